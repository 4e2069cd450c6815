"""Data sets by name."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import datasets as torchvision_datasets

from bitswitch import files
from bitswitch.data.cache import Cache, default_folder
from bitswitch.data.contents import Contents
from bitswitch.data.dataset import DataSet
from bitswitch.data.decode import Shown, unseen
from bitswitch.data.folder import list_images
from bitswitch.data.image_folder import ImageFolder, Unreadable
from bitswitch.data.images import ImageSet, take_val
from bitswitch.data.memory import MemoryDataSet
from bitswitch.data.preprocessing import Preprocessing
from bitswitch.errors import UserError, nearest, require

_NAMES = ("digits", "cifar10", "cifar100", "imagenet", "image_folder")
_DIGITS_TEST_IMAGES = 360
# (mean, std) of the training images.
_CIFAR = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_CIFAR_SHIFT = 4
_TORCHVISION: dict[Any, Any] = {"cifar10": torchvision_datasets.CIFAR10, "cifar100": torchvision_datasets.CIFAR100}


def load_data(
    name: str,
    root: str | Path | None = None,
    *,
    val_fraction: float = 0.1,
    unreadable: Unreadable = "refuse",
    download: bool = False,
    workers: int = 2,
    cache: str | Path | None = None,
    shown: Shown = unseen,
) -> DataSet:
    """A data set by name.

    Small sets whose images are of one size (512 MiB decoded, at most) are held in memory, others read file by file.

    Args:
        name: "digits": scikit-learn's 1,797 handwritten digits, 8 x 8, embedded in that package.
            "cifar10", "cifar100": what torchvision keeps in `root`, or an image folder of such images.
            "image_folder": class folders in train/ and in test/ or val/, or class folders alone, which are then test.
            "imagenet": the same, always resized and cropped to 224 x 224.
            The path of a folder: "image_folder" there.
        root: where the data lie, for names that need it.
        val_fraction: share of the training images set aside as `val`, chosen by content hash.
        unreadable: "refuse" an image that cannot be decoded, or "skip" it with a warning.
        download: fetch CIFAR into `root` where it is not there.
        workers: threads that hash and decode into memory, processes that decode during training.
        cache: folder for what is kept between runs; $XDG_CACHE_HOME/bitswitch where None.
        shown: passes on what is hashed and decoded, image by image, and shows how far it is.

    Raises:
        UserError: there is no such data set, or it cannot be read.
    """
    kind = name
    if name and name not in _NAMES and files.is_folder(Path(name)):
        if root is not None:
            raise UserError(f"data.name={name} is a folder already: leave out data.root={root}")
        kind, root = "image_folder", name
    _check(kind, val_fraction, unreadable, download, workers)
    if kind == "digits":
        if root is not None:
            raise UserError(
                f"data.root={root}: digits come with scikit-learn: data.root=null; data.name={root} names other images"
            )
        return _digits(val_fraction)
    if root is None:
        raise UserError(
            f"{name}: where are the images? Name their folder: data.root=FOLDER for a recipe, --data FOLDER for a file"
        )
    try:
        place = Path(root).expanduser()
    except RuntimeError as error:
        raise UserError(f"data.root={root}: there is no such user's home") from error
    if kind in _CIFAR and not files.is_folder(place / "train"):
        return _cifar_of_torchvision(name, place, val_fraction, download)
    try:
        kept = Cache(Path(cache).expanduser() if cache is not None else default_folder())
    except RuntimeError as error:
        raise UserError(f"data.cache={cache}: there is no such user's home") from error
    folder = ImageFolder(
        name=name,
        contents=Contents(list_images(place), kept, workers, shown),
        val_fraction=val_fraction,
        unreadable=unreadable,
    )
    if kind in _CIFAR:
        return _cifar_of_folder(folder)
    return folder.as_files() if kind == "imagenet" else folder.opened()


def place_of(name: str, trained_on: object) -> tuple[str, str | None]:
    """(name, root) for `load_data` of what a network is scored on.

    A folder is opened as the data that the network was trained on were: the same images, opened otherwise, are split otherwise.

    Args:
        name: a data name or a folder.
        trained_on: the data name that the network's file tells, if any.
    """
    if name not in _NAMES and files.is_folder(Path(name)):
        kept = _TORCHVISION[trained_on].base_folder if trained_on in _TORCHVISION else None
        if trained_on == "imagenet" or (kept is not None and files.is_folder(Path(name, kept))):
            return str(trained_on), name
    return name, None


def _check(name: str, val_fraction: float, unreadable: str, download: bool, workers: int) -> None:
    if name not in _NAMES:
        if os.sep in name:
            raise UserError(f"there is no folder {name}: name one that holds images, or one of {', '.join(_NAMES)}")
        raise UserError(
            f"no data set is named {name!r}{nearest(name, _NAMES)}; there are: {', '.join(_NAMES)}, or a folder"
        )
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction}: use a share from 0 to below 1")
    if unreadable not in ("refuse", "skip"):
        raise UserError(f"unreadable={unreadable!r}: use 'refuse' or 'skip'")
    if download and name == "digits":
        raise UserError("digits come with scikit-learn: leave out data.download")
    if download and name in ("imagenet", "image_folder"):
        raise UserError(f"{name} cannot be downloaded: leave out data.download, and name its folder with data.root")
    if workers < 0:
        raise UserError(f"workers={workers}: use 0 or more")


def _digits(val_fraction: float) -> MemoryDataSet:
    datasets = require("sklearn.datasets", "train")
    selection = require("sklearn.model_selection", "train")
    found = datasets.load_digits()
    train, test = selection.train_test_split(
        np.arange(len(found.target)), test_size=_DIGITS_TEST_IMAGES, stratify=found.target, random_state=0
    )
    # Sixteen grey levels, spread over the 256 of ordinary images.
    images = torch.from_numpy(np.rint(found.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    whole = ImageSet(images, torch.from_numpy(found.target.astype(np.int64)))
    rest, val = take_val(whole[torch.from_numpy(np.sort(train))], val_fraction)
    # Where val has taken all, what wants training images tells so.
    pixels = (rest if len(rest) > 1 else val).images.double() / 255
    return MemoryDataSet(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        preprocessing=Preprocessing(
            shape=(1, 8, 8), mean=(round(float(pixels.mean()), 6),), std=(round(float(pixels.std()), 6),)
        ),
        train=rest,
        val=val,
        test=whole[torch.from_numpy(np.sort(test))],
        shift=1,
        flip=False,
    )


def _cifar_of_folder(folder: ImageFolder) -> MemoryDataSet:
    data = folder.in_memory(_CIFAR[folder.name])
    if data is None or data.preprocessing.shape != (3, 32, 32):
        root = folder.contents.listing.root
        raise UserError(f"{root} holds images that are not 32 x 32, not {folder.name}: use data.name=image_folder")
    return data


def _cifar_of_torchvision(name: str, root: Path, val_fraction: float, download: bool) -> MemoryDataSet:
    """CIFAR as torchvision keeps it. Its files are pickles: they are opened only where their MD5 is the published one."""
    kind = _TORCHVISION[name]
    kept = root / kind.base_folder
    if not download and not files.is_folder(root):
        raise UserError(
            f"there is no folder {root}, or it may not be looked at: data.root names the one that holds {name}, "
            "data.download=true fetches it"
        )
    if not download and not files.is_folder(kept):
        raise UserError(f"{root} holds neither train/ and test/ nor {kept.name}/: data.download=true fetches it")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            train, test = kind(root, train=True, download=download), kind(root, train=False)
    except RuntimeError as error:
        raise UserError(f"{kept} is incomplete or damaged: remove it, data.download=true fetches it again") from error
    except OSError as error:
        raise UserError(f"{name} cannot be fetched into {root}: {getattr(error, 'reason', error)}") from error
    whole, tested = (
        ImageSet(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test)
    )
    rest, val = take_val(whole, val_fraction)
    mean, std = _CIFAR[name]
    return MemoryDataSet(
        name=name,
        classes=tuple(train.classes),
        preprocessing=Preprocessing(shape=(3, 32, 32), mean=mean, std=std),
        train=rest,
        val=val,
        test=tested,
        shift=_CIFAR_SHIFT,
        flip=True,
    )
