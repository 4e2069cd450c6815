"""Damaged artifacts: is every one refused in one line, or read as the very same tensors?

    python benchmarks/mutate.py --files 100000 --json results/mutations.json

Each file is a small artifact with one kind of damage, drawn from the seed. It is read whole, and where it was cut off at every
width, and as far as it goes. What may happen: it is refused (a UserError of one line), or header and tensors are the same. A
header that was forged, its digest made anew, may also describe another artifact that is whole in itself. All else is a failure:
other tensors, another exception, more than a second of the processor, memory beyond a limit of the process, an import or a
command run by the reader (an audit hook counts them).
"""

import argparse
import functools
import gc
import json
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import result
from bitswitch import artifact
from bitswitch.artifact.header import KEY, sealed
from bitswitch.codes import bits_read, narrow, signed_range
from bitswitch.errors import UserError

SLOW_SECONDS = 1.0
MEMORY_BYTES = 1 << 29
NUMBERS = [0, -1, 1, 2, 7, 255, 2**31, 2**32, 2**40, 2**47, 2**48, 2**63 - 1, 2**64, 10**30, 1.5, 1e308]
ABSURD: list[Any] = [*NUMBERS, True, None, "", "8", [], {}]
Tensors = dict[str, np.ndarray]


def write_base(path: Path, seed: int, widths: tuple[int, ...], *, graph: bool, per_channel: bool) -> None:
    """A small artifact that has something of everything."""
    generator = np.random.default_rng(seed)
    low, high = signed_range(widths[0])
    layers: list[artifact.LayerEntry] = []
    tensors: Tensors = {}
    for name, shape, kind in (("conv", (4, 3, 3, 3), "unsigned"), ("fc", (5, 11), "zero_point"), ("", (7,), "signed")):
        errors = {width: float(generator.random()) for width in widths}
        entry = artifact.LayerEntry(name=name, shape=shape, bits=widths[0], input=kind, squared_error=errors)
        layers.append(entry)
        scale = (shape[0], *[1] * (len(shape) - 1)) if per_channel else ()
        of = {"weight_scale": scale, "input_scale": (len(widths),)}
        of |= {"input_offset": (len(widths),)} if kind == "zero_point" else {}
        tensors |= {
            artifact.tensor_name(name, k): generator.random(s, np.float32) + np.float32(0.1) for k, s in of.items()
        }
        tensors[artifact.tensor_name(name, "codes")] = generator.integers(low, high + 1, shape).astype(np.int8)
    tensors |= {"bn.weight": generator.random((len(widths), 4), np.float32), "steps": np.array([3, -7], np.int32)}
    tensors |= {"graph": generator.integers(0, 256, 13).astype(np.uint8)} if graph else {}
    choice = {"assignment": {"conv": widths[0], "fc": 2, "": 2}, "cost": {"bits": 4.0}, "damage": 0.5, "top1": None}
    header = artifact.Header(
        widths=widths,
        layers=tuple(layers),
        norms={"bn": "conv"},
        before={"bn": None},
        transitional=False,
        per_channel=per_channel,
        frontier=(choice,),
        network={"name": "cifar_resnet20", "args": {}},
        preprocessing={"shape": [3, 8, 8], "mean": [0.5], "std": [0.25], "resize": None, "crop": None},
        classes=("a", "b"),
        provenance={"seed": seed},
        checksums={},
    )
    artifact.write(path, header, tensors)


def table_of(whole: bytes) -> tuple[dict[str, Any], bytes]:
    start = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:start]), whole[start:]


def with_table(table: Any, tensors: bytes) -> bytes:
    text = (table if isinstance(table, str) else json.dumps(table, separators=(",", ":"))).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + tensors


# The kinds of damage: bytes and a generator of random numbers in, bytes out.


