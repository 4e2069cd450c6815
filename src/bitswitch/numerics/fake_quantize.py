"""Fake quantization with gradients: double rounding for weights, the learned step for activations.

Equations: arXiv 2502.01199 section 3 (double rounding), arXiv 1902.08153 (LSQ, the gradient of a scale). Weights round
half up, as `codes.narrow` does; activations round half to even, as ONNX's QuantizeLinear does. Both recompute in backward
what they need from their own input, which autograd keeps anyway, instead of saving float copies.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from bitswitch.codes import narrow, signed_range

# How codes of the highest width become codes of a lower one: "half_up" is the law of `codes.narrow`; the others are the
# rivals that the paper compares with.
Narrowing = Literal["half_up", "floor", "floor_symmetric", "centred"]
# An int, or a 0-dim tensor of one: a width, or a bound of codes. As tensors, one compiled graph serves all of them.
Integer = Any


def weight_codes(weight: Tensor, scale: Tensor, bits: Integer) -> Tensor:
    """`q_h = clip(floor(W / s_h + 1/2), -2^(h-1), 2^(h-1) - 1)`: the integers that are stored.

    Args:
        weight: float weights, any shape; bfloat16 and float16 are computed in float32.
        scale: positive, a scalar or a shape that broadcasts against `weight` (one scale per output channel).
        bits: the highest width, h.

    Returns:
        int8 codes of the shape of `weight`. The code of a NaN is not defined.
    """
    low, high = signed_range(bits)
    # Beside bfloat16 and float16 weights a 0-dim scale does not make the quotient float32 by itself.
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return torch.floor(weight / scale + 0.5).clamp_(low, high).to(torch.int8)


def _lsq_factor(elements: int, shared_by: int, greatest: Integer, enabled: bool) -> float | Tensor:
    """`1 / sqrt(N Qp)`, N the number of elements that share one scale; 1 where it is switched off."""
    if not (enabled and elements):
        return 1.0
    return ((greatest.double() if isinstance(greatest, Tensor) else greatest) * (elements / shared_by)) ** -0.5


def narrowed_codes(
    weight: Tensor, scale: Tensor, *, high: Integer, low: Integer, narrowing: Narrowing = "half_up"
) -> Tensor:
    """Codes of `low` bits, derived from those of `high` bits: int8, the shape of `weight`.

    "half_up": `codes.narrow`. "floor" (AdaBits): `floor(q_h / 2^D)`. "floor_symmetric" (Bit-Mixer): the same, the lowest
    code of either width dropped, so that codes of b bits lie in [-(2^(b-1) - 1), 2^(b-1) - 1]. "centred": floor, and a code
    stands for the middle of its step; see `centre`.
    """
    codes = weight_codes(weight, scale, high)
    if narrowing == "half_up":
        return narrow(codes, high, low)
    if narrowing in ("floor", "centred"):
        return codes >> (high - low)
    return (codes.clamp(min=code_range(high, narrowing)[0]) >> (high - low)).clamp(min=code_range(low, narrowing)[0])


def centre(high: Integer, low: Integer, narrowing: Narrowing) -> Any:
    """What is added to a code of `low` bits before it is scaled: for "centred" 1/2 below the highest width, else 0.

    So 2 bits have levels on both sides of zero, and all are odd multiples of half a step, which int8 holds. The codes of the
    highest width that a level stands for lie around it to half a step of that width, as they do for "half_up".
    """
    return 0.5 * (low != high) if narrowing == "centred" else 0


def code_range(bits: Integer, narrowing: Narrowing) -> tuple[Integer, Integer]:
    """The least and the greatest weight code of a width."""
    least, greatest = signed_range(bits)
    return (-greatest if narrowing == "floor_symmetric" else least), greatest


def _keep(ctx: Any, *values: Any) -> None:
    """Save tensors as autograd wants it, and the rest as it is."""
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in values))
    ctx.plain = tuple(None if isinstance(value, Tensor) else value for value in values)


def _kept(ctx: Any) -> tuple[Any, ...]:
    return tuple(plain if saved is None else saved for saved, plain in zip(ctx.saved_tensors, ctx.plain, strict=True))


def _product(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`codes * scale` as `dtype`, in the memory of `codes` where nobody compiles.

    torch 2.11 compiles a Function to one without gradients where its result is another tensor's memory: that of an operation
    in place, or of a conversion to the dtype that it has already.
    """
    result = codes * scale if torch.compiler.is_compiling() else codes.mul_(scale)
    return result if result.dtype == dtype else result.to(dtype)


