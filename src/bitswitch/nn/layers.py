"""Layers whose weights and inputs are quantized at the width in use."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitswitch.codes import bits_read
from bitswitch.errors import UserError
from bitswitch.nn.kept import KeptWeights
from bitswitch.nn.quantizers import ActivationQuantizer, PerWidthWeightQuantizer, WeightQuantizer, note

Self = TypeVar("Self", bound="QuantizedLayer")
# Of a quantized layer, and of its entries in an artifact.
_NAMES = {"codes", "weight_quantizer", "input_quantizer", "weight_scale", "input_scale", "input_offset"}


class QuantizedLayer(nn.Module):
    """What all quantized layers share: a width in use, a quantizer for the weight, one for the input.

    In training, `weight` is a float parameter and `codes` is None. After `freeze`, and in a model loaded from an
    artifact, `weight` is None and `codes` holds the stored integers, int8, in the shape of the weight. The float weight
    of the width in use is then made from them when it is first needed, and kept until others are.

    Attributes:
        widths: that this layer can have, highest first.
        width: the one in use.
        planes: how many of the most significant bits of `codes` are known; the others are 0.
        kept: the float weights made from `codes`.
        dtype: of the float weight, that of the network.
        other_codes: whether `load_state_dict` has replaced the codes by others since they were stored.
    """

    weight: Any  # nn.Parameter | None, but torch declares it without the None
    bias: Any
    codes: Tensor | None
    widths: tuple[int, ...]
    width: int
    planes: int
    kept: KeptWeights
    dtype: torch.dtype
    other_codes: bool
    weight_quantizer: Any  # a WeightQuantizer, or a PerWidthWeightQuantizer in comparisons
    input_quantizer: ActivationQuantizer
    _errors: Mapping[int, float]

    @classmethod
    def from_float(
        cls: type[Self],
        layer: nn.Module,
        weights: WeightQuantizer | PerWidthWeightQuantizer,
        inputs: ActivationQuantizer,
    ) -> Self:
        """Take over a float layer's parameters, options and hooks. The float layer must not be used afterwards.

        Raises:
            UserError: the layer has a tensor or a module by a name that this one needs.
        """
        own = {*layer._buffers, *layer._parameters, *layer._modules}
        if taken := sorted(own & _NAMES):
            raise UserError(
                f"a {type(layer).__name__} has {taken[0]!r} of its own, which a quantized layer has, too: rename it, or keep "
                "the layer float with keep="
            )
        self = cls.__new__(cls)
        self.__dict__.update(layer.__dict__)
        self.weight_quantizer = weights
        self.input_quantizer = inputs
        self.register_buffer("codes", None)
        self.widths = weights.widths
        self.width = self.planes = weights.high
        self.kept = KeptWeights()
        self.dtype = layer.weight.dtype  # type: ignore[assignment]
        self.other_codes = False
        return self

    @property
    def stored_shape(self) -> torch.Size:
        """The shape of the weight, and of its codes."""
        return self.weight.shape if self.codes is None else self.codes.shape

    def weight_at(self, width: int) -> Tensor:
        """The weight as it is at `width` bits: float, the shape of the weight.

        Raises:
            UserError: the codes were loaded without the bits for this width.
        """
        return self._weight(width, lent=True)

    def _weight(self, width: int, *, lent: bool) -> Tensor:
        """`weight_at`; where `lent` is false, the caller drops it before the width changes."""
        codes = self.codes
        if codes is None:
            return self.weight_quantizer(self.weight, width)
        self.check_served(width)
        return self.kept.at(codes, self.weight_quantizer, width, self.dtype, lent=lent)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # To another device or type.
        self.kept.clear()
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.codes is not None:
            note(destination, prefix, {"planes": self.planes, "squared_errors": dict(self._errors)})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        # In inference mode nothing else tells that codes or scales were written to.
        self.kept.clear()
        codes = state_dict.get(f"{prefix}codes")
        if self.codes is None or codes is None or codes is self.codes or codes.shape != self.codes.shape:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
            return
        others = not torch.equal(codes.to(self.codes.device), self.codes)
        if others and "planes" not in local_metadata:
            errors: list[str] = rest[-1]
            errors.append(
                f"{prefix}codes are others than those here, and the state does not say how many of their bits are known "
                "(safetensors and copies as a dict drop it): use bitswitch.save and bitswitch.load"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if "planes" in local_metadata:
            self.planes, self._errors = local_metadata["planes"], dict(local_metadata["squared_errors"])
        self.other_codes |= others

    def check_served(self, width: int) -> None:
        """Raise where the bits for a width of this layer are not there.

        Raises:
            UserError: the codes were loaded without them.
        """
        # Never more than one bit beside those of the width: most often nothing is to be looked up.
        if self.planes > width:
            return
        high = self.widths[0]
        if bits_read(high, width) > self.planes:
            raise UserError(
                f"{width} bits are not loaded: the model holds {self.planes} of {high} bit planes; "
                f"bitswitch.upgrade(model, bits={width}) reads the rest"
            )

    def check_weight(self, name: str) -> None:
        """Refuse a weight that a hook or a parametrization computes from others, which codes in its place would leave there.

        Raises:
            UserError: it is one; it names the layer as `name`.
        """
        if self.codes is None and not isinstance(self._parameters.get("weight"), nn.Parameter):
            raise UserError(
                f"the weight of {name} is computed from others, as by pruning or a parametrization: make it one parameter "
                "again, by torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
            )

    @torch.no_grad()
    def stored_codes(self) -> Tensor:
        """The codes of the highest width: int8, the shape of the weight.

        Raises:
            UserError: the codes were loaded without all of their bits.
        """
        if self.codes is None:
            return self.weight_quantizer.codes(self.weight)
        self.check_served(self.widths[0])
        return self.codes

    @torch.no_grad()
    def squared_errors(self) -> Mapping[int, float]:
        """{width: ||W_l(width) - W_l||^2}, from the float weight, or as it was when that was dropped."""
        if self.weight is None:
            return self._errors
        weight = self.weight.double()
        return {width: float((self.weight_at(width).double() - weight).square().sum()) for width in self.widths}

    def store(self, codes: Tensor, squared_errors: Mapping[int, float], *, planes: int | None = None) -> None:
        """Hold these codes, and drop the float weight.

        Args:
            codes: of the highest width, int8, the shape of the weight.
            squared_errors: see `squared_errors`.
            planes: how many of their bits are known; all where not given.
        """
        self.codes, self._errors = codes, dict(squared_errors)
        self.planes = self.weight_quantizer.high if planes is None else planes
        self.weight = None
        self.kept.clear()

    def freeze(self) -> None:
        """Hold the codes of the highest width, and drop the float weight.

        Raises:
            UserError: something computes that weight; see `check_weight`.
        """
        self.check_weight(f"this {type(self).__name__}")
        if self.codes is None:
            self.store(self.stored_codes(), self.squared_errors())

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor, nn.Parameter | None]:
        # A backward may come after a switch.
        lent = torch.is_grad_enabled()
        return self.input_quantizer(x, self.width), self._weight(self.width, lent=lent), self.bias


class Conv1d(QuantizedLayer, nn.Conv1d):
    """A quantized nn.Conv1d."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, L] -> [N, C', L'], float."""
        return self._conv_forward(*self._quantized(input))


