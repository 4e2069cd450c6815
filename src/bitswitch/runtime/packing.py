"""The tensor `graph` of an artifact: ONNX without weights, which is mostly names, packed by zlib."""

import zlib

import numpy as np

# Of a graph, in bytes: what unpacks to more is no graph of ours, and shall not fill the memory.
_GREATEST = 2**26


def packed(graph: bytes) -> np.ndarray:
    """As it is stored: uint8, one dimension."""
    return np.frombuffer(zlib.compress(graph, level=9), np.uint8)


def unpacked(stored: np.ndarray) -> bytes:
    """The inverse of `packed`.

    Raises:
        ValueError: it is not, or of more than 64 MiB.
    """
    unpacker = zlib.decompressobj()
    try:
        graph = unpacker.decompress(stored.tobytes(), _GREATEST)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("it is cut off, too large, or not alone")
    return graph
