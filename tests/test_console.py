"""What commands show on the way: bars on a terminal, nothing into a pipe."""

import io

import pytest
from rich.console import Console

from bitswitch.cli import console


@pytest.mark.parametrize(
    ("terminal", "silent", "shown"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_bar_is_shown_on_a_terminal_alone_and_by_the_first_rank(monkeypatch, terminal, silent, shown):
    for follow in (_tracked, _reported):
        stream = io.StringIO()
        monkeypatch.setattr(console, "errors", Console(file=stream, force_terminal=terminal))
        follow(silent)
        assert ("evaluate" in stream.getvalue()) == shown and (
            "3/3" in stream.getvalue() or "100%" in stream.getvalue()
        ) == shown


def _tracked(silent):
    assert list(console.tracked("evaluate", iter("abc"), 3, silent=silent)) == ["a", "b", "c"]


def _reported(silent):
    with console.TerminalReporter(silent=silent).progress("evaluate", 3, 1) as advance:
        advance("fast")
        advance("fast")
