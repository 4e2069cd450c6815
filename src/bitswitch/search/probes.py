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

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bitswitch.errors import UserError
from bitswitch.search.passes import TRACED, Layer, LossFunction, Pass, Values, forward, products, reached
from bitswitch.search.samples import apply, batched, each, masked, rows, separate, squares, weight_gradient

Kind = Literal["output", "weight"]

_PLAIN = tuple(kind.forward for kind in TRACED)
# S is decomposed for every sample: with more outputs than this that costs more than all else.
_MOST_OUTPUTS = 1024
# How far two ways to one gradient may be apart, as a share of it.
_ROUNDING = 1e-2


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
                signs = Signs(self.seed, index, number, job.kind == "output")
                if job.kind == "output":
                    probes.append(self._output_probe(run, roots, job.layers, signs))
                else:
                    probes.append(self._weight_probe(run, gradients, job.layers, signs))
            found.append({name: summary(torch.stack([probe[name] for probe in probes])) for name in job.layers})
        return found

    def with_samples(self, batch: Any) -> "Prober":
        """This prober with a probe for each sample, if no sample's gradient depends on another."""
        if not self.shifted:
            return self
        run = self._run(batch)
        count = rows(run.knobs[name] for name in self.shifted)
        gradients = self._gradients(run)
        moves = {name: self._move(run, name, 1, Signs(self.seed)) for name in self.shifted}

        def pushed(mask: Tensor) -> Iterable[Tensor]:
            return products(run, gradients, {name: masked(move, mask) for name, move in moves.items()}).values()

        return replace(self, samples=count if separate(count, pushed) else 1)

    def with_outputs(self, run: "Pass") -> "Prober | None":
        """This prober with output probes, if it has run on a batch in which the model's output alone decides the loss."""
        if run.output is None or run.leaf is None or self.shifted != set(self.layers):
            return None
        if reached([run.loss], {name: [knob] for name, knob in run.knobs.items()}):
            return None
        knobs = list(run.knobs.values())
        output, leaf, signs = run.output, run.leaf, Signs(self.seed).like(run.output)
        gradient = torch.autograd.grad(run.loss, leaf, create_graph=True)[0]

        def pushed(mask: Tensor) -> Iterable[Tensor]:
            direction = masked(signs, mask)
            yield from torch.autograd.grad(output, knobs, direction, retain_graph=True, materialize_grads=True)
            if gradient.requires_grad:
                yield from torch.autograd.grad(gradient, leaf, direction, retain_graph=True, materialize_grads=True)

        count = rows([output, *knobs])
        count = count if separate(count, pushed) else 1
        if output.numel() // count > _MOST_OUTPUTS:
            return None
        found = replace(self, samples=count, kinds=("output", "weight"))
        bends = found._weight_probe(run, found._gradients(run), tuple(self.layers), Signs(self.seed))
        return found if any(value.any() for value in bends.values()) else replace(found, kinds=("output",))

    def _run(self, batch: Any) -> "Pass":
        run = forward(self.model, self.loss_fn, batch, self.shifted, self.layers, cut="output" in self.kinds)
        for name in self.shifted:
            if len(run.calls[name]) > 1:
                raise UserError(
                    f"layer {name!r} ran once on the first batch and more often on a later one: trace it alone"
                )
        return run

    def _samples(self, run: "Pass") -> int:
        if self.samples == 1:
            return 1
        knobs = [run.knobs[name] for name in self.shifted if name in run.knobs]
        # Layers may see several rows of one sample; then the outputs alone tell how many samples there are.
        return rows(knobs if "output" not in self.kinds or run.output is None else [run.output, *knobs])

    def _roots(self, run: "Pass") -> list[tuple[int, Tensor]]:
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
        self, run: "Pass", roots: Sequence[tuple[int, Tensor]], names: Sequence[str], signs: "Signs"
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
                values[name] += sign * squares(self.layers[name], run.inputs(name), gradient, count)
        return values

    def _gradients(self, run: "Pass") -> Values:
        """The derivative, in each knob, of what weight probes trace: the loss, or its first order in the outputs."""
        traced = run.loss
        if run.leaf is not None and run.output is not None:
            traced = (torch.autograd.grad(run.loss, run.leaf, retain_graph=True)[0] * run.output).sum()
        gradients = torch.autograd.grad(traced, list(run.knobs.values()), create_graph=True, materialize_grads=True)
        return dict(zip(run.knobs, gradients, strict=True))

    def _weight_probe(self, run: "Pass", gradients: Values, names: Sequence[str], signs: "Signs") -> Values:
        """V^T H V of every sample, or of the batch, for each layer."""
        count = self._samples(run)
        moves = {name: self._move(run, name, count, signs) for name in names if name in run.knobs}
        moved = products(run, gradients, moves)
        values = {name: torch.zeros(1, dtype=torch.float64, device="cpu") for name in names}
        for name, move in moves.items():
            dots = (move * moved[name]).flatten(1).sum(1, dtype=torch.float64)
            values[name] = dots.view(count, -1).sum(1) if name in self.shifted else dots.sum().view(1)
        return values

    def _move(self, run: "Pass", name: str, count: int, signs: "Signs") -> Tensor:
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
        moved = each(lambda x, flips: apply(layer, x, step * flips), inputs, columns)
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
    gradients = _plain_gradients(model, loss_fn, batch, layers)
    owners = Counter(id(layer.weight) for layer in layers.values())
    run, used, shifted = None, {name for name, gradient in gradients.items() if gradient is not None}, frozenset[str]()
    for cut in (True, False):
        run = _watched(model, loss_fn, batch, plain, layers, cut=cut)
        if run is None or (cut and (run.leaf is None or not reached([run.loss], {"output": [run.leaf]}))):
            continue
        ends = [run.loss] if run.output is None else [run.loss, run.output]
        by_others = reached(ends, {name: [layer.weight] for name, layer in layers.items()})
        by_own = reached(ends, {name: [zeros for _, zeros in calls] for name, calls in run.calls.items()})
        used |= by_others | by_own
        single = {
            name
            for name in by_own - by_others
            if len(run.calls[name]) == owners[id(layers[name].weight)] == 1 and batched(layers[name], run.inputs(name))
        }
        shifted = frozenset(name for name in single if _is_moved_right(run, name, layers[name], gradients[name]))
        if shifted == single:
            break
    of_loss = {name: layer for name, layer in layers.items() if name in used}
    if named and len(of_loss) < len(layers):
        raise UserError(f"the loss does not depend on layer {next(name for name in layers if name not in of_loss)!r}")
    if not of_loss:
        raise UserError("the loss depends on no layer's weight")
    found = Prober(model, loss_fn, seed, of_loss, shifted)
    if run is None:
        return found
    run = replace(run, knobs={name: knob for name, knob in run.knobs.items() if name in of_loss})
    return found.with_outputs(run) or found.with_samples(batch)


