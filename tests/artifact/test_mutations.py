"""Some of the damage that benchmarks/mutate.py does 100,000 times."""

import random

import pytest
import torch
from torch import nn

import bitswitch as bs
import mutate
from bitswitch.errors import UserError


@pytest.mark.parametrize("kind", mutate.KINDS)
def test_damage_is_refused_or_does_not_matter(tmp_path, kind):
    (row,) = mutate.run(tmp_path, 300, 1, [kind])
    assert row["failure"] is None and row["files"] == 300
    assert sum(n for told, n in row["outcomes"].items() if told.startswith("refused")) > 100


def test_a_reader_that_fails_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(mutate, "same", lambda *_: False)
    (row,) = mutate.run(tmp_path, 200, 1, ["table edited"])
    assert "other tensors" in row["failure"]


def two_lines():
    raise UserError("one\ntwo")


@pytest.mark.parametrize("read", [lambda: 1 / 0, two_lines])
def test_an_answer_that_is_no_refusal_is_found_out(read):
    assert mutate.attempt(read)[0].startswith("FAILED")


@pytest.mark.parametrize("kind", mutate.KINDS)
def test_load_refuses_what_read_refuses(tmp_path, kind):
    torch.manual_seed(0)
    network, x = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))), torch.randn(8, 6)
    model = bs.quantize(network, example_inputs=x, bits=(4, 2)).eval()
    bs.save(model, tmp_path / "whole")
    whole, path = (tmp_path / "whole").read_bytes(), tmp_path / "damaged"
    for number in range(30):
        path.write_bytes(mutate.KINDS[kind](whole, random.Random(number)))
        for bits in (4, 2):
            try:
                loaded = bs.load(path, model=network, bits=bits)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
            else:
                with torch.no_grad(), bs.switched(model, bits):
                    assert kind == "header forged" or torch.equal(loaded(x), model(x))
