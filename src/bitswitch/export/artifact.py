"""`save` and `load`: a quantized torch model to its artifact and back, the codes equal to the last bit."""

import copy
import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bitswitch import artifact
from bitswitch.artifact import GRAPH, tensor_name
from bitswitch.assignment import Assignment
from bitswitch.codes import bits_read
from bitswitch.errors import UserError, check_number, require
from bitswitch.export.tensors import fill, tensors_of
from bitswitch.models import build, is_trusted
from bitswitch.nn import Plan, QuantizedLayer, apply, plan_of, quantized_layers, switch, unwrapped

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
            8 bits or nothing is lost, and `example_inputs` show 64 results of each channel, which is what is done where it is
            not given; or "exact", which keeps the sums of all convolutions but those grouped and 1-d ones that one layer
            alone reads.

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
    if isinstance(classes, str):
        raise UserError(f"classes={classes!r} is text: give a tuple of names")
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
    except (TypeError, ValueError) as error:
        raise UserError(f"network, preprocessing, classes, provenance or frontier cannot be stored: {error}") from error
    return header, tensors_of(model)


def load(
    path: str | Path,
    *,
    bits: int | None = None,
    model: nn.Module | Callable[..., nn.Module] | str | None = None,
    assignment: Mapping[str, int] | str | None = None,
    cache_bytes: float | None = None,
) -> nn.Module:
    """The model of an artifact, in eval mode, with integer codes and no float weight in its quantized layers.

    Where `bits` or `assignment` is given, only the bits that it needs are read, and `upgrade` reads more. So the file may be
    cut off behind them.

    Args:
        path: the artifact; or its URL, of any kind that fsspec knows: "https://...", read by ranges; or the name of one that
            comes with the package, such as "resnet20-cifar10".
        bits: the width to stand at; the highest where neither this nor `assignment` is given.
        model: the network where the file does not name it, or names the user's own code, which is never imported on the
            word of a file: a float module, a function that builds one, or its name. Names and shapes of its tensors are held
            against the file; what has neither, such as a stride or an activation function, is not in the file.
        assignment: widths by layer name; or a budget such as "avg<=4" (average bits) or "bytes<=100000", for which the best
            choice of the file's frontier is taken.
        cache_bytes: memory for the float weights that are made from the codes, at their first use after a switch, and kept.
            They are kept for as many widths as fit into it whole, and for none if none does. Where it is not given: for
            the width in use.

    Raises:
        UserError: the file is not an unaltered artifact of a version that this package reads, or lacks what is needed; the
            network is not known or is another; the width is not in the file.
    """
    if bits is not None and assignment is not None:
        raise UserError("give bits= or assignment=, not both")
    if cache_bytes is not None:
        check_number("cache_bytes", cache_bytes)
    wanted = bits if assignment is None else assignment
    served = artifact.served_widths(path) if isinstance(wanted, str) else ()

    def planes(header: artifact.Header) -> int:
        return max(bits_read(header.widths[0], width) for width in _widths(path, header, wanted, served).values())

    located, tensors = artifact.read_part(path, planes)
    header = located.header
    # Building draws initial weights; the caller's random numbers are not to be moved by it.
    with torch.random.fork_rng(devices=[]):
        network = _network(located, model)
    if any(tensor.is_meta for tensor in itertools.chain(network.parameters(), network.buffers())):
        raise UserError(
            f"model: this {type(network).__name__} is on the meta device and has no place for values: build it on the CPU"
        )
    plan = Plan(
        widths=header.widths,
        layers={layer.name: layer.input for layer in header.layers},  # type: ignore[misc]
        norms=header.norms,
        before=header.before,
        transitional=header.transitional,
        method="double_rounding",
        per_channel=header.per_channel,
        scale_form="raw",
        lsq_factor=True,
    )
    loaded = apply(network, plan)
    try:
        fill(loaded, header, tensors, planes(header))
    except (UserError, RuntimeError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} does not fit this {type(loaded).__name__}: {reason[:300]}") from error
    loaded.requires_grad_(False).eval()
    loaded.bitswitch_located = _wherever(located)  # type: ignore[assignment]
    switch(loaded, _widths(path, header, wanted, served))
    if cache_bytes is not None:
        layers = quantized_layers(loaded).values()
        copy_bytes = sum(layer.stored_shape.numel() * layer.weight_quantizer.scale().element_size() for layer in layers)
        for layer in layers:
            layer.kept.most = int(min(max(cache_bytes, 0), len(header.widths) * copy_bytes) // copy_bytes)
    return loaded


def upgrade(model: nn.Module, bits: int | None = None) -> None:
    """Read what a model lacks for a higher width from where it was loaded, and switch every layer to that width.

    Only the bit planes that are missing are read. Nothing changes if anything is wrong.

    Args:
        model: from `load(..., bits=...)`.
        bits: the width; the highest where it is not given.

    Raises:
        UserError: the model was not loaded from an artifact; it has no such width; the file is gone, cut off, or not the one
            that it was.
    """
    located = getattr(model, "bitswitch_located", None)
    if not isinstance(located, artifact.Located):
        raise UserError(
            f"this {type(model).__name__} was not loaded from an artifact: there is nothing to upgrade it from"
        )
    header = located.header
    chosen = _widths(located.path, header, bits)
    layers = quantized_layers(model)
    if layers.keys() != {layer.name for layer in header.layers}:
        raise UserError(f"this {type(model).__name__} has other layers than {located.path}: upgrade what was loaded")
    needed = bits_read(header.widths[0], max(chosen.values()))
    held = min(layer.planes for layer in layers.values())
    if held < needed:
        if any(layer.other_codes for layer in layers.values()):
            raise UserError(
                f"this {type(model).__name__} has got other codes than those of {located.path} by load_state_dict: there is "
                "nothing to upgrade them from; load their own file"
            )
        found = artifact.read_planes(located, held, needed)
        for name, layer in layers.items():
            assert layer.codes is not None
            more = torch.from_numpy(found[tensor_name(name, "codes")]).to(layer.codes.device)
            layer.store(layer.codes | more, layer.squared_errors(), planes=needed)
    switch(model, chosen)


def _wherever(located: artifact.Located) -> artifact.Located:
    """The same file, in whatever folder the process will be."""
    if "://" in located.path:
        return located
    return dataclasses.replace(located, path=str(artifact.located(located.path).absolute()))


def _widths(
    path: str | Path,
    header: artifact.Header,
    wanted: int | Mapping[str, int] | str | None,
    served: tuple[int, ...] = (),
) -> Assignment:
    """The width of every layer that `load` was asked for; for a budget, of a file that serves these widths."""
    high = header.widths[0]
    names = [layer.name for layer in header.layers]
    try:
        if wanted is None:
            chosen: int | Mapping[str, int] = high
        elif isinstance(wanted, str):
            chosen = artifact.within_budget(header.frontier, wanted, max(served, default=None))["assignment"]
        else:
            chosen = wanted
        return Assignment.of(chosen, layers=dict.fromkeys(names, high), widths=dict.fromkeys(names, header.widths))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _network(located: artifact.Located, model: Any) -> nn.Module:
    path, named = located.path, located.header.network
    args = dict((named or {}).get("args") or {})
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    if isinstance(model, str):
        return _built(located, model, args)
    if model is not None:
        try:
            made = model(**args) if callable(model) else None
        except TypeError as error:
            raise UserError(f"model={model!r} cannot be called with the arguments {args}: {error}") from error
        if not isinstance(made, nn.Module):
            raise UserError(f"model={model!r} is neither a network, nor a function that returns one, nor a name")
        return copy.deepcopy(made)
    if named is None:
        raise UserError(f"{path} does not name its network: give it with model= (--model on the command line)")
    if not is_trusted(named["name"]):
        raise UserError(
            f"{path} names the network {named['name']!r}, and no code is imported on the word of a file: "
            f"if you trust it, give model={named['name']!r} (--model on the command line)"
        )
    return _built(located, named["name"], args)


def _built(located: artifact.Located, name: str, args: Mapping[str, Any]) -> nn.Module:
    """The network by name; arguments that ask for a far greater one than the file holds are refused before it is made."""
    if is_trusted(name):
        # Trained weights are no part of the architecture, and would be fetched to be thrown away.
        args = {key: value for key, value in args.items() if key != "weights"}
        try:
            with torch.device("meta"):
                asked = sum(parameter.numel() for parameter in build(name, args).parameters())
        except UserError:
            # Some networks compute with values while they are built, which meta tensors do not have. Bad arguments are told
            # of when it is built in earnest.
            asked = 0
        stored = sum(math.prod(entry.shape) for entry in located.entries.values() if entry.dtype != "U8")
        stored += sum(math.prod(layer.shape) for layer in located.header.layers)
        if asked > stored:
            raise UserError(f"{located.path} names a {name!r} of {asked} parameters, and holds {stored}")
    return build(name, args)


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
