"""Decoded images, and how `val` is taken from `train`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Decoded images and their labels.

    Attributes:
        images: uint8 [N, C, H, W], 0 to 255.
        labels: int64 [N].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "ImageSet":
        return ImageSet(self.images[index], self.labels[index])

    def hashes(self) -> list[bytes]:
        """The SHA-256 of every image's pixels."""
        return [hashlib.sha256(image.numpy().tobytes()).digest() for image in self.images]


def choose_val(hashes: Sequence[bytes], fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of (train, val), ascending: `val` is the fraction of images whose content hashes come first.

    The choice depends on the content alone, not on order, names or a seed. Images of equal content stay together, in `train`
    where the fraction ends among them.
    """
    order = sorted(range(len(hashes)), key=lambda i: (hashes[i], i))
    taken = round(fraction * len(hashes))
    while 0 < taken < len(order) and hashes[order[taken - 1]] == hashes[order[taken]]:
        taken -= 1
    rest, val = sorted(order[taken:]), sorted(order[:taken])
    return torch.tensor(rest, dtype=torch.long), torch.tensor(val, dtype=torch.long)


def take_val(train: ImageSet, fraction: float) -> tuple[ImageSet, ImageSet]:
    """Split decoded images into (train, val) by the hashes of their pixels."""
    rest, val = choose_val(train.hashes(), fraction)
    return train[rest], train[val]
