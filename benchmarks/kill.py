"""Killing a run does not change its result.

An undisturbed `bitswitch run` of a short digits recipe, then the same killed (SIGKILL) at random moments and started again
each time, until the wanted number of kills is reached and a last start ends by itself. The artifact and the model in the
last checkpoint must equal the undisturbed run's, bit for bit; a changed override must be refused.

    python benchmarks/kill.py [--kills 20] [--rounds 4] [--seed 0]
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SHORT = ["pretrain.epochs=6", "train.epochs=5"]


def command(out: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "bitswitch", "run", "digits", *SHORT, *overrides, "--out", str(out), "--json"]


def finish(out: Path) -> None:
    subprocess.run(command(out), check=True, stdout=subprocess.DEVNULL)


def killed_after(out: Path, seconds: float) -> bool:
    """Start the run and kill it after so many seconds; whether it was still running then."""
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def model_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def differences(one: Path, other: Path) -> list[str]:
    found = []
    if (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes():
        found.append("model.safetensors")
    for stage in ("pretrain", "train"):
        a, b = (model_of(run / "checkpoints" / f"{stage}.pt") for run in (one, other))
        found += [f"{stage}: {name}" for name in a if not torch.equal(a[name], b[name])]
    if (one / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes():
        found.append("metrics.jsonl")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    work = Path(tempfile.mkdtemp(prefix="bitswitch-kill-"))
    start = time.monotonic()
    finish(work / "whole")
    whole = time.monotonic() - start
    print(f"undisturbed: {whole:.1f} s")
    bad, kills = 0, 0
    for turn in range(options.rounds):
        wanted = options.kills // options.rounds + (turn < options.kills % options.rounds)
        out = work / f"killed-{turn}"
        done = 0
        while done < wanted:
            moment = moments.uniform(0.1, 0.9 * whole)
            if killed_after(out, moment):
                done += 1
                left = sorted(p.name for p in (out / "checkpoints").glob("*.pt"))
                print(f"round {turn}: killed after {moment:.2f} s, checkpoints {left}")
            else:
                shutil.rmtree(out)
                print(f"round {turn}: ended by itself before {moment:.2f} s, started over")
        kills += done
        finish(out)
        found = differences(work / "whole", out)
        bad += bool(found)
        print(f"round {turn}: {'DIFFERS in ' + ', '.join(found[:5]) if found else 'equal, bit for bit'}")
    changed = subprocess.run(command(work / "whole", "train.lr=0.002"), capture_output=True, text=True)
    refused = changed.returncode == 2 and "train.lr" in changed.stderr
    print(f"a changed override: {'refused' if refused else 'NOT REFUSED'}: {changed.stderr.strip()}")
    print(f"{kills} kills in {options.rounds} rounds, {bad} rounds differ")
    shutil.rmtree(work)
    sys.exit(bool(bad) or not refused)


if __name__ == "__main__":
    main()
