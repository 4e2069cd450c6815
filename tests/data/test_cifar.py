"""CIFAR as torchvision keeps it, and as an image folder."""

import hashlib
import pickle
import urllib.error

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import datasets

from bitswitch.data import load_data
from bitswitch.errors import UserError
from bitswitch.subject import Subject, data_for

KINDS = {
    "cifar10": (datasets.CIFAR10, "labels", ["airplane", "automobile", "bird"]),
    "cifar100": (datasets.CIFAR100, "fine_labels", ["apple", "aquarium_fish", "baby"]),
}


@pytest.fixture(params=list(KINDS))
def stored(request, tmp_path, monkeypatch):
    """(name, folder): a small set in torchvision's layout, its checksums taken for the published ones."""
    kind, labels, classes = KINDS[request.param]
    base = tmp_path / kind.base_folder
    base.mkdir()
    rng = np.random.default_rng(0)

    def write(name, value):
        content = pickle.dumps(value)
        (base / name).write_bytes(content)
        return hashlib.md5(content).hexdigest()

    def batch(name):
        images = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        return [name, write(name, {"data": images, labels: [i % 3 for i in range(20)]})]

    monkeypatch.setattr(kind, "train_list", [batch(name) for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [batch(name) for name, _ in kind.test_list])
    meta = kind.meta | {"md5": write(kind.meta["filename"], {kind.meta["key"]: classes})}
    monkeypatch.setattr(kind, "meta", meta)
    return request.param, tmp_path


def test_torchvisions_layout(stored, cpu):
    name, root = stored
    data = load_data(name, root)
    train = 20 * len(KINDS[name][0].train_list)
    assert [data.size(s) for s in ("train", "val", "test")] == [train * 9 // 10, train // 10, 20]
    assert data.name == name and list(data.classes) == KINDS[name][2]
    assert data.preprocessing.shape == (3, 32, 32) and (data.shift, data.flip) == (4, True)
    reference = KINDS[name][0](root, train=False)
    assert np.array_equal(data.test.images.permute(0, 2, 3, 1).numpy(), reference.data)
    assert data.test.labels.tolist() == reference.targets and data.test.labels.dtype == torch.int64
    assert next(data.training_batches(batch_size=6, seed=0, device=cpu).epoch(0))[0].shape == (6, 3, 32, 32)


def test_a_folder_is_opened_to_evaluate_as_a_run_opened_it(stored):
    name, root = stored
    told = Subject(model=nn.Identity(), widths=(), data_config={"name": name, "val_fraction": 0.2})
    data, run = data_for("x.safetensors", str(root), told), load_data(name, root, val_fraction=0.2)
    assert data.fingerprint() == run.fingerprint() and torch.equal(data.val.images, run.val.images)
    with pytest.raises(UserError, match=r"no folders of images|holds no images"):
        data_for("x.safetensors", str(root), Subject(model=nn.Identity(), widths=(), data_config={"name": "digits"}))


def test_val_of_an_imagenet_is_that_of_its_training(make_folder):
    # Small images of one size, which an image folder holds in memory and splits by their pixels.
    root = make_folder(train=20, test=4)
    told = Subject(model=nn.Identity(), widths=(), data_config={"name": "imagenet", "val_fraction": 0.2})
    data, run = data_for("x.safetensors", str(root), told), load_data("imagenet", root, val_fraction=0.2)
    assert len(run.val.paths) == 12 and data.val.paths == run.val.paths


def test_a_pickle_with_another_checksum_is_never_opened(stored):
    name, root = stored
    kind = KINDS[name][0]

    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    for file in (kind.test_list[0][0], kind.meta["filename"]):
        path = root / kind.base_folder / file
        whole = path.read_bytes()
        path.write_bytes(pickle.dumps(Evil()))
        with pytest.raises(UserError, match="incomplete or damaged"):
            load_data(name, root)
        path.write_bytes(whole)
    (root / kind.base_folder / kind.train_list[0][0]).unlink()
    with pytest.raises(UserError, match="incomplete or damaged"):
        load_data(name, root)


def test_nothing_is_fetched_unless_asked_for(tmp_path, monkeypatch, capsys):
    asked = []

    def fetch(url, *_args, **_kwargs):
        asked.append(url)
        print("a torchvision that prints")
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", fetch)
    with pytest.raises(UserError, match="download=true"):
        load_data("cifar10", tmp_path)
    assert not asked
    with pytest.raises(UserError, match=r"cannot be fetched into .*no network"):
        load_data("cifar10", tmp_path, download=True)
    assert len(asked) == 1 and capsys.readouterr().out == ""


def test_an_image_folder_of_cifar(make_folder):
    root = make_folder(sizes=((32, 32),), suffix=".jpg", train=10, test=3)
    data = load_data("cifar10", root)
    assert data.name == "cifar10" and (data.shift, data.flip) == (4, True)
    assert data.preprocessing.mean == (0.4914, 0.4822, 0.4465) and data.preprocessing.std == (0.2470, 0.2435, 0.2616)
    assert [data.size(s) for s in ("train", "val", "test")] == [27, 3, 9]


@pytest.mark.parametrize("sizes", [((16, 16),), ((32, 32), (32, 16))])
def test_a_folder_that_is_not_cifar(make_folder, sizes):
    with pytest.raises(UserError, match="not 32 x 32"):
        load_data("cifar10", make_folder(sizes=sizes))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(
        UserError,
        match=r"there is no folder .*missing, or it may not be looked at: data.root names the one that holds cifar10",
    ):
        load_data("cifar10", tmp_path / "missing")
    with pytest.raises(UserError, match="holds neither train/ and test/ nor"):
        load_data("cifar10", tmp_path)
