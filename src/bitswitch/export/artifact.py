"""`save`: a quantized torch model to its artifact, the codes equal to the last bit."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from bitswitch import artifact
from bitswitch.artifact import GRAPH
from bitswitch.errors import UserError, require
from bitswitch.export.loading import load
from bitswitch.export.tensors import tensors_of
from bitswitch.nn import Plan, QuantizedLayer, plan_of, unwrapped

Additions = Literal["requantized", "exact"]


def save(
    model: nn.Module,
    path: str | Path,
    *,
    network: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    classes: tuple[str, ...] | None = None,
    provenance: Mapping[str, Any] | None = None,
    frontier: Sequence[Mapping[str, Any]] = (),
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    additions: Additions | None = None,
) -> None:
    """Write the model's artifact: one integer code per quantized weight, scales, per-width parameters, float rest.

    The model is not changed. No float weight of a quantized layer is written.

    Args:
        model: made by `bitswitch.quantize`, or loaded.
        path: the file; written whole or not at all.
        network: {"name": ..., "args": {...}}, by which `load` builds the network again; without it, `load` must be given
            the model. Where this, preprocessing or classes are not given, a model that was loaded keeps those of its file.
        preprocessing: {"shape", "mean", "std", "resize", "crop"} of the input.
        classes: names in the order of the logits.
        provenance: plain JSON values, kept as they are. Where this or the frontier is not given, a model that was loaded and
            has not changed keeps that of its file.
        frontier: choices, as `bitswitch.search` returns them or frontier.json lists them, from which
            `load(assignment="avg<=4")` picks.
        example_inputs: what the network is called with, a batch of real data, better 64 images than 4: the network's graph is
            exported with it and stored too, so that `bitswitch.runtime.Session` can run the file. Needs the extras `onnx` and
            `runtime`. Where it is not given, a model that was loaded and has not changed keeps the graph of its file.
        additions: how that graph adds branches: "requantized" to 8 bits, calibrated on `example_inputs`, where every layer has
            8 bits or nothing is lost (for grouped and 1-d convolutions at every width), and `example_inputs` show 64 results of
            each channel, which is what is done where it is not given; or "exact", which keeps the sums of all convolutions but
            those grouped and 1-d ones that one layer alone reads.

    Raises:
        UserError: the model is not quantized, holds values that are not finite or cannot be stored, or the file cannot be
            written.
    """
    if additions is not None and example_inputs is None:
        raise UserError(
            f"additions={additions!r} says how a graph is made: give example_inputs= to make one, or leave it out"
        )
    model = unwrapped(model)
    header, tensors = contents(model, network, preprocessing, classes, provenance, frontier)
    located = getattr(model, "bitswitch_located", None)
    if isinstance(located, artifact.Located):
        unchanged = artifact.holds(located, header, tensors)
        kept = ("network", "preprocessing", "classes", *(("provenance", "frontier") if unchanged else ()))
        header = dataclasses.replace(
            header, **{key: getattr(header, key) or getattr(located.header, key) for key in kept}
        )
    if example_inputs is not None:
        tensors[GRAPH] = _session_graph()(model, header, tensors, example_inputs, additions or "requantized")
    elif isinstance(located, artifact.Located) and (graph := _graph_of(located, unchanged)) is not None:
        tensors[GRAPH] = graph
    artifact.write(path, header, tensors)


def _session_graph() -> Callable[..., np.ndarray]:
    """Imported here, since it needs ONNX and ONNX Runtime, which who only saves need not have."""
    require("onnxscript", "onnx")
    from bitswitch.export.graph import session_graph

    return session_graph


def _graph_of(located: artifact.Located, unchanged: bool) -> np.ndarray | None:
    """The graph of the file that a model was loaded from; None where that has none, or the model has changed since."""
    if GRAPH not in located.entries:
        return None
    reason = "the model has changed since"
    try:
        if unchanged:
            return artifact.graph_of(located)
    except UserError as error:
        reason = str(error)
    warnings.warn(
        f"the graph of {located.path} is not kept: {reason}; example_inputs= makes a new one", UserWarning, stacklevel=3
    )
    return None


def add_graph(
    path: str | Path,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    model: nn.Module | Callable[..., nn.Module] | str | None = None,
    additions: Additions = "requantized",
) -> None:
    """Put the network's graph into an artifact, or replace it, so that `bitswitch.runtime.Session` can run the file.

    Args:
        path: the artifact; written whole or not at all.
        example_inputs, additions: see `save`.
        model: see `load`.

    Raises:
        UserError: the file or the network cannot be used, or the network cannot be exported.
    """
    if "://" in str(path) or artifact.located(path) != Path(path):
        raise UserError(f"{path} is no file of this machine's to write to: load it, and save it with example_inputs=")
    header, tensors = artifact.read(path)
    tensors.pop(GRAPH, None)
    quantized = load(path, model=model)
    tensors[GRAPH] = _session_graph()(quantized, header, tensors, example_inputs, additions)
    artifact.write(path, header, tensors)


def contents(
    model: nn.Module,
    network: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    classes: tuple[str, ...] | None = None,
    provenance: Mapping[str, Any] | None = None,
    frontier: Sequence[Mapping[str, Any]] = (),
) -> tuple[artifact.Header, dict[str, np.ndarray]]:
    """The header and the tensors of a model's artifact; see `save`."""
    plan = plan_of(model)
    if plan.method != "double_rounding":
        raise UserError(
            f"a {plan.method} model keeps float weights and cannot be saved as an artifact: it is for comparison"
        )
    if classes is not None and not (
        isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)
    ):
        # Of a mapping such as torchvision's class_to_idx the order would be lost.
        raise UserError(f"classes={classes!r:.100} is no tuple of names in the order of the logits")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    for name in plan.layers:
        if name not in layers:
            raise UserError(
                f"{name!r} of this {type(model).__name__} is no quantized layer any more: quantize the network anew"
            )
    header = artifact.Header(
        widths=plan.widths,
        layers=tuple(_entry(name, layers[name], plan) for name in plan.layers),
        norms=plan.norms,
        before=plan.before,
        transitional=plan.transitional,
        per_channel=plan.per_channel,
        frontier=tuple(map(_row, frontier)),
        network=network,
        preprocessing=preprocessing,
        classes=classes,
        provenance=provenance or {},
        checksums={},
    )
    try:
        artifact.Header.from_text(header.to_text())
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"network, preprocessing, classes, provenance or frontier cannot be stored: {error}") from error
    return header, tensors_of(model)


def _row(choice: Any) -> Mapping[str, Any]:
    """A choice as frontier.json lists it; search, which this room does not import, gives objects."""
    if isinstance(choice, Mapping):
        return {"top1": None, **choice}
    try:
        return {"assignment": dict(choice.assignment), "cost": dict(choice.cost), "damage": choice.damage, "top1": None}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"frontier: {type(choice).__name__} {choice!r:.100} is no choice of bitswitch.search"
        ) from error


def _entry(name: str, layer: QuantizedLayer, plan: Plan) -> artifact.LayerEntry:
    layer.check_weight(repr(name))
    if layer.weight is not None and not bool(layer.weight.isfinite().all()):
        raise UserError(f"the weight of {name!r} holds values that are not finite: the training diverged")
    return artifact.LayerEntry(
        name=name,
        shape=tuple(layer.stored_shape),
        bits=layer.weight_quantizer.high,
        input=layer.input_quantizer.kind,
        # To float32's precision: the last digits of a sum are the device's.
        squared_error={width: float(np.float32(error)) for width, error in layer.squared_errors().items()},
    )
