"""Tables of SubNets, put together from one result file for each SuperNet and seed.

Such a file names its job in its command (`mixed.py WAY-of-JOB-seedK`) and has, beside what every result file has: "rows"
[[average bits, SubNet, top-1, widths]], "random" {budget: [[widths, top-1]]} and "rank_correlation_of_damage_and_top1" {damage:
{budget: Spearman's rank correlation over the random SubNets}}.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bitswitch.report.markdown import grouped, mean, table

_Result = Mapping[str, Any]
ALIKE = "all layers alike"
# Budgets whose widths are shown layer by layer.
SHOWN = (3.0, 4.0)


def way_and_joint(result: _Result) -> tuple[str, str]:
    """How a SuperNet was trained, and the joint training that it comes from, without the seed."""
    found = re.search(r"mixed\.py (\w+)-of-(.+)-seed\d+ ", result["command"])
    if found is None:
        raise ValueError(f"{result['command']!r} names no job of SubNets")
    return found[1], found[2]


def by_joint(results: Sequence[_Result]) -> dict[str, dict[str, list[_Result]]]:
    """{joint training: {way: results in the order of seeds}}."""
    joints = grouped(results, lambda one: way_and_joint(one)[1])
    return {
        joint: {
            way: sorted(runs, key=lambda one: one["seeds"][0])
            for way, runs in sorted(grouped(some, lambda one: way_and_joint(one)[0]).items())
        }
        for joint, some in sorted(joints.items())
    }


def reached(result: _Result) -> dict[str, dict[float, tuple[float, str]]]:
    """{SubNet: {average bits: (top-1 in percent, widths)}} of those that are no means over random ones."""
    found: dict[str, dict[float, tuple[float, str]]] = {}
    for bits, label, top1, widths in result["rows"]:
        if widths:
            found.setdefault(label, {})[float(bits)] = (float(top1), widths)
    return found


def subnet_tables(results: Sequence[_Result]) -> list[str]:
    """For every joint training: what its SubNets reach, how far damage tells, and the widths at 3 and 4 average bits.

    Several seeds become their mean, with the sample standard deviation after ±; of random SubNets, the standard deviation is
    the one among those of a seed, its mean over seeds.
    """
    tables = []
    for joint, ways in by_joint(results).items():
        runs = [one for some in ways.values() for one in some]
        splits = ", ".join(dict.fromkeys(one["split"] for one in runs))
        tables += [
            _reached_table(f"SubNets after {joint}: top-1 % on {splits} at average bits", ways),
            _rank_table(
                f"SubNets after {joint}: rank correlation of damage and top-1 among random ones, at average bits", ways
            ),
            _widths_table(f"SubNets after {joint}: widths, a digit for each layer in the order of the network", ways),
        ]
    return tables


def _reached_table(title: str, ways: Mapping[str, Sequence[_Result]]) -> str:
    averages = sorted({float(row[0]) for runs in ways.values() for run in runs for row in run["rows"]})
    rows = []
    for way, runs in ways.items():
        seeds = ", ".join(str(run["seeds"][0]) for run in runs)
        known = [reached(run) for run in runs]
        for label in known[0]:
            cells = [mean([one[label][bits][0] for one in known if bits in one[label]]) for bits in averages]
            rows.append([way, seeds, label, *cells])
        budgets = {float(budget): budget for budget in runs[0]["random"]}
        drawn = [[[top1 for _, top1 in run["random"][budgets[bits]]] for run in runs] if bits in budgets else []
                 for bits in averages]  # fmt: skip
        label = f"{len(runs[0]['random'][budgets[min(budgets)]])} at random, mean ± spread among them"
        rows.append([way, seeds, label, *map(_among, drawn)])
    return table(
        title,
        ["SuperNet", "seeds", "SubNet", *(f"{bits:g}" for bits in averages)],
        rows,
        [run for runs in ways.values() for run in runs],
    )


def _among(drawn: Sequence[Sequence[float]]) -> str:
    if not drawn:
        return ""
    means, spreads = zip(*((statistics.mean(one), statistics.stdev(one)) for one in drawn), strict=True)
    return f"{statistics.mean(means):.2f} ± {statistics.mean(spreads):.2f}"


def _rank_table(title: str, ways: Mapping[str, Sequence[_Result]]) -> str:
    budgets = sorted(next(iter(ways.values()))[0]["random"], key=float)
    rows = []
    for way, runs in ways.items():
        ranks = [run["rank_correlation_of_damage_and_top1"] for run in runs]
        rows += [[way, form, *(mean([one[form][b] for one in ranks]) for b in budgets)] for form in ranks[0]]
    head = ["SuperNet", "damage", *(f"{float(budget):g}" for budget in budgets)]
    return table(title, head, rows, [run for runs in ways.values() for run in runs])


def _widths_table(title: str, ways: Mapping[str, Sequence[_Result]]) -> str:
    rows = []
    for way, runs in ways.items():
        for run in runs:
            for label, some in reached(run).items():
                rows += [
                    [way, str(run["seeds"][0]), label, f"{bits:g}", f"`{some[bits][1]}`", f"{some[bits][0]:.2f}"]
                    for bits in SHOWN
                    if bits in some and label != ALIKE
                ]
    head = ["SuperNet", "seed", "SubNet", "average bits", "widths", "top-1 %"]
    return table(title, head, rows, [run for runs in ways.values() for run in runs])
