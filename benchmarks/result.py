"""The file that a benchmark writes, in the form that `make results` reads."""

import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import quantile_test

from bitswitch import files
from bitswitch.errors import UserError
from bitswitch.machine import machine, source_commit

# When the benchmark starts: what runs is what is there then.
_COMMIT = source_commit()


def commit() -> str | None:
    """The commit of the checkout when this process began."""
    return _COMMIT


def command() -> str:
    """What was typed, without the places of this machine."""
    return shlex.join(["python", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv)])


def run(main: Callable[[], None]) -> None:
    """Run a benchmark; a mistake of whoever typed its options ends in one line instead of a traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(str(error))


def write(
    path: Path,
    *,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    data: str = "random",
    split: str = "none",
    seeds: Sequence[int | str] = (0,),
    note: str | None = None,
    **more: Any,
) -> None:
    """Write a table and what gave it.

    Args:
        path: of the file; its folder is made.
        title: of the table.
        columns: their heads.
        rows: numbers and words.
        data: on which it was measured.
        split: of the data.
        seeds: of everything random.
        note: what a reader must know.
        more: measurements beside the table; `command` and `commit` replace those of this process.
    """
    document = {
        "title": title,
        "command": command(),
        "data": data,
        "split": split,
        "seeds": list(seeds),
        "commit": _COMMIT,
        "machine": machine(),
        **({} if note is None else {"note": note}),
        "columns": list(columns),
        "rows": rows,
        **more,
    }
    files.write(path, (_json(document) + "\n").encode())


def _json(value: Any, indent: str = "") -> str:
    """Indented JSON with a list of numbers and words on one line."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(str(key))}: {_json(one, inner)}" for key, one in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(one, (dict, list)) for one in value):
        return "[\n" + ",\n".join(inner + _json(one, inner) for one in value) + f"\n{indent}]"
    return json.dumps(value)


def spread(ratios: Sequence[float]) -> dict[str, Any]:
    """The median of ratios of pairs, its 95 % interval by order statistics, and the quartiles."""
    if len(ratios) < 6:
        sys.exit(f"{len(ratios)} pairs have no 95 % interval: take 6 or more")
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    bounds = quantile_test(list(ratios), q=middle, p=0.5).confidence_interval(0.95)
    return {
        "ratio": round(middle, 3),
        "ratio_bounds": [round(float(bound), 3) for bound in bounds],
        "ratio_quartiles": [round(low, 3), round(high, 3)],
    }