class _NarrowedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, high: Integer, low: Integer, narrowing: Narrowing, lsq_factor: bool
    ) -> Tensor:
        _keep(ctx, weight, scale, high, low)
        ctx.narrowing, ctx.lsq_factor = narrowing, lsq_factor
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        codes = narrowed_codes(wide, scale, high=high, low=low, narrowing=narrowing)
        # An integer cannot carry a NaN on to the loss; adding 0 * W does, and changes no finite result.
        if narrowing == "centred":
            codes = codes + centre(high, low, narrowing)
        return _product(codes + wide * 0, scale * (1 << (high - low)), weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        (gradient,) = gradients
        stored, scale, high, low = _kept(ctx)
        weight = stored.to(torch.promote_types(stored.dtype, torch.float32))
        ratio = 1 << (high - low)
        least, greatest = code_range(low, ctx.narrowing)
        v = weight / (scale * ratio)
        if ctx.narrowing == "centred":
            v = v - centre(high, low, ctx.narrowing)
        inside = (v >= least) & (v <= greatest)
        grad_weight = gradient * inside if ctx.needs_input_grad[0] else None
        grad_scale = None
        if ctx.needs_input_grad[1]:
            q = narrowed_codes(weight, scale, high=high, low=low, narrowing=ctx.narrowing)
            per_element = gradient * torch.where(
                inside, q - v, v.clamp(least, greatest) + centre(high, low, ctx.narrowing)
            )
            factor = _lsq_factor(weight.numel(), scale.numel(), greatest, ctx.lsq_factor)
            grad_scale = (per_element.sum_to_size(scale.shape) * (ratio * factor)).to(scale.dtype)
        return grad_weight, grad_scale, None, None, None, None


def double_round(
    weight: Tensor,
    scale: Tensor,
    *,
    high: Integer,
    low: Integer,
    narrowing: Narrowing = "half_up",
    lsq_factor: bool = True,
) -> Tensor:
    """Weights at `low` bits, from the codes of `high` bits: `W_l = narrow(q_h) * s_h * 2^(h-l)`.

    Gradients: to the weights, straight through where `v = W / (s_h 2^(h-l))` lies within the range of `low` bits, else 0;
    to the scale, per element `round(v) - v` within the range and the bound outside, times `2^(h-l)` (the chain rule from
    `s_l` to `s_h`) and times the LSQ factor.

    Args:
        weight: float weights, any shape.
        scale: `s_h`, positive, same dtype, a scalar or a shape that broadcasts against `weight`.
        high: the width of the stored codes, h.
        low: the width wanted, l.
        narrowing: "half_up", or a rival's rule in its place; see `narrowed_codes`.
        lsq_factor: multiply the scale's gradient by `1 / sqrt(N Qp)`, N the elements that share a scale, Qp = 2^(l-1) - 1.

    Returns:
        Float weights of the same shape and dtype, each a whole multiple of `s_h 2^(h-l)`. NaN where the weight is NaN.
    """
    return _NarrowedWeight.apply(weight, scale, high, low, narrowing, lsq_factor)


def zero_point(offset: Tensor, scale: Tensor, greatest: Integer) -> Tensor:
    """The integer zero-point `clip(round(-z / s), 0, greatest)`, as a float tensor that holds a whole number."""
    return torch.round(-offset / scale).clamp(min=0).clamp(max=greatest)


def _summed_to(x: Tensor, shape: torch.Size) -> Tensor:
    """The sum over the axes that a scale's shape does not have."""
    if torch.compiler.is_compiling() and not shape and x.dim() > 2:
        # By channel first: a compiler makes one loop of this sum and of batch normalization's backward.
        x = x.sum([0, *range(2, x.dim())])
    return x.sum_to_size(shape)


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, least: Integer, greatest: Integer, lsq: bool
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        _keep(ctx, x, scale, offset, least, greatest)
        ctx.lsq_factor = lsq
        step = scale.to(wide)
        v = x.to(wide).div(step).round_()
        if offset is None:
            return _product(v.clamp_(least, greatest), step, x.dtype)
        shift = zero_point(offset.to(wide), step, greatest)
        return _product(v.add_(shift).clamp_(least, greatest).sub_(shift), step, x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, scale, offset, least, greatest = _kept(ctx)
        wide = torch.promote_types(x.dtype, torch.float32)
        # A product, cheaper than the quotient of the forward: a bound or a tie may fall to the other side by a rounding.
        v = x.to(wide) * scale.to(wide).reciprocal()
        # Before the zero-point is added, as in forward: an odd one would turn ties the other way.
        nearest = v.round()
        if offset is not None:
            shift = zero_point(offset.to(wide), scale.to(wide), greatest)
            v, nearest = v.add_(shift), nearest.add_(shift)
        held = v.clamp(least, greatest)
        inside = held == v
        grad_x = torch.where(inside, gradient, 0.0) if ctx.needs_input_grad[0] else None
        grad_scale = grad_offset = None
        if ctx.needs_input_grad[1]:
            per_element = torch.where(inside, nearest.sub_(v), held).mul_(gradient)
            factor = _lsq_factor(x.numel(), scale.numel(), greatest, ctx.lsq_factor)
            grad_scale = (_summed_to(per_element, scale.shape) * factor).to(scale.dtype)
        if offset is not None and ctx.needs_input_grad[2]:
            outside = torch.where(inside, 0.0, gradient).to(wide)
            grad_offset = outside.sum_to_size(offset.shape).to(offset.dtype)
        return grad_x, grad_scale, grad_offset, None, None, None


def learned_step(
    x: Tensor,
    scale: Tensor,
    *,
    bounds: tuple[Integer, Integer],
    offset: Tensor | None = None,
    lsq_factor: bool = True,
) -> Tensor:
    """Activations at one width: `(clip(round(x / s) + zp, least, greatest) - zp) * s`, ties to even, `zp` an integer.

    Gradients: to `x`, straight through within the range, else 0; to the scale, per element `round(v) - v` within the
    range and the bound outside (`v = x / s + zp`), times the LSQ factor; to the offset, 0 within the range and 1 outside.

    Args:
        x: float activations, any shape; bfloat16 and float16 are computed in float32.
        scale: positive scalar tensor, float32 (float64 for a float64 network).
        bounds: the least and the greatest code.
        offset: z, a scalar tensor; the zero-point is `clip(round(-z / s), 0, greatest)`. None: no zero-point.
        lsq_factor: multiply the scale's gradient by `1 / sqrt(N Qp)`, N the elements of `x`, Qp the greatest code.

    Returns:
        Activations of the shape and dtype of `x`. NaN stays NaN.
    """
    least, greatest = bounds
    return _LearnedStep.apply(x, scale, offset, least, greatest, lsq_factor)
