"""What commands show on the way: bars on a terminal, nothing into a pipe."""

import io
import json

import pytest
from rich.console import Console

from bitswitch.cli import console
from bitswitch.errors import UserError


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


def test_what_was_found_is_shown_though_the_file_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken"):
        console.emit({"found": 1}, True, lambda: None, tmp_path / "taken" / "evaluate.json")
    assert json.loads(capsys.readouterr().out) == {"found": 1}


def _tracked(silent):
    assert list(console.tracked("evaluate", iter("abc"), 3, silent=silent)) == ["a", "b", "c"]


def _reported(silent):
    with console.TerminalReporter(silent=silent).progress("evaluate", 3, 1) as advance:
        advance("fast")
        advance("fast")
