"""Traces of the Hessian, layer by layer: how sharply the loss bends when a layer's weights move (HAWQ-V2, 1911.03852)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitswitch.errors import UserError, nearest
from bitswitch.nn import evaluating

_TRACED = (nn.Conv1d, nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Trace:
    """An estimate of the trace of one layer's block of the Hessian.

    Attributes:
        mean: the estimate.
        standard_error: of the estimate, from the spread of the probes.
    """

    mean: float
    standard_error: float


def hessian_trace(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    probes: int = 20,
    groups: int = 1,
    target: float | None = None,
    most_probes: int = 1000,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Trace]:
    """Hutchinson's estimate of the Hessian's trace for every layer's weight, in eval mode, by standard error.

    A probe is a random vector of signs v; `v_i . (H v)_i` estimates the trace of layer i's block. One product H v serves all
    layers of a group at once; more groups need more products a probe, but no layer's estimate then holds the cross terms of
    layers in other groups. The loss is the mean over batches, and every probe sees every batch.

    Args:
        model: a float network (its parameters and gradients are left as they are).
        loss_fn: `loss_fn(model, batch)`, a scalar tensor, twice differentiable.
        batches: visited once for every round of probes; what can be iterated over again is streamed, never held.
        layers: names; where None, all nn.Conv1d, nn.Conv2d and nn.Linear that the loss depends on.
        probes: how many in a round.
        groups: how many groups the layers are dealt to, in turn; as many as layers: no cross terms at all.
        target: go on until the standard error of every layer that holds at least 1 % of the summed absolute traces is at
            most this share of its trace.
        most_probes: stop there whatever the error is.
        seed: of the probes.
        progress: called after every round with the probes so far and the greatest relative error among those layers.

    Returns:
        {layer: its trace}, in the order of the network's definition.

    Raises:
        UserError: a name is no layer's, the loss does not depend on a named layer, there are no batches, or a trace is not
            finite.
    """
    weights = _weights(model, layers)
    samples: dict[str, list[float]] = {name: [] for name in weights}
    with evaluating(model):
        weights = _used(model, loss_fn, batches, weights, named=layers is not None)
        while True:
            done = len(next(iter(samples.values()))) if weights else 0
            for name, values in _round(
                model, loss_fn, batches, weights, range(done, done + probes), groups, seed
            ).items():
                samples[name] += values
            traces = {name: _estimate(name, samples[name]) for name in weights}
            error = worst_error(traces)
            if progress is not None:
                progress(done + probes, error)
            if target is None or error <= target or done + probes >= most_probes:
                return traces


def worst_error(traces: Mapping[str, Trace]) -> float:
    """The greatest relative standard error among the layers that hold at least 1 % of the summed absolute traces."""
    total = sum(abs(trace.mean) for trace in traces.values())
    heavy = [trace for trace in traces.values() if abs(trace.mean) >= 0.01 * total]
    return max((t.standard_error / abs(t.mean) if t.mean else math.inf for t in heavy), default=math.inf)


def _weights(model: nn.Module, layers: Sequence[str] | None) -> dict[str, Tensor]:
    found = {name: module.weight for name, module in model.named_modules() if isinstance(module, _TRACED)}
    for name in layers or ():
        if name not in found:
            raise UserError(f"no convolution or linear layer is named {name!r}{nearest(name, found)}")
    return found if layers is None else {name: found[name] for name in found if name in layers}


def _used(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    weights: Mapping[str, Tensor],
    *,
    named: bool,
) -> dict[str, Tensor]:
    """The weights that the loss of a batch depends on."""
    for batch in batches:
        gradients = torch.autograd.grad(loss_fn(model, batch), list(weights.values()), allow_unused=True)
        used = {name: w for (name, w), g in zip(weights.items(), gradients, strict=True) if g is not None}
        if named and len(used) < len(weights):
            raise UserError(f"the loss does not depend on layer {next(name for name in weights if name not in used)!r}")
        if not used:
            raise UserError("the loss depends on no layer's weight")
        return used
    raise UserError("there are no batches to take the trace over")


def _round(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    weights: Mapping[str, Tensor],
    probes: range,
    groups: int,
    seed: int,
) -> dict[str, list[float]]:
    """For each layer, `v_i . (H v)_i` of each probe, averaged over batches."""
    names, parameters = list(weights), list(weights.values())
    members = [list(range(first, len(names), groups)) for first in range(min(groups, len(names)))]
    total, count = torch.zeros(len(probes), len(names), dtype=torch.float64), 0
    for batch in batches:
        count += 1
        gradients = torch.autograd.grad(loss_fn(model, batch), parameters, create_graph=True)
        for row, probe in enumerate(probes):
            signs = _signs(parameters, seed, probe)
            for own in members:
                products = torch.autograd.grad(
                    [gradients[i] for i in own],
                    [parameters[i] for i in own],
                    [signs[i] for i in own],
                    retain_graph=True,
                    materialize_grads=True,
                )
                dots = torch.stack(
                    [(signs[i] * hv).sum(dtype=torch.float64) for i, hv in zip(own, products, strict=True)]
                )
                total[row, own] += dots.cpu()
        del gradients
    return {name: (total[:, i] / count).tolist() for i, name in enumerate(names)}


def _signs(parameters: Sequence[Tensor], seed: int, probe: int) -> list[Tensor]:
    """The probe's random signs, the same on every device and for every batch."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, probe)).generate_state(1)[0]))
    return [
        torch.randint(0, 2, p.shape, generator=generator).mul_(2).sub_(1).to(device=p.device, dtype=p.dtype)
        for p in parameters
    ]


def _estimate(name: str, values: Sequence[float]) -> Trace:
    if not all(math.isfinite(value) for value in values):
        raise UserError(f"the trace of layer {name!r} is not finite: check the model and the data")
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Trace(float(np.mean(values)), spread)
