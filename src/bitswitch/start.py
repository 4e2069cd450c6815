"""The entry of the command: an interruption may come while it is imported."""

import os
import sys
from typing import NoReturn

from bitswitch.errors import UserError


def main() -> NoReturn:
    """Run the command line; an interruption while it loads ends with 130, a missing extra with a line and 2."""
    _open_streams()
    try:
        # Here, so that both can be caught.
        from bitswitch import cli
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        print(f"bitswitch: {error}", file=sys.stderr)
        sys.exit(2)
    cli.main()


def _open_streams() -> None:
    """What a shell closed (`>&-`) goes nowhere, and the next file that is opened is not taken for it."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, os.fdopen(number, "w"))
