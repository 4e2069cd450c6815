"""Genetic refinement: around the programme's optimum, scored by what a network really reaches."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bitswitch.assignment import Assignment
from bitswitch.search.programme import Choice, Problem, alternatives, meets

_POPULATION = 16


def refine(
    problem: Problem,
    budgets: Mapping[str, float],
    score: Callable[[Sequence[Assignment]], Sequence[float]],
    *,
    evaluations: int,
    seed: int = 0,
) -> list[tuple[Choice, float]]:
    """Search on from the programme's choices by crossover and mutation, for the best score within the budgets.

    Args:
        problem: its costs bound the search; its damage alone starts it.
        budgets: {cost: the most that its sum may be}.
        score: of several assignments at once, greater is better; asked once for each assignment.
        evaluations: how many assignments may be scored in all.
        seed: of the draws.

    Returns:
        Every choice that was scored, with its score, the best first.

    Raises:
        UserError: no choice meets the budgets.
    """
    draw = np.random.default_rng(seed)
    groups = problem.groups()
    waiting = [choice.assignment for choice in alternatives(problem, budgets)][:_POPULATION]
    found: dict[Assignment, float] = {}
    while len(found) < evaluations:
        fresh = [one for one in dict.fromkeys(waiting) if one not in found][: evaluations - len(found)]
        if not fresh:
            break
        found |= dict(zip(fresh, score(fresh), strict=True))
        parents = sorted(found, key=lambda one: (-found[one], problem.choice(one).damage))[:_POPULATION]
        waiting = _children(problem, budgets, groups, parents, found, draw)
    scored = [(problem.choice(one), value) for one, value in found.items()]
    return sorted(scored, key=lambda pair: (-pair[1], pair[0].damage))


def _children(
    problem: Problem,
    budgets: Mapping[str, float],
    groups: Sequence[tuple[str, ...]],
    parents: Sequence[Assignment],
    known: Mapping[Assignment, float],
    draw: np.random.Generator,
) -> list[Assignment]:
    """New assignments within the budgets; fewer than wanted where hardly any are left."""
    children: dict[Assignment, None] = {}
    for _ in range(50 * _POPULATION):
        if len(children) == _POPULATION:
            break
        one, other = (parents[int(i)] for i in draw.integers(len(parents), size=2))
        widths: dict[str, int] = {}
        for group in groups:
            parent = one if draw.random() < 0.5 else other
            options = sorted(set.intersection(*(set(problem.damage[layer]) for layer in group)))
            mutated = draw.random() < 1 / len(groups)
            width = options[int(draw.integers(len(options)))] if mutated else parent[group[0]]
            widths |= dict.fromkeys(group, width)
        choice = problem.choice(widths)
        if choice.assignment not in known and meets(choice.cost, budgets):
            children[choice.assignment] = None
    return list(children)
