"""What chooses the SubNets of a SuperNet: traces, one layer at a time, a fit, or a search, each on val and scored on test.

    python benchmarks/choosers.py hasb-of-decide-paper-seed0 --data CIFAR_FOLDER

A job is one of mixed.py that is done: its run is in --work, its file in --results. Layers stand at 2 or 4 bits, but in the
genetic search, which may use all widths. The ways of choosing:

- "traces": the programme on damage by Hessian traces, which sees no network run;
- "one at 2 bits": damage is what one layer at 2 bits costs, all others at 4: in top-1, or in the divergence (Kullback and
  Leibler) of the answers from those of the highest width;
- "fit": damage is what a layer's 2 bits cost on the mean of random SubNets: least squares over 40 of each budget, with one
  number for each layer; of top-1, or of the divergence;
- "best drawn": the best in top-1 of the 40 of a budget;
- "genetic": 40 evaluations at each budget from the programme's choices by traces on, by top-1 (`search.refine`).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

import accuracy
import bitswitch as bs
import mixed
import result
from bitswitch import search
from bitswitch.assignment import Assignment
from bitswitch.data import DataSet
from bitswitch.machine import machine
from bitswitch.nn import quantized_layers, switched

BUDGETS = (2.5, 3.0, 3.5)
LOW, HIGH = 2, 4
DRAWN = 40


def main() -> None:
    options = mixed.parser(__doc__).parse_args()
    places = accuracy.Places(options.data, None, options.work, options.results)
    for job in options.jobs:
        path = places.results / f"choosers-{job}.json"
        if path.exists():
            print(f"{job}: {path} is there, nothing to do", flush=True)
            continue
        known, artifact = mixed.done(job, places)
        result.write(
            path,
            title=f"What chooses SubNets: {job}",
            data=known["data"],
            split=f"val chooses, {known['split']} scores",
            seeds=known["seeds"],
            command=f"python benchmarks/choosers.py {job} --data CIFAR_FOLDER",
            machine=machine(mixed.DEVICE),
            **_compared(job, known, artifact, str(options.data)),
        )
        print(f"{job}: {path} is written", flush=True)


def _compared(job: str, known: Mapping[str, Any], artifact: Path, folder: str) -> dict[str, Any]:
    model = bs.load(artifact).to(mixed.DEVICE)
    data = accuracy.images_for(bs.artifact.read_header(artifact), folder)
    layers = tuple(quantized_layers(model))
    seed = known["seeds"][0]
    drawn = {budget: mixed.random_subnets(layers, (LOW, HIGH), budget, seed, DRAWN) for budget in BUDGETS}
    high = dict.fromkeys(layers, HIGH)
    alone = [Assignment(tuple((high | {name: LOW}).items())) for name in layers]
    asked = [*(one for some in drawn.values() for one in some), *alone, Assignment(tuple(high.items()))]
    seen = dict(zip(asked, _answers(model, data, asked), strict=True))
    problem = search.Problem(
        damage=search.damage_table(model, known["traces"]),
        costs=search.cost_tables(model),
    )
    tables = {"traces": problem.damage}
    costs = {
        "top-1": {one: -top1 for one, (top1, _) in seen.items()},
        "divergence": {one: far for one, (_, far) in seen.items()},
    }
    for name, cost in costs.items():
        base = cost[asked[-1]]
        losses = {layer: cost[one] - base for layer, one in zip(layers, alone, strict=True)}
        tables[f"one at 2 bits, {name}"] = _table(losses)
        tables[f"fit, {name}"] = _table(_fit([one for some in drawn.values() for one in some], cost))
    chosen: dict[tuple[float, str], Assignment] = {}
    for budget in BUDGETS:
        for name, table in tables.items():
            found = search.Problem(damage=table, costs=problem.costs).solve({"bits": budget})
            chosen[budget, name] = found.assignment
        chosen[budget, "best drawn"] = max(drawn[budget], key=lambda one: seen[one][0])
        print(f"{job}: genetic search at {budget} bits", flush=True)
        best, _ = search.refine(
            problem,
            {"bits": budget},
            lambda some: mixed.top1_of(model, data, "val", some, None),
            evaluations=DRAWN,
            seed=seed,
        )[0]
        chosen[budget, "genetic"] = best.assignment
    once = list(dict.fromkeys(chosen.values()))
    top1 = {
        split: dict(zip(once, mixed.top1_of(model, data, split, once, None), strict=True))
        for split in dict.fromkeys(("val", known["split"]))
    }
    shown = {str(budget): [(mixed.digits(one), *seen[one]) for one in some] for budget, some in drawn.items()}
    return {
        **additive(shown),
        "columns": ["average bits", "chosen by", *(f"top-1 %, {split}" for split in top1), "widths"],
        "rows": [
            [budget, name, *(f"{scores[one]:.2f}" for scores in top1.values()), mixed.digits(one)]
            for (budget, name), one in chosen.items()
        ],
        "layers": list(layers),
        "damage_of_2_bits": {
            name: {layer: table[layer][LOW] - table[layer][HIGH] for layer in layers} for name, table in tables.items()
        },
        "rank_correlation_of_damage_and_top1": {
            name: {str(budget): _rank(table, some, seen) for budget, some in drawn.items()}
            for name, table in tables.items()
        },
        "drawn": shown,
    }


def additive(drawn: Mapping[str, Sequence[tuple[str, float, float]]]) -> dict[str, Any]:
    """How far damage adds up, and a note that says so, from {average bits: [(widths, top-1, divergence)]}."""
    budgets = [budget for budget, some in drawn.items() for _ in some]
    widths, *values = zip(*(one for some in drawn.values() for one in some), strict=True)
    top1, divergence = (explained(budgets, widths, one) for one in values)
    return {
        "note": f"{DRAWN} random SubNets at each budget for the fits, {DRAWN} evaluations for each genetic search. Of the "
        "variance between SubNets of one budget, each left out once, a number for each layer explains "
        f"{top1:.2f} in top-1 and {divergence:.2f} in divergence.",
        "explained": {"top-1": top1, "divergence": divergence},
    }


def explained(budgets: Sequence[str], widths: Sequence[str], values: Sequence[float]) -> float:
    """How much of the variance between SubNets of one budget a sum over layers tells of those that it has not seen.

    Least squares with a constant for each budget and a number for each layer at 2 bits, each SubNet left out once. Between
    budgets the programme never has to choose. 1 is all; below 0, the mean of the budget alone would tell more.
    """
    group = np.array([[budget == one for one in dict.fromkeys(budgets)] for budget in budgets], dtype=float)
    layers = np.array([[width == str(LOW) for width in one] for one in widths], dtype=float)
    goal = np.array(values)
    design = np.hstack([group, layers])
    seen = design @ np.linalg.pinv(design)
    left_out = (goal - seen @ goal) / (1 - np.diag(seen))
    within = goal - group @ (group.T @ goal / group.sum(0))
    return float(1 - (left_out**2).sum() / (within**2).sum())


def _table(losses: Mapping[str, float]) -> dict[str, dict[int, float]]:
    return {layer: {LOW: loss, HIGH: 0.0} for layer, loss in losses.items()}


def _fit(some: Sequence[Assignment], cost: Mapping[Assignment, float]) -> dict[str, float]:
    """What each layer's 2 bits cost by least squares."""
    design = np.array([[1.0, *(width == LOW for _, width in one.items())] for one in some])
    found = np.linalg.pinv(design) @ np.array([cost[one] for one in some])
    return dict(zip((layer for layer, _ in some[0].items()), found[1:].tolist(), strict=True))


