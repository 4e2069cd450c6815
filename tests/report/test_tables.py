import json
from pathlib import Path

import pytest

import result
from bitswitch.errors import UserError
from bitswitch.report import render, update
from report.trainings import training

ROOT = Path(__file__).parents[2]
RESULT = {
    "title": "T",
    "command": "make x",
    "data": "digits",
    "split": "test",
    "seeds": [0, 1],
    "commit": "abcdef0123456789",
    "machine": {"device": "cpu", "threads": 2, "torch": "2"},
    "columns": ["", "8 bits"],
    "rows": [["seed 0", 97.256]],
}


def test_a_table_names_its_source():
    text = render(RESULT)
    assert "| seed 0 | 97.26 |" in text
    assert all(word in text for word in ("make x", "abcdef012345", "digits", "test", "0, 1", "2 threads"))


def test_update_replaces_what_is_between_the_markers(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "a.json").write_text(json.dumps(RESULT))
    document = tmp_path / "d.md"
    document.write_text("before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n")
    update(document, tmp_path / "r")
    first = document.read_text()
    assert first.startswith("before\n") and first.endswith("after\n") and "old" not in first and "97.26" in first
    update(document, tmp_path / "r")
    assert document.read_text() == first


def test_what_was_trained_comes_before_single_measurements(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RESULT))
    (tmp_path / "b.json").write_text(json.dumps(training("ours", 0, top1=90.0, drop=1.0)))
    document = tmp_path / "d.md"
    document.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    update(document, tmp_path)
    text = document.read_text()
    assert 0 < text.index("on val") < text.index("97.26")


def test_bad_files(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "d.md").write_text("x")
    with pytest.raises(UserError, match="not a result file"):
        update(tmp_path / "d.md", tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(RESULT))
    with pytest.raises(UserError, match="lacks the lines"):
        update(tmp_path / "d.md", tmp_path)


@pytest.mark.parametrize(
    ("document", "results"),
    [
        ("docs/checks.md", "."),
        ("docs/performance.md", "performance"),
        ("docs/results.md", "cifar10"),
        ("src/bitswitch/shipped/README.md", "shipped"),
    ],
)
def test_documents_hold_what_the_result_files_say(tmp_path, document, results):
    copy = tmp_path / "copy.md"
    copy.write_text((ROOT / document).read_text())
    update(copy, ROOT / "results" / results)
    assert copy.read_text() == (ROOT / document).read_text(), "run: make results"


def test_the_readme_holds_what_was_decided(tmp_path):
    copy = tmp_path / "copy.md"
    copy.write_text((ROOT / "README.md").read_text())
    update(copy, ROOT / "results" / "cifar10", brief=True)
    assert copy.read_text() == (ROOT / "README.md").read_text(), "run: make results"


def test_what_benchmarks_write_is_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks/x.py", "/home/somebody/data", "--json", "results/x.json"])
    path = tmp_path / "results" / "x.json"
    result.write(path, title="T", columns=["", "s"], rows=[["a", 1.5]], seeds=["0-9"], note="Idle.", measured=[1])
    document = json.loads(path.read_text())
    assert document["command"] == "python benchmarks/x.py data --json results/x.json" and document["measured"] == [1]
    text = render(document)
    assert "| a | 1.50 |" in text and "Idle." in text and "seeds 0-9" in text and "split none" in text


def test_a_folder_without_result_files_leaves_the_tables_alone(tmp_path):
    document = tmp_path / "d.md"
    document.write_text("<!-- results:begin -->\n\nkept\n\n<!-- results:end -->")
    with pytest.raises(UserError, match="holds no result files"):
        update(document, tmp_path / "mistyped")
    assert "kept" in document.read_text()
