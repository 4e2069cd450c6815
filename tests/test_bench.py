"""`bitswitch bench`, on a small network: the form of what it measures, and what can be known beforehand."""

import json
import math

import pytest
import torch
from torch import nn

import bitswitch as bs
from bitswitch import bench, runtime
from bitswitch.codes import bits_read
from bitswitch.models import build
from bitswitch.search import read_latency
from commands import call


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(4, 1, 8, 8)
    network = {"name": "cifar_resnet8", "args": {"in_channels": 1}}
    model = bs.quantize(build(**network), bits=(8, 2), example_inputs=images)
    path = tmp_path / "m.safetensors"
    preprocessing = {"shape": [1, 8, 8], "mean": [0.5], "std": [0.5], "resize": None, "crop": None}
    bs.save(model.eval(), path, network=network, preprocessing=preprocessing, example_inputs=images)
    return path


def test_sessions_have_as_many_threads_as_torch(monkeypatch, file):
    told = []
    opened = runtime.Session

    def session(path, **options):
        told.append(options["threads"])
        return opened(path, **options)

    monkeypatch.setattr(runtime, "Session", session)
    bench._in_session(file, 8)
    bench._session_costs(file, 2, (8, 2), 1)
    assert told == [torch.get_num_threads()] * 2


def test_every_engine_and_width_is_measured(capsys, file, tmp_path, monkeypatch):
    status, out, err = call(capsys, "bench", file, "--rounds", 1, "--json", "--out", tmp_path)
    assert status == 0, err
    document = json.loads(out)
    model = bs.load(file)
    layers = bs.widths(model)
    weights = sum(model.get_submodule(name).stored_shape.numel() for name in layers)
    assert [row["bits"] for row in document["widths"]] == [8, 2]
    by_bits = {row["bits"]: row for row in document["widths"]}
    read = by_bits[8]["bytes_read"] - by_bits[2]["bytes_read"]
    assert read == (bits_read(8, 8) - bits_read(8, 2)) * weights // 8
    assert by_bits[8]["narrowed_bytes"] - by_bits[2]["narrowed_bytes"] == weights - weights // 4
    switches = {"torch_switch_ms", "torch_kept_switch_ms", "session_build_ms", "session_switch_us"}
    for row in document["widths"]:
        assert switches <= set(row) and all(row[key] > 0 for key in row)
    timed = {(row["engine"], row["bits"], row["batch"]) for row in document["speed"]}
    engines = [("torch", 8), ("torch", 2), ("session", 8), ("session", 2), ("float ONNX", None)]
    assert timed == {(*one, batch) for one in engines for batch in (1, 32)}
    assert all(row["images_per_s"] == 1e3 * row["batch"] / row["ms"] for row in document["speed"])
    table = read_latency(tmp_path / "bench.json")
    assert set(table) == set(layers) and all(set(row) == {8, 2} and min(row.values()) > 0 for row in table.values())
    traces = dict.fromkeys(layers, 1.0)
    (choice, *_) = bs.search(model, traces, budgets=[{"latency": 1e9}], latency=table)
    assert choice.assignment.uniform == 8


