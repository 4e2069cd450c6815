"""Figures of docs/results.md, from the result files of CIFAR-10."""

import hashlib
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitswitch import files
from bitswitch.errors import require

_Result = Mapping[str, Any]
ALIKE = "all layers alike"
# Distinct to colour-blind readers too (Okabe and Ito), and each with a mark of its own.
_LOOKS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))


def draw(results: str | Path, folder: str | Path) -> list[Path]:
    """Draw what the result files hold: `epochs-<schedule>-<bits>.svg` and `subnets.svg`.

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
    for schedule, bits in sorted({(one["schedule"], tuple(one["bits"])) for one in trainings}):
        runs = [one for one in trainings if (one["schedule"], tuple(one["bits"])) == (schedule, bits)]
        figures[f"epochs-{schedule}-{''.join(map(str, bits))}.svg"] = _epochs(runs, bits)
    subnets = [one for one in known.values() if "random" in one]
    if subnets:
        figures["subnets.svg"] = _subnets(subnets)
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
    figure, panels = _pyplot().subplots(1, len(bits), figsize=(3.2 * len(bits), 3.6), layout="constrained")
    for look, variant in zip(_looks(), sorted({one["variant"] for one in runs}), strict=False):
        seeds = [one for one in runs if one["variant"] == variant]
        share = _forwards(seeds[0]["overrides"], bits) / len(bits)
        for panel, width in zip(panels, bits, strict=True):
            floats = [one["final"][str(width)]["val"] for one in seeds]
            levels = [score["top1"] + score["drop"] for score in floats]
            curves = zip(*(one["curves"][str(width)]["top1"] for one in seeds), strict=True)
            drops = [statistics.mean(f - t for f, t in zip(levels, reached, strict=True)) for reached in curves]
            label = f"{variant} ({len(seeds)})" if len(seeds) > 1 else variant
            panel.plot([share * (i + 1) for i in range(len(drops))], drops, label=label, markersize=4, **look)
    for panel, width in zip(panels, bits, strict=True):
        panel.set_title(f"{width} bits")
        panel.invert_yaxis()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("points below float, val")
    figure.supxlabel("forwards and backwards, in epochs that visit every width", fontsize="medium")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def _subnets(results: Sequence[_Result]) -> Any:
    """Top-1 on val of SubNets against average bits, a panel for each SuperNet."""
    figure, panels = _pyplot().subplots(
        1, len(results), figsize=(6 * len(results), 4.4), layout="constrained", squeeze=False, sharey=True
    )
    for panel, one in zip(panels[0], results, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in one["rows"]:
            if "random" not in row[1]:
                lines.setdefault(row[1], []).append((row[0], float(row[2])))
        for look, (label, points) in zip(_looks(), lines.items(), strict=False):
            # Between uniform widths there is nothing: no line joins them.
            line = {"linestyle": ""} if label == ALIKE else {}
            panel.plot(*zip(*sorted(points), strict=True), label=label, markersize=5, **(look | line))
        budgets = sorted(one["random"], key=float)
        drawn = [[some[1] for some in one["random"][budget]] for budget in budgets]
        panel.errorbar(
            [float(budget) for budget in budgets],
            [statistics.mean(some) for some in drawn],
            yerr=[statistics.stdev(some) for some in drawn],
            label=f"{len(drawn[0])} at random, mean ± standard deviation",
            color="#777777",
            linestyle="--",
            capsize=3,
        )
        panel.set_title(one["title"], fontsize="medium")
        panel.set_xlabel("average bits of a weight's layer")
        panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("top-1 %, val")
    panels[0, 0].legend(loc="lower right", frameon=False)
    return figure


def _looks() -> list[dict[str, str]]:
    solid = [{"color": color, "marker": marker} for color, marker in _LOOKS]
    return [look | {"linestyle": style} for style in ("-", "--", ":") for look in solid]


def _forwards(overrides: Sequence[str], bits: Sequence[int]) -> float:
    """How many widths a step of a training visits on average."""
    said = [float(word.partition("=")[2]) for word in overrides if word.startswith("train.forwards=")]
    return said[-1] if said else len(bits)


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
