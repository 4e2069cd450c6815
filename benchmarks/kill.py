"""Killing a run does not change its result.

An undisturbed `bitswitch run` of a short recipe, all five stages, then the same killed (SIGKILL) at random moments and
started again each time, until it ends by itself; and again from nothing, until the wanted number of kills is reached. Every
time the artifacts, the metrics, traces and frontier and the models in the checkpoints must equal the undisturbed run's, bit
for bit; a changed override must be refused.

    python benchmarks/kill.py [--kills 20] [--json OUT.json]                           # digits
    python benchmarks/kill.py --images CIFAR_FOLDER [...]                              # 2,000 images of a CIFAR-10 folder

With --images the kills fall on a run in one process, then on one in two ranks (torchrun); between them one more run is killed
in the midst of a stage of many widths, and taken up by two ranks: it must end, and say what changed.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import result
from bitswitch.machine import machine
from bitswitch.pipeline import choose_device

MIXED = ["sensitivity.images=256", "supernet.epochs=6", "search.points=16"]
DIGITS = ["digits", "pretrain.epochs=6", "train.epochs=5", *MIXED]
CIFAR = ["cifar10-resnet20-mixed", "model.name=cifar_resnet8", "pretrain.epochs=3", "train.epochs=3", *MIXED]
FILES = ("model.safetensors", "metrics.jsonl", "sensitivity.json", "frontier.json", "supernet.safetensors")
CHECKPOINTS = ("pretrain", "train", "supernet")
# A kill comes at most this share of the whole run's time after a start: so that a run takes several.
LONGEST = 0.5
LOADING = "loading"
STAGES = (LOADING, "pretrain", "train", "sensitivity", "supernet", "search")


@dataclass(frozen=True)
class Case:
    """What is run: the words after `bitswitch run`, and on how many ranks."""

    name: str
    words: list[str]
    ranks: int = 1

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
        if status := process.wait(seconds):
            raise subprocess.CalledProcessError(status, command)
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


def stage_of(out: Path, started: float) -> str:
    """The stage in which a run that started then was killed; `loading` where it had not yet begun to work."""
    prepared = out / "config.yaml"  # every start writes it
    if not prepared.exists() or prepared.stat().st_mtime < started:
        return LOADING
    records = json.loads((out / "stages.json").read_text())
    begun = [stage for stage, record in records.items() if not record["done"]]
    return begun[0] if begun else LOADING


def epochs_done(out: Path, stage: str) -> int:
    checkpoint = out / "checkpoints" / f"{stage}.pt"
    return torch.load(checkpoint, weights_only=True)["epochs_done"] if checkpoint.exists() else 0


def model_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def differences(one: Path, other: Path) -> list[str]:
    found = [name for name in FILES if (one / name).read_bytes() != (other / name).read_bytes()]
    for stage in CHECKPOINTS:
        a, b = (model_of(run / "checkpoints" / f"{stage}.pt") for run in (one, other))
        found += [
            f"{stage}: {name}" for name in a.keys() | b.keys() if name not in a or not torch.equal(a[name], b[name])
        ]
    return found


def small_cifar(source: Path, target: Path) -> None:
    """170 training and 30 test images of each class."""
    for split, count in (("train", 170), ("test", 30)):
        for folder in sorted((source / split).iterdir()):
            (target / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                shutil.copy(image, target / split / folder.name)


def kill_until_it_ends(case: Case, out: Path, kills: int, longest: float, moments: random.Random) -> list[str]:
    """Start a run and kill it, again and again, at most so often; the stages in which it was killed. At the end it is whole."""
    fell: list[str] = []
    while len(fell) < kills:
        moment, started = moments.uniform(0.1, longest), time.time()
        if not killed_after(case.command(out), moment):
            return fell
        stage = stage_of(out, started)
        fell.append(stage)
        print(f"  killed after {moment:.2f} s in {stage}, {epochs_done(out, stage)} epochs of it done", flush=True)
    finish(case.command(out))
    return fell


def refused(case: Case, out: Path) -> bool:
    """Whether a changed override is, with a word on what changed."""
    changed = subprocess.run(case.command(out, "train.lr=0.002"), capture_output=True, text=True)
    told = next((line for line in changed.stderr.splitlines() if "train.lr was" in line), None)
    print(f"a changed override: {told or 'NOT REFUSED'}", flush=True)
    return changed.returncode != 0 and told is not None


def run(case: Case, work: Path, kills: int, moments: random.Random) -> dict[str, Any]:
    """All kills of a case."""
    start = time.monotonic()
    finish(case.command(work / "whole"))
    whole = time.monotonic() - start
    print(f"{case.name}, undisturbed: {whole:.1f} s", flush=True)
    fell: list[list[str]] = []
    different: list[list[str]] = []
    while (left := kills - sum(map(len, fell))) > 0:
        out = work / f"killed-{len(fell)}"
        fell.append(kill_until_it_ends(case, out, left, LONGEST * whole, moments))
        different.append(differences(work / "whole", out))
        found = "DIFFERS in " + ", ".join(different[-1][:5]) if different[-1] else "equal, bit for bit"
        print(f"{case.name}, run {len(fell)}, killed {len(fell[-1])} times: {found}", flush=True)
        shutil.rmtree(out)
    return {
        "case": case.name,
        "seconds": whole,
        "fell": fell,
        "different": different,
        "refused": refused(case, work / "whole"),
    }


def taken_up_by_two(case: Case, out: Path, longest: float, moments: random.Random) -> str:
    """Kill a run of one process in the midst of the joint or the SuperNet stage; what two ranks say that end it."""
    while True:
        shutil.rmtree(out, ignore_errors=True)
        started = time.time()
        killed = killed_after(case.command(out), moments.uniform(0.3, 0.9) * longest)
        stage = stage_of(out, started) if killed else LOADING
        if stage in ("train", "supernet") and epochs_done(out, stage):
            return finish(case.command(out, ranks=2)).strip()


def cases(images: Path | None, work: Path) -> list[Case]:
    if images is None:
        return [Case("digits", DIGITS)]
    small_cifar(images, work / "images")
    words = [*CIFAR, f"data.root={work / 'images'}", f"data.cache={work / 'cache'}"]
    return [Case("2,000 CIFAR-10 images", words), Case("2,000 CIFAR-10 images, 2 ranks", words, ranks=2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="for each case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    told = None
    with tempfile.TemporaryDirectory(prefix="bitswitch-kill-") as folder:
        work = Path(folder)
        found = []
        for number, case in enumerate(cases(options.images, work)):
            found.append(run(case, work / str(number), options.kills, moments))
            if options.images and number == 0:
                told = taken_up_by_two(case, work / "other-ranks", found[-1]["seconds"], moments)
                print(f"taken up by 2 ranks: {told}", flush=True)
    rows = [row(one) for one in found]
    print(*rows, sep="\n")
    if options.json:
        write(options, rows, found, told)
    sys.exit(any(any(one["different"]) or not one["refused"] for one in found))


def row(one: dict[str, Any]) -> list[Any]:
    fell = Counter(stage for stages in one["fell"] for stage in stages)
    return [one["case"], len(one["fell"]), *(fell[stage] for stage in STAGES), sum(map(bool, one["different"]))]


def write(options: argparse.Namespace, rows: list[list[Any]], found: list[dict[str, Any]], told: str | None) -> None:
    note = "Kills by the stage in which they fell; `loading` is the start of a process. Compared: both artifacts, metrics, "
    note += "traces, frontier, the models in all checkpoints."
    if told is not None:
        note += f" One more run was killed and taken up by two ranks, which said: {told}"
    result.write(
        options.json,
        title="Runs killed (SIGKILL) at random moments and started again, against the undisturbed run",
        # Its processes take a GPU where there is one.
        machine=machine(choose_device("auto")),
        data="cifar10-jpeg" if options.images else "digits",
        split="train, val, test",
        seeds=[options.seed],
        note=note,
        columns=["run", "runs", *(f"kills: {stage}" for stage in STAGES), "runs that differ"],
        rows=rows,
        measured=found,
    )


if __name__ == "__main__":
    result.run(main)
