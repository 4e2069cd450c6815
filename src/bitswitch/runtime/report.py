"""What the graph of an artifact is made of when it runs: how much of it in integers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitswitch.runtime.source import read

INTEGER_PRODUCTS = ("QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat")
FLOAT_PRODUCTS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose")


def graph_report(path: str | Path, wanted: int | Mapping[str, int] | None = None) -> dict[str, Any]:
    """What ONNX Runtime makes of an artifact's graph on this machine.

    Args:
        path: the artifact.
        wanted: a width, or widths by layer; the highest that the file holds where None.

    Returns:
        {"additions": "requantized" or "exact", "layers": quantized layers' products in the graph, "integer": convolutions and
        matrix products in integer kernels, "float": those in float ones (the first and the last layer, and products of two
        activations, are meant to be), "operations": {type: count}}.

    Raises:
        UserError: the file cannot be used or holds no graph, or it has no such width or layer.
    """
    source = read(path)
    counts = source.operations(source.assignment(source.widths[0] if wanted is None else wanted).to_json())
    return {
        "additions": source.bindings.additions,
        "layers": len(source.bindings.products),
        "integer": sum(counts[name] for name in INTEGER_PRODUCTS),
        "float": sum(counts[name] for name in FLOAT_PRODUCTS),
        "operations": dict(sorted(counts.items())),
    }
