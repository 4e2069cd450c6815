"""Digits, and the laws of data sets in memory."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitswitch.data import ImageSet, MemoryDataSet, Preprocessing, load_data
from bitswitch.data.images import choose_val, take_val
from bitswitch.errors import UserError


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def one_image_many_times(image, count, **changes):
    part = ImageSet(image.expand(count, *image.shape), torch.zeros(count, dtype=torch.long))
    plain = Preprocessing(shape=tuple(image.shape), mean=(0.0,), std=(1.0,))
    values = {"name": "x", "classes": ("a",), "preprocessing": plain, "shift": 1, "flip": False} | changes
    return MemoryDataSet(train=part, val=part, test=part, **values)


def test_digits_are_all_there_once(digits):
    assert [digits.size(split) for split in ("train", "val", "test")] == [1293, 144, 360]
    assert digits.fingerprint() == load_data("digits").fingerprint()
    assert digits.preprocessing == Preprocessing(shape=(1, 8, 8), mean=(0.306037,), std=(0.3762,))
    assert digits.train.images.max() == 255
    counts = digits.test.labels.bincount()
    assert counts.min() >= 34 and counts.max() <= 37


def test_digits_are_those_of_earlier_results(digits):
    """Numbers on record were made with these images and this stream; a change here makes them another experiment."""
    assert digits.fingerprint() == "b5ffd65092a3afb26634a2fcf8c850c5125345a091215270e8dc855a8e6221da"
    x, y = next(digits.training_batches(batch_size=64, seed=1, device=torch.device("cpu")).epoch(3))
    assert y[:12].tolist() == [6, 2, 4, 9, 7, 8, 2, 0, 1, 9, 1, 0]
    assert x.double().sum().item() == pytest.approx(-284.5016746, abs=1e-4)


def test_val_depends_on_content_alone():
    images = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8)
    whole = ImageSet(images, torch.arange(50))
    order = torch.randperm(50)
    _, val = take_val(whole, 0.2)
    _, shuffled = take_val(whole[order], 0.2)
    assert set(val.labels.tolist()) == set(shuffled.labels.tolist()) and len(val) == 10
    assert len(take_val(whole, 0.0)[1]) == 0


def test_a_set_smaller_than_a_batch_is_one_batch_that_the_ranks_can_share(digits):
    few = dataclasses.replace(digits, train=digits.train[torch.arange(10)])
    assert [few.training_batch(100 * world, world) for world in (1, 2, 3, 4)] == [10, 10, 9, 8]
    assert few.training_batch(6, 3) == 6


@given(st.lists(st.integers(0, 6), max_size=30), st.floats(0, 0.99))
def test_images_of_equal_content_are_in_one_split(contents, fraction):
    hashes = [bytes([one]) for one in contents]
    rest, val = ({hashes[i] for i in part.tolist()} for part in choose_val(hashes, fraction))
    assert not rest & val and rest | val == set(hashes)
    _, val = choose_val(hashes, fraction)
    assert len(val) <= round(fraction * len(hashes)) and (fraction or not len(val))
    if len(set(hashes)) == len(hashes):
        assert len(val) == round(fraction * len(hashes))


def test_an_epoch_is_always_the_same_stream(digits, cpu):
    batches = digits.training_batches(batch_size=64, seed=1, device=cpu)
    first = list(batches.epoch(3))
    assert len(first) == len(batches) == 20
    for (x, y), (u, v) in zip(first, batches.epoch(3), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    assert not torch.equal(first[0][0], next(batches.epoch(4))[0])
    other = digits.training_batches(batch_size=64, seed=2, device=cpu)
    assert not torch.equal(first[0][0], next(other.epoch(3))[0])


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_one_process(digits, cpu, world):
    alone = digits.training_batches(batch_size=64, seed=1, device=cpu)
    ranks = [digits.training_batches(batch_size=64, seed=1, device=cpu, rank=r, world=world) for r in range(world)]
    assert {len(rank) for rank in ranks} == {len(alone)}
    for (x, y), *shares in zip(alone.epoch(0), *(rank.epoch(0) for rank in ranks), strict=True):
        assert torch.equal(x, torch.cat([share for share, _ in shares]))
        assert torch.equal(y, torch.cat([share for _, share in shares]))


def test_what_ranks_cannot_share_is_refused(digits, cpu):
    with pytest.raises(UserError, match=r"batch_size=64 cannot be shared evenly by 3 ranks"):
        digits.training_batches(batch_size=64, seed=1, device=cpu, world=3)


def test_a_set_smaller_than_a_batch_is_one_batch(cpu):
    data = one_image_many_times(torch.ones(1, 4, 4, dtype=torch.uint8), 7)
    (batch,) = data.training_batches(batch_size=64, seed=1, device=cpu).epoch(0)
    assert len(batch[1]) == 7
    (batch,) = data.training_batches(batch_size=64, seed=1, device=cpu, rank=1, world=2).epoch(0)
    assert len(batch[1]) == 3


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_is_a_shift_and_a_mirror(cpu, flip):
    image = torch.arange(1, 21, dtype=torch.uint8).view(1, 4, 5)
    padded = torch.nn.functional.pad(image, (1,) * 4)
    allowed = set()
    for source in (padded, padded.flip(-1)) if flip else (padded,):
        for dy in range(3):
            for dx in range(3):
                allowed.add(tuple(source[:, dy : dy + 4, dx : dx + 5].flatten().tolist()))
    data = one_image_many_times(image, 300, flip=flip)
    (x, _), *_ = data.training_batches(batch_size=300, seed=0, device=cpu).epoch(0)
    seen = {tuple(row) for row in (x * 255).round().to(torch.uint8).flatten(1).tolist()}
    assert seen <= allowed and len(seen) == len(allowed)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_evaluation_sees_every_image_once(digits, cpu, world, stream):
    alone = list(digits.evaluation_batches("test", batch_size=100, device=cpu))
    x, y = stream(alone)
    assert torch.equal(y, digits.test.labels)
    mean, std = digits.preprocessing.mean[0], digits.preprocessing.std[0]
    assert torch.allclose(x, (digits.test.images / 255 - mean) / std, atol=1e-6)
    shared = [
        batch
        for rank in range(world)
        for batch in digits.evaluation_batches("test", batch_size=100, device=cpu, rank=rank, world=world)
    ]
    # The very batches of one process, each on one rank.
    assert len(shared) == len(alone)
    assert all(any(torch.equal(x, u) for u, _ in alone) for x, _ in shared)
    assert sum(len(labels) for _, labels in shared) == 360


def test_a_sample_is_the_first_training_images_as_they_are(digits, cpu):
    whole = digits.preprocessing.normalizer(cpu)(digits.train.images)
    assert torch.equal(digits.sample(5), whole[:5]) and len(digits.sample(10**6)) == 1293


def test_no_training_images(digits, cpu):
    data = dataclasses.replace(digits, train=digits.train[torch.tensor([], dtype=torch.long)])
    with pytest.raises(UserError, match="no training images"):
        data.training_batches(batch_size=64, seed=1, device=cpu)
    with pytest.raises(UserError, match="no training images"):
        data.sample(1)


def test_another_networks_preprocessing(digits, cpu):
    wanted = Preprocessing(shape=(1, 12, 12), mean=(0.5,), std=(0.25,), resize=16, crop=12)
    data = digits.with_preprocessing(wanted)
    x, _ = next(data.evaluation_batches("test", batch_size=4, device=cpu))
    assert x.shape == (4, 1, 12, 12) and data.fingerprint() == digits.fingerprint()
    assert x.min() >= -2 and x.max() <= 2
    assert next(data.training_batches(batch_size=8, seed=0, device=cpu).epoch(0))[0].shape == (8, 1, 12, 12)
    assert data.sample(3).shape == (3, 1, 12, 12)
    with pytest.raises(UserError, match=r"images of \[1, 8, 8\] do not fit a network that takes \[3, 32, 32\]"):
        digits.with_preprocessing(Preprocessing(shape=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"name": "digit"}, "did you mean 'digits'"),
        ({"name": ""}, "no data set"),
        ({"name": "no/such/folder"}, "there is no folder no/such/folder"),
        ({"name": "image_folder"}, "data.root=FOLDER"),
        ({"name": "image_folder", "root": "no/such"}, "there is no folder no/such"),
        ({"name": "cifar10"}, "data.root=FOLDER"),
        ({"name": "imagenet", "root": "x", "download": True}, "cannot be downloaded"),
        ({"name": "digits", "val_fraction": 1.0}, "val_fraction=1.0"),
        ({"name": "digits", "unreadable": "ignore"}, "unreadable='ignore'"),
        ({"name": "digits", "workers": -1}, "workers=-1"),
    ],
    ids=str,
)
def test_what_cannot_be_loaded_is_told_in_one_line(words, told):
    with pytest.raises(UserError) as caught:
        load_data(**words)
    assert told in str(caught.value) and "\n" not in str(caught.value)
