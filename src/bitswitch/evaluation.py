"""Evaluation of an artifact, a run's checkpoint or anybody's float weights on any data."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitswitch import artifact, files
from bitswitch.artifact import check_choice, within_budget
from bitswitch.assignment import Assignment
from bitswitch.data import DataSet, Shown, unseen
from bitswitch.data.cache import Cache, default_folder
from bitswitch.errors import UserError
from bitswitch.machine import machine, source_digest
from bitswitch.models import is_trusted
from bitswitch.nn import evaluating, quantized_layers
from bitswitch.subject import Subject, data_for, subject_of
from bitswitch.training import Score, World, evaluate, recalibrate
from bitswitch.training.distributed import from_first
from bitswitch.training.evaluate import PrecisionChoice, with_less_at_once

_BATCH = 256
# So many SubNets are scored in one pass over the data; their predictions are kept before the next pass.
_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How to score; see `evaluate_file`."""

    split: str
    device: torch.device
    world: World
    recalibration_images: int
    confusion: bool
    shown: Shown


def evaluate_file(
    path: str | Path,
    *,
    bits: Sequence[int] | None = None,
    assignment: str | None = None,
    data_name: str | None = None,
    split: str = "test",
    network: str | None = None,
    device: torch.device,
    world: World | None = None,
    recalibration_images: int = 0,
    confusion: bool = False,
    shown: Shown = unseen,
) -> dict[str, Any]:
    """Score a file at every width asked for, each batch visited once.

    Args:
        path: an artifact; a checkpoint of a stage; or anybody's checkpoint of float weights, which needs `network`.
        bits: widths; all that the file has where neither this nor `assignment` is given. Of an artifact that is cut off, all
            whose planes it holds.
        assignment: "frontier.json" (every choice), "frontier.json#3", a JSON file {layer: bits}, or a budget such as "avg<=4",
            for which the best choice of the artifact's own frontier is taken.
        data_name: a data name or an image folder; the data it was trained on where None.
        split: "test" or "val".
        network: its name where the file does not tell, or names the user's own code.
        device: where to compute.
        world: the ranks that share the images.
        recalibration_images: estimate batch normalization statistics anew from so many training images, at each width.
        confusion: add a matrix [class, predicted class] of counts to every result.
        shown: passes on the images that are read and the batches of a pass over the data, and shows how far it is.

    Returns:
        {"results": [{"bits", "assignment", "top1", "top5", "top1_interval", "loss", "images", "split", "data"}],
        "provenance": {...}}; "bits" is None for float weights and mixtures. Rows of a frontier also have "choice" and "cost",
        and where there are several "non_dominated": no other is as cheap in every cost and as accurate, and better in one.

    Raises:
        UserError: the file, the widths, the network or the data cannot be used.
    """
    path = artifact.located(path)
    subject = subject_of(path, network, None if assignment else bits)
    wanted = _wanted(path, subject, bits, assignment)
    name = data_name or subject.data
    if not name:
        raise UserError(f"{path} does not say what data it is for: give them with --data")
    data = data_for(path, name, subject, shown)
    if not data.size(split):
        raise UserError(
            f"{name} has no {split} images (of val a share of train, data.val_fraction): use another --split"
        )
    model, world = subject.model.to(device), world or World()
    _check_fits(path, model, data, split, device)
    plan = _Plan(
        split=split,
        device=device,
        world=world,
        recalibration_images=recalibration_images,
        confusion=confusion,
        shown=shown,
    )
    keys = {}
    # The user's own code may be another the next time, under the same name.
    if len(wanted) > 1 and not confusion and is_trusted(network or ""):
        views = f"{recalibration_images} augmented" if recalibration_images else ""
        about = [
            source_digest(),
            files.file_digest(path),
            data.fingerprint(),
            split,
            views,
            files.canonical_json(machine(device)),
        ]
        keys = {i: _key(about, one.precision) for i, one in enumerate(wanted) if one.choice is not None}
    scored, matrices = _scores(model, data, [one.precision for one in wanted], keys, plan)
    results = []
    for i, one in enumerate(wanted):
        row = {**one.names(), **scored[i], "split": split, "data": name}
        results.append(row | ({"confusion": matrices[i].tolist()} if confusion else {}))
    _mark_non_dominated([row for row in results if "choice" in row])
    provenance = dict(subject.provenance or {}) | {"evaluated_on": machine(device)}
    if recalibration_images:
        provenance["recalibration_images"] = recalibration_images
    return {"results": results, "provenance": provenance}


