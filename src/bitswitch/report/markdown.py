"""Parts of Markdown tables that several tables share."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from scipy.stats import t

_Result = Mapping[str, Any]
_Key = TypeVar("_Key")


def grouped(results: Iterable[_Result], key: Callable[[_Result], _Key]) -> dict[_Key, list[_Result]]:
    """Results by a key, each group in the order that they came in."""
    groups: dict[_Key, list[_Result]] = {}
    for one in results:
        groups.setdefault(key(one), []).append(one)
    return groups


def mean(values: Sequence[float]) -> str:
    """The mean with the sample standard deviation after ±, if there are two; nothing of nothing."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def difference(values: Sequence[float]) -> str:
    """`mean` of paired differences, in bold where the 95 % interval of their mean (Student's t) leaves 0 out."""
    told = mean(values)
    if len(values) < 3:
        return told
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"**{told}**" if abs(statistics.mean(values)) > half else told


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], results: Sequence[_Result] = ()) -> str:
    """A table under its title; below it, what gave the results that it was put together from."""
    lines = [f"**{title}**", "", _line(head), _line(["---"] * len(head)), *map(_line, rows)]
    if results:
        lines += ["", _source(results)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def short_commit(commit: str | None) -> str:
    """A commit as it is shown; what ends in "+changes" cannot be had again, and says so."""
    whole, changed, _ = (commit or "unknown").partition("+changes")
    return whole[:12] + changed


def _source(results: Sequence[_Result]) -> str:
    machines = {
        f"{m['device']}, {m['threads']} threads, torch {m['torch']}"
        for one in results
        for m in one.get("machines", [one["machine"]])
    }
    commits = {short_commit(commit) for one in results for commit in one.get("commits", [one["commit"]])}
    data = {one["data"] for one in results}
    return f"{'; '.join(sorted(data))}. Commits {', '.join(sorted(commits))}. {'; '.join(sorted(machines))}."
