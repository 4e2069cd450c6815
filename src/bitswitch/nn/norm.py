"""Batch normalizations of their own for every width, or for every pair of widths."""

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from bitswitch.nn.layers import QuantizedLayer

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_READ = frozenset(
    {
        *("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "eps", "momentum", "num_features"),
        *("affine", "track_running_stats"),
    }
)


class SwitchableBatchNorm(nn.Module):
    """A batch normalization for every width of the layer that it follows (arXiv 2502.01199, section 3).

    Args:
        norm: the float network's, with which every width starts.
        follows: the quantized layer whose width selects.

    Attributes:
        variants: the batch normalizations, by `key`.
    """

    def __init__(self, norm: nn.Module, follows: QuantizedLayer) -> None:
        super().__init__()
        # In a tuple, so that torch does not take the layer for a child; a deep copy still carries the tie along.
        self._follows = (follows,)
        self.variants = nn.ModuleDict({key: copy.deepcopy(norm) for key in self._keys()})
        self.train(norm.training)

    def __getattr__(self, name: str) -> Any:
        # A network may read the tensors of its normalization itself.
        if name not in _READ:
            return super().__getattr__(name)
        variants: Any = super().__getattr__("variants")
        return getattr(variants[self.key], name)

    def __setattr__(self, name: str, value: Any) -> None:
        # A network may set them itself, in its own train() for one, and means every width.
        if name in ("eps", "momentum"):
            for variant in self.variants.values():
                setattr(variant, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def follows(self) -> QuantizedLayer:
        """The quantized layer whose width selects."""
        return self._follows[0]

    @property
    def key(self) -> str:
        """The name of the variant in use."""
        return str(self.follows.width)

    def _keys(self) -> Iterable[str]:
        return map(str, self.follows.widths)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize at the width in use; the other variants' statistics and parameters are not touched."""
        return self.variants[self.key](input)


class TransitionalBatchNorm(SwitchableBatchNorm):
    """A batch normalization for every pair (width of the layer before, width of the layer that it follows).

    Bit-Mixer (ICCV 2021); arXiv 2502.01199, section 5. The layer before is the quantized one that ran last among those whose
    output reaches the layer that it follows; without one the pair is ("float", width).

    Args:
        norm: the float network's, or one for each width, with which every pair starts.
        follows: the quantized layer here.
        before: the quantized layer before it, or None.
    """

    def __init__(self, norm: nn.Module, follows: QuantizedLayer, before: QuantizedLayer | None) -> None:
        nn.Module.__init__(self)
        self._follows = (follows,)
        self._before = (before,)
        self.variants = nn.ModuleDict()
        for key in self._keys():
            started = norm.variants[key.partition(">")[2]] if isinstance(norm, SwitchableBatchNorm) else norm
            self.variants[key] = copy.deepcopy(started)
        self.train(norm.training)

    @property
    def before(self) -> QuantizedLayer | None:
        """The quantized layer before the one that it follows."""
        return self._before[0]

    @property
    def key(self) -> str:
        """The name of the variant in use: "4>8", 4 bits before and 8 here."""
        before = self._before[0]
        return f"{'float' if before is None else before.width}>{self._follows[0].width}"

    def _keys(self) -> Iterable[str]:
        before, here = self._before[0], self._follows[0]
        if before is here:
            # One layer that runs several times has one width.
            return [f"{width}>{width}" for width in here.widths]
        left = ["float"] if before is None else before.widths
        return [f"{first}>{second}" for first in left for second in here.widths]
