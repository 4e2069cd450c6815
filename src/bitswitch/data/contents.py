"""What the files of a folder hold: their hashes, their pixels, which of them are damaged; kept on disk between runs."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import PIL
import torch
from torch import Tensor

from bitswitch import files
from bitswitch.data.cache import Cache
from bitswitch.data.decode import Shown, UnreadableImage, check_image, file_digest, in_threads, read_image, read_size
from bitswitch.data.folder import Listing

_MOST_BYTES_IN_MEMORY = 512 * 2**20
# Files that are more than this together are hashed again only where their size or times have changed.
_MOST_BYTES_HASHED_EVERY_TIME = 2**30
_FORMAT = 3

Result = TypeVar("Result")
Failures = dict[int, str]


@dataclass(frozen=True)
class Decoded:
    """The images of a folder.

    Attributes:
        images: those that can be read, in the order of the listing: uint8 [M, 3, H, W].
        failures: {index in the listing: why it cannot be read}.
    """

    images: Tensor
    failures: Failures


@dataclass(frozen=True)
class Contents:
    """The contents of a listing's files.

    Attributes:
        listing: of the folder.
        cache: what earlier runs found out, by content.
        workers: threads that read and decode.
        shown: what shows how far that is.
    """

    listing: Listing
    cache: Cache
    workers: int
    shown: Shown

    @cached_property
    def hashes(self) -> list[bytes]:
        """The SHA-256 of every file's bytes."""
        return [bytes(row) for row in self._digests().numpy()]

    def decoded(self) -> Decoded | None:
        """All images; None where they differ in size or are more than fits into memory."""
        name = f"images-{self._key}"
        found = self.cache.read(name)
        if found is not None:
            tensors, note = found
            failures = self._that_still_fail(note)
            if failures is not None:
                return Decoded(tensors["images"], failures)
        size = self._common_size()
        if size is None:
            return None
        decoded = self._decode(size)
        self.cache.write(name, {"images": decoded.images}, decoded.failures)
        return decoded

    def failures(self) -> Failures:
        """{index: why it cannot be read}: every file is decoded once, then it is known by its content."""
        name = f"checked-{self._key}"
        found = self.cache.read(name)
        known = self._that_still_fail(found[1]) if found is not None else None
        if known is not None:
            return known
        attempts = self._each("checking images", lambda path: _attempt(check_image, path), self.listing.paths)
        failures = {index: why for index, why in enumerate(attempts) if isinstance(why, str)}
        self.cache.write(name, {}, failures)
        return failures

    @cached_property
    def _key(self) -> str:
        """A digest of every name and content, and of the decoder."""
        lines = [f"{_FORMAT} Pillow {PIL.__version__} {self.listing.train}"]
        lines += [f"{name}\0{digest.hex()}" for name, digest in zip(self.listing.names, self.hashes, strict=True)]
        return _digest_of(lines)

    def _that_still_fail(self, note: dict[str, str]) -> Failures | None:
        """The failures of an earlier run; None where one of the files can be read now: the disk failed then, not the file."""
        failures = {int(index): why for index, why in note.items()}
        paths = self.listing.paths
        return failures if all(isinstance(_attempt(check_image, paths[i]), str) for i in failures) else None

    def _common_size(self) -> tuple[int, int] | None:
        """Height and width of every image, if they are the same and all images fit into memory."""
        common = None
        for size in in_threads(lambda path: _attempt(read_size, path), self.listing.paths, self.workers):
            if isinstance(size, str):
                continue
            common = common or size
            if size != common:
                return None
        if common is None or len(self.listing.names) * 3 * common[0] * common[1] > _MOST_BYTES_IN_MEMORY:
            return None
        return common

    def _decode(self, size: tuple[int, int]) -> Decoded:
        images = torch.empty((len(self.listing.names), 3, *size), dtype=torch.uint8)
        failures = {}
        attempts = self._each("reading images", lambda path: _attempt(read_image, path), self.listing.paths)
        for index, image in enumerate(attempts):
            if isinstance(image, str):
                failures[index] = image
            else:
                images[index - len(failures)] = image
        return Decoded(images[: len(images) - len(failures)], failures)

    def _digests(self) -> Tensor:
        """uint8 [N, 32]; those of a large folder are remembered by its files' sizes and times."""
        paths = self.listing.paths
        stats = torch.tensor([_stat(path) for path in paths], dtype=torch.int64)
        if int(stats[:, 0].sum()) <= _MOST_BYTES_HASHED_EVERY_TIME:
            return self._hashed(paths)
        name = f"hashes-{_digest_of([str(self.listing.root.resolve()), *self.listing.names])}"
        found = self.cache.read(name)
        if found is None:
            digests, stale = torch.zeros((len(paths), 32), dtype=torch.uint8), torch.ones(len(paths), dtype=torch.bool)
        else:
            digests = found[0]["digests"].clone()
            # Zeros are those of a file that could not be read.
            stale = (found[0]["stats"] != stats).any(1) | (digests == 0).all(1)
        if stale.any():
            digests[stale] = self._hashed([paths[i] for i in stale.nonzero().flatten().tolist()])
            now = {"digests": digests, "stats": stats}
            if found is None or any(not torch.equal(now[key], found[0][key]) for key in now):
                self.cache.write(name, now, None)
        return digests

    def _hashed(self, paths: Sequence[str]) -> Tensor:
        """uint8 [N, 32]."""
        joined = b"".join(self._each("hashing images", file_digest, paths))
        return torch.frombuffer(bytearray(joined), dtype=torch.uint8).view(-1, 32)

    def _each(self, what: str, function: Callable[[str], Result], paths: Sequence[str]) -> Iterable[Result]:
        return self.shown(what, in_threads(function, paths, self.workers), len(paths))


def _attempt(read: Callable[[str], Result], path: str) -> Result | str:
    """What `read` makes of a file, or why it cannot, as text."""
    try:
        return read(path)
    except UnreadableImage as error:
        return str(error)


def _digest_of(lines: list[str]) -> str:
    return files.digest("\n".join(lines).encode(errors="surrogateescape"))


def _stat(path: str) -> tuple[int, int, int]:
    try:
        found = os.stat(path)  # noqa: PTH116 (Path is slow for a million files)
    except OSError:
        return (0, 0, 0)
    # The inode's time moves whenever the content does, whatever is done to the other times.
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
