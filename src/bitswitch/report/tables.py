"""Markdown tables from result files.

A result file is JSON: {"title", "command", "data", "split", "seeds", "commit", "machine", "columns", "rows", "note"}.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitswitch import files
from bitswitch.errors import UserError
from bitswitch.report.accuracy import accuracy_tables
from bitswitch.report.headline import differences, headline
from bitswitch.report.markdown import short_commit, table
from bitswitch.report.subnets import subnet_tables

_BEGIN = "<!-- results:begin -->"
_END = "<!-- results:end -->"


def render(result: Mapping[str, Any]) -> str:
    """One result as a Markdown table, followed by what gave it."""
    rows = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in result["rows"]]
    machine = result["machine"]
    source = (
        f"`{result['command']}`, commit {short_commit(result['commit'])}, data {result['data']}, "
        f"split {result['split']}, seeds {', '.join(map(str, result['seeds']))}, {machine['device']}, "
        f"{machine['threads']} threads, torch {machine['torch']}."
    )
    below = " ".join(part for part in (result.get("note"), source) if part)
    return f"{table(result['title'], result['columns'], rows)}\n\n{below}"


def update(document: str | Path, results: str | Path, *, brief: bool = False) -> None:
    """Put the tables of all result files of a folder between the markers of a Markdown document.

    Files of trainings, which name a variant, and of SubNets, which have random ones, are put together and come first; each
    other file gives a table of its own.

    Args:
        document: Markdown with the two markers.
        results: folder of result files.
        brief: what trainings decided, and nothing else; see `bitswitch.report.headline`.

    Raises:
        UserError: there are no result files, one lacks a field, or the document cannot be read or lacks the markers.
    """
    document = Path(document)
    singles, trainings, subnets = [], [], []
    paths = sorted(Path(results).glob("*.json"))
    if not paths:
        raise UserError(f"{results} holds no result files (*.json): the tables of {document} stay as they are")
    for path in paths:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if "variant" in value:
                accuracy_tables([value])
                trainings.append(value)
            elif "random" in value:
                subnet_tables([value])
                subnets.append(value)
            else:
                singles.append(render(value))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path} is not a result file: {error!r}") from error
    if brief:
        tables = headline(trainings)
    else:
        tables = [*differences(trainings), *accuracy_tables(trainings), *subnet_tables(subnets), *singles]
    try:
        text = document.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {document}: {error}") from error
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise UserError(f"{document} lacks the lines {_BEGIN} and {_END}")
    files.write(document, "\n\n".join([before + begin, *tables, end + after]).encode())
