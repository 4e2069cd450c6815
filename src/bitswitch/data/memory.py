"""Data sets held in memory as uint8, augmented a whole batch at a time on the device."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from bitswitch.data.dataset import Batch, Batches, DataSet, Schedule, evaluation_steps
from bitswitch.data.images import ImageSet
from bitswitch.data.preprocessing import Preprocessing


@dataclass(frozen=True, kw_only=True)
class MemoryDataSet(DataSet):
    """Decoded splits, all images of one size.

    Attributes:
        train, val, test: the splits.
        shift: how many pixels an image is shifted at most, either way, when it is augmented.
        flip: whether augmentation mirrors left and right.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    shift: int
    flip: bool

    def split(self, name: str) -> ImageSet:
        """A split by name."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def size(self, split: str) -> int:
        """How many images a split has."""
        return len(self.split(split))

    def fingerprint(self) -> str:
        """A digest of every pixel and label of every split."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        hasher = hashlib.sha256()
        for part in (self.train, self.val, self.test):
            hasher.update(part.images.flatten().numpy().data)
            hasher.update(part.labels.numpy().data)
        return hasher.hexdigest()

    def with_preprocessing(self, preprocessing: Preprocessing) -> "MemoryDataSet":
        """The same images for a network that wants another mean, standard deviation, size or crop."""
        preprocessing.framed(self.test.images[:1])
        return replace(self, preprocessing=preprocessing)

    def evaluation_batches(
        self, split: str, *, batch_size: int, device: torch.device, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Every image of a split exactly once over all ranks, in order, not augmented."""
        part, normalize = self.split(split), self.preprocessing.normalizer(device)
        for step in evaluation_steps(len(part), batch_size, rank, world):
            images = on_device(part.images[step.start : step.stop], device)
            yield normalize(self.preprocessing.framed(images)), on_device(part.labels[step.start : step.stop], device)

    def _sample(self, images: int) -> Tensor:
        return self.preprocessing.framed(self.train.images[:images])

    def _batches(self, schedule: Schedule, device: torch.device) -> Batches:
        return MemoryBatches(self, schedule, device)


class MemoryBatches:
    """Training batches; the training images lie on the device."""

    def __init__(self, data: MemoryDataSet, schedule: Schedule, device: torch.device) -> None:
        self.data = data
        self.schedule = schedule
        self.device = device
        self._train = ImageSet(data.train.images.to(device), data.train.labels.to(device))
        self._normalize = data.preprocessing.normalizer(device)

    def __len__(self) -> int:
        return len(self.schedule)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """(float32 [n, C, H, W] normalized, int64 [n]) on the device."""
        order, generator = self.schedule.order(epoch)
        on = on_device(order, self.device)
        for step in range(len(self)):
            # Drawn for the global batch: the same for any number of ranks.
            views = draw_views(self.schedule.batch_size, self.data.shift, self.data.flip, generator)
            part = self._train[self.schedule.own(on, step)]
            own_views = on_device(views[:, self.schedule.share], self.device)
            images = self.data.preprocessing.framed(augmented(part.images, own_views, self.data.shift))
            yield self._normalize(images), part.labels


def draw_views(count: int, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """How each of `count` images is seen: int64 [3, count], first row and column in the padded image, mirrored or not."""
    corners = torch.randint(0, 2 * shift + 1, (2, count), generator=generator)
    mirrored = torch.randint(0, 2, (1, count), generator=generator) * flip
    return torch.cat([corners, mirrored])


def augmented(images: Tensor, views: Tensor, shift: int) -> Tensor:
    """Each image shifted by up to `shift` pixels, black where it came from outside, and mirrored or not.

    Args:
        images: uint8 [N, C, H, W].
        views: int64 [3, N] from `draw_views`, on the same device.
        shift: as for `draw_views`.
    """
    count, _, height, width = images.shape
    top, left, mirrored = views.unsqueeze(-1)
    columns = torch.arange(width, device=images.device).expand(count, -1)
    columns = torch.where(mirrored.bool(), columns.flip(1), columns) + left
    rows = torch.arange(height, device=images.device) + top
    padded = F.pad(images, (shift,) * 4)
    each = torch.arange(count, device=images.device)
    # Indices on both sides of the channel slice put the channels last.
    return padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`; to CUDA from pinned memory, without waiting."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
