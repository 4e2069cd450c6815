"""The command line: parse, call, print, exit."""

import importlib.util

from bitswitch.errors import UserError

for _module in ("typer", "yaml", "pydantic", "torch"):
    # Looked for and not imported: torch takes seconds, and not every command needs it.
    if importlib.util.find_spec(_module) is None:
        raise UserError(f"{_module} is not installed: pip install 'bitswitch[train]'")

from bitswitch.cli.program import main  # noqa: E402

__all__ = ["main"]
