"""Reading and writing the file: a valid safetensors file, checked before anything in it is used. See docs/artifact.md.

In the file: float32 and int32 tensors, then `graph` where there is one, then the bit planes of the codes, the most
significant first. In memory, to those who read and write: the same, with `<layer>.codes` (int8, in the weight's shape) in
the place of the planes.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bitswitch import files
from bitswitch.artifact.container import DTYPES, MOST_TABLE_BYTES, Entry, metadata, read_table
from bitswitch.artifact.header import KEY, Header, tensor_name
from bitswitch.artifact.layout import GRAPH, Located, check_reach, locate, plane_name, reserved
from bitswitch.artifact.planes import pack, unpack
from bitswitch.artifact.source import Damaged, Source, opened
from bitswitch.codes import bits_read, signed_range
from bitswitch.errors import UserError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def checksum(dtype: str, shape: Sequence[int], content: bytes | bytearray | memoryview) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of `["F32",[2,3]]` (type and shape) followed by the bytes."""
    hasher = hashlib.sha256(files.canonical_json([dtype, list(shape)]).encode())
    hasher.update(content)
    return hasher.hexdigest()[:16]


def write(path: str | Path, header: Header, tensors: Mapping[str, np.ndarray]) -> None:
    """Write an artifact, whole or not at all; the header's checksums are filled in here.

    Args:
        path: the file.
        header: of the artifact.
        tensors: `<layer>.codes`, int8, of every layer; float32 and int32 tensors; `graph`, uint8 [bytes], or none.

    Raises:
        UserError: a tensor cannot be stored, or the file cannot be written.
    """
    rest = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    codes = [rest.pop(tensor_name(layer.name, "codes")) for layer in header.layers]
    _check_codes(header, codes)
    _check_names(header, rest)
    for i, plane in enumerate(pack(codes, header.widths[0])):
        rest[plane_name(i)] = plane
    content = save(rest, metadata={KEY: replace(header, checksums=_checksums(rest)).to_text()})
    if int.from_bytes(content[:8], "little") > MOST_TABLE_BYTES:
        raise UserError(f"{path}: the header would exceed {MOST_TABLE_BYTES:,} bytes: shorten provenance or frontier")
    files.write(path, content)


