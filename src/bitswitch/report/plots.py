"""Figures of docs/results.md, from the result files of CIFAR-10."""

import hashlib
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from bitswitch import files
from bitswitch.errors import require
from bitswitch.report.accuracy import by_widths, forwards, spent
from bitswitch.report.markdown import grouped
from bitswitch.report.subnets import ALIKE, SHOWN, by_joint, reached

_Result = Mapping[str, Any]
# Distinct to colour-blind readers too (Okabe and Ito), and each with a mark of its own.
_LOOKS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))
# A training that stays so many points below float to its end is left out of a panel's sight.
_SIGHT = 30


def draw(results: str | Path, folder: str | Path) -> list[Path]:
    """Draw what the result files hold: `epochs-<schedule>-<bits>-<spent>.svg`, `subnets-<job>.svg`, `widths-<job>.svg`.

    What is in a figure is alike in what was spent: see `bitswitch.report.accuracy.spent`. Forwards of a training are counted in
    epochs that visit every width. A training of one width is in all figures of its schedule and of lists that hold the width.

    A figure names, in its description, the digest of the files that it was made from: see `digest`.

    Args:
        results: folder of result files.
        folder: where the figures go.

    Returns:
        The files that were written.

    Raises:
        UserError: matplotlib is not installed.
    """
    known = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(results).glob("*.json"))}
    trainings = [one for one in known.values() if one.get("schedule") not in (None, "float")]
    figures = {}
    for (schedule, bits), runs in sorted(by_widths(trainings).items(), key=lambda item: item[0]):
        alone = [one for one in runs if len(one["bits"]) < len(bits)]
        whole = [one for one in runs if len(one["bits"]) == len(bits)]
        for alike, some in sorted(grouped(whole, partial(spent, schedule=schedule)).items()):
            figures[f"epochs-{schedule}-{''.join(map(str, bits))}-{alike:g}.svg"] = _epochs([*some, *alone], bits)
    for joint, ways in by_joint([one for one in known.values() if "random" in one]).items():
        figures[f"subnets-{joint}.svg"] = _subnets(ways)
        figures[f"widths-{joint}.svg"] = _widths(ways)
    written = []
    for name, figure in figures.items():
        written.append(Path(folder) / name)
        files.write(written[-1], _svg(figure, digest(results)))
    return written


def digest(results: str | Path) -> str:
    """SHA-256 of the names and contents of all result files of a folder."""
    found = hashlib.sha256()
    for path in sorted(Path(results).glob("*.json")):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def _epochs(runs: Sequence[_Result], bits: Sequence[int]) -> Any:
    """Points below float on val against forwards, a panel for each width; the mean of the seeds."""
    variants = sorted({one["variant"] for one in runs})
    # The legend above the panels has a line for two of them.
    size = (3.2 * len(bits), 3 + 0.11 * len(variants))
    figure, axes = _pyplot().subplots(1, len(bits), figsize=size, layout="constrained", squeeze=False)
    panels = dict(zip(bits, axes[0], strict=True))
    for look, variant in zip(cycle(_looks()), variants, strict=False):
        seeds = [one for one in runs if one["variant"] == variant]
        share = forwards(seeds[0]) / len(bits)
        for width in seeds[0]["bits"]:
            floats = [one["final"][str(width)]["val"] for one in seeds]
            levels = [score["top1"] + score["drop"] for score in floats]
            curves = zip(*(one["curves"][str(width)]["top1"] for one in seeds), strict=True)
            drops = [statistics.mean(f - t for f, t in zip(levels, reached, strict=True)) for reached in curves]
            label = f"{variant} ({len(seeds)})" if len(seeds) > 1 else variant
            x = [share * (i + 1) for i in range(len(drops))]
            panels[width].plot(x, drops, label=label, markersize=4, **look)
    for width, panel in panels.items():
        # What never comes near would leave no room to tell the others apart.
        drawn = [list(line.get_ydata()) for line in panel.get_lines()]
        near = [drop for one in drawn if min(one) <= _SIGHT for drop in one]
        if hidden := sum(min(one) > _SIGHT for one in drawn):
            panel.set_ylim(min(near, default=0) - 1, max(near, default=_SIGHT) + 1)
        panel.set_title(f"{width} bits" + (f" ({hidden} more than {_SIGHT} below)" if hidden else ""))
        panel.invert_yaxis()
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel("points below float, val")
    about = f"forwards and backwards, in epochs that visit every width ({_data(runs)})"
    figure.supxlabel(about, fontsize="medium")
    # A training of one width is in one panel alone.
    shown = [zip(*panel.get_legend_handles_labels(), strict=True) for panel in panels.values()]
    lines = {label: line for some in shown for line, label in some}
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def _subnets(ways: Mapping[str, Sequence[_Result]]) -> Any:
    """Top-1 of SubNets against average bits, a panel for each way to a SuperNet; the mean of the seeds."""
    figure, panels = _pyplot().subplots(
        1, len(ways), figsize=(5 * len(ways), 4.6), layout="constrained", squeeze=False, sharey=True
    )
    for panel, (way, runs) in zip(panels[0], ways.items(), strict=True):
        known = [reached(run) for run in runs]
        for look, label in zip(_looks(), known[0], strict=False):
            points = [(bits, statistics.mean(one[label][bits][0] for one in known)) for bits in sorted(known[0][label])]
            # Between uniform widths there is nothing: no line joins them.
            line = {"linestyle": ""} if label == ALIKE else {}
            panel.plot(*zip(*points, strict=True), label=label, markersize=5, **(look | line))
        budgets = sorted(runs[0]["random"], key=float)
        drawn = [[[some[1] for some in run["random"][budget]] for run in runs] for budget in budgets]
        panel.errorbar(
            [float(budget) for budget in budgets],
            [statistics.mean(map(statistics.mean, some)) for some in drawn],
            yerr=[statistics.mean(map(statistics.stdev, some)) for some in drawn],
            label=f"{len(drawn[0][0])} at random, mean ± spread among them",
            color="#777777",
            linestyle="--",
            capsize=3,
        )
        panel.set_title(f"{way} ({len(runs)})" if len(runs) > 1 else way)
        panel.set_xlabel("average bits of a weight's layer")
        panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel(f"top-1 %, {next(iter(ways.values()))[0]['split']}")
    figure.supxlabel(_data([run for runs in ways.values() for run in runs]), fontsize="medium")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=1 + len(ways), frameon=False
    )
    return figure


