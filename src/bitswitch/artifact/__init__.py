"""The artifact: one file, integer codes, every width. NumPy and safetensors, no torch."""

from bitswitch.artifact.file import is_artifact, read, read_header, write
from bitswitch.artifact.header import Header, LayerEntry, tensor_name

__all__ = ["Header", "LayerEntry", "is_artifact", "read", "read_header", "tensor_name", "write"]
