"""What an artifact costs on this machine: bytes, memory, time, for every width; and a latency table for the search."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bitswitch import artifact
from bitswitch.errors import UserError, require
from bitswitch.export import load
from bitswitch.machine import machine
from bitswitch.nn import quantized_layers, switch

BATCHES = (1, 32)


def bench(path: Path, *, network: str | None = None, rounds: int = 10) -> dict[str, Any]:
    """Measure an artifact, in torch and, where the file holds its graph, in the session and as a float ONNX model.

    Everything is timed in turn, round after round, so that a busy machine slows all alike; medians count.

    Args:
        path: the artifact.
        network: its name where the file does not tell, or names the user's own code.
        rounds: how often each is timed.

    Returns:
        {"file", "file_bytes", "machine", "graph": whether the file holds one, "widths": [{"bits", "bytes_read",
        "narrowed_bytes", "torch_switch_ms", "torch_kept_switch_ms", "session_build_ms", "session_switch_us", "torch_peak_mb",
        "session_peak_mb"}], where the first of each two switches is cold (weights or executable made) and the second warm,
        "speed": [{"engine", "bits", "batch", "ms", "images_per_s"}], "latency": {"unit": "ms", "layers": {layer: {bits: ms}}}};
        what the graph is needed for is None, or left out, without it; switches of a file of one width are None. "latency" is
        the table that `search.latency` takes.

    Raises:
        UserError: the file cannot be used, or does not say of what shape its input is.
    """
    located, tensors, widths = artifact.read_held(path)
    graph = artifact.GRAPH in tensors
    if graph:
        require("onnxruntime", "runtime")
        require("onnxscript", "onnx")
    shape = (located.header.preprocessing or {}).get("shape")
    if not shape:
        raise UserError(
            f"{path} does not say of what shape its input is: save it with preprocessing={{'shape': [C, H, W]}}"
        )
    if not _is_shape(shape):
        raise UserError(f"{path} gives {shape!r} as the shape of its input, which is no [C, H, W] to measure with")
    images = np.random.default_rng(0).standard_normal((max(BATCHES), *shape)).astype(np.float32)
    model = load(path, bits=widths[0], model=network)
    try:
        _in_torch(model, widths[0])(images[:1])
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} gives {list(shape)} as the shape of its input, which its network does not take ({reason}): save it with "
            "its own"
        ) from error
    rows = [_sizes(located, tensors, bits) for bits in widths]
    for row in rows:
        row |= _torch_switch(model, row["bits"], widths, rounds)
        row |= {"torch_peak_mb": _peak(path, "torch", row["bits"], network, shape)}
        row |= dict.fromkeys(("session_build_ms", "session_switch_us", "session_peak_mb"))
    runs: dict[tuple[str, int | None], Callable[[np.ndarray], Any]] = {}
    for bits in widths:
        runs["torch", bits] = _in_torch(model, bits)
    document: dict[str, Any] = {
        "file": str(path),
        "file_bytes": path.stat().st_size,
        "machine": machine(),
        "graph": graph,
        "widths": rows,
    }
    if graph:
        for row in rows:
            row |= _session_costs(path, row["bits"], widths, rounds)
            row |= {"session_peak_mb": _peak(path, "session", row["bits"], network, shape)}
            runs["session", row["bits"]] = _in_session(path, row["bits"])
        runs["float ONNX", None] = _float_onnx(model, widths[0], images)
        layers = _layer_latency(path, widths, images[:1], rounds)
        document["latency"] = None if layers is None else {"unit": "ms", "layers": layers}
    document["speed"] = _speed(runs, images, rounds)
    return document


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, Sequence)
        and all(type(size) is int and 0 < size < 2**20 for size in shape)
        and np.prod(shape, dtype=float) < 2**26
    )


def _sizes(located: artifact.Located, tensors: Mapping[str, np.ndarray], bits: int) -> dict[str, Any]:
    weights = [int(np.prod(layer.shape)) for layer in located.header.layers]
    besides = {artifact.GRAPH, *(artifact.tensor_name(layer.name, "codes") for layer in located.header.layers)}
    others = sum(t.nbytes for name, t in tensors.items() if name not in besides)
    return {
        "bits": bits,
        "bytes_read": located.bytes_read(bits),
        "narrowed_bytes": others + sum(-(-count * bits // 8) for count in weights),
    }


def _milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _torch_switch(model: nn.Module, bits: int, widths: Sequence[int], rounds: int) -> dict[str, float | None]:
    """Switch and take every float weight, from another width: made anew, and kept from before. None without another."""
    found: dict[str, float | None] = {"torch_switch_ms": None, "torch_kept_switch_ms": None}
    if len(widths) == 1:
        return found
    layers = quantized_layers(model).values()
    other = widths[0] if bits != widths[0] else widths[-1]
    most = [layer.kept.most for layer in layers]

    def weights(width: int) -> None:
        switch(model, width)
        for layer in layers:
            layer._weight(width, lent=False)  # as a forward without gradients takes it

    for key, copies in (("torch_switch_ms", 1), ("torch_kept_switch_ms", 2)):
        for layer in layers:
            layer.kept.most = copies
        times = []
        for _ in range(rounds + 1):
            weights(other)
            times.append(_milliseconds(lambda: weights(bits)))
        found[key] = statistics.median(times[1:])
    for layer, before in zip(layers, most, strict=True):
        layer.kept.clear()
        layer.kept.most = before
    return found


def _in_torch(model: nn.Module, bits: int) -> Callable[[np.ndarray], Any]:
    def run(x: np.ndarray) -> Any:
        switch(model, bits)
        with torch.no_grad():
            return model(torch.from_numpy(x))

    return run


def _in_session(path: Path, bits: int) -> Callable[[np.ndarray], Any]:
    from bitswitch.runtime import Session

    # As many threads as torch has, which a table of both names.
    return Session(path, bits=bits, threads=torch.get_num_threads()).run


def _session_costs(path: Path, bits: int, widths: Sequence[int], rounds: int) -> dict[str, float | None]:
    from bitswitch.runtime import Session

    if len(widths) == 1:
        # Another is what a session is switched from: alone it is made with the session.
        return {"session_build_ms": None, "session_switch_us": None}
    other = widths[0] if bits != widths[0] else widths[-1]
    session = Session(path, bits=other, threads=torch.get_num_threads())
    build = _milliseconds(lambda: session.switch(bits))
    found = []
    for _ in range(10 * rounds):
        session.switch(other)
        found.append(1e3 * _milliseconds(lambda: session.switch(bits)))
    return {"session_build_ms": build, "session_switch_us": statistics.median(found)}


def _float_onnx(model: nn.Module, bits: int, images: np.ndarray) -> Callable[[np.ndarray], Any]:
    """The network in float32, with the weights and batch normalizations of a width, in ONNX Runtime."""
    import onnxruntime as ort

    from bitswitch.export.float_graph import float_twin

    switch(model, bits)
    twin = float_twin(model)
    for name, layer in quantized_layers(model).items():
        twin.get_submodule(name).weight.data.copy_(layer.weight_at(bits))  # type: ignore[operator]
    example = torch.from_numpy(images[:2])
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(twin.eval(), (example,), dynamo=True, verbose=False, dynamic_shapes=shapes)
    assert program is not None
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    content = program.model_proto.SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


def _speed(
    runs: Mapping[tuple[str, int | None], Callable[[np.ndarray], Any]], images: np.ndarray, rounds: int
) -> list[dict[str, Any]]:
    times: dict[tuple[str, int | None, int], list[float]] = {}
    for turn in range(rounds + 1):
        for (engine, bits), run in runs.items():
            for batch in BATCHES:
                x = images[:batch]
                # A switch in torch makes weights at the first run: that is no part of the run.
                run(x)
                spent = _milliseconds(lambda run=run, x=x: run(x))  # type: ignore[misc]
                if turn:
                    times.setdefault((engine, bits, batch), []).append(spent)
    return [
        {"engine": engine, "bits": bits, "batch": batch, "ms": ms, "images_per_s": 1e3 * batch / ms}
        for (engine, bits, batch), found in times.items()
        for ms in [statistics.median(found)]
    ]


def _layer_latency(
    path: Path, widths: Sequence[int], images: np.ndarray, rounds: int
) -> dict[str, dict[str, float]] | None:
    """ONNX Runtime's own profile of one image: the time of each layer's product at each width, median over runs.

    A product that is several nodes, such as one of patches, is their sum. None where the profile does not tell every layer's.
    """
    import onnx
    import onnx_ir as ir

    from bitswitch.export.decide import decide
    from bitswitch.runtime.executable import Executable
    from bitswitch.runtime.source import read

    source = read(path)
    prefixes = {f"{product.prefix}.": product.layer for product in source.bindings.products}
    found: dict[str, dict[str, float]] = {layer: {} for layer in prefixes.values()}
    for bits in widths:
        assignment = {layer.name: bits for layer in source.header.layers}
        model = ir.serde.deserialize_model(onnx.load_model_from_string(source.graph))
        arrays = source.arrays(assignment)
        # ONNX Runtime would drop the names of nodes inside an If.
        decide(model.graph, arrays)
        nodes = {
            str(node.name): layer
            for node in model.graph
            for prefix, layer in prefixes.items()
            # By what it gives: what reads a product's result is no part of it.
            if node.op_type not in ("DequantizeLinear", "Mul", "Add")
            and any(f"{value.name}.".startswith(prefix) for value in node.outputs)
        }
        used = {value.name for node in model.graph for value in node.inputs if value}
        executable = Executable(
            ir.serde.serialize_model(model).SerializeToString(),
            {name: array for name, array in arrays.items() if name in used},
            may_saturate=source.may_saturate(arrays, assignment),
            threads=1,
            profile=True,
        )
        events = executable.profiled([images], rounds)
        per_run = len(events) // rounds
        runs = [events[i * per_run : (i + 1) * per_run] for i in range(rounds)]
        times = [_by_layer(run, nodes) for run in runs]
        if any(run.keys() != found.keys() for run in times):
            return None
        for layer in found:
            found[layer][str(bits)] = statistics.median(run[layer] for run in times)
    return found


def _by_layer(events: Sequence[tuple[str, float]], nodes: Mapping[str, str]) -> dict[str, float]:
    """The milliseconds of one run for each layer, from those of its nodes."""
    times: dict[str, float] = {}
    for event, milliseconds in events:
        owner = max((name for name in nodes if event.startswith(f"{name}_")), key=len, default=None)
        if owner is not None:
            times[nodes[owner]] = times.get(nodes[owner], 0.0) + milliseconds
    return times


_PEAK = {
    "torch": "import torch, bitswitch; m = bitswitch.load({path!r}, bits={bits}, model={model!r}); "
    "m(torch.zeros(1, *{shape}))",
    "session": "import numpy; from bitswitch.runtime import Session; "
    "Session({path!r}, bits={bits}).run(numpy.zeros((1, *{shape}), numpy.float32))",
}


def _peak(path: Path, engine: str, bits: int, network: str | None, shape: Sequence[int]) -> float | None:
    """Peak resident memory in MB (Linux) of a new process that loads one width and runs one image."""
    code = _PEAK[engine].format(path=str(path), bits=bits, model=network, shape=list(shape))
    # Not getrusage: what it gives begins with the peak of the process that started this one.
    code += "; print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    # A network of the user's own may not be found from here, and only Linux has that file.
    return float(done.stdout.split()[-2]) / 1024 if not done.returncode else None
