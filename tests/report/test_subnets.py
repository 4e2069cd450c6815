"""Tables and figures of SubNets, of several SuperNets and seeds."""

import copy
import json

import matplotlib as mpl
import pytest

from bitswitch.errors import UserError
from bitswitch.report import update
from bitswitch.report.plots import draw
from bitswitch.report.subnets import subnet_tables

mpl.use("agg")


def subnets(way, seed, *, top1=90.0, joint="screen-ours", split="val"):
    """A result file: two layers of 4 and 2 bits; one choice, and two random SubNets half a point to either side of it."""
    return {
        "title": "T",
        "command": f"python benchmarks/mixed.py {way}-of-{joint}-seed{seed} --data CIFAR_FOLDER",
        "data": "CIFAR-10, JPEG-compressed",
        "split": split,
        "seeds": [seed],
        "commit": "abcdef0123456789",
        "machine": {"device": "cpu", "threads": 1, "torch": "2"},
        "columns": [],
        "rows": [
            [4, "all layers alike", f"{top1 + 1:.2f}", "44"],
            [2, "all layers alike", f"{top1 - 1:.2f}", "22"],
            [3.0, "programme, damage hessian", f"{top1:.2f}", "42"],
            [3.0, "2 at random, mean ± standard deviation", "not read", ""],
        ],
        "random": {"3.0": [["42", top1 - 0.5], ["24", top1 + 0.5]]},
        "rank_correlation_of_damage_and_top1": {"hessian": {"3.0": -0.5 * seed}},
    }


def test_seeds_become_their_mean_and_random_ones_keep_their_spread():
    reached, ranks, widths = subnet_tables([subnets("hasb", 1, top1=91.0), subnets("uniform", 0), subnets("hasb", 0)])
    assert reached.startswith("**SubNets after screen-ours: top-1 % on val at average bits**")
    assert "| SuperNet | seeds | SubNet | 2 | 3 | 4 |" in reached
    assert "| hasb | 0, 1 | all layers alike | 89.50 ± 0.71 |  | 91.50 ± 0.71 |" in reached
    assert "| hasb | 0, 1 | programme, damage hessian |  | 90.50 ± 0.71 |  |" in reached
    # Each seed's random SubNets lie 1 point apart: their standard deviation is 0.71, whatever the seeds are.
    assert "| hasb | 0, 1 | 2 at random, mean ± spread among them |  | 90.50 ± 0.71 |  |" in reached
    assert "| uniform | 0 | programme, damage hessian |  | 90.00 |  |" in reached
    assert "JPEG" in reached and "abcdef012345" in reached
    assert "| hasb | hessian | -0.25 ± 0.35 |" in ranks and "| uniform | hessian | 0.00 |" in ranks
    assert "| hasb | 1 | programme, damage hessian | 3 | `42` | 91.00 |" in widths and "all layers" not in widths


def test_every_joint_training_has_tables_and_figures_of_its_own(tmp_path):
    for one in (subnets("none", 0), subnets("hasb", 0), subnets("hasb", 0, joint="decide-ours", split="test")):
        way, joint = one["command"].split()[2].split("-of-")
        (tmp_path / f"mixed-{way}-of-{joint}.json").write_text(json.dumps(one | {"rows": four(one["rows"])}))
    document = tmp_path / "d.md"
    document.write_text("<!-- results:begin --><!-- results:end -->")
    update(document, tmp_path)
    text = document.read_text()
    assert text.count("top-1 % on val at average bits") == text.count("top-1 % on test at average bits") == 1
    drawn = {path.name: path.read_text() for path in draw(tmp_path, tmp_path)}
    assert set(drawn) == {
        f"{kind}-{joint}.svg" for kind in ("subnets", "widths") for joint in ("screen-ours", "decide-ours")
    }
    assert "top-1 %, test" in drawn["subnets-decide-ours.svg"] and "top-1 %, val" in drawn["subnets-screen-ours.svg"]
    assert (
        "none: 4 average bits" in drawn["widths-screen-ours.svg"] and "none: 4" not in drawn["widths-decide-ours.svg"]
    )


def four(rows):
    """A choice at 4 average bits, too, which the figure of widths shows."""
    return [*rows, [4.0, "programme, damage hessian", "90.00", "44"]]


@pytest.mark.parametrize("lacks", ["rows", "command", "rank_correlation_of_damage_and_top1"])
def test_a_damaged_file_is_named(tmp_path, lacks):
    damaged = copy.deepcopy(subnets("hasb", 0))
    del damaged[lacks]
    (tmp_path / "a.json").write_text(json.dumps(damaged))
    (tmp_path / "d.md").write_text("<!-- results:begin --><!-- results:end -->")
    with pytest.raises(UserError, match=r"a\.json is not a result file"):
        update(tmp_path / "d.md", tmp_path)


def test_a_command_that_names_no_job_is_refused():
    with pytest.raises(ValueError, match="names no job"):
        subnet_tables([subnets("hasb", 0) | {"command": "python benchmarks/other.py"}])
