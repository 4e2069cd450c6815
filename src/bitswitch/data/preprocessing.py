"""What turns a decoded image into a network's input."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from bitswitch.errors import UserError

# Far above any network's.
_MOST_NUMBERS = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize, crop, scale to [0, 1], normalize.

    Attributes:
        shape: [C, H, W] of the network's input.
        mean, std: of the channels of images in [0, 1].
        resize: the shorter side before the crop, or None.
        crop: side of the square cut from the middle, or None.

    Raises:
        UserError: the values do not fit together.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    crop: int | None = None

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise UserError(f"preprocessing {asdict(self)}: {problem}")

    def _problem(self) -> str | None:
        sizes = [*self.shape, *(size for size in (self.resize, self.crop) if size is not None)]
        if len(self.shape) != 3 or not all(type(size) is int and size > 0 for size in sizes):
            return "shape is three whole numbers above 0 (channels, height, width), resize and crop are one or null"
        if math.prod(self.shape) > _MOST_NUMBERS or (self.resize or 0) ** 2 > _MOST_NUMBERS:
            return f"an image has more than {_MOST_NUMBERS:,} numbers"
        if not len(self.mean) == len(self.std) == self.shape[0]:
            return f"mean and std need one number for each of {self.shape[0]} channels"
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            return "mean and std are finite, std is above 0"
        if self.crop is not None and self.shape[1:] != (self.crop, self.crop):
            return f"a crop of {self.crop} does not give the shape {list(self.shape)}"
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain values, as an artifact's header holds them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `to_json`; without `resize` and `crop`, neither is done.

        Raises:
            UserError: another value is missing, or one does not fit.
        """
        if missing := [key for key in ("shape", "mean", "std") if key not in value]:
            raise UserError(
                f"preprocessing {dict(value)} lacks {' and '.join(missing)}: images cannot be made ready by it"
            )
        try:
            shape, resize, crop = tuple(value["shape"]), value.get("resize"), value.get("crop")
            mean, std = (tuple(float(number) for number in value[key]) for key in ("mean", "std"))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"preprocessing {value!r} cannot be used: {error}") from error
        return cls(shape=shape, mean=mean, std=std, resize=resize, crop=crop)

    def framed(self, images: Tensor) -> Tensor:
        """Resized and cropped: uint8 [..., C, h, w] -> uint8 [..., C, H, W].

        Raises:
            UserError: what comes out is not of the network's shape.
        """
        framed = images
        if self.resize is not None or self.crop is not None:
            if self.resize is not None:
                framed = functional.resize(framed, [self.resize], antialias=True)
            if self.crop is not None:
                framed = functional.center_crop(framed, [self.crop, self.crop])
        if tuple(framed.shape[-3:]) != self.shape:
            raise UserError(f"images of {list(images.shape[-3:])} do not fit a network that takes {list(self.shape)}")
        return framed

    def normalizer(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """A function uint8 [N, C, H, W] -> float32, `(x / 255 - mean) / std` per channel, for tensors on `device`.

        The constants are put on the device once, here: a copy in every step would wait for the device.
        """
        mean = torch.tensor(self.mean, device=device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=device).view(-1, 1, 1)
        return lambda images: images.float().div_(255).sub_(mean).div_(std)
