"""The commands of mixed precision, on digits."""

import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bitswitch as bs
from bitswitch import artifact
from bitswitch.artifact import read_header
from bitswitch.cli.console import stdout_kept_clean
from bitswitch.data import load_data
from bitswitch.errors import UserError
from bitswitch.evaluation import assignments_named
from bitswitch.machine import machine
from bitswitch.nn import TransitionalBatchNorm, plan_of
from bitswitch.rundir import RunDirectory
from bitswitch.runtime import Session
from bitswitch.runtime.packing import unpacked
from bitswitch.training import evaluate
from commands import call, one_line, run_digits, steps_shown

SHORT = [
    *("pretrain.epochs=3", "train.epochs=2", "supernet.epochs=2"),
    *("sensitivity.images=64", "search.points=6"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run_digits(tmp_path_factory.mktemp("runs") / "digits", *SHORT)


@pytest.fixture
def copied(done, tmp_path):
    return Path(shutil.copytree(done, tmp_path / "digits"))


def choices(folder):
    return json.loads((folder / "frontier.json").read_text())["choices"]


def test_a_run_directory_holds_what_is_promised(done):
    for name in ("model.safetensors", "supernet.safetensors", "sensitivity.json", "frontier.json"):
        assert (done / name).is_file()
    sensitivity = json.loads((done / "sensitivity.json").read_text())
    assert sensitivity["data"] == "digits" and sensitivity["seed"] == 0 and sensitivity["images"] == 64
    weights = {name: p.numel() for name, p in bs.load(done / "model.safetensors").named_parameters()}
    assert sensitivity["layers"]["conv1"]["weights"] == weights["conv1.weight"]
    for row in choices(done):
        assert set(row) == {"assignment", "cost", "damage", "top1"} and row["top1"] > 50
    rows = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    followed = [r for r in rows if r["stage"] == "supernet" and r["epoch"] == 0]
    assert [r["bits"] for r in followed] == [8, 6, 4, 2, None, None, None, None]
    assert all(("train_loss" in r) == (r["bits"] is not None) for r in followed)
    again = [r["assignment"] for r in rows if r["stage"] == "supernet" and r["epoch"] == 1 and r["bits"] is None]
    assert again == [r["assignment"] for r in followed if r["bits"] is None]


def test_the_artifact_holds_transitional_norms_and_its_frontier(done):
    header = read_header(done / "supernet.safetensors")
    assert header.transitional and list(header.frontier) == choices(done)
    model = bs.load(done / "supernet.safetensors", assignment="avg<=4")
    fits = [row for row in choices(done) if row["cost"]["bits"] <= 4 + 1e-9]
    best = max(fits, key=lambda row: (row["top1"], -row["damage"]))
    assert bs.widths(model) == best["assignment"]
    assert isinstance(model.layer2[0].bn1, TransitionalBatchNorm) and plan_of(model).transitional


def test_sub_nets_on_val_and_on_test(capsys, done):
    """Top-1 of frontier.json is that of val; evaluate reports test; a model loaded by hand agrees with both."""
    words = ["evaluate", done / "supernet.safetensors", "--assignment", done / "frontier.json", "--json"]
    for split in ("val", "test"):
        status, out, err = call(capsys, *words, "--split", split)
        assert status == 0, err
        results = json.loads(out)["results"]
        assert [row["choice"] for row in results] == list(range(len(choices(done))))
        model = bs.load(done / "supernet.safetensors")
        batches = list(load_data("digits").evaluation_batches(split, batch_size=256, device=torch.device("cpu")))
        for row, choice in zip(results, choices(done), strict=True):
            assert row["assignment"] == choice["assignment"] and row["cost"] == choice["cost"] and row["bits"] is None
            with bs.switched(model, choice["assignment"]), torch.no_grad():
                right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
            assert row["top1"] == pytest.approx(100 * right / row["images"])
            if split == "val":
                assert row["top1"] == choice["top1"]


def test_non_dominated_choices_are_marked(capsys, done):
    _, out, _ = call(
        capsys, "evaluate", done / "supernet.safetensors", "--assignment", done / "frontier.json", "--json"
    )
    rows = json.loads(out)["results"]

    def beats(other, row):
        at_least = other["top1"] >= row["top1"] and all(other["cost"][n] <= row["cost"][n] for n in row["cost"])
        return at_least and (other["top1"] > row["top1"] or other["cost"] != row["cost"])

    assert [row["non_dominated"] for row in rows] == [not any(beats(o, row) for o in rows) for row in rows]


def test_a_run_done_anew_without_a_supernet_leaves_no_rows_of_one(capsys, copied):
    words = ["run", "digits", "pretrain.epochs=1", "train.epochs=1", "supernet=null", "--out", copied, "--fresh"]
    status, _, err = call(capsys, *words)
    assert status == 0, err
    stages = [json.loads(line)["stage"] for line in (copied / "metrics.jsonl").read_text().splitlines()]
    assert set(stages) == {"pretrain", "train"} == set(json.loads((copied / "stages.json").read_text()))


def test_a_search_that_ties_what_there_is_not_costs_no_supernet(capsys, copied):
    records = json.loads((copied / "stages.json").read_text())
    (copied / "stages.json").write_text(json.dumps({"pretrain": records["pretrain"]}))
    words = ["run", "digits", *SHORT, "search.tied=[[layer1.0.convX, layer1.0.conv2]]", "--out", copied]
    one_line(call(capsys, *words), "search.tied: no layer that is quantized is named 'layer1.0.convX'")
    assert set(json.loads((copied / "stages.json").read_text())) == {"pretrain"}


def test_predictions_are_kept(capsys, done, monkeypatch):
    words = ["evaluate", done / "supernet.safetensors", "--assignment", done / "frontier.json", "--json"]
    first = call(capsys, *words)
    monkeypatch.setattr("bitswitch.evaluation.evaluate", lambda *_, **__: pytest.fail("computed again"))
    assert call(capsys, *words)[1] == first[1]
    kept = list((Path(os.environ["XDG_CACHE_HOME"]) / "bitswitch").glob("predictions-*.safetensors"))
    assert len(kept) == len(choices(done))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(done.parent / "elsewhere"))
    assert call(capsys, *words)[1] == first[1]


def test_predictions_of_other_software_or_of_own_code_are_not_taken(capsys, done, monkeypatch):
    words = ["evaluate", done / "supernet.safetensors", "--assignment", done / "frontier.json", "--json"]
    call(capsys, *words)
    kept = Path(os.environ["XDG_CACHE_HOME"]) / "bitswitch"
    before = set(kept.glob("predictions-*"))
    there = machine(torch.device("cpu"))
    monkeypatch.setattr("bitswitch.evaluation.machine", lambda device: there | {"torch": "another"})
    assert call(capsys, *words)[0] == 0
    assert len(set(kept.glob("predictions-*"))) == 2 * len(before)
    monkeypatch.setattr("bitswitch.evaluation.source_digest", lambda: "other code")
    assert call(capsys, *words)[0] == 0
    assert len(set(kept.glob("predictions-*"))) == 3 * len(before)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept.parent))
    shutil.rmtree(kept)
    (kept.parent / "own_network.py").write_text(
        "from bitswitch.models import build\ndef net(**_): return build('cifar_resnet8', {'in_channels': 1})\n"
    )
    monkeypatch.syspath_prepend(str(kept.parent))
    status, _, err = call(capsys, *words, "--model", "own_network:net")
    assert status == 0, err
    assert not list(kept.glob("predictions-*"))


