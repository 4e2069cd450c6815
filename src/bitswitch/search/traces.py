"""Estimates of traces from probes, and how much they may be trusted."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy import special

from bitswitch.errors import UserError
from bitswitch.search.probes import Job


@dataclass(frozen=True)
class Trace:
    """An estimate of the trace of one layer's block of the Hessian.

    Attributes:
        mean: the estimate.
        standard_error: of the estimate, from the spread of the probes; widened where they are few, so that 1.96 of them to
            either side hold the trace 95 times in 100.
    """

    mean: float
    standard_error: float


def worst_error(traces: Mapping[str, Trace]) -> float:
    """The greatest of the layers' standard errors, each as a share of its trace.

    Of 1 % of the summed absolute traces where a trace is smaller: such a layer matters little, but whether it is such a layer
    must be known.
    """
    return max(errors(traces).values())


def errors(traces: Mapping[str, Trace]) -> dict[str, float]:
    """Each layer's error, of which `worst_error` is the greatest."""
    least = 0.01 * sum(abs(trace.mean) for trace in traces.values())
    scales = {name: max(abs(trace.mean), least) for name, trace in traces.items()}
    return {name: t.standard_error / scales[name] if t.standard_error else 0.0 for name, t in traces.items()}


@dataclass
class Tally:
    """The probes of one kind that a layer has had.

    Attributes:
        drawn: also those that do not count any more.
        probes: those that count.
        total: `probes` times their mean.
        variance: of `total`, as estimated.
        uncertainty: half the variance of that estimate.
        alone: whether they moved no other layer.
    """

    drawn: int = 0
    probes: int = 0
    total: float = 0.0
    variance: float = 0.0
    uncertainty: float = 0.0
    alone: bool = False

    def add(self, job: Job, mean: float, variance: float, uncertainty: float) -> None:
        """Take in the mean of a job's probes, its variance as estimated, and half the variance of that estimate."""
        alone = len(job.layers) == 1
        if alone and not self.alone and job.kind == "weight":
            # Other layers' noise is in what came before; a mean would keep it.
            self.probes, self.total, self.variance, self.uncertainty = 0, 0.0, 0.0, 0.0
        self.alone = alone
        self.drawn = job.start + job.probes
        self.probes += job.probes
        self.total += job.probes * mean
        self.variance += job.probes**2 * variance
        self.uncertainty += job.probes**4 * uncertainty

    def of_mean(self) -> float:
        """The variance of the mean."""
        return self.variance / self.probes**2


def trace_of(name: str, parts: Iterable[Tally]) -> Trace:
    """A layer's trace: the sum of its parts, a kind of probes each.

    Raises:
        UserError: it is not finite.
    """
    parts = list(parts)
    error = math.sqrt(sum(part.of_mean() for part in parts))
    trace = Trace(sum(part.total / part.probes for part in parts), error * _widening(degrees(parts)))
    if not math.isfinite(trace.mean) or not math.isfinite(trace.standard_error):
        raise UserError(f"the trace of layer {name!r} is not finite: check the model and the data")
    return trace


def _widening(degrees: float) -> float:
    """By what 1.96 estimated standard errors must be multiplied to hold 95 %: Student's t."""
    return float(special.stdtrit(degrees, 0.975) / special.ndtri(0.975)) if math.isfinite(degrees) else 1.0


def degrees(parts: Sequence[Tally]) -> float:
    """Degrees of freedom of the estimated variance of the parts' sum (Satterthwaite), at least 1."""
    uncertainty = sum(part.uncertainty / part.probes**4 for part in parts)
    if not uncertainty:
        return math.inf
    # The square of the estimated variance is too great by 2/degrees of it: so the 2 is taken off again.
    variance = sum(part.of_mean() for part in parts)
    return max(1.0, variance * variance / uncertainty - 2)
