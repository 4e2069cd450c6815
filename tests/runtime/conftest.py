import copy

import pytest
import torch
from torch import nn

import bitswitch as bs


class Branching(nn.Module):
    """An addition, a signed input, groups, and every kind of float rest."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 12, 1, groups=2, bias=False)
        self.bn3 = nn.BatchNorm2d(12)
        self.conv4 = nn.Conv2d(12, 12, 3)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = x + self.bn2(self.conv2(x))
        x = self.bn3(self.conv3(nn.functional.gelu(x))).relu()
        return self.fc(self.conv4(x).mean((2, 3)))


@pytest.fixture(scope="session")
def network():
    return Branching()


@pytest.fixture(scope="session")
def small(network):
    """(quantized model in eval mode, images): statistics of every width of its own; closed and negative channels."""
    torch.manual_seed(0)
    images = torch.randn(16, 3, 8, 8)
    network = copy.deepcopy(network)
    network(images)
    with torch.no_grad():
        network.bn2.weight.copy_(torch.tensor([1.0, -1, 0, 1e-12, 0.5, 2, -0.3, 1]))
        network.bn2.bias.uniform_(-1, 1)
        network.bn3.weight[:3] = torch.tensor([-1.0, 0.0, 1e-12])
        network.bn3.bias.uniform_(-1, 1)
    model = bs.quantize(network, example_inputs=images)
    for width in (8, 6, 4, 2):
        with bs.switched(model, width):
            model.train()(images)
    return model.eval(), images
