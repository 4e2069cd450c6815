"""Adaptive learning-rate scaling: a learning rate for the scales of each bit-width (arXiv 2502.01199, section 3)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

AlrsForm = Literal["relative", "printed", "off"]


def paper_eta(high: int, low: int) -> float:
    """`eta_b`, with D = high - low: 10^(-D/2) for even D, 5 * 10^(-(D+1)/2) for odd D.

    >>> [paper_eta(8, b) for b in (8, 6, 4, 2)], paper_eta(4, 3)
    ([1.0, 0.1, 0.01, 0.001], 0.5)
    """
    drop = high - low
    return 10.0 ** -(drop // 2) if drop % 2 == 0 else 5 * 10.0 ** -((drop + 1) // 2)


def adapted_rate(rate: float, eta: float, gradients: Sequence[Tensor], form: AlrsForm) -> Tensor | float:
    """The learning rate of the scales of one bit-width.

    With `g = mean over layers of min(max|gradient|, 1)`:
    "relative" gives `eta * rate * (1 - g)`; "printed", the paper's formula, `eta * (rate - g)` held at 0 where it would be
    negative; "off" gives `rate`.

    Args:
        rate: lambda, the learning rate before scaling.
        eta: the factor of this bit-width.
        gradients: one for each scale that took part, any shapes.
        form: which formula.

    Returns:
        A scalar tensor on the gradients' device (nothing waits for the device), or a float where no gradient is needed.
    """
    if form == "off" or not gradients:
        return rate
    peaks = torch.stack([g if g.dim() == 0 else g.abs().amax() for g in gradients]).abs()
    # Adam's fused kernels read a learning rate as float32.
    mean = peaks.clamp(max=1.0).mean().float()
    return eta * rate * (1 - mean) if form == "relative" else (eta * (rate - mean)).clamp(min=0.0)
