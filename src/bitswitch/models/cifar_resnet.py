"""The residual networks for small images (He et al., arXiv 1512.03385, section 4.2)."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitswitch.errors import UserError

Shortcut = Literal["A", "B"]


class _PadShortcut(nn.Module):
    """Option A: every second pixel, and zeros for the channels that are new. No parameters."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        half = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.new_channels - half))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            if shortcut == "A":
                self.shortcut = _PadShortcut(outputs - inputs, stride)
            else:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.shortcut(x)
        return F.relu(y)


class CifarResNet(nn.Module):
    """A residual network of 6n + 2 layers in three stages of 16, 32 and 64 channels.

    Args:
        depth: 6n + 2: 8, 20, 32, 44, 56 or 110.
        num_classes: how many the last layer tells apart.
        in_channels: of the images.
        shortcut: "A" pads with zeros, as the paper does on CIFAR; "B" projects where the shape changes.
    """

    def __init__(self, depth: int, *, num_classes: int = 10, in_channels: int = 3, shortcut: Shortcut = "A") -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6 or shortcut not in ("A", "B"):
            raise UserError(
                f"depth={depth}, shortcut={shortcut!r}: depth is 6n + 2 (8, 20, 32, ...), shortcut 'A' or 'B'"
            )
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16, 1, shortcut)
        self.layer2 = self._stage(blocks, 16, 32, 2, shortcut)
        self.layer3 = self._stage(blocks, 32, 64, 2, shortcut)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(blocks: int, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
        first = _Block(inputs, outputs, stride, shortcut)
        return nn.Sequential(first, *(_Block(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> logits [N, num_classes]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))


def cifar_resnet(depth: int, *, num_classes: int = 10, in_channels: int = 3, shortcut: Shortcut = "A") -> CifarResNet:
    """A `CifarResNet`, freshly initialised.

    Raises:
        UserError: the depth is not 6n + 2, or the shortcut is neither "A" nor "B".
    """
    return CifarResNet(depth, num_classes=num_classes, in_channels=in_channels, shortcut=shortcut)