def _rank(
    table: Mapping[str, Mapping[int, float]], some: Sequence[Assignment], seen: Mapping[Assignment, tuple[float, float]]
) -> float | None:
    suffers = [math.fsum(table[layer][width] for layer, width in one.items()) for one in some]
    rank = float(spearmanr(suffers, [seen[one][0] for one in some]).statistic)
    return round(rank, 3) if math.isfinite(rank) else None


@torch.no_grad()
def _answers(model: nn.Module, data: DataSet, assignments: Sequence[Assignment]) -> list[tuple[float, float]]:
    """(top-1 in per cent, mean divergence from the answers of the highest width) of each assignment on val."""
    model.eval()
    highest = next(iter(quantized_layers(model).values())).widths[0]
    found: list[list[tuple[int, float]]] = [[] for _ in assignments]
    images = 0
    for x, y in mixed.batches(data, "val"):
        images += len(y)
        with switched(model, highest):
            reference = model(x).log_softmax(1)
        for one, sums in zip(assignments, found, strict=True):
            with switched(model, one):
                answers = model(x).log_softmax(1)
            far = nn.functional.kl_div(answers, reference, reduction="sum", log_target=True)
            sums.append((int((answers.argmax(1) == y).sum()), float(far)))
    return [
        (100 * sum(right for right, _ in sums) / images, math.fsum(far for _, far in sums) / images) for sums in found
    ]


if __name__ == "__main__":
    result.run(main)
