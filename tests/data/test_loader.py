"""ImageNet's way: images of different sizes, decoded by workers."""

import contextlib
import itertools
import pickle
import signal
import threading
from dataclasses import replace

import pytest
import torch

from bitswitch.data import FileDataSet, Preprocessing, load_data
from bitswitch.data.decode import UnreadableImage, read_image
from bitswitch.data.loader import FileSet, _TrainingReader
from bitswitch.errors import UserError

SMALL = Preprocessing(shape=(3, 24, 24), mean=(0.5,) * 3, std=(0.25,) * 3, resize=28, crop=24)


@pytest.fixture
def root(make_folder):
    return make_folder(sizes=((40, 48), (48, 40), (33, 60)), suffix=".JPEG", train=8, val=5)


@pytest.fixture
def folder(root):
    """A function that opens the folder, scaled down."""
    return lambda workers=0: load_data("imagenet", root, workers=workers).with_preprocessing(SMALL)


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(first, second, strict=True)
    )


def test_imagenets_sizes(root, cpu):
    data = load_data("imagenet", root, workers=0)
    assert isinstance(data, FileDataSet) and [data.size(s) for s in ("train", "val", "test")] == [22, 2, 15]
    wanted = {"shape": [3, 224, 224], "resize": 256, "crop": 224}
    assert data.preprocessing.to_json().items() >= wanted.items()
    x, y = next(data.evaluation_batches("test", batch_size=2, device=cpu))
    assert x.shape == (2, 3, 224, 224) and x.dtype == torch.float32 and y.tolist() == [0, 0] and y.dtype == torch.int64
    x, _ = next(data.training_batches(batch_size=2, seed=0, device=cpu).epoch(0))
    assert x.shape == (2, 3, 224, 224) and data.sample(3).shape == (3, 3, 224, 224)


def test_images_of_different_sizes_make_a_folder_imagenet_like(root):
    assert isinstance(load_data(str(root)), FileDataSet)


def test_workers_do_not_change_the_stream(folder, cpu):
    here = folder(0).training_batches(batch_size=6, seed=1, device=cpu)
    there = folder(2).training_batches(batch_size=6, seed=1, device=cpu)
    epoch = list(here.epoch(1))
    assert len(epoch) == len(here) == 3 and same(epoch, list(there.epoch(1)))
    assert same(epoch, list(here.epoch(1)))
    assert not same(epoch, list(here.epoch(2)))
    assert not same(epoch, list(folder().training_batches(batch_size=6, seed=2, device=cpu).epoch(1)))
    evaluated = [list(folder(w).evaluation_batches("test", batch_size=4, device=cpu)) for w in (0, 2)]
    assert same(*evaluated)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_one_process(folder, cpu, world):
    data = folder()
    alone = list(data.training_batches(batch_size=4, seed=1, device=cpu).epoch(0))
    ranks = [
        list(data.training_batches(batch_size=4, seed=1, device=cpu, rank=rank, world=world).epoch(0))
        for rank in range(world)
    ]
    joined = [
        (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])) for parts in zip(*ranks, strict=True)
    ]
    assert same(alone, joined)


def test_an_interrupt_while_workers_start_is_not_lost(folder, cpu, monkeypatch):
    class Forking(torch.utils.data.DataLoader):
        def __iter__(self):
            # As Python does with what is raised in a function that it calls at a fork.
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            return super().__iter__()

    monkeypatch.setattr("bitswitch.data.loader.DataLoader", Forking)
    # Whoever runs tests in several processes has them ignore it.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        next(folder().training_batches(batch_size=6, seed=1, device=cpu).epoch(0))
    assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, ignored)
    # Handlers can be set in the main thread alone.
    read = []
    thread = threading.Thread(target=lambda: read.extend(folder().evaluation_batches("test", batch_size=4, device=cpu)))
    with monkeypatch.context() as patch:
        patch.setattr("bitswitch.data.loader.DataLoader", torch.utils.data.DataLoader)
        thread.start()
        thread.join()
    assert read


