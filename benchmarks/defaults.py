"""Which defaults of joint training are best on digits: every variant over seeds, judged on `val` alone.

    python benchmarks/defaults.py OUT.json [--seeds 5] [--work DIR] [VARIANT ...]

Each seed's float network is trained once and shared by all variants, so that variants are paired by seed.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import result
from bitswitch.machine import machine
from bitswitch.pipeline import choose_device

VARIANTS = {
    "log relative eta=1": ["train.scale_form=log"],
    "log relative eta=paper": ["train.scale_form=log", "train.eta=paper"],
    "log printed": ["train.scale_form=log", "train.alrs=printed", "train.eta=paper"],
    "log off": ["train.scale_form=log", "train.alrs=off"],
    "log relative eta=1 scale_lr=5e-3": ["train.scale_form=log", "train.scale_lr=5.0e-3"],
    "raw relative eta=1": ["train.scale_form=raw"],
    "raw relative eta=paper": ["train.scale_form=raw", "train.eta=paper"],
    "raw printed": ["train.scale_form=raw", "train.alrs=printed", "train.eta=paper"],
    "raw off": ["train.scale_form=raw", "train.alrs=off"],
    "log relative eta=1 accumulate": ["train.scale_form=log", "train.order=accumulate"],
}


def bitswitch(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "bitswitch", *words, "--json"], check=True, stdout=subprocess.DEVNULL)


def last_val(run: Path) -> dict[str, dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["stage"] == "train" and row["split"] == "val"]
    last = max(row["epoch"] for row in rows)
    return {str(r["bits"]): {"top1": r["top1"], "loss": r["loss"]} for r in rows if r["epoch"] == last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("runs/defaults"))
    options = parser.parse_args()
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in options.variants}
    for seed in range(options.seeds):
        base = options.work / f"float-{seed}"
        bitswitch("pretrain", "digits", "--seed", str(seed), "--out", str(base), "--fresh")
        for name in options.variants:
            run = options.work / f"{name.replace(' ', '_')}-{seed}"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(base, run)
            bitswitch("train", "digits", *VARIANTS[name], "--seed", str(seed), "--out", str(run))
            found[name].append(last_val(run))
            shutil.rmtree(run)
    write(options.out, found, options.seeds)


def write(out: Path, found: dict[str, list[dict[str, dict[str, float]]]], seeds: int) -> None:
    """For each variant, means over seeds, and what each seed gave."""
    widths = list(next(iter(found.values()))[0])
    rows = []
    for name, runs in found.items():
        accuracies = [statistics.mean(run[width]["top1"] for run in runs) for width in widths]
        losses = [run[width]["loss"] for run in runs for width in widths]
        rows.append([name, *accuracies, f"{statistics.mean(losses):.4f}"])
        print(rows[-1])
    result.write(
        out,
        title="Digits: defaults of joint training, top-1 % on 144 val images, mean over seeds",
        # Its processes take a GPU where there is one.
        machine=machine(choose_device("auto")),
        data="digits (scikit-learn)",
        split="val",
        seeds=range(seeds),
        columns=["scales, ALRS", *(f"{width} bits" for width in widths), "mean loss"],
        rows=rows,
        measured=found,
    )


if __name__ == "__main__":
    result.run(main)
