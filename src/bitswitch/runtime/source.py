"""What a session reads of an artifact: the one place that knows how its file is laid out."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitswitch import artifact
from bitswitch.artifact import Header
from bitswitch.errors import UserError
from bitswitch.runtime.bindings import Bindings
from bitswitch.runtime.constants import Arrays, may_saturate, values
from bitswitch.runtime.executable import KEY, Executable, fused_operations
from bitswitch.runtime.protobuf import metadata

GRAPH = "graph"


@dataclass(frozen=True)
class Source:
    """An artifact's integers and parameters, its graph, and what the graph leaves open.

    Attributes:
        header: of the artifact.
        tensors: by name.
        graph: ONNX without numbers.
        bindings: the numbers that it wants.
    """

    header: Header
    tensors: Mapping[str, np.ndarray]
    graph: bytes
    bindings: Bindings

    @property
    def nbytes(self) -> int:
        """Bytes of tensors and graph."""
        return sum(tensor.nbytes for tensor in self.tensors.values()) + len(self.graph)

    def arrays(self, assignment: Mapping[str, int]) -> Arrays:
        """The graph's constants at an assignment, by name."""
        return values(self.bindings, self.header, self.tensors, assignment)

    def executable(self, assignment: Mapping[str, int], *, threads: int = 0, profile: bool = False) -> Executable:
        """The graph at an assignment, ready to run."""
        arrays = self.arrays(assignment)
        saturates = may_saturate(self.bindings, self.header, arrays, assignment)
        return Executable(self.graph, arrays, may_saturate=saturates, threads=threads, profile=profile)

    def operations(self, assignment: Mapping[str, int]) -> Counter[str]:
        """How many operations of each type the graph has at an assignment when it is ready to run."""
        arrays = self.arrays(assignment)
        saturates = may_saturate(self.bindings, self.header, arrays, assignment)
        return fused_operations(self.graph, arrays, may_saturate=saturates)


def read(path: str | Path) -> Source:
    """Read an artifact.

    Raises:
        UserError: there is no such file, it is not an unaltered artifact that this package reads, or it holds no graph.
    """
    header, tensors = artifact.read(path)
    if GRAPH not in tensors:
        raise UserError(
            f"{path} holds no graph to run: where torch is, `bitswitch export {path}` adds it, or "
            "bitswitch.save(..., example_inputs=x)"
        )
    graph = tensors.pop(GRAPH).tobytes()
    try:
        bindings = Bindings.from_text(metadata(graph)[KEY])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be used: its graph is damaged or of another version; save it again") from error
    return Source(header, tensors, graph, bindings)
