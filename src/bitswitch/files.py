"""Files that are written whole or not at all."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any

from bitswitch.errors import UserError

TEMPORARY_SUFFIX = ".partial"
# A Path has made one slash of two. Of one letter it is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def write(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`: a temporary file beside it, flushed to the disk, then renamed over it.

    Whatever goes wrong, the earlier file is whole; a temporary file is left only where the process was killed. Of a symbolic
    link the file that it leads to is written. Who may read an earlier file may read the new one: its
    owner, group and mode are kept as far as this user may set them.

    Raises:
        UserError: the file cannot be written (full disk, no permission, no such folder), or is a URL, a device or a pipe.
    """
    if _URL.match(str(path)):
        raise UserError(f"cannot write {path}: a URL is read, not written; give a file of this machine")
    path, temporary = Path(path), None
    try:
        if path.is_symlink():
            path = path.resolve()
        # A part of the name, so that a name as long as the file system takes can be written to.
        beside = path.with_name(f".{path.name[:48]}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = path.stat() if path.exists() else None
        if earlier is not None and not (stat.S_ISREG(earlier.st_mode) or stat.S_ISDIR(earlier.st_mode)):
            raise OSError("it is a device or a pipe, which a file would replace")
        with beside.open("xb") as stream:
            temporary = beside
            if earlier is not None:
                # Before anything is in it. Some file systems have no modes to change, and not everybody may give files away.
                for owner, group in ((-1, earlier.st_gid), (earlier.st_uid, -1)):
                    with contextlib.suppress(OSError, AttributeError):
                        os.chown(temporary, owner, group)
                with contextlib.suppress(OSError):
                    temporary.chmod(stat.S_IMODE(earlier.st_mode))
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except (OSError, ValueError, RuntimeError) as error:
        # The latter two of names that can be no file's, and of links in a circle.
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; what was there before is as it was") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def is_file(path: Path) -> bool:
    """Whether there is such a file that may be looked at; a name that is too long for one is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether there is such a folder that may be looked at; as `is_file`."""
    try:
        return path.is_dir()
    except OSError:
        return False


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """The value of a JSON file.

    Raises:
        UserError: there is no such file, it cannot be read, or it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error})") from error


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def digest(content: bytes | memoryview) -> str:
    """The SHA-256 of `content` in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file in hexadecimal, read in blocks."""
    hasher = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()
