"""The network's integer graph: what an artifact carries as `graph`, and what an ONNX file is made of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from bitswitch.artifact import Header
from bitswitch.errors import UserError, check_word, require
from bitswitch.export.artifact import Additions
from bitswitch.export.branches import ChannelRange, Range, Ranges, branches, end_in_bytes, end_in_floats, end_in_sums
from bitswitch.export.float_graph import float_graph
from bitswitch.export.layers import lower_layers
from bitswitch.export.lowering import Lowering
from bitswitch.nn import as_arguments, evaluating, switched
from bitswitch.nn.switch import quantized_layers
from bitswitch.runtime.bindings import Bindings
from bitswitch.runtime.constants import Arrays, values
from bitswitch.runtime.executable import KEY, Executable
from bitswitch.runtime.packing import packed
from bitswitch.runtime.whole_bias import LEAST_SCALE

# A graph that computes something else is off by as much as results vary from input to input, or more; eight-bit branches and
# roundings that fall the other way cost far less, but for networks that were not trained for a width: they magnify whatever
# disturbs them. So a graph may also be off by a little more than the model is off from itself on inputs that are disturbed as
# eight bits would.
_GREATEST_NOISE = 0.5
_GREATEST_OWN_NOISE = 2.0
# The same of whole numbers, such as classes: this share may be others.
_MOST_OTHERS = 0.1
_ROUNDING = 1e-9
_DISTURBANCE = 2.0**-8
_HALF = (torch.float16, torch.bfloat16)
# How far the range of a channel reaches beyond what the example inputs showed, either way.
_ROOM = 0.1
# Fewer results of a channel than this, as behind a global pooling there is one for each image, do not show its range.
_FEWEST = 64
# Shares of what they showed that are tried as the range of all channels, on so many results.
_SHARES, _SEEN = np.linspace(1, 0.3, 15), 2**18


@dataclass(frozen=True)
class IntegerGraph:
    """A graph without numbers, and what they are."""

    model: ir.Model
    bindings: Bindings
    header: Header
    tensors: Mapping[str, np.ndarray]

    def arrays(self, assignment: Mapping[str, int], **options: Any) -> Arrays:
        """The numbers at an assignment."""
        return values(self.bindings, self.header, self.tensors, assignment, **options)

    def strip(self) -> None:
        """Take out what the exporter notes of every node, stack traces for one: it outweighs the nodes."""
        for node in ir.traversal.RecursiveGraphIterator(self.model.graph):
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                if not value.is_graph_output():
                    value.shape = value.type = None
        graph = self.model.graph
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            value.metadata_props.clear()
        graph.metadata_props.clear()
        self.model.metadata_props.clear()


def integer_graph(
    model: nn.Module,
    header: Header,
    tensors: Mapping[str, np.ndarray],
    example_inputs: Tensor | tuple[Any, ...],
    additions: Additions = "requantized",
    *,
    sums: bool = False,
) -> IntegerGraph:
    """The integer graph of a quantized model, held against it at the highest width.

    Args:
        model: the quantized model.
        header: of its artifact.
        tensors: of its artifact.
        example_inputs: what it is called with: real data, since the ranges of eight-bit branches come from it.
        additions: "requantized": convolutions that feed an addition (or anything but one layer) end in 8 bits, with ranges from
            the example inputs, where every layer has 8 bits or that loses nothing, else in floats; grouped ones and those of
            one dimension at every width; "exact": they end in floats, but for these, which end in int32.
        sums: with "exact", whether such convolutions, and all others, are integer operations with a float result, or
            quantize-dequantize float ones.

    Raises:
        UserError: an extra is not installed, the network cannot be exported, or the graph does not compute what it does.
    """
    check_word("additions", additions, get_args(Additions))
    require("onnxruntime", "runtime")
    inputs = as_arguments(example_inputs)
    leaves = (*model.parameters(), *tree_leaves(inputs))
    half = [x.dtype for x in leaves if isinstance(x, Tensor) and x.dtype in _HALF]
    if half:
        raise UserError(
            f"this {type(model).__name__} or its example_inputs hold {half[0]}: a graph is float32; give model.float() and "
            "example_inputs of float32"
        )
    lowering = lower_layers(float_graph(model, inputs, tensors), header, tensors)
    if additions == "requantized":
        end_in_bytes(lowering, _ranges(lowering, inputs))
    elif sums:
        end_in_sums(lowering)
    else:
        end_in_floats(lowering)
    graph = IntegerGraph(lowering.model, lowering.bindings(additions), header, tensors)
    highest = dict.fromkeys(quantized_layers(model), header.widths[0])
    hold_against(model, highest, inputs, Executable(stored(graph), graph.arrays(highest)))
    return graph


def _ranges(lowering: Lowering, inputs: tuple[Any, ...]) -> dict[int, Ranges]:
    """By index of a branch, the ranges of its results at every width; none of those that the inputs show too little of."""
    found: dict[int, list[tuple[ChannelRange, Range]]] = {i: [] for i in branches(lowering)}
    if not found:
        return {}
    header, tensors = lowering.header, lowering.tensors
    probe = lowering.model.clone()
    made = {value.name: value for node in probe.graph for value in node.outputs}
    probe.graph.outputs[:] = [made[lowering.products[i][1].name] for i in found]
    for value in probe.graph.outputs:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    copied = Lowering(probe, header, tensors, products=lowering.products, quantizers=lowering.quantizers)
    graph = IntegerGraph(probe, copied.bindings("exact"), header, tensors)
    for width in header.widths:
        assignment = dict.fromkeys((layer.name for layer in header.layers), width)
        executable = Executable(stored(graph), graph.arrays(assignment), optimize=False)
        for i, result in zip(found, executable.run(_numpy(inputs)), strict=True):
            if not np.isfinite(result).all():
                layer = lowering.products[i][0].layer
                raise UserError(f"layer {layer!r} gives values that are not finite on example_inputs at {width} bits")
            if result.size // result.shape[1] >= _FEWEST:
                found[i].append((_extremes(result), _common_range(result)))
    return {
        i: Ranges(tuple(channels for channels, _ in widths), tuple(common for _, common in widths))
        for i, widths in found.items()
        if widths
    }


def _extremes(result: np.ndarray) -> ChannelRange:
    """The least and the greatest result of every channel (dimension 1), and beyond them the room that unseen inputs want."""
    axes = tuple(axis for axis in range(result.ndim) if axis != 1)
    least, greatest = result.min(axes).astype(np.float64), result.max(axes).astype(np.float64)
    room = _ROOM * (greatest - least)
    ends = [_outward(*pair) for pair in zip((least - room).tolist(), (greatest + room).tolist(), strict=True)]
    return tuple(low for low, _ in ends), tuple(high for _, high in ends)


def _outward(least: float, greatest: float) -> tuple[float, float]:
    """A range that holds this one, written with three digits of its width, wherever it lies: its ends are stored as text."""
    if not least < greatest:
        return least, greatest
    digits = 2 - math.floor(math.log10(greatest - least))
    step = 10.0**-digits
    return round(math.floor(least / step) * step, digits), round(math.ceil(greatest / step) * step, digits)


def _common_range(result: np.ndarray) -> Range:
    """The range around 0 in which 8 bits for all channels lose least, and the root of the mean square of what they lose.

    That is what rounding loses, and what lies beyond the range.
    """
    low, high = min(float(result.min()), 0.0), max(float(result.max()), 0.0)
    # At random: every so-and-so-many-th result may be that of one column of every image.
    seen = result.reshape(-1)[np.random.default_rng(0).integers(result.size, size=_SEEN)].astype(np.float64)

    def loss(share: float) -> float:
        step = max(share * (high - low) / 255, LEAST_SCALE)
        zero = np.round(-share * low / step)
        return float(np.sqrt(np.square((np.clip(np.round(seen / step) + zero, 0, 255) - zero) * step - seen).mean()))

    share = min(_SHARES, key=loss)
    return _short(share * low), _short(share * high), _short(loss(share))


def _short(number: float) -> float:
    """With three digits: it is stored for every channel and width, as text."""
    return float(f"{number:.3g}")


def stored(graph: IntegerGraph) -> bytes:
    """ONNX without numbers: all that `bindings` names is declared as external data, which a session supplies."""
    assignment = {layer.name: graph.header.widths[0] for layer in graph.header.layers}
    for name, array in graph.arrays(assignment).items():
        value = graph.model.graph.initializers[name]
        dtype = ir.DataType.from_numpy(array.dtype)
        value.const_value = ir.ExternalTensor(
            "artifact", 0, array.nbytes, dtype, shape=ir.Shape(array.shape), name=name
        )
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(dtype)
    graph.strip()
    graph.model.metadata_props[KEY] = graph.bindings.to_text()
    return ir.serde.serialize_model(graph.model).SerializeToString()


def session_graph(
    model: nn.Module,
    header: Header,
    tensors: Mapping[str, np.ndarray],
    example_inputs: Tensor | tuple[Any, ...],
    additions: Additions = "requantized",
) -> np.ndarray:
    """The tensor `graph` of an artifact, packed: uint8, one dimension.

    Args:
        model: the quantized model.
        header: of its artifact.
        tensors: of its artifact.
        example_inputs: what the model is called with; real data.
        additions: see `integer_graph`.

    Raises:
        UserError: an extra is not installed, the network cannot be exported, or the graph does not compute what it does.
    """
    return packed(stored(integer_graph(model, header, tensors, example_inputs, additions, sums=True)))


def hold_against(
    model: nn.Module, assignment: Mapping[str, int], inputs: tuple[Any, ...], executable: Executable
) -> None:
    """Hold an executable against the model at an assignment.

    Raises:
        UserError: it computes something else.
    """
    expected = _results(model, assignment, inputs)
    found = [
        result for result in executable.run(_numpy(inputs)) if result.dtype.kind == "f" or not _has_floats(expected)
    ]
    disturbed = None
    for number, (wanted, result) in enumerate(zip(expected, found, strict=True)):
        noise, signal = _noise(wanted, result)
        if noise <= (_GREATEST_NOISE if wanted.dtype.kind == "f" else _MOST_OTHERS) * signal:
            continue
        disturbed = disturbed or _results(model, assignment, _disturbed(inputs))
        comparable = np.isfinite(wanted) & np.isfinite(disturbed[number])
        own, _ = _noise(wanted, np.where(comparable, disturbed[number], wanted))
        if not noise <= _GREATEST_OWN_NOISE * own:
            widths = "/".join(map(str, sorted(set(assignment.values()), reverse=True)))
            raise UserError(
                f"the exported graph of this {type(model).__name__} does not compute what the model does at {widths} bits "
                f"(noise {noise:.3g} beside {signal:.3g}): nothing was written; please report the network"
            )


def _noise(wanted: np.ndarray, result: np.ndarray) -> tuple[float, float]:
    """By how much a result is off, and what that is to be held against; of whole numbers how many are off, and how many."""
    if wanted.dtype.kind != "f":
        return float(np.count_nonzero(result != wanted)), float(wanted.size)
    # What is not finite, such as a masked logit, is to be the same; the rest is compared.
    finite = np.isfinite(wanted)
    same = np.array_equal(result[~finite], wanted[~finite], equal_nan=True)
    wanted, result = np.where(finite, wanted, 0), np.where(finite, result, 0)
    noise = np.square(result - wanted).sum() if same else np.inf
    whole = np.square(wanted).sum()
    signal = np.square(wanted - (wanted.mean(0) if wanted.ndim and len(wanted) > 1 else 0)).sum()
    # Where it answers the same to every input, as to tokens that are all alike, the answer itself is the signal.
    return float(noise), float(whole if signal <= _ROUNDING * whole else signal)


def _has_floats(results: Sequence[np.ndarray]) -> bool:
    return any(result.dtype.kind == "f" for result in results)


@torch.no_grad()
def _results(model: nn.Module, assignment: Mapping[str, int], inputs: tuple[Any, ...]) -> list[np.ndarray]:
    """The model's results at an assignment, float64; complex ones as ONNX has them, in pairs.

    Whole numbers, such as places and classes, turn with the last bit of what they are the greatest of: they are left out where
    there are others.
    """
    place = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with evaluating(model), switched(model, assignment):
        leaves = tree_leaves(model(*tree_map_only(Tensor, lambda x: x.to(place), inputs)))
    # A size of the input is a result of the graph, too.
    tensors = [torch.as_tensor(x) for x in leaves if isinstance(x, Tensor | int)]
    tensors = [torch.view_as_real(x) if x.is_complex() else x for x in tensors]
    results = [(x.double() if x.is_floating_point() else x).cpu().numpy() for x in tensors]
    return [result for result in results if result.dtype.kind == "f" or not _has_floats(results)]


def _disturbed(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def disturbed(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return x + _DISTURBANCE * x.std() * torch.randn(x.shape, generator=generator).to(x.device)

    found: tuple[Any, ...] = tree_map_only(Tensor, disturbed, inputs)
    return found


def _numpy(inputs: tuple[Any, ...]) -> list[np.ndarray]:
    return [x.detach().cpu().numpy() for x in tree_leaves(inputs) if isinstance(x, Tensor)]
