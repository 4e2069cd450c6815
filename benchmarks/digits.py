"""What `bitswitch run digits` reaches on `test`, over seeds: writes a result file.

    python benchmarks/digits.py results/digits.json [--seeds 5] [--work runs/digits-seeds]
    python benchmarks/digits.py results/performance/digits-compiled.json --compile

With --compile every seed runs twice, its joint training compiled and not; the float network is the same on one thread.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import result
from bitswitch.machine import machine
from bitswitch.pipeline import choose_device


def scores(seed: int, out: Path, *overrides: str) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "bitswitch",
        "run",
        "digits",
        "supernet=null",
        *overrides,
        "--seed",
        str(seed),
        "--out",
        str(out),
        # What an earlier commit left there is not this one's.
        "--fresh",
        "--json",
    ]
    document = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {"float" if r["bits"] is None else f"{r['bits']} bits": r["top1"] for r in document["results"]}


def mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Over seeds, for every width."""
    return {name: statistics.mean(score[name] for score in found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("runs/digits-seeds"))
    parser.add_argument("--compile", action="store_true", help="joint training compiled beside not compiled")
    options = parser.parse_args()
    found = [scores(seed, options.work / str(seed)) for seed in range(options.seeds)]
    names = list(found[0])
    means = mean(found)
    if options.compile:
        compiled = [
            scores(seed, options.work / f"{seed}-compiled", "train.compile=true") for seed in range(options.seeds)
        ]
        both = {"not compiled": found, "compiled": compiled}
        rows = [
            [f"seed {k}, {how}", *(s[k][name] for name in names)]
            for k in range(options.seeds)
            for how, s in both.items()
        ]
        rows += [[f"mean, {how}", *mean(s).values()] for how, s in both.items()]
        rows.append(["compiled above not", *(mean(compiled)[name] - means[name] for name in names)])
    else:
        rows = [[f"seed {seed}", *(score[name] for name in names)] for seed, score in enumerate(found)]
        rows.append(["mean", *means.values()])
        rows.append(["mean below float", *(means["float"] - value for value in means.values())])
    result.write(
        options.out,
        title="Digits: top-1 % on 360 test images, one network for all widths" + ", compiled and not" * options.compile,
        # Its processes take a GPU where there is one.
        machine=machine(choose_device("auto")),
        data="digits (scikit-learn)",
        split="test",
        seeds=range(options.seeds),
        columns=["", *names],
        rows=rows,
    )
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    result.run(main)
