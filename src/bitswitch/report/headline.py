"""What was decided: the table of the README, and what its rows are above one another, seed by seed."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bitswitch.report.accuracy import ALL, OURS, TWICE, stored_bytes
from bitswitch.report.markdown import difference, grouped, table

_Result = Mapping[str, Any]
# What one seed says does not belong on a front page.
_SEEDS = 3
# What is shown, in this order, and what a reader who does not know our names for it is told.
_SELF, _PAPER, _LSQ = "bitswitch", "the paper's recipe", "LSQ jointly, float weights kept"
_EVERY = "bitswitch, every width in every step"
_LSQ_TAUGHT = "LSQ jointly, trained as bitswitch's row is"
_ALONE = "LSQ, a network for each width, float weights kept"
LABELS = {
    OURS + TWICE: _SELF,
    f"{OURS}-hot-432": _SELF,
    ALL: _EVERY,
    f"{ALL}-hot-432": _EVERY,
    "paper": _PAPER,
    "paper-432": _PAPER,
    "lsq": _LSQ,
    "lsq-432": _LSQ,
    f"{OURS}-lsq{TWICE}": _LSQ_TAUGHT,
    **{f"lsq-{bits}-alone": _ALONE for bits in (8, 4, 2)},
}


def headline(results: Sequence[_Result]) -> list[str]:
    """For every list of widths that has been decided: top-1 on test, the mean of the seeds, beside the float networks'.

    Args:
        results: of trainings; see `bitswitch.report.accuracy`. A way of training is shown once it has all seeds of its
            list, three at least, and a list once ours is. Networks of one width are a row together, of the lists that hold
            all their widths. The longer trainings of a way are a row of their own below it.
    """
    tables = []
    for bits, (levels, ways) in _decided(results).items():
        rows = [["float", "", *[f"{statistics.mean(levels.values()):.2f}"] * len(bits)]]
        for label, variants in ways.items():
            scores = [
                [run["final"][str(width)]["test"] for some in variants for run in some if width in run["bits"]]
                for width in bits
            ]
            stored = sum(stored_bytes(some[0]) for some in variants)
            rows.append([label, f"{stored / 1e3:,.0f}", *map(_cell, scores)])
        shown = _runs(ways)
        data = "; ".join(sorted({run["data"] for run in shown}))
        title = (
            f"ResNet20, one network for {', '.join(map(str, bits))} bits, on {data}: top-1 % on test (points above "
            f"float, ± standard deviation over seeds), mean of seeds {', '.join(map(str, sorted(levels)))}"
        )
        tables.append(table(title, ["", "stores, kB", *(f"{width} bits" for width in bits)], rows, shown))
    return tables


def differences(results: Sequence[_Result]) -> list[str]:
    """For every list of widths that has been decided: what its way is above the other rows of `headline`, paired by seed.

    Args:
        results: see `headline`.
    """
    tables = []
    for bits, (_, ways) in _decided(results).items():
        # Ours for longer is held against others for longer.
        longer = ways.keys() - LABELS.values()
        pairs = [
            (one, other)
            for one in ways
            for other in ways
            if one.startswith(_SELF) and one != _EVERY
            if not other.startswith(_SELF) and (one == _SELF or other in longer)
        ]
        pairs += [(_LSQ_TAUGHT, _LSQ)] * (_LSQ_TAUGHT in ways and _LSQ in ways)
        rows = [
            [one, other, split, *(_above(ways[one], ways[other], width, split) for width in bits)]
            for split in ("test", "val")
            for one, other in pairs
        ]
        title = (
            f"What was decided at {', '.join(map(str, bits))} bits: points of top-1 above another row (mean over seeds of the "
            "paired differences ± their standard deviation; bold where the 95 % interval of the mean leaves 0 out)"
        )
        shown = _runs(ways)
        tables.append(table(title, ["row", "above", "on", *(f"{width} bits" for width in bits)], rows, shown))
    return tables


def _decided(
    results: Sequence[_Result],
) -> dict[tuple[int, ...], tuple[dict[int, float], dict[str, list[list[_Result]]]]]:
    """{bits: ({seed: top-1 of its float network on test}, {row: for each variant in it, its runs})}; see `headline`."""
    decided = [one for one in results if one["schedule"] in ("decide", "long") and one["variant"] in LABELS]
    lists = grouped(decided, lambda one: tuple(one["bits"]))
    alone = [one for bits, runs in lists.items() if len(bits) == 1 for one in runs]
    found = {}
    for bits, own in sorted(((bits, runs) for bits, runs in lists.items() if len(bits) > 1), reverse=True):
        # The float network of a seed, from any run that is held against it.
        levels = {
            run["seeds"][0]: sum(run["final"][str(bits[0])]["test"][key] for key in ("top1", "drop"))
            for run in own
            if run["schedule"] == "decide"
        }
        runs = own + (alone if {run["bits"][0] for run in alone} <= set(bits) else [])
        ways: dict[str, list[list[_Result]]] = {}
        for (variant, schedule), some in sorted(
            grouped(runs, lambda one: (str(one["variant"]), str(one["schedule"]))).items(), key=_order
        ):
            longer = f", {some[0]['epochs']} epochs" if schedule == "long" else ""
            ways.setdefault(LABELS[variant] + longer, []).append(some)
        ways = {
            label: variants
            for label, variants in ways.items()
            if len(levels) >= _SEEDS
            and all(sorted(run["seeds"][0] for run in some) == sorted(levels) for some in variants)
        }
        if _SELF in ways:
            found[bits] = levels, ways
    return found


def _runs(ways: Mapping[str, Sequence[Sequence[_Result]]]) -> list[_Result]:
    return [run for variants in ways.values() for some in variants for run in some]


def _above(one: Sequence[Sequence[_Result]], other: Sequence[Sequence[_Result]], width: int, split: str) -> str:
    first, second = (
        {
            run["seeds"][0]: run["final"][str(width)][split]["top1"]
            for some in row
            for run in some
            if width in run["bits"]
        }
        for row in (one, other)
    )
    return difference([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def _order(of_a_way: tuple[tuple[str, str], Any]) -> tuple[int, str]:
    variant, schedule = of_a_way[0]
    return list(LABELS).index(variant), schedule


def _cell(scores: Sequence[Mapping[str, float]]) -> str:
    if not scores:
        return ""
    top1, drop = (statistics.mean(score[key] for score in scores) for key in ("top1", "drop"))
    spread = statistics.stdev(score["drop"] for score in scores)
    return f"{top1:.2f} ({-drop:+.2f} ± {spread:.2f})"
