"""`quantize`: any float network to one that can be switched."""

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bitswitch.codes import check_widths
from bitswitch.errors import UserError, check_word, nearest
from bitswitch.nn.layers import QUANTIZED, QuantizedLayer
from bitswitch.nn.norm import BATCH_NORMS
from bitswitch.nn.plan import OTHER_FORWARD, Plan, apply, has_other_forward, replace_attention
from bitswitch.nn.quantizers import InputKind, Method, ScaleForm, input_range
from bitswitch.nn.switch import unwrapped
from bitswitch.nn.trace import Trace, trace
from bitswitch.numerics import start_activation_scales

# Modules with a matrix of weights that are not swapped, and that a user would want to hear of.
_NOT_SWAPPED = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase),
)


def as_arguments(example_inputs: Tensor | tuple[Any, ...]) -> tuple[Any, ...]:
    """What a model is called with.

    Raises:
        UserError: it is neither a tensor nor a tuple of arguments.
    """
    if not isinstance(example_inputs, (Tensor, tuple)):
        raise UserError(f"example_inputs is a {type(example_inputs).__name__}: give a tensor, or a tuple of arguments")
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


# Parameters that are made in inference mode could never be trained.
@torch.inference_mode(False)
def quantize(
    model: nn.Module,
    *,
    example_inputs: Tensor | tuple[Any, ...],
    bits: Sequence[int] = (8, 6, 4, 2),
    keep: Sequence[str] = (),
    keep_first_last: bool = True,
    method: Method = "double_rounding",
    per_channel: bool = False,
    scale_form: ScaleForm = "log",
    lsq_factor: bool = True,
) -> nn.Module:
    """A copy of `model` whose layers can be switched between bit-widths. The original is untouched.

    Every nn.Conv1d, nn.Conv2d and nn.Linear gets quantizers for its weight and its input, nn.MultiheadAttention becomes
    an equal made of linear layers, and every batch normalization becomes one per width. Scales start from the weights
    and from one forward of `example_inputs` in eval mode. The copy stands at the highest width.

    Args:
        model: a float network, any module tree; trained, if it is to be of use.
        example_inputs: what the network is called with, a tensor or a tuple of arguments: real data, a batch or more,
            since activation scales and their kinds (unsigned, signed, with zero-point) are chosen from it.
        bits: bit-widths from 2 to 8, highest first.
        keep: layers that stay float, as names or patterns ("blocks.*.fc1"), on top of the first and the last; of what stays
            float anyway the warning is left out.
        keep_first_last: keep the first and the last layer that run float, as the paper does.
        method: "double_rounding"; or, to compare with, "per_width" (a weight scale for each width), "lsq", "adabits",
            "bit_mixer", "centred": these keep float weights and cannot be saved.
        per_channel: one weight scale per output channel instead of one per tensor.
        scale_form: learn the logarithm of each scale ("log"), or the scale itself ("raw").
        lsq_factor: multiply scale gradients by 1 / sqrt(N Qp) (LSQ).

    Returns:
        The quantized copy, in the train or eval mode of the original.

    Warns:
        UserWarning: names what stays float although it looks quantizable, and why.

    Raises:
        UserError: bad widths or options, a model that is already quantized, a pattern that matches nothing, weights or
            activations that are not finite, or no layer left to quantize (a ValueError).
    """
    model = unwrapped(model)
    widths = check_widths(bits)
    inputs = as_arguments(example_inputs)
    check_word("method", method, get_args(Method))
    check_word("scale_form", scale_form, get_args(ScaleForm))
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise UserError(f"this {type(model).__name__} is already quantized: quantize the float network")
    if any(map(is_lazy, chain(model.parameters(), model.buffers()))):
        raise UserError(
            f"this {type(model).__name__} has lazy modules without shapes yet: run it once, then quantize it"
        )
    try:
        copied = copy.deepcopy(model)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"this {type(model).__name__} cannot be copied ({reason[:200]}): tensors with a history are no parameters; of "
            "weight_norm and spectral_norm, use those in torch.nn.utils.parametrizations"
        ) from error
    refused = replace_attention(copied)
    named = dict(copied.named_modules())
    candidates = {name: m for name, m in named.items() if _can_be_swapped(m)}
    patterns = _patterns(keep)
    seen = trace(copied, inputs, candidates)
    kept = _matching(patterns, [*named, *seen.bare_products])
    running = [name for name in seen.order if name not in seen.read_elsewhere]
    ends = {seen.order[0], seen.order[-1]} if keep_first_last and running else set()
    chosen = [name for name in running if name not in kept and name not in ends]
    _warn_of_the_rest(named, chosen, kept | ends, seen, refused)
    if not chosen:
        raise UserError(
            f"{type(model).__name__} has no layer to quantize: {len(candidates)} convolution or linear layers found, "
            f"{len(running)} of them run, and the first and last stay float (keep_first_last=False changes that)"
        )
    starts = {name: _input_start(name, seen.inputs[name], widths) for name in chosen}
    norms = _followed(seen, chosen, [name for name, m in named.items() if isinstance(m, BATCH_NORMS)])
    plan = Plan(
        widths=widths,
        layers={name: kind for name, (kind, _, _) in starts.items()},
        norms=norms,
        before={norm: _last(chosen, seen.before[layer]) for norm, layer in norms.items()},
        method=method,
        per_channel=per_channel,
        scale_form=scale_form,
        lsq_factor=lsq_factor,
    )
    quantized = apply(copied, plan)
    modules = dict(quantized.named_modules())
    for name, (_, scales, offsets) in starts.items():
        _start(name, modules[name], scales, offsets)
    return quantized


