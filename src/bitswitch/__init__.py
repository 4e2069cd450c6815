"""bitswitch: one trained network, one stored integer per quantized weight, every precision from it.

The public names are imported when they are first used, so that `bitswitch.runtime` needs no torch.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from bitswitch.version import __version__

if TYPE_CHECKING:
    from bitswitch.export import load, save, upgrade
    from bitswitch.export.onnx import export_onnx
    from bitswitch.nn import quantize, switch, switched, widths
    from bitswitch.search import hessian_trace
    from bitswitch.training import MultiPrecisionOptimizer

_ROOMS = {
    "quantize": "bitswitch.nn",
    "switch": "bitswitch.nn",
    "switched": "bitswitch.nn",
    "widths": "bitswitch.nn",
    "MultiPrecisionOptimizer": "bitswitch.training",
    "hessian_trace": "bitswitch.search",
    "search": "bitswitch.search",
    "save": "bitswitch.export",
    "load": "bitswitch.export",
    "upgrade": "bitswitch.export",
    "export_onnx": "bitswitch.export.onnx",
}

_EXTRAS = {
    "torch": "train",
    "torchvision": "train",
    "scipy": "train",
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxscript": "onnx",
}

__all__ = [
    "MultiPrecisionOptimizer",
    "__version__",
    "export_onnx",
    "hessian_trace",
    "load",
    "quantize",
    "save",
    "search",
    "switch",
    "switched",
    "upgrade",
    "widths",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'bitswitch' has no attribute {name!r}")
    try:
        room = importlib.import_module(_ROOMS[name])
        # That room can itself be called.
        return room if name == "search" else getattr(room, name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in _EXTRAS:
            extra = _EXTRAS[missing]
            raise ModuleNotFoundError(
                f"bitswitch.{name} needs {missing}: pip install 'bitswitch[{extra}]'", name=missing
            ) from error
        raise


def __dir__() -> list[str]:
    # Without what is not installed: help() and inspect.getmembers get all that is listed, and would raise.
    lacking = {extra for module, extra in _EXTRAS.items() if importlib.util.find_spec(module) is None}
    if "train" in lacking:
        return sorted(set(__all__) - set(_ROOMS))
    return sorted(set(__all__) - ({"export_onnx"} if "onnx" in lacking else set()))
