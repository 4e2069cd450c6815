"""Gradients of scales by layer and width (the paper's figures 3 and 7 to 12)."""

from typing import Any

import torch
from torch import Tensor, nn

from bitswitch.nn import WeightQuantizer, quantized_layers


class ScaleGradients:
    """Adds up the sizes of scale gradients through an epoch; nothing waits for the device until rows are asked for.

    Args:
        model: made by `bitswitch.quantize`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = quantized_layers(model)
        self._sums: dict[int, Tensor] = {}
        self._peaks: dict[int, Tensor] = {}
        self._steps: dict[int, int] = {}

    @torch.no_grad()
    def add(self, width: int) -> None:
        """Take the gradients that are there, after a backward at `width`."""
        sizes = torch.stack([_size(scale) for layer in self._layers.values() for scale in _scales(layer, width)])
        known = width in self._sums
        self._sums[width] = self._sums[width] + sizes if known else sizes
        self._peaks[width] = self._peaks[width].maximum(sizes) if known else sizes
        self._steps[width] = self._steps.get(width, 0) + 1

    def rows(self) -> list[dict[str, Any]]:
        """A row for each width and layer: mean and greatest |gradient| of the weight scale and the input scale; starts anew."""
        found = []
        for width, sums in self._sums.items():
            means, peaks = (sums / self._steps[width]).view(-1, 2).tolist(), self._peaks[width].view(-1, 2).tolist()
            for name, mean, peak in zip(self._layers, means, peaks, strict=True):
                found.append(
                    {
                        "bits": width,
                        "layer": name,
                        "weight_mean": mean[0],
                        "weight_max": peak[0],
                        "input_mean": mean[1],
                        "input_max": peak[1],
                    }
                )
        self._sums, self._peaks, self._steps = {}, {}, {}
        return found


def _scales(layer: Any, width: int) -> tuple[nn.Parameter, nn.Parameter]:
    weights = layer.weight_quantizer
    own = weights.scale_parameter if isinstance(weights, WeightQuantizer) else weights.scale_parameter[str(width)]
    return own, layer.input_quantizer.scale_parameter[str(width)]


def _size(scale: nn.Parameter) -> Tensor:
    return scale.new_zeros(()) if scale.grad is None else scale.grad.abs().amax()
