"""Which bit-width each layer has."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bitswitch.errors import UserError, nearest


@dataclass(frozen=True, eq=False)
class Assignment(Mapping[str, int]):
    """A bit-width for every quantized layer, in the order of the network: a frozen value, equal to a dict of the same widths.

    Use `Assignment.of` to make one for a network's layers.
    """

    items_: tuple[tuple[str, int], ...]

    @classmethod
    def of(
        cls, wanted: "int | Mapping[str, int]", *, layers: Mapping[str, int], widths: Mapping[str, tuple[int, ...]]
    ) -> "Assignment":
        """The assignment that results when `wanted` is laid over the widths that `layers` have now.

        Args:
            wanted: one width for every layer, or widths for some layers by name.
            layers: the width of every layer now.
            widths: the widths that every layer can have.

        Raises:
            UserError: a layer has no such name, or a layer does not have the width.
        """
        if isinstance(wanted, Mapping):
            for name in wanted:
                if not isinstance(name, str):
                    raise UserError(f"a {type(name).__name__} is no layer's name: give {{name: bits}}")
                if name not in layers:
                    raise UserError(f"no quantized layer is named {name!r}{nearest(str(name), layers)}")
            merged = {**layers, **wanted}
        elif isinstance(wanted, str):
            raise UserError(f"{wanted!r} is text: give a width as a number, {{layer: bits}}, or a choice's assignment")
        elif hasattr(wanted, "assignment"):
            raise UserError(f"a {type(wanted).__name__} holds more than widths: give its .assignment")
        else:
            merged = dict.fromkeys(layers, wanted)
        for name, width in merged.items():
            if isinstance(width, bool) or not _is_in(width, widths[name]):
                raise UserError(f"layer {name!r} has no width {width!r}; it has {', '.join(map(str, widths[name]))}")
        return cls(tuple((name, int(width)) for name, width in merged.items()))

    def __getitem__(self, name: str) -> int:
        return self._widths[name]

    @cached_property
    def _widths(self) -> dict[str, int]:
        return dict(self.items_)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.items_)

    def __len__(self) -> int:
        return len(self.items_)

    def __hash__(self) -> int:
        return hash(frozenset(self.items_))

    @property
    def uniform(self) -> int | None:
        """The width that every layer has, or None where they differ."""
        found = {width for _, width in self.items_}
        return found.pop() if len(found) == 1 else None

    def to_json(self) -> dict[str, int]:
        """A plain dictionary {layer: width}."""
        return dict(self.items_)

    @classmethod
    def from_json(cls, value: Any) -> "Assignment":
        """The inverse of `to_json`.

        Raises:
            UserError: the value is not a dictionary of widths by layer name.
        """
        if not isinstance(value, dict) or not all(
            isinstance(b, int) and not isinstance(b, bool) for b in value.values()
        ):
            raise UserError("an assignment is a JSON object {layer name: bit-width}")
        return cls(tuple(value.items()))


def _is_in(width: Any, widths: tuple[int, ...]) -> bool:
    try:
        return getattr(width, "ndim", 0) == 0 and width in widths
    except (ValueError, RuntimeError):
        # Of an array or a tensor of several numbers.
        return False
