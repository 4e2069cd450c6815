import json

import pytest
import torch

from bitswitch.data import Preprocessing
from bitswitch.errors import UserError

IMAGENET = Preprocessing(shape=(3, 224, 224), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), resize=256, crop=224)


def test_json_and_back():
    value = json.loads(json.dumps(IMAGENET.to_json()))
    assert list(value) == ["shape", "mean", "std", "resize", "crop"]
    assert Preprocessing.from_json(value) == IMAGENET


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [3, 224]},
        {"shape": [3, 224, 0]},
        {"shape": [3.0, 224, 224]},
        {"mean": [0.5]},
        {"mean": 0.5},
        {"mean": ["a", 0.4, 0.3]},
        {"std": [0.2, 0.2, 0]},
        {"std": [0.2, 0.2, float("nan")]},
        {"crop": 200},
        {"resize": "256"},
        {"resize": 10**6},
        {"shape": [3, 224, 10**6], "crop": None},
        {"mean": [10**400, 0.4, 0.3]},
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused(change):
    with pytest.raises(UserError, match="preprocessing"):
        Preprocessing.from_json(IMAGENET.to_json() | change)


def test_a_missing_value_is_refused():
    with pytest.raises(UserError, match="lacks mean and std"):
        Preprocessing.from_json({"shape": [1, 8, 8]})


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (256, 256), (100, 90)])
def test_the_frame_is_the_middle_of_the_shorter_side(size):
    height, width = size
    # A ramp: grey level by column, so that the middle and the scale can be read off.
    image = (torch.arange(width) * 255 // width).to(torch.uint8).expand(3, height, width)
    framed = IMAGENET.framed(image)
    assert framed.shape == (3, 224, 224) and framed.dtype == torch.uint8
    assert abs(int(framed[0, 112, 112]) - 127) <= 2
    scale = 256 / min(size)
    assert int(framed[0, 0, -1]) - int(framed[0, 0, 0]) == pytest.approx(255 * 224 / (width * scale), abs=3)


def test_normalization_is_exact():
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    out = IMAGENET.normalizer(torch.device("cpu"))(images)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET.mean, IMAGENET.std))
    assert torch.equal(out, (images.float() / 255 - mean) / std)
