"""What a data set offers, whether its images lie in memory or in files, and which images are in which batch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from bitswitch.data.preprocessing import Preprocessing
from bitswitch.errors import UserError

Batch = tuple[Tensor, Tensor]
Self = TypeVar("Self", bound="DataSet")


class Batches(Protocol):
    """Training batches of one rank: a stream for every epoch that depends on the seed and the epoch alone."""

    def __len__(self) -> int:
        """Steps in an epoch: whole global batches."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """(float32 [n, C, H, W] normalized, int64 [n]) on the device."""


@dataclass(frozen=True, kw_only=True)
class DataSet(ABC):
    """Images of three splits, "train", "val" and "test"; train and val may be empty.

    Attributes:
        name: a data name, or the path of a folder.
        classes: names, in the order of the labels.
        preprocessing: what turns an image into a network's input.
    """

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of every image and label of every split: the same data, the same fingerprint."""

    @abstractmethod
    def size(self, split: str) -> int:
        """How many images a split has."""

    @abstractmethod
    def with_preprocessing(self: Self, preprocessing: Preprocessing) -> Self:
        """The same images for a network that wants another mean, standard deviation, size or crop.

        Raises:
            UserError: these images cannot be brought to that shape.
        """

    @abstractmethod
    def evaluation_batches(
        self, split: str, *, batch_size: int, device: torch.device, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Every image of a split exactly once over all ranks, in order, not augmented.

        Batches are the same whatever `world` is and go to the ranks in turn, whole: logits agree to the last bit. A rank
        gets none where there are fewer batches than ranks.

        Yields:
            (float32 [n, C, H, W] normalized, int64 [n]) on the device; the last batch may be smaller.
        """

    @abstractmethod
    def _sample(self, images: int) -> Tensor:
        """The first training images: uint8 [n, C, H, W]."""

    @abstractmethod
    def _batches(self, schedule: "Schedule", device: torch.device) -> Batches:
        """Training batches as scheduled."""

    def sample(self, images: int) -> Tensor:
        """The first `images` training images (all where there are fewer), not augmented: float32 [n, C, H, W], on the CPU.

        Raises:
            UserError: there are no training images.
        """
        self._need_training_images()
        return self.preprocessing.normalizer(torch.device("cpu"))(self._sample(min(images, self.size("train"))))

    def training_batches(
        self, *, batch_size: int, seed: int, device: torch.device, rank: int = 0, world: int = 1
    ) -> Batches:
        """Shuffled, augmented batches of one rank.

        Args:
            batch_size: of the global batch, over all ranks; a smaller training set is one batch.
            seed: of order and augmentation.
            device: where batches are wanted.
            rank: which contiguous share of every global batch this is.
            world: how many ranks there are. Whatever it is, the global batches are the same, but for a training set that is
                smaller than a batch and cannot be shared evenly: as many images are left out as the ranks cannot share.

        Raises:
            UserError: there are no training images, or the ranks cannot share the batch evenly.
        """
        whole = self.training_batch(batch_size, world)
        schedule = Schedule(images=self.size("train"), batch_size=whole, seed=seed, rank=rank, world=world)
        return self._batches(schedule, device)

    def training_batch(self, batch_size: int, world: int = 1) -> int:
        """How many images a global batch of `training_batches` has: as many as asked for, where the training set has them.

        Raises:
            UserError: as `training_batches`.
        """
        self._need_training_images()
        if batch_size < 1 or world < 1:
            raise UserError(f"batch_size={batch_size}, world={world}: give whole numbers above 0")
        if batch_size % world:
            raise UserError(
                f"batch_size={batch_size} cannot be shared evenly by {world} ranks: use a multiple of {world}"
            )
        # A set smaller than a batch: one batch of as many as the ranks can share.
        most = self.size("train") // world * world
        if not most:
            raise UserError(
                f"{self.name} has {self.size('train')} training images, fewer than there are ranks ({world})"
            )
        return min(batch_size, most)

    def _need_training_images(self) -> None:
        if not self.size("train"):
            if self.size("val"):
                raise UserError(f"{self.name} has no training images left beside those of val: lower data.val_fraction")
            raise UserError(f"{self.name} has no training images, only test: name data with a train/ folder")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which images make up the steps of an epoch, and which of them are one rank's.

    Attributes:
        images: in the training set.
        batch_size: of the global batch; a multiple of `world`, at most `images`.
        seed: of order and augmentation.
        rank, world: this rank, and how many there are.
    """

    images: int
    batch_size: int
    seed: int
    rank: int
    world: int

    def __len__(self) -> int:
        return self.images // self.batch_size

    def order(self, epoch: int) -> tuple[Tensor, torch.Generator]:
        """The images of an epoch in their order, int64 [images], and the generator that goes on from there."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
        return torch.randperm(self.images, generator=generator), generator

    @property
    def share(self) -> slice:
        """This rank's part of a global batch."""
        each = self.batch_size // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def own(self, order: Tensor, step: int) -> Tensor:
        """This rank's images of a step, int64 [batch_size / world]."""
        return order[step * self.batch_size : (step + 1) * self.batch_size][self.share]


def mixed_seed(*numbers: int) -> int:
    """One seed from several numbers: torch's CPU generator keeps 32 bits of a seed, so all are mixed into them."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def evaluation_steps(images: int, batch_size: int, rank: int, world: int) -> list[range]:
    """The images of each of one rank's evaluation batches."""
    return [range(first, min(first + batch_size, images)) for first in range(0, images, batch_size)][rank::world]
