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
LABELS = {
    f"{OURS}-twice-as-long": _SELF,
    "kd-float-alone-scale-lr-2e-3-hot-432": _SELF,
    "paper": _PAPER,
    "paper-432": _PAPER,
    "lsq": _LSQ,
    "lsq-432": _LSQ,
}


def headline(results: Sequence[_Result]) -> list[str]:
    """For every list of widths that has been decided: top-1 on test, the mean of the seeds, beside the float networks'.

    Args:
        results: of trainings; see `bitswitch.report.accuracy`. A way of training is shown once it has all seeds of its
            list, three at least, and a list once ours is.
    """
    decided = [one for one in results if one["schedule"] == "decide" and one["variant"] in LABELS]
    tables = []
    for bits, runs in sorted(grouped(decided, lambda one: tuple(one["bits"])).items(), reverse=True):
        # The float network of a seed, from any run that is held against it.
        levels = {
            run["seeds"][0]: sum(run["final"][str(bits[0])]["test"][key] for key in ("top1", "drop")) for run in runs
        }
        variants = {
            variant: some
            for variant, some in grouped(runs, lambda one: one["variant"]).items()
            if len(some) == len(levels) >= _SEEDS
        }
        if _SELF not in map(LABELS.get, variants):
            continue
        rows = [["float", "", *[f"{statistics.mean(levels.values()):.2f}"] * len(bits)]]
        for variant in sorted(variants, key=list(LABELS).index):
            scores = [[run["final"][str(width)]["test"] for run in variants[variant]] for width in bits]
            rows.append([LABELS[variant], f"{stored_bytes(variants[variant][0]) / 1e3:,.0f}", *map(_cell, scores)])
        title = (
            f"ResNet20 on CIFAR-10, one network for {', '.join(map(str, bits))} bits: top-1 % on test (points above float), "
            f"mean of seeds {', '.join(map(str, sorted(levels)))}"
        )
        shown = [run for some in variants.values() for run in some]
        tables.append(table(title, ["", "stores, kB", *(f"{width} bits" for width in bits)], rows, shown))
    return tables


def _cell(scores: Sequence[Mapping[str, float]]) -> str:
    top1, drop = (statistics.mean(score[key] for score in scores) for key in ("top1", "drop"))
    return f"{top1:.2f} ({-drop:+.2f})"
