"""A frontier of mixed assignments: how it is written down, and how the best within a budget is found in it."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bitswitch.artifact.container import is_finite
from bitswitch.errors import UserError, nearest

_BUDGET = re.compile(r"\s*(?P<cost>[^<]+?)\s*<=\s*(?P<most>[0-9.eE+-]+)\s*")


def check_choice(choice: Any, layers: Collection[str], widths: Collection[int]) -> Mapping[str, Any]:
    """One choice, {"assignment": {layer: bits}, "cost": {name: number}, "damage": number, "top1": number or None}.

    Args:
        choice: as it was read.
        layers: of the network.
        widths: that they can have.

    Raises:
        UserError: it is not a choice for such a network.
    """
    try:
        assignment, cost, damage, top1 = (choice[key] for key in ("assignment", "cost", "damage", "top1"))
        numbers = [*cost.values(), damage, *([] if top1 is None else [top1])]
        items = list(assignment.items())
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"a choice of the frontier lacks its assignment, cost, damage or top1 ({error!r})") from error
    for name, width in items:
        if name not in layers:
            raise UserError(f"the frontier names a layer {name!r} of another network{nearest(str(name), layers)}")
        if type(width) is not int or width not in widths:
            raise UserError(
                f"the frontier gives layer {name!r} {width!r} bits; there are {', '.join(map(str, widths))}"
            )
    if missing := sorted(set(layers) - set(assignment)):
        raise UserError(f"a choice of the frontier lacks layer {missing[0]!r}")
    if not all(map(is_finite, numbers)):
        raise UserError("a choice of the frontier holds a cost, damage or top1 that is no finite number")
    return choice


def within_budget(frontier: Sequence[Mapping[str, Any]], budget: str, highest: int | None = None) -> Mapping[str, Any]:
    """The best choice that a budget allows: of most top1 where all were measured, else of least damage.

    Args:
        frontier: choices.
        budget: "COST<=NUMBER", the cost one of those that the choices list; "avg" stands for "bits", the average width.
        highest: the width up to which a file that is cut off serves. Choices with higher ones are left out, unless all have.

    Raises:
        UserError: there is no frontier, the budget is not of that form, or nothing meets it.
    """
    if budget.strip().isdecimal():
        raise UserError(f"{budget!r} is text: one width for all layers is a whole number, {budget.strip()}")
    if not frontier:
        raise UserError(f"assignment={budget!r} needs a frontier, and there is none: bitswitch search RECIPE makes one")
    if highest is not None:
        frontier = [one for one in frontier if max(one["assignment"].values()) <= highest] or frontier
    costs = [name for name in frontier[0]["cost"] if all(name in choice["cost"] for choice in frontier)]
    parsed = _BUDGET.fullmatch(budget)
    try:
        name, most = parsed["cost"], float(parsed["most"])  # type: ignore[index]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"assignment={budget!r} is not of the form 'avg<=4'; costs are avg, {', '.join(costs)}"
        ) from error
    name = "bits" if name == "avg" else name
    if name not in costs:
        raise UserError(f"no cost is named {name!r}{nearest(name, costs)}; there are avg, {', '.join(costs)}")
    # A hair of slack: 4 bits on average may have been summed as 4.000000000000001.
    allowed = [choice for choice in frontier if choice["cost"][name] <= most * (1 + 1e-12)]
    if not allowed:
        least = min(choice["cost"][name] for choice in frontier)
        raise UserError(f"no choice of the frontier has {name} <= {most:g}: the least is {least:g}")
    if all(choice["top1"] is not None for choice in allowed):
        return max(allowed, key=lambda choice: (choice["top1"], -choice["damage"]))
    return min(allowed, key=lambda choice: choice["damage"])
