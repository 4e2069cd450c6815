"""The integer programme: one width for each layer, least damage within budgets (arXiv 2502.01199, section 3; HAWQ-V2).

Tables in, choices out: nothing here knows of a network. A table is {layer: {width: number}}.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from bitswitch.assignment import Assignment
from bitswitch.errors import UserError, nearest

Table = Mapping[str, Mapping[int, float]]
# Layers of one width, and that width.
_Option = tuple[tuple[str, ...], int]

# The solver stops within an absolute gap of 1e-6: damages are scaled so far up that no difference that matters is smaller.
_GREATEST_DAMAGE = 1e6
# So much greater than a solution an option's damage may be before it hides differences of a thousand millionth of that.
_TOLD_APART = 1e3
# A budget may be exactly what the best choice costs; in floating point it would miss it by a hair. The solver is given more
# room than that, and `meets` cuts off what used it, one choice at a time. Where all sums are multiples of one number, as
# averages of bits are, a budget between two of them leaves none to be cut off.
_SLACK = 1e-6
_HAIR = 1e-12
_LEAST_STEP = 1e-4


def no_cost(name: str, known: Mapping[str, Table]) -> UserError:
    """What is raised where a budget names no cost: what a cost needs that there could be, or which there are."""
    needed = {"bitops": "example_inputs=", "latency": "latency= (in a recipe search.latency=FILE)"}.get(name)
    if needed is not None:
        return UserError(f"the cost {name!r} needs {needed}")
    return UserError(f"no cost is named {name!r}{nearest(str(name), known)}; there are {', '.join(known)}")


def meets(cost: Mapping[str, float], budgets: Mapping[str, float]) -> bool:
    """Whether every cost is within its budget, but for rounding: 4 bits on average may be summed as 4.000000000000001."""
    return all(cost[name] <= budget + _HAIR * abs(budget) for name, budget in budgets.items())


@dataclass(frozen=True)
class Choice:
    """A solution.

    Attributes:
        assignment: a width for each layer.
        cost: the sum of each cost table at that assignment.
        damage: the sum of the damage table at that assignment.
    """

    assignment: Assignment
    cost: Mapping[str, float]
    damage: float


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be solved.

    Attributes:
        damage: how much each layer suffers at each width; finite.
        costs: {cost: table}, each additive over layers.
        tied: groups of layers that must have one width.
    """

    damage: Table
    costs: Mapping[str, Table]
    tied: Sequence[Sequence[str]] = ()

    def __post_init__(self) -> None:
        for name, table in {"damage": self.damage, **self.costs}.items():
            check_table(name, table, self.damage)
        groups = self.tied if isinstance(self.tied, Sequence) else [self.tied]
        if any(isinstance(group, str) or not isinstance(group, Collection) for group in groups):
            raise UserError(f"tied={self.tied!r}: give groups of layers, [[name, name], ...]")
        for layer in (layer for group in self.tied for layer in group):
            if not isinstance(layer, str) or layer not in self.damage:
                raise UserError(f"tied layers: no layer is named {layer!r}{nearest(str(layer), self.damage)}")
        for group in self.groups():
            if not set.intersection(*(set(self.damage[layer]) for layer in group)):
                raise UserError(f"tied layers: {', '.join(group)} have no width in common")

    def choice(self, widths: Mapping[str, int]) -> Choice:
        """The choice of these widths, with its costs and its damage."""
        return Choice(
            assignment=Assignment(tuple((layer, widths[layer]) for layer in self.damage)),
            cost={
                name: sum(table[layer][widths[layer]] for layer in self.damage) for name, table in self.costs.items()
            },
            damage=sum(self.damage[layer][widths[layer]] for layer in self.damage),
        )

    def solve(self, budgets: Mapping[str, float], *, forbidden: Sequence[tuple[str, int]] = ()) -> Choice:
        """The choice of least damage whose every cost is within its budget; among equals the solver's.

        Args:
            budgets: {cost: the most that its sum may be}.
            forbidden: (layer, width) pairs that may not be chosen.

        Raises:
            UserError: a budget names no cost, or no choice meets the budgets: the least and the greatest that can be met.
        """
        for name in budgets:
            if name not in self.costs:
                raise no_cost(name, self.costs)
            if math.isnan(budgets[name]):
                raise UserError(f"the budget of {name} is not a number")
        # Whatever a choice costs, it is within.
        budgets = {name: budget for name, budget in budgets.items() if budget != math.inf}
        groups = self.groups()
        options = [
            (group, width)
            for group in groups
            for width in sorted(set.intersection(*(set(self.damage[layer]) for layer in group)))
            if not any((layer, width) in forbidden for layer in group)
        ]
        for name, budget in budgets.items():
            options = _affordable(options, self.costs[name], budget)
        excluded: list[list[int]] = []
        while True:
            picked = self._pick(groups, options, budgets, excluded)
            if picked is None:
                raise self._infeasible(budgets)
            choice = self.choice({layer: width for group, width in (options[i] for i in picked) for layer in group})
            if meets(choice.cost, budgets):
                return choice
            excluded.append(picked)

    def groups(self) -> list[tuple[str, ...]]:
        """Layers that share a width, groups that overlap joined, in the order of the layers."""
        owner = {layer: {layer} for layer in self.damage}
        for group in self.tied:
            joined = set().union(*(owner[layer] for layer in group))
            for layer in joined:
                owner[layer] = joined
        seen: set[str] = set()
        groups = []
        for layer in self.damage:
            if layer not in seen:
                groups.append(tuple(name for name in self.damage if name in owner[layer]))
                seen |= owner[layer]
        return groups

    def _pick(
        self,
        groups: Sequence[tuple[str, ...]],
        options: Sequence[_Option],
        budgets: Mapping[str, float],
        excluded: Sequence[Sequence[int]],
    ) -> list[int] | None:
        """The indices of the options of an optimum, one for each group; None where there is none."""
        if {group for group, _ in options} != set(groups):
            return None
        rows = [[float(group == owner) for owner, _ in options] for group in groups]
        lower, upper = [1.0] * len(groups), [1.0] * len(groups)
        for name, budget in budgets.items():
            table = self.costs[name]
            row = np.array([sum(table[layer][width] for layer in group) for group, width in options])
            unit = max(float(np.abs(row).max(initial=0.0)), abs(budget)) or 1.0
            rows.append((row / unit).tolist())
            lower.append(-np.inf)
            step = _step(row / unit)
            steps = budget / unit / step if step else 0.0
            # Half a step above the last multiple that is within.
            whole = math.floor(steps + _HAIR * abs(steps))
            upper.append((whole + 0.5) * step if step else budget / unit + _SLACK)
        for picked in excluded:
            rows.append([float(i in picked) for i in range(len(options))])
            lower.append(-np.inf)
            upper.append(len(picked) - 1.0)
        damage = np.array([sum(self.damage[layer][width] for layer in group) for group, width in options])
        owners = [group for group, _ in options]
        least = {
            group: min(d for owner, d in zip(owners, damage, strict=True) if owner == group) for group in set(owners)
        }
        excess = damage - np.array([least[group] for group in owners])
        constraints = LinearConstraint(np.array(rows), lower, upper)
        usable, chosen = np.ones(len(options)), None
        while True:
            found = _least(excess, usable, constraints)
            if found is None:
                return chosen
            chosen = found
            total = excess[chosen].sum()
            if excess[usable > 0].max(initial=0.0) <= _TOLD_APART * total:
                return chosen
            # What is worse by itself than all of a solution is in no better one, and beside it the solver does not tell
            # small differences apart.
            usable = (excess <= total).astype(float)

    def bounds(self, cost: str) -> tuple[float, float]:
        """The least and the greatest sum of a cost, over all choices in which tied layers have one width."""
        table = self.costs[cost]
        sums = [
            [
                sum(table[layer][width] for layer in group)
                for width in set.intersection(*(set(self.damage[one]) for one in group))
            ]
            for group in self.groups()
        ]
        return sum(map(min, sums)), sum(map(max, sums))

    def _infeasible(self, budgets: Mapping[str, float]) -> UserError:
        parts = []
        for name, budget in budgets.items():
            least, greatest = self.bounds(name)
            parts.append(f"{name} <= {budget:g} (it can be from {least:g} to {greatest:g})")
        return UserError(f"no assignment meets {' and '.join(parts)}" + (" together" if len(parts) > 1 else ""))