def _checksums(stored: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {name: checksum(_NAMES[array.dtype], array.shape, array.tobytes()) for name, array in stored.items()}


def holds(located: Located, header: Header, tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a file holds just these tensors, beside a graph.

    Args:
        located: the file.
        header, tensors: see `write`.
    """
    rest = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    codes = [rest.pop(tensor_name(layer.name, "codes")) for layer in header.layers]
    rest |= {plane_name(i): plane for i, plane in enumerate(pack(codes, header.widths[0]))}
    return _checksums(rest) == {name: found for name, found in located.header.checksums.items() if name != GRAPH}


def graph_of(located: Located) -> np.ndarray:
    """The graph of a file that holds one.

    Raises:
        UserError: the file is gone, cut off, altered, or another than it was.
    """
    with opened(located.path) as source, _naming(located.path):
        return _read(source, located, [GRAPH])[GRAPH]


def read_header(path: str | Path) -> Header:
    """The header alone; nothing else is read.

    Args:
        path: of the file, or its URL.

    Raises:
        UserError: there is no such file, or it is not an artifact that this package reads.
    """
    with opened(path) as source, _naming(path):
        return locate(source, path).header


def served_widths(path: str | Path) -> tuple[int, ...]:
    """The widths whose planes a file holds, highest first: all of its header's, but where it is cut off.

    Raises:
        UserError: there is no such file, or it is not an artifact that this package reads.
    """
    with opened(path) as source, _naming(path):
        return locate(source, path).widths_within(source.size)


def is_artifact(path: str | Path, *, unreadable: bool) -> bool:
    """Whether a file says that it is an artifact, of whatever version; `unreadable` where it is no safetensors file at all."""
    try:
        with safe_open(path, framework="numpy") as stream:
            return KEY in (stream.metadata() or {})
    except (OSError, SafetensorError):
        pass
    try:
        # Of one that is cut off the table may be whole.
        with opened(path) as source:
            return metadata(read_table(source)[0], KEY) is not None
    except (UserError, Damaged):
        return unreadable


def read(path: str | Path) -> tuple[Header, dict[str, np.ndarray]]:
    """The header and all tensors, after every check: presence, checksum, shape, type, range.

    Args:
        path: of the file, or its URL.

    Returns:
        The header, and `<layer>.codes` (int8), the float32 and int32 tensors and, where the file has it, `graph` (uint8).

    Raises:
        UserError: there is no such file, or it is not an artifact that this package reads, or it is altered or cut off.
    """
    with opened(path) as source, _naming(path):
        located = locate(source, path)
        return located.header, _read_tensors(source, located, located.header.widths[0], graph=True)


def read_held(path: str | Path) -> tuple[Located, dict[str, np.ndarray], tuple[int, ...]]:
    """As `read`, but the file may be cut off: what the widths need that it serves.

    Args:
        path: of the file, or its URL.

    Returns:
        What it holds and where; the tensors, with 0 for the bits that no width served needs; the widths served, highest first.

    Raises:
        UserError: as `read`; or it is cut off before the planes of its lowest width end.
    """
    with opened(path) as source, _naming(path):
        located = locate(source, path)
        # Where it serves none, reading all tells so.
        widths = located.widths_within(source.size) or located.header.widths
        planes = bits_read(located.header.widths[0], widths[0])
        return located, _read_tensors(source, located, planes, graph=True), widths


def read_part(path: str | Path, planes: Callable[[Header], int]) -> tuple[Located, dict[str, np.ndarray]]:
    """As `read`, but without the graph, and only so many planes: nothing else of the file is read.

    Args:
        path: of the file, or its URL.
        planes: how many, given the header; see `codes.bits_read`. The bits of the others are 0 in the codes.

    Raises:
        UserError: as `read`; or what is wanted is not in a file that is cut off.
    """
    with opened(path) as source:
        with _naming(path):
            located = locate(source, path)
        count = planes(located.header)
        with _naming(path):
            return located, _read_tensors(source, located, count, graph=False)


def _read_tensors(source: Source, located: Located, planes: int, *, graph: bool) -> dict[str, np.ndarray]:
    header = located.header
    unwanted = {plane_name(i) for i in range(planes, header.widths[0])} | (set() if graph else {GRAPH})
    found = _read(source, located, [name for name in located.entries if name not in unwanted])
    given = [found.pop(plane_name(i)) for i in range(planes)]
    _check(header, found)
    return found | _unpack(header, given)


def read_planes(located: Located, first: int, stop: int) -> dict[str, np.ndarray]:
    """`<layer>.codes` with the bits of planes `first` to before `stop` alone, the others 0. Nothing else is read.

    Raises:
        UserError: the file is gone, cut off, altered, or another than it was.
    """
    with opened(located.path) as source, _naming(located.path):
        names = [plane_name(i) for i in range(first, stop)]
        try:
            found = _read(source, located, names)
        except Damaged as error:
            raise Damaged(f"{error}, or the file is another one by now", error.advice) from error
        return _unpack(located.header, list(found.values()), first)


def _check_names(header: Header, tensors: Mapping[str, np.ndarray]) -> None:
    kept = reserved(header)
    for name, array in tensors.items():
        if (name == GRAPH) != (array.dtype == np.uint8) or (name in kept and name != GRAPH):
            raise UserError(
                f"tensor {name!r} ({array.dtype}) has a name that the artifact keeps for its own: rename it"
            )
        if array.dtype not in _NAMES:
            raise UserError(f"tensor {name!r} is {array.dtype}: the artifact holds float32 and int32")


def _read(source: Source, located: Located, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Tensors of the file, given in its order: neighbours in one read, each held against its checksum."""
    check_reach(source, located, names)
    entries = {name: located.entries[name] for name in names}
    found = {}
    for run in _runs(entries):
        first = entries[run[0]].start
        content = source.read(first, entries[run[-1]].stop)
        for name in run:
            entry = entries[name]
            part = memoryview(content)[entry.start - first : entry.stop - first]
            if checksum(entry.dtype, entry.shape, part) != located.header.checksums[name]:
                raise Damaged(f"tensor {name!r} is altered (its checksum differs)")
            # A copy, so that a bias does not keep the planes beside it in memory.
            found[name] = np.frombuffer(part, DTYPES[entry.dtype]).reshape(entry.shape).copy()
    return found


def _runs(entries: Mapping[str, Entry]) -> Iterator[list[str]]:
    """The names, those that touch one another together."""
    gap, stop, gaps = 0, None, {}
    for name, entry in entries.items():
        gap += entry.start != stop
        gaps[name], stop = gap, entry.stop
    for _, run in groupby(entries, gaps.__getitem__):
        yield list(run)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Tell of damage with the file's name, in one line."""
    try:
        yield
    except Damaged as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be used: {reason[:300]}; {error.advice}") from error


def _unpack(header: Header, planes: Sequence[np.ndarray], first: int = 0) -> dict[str, np.ndarray]:
    shapes = [layer.shape for layer in header.layers]
    codes = unpack(planes, shapes, bits=header.widths[0], first=first)
    return {tensor_name(layer.name, "codes"): array for layer, array in zip(header.layers, codes, strict=True)}


def _check_codes(header: Header, codes: Sequence[np.ndarray]) -> None:
    low, high = signed_range(header.widths[0])
    for layer, array in zip(header.layers, codes, strict=True):
        name = tensor_name(layer.name, "codes")
        if array.dtype != np.int8 or array.shape != layer.shape:
            raise UserError(f"tensor {name!r} is {array.dtype} {array.shape}, not int8 {layer.shape}")
        if array.min() < low or array.max() > high:
            raise UserError(f"codes of {layer.name!r} exceed {layer.bits} bits")


def _check(header: Header, tensors: Mapping[str, np.ndarray]) -> None:
    """Shapes, types and ranges of what the layers need, and ranges of what belongs to batch normalizations."""

    def need(layer: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
        name = tensor_name(layer, key)
        if name not in tensors:
            raise Damaged(f"it lacks tensor {name!r}")
        array = tensors[name]
        if array.dtype != np.float32 or array.shape != shape:
            raise Damaged(f"tensor {name!r} is {array.dtype} {array.shape}, not float32 {shape}")
        if not np.isfinite(array).all():
            raise Damaged(f"tensor {name!r} is not finite")
        return array

    count = len(header.widths)
    for layer in header.layers:
        scales = (layer.shape[0], *[1] * (len(layer.shape) - 1)) if header.per_channel else ()
        for key, shape in (("weight_scale", scales), ("input_scale", (count,))):
            if not (need(layer.name, key, shape) > 0).all():
                raise Damaged(f"tensor {tensor_name(layer.name, key)!r} holds a scale that is not positive")
        if layer.input == "zero_point":
            need(layer.name, "input_offset", (count,))
    for norm in header.norms:
        for key in ("weight", "bias", "running_mean", "running_var"):
            array = tensors.get(name := tensor_name(norm, key))
            if array is not None and not (np.isfinite(array).all() and (key != "running_var" or (array >= 0).all())):
                raise Damaged(f"tensor {name!r} holds what no batch normalization has")
