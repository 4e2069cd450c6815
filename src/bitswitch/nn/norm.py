"""One batch normalization per width."""

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from bitswitch.nn.layers import QuantizedLayer

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class SwitchableBatchNorm(nn.Module):
    """A batch normalization for every width of the layer that it follows (arXiv 2502.01199, section 3).

    Args:
        norm: the float network's, with which every width starts.
        widths: candidate widths, highest first.
        follows: the quantized layer whose width selects.
    """

    def __init__(self, norm: nn.Module, widths: Sequence[int], follows: QuantizedLayer) -> None:
        super().__init__()
        self.by_width = nn.ModuleDict({str(width): copy.deepcopy(norm) for width in widths})
        # In a tuple, so that torch does not take the layer for a child; a deep copy still carries the tie along.
        self._follows = (follows,)
        self.train(norm.training)

    @property
    def follows(self) -> QuantizedLayer:
        """The quantized layer whose width selects."""
        return self._follows[0]

    def forward(self, x: Tensor) -> Tensor:
        """Normalize at the width in use; the other widths' statistics and parameters are not touched."""
        return self.by_width[str(self.follows.width)](x)
