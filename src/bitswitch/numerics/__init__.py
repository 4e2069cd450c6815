"""Pure tensor functions: rounding, double rounding, the learned step, scale starts, signal to noise."""

from bitswitch.numerics.fake_quantize import (
    Narrowing,
    double_round,
    learned_step,
    narrowed_codes,
    weight_codes,
    zero_point,
)
from bitswitch.numerics.scales import bounded, start_activation_scales, start_weight_scale
from bitswitch.numerics.sqnr import sqnr

__all__ = [
    "Narrowing",
    "bounded",
    "double_round",
    "learned_step",
    "narrowed_codes",
    "sqnr",
    "start_activation_scales",
    "start_weight_scale",
    "weight_codes",
    "zero_point",
]
