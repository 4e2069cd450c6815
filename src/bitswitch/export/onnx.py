"""`export_onnx`: one ONNX file for one assignment, in standard operations, checked before it is put in place."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import ShapeInferencePass
from onnxscript.optimizer import fold_constants, remove_unused_nodes
from torch import Tensor, nn

from bitswitch import files
from bitswitch.assignment import Assignment
from bitswitch.errors import UserError, check_word
from bitswitch.export.artifact import Additions, contents
from bitswitch.export.decide import decide
from bitswitch.export.graph import IntegerGraph, hold_against, integer_graph
from bitswitch.export.layout import TO_LAST, sink
from bitswitch.export.lowering import take_place
from bitswitch.export.patches import standard_sums
from bitswitch.nn import as_arguments, unwrapped, widths
from bitswitch.runtime.bindings import Bindings, Product
from bitswitch.runtime.executable import Executable
from bitswitch.runtime.source import Source, read

Weights = Literal["int8", "int4", "int2"]
_BITS: Mapping[str, int] = {"int8": 8, "int4": 4, "int2": 2}
_PACKED = {4: ir.DataType.INT4, 2: ir.DataType.INT2}
_ASSIGNMENT, _ARTIFACT = "bitswitch.assignment", "bitswitch.artifact"
# How many inputs are drawn to hold a file against its model.
_DRAWN_INPUTS = 8
_DRAWN_DTYPES = {"tensor(int32)": torch.int32, "tensor(bool)": torch.bool}
_ANY_SIZE = 2**62
# The opset whose DequantizeLinear reads 2-bit integers, and the file format that has them.
_INT2_OPSET, _INT2_IR_VERSION = 25, 13


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    example_inputs: Tensor | tuple[Any, ...],
    weights: Weights = "int8",
    additions: Additions = "requantized",
) -> None:
    """Write the model as it stands, at the widths in use, to one ONNX file; the batch may have any size.

    Quantizers are QuantizeLinear and DequantizeLinear pairs (QDQ), with a Clip on the bytes where a width is narrower, and
    integer weights behind a DequantizeLinear. Batch normalization is folded. The graph is held against the model, and the file
    passes ONNX's checker and opens in ONNX Runtime, before it is put in place.

    On x86 without VNNI, ONNX Runtime's kernels let 8-bit products saturate in pairs: set the session option
    `session.x64quantprecision` to "1" there. Weights of 7 bits or fewer are not concerned. QuantizeLinear makes
    a number of NaN: results can be finite where the model's are NaN.

    Args:
        model: a quantized model.
        path: the file; written whole or not at all.
        example_inputs: what the model is called with; real data, since the ranges of branches come from it.
        weights: "int8"; "int4" or "int2": layers of so few bits are packed, which ONNX Runtime computes in floats.
        additions: "requantized": a convolution that feeds an addition ends in 8 bits, so that it runs in integers, where every
            layer has 8 bits or nothing is lost, and its weights are not packed (a grouped or 1-d one at every width); "exact":
            it ends in floats, and runs in floats in most runtimes.

    Raises:
        UserError: the extra `runtime` is not installed; the network cannot be exported; the file does not compute what the
            model does, or cannot be written.
    """
    check_word("weights", weights, get_args(Weights))
    model = unwrapped(model)
    header, tensors = contents(model)
    graph = integer_graph(model, header, tensors, example_inputs, additions)
    assignment = widths(model)
    content = _file(graph, assignment, weights)
    inputs = as_arguments(example_inputs)
    hold_against(model, assignment, inputs, _opened(content, weights))
    files.write(path, content)


def export_file(
    path: str | Path,
    out: str | Path,
    *,
    wanted: int | Mapping[str, int] | None = None,
    weights: Weights = "int8",
    model: nn.Module | None = None,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
) -> Assignment:
    """Write an ONNX file of an artifact that holds its graph; the network is not needed.

    Args:
        path: the artifact.
        out: the file; written whole or not at all.
        wanted: a width, or widths by layer over the highest; the highest that the artifact holds where None.
        weights: see `export_onnx`.
        model: what the artifact loads as: the file is held against it before it is put in place.
        example_inputs: what it is called with for that; drawn from a normal distribution where None.

    Returns:
        The width of every layer.

    Raises:
        UserError: the artifact cannot be used or holds no graph; there is no such width or layer; the file does not compute
            what the model does, or cannot be written.
    """
    check_word("weights", weights, get_args(Weights))
    source = read(path)
    assignment = source.assignment(source.widths[0] if wanted is None else wanted)
    stored = ir.serde.deserialize_model(onnx.load_model_from_string(source.graph))
    graph = IntegerGraph(stored, source.bindings, source.header, source.tensors)
    content = _file(graph, assignment.to_json(), weights)
    executable = _opened(content, weights)
    if model is not None:
        inputs = _drawn(executable) if example_inputs is None else example_inputs
        hold_against(model, assignment, inputs if isinstance(inputs, tuple) else (inputs,), executable)
    files.write(out, content)
    return assignment


def _drawn(executable: Executable) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (kind, [size if isinstance(size, int) else _DRAWN_INPUTS for size in shape])
        for kind, shape in executable.inputs
    ]
    return tuple(
        torch.randn(shape, generator=generator)
        if kind == "tensor(float)"
        else torch.zeros(shape, dtype=_DRAWN_DTYPES.get(kind, torch.int64))
        for kind, shape in shapes
    )


def _opened(content: bytes, weights: str) -> Executable:
    try:
        return Executable(content, {})
    except Exception as error:
        # ONNX Runtime has a class of its own for every kind of refusal.
        reason = " ".join(str(error).split())
        raise UserError(
            f"this ONNX Runtime does not open the file with weights={weights!r} ({reason[:200]}): try another"
        ) from error


def packed_products(bindings: Bindings, assignment: Mapping[str, int], weights: Weights) -> list[Product]:
    """The products whose weights a file packs into fewer bits than 8."""
    bits = _BITS[weights]
    return [
        p for p in bindings.products if bits < 8 and assignment[p.layer] <= bits and p.kind not in ("int32", "sums")
    ]


def _end_in_floats(graph: ir.Graph, product: Product) -> None:
    """Leave out the rounding of a convolution's result to a byte: with packed weights it is computed in floats all the same."""
    steps = next((node for node in graph if node.outputs[0].name == f"{product.prefix}.steps"), None)
    if steps is not None:
        bytes_ = steps.inputs[0]
        quantizer = None if bytes_ is None else bytes_.producer()
        assert quantizer is not None and quantizer.inputs[0] is not None
        take_place(graph, steps.outputs[0], quantizer.inputs[0])


