"""What mixed SubNets of a SuperNet reach on CIFAR-10: the programme's beside random ones of the same average bits.

    python benchmarks/mixed.py hasb-of-screen-kd-float-seed0 uniform-of-... none-of-... --data CIFAR_FOLDER

A job is WAY-of-JOB. JOB is one of accuracy.py that is done: its run is in --work, its file in --results. WAY is how a SuperNet
is trained from it, for five epochs: by HASB ("hasb"), with every layer drawn evenly ("uniform"), or not at all
("none": the joint network's own batch normalizations, one for each width; "recalibrated": their statistics taken anew for each
SubNet, from 2,560 augmented training images). SubNets are scored on the split that JOB is judged
on, test or val; val alone chooses them. A job that was killed goes on from its last epoch while --work is there. Random SubNets
are drawn evenly among all whose average is the greatest that the budget allows.
"""

import argparse
import json
import re
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import accuracy
import bitswitch as bs
import result
from bitswitch import files, search
from bitswitch.assignment import Assignment
from bitswitch.data import DataSet
from bitswitch.evaluation import training_views
from bitswitch.machine import machine
from bitswitch.nn import quantized_layers
from bitswitch.pipeline import choose_device
from bitswitch.training import evaluate, recalibrate

UNTRAINED = ("none", "recalibrated")
WAYS = ("hasb", "uniform", *UNTRAINED)
EPOCHS = 5
BUDGETS = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
RANDOM = 10
RECALIBRATION_IMAGES = 2560
DEVICE = choose_device("auto")
# What a SuperNet's training has in common with joint training.
_SHARED = ("distillation.", "lr=", "scale_lr=", "batch_size=", "precision=", "compile=", "alrs=", "eta=")


def parser(description: str | None) -> argparse.ArgumentParser:
    """What a command on jobs of mixed networks takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("jobs", nargs="+")
    made.add_argument("--data", required=True, help="folder with train/ and test/")
    made.add_argument("--work", type=Path, default=Path("runs/cifar10"))
    made.add_argument("--results", type=Path, default=Path("results/cifar10"))
    return made


def main() -> None:
    options = parser(__doc__).parse_args()
    places = accuracy.Places(options.data, None, options.work, options.results)
    for job in options.jobs:
        if re.fullmatch(rf"({'|'.join(WAYS)})-of-.+-seed\d+", job) is None:
            sys.exit(f"{job} is no job: WAY-of-JOB, WAY one of {', '.join(WAYS)}, JOB of accuracy.py")
    for job in options.jobs:
        do(job, places)


def do(job: str, places: accuracy.Places) -> None:
    """Do a job and write its file, unless it is there."""
    path = places.results / f"mixed-{job}.json"
    if path.exists():
        print(f"{job}: {path} is there, nothing to do", flush=True)
        return
    way, _, joint = job.partition("-of-")
    accuracy.parts(joint)
    for needed in (places.results / f"{joint}.json", places.work / joint):
        if not needed.exists():
            sys.exit(f"{needed} is not there: do {joint} first, with accuracy.py and the same --work and --results")
    before = files.read_json(places.results / f"{joint}.json")
    run = places.work / f"mixed-{job}"
    commits = accuracy.and_before(places.work / f"mixed-{job}.commits", result.commit() or "unknown")
    machines = accuracy.and_before(places.work / f"mixed-{job}.machines", json.dumps(machine(DEVICE)))
    seed, split = before["seeds"][0], before["split"].split(", ")[-1]
    words = _words(way, before, places)
    # Of the float network, so of all ways.
    accuracy.run_stage("sensitivity", places.work / joint, seed, places, words)
    _copy(places.work / joint, run)
    if way not in UNTRAINED:
        accuracy.run_stage("supernet", run, seed, places, words)
        # Writes the choices into the artifact.
        accuracy.run_stage("search", run, seed, places, words)
    artifact = artifact_of(job, places)
    print(f"{job}: SubNets of {artifact}", flush=True)
    traces = {name: layer["trace"] for name, layer in files.read_json(run / "sensitivity.json")["layers"].items()}
    found = _subnets(artifact, traces, split, seed, places, recalibrated=way == "recalibrated")
    epochs = 0 if way in UNTRAINED else EPOCHS
    highest = before["final"][str(before["bits"][0])][split]
    float_top1 = highest["top1"] + highest["drop"]
    result.write(
        path,
        title=f"SubNets: {way}, {epochs} epochs after {joint}",
        data=before["data"],
        split=split,
        seeds=[seed],
        command=f"python benchmarks/mixed.py {job} --data CIFAR_FOLDER",
        note=f"Float: {float_top1:.2f} on {split}. Widths: a digit for each layer, in the order of the network.",
        overrides=list(words),
        commit=commits[0],
        commits=commits,
        machine=json.loads(machines[-1]),
        machines=[json.loads(one) for one in machines],
        **found,
    )
    print(f"{job}: {path} is written", flush=True)


def _copy(joint: Path, run: Path) -> None:
    if not run.exists():
        shutil.copytree(joint, run.with_suffix(".part"), dirs_exist_ok=True)
        run.with_suffix(".part").rename(run)


def artifact_of(job: str, places: accuracy.Places) -> Path:
    """The artifact that a job's SubNets are of, when the job is done."""
    name = "model.safetensors" if job.partition("-of-")[0] in UNTRAINED else "supernet.safetensors"
    return places.work / f"mixed-{job}" / name


