"""Checkpoints: written whole or not at all, read without running code."""

import io
from pathlib import Path
from typing import Any

import torch

from bitswitch import files
from bitswitch.errors import UserError


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values to `path`, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files.write(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, to CPU; nothing but tensors and plain values is accepted.

    Raises:
        UserError: the file is missing, damaged, or holds anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint at {path}") from error
    except MemoryError:
        raise
    # What a damaged pickle can raise has no end.
    except Exception as error:
        raise UserError(
            f"{path} is neither an artifact (.safetensors) nor a readable checkpoint ({type(error).__name__}): "
            "nothing in it was run; if it is a run's, do its stage again with --fresh"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a readable checkpoint: it holds a {type(state).__name__}")
    return state
