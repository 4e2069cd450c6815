"""What one training step does to one batch."""

from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitswitch.assignment import Assignment
from bitswitch.errors import check_word
from bitswitch.nn import switched
from bitswitch.training.distillation import Distillation
from bitswitch.training.engine import Engine
from bitswitch.training.optimizer import MultiPrecisionOptimizer
from bitswitch.training.sampler import AssignmentSampler, WidthSampler

Order = Literal["each", "accumulate"]


class Objective(Protocol):
    """A network, its optimizers, and the step that moves them."""

    model: nn.Module
    names: tuple[str, ...]

    def step(self, x: Tensor, y: Tensor, factor: float, number: int = 0) -> Tensor:
        """Train on one batch, the `number`-th; the losses, one for each of `names`, detached. Nothing waits for the device."""

    def state_dict(self) -> dict[str, Any]:
        """The optimizers' state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""


class FloatObjective:
    """Plain float training: SGD with Nesterov momentum and cross-entropy.

    Args:
        model: a float network.
        lr: learning rate at the top of the schedule.
        momentum: of SGD.
        weight_decay: of SGD.
        engine: how to compute.
    """

    names: tuple[str, ...] = ("float",)

    def __init__(
        self, model: nn.Module, *, lr: float, momentum: float, weight_decay: float, engine: Engine | None = None
    ) -> None:
        self.engine = engine or Engine()
        self.model = self.engine.place(model)
        self.forward = self.engine.forward_of(model)
        self.lr = lr
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0
        )

    def step(self, x: Tensor, y: Tensor, factor: float, number: int = 0) -> Tensor:
        """One SGD step; the loss, [1]."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        total = x.new_zeros(())
        for images, labels in self.engine.parts(x, y):
            loss = F.cross_entropy(self.forward(images), labels) / self.engine.micro_batches
            loss.backward()
            total = total + loss.detach()
        self.engine.finish_gradients(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total.view(1)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.optimizer.load_state_dict(state)


class JointObjective:
    """Joint multi-precision training (arXiv 2502.01199, algorithm 1): every width sees every batch, unless a sampler draws.

    With an AssignmentSampler, SuperNet training: the forwards of a step are at the assignments that it draws; with a
    WidthSampler, a step visits the widths that it draws.

    Args:
        model: made by `bitswitch.quantize`.
        optimizer: for the same model.
        order: "each" steps after every width's backward (the paper); "accumulate" sums the gradients of all widths and
            steps once (the conventional way).
        distillation: who teaches.
        teacher: the float network, in eval mode, where distillation says "float".
        engine: how to compute.
        on_gradients: called with the width before every step of it, while the gradients are there.
        sampler: draws assignments around the widths, or widths.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MultiPrecisionOptimizer,
        order: Order = "each",
        *,
        distillation: Distillation | None = None,
        teacher: nn.Module | None = None,
        engine: Engine | None = None,
        on_gradients: Callable[[int], None] | None = None,
        sampler: AssignmentSampler | WidthSampler | None = None,
    ) -> None:
        check_word("order", order, get_args(Order))
        self.engine = engine or Engine()
        self.model = self.engine.place(model)
        self.forward = self.engine.forward_of(model)
        self.optimizer = optimizer
        self.order = order
        self.distillation = distillation or Distillation()
        if (teacher is None) == (self.distillation.teacher == "float"):
            raise ValueError("a float teacher is given exactly where distillation asks for one")
        self.teach = None if teacher is None else self.engine.forward_of(self.engine.place(teacher.eval()))
        self.on_gradients = on_gradients
        self.sampler = sampler
        self.names = tuple(str(width) for width in optimizer.widths) if sampler is None else sampler.names

    def step(self, x: Tensor, y: Tensor, factor: float, number: int = 0) -> Tensor:
        """One joint step; the losses, [widths], or [forwards that the sampler draws]."""
        self.optimizer.factor = factor
        parts = list(self.engine.parts(x, y))
        visits: list[tuple[int | None, int | Assignment]]
        visits = [(w, w) for w in self.optimizer.widths] if self.sampler is None else [*self.sampler.draw(number)]
        taught = self._float_logits(parts)
        losses = []
        for i, (width, precision) in enumerate(visits):
            uniform = precision if isinstance(precision, int) else precision.uniform
            first_teaches = i == 0 and self.distillation.teacher == "highest"
            if first_teaches and uniform != self.optimizer.widths[0]:
                taught = self._highest_logits(parts)
            loss, logits = self._backward(precision, parts, taught)
            losses.append(loss)
            if first_teaches and uniform == self.optimizer.widths[0]:
                taught = logits
            if self.order == "each":
                self._step(width, (width,), mixed=uniform != width)
        if self.order == "accumulate":
            self._step(None, tuple(width for width, _ in visits))
        return torch.stack(losses)

    @torch.no_grad()
    def _highest_logits(self, parts: list[tuple[Tensor, Tensor]]) -> list[Tensor | None]:
        """What the highest width says where no forward of the step stands at it in every layer: a forward more."""
        with switched(self.model, self.optimizer.widths[0]):
            return [self.forward(images) for images, _ in parts]

    def _float_logits(self, parts: list[tuple[Tensor, Tensor]]) -> list[Tensor | None]:
        if self.teach is None:
            return [None] * len(parts)
        with torch.no_grad():
            return [self.teach(images) for images, _ in parts]

    def _backward(
        self, precision: int | Assignment, parts: list[tuple[Tensor, Tensor]], taught: list[Tensor | None]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients at one precision on all micro-batches: the mean loss and the logits, detached."""
        total = parts[0][0].new_zeros(())
        all_logits: list[Tensor | None] = []
        with switched(self.model, precision):
            for (images, labels), teacher in zip(parts, taught, strict=True):
                logits = self.forward(images)
                loss = self.distillation.loss(logits, labels, teacher) / len(parts)
                loss.backward()
                total = total + loss.detach()
                all_logits.append(logits.detach())
        return total, all_logits

    def _step(self, width: int | None, visited: tuple[int | None, ...], *, mixed: bool = False) -> None:
        self.engine.finish_gradients(self.model)
        if self.on_gradients is not None:
            for one in visited:
                if one is not None:
                    self.on_gradients(one)
        self.optimizer.step(width, mixed=mixed)

    def state_dict(self) -> dict[str, Any]:
        """The optimizers' state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.optimizer.load_state_dict(state)
