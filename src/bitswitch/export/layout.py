"""The order of dimensions between convolutions: channels last in the graph of a session, channels first in ONNX files.

ONNX Runtime's integer convolutions and matrix products of patches want channels last. Given channels first, it moves its own
transpositions out of their way one by one, and leaves those of every addition of something that is not channels last itself,
such as those of a residual network's first stage.
"""

from collections.abc import Sequence

import onnx_ir as ir

from bitswitch.export.lowering import take_place

# Channels last from channels first, and back.
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)

_SCALED = ("DequantizeLinear", "QuantizeLinear")
# Operations on every element by itself: inputs but the first may be scalars, or have the first's dimensions.
_ELEMENTWISE = frozenset(
    (
        *(
            "Abs",
            "Add",
            "Cast",
            "Clip",
            "Div",
            "Elu",
            "Erf",
            "Exp",
            "Gelu",
            "HardSigmoid",
            "HardSwish",
            "LeakyRelu",
            "Max",
        ),
        *("Min", "Mul", "Neg", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh", *_SCALED),
    )
)


def transposed(graph: ir.Graph, value: ir.Value, order: Sequence[int]) -> ir.Value:
    """A value with its dimensions in another order: what it was itself made from so, or by a transposition, there or new."""
    source = _source(value, _inverse(order))
    if source is not None:
        return source
    for node, _ in value.uses():
        if node.graph is graph and _order(node) == tuple(order):
            return node.outputs[0]
    out = ir.Value(name=f"{value.name}.{''.join(map(str, order))}", type=value.type)
    if value.shape is not None:
        out.shape = ir.Shape([value.shape[axis] for axis in order])
    node = ir.node("Transpose", [value], {"perm": list(order)}, outputs=[out])
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return out


def sink(graph: ir.Graph, order: Sequence[int]) -> None:
    """Move transpositions of an order behind the elementwise operations that read them, and out where they meet the inverse.

    Args:
        graph: sorted, with the shapes of what is added, multiplied and the like: operations without are passed over.
        order: of the dimensions.
    """
    order, inverse = tuple(order), _inverse(order)
    for node in list(graph):
        sources = [
            source for value in node.inputs if value is not None and (source := _source(value, order)) is not None
        ]
        if not sources:
            continue
        if _order(node) == inverse:
            # An input of the network, and another result of it, keep their own names.
            if sources[0].producer() is not None and not sources[0].is_graph_output():
                take_place(graph, node.outputs[0], sources[0])
        elif node.op_type in _ELEMENTWISE and all(_is_free(node, value, len(order)) for value in node.inputs):
            inputs = [
                transposed(graph, value, inverse) if value is not None and _rank(value) == len(order) else value
                for value in node.inputs
            ]
            out = node.outputs[0]
            made = ir.Value(name=f"{out.name}.{''.join(map(str, inverse))}", type=out.type)
            if out.shape is not None:
                made.shape = ir.Shape([out.shape[axis] for axis in inverse])
            attributes = node.attributes.values()
            graph.insert_before(node, ir.Node(node.domain, node.op_type, inputs, attributes, outputs=[made]))
            take_place(graph, out, transposed(graph, made, order))


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(order.index(axis) for axis in range(len(order)))


def _order(node: ir.Node) -> tuple[int, ...] | None:
    return tuple(node.attributes.get_ints("perm", ())) if node.op_type == "Transpose" else None


def _source(value: ir.Value, order: tuple[int, ...]) -> ir.Value | None:
    """What a transposition of this order made a value of."""
    node = value.producer()
    return node.inputs[0] if node is not None and _order(node) == order else None


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _is_free(node: ir.Node, value: ir.Value | None, rank: int) -> bool:
    """Whether an input of an elementwise operation can be transposed, or is the same in any order."""
    if value is None or _rank(value) == rank:
        return True
    # A scale of one dimension belongs to an axis.
    most = 0 if node.op_type in _SCALED else rank
    return value.shape is not None and len(value.shape) <= most and all(size == 1 for size in value.shape)
