"""Where scales start, and what keeps them positive."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitswitch.numerics.fake_quantize import Narrowing, centre, narrowed_codes

# A power of two far from every scale that a network uses, whose product with 2^6 is still an ordinary float32.
LEAST_SCALE = 2.0**-30
GREATEST_SCALE = 2.0**30

_SAMPLE = 1 << 16
_STEPS_PER_OCTAVE = 12
# The share of the weights' energy that a width loses by narrowing and does not feel.
_HARMLESS = 0.01


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, least: float, greatest: float) -> Tensor:
        return torch.where(value >= least, value, least).clamp(max=greatest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def bounded(value: Tensor, least: float, greatest: float) -> Tensor:
    """`value` kept within [least, greatest]; a NaN becomes `least`. The gradient passes straight through.

    Straight through, because a plain clamp would hold a value that an optimizer has thrown past a bound there for ever.
    """
    return _Bounded.apply(value, least, greatest)


def sample(x: Tensor, rows: int = 1) -> Tensor:
    """At most 65,536 elements of every row of `x.reshape(rows, -1)`, evenly spaced: [rows, n], float32 or wider."""
    x = x.detach().reshape(rows, -1)
    stride = max(-(-x.shape[1] // max(_SAMPLE // rows, 256)), 1)
    # A stride with a factor of the size would keep meeting the same column, feature or tap of a kernel.
    while x.shape[1] and math.gcd(stride, x.shape[1]) > 1:
        stride += 1
    # A copy, not a view: what is sampled may be changed in place later, and would be kept alive whole.
    return x[:, ::stride].to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _grid(greatest: Tensor, octaves_down: int, octaves_up: int) -> Tensor:
    """[n, rows, 1] candidates, from `octaves_down` below `greatest` ([rows, 1]) to `octaves_up` above."""
    steps = (octaves_down + octaves_up) * _STEPS_PER_OCTAVE + 1
    return greatest * torch.logspace(
        -octaves_down, octaves_up, steps, base=2, dtype=greatest.dtype, device=greatest.device
    ).view(-1, 1, 1)


def start_weight_scale(
    weight: Tensor, widths: Sequence[int], *, per_channel: bool = False, narrowing: Narrowing = "half_up"
) -> Tensor:
    """The shared scale `s_h` that serves all candidate widths best.

    Of a fine geometric grid, the scale with the least `sum over l of log(E_l(s) + 0.01)`, where
    `E_l(s) = ||W_l(s) - W||^2 / ||W||^2`: relative errors count, down to a noise of 1 % of the weights' energy, which no
    width feels. A plain sum would leave all to the narrowest width, logarithms alone nearly all to the widest
    (results/cifar10/starts.json).

    Args:
        weight: float weights, [out, ...].
        widths: candidate widths, highest first.
        per_channel: one scale for each index of the first axis.
        narrowing: how lower widths are derived.

    Returns:
        A scalar tensor, or [out, 1, ...] per channel, of the weight's dtype or float32, if that is wider; 2^(1-h) where all
        weights are 0.
    """
    high = widths[0]
    rows = weight.shape[0] if per_channel else 1
    x = sample(weight, rows)
    peak = x.abs().amax(1, keepdim=True)
    unit = torch.where(peak > 0, peak, 1.0)
    # In units of the peak, or the squares of tiny weights would vanish.
    x = x / unit
    candidates = _grid(torch.full_like(unit, 2.0 ** (1 - high)), 5, 2)
    energy = x.square().sum(1).clamp_min(torch.finfo(x.dtype).tiny)
    scores = torch.stack([_weight_errors(x, candidates, high, width, narrowing) for width in widths], 1)
    best = (scores / energy + _HARMLESS).log().sum(1).argmin(0)
    scale = candidates[best, torch.arange(rows, device=x.device), 0] * unit[:, 0]
    scale = torch.where(peak[:, 0] > 0, scale, 2.0 ** (1 - high)).clamp(LEAST_SCALE, GREATEST_SCALE)
    # Scales are not rounded to half precision.
    scale = scale.to(torch.promote_types(weight.dtype, torch.float32))
    return scale.view(-1, *[1] * (weight.dim() - 1)) if per_channel else scale.view(())


def _weight_errors(x: Tensor, candidates: Tensor, high: int, low: int, narrowing: Narrowing) -> Tensor:
    """||W_l(s) - W||^2 for every candidate and row: [candidates, rows]."""
    errors = []
    for scale in candidates:
        codes = narrowed_codes(x, scale, high=high, low=low, narrowing=narrowing)
        errors.append(((codes + centre(high, low, narrowing)) * (scale * 2 ** (high - low)) - x).square_().sum(1))
    return torch.stack(errors)


def start_activation_scales(
    x: Tensor, ranges: Sequence[tuple[int, int]], *, with_offset: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """For every range of codes, the scale of least squared error on observed activations.

    Args:
        x: observed activations, any shape; more than 65,536 are sampled evenly.
        ranges: (least, greatest) code, one for every width.
        with_offset: search a scale with a zero-point that keeps the lower end of the data at code 0.

    Returns:
        (scales [widths], offsets [widths] or None, relative errors [widths]: squared error / squared signal).
    """
    x = sample(x)
    low_end, high_end = (x.amin(), x.amax()) if with_offset else (None, None)
    scales, offsets, errors = [], [], []
    for least, greatest in ranges:
        if low_end is not None and high_end is not None:
            peak = (high_end.clamp_min(0) - low_end.clamp_max(0)) / greatest
        else:
            peak = (x.amax() / greatest).maximum(x.amin() / least if least else x.amin() * 0)
        alive = peak > 0
        candidates = _grid(torch.where(alive, peak, 1.0).view(1, 1), 6, 1)
        shift = torch.zeros_like(candidates) if low_end is None else torch.round(-low_end.clamp_max(0) / candidates)
        shift = shift.clamp(0, greatest)
        codes_error = torch.stack(
            [
                (((x / s).round_() + zp).clamp_(least, greatest).sub_(zp).mul_(s) - x).square_().sum()
                for s, zp in zip(candidates, shift, strict=True)
            ]
        )
        best = codes_error.argmin()
        scales.append(torch.where(alive, candidates[best, 0, 0], 1.0 / greatest).clamp(LEAST_SCALE, GREATEST_SCALE))
        offsets.append(-shift[best, 0, 0] * candidates[best, 0, 0])
        errors.append(codes_error[best] / x.square().sum().clamp_min(torch.finfo(x.dtype).tiny))
    return torch.stack(scales), torch.stack(offsets) if with_offset else None, torch.stack(errors)
