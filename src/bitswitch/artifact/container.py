"""The table of a safetensors file, read by ourselves: from a file that is cut off, too, and within strict bounds.

https://huggingface.co/docs/safetensors: 8 bytes, little-endian, the length of the table; the table, JSON; the tensors.
"""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitswitch.artifact.source import Damaged, Source

# Far above any network's (ResNet50: 0.1 MiB), far below what a reader would choke on.
MOST_TABLE_BYTES = 1 << 24
MOST_DIMENSIONS = 32
MOST_SIZE = 1 << 48
_LENGTH_BYTES = 8
_MOST_DEPTH = 64
_METADATA = "__metadata__"

DTYPES: Mapping[str, np.dtype] = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4"), "U8": np.dtype("u1")}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file.

    Attributes:
        dtype: "F32", "I32" or "U8".
        shape: of the tensor.
        start: its first byte in the file.
        stop: the byte after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_table(source: Source) -> tuple[Mapping[str, Any], int]:
    """The table as it was parsed, and where the tensors begin.

    Raises:
        Damaged: it is not the table of a safetensors file, or it is cut off.
    """
    length = int.from_bytes(source.read(0, _LENGTH_BYTES), "little")
    if length > MOST_TABLE_BYTES:
        raise Damaged(
            f"it is not a safetensors file (a table of {length} bytes)", "give an artifact, as bitswitch.save writes it"
        )
    text = source.read(_LENGTH_BYTES, _LENGTH_BYTES + length)
    if not text.startswith(b"{"):
        raise Damaged("it is not a safetensors file (no table)")
    try:
        table = strict_json(text.decode())
    except ValueError as error:
        raise Damaged(f"its table of tensors is damaged ({error})") from error
    return table, _LENGTH_BYTES + length


def metadata(table: Mapping[str, Any], key: str) -> str | None:
    """A value of the file's metadata; None where there is no such value, or one of them is no text."""
    found = table.get(_METADATA)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        return None
    return found.get(key)


def entries(table: Mapping[str, Any], start: int) -> dict[str, Entry]:
    """Where every tensor lies, in the order of the file.

    Args:
        table: from `read_table`.
        start: where the tensors begin.

    Raises:
        Damaged: a tensor has no proper type, shape or place, or tensors leave a gap, or overlap.
    """
    found = {name: _entry(name, value, start) for name, value in table.items() if name != _METADATA}
    ordered = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)))
    for name, entry in ordered.items():
        if entry.start != start:
            raise Damaged(f"tensor {name!r} leaves a gap or overlaps another")
        start = entry.stop
    return ordered


def _entry(name: str, value: Any, start: int) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, begin, end]
        fits = (
            dtype in DTYPES
            and len(value) == 3
            and type(shape) is list
            and len(shape) <= MOST_DIMENSIONS
            and all(type(number) is int and 0 <= number < MOST_SIZE for number in numbers)
            and end - begin == math.prod(shape) * DTYPES[dtype].itemsize
            # NumPy wants the product of the sizes that are not 0 to be one that it can count.
            and math.prod(filter(None, shape)) * DTYPES[dtype].itemsize < MOST_SIZE
        )
    except (TypeError, KeyError, ValueError):
        fits = False
    if not fits:
        raise Damaged(f"tensor {name!r} has no type, shape and place that an artifact can have")
    return Entry(dtype, tuple(shape), start + begin, start + end)


def strict_json(text: str) -> dict[str, Any]:
    """An object of JSON; no key may be given twice, no number be NaN or infinite, and what it holds is 64 deep at most.

    Raises:
        ValueError: it is none.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    inside: list[Any] = [value]
    for _ in range(_MOST_DEPTH):
        parts = (one.values() if isinstance(one, dict) else one for one in inside if isinstance(one, dict | list))
        inside = list(itertools.chain.from_iterable(parts))
    if inside:
        # What is read can then be written again, and copied, which all recurse.
        raise ValueError("it is nested too deeply")
    return value


def is_finite(number: Any) -> bool:
    """Whether a value of JSON is a number that a float can hold."""
    try:
        return type(number) in (int, float) and math.isfinite(number)
    except OverflowError:
        # A whole number beyond all floats.
        return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no number of JSON")
    return number
