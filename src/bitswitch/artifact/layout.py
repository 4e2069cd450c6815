"""What a file holds and where: its layout, checked before any tensor is read, and how far a file that is cut off reaches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitswitch.artifact import container
from bitswitch.artifact.container import Entry
from bitswitch.artifact.header import KEY, Header, tensor_name
from bitswitch.artifact.planes import plane_bytes
from bitswitch.artifact.source import Damaged, Source
from bitswitch.codes import MOST_BITS, bits_read

# The tensor that holds the network's graph.
GRAPH = "graph"


@dataclass(frozen=True, kw_only=True)
class Located:
    """What an artifact holds and where: with it, the rest of its planes can be read later.

    Attributes:
        path: of the file, or its URL.
        header: of the artifact.
        entries: {tensor of the file: its type, shape and place}, in the order of the file.
    """

    path: str
    header: Header
    entries: Mapping[str, Entry]

    def bytes_read(self, width: int) -> int:
        """How many bytes of the file it takes to load a width in torch: header, floats and planes, without the graph."""
        last = plane_name(bits_read(self.header.widths[0], width) - 1)
        graph = self.entries.get(GRAPH)
        return self.entries[last].stop - (0 if graph is None else graph.stop - graph.start)

    def planes_within(self, size: int) -> int:
        """How many planes the first `size` bytes hold."""
        return sum(self.entries[plane_name(i)].stop <= size for i in range(self.header.widths[0]))

    def widths_within(self, size: int) -> tuple[int, ...]:
        """The widths whose planes the first `size` bytes hold, highest first."""
        widths, planes = self.header.widths, self.planes_within(size)
        return tuple(width for width in widths if bits_read(widths[0], width) <= planes)


def plane_name(i: int) -> str:
    """The name of a plane; number 0 is the most significant."""
    return f"plane.{i}"


def locate(source: Source, path: str | Path) -> Located:
    """Read the header of a file, and check its layout.

    Raises:
        Damaged: it is not an artifact, or not laid out as one.
    """
    table, start = container.read_table(source)
    text = container.metadata(table, KEY)
    if text is None:
        raise Damaged("it is not an artifact of bitswitch (no such header)")
    header = Header.from_text(text)
    entries = container.entries(table, start)
    _check_layout(header, entries)
    end = max(entry.stop for entry in entries.values())
    if source.size > end:
        raise Damaged(f"{source.size - end} bytes follow its last tensor")
    return Located(path=str(path), header=header, entries=entries)


def _check_layout(header: Header, entries: Mapping[str, Entry]) -> None:
    """Every tensor of the header and no other; floats first, planes last, the most significant first."""
    if entries.keys() != header.checksums.keys():
        missing = sorted(header.checksums.keys() - entries.keys())
        extra = sorted(entries.keys() - header.checksums.keys())
        raise Damaged(f"it lacks tensor {missing[0]!r}" if missing else f"it has a tensor of its own, {extra[0]!r}")
    planes = [plane_name(i) for i in range(header.widths[0])]
    names = list(entries)
    if names[-len(planes) :] != planes:
        raise Damaged(f"its planes do not come last, from {planes[0]} to {planes[-1]}")
    size = plane_bytes([layer.shape for layer in header.layers])
    for name in planes:
        _check_entry(name, entries[name], "U8", (size,))
    rest = names[: -len(planes)]
    if GRAPH in rest:
        if rest[-1] != GRAPH:
            raise Damaged("its graph does not come right before the planes")
        rest.pop()
        _check_entry(GRAPH, entries[GRAPH], "U8", (entries[GRAPH].stop - entries[GRAPH].start,))
    kept = reserved(header)
    for name in rest:
        if name in kept or entries[name].dtype == "U8":
            raise Damaged(f"it has a tensor {name!r} that this bitswitch does not know", "upgrade bitswitch")


def _check_entry(name: str, entry: Entry, dtype: str, shape: tuple[int, ...]) -> None:
    if (entry.dtype, entry.shape) != (dtype, shape):
        raise Damaged(f"tensor {name!r} is {entry.dtype} {list(entry.shape)}, not {dtype} {list(shape)}")


def reserved(header: Header) -> set[str]:
    """Names that no float32 or int32 tensor may have."""
    layers = [layer.name for layer in header.layers]
    planes = {plane_name(i) for i in range(MOST_BITS)}
    return {
        GRAPH,
        *planes,
        *(f"multiplier.{name}" for name in layers),
        *(tensor_name(name, "codes") for name in layers),
    }


def check_reach(source: Source, located: Located, names: Sequence[str]) -> None:
    """Say of a file that is cut off what it can still do, before anything of it is read."""
    header, entries = located.header, located.entries
    if all(entries[name].stop <= source.size for name in names):
        return
    whole, served = located.planes_within(source.size), located.widths_within(source.size)
    what = f"it serves {served[0]} bits at most" if served else "it serves no width"
    advice = f"load bits={served[0]}, or fetch the rest" if served else "fetch the rest"
    raise Damaged(f"it is cut off after {source.size} bytes, with {whole} of {header.widths[0]} planes: {what}", advice)
