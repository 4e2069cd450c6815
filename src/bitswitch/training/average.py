"""The moving average of a network in training."""

import copy

import torch
from torch import Tensor, nn

_STATISTICS = ("running_mean", "running_var")


class MovingAverage:
    """`a <- d a + (1 - d) p` after every step, of parameters and statistics of batch normalization; the rest is copied.

    d is min(decay, (1 + t) / (10 + t)) at step t, so that the start, which low widths are far from, is soon forgotten.

    Args:
        model: in training; the average starts as a copy of it, and follows its tensors.
        decay: what d grows to, between 0 and 1.

    Attributes:
        model: the average, a network of its own.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model)
        self.decay = decay
        pairs: list[tuple[Tensor, Tensor]] = list(zip(self.model.parameters(), model.parameters(), strict=True))
        others: list[tuple[Tensor, Tensor]] = []
        for (name, own), followed in zip(self.model.named_buffers(), model.buffers(), strict=True):
            # An index must not be averaged, nor a mask that holds infinities.
            (pairs if name.rpartition(".")[2] in _STATISTICS else others).append((own, followed))
        self._moving, self._followed = [own for own, _ in pairs], [one for _, one in pairs]
        self._copied, self._given = [own for own, _ in others], [one for _, one in others]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in what the network is after a step, the first of which is 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._moving, self._followed, 1 - decay)
        if self._copied:
            torch._foreach_copy_(self._copied, self._given)
