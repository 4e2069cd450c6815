"""Rewrites of an exported graph: fewer operations, the same results."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from bitswitch.export.simplify import simplify

SHAPE = ("batch", 3, 6, 8)


def value(name, shape):
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def whole(name, numbers):
    return ir.Value(name=name, const_value=ir.tensor(np.array(numbers, np.int64), name=name))


def model(nodes, constants, outputs, inputs):
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=constants, opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


def simplified(made):
    """The model's operations after `simplify`; what it computes stays."""
    x = np.random.default_rng(0).normal(size=(2, 3, 6, 8)).astype(np.float32)
    before = ReferenceEvaluator(ir.serde.serialize_model(made)).run(None, {"x": x})
    simplify(made)
    after = ReferenceEvaluator(ir.serde.serialize_model(made)).run(None, {"x": x})
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    return [node.op_type for node in made.graph if node.op_type != "Constant"]


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        (([0], [9], [2], [2]), ([1], [-1], [3], [3]), 1),
        (([-4], [-1], [3], [1]), ([1, 0], [2, 5], [1, 2], [1, 2]), 1),
        # A slice of what a slice along the same axis left is another.
        (([1], [9], [2], [2]), ([1], [9], [2], [1]), 2),
        (([1], [9], [2], [2]), ([1, 1], [9, 9], [3, 2], [1, 1]), 2),
        # Which axis the last is, a rule that does not know the shape cannot tell.
        (([1], [9], [-1], [2]), ([1], [9], [2], [1]), 2),
        (([1], [9], [2]), ([1], [9], [3], [1]), 2),
    ],
)
@pytest.mark.parametrize("read_outside", [False, True])
def test_a_slice_of_a_slice(first, second, left, read_outside):
    x = value("x", SHAPE)
    constants, nodes, result = [], [], x
    for i, numbers in enumerate((first, second)):
        given = [whole(f"{i}.{k}", own) for k, own in enumerate(numbers)]
        constants += given
        nodes.append(ir.node("Slice", [result, *given], outputs=[value(f"sliced{i}", ("batch", None, None, None))]))
        result = nodes[-1].outputs[0]
    outputs = [nodes[0].outputs[0], result] if read_outside else [result]
    assert simplified(model(nodes, constants, outputs, [x])) == ["Slice"] * (2 if read_outside else left)


def test_a_view_that_shares_out_two_unknown_sizes_stays():
    """(2, 3, 6, 8) without its rows, (2, 3, 8), and (4, 3, 4) are both (?, 3, ?)."""
    x, over, shape = value("x", (None, 3, 6, None)), whole("axes", [2]), whole("shape", (4, 3, 4))
    mean = ir.node("ReduceMean", [x, over], outputs=[value("mean", (None, 3, 1, None))])
    out = value("view", (None, 3, None))
    reshape = ir.node("Reshape", [mean.outputs[0], shape], outputs=[out])
    assert simplified(model([mean, reshape], [over, shape], [out], [x])) == ["ReduceMean", "Reshape"]


@pytest.mark.parametrize(
    ("axes", "keepdims", "view", "left"),
    [
        ([2, 3], 1, (-1, 3), ["ReduceMean"]),
        ([-1, -2], 1, (-1, 3), ["ReduceMean"]),
        ([2, 3], 1, (-1, 1, 3), ["ReduceMean", "Reshape"]),
        ([2], 1, (-1, 24), ["ReduceMean", "Reshape"]),
        ([3], 1, (-1, 3, 6), ["ReduceMean"]),
        ([2, 3], 0, (-1, 3, 1), ["ReduceMean", "Reshape"]),
        ([1, 2], 1, (-1, 8), ["ReduceMean"]),
    ],
)
def test_a_view_of_a_mean(axes, keepdims, view, left):
    x, over, shape = value("x", SHAPE), whole("axes", axes), whole("shape", view)
    dims = [
        1 if axis in (a % 4 for a in axes) else size
        for axis, size in enumerate(SHAPE)
        if keepdims or axis not in [a % 4 for a in axes]
    ]
    mean = ir.node("ReduceMean", [x, over], {"keepdims": keepdims}, outputs=[value("mean", dims)])
    out = value("view", ["batch" if size == -1 else size for size in view])
    reshape = ir.node("Reshape", [mean.outputs[0], shape], outputs=[out])
    assert simplified(model([mean, reshape], [over, shape], [out], [x])) == left
