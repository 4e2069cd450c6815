"""Tables of trainings, put together from one result file for each way of training and seed.

Such a file has, beside what every result file has: "schedule" ("float" for the float networks that others start from),
"variant", "overrides" (all), "changed" (those of the variant), "epochs", "bits", "final" {bits: {split: {"top1", "top5",
"loss", "drop"}}}, "curves" {bits: {"top1": [one for each epoch]}} and "means_over_layers" {bits: {quantity: [one for each
epoch]}}.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bitswitch.report.markdown import difference, grouped, mean, table

_Result = Mapping[str, Any]
_QUANTITIES = {
    "weight_scale": "weight scale",
    "input_scale": "input scale",
    "weight_move": "weight scale's move",
    "input_move": "input scale's move",
    "weight_mean": "weight scale's gradient",
    "input_mean": "input scale's gradient",
    "gradient_norm": "norm of the weights' gradient",
}
# The last epoch alone is a matter of luck; the mean of so many of them is less so.
_LASTING = 4
OURS = "kd-float-alone-drawn-2-scale-lr-2e-3"
# Every width in every step.
ALL = "kd-float-alone-scale-lr-2e-3"
TWICE = "-twice-as-long"
# What is held against what: in a schedule, variants whose name begins so, against the first of these that cost as much.
_HELD_AGAINST = {
    "screen": ((OURS, OURS), (OURS, OURS + TWICE), ("", "ours")),
    "decide": (
        (OURS, OURS + TWICE),
        (ALL, f"{OURS}-hot-432"),
        *(("", "paper"), ("", "paper-432")),
    ),
    "long": (("", "paper"),),
}


def accuracy_tables(results: Sequence[_Result]) -> list[str]:
    """The float networks; then for every schedule and list of widths: what was reached, epoch by epoch, and the scales.

    Several seeds of one way of training become their mean, with the sample standard deviation after ±. See `by_widths` for
    trainings of one width.
    """
    tables = []
    floats = [one for one in results if one["schedule"] == "float"]
    if floats:
        tables.append(_float_table(floats))
    groups = by_widths([one for one in results if one["schedule"] != "float"])
    for (schedule, bits), group in sorted(
        groups.items(), key=lambda item: (item[0][0] != "decide", item[0][0], item[0][1])
    ):
        variants = sorted(grouped(group, lambda r: r["variant"]).values(), key=lambda runs: _order(runs, bits))
        epochs = "/".join(map(str, sorted({one["epochs"] for one in group})))
        where = f"{schedule}, {epochs} epochs, bits {', '.join(map(str, bits))}"
        for split in dict.fromkeys(split for one in group for score in one["final"].values() for split in score):
            tables.append(_final_table(f"{where}: on {split}", variants, bits, split))
        alike = "passes over the images" if schedule == "long" else "forwards"
        tables += _worth_tables(f"{where}: points above another row of as many {alike}", schedule, variants, bits)
        tables.append(_curve_table(f"{where}: top-1 % on val after each epoch", variants))
        tables.append(_scale_table(f"{where}: scales and gradients, first epoch → last", variants))
    return tables + _length_tables([one for one in results if one["schedule"] != "float"])


def by_widths(results: Sequence[_Result]) -> dict[tuple[str, tuple[int, ...]], list[_Result]]:
    """Trainings by (schedule, list of widths). One of a single width is with every list that holds it, or else by itself.

    Those of the schedule "decide" that have as many epochs as one of "long" are with these, too.
    """
    groups: dict[tuple[str, tuple[int, ...]], list[_Result]] = {}
    own = grouped(results, lambda one: (str(one["schedule"]), tuple(one["bits"])))
    for (schedule, bits), runs in own.items():
        lists = [(other, some) for other, some in own if other == schedule and len(some) > 1 and bits[0] in some]
        for key in lists if len(bits) == 1 and lists else [(schedule, bits)]:
            groups.setdefault(key, []).extend(runs)
    for (schedule, bits), group in groups.items():
        if schedule == "long":
            epochs, long = {run["epochs"] for run in group}, {run["variant"] for run in group}
            for run in own.get(("decide", bits), []):
                if run["epochs"] in epochs:
                    # The same way for longer may be here, too.
                    name = f"{run['variant']}, {run['epochs']} epochs" if run["variant"] in long else run["variant"]
                    group.append({**run, "variant": name})
    return groups


def _order(runs: Sequence[_Result], bits: Sequence[int]) -> tuple[bool, float]:
    """Those of all widths come first, and of them the one with the least sum of drops on val."""
    own = runs[0]["bits"]
    return len(own) < len(bits), sum(statistics.mean(run["final"][str(b)]["val"]["drop"] for run in runs) for b in own)


def _float_table(results: Sequence[_Result]) -> str:
    splits = list(results[0]["final"]["float"])
    head = ["seed", "epochs", *(f"{name}, {split}" for split in splits for name in ("top-1 %", "top-5 %", "loss"))]
    rows = [
        [
            *(str(one["seeds"][0]), str(one["epochs"])),
            *(
                text
                for split in splits
                for score in [one["final"]["float"][split]]
                for text in (f"{score['top1']:.2f}", f"{score['top5']:.2f}", f"{score['loss']:.3f}")
            ),
        ]
        for one in sorted(results, key=lambda one: one["seeds"][0])
    ]
    return table("Float networks, the start of all others", head, rows, results)


def _final_table(title: str, variants: Sequence[Sequence[_Result]], bits: Sequence[int], split: str) -> str:
    drops = (f"{b}: below float" for b in bits)
    head = ["variant", "what differs", "seeds", "stores, kB", *(f"{b} bits" for b in bits), *drops]
    rows = []
    for runs in variants:
        scores = [
            [score[split] for run in runs for score in [run["final"].get(str(width), {})] if split in score]
            for width in bits
        ]
        rows.append(
            [
                runs[0]["variant"],
                ", ".join(f"`{word}`" for word in runs[0]["changed"]) or "nothing",
                ", ".join(str(run["seeds"][0]) for run in runs),
                f"{stored_bytes(runs[0]) / 1e3:,.0f}",
                *(mean([score["top1"] for score in one]) for one in scores),
                *(mean([score["drop"] for score in one]) for one in scores),
            ]
        )
    return table(title, head, rows, [run for runs in variants for run in runs])


def _worth_tables(title: str, schedule: str, variants: Sequence[Sequence[_Result]], bits: Sequence[int]) -> list[str]:
    """The table of what ways of training are above those that they are held against, seed by seed, if there are any."""
    # Of one width alone there is nothing to compare all of them with.
    whole = (runs for runs in variants if len(runs[0]["bits"]) == len(bits))
    known = {runs[0]["variant"]: {run["seeds"][0]: run for run in runs} for runs in whole}
    costs = {variant: {spent(run, schedule) for run in runs.values()} for variant, runs in known.items()}
    rows, shown = [], []
    for variant, runs in known.items():
        for base in (name for prefix, name in _HELD_AGAINST.get(schedule, ()) if variant.startswith(prefix)):
            seeds = sorted(runs.keys() & known.get(base, {}).keys())
            if base != variant and seeds and costs[variant] == costs[base]:
                break
        else:
            continue
        pairs = [(_measures(runs[seed]), _measures(known[base][seed])) for seed in seeds]
        shown += [way[seed] for way in (runs, known[base]) for seed in seeds]
        first, second = pairs[0]
        rows += [
            [variant, base, ", ".join(map(str, seeds)), measure]
            + [difference([one[measure][width] - other[measure][width] for one, other in pairs]) for width in bits]
            for measure in first
            if measure in second
        ]
    head = ["variant", "above", "seeds", "on", *(f"{b} bits" for b in bits)]
    return [table(title, head, rows, shown)] if rows else []


def _measures(run: _Result) -> dict[str, dict[int, float]]:
    """{name: {bits: top-1}} of what a training can be judged by."""
    scores = {width: run["final"][str(width)] for width in run["bits"]}
    curves = {width: run["curves"][str(width)]["top1"] for width in run["bits"]}
    lasting = f"val, mean of the last {_LASTING} of {run['epochs']} epochs"
    found = {
        "val, last epoch": {width: score["val"]["top1"] for width, score in scores.items()},
        lasting: {width: statistics.mean(curve[-_LASTING:]) for width, curve in curves.items()},
    }
    tested = all("test" in score for score in scores.values())
    return found | ({"test": {width: score["test"]["top1"] for width, score in scores.items()}} if tested else {})


def spent(run: _Result, schedule: str) -> float:
    """What trainings that are compared in a schedule have alike: passes over the images in "long", elsewhere `cost`."""
    return float(run["epochs"]) if schedule == "long" else cost(run)


def cost(run: _Result) -> float:
    """Forwards of a training, in epochs that visit each of its widths."""
    return float(run["epochs"] * forwards(run) / len(run["bits"]))


def forwards(run: _Result) -> float:
    """How many widths a step of a training visits on average."""
    said = [float(word.partition("=")[2]) for word in run["overrides"] if word.startswith("train.forwards=")]
    return said[-1] if said else len(run["bits"])


def stored_bytes(run: _Result) -> int:
    """What a training leaves to be stored: an artifact, or a rival's weights."""
    # Older files name what an artifact has, and none of them is of a training without one.
    return int(run.get("stored_bytes") or run["artifact_bytes"])


