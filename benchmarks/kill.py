"""Killing a run does not change its result.

An undisturbed `bitswitch run` of a short recipe, then the same killed (SIGKILL) at random moments and started again each
time, until the wanted number of kills is reached and a last start ends by itself. The artifact, the metrics and the models
in the checkpoints must equal the undisturbed run's, bit for bit; a changed override must be refused.

    python benchmarks/kill.py [--kills 20] [--rounds 4]                                # digits
    python benchmarks/kill.py --images CIFAR_FOLDER [--ranks 2] [--kills 10]           # 2,000 images of a CIFAR-10 folder

With --ranks N the run goes through torchrun. With --images and one rank, one more run is killed and then taken up by two
ranks: it must end, and say what changed.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

MIXED = ["sensitivity.images=64", "supernet.epochs=4", "search.points=6"]
DIGITS = ["digits", "pretrain.epochs=6", "train.epochs=5", *MIXED]
CIFAR = ["cifar10-resnet20", "model.name=cifar_resnet8", "pretrain.epochs=3", "train.epochs=3"]


@dataclass(frozen=True)
class Case:
    """What is run: the words after `bitswitch run`, and on how many ranks."""

    words: list[str]
    ranks: int

    def command(self, out: Path, *overrides: str, ranks: int | None = None) -> list[str]:
        """The command that runs it into a folder."""
        ranks = ranks or self.ranks
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        return [sys.executable, *launch, "-m", "bitswitch", "run", *self.words, *overrides, "--out", str(out), "--json"]


def finish(command: list[str]) -> str:
    """Run to the end; what it said on stderr."""
    return subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True).stderr


def killed_after(command: list[str], seconds: float) -> bool:
    """Start and kill after so many seconds, all ranks at once; whether it was still running then."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        # torchrun gives every rank a session of its own, so that killing its group would spare them.
        for one in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        process.wait()
        return True


def descendants(parent: int) -> list[int]:
    """The processes that a process started, and those that they started (Linux)."""
    found = []
    for thread in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in map(int, thread.read_text().split()):
            found += [child, *descendants(child)]
    return found


def model_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def differences(one: Path, other: Path) -> list[str]:
    found = [
        name
        for name in ("model.safetensors", "metrics.jsonl", "sensitivity.json", "frontier.json", "supernet.safetensors")
        if (one / name).exists() and (one / name).read_bytes() != (other / name).read_bytes()
    ]
    for stage in ("pretrain", "train", "supernet"):
        if not (one / "checkpoints" / f"{stage}.pt").exists():
            continue
        a, b = (model_of(run / "checkpoints" / f"{stage}.pt") for run in (one, other))
        found += [f"{stage}: {name}" for name in a if not torch.equal(a[name], b[name])]
    return found


def small_cifar(source: Path, target: Path) -> None:
    """170 training and 30 test images of each class."""
    for split, count in (("train", 170), ("test", 30)):
        for folder in sorted((source / split).iterdir()):
            (target / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                shutil.copy(image, target / split / folder.name)


def kill_round(case: Case, out: Path, kills: int, longest: float, moments: random.Random, label: str) -> None:
    done = 0
    while done < kills:
        moment = moments.uniform(0.1, longest)
        if killed_after(case.command(out), moment):
            done += 1
            left = sorted(p.name for p in (out / "checkpoints").glob("*.pt"))
            print(f"{label}: killed after {moment:.2f} s, checkpoints {left}", flush=True)
        else:
            shutil.rmtree(out)
            print(f"{label}: ended by itself before {moment:.2f} s, started over", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    work = Path(tempfile.mkdtemp(prefix="bitswitch-kill-"))
    words = DIGITS
    if options.images:
        small_cifar(options.images, work / "images")
        words = [*CIFAR, f"data.root={work / 'images'}", f"data.cache={work / 'cache'}"]
    case = Case(words, options.ranks)
    start = time.monotonic()
    finish(case.command(work / "whole"))
    whole = time.monotonic() - start
    print(f"undisturbed, {options.ranks} rank(s): {whole:.1f} s", flush=True)
    bad, kills = 0, 0
    for turn in range(options.rounds):
        wanted = options.kills // options.rounds + (turn < options.kills % options.rounds)
        out = work / f"killed-{turn}"
        kill_round(case, out, wanted, 0.9 * whole, moments, f"round {turn}")
        kills += wanted
        finish(case.command(out))
        found = differences(work / "whole", out)
        bad += bool(found)
        print(f"round {turn}: {'DIFFERS in ' + ', '.join(found[:5]) if found else 'equal, bit for bit'}", flush=True)
    changed = subprocess.run(case.command(work / "whole", "train.lr=0.002"), capture_output=True, text=True)
    refused = changed.returncode != 0 and "train.lr was" in changed.stderr
    told = next((line for line in changed.stderr.splitlines() if "train.lr was" in line), changed.stderr[-300:])
    print(f"a changed override: {'refused' if refused else 'NOT REFUSED'}: {told}")
    if options.images and options.ranks == 1:
        out = work / "other-ranks"
        kill_round(case, out, 1, 0.9 * whole, moments, "other ranks")
        print("taken up by 2 ranks:", finish(case.command(out, ranks=2)).strip())
    print(f"{kills} kills in {options.rounds} rounds, {bad} rounds differ")
    shutil.rmtree(work)
    sys.exit(bool(bad) or not refused)


if __name__ == "__main__":
    main()
