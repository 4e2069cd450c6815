"""The torch-free runtime: an artifact on ONNX Runtime's integer kernels, its widths switched in microseconds."""

from bitswitch.runtime.report import graph_report
from bitswitch.runtime.session import Session

__all__ = ["Session", "graph_report"]
