"""Checkpoints: written whole or not at all, read without running code."""

import io
import pickle
import zipfile
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
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint at {path}") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from error
