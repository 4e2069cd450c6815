"""Where the shared weight scale starts, and what the network is worth there before any training.

    python benchmarks/starts.py OUT.json --data CIFAR_FOLDER --weights results/cifar10/float-seed0.safetensors

Each way of narrowing with each criterion of the scale; batch normalization is re-calibrated for every width, judged on val.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import accuracy
import bitswitch as bs
import result
from bitswitch.config import load_recipe
from bitswitch.evaluation import training_views
from bitswitch.models import load_weights
from bitswitch.nn import quantized_layers
from bitswitch.nn.quantizers import Method
from bitswitch.numerics import Narrowing, double_round
from bitswitch.pipeline import open_data
from bitswitch.pipeline.run import build_network
from bitswitch.training import evaluate, recalibrate

METHODS: tuple[Method, ...] = ("double_rounding", "centred", "adabits", "bit_mixer")
# From E [candidates, widths], squared error / squared weights, to what is to be least.
CRITERIA: dict[str, Callable[[Tensor], Tensor]] = {
    "sum of E / least E": lambda e: (e / e.amin(0)).sum(1),
    "greatest E / least E": lambda e: (e / e.amin(0)).amax(1),
    "sum of log E": lambda e: e.log().sum(1),
    "sum of log (E + 0.01) (the default)": lambda e: (e + 0.01).log().sum(1),
    "sum of log (E + 0.001)": lambda e: (e + 0.001).log().sum(1),
    "widest alone": lambda e: e[:, 0],
    "narrowest alone (sum of E)": lambda e: e.sum(1),
}
STEPS_PER_OCTAVE = 8


def errors(weight: Tensor, widths: tuple[int, ...], narrowing: Narrowing) -> tuple[Tensor, Tensor]:
    """(candidate scales, E [candidates, widths])."""
    high = widths[0]
    scales = weight.abs().max() * 2.0 ** (
        torch.arange(-5 * STEPS_PER_OCTAVE, 2 * STEPS_PER_OCTAVE) / STEPS_PER_OCTAVE - high + 1
    )
    rows = [
        [
            (double_round(weight, scale, high=high, low=low, narrowing=narrowing) - weight).square().sum()
            for low in widths
        ]
        for scale in scales
    ]
    return scales, torch.tensor(rows) / weight.square().sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", required=True, help="folder with train/ and test/")
    parser.add_argument("--weights", required=True, help="of a float network")
    parser.add_argument("--images", type=int, default=2560, help="for statistics")
    options = parser.parse_args()
    recipe = load_recipe(accuracy.RECIPE, [f"data.root={options.data}", *accuracy.NORMALIZED])
    data, device, widths = open_data(recipe), torch.device("cpu"), recipe.bits
    network = build_network(recipe, data).eval()
    load_weights(network, options.weights)
    views = training_views(data, options.images, device)
    rows = []
    for method in METHODS:
        model = bs.quantize(network, example_inputs=data.sample(512), bits=widths, method=method)
        with torch.no_grad():
            found = {
                name: errors(layer.weight, widths, layer.weight_quantizer.narrowing)
                for name, layer in quantized_layers(model).items()
            }
        for criterion, worst in CRITERIA.items():
            chosen = []
            for name, layer in quantized_layers(model).items():
                scales, error = found[name]
                best = int(worst(error).argmin())
                layer.weight_quantizer.set_scale(scales[best])
                chosen.append(error[best])
            for width in widths:
                recalibrate(model, views, width)
            scores = evaluate(model, data.evaluation_batches("val", batch_size=256, device=device), widths)
            mean = torch.stack(chosen).log().mean(0).exp().tolist()
            rows.append([method, criterion, *(score.top1 for score in scores), *(f"{value:.2g}" for value in mean)])
            print(rows[-1], flush=True)
    result.write(
        options.out,
        title="Before any training: the start of the shared weight scale, top-1 % on val, and E of the weights",
        data=accuracy.label(data.fingerprint()),
        split="val",
        columns=["narrowing", "least", *(f"{b} bits" for b in widths), *(f"E at {b}" for b in widths)],
        rows=rows,
        note=(
            f"Weights of {Path(options.weights).name}; one scale for each layer, E its squared error / squared weights, "
            f"the geometric mean over layers; statistics from {options.images} augmented training images."
        ),
    )


if __name__ == "__main__":
    result.run(main)
