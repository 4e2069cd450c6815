"""Costs of a layer, and of a network at an assignment."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitswitch.nn import QuantizedLayer, evaluating, quantized_layers


@dataclass(frozen=True)
class LayerCost:
    """What a layer's precision is multiplied with.

    Attributes:
        weights: how many the layer has.
        macs: multiply-accumulate operations for one image.
    """

    weights: int
    macs: int


@torch.no_grad()
def layer_costs(model: nn.Module, example_inputs: tuple[Any, ...]) -> dict[str, LayerCost]:
    """Count every quantized layer's weights and operations in one forward of real size.

    Args:
        model: made by `bitswitch.quantize`, or loaded.
        example_inputs: what the model is called with; the first axis of the first is the batch.

    Returns:
        {layer: its cost}, in the order of definition; a layer that did not run has no operations.
    """
    layers = quantized_layers(model)
    batch = len(example_inputs[0])
    macs = dict.fromkeys(layers, 0)

    def count(name: str, layer: QuantizedLayer, output: Tensor) -> None:
        macs[name] += output.numel() // batch * (layer.stored_shape.numel() // layer.stored_shape[0])

    handles = [
        layer.register_forward_hook(lambda module, _args, output, name=name: count(name, module, output))
        for name, layer in layers.items()
    ]
    try:
        with evaluating(model):
            model(*example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: LayerCost(layer.stored_shape.numel(), macs[name]) for name, layer in layers.items()}


def bitops(costs: Mapping[str, LayerCost], widths: Mapping[str, int]) -> int:
    """Bit operations for one image: the sum over layers of weight bits x activation bits x MACs.

    The first and the last layer, which stay float, are not counted.
    """
    return sum(cost.macs * widths[name] ** 2 for name, cost in costs.items())
