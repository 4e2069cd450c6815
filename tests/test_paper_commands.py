"""What the paper's README says can be typed, on digits."""

import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ROOT / "code"
pytestmark = pytest.mark.skipif(not CODE.is_dir(), reason="an installed package has no code/")


def call(capfd, monkeypatch, program, *words):
    """(exit status, the bitswitch command it printed, stderr after it)."""
    monkeypatch.setattr(sys, "argv", [str(CODE / program), *map(str, words)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(CODE / program), run_name="__main__")
    _, err = capfd.readouterr()
    first, _, rest = err.partition("\n")
    return stop.value.code, first, rest


def test_every_program_on_digits(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "run"
    shared = ["--dataset", "digits", "--out", out]
    steps = [
        ("Multi_Precision/train.py", ["-bit_width_list=32", "--epochs", 2], "pretrain", "pretrain.epochs=2"),
        ("Multi_Precision/train.py", ["-bit_width_list=32", "--evaluate"], "evaluate", "pretrain.pt"),
        ("Multi_Precision/train.py", ["-bit_width_list=8,4,2", "--epochs", 1], "train", "pretrain.epochs=2"),
        ("Multi_Precision/train.py", ["-bit_width_list=8,2", "--evaluate"], "evaluate", "--bits"),
        ("Super_net_solve/cal_hessian.py", ["-b", 64], "sensitivity", "sensitivity.batch_size=64"),
        ("Super_net/train.py", ["--epochs", 1], "supernet", "supernet.epochs=1"),
        ("Super_net_solve/cal_hessian.py", ["--cal_solve"], "search", "supernet.epochs=1"),
        ("Super_net_solve/cal_hessian.py", ["--evaluate"], "evaluate", "frontier.json"),
    ]
    for program, words, command, part in steps:
        status, printed, err = call(capfd, monkeypatch, program, *shared, *words)
        assert status == 0, (program, words, err)
        typed = shlex.split(printed)
        assert typed[:2] == ["bitswitch", command] and any(part in word for word in typed), printed
    assert json.loads((out / "frontier.json").read_text())["choices"]
    assert (out / "supernet.safetensors").is_file() and (out / "model.safetensors").is_file()


def test_local_ranks_are_spawned(capfd, monkeypatch, tmp_path):
    launched = []
    monkeypatch.setattr("os.execv", lambda *given: (launched.append(given), sys.exit(0)))
    words = ["--dataset", "digits", "--out", tmp_path, "-bit_width_list=32", "--multiprocessing_distributed"]
    status, printed, _ = call(capfd, monkeypatch, "Multi_Precision/train.py", *words, "--ranks", 2)
    assert status == 0 and printed.startswith("torchrun --standalone --nproc-per-node 2 -m bitswitch pretrain digits")
    ((program, command),) = launched
    assert program == sys.executable and command[1:7] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"),
    ]


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        (
            "Multi_Precision/train.py",
            ["--dataset", "imagenet", "--arch", "resnet20"],
            "no recipe for imagenet resnet20",
        ),
        ("Super_net_solve/cal_hessian.py", ["--dataset", "digits", "--epochs", "3"], "--epochs does not apply"),
        ("Super_net/train.py", ["--dataset", "digits"], "stage pretrain is not done"),
        ("Multi_Precision/train.py", ["--dataset", "digits", "-bit_width_list=9,8"], "9 is not a bit-width"),
        ("Multi_Precision/train.py", ["--pretrained", "a.pt"], "--pretrained does not apply to train"),
        ("Multi_Precision/train.py", ["--evaluate", "--epochs", "3"], "--epochs does not apply with --evaluate"),
        ("Multi_Precision/train.py", ["--ranks", "2"], "go with --multiprocessing_distributed"),
        ("Multi_Precision/train.py", ["--multiprocessing_distributed", "--ranks", "0"], "--ranks 0"),
    ],
)
def test_mistakes(capfd, monkeypatch, tmp_path, program, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program, *words])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(CODE / program), run_name="__main__")
    assert stop.value.code != 0
    assert message in capfd.readouterr().err + str(stop.value.code)


def test_a_folder_of_another_network_or_data_is_refused_and_its_seed_is_kept(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program = "Multi_Precision/train.py"
    words = ["--dataset", "digits", "--out", tmp_path / "a", "--epochs", 1]
    assert call(capfd, monkeypatch, program, *words, "-bit_width_list=32", "--seed", 3)[0] == 0
    status, printed, err = call(capfd, monkeypatch, program, *words, "-bit_width_list=8,2")
    assert status == 0 and printed.endswith("--seed 3"), err
    status, printed, _ = call(capfd, monkeypatch, program, "--out", tmp_path / "a", "-bit_width_list=8,2")
    assert status == 2 and "holds a run of cifar_resnet8 on digits: name another folder with --out" in printed


def test_a_supernet_has_the_schedule_of_the_papers(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["--dataset", "imagenet", "--data", tmp_path]
    _, printed, _ = call(capfd, monkeypatch, "Super_net/train.py", *words)
    (part,) = (word for word in shlex.split(printed) if word.startswith("supernet="))
    assert json.loads(part.partition("=")[2]) == {"epochs": 90, "batch_size": 256, "lr": 5e-4, "weight_decay": 5e-5}


def test_as_it_is_typed(tmp_path):
    command = [sys.executable, "code/Super_net_solve/cal_hessian.py", "--help"]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "--cal_solve" in shown and "--evaluate" in shown
