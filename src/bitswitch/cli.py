"""The command line: parse, call, print, exit."""

import contextlib
import ctypes
import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

from bitswitch.errors import UserError, require

require("typer", "train")
require("yaml", "train")
require("pydantic", "train")
require("torch", "train")

import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402
from rich.table import Table  # noqa: E402

from bitswitch import artifact, evaluation, files, pipeline  # noqa: E402
from bitswitch.config import load_recipe, recipe_names, to_yaml  # noqa: E402
from bitswitch.rundir import RunDirectory  # noqa: E402
from bitswitch.training import distributed  # noqa: E402
from bitswitch.version import __version__  # noqa: E402

# The base of every complaint about the words of a command; typer carries its own copy of click or takes it from outside.
_UsageError: Any = typer.BadParameter.__mro__[2]

_INTERRUPTED = 130

app = typer.Typer(
    name="bitswitch",
    help="One trained network, one stored 8-bit integer weight per parameter, every precision from it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipes_app = typer.Typer(help="List the built-in recipes.", invoke_without_command=True, rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes")

errors = Console(stderr=True, soft_wrap=True, highlight=False)
output = Console(soft_wrap=True, highlight=False)

RecipeName = Annotated[str, typer.Argument(help="A built-in recipe, or the path of a .yaml file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value ..., the values as YAML.")]
File = Annotated[Path, typer.Argument(help="An artifact; evaluate takes checkpoints, too.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1; auto takes CUDA where there is one.")]
Seed = Annotated[int | None, typer.Option("--seed", help="In place of the recipe's.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run directory; runs/<recipe> where it is not given.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Do these stages again whatever is there.")]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Write metrics for TensorBoard into the run directory.")
]
Report = Annotated[Path | None, typer.Option("--out", help="Also write the JSON document into this folder.")]


class TerminalReporter:
    """Notes and progress bars on stderr; no bars where it is not a terminal; nothing from ranks other than the first."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent

    def note(self, text: str) -> None:
        """A line."""
        if not self.silent:
            errors.print(text, markup=False)

    @contextlib.contextmanager
    def progress(self, stage: str, steps: int, done: int) -> Iterator[Callable[[str], None]]:
        """A progress bar with the time left."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        hidden = self.silent or not errors.is_terminal
        with Progress(*columns, TextColumn("{task.fields[text]}"), console=errors, disable=hidden) as bar:
            task = bar.add_task(stage, total=steps, completed=done, text="")
            yield lambda text: bar.update(task, advance=1, text=text)


