"""How long the integer programme takes: ResNet50's frontier of 50 budgets, 52 layers at 8, 6, 4 and 2 bits.

Weights and traces are random: the programme's time depends on its tables' sizes, hardly on their values; 5 draws are timed.

    python benchmarks/programme.py results/performance/programme.json [--budgets 50] [--draws 5]
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

import result
from bitswitch import search
from bitswitch.models import build
from bitswitch.nn import quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budgets", type=int, default=50)
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    model = quantize(build("resnet50"), bits=(8, 6, 4, 2), example_inputs=images)
    costs = search.cost_tables(model, (images,))
    rows = []
    for budget in ("bits", "bytes", "bitops"):
        seconds, sizes = [], []
        for draw in range(options.draws):
            generator = torch.Generator().manual_seed(draw)
            traces = {name: float(torch.rand((), generator=generator).exp()) for name in costs["bits"]}
            damage = search.damage_table(model, traces)
            start = time.perf_counter()
            problem = search.Problem(damage=damage, costs=costs)
            found = search.frontier(problem, search.budgets_between(problem, budget, options.budgets))
            seconds.append(time.perf_counter() - start)
            sizes.append(len(found))
        rows.append([budget, options.budgets, statistics.median(sizes), statistics.median(seconds), max(seconds)])
        print(rows[-1], flush=True)
    result.write(
        options.out,
        title="The integer programme: ResNet50's frontier, seconds",
        data="random traces and weights",
        seeds=range(options.draws),
        columns=["budget", "budgets", "choices", "median s", "slowest s"],
        rows=rows,
        note="52 layers, 4 widths; wall time.",
    )


if __name__ == "__main__":
    result.run(main)
