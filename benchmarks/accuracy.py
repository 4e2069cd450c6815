"""What ways of training reach on CIFAR-10: one result file for each job, a way of training at one seed.

    python benchmarks/accuracy.py --data CIFAR_FOLDER --start CHECKPOINT          # all jobs of QUEUE that have no file yet
    python benchmarks/accuracy.py screen-ours-seed0 float-seed1 --data ... --start ...

`float-seedK` fine-tunes the published weights (--start) and keeps what it reaches as float-seedK.safetensors beside its
result file: every other job of that seed starts from this file, so that drops are from one and the same float network.
`glance-*` is one epoch and `screen-*` five, judged on val; `decide-*` is ten and `long-*` twenty, also scored on test. A way
of training that visits two of four widths in a step costs half: `*-twice-as-long` is twice as many epochs (forty of `long-*`),
for as many forwards as the others have. Of the ways of three widths, one has half as many again for that reason, which is in
the queue of `decide-*`: see SCHEDULES. A job that was killed goes on from its last epoch while --work is there; a job whose
file is there is done. `make results` writes docs/results.md from the files.

On a CPU that others use, OMP_NUM_THREADS=1 gives more images a second, and with glibc MALLOC_MMAP_THRESHOLD_=4000000000
MALLOC_TRIM_THRESHOLD_=4000000000 keep memory from step to step, whose page faults took a fifth of the time of two trainings
beside each other. Fourteen jobs beside each other kept a GPU (an H100) busy.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save

import result
from bitswitch import files
from bitswitch.artifact import Header
from bitswitch.data import DataSet, Preprocessing, load_data
from bitswitch.machine import machine, source_commit
from bitswitch.models.weights import read_weights
from bitswitch.pipeline import choose_device
from bitswitch.report.accuracy import ALL, OURS, TWICE
from bitswitch.training import load_checkpoint

RECIPE = "cifar10-resnet20"
# The digest of the images that the results on record are of.
JPEG = "2bd45a54a1403300b4a1da01a6bc551a93b08f732c5d7e6283857f24373d564d"
# The mean and standard deviation that the published weights were trained with.
NORMALIZED = ("data.mean=[0.485, 0.456, 0.406]", "data.std=[0.229, 0.224, 0.225]")
FLOAT = ("pretrain.epochs=12", "pretrain.lr=0.05", "pretrain.precision=bfloat16", "pretrain.compile=true")
JOINT = ("train.precision=bfloat16", "train.compile=true", "train.record_scale_gradients=true")


@dataclass(frozen=True)
class Schedule:
    """How long a job trains, and on what it is judged."""

    epochs: int
    splits: tuple[str, ...]
    half_again: tuple[str, ...] = ()

    def changed(self, variant: str) -> tuple[str, ...]:
        """The overrides that make a variant differ from the schedule's own recipe."""
        epochs = 2 * self.epochs if variant.endswith(TWICE) else self.epochs * 3 // 2
        longer = variant.endswith(TWICE) or variant in self.half_again
        return (*VARIANTS[variant.removesuffix(TWICE)], *((f"train.epochs={epochs}",) if longer else ()))


