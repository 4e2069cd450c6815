"""Scales, their gradients and how far they move, by layer and width (the paper's figures 3 and 7 to 12)."""

from typing import Any

import torch
from torch import Tensor, nn

from bitswitch.nn import quantized_layers
from bitswitch.nn.quantizers import Quantizer


class ScaleGradients:
    """Adds up the sizes of gradients and moves through an epoch; nothing waits for the device until rows are asked for.

    Args:
        model: made by `bitswitch.quantize`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = quantized_layers(model)
        self._seen: dict[int, _Seen] = {}

    @torch.no_grad()
    def add(self, width: int) -> None:
        """Take the gradients that are there, after a backward at `width`."""
        pairs = [scale for layer in self._layers.values() for scale in _scales(layer, width)]
        sizes = torch.stack([_size(parameter) for _, parameter in pairs])
        logs = torch.stack([quantizer.positive(parameter).log().mean() for quantizer, parameter in pairs])
        norms = torch.stack([_norm(layer.weight) for layer in self._layers.values()])
        if width in self._seen:
            self._seen[width].add(sizes, logs, norms)
        else:
            self._seen[width] = _Seen(sizes, logs, norms)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each width and layer of all since the rows before, plain JSON values.

        Returns:
            {"bits", "layer"}; of the weight scale and of the input scale ("weight_", "input_") the mean and the greatest
            |gradient| ("mean", "max"), the scale ("scale", the geometric mean over channels) and its mean relative move from
            one step of this width to the next ("move"; what the other widths' steps do to a shared scale is in it); and the
            mean norm of the weights' gradient ("gradient_norm").
        """
        found = []
        for width, seen in self._seen.items():
            columns = {"mean": seen.sizes / seen.steps, "max": seen.peaks}
            columns |= {"scale": seen.logs.exp(), "move": seen.moves / max(seen.steps - 1, 1)}
            both = {name: column.view(-1, 2).tolist() for name, column in columns.items()}
            norms = (seen.norms / seen.steps).tolist()
            for i, layer in enumerate(self._layers):
                row = {f"{side}_{name}": values[i][k] for k, side in enumerate(_SIDES) for name, values in both.items()}
                found.append({"bits": width, "layer": layer, **row, "gradient_norm": norms[i]})
        self._seen = {}
        return found


_SIDES = ("weight", "input")


class _Seen:
    """Sums over the steps of one width; all tensors are [2 * layers], weight and input in turn, but `norms`, [layers]."""

    def __init__(self, sizes: Tensor, logs: Tensor, norms: Tensor) -> None:
        self.steps = 1
        self.sizes, self.peaks, self.logs, self.norms = sizes, sizes, logs, norms
        self.moves = torch.zeros_like(logs)

    def add(self, sizes: Tensor, logs: Tensor, norms: Tensor) -> None:
        self.steps += 1
        self.sizes, self.peaks, self.norms = self.sizes + sizes, self.peaks.maximum(sizes), self.norms + norms
        self.moves, self.logs = self.moves + (logs - self.logs).abs(), logs


def _scales(layer: Any, width: int) -> tuple[tuple[Quantizer, nn.Parameter], tuple[Quantizer, nn.Parameter]]:
    quantizers = layer.weight_quantizer, layer.input_quantizer
    weight, inputs = ((one, one.selected(width)["scale_parameter"]) for one in quantizers)
    return weight, inputs


def _size(parameter: Tensor) -> Tensor:
    return parameter.new_zeros(()) if parameter.grad is None else parameter.grad.abs().amax()


def _norm(parameter: Tensor) -> Tensor:
    return parameter.new_zeros(()) if parameter.grad is None else parameter.grad.norm().float()