def _widths(ways: Mapping[str, Sequence[_Result]]) -> Any:
    """The width of every layer in what the programme chose: a panel for each budget and way, a row for each damage and seed."""
    figure, panels = _pyplot().subplots(
        len(SHOWN), len(ways), figsize=(6.4 * len(ways), 4.4 * len(SHOWN)), layout="constrained", squeeze=False
    )
    for column, (way, runs) in zip(panels.T, ways.items(), strict=True):
        known = {run["seeds"][0]: reached(run) for run in runs}
        for panel, budget in zip(column, SHOWN, strict=True):
            rows = {
                f"{label.removeprefix('programme, damage ')}, seed {seed}": found[label][budget][1]
                for label in next(iter(known.values()))
                if label != ALIKE
                for seed, found in known.items()
            }
            widths = [[int(width) for width in digits] for digits in rows.values()]
            panel.imshow(widths, aspect="auto", cmap="Blues", vmin=0, vmax=12)
            for y, row in enumerate(widths):
                for x, width in enumerate(row):
                    panel.text(x, y, width, ha="center", va="center", fontsize="small")
            panel.set_yticks(range(len(rows)), rows)
            panel.set_xticks(range(len(widths[0])), range(1, len(widths[0]) + 1))
            panel.set_title(f"{way}: {budget:g} average bits")
            panel.set_xlabel("quantized layer, in the order of the network")
    figure.supxlabel(_data([run for runs in ways.values() for run in runs]), fontsize="medium")
    return figure


def _data(runs: Sequence[_Result]) -> str:
    return "; ".join(sorted({one["data"] for one in runs}))


def _looks() -> list[dict[str, str]]:
    solid = [{"color": color, "marker": marker} for color, marker in _LOOKS]
    return [look | {"linestyle": style} for style in ("-", "--", ":") for look in solid]


def _pyplot() -> Any:
    return require("matplotlib.pyplot", "dev")


def _svg(figure: Any, description: str) -> bytes:
    plt = _pyplot()
    # The same file from the same results: ids from a fixed salt, no date, and no version of the library.
    with plt.rc_context({"svg.hashsalt": "bitswitch", "svg.fonttype": "none"}):
        text = io.BytesIO()
        about = {"Date": None, "Creator": None, "Description": description}
        figure.savefig(text, format="svg", metadata=about)
    plt.close(figure)
    return text.getvalue()
