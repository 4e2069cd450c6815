"""The README's Python blocks run as they stand, on a small network of the same layer names."""

import re
from pathlib import Path

from torchvision import models

import bitswitch as bs
from bitswitch.models import build

README = Path(__file__).parents[1] / "README.md"


def test_the_python_blocks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "resnet18", lambda: build("cifar_resnet8", {"num_classes": 5}))
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    training = [block for block in blocks if "Session" not in block]
    assert len(training) == 2 and len(blocks) == 3
    names = {}
    for block in training:
        exec(block, names)
    assert bs.widths(names["model"]) == names["best"][0].assignment.to_json()
    assert (tmp_path / "model.safetensors").stat().st_size > 70_000
