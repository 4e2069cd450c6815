"""`python -m bitswitch.report DOCUMENT RESULTS`: write the tables of a folder of result files into a document."""

import sys

from bitswitch.errors import UserError
from bitswitch.report.tables import update

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m bitswitch.report DOCUMENT RESULTS")
    try:
        update(sys.argv[1], sys.argv[2])
    except UserError as error:
        sys.exit(f"bitswitch: {error}")
