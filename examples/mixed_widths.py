"""A width for every layer, by name, without training: load an artifact, assign, evaluate.

bitswitch run digits && python examples/mixed_widths.py runs/digits
python examples/mixed_widths.py runs/cifar10-resnet20 CIFAR_FOLDER
"""

import sys
from pathlib import Path

import torch

import bitswitch as bs
from bitswitch.artifact import read_header
from bitswitch.data import Preprocessing, load_data
from bitswitch.training import evaluate

file = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits") / "model.safetensors"
header = read_header(file)
model = bs.load(file)
names = list(bs.widths(model))
high, low = header.widths[0], header.widths[-1]

precisions = {
    f"every layer at {high} bits": high,
    f"all but {names[0]} at {low} bits": dict.fromkeys(names, low) | {names[0]: high},
    f"first half at {high} bits, second at {low}": {
        name: high if i < len(names) // 2 else low for i, name in enumerate(names)
    },
    f"every layer at {low} bits": low,
}
recipe = header.provenance["config"]["data"]
data = load_data(recipe["name"], sys.argv[2] if len(sys.argv) > 2 else None, val_fraction=recipe["val_fraction"])
data = data.with_preprocessing(Preprocessing.from_json(header.preprocessing))  # as the network was trained
# A width is chosen by what it does to `val`; `test` is for the final number.
batches = data.evaluation_batches("val", batch_size=256, device=torch.device("cpu"))
for name, score in zip(precisions, evaluate(model, batches, list(precisions.values())), strict=True):
    print(f"{name}: {score.top1:.2f} % of {score.images} val images")

bs.switch(model, {names[0]: low})  # some layers: the others stay as they are
print("now:", bs.widths(model))
