"""Accuracy at every width, in one pass over the data."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.nn import functional as F

from bitswitch.errors import UserError
from bitswitch.nn import evaluating, switched
from bitswitch.training.distributed import World, gather

PrecisionChoice = int | Mapping[str, int] | None
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one precision reached.

    Attributes:
        top1, top5: per cent of images.
        top1_interval: Wilson's 95 % interval of top1, in per cent.
        loss: mean cross-entropy.
        images: how many were counted.
    """

    top1: float
    top5: float
    top1_interval: tuple[float, float]
    loss: float
    images: int


def with_less_at_once(score: Callable[[int], Result], images: int, device: torch.device, world: World) -> Result:
    """Score so many images at a time, or half as many, and so on, where memory does not suffice.

    Args:
        score: given how many, goes over the data from the start.
        images: how many at first.
        device: that is named where one image is too much.
        world: the ranks; of several, which would have to agree, none tries again.

    Raises:
        UserError: memory does not suffice for one image, or not on one of several ranks.
    """
    while True:
        try:
            return score(images)
        except torch.OutOfMemoryError as error:
            if images == 1 or world.size > 1:
                raise UserError(
                    f"{device} is out of memory when {images} images at a time are scored: free some of it, or use another "
                    "--device" + (", or one process, which tries fewer" if world.size > 1 else "")
                ) from error
        images //= 2


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    precisions: Sequence[PrecisionChoice],
    *,
    forward: Callable[[Tensor], Tensor] | None = None,
    world: World | None = None,
    classes: int | None = None,
    confusion: list[Tensor] | None = None,
    predictions: list[Tensor] | None = None,
) -> list[Score]:
    """Score `model` at every precision, each batch visited once.

    Args:
        model: a network; evaluated in eval mode, its modes and widths are restored.
        batches: (images, labels) on the model's device; with several ranks, every `world.size`-th from this rank's own.
        precisions: widths or assignments; None runs the model as it is (a float network).
        forward: how to call the model; itself where None.
        world: the ranks that share the batches; sums are in the order of batches, the same for any number of ranks.
        classes: how many the data have, where a network of another number is to be refused.
        confusion: where a list is given, a matrix [class, predicted class] of counts is appended for each precision, int64.
        predictions: where a list is given, the predicted class of every image is appended for each precision, int32 [images].

    Returns:
        One score for each precision, the same on all ranks.

    Raises:
        UserError: the network does not give logits for images alone, or none that are finite; there are no images, or their
            classes are not the network's.
    """
    if isinstance(precisions, (int, str, Mapping)) or not len(precisions):
        raise UserError(f"precisions={precisions!r}: give a list of widths or assignments, such as [8, 2]")
    world = world or World()
    forward = model if forward is None else forward
    rows: list[Tensor] = []
    counts: list[Tensor] = []
    classes_seen: list[Tensor] = []
    with evaluating(model):
        for x, y in batches:
            found: list[Tensor] = []
            predicted: list[Tensor] = []
            for i, precision in enumerate(precisions):
                with switched(model, precision) if precision is not None else nullcontext():
                    logits = _logits(forward, x)
                if not i:
                    _check_classes(logits, y, classes)
                best = logits.argmax(1)
                found.append(_totals(logits, y, best))
                if confusion is not None:
                    _count(counts, i, y, best, logits.shape[1])
                if predictions is not None:
                    predicted.append(best.int())
            rows.append(torch.stack(found))
            if predictions is not None:
                classes_seen.append(torch.stack(predicted))
    scores = _scores([row.flatten().tolist() for row in rows], precisions, world)
    if confusion is not None:
        ranks = gather([[matrix.cpu() for matrix in counts]], world)
        confusion += [torch.stack(matrices).sum(0) for matrices in zip(*filter(None, ranks), strict=True)]
    if predictions is not None:
        own = [(world.rank + i * world.size, part.cpu()) for i, part in enumerate(classes_seen)]
        predictions += torch.cat([part for _, part in sorted(gather(own, world), key=lambda pair: pair[0])], 1).unbind()
    return scores


def _logits(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    try:
        logits = forward(x)
    except TypeError as error:
        # Python's own words.
        if "positional argument" not in str(error):
            raise
        raise UserError(
            f"the network cannot be called with images alone ({error}): score a function that wraps it"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
        given = f"a tensor {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(
            f"the network gives {given} for {len(x)} images, and a tensor of logits, [images, classes], is needed: score a "
            "function that wraps it"
        )
    return logits.float()


def _check_classes(logits: Tensor, y: Tensor, classes: int | None) -> None:
    known = logits.shape[1]
    if classes is not None and classes != known:
        raise UserError(f"the data have {classes} classes, the network tells {known} apart")
    # Labels of a data set are below its number of classes: nothing to wait for.
    if classes is None and int(y.max()) >= known:
        raise UserError(f"the data have a class {int(y.max())}, the network has only {known} classes")


def _totals(logits: Tensor, y: Tensor, best: Tensor) -> Tensor:
    """[4]: correct at 1, correct within 5, summed loss, images; float64, which holds counts exactly."""
    # Not the first of the top five, which may be another where logits are equal: predictions and confusions are argmax's.
    right = best == y
    among = right | (logits.topk(min(5, logits.shape[1])).indices == y[:, None]).any(1)
    loss = F.cross_entropy(logits, y, reduction="sum").double()
    return torch.stack([right.sum().double(), among.sum().double(), loss, torch.full_like(loss, len(y))])


def _count(counts: list[Tensor], i: int, y: Tensor, best: Tensor, classes: int) -> None:
    if len(counts) == i:
        counts.append(torch.zeros(classes, classes, dtype=torch.long, device=y.device))
    counts[i] += torch.bincount(y * classes + best, minlength=classes**2).view(classes, classes)


def _name(precision: PrecisionChoice) -> str:
    return f"{precision} bits" if isinstance(precision, int) else "a mixture of widths"


def _scores(own: list[list[float]], precisions: Sequence[PrecisionChoice], world: World) -> list[Score]:
    """Add up all ranks' batches in the order of the batches, whatever rank each was on."""
    tagged = [[float(world.rank + i * world.size), *row] for i, row in enumerate(own)]
    rows = sorted(gather(tagged, world))
    if not rows:
        raise UserError("there are no images to evaluate")
    sums = [sum(column) for column in zip(*rows, strict=True)][1:]
    scores = []
    for i in range(len(precisions)):
        top1, top5, loss, images = sums[4 * i : 4 * i + 4]
        if not math.isfinite(loss):
            where = "" if precisions[i] is None else f" at {_name(precisions[i])}"
            raise UserError(
                f"the network's outputs{where} are not finite numbers: its weights have diverged or are damaged"
            )
        interval = binomtest(int(top1), int(images)).proportion_ci(method="wilson")
        scores.append(
            Score(
                top1=100 * top1 / images,
                top5=100 * top5 / images,
                top1_interval=(100 * float(interval.low), 100 * float(interval.high)),
                loss=loss / images,
                images=int(images),
            )
        )
    return scores
