"""The command line: parse, call, print, exit."""

from bitswitch.errors import require

for _module in ("typer", "yaml", "pydantic", "torch"):
    require(_module, "train")

from bitswitch.cli.program import main  # noqa: E402

__all__ = ["main"]
