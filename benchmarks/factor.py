"""What a dequantization scale of its own for each width, over the same integer codes, could change: a factor on the output of
every quantized convolution, which the batch normalization behind it divides away but for its small constant.

    python benchmarks/factor.py OUT.json RUN/model.safetensors --data CIFAR_FOLDER

Top-1 on val of a trained ResNet20 for CIFAR-10 with such a factor, its batch statistics those of the multiplied output (the
mean times the factor, the variance times its square, which is what re-calibration would find); and how many predictions differ.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import accuracy
import bitswitch as bs
import result
from bitswitch.nn import quantized_layers
from bitswitch.training import evaluate

FACTORS = (1.0, 0.5, 0.8, 1.25, 2.0)
# Below this a channel's output is constant: all its weights have become zero.
DEAD = 1e-10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("file", type=Path, help="artifact of ResNet20")
    parser.add_argument("--data", required=True, help="folder with train/ and test/")
    options = parser.parse_args()
    header = bs.artifact.read_header(options.file)
    data = accuracy.images_for(header, options.data)
    rows: list[list[float]] = []
    plain: list[Tensor] = []
    for factor in FACTORS:
        model = multiplied(bs.load(options.file), factor)
        predictions: list[Tensor] = []
        batches = data.evaluation_batches("val", batch_size=100, device=torch.device("cpu"))
        scores = evaluate(model, batches, header.widths, predictions=predictions)
        plain = plain or predictions
        others = [int((one != first).sum()) for one, first in zip(predictions, plain, strict=True)]
        rows.append([factor, *(score.top1 for score in scores), *others])
        print(rows[-1], flush=True)
    variances = torch.cat(
        [bn.variants[str(b)].running_var for bn in norms(bs.load(options.file)) for b in header.widths]
    )
    living = variances[variances > DEAD]
    result.write(
        options.out,
        title="A dequantization scale of its own for each width: top-1 % on val with such a factor",
        data=accuracy.label(data.fingerprint()),
        split="val",
        seeds=[header.provenance["seed"]],
        columns=["factor", *(f"{b} bits" for b in header.widths), *(f"others at {b}" for b in header.widths)],
        rows=rows,
        note=(
            f"Others: images whose prediction differs from that without a factor, of {data.size('val'):,}. The least variance "
            f"of {len(living):,} channels' outputs is {float(living.min()):.2g} where batch normalization adds 1e-5; "
            f"{len(variances) - len(living)} more are constant."
        ),
    )


def norms(model: nn.Module) -> list[Any]:
    """The batch normalization behind every quantized convolution: in ResNet20 bn1 of conv1, bn2 of conv2."""
    return [model.get_submodule(name.replace("conv", "bn")) for name in quantized_layers(model)]


def multiplied(model: nn.Module, factor: float) -> nn.Module:
    """The network with a factor on every quantized convolution's output, and the batch statistics of that."""
    for layer in quantized_layers(model).values():
        layer.register_forward_hook(lambda module, inputs, output: output * factor)
    for norm in norms(model):
        for variant in norm.variants.values():
            variant.running_mean *= factor
            variant.running_var *= factor**2
    return model


if __name__ == "__main__":
    result.run(main)
