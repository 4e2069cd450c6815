"""What the stages of one command share, and the networks and data that a recipe names."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from bitswitch.config import EnginePart, Recipe
from bitswitch.data import DataSet, Shown, load_data, unseen
from bitswitch.errors import UserError
from bitswitch.models import build, load_weights
from bitswitch.nn import Plan, apply, quantize
from bitswitch.rundir import RunDirectory
from bitswitch.training import Engine, World, load_checkpoint
from bitswitch.training.distributed import broadcast_model, share_batch_norm

# Where data lie and how they are read: no result depends on it. What they are counts, by their fingerprint.
NOT_OF_THE_RESULT = ("root", "download", "workers", "cache")


class Reporter(Protocol):
    """Where a run tells how it goes."""

    def note(self, text: str) -> None:
        """A line."""

    def progress(self, stage: str, steps: int, done: int) -> AbstractContextManager[Callable[[str], None]]:
        """A progress bar over all steps of a stage; the function it gives advances by one and shows a text."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the stages of one command share.

    Attributes:
        name: of the recipe, for provenance.
        typed: the recipe as it was typed, for advice.
        recipe: the checked configuration.
        directory: where results go.
        device: where tensors live.
        reporter: where the run tells how it goes; silent on ranks other than the first.
        world: this process among the others.
        tensorboard: write metrics for TensorBoard, too.
    """

    name: str
    typed: str
    recipe: Recipe
    directory: RunDirectory
    device: torch.device
    reporter: Reporter
    world: World = field(default_factory=World)
    tensorboard: bool = False


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, else the CPU; "cuda" is the rank's own GPU.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"--device {name}: bitswitch computes on cpu or cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: there is no such device here; use cpu") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def shown_by(reporter: Reporter) -> Shown:
    """What shows on a reporter how far a loop over parts is."""

    def shown(what: str, parts: Iterable[Any], count: int) -> Iterator[Any]:
        with reporter.progress(what, count, 0) as advance:
            for part in parts:
                advance("")
                yield part

    return shown


def open_data(recipe: Recipe, shown: Shown = unseen) -> DataSet:
    """The recipe's data, with its own mean and standard deviation where the recipe gives them.

    Args:
        recipe: that names them.
        shown: see `load_data`.
    """
    part = recipe.data.model_dump()
    own: dict[str, Any] = {key: tuple(value) for key in ("mean", "std") if (value := part.pop(key)) is not None}
    data = load_data(**part, shown=shown)
    return data.with_preprocessing(dataclasses.replace(data.preprocessing, **own)) if own else data


def engine(run: Run, part: EnginePart) -> Engine:
    """How a part of the recipe computes."""
    return Engine(
        precision=part.precision,
        channels_last=part.channels_last,
        compile=part.compile,
        micro_batches=part.micro_batches,
        world=run.world,
    )


def join_ranks(run: Run, model: nn.Module, part: EnginePart) -> None:
    """The same start on all ranks, and statistics that they share if the recipe says so."""
    broadcast_model(model, run.world)
    if part.share_batch_norm:
        share_batch_norm(model, run.world)


def float_network(run: Run, data: DataSet) -> nn.Module:
    """The network as the pretrain stage left it."""
    network = build(**about(run, data)["network"])
    load_weights(network, run.directory.checkpoint("pretrain"))
    return network


def from_checkpoint(run: Run, data: DataSet, stage: str) -> nn.Module:
    """The quantized network as a stage's checkpoint holds it.

    Raises:
        UserError: it is not a checkpoint of that stage.
    """
    path = run.directory.checkpoint(stage)
    state = load_checkpoint(path)
    try:
        model = apply(float_network(run, data), Plan.from_json(state["plan"]))
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is not a checkpoint of stage {stage}: do it again with --fresh") from error
    return model


def build_network(recipe: Recipe, data: DataSet) -> nn.Module:
    """The recipe's float network; the number of classes comes from the data.

    Raises:
        UserError: there is no such network, or its weights cannot be had.
    """
    return build(recipe.model.name, _network_args(recipe, data))


def _network_args(recipe: Recipe, data: DataSet) -> dict[str, Any]:
    args = dict(recipe.model.args)
    if ":" not in recipe.model.name:
        args.setdefault("num_classes", len(data.classes))
    return args


def about(run: Run, data: DataSet) -> dict[str, Any]:
    """What a reader of a checkpoint or artifact needs to use it."""
    args = _network_args(run.recipe, data)
    # Trained weights to start from are no part of the architecture, and would be fetched again.
    args.pop("weights", None)
    return {
        "network": {"name": run.recipe.model.name, "args": args},
        "preprocessing": data.preprocessing.to_json(),
        "classes": list(data.classes),
        "data": data.name,
        "data_config": run.recipe.data.model_dump(mode="json", exclude=set(NOT_OF_THE_RESULT)),
    }


def quantized(run: Run, data: DataSet, network: nn.Module, *, images: int) -> nn.Module:
    """The quantized copy, its activation scales started from the first training images."""
    part = run.recipe.train
    return quantize(
        network,
        example_inputs=data.sample(images),
        bits=run.recipe.bits,
        keep=part.keep,
        method=part.method,
        per_channel=part.per_channel,
        scale_form=part.scale_form,
        lsq_factor=part.lsq_factor,
    )
