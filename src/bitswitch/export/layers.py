"""The rewrite of a float graph into an integer one: quantizers, integer weights, folded batch normalization.

The result has quantize and dequantize nodes around float operations (QDQ), which ONNX Runtime fuses into integer kernels: a
convolution where its result is quantized by one node alone, a matrix product also where it stays float.
"""

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from bitswitch.artifact import Header, tensor_name
from bitswitch.errors import UserError
from bitswitch.export.lowering import Lowering, only_user, take_place
from bitswitch.runtime.bindings import Product, Quantizer

# Operations whose results are not below 0 where their first input is not.
_KEEPING_SIGN = (
    "AveragePool",
    "Flatten",
    "GlobalAveragePool",
    "MaxPool",
    "ReduceMean",
    "Reshape",
    "Slice",
    "Transpose",
)


def lower_layers(model: ir.Model, header: Header, tensors: Mapping[str, np.ndarray]) -> Lowering:
    """Put integer weights, input quantizers and folded batch normalizations in the place of every quantized layer.

    Args:
        model: of `float_graph`; it is changed.
        header: of the artifact.
        tensors: of the artifact.

    Raises:
        UserError: a layer's weight is used by something that is neither a convolution nor a matrix product.
    """
    lowering = Lowering(model, header, tensors)
    parameters = {value.name: value for value in model.graph.inputs}
    uses = {}
    for entry in header.layers:
        weight = parameters.get(tensor_name(entry.name, "weight"))
        for node, _ in () if weight is None else weight.uses():
            uses[node] = entry.name
    for node in list(model.graph):
        if node in uses:
            _lower_layer(lowering, node, uses[node])
    if not lowering.products:
        raise UserError(
            "the exported graph holds no quantized layer: does the network call them on the example inputs?"
        )
    return lowering


def _lower_layer(lowering: Lowering, node: ir.Node, layer: str) -> None:
    if node.op_type == "Conv":
        _lower_convolution(lowering, node, layer)
    elif node.op_type == "Gemm" and node.attributes.get_int("transB"):
        _lower_linear(lowering, node, layer, node.inputs[2] if len(node.inputs) > 2 else None)
    elif node.op_type == "Transpose":
        for product, _ in list(node.outputs[0].uses()):
            if product.op_type != "MatMul":
                raise UserError(f"layer {layer!r} is exported as {product.op_type}, which has no integer form here")
            _lower_linear(lowering, product, layer, None)
    elif node.op_type not in ("Shape", "Size"):
        raise UserError(f"layer {layer!r} is exported as {node.op_type}, which has no integer form here")


def _lower_convolution(lowering: Lowering, node: ir.Node, layer: str) -> None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    product, x, weight, end = _operands(lowering, node, layer, "conv", bias, node.outputs[0])
    prefix = product.prefix
    parts = [lowering.constant(f"{prefix}.{key}") for key in ("bias", "bias_scale")]
    float_bias = lowering.add(node, "DequantizeLinear", parts, name=f"{prefix}.float_bias", axis=0)
    made = ir.Node("", "Conv", [x, weight, float_bias], node.attributes.values(), outputs=[ir.Value(name=prefix)])
    lowering.graph.insert_before(node, made)
    take_place(lowering.graph, end, made.outputs[0])
    lowering.products.append((product, made.outputs[0]))


def _lower_linear(lowering: Lowering, node: ir.Node, layer: str, bias: ir.Value | None) -> None:
    end = node.outputs[0]
    follower = only_user(end)
    if node.op_type == "MatMul" and follower is not None and follower.op_type == "Add":
        other = follower.inputs[1] if follower.inputs[0] is end else follower.inputs[0]
        if other is not None and other.name == tensor_name(layer, "bias"):
            bias, end = other, follower.outputs[0]
    product, x, weight, end = _operands(lowering, node, layer, "linear", bias, end)
    prefix = product.prefix
    # As the exporter has it: ONNX Runtime makes a float Gemm of a MatMul of two dimensions that an addition follows.
    made = lowering.add(node, node.op_type, [x, weight], name=f"{prefix}.matmul")
    made = lowering.add(node, "Add", [made, lowering.constant(f"{prefix}.bias")], name=prefix)
    take_place(lowering.graph, end, made)
    lowering.products.append((product, made))


def _operands(
    lowering: Lowering, node: ir.Node, layer: str, kind: str, bias: ir.Value | None, out: ir.Value
) -> tuple[Product, ir.Value, ir.Value, ir.Value]:
    """A product, its dequantized input and weight, and the result that it gives once a batch normalization is folded in."""
    norm, epsilon, end = _following_norm(lowering, kind, out)
    prefix = lowering.prefix(tensor_name(layer, "product"))
    product = Product(
        prefix=prefix,
        layer=layer,
        kind=kind,
        into=None,
        ranges=(),
        common_ranges=(),
        bias=_parameter(lowering, bias, layer),
        norm=norm,
        epsilon=epsilon,
    )
    x = _quantized_input(lowering, node, layer)
    codes, scale, zero = (lowering.constant(f"{prefix}.{key}") for key in ("codes", "scale", "zero"))
    axis = 0 if kind == "conv" else 1
    weight = lowering.add(node, "DequantizeLinear", [codes, scale, zero], name=f"{prefix}.weight", axis=axis)
    return product, x, weight, end