def _affordable(options: Sequence[_Option], table: Table, budget: float) -> list[_Option]:
    """The options that some choice within the budget can hold.

    The rest, such as the 1e9 that a latency table has for what a device cannot do, would be the unit of the programme, which
    then no longer tells what the budget does.
    """
    cost = {option: sum(table[layer][option[1]] for layer in option[0]) for option in options}
    least: dict[tuple[str, ...], float] = {}
    for (group, _), one in cost.items():
        least[group] = min(one, least.get(group, math.inf))
    room = budget - sum(least.values()) + _SLACK * (abs(budget) + sum(map(abs, least.values())))
    return [option for option in options if cost[option] - least[option[0]] <= room]


def _least(damage: np.ndarray, usable: np.ndarray, constraints: LinearConstraint) -> list[int] | None:
    """The indices of what is picked where the sum of damage is least; None where nothing meets the constraints.

    Args:
        damage: of each option, not negative.
        usable: 1 for an option that may be picked, else 0.
        constraints: of the options, each picked or not.
    """
    damage = damage * usable
    unit = float(damage.max(initial=0.0)) or 1.0
    # Where a budget leaves next to no room, HiGHS's presolve calls some problems infeasible that are not.
    for presolve in (True, False):
        found = milp(
            damage / unit * _GREATEST_DAMAGE,
            constraints=constraints,
            integrality=np.ones(len(damage)),
            bounds=Bounds(0, usable),
            options={"mip_rel_gap": 0.0, "presolve": presolve},
        )
        if found.x is not None:
            return [int(i) for i in np.flatnonzero(found.x > 0.5)]
    return None


