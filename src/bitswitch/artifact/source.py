"""Bytes of an artifact, from a local file or from a URL: what is asked for, and no more."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitswitch.artifact.shipped import located, shipped
from bitswitch.errors import UserError, nearest, require


class Damaged(UserError):
    """It is not a whole, unaltered artifact. Whoever knows its name adds it, and the advice."""

    def __init__(self, reason: str, advice: str = "make or fetch it again") -> None:
        super().__init__(reason)
        self.advice = advice


class Source:
    """A stream of which any range of bytes can be read.

    Args:
        stream: binary, unbuffered, with `seek` and `readinto`.
        name: for messages.
        failures: errors by which the stream tells that it cannot be read.

    Attributes:
        size: all that there is, in bytes.

    Raises:
        UserError: its size cannot be found.
    """

    def __init__(self, stream: Any, name: str, failures: type[Exception]) -> None:
        self._stream, self._name, self._failures = stream, name, failures
        try:
            self.size = int(stream.seek(0, io.SEEK_END))
        except failures as error:
            raise _unread(name, error) from error

    def read(self, start: int, stop: int) -> bytearray:
        """The bytes from `start` to before `stop`.

        Raises:
            Damaged: the source ends before.
            UserError: it cannot be read.
        """
        # Before anything is allocated: a damaged table may ask for terabytes.
        if stop > self.size:
            raise Damaged(f"it is cut off after {self.size} bytes")
        try:
            found = bytearray(stop - start)
        except MemoryError as error:
            raise UserError(
                f"{self._name} cannot be read: {stop - start} bytes are more than there is memory"
            ) from error
        done = 0
        try:
            with memoryview(found) as view:
                self._stream.seek(start)
                while done < len(found) and (count := self._stream.readinto(view[done:])):
                    done += count
        except self._failures as error:
            raise _unread(self._name, error) from error
        if done < len(found):
            raise Damaged(f"it ended after {start + done} of {self.size} bytes while it was read")
        return found


@contextmanager
def opened(path: str | Path) -> Iterator[Source]:
    """The source at a path, of a shipped artifact's name or, where it has "://" in it, at a URL that fsspec knows.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    name = str(path)
    failures, stream = (Exception, _remote(name)) if "://" in name else (OSError, _local(located(path)))
    with stream:
        yield Source(stream, name, failures)


def _local(path: Path) -> Any:
    try:
        if not path.exists():
            raise UserError(f"{path}: there is no such file{nearest(str(path), shipped())}")
        if path.is_dir():
            raise UserError(f"{path} is a folder, not an artifact")
        if not path.is_file():
            raise UserError(f"{path} is not a regular file")
        # Read, not mapped: a mapped file that another process cuts off ends this one.
        return path.open("rb", buffering=0)
    except OSError as error:
        raise _unread(str(path), error) from error


def _remote(url: str) -> Any:
    fsspec = require("fsspec", "remote")
    try:
        # Without a cache a read asks for its own range and no more.
        return fsspec.open(url, "rb", cache_type="none").open()
    except FileNotFoundError as error:
        raise UserError(f"{url}: there is no such file, or its server cannot be reached") from error
    except Exception as error:
        # Every protocol has errors of its own, which share no class.
        raise _unread(url, error) from error


def _unread(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{name} cannot be read: {reason[:300]}")
