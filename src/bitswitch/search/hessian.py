"""Traces of the Hessian, layer by layer: how sharply the loss bends when a layer's weights move (HAWQ-V2, 1911.03852)."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from bitswitch.errors import UserError, check_number, check_whole, nearest
from bitswitch.nn import QuantizedLayer, evaluating, unwrapped
from bitswitch.nn.plan import replace_attention
from bitswitch.search.passes import TRACED, Layer, LossFunction
from bitswitch.search.probes import Job, Kind, Prober, prober
from bitswitch.search.traces import Tally, Trace, errors, trace_of, worst_error

# A standard error from fewer values than this may be small by luck, and stop the search.
_VALUES = 20


def hessian_trace(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    target: float | None = 0.1,
    probes: int = 1000,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Trace]:
    """The trace of the Hessian's block for every layer's weight, in eval mode, with a standard error each.

    The loss is the mean over batches; every probe sees every batch. Which probes the model allows (bitswitch.search.probes) is
    found out on the first batch: whether its output is one tensor of at most 1024 numbers a sample that alone decides the
    loss, whether samples depend on each other, whether the outputs bend. The first round probes all layers at once. Later
    rounds, up to the target, probe the layers whose error is too large, each alone where the noise is that of weight probes.

    Args:
        model: a float network. Its parameters, gradients and modes are left as they are; frozen weights count like others.
        loss_fn: `loss_fn(model, batch)`, a scalar tensor, twice differentiable.
        batches: visited one at a time, all in every round; where they can be visited only once, `target` must be None.
        layers: names; where None, all nn.Conv1d, nn.Conv2d and nn.Linear that the loss depends on. In place of an
            nn.MultiheadAttention those of its equal in a quantized network, `in_proj` and `out_proj`.
        target: go on until `worst_error` is at most this. None: one round of `probes`.
        probes: at most so many of each kind for any layer, at least 2.
        seed: of the probes.
        rank: which of the `ranks` this is.
        ranks: processes of torch.distributed's default group. They share the batches: each is given all and computes every
            ranks-th; all return the traces that one process would.
        progress: called after every round with the most probes a layer has had and `worst_error`.

    Returns:
        {layer: its trace}, in the order of the network's definition.

    Raises:
        UserError: a number is out of range, a name is no layer's, the model is quantized, the loss does not depend on a named
            layer, there are no batches or they cannot be visited again, or a trace is not finite.
    """
    # A standard error needs two.
    check_whole("probes", probes, 2)
    check_whole("seed", seed, 0)
    check_whole("rank", rank, 0)
    check_whole("ranks", ranks, 1)
    if target is not None:
        check_number("target", target)
    if target is not None and not 0 < target < math.inf:
        raise UserError(f"target={target!r}: an error to reach is a number above 0; None takes one round")
    if not 0 <= rank < ranks:
        raise UserError(f"rank={rank} is none of ranks={ranks}: they count from 0")
    if isinstance(layers, str):
        raise UserError(f"layers={layers!r}: give a list, such as [{layers!r}]")
    layers = None if layers is None else list(layers)
    if layers is not None and not layers:
        raise UserError("layers=[] names none: leave it out for all")
    if target is not None and iter(batches) is batches:
        raise UserError("the batches can be visited only once: give a list or a loader, or target=None for one round")
    model = _traceable(model)
    traced = _layers(model, layers)
    with evaluating(model), torch.enable_grad(), _differentiable(traced):
        rest = iter(batches)
        first = next(rest, None)
        if first is None:
            raise UserError("there are no batches to take the trace over")
        how = prober(model, loss_fn, first, traced, seed, named=layers is not None)
        tallies = {name: {kind: Tally() for kind in how.kinds} for name in how.layers}
        fewest = min(max(2, 1 + math.ceil(_VALUES / how.samples)), probes)
        count = fewest if target is not None else probes
        jobs = [Job(kind, tuple(how.layers), 0, count) for kind in how.kinds]
        visited: Iterable[Any] = chain(iter([first]), rest)
        del first
        while True:
            _visit(how, visited, jobs, tallies, rank, ranks)
            traces = {name: trace_of(name, parts.values()) for name, parts in tallies.items()}
            if progress is not None:
                most = max(tally.probes for parts in tallies.values() for tally in parts.values())
                progress(most, worst_error(traces))
            jobs = [] if target is None else _next_jobs(tallies, traces, target, fewest, probes)
            if not jobs:
                return traces
            visited = batches


def _traceable(model: nn.Module) -> nn.Module:
    """The model, or its equal where attention would run no layers, or an activation has no second derivative."""
    model = unwrapped(model)
    if any(type(module) in (nn.MultiheadAttention, nn.Hardsigmoid) for module in model.modules()):
        model = copy.deepcopy(model)
        replace_attention(model)
        for module in model.modules():
            if type(module) is nn.Hardsigmoid:
                module.__class__ = _Hardsigmoid
    return model


class _Hardsigmoid(nn.Hardsigmoid):
    """One whose second derivative torch has."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