def test_choices_whose_bits_were_cut_off_are_left_out(tmp_path):
    frontier = [
        {"assignment": {"a": high, "b": 2}, "cost": {"bits": (high + 2) / 2}, "damage": 9.0 - high, "top1": None}
        for high in (8, 4, 2)
    ]
    (tmp_path / "frontier.json").write_text(json.dumps({"choices": frontier}))
    named = str(tmp_path / "frontier.json")

    def found(text, held):
        return [one.choice for one in assignments_named(text, ["a", "b"], (8, 4, 2), frontier, held)]

    assert found(named, 8) == [0, 1, 2] and found(named, 4) == [1, 2] and found(f"{named}#2", 4) == [2]
    assert found("avg<=8", 8) == [0] and found("avg<=8", 4) == [1] and found("avg<=8", 2) == [2]
    with pytest.raises(UserError, match="cut off and holds 4 bits at most"):
        found(f"{named}#0", 4)


@pytest.mark.parametrize("of", ["#2", "avg<=5", "file"])
def test_one_assignment(capsys, done, tmp_path, of):
    name = {"#2": f"{done / 'frontier.json'}#2", "avg<=5": of, "file": tmp_path / "own.json"}[of]
    layers = list(choices(done)[0]["assignment"])
    (tmp_path / "own.json").write_text(json.dumps({layers[1]: 2}))
    words = ["evaluate", done / "supernet.safetensors", "--assignment", name, "--json"]
    status, out, err = call(capsys, *words)
    assert status == 0, err
    (row,) = json.loads(out)["results"]
    if of == "#2":
        assert row["assignment"] == choices(done)[2]["assignment"] and row["choice"] == 2
    elif of == "file":
        assert row["assignment"] == dict.fromkeys(layers, 8) | {layers[1]: 2} and "choice" not in row
    else:
        assert row["cost"]["bits"] <= 5 + 1e-9


