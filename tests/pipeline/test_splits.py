"""Which images a stage sees, and whose scores an evaluation takes from an earlier one."""

import json
import os
from pathlib import Path

import pytest
import torch

import bitswitch as bs
from bitswitch import cli
from bitswitch.data import load_data
from bitswitch.errors import UserError
from bitswitch.evaluation import _key
from bitswitch.models import build
from bitswitch.rundir import RunDirectory
from commands import call, one_line

WORDS = ["digits", "pretrain.epochs=1", "--seed", "5", "--out"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", *WORDS, str(out)])
    assert stop.value.code == 0
    return out


def test_epochs_are_scored_on_val_alone(pretrained):
    data, rows = load_data("digits"), RunDirectory(pretrained).metrics()
    assert [(row["epoch"], row["split"], row["images"]) for row in rows] == [
        (0, "val", data.size("val")),
        (None, "test", data.size("test")),
    ]


def test_traces_are_taken_on_the_first_training_images(capsys, pretrained, monkeypatch):
    def seen(model, loss, batches, **options):
        assert torch.equal(torch.cat([x for x, _ in batches]), load_data("digits").sample(100))
        assert (options["seed"], options["probes"], options["target"]) == (5, 7, 0.5)
        raise UserError("enough")

    monkeypatch.setattr("bitswitch.pipeline.subnets.room.hessian_trace", seen)
    part = {"images": 100, "batch_size": 50, "probes": 7, "target": 0.5}
    words = [f"sensitivity.{key}={value}" for key, value in part.items()]
    one_line(call(capsys, "sensitivity", *WORDS, pretrained, *words), "enough")


def test_predictions_on_other_data_or_with_other_statistics_are_not_taken(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    named, data = {"name": "cifar_resnet8", "args": {"in_channels": 1}}, load_data("digits")
    model = bs.quantize(build(**named), example_inputs=data.sample(8))
    about = {"preprocessing": data.preprocessing.to_json(), "provenance": {"data": "digits"}}
    bs.save(model, tmp_path / "a.safetensors", network=named, classes=data.classes, **about)
    rows = [
        {"assignment": dict.fromkeys(bs.widths(model), bits), "cost": {"bits": bits}, "damage": 0.0, "top1": None}
        for bits in (8, 2)
    ]
    (tmp_path / "frontier.json").write_text(json.dumps({"choices": rows}))
    words = ["evaluate", tmp_path / "a.safetensors", "--assignment", tmp_path / "frontier.json", "--json"]

    def kept(*more):
        status, _, err = call(capsys, *words, *more)
        assert status == 0, err
        return len(list((Path(os.environ["XDG_CACHE_HOME"]) / "bitswitch").glob("predictions-*")))

    assert [kept(), kept(), kept("--split", "val"), kept("--recalibrate", "64")] == [2, 2, 4, 6]
    # So many images that nothing but the split tells them apart.
    monkeypatch.setattr(
        "bitswitch.evaluation._key", lambda about, precision: seen.append(about) or _key(about, precision)
    )
    seen = []
    assert kept() == kept("--split", "val") == 6
    assert seen[0] != seen[-1] and [one for one in seen[0] if one not in seen[-1]] == ["test"]
    monkeypatch.setattr("bitswitch.data.memory.MemoryDataSet.fingerprint", lambda self: "other data")
    assert kept() == 8
