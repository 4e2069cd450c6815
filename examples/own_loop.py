"""Your own network, your own loop: quantize, train four widths together, switch, save, load. Under a minute.

python examples/own_loop.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bitswitch as bs

torch.manual_seed(0)
images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16
loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=50, shuffle=True)

network = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Flatten(), nn.Linear(512, 10)),
)
optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
for _ in range(8):  # a trained float network is the start
    for x, y in loader:
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

model = bs.quantize(network, bits=(8, 6, 4, 2), example_inputs=images[:256])
joint = bs.MultiPrecisionOptimizer(model, lr=1e-3)
for _ in range(8):
    for x, y in loader:
        for width in joint.widths:
            with bs.switched(model, width):
                F.cross_entropy(model(x), y).backward()
            joint.step(width)  # steps and clears

bs.save(model, "runs/own_loop.safetensors")
loaded = bs.load("runs/own_loop.safetensors", model=network)  # the network is your own: the file holds no code
for name, net, width in [("float", network, None), *((f"{w} bits", loaded, w) for w in joint.widths)]:
    if width is not None:
        bs.switch(net, width)
    with torch.no_grad():
        hits = net.eval()(images[1400:]).argmax(1) == labels[1400:]
    print(f"{name}: {100 * hits.float().mean():.1f} % of {len(hits)} images")