PAPER = ("train.scale_form=raw", "train.alrs=printed", "train.eta=paper")
RIVALS = ("lsq", "adabits", "bit_mixer", "per_width")
TAUGHT = ("train.distillation.teacher=float",)
TAUGHT_DRAWN_2 = (*TAUGHT, "train.forwards=2", "train.scale_lr=2e-3")
TAUGHT_ALONE = (*TAUGHT_DRAWN_2, "train.distillation.weight=1")
HOT = ("train.distillation.temperature=3",)
# What else might help, each by itself on top of ours.
BESIDE = {
    "hot": HOT,
    "lr-1e-3": ("train.lr=1e-3",),
    "per-channel": ("train.per_channel=true",),
    "centred": ("train.method=centred",),
}
# What the parts of ours are worth, each by itself the other way. A raw scale has the rate of the weights, as in the paper:
# 2e-3 a step is more than a weight scale is.
WITHOUT = {
    "alrs-off": ("train.alrs=off",),
    "alrs-printed": ("train.alrs=printed", "train.eta=paper"),
    "eta-paper": ("train.eta=paper",),
    "raw": ("train.scale_form=raw", "train.scale_lr=5e-4"),
    "raw-alrs-off": ("train.scale_form=raw", "train.scale_lr=5e-4", "train.alrs=off"),
    "raw-eta-paper": ("train.scale_form=raw", "train.scale_lr=5e-4", "train.eta=paper"),
    "accumulate": ("train.order=accumulate",),
    "kd-highest": ("train.distillation.teacher=highest",),
    "per-width": ("train.method=per_width",),
    "lsq": ("train.method=lsq",),
}
VARIANTS: dict[str, tuple[str, ...]] = {
    "ours": (),
    "drawn-2": ("train.forwards=2",),
    "scale-lr-2e-3": ("train.scale_lr=2e-3",),
    "paper": PAPER,
    "paper-alrs-off": ("train.scale_form=raw", "train.alrs=off"),
    "kd-float": TAUGHT,
    "kd-float-drawn-2-scale-lr-2e-3": TAUGHT_DRAWN_2,
    "kd-float-drawn-2-scale-lr-2e-3-batch-64": (*TAUGHT_DRAWN_2, "train.batch_size=64"),
    **{method.replace("_", "-"): (f"train.method={method}",) for method in RIVALS},
    **{f"lsq-{bits}-alone": ("train.method=lsq", f"bits=[{bits}]") for bits in (8, 4, 2)},
}
# The first screens of a teacher had half of the loss from it; then all of it proved the better.
_HALF = "kd-float-drawn-2-scale-lr-2e-3"
SCHEDULES = {
    "glance": Schedule(1, ("val",)),
    "screen": Schedule(5, ("val",)),
    # Two of three widths a step, for as many forwards as the ten epochs of the others have.
    "decide": Schedule(10, ("val", "test"), half_again=(f"{OURS}-hot-432",)),
    "long": Schedule(20, ("val", "test")),
}
VARIANTS |= {OURS: TAUGHT_ALONE}
VARIANTS |= {f"{OURS}-{name}": (*TAUGHT_ALONE, *overrides) for name, overrides in (BESIDE | WITHOUT).items()}
TAUGHT_ALL = (*TAUGHT, "train.scale_lr=2e-3", "train.distillation.weight=1")
VARIANTS |= {ALL: TAUGHT_ALL, f"{ALL}-hot": (*TAUGHT_ALL, *HOT)}
VARIANTS |= {
    f"{variant}-432": ("bits=[4, 3, 2]", *VARIANTS[variant])
    for variant in ("paper", "lsq", ALL, f"{ALL}-hot", OURS, *(f"{OURS}-{name}" for name in ("hot", "centred")))
}
_SCREENED = (
    *("ours", "paper", "paper-alrs-off", "drawn-2", f"drawn-2{TWICE}", "kd-float", "scale-lr-2e-3"),
    *(_HALF + TWICE, OURS + TWICE),
    *(f"{_HALF}-batch-64{TWICE}", *(f"{OURS}-{name}{TWICE}" for name in BESIDE)),
    *(OURS, *(f"{OURS}-{name}" for name in WITHOUT)),
)
_DECIDED = (
    # The last of them as many epochs as the rivals, each at every width.
    *("paper", "lsq", "ours", OURS + TWICE, ALL),
    *(f"{OURS}-{name}{TWICE}" for name in ("centred", "hot", "per-channel", "lsq")),
    *("paper-432", "lsq-432", f"{ALL}-432", f"{ALL}-hot-432", f"{OURS}-hot-432"),
    *("lsq-8-alone", "lsq-4-alone", "lsq-2-alone", "adabits", "bit-mixer"),
)
# Of three widths for equal passes: two of three in a step are two thirds of the forwards.
_LONG = (
    *("paper-432", f"{OURS}-hot-432", f"{OURS}-432", f"{OURS}-centred-432"),
    *("paper", "lsq", OURS + TWICE),
)
QUEUE = (
    "float-seed0",
    *(f"screen-{variant}-seed0" for variant in _SCREENED),
    *(f"float-seed{seed}" for seed in (1, 2)),
    *(f"decide-{variant}-seed{seed}" for seed in range(3) for variant in _DECIDED),
    *(f"long-{variant}-seed{seed}" for seed in range(3) for variant in _LONG),
)


@dataclass(frozen=True)
class Places:
    """Where things are on this machine."""

    data: str | None
    start: str | None
    work: Path
    results: Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", default=list(QUEUE))
    parser.add_argument("--data", help="folder with train/ and test/")
    parser.add_argument("--start", help="published float weights; for float jobs alone")
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--results", type=Path, default=Path("results/cifar10"))
    options = parser.parse_args()
    places = Places(options.data, options.start, options.work, options.results)
    for job in options.jobs:
        parts(job)
    for job in options.jobs:
        do(job, places)


