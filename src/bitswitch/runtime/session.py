"""`Session`: an artifact that runs and switches its widths without torch."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitswitch.assignment import Assignment
from bitswitch.errors import UserError, check_number
from bitswitch.runtime.executable import Executable
from bitswitch.runtime.source import read

# ONNX Runtime has a pool of threads and an arena for each executable, of whose size it says nothing.
_MOST_KEPT = 32
# It starts as many as it is told.
_MOST_THREADS = 1024


@dataclass(frozen=True)
class _Ready:
    """An executable and the widths that it has."""

    assignment: Assignment
    executable: Executable


class Session:
    """A network that runs in ONNX Runtime's integer kernels at any width, or at a width for every layer.

    The executable of an assignment is built when it is first asked for, and kept while the memory budget allows; between
    those that are kept, `switch` only sets a reference. Any number of threads may `run` while another switches: a run that has
    begun ends at the widths it began with.

    Args:
        path: an artifact that holds its graph (`bitswitch.save(..., example_inputs=x)`), or the name of one that comes with
            the package. It may be cut off: then it runs at the widths that it holds.
        bits: the width to stand at; the highest where neither this nor `assignment` is given.
        assignment: widths by layer name; the other layers have the highest. Or a budget such as "avg<=4", for the best choice
            that a search wrote into the file.
        memory: bytes that the executables kept may take together, as the property `memory` counts them; the one in use is
            always kept. No more than 32 are kept at a time, since each has threads and buffers of its own.
        threads: how many threads one operation may use; 0: as many as there are cores.

    Raises:
        UserError: the file cannot be used or holds no graph, it has no such width, layer or choice, or an argument is no number
            of its kind.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        bits: int | None = None,
        assignment: Mapping[str, int] | str | None = None,
        memory: float = 2**30,
        threads: int = 0,
    ) -> None:
        if bits is not None and assignment is not None:
            raise UserError("give bits= or assignment=, not both")
        check_number("threads", threads)
        if threads not in range(_MOST_THREADS + 1):
            raise UserError(f"threads={threads!r}: give a whole number up to {_MOST_THREADS}; 0 takes all cores")
        check_number("memory", memory)
        self._source = read(path)
        self._threads = int(threads)
        self._budget = memory
        self._uniform = {width: self._source.assignment(width) for width in self._source.widths}
        self._kept: OrderedDict[Assignment, _Ready] = OrderedDict()
        self._lock = threading.Lock()
        wanted = assignment if bits is None else bits
        start = self._source.assignment(self._source.widths[0] if wanted is None else wanted)
        # One reference, read once by a run, set once by a switch: no thread ever sees half a switch.
        self._current = self._ready(start)

    def run(self, *inputs: np.ndarray) -> np.ndarray | tuple[np.ndarray, ...]:
        """The network's output; a tuple of arrays where it has several, those of a dictionary in its order.

        NaN is not looked for: a quantizer of bytes makes a number of it, so that results can be finite where torch's are NaN.

        Args:
            inputs: what the network takes: for an image network one float32 array [N, C, H, W], normalised; N is free, other
                sizes are those of the example inputs that the graph was made with.

        Raises:
            UserError: the inputs do not fit the network.
        """
        outputs = self._current.executable.run(inputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def switch(self, wanted: int | Mapping[str, int] | str) -> None:
        """Run at other widths from now on; what is running ends as it began.

        Args:
            wanted: one width for every layer; widths for some layers by name, laid over those in use; or a budget such as
                "avg<=4", for the best choice that a search wrote into the file.

        Raises:
            UserError: there is no such width, layer or choice; nothing has changed.
        """
        with self._lock:
            assignment = self._uniform.get(wanted) if isinstance(wanted, (int, np.integer)) else None
            if assignment is None:
                assignment = self._source.assignment(wanted, self.assignment.to_json())
            self._current = self._ready(assignment)

    @property
    def assignment(self) -> Assignment:
        """The width of every layer that is in use."""
        return self._current.assignment

    @property
    def bits(self) -> int | None:
        """The width in use, or None where layers differ."""
        return self.assignment.uniform

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that every layer can have, highest first; of a file that is cut off, those whose planes it holds."""
        return self._source.widths

    @property
    def additions(self) -> str:
        """How branches are added: "requantized" to 8 bits, or "exact", as floats."""
        return self._source.bindings.additions

    @property
    def ready(self) -> tuple[Assignment, ...]:
        """The assignments that are kept, the one used longest ago first."""
        with self._lock:
            return tuple(self._kept)

    @property
    def memory(self) -> int:
        """Bytes of the weights and parameters of the executables that are kept, and of the artifact they are made from.

        ONNX Runtime packs weights anew for its kernels and has buffers for activations; those are not counted.
        """
        with self._lock:
            return self._source.nbytes + self._kept_bytes()

    def _kept_bytes(self) -> int:
        return sum(ready.executable.nbytes for ready in self._kept.values())

    def _ready(self, assignment: Assignment) -> _Ready:
        """The executable of an assignment, built where it is not kept; the oldest go when the budget is spent."""
        ready = self._kept.get(assignment)
        if ready is None:
            ready = _Ready(assignment, self._source.executable(assignment.to_json(), threads=self._threads))
            self._kept[assignment] = ready
        self._kept.move_to_end(assignment)
        while len(self._kept) > 1 and (len(self._kept) > _MOST_KEPT or self._kept_bytes() > self._budget):
            self._kept.popitem(last=False)
        return ready
