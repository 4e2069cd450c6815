"""From a torch model to an artifact, and back; from both to ONNX."""

from bitswitch.export.artifact import load, save, upgrade

__all__ = ["load", "save", "upgrade"]
