import pytest
import torch

import bitswitch as bs
from bitswitch.errors import UserError
from bitswitch.models import build
from bitswitch.nn import plan_of
from bitswitch.subject import subject_of


@pytest.fixture(scope="module")
def state():
    model = bs.quantize(build("cifar_resnet8", {"in_channels": 1}).eval(), example_inputs=torch.randn(4, 1, 8, 8))
    network = {"name": "cifar_resnet8", "args": {"in_channels": 1}}
    about = {"network": network, "preprocessing": None, "data": "digits", "data_config": {}, "classes": ["a"]}
    return {"model": model.state_dict(), "about": about, "plan": plan_of(model).to_json()}


def test_a_checkpoint_of_a_stage(tmp_path, state):
    torch.save(state, tmp_path / "a.pt")
    subject = subject_of(tmp_path / "a.pt", None)
    assert subject.widths == (8, 6, 4, 2) and subject.classes == ("a",)
    assert all(torch.equal(value, state["model"][name]) for name, value in subject.model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"about": 3}, "not a whole checkpoint"),
        (lambda s: s | {"about": s["about"] | {"network": {"name": 5, "args": {}}}}, "no network is named '5'"),
        (lambda s: s | {"about": s["about"] | {"preprocessing": [1]}}, "preprocessing is a list"),
        (lambda s: s | {"about": s["about"] | {"data_config": "x"}}, "data_config is a str"),
        (lambda s: s | {"model": 5}, "not a whole checkpoint"),
        (lambda s: s | {"model": {1: torch.zeros(1)}}, "does not fit"),
        (lambda s: s | {"plan": s["plan"] | {"layers": 5}}, "not a whole checkpoint"),
        (lambda s: s | {"plan": s["plan"] | {"norms": 5}}, "not a whole checkpoint"),
    ],
)
def test_a_checkpoint_that_is_none_is_told_in_one_line(tmp_path, state, change, message):
    torch.save(change(state), tmp_path / "a.pt")
    with pytest.raises(UserError, match=message) as error:
        subject_of(tmp_path / "a.pt", None)
    assert "\n" not in str(error.value)
