import dataclasses
import itertools
import math
import random

import numpy as np
import pytest

from bitswitch.errors import UserError
from bitswitch.search import budgets_between
from bitswitch.search.programme import Problem, alternatives, frontier, pareto


def instance(seed):
    """A random problem of up to 8 layers x 4 widths, with ties of damage and of cost, and budgets of every kind."""
    draw = random.Random(seed)
    layers = [f"layer{i}" for i in range(draw.randint(1, 8))]
    widths = sorted(draw.sample([2, 3, 4, 6, 8], draw.randint(1, 4)), reverse=True)
    scale = 10.0 ** draw.randint(-9, 6)
    rough = draw.random() < 0.4  # few values: many ties
    damage = {n: {w: scale * (draw.randint(0, 3) if rough else draw.random() / w) for w in widths} for n in layers}
    weights = {n: draw.randint(1, 3) * draw.choice([1, 9216, 2359296]) for n in layers}
    costs = {
        "average_bits": {n: {w: w / len(layers) for w in widths} for n in layers},
        "bytes": {n: {w: weights[n] * w // 8 for w in widths} for n in layers},
        "bitops": {n: {w: weights[n] * w * w * 49 for w in widths} for n in layers},
        "latency": {n: {w: draw.random() * 1e-3 for w in widths} for n in layers},
    }
    tied = [draw.sample(layers, 2)] if len(layers) > 2 and draw.random() < 0.3 else []
    problem = Problem(damage=damage, costs=costs, tied=tied)
    budgets = {}
    for name in draw.sample(list(costs), draw.choice([1, 1, 1, 2])):
        low, high = (sum(pick(costs[name][n].values()) for n in layers) for pick in (min, max))
        # Some budgets are exactly what an assignment costs.
        exact = sum(costs[name][n][draw.choice(widths)] for n in layers)
        budgets[name] = exact if draw.random() < 0.5 else low + draw.random() * (high - low)
    return problem, budgets


def brute_force(problem, budgets):
    """The least damage over all assignments within the budgets, or None."""
    best = None
    for widths in itertools.product(*(problem.damage[n] for n in problem.damage)):
        chosen = dict(zip(problem.damage, widths, strict=True))
        if any(len({chosen[n] for n in group}) > 1 for group in problem.tied):
            continue
        # But for rounding: an average of 4 bits may be summed as 4.000000000000001.
        if any(sum(problem.costs[c][n][w] for n, w in chosen.items()) > budgets[c] * (1 + 1e-12) for c in budgets):
            continue
        damage = sum(problem.damage[n][w] for n, w in chosen.items())
        best = damage if best is None else min(best, damage)
    return best


@pytest.mark.parametrize("start", range(0, 1000, 50))
def test_the_objective_is_brute_forces(start):
    for seed in range(start, start + 50):
        problem, budgets = instance(seed)
        expected = brute_force(problem, budgets)
        if expected is None:
            with pytest.raises(UserError, match="no assignment meets"):
                problem.solve(budgets)
            continue
        choice = problem.solve(budgets)
        assert math.isclose(choice.damage, expected, rel_tol=1e-12, abs_tol=1e-300), seed
        assert all(choice.cost[name] <= budget * (1 + 1e-12) for name, budget in budgets.items())
        assert all(len({choice.assignment[n] for n in group}) == 1 for group in problem.tied)


def simple(**damage):
    damage = {name: dict(zip((8, 4, 2), values, strict=True)) for name, values in damage.items()}
    return Problem(damage=damage, costs={"average_bits": {n: {w: w / len(damage) for w in (8, 4, 2)} for n in damage}})


def test_the_sensitive_layer_gets_the_higher_width():
    problem = simple(a=(0, 1, 4), b=(0, 100, 400), c=(0, 1, 4))
    assert dict(problem.solve({"average_bits": 4}).assignment) == {"a": 2, "b": 8, "c": 2}


def test_an_infeasible_budget_names_what_can_be_met():
    with pytest.raises(UserError, match=r"average_bits <= 1 \(it can be from 2 to 8\)"):
        simple(a=(0, 1, 2), b=(0, 1, 2)).solve({"average_bits": 1})


def test_budgets_that_are_no_bounds():
    problem = simple(a=(0, 1, 2), b=(0, 1, 2))
    assert problem.solve({"average_bits": math.inf}) == problem.solve({}) == problem.solve({"average_bits": 8})
    with pytest.raises(UserError, match="no assignment meets"):
        problem.solve({"average_bits": -math.inf})
    with pytest.raises(UserError, match="the budget of average_bits is not a number"):
        problem.solve({"average_bits": math.nan})


def test_frontier_is_pareto_and_each_choice_once():
    problem = simple(a=(0, 1, 4), b=(0, 10, 40), c=(0, 2, 9))
    choices = frontier(problem, [{"average_bits": b / 4} for b in range(8, 33)])
    damages = [choice.damage for choice in choices]
    costs = [choice.cost["average_bits"] for choice in choices]
    assert damages == sorted(damages) and costs == sorted(costs, reverse=True)
    assert len({choice.assignment for choice in choices}) == len(choices) > 5
    assert pareto(choices) == choices


def test_a_beaten_choice_is_left_out():
    problem = simple(a=(3, 1, 4))
    assert [c.assignment["a"] for c in frontier(problem, [{"average_bits": b} for b in (2, 4, 8)])] == [4, 2]
    beaten = problem.choice({"a": 8})
    assert beaten not in pareto([beaten, problem.choice({"a": 4})])


def test_a_budget_just_below_what_can_be_met_is_solved_at_once(monkeypatch):
    """As float32's budgets are; choices that the solver's tolerance lets through would be excluded one by one."""
    draw = random.Random(0)
    layers = [f"layer{i}" for i in range(20)]
    damage = {name: {w: draw.random() * 4.0**-w for w in (8, 6, 4, 2)} for name in layers}
    problem = Problem(damage=damage, costs={"bits": {name: {w: w / 20 for w in (8, 6, 4, 2)} for name in layers}})
    picked = []
    pick = Problem._pick
    monkeypatch.setattr(Problem, "_pick", lambda *args: picked.append(pick(*args)) or picked[-1])
    for budget in (float(np.float32(3.3)), 3.999999, 4 - 4e-9, 4 - 2e-11):
        choice = problem.solve({"bits": budget})
        assert choice.cost["bits"] == pytest.approx(math.floor(budget * 10 + 1e-12) / 10)
    assert len(picked) <= 6


@pytest.mark.parametrize("never", [1e4, 1e6, 1e9, 1e30])
def test_a_cost_far_beyond_the_budget_hides_nothing(monkeypatch, never):
    """As of what a device cannot do: the choice is the one without that width, found without excluding others."""
    draw = random.Random(0)
    layers = [f"layer{i}" for i in range(18)]
    widths = (8, 6, 4, 2)
    damage = {name: {w: 10 ** draw.uniform(-3, 1) * 4.0**-w for w in widths} for name in layers}
    latency = {name: {w: (0.5 + w / 8) * draw.uniform(0.8, 1.2) for w in widths} for name in layers}
    latency["layer0"][8] = never
    damage["layer0"][8] = 0.0
    problem = Problem(damage=damage, costs={"latency": latency})
    expected = problem.solve({"latency": 18.0}, forbidden=[("layer0", 8)])
    picked = []
    pick = Problem._pick

    def counted(*args):
        picked.append(pick(*args))
        assert len(picked) < 6
        return picked[-1]

    monkeypatch.setattr(Problem, "_pick", counted)
    assert problem.solve({"latency": 18.0}) == expected and expected.cost["latency"] > 17.5


def test_a_hair_of_cost_does_not_save_a_beaten_choice():
    problem = simple(a=(3, 1, 4))
    best = problem.choice({"a": 4})
    worse = dataclasses.replace(best, damage=2.0, cost={"average_bits": best.cost["average_bits"] * (1 - 1e-15)})
    assert pareto([best, worse]) == [best]


def test_alternatives_are_other_choices_within_the_budget():
    problem = simple(a=(0, 1, 4), b=(0, 10, 40), c=(0, 2, 9))
    best, *others = alternatives(problem, {"average_bits": 5})
    assert best == problem.solve({"average_bits": 5})
    assert others and len({c.assignment for c in (best, *others)}) == len(others) + 1
    assert all(c.damage >= best.damage and c.cost["average_bits"] <= 5 for c in others)


def test_overlapping_ties_join():
    damage = {n: {4: 0.0, 2: 1.0} for n in "abcd"}
    costs = {"bits": {n: {4: 4, 2: 2} for n in "abcd"}}
    choice = Problem(damage=damage, costs=costs, tied=[["a", "b"], ["b", "c"]]).solve({"bits": 15})
    assert (
        choice.assignment["a"] == choice.assignment["b"] == choice.assignment["c"] == 4 and choice.assignment["d"] == 2
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"damage": {"a": {8: math.nan, 4: 1.0}}}, "holds nan for layer 'a' at 8 bits"),
        ({"damage": {}}, "holds no layers"),
        ({"costs": {"latency": {"a": {8: 1.0}}}}, "'latency' lacks 4 bits of layer 'a'"),
        ({"costs": {"latency": {}}}, "'latency' holds no layers"),
        ({"costs": {"latency": {"a": {8: 1.0, 4: 1.0}, "b": {}}}}, "layer 'b' of another network"),
        ({"tied": [["a", "z"]]}, "no layer is named 'z'"),
        (
            {
                "damage": {"a": {8: 0.0}, "b": {4: 0.0}},
                "costs": {"bits": {"a": {8: 8}, "b": {4: 4}}},
                "tied": [["a", "b"]],
            },
            "a, b have no width in common",
        ),
    ],
)
def test_bad_tables(change, words):
    with pytest.raises(UserError, match=words):
        Problem(**{"damage": {"a": {8: 0.0, 4: 1.0}}, "costs": {"bits": {"a": {8: 8, 4: 4}}}} | change)


