"""How much each layer suffers at each width."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from torch import nn

from bitswitch.assignment import Assignment
from bitswitch.errors import UserError, nearest
from bitswitch.nn import quantized_layers
from bitswitch.search.programme import Table
from bitswitch.search.traces import Trace

Form = Literal["hessian", "linear"]


def damage_table(model: nn.Module, traces: Mapping[str, Trace | float], form: Form = "hessian") -> Table:
    """Damage from traces of the Hessian.

    Args:
        model: made by `bitswitch.quantize`, or loaded: it knows the squared errors of its weights.
        traces: of the float network, for every quantized layer; those of other layers are passed over.
        form: "hessian": trace_l / n_l * ||W_l(b) - W_l||^2 (HAWQ-V2, arXiv 1911.03852), a trace below 0, which is noise or a
            saddle, counted as 0; "linear": -trace_l / n_l * b, the paper's objective with its sign put right.

    Raises:
        UserError: a layer has no trace, or one that is not finite.
    """
    table: dict[str, dict[int, float]] = {}
    for name, layer in quantized_layers(model).items():
        if name not in traces:
            raise UserError(f"the traces lack layer {name!r}{nearest(name, traces)}: are they of another network?")
        given = traces[name]
        trace = given.mean if isinstance(given, Trace) else float(given)
        if not math.isfinite(trace):
            raise UserError(f"the trace of layer {name!r} is {trace}: take the traces again")
        weight = trace / layer.stored_shape.numel()
        if form == "linear":
            table[name] = {width: -weight * width for width in layer.widths}
        else:
            table[name] = {width: max(weight, 0.0) * error for width, error in layer.squared_errors().items()}
    return table


def measured_damage(model: nn.Module, score: Callable[[Sequence[Assignment]], Sequence[float]]) -> Table:
    """Damage measured: how much a score falls when one layer alone stands at a width, all others at their highest.

    Args:
        model: made by `bitswitch.quantize`, or loaded.
        score: of several assignments, greater is better, such as top-1 accuracy on val.
    """
    layers = quantized_layers(model)
    highest = {name: layer.widths[0] for name, layer in layers.items()}
    trials = [(name, width) for name, layer in layers.items() for width in layer.widths]
    found = score([Assignment(tuple((highest | {name: width}).items())) for name, width in trials])
    table: dict[str, dict[int, float]] = {name: {} for name in layers}
    for (name, width), value in zip(trials, found, strict=True):
        table[name][width] = found[0] - value
    return table
