"""Artifacts by another writer: changed, under a digest and checksums that agree with the changes."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from bitswitch import artifact
from bitswitch.artifact.file import checksum
from bitswitch.artifact.header import KEY, sealed

NAMES = {"float32": "F32", "int32": "I32", "uint8": "U8", "int8": "I8", "float16": "F16"}


def rewrite(path: Path, change_header=lambda header: None, change_tensors=lambda tensors: None) -> None:
    """The file again; the header is changed after its checksums were made anew, and sealed after that."""
    header = json.loads(artifact.read_header(path).to_text())
    tensors: dict[str, np.ndarray] = load_file(path)
    change_tensors(tensors)
    header["checksums"] = {name: checksum(NAMES[str(a.dtype)], a.shape, a.tobytes()) for name, a in tensors.items()}
    del header["digest"]
    change_header(header)
    save_file(tensors, path, metadata={KEY: sealed(header)})
