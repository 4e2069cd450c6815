"""Image folders: layouts, colours, damage, val, the cache."""

import errno
import os
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bitswitch.data import FileDataSet, MemoryDataSet, contents, load_data
from bitswitch.data.decode import UnreadableImage, check_image, read_image
from bitswitch.errors import UserError


def refused(root, **words):
    with pytest.raises(UserError) as caught:
        load_data("image_folder", root, **words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def content(data, split="train"):
    """Images and labels, in whatever order."""
    part = data.split(split)
    return sorted((bytes(x.numpy().tobytes()), int(y)) for x, y in zip(part.images, part.labels, strict=True))


def test_train_and_test(make_folder):
    data = load_data("image_folder", make_folder(train=10, test=4))
    assert isinstance(data, MemoryDataSet) and data.classes == ("ant", "bee", "cow")
    assert [data.size(split) for split in ("train", "val", "test")] == [27, 3, 12]
    assert data.preprocessing.shape == (3, 8, 8) and (data.shift, data.flip) == (1, True)
    pixels = data.train.images.double() / 255
    assert data.preprocessing.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert data.preprocessing.std == pytest.approx(pixels.transpose(0, 1).flatten(1).std(1).tolist(), abs=1e-6)


def test_val_beside_train_is_the_test_split(make_folder):
    root = make_folder(train=10, val=4)
    assert [load_data(str(root)).size(split) for split in ("train", "val", "test")] == [27, 3, 12]


@pytest.mark.parametrize("split", [".", "test", "val"])
def test_class_folders_without_training_images_are_test(make_folder, cpu, split):
    root = make_folder(**{split: 4})
    data = load_data(str(root))
    assert data.name == str(root) and [data.size(s) for s in ("train", "val", "test")] == [0, 0, 12]
    with pytest.raises(UserError, match="no training images"):
        data.training_batches(batch_size=2, seed=0, device=cpu)


def test_a_test_folder_without_classes_does_not_hide_val(make_folder, save_image):
    root = make_folder(train=10, val=4)
    save_image(root / "test" / "1.png", 0)
    assert load_data(str(root)).size("test") == 12


def test_classes_may_be_named_as_splits_are(make_folder, save_image):
    root = make_folder(**{".": 4})
    for i in range(4):
        save_image(root / "train" / f"{i}.png", i)
    data = load_data(str(root))
    assert data.classes == ("ant", "bee", "cow", "train") and data.size("test") == 16
    # Beside nothing else a split is a split.
    alone = make_folder(train=4)
    save_image(alone / "test" / "1.png", 0)
    assert "has no folders of images in it" in refused(alone)


def test_a_folder_that_cannot_be_listed_is_told(make_folder, save_image, monkeypatch):
    root, real = make_folder(), os.scandir
    save_image(root / "train" / "ant" / "more" / "1.png", 77)

    def scandir(place):
        if str(place).endswith("more"):
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return real(place)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(UserError, match="more cannot be listed: Permission denied"):
        load_data(str(root))


@pytest.mark.parametrize("name", ["image_folder", "imagenet", "cifar10"])
def test_a_root_that_can_be_no_folder_is_told(name):
    with pytest.raises(UserError, match="there is no folder n"):
        load_data(name, "n" * 300)


def test_labels_follow_the_sorted_names(make_folder):
    root = make_folder(train=3, test=3, classes=("b", "A", "a"))
    data = load_data(str(root), val_fraction=0)
    assert data.classes == ("A", "a", "b")
    for label, name in enumerate(data.classes):
        files = {np.asarray(Image.open(p)).transpose(2, 0, 1).tobytes() for p in (root / "test" / name).iterdir()}
        assert files == {x for x, y in content(data, "test") if y == label}


def test_neither_the_place_nor_the_names_of_files_change_what_is_trained_on(make_folder, tmp_path, stream, cpu):
    root = make_folder()
    other = tmp_path / "elsewhere"
    for number, path in enumerate(sorted(root.rglob("*.png"), reverse=True)):
        place = other / path.parent.relative_to(root) / "deeper" / f"{number}.PNG"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    (other / "train" / "ant" / "._notes.png").write_text("left behind by another system")
    (other / "train" / "ant" / "notes.txt").write_text("no image")
    first, second = load_data(str(root)), load_data(str(other))
    assert torch.equal(first.train.images, second.train.images) and torch.equal(first.val.images, second.val.images)
    x, _ = stream(first.training_batches(batch_size=9, seed=0, device=cpu).epoch(0))
    u, _ = stream(second.training_batches(batch_size=9, seed=0, device=cpu).epoch(0))
    assert torch.equal(x, u)
    assert len(set(first.train.labels[:12].tolist())) == 3  # a sample has all classes


def test_val_is_chosen_by_content(make_folder, save_image):
    root = make_folder(train=20, test=2)
    before = load_data(str(root))
    save_image(root / "train" / "ant" / "new.png", 999)
    after = load_data(str(root))
    # One more image moves at most one in or out.
    assert len(set(content(before, "val")) ^ set(content(after, "val"))) <= 2
    assert not {x for x, _ in content(after, "val")} & {x for x, _ in content(after, "train")}


def test_layouts_that_cannot_be_used(make_folder, tmp_path):
    assert "no test/ or val/" in refused(make_folder("alone", train=2))
    (tmp_path / "empty").mkdir()
    assert "no folders of images" in refused(tmp_path / "empty")
    root = make_folder("gap", train=2, test=2)
    shutil.rmtree(root / "train" / "bee")
    assert "different classes" in refused(root) and "only " in refused(root) and "has bee" in refused(root)
    (root / "train" / "bee").mkdir()
    assert f"{root / 'train' / 'bee'} holds no images" in refused(root)
    with pytest.raises(UserError, match="leave out data"):
        load_data(str(root), root)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_of_sixteen_bits_the_upper_eight_are_taken(make_folder, suffix):
    root = make_folder()
    values = np.random.default_rng(0).integers(0, 2**16, (8, 8)).astype(np.uint16)
    odd = next((root / "test").rglob("*.png"))
    odd.unlink()
    Image.fromarray(values).save(odd.with_suffix(suffix))
    wanted = np.broadcast_to((values >> 8).astype(np.uint8), (3, 8, 8)).tobytes()
    assert wanted in {x for x, _ in content(load_data(str(root)), "test")}


def tiff(path, data, size, bits, **tags):
    """A file of one strip, by hand: Pillow writes neither 12 bits nor grey that was multiplied by its opacity."""
    entries = {256: size[0], 257: size[1], 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: size[1], 279: len(data)}
    entries |= {int(tag.removeprefix("t")): value for tag, value in tags.items()}
    body = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries))
    for tag, value in sorted(entries.items()):
        if isinstance(value, int):
            body += struct.pack("<HHIHH", tag, 3, 1, value, 0)
        else:
            body += struct.pack("<HHIHH", tag, 3, 2, *value)
    path.write_bytes(body + bytes(4))


