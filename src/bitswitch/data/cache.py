"""What is kept on disk between runs, so that nothing is decoded or hashed twice; whatever is damaged is made again."""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bitswitch import files
from bitswitch.errors import UserError


def default_folder() -> Path:
    """$XDG_CACHE_HOME/bitswitch, or ~/.cache/bitswitch.

    Raises:
        UserError: neither is known.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitswitch"
    except RuntimeError as error:
        raise UserError("there is no home folder to keep a cache in: name one with XDG_CACHE_HOME") from error


@dataclass(frozen=True)
class Cache:
    """A folder of safetensors files, each with a checksum of all that is in it; any of them may be deleted."""

    folder: Path

    def read(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """The tensors and the note written under `name`; None where there are none or they are damaged."""
        try:
            with safe_open(self._path(name), framework="pt") as stream:
                metadata = stream.metadata() or {}
                tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 (not a mapping)
            if metadata["checksum"] != _checksum(name, tensors, metadata["note"]):
                return None
            return tensors, json.loads(metadata["note"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def write(self, name: str, tensors: Mapping[str, Tensor], note: Any) -> None:
        """Keep tensors and a JSON value under `name`; a warning where the disk does not take them."""
        # A file's name that is not UTF-8 may be in it; what is put in its place is JSON's own escape.
        text = files.canonical_json(note).encode(errors="backslashreplace").decode()
        metadata = {"note": text, "checksum": _checksum(name, tensors, text)}
        try:
            files.write(self._path(name), save(dict(tensors), metadata=metadata))
        except UserError as error:
            # The same words for every file, so that they are said once.
            reason = getattr(error.__cause__, "strerror", None) or error
            warnings.warn(
                f"what was found out is not kept for the next time in {self.folder} ({reason}): name another folder with "
                "XDG_CACHE_HOME, or of a recipe with data.cache",
                stacklevel=2,
            )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _checksum(name: str, tensors: Mapping[str, Tensor], note: str) -> str:
    hasher = hashlib.sha256(f"{name}\n{note}\n".encode())
    for key in sorted(tensors):
        hasher.update(f"{key} {tensors[key].dtype} {list(tensors[key].shape)}\n".encode())
        hasher.update(tensors[key].flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()
