import dataclasses
import json

import numpy as np
import pytest

from bitswitch.assignment import Assignment
from bitswitch.errors import UserError

LAYERS = {"stem": 8, "block.conv": 4, "head": 2}
WIDTHS = {"stem": (8, 4), "block.conv": (8, 4, 2), "head": (8, 4, 2)}


def of(wanted):
    return Assignment.of(wanted, layers=LAYERS, widths=WIDTHS)


def test_one_width_for_all():
    got = of(4)
    assert dict(got) == {"stem": 4, "block.conv": 4, "head": 4}
    assert got.uniform == 4


def test_some_layers_keep_what_they_had():
    assert dict(of({"head": 8})) == {"stem": 8, "block.conv": 4, "head": 8}
    assert dict(of({})) == LAYERS
    assert of({}).uniform is None


def test_order_is_the_networks():
    assert list(of({"head": 8, "stem": 4})) == list(LAYERS)
    assert list(of(8)) == list(LAYERS)


def test_an_assignment_can_be_laid_over_another():
    assert of(of({"head": 8})) == of({"head": 8})


def test_it_is_a_mapping():
    got = of(8)
    assert got["head"] == 8
    assert len(got) == 3
    assert "head" in got
    assert "tail" not in got
    with pytest.raises(KeyError):
        got["tail"]


def test_numpy_widths_become_int():
    assert {type(width) for width in of(np.int64(4)).values()} == {int}


@pytest.mark.parametrize("wanted", [3, 16, 0, -4, True, False, None, "8", {"stem": 2}, {"stem": True}, {"stem": None}])
def test_a_width_that_a_layer_lacks_is_refused(wanted):
    with pytest.raises(UserError, match="is text" if wanted == "8" else "has no width"):
        of(wanted)


def test_one_layer_that_lacks_the_width_is_named():
    with pytest.raises(UserError, match="'stem' has no width 2; it has 8, 4"):
        of(2)


def test_an_unknown_layer_is_refused_and_the_nearest_named():
    with pytest.raises(UserError, match=r"'block\.conf'.*did you mean 'block\.conv'"):
        of({"block.conf": 8})


def test_what_was_given_is_not_changed():
    layers, wanted = dict(LAYERS), {"head": 8}
    Assignment.of(wanted, layers=layers, widths=WIDTHS)
    assert layers == LAYERS
    assert wanted == {"head": 8}


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        of(8).items_ = ()


def test_equal_assignments_are_equal():
    assert of(8) == of({"stem": 8, "block.conv": 8, "head": 8})
    assert of(8) != of(4) and of(8) == dict(of(8)) and dict(of(8)) == of(8) != {"stem": 8}
    assert len({of(8), of(dict.fromkeys(LAYERS, 8)), of(4)}) == 2


@pytest.mark.parametrize("wanted", [8, 4, {"head": 8}, {}])
def test_json_round_trip(wanted):
    got = of(wanted)
    plain = json.loads(json.dumps(got.to_json()))
    assert type(got.to_json()) is dict
    assert Assignment.from_json(plain) == got
    assert list(Assignment.from_json(plain)) == list(got)


@pytest.mark.parametrize("value", [None, 8, "8", [], [["a", 8]], {"a": "8"}, {"a": 8.0}, {"a": True}, {"a": None}])
def test_other_json_is_refused(value):
    with pytest.raises(UserError, match="layer name: bit-width"):
        Assignment.from_json(value)


def test_an_empty_one_is_not_uniform():
    assert Assignment(()).uniform is None
    assert len(Assignment(())) == 0
