"""Traces of the Hessian for every layer: the time to a relative error, against PyHessian run layer by layer. On the CPU.

    python benchmarks/hessian.py cifar_resnet20 --weights FILE --data FOLDER [--images 256] [--batch 256] [--json OUT.json]
    python benchmarks/hessian.py resnet18 [--data FOLDER] [--images 8] [--batch 8] [--json OUT.json]
    python benchmarks/hessian.py cifar_resnet20 --pairs 7 [...]         # single probes

Wanted: a standard error of at most 10 % for every layer that holds at least 1 % of the summed absolute traces; ours also wants
the other layers known to 0.1 % of that sum. PyHessian (PyPI) gets one layer at a time, by leaving only that weight's
requires_grad on: its probes are then smaller and hold no other layer's noise. It needs (spread / (10 % of the trace))^2
probes, at least 7; these are made, up to `--probes` a layer, and where more are needed the rest is EXTRAPOLATED from the time
of one. Both get the same images, batches and threads; with `--every n` PyHessian gets every n-th layer alone, and the ratio is
a lower bound. Ours is timed again and again between PyHessian's layers, and its median counts.

One probe of ours (all layers at once) is also timed against one of PyHessian's (the whole model), in pairs (A B A B ...), each
on a graph that is there already; "weights" are ours where outputs and loss cannot be told apart, as in any other loss.
"""

import argparse
import contextlib
import functools
import importlib
import io
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms
from torchvision.datasets import ImageFolder

import bitswitch as bs
import result
from bitswitch.models import build, load_weights
from bitswitch.search.passes import LossFunction
from bitswitch.search.probes import Signs, prober

warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
with contextlib.redirect_stdout(io.StringIO()):
    PyHessian: Any = importlib.import_module("pyhessian").hessian

Batch = tuple[Tensor, Tensor]
TARGET, HEAVY = 0.1, 0.01
# With fewer values a nominal 95 % interval of +-1.96 standard errors holds less than 90 % (Student's t, 6 degrees of freedom).
FEWEST = 7
SIZE = {"cifar_resnet20": 32, "resnet18": 224}
CLASSES = {"cifar_resnet20": 10, "resnet18": 1000}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def opaque_loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """The same loss, by a way on which the model's output cannot be seen."""
    return F.cross_entropy(model.forward(batch[0]), batch[1])


