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
# Of the greatest trace for each weight: less than any budget asks for, and more than nothing.
_LEAST_SHARE = 1e-6


def damage_table(model: nn.Module, traces: Mapping[str, Trace | float], form: Form = "hessian") -> Table:
    """Damage from traces of the Hessian.

    Args:
        model: made by `bitswitch.quantize`, or loaded: it knows the squared errors of its weights.
        traces: of the float network, for every quantized layer; those of other layers are passed over.
        form: "hessian": trace_l / n_l * ||W_l(b) - W_l||^2 (HAWQ-V2, arXiv 1911.03852), a trace below 0, which is noise or a
            saddle, counted for each weight as a millionth of the greatest or as the least above 0, whichever is less, so that
            bits which nothing else needs still go to such a layer;
            "linear": -trace_l / n_l * b, the paper's objective with its sign put right.

    Raises:
        UserError: a layer has no trace, or one that is not finite.
    """
    layers = quantized_layers(model)
    if not isinstance(traces, Mapping):
        raise UserError(f"traces is a {type(traces).__name__}: give {{layer: trace}}, as bitswitch.hessian_trace does")
    weights: dict[str, float] = {}
    for name, layer in layers.items():
        if name not in traces:
            raise UserError(f"the traces lack layer {name!r}{nearest(name, traces)}: are they of another network?")
        given = traces[name]
        try:
            trace = given.mean if isinstance(given, Trace) else float(given)
        except (TypeError, ValueError) as error:
            raise UserError(f"the trace of layer {name!r} is {given!r}: give a number or a Trace") from error
        if not math.isfinite(trace):
            raise UserError(f"the trace of layer {name!r} is {trace}: take the traces again")
        weights[name] = trace / layer.stored_shape.numel()
    if form == "linear":
        return {name: {width: -weights[name] * width for width in layer.widths} for name, layer in layers.items()}
    above = [weight for weight in weights.values() if weight > 0]
    least = min(_LEAST_SHARE * max(above), *above) if above else 1.0
    return {
        name: {
            width: (weights[name] if weights[name] > 0 else least) * error
            for width, error in layer.squared_errors().items()
        }
        for name, layer in layers.items()
    }


def measured_damage(model: nn.Module, score: Callable[[Sequence[Assignment]], Sequence[float]]) -> Table:
    """Damage measured: how much a score falls when one layer alone stands at a width, all others at their highest.

    Args:
        model: made by `bitswitch.quantize`, or loaded.
        score: of several assignments, greater is better, such as top-1 accuracy on val.
    """
    layers = quantized_layers(model)
    highest = {name: layer.widths[0] for name, layer in layers.items()}
    trials = [(name, width) for name, layer in layers.items() for width in layer.widths[1:]]
    lowered = [highest | {name: width} for name, width in trials]
    best, *found = score([Assignment(tuple(widths.items())) for widths in (highest, *lowered)])
    table = {name: {width: 0.0} for name, width in highest.items()}
    for (name, width), value in zip(trials, found, strict=True):
        table[name][width] = best - value
    return table
