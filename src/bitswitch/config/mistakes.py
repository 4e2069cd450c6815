"""What is wrong with a recipe, in one line."""

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import ValidationError

from bitswitch.config.schema import Recipe
from bitswitch.errors import nearest

_SHOULD = "Input should be "
_PARTS = ("model", "data", "pretrain", "train", "sensitivity", "supernet", "search")


def first_mistake(error: ValidationError, value: Any) -> str:
    """The first thing that is wrong, in one line."""
    found = [(_location(one["loc"], value, one["type"] == "missing"), one) for one in error.errors()]
    # Of alternatives, the one that fits furthest is likely the one that was meant.
    start = found[0][0]
    location, first = max((one for one in found if one[0][: len(start)] == start), key=lambda one: len(one[0]))
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        elsewhere = [f"{part}.{key}" for part in _PARTS if key in _known_keys([part])]
        near = nearest(location[-1], known).replace("'", f"'{key.removesuffix(location[-1])}", 1)
        hint = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else near
        return f"unknown key {key!r}{hint}; known here: {', '.join(known)}"
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    if first["type"] == "model_type":
        return f"{key}={first['input']!r}: give its keys, such as {key}.{_known_keys(location)[0]}=..."
    same = [one["msg"] for at, one in found if at == location]
    message = first["msg"].removeprefix("Value error, ")
    if len(same) > 1 and all(one.startswith(_SHOULD) for one in same):
        message = _SHOULD + " or ".join(
            dict.fromkeys(one.removeprefix(_SHOULD).partition(", unable")[0] for one in same)
        )
    message = message.replace("valid tuple", "list, such as [a, b]")
    if not key:
        return message
    if first["type"] == "string_type" and not isinstance(first["input"], list | dict):
        told = "" if isinstance(first["input"], bool | None) else f", {key}=\"'{first['input']}'\""
        message += f": quote it{told}"
    return f"{key}={first['input']!r}: {message[0].lower()}{message[1:]}" if key != "bits" else message


def _location(parts: Sequence[str | int], value: Any, missing: bool) -> list[str]:
    """The keys that lead to what is wrong or missing, without the names of alternatives of a union, which no user wrote."""
    keys = []
    for i, part in enumerate(parts):
        if isinstance(value, dict) and (part in value or (missing and i == len(parts) - 1)):
            keys.append(str(part))
            value = value.get(part)
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            value = value[part]
    return keys


def _known_keys(location: Sequence[str]) -> list[str]:
    part: Any = Recipe
    for name in location:
        annotation = part.model_fields[name].annotation
        # A part that may be left out is a union with None.
        part = next((one for one in get_args(annotation) if hasattr(one, "model_fields")), annotation)
    return list(part.model_fields)
