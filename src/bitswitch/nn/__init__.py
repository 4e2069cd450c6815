"""State and dispatch: quantized layers, a batch normalization per width, `quantize`, `switch`."""

from bitswitch.nn.layers import QuantizedLayer
from bitswitch.nn.mode import evaluating
from bitswitch.nn.norm import SwitchableBatchNorm, TransitionalBatchNorm
from bitswitch.nn.plan import Plan, apply, freeze, make_transitional, plan_of
from bitswitch.nn.quantize import as_arguments, quantize
from bitswitch.nn.quantizers import ActivationQuantizer, PerWidthWeightQuantizer, WeightQuantizer
from bitswitch.nn.switch import assignment, quantized_layers, switch, switched, unwrapped, widths

__all__ = [
    "ActivationQuantizer",
    "PerWidthWeightQuantizer",
    "Plan",
    "QuantizedLayer",
    "SwitchableBatchNorm",
    "TransitionalBatchNorm",
    "WeightQuantizer",
    "apply",
    "as_arguments",
    "assignment",
    "evaluating",
    "freeze",
    "make_transitional",
    "plan_of",
    "quantize",
    "quantized_layers",
    "switch",
    "switched",
    "unwrapped",
    "widths",
]
