"""Convolutions as integer matrix products of patches, which end in floats by themselves: their sums are exact."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from bitswitch.export.lowering import Chain, Lowering, dequantizers, take_place
from bitswitch.runtime.bindings import Product

# ONNX Runtime's own integer matrix product with a float result and a float bias: it makes one of a standard product, but leaves
# the addition of the bias behind it. Files of ONNX have the standard form; see `standard_sums`.
ORT_DOMAIN, SUMS = "com.microsoft", "MatMulIntegerToFloat"

# Of so few channels the runs of bytes that make a patch are so short that copying them takes longer than the products: two
# neighbours on a row share a patch, which halves the runs for a third more products where kernels are three wide, fewer where
# they are wider. Of 32 channels, or with 64 filters, it does not pay.
_MOST_SHARING_CHANNELS, _MOST_SHARING_FILTERS = 16, 32


def sums_of_patches(lowering: Lowering, product: Product, node: ir.Node) -> list[ir.Node]:
    """A convolution of two dimensions and one group as an integer matrix product of patches, channels last.

    ONNX Runtime's ConvInteger takes two to four times as long. The bytes of a patch are brought together by columns first, then
    by rows, so that few and long runs are copied.
    """
    x, scale, zero = dequantizers(node)[0].inputs
    shape = next(entry.shape for entry in lowering.header.layers if entry.name == product.layer)
    pads = list(node.attributes.get_ints("pads", (0, 0, 0, 0)))
    strides = node.attributes.get_ints("strides", (1, 1))
    dilations = node.attributes.get_ints("dilations", (1, 1))
    chain = Chain(f"{product.prefix}.sums")
    assert x is not None
    if any(pads):
        x = chain.add("Pad", [x, lowering.whole([0, *pads[:2], 0, 0, *pads[2:], 0]), zero], "padded")
    out, channels, rows, columns = shape
    width = _width(node.outputs[0])
    shares = _can_share(shape, width, strides[1], dilations[1])
    if shares:
        assert width is not None
        x = chain.add("Reshape", [x, lowering.whole([0, 0, (width + columns - 1) // 2, 2 * channels])], "neighbours")
        columns = (columns + 1) // 2
    for axis, size in ((2, columns), (1, rows)):
        x = _windows(lowering, chain, x, axis, size, strides[axis - 1], dilations[axis - 1])
    weight, *factors = (
        lowering.constant(f"{product.prefix}.{key}") for key in ("codes", "sum_scale", "sum_zero", "sum_bias")
    )
    if shares:
        out = 2 * out
        kernels = [
            chain.add("Pad", [weight, lowering.whole([0, 0, 0, place, 0, 0, 0, 1 - place])], f"neighbour{place}")
            for place in (0, 1)
        ]
        weight, *factors = (
            chain.add("Concat", pair, f"both.{key}", {"axis": 0})
            for key, pair in (("codes", kernels), *((factor.name, [factor, factor]) for factor in factors))
        )
    matrix = chain.add("Transpose", [weight], "last", {"perm": [2, 3, 1, 0]})
    matrix = chain.add("Reshape", [matrix, lowering.whole([-1, out])], "matrix")
    weight_scale, weight_zero, bias = factors
    lowering.model.opset_imports[ORT_DOMAIN] = 1
    x = chain.add(SUMS, [x, matrix, scale, weight_scale, zero, weight_zero, bias], "result", domain=ORT_DOMAIN)
    if shares:
        assert width is not None
        chain.add("Reshape", [x, lowering.whole([0, 0, width, out // 2])], "each")
    return chain.nodes


def _width(result: ir.Value) -> int | None:
    """Of the result of a convolution, channels first, where it is always the same."""
    width = None if result.shape is None else result.shape[3]
    return width if isinstance(width, int) else None


def _can_share(shape: Sequence[int], width: int | None, stride: int, dilation: int) -> bool:
    """Whether patches of two neighbours on a row are made of whole pairs of columns, and worth it."""
    filters, channels, _, columns = shape
    whole = width is not None and width % 2 == 0 and columns % 2 == 1 and stride == dilation == 1
    return whole and columns > 1 and channels <= _MOST_SHARING_CHANNELS and filters <= _MOST_SHARING_FILTERS


def _windows(
    lowering: Lowering, chain: Chain, x: ir.Value, axis: int, size: int, stride: int, dilation: int
) -> ir.Value:
    """What a kernel meets along an axis, side by side in the channels."""
    if size == 1 and stride == 1:
        return x
    taken = []
    for i in range(size):
        # To the place from which the last step still has the whole kernel before it.
        end = (i + 1 - size) * dilation or np.iinfo(np.int32).max
        arguments = [lowering.whole([number]) for number in (i * dilation, end, axis, stride)]
        taken.append(chain.add("Slice", [x, *arguments], f"axis{axis}.{i}"))
    return taken[0] if size == 1 else chain.add("Concat", taken, f"axis{axis}", {"axis": 3})


def standard_sums(model: ir.Model) -> None:
    """Write integer matrix products that are ONNX Runtime's own as ONNX has them: between quantizers."""
    for node in list(model.graph):
        if node.op_type != SUMS:
            continue
        x, matrix, scale, weight_scale, zero, weight_zero, bias = node.inputs
        chain = Chain(str(node.outputs[0].name))
        x = chain.add("DequantizeLinear", [x, scale, zero], "patches")
        matrix = chain.add("DequantizeLinear", [matrix, weight_scale, weight_zero], "matrix", {"axis": 1})
        x = chain.add("MatMul", [x, matrix], "product")
        x = chain.add("Add", [x, bias], "biased")
        model.graph.insert_before(node, chain.nodes)
        take_place(model.graph, node.outputs[0], x)
    model.opset_imports.pop(ORT_DOMAIN, None)
