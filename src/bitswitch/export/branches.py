"""Convolutions whose result no single quantizer reads, such as those that feed an addition: where they end.

ONNX Runtime fuses a convolution between quantizers alone. One that feeds an addition either ends in bytes, or is an integer
matrix product of patches that ends in floats with the same sums to the last bit, or runs in floats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from bitswitch.export.lowering import Lowering, only_user, remove_dead, take_place
from bitswitch.runtime.bindings import Product

# ONNX Runtime's own integer matrix product with a float result and a float bias: it makes one of a standard product, but leaves
# the addition of the bias behind it. Files of ONNX have the standard form; see `standard_sums`.
ORT_DOMAIN, SUMS = "com.microsoft", "MatMulIntegerToFloat"

# Of a branch, at every width, the least and the greatest result of every channel.
Ranges = tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]


def branches(lowering: Lowering) -> list[int]:
    """Which products are convolutions whose result is not read by just one layer's quantizer, such as those that are added.

    ONNX Runtime fuses a convolution between quantizers alone; one that ends in floats would run in floats altogether.
    """
    return [i for i, (product, value) in enumerate(lowering.products) if product.kind == "conv" and not _is_read(value)]


def _is_read(value: ir.Value) -> bool:
    node = only_user(value)
    return node is not None and node.op_type == "QuantizeLinear"


def end_in_bytes(lowering: Lowering, ranges: Mapping[int, Ranges]) -> None:
    """Give the results of `branches` 8 bits per channel, and let them end in floats where a byte would be too coarse.

    Beside codes of 8 bits it is fine, beside codes of 2 bits mostly exact; beside codes of 6 bits its rounding turns so many
    over that a network answers otherwise, and so does that of the whole biases of the other convolutions, which get both forms,
    too. Which of the two it is, ONNX Runtime decides when a graph is loaded: an If on a constant. Convolutions that are no
    matrix product of patches end in bytes at every width.

    Args:
        lowering: of `lower_layers`.
        ranges: by index of a product, see `Product.ranges`.
    """
    for i, (product, value) in enumerate(lowering.products):
        node = value.producer()
        if node is None or product.kind != "conv":
            continue
        has_patches = _has_patches(lowering, node, product)
        if i in ranges:
            kind, nodes = ("either" if has_patches else "branch"), _bytes(lowering, node, product)
        elif has_patches:
            kind, nodes = "conv or sums", _convolution(_Chain(product.prefix), node)
        else:
            continue
        if has_patches:
            branches = {
                "then_branch": _branch("bytes", nodes),
                "else_branch": _branch("sums", _sums(lowering, node, product)),
            }
            taken = lowering.constant(f"{product.prefix}.in_bytes")
            nodes = [ir.node("If", [taken], branches, outputs=[ir.Value(name=f"{product.prefix}.either")])]
        lowering.graph.insert_before(node, nodes)
        made = nodes[-1].outputs[0]
        take_place(lowering, value, made)
        lowering.products[i] = (replace(product, kind=kind, ranges=ranges.get(i, ())), made)


def _branch(name: str, nodes: Sequence[ir.Node]) -> ir.Graph:
    result = nodes[-1].outputs[0]
    result.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph([], [result], nodes=nodes, name=name)


def _bytes(lowering: Lowering, node: ir.Node, product: Product) -> list[ir.Node]:
    """A convolution that ends in 8 bits, and the floats that they stand for."""
    prefix = product.prefix
    one = _fixed(lowering, "one", np.float32(1))
    zero = _fixed(lowering, "zero", np.uint8(0))
    step, offset, mean, variance = (
        lowering.constant(f"{prefix}.{key}") for key in ("step", "offset", "mean", "variance")
    )
    chain = _Chain(prefix)
    x = _convolution(chain, node)[-1].outputs[0]
    x = chain.add("QuantizeLinear", [x, one, zero], "bytes")
    x = chain.add("DequantizeLinear", [x, one, zero], "steps")
    # Not a multiplication and an addition: ONNX Runtime would carry them into the convolution's layout, where they are slow.
    chain.add("BatchNormalization", [x, step, offset, mean, variance], "result", {"epsilon": 0.0})
    return chain.nodes


@dataclass
class _Chain:
    """Nodes that are not in a graph yet."""

    prefix: str
    nodes: list[ir.Node] = field(default_factory=list)

    def add(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
    ) -> ir.Value:
        outputs = [ir.Value(name=f"{self.prefix}.{name}")]
        self.nodes.append(ir.node(op, inputs, attributes, outputs=outputs, domain=domain))
        return self.nodes[-1].outputs[0]


def _convolution(chain: _Chain, node: ir.Node) -> list[ir.Node]:
    """The same convolution with dequantizers of its own.

    Outside an If, ONNX Runtime would go on to run them where it does not take this branch.
    """
    inputs = [
        chain.add("DequantizeLinear", given.inputs, key, given.attributes)
        for key, given in zip(("dequantized", "weight", "float_bias"), _dequantizers(node), strict=True)
    ]
    chain.add("Conv", inputs, "conv", node.attributes)
    return chain.nodes


def _has_patches(lowering: Lowering, node: ir.Node, product: Product) -> bool:
    """Whether a convolution is a matrix product of patches: two dimensions, one group."""
    shape = next(entry.shape for entry in lowering.header.layers if entry.name == product.layer)
    return len(shape) == 4 and node.attributes.get_int("group", 1) == 1


def _dequantizers(node: ir.Node) -> list[ir.Node]:
    """Those before a convolution: of its input, its weight and its bias."""
    found = [None if value is None else value.producer() for value in node.inputs]
    return [giver for giver in found if giver is not None]


def _sums(lowering: Lowering, node: ir.Node, product: Product) -> list[ir.Node]:
    """A convolution as an integer matrix product of patches, which ends in floats by itself: its sums are exact.

    ONNX Runtime's ConvInteger takes two to four times as long. The bytes of a patch are brought together by columns first, then
    by rows, channels last, so that few and long runs are copied.
    """
    codes, scale, zero = _dequantizers(node)[0].inputs
    shape = next(entry.shape for entry in lowering.header.layers if entry.name == product.layer)
    pads = list(node.attributes.get_ints("pads", (0, 0, 0, 0)))
    strides = node.attributes.get_ints("strides", (1, 1))
    dilations = node.attributes.get_ints("dilations", (1, 1))
    chain = _Chain(product.prefix)
    x = chain.add("Transpose", [codes], "channels_last", {"perm": [0, 2, 3, 1]})
    if any(pads):
        x = chain.add("Pad", [x, _whole(lowering, [0, *pads[:2], 0, 0, *pads[2:], 0]), zero], "padded")
    for axis in (2, 1):
        x = _windows(lowering, chain, x, axis, shape[axis + 1], strides[axis - 1], dilations[axis - 1])
    weight, weight_scale, weight_zero, bias = (
        lowering.constant(f"{product.prefix}.{key}") for key in ("codes", "sum_scale", "sum_zero", "sum_bias")
    )
    matrix = chain.add("Transpose", [weight], "last", {"perm": [2, 3, 1, 0]})
    matrix = chain.add("Reshape", [matrix, _whole(lowering, [-1, shape[0]])], "matrix")
    lowering.model.opset_imports[ORT_DOMAIN] = 1
    inputs = [x, matrix, scale, weight_scale, zero, weight_zero, bias]
    x = chain.add(SUMS, inputs, "sums", domain=ORT_DOMAIN)
    chain.add("Transpose", [x], "channels_first", {"perm": [0, 3, 1, 2]})
    return chain.nodes


def _windows(
    lowering: Lowering, chain: _Chain, x: ir.Value, axis: int, size: int, stride: int, dilation: int
) -> ir.Value:
    """What a kernel meets along an axis, side by side in the channels."""
    if size == 1 and stride == 1:
        return x
    taken = []
    for i in range(size):
        # To the place from which the last step still has the whole kernel before it.
        end = (i + 1 - size) * dilation or np.iinfo(np.int32).max
        arguments = [_whole(lowering, [number]) for number in (i * dilation, end, axis, stride)]
        taken.append(chain.add("Slice", [x, *arguments], f"axis{axis}.{i}"))
    return taken[0] if size == 1 else chain.add("Concat", taken, f"axis{axis}", {"axis": 3})


def _whole(lowering: Lowering, numbers: Sequence[int]) -> ir.Value:
    """A constant of whole numbers that is in the graph."""
    return _fixed(lowering, "_".join(map(str, numbers)), np.asarray(numbers, np.int64))


def _fixed(lowering: Lowering, name: str, array: np.generic | np.ndarray) -> ir.Value:
    """A constant that is in the graph."""
    value = lowering.constant(f"bitswitch.{name}")
    value.const_value = ir.tensor(np.asarray(array), name=value.name)
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
    return value


def end_in_floats(lowering: Lowering) -> None:
    """Let `branches` be what a quantize-dequantize graph makes of them, float convolutions, with a bias that is not rounded."""
    for i in branches(lowering):
        product, value = lowering.products[i]
        node = value.producer()
        assert node is not None
        rounded = node.inputs[2]
        node.replace_input_with(2, lowering.constant(f"{product.prefix}.bias"))
        remove_dead(lowering.graph, None if rounded is None else rounded.producer())
        lowering.products[i] = (replace(product, kind="float"), value)


def end_in_sums(lowering: Lowering) -> None:
    """Let every convolution end in floats that its integer sums give exactly.

    Those that are no matrix product of patches end in int32 (ConvInteger), which is slow, where they are `branches`; where one
    quantizer reads them they stay convolutions between bytes, whose bias is a whole number.
    """
    rest = branches(lowering)
    for i, (product, value) in enumerate(lowering.products):
        node = value.producer()
        assert node is not None
        if product.kind == "conv" and _has_patches(lowering, node, product):
            kind, nodes = "sums", _sums(lowering, node, product)
        elif i in rest:
            kind, nodes = "int32", _int32(lowering, node, product)
        else:
            continue
        lowering.graph.insert_before(node, nodes)
        take_place(lowering, value, nodes[-1].outputs[0])
        lowering.products[i] = (replace(product, kind=kind), nodes[-1].outputs[0])


def _int32(lowering: Lowering, node: ir.Node, product: Product) -> list[ir.Node]:
    """A convolution that ends in int32, with a float multiplication and addition behind."""
    codes, _, zero = _dequantizers(node)[0].inputs
    weight, weight_zero, multiplier, offset = (
        lowering.constant(f"{product.prefix}.{key}") for key in ("codes", "zero", "multiplier", "offset")
    )
    chain = _Chain(product.prefix)
    x = chain.add("ConvInteger", [codes, weight, zero, weight_zero], "int32", node.attributes)
    x = chain.add("Cast", [x], "sum", {"to": ir.DataType.FLOAT})
    x = chain.add("Mul", [x, multiplier], "scaled")
    chain.add("Add", [x, offset], "result")
    return chain.nodes


def standard_sums(model: ir.Model) -> None:
    """Write integer matrix products that are ONNX Runtime's own as ONNX has them: between quantizers."""
    for node in list(model.graph):
        if node.op_type != SUMS:
            continue
        x, matrix, scale, weight_scale, zero, weight_zero, bias = node.inputs
        chain = _Chain(str(node.outputs[0].name))
        x = chain.add("DequantizeLinear", [x, scale, zero], "patches")
        matrix = chain.add("DequantizeLinear", [matrix, weight_scale, weight_zero], "matrix", {"axis": 1})
        x = chain.add("MatMul", [x, matrix], "product")
        x = chain.add("Add", [x, bias], "biased")
        model.graph.insert_before(node, chain.nodes)
        node.outputs[0].replace_all_uses_with(x)
        model.graph.remove(node, safe=True)
    model.opset_imports.pop(ORT_DOMAIN, None)