def _as_matmul(graph: ir.Graph, product: Product) -> None:
    """ONNX Runtime makes an operation that takes no int2 of a quantized Gemm, and a Gemm of a MatMul and an Add."""
    made = next((node for node in graph if node.outputs[0].name == f"{product.prefix}.matmul"), None)
    if made is not None and made.op_type == "Gemm":
        made.op_type = "MatMul"
        for node in made.outputs[0].consumers():
            assert node.op_type == "Add"
            node.op_type = "Sum"


def _can_fold(node: ir.Node) -> bool | None:
    """Quantized weights stay integers; all else is as the fold has it (None)."""
    return False if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None


def is_of_another(path: str | Path, source: Source, assignment: Assignment) -> bool:
    """Whether a file is the ONNX file of the same artifact, and of another assignment."""
    try:
        properties = onnx.load_model(path, load_external_data=False).metadata_props
    except (OSError, DecodeError):
        return False
    known = {one.key: one.value for one in properties}
    same = known.get(_ARTIFACT) == files.digest(source.header.to_text().encode())
    return same and known.get(_ASSIGNMENT) != files.canonical_json(assignment.to_json())


def _file(graph: IntegerGraph, assignment: Mapping[str, int], weights: Weights) -> bytes:
    """The file's content: the graph with its numbers in it."""
    bits = _BITS[weights]
    arrays = graph.arrays(assignment, filled=lambda width: width > bits or bits == 8)
    products = packed_products(graph.bindings, assignment, weights)
    packed = {f"{product.prefix}.{key}" for product in products for key in ("codes", "zero")}
    sums = [p for p in graph.bindings.products if p.kind == "sums" and assignment[p.layer] <= bits < 8]
    if sums and graph.bindings.additions == "exact":
        # They are products of matrices of patches, and ONNX Runtime shapes no packed weights into a matrix.
        raise UserError(f"weights={weights!r}: the stored graph keeps exact sums, for int8 weights alone; use int8")
    decide(graph.model.graph, arrays)
    for product in products:
        _end_in_floats(graph.model.graph, product)
        if weights == "int2":
            _as_matmul(graph.model.graph, product)
    standard_sums(graph.model)
    for name, value in graph.model.graph.initializers.items():
        if name in arrays:
            dtype = _PACKED[bits] if name in packed else ir.DataType.from_numpy(arrays[name].dtype)
            array = arrays[name].astype(dtype.numpy())
            value.const_value = ir.tensor(array, dtype=dtype, name=name)
            value.shape, value.type = ir.Shape(array.shape), ir.TensorType(dtype)
    # The matrices of patches: whoever reads the file wants weights, not what makes them.
    fold_constants(graph.model, input_size_limit=_ANY_SIZE, output_size_limit=_ANY_SIZE, should_fold=_can_fold)
    remove_unused_nodes(graph.model)
    if weights == "int2":
        graph.model.opset_imports[""] = _INT2_OPSET
        graph.model.ir_version = _INT2_IR_VERSION
    # Shapes, which a stored graph has not, say what can be transposed.
    ShapeInferencePass(strict_mode=False)(graph.model)
    sink(graph.model.graph, TO_LAST)
    graph.model.graph.sort()
    graph.strip()
    graph.model.metadata_props[_ARTIFACT] = files.digest(graph.header.to_text().encode())
    graph.model.metadata_props[_ASSIGNMENT] = files.canonical_json(dict(assignment))
    proto = ir.serde.serialize_model(graph.model)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()
