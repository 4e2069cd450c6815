"""What an artifact costs on the disk, to read, and to switch: ResNet50 in torch, every layer.

    python benchmarks/switch.py [--pairs 20] [--network resnet50] [--json results/performance/switch.json]

A switch is `bs.switch` and every layer's float weight made anew from its codes, as the first forward after it does. It is held
against one pass that reads the codes and writes float weights, in two forms: `codes.float() * scale`, new weights, which
are held; and, harder to keep up with, `weight.copy_(codes).mul_(scale)`, over weights that are there already, whoever may
still need them. Sides are timed alternately, and a ratio is the median of the ratios of neighbours.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bitswitch as bs
import result
from bitswitch import artifact
from bitswitch.codes import bits_read
from bitswitch.models import build
from bitswitch.nn import QuantizedLayer, quantized_layers

CHOICES = [(8, 6, 4, 2), (4, 3, 2)]
COLUMNS = ["widths", "to", "switch ms", "pass ms", "ratio", "quartiles", "pass in place ms", "ratio", "quartiles"]


def milliseconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    made = action()
    elapsed = 1e3 * (time.perf_counter() - start)
    del made
    return elapsed


def switched(model: nn.Module, layers: Sequence[QuantizedLayer], width: int) -> None:
    """The width for every layer, and the weights that its forward will use."""
    bs.switch(model, width)
    for layer in layers:
        layer._weight(width, lent=False)  # as a forward without gradients takes it


def measure(model: nn.Module, pairs: int) -> list[list[Any]]:
    """A row for every width, switched to from another."""
    layers = list(quantized_layers(model).values())
    widths = layers[0].widths
    codes = [layer.stored_codes() for layer in layers]
    scales = [layer.weight_quantizer.scale() for layer in layers]

    weights = [torch.empty(code.shape) for code in codes]

    def one_pass() -> list[Tensor]:
        return [code.float() * scale for code, scale in zip(codes, scales, strict=True)]

    def in_place() -> None:
        for weight, code, scale in zip(weights, codes, scales, strict=True):
            weight.copy_(code).mul_(scale)

    rows = []
    for i, width in enumerate(widths):
        times = []
        for number in range(pairs + 2):
            switched(model, layers, widths[i - 1])
            switch_all = functools.partial(switched, model, layers, width)
            sides = [milliseconds(side) for side in (switch_all, one_pass, in_place)]
            if number >= 2:
                times.append(sides)
        switch, *passes = zip(*times, strict=True)
        row = [str(list(widths)), f"{width} bits", round(statistics.median(switch), 2)]
        for reference in passes:
            ratios = [mine / other for mine, other in zip(switch, reference, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            row += [round(statistics.median(reference), 2), round(middle, 3), f"{low:.2f}-{high:.2f}"]
        rows.append(row)
    return rows


def sizes(path: Path) -> dict[str, Any]:
    """Bytes of a file and of what its lowest width reads of it, beside what the format may take."""
    located, tensors = artifact.read_part(path, lambda header: header.widths[0])
    high, low = located.header.widths[0], located.header.widths[-1]
    weights = sum(array.size for name, array in tensors.items() if name.endswith(".codes"))
    floats = sum(array.nbytes for name, array in tensors.items() if not name.endswith(".codes"))
    return {
        "widths": list(located.header.widths),
        "weights": weights,
        "float_bytes": floats,
        "header_bytes": min(entry.start for entry in located.entries.values()),
        "file_bytes": path.stat().st_size,
        "file_limit": int(1.01 * (weights * high / 8 + floats)) + 65536,
        "lowest_width_bytes": located.entries[f"plane.{bits_read(high, low) - 1}"].stop,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="pairs timed for each width, at least 2")
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--image", type=int, default=64, help="side of the images from which scales start")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network = build(options.network)
    rows, measured = [], []
    with tempfile.TemporaryDirectory() as folder:
        for bits in CHOICES:
            path = Path(folder) / "model.safetensors"
            images = torch.randn(2, 3, options.image, options.image)
            bs.save(
                bs.quantize(network, bits=bits, example_inputs=images),
                path,
                network={"name": options.network, "args": {}},
            )
            measured.append(sizes(path))
            rows += measure(bs.load(path), options.pairs)
            for part in (bits[0], bits[-1]):
                measured[-1][f"load_ms_{part}_bits"] = milliseconds(functools.partial(bs.load, path, bits=part))
    for line in [COLUMNS, *rows]:
        print(" | ".join(f"{cell:.2f}" if isinstance(cell, float) else cell for cell in line))
    for size in measured:
        print(size)
    if options.json:
        told = [
            f"{size['widths']}: {size['file_bytes']:,} bytes (at most {size['file_limit']:,}), "
            f"{size['lowest_width_bytes']:,} of them read for {size['widths'][-1]} bits"
            for size in measured
        ]
        result.write(
            options.json,
            title=f"Switching every layer of {options.network} in torch, on the CPU",
            columns=COLUMNS,
            rows=rows,
            note=f"{options.pairs} pairs, median and quartiles of their ratios. {'; '.join(told)}.",
            measured=measured,
        )


if __name__ == "__main__":
    result.run(main)
