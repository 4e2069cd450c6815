import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import bitswitch as bs
from bitswitch import artifact
from bitswitch.cli.words import run_directory
from bitswitch.config import load_recipe, to_yaml
from bitswitch.data import load_data
from bitswitch.models import build
from bitswitch.pipeline.origins import config_of
from bitswitch.rundir import RunDirectory
from bitswitch.version import __version__
from commands import call, one_line, run_digits, steps_shown

SHORT = ["pretrain.epochs=2", "train.epochs=1", "supernet=null"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A short finished run; tests that change files take a copy."""
    return run_digits(tmp_path_factory.mktemp("runs") / "digits", *SHORT)


@pytest.fixture
def copied(done, tmp_path):
    return Path(shutil.copytree(done, tmp_path / "digits"))


def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


def test_a_run_directory_holds_what_is_promised(done):
    names = {str(p.relative_to(done)) for p in done.rglob("*") if p.is_file()}
    wanted = {"config.yaml", "metrics.jsonl", "stages.json", "model.safetensors", "checkpoints/pretrain.pt"}
    assert wanted <= names
    rows = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["epoch"], r["bits"], r["split"]) for r in rows] == [
        ("pretrain", 0, None, "val"),
        ("pretrain", 1, None, "val"),
        ("pretrain", None, None, "test"),
        *(("train", 0, bits, "val") for bits in (8, 6, 4, 2)),
        *(("train", None, bits, "test") for bits in (8, 6, 4, 2)),
    ]


def test_evaluate_in_a_new_process_gives_the_end_of_training(done):
    command = [sys.executable, "-m", "bitswitch", "evaluate", done / "model.safetensors", "--bits", "8,6,4,2", "--json"]
    document = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    ended = {r["bits"]: r for r in rows if r["stage"] == "train" and r["split"] == "test"}
    assert [r["bits"] for r in document["results"]] == [8, 6, 4, 2]
    for row in document["results"]:
        assert row["assignment"] is None and row["split"] == "test" and row["data"] == "digits"
        for key in ("top1", "top5", "loss", "images"):
            assert row[key] == ended[row["bits"]][key]
    (alone,) = (r["top1"] for r in rows if r["stage"] == "pretrain" and r["split"] == "test")
    known = document["provenance"]
    assert known["recipe"] == "digits" and known["float_top1"] == alone > 10
    assert known["top1"] == {str(bits): row["top1"] for bits, row in ended.items()}


def test_the_artifact_gives_the_checkpoints_logits_to_the_last_bit(done):
    from bitswitch.models import build
    from bitswitch.nn import Plan, apply
    from bitswitch.training import load_checkpoint

    state = load_checkpoint(done / "checkpoints" / "train.pt")
    model = apply(build("cifar_resnet8", {"in_channels": 1}), Plan.from_json(state["plan"]))
    model.load_state_dict(state["model"])
    model.eval()
    loaded = bs.load(done / "model.safetensors")
    with torch.no_grad():
        for x, _ in load_data("digits").evaluation_batches("test", batch_size=256, device=torch.device("cpu")):
            for width in (8, 6, 4, 2):
                bs.switch(model, width)
                bs.switch(loaded, width)
                assert torch.equal(model(x), loaded(x))


def test_a_second_run_skips_what_is_done(capsys, copied):
    before = snapshot(copied)
    status, out, err = call(capsys, "run", "digits", *SHORT, "--out", copied, "--json")
    assert status == 0 and json.loads(out)["results"][0]["bits"] is None
    assert "pretrain: done before, skipped" in err and "train: done before, skipped" in err
    assert snapshot(copied) == before


def test_a_changed_override_is_not_ignored(capsys, copied):
    before = snapshot(copied)
    one_line(
        call(capsys, "run", "digits", *SHORT, "train.lr=0.5", "--out", copied), "train.lr was 0.001, is 0.5", "--fresh"
    )
    one_line(call(capsys, "train", "digits", "train.epochs=1", "--out", copied), "pretrain.epochs was 2, is 60")
    one_line(call(capsys, "run", "digits", *SHORT, "--seed", 5, "--out", copied), "seed was 0, is 5")
    assert snapshot(copied) == before


def test_an_output_that_is_gone_is_made_again(capsys, copied):
    before = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").unlink()
    status, _, err = call(capsys, "run", "digits", *SHORT, "--out", copied)
    assert status == 0 and "pretrain: done before, skipped" in err and "train: taken up after epoch 1 of 1" in err
    assert artifact.read_header(copied / "model.safetensors").provenance and before


def test_a_changed_override_is_not_ignored_half_way(capsys, copied):
    """A stage that has begun is held to what it began with."""
    records = json.loads((copied / "stages.json").read_text())
    records["train"] |= {"done": False}
    (copied / "stages.json").write_text(json.dumps(records))
    one_line(call(capsys, "run", "digits", *SHORT, "train.epochs=3", "--out", copied), "train.epochs was 1, is 3")


def test_a_later_stage_that_may_have_to_be_done_again_is_named_before_the_first(capsys, copied):
    records = json.loads((copied / "stages.json").read_text())
    del records["pretrain"]
    (copied / "stages.json").write_text(json.dumps(records))
    status, _, err = call(capsys, "run", "digits", *SHORT, "--out", copied)
    first, *_, last = err.splitlines()
    assert "train was made from another pretrain stage" in first and "bitswitch train digits" in first
    # This time both end alike.
    assert status == 0 and "train: done before, skipped" in last


def test_fresh_does_a_stage_again(capsys, copied):
    words = ["train", "digits", SHORT[0], "train.epochs=1", "train.lr=2e-3", "--out", copied, "--fresh", "--json"]
    status, out, _ = call(capsys, *words)
    assert status == 0 and json.loads(out)["artifact"]
    assert "lr: 0.002" in (copied / "config.yaml").read_text()
    one_line(call(capsys, "run", "digits", *SHORT, "--out", copied), "train.lr was 0.002, is 0.001")
    assert call(capsys, "pretrain", "digits", SHORT[0], "--seed", 1, "--out", copied, "--fresh", "--json")[0] == 0
    one_line(call(capsys, "train", "digits", *SHORT, "--seed", 1, "--out", copied), "--fresh")


def test_fresh_takes_up_no_earlier_checkpoint(capsys, copied):
    words = ["train", "digits", *SHORT, "train.lr=2e-3", "--out", copied, "--fresh", "--json"]
    status, _, err = call(capsys, *words)
    assert status == 0 and "taken up" not in err
    rows = [(r["epoch"], r["bits"]) for r in RunDirectory(copied).metrics() if r["stage"] == "train"]
    assert rows == [*((0, bits) for bits in (8, 6, 4, 2)), *((None, bits) for bits in (8, 6, 4, 2))]


def test_an_output_that_was_changed_is_noticed(capsys, copied):
    with (copied / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    one_line(call(capsys, "run", "digits", *SHORT, "--out", copied), "was changed since it was made")


def test_an_artifact_that_is_not_the_trained_model_fails_its_stage(capsys, copied, monkeypatch):
    def another(path, **options):
        model = bs.load(path, **options)
        with torch.no_grad():
            next(model.parameters()).add_(1)
        return model

    monkeypatch.setattr("bitswitch.pipeline.saving.load", another)
    status, out, err = call(capsys, "train", "digits", *SHORT, "--fresh", "--out", copied, "--json")
    assert status == 1 and not out and "does not give the trained model's logits at 8 bits" in err
    assert not RunDirectory(copied).records()["train"]["done"]


def test_data_that_are_others_than_those_of_an_earlier_stage_are_refused(capsys, copied):
    records = json.loads((copied / "stages.json").read_text())
    records["pretrain"]["inputs"]["data"] = "0" * 64
    del records["train"]
    (copied / "stages.json").write_text(json.dumps(records))
    one_line(call(capsys, "train", "digits", *SHORT, "--out", copied), "the data are others", "--fresh")


def test_a_stage_needs_the_one_before(capsys, tmp_path):
    where = tmp_path / "x"
    hint = f"bitswitch pretrain digits --out {where} does it"
    one_line(call(capsys, "train", "digits", "--out", where), "pretrain is not done", hint)


def test_two_processes_cannot_work_in_one_directory(capsys, copied):
    with RunDirectory(copied).locked():
        one_line(call(capsys, "run", "digits", *SHORT, "--out", copied), "another bitswitch works in")


def test_a_file_system_without_locks_can_be_worked_on(monkeypatch, tmp_path):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked .Function not implemented"), RunDirectory(tmp_path).locked():
        pass


def test_ranks_that_do_not_share_the_run_directory_are_told(capsys, monkeypatch, copied):
    module = sys.modules["bitswitch.pipeline.checks"]
    monkeypatch.setattr(module, "gather", lambda own, _: [*own, "what is in another machine's own folder"])
    one_line(call(capsys, "run", "digits", *SHORT, "--out", copied), "rank 1 does not see", "--out must be one folder")


def test_what_torchrun_sets_says_nothing_without_torchrun(capsys, monkeypatch, copied):
    monkeypatch.setenv("LOCAL_RANK", "")
    status, _, err = call(capsys, "run", "digits", *SHORT, "--out", copied)
    assert status == 0, err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "digit"], ["no recipe is named 'digit'", "did you mean 'digits'"]),
        (["run", "nowhere.yaml"], ["nowhere.yaml cannot be read"]),
        (["run", "digits", "train.epoch=3"], ["unknown key 'train.epoch'", "did you mean 'train.epochs'"]),
        (["run", "digits", "epochs=3"], ["unknown key 'epochs'", "pretrain.epochs or train.epochs or supernet.epochs"]),
        (["run", "digits", "train=5"], ["train=5: give its keys, such as train.precision=..."]),
        (["search", "digits", "search.budgets=[]"], ["give at least one budget"]),
        (["search", "digits", "search.budgets=[4, {}]"], ["give at least one budget, each with a cost"]),
        (["run", "digits", "train.forwards=1"], ["train.forwards=1", "only 2 bits would be trained"]),
        (["run", "digits", "train.forwards=5"], ["train.forwards=5", "at most all of bits=[8, 6, 4, 2]"]),
        (["run", "digits", "bits[0]=8"], ["unknown key 'bits[0]'", "did you mean 'bits'"]),
        (["run", "digits", "train[lr]=1"], ["unknown key 'train[lr]'"]),
        (["run", "digits", "model.args[in]=2"], ["unknown key 'model.args[in]'", "did you mean 'model.args'"]),
        (["run", "digits", "search.budgets=[{bits: x}]"], ["search.budgets.bits='x': input should be a valid number"]),
        (
            ["run", "digits", "train.eta=abc"],
            ["'abc': input should be 'paper' or a valid number or a valid dictionary"],
        ),
        (
            ["run", "digits", "train.eta={8: 1, 2: 0.5}"],
            ["train.eta={8: 1.0, 2: 0.5}: give one factor for each of bits"],
        ),
        (["run", "digits", "supernet.eta={3: 1}"], ["supernet.eta={3: 1.0}: give one factor for each of bits=[8, 6,"]),
        (["run", "digits", "data.name="], ["data.name=None: input should be a valid string: quote it"]),
        (["run", "digits", "train.keep=conv1"], ["train.keep='conv1': input should be a list, such as [a, b]"]),
        (["run", "digits", "search.tied=[a, b]"], ["search.tied='a': input should be a list, such as [a, b]"]),
        (["run", "digits", "train.epochs=on"], ["train.epochs=True: true and false are no numbers"]),
        (["run", "digits", "seed=true"], ["seed=True: true and false are no numbers"]),
        (["run", "digits", "search.budgets=[{bits: yes}]"], ["true and false are no numbers"]),
        (["run", "digits", "train.epochs=1:30"], ["train.epochs='1:30': input should be a valid integer"]),
        (["run", "digits", "train.eta=&a {8: *a}"], ["is not YAML: a value holds itself"]),
        (["run", "digits", "train={lr: 1, lr: 2}"], ["the key 'lr' is there twice"]),
        (["run", "digits", "train.epochs=010"], ["010 would be an octal number: write it without the leading 0"]),
        (["run", "digits", "data.download=true"], ["leave out data.download"]),
        (
            ["run", "digits", "bits=[4]", "train.distillation.teacher=highest"],
            ["teacher=highest teaches the widths below it, and there are none"],
        ),
        (
            ["run", "digits", "supernet.sampler=uniform", "supernet.cap=0.5"],
            ["supernet.sensitive and supernet.cap are hasb's, and sampler=uniform"],
        ),
        (
            [
                "run",
                "digits",
                "train=[&a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1], &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a], "
                "&c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b], &d [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]]",
            ],
            ["it holds more than 10,000 values"],
        ),
        (["export", "digits", "--data", "images"], ["--data images is for a file: digits is a recipe"]),
        (["run", "digits", f"train={'[' * 3000}"], ["nested too deeply"]),
        (["run", "digits", "trian.epochs=3"], ["unknown key 'trian'", "did you mean 'train'"]),
        (["run", "digits", "train.epochs"], ["is not key=value"]),
        (["run", "digits", "train.epochs=many"], ["train.epochs='many'"]),
        (["run", "digits", "train.lr=.nan"], ["train.lr"]),
        (["run", "digits", "train.lr=[1"], ["is not YAML"]),
        (["run", "digits", "bits=[8,0]"], ["0 is not a bit-width"]),
        (["run", "digits", "bits=[8,1]"], ["1 is not a bit-width"]),
        (["run", "digits", "bits=[9,8]"], ["9 is not a bit-width"]),
        (["run", "digits", "bits=[4,8]"], ["highest first"]),
        (["run", "digits", "bits=[8,8]"], ["each bit-width once"]),
        (["run", "digits", "bits=8"], ["list of bit-widths"]),
        (["run", "digits", "data.name=digist"], ["no data set", "did you mean 'digits'"]),
        (["run", "digits", "model.name=resnet19"], ["no network is named 'resnet19'"]),
        (["run", "digits", "model.args={in_channels: 1, num_classes: 7}"], ["[7] outputs", "digits has 10 classes"]),
        (["run", "digits", "model.args={in_channels: 3}"], ["cannot take images of [1, 8, 8]"]),
        (["run", "digits", "model.args={colour: 1}"], ["does not take the arguments"]),
        (["run", "digits", "model.args={width: .inf}"], ["model.args", "give what JSON holds"]),
        (["run", "digits", "model.args={since: 2020-01-01}"], ["model.args", "give what JSON holds"]),
        (["run", "digits", "model.args={widths: {1: 16}}"], ["model.args", "give what JSON holds"]),
        (["run", "digits", "train.alrs=off", "train.eta=paper"], ["eta is a factor of ALRS", "set eta=1 with it"]),
        (["run", "digits", "data.root=images"], ["digits come with scikit-learn: data.root=null", "data.name=images"]),
        (["run", "digits", "--device", "cuda"], ["--device cuda", "no such device"]),
        (["run", "digits", "--device", "abacus"], ["--device abacus"]),
        (["inspect", "resnet20-cifar10", "--device", "cuda:x"], ["--device cuda:x: say auto, cpu, cuda"]),
        (["run", "digits", "--colour"], ["No such option"]),
        (["run"], ["Missing argument"]),
        (["fly"], ["No such command"]),
        (["evaluate", "no/such/file"], ["there is no such file"]),
        (["inspect", "no/such/file"], ["there is no such file"]),
        (
            ["evaluate", "https://example.org/m.safetensors"],
            ["https://example.org/m.safetensors", "bitswitch.load reads URLs"],
        ),
        (["recipes", "show", "digit"], ["did you mean 'digits'"]),
        (["recipes", "--json", "show", "digits"], ["recipes show are given behind its name"]),
        (["recipes", "--seed", "7", "show", "digits"], ["recipes show are given behind its name"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_told_in_one_line(capsys, tmp_path, words, told):
    if torch.cuda.is_available() and "cuda" in words:
        pytest.skip("this machine has CUDA")
    if words[0] == "run" and len(words) > 1:
        words = [*words, "--out", tmp_path / "x"]
    one_line(call(capsys, *words), *told)
    assert not (tmp_path / "x" / "checkpoints").exists()


def test_a_model_without_quantizable_layers(capsys, tmp_path, monkeypatch):
    """Told before the float network is trained, not after."""
    (tmp_path / "plain.py").write_text(
        "from torch import nn\ndef build(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["run", "digits", "model.name=plain:build", "model.args={}", "--out", tmp_path / "x"]
    one_line(call(capsys, *words), "no layer to quantize", "Sequential")
    assert not (tmp_path / "x" / "checkpoints").exists()


def test_a_loss_that_is_not_finite(capsys, copied):
    before = (copied / "model.safetensors").read_bytes()
    words = ["train", "digits", SHORT[0], "train.epochs=2", "train.lr=1e30", "--fresh", "--out", copied]
    one_line(call(capsys, *words), "the loss at", "bits is", "step", "epoch")
    assert (copied / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("when", ["checkpoint", "metrics"])
def test_a_full_disk(capsys, monkeypatch, copied, when):
    before = (copied / "model.safetensors").read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if when == "checkpoint":
        monkeypatch.setattr("os.fsync", full)
    else:
        real = Path.open
        monkeypatch.setattr(Path, "open", lambda p, mode="r", **k: full() if "a" in mode else real(p, mode, **k))
    words = ["train", "digits", *SHORT, "--fresh", "--out", copied]
    one_line(call(capsys, *words), "No space left on device", "as it was")
    assert (copied / "model.safetensors").read_bytes() == before
    assert not [p for p in copied.rglob(".*") if p.name != ".lock"]


def test_a_file_that_is_cut_off_is_evaluated_at_the_widths_that_it_holds(capsys, copied):
    path = copied / "model.safetensors"
    whole = path.read_bytes()
    scores = {row["bits"]: row for row in json.loads(call(capsys, "evaluate", path, "--json")[1])["results"]}
    path.write_bytes(whole[:-100])  # of the last plane, which 8 bits alone need
    for words, widths in (((), [6, 4, 2]), (("--bits", "2,4"), [2, 4])):
        status, out, err = call(capsys, "evaluate", path, *words, "--json")
        assert status == 0 and json.loads(out)["results"] == [scores[width] for width in widths], err
    one_line(call(capsys, "evaluate", path, "--bits", "8,2"), "cut off", "serves 6 bits at most")
    mixed = path.with_name("mixed.json")
    mixed.write_text(json.dumps(dict.fromkeys(bs.widths(bs.load(path, bits=2)), 8)))
    one_line(call(capsys, "evaluate", path, "--assignment", mixed), "8 bits are not loaded")
    document = json.loads(call(capsys, "inspect", path, "--json")[1])
    planes = artifact.plane_bytes([layer.shape for layer in artifact.read_header(path).layers])
    assert document["held"] == [6, 4, 2] and document["code_bytes"] == 7 * planes
    named_otherwise = path.with_name("model.cut")
    shutil.copy(path, named_otherwise)
    assert call(capsys, "evaluate", named_otherwise, "--json")[0] == 0
    planes = artifact.plane_bytes([layer.shape for layer in artifact.read_header(path).layers])
    path.write_bytes(whole[: -6 * planes])
    one_line(call(capsys, "evaluate", path), "serves no width")


def test_a_missing_extra_is_told_in_one_line():
    code = "import sys; sys.modules['typer'] = None\nfrom bitswitch.start import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "bitswitch: typer is not installed: pip install 'bitswitch[train]'\n"


def test_bad_artifacts(capsys, copied):
    path = copied / "model.safetensors"
    whole = path.read_bytes()
    one_line(call(capsys, "evaluate", path, "--bits", "8,5"), "has no width 5", "8, 6, 4, 2")
    one_line(call(capsys, "evaluate", path, "--bits", "eight"), "--bits eight")
    one_line(call(capsys, "evaluate", path, "--split", "train"), "--split train")
    one_line(call(capsys, "evaluate", path, "--data", "nothing"), "no data set is named 'nothing'")
    one_line(call(capsys, "evaluate", path, "--model", "resnet18"), "does not take")
    one_line(call(capsys, "evaluate", copied), "is a folder")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    one_line(call(capsys, "evaluate", path), "altered")
    path.write_bytes(whole.replace(b'\\"version\\":2,', b'\\"version\\":7,'))
    one_line(call(capsys, "inspect", path), "version 7", "upgrade bitswitch")


def test_out_of_memory_names_the_settings_to_change(capsys, tmp_path, monkeypatch):
    def exhausted(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("bitswitch.pipeline.training.FloatObjective", exhausted)
    one_line(call(capsys, "run", "digits", "--out", tmp_path), "out of memory", "pretrain.micro_batches", "batch_size")


@pytest.mark.parametrize("damage", ["no compiler", "*.so", "*.main.so"])
def test_a_compilation_that_fails_says_what_to_do(tmp_path, damage):
    cache = tmp_path / "cache"
    words = ["pretrain", "digits", *SHORT, "pretrain.compile=true", "pretrain.epochs=1", "--out", tmp_path / "run"]
    command = [sys.executable, "-m", "bitswitch", *map(str, words)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    if damage == "no compiler":
        environment["CXX"] = str(tmp_path / "no-compiler")
    else:
        subprocess.run(command, env=environment, check=True, capture_output=True)
        for library in cache.rglob(damage):
            library.write_bytes(b"")
        command += ["--fresh"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("bitswitch: ")]
    assert "torch.compile failed in stage pretrain" in line and f"delete {cache}" in line and "compile=false" in line
    assert "Traceback" not in done.stderr


def test_a_users_own_network(capsys, tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "def build(width=8):\n"
        "    layers = [nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()]\n"
        "    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, 10))\n"
    )
    (tmp_path / "my.yaml").write_text(
        "bits: [4, 2]\nmodel: {name: 'mynet:build', args: {width: 4}}\ndata: {name: digits}\n"
        "pretrain: {epochs: 1, batch_size: 64, lr: 0.05}\ntrain: {epochs: 1, batch_size: 64}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "run", "my.yaml", "--json")[0] == 0
    file = tmp_path / "runs" / "my" / "model.safetensors"
    one_line(call(capsys, "evaluate", file), "no code is imported", "--model")
    assert call(capsys, "evaluate", file, "--model", "mynet:build", "--json")[0] == 0


def test_json_goes_alone_to_stdout(capsys, done, tmp_path):
    for words in (["inspect", done / "model.safetensors"], ["recipes"], ["recipes", "show", "digits"], ["version"]):
        status, out, _ = call(capsys, *words, "--json")
        assert status == 0 and isinstance(json.loads(out), dict)
    call(capsys, "inspect", done / "model.safetensors", "--json", "--out", tmp_path)
    document = json.loads((tmp_path / "inspect.json").read_text())
    header, tensors = artifact.read(done / "model.safetensors")
    assert document["code_bytes"] + document["other_bytes"] == sum(t.nbytes for t in tensors.values())
    assert [layer["name"] for layer in document["layers"]] == [layer.name for layer in header.layers]


def test_names_in_a_file_do_not_steer_the_terminal(capsys, tmp_path):
    network = torch.nn.Sequential(OrderedDict((name, torch.nn.Linear(4, 4)) for name in ("a", "b\x1b[31m", "c")))
    bs.save(bs.quantize(network, example_inputs=torch.ones(2, 4)), tmp_path / "m")
    status, out, _ = call(capsys, "inspect", tmp_path / "m")
    assert status == 0 and "b?[31m" in out and "\x1b" not in out


def test_tables_are_readable(capsys, done):
    status, out, _ = call(capsys, "evaluate", done / "model.safetensors")
    assert status == 0 and all(text in out for text in ("8 bits", "2 bits", "top-1 %", "360"))
    status, out, _ = call(capsys, "inspect", done / "model.safetensors")
    assert status == 0 and "layer3.0.conv2" in out and "float_top1" in out
    assert {"digits", "cifar10-resnet20"} <= set(call(capsys, "recipes")[1].split())
    assert call(capsys)[0] == 0
    assert call(capsys, "--help")[0] == 0


def test_our_own_fault_exits_1(capsys, monkeypatch):
    monkeypatch.setattr("bitswitch.cli.program.recipe_names", lambda: 1 / 0)
    status, _, err = call(capsys, "recipes")
    assert status == 1 and "ZeroDivisionError" in err


def _killed(_worker):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_reader_of_images_that_was_killed_is_no_fault_of_ours(capsys, monkeypatch, tmp_path):
    def read(*_, **__):
        next(iter(DataLoader([0], num_workers=1, worker_init_fn=_killed)))

    monkeypatch.setattr("bitswitch.cli.program.recipe_names", read)
    one_line(call(capsys, "recipes"), "a process that reads images ended (DataLoader worker", "--shm-size), give more")
    monkeypatch.setattr("bitswitch.pipeline.execute", read)
    one_line(call(capsys, "run", "digits", "--out", tmp_path / "x"), "give more, or use fewer with data.workers")


def test_the_pass_over_test_shows_how_far_it_is(capsys, copied, monkeypatch):
    steps = steps_shown(monkeypatch)
    monkeypatch.setattr("bitswitch.pipeline.running._EVALUATION_BATCH", 50)
    assert call(capsys, "train", "digits", *SHORT, "--out", copied, "--fresh")[0] == 0
    (result,) = (json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()[-1:])
    batches = math.ceil(result["images"] / 50)
    assert batches > 2 and [one for one in steps if one[0] == "test"] == [("test", batches)] * batches


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["run", "digits"],
            "interrupted; the same command goes on from the last checkpoint, or the last stage that is done\n",
        ),
        (
            ["run", "digits", "--fresh"],
            "interrupted; the same command starts over; without --fresh it goes on from the last checkpoint, or the last stage "
            "that is done\n",
        ),
        (["recipes"], "interrupted\n"),
    ],
)
def test_interruption_exits_130(capsys, monkeypatch, tmp_path, words, told):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("bitswitch.cli.program.recipe_names", interrupt)
    monkeypatch.setattr("bitswitch.pipeline.execute", interrupt)
    monkeypatch.chdir(tmp_path)
    status, _, err = call(capsys, *words)
    assert status == 130 and err == told


def test_an_interruption_of_the_interruption_changes_nothing(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    def told(text):
        os.kill(os.getpid(), signal.SIGINT)
        print(text, file=sys.stderr)

    monkeypatch.setattr("bitswitch.cli.program.recipe_names", interrupt)
    monkeypatch.setattr("bitswitch.cli.program.errors", SimpleNamespace(print=told))
    assert call(capsys, "recipes") == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    "options",
    [
        ["pretrain.epochs=0"],
        ["train.channels_last=true", "train.precision=bfloat16", "train.micro_batches=2"],
        ["train.distillation.teacher=float", "train.record_scale_gradients=true"],
        ["train.distillation={teacher: highest, temperature: 4}", "train.order=accumulate"],
        ["train.forwards=2", "train.order=accumulate", "train.record_scale_gradients=true"],
        ["train.forwards=2", "train.distillation.teacher=highest"],
    ],
    ids=str,
)
def test_every_switch_ends_with_an_artifact(capsys, tmp_path, options):
    words = ["run", "digits", *SHORT, "pretrain.epochs=1", *options, "--out", tmp_path / "x", "--json"]
    status, out, err = call(capsys, *words)
    assert status == 0, err
    assert json.loads(out)["artifact"]
    if "train.record_scale_gradients=true" in options:
        rows = [json.loads(line) for line in (tmp_path / "x" / "scale_gradients.jsonl").read_text().splitlines()]
        assert len(rows) == 4 * 6 and {row["epoch"] for row in rows} == {0}
        assert all(row["gradient_norm"] > 0 for row in rows)


def test_a_rival_is_evaluated_from_its_checkpoint(capsys, tmp_path):
    words = ["run", "digits", *SHORT, "train.method=lsq", "--out", tmp_path / "x", "--json"]
    status, out, err = call(capsys, *words)
    assert status == 0 and json.loads(out)["artifact"] is None and "no artifact" in err
    assert not (tmp_path / "x" / "model.safetensors").exists()
    ended = {row["bits"]: row["top1"] for row in json.loads(out)["results"]}
    status, out, _ = call(capsys, "evaluate", tmp_path / "x" / "checkpoints" / "train.pt", "--json")
    assert {row["bits"]: row["top1"] for row in json.loads(out)["results"]} == {b: ended[b] for b in (8, 6, 4, 2)}


def test_confusion_and_recalibration(capsys, done):
    words = ["evaluate", done / "model.safetensors", "--bits", "8,2", "--confusion", "--recalibrate", "300", "--json"]
    status, out, _ = call(capsys, *words)
    document = json.loads(out)
    for row in document["results"]:
        matrix = torch.tensor(row["confusion"])
        assert matrix.shape == (10, 10) and int(matrix.sum()) == row["images"] == 360
        assert float(matrix.diag().sum()) / 3.6 == pytest.approx(row["top1"])
    assert status == 0 and document["provenance"]["recalibration_images"] == 300


def test_float_weights_of_others(capsys, done, tmp_path):
    from bitswitch.models import build

    torch.save({"state_dict": build("resnet18", {"num_classes": 10}).state_dict()}, tmp_path / "a.pt")
    one_line(call(capsys, "evaluate", tmp_path / "a.pt"), "name its network with --model")
    one_line(
        call(capsys, "evaluate", tmp_path / "a.pt", "--model", "cifar_resnet8", "--data", "digits"), "does not fit"
    )


def test_a_starting_checkpoint_counts_by_its_content(capsys, done, tmp_path):
    source = done / "checkpoints" / "pretrain.pt"
    first, second = shutil.copy(source, tmp_path / "a.pt"), shutil.copy(source, tmp_path / "b.pt")
    words = ["pretrain", "digits", "pretrain.epochs=0", "--out", tmp_path / "x", "--json"]
    status, out, _ = call(capsys, *words, f"pretrain.checkpoint={first}")
    assert status == 0
    reached = json.loads((done / "stages.json").read_text())["pretrain"]["result"]["float"]["top1"]
    assert json.loads(out)["results"][0]["top1"] == reached
    assert call(capsys, *words, f"pretrain.checkpoint={second}")[0] == 0
    state = torch.load(second, weights_only=True)
    state["model"]["linear.bias"] += 1
    torch.save(state, second)
    one_line(call(capsys, *words, f"pretrain.checkpoint={second}"), "checkpoint was another file", "--fresh")
    one_line(call(capsys, *words, "pretrain.checkpoint=nowhere.pt"), "nowhere.pt", "no such file")
    # Left out by a later stage, whose artifact would name none.
    train = ["train", "digits", "pretrain.epochs=0", *SHORT[1:], "--out", tmp_path / "x"]
    one_line(call(capsys, *train), "pretrain.checkpoint was a file, is none", "--fresh")
    assert call(capsys, *train, f"pretrain.checkpoint={first}")[0] == 0
    export = ["export", "digits", "pretrain.epochs=0", *SHORT[1:], "--out", tmp_path / "x"]
    one_line(call(capsys, *export), "pretrain.checkpoint was a file, is none")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints/pretrain.pt", "model.safetensors"])
def test_files_of_others_are_left_alone(capsys, tmp_path, name):
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    (tmp_path / ".download.partial").write_text("mine")
    one_line(call(capsys, "run", "digits", *SHORT, "--out", tmp_path), "no record of a run")
    assert mine.read_text() == "mine" and (tmp_path / ".download.partial").exists()


def test_a_bad_starting_checkpoint_costs_nothing(capsys, copied, tmp_path):
    before = snapshot(copied)
    (tmp_path / "noise.pt").write_bytes(b"noise")
    words = ["run", "digits", *SHORT, f"pretrain.checkpoint={tmp_path / 'noise.pt'}", "--fresh", "--out", copied]
    one_line(call(capsys, *words), "noise.pt is not a checkpoint")
    assert snapshot(copied) == before


@pytest.mark.parametrize("content", ["[]", "5", "null", '{"pretrain": {}}', "{", '{"pretrain": 5}'])
def test_damaged_records(capsys, copied, content):
    (copied / "stages.json").write_text(content)
    one_line(call(capsys, "run", "digits", *SHORT, "--out", copied), "stages.json is damaged", "--fresh")


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("model"),
        lambda s: s.pop("plan"),
        lambda s: s.update(epochs_done=99),
        lambda s: s.update(epochs_done="x"),
        lambda s: s.update(optimizers={}),
        lambda s: s["model"].pop("linear.bias"),
    ],
)
def test_a_checkpoint_of_something_else_is_not_taken_up(capsys, copied, change):
    path = copied / "checkpoints" / "train.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    records = json.loads((copied / "stages.json").read_text())
    records["train"]["done"] = False
    (copied / "stages.json").write_text(json.dumps(records))
    one_line(call(capsys, "run", "digits", *SHORT, "--out", copied), "train.pt", "--fresh")


@pytest.mark.parametrize("content", [b"", b"noise", b"\x80\x02.", b"root:x:0:0:root:/root:/bin/bash\n"])
def test_files_that_are_no_checkpoints(capsys, tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    one_line(call(capsys, "evaluate", tmp_path / "a.pt", "--model", "cifar_resnet8", "--data", "digits"), "a.pt")


def test_another_number_of_ranks_is_told(capsys, copied):
    path = copied / "checkpoints" / "train.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"ranks": 3}, path)
    records = json.loads((copied / "stages.json").read_text())
    records["train"]["done"] = False
    (copied / "stages.json").write_text(json.dumps(records))
    status, _, err = call(capsys, "run", "digits", *SHORT, "--out", copied, "--json")
    assert status == 0 and "taken up after epoch 1 of 1; it ran on 3 processes before, on 1 now" in err


def test_a_part_of_one_image_is_too_small_for_batch_normalization(capsys, tmp_path):
    (tmp_path / "narrow_network.py").write_text(
        "from torch import nn\n"
        "def net(num_classes=10):\n"
        "    first = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, bias=False), nn.AdaptiveAvgPool2d(1)]\n"
        "    return nn.Sequential(*first, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, num_classes))\n"
    )
    words = ["run", "digits", *SHORT, "model.name=narrow_network:net", "model.args={}", "pretrain.batch_size=32"]
    sys.path.insert(0, str(tmp_path))
    try:
        result = call(capsys, *words, "pretrain.micro_batches=32", "--out", tmp_path / "x")
    finally:
        sys.path.remove(str(tmp_path))
    one_line(result, "stage pretrain", "batch normalization", "lower pretrain.micro_batches")


def test_weights_that_bring_an_architecture_of_their_own_are_refused(capsys, tmp_path, monkeypatch):
    (tmp_path / "own_weights.py").write_text(
        "from bitswitch.models import build\n"
        "class Scaled(type(build('cifar_resnet8', {'in_channels': 1}))):\n"
        "    def forward(self, x): return super().forward(2 * x)\n"
        "def net(num_classes, weights=None, as_with_weights=False):\n"
        "    network = build('cifar_resnet8', {'in_channels': 1, 'num_classes': num_classes})\n"
        "    if weights or as_with_weights: network.__class__ = Scaled\n"
        "    return network\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["pretrain", "digits", "pretrain.epochs=0", "model.name=own_weights:net"]
    args = "num_classes: 10, weights: V1"
    one_line(call(capsys, *words, f"model.args={{{args}}}", "--out", tmp_path / "a"), "another network with weights=V1")
    status, _, err = call(capsys, *words, f"model.args={{{args}, as_with_weights: true}}", "--out", tmp_path / "b")
    assert status == 0, err


def test_a_path_with_brackets_is_shown_as_it_is(capsys, done, tmp_path):
    for name in ("[baseline]", "[/old]"):
        path = tmp_path / name / "model.safetensors"
        path.parent.mkdir(parents=True)
        shutil.copy(done / "model.safetensors", path)
        status, out, err = call(capsys, "inspect", path)
        assert status == 0 and str(path) in "".join(out.split("\n")), err


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_the_shell_closed_go_nowhere(closed):
    done = subprocess.run(f"{sys.executable} -m bitswitch version {closed}", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "" if closed[0] == ">" else f"{__version__}\n", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["recipes"], ["recipes", "--json"]], ids=" ".join)
def test_a_stdout_that_takes_nothing_is_no_fault_of_ours(words, unbuffered):
    command = [sys.executable, "-m", "bitswitch", *words]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    read, closed = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, env=environment, text=True)
    os.close(closed)
    assert (done.returncode, done.stderr) == (0, "")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, text=True)
    assert (done.returncode, done.stderr) == (2, "bitswitch: cannot write to stdout: No space left on device\n")


def test_letters_that_stdout_cannot_write_are_escaped(done, tmp_path):
    path = Path(shutil.copy(done / "model.safetensors", tmp_path / "\u043c.safetensors"))
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    shown = subprocess.run([sys.executable, "-m", "bitswitch", "inspect", path], capture_output=True, env=environment)
    assert shown.returncode == 0 and b"\\u043c.safetensors" in shown.stdout.replace(b"\n", b"")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train.eta={8: 1.0, 2: 1.0}"], ["train.eta", "bits=[8, 6, 4, 2]"]),
        (["data.root=2024-02-30"], ["data.root", "not YAML"]),
        (["data.root=/data/set #2"], ["data.root", "comment: quote"]),
        (["data.root=2024"], ["data.root", "quote it, data.root=\"'2024'\""]),
        (["model.args={num_classes: -1}"], ["cannot be built"]),
    ],
)
def test_values_that_no_run_can_have_are_refused_before_anything_is_done(capsys, tmp_path, words, expected):
    one_line(call(capsys, "run", "digits", *words, "--out", tmp_path / "x"), *expected)
    assert not (tmp_path / "x" / "stages.json").exists()


def test_an_override_of_one_part_leaves_another_that_shares_its_mapping(tmp_path):
    recipe = tmp_path / "r.yaml"
    # Where a recipe extends another, parts are copied as they are laid over it.
    data = "model: {name: cifar_resnet8, args: {in_channels: 1}}\ndata: {name: digits}\n"
    recipe.write_text(f"{data}train: &both {{epochs: 5, batch_size: 64}}\nsupernet: *both\n")
    found = load_recipe(str(recipe), ["train.epochs=1"])
    assert (found.train.epochs, found.supernet.epochs) == (1, 5)


@pytest.mark.parametrize("recipe", ["mine", "some/folder/mine.yaml", "/mine.yml"])
def test_a_run_without_a_folder_goes_to_one_of_the_recipes_name(recipe):
    assert run_directory(None, recipe).path == Path("runs/mine")
    assert run_directory(Path("out"), recipe).path == Path("out")


def test_advice_names_the_recipe_as_it_was_typed(capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: digits\n")
    out = tmp_path / "x"
    one_line(call(capsys, "train", recipe, "--out", out), f"bitswitch pretrain {recipe} --out {out} does it")


@pytest.fixture
def own_network(tmp_path, monkeypatch):
    """A function that writes a module with a function `net` and gives the words for it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "networks_of_a_test", raising=False)

    def write(code):
        (tmp_path / "networks_of_a_test.py").write_text(code)
        return ["model.name=networks_of_a_test:net", "model.args={}"]

    return write


