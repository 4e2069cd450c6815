"""`bitswitch.search`: from a quantized network and traces to a frontier of mixed assignments."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bitswitch.errors import UserError, nearest
from bitswitch.nn import as_arguments
from bitswitch.search.costs import as_budgets, budgets_between, cost_tables
from bitswitch.search.damage import Form, damage_table
from bitswitch.search.programme import Choice, Problem, Table, frontier
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
        damage: "hessian" (HAWQ-V2), "linear" (the paper's objective, its sign put right), or a table {layer: {width: number}}.
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
    table = damage_table(model, traces, damage) if isinstance(damage, str) else damage
    problem = Problem(damage=table, costs=cost_tables(model, inputs, latency), tied=tied)
    wanted = budgets_between(problem, "bits", _POINTS) if budgets is None else as_budgets(budgets)
    if not wanted:
        raise UserError("budgets=[] names none: leave it out for some between the least and the greatest")
    return frontier(problem, wanted)
