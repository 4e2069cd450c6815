import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from bitswitch.export.layout import TO_FIRST, TO_LAST, sink, transposed

SHAPE = (2, 3, 4, 5)


def value(name, shape=None):
    return ir.Value(name=name, shape=None if shape is None else ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def node(op, inputs, name, shape=None, **attributes):
    return ir.node(op, inputs, attributes, outputs=[value(name, shape)])


def last(shape):
    return tuple(shape[axis] for axis in TO_LAST)


def run(graph, feeds):
    model = ir.Model(graph, ir_version=10)
    graph.opset_imports[""] = 21
    return ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, feeds)


def built(other_shape, read_outside):
    """A network whose products are channels last: a(x) + other, bounded, and into the next product, and maybe elsewhere."""
    x, other = value("x", SHAPE), value("other", other_shape)
    nodes = [node("Transpose", [x], "x_last", perm=TO_LAST)]
    nodes.append(node("Sin", [nodes[-1].outputs[0]], "product"))
    nodes.append(node("Transpose", [nodes[-1].outputs[0]], "first", SHAPE, perm=TO_FIRST))
    nodes.append(node("Add", [nodes[-1].outputs[0], other], "sum", SHAPE))
    nodes.append(node("Relu", [nodes[-1].outputs[0]], "bounded", SHAPE))
    bounded = nodes[-1].outputs[0]
    nodes.append(node("Transpose", [bounded], "bounded_last", perm=TO_LAST))
    nodes.append(node("Cos", [nodes[-1].outputs[0]], "next"))
    outputs = [nodes[-1].outputs[0]]
    if read_outside:
        nodes.append(node("ReduceMean", [bounded], "mean"))
        outputs.append(nodes[-1].outputs[0])
    return ir.Graph([x, other], outputs, nodes=nodes)


@pytest.mark.parametrize("read_outside", [False, True])
@pytest.mark.parametrize(
    ("other_shape", "left"), [(SHAPE, 2), ((2, 3, 1, 1), 2), ((), 1), ((1,), 1), ((3, 1, 1), 3), ((5,), 3), (None, 3)]
)
def test_transpositions_sink_to_where_they_meet(other_shape, left, read_outside):
    """What is computed stays; of three transpositions those of x, and of what is added where it has four dimensions, stay."""
    generator = np.random.default_rng(0)
    shape = SHAPE if other_shape is None else other_shape
    feeds = {"x": generator.normal(size=SHAPE), "other": generator.normal(size=shape)}
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    graph = built(other_shape, read_outside)
    before = run(graph, feeds)
    graph = built(other_shape, read_outside)
    sink(graph, TO_FIRST)
    graph.sort()
    # Where another still reads the sum channels first, one more.
    more = int(read_outside and left < 3)
    assert sum(node.op_type == "Transpose" for node in graph) == left + more
    assert all(out.uses() or out.is_graph_output() for node in graph for out in node.outputs)
    for a, b in zip(before, run(graph, feeds), strict=True):
        assert np.array_equal(a, b)


def test_a_result_of_the_network_may_be_what_sinks():
    x = value("x", SHAPE)
    nodes = [node("Transpose", [x], "last", last(SHAPE), perm=TO_LAST), node("Sin", [x], "sin", SHAPE)]
    nodes.append(node("Relu", [nodes[0].outputs[0]], "result", last(SHAPE)))
    graph = ir.Graph([x], [nodes[-1].outputs[0], nodes[1].outputs[0]], nodes=nodes)
    feeds = {"x": np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)}
    sink(graph, TO_LAST)
    graph.sort()
    assert [out.name for out in graph.outputs] == ["result", "sin"]
    assert [node.op_type for node in graph][-1] == "Transpose"
    assert np.array_equal(run(graph, feeds)[0], np.maximum(feeds["x"], 0).transpose(TO_LAST))


def test_a_scale_of_one_axis_keeps_its_place():
    x, scale = value("x", SHAPE), value("scale", (5,))
    first = node("Transpose", [x], "first", perm=TO_FIRST)
    scaled = node("QuantizeLinear", [first.outputs[0], scale], "codes", axis=1)
    graph = ir.Graph([x, scale], scaled.outputs, nodes=[first, scaled])
    sink(graph, TO_FIRST)
    assert [node.op_type for node in graph] == ["Transpose", "QuantizeLinear"]


def test_a_transposition_is_made_once():
    x = value("x", SHAPE)
    relu = node("Relu", [x], "relu", SHAPE)
    graph = ir.Graph([x], relu.outputs, nodes=[relu])
    once = transposed(graph, relu.outputs[0], TO_LAST)
    assert transposed(graph, relu.outputs[0], TO_LAST) is once and tuple(once.shape) == last(SHAPE)
    assert transposed(graph, once, TO_FIRST) is relu.outputs[0]
    assert transposed(graph, x, TO_LAST).producer() is graph[0]