class Between(nn.Module):
    """A softmax reads what a convolution gives."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 4)
        self.one, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = torch.softmax(self.one(self.stem(x).relu()), 1)
        return self.head((self.other(x).relu() + x).mean((2, 3)))


def test_a_file_of_one_width_has_nothing_to_switch_to(capsys, tmp_path):
    images = torch.rand(4, 1, 8, 8)
    network = {"name": "cifar_resnet8", "args": {"in_channels": 1}}
    model = bs.quantize(build(**network), bits=(8,), example_inputs=images).eval()
    preprocessing = {"shape": [1, 8, 8], "mean": [0.5], "std": [0.5], "resize": None, "crop": None}
    bs.save(model, tmp_path / "m", network=network, preprocessing=preprocessing, example_inputs=images)
    status, out, err = call(capsys, "bench", tmp_path / "m", "--rounds", 1, "--json")
    assert status == 0, err
    (row,) = json.loads(out)["widths"]
    for key in ("torch_switch_ms", "torch_kept_switch_ms", "session_build_ms", "session_switch_us"):
        assert row[key] is None
    assert row["session_peak_mb"] > 0
    assert call(capsys, "bench", tmp_path / "m", "--rounds", 1)[0] == 0


def test_what_reads_a_product_is_no_part_of_its_latency(tmp_path, monkeypatch):
    torch.manual_seed(0)
    images = torch.rand(64, 1, 8, 8)
    model = bs.quantize(Between(), bits=(8, 2), example_inputs=images)
    bs.save(model.eval(), tmp_path / "m", example_inputs=images)
    by_layer, counted = bench._by_layer, {}

    def seen(events, nodes):
        counted.update(nodes)
        return by_layer(events, nodes)

    monkeypatch.setattr(bench, "_by_layer", seen)
    table = bench._layer_latency(tmp_path / "m", [8, 2], images[:1].numpy(), 2)
    assert set(table) == set(counted.values()) == {"one", "other"}
    assert any("conv" in name.lower() for name in counted) and not any("softmax" in name.lower() for name in counted)


def test_a_file_that_is_cut_off_is_inspected_measured_and_exported_at_the_widths_that_it_holds(capsys, file, tmp_path):
    whole = json.loads(call(capsys, "bench", file, "--rounds", 1, "--json")[1])
    file.write_bytes(file.read_bytes()[:-1])
    status, out, err = call(capsys, "bench", file, "--rounds", 1, "--json")
    assert status == 0, err
    document = json.loads(out)
    (row,) = document["widths"]
    same = ("bits", "bytes_read", "narrowed_bytes")
    assert [row[key] for key in same] == [whole["widths"][1][key] for key in same]
    assert {row["bits"] for row in document["speed"]} == {2, None}
    status, out, err = call(capsys, "inspect", file, "--graph", "--json")
    assert status == 0, err
    document = json.loads(out)
    assert document["widths"] == [8, 2] and document["held"] == [2] and set(document["graph"]) == {"2"}
    assert document["code_bytes"] == bits_read(8, 2) * sum(math.prod(row["shape"]) for row in document["layers"]) // 8
    assert document["code_bytes"] + document["other_bytes"] + document["graph_bytes"] < document["bytes"]
    assert "cut off: it serves 2 bits at most" in call(capsys, "inspect", file)[1]
    status, out, err = call(capsys, "export", file, "--out", tmp_path / "onnx", "--json")
    assert status == 0, err
    assert [row["bits"] for row in json.loads(out)["files"]] == [2]
    one = tmp_path / "one.json"
    one.write_text(json.dumps({row["name"]: 2 for row in document["layers"][:1]}))
    for command in (["export", file, "--out", tmp_path / "more"], ["evaluate", file, "--data", "digits"]):
        status, out, err = call(capsys, *command, "--assignment", one, "--json")
        assert status == 0 and set(
            json.loads(out).get("files", json.loads(out).get("results"))[0]["assignment"].values()
        ) == {2}, err
    status, out, err = call(capsys, "export", file, "--out", tmp_path / "none", "--bits", "2,2")
    assert status == 2 and "--bits 2,2: name each width once" in err
    status, out, err = call(capsys, "export", file, "--out", tmp_path / "none", "--bits", "2,8")
    assert status == 2 and not (tmp_path / "none").exists()
    status, out, err = call(capsys, "export", file, "--out", tmp_path / "onnx", "--bits", 8)
    assert status == 2 and "cut off before 8 bits: it serves 2 bits at most" in err and err.count("\n") == 1


def test_a_file_without_a_graph_is_measured_in_torch(capsys, tmp_path):
    torch.manual_seed(0)
    images = torch.rand(4, 1, 8, 8)
    network = {"name": "cifar_resnet8", "args": {"in_channels": 1}}
    model = bs.quantize(build(**network), bits=(8, 2), example_inputs=images)
    bs.save(model, tmp_path / "m", network=network, preprocessing={"shape": [1, 8, 8]})
    status, out, _ = call(capsys, "bench", tmp_path / "m", "--rounds", 1)
    assert status == 0 and "bitswitch export" in out and "session" not in out.split("no session")[0].split("threads")[1]
    bs.save(model, tmp_path / "n", network=network)
    status, out, err = call(capsys, "bench", tmp_path / "n")
    assert status == 2 and "of what shape its input is" in err and err.count("\n") == 1
    bs.save(model, tmp_path / "o", network=network, preprocessing={"shape": [3, 8, 8]})
    status, out, err = call(capsys, "bench", tmp_path / "o")
    assert status == 2 and "[3, 8, 8] as the shape of its input, which its network does not" in err, err
    assert err.count("\n") == 1
    status, out, err = call(capsys, "bench", tmp_path / "m", "--device", "cuda")
    assert status == 2 and "bench measures on the CPU" in err
    # What it is, its content tells.
    status, out, err = call(capsys, "evaluate", tmp_path / "m", "--data", "digits")
    assert status == 2 and "lacks mean and std: images cannot be made ready by it" in err, err
    (tmp_path / "text").write_text("no artifact")
    status, out, err = call(capsys, "evaluate", tmp_path / "text", "--data", "digits")
    assert status == 2 and "neither an artifact (.safetensors) nor a readable checkpoint" in err
