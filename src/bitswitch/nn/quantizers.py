"""The scales that are learned, and the quantizers that hold them.

Every width has parameters of its own, not a row of a stacked tensor: a parameter that took no part in a step has no
gradient, and every optimizer of torch leaves such a parameter, its momentum and its weight decay alone.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from bitswitch.codes import signed_range, unsigned_range
from bitswitch.numerics import bounded, double_round, learned_step, weight_codes
from bitswitch.numerics.scales import GREATEST_SCALE, LEAST_SCALE

InputKind = Literal["unsigned", "signed", "zero_point"]
ScaleForm = Literal["raw", "log"]


def input_range(kind: InputKind, bits: int) -> tuple[int, int]:
    """The least and the greatest activation code of a kind of quantizer at a width."""
    return signed_range(bits) if kind == "signed" else unsigned_range(bits)


class _Quantizer(nn.Module):
    """A quantizer whose scales are learned as they are ("raw") or as their logarithm ("log")."""

    def __init__(self, form: ScaleForm) -> None:
        super().__init__()
        self.form = form

    def _positive(self, parameter: Tensor) -> Tensor:
        """The scale that a parameter stands for: in [2^-30, 2^30], whatever an optimizer wrote into the parameter."""
        if self.form == "log":
            return bounded(parameter, math.log(LEAST_SCALE), math.log(GREATEST_SCALE)).exp()
        return bounded(parameter, LEAST_SCALE, GREATEST_SCALE)

    def _parameter_from(self, scale: Tensor) -> Tensor:
        return scale.log() if self.form == "log" else scale


class WeightQuantizer(_Quantizer):
    """Double rounding with one shared scale `s_h` for all widths (arXiv 2502.01199, section 3).

    Args:
        widths: candidate widths, highest first.
        shape: the scale's shape: () per tensor, or [out, 1, ...] per channel.
        form: what is learned, the scale or its logarithm.
        lsq_factor: multiply scale gradients by 1 / sqrt(N Qp).
    """

    def __init__(
        self, widths: tuple[int, ...], shape: Sequence[int], *, form: ScaleForm = "log", lsq_factor: bool = True
    ) -> None:
        super().__init__(form)
        self.widths = widths
        self.lsq_factor = lsq_factor
        self.scale_parameter = nn.Parameter(self._parameter_from(torch.ones(tuple(shape))))

    @property
    def high(self) -> int:
        """The width of the stored codes."""
        return self.widths[0]

    def scale(self) -> Tensor:
        """`s_h`, always positive and finite."""
        return self._positive(self.scale_parameter)

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Start at `scale`."""
        self.scale_parameter.copy_(self._parameter_from(scale))

    def codes(self, weight: Tensor) -> Tensor:
        """The stored integers q_h of `weight`: int8, the same shape."""
        return weight_codes(weight, self.scale(), self.high)

    def forward(self, weight: Tensor, width: int) -> Tensor:
        """`weight` as it is at `width` bits, float, with gradients to itself and to the scale."""
        return double_round(weight, self.scale(), high=self.high, low=width, lsq_factor=self.lsq_factor)


class ActivationQuantizer(_Quantizer):
    """One learned scale (and offset) for every width (LSQ, arXiv 1902.08153; zero-point integer).

    Args:
        widths: candidate widths, highest first.
        kind: "unsigned" [0, 2^b - 1]; "signed" [-2^(b-1), 2^(b-1) - 1]; "zero_point" unsigned with an integer zero-point.
        form: what is learned, the scale or its logarithm.
        lsq_factor: multiply scale gradients by 1 / sqrt(N Qp).
    """

    def __init__(
        self, widths: tuple[int, ...], kind: InputKind, *, form: ScaleForm = "log", lsq_factor: bool = True
    ) -> None:
        super().__init__(form)
        self.widths = widths
        self.kind = kind
        self.lsq_factor = lsq_factor
        self.scale_parameter = nn.ParameterDict({str(w): self._parameter_from(torch.ones(())) for w in widths})
        self.offset = nn.ParameterDict({str(w): torch.zeros(()) for w in widths} if kind == "zero_point" else {})

    def scale(self, width: int) -> Tensor:
        """The scale of a width, always positive and finite."""
        return self._positive(self.scale_parameter[str(width)])

    @torch.no_grad()
    def set_scale(self, width: int, scale: Tensor, offset: Tensor | None = None) -> None:
        """Start a width at `scale` (and `offset`)."""
        self.scale_parameter[str(width)].copy_(self._parameter_from(scale))
        if offset is not None:
            self.offset[str(width)].copy_(offset)

    def forward(self, x: Tensor, width: int) -> Tensor:
        """`x` as it is at `width` bits, with gradients to itself, to the width's scale and to its offset."""
        offset = self.offset[str(width)] if self.kind == "zero_point" else None
        bounds = input_range(self.kind, width)
        return learned_step(x, self.scale(width), bounds=bounds, offset=offset, lsq_factor=self.lsq_factor)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"{self.kind}, widths={self.widths}"
