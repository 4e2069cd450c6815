"""The artifact: one file, integer codes, every width. NumPy and safetensors, no torch."""

from bitswitch.artifact.file import read, read_header, write
from bitswitch.artifact.header import Header, LayerEntry

__all__ = ["Header", "LayerEntry", "read", "read_header", "write"]
