"""`load` and `upgrade`: an artifact to its torch model, the codes equal to the last bit."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitswitch import artifact
from bitswitch.artifact import tensor_name
from bitswitch.assignment import Assignment
from bitswitch.codes import bits_read
from bitswitch.errors import UserError, check_number
from bitswitch.export.tensors import fill
from bitswitch.models import build, build_within, is_trusted, without_weights
from bitswitch.nn import Plan, apply, quantized_layers, switch, unwrapped


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
    try:
        loaded = apply(network, plan)
        fill(loaded, header, tensors, planes(header))
    except (UserError, RuntimeError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} does not fit this {type(network).__name__}: {reason[:300]}") from error
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
    model = unwrapped(model)
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
    if not is_trusted(name):
        return build(name, args)
    # Trained weights are no part of the architecture, and would be fetched to be thrown away.
    args = without_weights(name, args)
    stored = sum(math.prod(entry.shape) for entry in located.entries.values() if entry.dtype != "U8")
    stored += sum(math.prod(layer.shape) for layer in located.header.layers)
    named = located.header.network
    if named is not None and named["name"] == name:
        refused = f"{located.path} names a {name!r} of {{}} parameters, and holds {stored}"
    else:
        refused = f"model={name!r} has {{}} parameters, and {located.path} holds {stored}"
    return build_within(name, args, stored, refused)