def _can_be_swapped(module: nn.Module) -> bool:
    """Not where a hook or a parametrization computes the weight, or another forward reads it: they would pass the swap by."""
    own_weight = isinstance(module._parameters.get("weight"), nn.Parameter)
    return type(module) in QUANTIZED and own_weight and not has_other_forward(module)


def _patterns(keep: Sequence[str] | None) -> Sequence[str]:
    patterns = (keep,) if isinstance(keep, str) else keep or ()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise UserError(
                f"keep holds a {type(pattern).__name__}: name layers, or give patterns such as 'blocks.*.fc1'"
            )
    return patterns


def _matching(patterns: Sequence[str], named: Sequence[str]) -> set[str]:
    """The modules, and parameters outside any layer, that a name or pattern names, and all that is inside them."""
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in named if name and (name == pattern or fnmatchcase(name, pattern))}
        if not hits:
            raise UserError(f"keep={pattern!r} names no layer{nearest(pattern, named)}")
        found |= {name for name in named if any(name == hit or name.startswith(f"{hit}.") for hit in hits)}
    return found


def _followed(seen: Trace, chosen: Sequence[str], norms: Sequence[str]) -> dict[str, str]:
    """For every batch normalization that ran, the quantized layer whose width selects.

    It is the layer that ran last before it in its data flow. Where that one is float, so that its statistics hardly
    depend on widths, or what lies between cannot be seen, as in NumPy or TorchScript, the nearest quantized layer before
    it in time, or else the first: every width still has its own.
    """
    followed = {}
    for norm in norms:
        if norm in seen.before:
            ancestors = seen.before[norm]
            last = seen.order.index(ancestors[-1]) + 1 if ancestors else seen.earlier[norm]
            followed[norm] = _last(chosen, seen.order[:last]) or chosen[0]
    return followed


def _last(chosen: Sequence[str], layers: Sequence[str]) -> str | None:
    """The last of `layers` that is to be quantized."""
    return next((name for name in reversed(layers) if name in chosen), None)


def _input_start(name: str, x: Tensor, widths: tuple[int, ...]) -> tuple[InputKind, Tensor, Tensor | None]:
    """The kind of quantizer that suits the data, and where its scales and offsets start."""
    if x.is_complex():
        raise UserError(f"the input of layer {name!r} is complex: name it in keep=, to leave it float")
    if not x.numel():
        raise UserError(f"the input of layer {name!r} is empty on the example inputs: give a batch of real data")
    if not bool(x.isfinite().all()):
        raise UserError(
            f"the input of layer {name!r} is not finite on the example inputs: check the model and the data"
        )
    if bool((x >= 0).all()):
        scales, _, _ = start_activation_scales(x, [input_range("unsigned", width) for width in widths])
        return "unsigned", scales, None
    signed, _, signed_errors = start_activation_scales(x, [input_range("signed", width) for width in widths])
    shifted, offsets, shifted_errors = start_activation_scales(
        x, [input_range("zero_point", width) for width in widths], with_offset=True
    )
    tiny = torch.finfo(x.dtype).tiny
    gain = (signed_errors.clamp_min(tiny).log() - shifted_errors.clamp_min(tiny).log()).mean()
    # A zero-point costs additions in an integer kernel: it must pay, here with a fifth of the error.
    return ("zero_point", shifted, offsets) if float(gain) > 0.2 else ("signed", signed, None)


def _start(name: str, layer: QuantizedLayer, scales: Tensor, offsets: Tensor | None) -> None:
    weight = layer.weight
    assert weight is not None
    if not bool(weight.isfinite().all()):
        raise UserError(f"the weight of layer {name!r} is not finite: check the model that you quantize")
    layer.weight_quantizer.start(weight)
    for i, width in enumerate(layer.widths):
        layer.input_quantizer.set_scale(width, scales[i], None if offsets is None else offsets[i])


def _warn_of_the_rest(
    named: Mapping[str, nn.Module], chosen: Sequence[str], meant: set[str], seen: Trace, refused: Mapping[str, str]
) -> None:
    """One warning that names every layer that stays float without the user having asked for it."""
    reasons = dict(refused)
    for name, module in named.items():
        if not isinstance(module, _NOT_SWAPPED) or name in chosen or name in meant or _inside(name, refused):
            continue
        if name in seen.read_elsewhere:
            reasons[name] = "its weight is read by a functional call"
        elif _can_be_swapped(module):
            reasons[name] = "it did not run on the example inputs"
        elif has_other_forward(module):
            reasons[name] = OTHER_FORWARD
        else:
            reasons[name] = f"a {type(module).__name__} cannot be swapped"
    for name, module in named.items():
        # What is called frozen, in torchvision and elsewhere, never moves them.
        moves = not isinstance(module, BATCH_NORMS) and not type(module).__name__.startswith("Frozen")
        if moves and module._buffers.get("running_mean") is not None:
            reasons[name or "the network itself"] = "its running statistics are shared by all widths"
    for name in seen.bare_products:
        if not _inside(name, reasons):
            reasons[name] = "a parameter used in a product outside any layer"
    reasons = {name: reason for name, reason in reasons.items() if not _inside(name, meant)}
    if reasons:
        listed = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
        warnings.warn(f"stays float: {listed}. Name it in keep= to silence this", stacklevel=4)


def _inside(name: str, parents: Iterable[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)
