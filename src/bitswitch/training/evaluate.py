"""Accuracy at every width, in one pass over the data."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitswitch.errors import UserError
from bitswitch.nn import switched


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one precision reached: top-1 and top-5 in per cent, mean cross-entropy, how many images were counted."""

    top1: float
    top5: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    precisions: Sequence[int | Mapping[str, int] | None],
) -> list[Score]:
    """Score `model` at every precision, each batch visited once.

    Args:
        model: a network; evaluated in eval mode, its mode and widths are restored.
        batches: (images, labels) on the model's device.
        precisions: widths or assignments; None runs the model as it is (a float network).

    Returns:
        One score for each precision.

    Raises:
        UserError: there are no images, or the labels do not fit the network's classes.
    """
    training = model.training
    model.eval()
    totals, images = None, 0
    try:
        for x, y in batches:
            rows = []
            for precision in precisions:
                with switched(model, precision) if precision is not None else nullcontext():
                    logits = model(x).float()
                if not images and int(y.max()) >= logits.shape[1]:
                    raise UserError(f"the data has class {int(y.max())}, the network only {logits.shape[1]} classes")
                hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
                loss = F.cross_entropy(logits, y, reduction="sum")
                rows.append(torch.stack([hits[:, 0].sum().double(), hits.sum().double(), loss.double()]))
            totals = torch.stack(rows) if totals is None else totals + torch.stack(rows)
            images += len(y)
    finally:
        model.train(training)
    if totals is None:
        raise UserError("there are no images to evaluate")
    return [
        Score(top1=100 * top1 / images, top5=100 * top5 / images, loss=loss / images, images=images)
        for top1, top5, loss in totals.tolist()
    ]
