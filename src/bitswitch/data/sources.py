"""Data sets by name."""

from pathlib import Path

import numpy as np
import torch

from bitswitch.data.images import DataSet, ImageSet, take_val
from bitswitch.errors import UserError, nearest, require

_NAMES = ("digits",)
_DIGITS_TEST_IMAGES = 360


def load_data(name: str, root: str | Path | None = None, *, val_fraction: float = 0.1) -> DataSet:
    """A data set by name, decoded into memory.

    Args:
        name: "digits": scikit-learn's 1,797 handwritten digits, 8 x 8, embedded in that package.
        root: where the data lie, for names that need it.
        val_fraction: share of the training images set aside as `val`, chosen by content hash.

    Raises:
        UserError: there is no such data set, or it cannot be read.
    """
    if name == "digits":
        return _digits(val_fraction)
    raise UserError(f"no data set is named {name!r}{nearest(name, _NAMES)}; there are: {', '.join(_NAMES)}")


def _digits(val_fraction: float) -> DataSet:
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
    pixels = rest.images.double() / 255
    return DataSet(
        name="digits",
        train=rest,
        val=val,
        test=whole[torch.from_numpy(np.sort(test))],
        classes=tuple(str(digit) for digit in range(10)),
        mean=(round(float(pixels.mean()), 6),),
        std=(round(float(pixels.std()), 6),),
        shift=1,
        flip=False,
    )
