"""The scales that are learned, and the quantizers that hold them.

Every width has parameters of its own, not a row of a stacked tensor: a parameter that took no part in a step has no
gradient, and every optimizer of torch leaves such a parameter, its momentum and its weight decay alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitswitch.codes import signed_range, unsigned_range
from bitswitch.errors import UserError
from bitswitch.numerics import Narrowing, bounded, double_round, learned_step, start_weight_scale, weight_codes
from bitswitch.numerics.scales import GREATEST_SCALE, LEAST_SCALE

InputKind = Literal["unsigned", "signed", "zero_point"]
ScaleForm = Literal["raw", "log"]
# "double_rounding" is the method; "per_width" is the paper's variant with one weight scale for each width; "lsq", "adabits"
# and "bit_mixer" are the rivals of its figure 2, "centred" is a candidate (docs/results.md). All but the first keep a float
# master and cannot be saved as an artifact.
Method = Literal["double_rounding", "per_width", "lsq", "adabits", "bit_mixer", "centred"]
_NARROWINGS: dict[Method, Narrowing] = {
    "double_rounding": "half_up",
    "adabits": "floor",
    "bit_mixer": "floor_symmetric",
    "centred": "centred",
}


def input_range(kind: InputKind, bits: int) -> tuple[int, int]:
    """The least and the greatest activation code of a kind of quantizer at a width."""
    return signed_range(bits) if kind == "signed" else unsigned_range(bits)


class Quantizer(nn.Module):
    """A quantizer whose scales are learned as they are ("raw") or as their logarithm ("log").

    Its forward is `quantize` with what a width has: its numbers and its parameters. `nn.one_graph` hands `quantize` the same
    as tensors, so that one compiled graph serves every width.
    """

    widths: tuple[int, ...]

    def __init__(self, form: ScaleForm) -> None:
        super().__init__()
        self.form = form

    @property
    def high(self) -> int:
        """The highest width, that of the stored codes."""
        return self.widths[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Scales are single precision at least, of a network in half precision too: what is stored and learned is not rounded.
        def moved(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            halved = made.is_floating_point() and made.element_size() < min(4, tensor.element_size())
            return tensor.to(made.device) if halved else made

        return super()._apply(moved, recurse)

    def numbers(self, width: int) -> tuple[int | float, ...]:
        """What tells a width apart in `quantize`, beside its parameters."""
        raise NotImplementedError

    def selected(self, width: int) -> dict[str, nn.Parameter]:
        """The parameters that a width uses, by the names under which `quantize` takes them."""
        raise NotImplementedError

    def quantize(self, x: Tensor, *numbers: Any, **selected: Tensor) -> Tensor:
        """`x` as it is at the width of these numbers (or 0-dim tensors of them), computed with these parameters."""
        raise NotImplementedError

    def forward(self, x: Tensor, width: int) -> Tensor:
        """`x` as it is at `width` bits, float, with gradients to itself and to the parameters of the width."""
        return self.quantize(x, *self.numbers(width), **self.selected(width))

    def positive(self, parameter: Tensor) -> Tensor:
        """The scale that a parameter stands for: in [2^-30, 2^30], whatever an optimizer wrote into the parameter.

        In float32, or what is wider: float16 holds neither bound.
        """
        parameter = _wide(parameter)
        if self.form == "log":
            held = bounded(parameter, math.log(LEAST_SCALE), math.log(GREATEST_SCALE))
            # In float64, then rounded: every device and compiler has an exp of its own in float32, and the codes hang on it.
            return held.double().exp().to(parameter.dtype)
        return bounded(parameter, LEAST_SCALE, GREATEST_SCALE)

    def _parameter_from(self, scale: Tensor) -> Tensor:
        return scale.log() if self.form == "log" else scale

    def meaning(self) -> dict[str, str]:
        """What the parameters stand for, beside their names and shapes; a state of another meaning is not loaded."""
        return {"scale_form": self.form}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        note(destination, prefix, self.meaning())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        errors: list[str] = rest[-1]
        for key, mine in self.meaning().items():
            if (theirs := local_metadata.get(key, mine)) != mine:
                errors.append(
                    f"{prefix.removesuffix('.')} has {key} {mine!r} and the state was made with {theirs!r}: quantize with the "
                    "options and example_inputs of the model that it comes from"
                )


def note(state: Any, prefix: str, facts: Mapping[str, Any]) -> None:
    """Put facts beside a module's tensors in a state dict, where torch keeps versions."""
    if hasattr(state, "_metadata"):
        state._metadata[prefix[:-1]].update(facts)


