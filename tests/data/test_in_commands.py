"""Image folders from a recipe to the evaluation of its artifact."""

import functools
import json

import pytest

import commands


@pytest.fixture
def call(capsys):
    """A function that runs a command in this process: (exit status, stdout, stderr)."""
    return functools.partial(commands.call, capsys)


def test_a_run_on_an_image_folder(call, make_folder, tmp_path):
    folder, out = make_folder(sizes=((32, 32),), suffix=".jpg", train=8, test=4), tmp_path / "out"
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "bits: [8, 2]\nmodel: {name: cifar_resnet8}\ndata: {name: cifar10}\n"
        "pretrain: {epochs: 1, batch_size: 8}\ntrain: {epochs: 1, batch_size: 8, calibration_images: 8}\n"
    )
    words = ["run", recipe, "--out", out, "--json", "--device", "cpu"]
    assert call(*words)[0] == 2  # where are the images?
    status, printed, _ = call(*words, f"data.root={folder}")
    assert status == 0
    rows = {row["bits"]: row for row in json.loads(printed)["results"]}

    moved = folder.rename(tmp_path / "moved")
    elsewhere = [f"data.root={moved}", "data.workers=1", f"data.cache={tmp_path / 'other'}", "data.download=true"]
    status, _, told = call(*words, *elsewhere)
    assert status == 0 and "train: done before, skipped" in told
    status, _, told = call(*words, *elsewhere, "data.unreadable=skip")
    assert status == 2 and "data.unreadable was" in told

    for split in ("train", "test"):
        (moved / split / "ant").rename(moved / split / "aunt")
    commands.one_line(call(*words, *elsewhere), "the classes have other names")
    # A run of an earlier version did not note them.
    records = json.loads((out / "stages.json").read_text())
    names = [record["inputs"].pop("classes") for record in records.values()]
    (out / "stages.json").write_text(json.dumps(records))
    assert len(set(names)) == 1 and call(*words, *elsewhere)[0] == 0
    for split in ("train", "test"):
        (moved / split / "aunt").rename(moved / split / "ant")

    artifact = out / "model.safetensors"
    status, printed, _ = call("evaluate", artifact, "--data", moved, "--json", "--device", "cpu")
    assert status == 0
    for row in json.loads(printed)["results"]:
        assert row["images"] == 12 and all(row[key] == rows[row["bits"]][key] for key in ("top1", "loss"))
    status, _, told = call("evaluate", artifact)
    assert status == 2 and "--data FOLDER" in told

    told = call("evaluate", artifact, "--data", moved / "test", "--split", "val", "--device", "cpu")
    commands.one_line(told, "has no val images", "use another --split")

    (moved / "test" / "ant").rename(moved / "test" / "dog")
    status, _, told = call("evaluate", artifact, "--data", moved / "test", "--device", "cpu")
    assert (
        status == 2
        and "has the classes 'bee', 'cow', 'dog' (3)" in told
        and "trained on 'ant', 'bee', 'cow' (3)" in told
    )
    assert len(told.splitlines()) == 1
