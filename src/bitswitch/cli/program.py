"""The program: its commands, and how it exits.

What imports torch, which takes seconds, is imported by the commands that compute: help comes at once.
"""

import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import typer

from bitswitch.cli import artifacts, stages
from bitswitch.cli.console import emit, errors, output
from bitswitch.cli.words import Device, Json, Overrides, RecipeName, Report, Seed
from bitswitch.config import load_recipe, recipe_names, to_yaml
from bitswitch.errors import UserError
from bitswitch.version import __version__

# The base of every complaint about the words of a command; typer carries its own copy of click or takes it from outside.
_UsageError: Any = typer.BadParameter.__mro__[2]

_INTERRUPTED = 130

app = typer.Typer(
    name="bitswitch",
    help="One trained network, one stored 8-bit integer weight per parameter, every precision from it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, (_stages, _help) in stages.COMMANDS.items():
    app.command(_name, help=_help)(stages.command_of(_stages))
for _command in (artifacts.evaluate, artifacts.inspect, artifacts.export, artifacts.bench):
    app.command()(_command)
recipes_app = typer.Typer(help="List the built-in recipes.", invoke_without_command=True, rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes")


@recipes_app.callback()
def recipes(
    context: typer.Context, json_: Json = False, device: Device = "auto", seed: Seed = None, out: Report = None
) -> None:
    """List the built-in recipes."""
    if context.invoked_subcommand is None:
        emit({"recipes": recipe_names()}, json_, lambda: output.print("\n".join(recipe_names()), markup=False))


@recipes_app.command()
def show(
    name: RecipeName,
    overrides: Overrides = None,
    json_: Json = False,
    device: Device = "auto",
    seed: Seed = None,
    out: Report = None,
) -> None:
    """Print a recipe as it is resolved."""
    recipe = load_recipe(name, overrides or [], seed=seed)
    emit(recipe.model_dump(mode="json"), json_, lambda: output.print(to_yaml(recipe), markup=False, end=""))


@app.command()
def version(json_: Json = False) -> None:
    """The version of bitswitch."""
    emit({"version": __version__}, json_, lambda: output.print(__version__, markup=False))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line. Exit 0: done; 2: the user's mistake, told in one line; 1: our fault; 130: interrupted."""
    # A user's own package.module:function is looked for where the command is typed; after all else, since a file there that is
    # named as a library is would be run in its place.
    sys.path.append("")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # What a command returns is None; a number comes from typer, for --help or an interruption.
        code = app(args=given or ["--help"], standalone_mode=False) or 0
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
    except UserError as error:
        code = _fail(str(error))
    except _UsageError as error:
        code = _fail(error.format_message() or "bitswitch --help lists the commands")
    except (typer.Abort, KeyboardInterrupt):
        # A second one, out of impatience, is to change nothing.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        errors.print("interrupted; the same command goes on from the last checkpoint", markup=False)
        code = _INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        code = _fail(f"another process ended: see what it said ({reason})") if _is_lost_peer(error) else _fault()
    except Exception:
        code = _fault()
    sys.exit(code)


def _is_lost_peer(error: RuntimeError) -> bool:
    from bitswitch.training import distributed

    return distributed.is_lost_peer(error)


def _fault() -> int:
    traceback.print_exc()
    errors.print("this is a fault of bitswitch, not yours; please report it with the lines above", markup=False)
    return 1


def _fail(message: str) -> int:
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(message.split()))
    errors.print(f"bitswitch: {line}", markup=False)
    return 2
