"""Networks: the CIFAR ResNets, and any other by name."""

from bitswitch.models.cifar_resnet import CifarResNet, cifar_resnet
from bitswitch.models.registry import build, is_trusted, without_weights
from bitswitch.models.weights import load_weights, read_weights
from bitswitch.models.within import build_within

__all__ = [
    "CifarResNet",
    "build",
    "build_within",
    "cifar_resnet",
    "is_trusted",
    "load_weights",
    "read_weights",
    "without_weights",
]