def test_a_mixture_is_recalibrated_alone(capsys, done):
    words = ["evaluate", done / "supernet.safetensors", "--recalibrate", "200", "--json"]
    both = json.loads(call(capsys, *words, "--bits", "2", "--assignment", "avg<=4")[1])["results"]
    one = json.loads(call(capsys, *words, "--assignment", "avg<=4")[1])["results"]
    assert both[1] == one[0]


def test_a_second_run_skips_what_is_done(capsys, copied):
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file() and p.name != ".lock"}
    status, out, err = call(capsys, "run", "digits", *SHORT, "--out", copied, "--json")
    assert status == 0 and err.count("done before, skipped") == 5
    document = json.loads(out)
    assert document["frontier"]["choices"] == choices(copied) and document["supernet"].endswith("supernet.safetensors")
    assert [(r["stage"], r["bits"]) for r in document["results"]] == [
        ("pretrain", None),
        *itertools.product(("train", "supernet"), (8, 6, 4, 2)),
    ]
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_one_stage_again(capsys, copied):
    words = [*SHORT, "--out", copied]
    one_line(call(capsys, "search", "digits", *words, "search.points=3"), "search.points was 6, is 3", "--fresh")
    status, _, err = call(capsys, "search", "digits", *words, "search.points=3", "--fresh", "--json")
    assert status == 0, err
    assert len(choices(copied)) <= 3
    assert list(read_header(copied / "supernet.safetensors").frontier) == choices(copied)
    status, _, err = call(capsys, "supernet", "digits", *words, "supernet.sampler=uniform", "--fresh", "--json")
    assert status == 0, err
    # Another SuperNet: its frontier is to be searched anew.
    one_line(call(capsys, "search", "digits", *words, "supernet.sampler=uniform", "search.points=3"), "--fresh")


@pytest.mark.parametrize(
    "options",
    [
        ["search.damage=accuracy", "search.budgets=[4, {bits: 6, bytes: 99000}]"],
        ["search.damage=linear", "search.alternatives=true", "search.budget=bitops"],
        ["search.genetic_evaluations=24", "search.points=2", "search.tie_shared_inputs=true"],
        ["search.val_images=0", "search.tied=[[layer1.0.conv1, layer3.0.conv2]]"],
    ],
    ids=str,
)
def test_every_kind_of_search(capsys, copied, options):
    status, _, err = call(capsys, "search", "digits", *SHORT, *options, "--out", copied, "--fresh", "--json")
    assert status == 0, err
    rows = choices(copied)
    assert rows and all((row["top1"] is None) == ("search.val_images=0" in options) for row in rows)
    for row in rows:
        if "search.damage=accuracy" in options:
            assert row["cost"]["bits"] <= 6 + 1e-9
        if "tied" in options[-1]:
            assert row["assignment"]["layer1.0.conv1"] == row["assignment"]["layer3.0.conv2"]


