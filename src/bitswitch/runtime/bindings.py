"""What an integer graph leaves open.

A graph holds no weights and knows no widths: its constants are named, and a `Bindings` says what each name stands for.
`constants.values` computes them from an artifact's tensors. One graph so serves every assignment.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from bitswitch import files
from bitswitch.artifact import Header, tensor_name
from bitswitch.artifact.container import is_finite, strict_json

_OF_QUANTIZER = ("scale", "zero", "low", "high", "clips")
_CONV = ("codes", "scale", "zero", "bias", "bias_scale")
_SUMS = ("codes", "sum_zero", "sum_scale", "sum_bias")
_BRANCH = (*_CONV, "step", "offset", "mean", "variance")
# The arrays of each kind of product; see `Product`.
_KINDS = {
    "conv": _CONV,
    "sums": _SUMS,
    "branch": _BRANCH,
    "bytes or sums": (*_BRANCH, *_SUMS, "common_step", "common_zero", "in_bytes", "alike"),
    "conv or sums": (*_CONV, *_SUMS, "in_bytes"),
    "int32": ("codes", "zero", "multiplier", "offset"),
    "float": ("codes", "scale", "zero", "bias"),
    "linear": ("codes", "scale", "zero", "bias"),
}


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """A layer's input quantizer.

    Arrays: `<prefix>.scale` float32 [], `.zero`, `.low`, `.high` uint8 [], `.clips` bool [] (the bounds are narrower than a
    byte's).

    Attributes:
        prefix: of the names of its arrays.
        layer: whose input it is.
        least, greatest: bounds that an activation function put on what is quantized, or None. Rounding is monotone, so
            clipping codes at the bounds' codes is the same.
        nonnegative: whether what is quantized is never below 0, without those bounds.
    """

    prefix: str
    layer: str
    least: float | None
    greatest: float | None
    nonnegative: bool


@dataclass(frozen=True, kw_only=True)
class Product:
    """A convolution or matrix product of a layer, with the batch normalization that follows it folded in.

    Eight kinds. "conv": its result goes straight to the next layer's quantizer. "sums": an integer matrix product of patches,
    which ends in floats. "branch": its result gets 8 bits per channel and goes on as floats, `byte * step + offset`. "bytes or
    sums": the graph has the form of "branch", that of one scale, `(byte - common_zero) * common_step`, and that of "sums", and
    flags say which. "conv or sums": likewise. "int32": it ends in integers that a float multiplication and addition follow.
    "float": a float convolution of dequantized codes. "linear": a matrix product, which ends in floats by itself.

    Arrays: `<prefix>.codes` int8 in the weight's shape ("linear": [in, out]; "int32": uint8, 128 higher), `.scale` float32
    [out] and `.zero` int8 [out]; `.bias` int32 [out] and `.bias_scale` float32 [out], or `.bias` float32 [out] alone for
    "linear" and "float". "branch" has more: `.step`, `.offset`, `.mean` (0) and `.variance` (1), float32 [out], of the batch
    normalization that applies the first two. "sums": `.codes`, `.sum_zero` int8 [out], `.sum_scale`, `.sum_bias`
    float32 [out]. "bytes or sums": those of "branch" and "sums", `.common_step` float32 [], `.common_zero` uint8 [], and
    `.in_bytes`, `.alike` (one scale) bool []. "conv or sums": those of "conv" and "sums", and `.in_bytes` bool []. "int32":
    `.codes`, `.zero` uint8 [], `.multiplier`, `.offset` [out, 1, ...].

    Attributes:
        prefix: of the names of its arrays.
        layer: whose weight it is.
        kind: see above.
        into: of a "conv" or "conv or sums", the prefix of the input quantizer that alone reads its result.
        ranges: of a "branch" or "bytes or sums", at every width, highest first, the least and the greatest result of every
            channel; calibrated at export.
        common_ranges: of a "bytes or sums", at every width, the ends of one range for all channels, around 0, and the root of
            the mean square of what its bytes lose; likewise.
        bias: the tensor of the float bias, or None.
        norm: the batch normalization folded in, or None.
        epsilon: of the batch normalization.
    """

    prefix: str
    layer: str
    kind: str
    into: str | None
    ranges: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    common_ranges: tuple[tuple[float, float, float], ...]
    bias: str | None
    norm: str | None
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A tensor of the artifact, as it is, or its row for the width in use where a batch normalization owns it."""

    tensor: str
    dtype: str
    norm: str | None


@dataclass(frozen=True, kw_only=True)
class Bindings:
    """All that a graph leaves open.

    Attributes:
        additions: "requantized" (convolutions that feed one end in 8 bits where every layer has 8 or nothing is lost, else in
            floats; grouped ones and those of one dimension, which are no matrix product of patches, in 8 bits at every width)
            or "exact" (all end in floats, those in int32).
    """

    additions: str
    quantizers: tuple[Quantizer, ...]
    products: tuple[Product, ...]
    constants: tuple[Constant, ...]

    def to_text(self) -> str:
        """Canonical JSON."""
        return files.canonical_json(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "Bindings":
        """The inverse of `to_text`.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is no such text.
        """
        value = strict_json(text)
        products = [
            entry
            | {"ranges": tuple((tuple(least), tuple(greatest)) for least, greatest in entry["ranges"])}
            | {"common_ranges": tuple((low, high, loss) for low, high, loss in entry["common_ranges"])}
            for entry in value["products"]
        ]
        return cls(
            additions=str(value["additions"]),
            quantizers=tuple(Quantizer(**entry) for entry in value["quantizers"]),
            products=tuple(Product(**entry) for entry in products),
            constants=tuple(Constant(**entry) for entry in value["constants"]),
        )

    def names(self) -> set[str]:
        """The names of all constants that `constants.values` computes."""
        of_quantizers = {f"{one.prefix}.{key}" for one in self.quantizers for key in _OF_QUANTIZER}
        of_products = {f"{one.prefix}.{key}" for one in self.products for key in _KINDS[one.kind]}
        return of_quantizers | of_products | {constant.tensor for constant in self.constants}

    def check(self, header: Header, tensors: Mapping[str, np.ndarray]) -> None:
        """Whether the artifact has all that is named here, in the shapes that it takes.

        Raises:
            ValueError, TypeError, OverflowError: it has not.
        """
        layers = {layer.name: layer for layer in header.layers}
        prefixes = [quantizer.prefix for quantizer in self.quantizers]
        _need(self.additions in ("requantized", "exact"), f"additions {self.additions!r}")
        named = [*prefixes, *(product.prefix for product in self.products)]
        _need(len(set(named)) == len(named), "a prefix given twice")
        for quantizer in self.quantizers:
            _need(
                isinstance(quantizer.prefix, str) and quantizer.layer in layers, f"a quantizer of {quantizer.layer!r}"
            )
            _need(isinstance(quantizer.nonnegative, bool), f"a quantizer of {quantizer.layer!r}")
            for bound in (quantizer.least, quantizer.greatest):
                _need(bound is None or is_finite(bound), f"a bound {bound!r}")
        for product in self.products:
            _need(isinstance(product.prefix, str) and product.layer in layers, f"a product of {product.layer!r}")
            _need(product.kind in _KINDS and product.into in (None, *prefixes), f"a product of kind {product.kind!r}")
            _need(is_finite(product.epsilon), f"an epsilon {product.epsilon!r}")
            channels = layers[product.layer].shape[0]
            if product.kind in ("branch", "bytes or sums"):
                _need(len(product.ranges) == len(header.widths), f"the ranges of {product.layer!r}")
                for least, greatest in product.ranges:
                    whole = len(least) == len(greatest) == channels and all(map(is_finite, (*least, *greatest)))
                    _need(whole and all(map(float.__le__, map(float, least), map(float, greatest))), "a range")
            if product.kind == "bytes or sums":
                _need(len(product.common_ranges) == len(header.widths), f"the common ranges of {product.layer!r}")
                for low, high, loss in product.common_ranges:
                    _need(all(map(is_finite, (low, high, loss))) and low <= 0 <= high, "a common range")
            if product.bias is not None:
                _need(tensors[product.bias].shape == (channels,), f"the bias of {product.layer!r}")
            if product.norm is not None:
                for key in ("weight", "bias", "running_mean", "running_var"):
                    self._check_stacked(header, tensors, tensor_name(product.norm, key), product.norm, (channels,))
        for constant in self.constants:
            _need(constant.tensor in tensors and isinstance(constant.dtype, str), f"a constant {constant.tensor!r}")
            _need(np.dtype(constant.dtype).kind in "biuf", f"a constant of type {constant.dtype!r}")
            if constant.norm is not None:
                shape = tensors[constant.tensor].shape[1:]
                self._check_stacked(header, tensors, constant.tensor, constant.norm, shape)

    @staticmethod
    def _check_stacked(
        header: Header, tensors: Mapping[str, np.ndarray], name: str, norm: str, shape: tuple[int, ...]
    ) -> None:
        _need(norm in header.norms, f"a batch normalization {norm!r}")
        rows = header.norm_row(norm, {layer.name: header.widths[-1] for layer in header.layers}) + 1
        _need(name not in tensors or tensors[name].shape == (rows, *shape), f"the shape of {name!r}")


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
