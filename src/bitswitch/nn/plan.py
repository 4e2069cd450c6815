"""What is quantized in a network, and how: a value that can be stored, and the swap that it describes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from bitswitch.errors import UserError
from bitswitch.nn.layers import QUANTIZED, MultiheadAttention, QuantizedLayer
from bitswitch.nn.norm import BATCH_NORMS, SwitchableBatchNorm, TransitionalBatchNorm
from bitswitch.nn.quantizers import ActivationQuantizer, InputKind, Method, ScaleForm, weight_quantizer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `apply` needs to make a float network's structure that of its quantized form.

    Attributes:
        widths: candidate widths, highest first.
        layers: {layer to quantize: the kind of its input}, in the order in which the layers run.
        norms: {batch normalization: the quantized layer whose width it follows}.
        before: {batch normalization: the quantized layer before the one that it follows, or None}.
        transitional: one batch normalization for each pair of their widths, not for each width alone.
        method: how weights are quantized.
        per_channel: one weight scale per output channel.
        scale_form: whether scales or their logarithms are learned.
        lsq_factor: whether scale gradients are multiplied by 1 / sqrt(N Qp).
    """

    widths: tuple[int, ...]
    layers: Mapping[str, InputKind]
    norms: Mapping[str, str]
    before: Mapping[str, str | None]
    method: Method
    per_channel: bool
    scale_form: ScaleForm
    lsq_factor: bool
    transitional: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"widths": list(self.widths)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Plan":
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: it is no plan.
        """
        plan = cls(**dict(value) | {"widths": tuple(value["widths"])})
        if not all(isinstance(part, dict) for part in (plan.layers, plan.norms, plan.before)):
            raise TypeError("its layers and batch normalizations are no tables")
        return plan


OTHER_FORWARD = "its forward was replaced by another"


def has_other_forward(module: nn.Module) -> bool:
    """Whether a module has a forward of its own instead of its class's, which would pass a swapped layer by."""
    return "forward" in module.__dict__


def replace_attention(model: nn.Module) -> dict[str, str]:
    """Replace every nn.MultiheadAttention that can be replaced, in place; keep encoder layers off their fused path.

    Returns:
        {name of one that cannot be replaced: why}.
    """
    refused: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention) and type(module) is not nn.MultiheadAttention:
            refused[name] = f"a {type(module).__name__} cannot be swapped"
        if type(module) is nn.MultiheadAttention:
            if has_other_forward(module):
                refused[name] = OTHER_FORWARD
            elif MultiheadAttention.supports(module):
                become(module, MultiheadAttention(module))
            else:
                refused[name] = "attention with kdim, vdim, add_bias_kv, add_zero_attn or weights that are computed"
        if isinstance(module, nn.TransformerEncoderLayer):
            # In eval the fused path reads linear1.weight and linear2.weight itself; this flag is its condition alone.
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return refused


def become(module: nn.Module, other: nn.Module) -> None:
    """Make `module` what `other` is, in place, so that all who hold it, plain lists too, hold the new one."""
    module.__class__ = type(other)
    module.__dict__ = other.__dict__


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """Swap modules as the plan says, in place; scales start at 1.

    Args:
        model: the float network that the plan was made for (or one of the same architecture).
        plan: what to swap.

    Returns:
        The model.

    Raises:
        UserError: the model is not of the architecture that the plan was made for.
    """
    replace_attention(model)
    modules = dict(model.named_modules())
    for name in (*plan.layers, *plan.norms, *plan.norms.values(), *plan.before.values()):
        if name is not None and name not in modules:
            raise UserError(
                f"this {type(model).__name__} is another network than the one quantized: it has no {name!r}"
            )
    for name, kind in plan.layers.items():
        become(modules[name], _quantized(name, modules[name], kind, plan))
    for name, follows in plan.norms.items():
        layer = modules[follows]
        if not isinstance(modules[name], BATCH_NORMS) or not isinstance(layer, QuantizedLayer):
            raise UserError(f"this {type(model).__name__} is another network than the one quantized: see {name!r}")
        become(modules[name], SwitchableBatchNorm(modules[name], layer))
    model.bitswitch_plan = replace(plan, transitional=False)  # type: ignore[assignment]
    return make_transitional(model) if plan.transitional else model


def make_transitional(model: nn.Module) -> nn.Module:
    """Give every batch normalization a variant for each pair of widths that can occur, in place.

    Each pair starts from the variant of the width here; see `TransitionalBatchNorm`.

    Args:
        model: made by `bitswitch.quantize`, or loaded.

    Returns:
        The model.

    Raises:
        UserError: it is not a quantized model.
    """
    plan = plan_of(model)
    if not plan.transitional:
        modules: dict[str, Any] = dict(model.named_modules())
        for name, before in plan.before.items():
            norm = modules[name]
            made = TransitionalBatchNorm(norm, norm.follows, None if before is None else modules[before])
            # What users gave it, such as hooks, goes along.
            made.__dict__.update(
                {key: value for key, value in vars(norm).items() if key not in ("_modules", "_follows")}
            )
            become(norm, made)
        model.bitswitch_plan = replace(plan, transitional=True)  # type: ignore[assignment]
    return model


def plan_of(model: nn.Module) -> Plan:
    """The plan by which a model was quantized.

    Raises:
        UserError: it was not.
    """
    plan = getattr(model, "bitswitch_plan", None)
    if not isinstance(plan, Plan):
        raise UserError(
            f"{type(model).__name__} is not a quantized model: make one with bitswitch.quantize(model, ...)"
        )
    return plan


def _quantized(name: str, module: nn.Module, kind: InputKind, plan: Plan) -> QuantizedLayer:
    if isinstance(module, QuantizedLayer):
        raise UserError(f"this network is quantized already, {name!r} for one: give the float network")
    if type(module) not in QUANTIZED:
        raise UserError(f"this is another network than the one quantized: {name!r} is a {type(module).__name__}")
    if has_other_forward(module):
        raise UserError(f"this is another network than the one quantized: of {name!r}, {OTHER_FORWARD}")
    weight: Any = module.weight
    shape = (weight.shape[0], *[1] * (weight.dim() - 1)) if plan.per_channel else ()
    options: dict[str, Any] = {"form": plan.scale_form, "lsq_factor": plan.lsq_factor}
    weights = weight_quantizer(plan.method, plan.widths, shape, **options)
    inputs = ActivationQuantizer(plan.widths, kind, **options)
    # A scale learned in half precision would not move by a small step.
    wide = torch.promote_types(weight.dtype, torch.float32)
    return QUANTIZED[type(module)].from_float(module, weights.to(weight.device, wide), inputs.to(weight.device, wide))


def freeze(model: nn.Module) -> nn.Module:
    """Drop the float weight of every quantized layer, in place, and keep its codes."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module.freeze()
    return model