BODY = """
import random
import numpy
import torch
from torch import nn


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.a(x.flatten(1)).relu()
        return self.d(self.c(self.b(x).relu()).relu())


"""


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def forward(self, x): return {'out': super().forward(x)}", ["gives a dict, and a tensor of logits"]),
        (
            "def forward(self, x):\n        y = super().forward(x)\n        return (y, y) if self.training else y",
            ["gives a tuple in training", "aux_logits=false"],
        ),
        ("def forward(self, x): return self.d(None)", ["cannot take images of [1, 8, 8]: TypeError"]),
        ("def forward(self, x): raise KeyError", ["cannot take images of [1, 8, 8]: KeyError"]),
        (
            "def get_extra_state(self): return {'a': 1}\n    def set_extra_state(self, x): pass",
            ["_extra_state", "a dict"],
        ),
        (
            "def __init__(self):\n        super().__init__()\n        self.c = nn.LazyLinear(8)",
            ["has lazy modules", "give them their sizes"],
        ),
    ],
    ids=["dict", "tuple", "type", "key", "extra state", "lazy"],
)
def test_networks_that_cannot_be_trained_are_refused_before_anything(capsys, tmp_path, own_network, code, words):
    named = own_network(f"{BODY}class Own(Body):\n    {code}\n\n\ndef net(): return Own()\n")
    one_line(call(capsys, "run", "digits", *SHORT, *named, "--out", tmp_path / "x"), "networks_of_a_test:net", *words)
    assert not (tmp_path / "x" / "checkpoints").exists()


