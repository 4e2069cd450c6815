"""A graph and its numbers, ready to run in ONNX Runtime."""

import base64
import functools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bitswitch.errors import UserError, require
from bitswitch.runtime.constants import Arrays
from bitswitch.runtime.protobuf import operations

# The metadata of a stored graph that holds its bindings.
KEY = "bitswitch"
# ONNX Runtime's name for "unsigned weights on x86 without VNNI": slower there, and exact.
_PRECISION = "session.x64quantprecision"
# Errors are raised, and would be told twice.
_FATAL_ALONE = 4
_DISABLED = [
    # It would move quantizers across poolings, whose kernels are slower for bytes than for floats.
    "QDQPropagationTransformer",
    # It would put channels first, where convolutions have them until they are fused.
    "TransposeOptimizer",
    "TransposeOptimizer_CPUExecutionProvider",
]


class Executable:
    """One assignment's executable. `run` may be called from many threads at once.

    Args:
        graph: ONNX without numbers.
        arrays: the numbers, by name.
        may_saturate: whether the sum of two products can exceed 16 bits.
        threads: how many threads an operation may use; 0: as many as there are cores.
        optimize: False leaves the graph as it is, float operations between quantizers.
        profile: for `profiled`.
    """

    def __init__(
        self,
        graph: bytes,
        arrays: Arrays,
        *,
        may_saturate: bool = True,
        threads: int = 0,
        optimize: bool = True,
        profile: bool = False,
    ) -> None:
        options = _options(threads, precise=_must_be_precise(may_saturate))
        if not optimize:
            options.graph_optimization_level = _onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
        if profile:
            self._folder = TemporaryDirectory()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._folder.name) / "profile")
        self._session = _session(graph, arrays, options)
        self._names = [value.name for value in self._session.get_inputs()]
        # ("tensor(float)", the shape, in which a size that is open is a name)
        self.inputs = [(value.type, tuple(value.shape)) for value in self._session.get_inputs()]
        self.nbytes = sum(array.nbytes for array in arrays.values()) + len(graph)

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """All outputs for these inputs."""
        if len(inputs) != len(self._names):
            raise UserError(f"the network takes {len(self._names)} inputs, not {len(inputs)}")
        for value in inputs:
            if not isinstance(value, np.ndarray):
                raise UserError(f"an input is a {type(value).__name__}: give NumPy arrays, of a tensor its .numpy()")
        # ONNX Runtime reads the bytes of another machine's order as if they were its own.
        native = [value.astype(value.dtype.newbyteorder("="), copy=False) for value in inputs]
        try:
            return self._session.run(None, dict(zip(self._names, native, strict=True)))
        except _state().InvalidArgument as error:
            reason = " ".join(str(error).split("INVALID_ARGUMENT :")[-1].split())
            raise UserError(f"the inputs do not fit the network: {reason[:300]}") from error
        except (RuntimeError, _state().Fail, _state().RuntimeException, _state().NotImplemented) as error:
            # Of a node, whose shapes it may only now compare, or which lacks memory; or there is no such type of tensor.
            reason = " ".join(str(error).split())
            raise UserError(f"ONNX Runtime cannot run the network on these inputs: {reason[:500]}") from error

    def profiled(self, inputs: Sequence[np.ndarray], rounds: int) -> list[tuple[str, float]]:
        """(node, milliseconds) of every node of every run but a first one; once, where made with `profile`."""
        for _ in range(rounds + 1):
            self.run(inputs)
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        self._folder.cleanup()
        kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
        first = len(kernels) // (rounds + 1)
        return [(event["name"].removesuffix("kernel_time"), event["dur"] / 1e3) for event in kernels[first:]]


def fused_operations(graph: bytes, arrays: Arrays, *, may_saturate: bool) -> Counter[str]:
    """How many operations of each type ONNX Runtime has left after its fusions."""
    options = _options(1, precise=_must_be_precise(may_saturate))
    # Its own layout of memory aside, which cannot be written down: the same kernels of integers, other names of float ones.
    with TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        _session(graph, arrays, options)
        return operations(Path(options.optimized_model_filepath).read_bytes())


def _session(graph: bytes, arrays: Arrays, options: Any) -> Any:
    ort = _onnxruntime()
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    options.add_external_initializers(list(arrays), values)
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=_DISABLED)


def _options(threads: int, *, precise: bool) -> Any:
    options = _onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _FATAL_ALONE
    options.add_session_config_entry(_PRECISION, str(int(precise)))
    return options


def _state() -> Any:
    """Where ONNX Runtime has its exceptions."""
    return _onnxruntime().capi.onnxruntime_pybind11_state


def _onnxruntime() -> Any:
    return require("onnxruntime", "runtime")


def adds_exactly() -> bool:
    """Whether ONNX Runtime's kernels of bytes add any two products exactly on this machine: not on x86 without VNNI."""
    return _convolves(precise=False)


def _must_be_precise(may_saturate: bool) -> bool:
    """Whether ONNX Runtime must be told not to let sums of two products saturate, on this machine.

    Raises:
        UserError: it computes a convolution wrongly even where it is told.
    """
    precise = may_saturate and not adds_exactly()
    if not _convolves(precise=True):
        raise UserError(
            "this ONNX Runtime computes a convolution of bytes wrongly on this machine: install another version"
        )
    return precise


# One QLinearConv of 8 x 8 channels, 1 x 1, all weights 127, scales 1 and 1100; tests/runtime/test_bindings.py makes it anew.
_PROBE = base64.b64decode(
    "CAUSADqJAgo6CgF4CgNvbmUKBHplcm8KAXcKA29uZQoFd3plcm8KBXNjYWxlCgR6ZXJvEgF5IgtRTGluZWFyQ29udhIFcHJvYmUqDRABQgNvbm"
    "VKBAAAgD8qCxACQgR6ZXJvSgEAKgwQA0IFd3plcm9KAQAqDxABQgVzY2FsZUoEAICJRCpPCAgICAgBCAEQA0IBd0pAf39/f39/f39/f39/f39/"
    "f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f1obCgF4EhYKFAgCEhAKAggBCgIICAoCCAQKAggEYhsKAX"
    "kSFgoUCAISEAoCCAEKAggICgIIBAoCCARCBAoAEAo="
)
_PROBE_SHAPE = (1, 8, 4, 4)


@functools.cache
def _convolves(*, precise: bool) -> bool:
    """Whether a convolution whose pairs of products exceed 16 bits is what NumPy says."""
    options = _options(1, precise=precise)
    session = _onnxruntime().InferenceSession(_PROBE, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full(_PROBE_SHAPE, 255, np.uint8)})
    return bool(np.array_equal(found, np.full(_PROBE_SHAPE, np.round(8 * 255 * 127 / 1100), np.uint8)))
