import pytest
import torch
from torch import nn

import bitswitch as bs


class Small(nn.Module):
    """A small residual network with every kind of tensor that an artifact holds."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.gelu = nn.GELU()
        self.conv3 = nn.Conv2d(8, 12, 1, groups=2, bias=False)
        self.norm = nn.GroupNorm(2, 12)
        self.conv4 = nn.Conv2d(12, 12, 3)
        self.fc = nn.Linear(12, 5)
        self.register_buffer("steps", torch.tensor([3, -7]))

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = x + self.bn2(self.conv2(x)).relu()
        x = self.norm(self.conv3(self.gelu(x - 0.3)))
        return self.fc(self.conv4(x).mean((2, 3)))


@pytest.fixture
def images():
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def network(images):
    torch.manual_seed(0)
    model = Small()
    model(images)  # moves the running statistics off their start
    return model


@pytest.fixture
def quantized(network, images):
    return bs.quantize(network, example_inputs=images)
