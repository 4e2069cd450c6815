"""Image sets in memory, and how `val` is taken from `train`."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from bitswitch import files


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
        """The SHA-256 of every image's bytes."""
        return [hashlib.sha256(image.numpy().tobytes()).digest() for image in self.images]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set with its splits, and what turns its images into a network's input.

    Attributes:
        name: a data name, or the path of a folder.
        train, val, test: the splits; `val` may be empty.
        classes: names, in the order of the labels.
        mean, std: of the channels of images in [0, 1].
        shift: how many pixels an image is shifted at most, either way, when it is augmented.
        flip: whether augmentation mirrors left and right.
    """

    name: str
    train: ImageSet
    val: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shift: int
    flip: bool

    def split(self, name: str) -> ImageSet:
        """A split by name."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def fingerprint(self) -> str:
        """A digest of every image and label of every split: the same data, the same fingerprint."""
        parts = []
        for part in (self.train, self.val, self.test):
            parts += [part.images.numpy().tobytes(), part.labels.numpy().tobytes()]
        return files.digest(b"".join(parts))

    def normalized(self, images: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> float32, `(x / 255 - mean) / std` per channel."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)


def take_val(train: ImageSet, fraction: float) -> tuple[ImageSet, ImageSet]:
    """Split `train` into (train, val): `val` is the fraction of images whose content hashes come first.

    The choice depends on the images alone, not on their order, their names or a seed.
    """
    hashes = train.hashes()
    order = sorted(range(len(train)), key=lambda i: (hashes[i], i))
    taken = round(fraction * len(train))
    return train[torch.tensor(sorted(order[taken:]), dtype=torch.long)], train[
        torch.tensor(sorted(order[:taken]), dtype=torch.long)
    ]
