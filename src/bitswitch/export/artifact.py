"""`save` and `load`: a quantized torch model to its artifact and back, the codes equal to the last bit."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bitswitch import artifact
from bitswitch.artifact import tensor_name
from bitswitch.errors import UserError
from bitswitch.models import build, is_trusted
from bitswitch.nn import Plan, QuantizedLayer, SwitchableBatchNorm, apply, plan_of, switch

# The tensor that holds the network's graph.
GRAPH = "graph"
Additions = Literal["requantized", "exact"]


def save(
    model: nn.Module,
    path: str | Path,
    *,
    network: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    classes: tuple[str, ...] | None = None,
    provenance: Mapping[str, Any] | None = None,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    additions: Additions = "requantized",
) -> None:
    """Write the model's artifact: one integer code per quantized weight, scales, per-width parameters, float rest.

    The model is not changed. No float weight of a quantized layer is written.

    Args:
        model: made by `bitswitch.quantize`, or loaded.
        path: the file; written whole or not at all.
        network: {"name": ..., "args": {...}}, by which `load` builds the network again; without it, `load` must be given
            the model.
        preprocessing: {"shape", "mean", "std", "resize", "crop"} of the input.
        classes: names in the order of the logits.
        provenance: plain JSON values, kept as they are.
        example_inputs: what the network is called with, a batch of real data: the network's graph is exported with it and
            stored too, so that `bitswitch.runtime.Session` can run the file. Needs the extras `onnx` and `runtime`.
        additions: how that graph adds branches: "requantized" to 8 bits, calibrated on `example_inputs`; or "exact".

    Raises:
        UserError: the model is not quantized, holds values that are not finite or cannot be stored, or the file cannot be
            written.
    """
    header, tensors = contents(model, network, preprocessing, classes, provenance)
    if example_inputs is not None:
        # Here, since it needs ONNX and ONNX Runtime, which who only saves need not have.
        from bitswitch.export.graph import session_graph

        tensors[GRAPH] = session_graph(model, header, tensors, example_inputs, additions)
    artifact.write(path, header, tensors)


def contents(
    model: nn.Module,
    network: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    classes: tuple[str, ...] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> tuple[artifact.Header, dict[str, np.ndarray]]:
    """The header and the tensors of a model's artifact; see `save`."""
    plan = plan_of(model)
    if plan.method != "double_rounding":
        raise UserError(
            f"a {plan.method} model keeps float weights and cannot be saved as an artifact: it is for comparison"
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    header = artifact.Header(
        widths=plan.widths,
        layers=tuple(_entry(name, layers[name], plan) for name in plan.layers),
        norms=plan.norms,
        per_channel=plan.per_channel,
        network=network,
        preprocessing=preprocessing,
        classes=classes,
        provenance=provenance or {},
        checksums={},
    )
    try:
        artifact.Header.from_text(header.to_text())
    except (TypeError, ValueError) as error:
        raise UserError(f"network, preprocessing, classes or provenance cannot be stored: {error}") from error
    return header, _tensors(model)


def load(
    path: str | Path,
    *,
    bits: int | None = None,
    model: nn.Module | Callable[..., nn.Module] | str | None = None,
    assignment: Mapping[str, int] | None = None,
) -> nn.Module:
    """The model of an artifact, in eval mode, with integer codes and no float weight in its quantized layers.

    Args:
        path: the artifact.
        bits: the width to stand at; the highest where neither this nor `assignment` is given.
        model: the network where the file does not name it, or names the user's own code, which is never imported on the
            word of a file: a float module, a function that builds one, or its name.
        assignment: widths by layer name.

    Raises:
        UserError: the file is not a whole, unaltered artifact of a version that this package reads; the network is not
            known or is another; the width is not in the file.
    """
    if bits is not None and assignment is not None:
        raise UserError("give bits= or assignment=, not both")
    header, tensors = artifact.read(path)
    tensors.pop(GRAPH, None)
    # Building draws initial weights; the caller's random numbers are not to be moved by it.
    with torch.random.fork_rng(devices=[]):
        network = _network(path, header, model)
    plan = Plan(
        widths=header.widths,
        layers={layer.name: layer.input for layer in header.layers},  # type: ignore[misc]
        norms=header.norms,
        method="double_rounding",
        per_channel=header.per_channel,
        scale_form="raw",
        lsq_factor=True,
    )
    loaded = apply(network, plan)
    try:
        _fill(loaded, header, tensors)
    except (UserError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} does not fit this {type(loaded).__name__}: {reason[:300]}") from error
    loaded.requires_grad_(False).eval()
    if bits is not None or assignment is not None:
        switch(loaded, assignment if bits is None else bits)  # type: ignore[arg-type]
    return loaded


def _network(path: str | Path, header: artifact.Header, model: Any) -> nn.Module:
    args = dict((header.network or {}).get("args") or {})
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    if isinstance(model, str):
        return build(model, args)
    if model is not None:
        made = model(**args) if callable(model) else None
        if not isinstance(made, nn.Module):
            raise UserError(f"model={model!r} is neither a network, nor a function that returns one, nor a name")
        return copy.deepcopy(made)
    if header.network is None:
        raise UserError(f"{path} does not name its network: give it with model= (--model on the command line)")
    if not is_trusted(header.network["name"]):
        raise UserError(
            f"{path} names the network {header.network['name']!r}, and no code is imported on the word of a file: "
            f"if you trust it, give model={header.network['name']!r} (--model on the command line)"
        )
    return build(header.network["name"], args)


def _entry(name: str, layer: QuantizedLayer, plan: Plan) -> artifact.LayerEntry:
    if layer.weight is not None and not bool(layer.weight.isfinite().all()):
        raise UserError(f"the weight of {name!r} holds values that are not finite: the training diverged")
    return artifact.LayerEntry(
        name=name,
        shape=tuple(layer.stored_shape),
        bits=layer.weight_quantizer.high,
        input=layer.input_quantizer.kind,
        squared_error=layer.squared_errors(),
    )


@torch.no_grad()
def _tensors(model: nn.Module) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            for key, tensor in _layer_tensors(module).items():
                found[tensor_name(name, key)] = _storable(tensor_name(name, key), tensor, learned=True)
        elif isinstance(module, SwitchableBatchNorm):
            states = [norm.state_dict() for norm in module.by_width.values()]
            for key in states[0]:
                stacked = torch.stack([state[key] for state in states])
                found[tensor_name(name, key)] = _storable(tensor_name(name, key), stacked, learned=True)
    for name, tensor in _others(model).items():
        found[name] = _storable(name, tensor.detach(), learned=isinstance(tensor, nn.Parameter))
    return found


def _others(model: nn.Module) -> dict[str, Tensor]:
    """What belongs to no quantized layer and no switchable batch normalization, each tensor under its first name."""
    inside: set[str] = set()
    prefixes: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer):
            inside |= {tensor_name(name, "weight"), tensor_name(name, "codes")}
            prefixes += [tensor_name(name, "weight_quantizer."), tensor_name(name, "input_quantizer.")]
        elif isinstance(module, SwitchableBatchNorm):
            prefixes.append(tensor_name(name, "by_width."))
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in inside and not name.startswith(tuple(prefixes)):
            first.setdefault(id(tensor), name)
    whole = model.state_dict(keep_vars=True)
    return {name: whole[name] for name in first.values()}


