"""Image files read, checked and hashed."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from bitswitch.errors import UserError

_CHUNK = 256
_TIFF_BITS = 258

Shown = Callable[[str, Iterable[Any], int], Iterable[Any]]
"""Passes on parts of work, of which there are so many, and shows what is done and how far it is."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def unseen(what: str, parts: Iterable[Any], count: int) -> Iterable[Any]:
    """The parts, of which nothing is shown."""
    return parts


class UnreadableImage(UserError):
    """A file that cannot be decoded; the message names it and says why."""


def read_image(path: str) -> Tensor:
    """A file as uint8 [3, H, W]; grey, palette and CMYK images become RGB, of 16 bits the upper 8 are taken.

    A rotation that EXIF asks for is not made (Pillow makes it of TIFF), as in torchvision's ImageFolder.

    Raises:
        UnreadableImage: it cannot be decoded, or holds floats or integers whose range nothing tells.
    """
    return _opened(path, lambda image: torch.from_numpy(np.array(_in_bytes(image).convert("RGB"))).permute(2, 0, 1))


def read_size(path: str) -> tuple[int, int]:
    """Height and width, from the file's header alone.

    Raises:
        UnreadableImage: it is not an image.
    """
    return _opened(path, lambda image: (image.height, image.width))


def check_image(path: str) -> None:
    """Decode all of a file, a JPEG at an eighth of its size, which finds what is damaged in a third of the time.

    Raises:
        UnreadableImage: it cannot be decoded.
    """

    def load(image: Image.Image) -> None:
        image.draft("RGB", (1, 1))
        _in_bytes(image).convert("RGB")

    _opened(path, load)


def _in_bytes(image: Image.Image) -> Image.Image:
    """The image in a mode of 8 bits; Pillow would clip what is wider at 255."""
    # Pillow decodes 16-bit PGM, and older versions 16-bit PNG, as integers of 32 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        # A TIFF of 12 bits is opened as one of 16, its numbers as they are.
        bits = image.tag_v2.get(_TIFF_BITS, (16,))[0] if isinstance(image, TiffImageFile) else 16
        return Image.fromarray((np.array(image) >> (bits - 8)).astype(np.uint8))
    if image.mode == "La":
        # Grey that was multiplied by its opacity, which Pillow turns into nothing else.
        return image.convert("LA")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are {'floats' if image.mode == 'F' else 'integers of no known range'}: convert it to 8 bits"
        )
    return image


def _opened(path: str, use: Callable[[Image.Image], Result]) -> Result:
    try:
        _check_regular(path)
        with Image.open(path) as image:
            return use(image)
    # Decoders raise what they like on damaged files: OSError, SyntaxError, ValueError, IndexError, struct.error.
    except Exception as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or repr(error)
        raise UnreadableImage(f"{path} cannot be read: {' '.join(reason.split())}") from error


def _check_regular(path: str) -> None:
    """A named pipe would be waited for."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 (Path is slow for a million files)
        raise OSError("no regular file")


def file_digest(path: str) -> bytes:
    """The SHA-256 of a file's bytes; zeros where it cannot be opened."""
    try:
        _check_regular(path)
        return hashlib.sha256(Path(path).read_bytes()).digest()
    except OSError:
        # Decoding comes next and says why, or leaves the file out.
        return bytes(32)


def in_threads(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterable[Result]:
    """`function` of every item, in order; reading and decoding let other threads run."""
    chunks = [items[first : first + _CHUNK] for first in range(0, len(items), _CHUNK)]
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for chunk in pool.map(lambda chunk: [function(item) for item in chunk], chunks):
            yield from chunk