def _wide(parameter: Tensor) -> Tensor:
    """In float32 at least. Where it is nothing is added, not even what does nothing: exporters match the operations."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return parameter if parameter.dtype == wide else parameter.to(wide)


class WeightQuantizer(Quantizer):
    """One shared scale `s_h` for all widths, lower widths derived from the codes of the highest.

    Args:
        widths: candidate widths, highest first.
        shape: the scale's shape: () per tensor, or [out, 1, ...] per channel.
        method: "double_rounding" (arXiv 2502.01199, section 3), or, to compare with, "adabits", "bit_mixer", "centred".
        form: what is learned, the scale or its logarithm.
        lsq_factor: multiply scale gradients by 1 / sqrt(N Qp).
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        shape: Sequence[int],
        *,
        method: Method = "double_rounding",
        form: ScaleForm = "log",
        lsq_factor: bool = True,
    ) -> None:
        super().__init__(form)
        self.widths = widths
        self.narrowing = _NARROWINGS[method]
        self.lsq_factor = lsq_factor
        self.scale_parameter = nn.Parameter(self._parameter_from(torch.ones(tuple(shape))))

    def meaning(self) -> dict[str, str]:
        """And how lower widths are made."""
        return super().meaning() | {"narrowing": self.narrowing}

    @property
    def per_channel(self) -> bool:
        """Whether every output channel has a scale of its own."""
        return self.scale_parameter.dim() > 0

    def scale(self) -> Tensor:
        """`s_h`, always positive and finite."""
        return self.positive(self.scale_parameter)

    def scale_parameters(self) -> list[nn.Parameter]:
        """What an optimizer of scales moves."""
        return [self.scale_parameter]

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Go on from `scale`."""
        self.scale_parameter.copy_(self._parameter_from(scale))

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Start where the error over all widths is least."""
        self.set_scale(start_weight_scale(weight, self.widths, per_channel=self.per_channel, narrowing=self.narrowing))

    def codes(self, weight: Tensor) -> Tensor:
        """The stored integers q_h of `weight`: int8, the same shape.

        Raises:
            UserError: a rival's codes do not narrow as an artifact's do.
        """
        if self.narrowing != "half_up":
            raise UserError("only double_rounding can be stored as integers: this method is for comparison")
        return weight_codes(weight, self.scale(), self.high)

    def selected(self, width: int) -> dict[str, nn.Parameter]:
        """The shared scale, whatever the width."""
        return {"scale_parameter": self.scale_parameter}

    def numbers(self, width: int) -> tuple[int | float, ...]:
        """The width."""
        return (width,)

    def quantize(self, x: Tensor, *numbers: Any, **selected: Tensor) -> Tensor:
        """A weight at a width, from the codes of the highest."""
        return double_round(
            x,
            self.positive(selected["scale_parameter"]),
            high=self.high,
            low=numbers[0],
            narrowing=self.narrowing,
            lsq_factor=self.lsq_factor,
        )


class PerWidthWeightQuantizer(Quantizer):
    """A scale for every width, over float weights that are kept: for comparison, not for storage.

    Args:
        widths: candidate widths, highest first.
        shape: the scale's shape: () per tensor, or [out, 1, ...] per channel.
        method: "per_width" rounds half up, as double rounding does (the paper's variant); "lsq" half to even.
        form: what is learned, the scales or their logarithms.
        lsq_factor: multiply scale gradients by 1 / sqrt(N Qp).
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        shape: Sequence[int],
        *,
        method: Method,
        form: ScaleForm = "log",
        lsq_factor: bool = True,
    ) -> None:
        super().__init__(form)
        self.widths = widths
        self.method = method
        self.lsq_factor = lsq_factor
        self.scale_parameter = nn.ParameterDict(
            {str(w): self._parameter_from(torch.ones(tuple(shape))) for w in widths}
        )

    def meaning(self) -> dict[str, str]:
        """And how weights are rounded."""
        return super().meaning() | {"method": self.method}

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Start every width where its own error is least."""
        for width in self.widths:
            parameter = self.scale_parameter[str(width)]
            scale = start_weight_scale(weight, (width,), per_channel=parameter.dim() > 0)
            parameter.copy_(self._parameter_from(scale))

    def codes(self, weight: Tensor) -> Tensor:
        """There are none to store.

        Raises:
            UserError: always.
        """
        raise UserError(f"{self.method} keeps float weights and cannot be stored as integers: it is for comparison")

    def selected(self, width: int) -> dict[str, nn.Parameter]:
        """The scale of the width."""
        return {"scale_parameter": self.scale_parameter[str(width)]}

    def numbers(self, width: int) -> tuple[int | float, ...]:
        """The width, or the range of codes."""
        return signed_range(width) if self.method == "lsq" else (width,)

    def quantize(self, x: Tensor, *numbers: Any, **selected: Tensor) -> Tensor:
        """A weight at a width, rounded once."""
        scale = self.positive(selected["scale_parameter"])
        if self.method == "lsq":
            least, greatest = numbers
            return learned_step(x, scale, bounds=(least, greatest), lsq_factor=self.lsq_factor)
        return double_round(x, scale, high=numbers[0], low=numbers[0], lsq_factor=self.lsq_factor)


