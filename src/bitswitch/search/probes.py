"""Random probes of the blocks of a model's Hessian, on one batch.

With f the model's outputs, J their derivative in a layer's weight and S the loss's second derivative in f, the layer's block of
the Hessian is J^T S J + R; R, the outputs' own curvature, is exactly zero where the network is piecewise linear in each weight
(ReLU, pooling, batch normalization in eval mode). Two estimates, both unbiased:

- Output probes, of tr(J^T S J): |J^T S^(1/2) v|^2 with random signs v over the outputs. One backward serves all layers, no
  layer's estimate holds another's noise, and none comes from signs over weights, of which there are many more than outputs.
- Weight probes, of tr(R), or of the whole trace where outputs and loss cannot be told apart: Hutchinson's V^T H V with signs
  V. Samples that do not depend on each other get different signs, which divides the variance by their number. Where V moves
  nothing but its own layer's output, by V a with a the layer's input, the product is taken there, not in the weights.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitswitch.errors import UserError

TRACED = (nn.Conv1d, nn.Conv2d, nn.Linear)

Layer = nn.Conv1d | nn.Conv2d | nn.Linear
LossFunction = Callable[[nn.Module, Any], Tensor]
Kind = Literal["output", "weight"]
Values = dict[str, Tensor]

_PLAIN = tuple(kind.forward for kind in TRACED)
# S is decomposed for every sample: with more outputs than this that costs more than all else.
_MOST_OUTPUTS = 1024
# Elements of one layer's per-sample gradients that are held at a time.
_CHUNK = 2**24
# Fewer random halves of a batch than this, over its samples, might not tell two that depend on each other apart.
_HALVES = 20


@dataclass(frozen=True)
class Job:
    """Probes of one kind for some layers: those with the numbers `start` to `start + probes`, at least 2."""

    kind: Kind
    layers: tuple[str, ...]
    start: int
    probes: int


@dataclass(frozen=True)
class Prober:
    """How a model can be probed.

    Attributes:
        layers: those that the loss depends on.
        shifted: those whose weight is used once in a forward, by their own module; they are moved in their outputs.
        samples: of the first batch, if none depends on another; else 1.
        kinds: of the probes whose expectations add up to the trace.
    """

    model: nn.Module
    loss_fn: LossFunction
    seed: int
    layers: Mapping[str, Layer]
    shifted: frozenset[str]
    samples: int = 1
    kinds: tuple[Kind, ...] = ("weight",)

    def visit(self, batch: Any, index: int, jobs: Sequence[Job]) -> list[dict[str, tuple[float, float, float]]]:
        """For each job and layer, what the probes on this batch, the index-th, found.

        That is their mean, its variance as estimated from their spread, and the variance of that estimate, halved (of a
        normal distribution): by it the degrees of freedom are known.
        """
        run = self._run(batch)
        kinds = {job.kind for job in jobs}
        roots = self._roots(run) if "output" in kinds else []
        gradients = self._gradients(run) if "weight" in kinds else {}
        found = []
        for job in jobs:
            probes = []
            for number in range(job.start, job.start + job.probes):
                signs = _Signs(self.seed, index, number, job.kind == "output")
                if job.kind == "output":
                    probes.append(self._output_probe(run, roots, job.layers, signs))
                else:
                    probes.append(self._weight_probe(run, gradients, job.layers, signs))
            found.append({name: _summary(torch.stack([probe[name] for probe in probes])) for name in job.layers})
        return found

    def with_samples(self, batch: Any) -> "Prober":
        """This prober with a probe for each sample, if no sample's gradient depends on another."""
        if not self.shifted:
            return self
        run = self._run(batch)
        count = _rows(run.knobs[name] for name in self.shifted)
        gradients = self._gradients(run)
        moves = {name: self._move(run, name, 1, _Signs(self.seed)) for name in self.shifted}

        def pushed(mask: Tensor) -> Iterable[Tensor]:
            return _products(run, gradients, {name: _masked(move, mask) for name, move in moves.items()}).values()

        return replace(self, samples=count if _separate(count, pushed) else 1)

    def with_outputs(self, run: "_Pass") -> "Prober | None":
        """This prober with output probes, if it has run on a batch in which the model's output alone decides the loss."""
        if run.output is None or run.leaf is None or self.shifted != set(self.layers):
            return None
        if _reached([run.loss], {name: [knob] for name, knob in run.knobs.items()}):
            return None
        knobs = list(run.knobs.values())
        output, leaf, signs = run.output, run.leaf, _Signs(self.seed).like(run.output)
        gradient = torch.autograd.grad(run.loss, leaf, create_graph=True)[0]

        def pushed(mask: Tensor) -> Iterable[Tensor]:
            direction = _masked(signs, mask)
            yield from torch.autograd.grad(output, knobs, direction, retain_graph=True, materialize_grads=True)
            if gradient.requires_grad:
                yield from torch.autograd.grad(gradient, leaf, direction, retain_graph=True, materialize_grads=True)

        count = _rows([output, *knobs])
        count = count if _separate(count, pushed) else 1
        if output.numel() // count > _MOST_OUTPUTS:
            return None
        found = replace(self, samples=count, kinds=("output", "weight"))
        bends = found._weight_probe(run, found._gradients(run), tuple(self.layers), _Signs(self.seed))
        return found if any(value.any() for value in bends.values()) else replace(found, kinds=("output",))

    def _run(self, batch: Any) -> "_Pass":
        run = _forward(self.model, self.loss_fn, batch, self.shifted, self.layers, cut="output" in self.kinds)
        for name in self.shifted:
            if len(run.calls[name]) > 1:
                raise UserError(
                    f"layer {name!r} ran once on the first batch and more often on a later one: trace it alone"
                )
        return run

    def _samples(self, run: "_Pass") -> int:
        return 1 if self.samples == 1 else _rows(run.knobs[name] for name in self.shifted if name in run.knobs)

    def _roots(self, run: "_Pass") -> list[tuple[int, Tensor]]:
        """S^(1/2) of every sample, [samples, outputs, outputs], for the positive and the negative part of S, with its sign."""
        leaf, count = run.leaf, self._samples(run)
        assert leaf is not None
        gradient = torch.autograd.grad(run.loss, leaf, create_graph=True)[0].reshape(count, -1)
        if not gradient.requires_grad:
            return []
        rows = [
            torch.autograd.grad(column.sum(), leaf, retain_graph=True, materialize_grads=True)[0].reshape(count, -1)
            for column in gradient.unbind(1)
        ]
        curvature = torch.stack(rows, 1).to(torch.promote_types(leaf.dtype, torch.float32))
        if not curvature.isfinite().all():
            return [(1, curvature)]  # eigh would refuse it; so it makes the trace not finite, which names a layer
        eigenvalues, vectors = torch.linalg.eigh(curvature)
        rounding = torch.finfo(eigenvalues.dtype).eps * eigenvalues.shape[1] * eigenvalues.abs().amax()
        return [
            (sign, (vectors * (sign * eigenvalues).clamp(min=0).sqrt().unsqueeze(1)).to(leaf.dtype))
            for sign in (1, -1)
            if (sign * eigenvalues > rounding).any()
        ]

    def _output_probe(
        self, run: "_Pass", roots: Sequence[tuple[int, Tensor]], names: Sequence[str], signs: "_Signs"
    ) -> Values:
        """|J^T S^(1/2) v|^2 of every sample, for each layer."""
        assert run.output is not None
        count = self._samples(run)
        values = {name: torch.zeros(count, dtype=torch.float64, device=run.output.device) for name in names}
        ran = [name for name in names if name in run.knobs]
        for sign, root in roots:
            direction = (root * signs.like(root[:, :1])).sum(2).view_as(run.output)
            gradients = torch.autograd.grad(
                run.output, [run.knobs[name] for name in ran], direction, retain_graph=True, materialize_grads=True
            )
            for name, gradient in zip(ran, gradients, strict=True):
                values[name] += sign * _squares(self.layers[name], run.inputs(name), gradient, count)
        return values

    def _gradients(self, run: "_Pass") -> Values:
        """The derivative, in each knob, of what weight probes trace: the loss, or its first order in the outputs."""
        traced = run.loss
        if run.leaf is not None and run.output is not None:
            traced = (torch.autograd.grad(run.loss, run.leaf, retain_graph=True)[0] * run.output).sum()
        gradients = torch.autograd.grad(traced, list(run.knobs.values()), create_graph=True, materialize_grads=True)
        return dict(zip(run.knobs, gradients, strict=True))

    def _weight_probe(self, run: "_Pass", gradients: Values, names: Sequence[str], signs: "_Signs") -> Values:
        """V^T H V of every sample, or of the batch, for each layer."""
        count = self._samples(run)
        moves = {name: self._move(run, name, count, signs) for name in names if name in run.knobs}
        products = _products(run, gradients, moves)
        values = {name: torch.zeros(1, dtype=torch.float64) for name in names}
        for name, move in moves.items():
            dots = (move * products[name]).flatten(1).sum(1, dtype=torch.float64)
            values[name] = dots.view(count, -1).sum(1) if name in self.shifted else dots.sum().view(1)
        return values

    def _move(self, run: "_Pass", name: str, count: int, signs: "_Signs") -> Tensor:
        """Where a step of random signs moves the knob: the signs themselves for a weight, V_n a_n for sample n's output.

        V_n is one V whose columns and rows are flipped at random for every sample: each is as random as V, no two are
        correlated, and few signs are drawn.
        """
        layer, knob = self.layers[name], run.knobs[name]
        if name not in self.shifted:
            return signs.like(knob)
        inputs = run.inputs(name).unflatten(0, (count, -1))
        step = signs.draw(layer.weight.shape, inputs)
        columns = signs.draw([count, 1, *step.shape[1:]], inputs)
        moved = _for_samples(lambda x, flips: _apply(layer, x, step * flips), step)(inputs, columns)
        channel = moved.dim() - 1 if isinstance(layer, nn.Linear) else 2
        rows = [count if i == 0 else len(step) if i == channel else 1 for i in range(moved.dim())]
        return (moved * signs.draw(rows, inputs)).flatten(0, 1)