def flipped_bits(whole: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(whole)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def changed_bytes(whole: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(whole))
    length = draw.choice([1, 4, 8, 100, 1000])
    filled = draw.choice([draw.randbytes(length), b"\0" * length, b"\xff" * length, whole[:length]])
    return whole[:start] + filled[: len(whole) - start] + whole[start + length :]


def cut_off(whole: bytes, draw: random.Random) -> bytes:
    start = len(whole) - len(table_of(whole)[1])
    return whole[: draw.randrange(draw.choice([0, start]), len(whole))]


def moved_bytes(whole: bytes, draw: random.Random) -> bytes:
    """Something taken out, put in, doubled, or put behind."""
    start, length = draw.randrange(len(whole)), draw.choice([1, 2, 8, 64, 512])
    piece = whole[start : start + length]
    taken = whole[:start] + whole[start + length :]
    place = draw.randrange(len(taken) + 1)
    moved = taken[:place] + piece + taken[place:]
    return draw.choice([taken, moved, whole[:start] + piece + whole[start:], whole + piece])


def wrong_length(whole: bytes, draw: random.Random) -> bytes:
    """The eight bytes that say how long the table is."""
    real = int.from_bytes(whole[:8], "little")
    near = max(0, real + draw.choice([-9, -8, -1, 1, 7, 8, 100, len(whole)]))
    length = draw.choice(
        [near, draw.randrange(2**64), 2 ** draw.randrange(64), draw.randrange(2 * len(whole)), 2**64 - 1]
    )
    return struct.pack("<Q", length) + whole[8:]


def edited_table(whole: bytes, draw: random.Random) -> bytes:
    """Types, shapes and places: absurd, exchanged, overlapping, huge, missing."""
    table, tensors = table_of(whole)
    names = [name for name in table if name != "__metadata__"]
    name, other = draw.sample(names, 2)
    entry = table[name]
    edit = draw.randrange(9)
    if edit == 0:
        entry[draw.choice([*entry, "new"])] = draw.choice(ABSURD)
    elif edit == 1:
        entry["shape"] = [draw.choice(ABSURD) for _ in range(draw.choice([0, 1, 2, 50, 1000]))]
    elif edit == 2:
        entry["data_offsets"] = [draw.choice(ABSURD) for _ in range(draw.choice([0, 1, 2, 2, 2, 3]))]
    elif edit == 3:
        # As large as it says: terabytes that follow one another without a gap.
        grown = 2 ** draw.randrange(20, 48)
        entry["dtype"], entry["shape"] = "U8", [grown]
        entry["data_offsets"][1] = entry["data_offsets"][0] + grown
        for later in names:
            if table[later]["data_offsets"][0] > entry["data_offsets"][0]:
                table[later]["data_offsets"] = [offset + grown for offset in table[later]["data_offsets"]]
    elif edit == 4:
        table[name], table[other] = table[other], table[name]
    elif edit == 5:
        entry["data_offsets"] = list(table[other]["data_offsets"])
    elif edit == 6:
        entry["dtype"] = draw.choice(["F32", "I32", "U8", "F64", "I64", "BOOL", "F16", "X", ""])
    elif edit == 7:
        table[draw.choice([other, name + "x", "plane.8", "graph", "__metadata__", ""])] = table.pop(name)
    else:
        entry["shape"] = [*entry["shape"][::-1], *[1] * draw.randrange(3)]
    return with_table(table, tensors)


def doubled_tensors(whole: bytes, draw: random.Random) -> bytes:
    """A key of the table given twice, with another value or the same."""
    table, tensors = table_of(whole)
    name, other = draw.choices([name for name in table if name != "__metadata__"], k=2)
    name = draw.choice([name, "__metadata__"])
    text = json.dumps(table, separators=(",", ":"))
    extra = f"{json.dumps(name)}:{json.dumps(table[draw.choice([name, other])])}"
    return with_table(draw.choice([text[:-1] + "," + extra + "}", "{" + extra + "," + text[1:]]), tensors)


def _edit(value: Any, draw: random.Random) -> Any:
    """A JSON value with one place in it changed."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw.choice(keys)
        step = draw.randrange(10)
        if step == 0:
            del value[key]
        elif step == 1 and isinstance(value, dict):
            value[draw.choice([*keys, "new"])] = value.pop(key)
        elif step == 2 and isinstance(value, list):
            value.insert(key, value[draw.choice(keys)])
        else:
            value[key] = _edit(value[key], draw)
        return value
    if draw.random() < 0.3 and isinstance(value, int):
        return value + draw.choice([-1, 1, 8, 2**40])
    return draw.choice(ABSURD)


def edited_header(whole: bytes, draw: random.Random) -> bytes:
    """The header's values, under its old digest."""
    table, tensors = table_of(whole)
    header = _edit(json.loads(table["__metadata__"][KEY]), draw)
    table["__metadata__"][KEY] = json.dumps(header, sort_keys=True, separators=(",", ":"))
    return with_table(table, tensors)


def forged_header(whole: bytes, draw: random.Random) -> bytes:
    """The header's values, under a digest made anew."""
    table, tensors = table_of(whole)
    header = json.loads(table["__metadata__"][KEY])
    del header["digest"]
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        header = _edit(header, draw)
    table["__metadata__"][KEY] = sealed(header) if isinstance(header, dict) else json.dumps(header)
    return with_table(table, tensors)


def deep_or_long(whole: bytes, draw: random.Random) -> bytes:
    """A table that is nested deeply, or has numbers of many digits."""
    table, tensors = table_of(whole)
    many = draw.choice([100, 2000, 20_000])
    odd = draw.choice(
        ["[" * many, '{"a":' * many, "[" * many + "]" * many, "9" * many, "-" * many, '"' + "\\ud800" * many + '"']
    )
    if draw.random() < 0.5:
        return with_table('{"a":' + odd + "}", tensors)
    table["__metadata__"][KEY] = draw.choice([odd, '{"version":2,"digest":' + odd + "}"])
    return with_table(table, tensors)


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bits flipped": flipped_bits,
    "bytes changed": changed_bytes,
    "cut off": cut_off,
    "bytes moved": moved_bytes,
    "wrong length of the table": wrong_length,
    "table edited": edited_table,
    "tensors doubled": doubled_tensors,
    "header edited": edited_header,
    "header forged": forged_header,
    "deep or long JSON": deep_or_long,
}