def _layers(model: nn.Module, layers: Sequence[str] | None) -> dict[str, Layer]:
    modules = dict(model.named_modules())
    if any(isinstance(module, QuantizedLayer) for module in modules.values()):
        raise UserError("the model is quantized, and rounding has no second derivative: give the float network")
    found = {n: m for n, m in modules.items() if isinstance(m, TRACED) and isinstance(m.weight, nn.Parameter)}
    for name in layers or ():
        if name not in found:
            raise UserError(f"no convolution or linear layer is named {name!r}{nearest(str(name), found)}")
    return found if layers is None else {name: found[name] for name in found if name in layers}


@contextmanager
def _differentiable(layers: Mapping[str, Layer]) -> Iterator[None]:
    """All weights take part for the length of a `with` block, frozen ones too."""
    weights = [layer.weight for layer in layers.values()]
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)


def _visit(
    how: Prober,
    batches: Iterable[Any],
    jobs: Sequence[Job],
    tallies: Mapping[str, Mapping[Kind, Tally]],
    rank: int,
    ranks: int,
) -> None:
    """Do the jobs on this rank's share of the batches, and add to the tallies what all ranks found."""
    keys = [(job, name) for job in jobs for name in job.layers]
    sums, count = torch.zeros(len(keys), 3, dtype=torch.float64, device="cpu"), 0
    for index, batch in enumerate(batches):
        count += 1
        if index % ranks == rank:
            found = how.visit(batch, index, jobs)
            values = [of_job[name] for job, of_job in zip(jobs, found, strict=True) for name in job.layers]
            sums += torch.tensor(values, dtype=torch.float64, device="cpu")
    if ranks > 1:
        device = next(iter(how.layers.values())).weight.device
        sums = sums.to(device)
        dist.all_reduce(sums)
    for (job, name), (mean, variance, uncertainty) in zip(keys, sums.tolist(), strict=True):
        tallies[name][job.kind].add(job, mean / count, variance / count**2, uncertainty / count**4)


def _next_jobs(
    tallies: Mapping[str, Mapping[Kind, Tally]],
    traces: Mapping[str, Trace],
    target: float,
    fewest: int,
    most: int,
) -> list[Job]:
    """What should bring the layers above the target there: more of the probes whose noise is the larger in each."""
    outputs, jobs = 0, []
    for name, error in errors(traces).items():
        if error <= target:
            continue
        kind = max(tallies[name], key=lambda kind: tallies[name][kind].of_mean())
        tally = tallies[name][kind]
        first_alone = kind == "weight" and not tally.alone
        counted = 0 if first_alone else tally.probes
        # Not squared by a power, which overflows.
        needed = counted * ((error / target) * (error / target) - 1)
        more = min(fewest if first_alone else max(fewest, math.ceil(min(needed, most))), most - counted)
        if more < 2:
            continue
        if kind == "output":
            outputs = max(outputs, more)
        else:
            jobs.append(Job(kind, (name,), tally.drawn, more))
    if outputs:
        # One backward serves all layers, so all get what one needs.
        jobs.append(Job("output", tuple(tallies), next(iter(tallies.values()))["output"].drawn, outputs))
    return jobs
