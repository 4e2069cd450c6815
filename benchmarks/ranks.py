"""The same 50 joint steps in float32 by one process and by two ranks (gloo), their losses side by side.

    python benchmarks/ranks.py [--steps 50]

Global batch 32, shared batch normalization statistics. In float64 the two agree to 1e-6 after five steps, which
tests/training/test_distributed.py holds; in float32 sums in another order make Adam's first steps differ, and the curves
drift apart within the noise of training.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SCRIPT = Path(__file__).parents[1] / "tests" / "training" / "ranks.py"
WIDTHS = (8, 6, 4, 2)


def losses(ranks: int, steps: int, out: Path) -> torch.Tensor:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    subprocess.run([sys.executable, *launch, str(SCRIPT), str(out), "float32", str(steps), "1"], check=True)
    return torch.load(out, weights_only=True)["losses"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        one, two = (losses(ranks, options.steps, Path(folder) / str(ranks)) for ranks in (1, 2))
    print("step   " + "   ".join(f"{width} bits: 1 / 2 ranks" for width in WIDTHS))
    for step in sorted({*range(0, options.steps, 5), options.steps - 1}):
        pairs = (f"{a:.6f} / {b:.6f}" for a, b in zip(one[step].tolist(), two[step].tolist(), strict=True))
        print(f"{step:4d}   " + "   ".join(pairs))
    print("greatest difference at each width:", [f"{d:.2e}" for d in (one - two).abs().amax(0).tolist()])


if __name__ == "__main__":
    main()