class Conv2d(QuantizedLayer, nn.Conv2d):
    """A quantized nn.Conv2d."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W'], float."""
        return self._conv_forward(*self._quantized(input))


class Linear(QuantizedLayer, nn.Linear):
    """A quantized nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out], float."""
        return F.linear(*self._quantized(input))


class MultiheadAttention(nn.Module):
    """An equal of nn.MultiheadAttention whose projections are layers that are called, so that they can be quantized.

    nn.MultiheadAttention hands its weights to one function and calls no layer. Not covered, and refused by `supports`:
    kdim or vdim that differ from embed_dim, add_bias_kv, add_zero_attn, weights that are computed from others.
    """

    # What torch's encoder layers look at before they take a fused path that would read float weights and pass us by.
    _qkv_same_embed_dim = False
    in_proj_bias = None

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        # What users gave it, such as hooks, goes along.
        own = ("_parameters", "_modules", "_qkv_same_embed_dim")
        self.__dict__.update({name: value for name, value in attention.__dict__.items() if name not in own})
        self.embed_dim = attention.embed_dim
        self.num_heads = attention.num_heads
        self.head_dim = attention.head_dim
        self.dropout = attention.dropout
        self.batch_first = attention.batch_first
        self.in_proj = _linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    @staticmethod
    def supports(attention: nn.MultiheadAttention) -> bool:
        """Whether this class can stand in for `attention`."""
        plain = (attention._parameters.get("in_proj_weight"), attention.out_proj._parameters.get("weight"))
        return all(one is not None for one in plain) and attention.bias_k is None and not attention.add_zero_attn

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward: the output and, where asked for, the attention weights."""
        batched = query.dim() == 3
        q, k, v = (self._split(x, batched) for x in self._project(query, key, value))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True needs attn_mask, as in nn.MultiheadAttention")
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        mixed = mixed.transpose(1, 2).flatten(2)
        mixed = self.out_proj(mixed if self.batch_first else mixed.transpose(0, 1))
        if batched:
            return mixed, weights
        return mixed.squeeze(0 if self.batch_first else 1), None if weights is None else weights.squeeze(0)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key and key is value:
            return self.in_proj(query).chunk(3, -1)
        # Three whole products where three thirds would do: cross-attention pays for passing through one layer.
        return tuple(self.in_proj(x).chunk(3, -1)[i] for i, x in enumerate((query, key, value)))

    def _split(self, x: Tensor, batched: bool) -> Tensor:
        """To [batch, heads, length, head_dim]."""
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, attention: Tensor | None) -> Tensor | None:
        """One additive mask that broadcasts to [batch, heads, target, source], or None."""
        mask = None
        if attention is not None:
            mask = _additive(attention, q.dtype)
            mask = mask.unflatten(0, (q.shape[0], self.num_heads)) if mask.dim() == 3 else mask
        if padding is not None:
            padding = _additive(padding, q.dtype).reshape(q.shape[0], 1, 1, k.shape[2])
            mask = padding if mask is None else mask + padding
        return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))


def _linear(weight: Any, bias: Any) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


QUANTIZED: dict[type[nn.Module], Any] = {nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Linear: Linear}
