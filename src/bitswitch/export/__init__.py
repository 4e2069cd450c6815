"""From a torch model to an artifact, and back; from both to ONNX."""

from bitswitch.export.artifact import load, save

__all__ = ["load", "save"]