def prober(
    model: nn.Module, loss_fn: LossFunction, batch: Any, layers: Mapping[str, Layer], seed: int, *, named: bool
) -> Prober:
    """Find out on a batch how the layers can be probed.

    Raises:
        UserError: the loss does not depend on a layer although it is `named`, or on none.
    """
    plain = frozenset(name for name, layer in layers.items() if type(layer).forward in _PLAIN)
    run = _forward(model, loss_fn, batch, plain, layers, cut=True)
    if run.leaf is None or not _reached([run.loss], {"output": [run.leaf]}):
        run = _forward(model, loss_fn, batch, plain, layers, cut=False)
    ends = [run.loss] if run.output is None else [run.loss, run.output]
    by_others = _reached(ends, {name: [layer.weight] for name, layer in layers.items()})
    by_own = _reached(ends, {name: [zeros for _, zeros in calls] for name, calls in run.calls.items()})
    used = {name: layer for name, layer in layers.items() if name in by_others | by_own}
    if named and len(used) < len(layers):
        raise UserError(f"the loss does not depend on layer {next(name for name in layers if name not in used)!r}")
    if not used:
        raise UserError("the loss depends on no layer's weight")
    owners = Counter(id(layer.weight) for layer in layers.values())
    shifted = frozenset(
        name
        for name in by_own - by_others
        if len(run.calls[name]) == owners[id(layers[name].weight)] == 1 and _batched(layers[name], run.inputs(name))
    )
    found = Prober(model, loss_fn, seed, used, shifted)
    run = replace(run, knobs={name: knob for name, knob in run.knobs.items() if name in used})
    return found.with_outputs(run) or found.with_samples(batch)


