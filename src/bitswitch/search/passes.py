"""One forward of a model on a batch, watched: what each layer got, and where its outputs can be moved."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

TRACED = (nn.Conv1d, nn.Conv2d, nn.Linear)

Layer = nn.Conv1d | nn.Conv2d | nn.Linear
LossFunction = Callable[[nn.Module, Any], Tensor]
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Pass:
    """A forward of one batch.

    Attributes:
        output: the model's, if it is one tensor of floats.
        leaf: what the loss was given for it, without the model's graph.
        calls: for each shifted layer, its inputs and the zeros that were added to its outputs.
        knobs: what is moved to probe a layer: those zeros, or its weight.
    """

    loss: Tensor
    output: Tensor | None
    leaf: Tensor | None
    calls: dict[str, list[tuple[Tensor, Tensor]]]
    knobs: dict[str, Tensor]

    def inputs(self, name: str) -> Tensor:
        """A shifted layer's input."""
        return self.calls[name][0][0]


def forward(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    shifted: frozenset[str],
    layers: Mapping[str, Layer],
    *,
    cut: bool,
) -> Pass:
    """Run the loss; `cut`: on a leaf in place of the model's output."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in shifted}
    outputs: list[Any] = []
    leaves: list[Tensor] = []

    def hide(layer: Layer, args: Any) -> None:
        layer.weight.requires_grad_(False)

    def shift(name: str) -> Callable[..., Tensor]:
        def hook(layer: Layer, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            layer.weight.requires_grad_(True)
            zeros = torch.zeros_like(output, requires_grad=True)
            calls[name].append(((args[0] if args else kwargs["input"]).detach().to(output.dtype), zeros))
            return output + zeros

        return hook

    def cut_off(module: nn.Module, args: Any, output: Any) -> Any:
        outputs.append(output)
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() == 0:
            return output
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    with ExitStack() as stack:
        # The other kernels of attention have no second derivative.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for name in shifted:
            stack.callback(layers[name].register_forward_pre_hook(hide).remove)
            # Before the user's own hooks, which may keep the output for the loss.
            hook = layers[name].register_forward_hook(shift(name), with_kwargs=True, prepend=True)
            stack.callback(hook.remove)
        if cut:
            stack.callback(model.register_forward_hook(cut_off).remove)
        loss = loss_fn(model, batch)
    once = len(outputs) == len(leaves) == 1
    knobs = {
        name: calls[name][0][1] if name in shifted else layer.weight
        for name, layer in layers.items()
        if name not in shifted or calls[name]
    }
    return Pass(loss, outputs[0] if once else None, leaves[0] if once else None, calls, knobs)


def reached(ends: Sequence[Tensor], tensors: Mapping[str, Sequence[Tensor]]) -> set[str]:
    """The names of those, one of whose tensors one of the ends depends on."""
    flat = [(name, tensor) for name, several in tensors.items() for tensor in several]
    sums = [end.sum() for end in ends if end.requires_grad]
    if not sums or not flat:
        return set()
    gradients = torch.autograd.grad(sums, [tensor for _, tensor in flat], retain_graph=True, allow_unused=True)
    return {name for (name, _), gradient in zip(flat, gradients, strict=True) if gradient is not None}


def products(run: Pass, gradients: Values, moves: Values) -> Values:
    """The derivative of `gradients` along the moves, in the same knobs."""
    curved = [name for name in moves if gradients[name].requires_grad]
    if not curved:
        return {name: torch.zeros_like(move) for name, move in moves.items()}
    products = torch.autograd.grad(
        [gradients[name] for name in curved],
        [run.knobs[name] for name in moves],
        [moves[name] for name in curved],
        retain_graph=True,
        materialize_grads=True,
    )
    return dict(zip(moves, products, strict=True))
