"""Bit planes: plane i of h holds bit h-1-i, the most significant first, of the codes of all layers.

In a plane each layer's bits stand in row-major order, eight to a byte, the first in the byte's highest bit, and each layer
is filled up with zeros to a whole byte.
"""

import math
from collections.abc import Sequence

import numpy as np


def plane_bytes(shapes: Sequence[tuple[int, ...]]) -> int:
    """The size of one plane of layers of these shapes."""
    return sum((math.prod(shape) + 7) // 8 for shape in shapes)


def pack(codes: Sequence[np.ndarray], bits: int) -> list[np.ndarray]:
    """The planes of codes.

    Args:
        codes: int8, of every layer, in `signed_range(bits)`.
        bits: their width.

    Returns:
        `bits` planes, uint8 [plane_bytes].
    """
    # Two's complement, moved up so that plane i is bit 7-i of the byte for every width.
    raised = [(np.asarray(layer, np.int8) << (8 - bits)).view(np.uint8).ravel() for layer in codes]
    return [np.concatenate([np.packbits(layer & (128 >> i)) for layer in raised]) for i in range(bits)]


def unpack(
    planes: Sequence[np.ndarray], shapes: Sequence[tuple[int, ...]], *, bits: int, first: int = 0
) -> list[np.ndarray]:
    """The codes that planes give, bits of planes that are not given being 0.

    Codes of plane 0 to k-1, and of k and above, add up (by "or") to the codes of all.

    Args:
        planes: uint8 [plane_bytes] each: `first` and those that follow it.
        shapes: of the layers.
        bits: width of the codes.
        first: the number of the first plane given.

    Returns:
        int8 codes of every layer, in its shape.
    """
    found, start = [], 0
    for shape in shapes:
        count = math.prod(shape)
        stop = start + (count + 7) // 8
        raised = np.zeros(count, np.uint8)
        for i, plane in enumerate(planes, first):
            raised |= np.unpackbits(plane[start:stop], count=count) << (7 - i)
        # An arithmetic shift: the sign comes down with it.
        found.append((raised.view(np.int8) >> (8 - bits)).reshape(shape))
        start = stop
    return found
