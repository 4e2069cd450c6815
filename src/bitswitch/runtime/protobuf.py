"""The little of the protobuf wire format that it takes to look into an ONNX model without the onnx package."""

from collections import Counter
from collections.abc import Iterator

from bitswitch.errors import UserError

# Field numbers of onnx.proto: ModelProto, GraphProto, NodeProto, StringStringEntryProto, TensorProto.
_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_GRAPH_NODE = 1
_NODE_OP_TYPE = 4
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_GRAPH_INITIALIZER = 5
_TENSOR_NAME, _TENSOR_EXTERNAL = 8, 13
# All fields by which tensors can be inside, and the kind of message that each holds.
_INSIDE = {
    "model": {_MODEL_GRAPH: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {_GRAPH_NODE: "node", _GRAPH_INITIALIZER: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
# As deep as readers of protobuf go.
_DEEPEST = 100
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5


def fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a message, (field number, content), in order; the others are passed over.

    Raises:
        UserError: it is no message.
    """
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        # Readers of protobuf drop what is above 32 bits.
        key &= 0xFFFFFFFF
        kind = key & 7
        if kind == _VARINT:
            _, position = _varint(message, position)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            position += 8 if kind == _EIGHT_BYTES else 4
        elif kind == _LENGTH:
            length, position = _varint(message, position)
            if position + length > len(message):
                raise UserError("the graph is damaged")
            yield key >> 3, message[position : position + length]
            position += length
        else:
            raise UserError("the graph is damaged")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise UserError("the graph is damaged")


def metadata(model: bytes) -> dict[str, str]:
    """The metadata of an ONNX model."""
    entries = (dict(fields(entry)) for number, entry in fields(memoryview(model)) if number == _MODEL_METADATA)
    return {str(e[_ENTRY_KEY], "utf-8"): str(e.get(_ENTRY_VALUE, b""), "utf-8") for e in entries if _ENTRY_KEY in e}


def external_tensors(model: bytes) -> list[str]:
    """The names of the tensors of an ONNX model whose values are elsewhere.

    Raises:
        UserError, UnicodeDecodeError: it is damaged, or such a tensor is no initializer of the model's own graph.
    """
    found: list[str] = []
    _find_external(memoryview(model), "model", ("model",), found)
    return found


def _find_external(message: memoryview, kind: str, path: tuple[str, ...], found: list[str]) -> None:
    inside = _INSIDE[kind]
    name, is_external = "", False
    for number, content in fields(message):
        if kind == "tensor" and number == _TENSOR_NAME:
            name = str(content, "utf-8")
        elif kind == "tensor" and number == _TENSOR_EXTERNAL:
            is_external = True
        elif number in inside:
            if len(path) > _DEEPEST:
                raise UserError("the graph is damaged")
            _find_external(content, inside[number], (*path, inside[number]), found)
    if is_external:
        if path != ("model", "graph", "tensor"):
            raise UserError("the graph wants values of a file for what is no constant of its own")
        found.append(name)


def operations(model: bytes) -> Counter[str]:
    """How many nodes of each type the graph of an ONNX model has; those inside branches are not counted."""
    counts: Counter[str] = Counter()
    for number, graph in fields(memoryview(model)):
        if number == _MODEL_GRAPH:
            for inner, node in fields(graph):
                if inner == _GRAPH_NODE:
                    counts.update(str(text, "utf-8") for key, text in fields(node) if key == _NODE_OP_TYPE)
    return counts