@pytest.mark.parametrize("world", [1, 2, 5])
def test_evaluation_sees_every_image_once(folder, cpu, world):
    data = folder()
    alone = list(data.evaluation_batches("test", batch_size=4, device=cpu))
    labels = torch.cat([y for _, y in alone])
    assert labels.tolist() == list(data.test.labels) and len(labels) == 15
    ranks = [list(data.evaluation_batches("test", batch_size=4, device=cpu, rank=r, world=world)) for r in range(world)]
    assert same(alone, [ranks[step % world][step // world] for step in range(len(alone))])
    assert sum(map(len, ranks)) == len(alone)


def test_trainings_own_random_numbers_are_left_alone(folder, cpu):
    for workers in (0, 1):
        torch.manual_seed(5)
        list(folder(workers).training_batches(batch_size=6, seed=1, device=cpu).epoch(0))
        drawn = torch.rand(1)
        torch.manual_seed(5)
        assert torch.equal(drawn, torch.rand(1))


def test_a_random_view_is_of_its_seed_epoch_and_image(folder):
    """The order of the images changes with the seed and the epoch, too, so that batches do not show it."""
    data = folder()
    (path, *_), (label, *_), (digest, *_) = data.train.paths, data.train.labels, data.train.digests
    twice = FileSet((path, path), (label, label), (digest, digest))
    views = [
        _TrainingReader(twice, data.preprocessing, seed=seed, epoch=epoch)._view(i)
        for seed, epoch, i in itertools.product((0, 1), repeat=3)
    ]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(views, 2))
    assert torch.equal(views[0], _TrainingReader(twice, data.preprocessing, seed=0, epoch=0)._view(0))


def test_val_is_chosen_by_the_bytes_of_the_files(folder, root):
    before = folder()
    (root / "train" / "ant" / "000.JPEG").rename(root / "train" / "ant" / "zzz.JPEG")
    after = folder()
    assert set(before.val.digests) == set(after.val.digests) and not set(after.val.digests) & set(after.train.digests)
    assert before.fingerprint() == after.fingerprint()
    other = replace(after.test, labels=after.test.labels[::-1])
    assert replace(after, test=other).fingerprint() != after.fingerprint()
    (root / "train" / "ant" / "zzz.JPEG").write_bytes((root / "val" / "cow" / "000.JPEG").read_bytes())
    assert folder().fingerprint() != before.fingerprint()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_goes_bad_later_is_named_in_one_line(folder, root, cpu, workers):
    data = folder(workers)
    (root / "val" / "bee" / "002.JPEG").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        list(data.evaluation_batches("test", batch_size=4, device=cpu))
    assert "bee/002.JPEG cannot be read" in str(caught.value) and "\n" not in str(caught.value)


def test_the_check_is_done_once(root, monkeypatch):
    from bitswitch.data import contents

    seen, real = [], contents.check_image
    monkeypatch.setattr(contents, "check_image", lambda path: seen.append(path) or real(path))
    load_data("imagenet", root)
    load_data("imagenet", root)
    assert len(seen) == 39


def test_a_network_without_a_crop_cannot_take_images_of_different_sizes(folder, cpu):
    def native(*height_width):
        return Preprocessing(shape=(3, *height_width), mean=(0.5,) * 3, std=(0.25,) * 3)

    with pytest.raises(UserError, match="do not fit"):
        folder().with_preprocessing(native(32, 32))
    first = folder().test.paths[0]
    height, width = read_image(first).shape[1:]
    with pytest.raises(UserError, match=r"JPEG: images of \[3, .* do not fit"):
        list(folder().with_preprocessing(native(height, width)).evaluation_batches("test", batch_size=4, device=cpu))


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(UnreadableImage("x cannot be read: y")))
    assert isinstance(error, UnreadableImage) and str(error) == "x cannot be read: y"
