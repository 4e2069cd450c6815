"""Folders of images: one folder for each class, and what is in them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitswitch import files
from bitswitch.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Listing:
    """The images of a folder.

    Attributes:
        root: the folder.
        classes: sorted names; a label is an index into them.
        names: of the files below `root`, the training images first, both splits in the order of their classes.
        labels: of the files.
        train: how many of them are training images.
    """

    root: Path
    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]
    train: int

    @property
    def paths(self) -> list[str]:
        """Where the files lie."""
        return [str(self.root / name) for name in self.names]


def list_images(root: Path) -> Listing:
    """The images of a folder with train/ and test/ or val/, or of class folders alone, which are test.

    Of test/ and val/, the first that has folders in it is test. A train/ without folders in it, with other folders and none of
    the two beside it, is a class of that name, as CIFAR-100 has one.

    Raises:
        UserError: no such folder, one that cannot be listed, no images, an empty class, or classes that differ between train
            and test.
    """
    if not files.is_folder(root):
        raise UserError(f"there is no folder {root}, or it may not be looked at: name the one that holds the images")
    train, test = _split_folders(root)
    classes, tested = _classes(test)
    trained: list[tuple[str, int]] = []
    if train is not None:
        train_classes, trained = _classes(train)
        _same_classes(train, train_classes, test, classes)
    found = trained + tested
    names = tuple(Path(path).relative_to(root).as_posix() for path, _ in found)
    return Listing(root, classes, names, tuple(label for _, label in found), len(trained))


def _split_folders(root: Path) -> tuple[Path | None, Path]:
    present = {name: root / name for name in ("train", "test", "val") if files.is_folder(root / name)}
    if list(present) == ["train"] and not _inside(present["train"]) and len(_inside(root)) > 1:
        return None, root
    held_out = [present[name] for name in ("test", "val") if name in present]
    if "train" in present and not held_out:
        raise UserError(f"{root} has train/ but no test/ or val/ beside it: there is nothing to evaluate on")
    # Images without classes in test/, as of a competition, are not to hide those of val/.
    if len(held_out) > 1 and not _inside(held_out[0]):
        held_out.reverse()
    return present.get("train"), held_out[0] if held_out else root


def _inside(folder: Path) -> list[str]:
    """The folders in a folder, sorted by name, but those that other programs leave behind."""
    try:
        return sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}") from error


def _classes(folder: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """The classes of a split and its (path, label) pairs."""
    classes = tuple(_inside(folder))
    for name in classes:
        if not name.isascii() and name.encode(errors="replace").decode() != name:
            raise UserError(f"{folder}: the name of the class {name!r} is not UTF-8: rename it")
    if not classes:
        raise UserError(f"{folder} has no folders of images in it: it needs one for each class")
    found = []
    for label, name in enumerate(classes):
        inside = _images_below(folder / name)
        if not inside:
            raise UserError(f"the class folder {folder / name} holds no images: fill it or remove it")
        found += [(path, label) for path in inside]
    return classes, found


def _images_below(folder: Path) -> list[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}") from error

    found = []
    visited = set()
    for place, inside, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(place)  # noqa: PTH116 (as below)
        if (status.st_dev, status.st_ino) in visited:
            # A link to what was walked through already, perhaps to the folder that it lies in.
            inside.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        # A leading dot marks what other programs leave behind, such as ._x.jpg and .ipynb_checkpoints.
        inside[:] = [name for name in inside if not name.startswith(".")]
        found += [
            os.path.join(place, name)  # noqa: PTH118 (Path is slow for a million files)
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(found)


def _same_classes(train: Path, trained: Sequence[str], test: Path, tested: Sequence[str]) -> None:
    differ = []
    for place, more, less in ((train, trained, tested), (test, tested, trained)):
        only = sorted(set(more) - set(less))
        if only:
            listed = ", ".join(only[:3]) + (f" and {len(only) - 3} more" if len(only) > 3 else "")
            differ.append(f"only {place} has {listed}")
    if differ:
        raise UserError(f"{train} and {test} hold different classes: {'; '.join(differ)}")
