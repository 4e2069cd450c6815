"""Data sets that stay in files: decoded and augmented image by image in DataLoader workers."""

import hashlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from bitswitch.data.dataset import Batch, Batches, DataSet, Schedule, evaluation_steps, mixed_seed
from bitswitch.data.decode import read_image
from bitswitch.data.preprocessing import Preprocessing
from bitswitch.errors import UserError


@dataclass(frozen=True)
class FileSet:
    """Image files, their labels and the SHA-256 of their bytes."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    digests: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Sequence[int]) -> "FileSet":
        return FileSet(
            tuple(self.paths[i] for i in index),
            tuple(self.labels[i] for i in index),
            tuple(self.digests[i] for i in index),
        )


@dataclass(frozen=True, kw_only=True)
class FileDataSet(DataSet):
    """Splits as lists of files; training sees random resized crops, mirrored or not.

    Attributes:
        train, val, test: the splits.
        workers: processes that decode; 0 decodes in this one.
    """

    train: FileSet
    val: FileSet
    test: FileSet
    workers: int

    def split(self, name: str) -> FileSet:
        """A split by name."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def size(self, split: str) -> int:
        """How many images a split has."""
        return len(self.split(split))

    def fingerprint(self) -> str:
        """A digest of every file's bytes and label of every split."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        hasher = hashlib.sha256()
        for name in ("train", "val", "test"):
            part = self.split(name)
            hasher.update(f"{name} {len(part)}\n".encode())
            for digest, label in zip(part.digests, part.labels, strict=True):
                hasher.update(digest + label.to_bytes(8, "little"))
        return hasher.hexdigest()

    def with_preprocessing(self, preprocessing: Preprocessing) -> "FileDataSet":
        """The same images for a network that wants another mean, standard deviation, size or crop."""
        preprocessing.framed(read_image(self.test.paths[0]))
        return replace(self, preprocessing=preprocessing)

    def evaluation_batches(
        self, split: str, *, batch_size: int, device: torch.device, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Every image of a split exactly once over all ranks, in order, not augmented."""
        steps = evaluation_steps(self.size(split), batch_size, rank, world)
        normalize = self.preprocessing.normalizer(device)
        reader = _Reader(self.split(split), self.preprocessing)
        for images, labels in _through_workers(reader, [list(step) for step in steps], self.workers, device):
            yield normalize(images), labels

    def _sample(self, images: int) -> Tensor:
        batches = [list(step) for step in evaluation_steps(images, 64, 0, 1)]
        reader = _Reader(self.train, self.preprocessing)
        return torch.cat([x for x, _ in _through_workers(reader, batches, self.workers, torch.device("cpu"))])

    def _batches(self, schedule: Schedule, device: torch.device) -> Batches:
        return FileBatches(self, schedule, device)


class FileBatches:
    """Training batches; every image's augmentation is drawn from (seed, epoch, image) wherever it is decoded."""

    def __init__(self, data: FileDataSet, schedule: Schedule, device: torch.device) -> None:
        self.data = data
        self.schedule = schedule
        self.device = device
        self._normalize = data.preprocessing.normalizer(device)

    def __len__(self) -> int:
        return len(self.schedule)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """(float32 [n, C, H, W] normalized, int64 [n]) on the device."""
        order, _ = self.schedule.order(epoch)
        batches = [self.schedule.own(order, step).tolist() for step in range(len(self))]
        reader = _TrainingReader(self.data.train, self.data.preprocessing, seed=self.schedule.seed, epoch=epoch)
        for images, labels in _through_workers(reader, batches, self.data.workers, self.device):
            yield self._normalize(images), labels


class _Reader(Dataset):
    """Decodes whole batches: uint8 [n, C, H, W] and int64 [n], or the error that says which file cannot be read.

    An error is handed over, not raised: DataLoader would wrap a worker's exception in its traceback.
    """

    def __init__(self, part: FileSet, preprocessing: Preprocessing) -> None:
        self.part = part
        self.preprocessing = preprocessing

    def __getitems__(self, index: list[int]) -> Batch | UserError:
        try:
            images = torch.stack([self._view(i) for i in index])
        except UserError as error:
            return error
        return images, torch.tensor([self.part.labels[i] for i in index])

    def _view(self, i: int) -> Tensor:
        image = read_image(self.part.paths[i])
        try:
            return self.preprocessing.framed(image)
        except UserError as error:
            raise UserError(f"{self.part.paths[i]}: {error}") from error


class _TrainingReader(_Reader):
    """Random views, the same for a (seed, epoch, image) in every process."""

    def __init__(self, part: FileSet, preprocessing: Preprocessing, *, seed: int, epoch: int) -> None:
        super().__init__(part, preprocessing)
        self.seed = seed
        self.epoch = epoch
        height_width = preprocessing.shape[1:]
        self._transform = v2.Compose([v2.RandomResizedCrop(height_width, antialias=True), v2.RandomHorizontalFlip()])

    def _view(self, i: int) -> Tensor:
        image = read_image(self.part.paths[i])
        # The transforms draw from torch's global generator; without workers that is the training's own.
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(mixed_seed(self.seed, self.epoch, i))
        try:
            return self._transform(image)
        finally:
            generator.set_state(state)


def _through_workers(reader: _Reader, batches: list[list[int]], workers: int, device: torch.device) -> Iterator[Batch]:
    """Batches on the device, uint8 and int64; only these are decoded.

    Raises:
        UserError: a file cannot be read.
    """
    loader: Any = DataLoader(
        reader,
        batch_sampler=batches,
        num_workers=min(workers, len(batches)),
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        # DataLoader draws a seed for its workers: not from the global generator, which the training's numbers hang on.
        generator=torch.Generator(),
    )
    with _uninterrupted():
        # Workers start here.
        found = iter(loader)
    for batch in found:
        if isinstance(batch, UserError):
            raise batch
        images, labels = batch
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put Ctrl-C off: while a process forks, Python calls what drops a KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[tuple[Any, ...]] = []
    own = os.getpid()

    def ask(*call: Any) -> None:
        # The worker that was forked has this handler for good: there it is as it was.
        if os.getpid() == own:
            asked.append(call)
        elif callable(before):
            before(*call)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked and callable(before):
        before(*asked[0])


def _as_it_is(batch: Any) -> Any:
    return batch