def _parameter(lowering: Lowering, bias: ir.Value | None, layer: str) -> str | None:
    """The name of a bias among the artifact's tensors; a bias of zeros, which torch's exporter adds, is none."""
    if bias is None:
        return None
    if bias.name in lowering.tensors:
        return bias.name
    constant = ir.convenience.get_const_tensor(bias)
    if constant is None or np.any(constant.numpy()):
        raise UserError(f"the bias of layer {layer!r} is computed in the network: it has no integer form here")
    return None


def _following_norm(lowering: Lowering, kind: str, out: ir.Value) -> tuple[str | None, float, ir.Value]:
    """(name, epsilon, its result) of the batch normalization of its channels that alone reads `out`, or (None, 0, out)."""
    node = only_user(out)
    if node is None or node.op_type != "BatchNormalization" or node.inputs[0] is not out:
        return None, 0.0, out
    # It normalizes dimension 1; the channels of a matrix product are the last.
    if kind == "linear" and (out.shape is None or len(out.shape) != 2):
        return None, 0.0, out
    mean = node.inputs[3]
    assert mean is not None and mean.name is not None
    norm = mean.name.removesuffix("running_mean").removesuffix(".")
    if norm not in lowering.header.norms:
        return None, 0.0, out
    return norm, node.attributes.get_float("epsilon", 1e-5), node.outputs[0]


def _activation(node: ir.Node | None) -> tuple[float | None, float | None] | None:
    """The bounds of a node that does nothing but bound its input, None where it has none on a side; or None."""
    if node is None or node.op_type not in ("Relu", "Clip"):
        return None
    if node.op_type == "Relu":
        return 0.0, None
    bounds = [None if value is None else ir.convenience.get_const_tensor(value) for value in node.inputs[1:]]
    if len(bounds) != 2 or bounds[0] is None or bounds[1] is None:
        return None
    least, greatest = (float(bound.numpy()) for bound in bounds if bound is not None)
    return (None if least == -math.inf else least), (None if greatest == math.inf else greatest)


def _source(value: ir.Value) -> tuple[ir.Value, tuple[float | None, float | None]]:
    """What to quantize in place of `value`, and the bounds of the activation function so passed over.

    A ReLU or a clip that one quantizer alone reads is what its own clipping does: a node less, and where a convolution stands
    before it, the one form in which ONNX Runtime finds an integer kernel.
    """
    node = value.producer()
    bounds = _activation(node)
    if node is None or bounds is None or only_user(value) is None:
        return value, (None, None)
    return _given(node), bounds


def _is_nonnegative(value: ir.Value) -> bool:
    """Whether a value is never below 0, by the operation that gives it."""
    node = value.producer()
    if node is None:
        return False
    if node.op_type in _KEEPING_SIGN:
        return _is_nonnegative(_given(node))
    bounds = _activation(node)
    least = None if bounds is None else bounds[0]
    return node.op_type in ("Sigmoid", "Softplus") or (least is not None and least >= 0)


def _given(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _quantized_input(lowering: Lowering, node: ir.Node, layer: str) -> ir.Value:
    """The dequantized codes of a layer's input: QuantizeLinear, a clip of the bytes where they are narrower, DequantizeLinear.

    The clip stands behind QuantizeLinear, on bytes: before it, ONNX Runtime would leave the convolution float. It is the branch
    of an If on a constant, which ONNX Runtime decides when a graph is loaded: at 8 bits there is nothing to clip.
    """
    x = _given(node)
    key = (id(x), layer)
    if key in lowering.quantizers:
        return lowering.quantizers[key][1]
    source, (least, greatest) = _source(x)
    prefix = lowering.prefix(tensor_name(layer, "input"))
    scale, zero, low, high, clips = (
        lowering.constant(f"{prefix}.{key}") for key in ("scale", "zero", "low", "high", "clips")
    )
    bytes_ = lowering.add(node, "QuantizeLinear", [source, scale, zero], name=f"{prefix}.bytes")
    clip = ir.node("Clip", [bytes_, low, high], outputs=[ir.Value(name=f"{prefix}.clipped")])
    keep = ir.node("Identity", [bytes_], outputs=[ir.Value(name=f"{prefix}.kept")])
    for branch in (clip, keep):
        branch.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    branches = {
        "then_branch": ir.Graph([], clip.outputs, nodes=[clip], name="clip"),
        "else_branch": ir.Graph([], keep.outputs, nodes=[keep], name="keep"),
    }
    codes = lowering.add(node, "If", [clips], name=f"{prefix}.codes", **branches)
    made = lowering.add(node, "DequantizeLinear", [codes, scale, zero], name=prefix)
    made.shape, made.type = x.shape, x.type
    quantizer = Quantizer(
        prefix=prefix, layer=layer, least=least, greatest=greatest, nonnegative=_is_nonnegative(source)
    )
    lowering.quantizers[key] = (quantizer, made)
    return made