def _step(values: np.ndarray) -> float:
    """What all values are whole multiples of, but for rounding; 0 where that is too small for the solver to tell apart."""
    step = 0.0
    for value in np.abs(values):
        greater, less = max(step, value), min(step, value)
        while less > _LEAST_STEP:
            rest = math.remainder(greater, less)
            greater, less = less, abs(rest) if abs(rest) > _SLACK * _LEAST_STEP else 0.0
        if less:
            return 0.0
        step = greater
    if not step:
        return 0.0
    # Without the errors of all those remainders.
    step = float(np.abs(values).max() / round(np.abs(values).max() / step))
    multiples = np.abs(values) / step
    return step if (np.abs(multiples - np.round(multiples)) <= _HAIR * np.maximum(multiples, 1.0)).all() else 0.0


def frontier(problem: Problem, budgets: Sequence[Mapping[str, float]]) -> list[Choice]:
    """The best choice for each budget, each once, without those that another beats in damage and every cost.

    Raises:
        UserError: a budget cannot be met.
    """
    found: dict[Assignment, Choice] = {}
    for budget in budgets:
        choice = problem.solve(budget)
        found[choice.assignment] = choice
    return pareto(list(found.values()))


def pareto(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that no other one equals or beats in damage and every cost and truly beats in one, least damage first."""

    def numbers(choice: Choice) -> list[float]:
        return [choice.damage, *choice.cost.values()]

    def beaten(choice: Choice, by: Choice) -> bool:
        pairs = [(own, theirs, _HAIR * abs(own)) for own, theirs in zip(numbers(choice), numbers(by), strict=True)]
        return all(theirs <= own + hair for own, theirs, hair in pairs) and any(
            theirs < own - hair for own, theirs, hair in pairs
        )

    kept = [choice for choice in choices if not any(beaten(choice, other) for other in choices)]
    return sorted(kept, key=numbers)


def alternatives(problem: Problem, budgets: Mapping[str, float]) -> list[Choice]:
    """The optimum, then other choices within the same budgets (the paper's algorithm 2).

    For each layer in turn the width that it got is forbidden and the rest solved again; what is new is kept.

    Raises:
        UserError: no choice meets the budgets.
    """
    best = problem.solve(budgets)
    found = {best.assignment: best}
    for layer, width in best.assignment.items():
        try:
            other = problem.solve(budgets, forbidden=[(layer, width)])
        except UserError:
            # Without that width of that layer the budgets cannot be met.
            continue
        found.setdefault(other.assignment, other)
    return [best, *sorted((c for c in found.values() if c is not best), key=lambda choice: choice.damage)]


def check_table(name: str, table: Table, layers: Table) -> None:
    """Refuse a table that lacks a layer or a width of `layers`, has others, or holds what is not finite.

    Raises:
        UserError: it does.
    """
    if not isinstance(table, Mapping):
        raise UserError(f"table {name!r} is a {type(table).__name__}: give {{layer: {{width: number}}}}")
    if not table:
        raise UserError(f"table {name!r} holds no layers")
    for layer, widths in layers.items():
        if layer not in table:
            raise UserError(f"table {name!r} lacks layer {layer!r}")
        if not isinstance(table[layer], Mapping):
            raise UserError(
                f"table {name!r} gives layer {layer!r} a {type(table[layer]).__name__}: give {{width: number}}"
            )
        for width in widths:
            if width not in table[layer]:
                raise UserError(f"table {name!r} lacks {width} bits of layer {layer!r}")
            if not _is_finite(table[layer][width]):
                raise UserError(f"table {name!r} holds {table[layer][width]} for layer {layer!r} at {width} bits")
    for layer in table:
        if layer not in layers:
            raise UserError(f"table {name!r} has a layer {layer!r} of another network{nearest(str(layer), layers)}")


def _is_finite(number: Any) -> bool:
    try:
        return not isinstance(number, (str, bool)) and math.isfinite(number)
    except (TypeError, ValueError, OverflowError):
        return False
