"""Artifacts that come with the package."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import bitswitch as bs
from bitswitch import artifact, files
from bitswitch.artifact import tensor_name
from bitswitch.errors import UserError
from bitswitch.runtime import Session
from commands import call, one_line

ROOT = Path(__file__).parent.parent.parent
NAMES = artifact.shipped()


def test_there_are_some():
    assert {"resnet20-cifar10", "resnet20-cifar10-mixed"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_torch_and_a_session_take_the_name(name):
    images = torch.randn(8, *artifact.read_header(name).preprocessing["shape"])
    for bits in artifact.read_header(name).widths:
        with torch.no_grad():
            wanted = bs.load(name, bits=bits)(images).numpy()
        found = Session(name, bits=bits).run(images.numpy())
        assert np.abs(found - wanted).max() < 0.2 * np.abs(wanted).max()


@pytest.mark.parametrize("name", NAMES)
def test_a_card_and_a_result_file_are_of_this_very_file(name):
    known = json.loads((ROOT / "results" / "shipped" / f"{name}.json").read_text())
    assert known["sha256"] == files.file_digest(artifact.located(name))
    card = (ROOT / "src" / "bitswitch" / "shipped" / "README.md").read_text()
    assert f"## {name}\n" in card and f"**{name}**" in card
    header = artifact.read_header(name)
    uniform, mixed = known["rows"][: len(header.widths)], known["rows"][len(header.widths) :]
    assert [row[0] for row in uniform] == list(header.widths)
    digits = ["".join(map(str, choice["assignment"].values())) for choice in header.frontier]
    assert [row[0].partition("(")[2] for row in mixed] == [f"{one})" for one in digits]
    text = json.dumps(known) + json.dumps(dict(artifact.read_header(name).provenance))
    assert "/tmp" not in text and "/home" not in text and "/work" not in text


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_as_large_as_its_codes_and_floats(name):
    """Header and graph together are at most 1 % more and 64 KiB."""
    header, tensors = artifact.read(name)
    codes = {tensor_name(layer.name, "codes") for layer in header.layers}
    parts = sum(tensor.nbytes for key, tensor in tensors.items() if key != artifact.GRAPH)
    assert artifact.GRAPH in tensors and all(tensors[key].dtype == np.int8 for key in codes)
    assert artifact.located(name).stat().st_size <= 1.01 * parts + 2**16


def test_a_supernet_chooses_from_its_own_frontier():
    model = bs.load("resnet20-cifar10-mixed", assignment="avg<=3.5")
    session = Session("resnet20-cifar10-mixed", assignment=bs.widths(model))
    assert Session("resnet20-cifar10-mixed", assignment="avg<=3.5").assignment == session.assignment
    other = Session("resnet20-cifar10-mixed", bits=8)
    other.switch("avg<=3.5")
    assert other.assignment == session.assignment
    with pytest.raises(UserError, match=r"no choice of the frontier has bits <= 1: the least is 2\.4"):
        other.switch("avg<=1")
    assert other.assignment == session.assignment
    with pytest.raises(UserError, match="needs a frontier"):
        Session("resnet20-cifar10", assignment="avg<=3.5")
    assert session.bits is None and 3 < np.mean(list(bs.widths(model).values())) <= 3.5


def test_commands_take_the_name_and_write_nothing_into_the_package(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = artifact.located("resnet20-cifar10").parent
    before = {path.name: files.file_digest(path) for path in folder.iterdir()}
    status, out, _ = call(capsys, "inspect", "resnet20-cifar10", "--json")
    assert status == 0 and json.loads(out)["widths"] == [8, 6, 4, 2]
    status, out, _ = call(capsys, "inspect", "resnet20-cifar10-mixed", "--json")
    assert status == 0 and len(json.loads(out)["choices"]) == 6
    one_line(call(capsys, "export", "resnet20-cifar10", "--bits", "4", "--exact"), "holds a graph already")
    one_line(call(capsys, "export", "resnet20-cifar1", "--bits", "4"), "did you mean 'resnet20-cifar10'")
    for i in range(2):
        words = ("--assignment", f"avg<={4 + i}", "--json")
        status, out, err = call(capsys, "export", "resnet20-cifar10-mixed", *words)
        assert status == 0, err
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == [
        "resnet20-cifar10-mixed-mixed-4.00bit.onnx",
        "resnet20-cifar10-mixed-mixed-5.00bit.onnx",
    ]
    status, out, err = call(capsys, "export", "resnet20-cifar10", "--bits", "4", "--json")
    assert status == 0, err
    assert [row["file"] for row in json.loads(out)["files"]] == ["onnx/resnet20-cifar10-4bit.onnx"]
    assert {path.name: files.file_digest(path) for path in folder.iterdir()} == before
    one_line(call(capsys, "evaluate", "resnet20-cifar10", "--data", tmp_path / "nothing"), "nothing")


def test_a_file_here_comes_first_and_a_wrong_name_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"resnet20-cifar: there is no such file; did you mean 'resnet20-cifar10'"):
        bs.load("resnet20-cifar")
    (tmp_path / "resnet20-cifar10").mkdir()
    assert bs.artifact.located("resnet20-cifar10").is_file()
    (tmp_path / "resnet20-cifar10").rmdir()
    with pytest.raises(UserError, match="cannot be read"):
        bs.load("a" * 300)
    (tmp_path / "resnet20-cifar10").write_bytes(b"mine")
    with pytest.raises(UserError, match="resnet20-cifar10 cannot be used"):
        bs.load("resnet20-cifar10")
