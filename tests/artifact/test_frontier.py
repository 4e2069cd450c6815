"""A frontier in words and in files."""

import pytest
import torch
from torch import nn

import bitswitch as bs
from bitswitch.artifact import check_choice, read_header, within_budget
from bitswitch.errors import UserError
from bitswitch.runtime import Session


def choice(a, b, damage, top1=None):
    return {
        "assignment": {"a": a, "b": b},
        "cost": {"bits": (a + b) / 2, "bytes": 10 * a + b},
        "damage": damage,
        "top1": top1,
    }


FRONTIER = [choice(8, 8, 0.0), choice(8, 4, 1.0), choice(4, 4, 2.0), choice(2, 2, 9.0)]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [("avg<=8", 0), ("avg<=7.9", 1), (" bits <= 4 ", 2), ("bytes<=84", 1), ("bytes<=83.9", 2), ("avg<=2e0", 3)],
)
def test_the_least_damage_that_fits(budget, expected):
    assert within_budget(FRONTIER, budget) is FRONTIER[expected]


def test_measured_accuracy_decides_where_all_was_measured():
    measured = [choice(8, 8, 0.0, 90.0), choice(8, 4, 1.0, 91.0), choice(4, 4, 2.0, 91.0)]
    assert within_budget(measured, "avg<=8") is measured[1]
    assert within_budget([*measured, choice(2, 2, 9.0)], "avg<=8") is measured[0]


def test_a_sum_that_is_a_hair_above_its_budget_fits():
    near = {**choice(4, 4, 1.0), "cost": {"bits": 4.000000000000001}}
    assert within_budget([near], "avg<=4") is near


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("avg<=1", "the least is 2"),
        ("avg<4", "not of the form"),
        ("avg<=4<=5", "not of the form"),
        ("avg<=-", "not of the form"),
        ("byte<=4", "did you mean 'bytes'"),
        ("", "not of the form"),
    ],
)
def test_what_no_budget_is(budget, message):
    with pytest.raises(UserError, match=message):
        within_budget(FRONTIER, budget)


def test_no_frontier():
    with pytest.raises(UserError, match="bitswitch search"):
        within_budget([], "avg<=4")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"assignment": {"a": 8}}, "lacks layer 'b'"),
        ({"assignment": {"a": 8, "b": 4, "c": 4}}, "another network"),
        ({"assignment": {"a": 8, "b": 3}}, "3 bits"),
        ({"assignment": {"a": 8, "b": True}}, "True bits"),
        ({"damage": float("nan")}, "finite"),
        ({"damage": 10**400}, "finite"),
        ({"cost": {"bits": "4"}}, "finite"),
        ({"cost": None}, "lacks its"),
    ],
)
def test_a_choice_of_another_kind_is_refused(changed, message):
    check_choice(FRONTIER[0], ["a", "b"], (8, 4, 2))
    with pytest.raises(UserError, match=message):
        check_choice({**FRONTIER[0], **changed}, ["a", "b"], (8, 4, 2))


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    return net, bs.quantize(net, bits=(8, 2), example_inputs=torch.randn(8, 4))


def test_load_takes_a_budget(tmp_path, model):
    net, quantized = model
    best = {"assignment": {"1": 8, "2": 2}, "cost": {"bits": 5.0}, "damage": 1.0, "top1": None}
    worse = {"assignment": {"1": 2, "2": 2}, "cost": {"bits": 2.0}, "damage": 3.0, "top1": None}
    path = tmp_path / "mixed.safetensors"
    bs.save(quantized, path, frontier=[best, worse])
    assert read_header(path).frontier == (best, worse)
    assert bs.widths(bs.load(path, model=net, assignment="avg<=6")) == {"1": 8, "2": 2}
    assert bs.widths(bs.load(path, model=net, assignment="bits<=4")) == {"1": 2, "2": 2}
    with pytest.raises(UserError, match=r"mixed.safetensors: no choice of the frontier has bits <= 1: the least is 2"):
        bs.load(path, model=net, assignment="avg<=1")


def test_any_name_of_a_cost_can_be_asked_for():
    costs = {"bits": 4.0, "latency_ms2": 3.0, "Energy per image": 2.0}
    choice = {"assignment": {"a": 4}, "cost": costs, "damage": 1.0, "top1": None}
    assert within_budget([choice], " latency_ms2 <= 3") == within_budget([choice], "Energy per image<=2") == choice
    with pytest.raises(UserError, match="did you mean 'latency_ms2'"):
        within_budget([choice], "latency_ms<=4")
    with pytest.raises(UserError, match="is not of the form"):
        within_budget([choice], "<=4")


def test_of_a_file_that_is_cut_off_a_budget_takes_what_it_serves(tmp_path, model):
    net, quantized = model
    best = {"assignment": {"1": 8, "2": 2}, "cost": {"bits": 5.0}, "damage": 1.0, "top1": None}
    worse = {"assignment": {"1": 2, "2": 2}, "cost": {"bits": 2.0}, "damage": 3.0, "top1": None}
    path = tmp_path / "mixed.safetensors"
    for frontier, expected in (([best, worse], worse), ([best], None)):
        bs.save(quantized, path, frontier=frontier, example_inputs=torch.randn(8, 4))
        path.write_bytes(path.read_bytes()[:-1])
        if expected:
            assert bs.widths(bs.load(path, model=net, assignment="avg<=6")) == expected["assignment"]
            assert Session(path, assignment="avg<=6").assignment == expected["assignment"]
        else:
            for refused in (
                lambda: bs.load(path, model=net, assignment="avg<=6"),
                lambda: Session(path).switch("avg<=6"),
            ):
                with pytest.raises(UserError, match="cut off"):
                    refused()


def test_a_frontier_of_another_network_is_not_saved(tmp_path, model):
    _, quantized = model
    with pytest.raises(UserError, match="another network"):
        bs.save(quantized, tmp_path / "m", frontier=[{"assignment": {"9": 8}, "cost": {}, "damage": 0.0, "top1": None}])
    assert not (tmp_path / "m").exists()
