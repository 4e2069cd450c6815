"""One example forward, watched: which layers run, in which order, on what data, and what flows where."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from bitswitch.nn.mode import evaluating
from bitswitch.nn.norm import BATCH_NORMS
from bitswitch.numerics.scales import sample

_PRODUCTS = {
    *(F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(torch.mm, torch.bmm, torch.matmul, torch.einsum, torch.tensordot, torch.addmm, torch.baddbmm, torch.addbmm),
    *(Tensor.mm, Tensor.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.addmm, Tensor.baddbmm),
}
# What a parameter may go through and still be that parameter.
_VIEWS = {
    *(Tensor.t, Tensor.transpose, Tensor.permute, Tensor.view, Tensor.reshape, Tensor.unflatten, Tensor.flatten),
    *(Tensor.T.__get__, Tensor.mT.__get__),  # type: ignore[attr-defined]
    *(torch.t, torch.transpose, torch.permute, torch.reshape, torch.flatten),
}


@dataclass
class Trace:
    """What was seen.

    Attributes:
        order: the watched layers that ran, by name, in the order of their first call.
        inputs: for each, a sample of its inputs, float32 or wider, one dimension.
        before: for each watched layer and batch normalization that ran, the watched layers that its input was computed
            from, in the order in which they ran.
        earlier: how many layers of `order` had run before each batch normalization.
        read_elsewhere: the watched layers whose weight something else read than their own forward.
        bare_products: parameters that a product read although they belong to no watched layer, by name.
    """

    order: list[str] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, tuple[str, ...]] = field(default_factory=dict)
    earlier: dict[str, int] = field(default_factory=dict)
    read_elsewhere: set[str] = field(default_factory=set)
    bare_products: set[str] = field(default_factory=set)


class _Flow(TorchFunctionMode):
    """Carries through every operation which watched layers a tensor was computed from."""

    def __init__(self, trace: Trace, weights: Mapping[int, set[str]], parameters: Mapping[int, str]) -> None:
        super().__init__()
        self.trace = trace
        self.weights = weights
        self.parameters = parameters
        self.origins = WeakTensorKeyDictionary()
        self.views = WeakTensorKeyDictionary()
        self.inside: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # What is assigned to returns nothing, and what is written to a view is in the tensor that it shows.
        changed = args[0] if func is Tensor.__setitem__ else result
        returned = [leaf for leaf in tree_leaves(changed) if isinstance(leaf, Tensor)]
        if func in _VIEWS and len(given) == len(returned) == 1 and (name := self._parameter(given[0])) is not None:
            self.views[returned[0]] = name
        if returned:
            self._note_readers(func, given)
            self.mark(returned, frozenset().union(*(self.origins.get(t, ()) for t in given)))
        return result

    def _note_readers(self, func: Any, given: list[Tensor]) -> None:
        for tensor in given:
            owners = self.weights.get(id(tensor), set())
            if owners and owners.isdisjoint(self.inside):
                self.trace.read_elsewhere |= owners
            elif (
                not owners and func in _PRODUCTS and tensor.dim() > 1 and (name := self._parameter(tensor)) is not None
            ):
                self.trace.bare_products.add(name)

    def _parameter(self, tensor: Tensor) -> str | None:
        return self.parameters.get(id(tensor), self.views.get(tensor))

    def mark(self, tensors: list[Tensor], origins: frozenset[int]) -> None:
        """Add to what the tensors were computed from, positions in the order of layers."""
        if origins:
            for tensor in (*tensors, *(t._base for t in tensors if t._base is not None)):
                self.origins[tensor] = origins.union(self.origins.get(tensor, ()))

    def before(self, tensor: Tensor) -> tuple[str, ...]:
        return tuple(self.trace.order[position] for position in sorted(self.origins.get(tensor, ())))


def _before(module: nn.Module, call: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> RemovableHandle:
    """Call with the arguments of every forward, positional and by keyword."""
    return module.register_forward_pre_hook(lambda _, args, kwargs: call(args, kwargs), with_kwargs=True)


def trace(model: nn.Module, example_inputs: tuple[Any, ...], watched: Mapping[str, nn.Module]) -> Trace:
    """Run `model(*example_inputs)` once in eval mode and record what the watched layers do.

    Args:
        model: a float network.
        example_inputs: what it is called with.
        watched: layers by name; each has a parameter `weight`.
    """
    seen = Trace()
    weights: dict[int, set[str]] = {}
    for name, layer in watched.items():
        weights.setdefault(id(layer.weight), set()).add(name)
    others = {id(p): name for name, p in model.named_parameters() if id(p) not in weights}
    flow = _Flow(seen, weights, others)

    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if name not in seen.order:
            seen.order.append(name)
            seen.before[name] = flow.before(x)
        flow.inside.append(name)
        kept = sample(x)[0]
        seen.inputs[name] = torch.cat([seen.inputs[name], kept]) if name in seen.inputs else kept

    def after(name: str, output: Tensor) -> None:
        flow.inside.pop()
        flow.mark([output], frozenset({seen.order.index(name)}))

    def note_before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.before.setdefault(name, flow.before(args[0] if args else next(iter(kwargs.values()))))
        seen.earlier.setdefault(name, len(seen.order))

    with ExitStack() as stack:
        for name, layer in watched.items():
            stack.callback(_before(layer, partial(before, name)).remove)
            stack.callback(layer.register_forward_hook(lambda _m, _a, out, name=name: after(name, out)).remove)
        for name, module in model.named_modules():
            if isinstance(module, BATCH_NORMS):
                stack.callback(_before(module, partial(note_before, name)).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(flow)
        model(*example_inputs)
    return seen