@dataclass(frozen=True)
class _Pass:
    """A forward of one batch.

    Attributes:
        output: the model's, if it is one tensor of floats.
        leaf: what the loss was given for it, without the model's graph.
        calls: for each shifted layer, its inputs and the zeros that were added to its outputs.
        knobs: what is moved to probe a layer: those zeros, or its weight.
    """

    loss: Tensor
    output: Tensor | None
    leaf: Tensor | None
    calls: dict[str, list[tuple[Tensor, Tensor]]]
    knobs: dict[str, Tensor]

    def inputs(self, name: str) -> Tensor:
        """A shifted layer's input."""
        return self.calls[name][0][0]


def _forward(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    shifted: frozenset[str],
    layers: Mapping[str, Layer],
    *,
    cut: bool,
) -> _Pass:
    """Run the loss; `cut`: on a leaf in place of the model's output."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in shifted}
    outputs: list[Any] = []
    leaves: list[Tensor] = []

    def hide(layer: Layer, args: Any) -> None:
        layer.weight.requires_grad_(False)

    def shift(name: str) -> Callable[..., Tensor]:
        def hook(layer: Layer, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            layer.weight.requires_grad_(True)
            zeros = torch.zeros_like(output, requires_grad=True)
            calls[name].append(((args[0] if args else kwargs["input"]).detach().to(output.dtype), zeros))
            return output + zeros

        return hook

    def cut_off(module: nn.Module, args: Any, output: Any) -> Any:
        outputs.append(output)
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() == 0:
            return output
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    with ExitStack() as stack:
        # The other kernels of attention have no second derivative.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for name in shifted:
            stack.callback(layers[name].register_forward_pre_hook(hide).remove)
            # Before the user's own hooks, which may keep the output for the loss.
            hook = layers[name].register_forward_hook(shift(name), with_kwargs=True, prepend=True)
            stack.callback(hook.remove)
        if cut:
            stack.callback(model.register_forward_hook(cut_off).remove)
        loss = loss_fn(model, batch)
    once = len(outputs) == len(leaves) == 1
    knobs = {
        name: calls[name][0][1] if name in shifted else layer.weight
        for name, layer in layers.items()
        if name not in shifted or calls[name]
    }
    return _Pass(loss, outputs[0] if once else None, leaves[0] if once else None, calls, knobs)


def _reached(ends: Sequence[Tensor], tensors: Mapping[str, Sequence[Tensor]]) -> set[str]:
    """The names of those, one of whose tensors one of the ends depends on."""
    flat = [(name, tensor) for name, several in tensors.items() for tensor in several]
    sums = [end.sum() for end in ends if end.requires_grad]
    if not sums or not flat:
        return set()
    gradients = torch.autograd.grad(sums, [tensor for _, tensor in flat], retain_graph=True, allow_unused=True)
    return {name for (name, _), gradient in zip(flat, gradients, strict=True) if gradient is not None}


def _summary(values: Tensor) -> tuple[float, float, float]:
    """Of probes x samples: the mean over probes, summed over samples; its variance; that estimate's own, halved."""
    probes = len(values)
    variances = values.var(0) / probes
    # Of n normal values, s^2 has the variance 2/(n - 1) times the square of theirs, and E[s^4] is (n + 1)/(n - 1) times it.
    return values.mean(0).sum().item(), variances.sum().item(), variances.square().sum().item() / (probes + 1)


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """Zero outside the samples of the mask."""
    return (x.reshape(len(mask), -1) * mask.to(x).unsqueeze(1)).view_as(x)


