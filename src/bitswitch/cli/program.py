"""The program: its commands, and how it exits.

What imports torch, which takes seconds, is imported by the commands that compute: help comes at once.
"""

import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import typer

from bitswitch.cli import artifacts, stages
from bitswitch.cli.console import StdoutRefused, emit, errors, output, printable
from bitswitch.cli.words import Device, Json, Overrides, RecipeName, Report, Seed
from bitswitch.config import load_recipe, recipe_names, to_yaml
from bitswitch.errors import UserError
from bitswitch.version import __version__

# The base of every complaint about the words of a command; typer carries its own copy of click or takes it from outside.
_UsageError: Any = typer.BadParameter.__mro__[2]

_INTERRUPTED = 130

app = typer.Typer(
    name="bitswitch",
    help="One trained network, one stored integer per quantized weight, every precision from it.",
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
    if context.invoked_subcommand is not None:
        if json_ or device != "auto" or seed is not None or out is not None:
            raise UserError(f"options of bitswitch recipes {context.invoked_subcommand} are given behind its name")
    else:
        names = recipe_names()
        emit({"recipes": names}, json_, lambda: output.print("\n".join(names)), out and out / "recipes.json")


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
    document = recipe.model_dump(mode="json")
    emit(document, json_, lambda: output.print(to_yaml(recipe), end=""), out and out / "recipe.json")


@app.command()
def version(json_: Json = False, device: Device = "auto", seed: Seed = None, out: Report = None) -> None:
    """The version of bitswitch."""
    emit({"version": __version__}, json_, lambda: output.print(__version__), out and out / "version.json")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line. Exit 0: done; 2: the user's mistake, told in one line; 1: our fault; 130: interrupted."""
    # A user's own package.module:function is looked for where the command is typed; after all else, since a file there that is
    # named as a library is would be run in its place.
    sys.path.append("")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A pipe may have an encoding that lacks a letter of somebody's path.
        sys.stdout.reconfigure(errors="backslashreplace")
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
        errors.print(_interrupted(given))
        code = _INTERRUPTED
    except StdoutRefused as error:
        # What is left in its buffer cannot be written, of which Python would complain at its end.
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123 (a device)
            os.dup2(nowhere.fileno(), 1)
        code = 0 if error.gone else _fail(f"cannot write to stdout: {error.reason}")
    except RuntimeError as error:
        told = _of_another_process(error, given)
        code = _fault() if told is None else _fail(told)
    except Exception:
        code = _fault()
    sys.exit(code)


def _interrupted(given: Sequence[str]) -> str:
    if given[:1] and given[0] not in stages.COMMANDS:
        return "interrupted"
    # Said again, --fresh throws away what this command did.
    fresh = "starts over; without --fresh it " if "--fresh" in given else ""
    return f"interrupted; the same command {fresh}goes on from the last checkpoint, or the last stage that is done"


def _of_another_process(error: RuntimeError, given: Sequence[str]) -> str | None:
    """What to tell of a process whose end stopped this one; None where none did."""
    from bitswitch.training import distributed

    reason = str(error).splitlines()[0] if str(error) else ""
    # torch's own words; its handler raises wherever this process happens to be.
    if reason.startswith("DataLoader worker"):
        fewer = ", or use fewer with data.workers, 0 for none" if given[:1] and given[0] in stages.COMMANDS else ""
        return (
            f"a process that reads images ended ({reason}): where memory or shared memory is short (/dev/shm; of a container "
            f"--shm-size), give more{fewer}"
        )
    return f"another process ended: see what it said ({reason})" if distributed.is_lost_peer(error) else None


def _fault() -> int:
    traceback.print_exc()
    errors.print("this is a fault of bitswitch, not yours; please report it with the lines above")
    return 1


def _fail(message: str) -> int:
    errors.print(f"bitswitch: {printable(' '.join(message.split()))}")
    return 2
