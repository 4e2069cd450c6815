"""A quantized model's tensors as an artifact holds them, and back."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from bitswitch import artifact
from bitswitch.artifact import tensor_name
from bitswitch.errors import UserError
from bitswitch.nn import QuantizedLayer, SwitchableBatchNorm


@torch.no_grad()
def tensors_of(model: nn.Module) -> dict[str, np.ndarray]:
    """The tensors of a quantized model's artifact, by name; codes are those of the highest width.

    Raises:
        UserError: a tensor holds values that are not finite, or is of a type that the artifact cannot hold.
    """
    found: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            for key, tensor in _layer_tensors(module).items():
                full = tensor_name(name, key)
                found[full] = tensor.cpu().numpy() if key == "codes" else _storable(full, tensor, learned=True)
        elif isinstance(module, SwitchableBatchNorm):
            states = [norm.state_dict() for norm in module.variants.values()]
            for key in states[0]:
                stacked = torch.stack([state[key] for state in states])
                found[tensor_name(name, key)] = _storable(tensor_name(name, key), stacked, learned=True)
    for name, tensor in _others(model).items():
        if name in found:
            raise UserError(
                f"{name!r} is a tensor of the network by a name that the artifact has for its own: rename it"
            )
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
            prefixes.append(tensor_name(name, "variants."))
    first: dict[int, str] = {}
    whole = model.state_dict(keep_vars=True)
    for name, tensor in whole.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{name!r} in the state is a {type(tensor).__name__}, and an artifact holds tensors alone")
        if name not in inside and not name.startswith(tuple(prefixes)):
            first.setdefault(id(tensor), name)
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
    """A NumPy array of int32 or float32; what was learned must be finite, a constant such as a mask need not."""
    if tensor.is_floating_point():
        if tensor.dtype == torch.float64:
            raise UserError(f"{name!r} is float64 and the artifact holds float32: train or convert with model.float()")
        if learned and not bool(tensor.isfinite().all()):
            raise UserError(f"{name!r} holds values that are not finite: the training diverged")
        return tensor.float().cpu().numpy()
    # NumPy's, since torch has no least and greatest of unsigned integers.
    array = tensor.cpu().numpy()
    if tensor.is_complex() or (array.size and (int(array.min()) < -(2**31) or int(array.max()) >= 2**31)):
        raise UserError(f"{name!r} ({tensor.dtype}) does not fit the artifact's float32 or int32")
    return array.astype(np.int32)


def fill(model: nn.Module, header: artifact.Header, tensors: Mapping[str, np.ndarray], planes: int) -> None:
    """Put an artifact's tensors into the structure made for them; every tensor must find its place and every place one.

    Raises:
        UserError, RuntimeError, KeyError: they do not fit.
    """
    rest = {name: torch.from_numpy(array) for name, array in tensors.items()}
    errors = {layer.name: layer.squared_error for layer in header.layers}
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            if module.weight is None or module.weight.shape != rest[tensor_name(name, "codes")].shape:
                raise UserError(f"the weight of {name!r} has another shape")
            module.store(rest[tensor_name(name, "codes")], errors[name], planes=planes)
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
    for key in next(iter(norm.variants.values())).state_dict():
        stacked = rest.pop(tensor_name(name, key))
        if len(stacked) != len(norm.variants):
            raise UserError(f"{tensor_name(name, key)!r} holds {len(stacked)} variants, not {len(norm.variants)}")
        for variant, tensor in zip(norm.variants, stacked, strict=True):
            state[tensor_name(name, f"variants.{variant}.{key}")] = tensor
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