def done(job: str, places: accuracy.Places) -> tuple[dict[str, Any], Path]:
    """What a job wrote, and the artifact that its SubNets are of; ends the command where others cannot score them."""
    path, artifact = places.results / f"mixed-{job}.json", artifact_of(job, places)
    if job.startswith("recalibrated-"):
        sys.exit(f"{job}: SubNets are scored as they are stored, without statistics of their own: name another way")
    for needed in (path, artifact):
        if not needed.exists():
            sys.exit(f"{needed} is not there: do {job} first, with mixed.py and the same --work and --results")
    return files.read_json(path), artifact


def _words(way: str, before: Mapping[str, Any], places: accuracy.Places) -> tuple[str, ...]:
    weights = places.results / before["started_from"]["name"]
    words = [*before["overrides"], "pretrain.epochs=0", f"pretrain.checkpoint={weights}"]
    if way in UNTRAINED:
        return tuple(words)
    shared = [word.removeprefix("train.") for word in before["overrides"] if word.startswith("train.")]
    words += [f"supernet.{word}" for word in shared if word.startswith(_SHARED)]
    return (*words, f"supernet.epochs={EPOCHS}", f"supernet.sampler={way}", f"search.budgets={list(BUDGETS)}")


def _subnets(
    artifact: Path,
    traces: Mapping[str, float],
    split: str,
    seed: int,
    places: accuracy.Places,
    *,
    recalibrated: bool,
) -> dict[str, Any]:
    model = bs.load(artifact).to(DEVICE)
    header = bs.artifact.read_header(artifact)
    data = accuracy.images_for(header, str(places.data))
    views = training_views(data, RECALIBRATION_IMAGES, DEVICE) if recalibrated else None
    layers = quantized_layers(model)
    widths = header.widths
    damage = {
        "hessian": search.damage_table(model, traces),
        "linear": search.damage_table(model, traces, "linear"),
        "measured on val": search.measured_damage(model, lambda some: top1_of(model, data, "val", some, views)),
    }
    problems = {form: search.Problem(damage=table, costs=search.cost_tables(model)) for form, table in damage.items()}
    uniform = [Assignment(tuple((name, width) for name in layers)) for width in widths]
    # At the highest width itself there is one SubNet to draw, all layers alike.
    budgets = [budget for budget in BUDGETS if budget < widths[0]]
    chosen = {
        (form, budget): problem.solve({"bits": budget}) for form, problem in problems.items() for budget in budgets
    }
    drawn = {budget: random_subnets(tuple(layers), widths, budget, seed) for budget in budgets}
    asked = [*uniform, *(one.assignment for one in chosen.values()), *(one for some in drawn.values() for one in some)]
    top1 = dict(zip(asked, top1_of(model, data, split, asked, views), strict=True))
    rows: list[list[Any]] = [
        [width, "all layers alike", mean_and_spread([top1[one]]), digits(one)]
        for width, one in zip(widths, uniform, strict=True)
    ]
    ranks: dict[str, dict[str, float]] = {}
    for budget in budgets:
        for form, problem in problems.items():
            choice = chosen[form, budget].assignment
            rows.append([budget, f"programme, damage {form}", mean_and_spread([top1[choice]]), digits(choice)])
            suffers = [problem.choice(one).damage for one in drawn[budget]]
            rank = spearmanr(suffers, [top1[one] for one in drawn[budget]]).statistic
            ranks.setdefault(form, {})[str(budget)] = round(float(rank), 3)
        cells = mean_and_spread([top1[one] for one in drawn[budget]])
        rows.append([budget, f"{RANDOM} at random, mean ± standard deviation", cells, ""])
    return {
        "columns": ["average bits", "SubNet", f"top-1 %, {split}", "widths"],
        "rows": rows,
        "rank_correlation_of_damage_and_top1": ranks,
        "layers": list(layers),
        "traces": {name: traces[name] for name in layers},
        "damage": {form: {name: list(table[name].values()) for name in layers} for form, table in damage.items()},
        "random": {str(budget): [[digits(one), top1[one]] for one in some] for budget, some in drawn.items()},
    }