def parts(job: str) -> tuple[str, str, int]:
    """(schedule, variant, seed) of a job's name; the schedule of the baseline is "float", its variant too."""
    found = re.fullmatch(r"(?:(float)|(\w+?)-(.+))-seed(\d+)", job)
    if found is not None:
        schedule, variant = ("float", "float") if found[1] else (found[2], found[3])
        if found[1] or (schedule in SCHEDULES and variant.removesuffix(TWICE) in VARIANTS):
            return schedule, variant, int(found[4])
    sys.exit(
        f"{job} is no job: SCHEDULE-VARIANT[{TWICE}]-seedK of {', '.join(SCHEDULES)} and {', '.join(VARIANTS)}, or float-seedK"
    )


def do(job: str, places: Places) -> None:
    """Do a job and write its file, unless it is there."""
    path = places.results / f"{job}.json"
    if path.exists():
        print(f"{job}: {path} is there, nothing to do", flush=True)
        return
    schedule, variant, seed = parts(job)
    print(f"{job}: begins or goes on", flush=True)
    run = places.work / job
    commits = and_before(places.work / f"{job}.commits", result.commit() or "unknown")
    # Stages take a GPU where there is one.
    machines = and_before(places.work / f"{job}.machines", json.dumps(machine(choose_device("auto"))))
    floats = schedule == "float"
    document = _float(run, seed, places) if floats else _quantized(run, SCHEDULES[schedule], variant, seed, places)
    words = f"python benchmarks/accuracy.py {job} --data CIFAR_FOLDER"
    result.write(
        path,
        title=f"{RECIPE}: {job}",
        seeds=[seed],
        command=words if schedule != "float" else f"{words} --start {Path(places.start or '').name}",
        commit=commits[0],
        commits=commits,
        machine=json.loads(machines[-1]),
        machines=[json.loads(one) for one in machines],
        schedule=schedule,
        variant=variant,
        data=label(document["data_sha256"]),
        **document,
    )
    print(f"{job}: {path} is written", flush=True)


def and_before(path: Path, now: str) -> list[str]:
    """All lines of a file of what worked on a job, commits or machines, `now` the last of them."""
    known = path.read_text().splitlines() if path.exists() else []
    if known[-1:] != [now]:
        known.append(now)
        files.write(path, "".join(f"{one}\n" for one in known).encode())
    return known


def label(digest: str) -> str:
    """What a result calls its images, by the digest of all of them."""
    return f"CIFAR-10, {'JPEG-compressed (quality 75)' if digest == JPEG else 'other files'}"


def run_stage(stage: str, run: Path, seed: int, places: Places, words: tuple[str, ...]) -> None:
    # Processes that are started later run what is there then.
    if (source_commit() or "").partition("+")[0] != (result.commit() or "").partition("+")[0]:
        sys.exit(f"another commit was checked out since the job began, at {result.commit()}: start it again")
    where = () if places.data is None else (f"data.root={places.data}",)
    command = [sys.executable, "-m", "bitswitch", stage, RECIPE, *where, *words, "--seed", str(seed), "--out", str(run)]
    subprocess.run([*command, "--json"], check=True, stdout=subprocess.DEVNULL)


def images_for(header: Header, folder: str) -> DataSet:
    """CIFAR-10 as an artifact wants it normalized; the images that it was trained on, and no others."""
    data = load_data("cifar10", folder).with_preprocessing(Preprocessing.from_json(dict(header.preprocessing or {})))
    if header.provenance.get("data_sha256", data.fingerprint()) != data.fingerprint():
        sys.exit(f"{folder}: these are not the images that the file was trained on")
    return data


def _float(run: Path, seed: int, places: Places) -> dict[str, Any]:
    if places.start is None:
        sys.exit(f"float-seed{seed} begins with published weights: name them with --start")
    run_stage("pretrain", run, seed, places, (*NORMALIZED, *FLOAT, f"pretrain.checkpoint={places.start}"))
    rows = _metrics(run, "pretrain")
    weights = places.results / f"float-seed{seed}.safetensors"
    files.write(weights, save(read_weights(run / "checkpoints" / "pretrain.pt")))
    final = _finals(rows, ("val", "test"))
    source = {"name": Path(places.start).name, "sha256": files.file_digest(places.start)}
    return {
        "split": "val, test",
        "epochs": len(_curves(rows)["float"]["top1"]),
        "columns": ["split", "top-1 %", "top-5 %", "loss"],
        "rows": [[split, score["top1"], score["top5"], score["loss"]] for split, score in final["float"].items()],
        "overrides": [*NORMALIZED, *FLOAT],
        "started_from": source,
        "data_sha256": _fingerprint(run),
        "weights": {"name": weights.name, "sha256": files.file_digest(weights)},
        "note": "The published weights have seen the images of val in their original form: val is flattered.",
        "final": final,
        "curves": _curves(rows),
    }


