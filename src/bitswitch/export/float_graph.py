"""The ONNX graph of a quantized model's float network, in which layers and batch normalizations still stand apart."""

import copy
import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from bitswitch.errors import UserError, require
from bitswitch.nn import QuantizedLayer, SwitchableBatchNorm

# The opset whose QuantizeLinear and DequantizeLinear know 4-bit integers; ONNX Runtime 1.20 reads it.
OPSET = 21
# What torch's exporter warns of: its own functions and names, and weights of recurrent layers, which it lays out itself.
_NOT_FOR_THE_USER = (
    "_check_is_size will be removed",
    "The tensor attributes? .* assigned during export",
    "# The axis name",
)


def float_graph(model: nn.Module, example_inputs: tuple[Any, ...], tensors: Mapping[str, np.ndarray]) -> Any:
    """Export the float network with a batch of any size.

    Args:
        model: a quantized model; it is not changed.
        example_inputs: what it is called with.
        tensors: the artifact's, by name.

    Returns:
        An `onnx_ir.Model`. Parameters and buffers that the artifact holds, and the weights of quantized layers, are inputs
        of its graph by their names, behind the network's own; their values are not in it. Constants are folded.

    Raises:
        UserError: onnx or onnxscript is not installed, torch cannot export the network, or its forward takes batches of one
            size alone.
    """
    require("onnx", "onnx")
    require("onnxscript", "onnx")
    # Both need the extra.
    from bitswitch.export.simplify import simplify

    inputs = _batch_of_two(example_inputs)
    size = inputs[0].shape[0]
    try:
        twin = float_twin(model)
        named = _shapes(twin, inputs, torch.export.Dim("batch"))
        # A dict at the end torch would take for arguments by name.
        program = _program(twin, (*inputs, {}) if isinstance(inputs[-1], dict) else inputs, named)
        if isinstance(program.model.graph.inputs[0].shape[0], int):
            # torch made a constant of the batch's size without a word. len(x) is a number where the forward is run, and
            # stays what it is where its code is read instead.
            shapes = _shapes(twin, inputs, torch.export.Dim.AUTO)
            read = torch.export.export(twin, inputs, dynamic_shapes=shapes, strict=True)
            if not read.range_constraints:
                raise UserError(
                    f"the forward of this {type(model).__name__} makes a constant of the batch's size, here {size}, and the "
                    "graph would take no other: let it use x.shape[0] as it is, and -1 in a view"
                )
            program = _program(read, (), named)
    except UserError:
        raise
    except Exception as error:
        # The exporter raises many kinds of errors, all of which say that this network is not for it.
        # torch's own words come first and are of no network; the reason is what they were raised from.
        reason = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error.__cause__ or error)).split())
        raise UserError(f"torch.onnx.export cannot export this {type(model).__name__}: {reason[:300]}") from error
    graph = program.model.graph
    weights = {f"{name}.weight" if name else "weight" for name, _ in _layers(model)}
    for value in graph.inputs:
        # A buffer may have the name of an argument of forward.
        while value.name in tensors or value.name in weights:
            value.name = f"{value.name}.input"
    first_names = _first_names(twin)
    for given in list(graph.initializers):
        # The exporter names what a network holds in several places after another of them than the artifact does.
        name = first_names.get(given, given)
        if name != given:
            value = graph.initializers.pop(given)
            value.name = name
            graph.initializers[name] = value
        if name in tensors or name in weights:
            # Not a constant any more, so that nothing folds it.
            graph.inputs.append(graph.initializers.pop(name))
    simplify(program.model)
    return program.model


def _program(network: Any, inputs: tuple[Any, ...], shapes: tuple[Any, ...]) -> Any:
    """torch's ONNX program of a module, or of its exported program."""
    with warnings.catch_warnings():
        for sentence in _NOT_FOR_THE_USER:
            warnings.filterwarnings("ignore", sentence)
        return torch.onnx.export(
            network,
            inputs,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            dynamic_shapes=shapes,
        )


def float_twin(model: nn.Module) -> nn.Module:
    """A copy with float layers and batch normalizations in the places of quantized ones; the weights are zero."""
    # What forward kept of an earlier call has a history, which cannot be copied.
    own = tree_leaves([list(vars(module).values()) for module in model.modules()])
    past = [x for x in own if isinstance(x, Tensor) and not x.is_leaf]
    twin = copy.deepcopy(model, {id(x): x.detach() for x in past}).eval()
    for _, layer in _layers(twin):
        weight = torch.zeros(layer.stored_shape, device="cpu")
        for name in ("weight_quantizer", "input_quantizer"):
            delattr(layer, name)
        del layer._buffers["codes"]
        layer.register_parameter("weight", nn.Parameter(weight))
        layer.__class__ = next(base for base in type(layer).__mro__ if base.__module__.startswith("torch.nn."))
    for module in list(twin.modules()):
        if isinstance(module, SwitchableBatchNorm):
            norm = next(iter(module.variants.values()))
            module.__class__ = type(norm)  # type: ignore[assignment]
            module.__dict__ = norm.__dict__
    return twin.cpu()


def _first_names(model: nn.Module) -> dict[str, str]:
    """{every name of a parameter or buffer: the first name of the same}."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _layers(model: nn.Module) -> list[tuple[str, QuantizedLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]


def _batch_of_two(example_inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs with a batch of at least two: torch takes a size of one for a constant."""
    if not example_inputs or not isinstance(example_inputs[0], Tensor) or not example_inputs[0].dim():
        raise UserError("example_inputs: the first must be a tensor whose first dimension is the batch")
    if not len(example_inputs[0]):
        raise UserError("example_inputs: the batch is empty: there is nothing to hold a graph against; give real data")
    found: tuple[Any, ...] = tree_map_only(Tensor, Tensor.cpu, example_inputs)
    if found[0].shape[0] == 1:
        found = tree_map(lambda x: torch.cat([x, x]) if _has_batch(x, 1) else x, found)
    return found


def _has_batch(x: Any, size: int) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == size


def _shapes(model: nn.Module, inputs: tuple[Any, ...], batch: Any) -> tuple[Any, ...]:
    """What torch wants to know of sizes, one entry for each parameter of forward; `*args` takes a tuple of its own."""
    size = inputs[0].shape[0]
    shapes = tree_map(lambda x: {0: batch} if _has_batch(x, size) else {} if isinstance(x, Tensor) else None, inputs)
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return shapes
    named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*shapes[:named], shapes[named:]) if len(shapes) > named else shapes