class Base:
    """A whole artifact, and what a reader has to find in it."""

    def __init__(self, path: Path) -> None:
        self.whole = path.read_bytes()
        self.header, self.tensors = artifact.read(path)
        located, _ = artifact.read_part(path, lambda header: header.widths[0])
        self.ends = [located.entries[f"plane.{i}"].stop for i in range(self.header.widths[0])]


def same(tensors: Tensors, expected: Tensors) -> bool:
    return tensors.keys() == expected.keys() and all(
        array.dtype == expected[name].dtype
        and array.shape == expected[name].shape
        # By bytes: a NaN equals itself.
        and array.tobytes() == expected[name].tobytes()
        for name, array in tensors.items()
    )


def _read_part(path: Path, planes: int) -> Any:
    return artifact.read_part(path, lambda _: planes)


def attempt(read: Callable[[], Any]) -> tuple[str | None, Any]:
    """What became of a read, if it gave nothing; or what it gave."""
    try:
        return None, read()
    except UserError as error:
        return ("refused" if "\n" not in str(error) and len(str(error)) < 1000 else "FAILED: more than one line"), None
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {error}", None


def outcome(base: Base, path: Path, kind: str, size: int) -> str:
    """Read the file at `path`, and say what became of it."""
    told, found = attempt(lambda: artifact.read(path))
    if told is None:
        header, tensors = found
        if same(tensors, base.tensors) and header == base.header:
            told = "the same"
        else:
            told = "another artifact" if kind == "header forged" else "FAILED: other tensors"
    if kind != "cut off":
        return told
    high = base.header.widths[0]
    served = tuple(width for width in base.header.widths if base.ends[bits_read(high, width) - 1] <= size)
    held, found = attempt(lambda: artifact.read_held(path))
    if held not in (None, "refused") or (() if held else found[2]) != served:
        return f"FAILED: {served} bits of a file cut off after {size} bytes: {held}"
    whole = {} if held else found[1]
    for width in base.header.widths:
        planes = bits_read(high, width)
        part, found = attempt(functools.partial(_read_part, path, planes))
        if part not in (None, "refused") or (part is None) != (width in served):
            return f"FAILED: {width} bits of a file cut off after {size} bytes: {part}"
        for tensors in (found[1], whole) if part is None else ():
            for layer in base.header.layers:
                name = artifact.tensor_name(layer.name, "codes")
                if not np.array_equal(narrow(tensors[name], high, width), narrow(base.tensors[name], high, width)):
                    return f"FAILED: other codes at {width} bits"
    return f"{told}, {'some widths' if served else 'no width'} served"


