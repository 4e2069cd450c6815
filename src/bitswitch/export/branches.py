"""Convolutions whose result no single quantizer reads, such as those that feed an addition: where they end.

ONNX Runtime fuses a convolution between quantizers alone. One that feeds an addition either ends in bytes, or is an integer
matrix product of patches that ends in floats with the same sums to the last bit, or runs in floats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from bitswitch.export.layout import TO_FIRST, TO_LAST, sink, transposed
from bitswitch.export.lowering import Chain, Lowering, dequantizers, only_user, remove_dead, take_place
from bitswitch.export.patches import sums_of_patches
from bitswitch.runtime.bindings import Product

# The least and the greatest result of every channel; the ends of a range for all channels, and what its bytes lose.
ChannelRange = tuple[tuple[float, ...], tuple[float, ...]]
Range = tuple[float, float, float]


@dataclass(frozen=True)
class Ranges:
    """Of a branch, at every width; see `Product.ranges` and `Product.common_ranges`."""

    channels: tuple[ChannelRange, ...]
    common: tuple[Range, ...]


def branches(lowering: Lowering) -> list[int]:
    """Which products are convolutions whose result is not read by just one layer's quantizer, such as those that are added.

    ONNX Runtime fuses a convolution between quantizers alone; one that ends in floats would run in floats altogether.
    """
    return [i for i, (product, value) in enumerate(lowering.products) if product.kind == "conv" and not _is_read(value)]


def _is_read(value: ir.Value) -> bool:
    node = only_user(value)
    return node is not None and node.op_type == "QuantizeLinear"


def end_in_bytes(lowering: Lowering, ranges: Mapping[int, Ranges]) -> None:
    """Give the results of `branches` that have ranges 8 bits, and let them end in floats where a byte would be too coarse.

    Beside codes of 8 bits it is fine, beside codes of 2 bits mostly exact; beside codes of 6 bits its rounding turns so many
    over that a network answers otherwise, and so does that of the whole biases of the other convolutions, which get both forms,
    too. Which of them it is, ONNX Runtime decides when a graph is loaded: an If on a constant. Convolutions that are no matrix
    product of patches end in bytes at every width. `branches` without ranges end in floats that their sums give exactly.

    Args:
        lowering: of `lower_layers`.
        ranges: by index of a product.
    """
    for i, site in _sites(lowering).items():
        if i in ranges:
            kind, nodes = "branch", _bytes_of_channels(lowering, site)
            if site.has_patches:
                kind = "bytes or sums"
                nodes = [_either(lowering, site, "alike", _bytes(lowering, site), nodes)]
                nodes = [_either(lowering, site, "in_bytes", nodes, sums_of_patches(lowering, site.product, site.node))]
        elif site.reader is None:
            kind, nodes = _exact(lowering, site)
        elif site.is_image:
            kind, nodes = "conv", _codes(site)
            if site.has_patches:
                kind = "conv or sums"
                nodes = [_either(lowering, site, "in_bytes", nodes, _sums_in_codes(lowering, site))]
        else:
            continue
        product = replace(site.product, kind=kind)
        if i in ranges:
            product = replace(product, ranges=ranges[i].channels, common_ranges=ranges[i].common)
        _put(lowering, i, site, product, nodes, codes=site.reader is not None)
    sink(lowering.graph, TO_FIRST)


def end_in_sums(lowering: Lowering) -> None:
    """Let every convolution end in floats that its integer sums give exactly.

    Those that are no matrix product of patches end in int32 (ConvInteger), which is slow, where they are `branches`; where one
    quantizer reads them they stay convolutions between bytes, whose bias is a whole number.
    """
    for i, site in _sites(lowering).items():
        if site.has_patches or site.reader is None:
            kind, nodes = _exact(lowering, site)
        elif site.is_image:
            kind, nodes = "conv", _codes(site)
        else:
            continue
        _put(lowering, i, site, replace(site.product, kind=kind), nodes, codes=kind == "conv")
    sink(lowering.graph, TO_FIRST)


@dataclass(frozen=True)
class _Site:
    """A convolution in its place.

    Attributes:
        product: what it is.
        result: of it.
        node: itself.
        is_image: it has two dimensions, and the codes of its input are channels last.
        has_patches: it is a matrix product of patches: two dimensions, one group.
        reader: the QuantizeLinear that alone reads it.
        into: the prefix of that quantizer.
    """

    product: Product
    result: ir.Value
    node: ir.Node
    is_image: bool
    has_patches: bool
    reader: ir.Node | None
    into: str | None


def _sites(lowering: Lowering) -> dict[int, _Site]:
    """All convolutions, by index of the product; the quantizers of images now read them channels last."""
    shapes = {layer.name: layer.shape for layer in lowering.header.layers}
    found = {}
    for i, (product, value) in enumerate(lowering.products):
        node = value.producer()
        if product.kind != "conv" or node is None:
            continue
        user = only_user(value)
        reader = user if user is not None and user.op_type == "QuantizeLinear" else None
        is_image = len(shapes[product.layer]) == 4
        found[i] = _Site(
            product=product,
            result=value,
            node=node,
            is_image=is_image,
            has_patches=is_image and node.attributes.get_int("group", 1) == 1,
            reader=reader,
            into=None if reader is None else lowering.quantizer_of(reader),
        )
    # A quantizer belongs to one layer, whose convolutions are all of images or none.
    images = {site.node.inputs[0] for site in found.values() if site.is_image}
    for quantizer, value in lowering.quantizers.values():
        if value in images:
            node = lowering.quantizing(quantizer.prefix)
            source = node.inputs[0]
            assert source is not None
            node.replace_input_with(0, transposed(lowering.graph, source, TO_LAST))
    return found


def _put(
    lowering: Lowering, i: int, site: _Site, product: Product, nodes: Sequence[ir.Node], *, codes: bool = False
) -> None:
    """Put nodes in the place of a convolution and, where they end in codes, of the quantizer that alone reads it."""
    graph = lowering.graph
    graph.insert_before(site.node, nodes)
    made, end, is_read_so = nodes[-1].outputs[0], site.result, not site.is_image
    if codes:
        assert site.reader is not None
        end, is_read_so = site.reader.outputs[0], site.reader.inputs[0] is not site.result
    new = made if is_read_so else transposed(graph, made, TO_FIRST)
    take_place(graph, end, new)
    # Where the last node was a transposition, nobody reads it.
    remove_dead(graph, made.producer())
    lowering.products[i] = (replace(product, into=site.into if codes else None), new)


def _either(
    lowering: Lowering, site: _Site, flag: str, then: Sequence[ir.Node], otherwise: Sequence[ir.Node]
) -> ir.Node:
    """An If on a constant of a product."""
    forms = {}
    for key, nodes in (("then_branch", then), ("else_branch", otherwise)):
        result = nodes[-1].outputs[0]
        result.type = ir.TensorType(ir.DataType.FLOAT if site.reader is None else ir.DataType.UINT8)
        forms[key] = ir.Graph([], [result], nodes=nodes, name=key)
    prefix = f"{site.product.prefix}.{flag}"
    return ir.node("If", [lowering.constant(prefix)], forms, outputs=[ir.Value(name=f"{prefix}.either")])


def _codes(site: _Site) -> list[ir.Node]:
    """A convolution that ends in the codes of its reader."""
    assert site.reader is not None
    chain = Chain(site.product.prefix)
    x = _convolution(chain, site)
    x = chain.add("QuantizeLinear", [x, *site.reader.inputs[1:]], "bytes")
    chain.add("Transpose", [x], "bytes_last", {"perm": TO_LAST})
    return chain.nodes


def _sums_in_codes(lowering: Lowering, site: _Site) -> list[ir.Node]:
    """Exact sums that end in the codes of their reader."""
    assert site.reader is not None
    nodes = sums_of_patches(lowering, site.product, site.node)
    chain = Chain(f"{site.product.prefix}.sums", nodes)
    chain.add("QuantizeLinear", [nodes[-1].outputs[0], *site.reader.inputs[1:]], "bytes")
    return nodes


def _bytes(lowering: Lowering, site: _Site) -> list[ir.Node]:
    """A convolution that ends in 8 bits, of one scale, and the floats that they stand for."""
    chain = Chain(f"{site.product.prefix}.alike")
    one, step, byte = (
        lowering.fixed("one", np.float32(1)),
        lowering.constant(f"{site.product.prefix}.common_step"),
        lowering.constant(f"{site.product.prefix}.common_zero"),
    )
    x = _convolution(chain, site)
    x = chain.add("QuantizeLinear", [x, one, byte], "bytes")
    x = chain.add("Transpose", [x], "bytes_last", {"perm": TO_LAST})
    chain.add("DequantizeLinear", [x, step, byte], "result")
    return chain.nodes


def _bytes_of_channels(lowering: Lowering, site: _Site) -> list[ir.Node]:
    """A convolution that ends in 8 bits, with a scale for every channel, and the floats that they stand for."""
    prefix = site.product.prefix
    one = lowering.fixed("one", np.float32(1))
    zero = lowering.fixed("zero", np.uint8(0))
    step, offset, mean, variance = (
        lowering.constant(f"{prefix}.{key}") for key in ("step", "offset", "mean", "variance")
    )
    chain = Chain(prefix)
    x = _convolution(chain, site)
    x = chain.add("QuantizeLinear", [x, one, zero], "bytes")
    x = chain.add("DequantizeLinear", [x, one, zero], "steps")
    # Not a multiplication and an addition: they are slower, and more so where channels are last.
    x = chain.add("BatchNormalization", [x, step, offset, mean, variance], "result", {"epsilon": 0.0})
    if site.is_image:
        chain.add("Transpose", [x], "result_last", {"perm": TO_LAST})
    return chain.nodes


def _convolution(chain: Chain, site: _Site) -> ir.Value:
    """The same convolution with dequantizers of its own.

    Outside an If, ONNX Runtime would go on to run them where it does not take this branch.
    """
    givers = dequantizers(site.node)
    codes = givers[0].inputs[0]
    if site.is_image:
        codes = chain.add("Transpose", [codes], "codes_first", {"perm": TO_FIRST})
    inputs = [
        chain.add("DequantizeLinear", [codes if i == 0 else given.inputs[0], *given.inputs[1:]], key, given.attributes)
        for i, (key, given) in enumerate(zip(("dequantized", "weight", "float_bias"), givers, strict=True))
    ]
    return chain.add("Conv", inputs, "conv", site.node.attributes)


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


def _exact(lowering: Lowering, site: _Site) -> tuple[str, list[ir.Node]]:
    """A convolution that ends in floats, exactly, and its kind."""
    if site.has_patches:
        return "sums", sums_of_patches(lowering, site.product, site.node)
    return "int32", _int32(lowering, site)


def _int32(lowering: Lowering, site: _Site) -> list[ir.Node]:
    """A convolution that ends in int32, with a float multiplication and addition behind."""
    codes, _, zero = dequantizers(site.node)[0].inputs
    prefix = site.product.prefix
    weight, weight_zero, multiplier, offset = (
        lowering.constant(f"{prefix}.{key}") for key in ("codes", "zero", "multiplier", "offset")
    )
    chain = Chain(prefix)
    if site.is_image:
        codes = chain.add("Transpose", [codes], "codes_first", {"perm": TO_FIRST})
    x = chain.add("ConvInteger", [codes, weight, zero, weight_zero], "int32", site.node.attributes)
    x = chain.add("Cast", [x], "sum", {"to": ir.DataType.FLOAT})
    x = chain.add("Mul", [x, multiplier], "scaled")
    x = chain.add("Add", [x, offset], "result")
    if site.is_image:
        chain.add("Transpose", [x], "result_last", {"perm": TO_LAST})
    return chain.nodes
