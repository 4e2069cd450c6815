"""The entry of the command: it takes seconds to import torch, and an interruption may come then."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; an interruption while it loads ends with 130."""
    try:
        # Here, so that the interruption can be caught.
        from bitswitch import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()
