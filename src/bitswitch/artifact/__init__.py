"""The file: header, tensors, read and write. NumPy and safetensors alone."""

from bitswitch.artifact.file import is_artifact, read, read_header, write
from bitswitch.artifact.frontier import check_choice, within_budget
from bitswitch.artifact.header import Header, LayerEntry, tensor_name

__all__ = [
    "Header",
    "LayerEntry",
    "check_choice",
    "is_artifact",
    "read",
    "read_header",
    "tensor_name",
    "within_budget",
    "write",
]