@torch.no_grad()
def _check_fits(path: Path, model: nn.Module, data: DataSet, split: str, device: torch.device) -> None:
    """Refuse a network that does not take images of this shape, in a line, before the data are gone through."""
    images, _ = next(data.evaluation_batches(split, batch_size=2, device=device))
    try:
        with evaluating(model):
            model(images)
    except torch.OutOfMemoryError:
        raise
    except TypeError:
        # Such as of a network that cannot be called with images alone: told of when it is scored.
        return
    except Exception as error:
        # Whatever the user's module does.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"the network of {path} does not take images of {list(images.shape[1:])}, as {data.name} has them ({reason}): give "
            "the data that it is for with --data, or the network that it is with --model"
        ) from error


def _scores(
    model: nn.Module, data: DataSet, precisions: Sequence[PrecisionChoice], keys: Mapping[int, str], plan: _Plan
) -> tuple[dict[int, dict[str, Any]], dict[int, Tensor]]:
    """The score of every precision by its place, and its confusion matrix where one is asked for.

    Args:
        model: on the device.
        data: to score it on.
        precisions: to score it at.
        keys: {place: under what its predictions are kept, and are found if an earlier evaluation kept them}.
        plan: how.
    """
    device, world, images = plan.device, plan.world, plan.recalibration_images
    scored = _kept(keys, world)
    matrices: dict[int, Tensor] = {}
    # With statistics estimated anew, which mixtures share, each precision has a pass of its own.
    at_once = 1 if images else _AT_ONCE
    left = [i for i in range(len(precisions)) if i not in scored]
    for start in range(0, len(left), at_once):
        some = left[start : start + at_once]
        if images:
            recalibrate(model, training_views(data, images, device), precisions[some[0]])
        score = partial(_score, model, data, [precisions[i] for i in some], plan)
        scores, counts, predictions = with_less_at_once(score, _BATCH, device, world)
        scored |= dict(zip(some, map(dataclasses.asdict, scores), strict=True))
        matrices |= dict(zip(some, counts, strict=False))
        if world.first:
            for i, predicted in zip(some, predictions, strict=True):
                if i in keys:
                    Cache(default_folder()).write(keys[i], {"predicted": predicted}, scored[i])
    return scored, matrices


