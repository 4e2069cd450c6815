"""The stages of mixed precision: sensitivity and search."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitswitch import files
from bitswitch import search as room
from bitswitch.assignment import Assignment
from bitswitch.config import SearchPart
from bitswitch.data import DataSet
from bitswitch.errors import UserError
from bitswitch.nn import quantized_layers
from bitswitch.nn.plan import replace_attention
from bitswitch.pipeline.run import Run, engine, float_network, from_checkpoint
from bitswitch.pipeline.saving import save_artifact
from bitswitch.pipeline.training import traces_of
from bitswitch.training import evaluate
from bitswitch.training.evaluate import with_less_at_once

_EVALUATION_BATCH = 256
# So many SubNets are scored in one pass over val.
_AT_ONCE = 32

_Top1 = Callable[[Sequence[Assignment]], list[float]]


@dataclasses.dataclass(frozen=True)
class _FirstImages:
    """The first training images in batches, not augmented; can be gone through again and again.

    Batches count alike in a trace, so that they are as equal as whole ones of one size can be.
    """

    data: DataSet
    images: int
    batch_size: int
    device: torch.device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = -(-self.images // self.batch_size)
        size = -(-self.images // parts)
        left = self.images
        for x, y in self.data.evaluation_batches("train", batch_size=size, device=self.device):
            yield x[:left], y[:left]
            left -= len(x)
            if left <= 0:
                return


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def sensitivity(run: Run, data: DataSet) -> tuple[dict[str, Any], list[Path]]:
    """Traces of the float network's Hessian, for every convolution and linear layer, to sensitivity.json."""
    part = run.recipe.sensitivity
    model = float_network(run, data).to(run.device)
    # Attention is traced through the layers that `quantize` puts in its place.
    replace_attention(model)
    batches = _FirstImages(data, min(part.images, data.size("train")), part.batch_size, run.device)
    drawn = 0
    with run.reporter.progress("sensitivity", part.probes, 0) as advance:

        def tell(probes: int, error: float) -> None:
            nonlocal drawn
            for _ in range(drawn, probes):
                advance(f"greatest relative error {error:.2f} of {part.target:g}")
            drawn = probes

        traces = room.hessian_trace(
            model,
            _cross_entropy,
            batches,
            target=part.target,
            probes=part.probes,
            seed=run.recipe.seed,
            rank=run.world.rank,
            ranks=run.world.size,
            progress=tell,
        )
    weights = {name: weight.numel() for name, weight in model.named_parameters(remove_duplicate=False)}
    document = {
        "metric": "hessian",
        "loss": "cross-entropy",
        "data": data.name,
        "data_sha256": data.fingerprint(),
        "split": "train",
        "images": batches.images,
        "seed": run.recipe.seed,
        "probes": drawn,
        "layers": {
            name: {
                "trace": trace.mean,
                "standard_error": trace.standard_error,
                "weights": weights[f"{name}.weight" if name else "weight"],
            }
            for name, trace in traces.items()
        },
    }
    if run.world.first:
        files.write_json(run.directory.sensitivity, document)
    return {"probes": drawn}, [run.directory.sensitivity]


def check(run: Run, data: DataSet) -> None:
    """Refuse a search that cannot be done before anything else is.

    Raises:
        UserError: the latency table cannot be read, a budget names a cost that there is not, val is needed and empty, or a
            genetic search has less than one evaluation for each budget.
    """
    part = run.recipe.search
    if (part.damage == "accuracy" or part.genetic_evaluations) and not _val_images(run, data):
        raise UserError(
            "search.damage=accuracy and search.genetic_evaluations are measured on val, and there is none: set "
            "data.val_fraction and search.val_images"
        )
    budgets = part.points if part.budgets is None else len(part.budgets)
    if 0 < part.genetic_evaluations < budgets:
        raise UserError(
            f"search.genetic_evaluations={part.genetic_evaluations} are shared by {budgets} budgets: give at least "
            f"{budgets}, or fewer budgets (search.points, search.budgets)"
        )
    known = ["bits", "weight_bits", "bytes", "bitops"]
    if part.latency is not None:
        room.read_latency(part.latency)
        known.append("latency")
    wanted = room.as_budgets(part.budgets or ())
    least, greatest = min(run.recipe.bits), max(run.recipe.bits)
    for cost, most in itertools.chain.from_iterable(budget.items() for budget in wanted):
        if cost in ("bits", "weight_bits") and most < least:
            raise UserError(
                f"search.budgets: no assignment meets {cost} <= {most:g} (it can be from {least} to {greatest})"
            )
    for cost in itertools.chain([part.budget], *wanted):
        if cost not in known:
            more = "" if "latency" in known else ", and latency where search.latency names a table"
            raise UserError(f"search: no cost is named {cost!r}; there are {', '.join(known)}{more}")