@pytest.mark.parametrize(("bits", "data"), [(12, "000400800fff"), (16, "00000040" + "0080ffff")])
def test_a_tiff_says_how_many_bits_its_pixels_have(tmp_path, bits, data):
    """Pillow opens those of 12 bits as of 16."""
    tiff(tmp_path / "a.tif", bytes.fromhex(data), (4, 1), bits)
    assert Image.open(tmp_path / "a.tif").mode == "I;16"
    assert read_image(str(tmp_path / "a.tif"))[0].tolist() == [[0, 64, 128, 255]]


def test_grey_that_was_multiplied_by_its_opacity_is_read(tmp_path):
    tiff(tmp_path / "a.tif", bytes([50, 128] * 16), (4, 4), (8, 8), t277=2, t338=1)
    assert Image.open(tmp_path / "a.tif").mode == "La"
    check_image(str(tmp_path / "a.tif"))
    (value,) = read_image(str(tmp_path / "a.tif")).unique().tolist()
    assert value == pytest.approx(50 * 255 / 128, abs=1)


def test_what_cannot_become_rgb_fails_the_check(tmp_path, monkeypatch, save_image):
    save_image(tmp_path / "a.png", 1)
    monkeypatch.setattr(Image.Image, "convert", lambda self, mode: (_ for _ in ()).throw(ValueError("not supported")))
    with pytest.raises(UnreadableImage, match=r"a\.png cannot be read: not supported"):
        check_image(str(tmp_path / "a.png"))


