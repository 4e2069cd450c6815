"""Tables of trainings, and the benchmark that writes their files."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import accuracy
from bitswitch import cli
from bitswitch.errors import UserError
from bitswitch.models import build
from bitswitch.models.weights import read_weights
from bitswitch.report import update
from bitswitch.report.accuracy import _HELD_AGAINST, OURS, accuracy_tables
from report.trainings import training

ROOT = Path(__file__).parents[2]


def test_seeds_become_their_mean_and_spread_and_the_best_comes_first():
    runs = [
        training("worse", 0, top1=85.0, drop=5.0),
        training("better", 0, top1=88.0, drop=2.0),
        training("better", 1, top1=89.0, drop=1.0),
    ]
    on_val, on_test, curves, scales = accuracy_tables(runs)
    assert on_val.startswith("**decide, 2 epochs, bits 8, 2: on val**") and "on test" in on_test
    better, worse = (line for line in on_test.splitlines() if line.startswith(("| better", "| worse")))
    assert "| 0, 1 | 123 | 88.50 ± 0.71 | 88.50 ± 0.71 | 1.50 ± 0.71 |" in better
    assert "| 0 | 123 | 85.00 | 85.00 | 5.00 |" in worse
    assert on_test.index(better) < on_test.index(worse)
    assert "JPEG" in on_test and "abcdef012345" in on_test and "2 threads" in on_test
    assert "| better | 2 | 87.50 | 88.50 | 88.00 |" in curves and "0.001 → 0.25" in scales


def test_schedules_and_lists_of_widths_are_kept_apart_and_a_screen_has_no_test():
    runs = [
        training("a", 0, top1=80.0, drop=1.0, schedule="screen"),
        training("a", 0, top1=70.0, drop=1.0, schedule="screen", bits=(4, 3, 2)),
        training("a", 0, top1=90.0, drop=1.0),
    ]
    titles = [table.splitlines()[0] for table in accuracy_tables(runs)]
    assert [title for title in titles if "on " in title and "after" not in title] == [
        "**decide, 2 epochs, bits 8, 2: on val**",
        "**decide, 2 epochs, bits 8, 2: on test**",
        "**screen, 2 epochs, bits 4, 3, 2: on val**",
        "**screen, 2 epochs, bits 8, 2: on val**",
    ]


def test_a_training_of_one_width_stands_below_those_of_the_lists_that_hold_it():
    runs = [
        training("a-2-alone", 0, top1=95.0, drop=1.0, bits=(2,)),
        training("a", 0, top1=90.0, drop=6.0),
        training("a", 0, top1=91.0, drop=5.0, bits=(4, 3, 2)),
        training("a-2-alone", 0, top1=60.0, drop=1.0, bits=(2,), schedule="screen"),
    ]
    tables = accuracy_tables(runs)
    assert [one.splitlines()[0] for one in tables if "on test" in one] == [
        "**decide, 2 epochs, bits 4, 3, 2: on test**",
        "**decide, 2 epochs, bits 8, 2: on test**",
    ]
    (eight,) = (one for one in tables if "bits 8, 2: on test" in one)
    rows = [line for line in eight.splitlines() if line.startswith("| a")]
    assert rows == [
        "| a | `train.alrs=a` | 0 | 123 | 90.00 | 90.00 | 6.00 | 6.00 |",
        "| a-2-alone | `train.alrs=a-2-alone` | 0 | 123 |  | 95.00 |  | 1.00 |",
    ]
    curves = next(one for one in tables if "bits 8, 2: top-1 % on val" in one)
    assert curves.count("| a-2-alone | 2 |") == 1 and "| a-2-alone | 8 |" not in curves
    # No list of the screens holds it: it has tables of its own.
    assert any(one.startswith("**screen, 2 epochs, bits 2: on val**") for one in tables)


def test_a_run_that_stopped_earlier_leaves_its_later_epochs_empty():
    runs = [
        training("a", 0, top1=80.0, drop=1.0, schedule="screen"),
        training("b", 0, top1=70.0, drop=1.0, schedule="screen", epochs=1),
    ]
    _, curves, _ = accuracy_tables(runs)
    assert "| a | 8 | 79.00 | 80.00 | 79.50 |" in curves and "| b | 8 | 69.00 |  | 69.00 |" in curves


def test_the_last_column_is_the_mean_of_the_last_four_epochs_and_no_more():
    run = training("a", 0, top1=80.0, drop=1.0, schedule="screen", epochs=6)
    run["curves"]["8"]["top1"] = [10.0, 20.0, 81.0, 82.0, 83.0, 84.0]
    _, curves, _ = accuracy_tables([run])
    assert "| a | 8 | 10.00 | 20.00 | 81.00 | 82.00 | 83.00 | 84.00 | 82.50 |" in curves


def test_ways_are_held_against_those_that_cost_as_much_seed_by_seed():
    runs = [
        *(training("paper", seed, top1=80.0 + seed, drop=1.0) for seed in range(3)),
        *(training("lsq", seed, top1=82.0 + 2 * seed, drop=1.0) for seed in range(2)),
        *(training(f"{OURS}-twice-as-long", seed, top1=85.0, drop=1.0, epochs=4) for seed in range(2)),
        training(f"{OURS}-hot-twice-as-long", 0, top1=85.5, drop=1.0, epochs=4),
        training("adabits", 0, top1=99.0, drop=1.0, epochs=4),
        training("lsq-2-alone", 0, top1=99.0, drop=1.0, bits=(2,)),
    ]
    for run in runs:
        if run["variant"].startswith(OURS):
            run["overrides"] = ["train.forwards=2", "train.forwards=1"]
    (told,) = (one for one in accuracy_tables(runs) if "above another row" in one)
    rows = [line for line in told.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert sorted(rows) == [
        f"| {OURS}-hot-twice-as-long | {OURS}-twice-as-long | 0 | test | 0.50 | 0.50 |",
        f"| {OURS}-hot-twice-as-long | {OURS}-twice-as-long | 0 | val, last epoch | 0.50 | 0.50 |",
        f"| {OURS}-hot-twice-as-long | {OURS}-twice-as-long | 0 | val, mean of the last 4 of 4 epochs | 0.50 | 0.50 |",
        f"| {OURS}-twice-as-long | paper | 0, 1 | test | 4.50 ± 0.71 | 4.50 ± 0.71 |",
        f"| {OURS}-twice-as-long | paper | 0, 1 | val, last epoch | 4.50 ± 0.71 | 4.50 ± 0.71 |",
        "| lsq | paper | 0, 1 | test | 2.50 ± 0.71 | 2.50 ± 0.71 |",
        "| lsq | paper | 0, 1 | val, last epoch | 2.50 ± 0.71 | 2.50 ± 0.71 |",
        "| lsq | paper | 0, 1 | val, mean of the last 4 of 2 epochs | 2.50 ± 0.71 | 2.50 ± 0.71 |",
    ]


def test_a_long_schedule_is_held_against_trainings_of_as_many_epochs():
    runs = [
        *(training("paper", seed, top1=80.0 + seed, drop=1.0, schedule="long", epochs=4) for seed in range(2)),
        training("paper", 0, top1=70.0, drop=1.0),
        training("paper-432", 0, top1=70.0, drop=1.0, bits=(4, 3, 2), epochs=4),
        *(training(f"{OURS}-twice-as-long", seed, top1=85.0, drop=1.0, epochs=4) for seed in range(2)),
    ]
    for run in runs[-2:]:
        run["overrides"] = ["train.forwards=1"]
    tables = accuracy_tables(runs)
    (told,) = (one for one in tables if one.startswith("**long, 4 epochs, bits 8, 2: points above another row"))
    assert f"| {OURS}-twice-as-long | paper | 0, 1 | val, last epoch | 4.50 ± 0.71 | 4.50 ± 0.71 |" in told
    (on_val,) = (one for one in tables if one.startswith("**long, 4 epochs, bits 8, 2: on val"))
    assert len([line for line in on_val.splitlines() if line.startswith(("| paper |", f"| {OURS}"))]) == 2
    longer = [training(f"{OURS}-twice-as-long", 0, top1=95.0, drop=1.0, schedule="long", epochs=8)]
    (both,) = (one for one in accuracy_tables(runs + longer) if one.startswith("**long, 4/8 epochs, bits 8, 2: on val"))
    assert f"| {OURS}-twice-as-long | " in both and f"| {OURS}-twice-as-long, 4 epochs | " in both
    # They stay where they were, too.
    (decided,) = (one for one in tables if one.startswith("**decide, 2/4 epochs, bits 8, 2: on val"))
    assert f"| {OURS}-twice-as-long |" in decided and "| paper |" in decided


def test_a_way_of_several_lengths_is_shown_at_the_end_of_each_for_the_seeds_that_all_have():
    def of(variant, seed, top1, epochs, *changed, bits=(8, 2)):
        run = training(variant, seed, top1=top1, drop=1.0, epochs=epochs, bits=bits)
        return {**run, "changed": ["train.lr=1", *changed], "overrides": ["train.forwards=1"]}

    runs = [
        of("a", 0, 80.0, 2),
        of("a-twice-as-long", 0, 81.0, 4, "train.epochs=4"),
        of("a-twice-as-long", 1, 99.0, 4, "train.epochs=4"),
        of("a-half", 0, 70.0, 2, "train.batch_size=2"),
        # Of another list of widths, and of another way, whose lengths no seed has both of.
        of("a-432", 0, 75.0, 8, bits=(4, 3, 2)),
        of("b", 0, 75.0, 2, "train.eta=2"),
        of("b", 1, 75.0, 4, "train.eta=2"),
    ]
    (found,) = (one for one in accuracy_tables(runs) if one.startswith("**Whole schedules"))
    assert "bits 8, 2:" in found
    assert [line for line in found.splitlines() if line.startswith(("| a", "| b"))] == [
        "| a | 2 | 1 | 0 | 80.00 | 80.00 |",
        "| a | 4 | 2 | 0 | 81.00 | 81.00 |",
    ]


def test_every_row_that_others_are_held_against_is_of_a_training_in_the_queue():
    bases = {f"{schedule}-{name}-seed0" for schedule, held in _HELD_AGAINST.items() for _, name in held}
    assert bases <= set(accuracy.QUEUE)


@pytest.mark.parametrize("lost", [("final", "2"), ("curves", "2"), ("overrides",)])
def test_a_damaged_training_is_named(tmp_path, lost):
    damaged = training("a", 0, top1=80.0, drop=1.0)
    *above, last = lost
    del (damaged[above[0]] if above else damaged)[last]
    (tmp_path / "a.json").write_text(json.dumps(damaged))
    (tmp_path / "d.md").write_text("<!-- results:begin --><!-- results:end -->")
    with pytest.raises(UserError, match=r"a\.json is not a result file"):
        update(tmp_path / "d.md", tmp_path)


def test_every_job_of_the_queue_is_one_and_another_is_refused():
    assert len(set(accuracy.QUEUE)) == len(accuracy.QUEUE)
    for job in accuracy.QUEUE:
        schedule, variant, seed = accuracy.parts(job)
        assert job in (f"{schedule}-{variant}-seed{seed}", f"float-seed{seed}")
    for job in ("screen-ours", "screen-other-seed0", "tried-ours-seed0", "floats-seed0"):
        with pytest.raises(SystemExit, match="is no job"):
            accuracy.parts(job)


def test_twice_as_long_is_twice_the_schedules_epochs():
    schedule = accuracy.SCHEDULES["decide"]
    assert schedule.changed("drawn-2") == ("train.forwards=2",)
    assert schedule.changed("drawn-2-twice-as-long") == ("train.forwards=2", f"train.epochs={2 * schedule.epochs}")


def in_this_process(command, *, check, stdout):
    """A command of the package without another start of Python."""
    assert command[1:3] == ["-m", "bitswitch"] and check
    with pytest.raises(SystemExit) as stop:
        cli.main(command[3:])
    assert stop.value.code == 0


@pytest.fixture
def places(monkeypatch, tmp_path):
    """The benchmark on small data, with one epoch of each training."""
    monkeypatch.setattr(accuracy, "RECIPE", "digits")
    monkeypatch.setattr(accuracy, "NORMALIZED", ())
    monkeypatch.setattr(accuracy, "FLOAT", ("pretrain.epochs=2",))
    monkeypatch.setattr(accuracy, "JOINT", ("train.record_scale_gradients=true",))
    short = {
        "screen": accuracy.Schedule(1, ("val",)),
        "decide": accuracy.Schedule(2, ("val", "test")),
    }
    monkeypatch.setattr(accuracy, "SCHEDULES", short)
    monkeypatch.setattr(accuracy, "subprocess", SimpleNamespace(run=in_this_process, DEVNULL=None))
    torch.save(build("cifar_resnet8", {"in_channels": 1}).state_dict(), tmp_path / "start.pt")
    return accuracy.Places(None, str(tmp_path / "start.pt"), tmp_path / "work", tmp_path / "results")


def test_jobs_from_the_float_network_to_the_document(places, capsys, tmp_path):
    with pytest.raises(SystemExit, match="do float-seed0 first"):
        accuracy.do("screen-ours-seed0", places)
    with pytest.raises(SystemExit, match="name them with --start"):
        accuracy.do("float-seed0", replace(places, start=None))
    jobs = ("float-seed0", "screen-scale-lr-2e-3-seed0", "decide-lsq-seed0")
    # A job that was begun elsewhere.
    elsewhere = {"device": "cuda (another)", "threads": 1, "torch": "2.0"}
    (places.work / "decide-lsq-seed0.machines").write_text(json.dumps(elsewhere) + "\n")
    for job in jobs:
        accuracy.do(job, places)
    base, screen, decide = (json.loads((places.results / f"{job}.json").read_text()) for job in jobs)
    assert set(base["final"]["float"]) == {"val", "test"} and len(base["curves"]["float"]["top1"]) == 2

    assert screen["machines"] == [screen["machine"]] and decide["machines"] == [elsewhere, decide["machine"]]
    assert screen["started_from"] == base["weights"] and screen["changed"] == ["train.scale_lr=2e-3"]
    artifact = places.work / "screen-scale-lr-2e-3-seed0" / "model.safetensors"
    assert screen["stored_bytes"] == artifact.stat().st_size < decide["stored_bytes"] / 2
    assert '"test"' not in (places.results / "screen-scale-lr-2e-3-seed0.json").read_text()
    for document, splits in ((screen, {"val"}), (decide, {"val", "test"})):
        for width in ("8", "6", "4", "2"):
            assert set(document["final"][width]) == splits
            for split, score in document["final"][width].items():
                assert score["drop"] == pytest.approx(base["final"]["float"][split]["top1"] - score["top1"], abs=1e-9)
            assert document["curves"][width]["top1"][-1] == document["final"][width]["val"]["top1"]
            assert len(document["means_over_layers"][width]["weight_scale"]) == document["epochs"]
            assert len(document["layers_of_the_last_epoch"][width]["input_move"]) == 6

    (tmp_path / "d.md").write_text("<!-- results:begin --><!-- results:end -->")
    update(tmp_path / "d.md", places.results)
    text = (tmp_path / "d.md").read_text()
    assert (
        "screen, 1 epochs" in text
        and "decide, 2 epochs" in text
        and "| scale-lr-2e-3 | `train.scale_lr=2e-3` | 0 |" in text
        and "cuda (another), 1 threads, torch 2.0" in text
    )

    # The pretrain stage of a job takes no step: its network is the file's.
    kept = read_weights(places.results / "float-seed0.safetensors")
    used = read_weights(places.work / "screen-scale-lr-2e-3-seed0" / "checkpoints" / "pretrain.pt")
    assert kept.keys() == used.keys() and all(kept[name].equal(used[name]) for name in kept)

    scores = places.results / "float-seed0.json"
    before = scores.read_text()
    scores.write_text(before.replace(base["data_sha256"], "other"))
    with pytest.raises(SystemExit, match="holds other images"):
        accuracy.do("screen-ours-seed0", places)
    scores.write_text(before)

    stamps = {path: path.stat().st_mtime_ns for path in places.results.iterdir()}
    capsys.readouterr()
    for job in jobs:
        accuracy.do(job, places)
    assert capsys.readouterr().out.count("nothing to do") == 3
    assert {path: path.stat().st_mtime_ns for path in places.results.iterdir()} == stamps


def test_images_on_record_are_called_what_they_are_and_others_are_not():
    records = [json.loads(path.read_text()) for path in (ROOT / "results" / "cifar10").glob("*.json")]
    digests = {record["data_sha256"]: record["data"] for record in records if "data_sha256" in record}
    assert digests == {accuracy.JPEG: accuracy.label(accuracy.JPEG)} and "JPEG" in accuracy.label(accuracy.JPEG)
    assert "JPEG" not in accuracy.label(64 * "0")
