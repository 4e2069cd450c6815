"""Batches from images in memory, augmented a whole batch at a time."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bitswitch.data.images import DataSet, ImageSet


class MemoryBatches:
    """Shuffled, augmented, normalized batches; epoch e of a seed is always the same stream.

    The last batch of an epoch is left out where it would be smaller than the others.

    Args:
        data: gives the images of `train`, the augmentation, mean and standard deviation.
        batch_size: images in a batch.
        seed: of order and augmentation.
        device: where batches are wanted.
    """

    def __init__(self, data: DataSet, *, batch_size: int, seed: int, device: torch.device) -> None:
        self.data = data
        self.batch_size = min(batch_size, len(data.train))
        self.seed = seed
        self.device = device
        self._train = ImageSet(data.train.images.to(device), data.train.labels.to(device))

    def __len__(self) -> int:
        return len(self.data.train) // self.batch_size

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(float32 [N, C, H, W], int64 [N]) on the device."""
        # torch's CPU generator keeps 32 bits of a seed: mix both numbers into them.
        mixed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
        generator = torch.Generator().manual_seed(mixed)
        order = torch.randperm(len(self.data.train), generator=generator)
        for step in range(len(self)):
            index = order[step * self.batch_size : (step + 1) * self.batch_size].to(self.device)
            images = _augmented(self._train.images[index], self.data.shift, self.data.flip, generator)
            yield self.data.normalized(images), self._train.labels[index]


def _augmented(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image shifted by -shift to shift pixels either way, black where it came from outside, and mirrored or not."""
    count, _, height, width = images.shape
    dy, dx = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
    mirrored = torch.randint(0, 2, (count, 1), generator=generator).bool() & flip
    columns = torch.arange(width).expand(count, -1)
    columns = torch.where(mirrored, columns.flip(1), columns) + dx
    rows = torch.arange(height) + dy
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = F.pad(images, (shift,) * 4)
    each = torch.arange(count, device=images.device)
    # Indices on both sides of the channel slice put the channels last.
    return padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def evaluation_batches(
    data: DataSet, split: str, *, device: torch.device, batch_size: int = 256
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image of a split once, in order, normalized, not augmented."""
    images = data.split(split)
    for step in range(math.ceil(len(images) / batch_size)):
        part = slice(step * batch_size, (step + 1) * batch_size)
        yield data.normalized(images.images[part].to(device)), images.labels[part].to(device)
