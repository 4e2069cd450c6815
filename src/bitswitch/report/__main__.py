"""`python -m bitswitch.report DOCUMENT RESULTS [FIGURES]`: tables of a folder of result files, into a document; its figures."""

import sys

from bitswitch.errors import UserError
from bitswitch.report.plots import draw
from bitswitch.report.tables import update

if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python -m bitswitch.report DOCUMENT RESULTS [FIGURES]")
    try:
        update(sys.argv[1], sys.argv[2])
        if len(sys.argv) == 4:
            draw(sys.argv[2], sys.argv[3])
    except UserError as error:
        sys.exit(f"bitswitch: {error}")
