"""Your own network, your own loop: quantize, train for four widths at once, switch, save, load. About 20 seconds.

python examples/own_loop.py
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import bitswitch as bs

torch.manual_seed(0)
images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16
order = torch.randperm(len(labels))
train, test = order[:1400], order[1400:]


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Convolution, batch normalization, ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def batches(epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of 50."""
    for _ in range(epochs):
        for index in train[torch.randperm(len(train))].split(50):
            yield images[index], labels[index]


network = nn.Sequential(block(1, 16), block(16, 32), nn.MaxPool2d(2), block(32, 32), nn.Flatten(), nn.Linear(512, 10))
optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
for x, y in batches(epochs=8):  # a trained float network is the start
    F.cross_entropy(network(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()

model = bs.quantize(network, bits=(8, 6, 4, 2), example_inputs=images[train[:256]])
joint = bs.MultiPrecisionOptimizer(model, lr=1e-3)
for x, y in batches(epochs=8):
    for width in joint.widths:
        with bs.switched(model, width):
            F.cross_entropy(model(x), y).backward()
        joint.step(width)


def accuracy(logits: Tensor) -> str:
    """Top-1 on the test images."""
    return f"{100 * (logits.argmax(1) == labels[test]).float().mean():.1f} %"


with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    file = Path(folder) / "model.safetensors"
    bs.save(model.eval(), file)
    loaded = bs.load(file, model=network)  # the network is your own: the file holds no code
    print(f"{file.stat().st_size:,} bytes; float {accuracy(network.eval()(images[test]))}")
    for width in joint.widths:
        bs.switch(model, width)
        bs.switch(loaded, width)
        assert torch.equal(loaded(images[test]), model(images[test]))
        print(f"{width} bits: {accuracy(loaded(images[test]))}")