def test_a_named_pipe_is_not_waited_for(make_folder):
    root = make_folder()
    os.mkfifo(root / "train" / "ant" / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png cannot be read: no regular file"):
        load_data(str(root))
    with pytest.warns(UserWarning, match="1 of 43 images are left out"):
        assert load_data(str(root), unreadable="skip").size("train") == 27


@pytest.mark.parametrize("kind", ["image_folder", "imagenet"])
def test_what_is_read_is_shown(make_folder, kind):
    root, seen = make_folder(), []

    def shown(what, parts, count):
        parts = list(parts)
        seen.append((what, len(parts), count))
        return parts

    for _ in range(2):
        load_data(kind, root, shown=shown)
    kept = {"image_folder": "reading images", "imagenet": "checking images"}[kind]
    assert seen == [("hashing images", 42, 42), (kept, 42, 42), ("hashing images", 42, 42)]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_known_range_are_refused(make_folder, dtype):
    root = make_folder()
    odd = next((root / "train").rglob("*.png"))
    odd.unlink()
    Image.fromarray(np.ones((8, 8), dtype)).save(odd.with_suffix(".tif"))
    with pytest.raises(
        UserError, match=r"\.tif cannot be read: its pixels are (floats|integers of no known range): convert"
    ):
        load_data(str(root))


@pytest.mark.parametrize(("mode", "suffix"), [("L", ".jpg"), ("CMYK", ".jpg"), ("P", ".png"), ("RGBA", ".png")])
def test_other_colours_become_rgb(make_folder, save_image, mode, suffix):
    root = make_folder(train=2, test=2)
    odd = root / "test" / "ant" / f"odd{suffix}"
    save_image(odd, 77, mode=mode)
    assert Image.open(odd).mode == mode
    data = load_data(str(root))
    assert isinstance(data, MemoryDataSet) and data.size("test") == 7
    wanted = np.asarray(Image.open(odd).convert("RGB")).transpose(2, 0, 1).tobytes()
    assert wanted in {x for x, y in content(data, "test") if y == 0}


def damage(path, how):
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}[how])


@pytest.mark.parametrize("sizes", [((32, 32),), ((32, 32), (40, 36))], ids=["memory", "files"])
@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
def test_damaged_images(make_folder, sizes, how):
    root = make_folder(sizes=sizes, suffix=".jpg", train=4, test=2)
    bad = root / "train" / "bee" / "001.jpg"
    damage(bad, how)
    for _ in range(2):  # the second time from the cache
        assert str(bad) in refused(root) and "data.unreadable=skip" in refused(root)
        with pytest.warns(UserWarning, match=r"1 of 18 images are left out: .*bee/001.jpg"):
            data = load_data("image_folder", root, unreadable="skip", val_fraction=0.5)
        assert isinstance(data, MemoryDataSet if len(sizes) == 1 else FileDataSet)
        assert data.size("train") + data.size("val") == 11 and data.size("test") == 6
    for path in (root / "train" / "bee").iterdir():
        damage(path, how)
    assert "and 3 more" in refused(root)
    assert "class bee has no image that can be read" in refused(root, unreadable="skip")


def test_a_damaged_image_whose_name_is_not_utf8(make_folder):
    root = make_folder(train=4, test=2)
    Path(os.fsdecode(os.fsencode(root / "train" / "ant") + b"/br\xf6ken.png")).write_text("no image")
    for _ in range(2):  # the second time from the cache
        assert "ken.png" in refused(root)
        with pytest.warns(UserWarning, match="1 of 19 images are left out"):
            load_data("image_folder", root, unreadable="skip")


def test_hidden_folders_hold_no_images(make_folder):
    root = make_folder(train=4, test=2)
    shutil.copytree(root / "train" / "ant", root / "train" / "ant" / ".ipynb_checkpoints")
    shutil.copytree(root / "train" / "ant", root / "train" / "ant" / "deeper")
    data = load_data("image_folder", root, val_fraction=0)
    assert data.size("train") == 16


def test_a_disk_that_failed_once_is_not_remembered(make_folder, monkeypatch):
    root = make_folder()
    real = contents.read_image

    def failing(path):
        if path.endswith("train/ant/000.png"):
            raise contents.UnreadableImage(f"{path} cannot be read: Input/output error")
        return real(path)

    with monkeypatch.context() as patched:
        patched.setattr(contents, "read_image", failing)
        assert "Input/output error" in refused(root)
    assert load_data(str(root)).size("train") == 27


def decodings(monkeypatch):
    """A list that grows by the path of every image decoded into memory."""
    seen, real = [], contents.read_image
    monkeypatch.setattr(contents, "read_image", lambda path: seen.append(path) or real(path))
    return seen


def test_images_are_decoded_once(make_folder, monkeypatch, own_cache):
    root, seen = make_folder(), decodings(monkeypatch)
    first = load_data(str(root))
    assert len(seen) == 42 and len(list(own_cache.iterdir())) == 1
    second = load_data(str(root))
    assert len(seen) == 42
    assert first.fingerprint() == second.fingerprint() and content(first) == content(second)


def test_the_cache_may_lie_elsewhere(make_folder, own_cache, tmp_path):
    load_data(str(make_folder()), cache=tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) and not own_cache.exists()