def _quantized(run: Path, schedule: Schedule, variant: str, seed: int, places: Places) -> dict[str, Any]:
    weights, scores = places.results / f"float-seed{seed}.safetensors", places.results / f"float-seed{seed}.json"
    if not (weights.exists() and scores.exists()):
        sys.exit(f"{weights} is not there: do float-seed{seed} first")
    base = files.read_json(scores)
    started = base["final"]["float"]
    changed = schedule.changed(variant)
    overrides = (*NORMALIZED, *JOINT, f"train.epochs={schedule.epochs}", *changed)
    words = (*overrides, "pretrain.epochs=0", f"pretrain.checkpoint={weights}")
    run_stage("pretrain", run, seed, places, words)
    if _fingerprint(run) != base["data_sha256"]:
        sys.exit(f"{places.data} holds other images than those of {scores}: a drop would compare nothing")
    run_stage("train", run, seed, places, words)
    rows = _metrics(run, "train")
    final = {
        bits: {split: score | {"drop": started[split]["top1"] - score["top1"]} for split, score in by_split.items()}
        for bits, by_split in _finals(rows, schedule.splits).items()
    }
    return {
        "split": ", ".join(schedule.splits),
        "epochs": len(next(iter(_curves(rows).values()))["top1"]),
        "columns": ["bits", "split", "top-1 %", "below float", "top-5 %", "loss"],
        "rows": [
            [int(bits), split, score["top1"], score["drop"], score["top5"], score["loss"]]
            for bits, by_split in final.items()
            for split, score in by_split.items()
        ],
        "overrides": list(overrides),
        "changed": list(changed),
        "data_sha256": base["data_sha256"],
        "started_from": {"name": weights.name, "sha256": files.file_digest(weights)},
        "bits": [int(bits) for bits in final],
        "stored_bytes": _stored_bytes(run),
        "final": final,
        "curves": _curves(rows),
        **_scales(run),
    }


def _stored_bytes(run: Path) -> int:
    """Of the artifact; of a way of training that has none, of the float weights, scales and statistics that it keeps."""
    artifact = run / "model.safetensors"
    if artifact.exists():
        return artifact.stat().st_size
    return sum(tensor.nbytes for tensor in load_checkpoint(run / "checkpoints" / "train.pt")["model"].values())


def _fingerprint(run: Path) -> str:
    """Of all images and labels that a run has seen."""
    digest: str = files.read_json(run / "stages.json")["pretrain"]["inputs"]["data"]
    return digest


def _metrics(run: Path, stage: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row | {"bits": str(row["bits"] or "float")} for row in rows if row["stage"] == stage]


def _curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """{bits: {quantity: its value on val after every epoch}}."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in sorted((row for row in rows if row["split"] == "val"), key=lambda row: row["epoch"]):
        # A width that a step does not always visit has no training loss.
        for name in ("top1", "loss", "train_loss"):
            if name in row:
                found.setdefault(row["bits"], {}).setdefault(name, []).append(round(row[name], 4))
    return found


def _finals(rows: list[dict[str, Any]], splits: tuple[str, ...]) -> dict[str, dict[str, dict[str, float]]]:
    """{bits: {split: score at the end}}; a training ends with a row for test whatever is asked for, which is left out."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["split"] in splits:
            # Of val, the last epoch's stays.
            score = {name: round(row[name], 4) for name in ("top1", "top5", "loss", "images")}
            found.setdefault(row["bits"], {})[row["split"]] = score
    return found


def _scales(run: Path) -> dict[str, Any]:
    """What was recorded of scales and gradients: means over layers after every epoch, and the last epoch's layers."""
    rows = [json.loads(line) for line in (run / "scale_gradients.jsonl").read_text().splitlines()]
    names = [name for name in rows[0] if name not in ("epoch", "bits", "layer")]
    last = max(row["epoch"] for row in rows)
    means: dict[str, dict[str, list[float]]] = {}
    layers: dict[str, dict[str, list[float]]] = {}
    for bits in dict.fromkeys(row["bits"] for row in rows):
        own = [row for row in rows if row["bits"] == bits]
        for name in names:
            mean = _geometric_mean if name.endswith("_scale") else statistics.mean
            by_epoch = [mean([row[name] for row in own if row["epoch"] == epoch]) for epoch in range(last + 1)]
            means.setdefault(str(bits), {})[name] = [_short(value) for value in by_epoch]
            layers.setdefault(str(bits), {})[name] = [_short(row[name]) for row in own if row["epoch"] == last]
    order = list(dict.fromkeys(row["layer"] for row in rows))
    return {"means_over_layers": means, "layers_of_the_last_epoch": {"order": order, **layers}}


def _geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.mean(math.log(value) for value in values))


def _short(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    result.run(main)
