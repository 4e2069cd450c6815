"""How the benchmarks on mixed networks draw SubNets and fit what they cost."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import chisquare

import accuracy
import between
import choosers
import mixed
from bitswitch.assignment import Assignment

LAYERS = ("a", "b", "c")


def of(*widths: int) -> Assignment:
    return Assignment(tuple(zip(LAYERS, widths, strict=True)))


def test_random_subnets_are_distinct_and_of_the_greatest_sum_within_the_budget():
    wanted = {of(*widths) for widths in product((2, 4, 6, 8), repeat=3) if sum(widths) == 12}
    # 4.5 bits of three layers are 13.5; the greatest even sum is 12.
    for budget in (4.0, 4.5):
        found = mixed.random_subnets(LAYERS, (8, 6, 4, 2), budget, 0, len(wanted))
        assert set(found) == wanted and len(found) == len(wanted) == 10


def test_random_subnets_are_drawn_evenly():
    drawn = [mixed.random_subnets(LAYERS, (8, 6, 4, 2), 4.0, seed, 1)[0] for seed in range(3000)]
    counts = [drawn.count(one) for one in set(drawn)]
    assert len(counts) == 10 and chisquare(counts).pvalue > 0.001


def test_a_fit_finds_costs_that_add_up_and_tells_how_much_of_the_others_it_explains():
    some = [of(*widths) for widths in product((2, 4), repeat=3)]
    cost = {one: 5.0 + 1.0 * (one["a"] == 2) - 2.0 * (one["c"] == 2) for one in some}
    found, explained = choosers._fit(some, cost)
    assert found == pytest.approx({"a": 1.0, "b": 0.0, "c": -2.0}) and explained == pytest.approx(1.0)
    # A product of three signs is what no sum of numbers of layers tells anything of.
    odd = {one: float(np.prod([width - 3 for _, width in one.items()])) for one in some}
    found, explained = choosers._fit(some, odd)
    assert found == pytest.approx(dict.fromkeys(LAYERS, 0.0)) and explained < 0


def test_what_a_fit_explains_is_of_costs_that_it_has_not_seen():
    draw = np.random.default_rng(0)
    some = [of(*widths) for widths in product((2, 4), repeat=3)]
    cost = {one: 3.0 * (one["b"] == 2) + float(draw.normal()) for one in some}
    values = np.array([cost[one] for one in some])
    errors = []
    for one in some:
        others = [other for other in some if other != one]
        design = np.array([[1.0, *(width == 2 for _, width in other.items())] for other in others])
        found = np.linalg.lstsq(design, [cost[other] for other in others], rcond=None)[0]
        errors.append(cost[one] - found @ [1.0, *(width == 2 for _, width in one.items())])
    expected = 1 - np.sum(np.square(errors)) / np.sum((values - values.mean()) ** 2)
    assert choosers._fit(some, cost)[1] == pytest.approx(expected)


def test_neighbouring_widths_and_the_bits_of_a_weight():
    assert between._beside(3.5, (8, 6, 4, 2)) == (4, 2) and between._beside(5.0, (8, 6, 4, 2)) == (6, 4)
    assert between._bits_of_a_weight("824", {"a": 1, "b": 10, "c": 9}) == pytest.approx((8 + 20 + 36) / 20)


@pytest.mark.parametrize(
    "job, told",
    [("none-of-x-seed0", "mixed-none-of-x-seed0.json is not there"), ("recalibrated-of-x-seed0", "name another way")],
)
def test_a_job_that_is_not_done_or_has_statistics_of_its_own_is_told_in_one_line(tmp_path, job, told):
    with pytest.raises(SystemExit, match=told) as caught:
        mixed.done(job, accuracy.Places(None, None, tmp_path, tmp_path))
    assert "\n" not in str(caught.value)
