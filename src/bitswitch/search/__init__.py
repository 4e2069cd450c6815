"""Sensitivity, costs, and the programme that chooses widths."""

from bitswitch.search.costs import LayerCost, bitops, layer_costs
from bitswitch.search.hessian import Trace, hessian_trace
from bitswitch.search.programme import Choice, Problem, alternatives, frontier, pareto

__all__ = [
    "Choice",
    "LayerCost",
    "Problem",
    "Trace",
    "alternatives",
    "bitops",
    "frontier",
    "hessian_trace",
    "layer_costs",
    "pareto",
]
