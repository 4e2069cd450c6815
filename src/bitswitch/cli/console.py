"""What a command prints: the document on stdout, notes and progress on stderr."""

import contextlib
import ctypes
import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

from bitswitch import files

Part = TypeVar("Part")


def printable(text: str) -> str:
    """Without what would steer a terminal, as the names in somebody's file may."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class StdoutRefused(Exception):
    """What a command found cannot be written to stdout.

    Attributes:
        gone: whether its reader went away, as `head` does.
        reason: in one line.
    """

    def __init__(self, gone: bool, reason: str) -> None:
        super().__init__(reason)
        self.gone, self.reason = gone, reason


class _Output(Console):
    """Of stdout, without rich's own end where its reader went away."""

    def on_broken_pipe(self) -> None:
        """Called by rich while the error is handled."""
        raise


# Without markup and emoji: paths and names of layers may hold brackets, and words between colons.
errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
output = _Output(soft_wrap=True, highlight=False, markup=False, emoji=False)


class TerminalReporter:
    """Notes and progress bars on stderr; no bars where it is not a terminal; nothing from ranks other than the first."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent

    def note(self, text: str) -> None:
        """A line."""
        if not self.silent:
            errors.print(text)

    @contextlib.contextmanager
    def progress(self, stage: str, steps: int, done: int) -> Iterator[Callable[[str], None]]:
        """A progress bar with the time left."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        hidden = self.silent or not errors.is_terminal
        with Progress(*columns, TextColumn("{task.fields[text]}"), console=errors, disable=hidden) as bar:
            task = bar.add_task(stage, total=steps, completed=done, text="")
            yield lambda text: bar.update(task, advance=1, text=text)


def tracked(what: str, parts: Iterable[Part], count: int, *, silent: bool = False) -> Iterable[Part]:
    """The parts of some work, with a progress bar on stderr while they are taken; none where that is not a terminal."""
    hidden = silent or not errors.is_terminal
    return track(parts, what, total=count, console=errors, disable=hidden, transient=True)


def emit(document: dict[str, Any], as_json: bool, show: Callable[[], None], file: Path | None = None) -> None:
    """A document as the only thing on stdout, or shown to a reader; and into a file where one is named."""
    try:
        if as_json:
            sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
        else:
            show()
        sys.stdout.flush()
    except OSError as error:
        # Here, since typer would end with 1 where the reader went away.
        raise StdoutRefused(error.errno == errno.EPIPE, str(error.strerror)) from error
    finally:
        # Last: what took hours is on stdout, should the file be refused.
        if file is not None:
            files.write_json(file, document)


@contextlib.contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Send what networks and libraries print to stderr, past Python, too: HiGHS has a stray printf (its issue 2783)."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        # C's own buffer would reach stdout later.
        with contextlib.suppress(OSError, TypeError, AttributeError):
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
