import pytest
import torch

from bitswitch.data import DataSet, ImageSet, MemoryBatches, evaluation_batches, load_data
from bitswitch.data.images import take_val
from bitswitch.errors import UserError


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def test_digits_are_all_there_once(digits):
    parts = [digits.train, digits.val, digits.test]
    assert [len(p) for p in parts] == [1293, 144, 360]
    assert digits.fingerprint() == load_data("digits").fingerprint()
    assert digits.train.images.shape[1:] == (1, 8, 8) and digits.train.images.max() == 255
    counts = digits.test.labels.bincount()
    assert counts.min() >= 34 and counts.max() <= 37


def test_val_depends_on_content_alone():
    images = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8)
    whole = ImageSet(images, torch.arange(50))
    order = torch.randperm(50)
    _, val = take_val(whole, 0.2)
    _, shuffled = take_val(whole[order], 0.2)
    assert set(val.labels.tolist()) == set(shuffled.labels.tolist()) and len(val) == 10
    assert len(take_val(whole, 0.0)[1]) == 0


def test_an_epoch_is_always_the_same_stream(digits):
    batches = MemoryBatches(digits, batch_size=64, seed=1, device=torch.device("cpu"))
    first = list(batches.epoch(3))
    assert len(first) == len(batches) == 20
    for (x, y), (u, v) in zip(first, batches.epoch(3), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    assert not torch.equal(first[0][0], next(batches.epoch(4))[0])
    other = MemoryBatches(digits, batch_size=64, seed=2, device=torch.device("cpu"))
    assert not torch.equal(first[0][0], next(other.epoch(3))[0])


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_is_a_shift_and_a_mirror(flip):
    image = torch.arange(1, 21, dtype=torch.uint8).view(1, 4, 5)
    padded = torch.nn.functional.pad(image, (1,) * 4)
    allowed = set()
    for source in (padded, padded.flip(-1)) if flip else (padded,):
        for dy in range(3):
            for dx in range(3):
                allowed.add(tuple(source[:, dy : dy + 4, dx : dx + 5].flatten().tolist()))
    part = ImageSet(image.expand(300, 1, 4, 5), torch.zeros(300, dtype=torch.long))
    data = DataSet(
        name="x", train=part, val=part, test=part, classes=("a",), mean=(0.0,), std=(1.0,), shift=1, flip=flip
    )
    (x, _), *_ = MemoryBatches(data, batch_size=300, seed=0, device=torch.device("cpu")).epoch(0)
    seen = {tuple(row) for row in (x * 255).round().to(torch.uint8).flatten(1).tolist()}
    assert seen <= allowed and len(seen) == len(allowed)


def test_evaluation_sees_every_image_once_in_order(digits):
    x, y = zip(*evaluation_batches(digits, "test", device=torch.device("cpu"), batch_size=100), strict=True)
    assert torch.equal(torch.cat(y), digits.test.labels)
    mean, std = digits.mean[0], digits.std[0]
    assert torch.allclose(torch.cat(x), (digits.test.images / 255 - mean) / std, atol=1e-6)


def test_unknown_data():
    with pytest.raises(UserError, match="did you mean 'digits'"):
        load_data("digit")