def test_an_unknown_budget():
    with pytest.raises(UserError, match="did you mean 'average_bits'"):
        simple(a=(0, 1, 2)).solve({"average_bit": 4})


# 250 and 265 are such that the presolve of HiGHS calls the least budget infeasible.
@pytest.mark.parametrize("seed", [*range(40), 250, 265])
def test_budgets_between_can_all_be_met_and_reach_both_ends(seed):
    """With ties, too: two layers that are fastest at different widths cannot both be."""
    problem, _ = instance(seed)
    for cost in problem.costs:
        least, middle, most = budgets_between(problem, cost, 3)
        for budget in (least, middle, most):
            assert problem.solve(budget).cost[cost] <= budget[cost] * (1 + 1e-9)
        assert problem.solve(least).cost[cost] == pytest.approx(least[cost])


@pytest.mark.parametrize("penalty", [1e6, 1e9, 1e12, 1e15])
def test_a_great_damage_hides_no_small_ones(penalty):
    """As somebody forbids widths of a layer by."""
    for seed in range(12):
        draw = random.Random(seed)
        damage = {f"layer{i}": {w: draw.random() * 4.0**-w for w in (8, 6, 4, 2)} for i in range(5)}
        damage["layer0"] |= dict.fromkeys((6, 4, 2), penalty)
        problem = Problem(damage=damage, costs={"bits": {name: {w: w / 5 for w in (8, 6, 4, 2)} for name in damage}})
        budgets = {"bits": draw.uniform(4, 6)}
        assert problem.solve(budgets).damage == pytest.approx(brute_force(problem, budgets), rel=1e-9)


def test_where_a_width_is_all_there_is_there_are_no_alternatives():
    problem = Problem(damage={"a": {8: 1.0}}, costs={"bits": {"a": {8: 8.0}}})
    assert [choice.assignment["a"] for choice in alternatives(problem, {"bits": 8})] == [8]


def test_bounds_are_of_the_widths_that_damage_has():
    costs = {"bits": {name: {w: w / 2 for w in (8, 4, 2)} for name in "ab"}}
    problem = Problem(damage={name: {8: 0.0, 4: 1.0} for name in "ab"}, costs=costs)
    assert problem.bounds("bits") == (4, 8)
    with pytest.raises(UserError, match=r"bits <= 3 \(it can be from 4 to 8\)"):
        problem.solve({"bits": 3})
    assert frontier(problem, budgets_between(problem, "bits", 3))[-1].cost["bits"] == 4


def test_costs_that_are_nearly_multiples_of_one_number():
    costs = {8: 0.549999999995287, 6: 0.14999999999801997, 4: 0.3500000000018695, 2: 1.2500000000012528}
    problem = Problem(damage={"a": {w: 1 / w for w in costs}}, costs={"latency": {"a": costs}})
    assert problem.solve({"latency": costs[6]}).assignment["a"] == 6
