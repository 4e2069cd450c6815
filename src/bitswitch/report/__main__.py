"""`python -m bitswitch.report DOCUMENT RESULTS`: tables of a folder of result files, into a document; and figures."""

import argparse
import sys

from bitswitch.errors import UserError
from bitswitch.report.plots import draw
from bitswitch.report.tables import update

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bitswitch.report", description=__doc__)
    parser.add_argument("document")
    parser.add_argument("results", help="folder of result files")
    parser.add_argument("--brief", action="store_true", help="what trainings decided, and nothing else")
    parser.add_argument("--figures", metavar="FOLDER", help="draw figures of the results there")
    options = parser.parse_args()
    try:
        update(options.document, options.results, brief=options.brief)
        if options.figures:
            draw(options.results, options.figures)
    except UserError as error:
        sys.exit(f"bitswitch: {error}")
