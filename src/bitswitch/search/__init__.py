"""Sensitivity, costs, and the programme that chooses widths.

The package can be called: `bitswitch.search(model, traces, budgets=...)` is `bitswitch.search.find(...)`, so that the public
name `bitswitch.search` is the function, and the room's modules are where one looks for them.
"""

import sys
import types
from typing import Any

from bitswitch.search.costs import (
    LayerCost,
    as_budgets,
    bitops,
    budgets_between,
    cost_tables,
    layer_costs,
    read_latency,
    shared_inputs,
)
from bitswitch.search.damage import damage_table, measured_damage
from bitswitch.search.find import find
from bitswitch.search.genetic import refine
from bitswitch.search.hessian import hessian_trace
from bitswitch.search.programme import Choice, Problem, alternatives, frontier, pareto
from bitswitch.search.traces import Trace

__all__ = [
    "Choice",
    "LayerCost",
    "Problem",
    "Trace",
    "alternatives",
    "as_budgets",
    "bitops",
    "budgets_between",
    "cost_tables",
    "damage_table",
    "find",
    "frontier",
    "hessian_trace",
    "layer_costs",
    "measured_damage",
    "pareto",
    "read_latency",
    "refine",
    "shared_inputs",
]


class _Callable(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> list[Choice]:
        return find(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
