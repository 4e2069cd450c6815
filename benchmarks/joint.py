"""What joint training costs: a joint step over {8, 6, 4, 2} against its parts, an epoch against a float one. On the CPU.

    python benchmarks/joint.py [--compile] [--pairs 15] [--dtypes ...] [--data CIFAR_FOLDER] [--json OUT.json]

ResNet20, batch 128, on `bitswitch.training`'s own objectives, and in pairs (A B A B ...): a row gives the median of the pairs'
ratios with its 95 % interval. "joint" steps after every width, "accumulated" once. "four single" are four steps of one width
each. The float step is SGD's, as in the pretrain stage. "with loader": steps of the stages' own loaders, on images of a
folder or, without --data, on random ones of that size. "mixed" is a SuperNet whose every layer is drawn anew in each forward
(sigma 1), "uniform" the same network at the four widths. Recompilations are counted from the end of warm-up to the end.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import bitswitch as bs
import result
from bitswitch.data import load_data
from bitswitch.models import build
from bitswitch.nn import make_transitional, quantized_layers
from bitswitch.training import AssignmentSampler, Engine, FloatObjective, JointObjective, MultiPrecisionOptimizer
from step import seconds

WIDTHS = (8, 6, 4, 2)
BATCH = 128
COLUMNS = ["dtype", "what", "against", "ms", "its ms", "ratio", "95 % interval", "quartiles"]

Step = Callable[[], Any]


class Network:
    """A float ResNet20, its quantized form, and one way to compute."""

    def __init__(self, engine: Engine) -> None:
        torch.manual_seed(0)
        self.engine = engine
        self.network = build("cifar_resnet20")
        self.x, self.y = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
        self.model = bs.quantize(self.network, bits=WIDTHS, example_inputs=self.x)

    def float_step(self) -> FloatObjective:
        """As the pretrain stage trains."""
        network = copy.deepcopy(self.network)
        return FloatObjective(network, lr=0.01, momentum=0.9, weight_decay=1e-4, engine=self.engine)

    def joint(self, order: Any = "each", sampling: Any = None) -> JointObjective:
        """As the train stage trains, or the supernet stage with a sampler."""
        model = copy.deepcopy(self.model)
        sampler = None
        if sampling is not None:
            layers = tuple(quantized_layers(make_transitional(model)))
            sampler = AssignmentSampler(
                layers=layers,
                widths=WIDTHS,
                sensitive=frozenset(layers[::2]),
                sampling=sampling,
                sigma=1.0,
                sandwich=False,
                seed=0,
                steps=1,
                epochs=1,
            )
        return JointObjective(model, MultiPrecisionOptimizer(model), order, engine=self.engine, sampler=sampler)

    def singles(self) -> Step:
        """Four steps, each at one width."""
        model = copy.deepcopy(self.model)
        optimizer = MultiPrecisionOptimizer(model)
        forward = self.engine.forward_of(model)

        def step() -> None:
            for width in WIDTHS:
                with bs.switched(model, width):
                    nn.functional.cross_entropy(forward(self.x), self.y).backward()
                optimizer.step(width)

        return step

    def on_batch(self, objective: FloatObjective | JointObjective) -> Step:
        """A step on the one batch, numbered on, so that a sampler draws anew."""
        number = iter(range(1 << 30))
        return lambda: objective.step(self.x, self.y, 1.0, next(number))


def loaded(objective: FloatObjective | JointObjective, batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> Step:
    """A step on the next batch of a loader."""
    stream = batches()

    def step() -> None:
        objective.step(*next(stream), 1.0)

    return step


def endless(folder: Path | None) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """The stages' own training batches, epoch after epoch."""
    if folder is None:
        return lambda: iter(lambda: (torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))), None)
    data = load_data("cifar10", root=str(folder))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        loader = data.training_batches(batch_size=BATCH, seed=0, device=torch.device("cpu"), rank=0, world=1)
        for epoch in range(1 << 30):
            yield from loader.epoch(epoch)

    return batches


def sides(net: Network, batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> list[tuple[str, Step, str, Step]]:
    """(what, against what): the second is what counts as 1."""
    float_step = net.on_batch(net.float_step())

    def four_floats() -> None:
        for _ in WIDTHS:
            float_step()

    joint, accumulated, singles = net.on_batch(net.joint()), net.on_batch(net.joint("accumulate")), net.singles()
    return [
        ("joint", joint, "four single", singles),
        ("accumulated", accumulated, "four single", singles),
        ("joint", joint, "four float", four_floats),
        ("joint, with loader", loaded(net.joint(), batches), "float, with loader", loaded(net.float_step(), batches)),
        ("SuperNet, mixed", net.on_batch(net.joint(sampling="uniform")), "SuperNet, uniform",
         net.on_batch(net.joint(sampling="fixed"))),
    ]  # fmt: skip


def measure(dtype: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """A row for every pair of sides, and how many graphs were compiled after warm-up."""
    engine = Engine(precision="bfloat16" if dtype == "bfloat16" else "float32", compile=options.compile)
    pairs = sides(Network(engine), endless(options.data))
    for _, mine, _, other in pairs:
        for _ in range(options.warmup):
            mine()
            other()
    warm = counters["stats"]["unique_graphs"]
    rows = []
    for what, mine, against, other in pairs:
        times = [(seconds(other), seconds(mine)) for _ in range(options.pairs)]
        rows.append(
            {
                "dtype": dtype,
                "what": what,
                "against": against,
                "ms": round(1e3 * statistics.median(own for _, own in times), 1),
                "its ms": round(1e3 * statistics.median(reference for reference, _ in times), 1),
                **result.spread([own / reference for reference, own in times]),
                "pairs_ms": [[round(1e3 * one, 1) for one in pair] for pair in times],
            }
        )
    return rows, counters["stats"]["unique_graphs"] - warm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="both sides compiled")
    parser.add_argument("--pairs", type=int, default=15, help="at least 6")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="CIFAR-10, as an image folder or torchvision's files"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured, compiled = [], 0
    for dtype in options.dtypes:
        rows, more = measure(dtype, options)
        measured += rows
        compiled += more
    table = [
        [row[name] for name in COLUMNS[:6]]
        + ["{:.2f}-{:.2f}".format(*row[f"ratio_{s}"]) for s in ("bounds", "quartiles")]
        for row in measured
    ]
    for line in [COLUMNS, *table]:
        print(" | ".join(map(str, line)))
    print(f"graphs compiled after warm-up: {compiled}")
    if options.json:
        result.write(
            options.json,
            title="Joint training of ResNet20 {8, 6, 4, 2}, on the CPU"
            + (", compiled" if options.compile else ", eager"),
            data="random" if options.data is None else "cifar10, as given (loader rows)",
            split="none" if options.data is None else "train",
            note=f"Batch {BATCH}, {options.pairs} pairs, median of their ratios, its 95 % interval, quartiles; graphs compiled "
            f"after warm-up: {compiled}.",
            columns=COLUMNS,
            rows=table,
            measured=measured,
        )


if __name__ == "__main__":
    result.run(main)
