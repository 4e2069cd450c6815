"""What a result depends on beside its configuration and its data."""

import functools
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from bitswitch import files
from bitswitch.version import __version__


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, the kind of device and the number of threads, as plain JSON values."""
    device = device or torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (platform.machine() or "unknown")
    return {
        "bitswitch": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
    }


@functools.cache
def source_digest() -> str:
    """Of all that this package computes with: another wherever its code is."""
    folder = Path(__file__).parent
    return files.digest(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py"))))


def source_commit() -> str | None:
    """The commit of the checkout that this package runs from, marked where files differ; None outside of one."""
    own = Path(__file__)
    # The second fails where this file is none of the repository's, as in an environment inside of somebody else's.
    asked = (["describe", "--always", "--abbrev=40", "--dirty=+changes"], ["ls-files", "--error-unmatch", own.name])
    try:
        told = [
            subprocess.run(
                ["git", "-C", str(own.parent), *words], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for words in asked
        ]
        return told[0] or None
    except (OSError, subprocess.SubprocessError):
        return None
