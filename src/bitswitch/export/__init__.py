"""From a torch model to an artifact, and back; from both to ONNX."""

from bitswitch.export.artifact import add_graph, save
from bitswitch.export.loading import load, upgrade

__all__ = ["add_graph", "load", "save", "upgrade"]
