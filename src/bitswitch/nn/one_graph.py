"""One graph for every width and every mixture of widths, so that a network is compiled once."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bitswitch.nn.layers import QuantizedLayer
from bitswitch.nn.norm import SwitchableBatchNorm
from bitswitch.nn.plan import become
from bitswitch.nn.quantizers import Quantizer

_QUANTIZERS = ("weight_quantizer", "input_quantizer")
# A layer or norm, what it stands at, and on which device.
_At = tuple[str, int | str, torch.device | None]
# The twin's name of a tensor, and where it is found: not the tensor, which a move to another device may replace.
_Place = tuple[str, dict[str, Any], str]


class OneGraph:
    """A quantized model as a function of tensors alone, which torch.compile traces once for all assignments.

    A width that is an integer is a constant of a compiled graph: every assignment would be another graph. So what is
    compiled is a twin of the model whose quantizers and batch normalizations have room for the parameters of one width, and
    whose ranges of codes are tensors. A call hands it the model's own tensors of the widths in use. Gradients and running
    statistics reach those and no others, as in the model itself.

    Args:
        model: made by `bitswitch.quantize`, with float weights.
        compiled: False computes the twin as it is, to find out what is the compiler's doing.
    """

    def __init__(self, model: nn.Module, *, compiled: bool = True) -> None:
        self.model = model
        self.twin = _twin(model)
        named = dict(model.named_modules())
        self._layers = {name: module for name, module in named.items() if isinstance(module, QuantizedLayer)}
        self._norms = {name: module for name, module in named.items() if isinstance(module, SwitchableBatchNorm)}
        self._same: list[_Place] = []
        self._modes: list[tuple[nn.Module, nn.Module]] = []
        for name, module in self.twin.named_modules():
            if not isinstance(module, _Slot) and name not in self._norms:
                self._same += _places(f"{name}." if name else "", named[name])
                self._modes.append((module, named[name]))
        self._twin_norms = [(self.twin.get_submodule(name), norm) for name, norm in self._norms.items()]
        self._chosen: dict[_At, list[_Place]] = {}
        self._call: Callable[..., Any] = self._of_tensors
        if compiled:
            self._call = torch.compile(self._of_tensors, backend=_inductor, dynamic=False)

    def __call__(self, *inputs: Any) -> Any:
        """The model's forward at the widths that its layers have now."""
        # Module by module: some may be held in eval mode.
        for mine, theirs in (*self._modes, *((mine, norm.variants[norm.key]) for mine, norm in self._twin_norms)):
            if mine.training != theirs.training:
                mine.training = theirs.training
        places = self._places()
        tensors = {name: held[key] for name, held, key in places}
        result = self._call(tensors, inputs)
        # Where a forward replaced a buffer instead of writing into it, functional_call left the new one here.
        for name, held, key in places:
            if tensors[name] is not held[key]:
                held[key] = tensors[name]
        return result

    def _of_tensors(self, tensors: dict[str, Tensor], inputs: tuple[Any, ...]) -> Any:
        return functional_call(self.twin, tensors, inputs)

    def _places(self) -> list[_Place]:
        """Where the model's tensors of the widths in use are found, by the names that the twin has for them."""
        places = list(self._same)
        for name, layer in self._layers.items():
            at: _At = (name, layer.width, layer.weight.device)
            if at not in self._chosen:
                self._chosen[at] = _places_of_width(name, layer)
            places += self._chosen[at]
        for name, norm in self._norms.items():
            at = (name, norm.key, None)
            if at not in self._chosen:
                self._chosen[at] = _places(f"{name}.", norm.variants[norm.key])
            places += self._chosen[at]
        return places


def _places(prefix: str, module: nn.Module) -> list[_Place]:
    """Where a module's own tensors are found."""
    return [
        (prefix + key, tensors, key)
        for tensors in (module._parameters, module._buffers)
        for key, tensor in tensors.items()
        if tensor is not None
    ]


def _places_of_width(name: str, layer: QuantizedLayer) -> list[_Place]:
    """Where the tensors of a layer's quantizers at its width are found."""
    places: list[_Place] = []
    for kind in _QUANTIZERS:
        quantizer: Quantizer = getattr(layer, kind)
        selected = {id(parameter): slot for slot, parameter in quantizer.selected(layer.width).items()}
        owned = [place for module in quantizer.modules() for place in _places("", module)]
        places += [
            (f"{name}.{kind}.{selected[id(tensors[key])]}", tensors, key)
            for _, tensors, key in owned
            if id(tensors[key]) in selected
        ]
        # Tensors for each place: that two places share one would be a fact of the graph, and the next mixture another graph.
        numbers = [torch.tensor(number, device=layer.weight.device) for number in quantizer.numbers(layer.width)]
        places += [(f"{name}.{kind}.number{i}", {"": number}, "") for i, number in enumerate(numbers)]
    return places


def _inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    from bitswitch.nn.inductor import compile_graph  # slow to import, and of no use to who does not compile

    return compile_graph(graph, inputs)


class _Slot(nn.Module):
    """A quantizer that has room for the parameters of one width."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self._quantize = quantizer.quantize
        for name, parameter in quantizer.selected(quantizer.high).items():
            self.register_parameter(name, parameter)
        for i, number in enumerate(quantizer.numbers(quantizer.high)):
            self.register_buffer(f"number{i}", torch.tensor(number))

    def forward(self, x: Tensor, width: int) -> Tensor:
        """`x` at the width that it was handed, whatever the layer's own says."""
        parameters: Any = self._parameters
        return self._quantize(x, *self._buffers.values(), **parameters)


def _twin(model: nn.Module) -> nn.Module:
    """A copy without memory of its own, whose per-width modules are those of one width."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        if isinstance(module, SwitchableBatchNorm):
            become(module, module.variants[module.key])
        elif isinstance(module, QuantizedLayer):
            for kind in _QUANTIZERS:
                setattr(module, kind, _Slot(getattr(module, kind)))
    return twin.to("meta")
