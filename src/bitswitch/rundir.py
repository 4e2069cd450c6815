"""A run directory: which stages are done, with which configuration and inputs, and the metrics so far."""

import contextlib
import errno
import importlib
import itertools
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitswitch import files
from bitswitch.errors import UserError, require

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


# What a file system says that has no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_OWN = (
    *("config.yaml", "metrics.jsonl", "stages.json", "scale_gradients.jsonl", "sensitivity.json", "frontier.json"),
    *("model.safetensors", "supernet.safetensors"),
)
_CHECKPOINTS = ("pretrain", "train", "supernet")
_RECORD = {"done", "config", "inputs", "outputs", "result"}


@dataclass(frozen=True)
class RunDirectory:
    """The files of a run, by the names that design and users know."""

    path: Path

    @property
    def artifact(self) -> Path:
        """The multi-precision artifact."""
        return self.path / "model.safetensors"

    @property
    def supernet(self) -> Path:
        """The SuperNet's artifact, with its frontier."""
        return self.path / "supernet.safetensors"

    @property
    def sensitivity(self) -> Path:
        """Traces of the float network."""
        return self.path / "sensitivity.json"

    @property
    def frontier(self) -> Path:
        """The choices of the search."""
        return self.path / "frontier.json"

    def checkpoint(self, stage: str) -> Path:
        """The checkpoint of a stage."""
        return self.path / "checkpoints" / f"{stage}.pt"

    @property
    def _stages(self) -> Path:
        return self.path / "stages.json"

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process alone; temporary files that killed runs left of its own files are removed.

        Warns:
            UserWarning: its file system has no locks.

        Raises:
            UserError: another process holds it, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"cannot use the run directory {self.path}: {error.strerror}; name another with --out"
            ) from error
        with lock:
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise UserError(
                            f"another bitswitch works in {self.path}: wait for it, or use another --out"
                        ) from error
                    warnings.warn(
                        f"{self.path} cannot be locked ({error.strerror}): let no other bitswitch work in it",
                        UserWarning,
                        stacklevel=2,
                    )
            for name in (*_OWN, *(f"checkpoints/{stage}.pt" for stage in _CHECKPOINTS)):
                own = self.path / name
                for left in own.parent.glob(f".{own.name}.????????{files.TEMPORARY_SUFFIX}"):
                    left.unlink(missing_ok=True)
            yield

    def records(self) -> dict[str, Any]:
        """{stage: {"done", "config", "inputs", "outputs", "result"}}.

        Raises:
            UserError: the file is damaged.
        """
        try:
            records = json.loads(self._stages.read_text(encoding="utf-8"))
            if not isinstance(records, dict) or any(set(record) != _RECORD for record in records.values()):
                raise ValueError("it holds no records of stages")
            return records
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{self._stages} is damaged ({error}): start over with bitswitch run ... --fresh, or use another --out"
            ) from error

    def strangers(self) -> list[str]:
        """Files by the names of a run's, in a directory that holds no record of a run."""
        if self._stages.exists():
            return []
        return [name for name in (*_OWN, "checkpoints") if (self.path / name).exists()]

    def write_records(self, records: Mapping[str, Any]) -> None:
        """Replace all records."""
        files.write_json(self._stages, records)

    def record(self, stage: str, value: Mapping[str, Any]) -> None:
        """Set one stage's record."""
        self.write_records(self.records() | {stage: dict(value)})

    def replaced(self, name: str, before: str) -> None:
        """A file was written anew with more in it: where it is a stage's output as recorded, it is so still.

        Args:
            name: of the file.
            before: its digest when it was the stage's.
        """
        records = self.records()
        for record in records.values():
            if record["outputs"].get(name) == before:
                record["outputs"][name] = files.file_digest(self.path / name)
                self.write_records(records)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows; a last line that a killed process left unfinished is passed over."""
        return _rows(self._metrics) if self._metrics.exists() else []

    def rewind_metrics(self, stage: str, epochs_done: int) -> None:
        """Drop the rows of `stage`, and of its scale gradients, that a resumed run will write again."""
        gradients = self.path / "scale_gradients.jsonl"
        if stage == "train" and gradients.exists():
            kept = [row for row in _rows(gradients) if row["epoch"] < epochs_done]
            files.write(gradients, "".join(json.dumps(row) + "\n" for row in kept).encode())
        rows = [
            r
            for r in self.metrics()
            if r.get("stage") != stage or (r["epoch"] is not None and r["epoch"] < epochs_done)
        ]
        files.write(self._metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def add_metrics(self, rows: list[dict[str, Any]], *, tensorboard: bool = False) -> None:
        """Append rows; with `tensorboard`, write their numbers for TensorBoard, too.

        Raises:
            UserError: the file cannot be written, or TensorBoard is not installed.
        """
        self._append(self._metrics, rows)
        if tensorboard:
            require("tensorboard", "tensorboard")
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(self.path / "tensorboard"))
            with writer:
                mixtures = itertools.count()
                for row in rows:
                    of = f"mixture {next(mixtures)}" if row.get("assignment") else row["bits"] or "float"
                    place = f"{row['stage']}/{of}"
                    for key in ("train_loss", "loss", "top1"):
                        if key in row:
                            writer.add_scalar(f"{place}/{key}", row[key], row["epoch"])

    def add_scale_gradients(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to scale_gradients.jsonl.

        Raises:
            UserError: the file cannot be written.
        """
        self._append(self.path / "scale_gradients.jsonl", rows)

    @staticmethod
    def _append(path: Path, rows: list[dict[str, Any]]) -> None:
        before = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps(row) + "\n" for row in rows))
        except OSError as error:
            # A full disk takes a part of what it is given.
            with contextlib.suppress(OSError):
                os.truncate(path, before)
            raise UserError(f"cannot write {path}: {error.strerror}; what was there before is as it was") from error


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, without what a killed process left unfinished."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "epoch" in row]


def changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested mappings, one phrase each: "train.epochs was 5, is 6"."""
    found = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += changes(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {json.dumps(old)}, is {json.dumps(new)}")
    return found
