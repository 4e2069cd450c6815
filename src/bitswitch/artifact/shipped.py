"""Trained artifacts that come with the package, by name; the README.md beside them says what they are."""

from pathlib import Path

_FOLDER = Path(__file__).parent.parent / "shipped"
_SUFFIX = ".safetensors"


def shipped() -> list[str]:
    """The names."""
    return sorted(path.stem for path in _FOLDER.glob(f"*{_SUFFIX}"))


def located(path: str | Path) -> Path:
    """The file of a shipped artifact where `path` is its name and no file of that name is here; else `path`."""
    found = _FOLDER / f"{path}{_SUFFIX}"
    return found if str(path) in shipped() and not Path(path).is_file() else Path(path)
