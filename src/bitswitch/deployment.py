"""From a trained file to what runs without torch: the graph in the artifact, ONNX files, what a graph is made of."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from bitswitch import artifact, files
from bitswitch.data import Shown, unseen
from bitswitch.errors import UserError, nearest, require
from bitswitch.evaluation import assignments_named
from bitswitch.export import add_graph, load
from bitswitch.export.artifact import Additions
from bitswitch.models import is_trusted
from bitswitch.rundir import RunDirectory
from bitswitch.runtime.source import Source, read
from bitswitch.subject import example_images

CALIBRATION_IMAGES = 64


def export(
    path: Path,
    folder: Path,
    *,
    bits: Sequence[int] | None = None,
    assignment: str | None = None,
    weights: str = "int8",
    additions: Additions = "requantized",
    images: Tensor | None = None,
    data_name: str | None = None,
    network: str | None = None,
    shown: Shown = unseen,
) -> dict[str, Any]:
    """Write one ONNX file for each precision asked for; the artifact gets its graph first, where it has none that can be used.

    Args:
        path: the artifact.
        folder: where the ONNX files go: `<name>-4bit.onnx`, or by the average width of its layers
            `<name>-mixed-3.44bit.onnx`, with a number more where another mixture of the artifact has the same.
        bits: widths; all whose planes the file holds where neither this nor `assignment` is given.
        assignment: as in `bitswitch.evaluation.evaluate_file`.
        weights: "int8", "int4" or "int2".
        additions: how a graph that is made now adds branches; see `bitswitch.export.save`.
        images: to make the graph with, and to hold the ONNX files against torch with; where None, training images of
            `data_name`, or, for a graph that is made, of the data that the file names.
        data_name: a data name or an image folder.
        network: its name where the file does not tell, or names the user's own code.
        shown: see `bitswitch.data.load_data`.

    Returns:
        {"files": [{"file", "bits", "assignment", "bytes", "weights": as asked for, or "int8" where no layer is so narrow}],
        "graph_added": whether the artifact was written anew, "held_against_torch": whether every file was held against the
        artifact's model in torch before it was put in place, which takes a network that can be loaded}.

    Raises:
        UserError: an extra is not installed; the file, precision or data cannot be used; a file cannot be written.
    """
    require("onnxscript", "onnx")
    require("onnxruntime", "runtime")
    from bitswitch.export.onnx import Weights, export_file, is_of_another, packed_products

    located, _, held = artifact.read_held(path)
    header = located.header
    wanted: list[int | Mapping[str, int]] = list(bits or ())
    if assignment is not None:
        layers = [layer.name for layer in header.layers]
        named = assignments_named(assignment, layers, header.widths, header.frontier, held[0])
        wanted += [one.precision for one in named if isinstance(one.precision, Mapping)]
    if len(set(bits or ())) < len(bits or ()):
        raise UserError(f"--bits {','.join(map(str, bits or ()))}: name each width once")
    for width in bits or ():
        if width not in header.widths:
            raise UserError(f"{path} has no width {width}: it has {', '.join(map(str, header.widths))}")
    if weights not in get_args(Weights):
        raise UserError(f"--weights {weights}{nearest(weights, get_args(Weights))}: use int8, int4 or int2")
    source, images, added = _with_graph(path, images, additions, data_name, network, shown)
    for one in wanted:
        # What the file is cut off before is told before anything is written.
        source.assignment(one)
    model = _model(path, network, held[0])
    made: list[dict[str, Any]] = []
    for one in wanted or held:
        name = f"{path.stem}-{one}bit" if isinstance(one, int) else f"{path.stem}-mixed-{_average(one)}bit"
        file = folder / f"{name}.onnx"
        for number in itertools.count(1):
            # A mixture of this artifact that has the same average, of this call or an earlier one, keeps its file.
            if isinstance(one, int) or not is_of_another(file, source, source.assignment(one)):
                break
            file = folder / f"{name}-{number}.onnx"
        used = export_file(
            path,
            file,
            wanted=one,
            weights=weights,  # type: ignore[arg-type]
            model=model,
            example_inputs=images,
        )
        row = {"file": str(file), "bits": used.uniform, "assignment": None, "bytes": file.stat().st_size}
        row |= {"weights": weights if packed_products(source.bindings, used, weights) else "int8"}  # type: ignore[arg-type]
        made.append(row if isinstance(one, int) else row | {"assignment": used.to_json()})
    return {"files": made, "graph_added": added, "held_against_torch": model is not None}


def _average(mixture: Mapping[str, int]) -> str:
    return f"{statistics.mean(mixture.values()):.2f}"


def _with_graph(
    path: Path,
    images: Tensor | None,
    additions: Additions,
    data_name: str | None,
    network: str | None,
    shown: Shown,
) -> tuple[Source, Tensor | None, bool]:
    """What a session reads of an artifact, which gets its graph first where it has none; the images it took; whether it did."""
    try:
        source = read(path)
    except UserError:
        # No graph, or none that can be used: the file itself is sound.
        if images is None:
            images = example_images(path, CALIBRATION_IMAGES, data_name=data_name, network=network, shown=shown)
        directory = RunDirectory(path.parent)
        # Of a run, whose records are not to be written by two at once.
        with directory.locked() if directory.records() else nullcontext():
            before = files.file_digest(path)
            add_graph(path, images, model=network, additions=additions)
            directory.replaced(path.name, before)
        return read(path), images, True
    if additions == "exact" and source.bindings.additions != "exact":
        raise UserError(
            f"{path} holds a graph already, with requantized additions: --exact is for a file without a graph"
        )
    if images is None and data_name is not None and _is_known(path, network):
        images = example_images(path, CALIBRATION_IMAGES, data_name=data_name, network=network, shown=shown)
    return source, images, False


def _model(path: Path, network: str | None, bits: int) -> nn.Module | None:
    """The artifact's model at this width and below; None where its network is not known."""
    return load(path, bits=bits, model=network) if _is_known(path, network) else None


def _is_known(path: Path, network: str | None) -> bool:
    """Whether the network can be built: it was given, or the file names one that is ours to import."""
    named = artifact.read_header(path).network
    return network is not None or (named is not None and is_trusted(named["name"]))
