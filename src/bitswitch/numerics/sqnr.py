"""Signal to quantization noise."""

import math

import torch
from torch import Tensor


def sqnr(signal: Tensor, approximation: Tensor) -> float:
    """`10 log10(sum signal^2 / sum (signal - approximation)^2)` in decibels, computed in float64.

    Infinite where the two are equal. Shapes must be the same.
    """
    signal = signal.detach().double()
    noise = (signal - approximation.detach().double()).square().sum()
    return float(10 * torch.log10(signal.square().sum() / noise)) if noise else math.inf
