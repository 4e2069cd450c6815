"""The little of the protobuf wire format that it takes to look into an ONNX model without the onnx package."""

from collections import Counter
from collections.abc import Iterator

from bitswitch.errors import UserError

# Field numbers of onnx.proto: ModelProto, GraphProto, NodeProto, AttributeProto, StringStringEntryProto.
_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_GRAPH_NODE = 1
_NODE_OP_TYPE = 4
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5


def fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a message, (field number, content), in order; the others are passed over.

    Raises:
        UserError: it is no message.
    """
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
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


def operations(model: bytes) -> Counter[str]:
    """How many nodes of each type the graph of an ONNX model has; those inside branches are not counted."""
    counts: Counter[str] = Counter()
    for number, graph in fields(memoryview(model)):
        if number == _MODEL_GRAPH:
            for inner, node in fields(graph):
                if inner == _GRAPH_NODE:
                    counts.update(str(text, "utf-8") for key, text in fields(node) if key == _NODE_OP_TYPE)
    return counts