def _score(
    model: nn.Module, data: DataSet, precisions: Sequence[PrecisionChoice], plan: _Plan, images: int
) -> tuple[list[Score], list[Tensor], list[Tensor]]:
    """Scores, confusion matrices where they are asked for, and predictions, so many images at a time."""
    world = plan.world
    batches = data.evaluation_batches(
        plan.split, batch_size=images, device=plan.device, rank=world.rank, world=world.size
    )
    counts: list[Tensor] = []
    predictions: list[Tensor] = []
    scores = evaluate(
        model,
        plan.shown("evaluate", batches, -(-data.size(plan.split) // (images * world.size))),
        precisions,
        world=world,
        classes=len(data.classes),
        confusion=counts if plan.confusion else None,
        predictions=predictions,
    )
    return scores, counts, predictions


def _key(about: Sequence[str], precision: Any) -> str:
    return f"predictions-{files.digest(files.canonical_json([*about, dict(precision)]).encode())}"


def _kept(keys: Mapping[int, str], world: World) -> dict[int, dict[str, Any]]:
    """The scores of SubNets whose predictions an earlier evaluation kept, by their place."""
    found: dict[int, dict[str, Any]] = {}
    if world.first:
        for i, key in keys.items():
            if (kept := Cache(default_folder()).read(key)) is not None:
                found[i] = {field.name: kept[1][field.name] for field in dataclasses.fields(Score)}
    return from_first(found, world)


def _mark_non_dominated(rows: Sequence[dict[str, Any]]) -> None:
    def beaten(row: dict[str, Any], by: dict[str, Any]) -> bool:
        pairs = [(row["cost"][name], by["cost"][name]) for name in row["cost"] if name in by["cost"]]
        pairs.append((-row["top1"], -by["top1"]))
        return all(theirs <= own for own, theirs in pairs) and any(theirs < own for own, theirs in pairs)

    for row in rows if len(rows) > 1 else ():
        row["non_dominated"] = not any(beaten(row, other) for other in rows)


@dataclass(frozen=True)
class Wanted:
    """A precision to evaluate; for a choice of a frontier its number and costs, too."""

    precision: int | Mapping[str, int] | None
    choice: int | None = None
    cost: Mapping[str, float] | None = None

    def names(self) -> dict[str, Any]:
        """How its row begins."""
        mixed = isinstance(self.precision, Mapping)
        row: dict[str, Any] = {"bits": None if mixed else self.precision, "assignment": None}
        if isinstance(self.precision, Mapping):
            row["assignment"] = dict(self.precision)
        return row if self.cost is None else row | {"choice": self.choice, "cost": dict(self.cost)}


def _wanted(path: str | Path, subject: Subject, bits: Sequence[int] | None, assignment: str | None) -> list[Wanted]:
    if not subject.widths:
        if bits or assignment:
            raise UserError(f"{path} holds float weights and has no widths: leave --bits and --assignment out")
        return [Wanted(None)]
    if bits and len(set(bits)) < len(bits):
        raise UserError(f"--bits {','.join(map(str, bits))}: name each width once")
    for width in bits or ():
        if width not in subject.widths:
            raise UserError(f"{path} has no width {width}: it has {', '.join(map(str, subject.widths))}")
    held, mixed = subject.held or subject.widths, []
    if assignment is not None:
        layers = list(quantized_layers(subject.model))
        mixed = assignments_named(assignment, layers, subject.widths, subject.frontier, held[0])
    return [*map(Wanted, bits or (() if mixed else held)), *mixed]


def assignments_named(
    text: str,
    layers: Sequence[str],
    widths: Sequence[int],
    frontier: Sequence[Mapping[str, Any]],
    rest: int,
) -> list[Wanted]:
    """What `--assignment` names: see `evaluate_file`.

    Args:
        text: as it was typed.
        layers: of the network that are quantized.
        widths: that they can have, highest first.
        frontier: of the artifact.
        rest: the width of layers that a JSON file of widths does not name: the highest that the file holds. Choices with
            higher ones, of a file that was cut off, are left out.

    Raises:
        UserError: there is no such file or choice, or it is of another network, or needs bits that were cut off.
    """
    if "<=" in text:
        choice = within_budget(frontier, text, rest)
        return [Wanted(choice["assignment"], list(frontier).index(choice), choice["cost"])]
    file, hash_, number = text.rpartition("#")
    if not hash_ or "/" in number or "." in number:
        # The sign is of a folder's or a file's name.
        file, hash_, number = text, "", ""
    found = files.read_json(file)
    if not isinstance(found, dict) or "choices" not in found:
        if hash_:
            raise UserError(f"--assignment {text}: {file} has no choices to number; leave #{number} out")
        one = Assignment.from_json(found)
        candidates = dict.fromkeys(layers, tuple(widths))
        return [Wanted(Assignment.of(one, layers=dict.fromkeys(layers, rest), widths=candidates))]
    try:
        choices = [check_choice(choice, layers, widths) for choice in found["choices"]]
    except (TypeError, UserError) as error:
        raise UserError(f"--assignment {file}: {error}") from error
    if not choices:
        raise UserError(f"--assignment {text}: {file} holds no choices: bitswitch search RECIPE makes them")
    # Python refuses to read numbers of thousands of digits.
    if hash_ and (not number.isdecimal() or len(number) > 9 or int(number) >= len(choices)):
        raise UserError(f"--assignment {text}: {file} has choices #0 to #{len(choices) - 1}")
    held = [
        i for i in ([int(number)] if hash_ else range(len(choices))) if max(choices[i]["assignment"].values()) <= rest
    ]
    if not held:
        raise UserError(
            f"--assignment {text}: the artifact was cut off and holds {rest} bits at most, which is too few"
        )
    return [Wanted(choices[i]["assignment"], i, choices[i]["cost"]) for i in held]


def training_views(data: DataSet, count: int, device: torch.device) -> list[Tensor]:
    """Batches of `count` training images in all, augmented as training sees them, the same every time.

    Where the data have fewer, they come again, augmented otherwise. Shifts bring black borders into the statistics that the
    network was trained with; those of the bare images are others.
    """
    views: list[Tensor] = []
    # Batches count alike in the statistics, so that they are as equal as whole ones of one size can be.
    most = min(_BATCH, data.size("train") or _BATCH)
    size = -(-count // -(-count // most))
    stream = data.training_batches(batch_size=size, seed=0, device=device)
    for images, _ in itertools.chain.from_iterable(map(stream.epoch, itertools.count())):
        views.append(images[: count - sum(map(len, views))])
        if sum(map(len, views)) == count:
            break
    return views
