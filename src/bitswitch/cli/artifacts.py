"""The commands that take a file."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bitswitch import artifact, files
from bitswitch.cli.console import emit, output, stdout_kept_clean, tracked
from bitswitch.cli.tables import score_table, show_bench, show_exported, show_file
from bitswitch.cli.words import (
    Bits,
    DataName,
    Device,
    File,
    Json,
    Mixture,
    Network,
    Overrides,
    Report,
    Seed,
    ranks,
    run_directory,
    widths_of,
)
from bitswitch.codes import bits_read
from bitswitch.config import load_recipe, recipe_names
from bitswitch.errors import UserError, nearest, require


def evaluate(
    file: File,
    bits: Bits = None,
    assignment: Mixture = None,
    data: DataName = None,
    split: Annotated[str, typer.Option(help="test or val.")] = "test",
    model: Network = None,
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
    from bitswitch import evaluation

    if split not in ("test", "val"):
        raise UserError(f"--split {split}: use test or val")
    with ranks(device) as (world, place), stdout_kept_clean():
        document = evaluation.evaluate_file(
            file,
            bits=widths_of(bits),
            assignment=assignment,
            data_name=data,
            split=split,
            network=model,
            device=place,
            world=world,
            recalibration_images=recalibrate,
            confusion=confusion,
            shown=partial(tracked, silent=not world.first),
        )
    if not world.first:
        return
    title = f"{file}, on {split}"
    emit(document, json_, lambda: output.print(score_table(title, document["results"])), out and out / "evaluate.json")


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
    located, tensors, held = artifact.read_held(file)
    header = located.header
    codes = {artifact.tensor_name(layer.name, "codes") for layer in header.layers}
    document = {
        "file": str(file),
        "bytes": file.stat().st_size,
        "widths": list(header.widths),
        "held": list(held),
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
        "choices": list(header.frontier),
        "code_bytes": bits_read(header.widths[0], held[0]) * artifact.plane_bytes([one.shape for one in header.layers]),
        "other_bytes": sum(a.nbytes for name, a in tensors.items() if name not in codes and name != artifact.GRAPH),
        "graph_bytes": tensors[artifact.GRAPH].nbytes if artifact.GRAPH in tensors else 0,
        "provenance": dict(header.provenance),
    }
    if graph:
        require("onnxruntime", "runtime")
        from bitswitch.runtime import graph_report

        with stdout_kept_clean():
            document["graph"] = {str(width): graph_report(file, width) for width in held}
    emit(document, json_, lambda: show_file(document), out and out / "inspect.json")


def export(
    file: Annotated[str, typer.Argument(help="An artifact, or a recipe whose run is done.")],
    overrides: Overrides = None,
    bits: Bits = None,
    assignment: Mixture = None,
    weights: Annotated[
        str, typer.Option(help="int8 (alone with --exact), or int4 or int2 for layers that fit.")
    ] = "int8",
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Convolutions keep their exact sums, most grouped and 1-d ones aside: slower, nearer torch."
        ),
    ] = False,
    data: DataName = None,
    model: Network = None,
    json_: Json = False,
    device: Device = "auto",
    seed: Seed = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder, if not onnx/ beside the file or here; of a recipe, its run.",
        ),
    ] = None,
) -> None:
    """ONNX files of an artifact, one a precision; the artifact gets its graph, for the session without torch."""
    require("onnxscript", "onnx")
    require("onnxruntime", "runtime")
    from bitswitch import deployment, pipeline

    path, images = artifact.located(file), None
    # Nothing is written into the package.
    beside = path.parent if path == Path(file) else Path()
    if path.suffix in (".yaml", ".yml") or not files.is_file(path):
        if path.suffix not in (".yaml", ".yml") and file not in recipe_names():
            known = nearest(file, [*artifact.shipped(), *recipe_names()])
            raise UserError(
                f"there is no file {file}, and no recipe of that name (bitswitch recipes lists them){known}"
            )
        if data is not None:
            raise UserError(f"--data {data} is for a file: {file} is a recipe and names its data (data.root=FOLDER)")
        recipe = load_recipe(file, overrides or [], seed=seed)
        path = pipeline.artifact_of(recipe, run_directory(out, file), file)
        out, beside, images = (
            None,
            path.parent,
            pipeline.open_data(recipe, tracked).sample(deployment.CALIBRATION_IMAGES),
        )
    elif overrides:
        raise UserError(f"{overrides[0]!r}: overrides are for a recipe, {file} is a file")
    with stdout_kept_clean():
        document = deployment.export(
            path,
            out or beside / "onnx",
            bits=widths_of(bits),
            assignment=assignment,
            weights=weights,
            additions="exact" if exact else "requantized",
            images=images,
            data_name=data,
            network=model,
            shown=tracked,
        )
    emit(document, json_, lambda: show_exported(path, document))


def bench(
    file: File,
    model: Network = None,
    rounds: Annotated[int, typer.Option(help="How often each is timed.", min=1)] = 10,
    json_: Json = False,
    device: Device = "auto",
    seed: Seed = None,
    out: Report = None,
) -> None:
    """Size, memory, switching, latency and throughput of an artifact at every width, on this machine's CPU."""
    from bitswitch.bench import bench as measure

    if device.startswith("cuda"):
        raise UserError(f"--device {device}: bench measures on the CPU, where sessions run; leave it out")
    with stdout_kept_clean():
        document = measure(file, network=model, rounds=rounds)
    emit(document, json_, lambda: show_bench(document), out and out / "bench.json")