def test_a_network_that_draws_from_other_generators_is_repeated(capsys, tmp_path, own_network):
    drawn = "random.random() * numpy.random.rand()"
    own = f"class Own(Body):\n    def forward(self, x):\n        return super().forward(x) * {drawn}\n"
    named = own_network(f"{BODY}{own}\n\ndef net(): return Own()\n")
    rows = []
    for out in ("a", "b"):
        assert call(capsys, "pretrain", "digits", *SHORT, *named, "--out", tmp_path / out)[0] == 0
        rows.append((tmp_path / out / "metrics.jsonl").read_text())
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("train.eta=-1", "train.eta=-1: a learning rate's factor is not negative"),
        ("train.eta={8: 1, 6: 1, 4: 1, 2: -1}", "a learning rate's factor is not negative"),
        ("train.micro_batches=3", "train.micro_batches=3: a rank's batch of 64 images cannot be divided"),
        ("train.distillation.temperature=3", "set teacher, too"),
        ("train.distillation={weight: 1}", "set teacher, too"),
        ("data.cache=~nobody-of-that-name/x", "no such user's home"),
    ],
)
def test_values_that_only_a_later_stage_reads_are_refused_before_anything(capsys, tmp_path, word, told):
    images = tmp_path / "images"
    where = []
    if word.startswith("data"):
        for split in ("train", "test"):
            (images / split / "a").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(images / split / "a" / "1.png")
        where = [f"data={{name: image_folder, root: {images}}}"]
    one_line(call(capsys, "run", "digits", *SHORT, *where, "train.batch_size=64", word, "--out", tmp_path / "x"), told)
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").glob("checkpoints/*"))


def test_what_to_do_about_a_stage_made_otherwise_keeps_the_others(capsys, copied):
    result = call(capsys, "run", "digits", *SHORT, "train.lr=1e-5", "--out", copied)
    one_line(
        result, "holds a train stage made otherwise (train.lr was", f"bitswitch train digits --out {copied} --fresh"
    )


@pytest.mark.parametrize("words", [["batch_size=2048", "micro_batches=3"], ["epochs=0", "micro_batches=3"]], ids=str)
def test_micro_batches_are_parts_of_the_batches_that_there_are(capsys, tmp_path, words):
    """Of 1293 images in all, or of none."""
    status, _, err = call(
        capsys, "pretrain", "digits", *SHORT, *(f"pretrain.{word}" for word in words), "--out", tmp_path
    )
    assert status == 0, err


@pytest.mark.parametrize(
    "forward",
    [
        # More than the two images that are tried.
        "def forward(self, x): return super().forward(x.unflatten(0, (4, -1)).flatten(0, 1) if self.training else x)",
        # Gradients of its own.
        "def forward(self, x):\n        y = super().forward(x)\n"
        "        if not self.training: return y\n"
        "        return y + 0 * torch.autograd.grad(y.sum(), self.a.weight, retain_graph=True)[0].sum()",
    ],
    ids=["four parts", "gradients"],
)
def test_networks_that_only_train_in_batches_of_their_own_train(capsys, tmp_path, own_network, forward):
    named = own_network(f"{BODY}class Own(Body):\n    {forward}\n\n\ndef net(): return Own()\n")
    status, _, err = call(capsys, "pretrain", "digits", *SHORT, *named, "--out", tmp_path / "x")
    assert status == 0, err


def test_a_run_of_an_own_recipe_is_exported(capsys, copied, tmp_path):
    (tmp_path / "own.yaml").write_text("extends: digits\npretrain: {epochs: 2}\ntrain: {epochs: 1}\nsupernet: null\n")
    status, out, err = call(capsys, "export", tmp_path / "own.yaml", "--out", copied, "--bits", 8, "--json")
    assert status == 0, err
    assert [Path(row["file"]).parent for row in json.loads(out)["files"]] == [copied / "onnx"]


def test_what_an_earlier_run_left_is_not_exported(capsys, copied):
    shutil.copy(copied / "model.safetensors", copied / "supernet.safetensors")
    words = ["export", "digits", *SHORT[:2], "--out", copied, "--bits", 8, "--json"]
    status, out, err = call(capsys, *words)
    assert status == 0, err
    assert [Path(row["file"]).name for row in json.loads(out)["files"]] == ["model-8bit.onnx"]
    one_line(call(capsys, *words, "--seed", 7), "holds a pretrain stage made otherwise (seed was 0, is 7)")


def test_a_supernet_of_another_joint_network_is_not_exported(capsys, copied):
    """`train --fresh` after a SuperNet's training."""
    words, records = ["digits", *SHORT[:2]], json.loads((copied / "stages.json").read_text())
    recipe = load_recipe(*words[:1], words[1:])
    made = {"done": True, "inputs": {"train": "0" * 64}, "outputs": {}, "result": {}}
    inputs = {"pretrain": records["train"]["inputs"]["pretrain"]}
    records["sensitivity"] = made | {"config": config_of(recipe, "sensitivity"), "inputs": inputs}
    records["supernet"] = made | {"config": config_of(recipe, "supernet")}
    (copied / "stages.json").write_text(json.dumps(records))
    shutil.copy(copied / "model.safetensors", copied / "supernet.safetensors")
    one_line(
        call(capsys, "export", *words, "--out", copied), "a supernet stage made otherwise (train was done again since)"
    )
    records["train"]["done"] = False
    (copied / "stages.json").write_text(json.dumps(records))
    one_line(call(capsys, "export", *words, "--out", copied), "holds a train stage made otherwise (it is not done)")


def test_a_part_that_was_printed_as_null_takes_overrides(tmp_path):
    (tmp_path / "printed.yaml").write_text(to_yaml(load_recipe("digits", ["supernet=null"])))
    recipe = load_recipe(str(tmp_path / "printed.yaml"), ["supernet.epochs=3"])
    assert recipe.supernet is not None and recipe.supernet.epochs == 3


@pytest.mark.parametrize(
    ("moves", "told"),
    [("self.own += 1", True), ("self.own = None", False), ("del self.own", False), ("self.own = self.own + 0", False)],
)
def test_a_buffer_that_a_checkpoint_lacks_is_told(capsys, tmp_path, own_network, moves, told):
    code = (
        "def __init__(self):\n        super().__init__()\n"
        "        self.register_buffer('own', torch.tensor([float('nan'), 0.0]), persistent=False)\n"
        "        self.once = True\n"
        "    def forward(self, x):\n        if self.training and self.once:\n"
        f"            self.once = False\n            {moves}\n        return super().forward(x)"
    )
    named = own_network(f"import torch\n{BODY}class Own(Body):\n    {code}\n\n\ndef net(): return Own()\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert call(capsys, "run", "digits", *SHORT, *named, "--out", tmp_path / "x")[0] == 0
    messages = [str(one.message) for one in caught if "moves the buffer 'own' in training" in str(one.message)]
    assert len(messages) == told


def test_a_checkpoint_that_cannot_be_read_says_what_to_do(capsys, copied):
    path = copied / "checkpoints" / "train.pt"
    path.write_bytes(path.read_bytes()[:1000])
    records = json.loads((copied / "stages.json").read_text())
    records["train"] |= {"done": False, "outputs": {}, "result": None}
    (copied / "stages.json").write_text(json.dumps(records))
    result = call(capsys, "train", "digits", *SHORT, "--out", copied)
    one_line(result, "train.pt is neither", "do its stage again with --fresh")


def test_images_that_a_network_does_not_take_are_told(capsys, tmp_path):
    torch.manual_seed(0)
    network = {"name": "cifar_resnet8", "args": {}}
    model = bs.quantize(build(**network), bits=(8, 2), example_inputs=torch.rand(4, 3, 8, 8))
    bs.save(model, tmp_path / "m.safetensors", network=network)
    with pytest.warns(UserWarning, match="does not say how its images are made ready"):
        result = call(capsys, "evaluate", tmp_path / "m.safetensors", "--data", "digits")
    one_line(result, "does not take images of [1, 8, 8], as digits has them", "expected input", "--data")


def test_a_choice_of_too_many_digits_is_told(capsys, copied):
    choices = {"choices": [{"assignment": dict.fromkeys(bs.widths(bs.load(copied / "model.safetensors")), 8)}]}
    choices["choices"][0] |= {"cost": {"bits": 8}, "damage": 0, "top1": None}
    (copied / "f.json").write_text(json.dumps(choices))
    words = ["evaluate", copied / "model.safetensors", "--assignment"]
    assert call(capsys, *words, f"{copied / 'f.json'}#0")[0] == 0
    one_line(call(capsys, *words, f"{copied / 'f.json'}#{'1' * 5000}"), "has choices #0 to #0")