def batches_of(options: argparse.Namespace) -> list[Batch]:
    """Normalized images and labels: a random choice from a folder, or random images."""
    generator = torch.Generator().manual_seed(options.seed)
    size = SIZE[options.network]
    if options.data is None:
        x = torch.randn(options.images, 3, size, size, generator=generator)
        y = torch.randint(CLASSES[options.network], (options.images,), generator=generator)
    else:
        convert = transforms.Compose(
            [
                transforms.Resize(size),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )
        folder = ImageFolder(options.data, convert)
        chosen = torch.randperm(len(folder), generator=generator)[: options.images].tolist()
        x = torch.stack([folder[i][0] for i in chosen])
        y = torch.tensor([folder[i][1] for i in chosen])
    return list(zip(x.split(options.batch), y.split(options.batch), strict=True))


def network_of(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(options.seed)
    model = build(options.network, {"num_classes": CLASSES[options.network]})
    if options.weights:
        load_weights(model, options.weights)
    return model.eval()


def seconds(step: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = step()
    return time.perf_counter() - start, result


def rival(model: nn.Module, batches: list[Batch]) -> Any:
    """PyHessian on the weights that require a gradient. One batch: its faster way, which keeps the graph."""
    model.zero_grad(set_to_none=True)
    data = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
    if len(batches) > 1:
        loss_fn(model, batches[0]).backward()  # or it takes the number 0.0 for every gradient
    return PyHessian(model, nn.CrossEntropyLoss(), cuda=False, **data)


def probed(found: Any, probes: int) -> list[float]:
    # No tolerance: its own stops at the first probe that moves the mean little, or if the trace is negative.
    return found.trace(maxIter=probes, tol=-math.inf)


def one_layer(
    model: nn.Module, batches: list[Batch], weight: Tensor, trace: float, fewest: int, most: int
) -> dict[str, Any]:
    """PyHessian's times and probes for one weight: as many as it needs, or `most`."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is weight)
    setup, found = seconds(lambda: rival(model, batches))
    values: list[float] = []
    elapsed, wanted = 0.0, min(fewest, most)
    while len(values) < wanted:
        took, more = seconds(functools.partial(probed, found, wanted - len(values)))
        elapsed, values = elapsed + took, values + more
        # A real run would not know that it went too far.
        needed = max(len(values), math.ceil((statistics.stdev(values) / (TARGET * abs(trace))) ** 2))
        wanted = min(needed, most)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    probe = elapsed / len(values)
    return {
        "setup_s": setup,
        "probe_s": probe,
        "values": values,
        "probes_needed": needed,
        "seconds_measured": setup + elapsed,
        "seconds_needed": setup + needed * probe,
    }


def to_target(model: nn.Module, batches: list[Batch], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the target: ours measured, PyHessian's measured for some probes a layer and extrapolated."""
    weights = {
        name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    ours: list[float] = []
    opaque: list[float] = []
    rounds: list[tuple[int, float]] = []
    traces: dict[str, bs.search.Trace] = {}

    def run_ours() -> None:
        nonlocal traces
        rounds.clear()
        elapsed, traces = seconds(
            lambda: bs.hessian_trace(
                model, loss_fn, batches, target=TARGET, seed=options.seed, progress=lambda n, e: rounds.append((n, e))
            )
        )
        ours.append(elapsed)

    run_ours()  # warms up; not counted
    ours.clear()
    weights = dict(list(weights.items())[:: options.every])
    every = math.ceil(len(weights) / options.repeats)
    layers: dict[str, dict[str, Any]] = {}
    for number, (name, weight) in enumerate(weights.items()):
        if number % every == 0:
            run_ours()
        trace = traces[name]
        layers[name] = one_layer(model, batches, weight, trace.mean, options.fewest, options.probes)
        layers[name] |= {"trace": trace.mean, "standard_error": trace.standard_error}
        timed, needed = len(layers[name]["values"]), layers[name]["probes_needed"]
        print(f"  {name}: PyHessian {layers[name]['probe_s']:.3f} s a probe, {timed} of {needed}", file=sys.stderr)
    if options.opaque:
        opaque.append(
            seconds(lambda: bs.hessian_trace(model, opaque_loss_fn, batches, target=TARGET, seed=options.seed))[0]
        )
    total = sum(abs(trace.mean) for trace in traces.values())
    for layer in layers.values():
        layer["heavy"] = abs(layer["trace"]) >= HEAVY * total
    heavy = [layer for layer in layers.values() if layer["heavy"]]
    theirs = sum(layer["seconds_needed"] for layer in heavy)
    return {
        "heavy_layers": sum(abs(trace.mean) >= HEAVY * total for trace in traces.values()),
        "pyhessian_layers": len(heavy),
        "ours_s": ours,
        "rounds": rounds,
        "opaque_s": opaque,
        "pyhessian_s": theirs,
        "pyhessian_s_measured": sum(layer["seconds_measured"] for layer in heavy),
        "pyhessian_probes_measured": sum(len(layer["values"]) for layer in heavy),
        "pyhessian_probes_needed": sum(layer["probes_needed"] for layer in heavy),
        "ratio": theirs / statistics.median(ours),
        "layers": layers,
    }


def one_probe(model: nn.Module, batches: list[Batch], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one probe for all layers, in pairs, on the first batch, with the graph there."""
    return {
        "outputs": in_pairs(model, loss_fn, batches[0], options),
        "weights": in_pairs(model, opaque_loss_fn, batches[0], options),
    }


def in_pairs(model: nn.Module, loss: LossFunction, batch: Batch, options: argparse.Namespace) -> dict[str, Any]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    how = prober(model, loss, batch, layers, options.seed, named=True)
    run = how._run(batch)
    if how.kinds == ("output",):
        probe = functools.partial(how._output_probe, run, how._roots(run), list(layers))
    else:
        probe = functools.partial(how._weight_probe, run, how._gradients(run), list(layers))
    found = rival(model, [batch])
    pairs = []
    for number in range(options.pairs + 1):
        signs = Signs(number)
        pairs.append((seconds(functools.partial(probed, found, 1))[0], seconds(functools.partial(probe, signs))[0]))
    pairs = pairs[1:]  # the first warms up
    model.zero_grad(set_to_none=True)
    return {"pairs_s": pairs, "ratio": statistics.median(theirs / own for theirs, own in pairs)}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=SIZE)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", type=Path, help="a folder of classes; random images without")
    parser.add_argument("--data-name", default="images", help="what to call it in the result")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--probes", type=int, default=40, help="PyHessian's for each layer at most, at least 2")
    parser.add_argument("--fewest", type=int, default=FEWEST, help="PyHessian's for each layer at least, 2 or more")
    parser.add_argument("--every", type=int, default=1, help="PyHessian gets every n-th layer alone; ours gets all")
    parser.add_argument("--repeats", type=int, default=5, help="of ours")
    parser.add_argument("--pairs", type=int, default=0, help="of single probes; with these, nothing else is timed")
    parser.add_argument("--opaque", action="store_true", help="ours to the target without seeing the outputs as well")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    if min(options.probes, options.fewest) < 2:
        parser.error("--probes, --fewest: at least 2, or there is no spread")
    return options


COLUMNS = ["what", "images", "batch", "ours s", "PyHessian s", "times faster", "PyHessian probes"]


def rows_of_probe(options: argparse.Namespace, found: dict[str, Any]) -> list[list[Any]]:
    rows = []
    for kind, timed in found.items():
        theirs, own = (statistics.median(column) for column in zip(*timed["pairs_s"], strict=True))
        first = min(options.images, options.batch)
        rows.append([f"{options.network}: one probe, of {kind}", first, first, own, theirs, timed["ratio"], 1])
    return rows


def rows_to_target(options: argparse.Namespace, found: dict[str, Any]) -> list[list[Any]]:
    what = f"{options.network}: {found['heavy_layers']} heavy layers to {TARGET:.0%}"
    if options.every > 1:
        what += f" (PyHessian: {found['pyhessian_layers']} of them)"
    sides = [(what, statistics.median(found["ours_s"]))]
    sides += [(f"{what}, outputs not seen", own) for own in found["opaque_s"]]
    theirs, needed = found["pyhessian_s"], found["pyhessian_probes_needed"]
    return [[name, options.images, options.batch, own, theirs, theirs / own, needed] for name, own in sides]


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    model, batches = network_of(options), batches_of(options)
    if options.pairs:
        found = one_probe(model, batches, options)
        rows, note = (
            rows_of_probe(options, found),
            f"Median ratio of {options.pairs} pairs, each on a graph that is there.",
        )
    else:
        found = to_target(model, batches, options)
        rows = rows_to_target(options, found)
        note = (
            f"PyHessian layer by layer: {found['pyhessian_s_measured']:.1f} s MEASURED for "
            f"{found['pyhessian_probes_measured']} probes, {found['pyhessian_s']:.1f} s for the "
            f"{found['pyhessian_probes_needed']} that their spread asks for, at least {options.fewest} a layer"
            f"{'' if found['pyhessian_probes_measured'] == found['pyhessian_probes_needed'] else ' (the rest EXTRAPOLATED)'}. "
            f"Ours: median of {len(found['ours_s'])} whole runs, between its layers."
        )
    note = f"Weights: {options.weights.name if options.weights else 'random'}. {note}"
    print(f"threads {options.threads}, torch {torch.__version__}, on the CPU. {note}")
    print(" | ".join(COLUMNS))
    for row in rows:
        print(" | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row))
    if options.json:
        result.write(
            options.json,
            title=f"Traces of {options.network}'s Hessian, layer by layer, against PyHessian, on the CPU",
            data="random" if options.data is None else options.data_name,
            split="none" if options.data is None else "train",
            seeds=[options.seed],
            note=note,
            columns=COLUMNS,
            rows=[[round(cell, 3) if isinstance(cell, float) else cell for cell in row] for row in rows],
            measured=found,
        )


if __name__ == "__main__":
    result.run(main)