class Watch:
    """Counts what a reader has no business to do: imports, commands, connections."""

    EVENTS = (
        "import",
        "exec",
        "compile",
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "pickle.find_class",
        "socket.connect",
    )

    def __init__(self) -> None:
        self.on, self.seen = False, Counter[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event in self.EVENTS:
            self.seen[f"{event} {arguments[:1]}"] += 1


def bases(folder: Path) -> list[Base]:
    made = []
    for i, (widths, graph, per_channel) in enumerate((((8, 6, 4, 2), False, False), ((4, 3, 2), True, True))):
        write_base(folder / f"base{i}", i, widths, graph=graph, per_channel=per_channel)
        made.append(Base(folder / f"base{i}"))
    return made


def run(folder: Path, files: int, seed: int, kinds: list[str], watch: Watch | None = None) -> list[dict[str, Any]]:
    """Damage and read so many files.

    Returns:
        For every kind: how many files, {outcome: how many}, the longest time in seconds, and the first failure.
    """
    made, path = bases(folder), folder / "damaged"
    rows: dict[str, dict[str, Any]] = {
        kind: {"kind": kind, "files": 0, "outcomes": Counter(), "worst": 0.0, "failure": None} for kind in kinds
    }
    for number in range(files):
        draw = random.Random(f"{seed} {number}")
        base, kind = made[number // len(kinds) % len(made)], kinds[number % len(kinds)]
        damaged = KINDS[kind](base.whole, draw)
        path.write_bytes(damaged)
        row: dict[str, Any] = rows[kind]
        start = time.process_time()
        if watch:
            watch.on = True
        told = outcome(base, path, kind, len(damaged))
        if watch:
            watch.on = False
        elapsed = time.process_time() - start
        if elapsed > SLOW_SECONDS:
            told = f"FAILED: {elapsed:.1f} s"
        row["files"] += 1
        row["outcomes"][told] += 1
        row["worst"] = max(row["worst"], elapsed)
        if told.startswith("FAILED") and row["failure"] is None:
            row["failure"] = f"{number}: {told}"
    return list(rows.values())


def _memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


COLUMNS = [
    "damage",
    "files",
    "refused",
    "the same",
    "another, whole (forged)",
    "cut: some widths served",
    "failed",
    "worst CPU ms",
]


def cells(row: dict[str, Any]) -> list[Any]:
    count = row["outcomes"]
    failed = sum(n for told, n in count.items() if told.startswith("FAILED"))
    served = sum(n for told, n in count.items() if told.endswith("some widths served"))
    refused = count["refused"] + count["refused, no width served"]
    return [
        row["kind"],
        row["files"],
        refused,
        count["the same"],
        count["another artifact"],
        served,
        failed,
        round(1e3 * row["worst"], 1),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), 200, -1, list(KINDS))  # what is imported late is imported now
        gc.collect()
        before = _memory("VmRSS:")
        limit = _memory("VmSize:") + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        rows = run(Path(folder), options.files, options.seed, list(KINDS), watch)
    grown = max(_memory("VmHWM:") - before, 0)
    table = [cells(row) for row in rows]
    table.append(
        ["all", *(sum(column) for column in list(zip(*table, strict=True))[1:-1]), max(line[-1] for line in table)]
    )
    for line in [COLUMNS, *table]:
        print(" | ".join(map(str, line)))
    for row in rows:
        if row["failure"]:
            print(f"{row['kind']}, file {row['failure']}")
    note = (
        f"Memory grew by {grown / 2**20:.0f} MiB at most, under a limit of {MEMORY_BYTES / 2**20:.0f}; the reader imported, "
        f"compiled, ran or connected to {'nothing' if not watch.seen else dict(watch.seen)}."
    )
    print(note)
    if options.json:
        result.write(
            options.json,
            title=f"{options.files:,} damaged artifacts: what the reader made of them",
            seeds=[options.seed],
            note=note,
            columns=COLUMNS,
            rows=table,
            failures=[row["failure"] for row in rows if row["failure"]],
        )
    sys.exit(bool(watch.seen) or any(row["failure"] for row in rows))


if __name__ == "__main__":
    result.run(main)