def search(run: Run, data: DataSet) -> tuple[dict[str, Any], list[Path]]:
    """The programme's frontier, scored on val, to frontier.json and into the SuperNet's artifact."""
    part, supernet = run.recipe.search, run.recipe.supernet
    assert supernet is not None
    # In the memory format of its training, in which its artifact is held against it.
    model = engine(run, supernet).place(from_checkpoint(run, data, "supernet").to(run.device)).eval()
    layers = tuple(quantized_layers(model))
    budgets = part.points if part.budgets is None else len(part.budgets)
    passes = len(layers) * (len(run.recipe.bits) - 1) + 1 if part.damage == "accuracy" else 0
    with run.reporter.progress(
        "search", (passes + part.genetic_evaluations + budgets) * _steps(run, data), 0
    ) as advance:
        rows = _rows(run, data, model, part, partial(_top1, run, data, model, advance))
    if run.world.first:
        record = run.directory.records()["supernet"]
        save_artifact(run, data, model, run.directory.supernet, supernet, record["result"], rows)
        files.write_json(run.directory.frontier, {"split": "val", "damage": part.damage, "choices": rows})
    return {"choices": len(rows)}, [run.directory.frontier, run.directory.supernet]


def _rows(run: Run, data: DataSet, model: nn.Module, part: SearchPart, top1: _Top1) -> list[dict[str, Any]]:
    """The choices as they stand in frontier.json."""
    layers = tuple(quantized_layers(model))
    example = (data.sample(1).to(run.device),)
    latency = None if part.latency is None else room.read_latency(part.latency)
    costs = room.cost_tables(model, example, latency)
    if part.damage == "accuracy":
        damage = room.measured_damage(model, top1)
    else:
        damage = room.damage_table(model, traces_of(run, layers), part.damage)
    tied = [*part.tied, *(room.shared_inputs(model, example) if part.tie_shared_inputs else [])]
    problem = room.Problem(damage=damage, costs=costs, tied=tied)
    budgets = (
        room.budgets_between(problem, part.budget, part.points)
        if part.budgets is None
        else room.as_budgets(part.budgets)
    )
    choices = _choices(run, problem, budgets, part, top1)
    scored = _val_images(run, data) > 0
    scores = top1([choice.assignment for choice in choices]) if scored else [None] * len(choices)
    return [
        {
            "assignment": choice.assignment.to_json(),
            "cost": dict(choice.cost),
            "damage": choice.damage,
            "top1": score,
        }
        for choice, score in zip(choices, scores, strict=True)
    ]


def _choices(
    run: Run, problem: room.Problem, budgets: Sequence[Mapping[str, float]], part: SearchPart, top1: _Top1
) -> list[room.Choice]:
    """The frontier; with the programme's other solutions and the genetic search's best, where they are asked for."""
    found = {choice.assignment: choice for choice in room.frontier(problem, budgets)}
    least, more = divmod(part.genetic_evaluations, len(budgets))
    for i, budget in enumerate(budgets):
        if part.alternatives:
            found |= {choice.assignment: choice for choice in room.alternatives(problem, budget)}
        if share := least + (i < more):
            best, _ = room.refine(
                problem,
                budget,
                top1,
                evaluations=share,
                seed=run.recipe.seed,
            )[0]
            found[best.assignment] = best
    return sorted(found.values(), key=lambda choice: (choice.damage, *choice.cost.values()))


def _val_images(run: Run, data: DataSet) -> int:
    return min(run.recipe.search.val_images, data.size("val"))


def _steps(run: Run, data: DataSet) -> int:
    """How many batches of val this rank scores an assignment on."""
    batches = -(-_val_images(run, data) // _EVALUATION_BATCH)
    return len(range(run.world.rank, batches, run.world.size))


def _top1(
    run: Run, data: DataSet, model: nn.Module, advance: Callable[[str], None], assignments: Sequence[Assignment]
) -> list[float]:
    """Top-1 on the first images of val, for each assignment."""
    world = run.world

    def score(some: Sequence[Assignment], images: int) -> list[float]:
        def first() -> Iterator[tuple[Tensor, Tensor]]:
            most = _val_images(run, data)
            batches = data.evaluation_batches(
                "val", batch_size=images, device=run.device, rank=world.rank, world=world.size
            )
            for start, (x, y) in zip(range(world.rank * images, most, world.size * images), batches, strict=False):
                yield x[: most - start], y[: most - start]
                # Of smaller batches, all of a whole one count once.
                for _ in some if (start + images) % _EVALUATION_BATCH == 0 or start + images >= most else ():
                    advance("")

        return [score.top1 for score in evaluate(model, first(), some, world=world)]

    return [
        top1
        for start in range(0, len(assignments), _AT_ONCE)
        for top1 in with_less_at_once(
            partial(score, assignments[start : start + _AT_ONCE]), _EVALUATION_BATCH, run.device, world
        )
    ]
