import errno
import json
from pathlib import Path

import pytest

from bitswitch.errors import UserError
from bitswitch.rundir import RunDirectory


def test_rows_that_a_full_disk_took_in_part_are_taken_back(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    row = {"stage": "train", "epoch": 0, "bits": 8}
    directory.add_metrics([row])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    real_open = Path.open

    def full(self, *args, **kwargs):
        stream = real_open(self, *args, **kwargs)
        real_write = stream.write

        def write(text):
            real_write(text[:10])
            stream.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

        stream.write = write
        return stream

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match="No space left on device; what was there before is as it was"):
        directory.add_metrics([row | {"epoch": 1}])
    monkeypatch.undo()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    directory.add_metrics([row | {"epoch": 1}])
    assert [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1]


def test_rows_that_a_resumed_run_writes_again_are_dropped(tmp_path):
    directory = RunDirectory(tmp_path)
    rows = [
        *({"stage": "pretrain", "epoch": epoch} for epoch in (0, 1, None)),
        *({"stage": "train", "epoch": epoch} for epoch in (0, 1, None)),
    ]
    directory.add_metrics(rows)
    directory.add_scale_gradients([{"epoch": epoch} for epoch in (0, 1)])
    directory.rewind_metrics("train", 1)
    assert directory.metrics() == rows[:4]
    gradients = (tmp_path / "scale_gradients.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in gradients] == [{"epoch": 0}]