def _emit(document: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    else:
        show()


def _stages(
    stages: Sequence[str] | None,
    recipe: str,
    overrides: list[str] | None,
    as_json: bool,
    device: str,
    seed: int | None,
    out: Path | None,
    fresh: bool,
    tensorboard: bool,
) -> None:
    """Do stages (all that the recipe asks for where None), and show what they reached."""
    if tensorboard:
        require("tensorboard", "tensorboard")
    config = load_recipe(recipe, overrides or [], seed=seed)
    name = Path(recipe).stem
    stages = pipeline.stages_of(config) if stages is None else stages
    with _ranks(device) as (world, place):
        run = pipeline.Run(
            name=name,
            recipe=config,
            directory=RunDirectory(out or Path("runs") / name),
            device=place,
            reporter=TerminalReporter(silent=not world.first),
            world=world,
            tensorboard=tensorboard,
        )
        with _stdout_kept_clean():
            records = pipeline.execute(run, stages, fresh=fresh)
    if not world.first:
        return
    shown = {stage: record for stage, record in records.items() if stage in stages or stage == "pretrain"}
    document = _run_document(run, shown)
    _emit(document, as_json, lambda: _show_run(document))


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """Send what libraries print past Python to stderr: HiGHS has a stray printf in its integer solver (its issue 2783)."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        # C's own buffer would reach stdout later.
        with contextlib.suppress(OSError, TypeError, AttributeError):
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def _ranks(device: str) -> Iterator[tuple[distributed.World, torch.device]]:
    """This process among those that torchrun started, and its device."""
    place = pipeline.choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    world = distributed.join(place.type)
    try:
        yield world, place
    finally:
        distributed.leave()


def _run_document(run: pipeline.Run, records: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for stage in ("pretrain", "train", "supernet"):
        for bits, score in records.get(stage, {"result": {}})["result"].items():
            rows.append({"stage": stage, "bits": None if bits == "float" else int(bits), "split": "test", **score})
    document: dict[str, Any] = {"results": rows, "run": str(run.directory.path), "artifact": None, "bytes": None}
    if run.directory.artifact.name in records.get("train", {"outputs": ()})["outputs"]:
        document |= {"artifact": str(run.directory.artifact), "bytes": run.directory.artifact.stat().st_size}
    if "supernet" in records:
        document["supernet"] = str(run.directory.supernet)
    if "sensitivity" in records:
        document["sensitivity"] = files.read_json(run.directory.sensitivity)
    if "search" in records:
        document["frontier"] = files.read_json(run.directory.frontier)
    return document


def _score_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
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
        return f"#{row['choice']}: {row['cost']['bits']:.2f} bits{' *' if row.get('non_dominated') else ''}"
    if row.get("assignment") is not None:
        return "mixed"
    return "float" if row["bits"] is None else f"{row['bits']} bits"


def _show_run(document: dict[str, Any]) -> None:
    for stage, title in (("", "multi-precision"), ("supernet", "SuperNet")):
        rows = [row for row in document["results"] if (row["stage"] == "supernet") == bool(stage)]
        if rows:
            output.print(_score_table(f"{document['run']}, {title}, on test", rows))
    if "sensitivity" in document:
        output.print(_trace_table(document["sensitivity"]))
    if "frontier" in document:
        output.print(_frontier_table(document["frontier"]))
    if document["artifact"]:
        output.print(f"{document['artifact']}: {document['bytes']:,} bytes, every width in it", markup=False)
    if "supernet" in document:
        output.print(f"{document['supernet']}: every mixture of widths in it", markup=False)


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


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    json_: Json = False,
    device: Device = "auto",
    seed: Seed = None,
    out: Out = None,
    fresh: Fresh = False,
    tensorboard: TensorBoard = False,
) -> None:
    """Every stage of a recipe in order; takes up where it stopped."""
    _stages(None, recipe, overrides, json_, device, seed, out, fresh, tensorboard)


@app.command()
def pretrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    json_: Json = False,
    device: Device = "auto",
    seed: Seed = None,
    out: Out = None,
    fresh: Fresh = False,
    tensorboard: TensorBoard = False,
) -> None:
    """Train the float network."""
    _stages(["pretrain"], recipe, overrides, json_, device, seed, out, fresh, tensorboard)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    json_: Json = False,
    device: Device = "auto",
    seed: Seed = None,
    out: Out = None,
    fresh: Fresh = False,
    tensorboard: TensorBoard = False,
) -> None:
    """Train all bit-widths together, from the float network, and write the artifact."""
    _stages(["train"], recipe, overrides, json_, device, seed, out, fresh, tensorboard)


@app.command()
def sensitivity(
    recipe: RecipeName,
    overrides: Overrides = None,
    json_: Json = False,
    device: Device = "auto",
    seed: Seed = None,
    out: Out = None,
    fresh: Fresh = False,
    tensorboard: TensorBoard = False,
) -> None:
    """Traces of the float network's Hessian, layer by layer."""
    _stages(["sensitivity"], recipe, overrides, json_, device, seed, out, fresh, tensorboard)


@app.command()
def supernet(
    recipe: RecipeName,
    overrides: Overrides = None,
    json_: Json = False,
    device: Device = "auto",
    seed: Seed = None,
    out: Out = None,
    fresh: Fresh = False,
    tensorboard: TensorBoard = False,
) -> None:
    """Train the SuperNet, from the multi-precision network."""
    _stages(["supernet"], recipe, overrides, json_, device, seed, out, fresh, tensorboard)


@app.command()
def search(
    recipe: RecipeName,
    overrides: Overrides = None,
    json_: Json = False,
    device: Device = "auto",
    seed: Seed = None,
    out: Out = None,
    fresh: Fresh = False,
    tensorboard: TensorBoard = False,
) -> None:
    """Find the best SubNets for a range of budgets."""
    _stages(["search"], recipe, overrides, json_, device, seed, out, fresh, tensorboard)


@app.command()
def evaluate(
    file: File,
    bits: Annotated[str | None, typer.Option(help="Widths, such as 8,6,4,2; all where not given.")] = None,
    assignment: Annotated[
        str | None, typer.Option(help="frontier.json, frontier.json#3, a JSON file {layer: bits}, or avg<=4.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="A data name or an image folder; its own where not given.")] = None,
    split: Annotated[str, typer.Option(help="test or val.")] = "test",
    model: Annotated[str | None, typer.Option(help="The network where the file does not name it.")] = None,
    recalibrate: Annotated[int, typer.Option(help="Estimate BatchNorm anew from so many training images.", min=0)] = 0,
    confusion: Annotated[
        bool, typer.Option("--confusion", help="Add confusion matrices to the JSON document.")
    ] = False,
    json_: Json = False,
    device: Device = "auto",
    seed: Seed = None,
    out: Report = None,
) -> None:
    """Accuracy of an artifact, or of a checkpoint, at every width."""
    if split not in ("test", "val"):
        raise UserError(f"--split {split}: use test or val")
    with _ranks(device) as (world, place):
        document = evaluation.evaluate_file(
            file,
            bits=_widths(bits),
            assignment=assignment,
            data_name=data,
            split=split,
            network=model,
            device=place,
            world=world,
            recalibration_images=recalibrate,
            confusion=confusion,
        )
    if not world.first:
        return
    if out is not None:
        files.write_json(out / "evaluate.json", document)
    _emit(document, json_, lambda: output.print(_score_table(f"{file}, on {split}", document["results"])))


def _widths(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--bits {text}: give widths with commas between them, such as 8,6,4,2") from error


@app.command()
def inspect(
    file: File,
    graph: Annotated[
        bool, typer.Option("--graph", help="Count what runs in integers and what in floats here.")
    ] = False,
    json_: Json = False,
    device: Device = "auto",
    seed: Seed = None,
    out: Report = None,
) -> None:
    """What is in an artifact: widths, layers, sizes, provenance."""
    header, tensors = artifact.read(file)
    document = {
        "file": str(file),
        "bytes": file.stat().st_size,
        "widths": list(header.widths),
        "network": header.network,
        "preprocessing": header.preprocessing,
        "classes": header.classes,
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "bits": layer.bits,
                "input": layer.input,
                "squared_error": {str(width): error for width, error in layer.squared_error.items()},
            }
            for layer in header.layers
        ],
        "code_bytes": header.widths[0] * artifact.plane_bytes([layer.shape for layer in header.layers]),
        "other_bytes": sum(a.nbytes for name, a in tensors.items() if not name.endswith(".codes")),
        "provenance": dict(header.provenance),
    }
    if graph:
        require("onnxruntime", "runtime")
        from bitswitch.runtime import graph_report

        document["graph"] = {str(width): graph_report(file, width) for width in header.widths}
    if out is not None:
        files.write_json(out / "inspect.json", document)
    _emit(document, json_, lambda: _show_file(document))


def _show_file(document: dict[str, Any]) -> None:
    table = Table(title=f"{document['file']}: squared error of the weights at each width", title_justify="left")
    table.add_column("layer", no_wrap=True)
    for column in ("shape", "input", *(f"{width} bits" for width in document["widths"])):
        table.add_column(column, overflow="fold")
    for layer in document["layers"]:
        errors_ = [f"{layer['squared_error'][str(w)]:.4g}" for w in document["widths"]]
        table.add_row(layer["name"], "x".join(map(str, layer["shape"])), layer["input"], *errors_)
    output.print(table)
    sizes = f"{document['code_bytes']:,} of integer codes, {document['other_bytes']:,} of other tensors"
    output.print(f"{document['bytes']:,} bytes: {sizes}", markup=False)
    output.print(f"network: {json.dumps(document['network'])}", markup=False)
    for width, report in document.get("graph", {}).items():
        kinds = (
            f"{report['integer']} products in integers, {report['float']} in floats, additions {report['additions']}"
        )
        output.print(f"graph at {width} bits: {kinds}", markup=False)
    for key, value in document["provenance"].items():
        output.print(f"{key}: {json.dumps(value)}", markup=False)


@app.command()
def export(
    file: Annotated[str, typer.Argument(help="An artifact, or a recipe whose run is done.")],
    overrides: Overrides = None,
    bits: Annotated[str | None, typer.Option(help="Widths, such as 8,4; all where not given.")] = None,
    assignment: Annotated[
        str | None, typer.Option(help="frontier.json, frontier.json#3, a JSON file {layer: bits}, or avg<=4.")
    ] = None,
    weights: Annotated[str, typer.Option(help="int8, or int4 or int2 for the layers that fit.")] = "int8",
    exact: Annotated[bool, typer.Option("--exact", help="Branches that are added keep 32 bits, not 8.")] = False,
    data: Annotated[str | None, typer.Option(help="A data name or an image folder; its own where not given.")] = None,
    model: Annotated[str | None, typer.Option(help="The network where the file does not name it.")] = None,
    json_: Json = False,
    device: Device = "auto",
    seed: Seed = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder; onnx/ beside the artifact if not given.")] = None,
) -> None:
    """ONNX files of an artifact, one a precision; the artifact gets its graph, for the session without torch."""
    require("onnxscript", "onnx")
    require("onnxruntime", "runtime")
    from bitswitch import deployment

    path, images = Path(file), None
    if not path.is_file() and path.suffix != ".safetensors":
        recipe = load_recipe(file, overrides or [], seed=seed)
        directory = RunDirectory(out or Path("runs") / path.stem)
        path = directory.supernet if directory.supernet.is_file() else directory.artifact
        if not path.is_file():
            raise UserError(f"stage train is not done in {directory.path}: bitswitch run {file} does it")
        out, images = None, pipeline.open_data(recipe).sample(deployment.CALIBRATION_IMAGES)
    elif overrides:
        raise UserError(f"{overrides[0]!r}: overrides are for a recipe, {file} is a file")
    document = deployment.export(
        path,
        out or path.parent / "onnx",
        bits=_widths(bits),
        assignment=assignment,
        weights=weights,
        additions="exact" if exact else "requantized",
        images=images,
        data_name=data,
        network=model,
    )
    _emit(document, json_, lambda: _show_exported(path, document))


def _show_exported(path: Path, document: dict[str, Any]) -> None:
    if document["graph_added"]:
        output.print(f"{path} holds its graph now: bitswitch.runtime.Session runs it", markup=False)
    if not document["held_against_torch"]:
        errors.print("not held against torch: the file does not name its network (--model)", markup=False)
    for row in document["files"]:
        output.print(f"{row['file']}: {row['bytes']:,} bytes", markup=False)


@app.command()
def bench(
    file: File,
    model: Annotated[str | None, typer.Option(help="The network where the file does not name it.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each is timed.", min=1)] = 10,
    json_: Json = False,
    device: Device = "auto",
    seed: Seed = None,
    out: Report = None,
) -> None:
    """Size, memory, switching, latency and throughput of an artifact at every width, on this machine's CPU."""
    from bitswitch.bench import bench as measure

    document = measure(file, network=model, rounds=rounds)
    if out is not None:
        files.write_json(out / "bench.json", document)
    _emit(document, json_, lambda: _show_bench(document))


def _show_bench(document: dict[str, Any]) -> None:
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
        output.print(f"no session: bitswitch export {document['file']} adds the graph", markup=False)


@recipes_app.callback()
def recipes(
    context: typer.Context, json_: Json = False, device: Device = "auto", seed: Seed = None, out: Report = None
) -> None:
    """List the built-in recipes."""
    if context.invoked_subcommand is None:
        _emit({"recipes": recipe_names()}, json_, lambda: output.print("\n".join(recipe_names()), markup=False))


@recipes_app.command()
def show(
    name: RecipeName,
    overrides: Overrides = None,
    json_: Json = False,
    device: Device = "auto",
    seed: Seed = None,
    out: Report = None,
) -> None:
    """Print a recipe as it is resolved."""
    recipe = load_recipe(name, overrides or [], seed=seed)
    _emit(recipe.model_dump(mode="json"), json_, lambda: output.print(to_yaml(recipe), markup=False, end=""))


@app.command()
def version(json_: Json = False) -> None:
    """The version of bitswitch."""
    _emit({"version": __version__}, json_, lambda: output.print(__version__, markup=False))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line. Exit 0: done; 2: the user's mistake, told in one line; 1: our fault; 130: interrupted."""
    # A user's own package.module:function is looked for where the command is typed, as python -m does.
    sys.path.insert(0, "")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # What a command returns is None; a number comes from typer, for --help or an interruption.
        code = app(args=given or ["--help"], standalone_mode=False) or 0
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
    except UserError as error:
        code = _fail(str(error))
    except _UsageError as error:
        code = _fail(error.format_message() or "bitswitch --help lists the commands")
    except (typer.Abort, KeyboardInterrupt):
        # A second one, out of impatience, is to change nothing.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        errors.print("interrupted; the same command goes on from the last checkpoint", markup=False)
        code = _INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except RuntimeError as error:
        code = _fault() if not distributed.is_lost_peer(error) else _fail("another process ended: see what it said")
    except Exception:
        code = _fault()
    sys.exit(code)


def _fault() -> int:
    traceback.print_exc()
    errors.print("this is a fault of bitswitch, not yours; please report it with the lines above", markup=False)
    return 1


def _fail(message: str) -> int:
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(message.split()))
    errors.print(f"bitswitch: {line}", markup=False)
    return 2


if __name__ == "__main__":
    main()
