import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def cpu():
    return torch.device("cpu")


@pytest.fixture
def save_image():
    """A function that writes an image of random blocks, the same for the same seed."""

    def save(path, seed, size=(8, 8), mode="RGB"):
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = size
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).convert(mode).save(path)

    return save


@pytest.fixture
def make_folder(tmp_path, save_image):
    """A function that writes an image folder: {split: images of each of the classes ant, bee, cow}."""

    def make(name="folder", sizes=((8, 8),), suffix=".png", classes=("ant", "bee", "cow"), **splits):
        root, seed = tmp_path / name, 0
        for split, images in (splits or {"train": 10, "test": 4}).items():
            for c in classes:
                for i in range(images):
                    save_image(root / split / c / f"{i:03}{suffix}", seed, sizes[seed % len(sizes)])
                    seed += 1
        return root

    return make


@pytest.fixture(autouse=True)
def one_thread():
    """Images this small wait longer for a second thread than they take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Where this test's decodings go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "bitswitch"


@pytest.fixture
def stream():
    """A function that joins batches: all images, all labels."""

    def join(batches):
        x, y = zip(*batches, strict=True)
        return torch.cat(x), torch.cat(y)

    return join
