"""The loop that float, joint and SuperNet training share."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bitswitch.errors import UserError
from bitswitch.training.checkpoints import load_checkpoint, save_checkpoint
from bitswitch.training.distributed import World, average, broadcast_buffers, gather
from bitswitch.training.objectives import Objective

# How many steps may pass before a loss that is not finite is noticed: each look waits for the device.
_LOOK_EVERY = 50


class Batches(Protocol):
    """Training data: a stream for every epoch that depends on nothing but the seed and the epoch."""

    def __len__(self) -> int:
        """Batches in an epoch."""

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of an epoch, on the device."""


def cosine(step: int, steps: int) -> float:
    """The cosine schedule's factor, from 1 at step 0 towards 0 at `steps`.

    >>> cosine(0, 10), round(cosine(5, 10), 6)
    (1.0, 0.5)
    """
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def seed_all(seed: int) -> None:
    """Seed the random numbers that a network may draw from: torch's, NumPy's and Python's own."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@dataclass(kw_only=True)
class Loop:
    """Trains to the last epoch, from where its checkpoint stands.

    Attributes:
        objective: the network, its optimizers and their step.
        batches: training data.
        epochs: how many in all.
        checkpoint: where the state is kept, written after every epoch.
        extra: plain values stored in the checkpoint beside the state.
        on_step: called after every step.
        on_epoch: called after every epoch, before its checkpoint is written, with the epoch and each precision's mean loss.
        seed: of whatever the network draws, dropout for one; every epoch and rank has a stream of its own.
        world: this process among the others; rank 0 alone writes.
        epochs_done: how many are behind it.
    """

    objective: Objective
    batches: Batches
    epochs: int
    checkpoint: Path
    extra: dict[str, Any]
    on_step: Callable[[], None]
    on_epoch: Callable[[int, dict[str, float]], None]
    seed: int = 0
    world: World = field(default_factory=World)
    epochs_done: int = 0

    def resume(self) -> int:
        """Take up the checkpoint where there is one; how many epochs are done.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        if self.checkpoint.exists():
            state = load_checkpoint(self.checkpoint)
            try:
                done = state["epochs_done"]
                if not isinstance(done, int) or not 0 <= done <= self.epochs:
                    raise ValueError(f"{done!r} of {self.epochs} epochs done")
                self.objective.model.load_state_dict(state["model"])
                self.objective.load_state_dict(state["optimizers"])
            except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"{self.checkpoint} is not a checkpoint of this training ({reason}): do it again with --fresh"
                ) from error
            self.epochs_done = done
        return self.epochs_done

    def run(self) -> None:
        """Train the epochs that are left.

        Raises:
            UserError: a loss is not finite, there are other batches than announced, or the ranks' weights are not the same (the
                last checkpoint stays), or a checkpoint cannot be written.
        """
        while self.epochs_done < self.epochs:
            self.objective.model.train()
            # Seeded by the epoch, so that a resumed run, with any number of ranks, needs no stored state. The 1 keeps the
            # stream apart from those of the data, which have the seed and the epoch, too.
            entropy = (self.seed, self.epochs_done, self.world.rank, 1)
            seed_all(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
            losses = self._epoch(self.epochs_done)
            self._check_ranks()
            # Where batch statistics are not shared, every rank has its own running ones: rank 0's are those that are kept.
            broadcast_buffers(self.objective.model, self.world)
            self.on_epoch(self.epochs_done, dict(zip(self.objective.names, losses, strict=True)))
            self.epochs_done += 1
            self._save()
        if not self.checkpoint.exists():
            # No epochs were asked for: what the network started with is the result.
            self._save()

    def _epoch(self, epoch: int) -> list[float]:
        steps = len(self.batches)
        given = 0
        seen: list[Tensor] = []
        total = torch.zeros(len(self.objective.names), dtype=torch.float64)
        for step, (x, y) in enumerate(self.batches.epoch(epoch)):
            given = step + 1
            if given > steps:
                break
            number = epoch * steps + step
            seen.append(self.objective.step(x, y, cosine(number, self.epochs * steps), number))
            self.on_step()
            if len(seen) == _LOOK_EVERY or step == steps - 1:
                window = average(torch.stack(seen).double(), self.world).cpu()
                self._check(window, epoch, step + 1 - len(seen))
                total += window.sum(0)
                seen = []
        if given != steps or not steps:
            raise UserError(
                f"epoch {epoch} has {'more' if given > steps else given} batches, and {steps} were announced: the length and "
                "the stream of batches must be alike, and hold one at least"
            )
        return (total / steps).tolist()

    def _check(self, window: Tensor, epoch: int, first_step: int) -> None:
        bad = (~window.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            name = self.objective.names[column]
            where = f"{name} bits" if name.isdecimal() else name
            kept = (
                f"the last good checkpoint is {self.checkpoint}"
                if self.checkpoint.exists()
                else "no epoch was done yet"
            )
            raise UserError(
                f"the loss at {where} is {window[row, column].item()} at step {first_step + row} of epoch {epoch}; "
                f"{kept}; lower the learning rate and start with --fresh"
            )

    def _check_ranks(self) -> None:
        if self.world.size == 1:
            return
        with torch.no_grad():
            parameters = (p.abs() if p.is_complex() else p for p in self.objective.model.parameters())
            sums = torch.stack([parameter.sum(dtype=torch.float64) for parameter in parameters])
        # As bytes, in which NaN equals itself: of a training that diverged its loss tells.
        if len(set(gather([sums.cpu().numpy().tobytes()], self.world))) > 1:
            raise UserError(
                f"in epoch {self.epochs_done} the ranks' weights became different ones: train a network that leaves out "
                "layers at random, in another way on each rank, with one rank"
            )

    def _save(self) -> None:
        if not self.world.first:
            return
        state = {
            "epochs_done": self.epochs_done,
            "model": self.objective.model.state_dict(),
            "optimizers": self.objective.state_dict(),
            **self.extra,
        }
        save_checkpoint(self.checkpoint, state)