def test_without_a_home_a_folder_for_the_cache_is_asked_for(make_folder, monkeypatch):
    def no_home(_cls):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", classmethod(no_home))
    assert "name one with XDG_CACHE_HOME" in refused(make_folder(train=4, test=4))


@pytest.mark.parametrize("how", ["cut", "flipped", "nonsense", "folder"])
def test_a_damaged_cache_is_made_again(make_folder, monkeypatch, own_cache, how):
    root, seen = make_folder(), decodings(monkeypatch)
    first = load_data(str(root))
    (kept,) = own_cache.iterdir()
    whole = kept.read_bytes()
    if how == "folder":
        kept.unlink()
        (kept / "inside").mkdir(parents=True)
    else:
        # One bit of a pixel: still a valid safetensors file.
        flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
        kept.write_bytes({"cut": whole[:-9], "flipped": flipped, "nonsense": b"nonsense"}[how])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        second = load_data(str(root))
    assert len(seen) == 84 and content(first) == content(second)
    if how == "folder":
        assert any("not kept for the next time in" in str(warning.message) for warning in told)
    else:
        load_data(str(root))
        assert len(seen) == 84


def test_changed_content_is_decoded_again(make_folder, save_image, monkeypatch):
    root, seen = make_folder(suffix=".bmp"), decodings(monkeypatch)
    first = load_data(str(root))
    path = root / "train" / "ant" / "000.bmp"
    before = path.stat()
    save_image(path, 1234)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    second = load_data(str(root))
    assert len(seen) == 84 and first.fingerprint() != second.fingerprint()


def test_hashes_of_a_large_folder_are_remembered_by_size_and_times(make_folder, save_image, monkeypatch):
    monkeypatch.setattr(contents, "_MOST_BYTES_HASHED_EVERY_TIME", 0)
    hashed, real = [], contents.Contents._hashed
    monkeypatch.setattr(contents.Contents, "_hashed", lambda self, paths: hashed.append(paths) or real(self, paths))
    root = make_folder(suffix=".bmp")
    first = load_data(str(root))
    load_data(str(root))
    assert [len(paths) for paths in hashed] == [42]
    path = root / "train" / "ant" / "000.bmp"
    before = path.stat()
    save_image(path, 1234)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = load_data(str(root))
    assert hashed[1:] == [[str(path)]] and first.fingerprint() != second.fingerprint()


def test_a_file_that_could_not_be_hashed_once_is_hashed_again(make_folder, monkeypatch):
    monkeypatch.setattr(contents, "_MOST_BYTES_HASHED_EVERY_TIME", 0)
    root, real, hashed = make_folder(), contents.Contents._hashed, []

    def digests(self, paths):
        found = real(self, paths)
        if not hashed:
            found[-1] = 0
        hashed.append(paths)
        return found

    monkeypatch.setattr(contents.Contents, "_hashed", digests)
    for _ in range(3):
        load_data(str(root))
    assert hashed[1:] == [hashed[0][-1:]]


def test_more_than_memory_takes_stays_in_files(make_folder, monkeypatch):
    root = make_folder()
    monkeypatch.setattr(contents, "_MOST_BYTES_IN_MEMORY", 42 * 3 * 8 * 8)
    assert isinstance(load_data(str(root), cache=root / "a"), MemoryDataSet)
    monkeypatch.setattr(contents, "_MOST_BYTES_IN_MEMORY", 42 * 3 * 8 * 8 - 1)
    assert isinstance(load_data(str(root), cache=root / "b"), FileDataSet)


def test_a_link_to_a_folder_above_is_not_followed_round_and_round(make_folder):
    root = make_folder(train=3, test=2)
    (root / "train" / "ant" / "loop").symlink_to(root / "train" / "ant", target_is_directory=True)
    assert load_data("image_folder", root, val_fraction=0).size("train") == 9


def test_a_class_whose_name_is_not_utf8_is_refused_before_it_is_trained_on(make_folder):
    root = make_folder(train=2, test=2)
    for split in ("train", "test"):
        (root / split / "ant").rename(os.fsdecode(os.fsencode(root / split) + b"/\xff"))
    assert "is not UTF-8: rename it" in refused(root)


def test_places_that_cannot_be(make_folder):
    with pytest.raises(UserError, match="no data set is named"):
        load_data("x" * 300)
    with pytest.raises(UserError, match="no such user's home"):
        load_data("image_folder", "~nobody-of-this-name/x")


def test_val_may_not_take_all_training_images(make_folder):
    data = load_data(str(make_folder(train=1, test=1)), val_fraction=0.9)
    assert data.size("train") == 0 < data.size("val")
    with pytest.raises(UserError, match=r"no training images left beside those of val: lower data\.val_fraction"):
        data.sample(1)