def weight_quantizer(
    method: Method, widths: tuple[int, ...], shape: Sequence[int], *, form: ScaleForm, lsq_factor: bool
) -> WeightQuantizer | PerWidthWeightQuantizer:
    """The quantizer of a method."""
    kind = WeightQuantizer if method in _NARROWINGS else PerWidthWeightQuantizer
    return kind(widths, shape, method=method, form=form, lsq_factor=lsq_factor)


class ActivationQuantizer(Quantizer):
    """One learned scale (and offset) for every width (LSQ, arXiv 1902.08153; zero-point integer).

    Args:
        widths: candidate widths, highest first.
        kind: "unsigned" [0, 2^b - 1]; "signed" [-2^(b-1), 2^(b-1) - 1]; "zero_point" unsigned with an integer zero-point.
        form: what is learned, the scale or its logarithm.
        lsq_factor: multiply scale gradients by 1 / sqrt(N Qp).
    """

    def __init__(
        self, widths: tuple[int, ...], kind: InputKind, *, form: ScaleForm = "log", lsq_factor: bool = True
    ) -> None:
        super().__init__(form)
        self.widths = widths
        self.kind = kind
        self.lsq_factor = lsq_factor
        self.scale_parameter = nn.ParameterDict({str(w): self._parameter_from(torch.ones(())) for w in widths})
        self.offset = nn.ParameterDict({str(w): torch.zeros(()) for w in widths} if kind == "zero_point" else {})

    def meaning(self) -> dict[str, str]:
        """And the range of codes."""
        return super().meaning() | {"input": self.kind}

    def scale(self, width: int) -> Tensor:
        """The scale of a width, always positive and finite."""
        return self.positive(self.scale_parameter[str(width)])

    def offset_at(self, width: int) -> Tensor | None:
        """The offset of a width, never NaN; None where there is no zero-point."""
        return self._held(self.offset[str(width)]) if self.kind == "zero_point" else None

    def _held(self, offset: Tensor) -> Tensor:
        return bounded(_wide(offset), -GREATEST_SCALE, GREATEST_SCALE)

    @torch.no_grad()
    def set_scale(self, width: int, scale: Tensor, offset: Tensor | None = None) -> None:
        """Go on from `scale` (and `offset`) at a width."""
        self.scale_parameter[str(width)].copy_(self._parameter_from(scale))
        if offset is not None:
            self.offset[str(width)].copy_(offset)

    def selected(self, width: int) -> dict[str, nn.Parameter]:
        """The scale of the width, and its offset where there are zero-points."""
        names = {"scale_parameter": self.scale_parameter, "offset": self.offset}
        return {name: values[str(width)] for name, values in names.items() if len(values)}

    def numbers(self, width: int) -> tuple[int | float, ...]:
        """The range of codes, as floats: activations are never integers here."""
        least, greatest = input_range(self.kind, width)
        return float(least), float(greatest)

    def quantize(self, x: Tensor, *numbers: Any, **selected: Tensor) -> Tensor:
        """Activations at a width."""
        least, greatest = numbers
        offset = selected.get("offset")
        return learned_step(
            x,
            self.positive(selected["scale_parameter"]),
            bounds=(least, greatest),
            offset=None if offset is None else self._held(offset),
            lsq_factor=self.lsq_factor,
        )

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"{self.kind}, widths={self.widths}"
