"""Are the standard errors of traces honest where a target stops the probing? Small networks, exact float64 Hessians.

    python benchmarks/coverage.py results/hessian-coverage.json [--repeats 200]

Each network of tests/search/test_hessian.py is traced again and again, with other probes each time, until the target's relative
error is reached. Counted is how often 1.96 standard errors to either side hold the exact trace: nominally 95 %. Layers whose
estimate has no error are left out.
"""

import argparse
import importlib
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import result
from bitswitch.search import hessian_trace

sys.path.append(str(Path(__file__).parents[1] / "tests" / "search"))
case: Any = importlib.import_module("test_hessian").case

# The network, how many of its batches (all where None), and the target.
RUNS = [
    ("relu", 1, 0.1),
    ("relu", None, 0.1),
    ("answer", 1, 0.1),
    ("answer", None, 0.1),
    ("attention", 1, 0.1),
    ("softplus", 1, 0.1),
    ("softplus", 1, 0.4),
    ("transformer", 1, 0.3),
]
COLUMNS = ["network", "target", "rounds", "least held %", "greatest held %", "greatest error / standard error"]


def held(name: str, batches: int | None, target: float, repeats: int) -> dict[str, Any]:
    model, loss_fn, data, exact = case(name, batches)
    rounds: list[int] = []
    errors: dict[str, list[float]] = {layer: [] for layer in exact}
    for seed in range(repeats):
        traces = hessian_trace(
            model, loss_fn, data, target=target, seed=seed, progress=lambda probes, _: rounds.append(probes)
        )
        for layer, trace in traces.items():
            if trace.standard_error > 1e-9 * abs(exact[layer]):
                errors[layer].append((trace.mean - exact[layer]) / trace.standard_error)
    return {"rounds": len(rounds) / repeats, "errors": {layer: found for layer, found in errors.items() if found}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, measured = [], []
    for name, batches, target in RUNS:
        found = held(name, batches, target, options.repeats)
        shares = {
            layer: 100 * statistics.mean(abs(error) <= 1.96 for error in errors)
            for layer, errors in found["errors"].items()
        }
        worst = max(abs(error) for errors in found["errors"].values() for error in errors)
        label = f"{name}, {'all batches' if batches is None else '1 batch'}"
        rows.append([label, target, found["rounds"], min(shares.values()), max(shares.values()), round(worst, 1)])
        measured.append({"network": label, "target": target, "held %": shares})
        print(rows[-1], shares, flush=True)
    result.write(
        options.out,
        title="Traces that stop at a target: how often 1.96 standard errors hold the exact trace",
        seeds=[f"0-{options.repeats - 1}"],
        columns=COLUMNS,
        rows=rows,
        note=f"{options.repeats} repeats, layer by layer; the least and the greatest of the layers. Nominal: 95 %.",
        measured=measured,
    )


if __name__ == "__main__":
    result.run(main)
