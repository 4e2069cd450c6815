"""Batch normalization in the SuperNet: per pair of widths, per width, and statistics estimated anew for each SubNet.

For every seed a SuperNet is trained with transitional and with switchable batch normalization, from one and the same
multi-precision network; the same random mixtures of widths are then scored, as they are and after re-calibration.

    python benchmarks/norms.py results/digits-norms.json [--seeds 3] [--mixtures 16]
    python benchmarks/norms.py OUT.json --recipe cifar10-resnet20-mixed --words data.root=CIFAR_FOLDER supernet.epochs=1 ...
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import result
from bitswitch.machine import machine
from bitswitch.pipeline import choose_device

KINDS = ("transitional", "switchable")
IMAGES = 2000


def bitswitch(*words: object) -> dict:
    command = [sys.executable, "-m", "bitswitch", *map(str, words), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def mixtures_file(path: Path, model: Path, count: int) -> None:
    """Random assignments, every layer drawn evenly, in the form of a frontier."""
    described = bitswitch("inspect", model)
    layers, widths = [layer["name"] for layer in described["layers"]], described["widths"]
    drawn = np.random.default_rng(1).choice(np.array(widths), (count, len(layers))).tolist()
    choices = [
        {
            "assignment": dict(zip(layers, row, strict=True)),
            "cost": {"bits": sum(row) / len(row)},
            "damage": 0,
            "top1": None,
        }
        for row in drawn
    ]
    path.write_text(json.dumps({"choices": choices}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--words", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--mixtures", type=int, default=16)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bitswitch-norms-"))
    data = next((word.partition("=")[2] for word in options.words if word.startswith("data.root=")), None)
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(options.seeds):
        base = work / f"base-{seed}"
        shared = [options.recipe, *options.words, "--seed", seed, "--out"]
        for stage in ("pretrain", "train", "sensitivity"):
            bitswitch(stage, *shared, base)
        mixtures_file(work / "mixtures.json", base / "model.safetensors", options.mixtures)
        for kind in KINDS:
            run = Path(shutil.copytree(base, work / f"{kind}-{seed}"))
            bitswitch("supernet", *shared, run, f"supernet.batch_norm={kind}")
            for label, extra in (("as trained", []), ("re-calibrated", ["--recalibrate", IMAGES])):
                words = [run / "supernet.safetensors", "--assignment", work / "mixtures.json", "--split", "val", *extra]
                rows = bitswitch("evaluate", *words, *(["--data", data] if data else []))["results"]
                found.setdefault((kind, label), []).append(statistics.mean(row["top1"] for row in rows))
            shutil.rmtree(run)
    shutil.rmtree(work)
    rows = [
        [kind, label, statistics.mean(values), *(round(value, 2) for value in values)]
        for (kind, label), values in found.items()
    ]
    result.write(
        options.out,
        title=f"Batch normalization in the SuperNet ({options.recipe}): top-1 % of {options.mixtures} random mixtures",
        # Its processes take a GPU where there is one.
        machine=machine(choose_device("auto")),
        data=options.recipe,
        split="val",
        seeds=range(options.seeds),
        columns=[
            "batch normalization",
            "statistics",
            "mean over seeds",
            *(f"seed {s}" for s in range(options.seeds)),
        ],
        rows=rows,
        note=f"Statistics re-calibrated from {IMAGES} training images for each mixture.",
    )
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    result.run(main)
