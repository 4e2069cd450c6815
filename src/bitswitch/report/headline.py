"""The table of the README: what was decided on test, and nothing else of the trainings."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bitswitch.report.accuracy import OURS, stored_bytes
from bitswitch.report.markdown import grouped, table

_Result = Mapping[str, Any]
# What one seed says does not belong on a front page.
_SEEDS = 3
# What is shown, in this order, and what a reader who does not know our names for it is told.
_SELF, _PAPER, _LSQ = "bitswitch", "the paper's recipe", "LSQ jointly, float weights kept"
_LSQ_TAUGHT = "LSQ jointly, trained as bitswitch's row is"
_ALONE = "LSQ, a network for each width, float weights kept"
LABELS = {
    f"{OURS}-twice-as-long": _SELF,
    f"{OURS}-hot-432": _SELF,
    "paper": _PAPER,
    "paper-432": _PAPER,
    "lsq": _LSQ,
    "lsq-432": _LSQ,
    f"{OURS}-lsq-twice-as-long": _LSQ_TAUGHT,
    **{f"lsq-{bits}-alone": _ALONE for bits in (8, 4, 2)},
}


def headline(results: Sequence[_Result]) -> list[str]:
    """For every list of widths that has been decided: top-1 on test, the mean of the seeds, beside the float networks'.

    Args:
        results: of trainings; see `bitswitch.report.accuracy`. A way of training is shown once it has all seeds of its
            list, three at least, and a list once ours is. Networks of one width are a row together, of the lists that hold
            all their widths. The longer trainings of a way are a row of their own below it.
    """
    decided = [one for one in results if one["schedule"] in ("decide", "long") and one["variant"] in LABELS]
    lists = grouped(decided, lambda one: tuple(one["bits"]))
    alone = [one for bits, runs in lists.items() if len(bits) == 1 for one in runs]
    tables = []
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
        if _SELF not in ways:
            continue
        rows = [["float", "", *[f"{statistics.mean(levels.values()):.2f}"] * len(bits)]]
        for label, variants in ways.items():
            scores = [
                [run["final"][str(width)]["test"] for some in variants for run in some if width in run["bits"]]
                for width in bits
            ]
            stored = sum(stored_bytes(some[0]) for some in variants)
            rows.append([label, f"{stored / 1e3:,.0f}", *map(_cell, scores)])
        title = (
            f"ResNet20 on CIFAR-10, one network for {', '.join(map(str, bits))} bits: top-1 % on test (points above float, "
            f"± standard deviation over seeds), mean of seeds {', '.join(map(str, sorted(levels)))}"
        )
        shown = [run for variants in ways.values() for some in variants for run in some]
        tables.append(table(title, ["", "stores, kB", *(f"{width} bits" for width in bits)], rows, shown))
    return tables


def _order(of_a_way: tuple[tuple[str, str], Any]) -> tuple[int, str]:
    variant, schedule = of_a_way[0]
    return list(LABELS).index(variant), schedule


def _cell(scores: Sequence[Mapping[str, float]]) -> str:
    if not scores:
        return ""
    top1, drop = (statistics.mean(score[key] for score in scores) for key in ("top1", "drop"))
    spread = statistics.stdev(score["drop"] for score in scores)
    return f"{top1:.2f} ({-drop:+.2f} ± {spread:.2f})"
