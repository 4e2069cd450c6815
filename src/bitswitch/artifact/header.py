"""What an artifact says of itself: a JSON document in the metadata of the safetensors file."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bitswitch import codes, files
from bitswitch.artifact.container import MOST_DIMENSIONS, MOST_SIZE, is_finite, strict_json
from bitswitch.artifact.frontier import check_choice
from bitswitch.artifact.source import Damaged

VERSION = 2
KEY = "bitswitch"
_NO_DIGEST = "0" * 64
_DIGEST = re.compile("[0-9a-f]{64}")


def tensor_name(module: str, key: str) -> str:
    """The name of a module's tensor; the root module's have no prefix."""
    return f"{module}.{key}" if module else key


@dataclass(frozen=True, kw_only=True)
class LayerEntry:
    """A quantized layer.

    Attributes:
        name: of the layer in the network.
        shape: of its weight.
        bits: width of the stored codes.
        input: kind of its input's quantizer: "unsigned", "signed" or "zero_point".
        squared_error: {width: ||W_l(width) - W_l||^2}, W_l the float weights that training ended with.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    input: str
    squared_error: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Header:
    """All that is not a tensor.

    Attributes:
        widths: candidate widths, highest first.
        layers: in the order in which they run.
        norms: {batch normalization: the layer whose width it follows}.
        before: {batch normalization: the layer before the one that it follows, or None}.
        transitional: batch normalizations are stacked over the pairs of widths (before, here), not over the widths here.
        per_channel: one weight scale per output channel.
        frontier: the best mixed assignments, each {"assignment": {layer: bits}, "cost": {name: number}, "damage": number,
            "top1": per cent of val, or None}.
        network: {"name": ..., "args": {...}}, or None where the network is the user's own and was not named.
        preprocessing: {"shape": [C, H, W], "mean": [...], "std": [...], "resize": ..., "crop": ...}, or None.
        classes: names in the order of the logits, or None.
        provenance: how the file came about: recipe, seed, versions, accuracies.
        checksums: {tensor of the file: see `file.checksum`}.
    """

    widths: tuple[int, ...]
    layers: tuple[LayerEntry, ...]
    norms: Mapping[str, str]
    before: Mapping[str, str | None]
    transitional: bool
    per_channel: bool
    frontier: tuple[Mapping[str, Any], ...]
    network: Mapping[str, Any] | None
    preprocessing: Mapping[str, Any] | None
    classes: tuple[str, ...] | None
    provenance: Mapping[str, Any]
    checksums: Mapping[str, str]

    def norm_row(self, norm: str, assignment: Mapping[str, int]) -> int:
        """The row in use of the tensors of a batch normalization.

        Rows are in the order of `widths`; of pairs, the width before varies slowest.
        """
        here, before = self.norms[norm], self.before[norm]
        row = self.widths.index(assignment[here])
        if not self.transitional or before is None or before == here:
            return row
        return self.widths.index(assignment[before]) * len(self.widths) + row

    def to_text(self) -> str:
        """Canonical JSON, its digest in it."""
        value = asdict(self) | {"version": VERSION}
        for layer in value["layers"]:
            layer["squared_error"] = {str(width): error for width, error in layer["squared_error"].items()}
        return sealed(value)

    @classmethod
    def from_text(cls, text: str) -> "Header":
        """The inverse of `to_text`.

        Raises:
            Damaged: it is not a header of a version that this package reads, or it is altered.
        """
        try:
            value = strict_json(text)
            version = value.pop("version")
        except (ValueError, KeyError) as error:
            raise Damaged(f"its header is not one of bitswitch ({error})") from error
        if type(version) is not int or version != VERSION:
            raise Damaged(
                f"it is of format version {version!r}, this bitswitch reads version {VERSION}", "upgrade bitswitch"
            )
        try:
            digest = value.pop("digest")
            # Half a surrogate pair, escaped, would pass here and could not be written again.
            files.canonical_json(value).encode()
            if not _DIGEST.fullmatch(digest) or files.digest(text.replace(digest, _NO_DIGEST).encode()) != digest:
                raise ValueError("it is altered (its digest differs)")
            return cls._checked(value)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise Damaged(f"its header is damaged: {error}") from error

    @classmethod
    def _checked(cls, value: dict[str, Any]) -> "Header":
        widths = codes.check_widths(value["widths"])
        layers = tuple(_layer(entry, widths) for entry in value["layers"])
        names = [layer.name for layer in layers]
        if not layers or len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
            raise ValueError("no layers, or one without a name, or listed twice")
        if not set(value["norms"].values()) <= set(names):
            raise ValueError("a batch normalization follows no listed layer")
        if set(value["before"]) != set(value["norms"]) or not set(value["before"].values()) <= {None, *names}:
            raise ValueError("a batch normalization has no listed layer before it")
        for key in ("network", "preprocessing", "provenance", "checksums"):
            if not isinstance(value[key], dict) and not (value[key] is None and key in ("network", "preprocessing")):
                raise ValueError(f"{key} is not an object")
        if not all(isinstance(value[key], bool) for key in ("per_channel", "transitional")):
            raise ValueError("per_channel or transitional is neither true nor false")
        network = value["network"]
        if network is not None and not (isinstance(network["name"], str) and isinstance(network["args"], dict)):
            raise ValueError("the network has no name and arguments")
        classes = value["classes"]
        if classes is not None:
            # Numbers for names are what `save` took once.
            if type(classes) is not list or not all(type(name) in (str, int) for name in classes):
                raise ValueError("classes is no list of names")
            classes = tuple(map(str, classes))
        known = dict.fromkeys(names)
        frontier = tuple(check_choice(choice, known, widths) for choice in value["frontier"])
        return cls(**value | {"widths": widths, "layers": layers, "classes": classes, "frontier": frontier})


def sealed(value: Mapping[str, Any]) -> str:
    """The text of a header: canonical JSON with a digest, the SHA-256 of this very text with zeros for the digest."""
    digest = files.digest(files.canonical_json({**value, "digest": _NO_DIGEST}).encode())
    return files.canonical_json({**value, "digest": digest})


def _layer(entry: dict[str, Any], widths: tuple[int, ...]) -> LayerEntry:
    shape = tuple(entry["shape"])
    if not 0 < len(shape) <= MOST_DIMENSIONS or not all(type(size) is int and 0 < size < MOST_SIZE for size in shape):
        raise ValueError(f"layer {entry['name']!r} has the shape {shape}")
    if (
        type(entry["bits"]) is not int
        or entry["bits"] != widths[0]
        or entry["input"] not in ("unsigned", "signed", "zero_point")
    ):
        raise ValueError(f"layer {entry['name']!r} has {entry['bits']!r} bits and input {entry['input']!r}")
    errors = {width: entry["squared_error"].get(str(width)) for width in widths}
    if len(errors) != len(entry["squared_error"]) or not all(is_finite(one) and one >= 0 for one in errors.values()):
        raise ValueError(f"layer {entry['name']!r} lacks the squared error of a width")
    return LayerEntry(**entry | {"shape": shape, "squared_error": errors})
