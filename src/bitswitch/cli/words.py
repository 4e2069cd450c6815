"""The words that commands share: arguments, options, and the processes that torchrun started."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitswitch.artifact import located
from bitswitch.errors import UserError
from bitswitch.rundir import RunDirectory

if TYPE_CHECKING:
    import torch

    from bitswitch.training.distributed import World


def _local(text: str) -> Path:
    if "://" in text:
        raise typer.BadParameter(f"{text}: commands read files of this machine; bitswitch.load reads URLs")
    return located(text)


def _device(text: str) -> str:
    # Whether there is such a one here, the commands that compute ask torch.
    if not re.fullmatch(r"auto|(cpu|cuda)(:\d+)?", text):
        raise UserError(f"--device {text}: say auto, cpu, cuda or, of several, cuda:1")
    return text


RecipeName = Annotated[str, typer.Argument(help="A built-in recipe, or the path of a .yaml file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value ..., the values as YAML.")]
File = Annotated[
    Path,
    typer.Argument(
        parser=_local, metavar="FILE", help="An artifact or the name of a shipped one; evaluate takes checkpoints, too."
    ),
]
Bits = Annotated[str | None, typer.Option(help="Widths, such as 8,6,4,2; all where not given.")]
Mixture = Annotated[
    str | None,
    typer.Option("--assignment", help="frontier.json, frontier.json#3, a JSON file {layer: bits}, or avg<=4."),
]
DataName = Annotated[
    str | None, typer.Option("--data", help="A data name or the folder of the images; digits need none.")
]
Network = Annotated[str | None, typer.Option("--model", help="The network where the file does not name it.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        callback=_device,
        help="cpu, cuda, cuda:1; auto: CUDA where there is one. Used to train and to score.",
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="In place of the recipe's; a file has its own.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run directory; runs/<recipe> where it is not given.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Do these stages again whatever is there.")]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Write metrics for TensorBoard into the run directory.")
]
Report = Annotated[Path | None, typer.Option("--out", help="Also write the JSON document into this folder.")]


@contextlib.contextmanager
def ranks(device: str) -> Iterator["tuple[World, torch.device]"]:
    """This process among those that torchrun started, and its device."""
    from bitswitch import pipeline
    from bitswitch.training import distributed

    place = pipeline.choose_device(device, distributed.launched().local_rank)
    world = distributed.join(place.type)
    try:
        yield world, place
    finally:
        distributed.leave()


def run_directory(out: Path | None, recipe: str) -> RunDirectory:
    """The folder of --out, or that of a recipe where it is not given."""
    return RunDirectory(out or Path("runs") / Path(recipe).stem)


def widths_of(text: str | None) -> list[int] | None:
    """The widths of --bits; None where it is not given.

    Raises:
        UserError: they are no numbers.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--bits {text}: give widths with commas between them, such as 8,6,4,2") from error