@pytest.mark.parametrize(
    "options",
    [
        ["supernet.sandwich=true", "supernet.sampler=uniform", "supernet.batch_norm=switchable"],
        ["supernet.distillation.teacher=float", "supernet.sensitive=0.5", "supernet.cap=0.3"],
        ["supernet.distillation.teacher=highest", "supernet.sigma=1.0", "supernet.order=accumulate"],
        ["supernet.sampler=fixed", "supernet.precision=bfloat16", "supernet.micro_batches=2"],
    ],
    ids=str,
)
def test_every_kind_of_supernet(capsys, copied, options):
    words = [*SHORT, "supernet.epochs=1", *options, "--out", copied]
    status, _, err = call(capsys, "supernet", "digits", *words, "--fresh", "--json")
    assert status == 0, err
    header = read_header(copied / "supernet.safetensors")
    assert header.transitional == ("supernet.batch_norm=switchable" not in options)


def test_a_supernet_of_channels_last_is_searched_in_that_memory_format(capsys, copied):
    words = [*SHORT, "supernet.epochs=1", "supernet.channels_last=true", "--out", copied]
    for stage in ("supernet", "search"):
        status, _, err = call(capsys, stage, "digits", *words, "--fresh", "--json")
        assert status == 0, err


def test_a_latency_table(capsys, copied, tmp_path):
    path = tmp_path / "latency.json"
    layers = list(choices(copied)[0]["assignment"])
    table = {name: {"8": 4.0, "6": 3.0, "4": 2.0, "2": 1.0} for name in layers}
    path.write_text(json.dumps({"layers": table}))
    words = [*SHORT, f"search.latency={path}", "search.budget=latency", "--out", copied, "--fresh", "--json"]
    status, _, err = call(capsys, "search", "digits", *words)
    assert status == 0, err
    assert min(row["cost"]["latency"] for row in choices(copied)) == len(layers)
    del table[layers[0]]["4"]
    path.write_text(json.dumps({"layers": table}))
    before = choices(copied)
    one_line(call(capsys, "search", "digits", *words), "latency", f"4 bits of layer '{layers[0]}'")
    assert choices(copied) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["search", "digits", "search.budget=byte"], ["no cost is named 'byte'", "bytes"]),
        (["search", "digits", "search.budgets=[{latency: 3}]"], ["'latency'", "search.latency"]),
        (["search", "digits", "search.latency=none.json"], ["none.json"]),
        (["search", "digits", "search.budgets=[1.5]"], ["can be from 2 to 8"]),
        (["search", "digits", "search.genetic_evaluations=5"], ["shared by 6 budgets"]),
        (["search", "digits", "supernet.sandwich=true", "supernet.sampler=fixed"], ["sandwich", "sampler=hasb"]),
        (["search", "digits", "search.tied=[[conv9, conv8]]"], ["no layer that is quantized is named 'conv9'"]),
        (["search", "digits", "data.val_fraction=0"], ["data.val_fraction was 0.1"]),
        (["search", "digits", "supernet.sampler=hasp"], ["supernet.sampler='hasp'"]),
        (["search", "digits", "supernet.sensitive=2"], ["quantile"]),
        (["search", "digits", "supernet=null"], ["has no part supernet"]),
        (["search", "digits", "train.method=lsq"], ["gives no SuperNet"]),
        (["search", "digits", "supernet.epoch=3"], ["unknown key 'supernet.epoch'", "did you mean 'supernet.epochs'"]),
    ],
    ids=str,
)
def test_what_cannot_be_searched(capsys, copied, words, expected):
    before = choices(copied)
    changed = [word for word in SHORT if word.split("=")[0] not in {w.split("=")[0] for w in words[2:]}]
    if "supernet=null" in words:
        changed = [word for word in changed if not word.startswith("supernet")]
    one_line(call(capsys, *words[:2], *changed, *words[2:], "--out", copied, "--fresh"), *expected)
    assert choices(copied) == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("empty.json", "holds no choices"),
        ("empty.json#0", "holds no choices"),
        ("a#b/empty.json", "holds no choices"),
        ("frontier.json#99", "choices #0 to #"),
        ("frontier.json#-1", "choices #0 to #"),
        ("frontier.json#x", "choices #0 to #"),
        ("none.json", "cannot read"),
        ("config.yaml", "is not JSON"),
        ("avg<=1", "the least is 2"),
        ("cost<=1", "no cost is named"),
        ("own.json#1", "no choices to number"),
        ("other.json", "no quantized layer is named 'conv9'"),
        ("wide.json", "has no width 5"),
        ("foreign.json", "another network"),
        ("list.json", "a JSON object"),
    ],
)
def test_assignments_that_are_none(capsys, copied, monkeypatch, text, expected):
    monkeypatch.chdir(copied)
    layer = next(iter(choices(copied)[0]["assignment"]))
    Path("own.json").write_text(json.dumps({layer: 4}))
    Path("wide.json").write_text(json.dumps({layer: 5}))
    Path("other.json").write_text(json.dumps({"conv9": 4}))
    Path("list.json").write_text("[8, 4]")
    Path("a#b").mkdir()
    for place in (Path(), Path("a#b")):
        (place / "empty.json").write_text('{"choices": []}')
    Path("foreign.json").write_text(
        json.dumps({"choices": [{"assignment": {"x": 8}, "cost": {}, "damage": 0, "top1": None}]})
    )
    one_line(call(capsys, "evaluate", "supernet.safetensors", "--assignment", text), expected)


