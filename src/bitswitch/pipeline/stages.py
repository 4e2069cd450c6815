"""The stages: what each does, what its result depends on and what it makes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitswitch.config import Recipe
from bitswitch.data import DataSet
from bitswitch.pipeline import subnets, training
from bitswitch.pipeline.run import Run
from bitswitch.rundir import RunDirectory


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage.

    Attributes:
        work: does it; returns its result, plain JSON values, and the files that it made.
        config: the parts of the recipe that its result depends on.
        after: the stages whose product it reads.
        product: what stages after it read.
        part: of the recipe that must be there.
    """

    work: Callable[[Run, DataSet], tuple[dict[str, Any], list[Path]]]
    config: tuple[str, ...]
    after: tuple[str, ...]
    product: Callable[[RunDirectory], Path]
    part: str


def _checkpoint(stage: str) -> Callable[[RunDirectory], Path]:
    return lambda directory: directory.checkpoint(stage)


STAGES = {
    "pretrain": Stage(
        work=training.pretrain,
        config=("seed", "model", "data", "pretrain"),
        after=(),
        product=_checkpoint("pretrain"),
        part="pretrain",
    ),
    "train": Stage(
        work=training.train,
        config=("seed", "bits", "model", "data", "train"),
        after=("pretrain",),
        product=_checkpoint("train"),
        part="train",
    ),
    "sensitivity": Stage(
        work=subnets.sensitivity,
        config=("seed", "model", "data", "sensitivity"),
        after=("pretrain",),
        product=lambda directory: directory.sensitivity,
        part="sensitivity",
    ),
    "supernet": Stage(
        work=training.supernet,
        config=("seed", "bits", "model", "data", "supernet"),
        after=("train", "sensitivity"),
        product=_checkpoint("supernet"),
        part="supernet",
    ),
    "search": Stage(
        work=subnets.search,
        config=("seed", "bits", "model", "data", "search"),
        after=("supernet", "sensitivity"),
        product=lambda directory: directory.frontier,
        # Its SubNets are the SuperNet's.
        part="supernet",
    ),
}


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """The stages that a recipe asks for: those of mixed precision where it has a supernet part and is no rival's."""
    mixed = recipe.supernet is not None and recipe.train.method == "double_rounding"
    return tuple(STAGES) if mixed else ("pretrain", "train")


def needed(stages: Iterable[str]) -> list[str]:
    """These stages and all whose products they read, in order."""
    wanted = set(stages)
    for name in reversed(STAGES):
        if name in wanted:
            wanted |= set(STAGES[name].after)
    return [name for name in STAGES if name in wanted]