def _length_tables(results: Sequence[_Result]) -> list[str]:
    """For every list of widths: ways of training at the end of schedules of several lengths, if there are any.

    What a schedule has after some of its epochs does not tell what a shorter one ends with: the rate has not fallen there.
    """
    ways = grouped(
        results,
        lambda one: (tuple(one["bits"]), tuple(w for w in one["changed"] if not w.startswith("train.epochs="))),
    )
    found: dict[tuple[int, ...], list[tuple[list[str], list[_Result]]]] = {}
    for (bits, _), runs in ways.items():
        lengths = {
            epochs: {run["seeds"][0]: run for run in some}
            for epochs, some in grouped(runs, lambda one: int(one["epochs"])).items()
        }
        seeds = sorted(set.intersection(*(set(some) for some in lengths.values())))
        if len(lengths) < 2 or not seeds:
            continue
        name = runs[0]["variant"].removesuffix(TWICE)
        for epochs, some in sorted(lengths.items()):
            own = [some[seed] for seed in seeds]
            scores = (mean([run["final"][str(width)]["val"]["top1"] for run in own]) for width in bits)
            row = [name, str(epochs), f"{cost(own[0]):.3g}", ", ".join(map(str, seeds)), *scores]
            found.setdefault(bits, []).append((row, own))
    return [
        table(
            f"Whole schedules of several lengths, bits {', '.join(map(str, bits))}: top-1 % on val after the last epoch, of "
            "the seeds that every length of a way has",
            ["variant", "epochs", "forwards, in epochs of all widths", "seeds", *(f"{width} bits" for width in bits)],
            [row for row, _ in rows],
            [run for _, some in rows for run in some],
        )
        for bits, rows in sorted(found.items(), reverse=True)
    ]


