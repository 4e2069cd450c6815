"""The file: header, bit planes, tensors, read and write. NumPy and safetensors alone."""

from bitswitch.artifact.file import (
    graph_of,
    holds,
    is_artifact,
    read,
    read_header,
    read_held,
    read_part,
    read_planes,
    served_widths,
    write,
)
from bitswitch.artifact.frontier import check_choice, within_budget
from bitswitch.artifact.header import Header, LayerEntry, tensor_name
from bitswitch.artifact.layout import GRAPH, Located
from bitswitch.artifact.planes import plane_bytes
from bitswitch.artifact.shipped import located, shipped

__all__ = [
    "GRAPH",
    "Header",
    "LayerEntry",
    "Located",
    "check_choice",
    "graph_of",
    "holds",
    "is_artifact",
    "located",
    "plane_bytes",
    "read",
    "read_header",
    "read_held",
    "read_part",
    "read_planes",
    "served_widths",
    "shipped",
    "tensor_name",
    "within_budget",
    "write",
]
