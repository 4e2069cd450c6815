"""Weights that others wrote, into a network of the same architecture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bitswitch.errors import UserError

# Where training programs put the weights among other things, the first that is there.
_NESTED = ("state_dict", "model_state_dict", "model", "net", "weights")
_DEEPEST = 8
# What wrappers put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 5


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint's weights, in place: safetensors, or what torch.save wrote.

    A nested "state_dict" (or "model", ...) is found, prefixes that wrappers add ("module.") are taken off. Files of
    torch.save are read with `weights_only=True`: no code in them runs.

    Raises:
        UserError: the file cannot be read, or holds other names or shapes than the network; the first of each are listed.
    """
    wanted = model.state_dict()
    state = _without_prefixes(read_weights(path), wanted)
    # Counters that older versions of torch did not write are no difference of architecture.
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name not in state and name not in counters]
    unexpected = [name for name in state if name not in wanted]
    wrong = [
        f"{name} {tuple(state[name].shape)} for {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    found = [("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)]
    if any(names for _, names in found):
        told = "; ".join(f"{what}: {_some(names)}" for what, names in found if names)
        raise UserError(f"{path} does not fit this {type(model).__name__}: {told}")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        # Of tensors that are of the shape, and sparse, quantized or on the meta device.
        raise UserError(f"{path} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name.

    Raises:
        UserError: the file is missing, unreadable, or holds no tensors by name.
    """
    value = _read(Path(path))
    # A pickle can hold itself.
    for _ in range(_DEEPEST):
        value = next((value[key] for key in _NESTED if isinstance(value.get(key), Mapping) and value[key]), value)
    state = {str(name): tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}
    if not state:
        raise UserError(f"{path} holds no weights: a state_dict, alone or under one of {', '.join(_NESTED)}, is needed")
    return state


def _without_prefixes(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off prefixes that all names have and the network does not know."""
    while not set(state) & set(wanted):
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _read(path: Path) -> Mapping[str, Any]:
    try:
        value = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except MemoryError:
        raise
    # What a damaged pickle can raise has no end.
    except Exception as error:
        reason = type(error).__name__
        raise UserError(f"{path} is not a checkpoint that can be read without running code ({reason})") from error
    if not isinstance(value, Mapping):
        raise UserError(f"{path} holds a {type(value).__name__}, not weights by name")
    return value


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
