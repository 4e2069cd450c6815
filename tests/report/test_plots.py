import json
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import pytest

from bitswitch.report.plots import digest, draw
from report.trainings import training

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "cifar10"
mpl.use("agg")


def words(path):
    return " ".join("".join(element.itertext()) for element in ET.parse(path).iter("{http://www.w3.org/2000/svg}text"))


def test_figures_of_the_documents_are_of_the_results_that_are_there():
    figures = sorted((ROOT / "docs" / "plots").glob("*.svg"))
    assert figures, "run: make results"
    for path in figures:
        assert digest(RESULTS) in path.read_text(), f"{path.name}: run: make results"
        assert f"plots/{path.name}" in (ROOT / "docs" / "results.md").read_text()


def test_the_same_results_draw_the_same_files_and_others_do_not(tmp_path):
    results, first, second = tmp_path / "results", tmp_path / "first", tmp_path / "second"
    results.mkdir()
    for name in ("screen-paper-seed0", "screen-drawn-2-seed0", "mixed-hasb-of-screen-kd-float-seed0"):
        (results / f"{name}.json").write_bytes((RESULTS / f"{name}.json").read_bytes())
    names = [path.name for path in draw(results, first)]
    assert names == [
        *("epochs-screen-8642-2.5.svg", "epochs-screen-8642-5.svg"),
        *("subnets-screen-kd-float.svg", "widths-screen-kd-float.svg"),
    ]
    draw(results, second)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)

    for name, variant, other in zip(names[:2], ("drawn-2", "paper"), ("paper", "drawn-2"), strict=True):
        told = words(first / name)
        assert (
            all(word in told for word in ("8 bits", "2 bits", variant, "points below float, val")) and other not in told
        )
    assert all(word in words(first / names[2]) for word in ("programme, damage hessian", "at random", "average bits"))

    changed = json.loads((results / "screen-paper-seed0.json").read_text())
    changed["curves"]["2"]["top1"][-1] -= 5
    (results / "screen-paper-seed0.json").write_text(json.dumps(changed))
    draw(results, second)
    assert (first / names[1]).read_bytes() != (second / names[1]).read_bytes()


def test_a_curve_ends_where_its_training_ended(tmp_path, monkeypatch):
    """Of several seeds the mean of drops; a training that visits half of the widths is half as far along at its end."""
    one = json.loads((RESULTS / "screen-drawn-2-seed0.json").read_text())
    other = json.loads((RESULTS / "screen-drawn-2-seed0.json").read_text()) | {"seeds": [1]}
    other["curves"]["2"]["top1"][-1] -= 2
    for seed, document in enumerate((one, other)):
        (tmp_path / f"{seed}.json").write_text(json.dumps(document))
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, x, y, **look: drawn.append((list(x), list(y), look)))
    draw(tmp_path, tmp_path)
    x, y, look = drawn[3]
    assert x == pytest.approx([0.5, 1, 1.5, 2, 2.5]) and look["label"] == "drawn-2 (2)"
    assert y[-1] == pytest.approx(one["final"]["2"]["val"]["drop"] + 1)


def test_a_training_far_below_the_others_is_counted_and_does_not_squash_them(tmp_path):
    for variant, drop in (("paper", 2.0), ("adabits", 50.0)):
        document = training(variant, 0, top1=90.0 - drop, drop=drop)
        document["final"]["8"] = {
            split: score | {"top1": 88.0, "drop": 2.0} for split, score in document["final"]["8"].items()
        }
        document["curves"]["8"]["top1"] = [87.0, 88.0]
        (tmp_path / f"{variant}.json").write_text(json.dumps(document))
    (figure,) = draw(tmp_path, tmp_path)
    told = words(figure)
    assert "2 bits (1 more than 30 below)" in told and "8 bits (" not in told
    assert "adabits" in told and " 40 " not in f" {told} "


def test_a_training_of_one_width_is_drawn_in_the_panel_of_that_width_alone(tmp_path, monkeypatch):
    whole = training("paper", 0, top1=80.0, drop=1.0)
    alone = training("lsq-2-alone", 0, top1=80.0, drop=1.0, bits=(2,))
    for document in (whole, alone):
        (tmp_path / f"{document['variant']}.json").write_text(json.dumps(document))
    (figure,) = draw(tmp_path, tmp_path)
    assert figure.name == "epochs-decide-82-2.svg" and {"paper", "lsq-2-alone"} <= set(words(figure).split())
    drawn = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.plot",
        lambda self, x, y, **look: drawn.append((self.get_subplotspec().colspan.start, look["label"], list(x))),
    )
    draw(tmp_path, tmp_path)
    assert drawn == [(1, "lsq-2-alone", [0.5, 1]), (0, "paper", [1, 2]), (1, "paper", [1, 2])]


def test_no_training_is_left_out_however_many_there_are(tmp_path):
    for number in range(40):
        document = training(f"way-{number}", 0, top1=80.0, drop=1.0)
        (tmp_path / f"{number}.json").write_text(json.dumps(document))
    (figure,) = draw(tmp_path, tmp_path)
    assert {f"way-{number}" for number in range(40)} <= set(words(figure).split())
