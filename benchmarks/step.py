"""What one training step costs, quantized against float, and against brevitas and torchao where they are installed. On the CPU.

    python benchmarks/step.py [--compile] [--pairs 15] [--networks ...] [--dtypes ...] [--quick] [--json OUT.json]

A step is forward, backward and optimizer, at one width. Every quantized step is timed right after a float step of the same
network on the same batch (A B A B ...); a row gives the median of the pairs' ratios with its 95 % interval (order statistics),
and their quartiles. Both sides have fused Adams; ours has two, and ALRS. With --compile the float network goes through
torch.compile, ours through bitswitch.nn.one_graph, one graph for all widths; rivals are timed both ways. Brevitas gets the same
layers quantized at 4 bits: before every convolution a QuantReLU with a learned scale (all those inputs are outputs of a ReLU
already), in it QuantConv2d's own choice of weight scale. torchao trains quantized Linear layers alone, so it stands beside
ours on `mlp`, five Linear layers of 1024: weights of 4 bits with a scale for each output channel, activations of 8 bits with a
scale for each row; it learns no scale.
"""

import argparse
import copy
import functools
import importlib
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitswitch as bs
import result
from bitswitch.models import build
from bitswitch.nn.one_graph import OneGraph

WIDTHS = (8, 4, 2)
RIVAL_BITS = 4
LR, WEIGHT_DECAY = 5e-4, 5e-5
# Pixels a side; 0 where the input is a row of features.
IMAGE = {"cifar_resnet20": 32, "resnet18": 224, "mlp": 0}
CLASSES = {"cifar_resnet20": 10, "resnet18": 1000, "mlp": 10}
FEATURES = 1024
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network on one random batch."""

    network: str
    batch: int
    image: int
    dtype: str
    memory_format: str
    compiled: bool

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 is autocast, float32 is as it is."""
        return torch.autocast("cpu", torch.bfloat16) if self.dtype == "bfloat16" else nullcontext()

    def backward(self, forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
        """Forward and backward."""
        with self.autocast():
            loss = F.cross_entropy(forward(x), y)
        loss.backward()


def plain_step(case: Case, model: nn.Module, x: Tensor, y: Tensor, *, compiled: bool) -> Step:
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    def step() -> None:
        case.backward(forward, x, y)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def quantized_steps(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Step]:
    forward = OneGraph(model) if case.compiled else model
    optimizer = bs.MultiPrecisionOptimizer(model, lr=LR, weight_decay=WEIGHT_DECAY)

    def step(width: int) -> None:
        with bs.switched(model, width):
            case.backward(forward, x, y)
        optimizer.step(width)

    return {f"{width} bits": functools.partial(step, width) for width in WIDTHS}


def brevitas_network(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy of a float network with the named convolutions, and what flows into them, quantized by brevitas."""
    layers: Any = importlib.import_module("brevitas.nn")
    quantizers: Any = importlib.import_module("brevitas.quant.scaled_int")
    model = copy.deepcopy(model)
    for name in names:
        parent, _, child = name.rpartition(".")
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d), name
        swapped = layers.QuantConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            bias=conv.bias is not None,
            weight_bit_width=RIVAL_BITS,
        )
        swapped.weight = conv.weight
        # MaxInit is the learned scale from the first step on; the default looks at percentiles for its first 300 steps.
        inputs = layers.QuantReLU(
            act_quant=quantizers.Uint8ActPerTensorFloatMaxInit, min_val=0.0, max_val=4.0, bit_width=RIVAL_BITS
        )
        setattr(model.get_submodule(parent), child, nn.Sequential(inputs, swapped))
    return model


def torchao_network(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy of a network whose named Linear layers, and what flows into them, torchao quantizes."""
    torchao: Any = importlib.import_module("torchao.quantization")
    qat: Any = importlib.import_module("torchao.quantization.qat")
    model = copy.deepcopy(model)
    config = qat.QATConfig(
        activation_config=qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        weight_config=qat.IntxFakeQuantizeConfig(torch.int4, "per_channel"),  # type: ignore[attr-defined]
        step="prepare",
    )
    torchao.quantize_(model, config, filter_fn=lambda _, name: name in names)
    return model


def network_of(case: Case) -> tuple[nn.Module, Tensor]:
    """The float network and a batch."""
    if case.network == "mlp":
        hidden = [layer for _ in range(4) for layer in (nn.Linear(FEATURES, FEATURES), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(FEATURES, CLASSES["mlp"])), torch.randn(case.batch, FEATURES)
    memory_format = FORMATS[case.memory_format]
    network = build(case.network, {"num_classes": CLASSES[case.network]}).to(memory_format=memory_format)
    return network, torch.randn(case.batch, 3, case.image, case.image).to(memory_format=memory_format)


def sides(case: Case) -> tuple[Step, dict[str, Step]]:
    """The float step, and the steps that are held against it."""
    torch.manual_seed(0)
    network, x = network_of(case)
    y = torch.randint(CLASSES[case.network], (case.batch,))
    model = bs.quantize(network, bits=WIDTHS, example_inputs=x[:16])
    steps = quantized_steps(case, model, x, y)
    rival, make = ("torchao", torchao_network) if case.network == "mlp" else ("brevitas", brevitas_network)
    if importlib.util.find_spec(rival):
        for compiled in [False, True][: 1 + case.compiled]:
            name = f"{rival} {RIVAL_BITS} bits" + ", compiled" * compiled
            steps[name] = plain_step(case, make(network, list(bs.widths(model))), x, y, compiled=compiled)
    return plain_step(case, network, x, y, compiled=case.compiled), steps


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(case: Case, pairs: int, warmup: int) -> list[dict[str, Any]]:
    """A row for every step that is held against the float step."""
    reference, steps = sides(case)
    first = {name: seconds(step) for name, step in {"float": reference, **steps}.items()}
    for step in (reference, *steps.values()):
        for _ in range(warmup):
            step()
    # Sides in the inner loop, so that a machine that slows down slows all of them.
    timed: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(pairs):
        for name, step in steps.items():
            timed[name].append((seconds(reference), seconds(step)))
    return [summary(case, name, times) | {"first_s": round(first[name], 1)} for name, times in timed.items()]


def summary(case: Case, name: str, times: list[tuple[float, float]]) -> dict[str, Any]:
    ratios = [side / reference for reference, side in times]
    return {
        **vars(case),
        "step": name,
        "float_ms": round(1e3 * statistics.median(reference for reference, _ in times), 3),
        "step_ms": round(1e3 * statistics.median(side for _, side in times), 3),
        **result.spread(ratios),
        "pairs_ms": [[round(1e3 * reference, 3), round(1e3 * side, 3)] for reference, side in times],
    }


COLUMNS = ["network", "batch", "image", "dtype", "step", "float ms", "step ms", "ratio", "95 % interval", "quartiles"]


def cells(measured: dict[str, Any]) -> list[Any]:
    """A line of the table, in the order of COLUMNS."""
    names = ("network", "batch", "image", "dtype", "step", "float_ms", "step_ms", "ratio")
    spans = ("{:.2f}-{:.2f}".format(*measured[f"ratio_{span}"]) for span in ("bounds", "quartiles"))
    return [*(measured[name] for name in names), *spans]


LINE = "{:<16}{:>6}{:>7}  {:<10}{:<26}{:>9}{:>9}{:>7}  {:<14}{}"


def show(rows: list[list[Any]]) -> None:
    for row in rows:
        print(LINE.format(*(f"{cell:.2f}" if isinstance(cell, float) else cell for cell in row)), flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="float and quantized steps timed, at least 6")
    parser.add_argument("--networks", nargs="+", choices=IMAGE, default=["cifar_resnet20", "resnet18"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--cifar-batch", type=int, default=128)
    parser.add_argument("--resnet18-batch", type=int, default=32)
    parser.add_argument("--mlp-batch", type=int, default=256)
    parser.add_argument("--memory-format", choices=FORMATS, default="contiguous")
    parser.add_argument("--compile", action="store_true", help="both sides compiled")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--warmup", type=int, default=3, help="steps of each kind that are not timed")
    parser.add_argument("--quick", action="store_true", help="tiny batches and images: does it run, not how fast")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    if options.pairs < 6:
        parser.error("--pairs: at least 6, or there is no 95 % interval")
    return options


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    batches = {"cifar_resnet20": options.cifar_batch, "resnet18": options.resnet18_batch, "mlp": options.mlp_batch}
    print(f"threads {options.threads}, memory format {options.memory_format}, torch {torch.__version__}, on the CPU")
    rivals = {name: _version(name) for name in ("brevitas", "torchao")}
    print(", ".join(f"{name} {version or 'is not installed: no rows for it'}" for name, version in rivals.items()))
    if options.quick:
        print("--quick: sizes are tiny, the ratios say nothing")
    measured: list[dict[str, Any]] = []
    print(LINE.format(*COLUMNS))
    for network in options.networks:
        for dtype in options.dtypes:
            case = Case(
                network=network,
                batch=4 if options.quick else batches[network],
                image=32 if options.quick and IMAGE[network] else IMAGE[network],
                dtype=dtype,
                memory_format=options.memory_format,
                compiled=options.compile,
            )
            rows = measure(case, options.pairs, 1 if options.quick else options.warmup)
            show([cells(row) for row in rows])
            measured += rows
            # After every case: what is measured is kept, whatever becomes of the rest.
            if options.json:
                write(options, measured)


def _version(name: str) -> str | None:
    return importlib.metadata.version(name) if importlib.util.find_spec(name) else None


def write(options: argparse.Namespace, measured: list[dict[str, Any]]) -> None:
    """A result file, as `make results` reads it, with every single time beside the table."""
    first = ", ".join(
        sorted({f"{m['network']} {m['dtype']} {m['first_s']} s" for m in measured if m["step"] == "8 bits"})
    )
    result.write(
        options.json,
        title="One training step, quantized against float, on the CPU"
        + (", compiled" if options.compile else ", not compiled")
        + (" (QUICK: NO RESULT)" * options.quick),
        note=f"{options.memory_format}, {options.pairs} pairs, median of their ratios, its 95 % interval, quartiles; "
        + (f"our first step, compilation included (cached or not): {first}; " if options.compile else "")
        + ", ".join(f"{name} {version}" for name in ("brevitas", "torchao") if (version := _version(name)))
        + ".",
        columns=COLUMNS,
        rows=[cells(row) for row in measured],
        measured=measured,
    )


if __name__ == "__main__":
    result.run(main)
