"""Documents as tables."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bitswitch.cli.console import errors, output, printable


def score_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Accuracies, one row a precision or choice."""
    marked = any("non_dominated" in row for row in rows)
    note = "average bits of each choice; * no other is as cheap and as accurate" if marked else None
    table = Table(title=title, title_justify="left", caption=note, caption_justify="left")
    for column in ("precision", "top-1 %", "95 % interval", "top-5 %", "loss", "images"):
        table.add_column(column, justify="right")
    for row in rows:
        interval = "{:.2f} - {:.2f}".format(*row["top1_interval"])
        numbers = (f"{row['top1']:.2f}", interval, f"{row['top5']:.2f}", f"{row['loss']:.4f}")
        table.add_row(_precision(row), *numbers, str(row["images"]))
    return table


def _precision(row: dict[str, Any]) -> str:
    if row.get("choice") is not None:
        bits = f": {row['cost']['bits']:.2f} bits" if "bits" in row["cost"] else ""
        return f"#{row['choice']}{bits}{' *' if row.get('non_dominated') else ''}"
    if row.get("assignment") is not None:
        return "mixed"
    return "float" if row["bits"] is None else f"{row['bits']} bits"


def show_run(document: dict[str, Any]) -> None:
    """What a run reached."""
    for stage, title in (("", "multi-precision"), ("supernet", "SuperNet")):
        rows = [row for row in document["results"] if (row["stage"] == "supernet") == bool(stage)]
        if rows:
            output.print(score_table(f"{document['run']}, {title}, on test", rows))
    if "sensitivity" in document:
        output.print(_trace_table(document["sensitivity"]))
    if "frontier" in document:
        output.print(_frontier_table(document["frontier"]))
    if document["artifact"]:
        output.print(f"{document['artifact']}: {document['bytes']:,} bytes, every width in it")
    if "supernet" in document:
        output.print(f"{document['supernet']}: every mixture of widths in it")


def _trace_table(document: dict[str, Any]) -> Table:
    table = Table(
        title=f"Hessian traces, {document['images']} training images, {document['probes']} probes", title_justify="left"
    )
    for column in ("layer", "weights", "trace", "standard error"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for name, row in document["layers"].items():
        table.add_row(name, f"{row['weights']:,}", f"{row['trace']:.4g}", f"{row['standard_error']:.2g}")
    return table


def _frontier_table(document: dict[str, Any]) -> Table:
    table = Table(title=f"SubNets of the SuperNet, on {document['split']}", title_justify="left")
    units = {"bits": 1, "bytes": 1e3, "bitops": 1e6, "latency": 1}
    heads = {"bits": "average bits", "bytes": "kB", "bitops": "MBitOPs", "latency": "latency"}
    costs = [name for name in document["choices"][0]["cost"] if name in units]
    for column in ("", *(heads[name] for name in costs), "damage", "top-1 %", "widths in the order of layers"):
        table.add_column(column, justify="left" if column.startswith("widths") else "right")
    for i, choice in enumerate(document["choices"]):
        numbers = [f"{choice['cost'][name] / units[name]:,.2f}" for name in costs]
        top1 = "" if choice["top1"] is None else f"{choice['top1']:.2f}"
        table.add_row(f"#{i}", *numbers, f"{choice['damage']:.3g}", top1, _runs(list(choice["assignment"].values())))
    return table


def _runs(widths: Sequence[int]) -> str:
    """Widths layer by layer, equal neighbours together: "8 4x3 2" reads 8, three times 4, 2."""
    groups = [(width, len(list(same))) for width, same in itertools.groupby(widths)]
    return " ".join(str(width) if count == 1 else f"{width}x{count}" for width, count in groups)


def show_file(document: dict[str, Any]) -> None:
    """What `inspect` found."""
    table = Table(title=f"{document['file']}: squared error of the weights at each width", title_justify="left")
    table.add_column("layer", no_wrap=True)
    for column in ("shape", "input", *(f"{width} bits" for width in document["widths"])):
        table.add_column(column, overflow="fold")
    for layer in document["layers"]:
        errors_ = [f"{layer['squared_error'][str(w)]:.4g}" for w in document["widths"]]
        table.add_row(printable(layer["name"]), "x".join(map(str, layer["shape"])), layer["input"], *errors_)
    output.print(table)
    sizes = f"{document['code_bytes']:,} of integer codes, {document['other_bytes']:,} of other tensors"
    sizes += f", {document['graph_bytes']:,} of the graph" if document["graph_bytes"] else ""
    output.print(f"{document['bytes']:,} bytes: {sizes}")
    if document["held"] != document["widths"]:
        output.print(f"cut off: it serves {document['held'][0]} bits at most")
    output.print(f"network: {json.dumps(document['network'])}")
    for i, choice in enumerate(document["choices"]):
        costs = ", ".join(f"{printable(name)} {value:,.6g}" for name, value in choice["cost"].items())
        output.print(f"choice #{i}: {costs}")
    for width, report in document.get("graph", {}).items():
        kinds = (
            f"{report['integer']} products in integers, {report['float']} in floats, additions {report['additions']}"
        )
        output.print(f"graph at {width} bits: {kinds}")
    for key, value in document["provenance"].items():
        output.print(f"{printable(key)}: {json.dumps(value)}")


def show_exported(path: Path, document: dict[str, Any]) -> None:
    """What `export` wrote."""
    if document["graph_added"]:
        output.print(f"{path} holds its graph now: bitswitch.runtime.Session runs it")
    if not document["held_against_torch"]:
        errors.print("not held against torch: the file does not name its network (--model)")
    for row in document["files"]:
        output.print(f"{row['file']}: {row['bytes']:,} bytes, {row['weights']} weights")


def show_bench(document: dict[str, Any]) -> None:
    """What `bench` measured."""
    costs = Table(title=f"{document['file']}: {document['file_bytes']:,} bytes", title_justify="left")
    heads = ("bits", "bytes read", "narrowed", "torch switch ms", "kept", "session build ms", "switch us", "peak MB")
    for column in heads:
        costs.add_column(column, justify="right")
    for row in document["widths"]:
        timed = ("torch_switch_ms", "torch_kept_switch_ms", "session_build_ms", "session_switch_us")
        rest = [row[key] for key in timed]
        peaks = "/".join("-" if row[key] is None else f"{row[key]:.0f}" for key in ("torch_peak_mb", "session_peak_mb"))
        numbers = ["-" if value is None else f"{value:.2f}" for value in rest]
        costs.add_row(str(row["bits"]), f"{row['bytes_read']:,}", f"{row['narrowed_bytes']:,}", *numbers, peaks)
    output.print(costs)
    speed = Table(title=f"{document['machine']['threads']} threads", title_justify="left")
    for column in ("engine", "bits", "batch", "ms", "images/s"):
        speed.add_column(column, justify="left" if column == "engine" else "right")
    for row in document["speed"]:
        bits = "float" if row["bits"] is None else str(row["bits"])
        speed.add_row(row["engine"], bits, str(row["batch"]), f"{row['ms']:.2f}", f"{row['images_per_s']:,.0f}")
    output.print(speed)
    if not document["graph"]:
        output.print(f"no session: bitswitch export {document['file']} adds the graph")
