"""The tensor `graph` of an artifact: ONNX without quantized weights, packed by zlib."""

import zlib

import numpy as np

# A graph of ours is mostly names and packs to an eighth. Beyond this size one that is read may unpack to no more than so many
# times what is stored, so that a small file cannot fill the memory.
_ALWAYS_READ = 2**22
_MOST_TIMES = 4


def packed(graph: bytes) -> np.ndarray:
    """As it is stored, uint8, one dimension: not made smaller where `unpacked` would refuse it so."""
    stored = zlib.compress(graph, level=9)
    if len(graph) > _limit(len(stored)):
        stored = zlib.compress(graph, level=0)
    return np.frombuffer(stored, np.uint8)


def unpacked(stored: np.ndarray) -> bytes:
    """The inverse of `packed`.

    Raises:
        ValueError: it is no such thing, or becomes too large.
    """
    unpacker = zlib.decompressobj()
    try:
        graph = unpacker.decompress(stored.tobytes(), _limit(stored.nbytes))
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("it is cut off, too large, or not alone")
    return graph


def _limit(stored: int) -> int:
    """How many bytes a graph may have that is stored in so many."""
    return max(_ALWAYS_READ, _MOST_TIMES * stored)
