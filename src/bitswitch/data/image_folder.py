"""A folder of images as a data set: decoded into memory where it is small, else read file by file."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitswitch.data.contents import Contents, Failures
from bitswitch.data.dataset import DataSet
from bitswitch.data.images import ImageSet, choose_val, take_val
from bitswitch.data.loader import FileDataSet, FileSet
from bitswitch.data.memory import MemoryDataSet
from bitswitch.data.preprocessing import Preprocessing
from bitswitch.errors import UserError

Unreadable = Literal["refuse", "skip"]
Channels = tuple[float, ...]

IMAGENET = Preprocessing(
    shape=(3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize=256, crop=224
)


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """A folder that is to become a data set.

    Attributes:
        name: of the data set.
        contents: of the folder.
        val_fraction: share of the training images that become `val`.
        unreadable: what to do with images that cannot be decoded.
    """

    name: str
    contents: Contents
    val_fraction: float
    unreadable: Unreadable

    def opened(self) -> DataSet:
        """In memory where that is possible, else file by file.

        Raises:
            UserError: an image cannot be read.
        """
        return self.in_memory() or self.as_files()

    def in_memory(self, mean_std: tuple[Channels, Channels] | None = None) -> MemoryDataSet | None:
        """All images decoded; None where they differ in size or are too many.

        Training shifts them by up to an eighth of the shorter side (four pixels of CIFAR's thirty-two) and mirrors them.

        Args:
            mean_std: of the channels; measured on the training images where None.

        Raises:
            UserError: an image cannot be read.
        """
        decoded = self.contents.decoded()
        if decoded is None:
            return None
        kept = self._kept(decoded.failures)
        row = {index: row for row, index in enumerate(kept)}
        labels = torch.tensor([self.contents.listing.labels[index] for index in kept])
        whole = ImageSet(decoded.images, labels)
        train, test = (whole[_indices([row[i] for i in part])] for part in self._in_order(kept))
        rest, val = take_val(train, self.val_fraction)
        mean, std = mean_std or measured(rest.images if len(rest) else test.images)
        height, width = decoded.images.shape[2:]
        return MemoryDataSet(
            name=self.name,
            classes=self.contents.listing.classes,
            preprocessing=Preprocessing(shape=(3, height, width), mean=mean, std=std),
            train=rest,
            val=val,
            test=test,
            shift=max(1, min(height, width) // 8),
            flip=True,
        )

    def as_files(self) -> FileDataSet:
        """Read file by file, resized and cropped as ImageNet is.

        Raises:
            UserError: an image cannot be read.
        """
        listing, hashes = self.contents.listing, self.contents.hashes
        train, test = self._in_order(self._kept(self.contents.failures()))
        rest, val = choose_val([hashes[i] for i in train], self.val_fraction)
        whole = FileSet(tuple(listing.paths), listing.labels, tuple(hashes))
        return FileDataSet(
            name=self.name,
            classes=listing.classes,
            preprocessing=IMAGENET,
            train=whole[[train[i] for i in rest.tolist()]],
            val=whole[[train[i] for i in val.tolist()]],
            test=whole[test],
            workers=self.contents.workers,
        )

    def _in_order(self, kept: Sequence[int]) -> tuple[list[int], list[int]]:
        """Indices of the training and of the test images.

        Training images come in the order of their content hashes: the first of them are of all classes, and neither where
        the folder lies nor what its files are called changes what is trained on.
        """
        hashes, boundary = self.contents.hashes, self.contents.listing.train
        train = sorted((i for i in kept if i < boundary), key=lambda i: (hashes[i], i))
        return train, [i for i in kept if i >= boundary]

    def _kept(self, failures: Failures) -> list[int]:
        """Indices of the images that can be read.

        Raises:
            UserError: some cannot, and are not to be skipped; or a class would lose all its images.
        """
        listing = self.contents.listing
        kept = [index for index in range(len(listing.names)) if index not in failures]
        if not failures:
            return kept
        first = failures[min(failures)]
        told = f"{first}{f', and {len(failures) - 1} more' if len(failures) > 1 else ''}"
        if self.unreadable == "refuse":
            raise UserError(f"{told}: mend or remove what is damaged; a run leaves it out with data.unreadable=skip")
        for part in (range(listing.train), range(listing.train, len(listing.names))):
            lost = {listing.labels[i] for i in part} - {listing.labels[i] for i in part if i not in failures}
            if lost:
                raise UserError(f"class {listing.classes[min(lost)]} has no image that can be read: {told}")
        warnings.warn(f"{len(failures)} of {len(listing.names)} images are left out: {told}", stacklevel=2)
        return kept


def measured(images: Tensor) -> tuple[Channels, Channels]:
    """Mean and standard deviation of every channel of uint8 [N, C, H, W], scaled to [0, 1]: six digits."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        # From counts of the 256 levels: exact, and without a float copy of the images.
        counts = torch.bincount(channel.flatten(), minlength=256).double()
        mean = (counts * levels).sum() / counts.sum()
        variance = (counts * (levels - mean).square()).sum() / (counts.sum() - 1).clamp(min=1)
        means.append(round(float(mean), 6))
        # A channel that is the same everywhere must not be divided by zero.
        stds.append(round(float(variance.sqrt()), 6) or 1.0)
    return tuple(means), tuple(stds)


def _indices(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)
