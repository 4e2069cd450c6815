"""Float weights that were made from integer codes, and are kept while their width is in use."""

import threading
from contextlib import nullcontext
from operator import is_
from typing import Any

import torch
from torch import Tensor

from bitswitch.codes import narrow_in_unit
from bitswitch.nn.quantizers import WeightQuantizer


class KeptWeights:
    """The float weights of a layer at the widths used latest. Copies and pickles start with none.

    Args:
        most: for how many widths a weight is kept.
    """

    def __init__(self, most: int = 1) -> None:
        self.most = most
        self._threads: set[int] = set()
        self._lock = threading.RLock()
        self.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptWeights, (self.most,)

    def __len__(self) -> int:
        return len(self._weights)

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._weights: dict[int, Tensor] = {}
            self._lent: set[int] = set()
            self._made_of: tuple[Tensor, Tensor] | None = None
            self._versions = (0, 0)

    def at(self, codes: Tensor, quantizer: WeightQuantizer, width: int, dtype: torch.dtype, *, lent: bool) -> Tensor:
        """`narrow(codes) * 2^(h-l) * s_h`, kept or made now.

        Args:
            codes: of the highest width, int8.
            quantizer: whose scale it is.
            width: of the weight.
            dtype: of the weight.
            lent: somebody may still hold the weight after its width is no longer in use.
        """
        parameter = quantizer.scale_parameter
        # A graph that is compiled, exported or traced holds the integers; and a scale that learns moves.
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not self.most or tracing or parameter.requires_grad:
            return _dequantized(codes, quantizer.scale(), quantizer.high, width, dtype)
        with self._lock:
            return self._kept_or_made(codes, quantizer, width, dtype, lent=lent)

    def _kept_or_made(
        self, codes: Tensor, quantizer: WeightQuantizer, width: int, dtype: torch.dtype, *, lent: bool
    ) -> Tensor:
        parameter = quantizer.scale_parameter
        self._threads.add(threading.get_ident())
        # The tensors themselves: another could be given the address of one that is gone.
        made_of, versions = (codes, parameter), (_version(codes), _version(parameter))
        if self._made_of is None or not all(map(is_, made_of, self._made_of)) or versions != self._versions:
            self.clear()
            self._made_of, self._versions, self._scale = made_of, versions, quantizer.scale()
        weight = self._weights.pop(width, None)
        if weight is None:
            # In inference mode the weight would be one that no later backward to an input may use.
            with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
                spare = self._spare()
                weight = _dequantized(codes, self._scale, quantizer.high, width, dtype, out=spare)
        # What stands for a tensor while a tracer runs must not outlive it.
        if type(weight) is Tensor:
            self._weights[width] = weight
            if lent:
                self._lent.add(width)
        return weight

    def _spare(self) -> Tensor | None:
        """Make room for one more. Returns the memory of one that is dropped, if nobody else can hold it."""
        dropped = None
        while len(self._weights) >= self.most:
            width = next(iter(self._weights))
            dropped = self._weights.pop(width)
            # Another thread may be computing with it. On a GPU torch keeps memory anyway, and another stream may read this.
            if width in self._lent or len(self._threads) > 1 or not dropped.is_cpu:
                dropped = None
            self._lent.discard(width)
        return dropped


def _dequantized(
    codes: Tensor, scale: Tensor, high: int, width: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    # In the unit of the highest width: the same product to the last bit, since the two differ by a power of two.
    narrowed = narrow_in_unit(codes, high, width)
    # The first touch of new memory costs as much as all the arithmetic.
    if dtype == scale.dtype:
        weight = narrowed.to(dtype) if out is None else out.copy_(narrowed)
        return weight.mul_(scale)
    # The product is rounded once, as in training.
    return (narrowed.to(scale.dtype) * scale).to(dtype)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; of those made in inference mode torch does not count it."""
    return 0 if tensor.is_inference() else tensor._version
