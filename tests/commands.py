"""Commands in this process, for the tests of several rooms."""

import contextlib
import signal
from pathlib import Path

import pytest

from bitswitch import cli
from bitswitch.cli.console import TerminalReporter


def run_digits(out: Path, *words: str) -> Path:
    """A finished run of digits, in a folder."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "digits", *words, "--out", str(out), "--json", "--device", "cpu"])
    assert stop.value.code == 0
    return out


def call(capsys, *words):
    """(exit status, stdout, stderr) of a command."""
    capsys.readouterr()
    # An interrupted command ignores what comes after, which the tests' own process is not to.
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in words])
    finally:
        signal.signal(signal.SIGINT, handler)
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def one_line(result, *words):
    """A command ended as it must where the user is mistaken: status 2, one line that holds these words, nothing on stdout."""
    status, out, err = result
    assert status == 2 and out == "", (status, out, err)
    *notes, last = err.splitlines()
    assert last.startswith("bitswitch: ") and all("skipped" in note or "taken up" in note for note in notes), err
    for word in words:
        assert word in last, err


def steps_shown(monkeypatch):
    """A list that gets (what a progress bar is of, its steps) for every step that is shown from now on."""
    steps, real = [], TerminalReporter.progress

    @contextlib.contextmanager
    def progress(self, stage, count, done):
        with real(self, stage, count, done) as advance:
            yield lambda text: (steps.append((stage, count)), advance(text))[1]

    monkeypatch.setattr(TerminalReporter, "progress", progress)
    return steps
