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


def test_a_fit_finds_costs_that_add_up():
    some = [of(*widths) for widths in product((2, 4), repeat=3)]
    cost = {one: 5.0 + 1.0 * (one["a"] == 2) - 2.0 * (one["c"] == 2) for one in some}
    assert choosers._fit(some, cost) == pytest.approx({"a": 1.0, "b": 0.0, "c": -2.0})
    # A product of three signs is what no sum of numbers of layers tells anything of.
    odd = {one: float(np.prod([width - 3 for _, width in one.items()])) for one in some}
    assert choosers._fit(some, odd) == pytest.approx(dict.fromkeys(LAYERS, 0.0))


def test_what_a_sum_over_layers_explains_is_of_unseen_subnets_within_a_budget():
    widths = [
        digits for count in (2, 3) for digits in map("".join, product("24", repeat=5)) if digits.count("2") == count
    ]
    budgets = [str(digits.count("2")) for digits in widths]
    draw = np.random.default_rng(0)
    numbers, noise = np.array([3.0, -1.0, 2.0, 0.0, 1.0]), draw.normal(size=len(widths))
    at_two = np.array([[digit == "2" for digit in digits] for digits in widths], dtype=float)
    # However far the budgets are apart, that is nothing that layers explain.
    far = np.array([100.0 * int(budget) for budget in budgets])
    assert choosers.explained(budgets, widths, list(at_two @ numbers + far)) == pytest.approx(1.0)
    assert choosers.explained(budgets, widths, list(noise + far)) < 0.2
    values = at_two @ numbers + noise + far
    design = np.hstack([np.array([[b == "2", b == "3"] for b in budgets], dtype=float), at_two])
    errors = []
    for one in range(len(widths)):
        others = [other for other in range(len(widths)) if other != one]
        found = np.linalg.lstsq(design[others], values[others], rcond=None)[0]
        errors.append(values[one] - found @ design[one])
    means = np.array([values[[b == budget for b in budgets]].mean() for budget in budgets])
    expected = 1 - np.sum(np.square(errors)) / np.sum((values - means) ** 2)
    assert choosers.explained(budgets, widths, list(values)) == pytest.approx(expected)
    assert 0.1 < expected < 0.9


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
