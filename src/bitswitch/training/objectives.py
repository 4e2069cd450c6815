"""What one training step does to one batch."""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitswitch.nn import switched
from bitswitch.training.optimizer import MultiPrecisionOptimizer

Order = Literal["each", "accumulate"]


class Objective(Protocol):
    """A network, its optimizers, and the step that moves them."""

    model: nn.Module
    names: tuple[str, ...]

    def step(self, x: Tensor, y: Tensor, factor: float) -> Tensor:
        """Train on one batch; the losses, one for each of `names`, detached. Nothing waits for the device."""

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
    """

    names: tuple[str, ...] = ("float",)

    def __init__(self, model: nn.Module, *, lr: float, momentum: float, weight_decay: float) -> None:
        self.model = model
        self.lr = lr
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0
        )

    def step(self, x: Tensor, y: Tensor, factor: float) -> Tensor:
        """One SGD step; the loss, [1]."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach().view(1)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.optimizer.load_state_dict(state)


class JointObjective:
    """Joint multi-precision training (arXiv 2502.01199, algorithm 1): every width sees every batch.

    Args:
        model: made by `bitswitch.quantize`.
        optimizer: for the same model.
        order: "each" steps after every width's backward (the paper); "accumulate" sums the gradients of all widths and
            steps once (the conventional way).
    """

    def __init__(self, model: nn.Module, optimizer: MultiPrecisionOptimizer, order: Order = "each") -> None:
        self.model = model
        self.optimizer = optimizer
        self.order = order
        self.names = tuple(str(width) for width in optimizer.widths)

    def step(self, x: Tensor, y: Tensor, factor: float) -> Tensor:
        """One joint step; the losses, [widths]."""
        self.optimizer.factor = factor
        losses = []
        for width in self.optimizer.widths:
            with switched(self.model, width):
                loss = F.cross_entropy(self.model(x), y)
                loss.backward()
            losses.append(loss.detach())
            if self.order == "each":
                self.optimizer.step(width)
        if self.order == "accumulate":
            self.optimizer.step()
        return torch.stack(losses)

    def state_dict(self) -> dict[str, Any]:
        """The optimizers' state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.optimizer.load_state_dict(state)