def _layer_tensors(layer: QuantizedLayer) -> dict[str, Tensor]:
    quantizer = layer.input_quantizer
    tensors = {
        "codes": layer.stored_codes(),
        "weight_scale": layer.weight_quantizer.scale(),
        "input_scale": torch.stack([quantizer.scale(width) for width in layer.widths]),
    }
    offsets = [offset for width in layer.widths if (offset := quantizer.offset_at(width)) is not None]
    if offsets:
        tensors["input_offset"] = torch.stack(offsets)
    return tensors


def _storable(name: str, tensor: Tensor, *, learned: bool) -> np.ndarray:
    """A NumPy array of int8 (codes), int32 or float32; what was learned must be finite, a constant such as a mask need not."""
    if tensor.dtype == torch.int8:
        return tensor.cpu().numpy()
    if tensor.is_floating_point():
        if tensor.dtype == torch.float64:
            raise UserError(f"{name!r} is float64 and the artifact holds float32: train or convert with model.float()")
        if learned and not bool(tensor.isfinite().all()):
            raise UserError(f"{name!r} holds values that are not finite: the training diverged")
        return tensor.float().cpu().numpy()
    if tensor.is_complex() or (tensor.numel() and (int(tensor.min()) < -(2**31) or int(tensor.max()) >= 2**31)):
        raise UserError(f"{name!r} ({tensor.dtype}) does not fit the artifact's float32 or int32")
    return tensor.to(torch.int32).cpu().numpy()


def _fill(model: nn.Module, header: artifact.Header, tensors: Mapping[str, np.ndarray]) -> None:
    """Put an artifact's tensors into the structure made for them; every tensor must find its place and every place one."""
    rest = {name: torch.from_numpy(array) for name, array in tensors.items()}
    errors = {layer.name: layer.squared_error for layer in header.layers}
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            if module.weight is None or module.weight.shape != rest[tensor_name(name, "codes")].shape:
                raise UserError(f"the weight of {name!r} has another shape")
            module.store(rest[tensor_name(name, "codes")], errors[name])
            state |= _layer_state(name, module, rest)
        elif isinstance(module, SwitchableBatchNorm):
            state |= _norm_state(name, module, rest)
    places = _others(model)
    if places.keys() != rest.keys():
        missing, extra = sorted(places.keys() - rest.keys()), sorted(rest.keys() - places.keys())
        raise UserError(f"the file lacks {missing[0]!r}" if missing else f"the network has no {extra[0]!r}")
    # Shared modules have several names, of which the file holds the first.
    model.load_state_dict(state | rest, strict=False)


def _norm_state(name: str, norm: SwitchableBatchNorm, rest: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for key in next(iter(norm.by_width.values())).state_dict():
        stacked = rest.pop(tensor_name(name, key))
        if len(stacked) != len(norm.by_width):
            raise UserError(f"{tensor_name(name, key)!r} holds {len(stacked)} widths, not {len(norm.by_width)}")
        for width, tensor in zip(norm.by_width, stacked, strict=True):
            state[tensor_name(name, f"by_width.{width}.{key}")] = tensor
    return state


def _layer_state(name: str, layer: QuantizedLayer, rest: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {
        tensor_name(name, "codes"): rest.pop(tensor_name(name, "codes")),
        tensor_name(name, "weight_quantizer.scale_parameter"): rest.pop(tensor_name(name, "weight_scale")),
    }
    scales = rest.pop(tensor_name(name, "input_scale"))
    offsets = rest.pop(tensor_name(name, "input_offset")) if layer.input_quantizer.kind == "zero_point" else None
    for i, width in enumerate(layer.widths):
        state[tensor_name(name, f"input_quantizer.scale_parameter.{width}")] = scales[i]
        if offsets is not None:
            state[tensor_name(name, f"input_quantizer.offset.{width}")] = offsets[i]
    return state
