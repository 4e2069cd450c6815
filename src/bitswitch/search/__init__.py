"""What precision costs, layer by layer."""

from bitswitch.search.costs import LayerCost, bitops, layer_costs

__all__ = ["LayerCost", "bitops", "layer_costs"]
