"""The samples of a batch: how many there are, whether they depend on each other, and what a layer does to each."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight

from bitswitch.search.passes import Layer

# Fewer random halves of a batch than this, over its samples, might not tell two that depend on each other apart.
_HALVES = 20


def rows(tensors: Iterable[Tensor]) -> int:
    """What the first dimensions are multiples of: the samples of a batch."""
    return math.gcd(*(len(tensor) for tensor in tensors)) or 1


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Zero outside the samples of the mask."""
    return (x.reshape(len(mask), -1) * mask.to(x).unsqueeze(1)).view_as(x)


def separate(count: int, pushed: Callable[[Tensor], Iterable[Tensor]]) -> bool:
    """Whether moving one half of the samples leaves the derivatives in the other half as they are, for random halves."""
    for attempt in range(math.ceil(_HALVES / count) if count > 1 else 0):
        generator = torch.Generator().manual_seed(attempt)
        mask = torch.randperm(count, generator=generator, device="cpu") < count // 2
        for found in pushed(mask):
            if found.reshape(count, -1)[~mask.to(found.device)].any():
                return False
    return True


def each(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The function of one sample, of all: one after the other, which beats the grouped convolutions that vmap makes of them."""
    return torch.stack([function(*of_sample) for of_sample in zip(*tensors, strict=True)])


def squares(layer: Layer, inputs: Tensor, gradients: Tensor, count: int) -> Tensor:
    """Of every sample, the squared norm of the derivative in the layer's weight, from that in the layer's outputs."""

    def square(x: Tensor, gradient: Tensor) -> Tensor:
        derivative = weight_gradient(layer, x, gradient).flatten()
        return derivative.dot(derivative)

    return each(square, inputs.unflatten(0, (count, -1)), gradients.unflatten(0, (count, -1))).double()


def weight_gradient(layer: Layer, inputs: Tensor, gradients: Tensor) -> Tensor:
    """The derivative in the layer's weight, from that in its outputs."""
    if isinstance(layer, nn.Linear):
        return gradients.flatten(0, -2).T @ inputs.flatten(0, -2)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    of_weight = conv1d_weight if isinstance(layer, nn.Conv1d) else conv2d_weight
    shape = layer.weight.shape
    return of_weight(padded, shape, gradients, layer.stride, 0, layer.dilation, layer.groups)


def apply(layer: Layer, inputs: Tensor, weight: Tensor) -> Tensor:
    """The layer with another weight and no bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(inputs, weight)
    return layer._conv_forward(inputs, weight, None)


def batched(layer: Layer, inputs: Tensor) -> bool:
    """Whether the inputs have a dimension of samples."""
    return inputs.dim() >= 2 if isinstance(layer, nn.Linear) else inputs.dim() == layer.weight.dim()
