"""The entry of the command: an interruption may come while it is imported."""

import sys
from typing import NoReturn

from bitswitch.errors import UserError


def main() -> NoReturn:
    """Run the command line; an interruption while it loads ends with 130, a missing extra with a line and 2."""
    try:
        # Here, so that both can be caught.
        from bitswitch import cli
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        print(f"bitswitch: {error}", file=sys.stderr)
        sys.exit(2)
    cli.main()
