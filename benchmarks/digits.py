"""What `bitswitch run digits` reaches on `test`, over seeds: writes a result file.

python benchmarks/digits.py results/digits.json [--seeds 5] [--work runs/digits-seeds]
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import result


def scores(seed: int, out: Path) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "bitswitch",
        "run",
        "digits",
        "supernet=null",
        "--seed",
        str(seed),
        "--out",
        str(out),
        "--json",
    ]
    document = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {"float" if r["bits"] is None else f"{r['bits']} bits": r["top1"] for r in document["results"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("runs/digits-seeds"))
    options = parser.parse_args()
    found = [scores(seed, options.work / str(seed)) for seed in range(options.seeds)]
    names = list(found[0])
    rows = [[f"seed {seed}", *(score[name] for name in names)] for seed, score in enumerate(found)]
    means = {name: statistics.mean(score[name] for score in found) for name in names}
    rows.append(["mean", *means.values()])
    rows.append(["mean below float", *(means["float"] - mean for mean in means.values())])
    result.write(
        options.out,
        title="Digits: top-1 % on 360 test images, one network for all widths",
        data="digits (scikit-learn)",
        split="test",
        seeds=range(options.seeds),
        columns=["", *names],
        rows=rows,
    )
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
