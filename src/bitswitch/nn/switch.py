"""Which width is in use."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from bitswitch.assignment import Assignment
from bitswitch.errors import UserError
from bitswitch.nn.layers import QuantizedLayer
from bitswitch.nn.norm import SwitchableBatchNorm


def check_network(model: object) -> None:
    """Refuse what is no network, such as its class, its parameters or its state.

    Raises:
        UserError: it is none.
    """
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise UserError(f"model is {given}: give the network itself, a torch.nn.Module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network in torch's wrappers (torch.compile's, for several devices, of averaged weights), which rename every layer.

    Raises:
        UserError: it is no network.
    """
    check_network(model)
    while True:
        inner = "module" if isinstance(model, (DistributedDataParallel, DataParallel, AveragedModel)) else "_orig_mod"
        wrapped = model._modules.get(inner)
        if wrapped is None:
            return model
        model = wrapped


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers by name, in the order of the network's definition.

    Raises:
        UserError: the model has none.
    """
    layers: dict[str, QuantizedLayer] = {}
    _find(unwrapped(model), "", layers, set())
    if not layers:
        raise UserError(f"{type(model).__name__} has no quantized layer: make one with bitswitch.quantize(model, ...)")
    return layers


def _find(module: nn.Module, name: str, found: dict[str, QuantizedLayer], seen: set[nn.Module]) -> None:
    """As `named_modules` does, which would take a tenth of a switch: four in five modules are parts of layers and norms."""
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, QuantizedLayer):
        found[name] = module
    elif not isinstance(module, SwitchableBatchNorm):
        for part, child in module.named_children():
            _find(child, f"{name}.{part}" if name else part, found, seen)


def assignment(model: nn.Module) -> Assignment:
    """The width that every quantized layer has now."""
    return Assignment(tuple((name, layer.width) for name, layer in quantized_layers(model).items()))


def widths(model: nn.Module) -> dict[str, int]:
    """The width that every quantized layer has now, {layer name: bits}."""
    return assignment(model).to_json()


def switch(model: nn.Module, wanted: int | Mapping[str, int]) -> None:
    """Set the width of every layer (an integer) or of some layers ({name: bits}). Nothing changes if anything is wrong.

    A batch normalization follows the layer before it. A backward that runs later uses the widths of its own forward, but where
    `torch.utils.checkpoint` computes that forward again: then switch after the backward. A forward in another thread may see
    some layers at the old widths and some at the new; `bitswitch.runtime.Session` switches between whole forwards.

    Raises:
        UserError: no layer has that name, or a layer does not have that width, or its bits were not loaded (a ValueError).
    """
    _switch(quantized_layers(model), wanted)


def _switch(layers: Mapping[str, QuantizedLayer], wanted: int | Mapping[str, int]) -> None:
    chosen = Assignment.of(
        wanted,
        layers={name: layer.width for name, layer in layers.items()},
        widths={name: layer.widths for name, layer in layers.items()},
    )
    pairs = [(layers[name], width) for name, width in chosen.to_json().items()]
    for layer, width in pairs:
        layer.check_served(width)
    for layer, width in pairs:
        layer.width = width


@contextmanager
def switched(model: nn.Module, wanted: int | Mapping[str, int]) -> Iterator[nn.Module]:
    """Switch for the length of a `with` block; then every layer has the width that it had, also after an exception."""
    layers = quantized_layers(model)
    before = {layer: layer.width for layer in layers.values()}
    _switch(layers, wanted)
    try:
        yield model
    finally:
        for layer, width in before.items():
            layer.width = width
