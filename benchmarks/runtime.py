"""How fast a session runs, beside ONNX Runtime's float model and its own static int8 quantization. On the CPU.

    python benchmarks/runtime.py [--pairs 20] [--networks ...] [--seconds 60] [--json OUT.json]

The same random network for all sides, batch 1, all runs of a round right after each other, so that a machine that slows down
slows all of them; a ratio is the median of the rounds' ratios. ONNX Runtime's own quantization is its `quantize_static` with
unsigned activations and per-channel weights, all layers, after its preprocessing. On x86 without VNNI its products saturate in
pairs unless its precision option is set; a session sets it where it must. So it is timed both ways: there, "exact" is the one
to compare with; with VNNI, the plain one. "Same layers" leaves the first and the last layer float, as ours are. Then: how
long a switch between ready sessions takes, and eight threads that run while one switches.
"""

import argparse
import functools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

import bitswitch as bs
import result
from bitswitch.models import build
from bitswitch.runtime import Session, graph_report

WIDTHS = (8, 6, 4, 2)
ORT_SIDES = ("ORT int8 exact", "ORT int8", "ORT int8 same layers")
IMAGE = {"cifar_resnet20": 32, "resnet18": 224}
COLUMNS = ["network", "image", "side", "ms", "x float", *(f"x {side}" for side in ORT_SIDES), "x ours at 8 bits"]

Run = Callable[[], Any]