def test_a_damaged_sensitivity_is_named(capsys, copied):
    (copied / "sensitivity.json").write_text("{}")
    result = call(capsys, "supernet", "digits", *SHORT, "--out", copied, "--fresh")
    one_line(result, "sensitivity.json")


def test_a_float_checkpoint_has_no_assignments(capsys, done):
    words = ["evaluate", done / "checkpoints" / "pretrain.pt"]
    one_line(call(capsys, *words, "--assignment", "avg<=4"), "leave --bits and --assignment out")
    status, out, err = call(capsys, *words, "--json")
    assert status == 0, err
    (row,) = json.loads(out)["results"]
    rows = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert row["top1"] == next(r["top1"] for r in rows if r["stage"] == "pretrain" and r["split"] == "test")


def test_export_and_the_session(capsys, copied):
    file = copied / "supernet.safetensors"
    words = ["export", file, "--bits", "4", "--assignment", "avg<=5", "--json"]
    status, out, err = call(capsys, *words)
    assert status == 0, err
    document = json.loads(out)
    assert document["graph_added"] and document["held_against_torch"]
    assert [row["bits"] for row in document["files"]] == [4, None]
    assert all(Path(row["file"]).parent == copied / "onnx" for row in document["files"])
    # The file has more in it now, and is the stage's still.
    status, _, err = call(capsys, "run", "digits", *SHORT, "--out", copied, "--json")
    assert status == 0 and err.count("done before, skipped") == 5
    assert json.loads(call(capsys, *words)[1])["graph_added"] is False
    assert json.loads(call(capsys, *words, "--data", "digits")[1])["graph_added"] is False
    one_line(call(capsys, *words, "--data", copied / "none"), "there is no folder")
    assert [row["weights"] for row in document["files"]] == ["int8", "int8"]
    # Where no layer is narrow enough to be packed, the file says so.
    assert "int8 weights" in call(capsys, "export", file, "--bits", "8", "--weights", "int4")[1]
    mixed = document["files"][1]["assignment"]
    model = bs.load(file)
    session = Session(file)
    for x, _ in load_data("digits").evaluation_batches("test", batch_size=360, device=torch.device("cpu")):
        for wanted, written in ((4, document["files"][0]), (mixed, document["files"][1])):
            session.switch(wanted)
            with bs.switched(model, wanted), torch.no_grad():
                expected = model(x).argmax(1).numpy()
            assert (session.run(x.numpy()).argmax(1) == expected).mean() > 0.97
            exported = onnxruntime.InferenceSession(written["file"], providers=["CPUExecutionProvider"])
            (found,) = exported.run(None, {exported.get_inputs()[0].name: x.numpy()})
            assert (found.argmax(1) == expected).mean() > 0.97
    graph = json.loads(call(capsys, "inspect", file, "--graph", "--json")[1])["graph"]
    assert set(graph) == {"8", "6", "4", "2"} and all(report["integer"] >= 6 for report in graph.values())


