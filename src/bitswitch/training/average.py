"""The moving average of a network in training."""

import copy

import torch
from torch import Tensor, nn

_STATISTICS = ("running_mean", "running_var")


class MovingAverage:
    """`a <- decay a + (1 - decay) p` after every step, of parameters and statistics of batch normalization; the rest is copied.

    Args:
        model: in training; the average starts as a copy of it, and follows its tensors.
        decay: between 0 and 1.

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
    def update(self) -> None:
        """Take in what the network is now."""
        torch._foreach_lerp_(self._moving, self._followed, 1 - self.decay)
        if self._copied:
            torch._foreach_copy_(self._copied, self._given)
