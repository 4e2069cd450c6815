"""Which width every layer has in a step of SuperNet training (arXiv 2502.01199, section 5)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from bitswitch.assignment import Assignment
from bitswitch.errors import UserError, check_number, check_word, nearest

Sampling = Literal["hasb", "uniform", "fixed"]


def sensitive_layers(
    traces: Mapping[str, float], *, above: Literal["mean"] | float = "mean", cap: float = 1.0
) -> frozenset[str]:
    """The layers that are to be drawn at high widths more often.

    Args:
        traces: of the Hessian, for each quantized layer.
        above: "mean" takes the layers whose trace is at least the mean over layers (arXiv 2502.01199, section 5); a number
            in [0, 1] those whose trace is at least that quantile.
        cap: at most this share of all layers, those of the greatest traces.

    Raises:
        UserError: there are no traces, one is not finite, or a share is not from 0 to 1, or `cap` is less than one layer.

    >>> sorted(sensitive_layers({"a": 1.0, "b": 9.0, "c": 8.0, "d": 2.0}))
    ['b', 'c']
    >>> sorted(sensitive_layers({"a": 1.0, "b": 9.0, "c": 8.0, "d": 2.0}, cap=0.25))
    ['b']
    """
    values = np.array(list(traces.values()), dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise UserError(
            "sensitive layers cannot be told: a trace is missing or not finite; do the sensitivity stage again"
        )
    for name, share in (("above", 0.0 if above == "mean" else above), ("cap", cap)):
        if isinstance(share, str) or not 0 <= share <= 1:
            raise UserError(f"{name}={share!r}: give a number from 0 to 1" + " or 'mean'" * (name == "above"))
    threshold = values.mean() if above == "mean" else np.quantile(values, above)
    # The mean of equal numbers may be above them by a last digit, and a share of layers below a whole number.
    threshold -= 1e-12 * abs(threshold)
    most = most_sensitive(cap, len(values))
    ranked = sorted(traces, key=lambda name: -traces[name])
    return frozenset(name for name in ranked[:most] if traces[name] >= threshold)


def most_sensitive(cap: float, layers: int) -> int:
    """How many of so many layers a cap leaves.

    Raises:
        UserError: none, of a cap above 0: HASB would draw all layers evenly.
    """
    most = int(cap * layers + 1e-9)
    if cap > 0 and not most:
        least = math.ceil(1000 / layers) / 1000
        raise UserError(f"cap={cap} of {layers} layers is less than one: use {least} or more, or sampler=uniform")
    return most


@dataclass(frozen=True, kw_only=True)
class AssignmentSampler:
    """Draws the assignments of a step, the same on every rank and in a resumed run.

    With sigma_e = sigma (e + 1) / E in epoch e of E, a forward that stands for width b leaves every layer at b with
    probability 1 - sigma_e, and else draws its width: a sensitive layer takes width b_i with probability b_i / sum(widths),
    any other layer each width equally often (arXiv 2502.01199, section 5).

    Attributes:
        layers: quantized layers, in the order of the network.
        widths: candidate widths, highest first.
        sensitive: layers that are drawn at high widths more often.
        sampling: "hasb"; "uniform" draws every layer as one that is not sensitive (Bit-Mixer); "fixed" draws none.
        sigma: the share of layers that are drawn in the last epoch, in [0, 1].
        sandwich: instead of a forward for each width, three: all layers at the highest, all drawn, all at the lowest.
        seed: of the draws.
        steps: in an epoch.
        epochs: E.
    """

    layers: tuple[str, ...]
    widths: tuple[int, ...]
    sensitive: frozenset[str]
    sampling: Sampling
    sigma: float
    sandwich: bool
    seed: int
    steps: int
    epochs: int

    def __post_init__(self) -> None:
        check_word("sampling", self.sampling, get_args(Sampling))
        check_number("sigma", self.sigma)
        if not 0 <= self.sigma <= 1:
            raise UserError(f"sigma={self.sigma!r}: a share of layers is from 0 to 1")
        if self.sandwich and self.sampling == "fixed":
            raise UserError(
                "sandwich=True draws its middle forward: use sampling='hasb' or 'uniform', or sandwich=False"
            )
        for name in sorted(self.sensitive - set(self.layers)):
            raise UserError(f"sensitive: no layer is named {name!r}{nearest(name, self.layers)}")

    @property
    def names(self) -> tuple[str, ...]:
        """What the forwards of a step stand for."""
        ends = (str(self.widths[0]), "random", str(self.widths[-1]))
        return ends if self.sandwich else tuple(map(str, self.widths))

    def draw(self, step: int) -> list[tuple[int | None, Assignment]]:
        """For every forward of a step, the width that it stands for (None: no one's) and its assignment.

        Args:
            step: counted from the beginning of training.
        """
        bases: Sequence[int | None] = (self.widths[0], None, self.widths[-1]) if self.sandwich else self.widths
        rows = len(bases)
        # A layer's numbers depend on the seed, the step and its place alone.
        chance = np.random.default_rng((self.seed, step)).random((rows, 2, len(self.layers)))
        sigma = 0.0 if self.sampling == "fixed" else self.sigma * (step // self.steps + 1) / self.epochs
        drawn = self._roulette(chance[:, 1])
        found = []
        for base, share, row in zip(bases, chance[:, 0], drawn, strict=True):
            if base is None:
                taken = row
            elif self.sandwich:
                taken = np.full_like(row, base)
            else:
                taken = np.where(share < sigma, row, base)
            found.append((base, Assignment(tuple(zip(self.layers, taken.tolist(), strict=True)))))
        return found

    def _roulette(self, chance: np.ndarray) -> np.ndarray:
        """Widths from numbers in [0, 1), the last axis over layers."""
        even = np.full(len(self.widths), 1 / len(self.widths))
        wide = np.array(self.widths) / sum(self.widths)
        aware = self.sampling == "hasb"
        edges = np.stack([np.cumsum(wide if aware and name in self.sensitive else even) for name in self.layers])
        # The last edge is 1 but for rounding.
        index = (chance[..., None] >= edges[:, :-1]).sum(-1)
        return np.array(self.widths)[index]


@dataclass(frozen=True, kw_only=True)
class WidthSampler:
    """Draws the widths that a step of joint training visits: always the lowest, with others drawn evenly.

    The lowest has the most to learn, and the others learn much of it along (the codes are shared), so that a step over two
    of four widths costs half and leaves the lowest as many steps.

    Attributes:
        widths: candidate widths, highest first.
        forwards: how many a step visits, from 1 to all.
        seed: of the draws, the same on every rank and in a resumed run.
    """

    widths: tuple[int, ...]
    forwards: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.forwards <= len(self.widths):
            raise UserError(f"forwards={self.forwards!r}: a step visits from 1 to all {len(self.widths)} widths")

    @property
    def names(self) -> tuple[str, ...]:
        """What the forwards of a step stand for."""
        if self.forwards == len(self.widths):
            return tuple(map(str, self.widths))
        return (*(f"random {i + 1}" for i in range(self.forwards - 1)), str(self.widths[-1]))

    def draw(self, step: int) -> list[tuple[int, int]]:
        """For every forward of a step, highest first, the width that it stands for and the one that it has: the same.

        Args:
            step: counted from the beginning of training.

        >>> [[width for width, _ in WidthSampler(widths=(8, 6, 4, 2), forwards=2, seed=0).draw(step)] for step in range(4)]
        [[4, 2], [6, 2], [6, 2], [4, 2]]
        """
        *others, lowest = self.widths
        drawn = np.random.default_rng((self.seed, step)).choice(len(others), self.forwards - 1, replace=False)
        return [(width, width) for width in (*(others[i] for i in sorted(drawn.tolist())), lowest)]
