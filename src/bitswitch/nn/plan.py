"""What is quantized in a network, and how: a value that can be stored, and the swap that it describes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from bitswitch.errors import UserError
from bitswitch.nn.layers import QUANTIZED, MultiheadAttention, QuantizedLayer
from bitswitch.nn.norm import BATCH_NORMS, SwitchableBatchNorm
from bitswitch.nn.quantizers import ActivationQuantizer, InputKind, ScaleForm, WeightQuantizer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `apply` needs to make a float network's structure that of its quantized form.

    Attributes:
        widths: candidate widths, highest first.
        layers: {layer to quantize: the kind of its input}, in the order in which the layers run.
        norms: {batch normalization: the quantized layer whose width it follows}.
        per_channel: one weight scale per output channel.
        scale_form: whether scales or their logarithms are learned.
        lsq_factor: whether scale gradients are multiplied by 1 / sqrt(N Qp).
    """

    widths: tuple[int, ...]
    layers: Mapping[str, InputKind]
    norms: Mapping[str, str]
    per_channel: bool
    scale_form: ScaleForm
    lsq_factor: bool

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"widths": list(self.widths)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Plan":
        """The inverse of `to_json`."""
        return cls(**dict(value) | {"widths": tuple(value["widths"])})


def replace_attention(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Replace every nn.MultiheadAttention that can be replaced, and keep torch's encoder layers off their fused path.

    Returns:
        (the model, the names of those that cannot be replaced).
    """
    equals: dict[nn.Module, nn.Module] = {}
    refused: list[str] = []
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            if MultiheadAttention.supports(module):
                equals[module] = MultiheadAttention(module)
            else:
                refused.append(name)
        if isinstance(module, nn.TransformerEncoderLayer):
            # In eval the fused path reads linear1.weight and linear2.weight itself; this flag is its condition alone.
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return _replace(model, equals), refused


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put every module of `new` in its old one's place, wherever that is used."""
    for parent in list(model.modules()):
        # Not named_children: it leaves out the second use of a shared module.
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """Swap modules as the plan says, in place; scales start at 1.

    Args:
        model: the float network that the plan was made for (or one of the same architecture).
        plan: what to swap.

    Returns:
        The model (another object only where the model itself is a layer that is swapped).

    Raises:
        UserError: the model is not of the architecture that the plan was made for.
    """
    model, _ = replace_attention(model)
    modules = dict(model.named_modules())
    for name in (*plan.layers, *plan.norms, *plan.norms.values()):
        if name not in modules:
            raise UserError(
                f"this {type(model).__name__} is another network than the one quantized: it has no {name!r}"
            )
    layers: dict[str, QuantizedLayer] = {}
    for name, kind in plan.layers.items():
        layers[name] = _quantized(name, modules[name], kind, plan)
    norms: dict[nn.Module, nn.Module] = {}
    for name, follows in plan.norms.items():
        if not isinstance(modules[name], BATCH_NORMS) or follows not in layers:
            raise UserError(f"this {type(model).__name__} is another network than the one quantized: see {name!r}")
        norms[modules[name]] = SwitchableBatchNorm(modules[name], plan.widths, layers[follows])
    model = _replace(model, {modules[name]: layer for name, layer in layers.items()} | norms)
    model.bitswitch_plan = plan  # type: ignore[assignment]
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
    if type(module) not in QUANTIZED:
        raise UserError(f"this is another network than the one quantized: {name!r} is a {type(module).__name__}")
    weight: Any = module.weight
    shape = (weight.shape[0], *[1] * (weight.dim() - 1)) if plan.per_channel else ()
    options: dict[str, Any] = {"form": plan.scale_form, "lsq_factor": plan.lsq_factor}
    weights = WeightQuantizer(plan.widths, shape, **options)
    inputs = ActivationQuantizer(plan.widths, kind, **options)
    return QUANTIZED[type(module)].from_float(
        module, weights.to(weight.device, weight.dtype), inputs.to(weight.device, weight.dtype)
    )


def freeze(model: nn.Module) -> nn.Module:
    """Drop the float weight of every quantized layer, in place, and keep its codes."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module.freeze()
    return model