def _products(run: _Pass, gradients: Values, moves: Values) -> Values:
    """The derivative of `gradients` along the moves, in the same knobs."""
    curved = [name for name in moves if gradients[name].requires_grad]
    if not curved:
        return {name: torch.zeros_like(move) for name, move in moves.items()}
    products = torch.autograd.grad(
        [gradients[name] for name in curved],
        [run.knobs[name] for name in moves],
        [moves[name] for name in curved],
        retain_graph=True,
        materialize_grads=True,
    )
    return dict(zip(moves, products, strict=True))


def _separate(count: int, pushed: Callable[[Tensor], Iterable[Tensor]]) -> bool:
    """Whether moving one half of the samples leaves the derivatives in the other half as they are, for random halves."""
    for attempt in range(math.ceil(_HALVES / count) if count > 1 else 0):
        generator = torch.Generator().manual_seed(attempt)
        mask = torch.randperm(count, generator=generator) < count // 2
        for found in pushed(mask):
            if found.reshape(count, -1)[~mask.to(found.device)].any():
                return False
    return True


def _squares(layer: Layer, inputs: Tensor, gradients: Tensor, count: int) -> Tensor:
    """Of every sample, the squared norm of the derivative in the layer's weight, from that in the layer's outputs."""
    weight = layer.weight.detach().to(inputs.dtype)

    def square(x: Tensor, gradient: Tensor) -> Tensor:
        derivative = torch.func.vjp(lambda weight: _apply(layer, x, weight), weight)[1]
        return derivative(gradient)[0].square().sum()

    each = _for_samples(square, weight)
    return each(inputs.unflatten(0, (count, -1)), gradients.unflatten(0, (count, -1))).double()


def _for_samples(function: Callable[..., Tensor], weight: Tensor) -> Callable[..., Tensor]:
    """The function of one sample on many, as many at a time as may each hold a tensor of the weight's size."""
    return torch.func.vmap(function, chunk_size=max(1, _CHUNK // weight.numel()))


def _apply(layer: Layer, inputs: Tensor, weight: Tensor) -> Tensor:
    """The layer with another weight and no bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(inputs, weight)
    return layer._conv_forward(inputs, weight, None)


def _batched(layer: Layer, inputs: Tensor) -> bool:
    return inputs.dim() >= 2 if isinstance(layer, nn.Linear) else inputs.dim() == layer.weight.dim()


def _rows(tensors: Iterable[Tensor]) -> int:
    """What the first dimensions are multiples of: the samples of a batch."""
    return math.gcd(*(len(tensor) for tensor in tensors)) or 1


class _Signs:
    """A stream of random signs, the same on every device."""

    def __init__(self, *key: int) -> None:
        state = np.random.SeedSequence(key).generate_state(1)
        self._generator = torch.Generator().manual_seed(int(state[0]))

    def draw(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Signs of a shape, of the dtype and on the device of `like`."""
        bits = torch.randint(0, 2, tuple(shape), generator=self._generator, dtype=torch.int8)
        return bits.mul_(2).sub_(1).to(device=like.device, dtype=like.dtype)

    def like(self, x: Tensor) -> Tensor:
        """Signs of the shape of `x`."""
        return self.draw(x.shape, x)