def random_subnets(
    layers: Sequence[str], widths: Sequence[int], budget: float, seed: int, count: int = RANDOM
) -> list[Assignment]:
    """Assignments drawn evenly among all whose sum of widths is the greatest within a budget of average bits.

    Layers are drawn independently, with probabilities that fall or rise exponentially with the width: how probable an
    assignment is then depends on its sum alone, so that among those of the wanted sum all are alike.
    """
    generator = np.random.default_rng((seed, round(100 * budget)))
    values = np.array(widths)
    step = int(np.gcd.reduce(np.abs(np.diff(values))))
    least = int(values.min()) * len(layers)
    total = least + int(budget * len(layers) - least) // step * step
    low, high = -8.0, 8.0
    for _ in range(60):
        tilt = (low + high) / 2
        chance = np.exp(tilt * (values - values.mean()))
        chance /= chance.sum()
        low, high = (tilt, high) if chance @ values * len(layers) < total else (low, tilt)
    found: dict[Assignment, None] = {}
    while len(found) < count:
        row = generator.choice(values, len(layers), p=chance)
        if row.sum() == total:
            found[Assignment(tuple(zip(layers, row.tolist(), strict=True)))] = None
    return list(found)


def top1_of(
    model: torch.nn.Module,
    data: DataSet,
    split: str,
    assignments: Sequence[Assignment],
    views: Sequence[torch.Tensor] | None,
) -> list[float]:
    if views is None:
        return [score.top1 for score in evaluate(model, batches(data, split), assignments)]
    found = []
    for one in assignments:
        recalibrate(model, views, one)
        found += [score.top1 for score in evaluate(model, batches(data, split), [one])]
    return found


def batches(data: DataSet, split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    # On a CPU small batches with channels last: 1.6 times the images a second of 500 with channels first.
    size = 100 if DEVICE.type == "cpu" else 1000
    for x, y in data.evaluation_batches(split, batch_size=size, device=DEVICE):
        yield x.contiguous(memory_format=torch.channels_last), y


def digits(assignment: Assignment) -> str:
    return "".join(str(width) for _, width in assignment.items())


def mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


if __name__ == "__main__":
    result.run(main)