def _curve_table(title: str, variants: Sequence[Sequence[_Result]]) -> str:
    epochs = max(run["epochs"] for runs in variants for run in runs)
    rows = []
    for runs in variants:
        for width in runs[0]["bits"]:
            curves = [run["curves"][str(width)]["top1"] for run in runs]
            reached = [[curve[epoch] for curve in curves if epoch < len(curve)] for epoch in range(epochs)]
            lasting = [statistics.mean(curve[-_LASTING:]) for curve in curves]
            cells = [f"{statistics.mean(one):.2f}" if one else "" for one in (*reached, lasting)]
            rows.append([runs[0]["variant"], str(width), *cells])
    head = ["variant", "bits", *map(str, range(1, epochs + 1)), f"mean of its last {_LASTING}"]
    return table(title, head, rows, [run for runs in variants for run in runs])


def _scale_table(title: str, variants: Sequence[Sequence[_Result]]) -> str:
    rows = []
    for runs in variants:
        for width in runs[0]["bits"]:
            cells = []
            for quantity in _QUANTITIES:
                known = [run["means_over_layers"][str(width)][quantity] for run in runs]
                first, last = (statistics.mean(one[at] for one in known) for at in (0, -1))
                cells.append(f"{first:.3g} → {last:.3g}")
            rows.append([runs[0]["variant"], str(width), *cells])
    return table(title, ["variant", "bits", *_QUANTITIES.values()], rows, [run for runs in variants for run in runs])