class _Calibration(CalibrationDataReader):
    def __init__(self, name: str, x: np.ndarray) -> None:
        self._batches: Iterator[dict[str, np.ndarray]] = iter([{name: x}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def network(name: str, size: int) -> tuple[nn.Module, torch.Tensor]:
    """A random network whose batch normalizations have seen data, and images."""
    torch.manual_seed(0)
    model, images = build(name), torch.randn(8, 3, size, size)
    with torch.no_grad():
        for _ in range(3):
            model(images)
    return model.eval(), images


def ort_session(path: Path, *, precise: bool, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.x64quantprecision", str(int(precise)))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def sides(folder: Path, name: str, additions: tuple[str, ...], threads: int) -> tuple[dict[str, Run], Path]:
    """What is timed, and an artifact."""
    model, images = network(name, IMAGE[name])
    plain, prepared, own, same = (folder / f"{name}-{kind}.onnx" for kind in ("float", "prepared", "int8", "same"))
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (images,), plain, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)
    quant_pre_process(plain, prepared)
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    quantize_static(prepared, own, _Calibration("x", images.numpy()), **kinds)
    products = [node.name for node in onnx.load(prepared).graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    ends = [products[0], products[-1]]
    quantize_static(prepared, same, _Calibration("x", images.numpy()), nodes_to_exclude=ends, **kinds)
    x = images[:1].numpy()
    found: dict[str, Run] = {}
    for side, path, precise in (
        ("float", plain, False),
        *zip(ORT_SIDES, (own, own, same), (True, False, False), strict=True),
    ):
        session = ort_session(path, precise=precise, threads=threads)
        found[side] = functools.partial(session.run, None, {"x": x})
    quantized = bs.quantize(model, example_inputs=images).eval()
    for kind in additions:
        path = folder / f"{name}-{kind}.safetensors"
        bs.save(quantized, path, example_inputs=images, additions=kind)  # type: ignore[arg-type]
        for width in WIDTHS:
            report = graph_report(path, width)
            assert report["integer"] == report["layers"], report
            ours = Session(path, bits=width, threads=threads)
            found[f"{width} bits, {kind}"] = functools.partial(ours.run, x)
    return found, folder / f"{name}-{additions[0]}.safetensors"


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name: str, runs: dict[str, Run], pairs: int) -> list[dict[str, Any]]:
    repeats = 1 if IMAGE[name] > 100 else 10
    for run in runs.values():
        for _ in range(3):
            run()
    rounds = [{side: min(seconds(run) for _ in range(repeats)) for side, run in runs.items()} for _ in range(pairs)]

    def faster(side: str, other: str) -> float:
        return round(statistics.median(times[other] / times[side] for times in rounds), 3)

    return [
        {
            "network": name,
            "image": IMAGE[name],
            "side": side,
            "ms": round(1e3 * statistics.median(times[side] for times in rounds), 3),
            "x float": faster(side, "float"),
            **{f"x {other}": faster(side, other) for other in ORT_SIDES},
            "x ours at 8 bits": faster(side, "8 bits, requantized"),
            "times_ms": [round(1e3 * times[side], 3) for times in rounds],
        }
        for side in runs
    ]


def switching(path: Path) -> dict[str, float]:
    """Microseconds of a switch between ready executables: median and 99th of a hundred."""
    session = Session(path, threads=1)
    for width in WIDTHS:
        session.switch(width)
    choice = np.random.default_rng(0)
    times = sorted(seconds(lambda: session.switch(int(choice.choice(WIDTHS)))) for _ in range(10_000))
    return {"median_us": round(1e6 * times[5_000], 2), "p99_us": round(1e6 * times[9_900], 2)}


def threads_that_switch(path: Path, size: int, limit: float) -> dict[str, int]:
    """Eight threads run while one switches: how many outputs were one width's exactly, and how many were not."""
    session = Session(path, threads=1)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)).numpy()
    outputs = []
    for width in WIDTHS:
        session.switch(width)
        outputs.append(session.run(x))
    counts = [[0, 0] for _ in range(8)]
    end = time.monotonic() + limit

    def run(mine: list[int]) -> None:
        while time.monotonic() < end:
            found = session.run(x)
            mine[any(np.array_equal(found, output) for output in outputs)] += 1

    workers = [threading.Thread(target=run, args=(mine,)) for mine in counts]
    for worker in workers:
        worker.start()
    choice = np.random.default_rng(0)
    switches = 0
    while time.monotonic() < end:
        session.switch(int(choice.choice(WIDTHS)))
        switches += 1
        time.sleep(0.0005)
    for worker in workers:
        worker.join()
    return {"switches": switches, "whole": sum(c[1] for c in counts), "mixed": sum(c[0] for c in counts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=IMAGE, default=list(IMAGE))
    parser.add_argument("--pairs", type=int, default=20, help="rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=60, help="of threads that run while one switches; 0: not at all"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured: list[dict[str, Any]] = []
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            runs, path = sides(Path(folder), name, ("requantized", "exact"), options.threads)
            measured += measure(name, runs, options.pairs)
            switch = switching(path)
            notes.append(f"{name}: a switch takes {switch['median_us']} us (99 of 100: {switch['p99_us']})")
        if options.seconds:
            stress = threads_that_switch(path, IMAGE[name], options.seconds)
            notes.append(
                f"8 threads for {options.seconds:g} s during {stress['switches']} switches of {name}: {stress['whole']} "
                f"outputs of one width exactly, {stress['mixed']} others"
            )
    rows = [[row[column] for column in COLUMNS] for row in measured]
    for row in [COLUMNS, *rows]:
        print("  ".join(f"{cell!s:<16}" for cell in row))
    print("; ".join(notes))
    if options.json:
        result.write(
            options.json,
            title="A session beside ONNX Runtime's float model and its own int8, on the CPU",
            columns=COLUMNS,
            rows=rows,
            note=f"Batch 1, {options.pairs} rounds, median ratios (more is faster). {'; '.join(notes)}. ONNX Runtime "
            f"{onnxruntime.__version__}; the processor {'has' if has_vnni() else 'lacks'} VNNI.",
            measured=measured,
        )


def has_vnni() -> bool:
    """Whether products of bytes are exact and fast here; told by Linux alone."""
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and "vnni" in flags.read_text()


if __name__ == "__main__":
    result.run(main)
