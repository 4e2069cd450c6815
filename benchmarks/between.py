"""Whether the programme's SubNets gain by the traces, or by keeping to neighbouring widths alone.

    python benchmarks/between.py none-of-decide-paper-seed0 hasb-of-... --data CIFAR_FOLDER --json results/cifar10/between.json

A job is one of mixed.py that is done: its run is in --work, its file in --results. Its random SubNets have all four widths;
those that are drawn here have the two next to the average alone, evenly among all of the same average. SubNets count every
layer once in their average, large or small; beside it stand the bits of a weight, which is what they store.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import accuracy
import bitswitch as bs
import mixed
import result
from bitswitch.machine import machine
from bitswitch.nn import quantized_layers

# Budgets that no network of one width meets.
BUDGETS = (2.5, 3.0, 3.5, 5.0)


def main() -> None:
    parser = mixed.parser(__doc__)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    places = accuracy.Places(options.data, None, options.work, options.results)
    rows, drawn, images, splits, seeds = [], {}, [], [], []
    for job in options.jobs:
        known, artifact = mixed.done(job, places)
        some, drawn[job] = _rows(job, known, artifact, str(options.data))
        rows += some
        images.append(known["data"])
        splits.append(known["split"])
        seeds += known["seeds"]
    result.write(
        options.json,
        title="Random SubNets of the two widths next to the average: top-1 %, and bits of a weight",
        data=", ".join(dict.fromkeys(images)),
        split=", ".join(dict.fromkeys(splits)),
        seeds=sorted(set(seeds)),
        note=f"{mixed.RANDOM} random SubNets each, mean ± standard deviation; those of all widths and the traces' are of "
        "the files of mixed.py. Average bits count every layer once, bits of a weight every weight.",
        columns=[
            *("SuperNet", "seed", "average bits", "by traces", "random, two widths", "random, all widths"),
            *("bits of a weight: by traces", "two widths", "all widths"),
        ],
        rows=rows,
        drawn=drawn,
        machine=machine(mixed.DEVICE),
    )


def _rows(job: str, known: Mapping[str, Any], artifact: Path, folder: str) -> tuple[list[list[Any]], dict[str, Any]]:
    way, _, joint = job.partition("-of-")
    model, header = bs.load(artifact).to(mixed.DEVICE), bs.artifact.read_header(artifact)
    data = accuracy.images_for(header, folder)
    sizes = {name: layer.stored_shape.numel() for name, layer in quantized_layers(model).items()}
    seed, split = known["seeds"][0], known["split"]
    drawn = {
        budget: mixed.random_subnets(tuple(sizes), _beside(budget, header.widths), budget, seed)
        for budget in BUDGETS
        if budget < header.widths[0] and budget not in header.widths
    }
    asked = [one for some in drawn.values() for one in some]
    top1 = dict(zip(asked, mixed.top1_of(model, data, split, asked, None), strict=True))
    rows: list[list[Any]] = []
    for budget, some in drawn.items():
        (chosen,) = (row for row in known["rows"] if row[:2] == [budget, "programme, damage hessian"])
        others = known["random"][str(budget)]
        rows.append(
            [
                *(f"{way} after {joint.rpartition('-seed')[0]}", seed, budget, chosen[2]),
                mixed.mean_and_spread([top1[one] for one in some]),
                mixed.mean_and_spread([one[1] for one in others]),
                *(
                    f"{statistics.mean(_bits_of_a_weight(digits, sizes) for digits in widths):.2f}"
                    for widths in ([chosen[3]], map(mixed.digits, some), [one[0] for one in others])
                ),
            ]
        )
    return rows, {str(budget): [[mixed.digits(one), top1[one]] for one in some] for budget, some in drawn.items()}


def _beside(budget: float, widths: Sequence[int]) -> tuple[int, int]:
    return min(width for width in widths if width > budget), max(width for width in widths if width < budget)


def _bits_of_a_weight(digits: str, sizes: Mapping[str, int]) -> float:
    bits = sum(int(digit) * size for digit, size in zip(digits, sizes.values(), strict=True))
    return bits / sum(sizes.values())


if __name__ == "__main__":
    result.run(main)
