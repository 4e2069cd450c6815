"""What a session reads of an artifact: the one place that knows how its file is laid out."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitswitch import artifact
from bitswitch.artifact import GRAPH, Header, within_budget
from bitswitch.assignment import Assignment
from bitswitch.errors import UserError
from bitswitch.runtime.bindings import Bindings
from bitswitch.runtime.constants import Arrays, may_saturate, values
from bitswitch.runtime.executable import KEY, Executable, adds_exactly, fused_operations
from bitswitch.runtime.packing import unpacked
from bitswitch.runtime.protobuf import external_tensors, metadata


@dataclass(frozen=True)
class Source:
    """An artifact's integers and parameters, its graph, and what the graph leaves open.

    Attributes:
        path: of the artifact.
        widths: those whose planes it holds, highest first: all of its header's, but where it is cut off.
        header: of the artifact.
        tensors: by name.
        graph: ONNX without numbers.
        bindings: the numbers that it wants.
    """

    path: str
    widths: tuple[int, ...]
    header: Header
    tensors: Mapping[str, np.ndarray]
    graph: bytes
    bindings: Bindings

    @property
    def nbytes(self) -> int:
        """Bytes of tensors and graph."""
        return sum(tensor.nbytes for tensor in self.tensors.values()) + len(self.graph)

    def assignment(self, wanted: int | Mapping[str, int] | str, over: Mapping[str, int] | None = None) -> Assignment:
        """The width of every layer that results when `wanted` is laid over `over`.

        Args:
            wanted: a width; widths by layer; a budget such as "avg<=4".
            over: widths of all layers; the highest that is held where None.

        Raises:
            UserError: there is no such width, layer or choice, or the file is cut off before it.
        """
        if isinstance(wanted, str):
            wanted = dict(within_budget(self.header.frontier, wanted, self.widths[0])["assignment"])
        candidates = {layer.name: self.header.widths for layer in self.header.layers}
        over = over or dict.fromkeys(candidates, self.widths[0])
        found = Assignment.of(wanted, layers=over, widths=candidates)
        highest = max(found.values())
        if highest > self.widths[0]:
            raise UserError(
                f"{self.path} is cut off before {highest} bits: it serves {self.widths[0]} bits at most; fetch the rest"
            )
        return found

    def arrays(self, assignment: Mapping[str, int]) -> Arrays:
        """The graph's constants at an assignment, by name."""
        return values(self.bindings, self.header, self.tensors, assignment, saturating=adds_exactly())

    def may_saturate(self, arrays: Arrays, assignment: Mapping[str, int]) -> bool:
        """Whether sums of two products can exceed 16 bits with these constants; see `constants.may_saturate`."""
        return may_saturate(self.bindings, self.header, arrays, assignment)

    def executable(self, assignment: Mapping[str, int], *, threads: int = 0) -> Executable:
        """The graph at an assignment, ready to run.

        Raises:
            UserError: ONNX Runtime does not open the graph.
        """
        arrays = self.arrays(assignment)
        with self._opening():
            return Executable(self.graph, arrays, may_saturate=self.may_saturate(arrays, assignment), threads=threads)

    def operations(self, assignment: Mapping[str, int]) -> Counter[str]:
        """How many operations of each type the graph has at an assignment when it is ready to run.

        Raises:
            UserError: ONNX Runtime does not open the graph.
        """
        arrays = self.arrays(assignment)
        with self._opening():
            return fused_operations(self.graph, arrays, may_saturate=self.may_saturate(arrays, assignment))

    @contextmanager
    def _opening(self) -> Iterator[None]:
        try:
            yield
        except (UserError, MemoryError, ImportError):
            raise
        except OSError as error:
            raise UserError(f"{self.path} cannot be run here: {error.strerror or error}") from error
        except Exception as error:
            # ONNX Runtime has a class of its own for every kind of refusal.
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self.path} cannot be run: this ONNX Runtime does not open its graph ({reason}); save it again"
            ) from error


def read(path: str | Path) -> Source:
    """Read an artifact.

    Raises:
        UserError: there is no such file, it is not an unaltered artifact that this package reads, it is cut off before its
            lowest width, or it holds no graph.
    """
    located, tensors, widths = artifact.read_held(path)
    if GRAPH not in tensors:
        raise UserError(
            f"{path} holds no graph to run: where torch is, `bitswitch export {path}` adds it, or "
            "bitswitch.save(..., example_inputs=x)"
        )
    try:
        graph = unpacked(tensors.pop(GRAPH))
        bindings = Bindings.from_text(metadata(graph)[KEY])
        bindings.check(located.header, tensors)
        if strange := {*external_tensors(graph)} - bindings.names():
            # ONNX Runtime would look for its values in files of this machine.
            raise ValueError(f"{min(strange)!r} is not of the artifact")
    except (UserError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} cannot be used: its graph is damaged or of another version; where torch is, "
            f"`bitswitch export {path}` makes it anew"
        ) from error
    return Source(str(path), widths, located.header, tensors, graph, bindings)