def test_a_mixture_of_the_same_average_keeps_its_file(capsys, copied, tmp_path):
    file = copied / "supernet.safetensors"
    first, second, *rest = [layer.name for layer in read_header(file).layers]
    assert rest
    for high, low, expected in ((first, second, ""), (second, first, "-1"), (first, second, "")):
        (tmp_path / "one.json").write_text(json.dumps(dict.fromkeys(rest, 4) | {high: 8, low: 2}))
        status, out, err = call(capsys, "export", file, "--assignment", tmp_path / "one.json", "--json")
        assert status == 0, err
        (row,) = json.loads(out)["files"]
        assert row["file"].endswith(f"bit{expected}.onnx")
    assert len(list((copied / "onnx").iterdir())) == 2


def test_export_makes_a_graph_anew_that_is_of_another_version(capsys, copied):
    file = copied / "model.safetensors"
    words = ["export", file, "--bits", "4", "--json"]
    assert json.loads(call(capsys, *words)[1])["graph_added"] is True
    header, tensors = artifact.read(file)
    artifact.write(file, header, tensors | {"graph": np.frombuffer(unpacked(tensors["graph"]), np.uint8)})
    with pytest.raises(UserError, match=r"another version; where torch is, `bitswitch export .*` makes it anew"):
        Session(file)
    assert json.loads(call(capsys, *words)[1])["graph_added"] is True
    assert np.array_equal(artifact.read(file)[1]["graph"], tensors["graph"])
    Session(file)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bits", "5"], "has no width 5"),
        (["--weights", "int3"], "--weights int3"),
        (["train.epochs=3"], "overrides are for a recipe"),
        (["--assignment", "avg<=1"], "the least is 2"),
    ],
)
def test_what_cannot_be_exported(capsys, copied, words, expected):
    before = (copied / "supernet.safetensors").read_bytes()
    one_line(call(capsys, "export", copied / "supernet.safetensors", *words), expected)
    assert (copied / "supernet.safetensors").read_bytes() == before and not (copied / "onnx").exists()


def test_a_recipe_that_has_not_run_cannot_be_exported(capsys, tmp_path):
    one_line(call(capsys, "export", "digits", "--out", tmp_path / "none"), "stage train is not done")
    missing = tmp_path / "missing.safetensors"
    one_line(call(capsys, "export", missing), f"there is no file {missing}, and no recipe of that name")


def test_a_stage_that_is_done_leaves_the_configuration_of_the_others(capsys, copied):
    before = (copied / "config.yaml").read_bytes()
    status, _, err = call(capsys, "pretrain", "digits", SHORT[0], "--out", copied)
    assert status == 0 and "pretrain: done before, skipped" in err
    assert (copied / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("supernet.cap=0.01", "cap=0.01 of 6 layers is less than one"),
        ("search.budgets=[{bytes: 1}]", "no assignment meets bytes <= 1"),
        ("search.latency=TABLE", "table 'latency' lacks layer"),
    ],
)
def test_what_the_last_stages_cannot_do_is_told_before_the_first_of_those_left(capsys, copied, word, expected):
    (copied / "table.json").write_text(json.dumps({"layers": {"x": {"8": 1.0}}}))
    records = json.loads((copied / "stages.json").read_text())
    (copied / "stages.json").write_text(json.dumps({"pretrain": records["pretrain"]}))
    word = word.replace("TABLE", str(copied / "table.json"))
    one_line(call(capsys, "run", "digits", *SHORT, word, "--out", copied), expected)
    assert set(json.loads((copied / "stages.json").read_text())) == {"pretrain"}