def _plain_gradients(
    model: nn.Module, loss_fn: LossFunction, batch: Any, layers: Mapping[str, Layer]
) -> dict[str, Tensor | None]:
    """The derivative of the loss in every weight, of a forward that nothing watches; None where there is none."""
    loss = forward(model, loss_fn, batch, frozenset(), layers, cut=False).loss
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise UserError(f"the loss is {given}: loss_fn(model, batch) must give one number, a scalar tensor")
    if not loss.requires_grad:
        return dict.fromkeys(layers)
    found = torch.autograd.grad(loss.sum(), [layer.weight for layer in layers.values()], allow_unused=True)
    return dict(zip(layers, found, strict=True))


def _watched(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    plain: frozenset[str],
    layers: Mapping[str, Layer],
    *,
    cut: bool,
) -> Pass | None:
    """A forward that is watched; None where it fails, as where the loss looks behind the outputs for what was cut off."""
    try:
        return forward(model, loss_fn, batch, plain, layers, cut=cut)
    except RuntimeError:
        # Not the network's own: it has just run.
        return None


def _is_moved_right(run: Pass, name: str, layer: Layer, expected: Tensor | None) -> bool:
    """Whether moving a layer's output is all that its weight does: not where a derivative in the inputs is part of the loss."""
    zeros, ends, weights = run.calls[name][0][1], [run.loss], [torch.ones_like(run.loss)]
    if run.leaf is not None and run.output is not None:
        ends.append(run.output)
        weights.append(torch.autograd.grad(run.loss, run.leaf, retain_graph=True, materialize_grads=True)[0])
    reaching = [(end, weight) for end, weight in zip(ends, weights, strict=True) if end.requires_grad]
    (gradient,) = torch.autograd.grad(
        [end for end, _ in reaching],
        zeros,
        [weight for _, weight in reaching],
        retain_graph=True,
        materialize_grads=True,
    )
    found = weight_gradient(layer, run.inputs(name), gradient)
    wanted = torch.zeros_like(found) if expected is None else expected
    return bool((found - wanted).norm() <= _ROUNDING * wanted.norm())


def summary(values: Tensor) -> tuple[float, float, float]:
    """Of probes x samples: the mean over probes, summed over samples; its variance; that estimate's own, halved."""
    probes = len(values)
    variances = values.var(0) / probes
    # Of n normal values, s^2 has the variance 2/(n - 1) times the square of theirs, and E[s^4] is (n + 1)/(n - 1) times it.
    return values.mean(0).sum().item(), variances.sum().item(), variances.square().sum().item() / (probes + 1)


class Signs:
    """A stream of random signs, the same on every device."""

    def __init__(self, *key: int) -> None:
        state = np.random.SeedSequence(key).generate_state(1)
        self._generator = torch.Generator().manual_seed(int(state[0]))

    def draw(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Signs of a shape, of the dtype and on the device of `like`."""
        bits = torch.randint(0, 2, tuple(shape), generator=self._generator, dtype=torch.int8, device="cpu")
        return bits.mul_(2).sub_(1).to(device=like.device, dtype=like.dtype)

    def like(self, x: Tensor) -> Tensor:
        """Signs of the shape of `x`."""
        return self.draw(x.shape, x)
