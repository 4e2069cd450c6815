"""Reading and writing the file: a valid safetensors file, checked before anything in it is used.

Tensors of format version 1: `<layer>.codes` int8 in the weight's shape; `<layer>.weight_scale` float32, one element or one
per output channel; `<layer>.input_scale` and, with a zero-point, `<layer>.input_offset` float32 [widths]; `<norm>.*`, the
tensors of a batch normalization stacked over the widths; everything else under its own name, float32 or int32.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bitswitch import files
from bitswitch.artifact.header import KEY, Header, tensor_name
from bitswitch.codes import signed_range
from bitswitch.errors import UserError


def _checksum(array: np.ndarray) -> str:
    return files.digest(array.tobytes())[:16]


def write(path: str | Path, header: Header, tensors: Mapping[str, np.ndarray]) -> None:
    """Write an artifact, whole or not at all; the header's checksums are filled in here.

    Raises:
        UserError: the file cannot be written.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    header = replace(header, checksums={name: _checksum(array) for name, array in arrays.items()})
    files.write(path, save(arrays, metadata={KEY: header.to_text()}))


def read_header(path: str | Path) -> Header:
    """The header alone.

    Raises:
        UserError: there is no such file, or it is not an artifact that this package reads.
    """
    try:
        with safe_open(path, framework="numpy") as stream:
            return _header(stream.metadata())
    except (OSError, SafetensorError, UserError) as error:
        raise _unreadable(path, error) from error


def is_artifact(path: str | Path) -> bool:
    """Whether a safetensors file says that it is an artifact, of whatever version."""
    try:
        with safe_open(path, framework="numpy") as stream:
            return KEY in (stream.metadata() or {})
    except (OSError, SafetensorError):
        # What cannot be read at all is for `read` to tell.
        return True


def read(path: str | Path) -> tuple[Header, dict[str, np.ndarray]]:
    """The header and all tensors, after every check: presence, checksum, shape, type, range.

    Raises:
        UserError: there is no such file, or it is not an artifact that this package reads, or it is altered.
    """
    try:
        with safe_open(path, framework="numpy") as stream:
            header = _header(stream.metadata())
            names = set(stream.keys())
            _same_names(names, header)
            tensors = {name: stream.get_tensor(name) for name in sorted(names)}
        for name, array in tensors.items():
            if _checksum(array) != header.checksums[name]:
                raise UserError(f"tensor {name!r} is altered (its checksum differs)")
        _check(header, tensors)
    except (OSError, SafetensorError, UserError) as error:
        raise _unreadable(path, error) from error
    return header, tensors


def _unreadable(path: str | Path, error: Exception) -> UserError:
    if not Path(path).exists():
        return UserError(f"{path}: there is no such file")
    if Path(path).is_dir():
        return UserError(f"{path} is a folder, not an artifact")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{path} cannot be used: {reason}; make or fetch it again")


def _header(metadata: Mapping[str, str] | None) -> Header:
    if not metadata or KEY not in metadata:
        raise UserError("it is not an artifact of bitswitch (no such header)")
    return Header.from_text(metadata[KEY])


def _same_names(found: set[str], header: Header) -> None:
    if found != set(header.checksums):
        missing, extra = sorted(set(header.checksums) - found), sorted(found - set(header.checksums))
        raise UserError(f"it lacks tensor {missing[0]!r}" if missing else f"it has a tensor of its own, {extra[0]!r}")


def _check(header: Header, tensors: Mapping[str, np.ndarray]) -> None:
    """Shapes, types and ranges of what the layers need."""

    def need(name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"it lacks tensor {name!r}")
        array = tensors[name]
        if array.dtype != dtype or array.shape != shape:
            raise UserError(f"tensor {name!r} is {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}")
        return array

    count = len(header.widths)
    for layer in header.layers:
        scales = (layer.shape[0], *[1] * (len(layer.shape) - 1)) if header.per_channel else ()
        stored = need(tensor_name(layer.name, "codes"), np.int8, layer.shape)
        low, high = signed_range(layer.bits)
        if stored.min() < low or stored.max() > high:
            raise UserError(f"codes of {layer.name!r} exceed {layer.bits} bits")
        for name, shape in (("weight_scale", scales), ("input_scale", (count,))):
            scale = need(tensor_name(layer.name, name), np.float32, shape)
            if not (np.isfinite(scale).all() and (scale > 0).all()):
                raise UserError(
                    f"tensor {tensor_name(layer.name, name)!r} holds a scale that is not positive and finite"
                )
        if (
            layer.input == "zero_point"
            and not np.isfinite(need(tensor_name(layer.name, "input_offset"), np.float32, (count,))).all()
        ):
            raise UserError(f"tensor '{layer.name}.input_offset' is not finite")