def test_a_stage_from_another_checkpoint_is_refused(capsys, copied, tmp_path):
    torch.save(torch.load(copied / "checkpoints" / "pretrain.pt", weights_only=True)["model"], tmp_path / "other.pt")
    word = f"pretrain.checkpoint={tmp_path / 'other.pt'}"
    before = (copied / "config.yaml").read_bytes()
    told = call(capsys, "train", "digits", *SHORT, word, "--out", copied)
    one_line(told, "a pretrain stage made otherwise (pretrain.checkpoint was another file, or none)")
    assert (copied / "config.yaml").read_bytes() == before


def test_the_example_of_mixed_widths(done):
    example = Path(__file__).parents[1] / "examples" / "mixed_widths.py"
    run = subprocess.run([sys.executable, example, done], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "every layer at 2 bits" in run.stdout and "of 144 val images" in run.stdout


def test_a_search_is_checked_with_the_networks_own_weights_and_norms(capsys, copied, monkeypatch):
    seen = []

    def own_costs(model, *_):
        seen.append(model)
        raise UserError("enough")

    monkeypatch.setattr("bitswitch.pipeline.checks.room.cost_tables", own_costs)
    records = json.loads((copied / "stages.json").read_text())
    (copied / "stages.json").write_text(json.dumps({"pretrain": records["pretrain"]}))
    one_line(call(capsys, "run", "digits", *SHORT, "--out", copied), "enough")
    (model,) = seen
    weights = torch.load(copied / "checkpoints" / "pretrain.pt", weights_only=True)["model"]
    assert torch.equal(model.get_submodule("conv1").weight, weights["conv1.weight"])
    assert any(isinstance(module, TransitionalBatchNorm) for module in model.modules())


def test_a_search_scores_fewer_at_once_where_memory_is_short(capsys, copied, monkeypatch):
    before = (copied / "frontier.json").read_bytes()
    tried = []

    def short(model, batches, *args, **kwargs):
        given = list(batches)
        tried.append(len(given[0][0]))
        if tried[-1] > 64:
            raise torch.OutOfMemoryError("out of memory")
        return evaluate(model, given, *args, **kwargs)

    monkeypatch.setattr("bitswitch.pipeline.subnets.evaluate", short)
    status, _, err = call(capsys, "search", "digits", *SHORT, "--out", copied, "--fresh")
    assert status == 0, err
    assert (copied / "frontier.json").read_bytes() == before and set(tried) == {144, 128, 64}


def test_a_search_scores_as_many_images_as_it_is_told_and_shows_how_far_it_is(capsys, copied, monkeypatch):
    seen, steps = [], steps_shown(monkeypatch)

    def counted(model, batches, *args, **kwargs):
        found = evaluate(model, batches, *args, **kwargs)
        seen.append(found[0].images)
        return found

    monkeypatch.setattr("bitswitch.pipeline.subnets.evaluate", counted)
    words = ["search.val_images=100", "search.damage=accuracy", "search.points=2"]
    assert call(capsys, "search", "digits", *SHORT, *words, "--out", copied, "--fresh")[0] == 0
    layers = len(choices(copied)[0]["assignment"])
    assert set(seen) == {100} and set(steps) == {("search", 3 * layers + 1 + 2)}
    assert len(steps) == 3 * layers + 1 + len(choices(copied))


def test_a_supernet_whose_artifact_is_gone_is_not_done(capsys, copied):
    before = (copied / "supernet.safetensors").read_bytes()
    (copied / "supernet.safetensors").unlink()
    status, _, err = call(capsys, "supernet", "digits", *SHORT, "--out", copied)
    assert status == 0 and "supernet: taken up after epoch 2" in err and (copied / "supernet.safetensors").is_file()
    status, _, err = call(capsys, "search", "digits", *SHORT, "--out", copied, "--fresh")
    assert status == 0 and (copied / "supernet.safetensors").read_bytes() == before


def test_what_a_library_prints_is_not_on_stdout(capfd):
    with stdout_kept_clean():
        print("a word of a network")
        ctypes.CDLL(None).printf(b"noise of a solver\n")
    print("document", flush=True)
    out, err = capfd.readouterr()
    assert out == "document\n" and set(err.splitlines()) == {"noise of a solver", "a word of a network"}


def test_two_ranks_train_one_supernet_and_share_its_evaluation(capsys, copied):
    """Gradients are averaged over the ranks: had these drawn differently, what they average would not match."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bitswitch"]
    words = [*SHORT, "supernet.epochs=1", "--out", str(copied), "--fresh", "--json"]
    result = subprocess.run([*launch, "supernet", "digits", *words], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    words = ["evaluate", str(copied / "supernet.safetensors"), "--assignment", f"{copied / 'frontier.json'}", "--json"]
    result = subprocess.run([*launch, *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    two = json.loads(result.stdout)["results"]
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    one = json.loads(call(capsys, *words)[1])["results"]
    assert one == two


@pytest.mark.parametrize(("images", "sizes"), [(64, [64]), (129, [65, 64]), (300, [100, 100, 100])])
def test_batches_that_count_alike_in_a_trace_are_alike(capsys, copied, monkeypatch, images, sizes):
    def seen(model, loss, batches, **_):
        assert [len(x) for x, _ in batches] == [len(y) for _, y in batches] == sizes
        raise UserError("enough")

    monkeypatch.setattr("bitswitch.pipeline.subnets.room.hessian_trace", seen)
    words = ["sensitivity", "digits", *SHORT[:3], f"sensitivity.images={images}", "--out", copied, "--fresh"]
    one_line(call(capsys, *words), "enough")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (
            "search.tied=[[stage1.0.conv, stage1.0.conv1]]",
            ["search.tied: no layer that is quantized is named 'stage1.0.conv'", "did you mean"],
        ),
        ("search.budgets=[4, {weight_bits: 1}]", ["no assignment meets weight_bits <= 1 (it can be from 2 to 8)"]),
    ],
)
def test_searches_that_cannot_be_done_are_refused_before_anything(capsys, tmp_path, word, expected):
    one_line(call(capsys, "run", "digits", *SHORT, word, "--out", tmp_path / "x"), *expected)
    assert not (tmp_path / "x" / "checkpoints").exists()


def test_layers_that_share_a_weight_have_a_trace_each(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tied_network.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    layers = [nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 10)]\n"
        "    layers[4].weight = layers[2].weight\n"
        "    return nn.Sequential(nn.Flatten(), *layers)\n"
    )
    named = ["model.name=tied_network:net", "model.args={}"]
    status, _, err = call(capsys, "run", "digits", *SHORT, *named, "--out", tmp_path / "x")
    assert status == 0, err
    layers = json.loads((tmp_path / "x" / "sensitivity.json").read_text())["layers"]
    assert layers["3"]["weights"] == layers["5"]["weights"] == 64


def test_mixtures_have_places_of_their_own_in_tensorboard(done, tmp_path):
    rows = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["stage"] == "supernet" and row["epoch"] == 0]
    RunDirectory(tmp_path).add_metrics(rows, tensorboard=True)
    (events,) = {path.parent for path in tmp_path.rglob("events*")}
    read = EventAccumulator(str(events)).Reload()
    written = read.Tags()["scalars"]
    assert {"supernet/8/top1", "supernet/mixture 0/top1", "supernet/mixture 3/top1"} <= set(written)
    assert all(len(read.Scalars(tag)) == 1 for tag in written)
    (of_eight,) = (row for row in rows if row["bits"] == 8)
    assert read.Scalars("supernet/8/top1")[0].value == pytest.approx(of_eight["top1"])
