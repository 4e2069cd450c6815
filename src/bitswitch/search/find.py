"""`bitswitch.search`: from a quantized network and traces to a frontier of mixed assignments."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bitswitch.errors import UserError, nearest
from bitswitch.nn import as_arguments, quantized_layers
from bitswitch.search.costs import as_budgets, budgets_between, cost_tables
from bitswitch.search.damage import Form, damage_table
from bitswitch.search.programme import Choice, Problem, Table, check_table, frontier
from bitswitch.search.traces import Trace

_POINTS = 16


def find(
    model: nn.Module,
    traces: Mapping[str, Trace | float],
    budgets: Sequence[float | Mapping[str, float]] | None = None,
    *,
    damage: Form | Table = "hessian",
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    latency: Table | None = None,
    tied: Sequence[Sequence[str]] = (),
) -> list[Choice]:
    """The frontier of mixed assignments: for every budget the least damage, without those that others beat.

    Args:
        model: made by `bitswitch.quantize`, or loaded.
        traces: of the Hessian, for every quantized layer; see `bitswitch.hessian_trace`.
        budgets: each a number, the most that the average width over layers may be, or {cost: most} over any of the costs at
            once: "bits", "weight_bits", "bytes", "bitops", "latency"; where None, 16 average widths from least to greatest.
        damage: "hessian" (HAWQ-V2), "linear" (the paper's objective, its sign put right), or a table {layer: {width: number}};
            a width that it leaves out is not chosen there.
        example_inputs: what the model is called with, for the cost "bitops".
        latency: {layer: {width: time}}, for the cost "latency".
        tied: groups of layers that must have one width.

    Returns:
        Choices, least damage first; see `bitswitch.search.Choice`.

    Raises:
        UserError: traces or tables of another network, an unknown cost, or a budget that cannot be met, with the least and
            the greatest that can be.
    """
    inputs = None if example_inputs is None else as_arguments(example_inputs)
    if isinstance(damage, str) and damage not in ("hessian", "linear"):
        raise UserError(f"damage={damage!r}{nearest(damage, ('hessian', 'linear'))}: use hessian, linear or a table")
    table = damage_table(model, traces, damage) if isinstance(damage, str) else _plain(damage, model)
    problem = Problem(damage=table, costs=cost_tables(model, inputs, latency), tied=tied)
    wanted = budgets_between(problem, "bits", _POINTS) if budgets is None else as_budgets(budgets)
    if not wanted:
        raise UserError("budgets=[] names none: leave it out for some between the least and the greatest")
    return frontier(problem, wanted)


def _plain(damage: Table, model: nn.Module) -> Table:
    """A table of the user's in Python's own numbers, which a file can hold, of the model's layers and widths."""
    layers = quantized_layers(model)
    check_table("damage", damage, {name: {} for name in layers})
    check_table("damage", damage, damage)
    for name, layer in layers.items():
        if others := [width for width in damage[name] if width not in layer.widths]:
            raise UserError(f"table 'damage' has {others[0]!r} bits for layer {name!r}: there are {list(layer.widths)}")
    return {name: {int(width): float(damage[name][width]) for width in damage[name]} for name in layers}
