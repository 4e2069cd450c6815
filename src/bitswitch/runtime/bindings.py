"""What an integer graph leaves open, and the numbers that go there at an assignment. NumPy alone.

A graph holds no weights and knows no widths: its constants are named, and a `Bindings` says what each name stands for.
`values` computes them from an artifact's tensors. One graph so serves every assignment.

Activation codes are unsigned bytes: those of a signed quantizer lie 128 higher, with a zero-point of 128. Weight codes of
l < 8 bits are shifted left to fill a byte and their scale is divided by as much. That is the same weight exactly, and the
integer bias, whose unit is the product of both scales, loses less by its rounding. They are shifted only so far that the sum of
two products of an unsigned and a signed byte stays below 2^15, where x86 without VNNI saturates.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from bitswitch import files
from bitswitch.artifact import Header, tensor_name
from bitswitch.codes import narrow, signed_range, unsigned_range

Arrays = dict[str, np.ndarray]

_SIGNED_ZERO_POINT = 128
_SATURATION = 2**15
# A byte of a branch is fine enough beside codes of this many bits or more.
_LEAST_BITS_IN_BYTES = 6
# A bias beyond this would leave an int32 accumulator too little room for the products.
_GREATEST_BIAS = 2**29
_LEAST_SCALE = 1e-30


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
    """

    prefix: str
    layer: str
    least: float | None
    greatest: float | None


@dataclass(frozen=True, kw_only=True)
class Product:
    """A convolution or matrix product of a layer, with the batch normalization that follows it folded in.

    Seven kinds. "conv": its result goes straight to the next layer's quantizer. "sums": an integer matrix product of patches,
    which ends in floats. "branch": its result gets 8 bits per channel and goes on as floats, `byte * step + offset`. "either":
    the graph has the forms of "branch" and of "sums", and a flag says which. "int32": it ends in integers that a float
    multiplication and addition follow. "float": a float convolution of dequantized codes. "linear": a matrix product, which
    ends in floats by itself.

    Arrays: `<prefix>.codes` int8 in the weight's shape ("linear": [in, out]; "int32": uint8, 128 higher), `.scale` float32
    [out] and `.zero` int8 [out]; `.bias` int32 [out] and `.bias_scale` float32 [out], or `.bias` float32 [out] alone for
    "linear" and "float". "branch" has more: `.step`, `.offset`, `.mean` (0) and `.variance` (1), float32 [out], of the batch
    normalization that applies the first two. "sums": `.codes`, `.sum_zero` int8 [out], `.sum_scale`, `.sum_bias`
    float32 [out]. "either": those of both, and `.in_bytes` bool []. "int32": `.codes`, `.zero` uint8 [],
    `.multiplier`, `.offset` [out, 1, ...].

    Attributes:
        prefix: of the names of its arrays.
        layer: whose weight it is.
        kind: see above.
        into: of a "conv", the prefix of the input quantizer that alone reads its result.
        ranges: of a "branch" or "either", at every width, highest first, the least and the greatest result of every channel;
            calibrated at export.
        bias: the tensor of the float bias, or None.
        norm: the batch normalization folded in, or None.
        epsilon: of the batch normalization.
    """

    prefix: str
    layer: str
    kind: str
    into: str | None
    ranges: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
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
        additions: "requantized" (convolutions that feed one end in 8 bits where every layer has 6 or more, else in floats) or
            "exact" (all end in floats).
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
            ValueError, TypeError, KeyError: it is no such text.
        """
        value = json.loads(text)
        products = [
            entry | {"ranges": tuple((tuple(least), tuple(greatest)) for least, greatest in entry["ranges"])}
            for entry in value["products"]
        ]
        return cls(
            additions=str(value["additions"]),
            quantizers=tuple(Quantizer(**entry) for entry in value["quantizers"]),
            products=tuple(Product(**entry) for entry in products),
            constants=tuple(Constant(**entry) for entry in value["constants"]),
        )


def values(
    bindings: Bindings,
    header: Header,
    tensors: Mapping[str, np.ndarray],
    assignment: Mapping[str, int],
    *,
    filled: Callable[[int], bool] = lambda width: True,
) -> Arrays:
    """Every constant that the graph leaves open, by name.

    Args:
        bindings: of the graph.
        header: of the artifact.
        tensors: of the artifact, by name.
        assignment: the width of every layer.
        filled: whether codes of a width are shifted to fill a byte; otherwise they are what `codes.narrow` gives.
    """
    artifact = _Artifact(header, tensors, assignment)
    found: Arrays = {}
    for quantizer in bindings.quantizers:
        found |= _named(quantizer.prefix, _quantizer(artifact, quantizer))
    for product in bindings.products:
        found |= _named(product.prefix, _product(artifact, product, _thresholds(product, found), filled))
    for constant in bindings.constants:
        array = artifact.tensors[constant.tensor]
        row = array if constant.norm is None else array[artifact.row_of_norm(constant.norm)]
        found[constant.tensor] = np.asarray(row, dtype=constant.dtype)
    return found


@dataclass(frozen=True)
class _Artifact:
    """An artifact at an assignment."""

    header: Header
    tensors: Mapping[str, np.ndarray]
    assignment: Mapping[str, int]

    def row(self, layer: str) -> int:
        """The row of a layer's width in tensors that are stacked over the widths."""
        return self.header.widths.index(self.assignment[layer])

    def row_of_norm(self, norm: str) -> int:
        """The row of a batch normalization that is in use."""
        return self.header.norm_row(norm, self.assignment)

    def kind(self, layer: str) -> str:
        """The kind of a layer's input quantizer."""
        return next(entry.input for entry in self.header.layers if entry.name == layer)

    def input_scale(self, layer: str) -> np.float32:
        return self.tensors[tensor_name(layer, "input_scale")][self.row(layer)]

    def zero_point(self, layer: str) -> int:
        """The code of 0.0 among bytes: `clip(round(-z / s), 0, 2^b - 1)`, 128 for a signed quantizer, else 0."""
        kind = self.kind(layer)
        if kind == "zero_point":
            offset = self.tensors[tensor_name(layer, "input_offset")][self.row(layer)]
            greatest = unsigned_range(self.assignment[layer])[1]
            return int(np.clip(np.round(-offset / self.input_scale(layer)), 0, greatest))
        return _SIGNED_ZERO_POINT if kind == "signed" else 0

    def code_range(self, layer: str) -> tuple[int, int]:
        """The least and the greatest byte that a layer's quantizer gives."""
        if self.kind(layer) != "signed":
            return unsigned_range(self.assignment[layer])
        least, greatest = signed_range(self.assignment[layer])
        return least + _SIGNED_ZERO_POINT, greatest + _SIGNED_ZERO_POINT

    def _norm(self, norm: str, key: str, default: float, channels: int) -> np.ndarray:
        stacked = self.tensors.get(tensor_name(norm, key))
        return np.full(channels, default) if stacked is None else stacked[self.row_of_norm(norm)].astype(np.float64)

    def room(self, layer: str) -> int:
        """By how many bits a layer's weight codes can be shifted."""
        magnitude = -signed_range(self.assignment[layer])[0]
        inside = [shift for shift in range(7) if magnitude << shift <= 128 and self.fits(magnitude << shift, layer)]
        return max(inside, default=0)

    def fits(self, magnitude: int, layer: str) -> bool:
        """Whether two products of such weights with a layer's input bytes stay within 16 bits."""
        return 2 * magnitude * self.code_range(layer)[1] <= _SATURATION

    def affine(self, product: Product, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """(a, c) of `y = a * product + c` for every channel, float64: bias and batch normalization together."""
        bias = np.zeros(channels) if product.bias is None else self.tensors[product.bias].astype(np.float64)
        if product.norm is None:
            return np.ones(channels), bias
        weight, shift, mean, variance = (
            self._norm(product.norm, key, default, channels)
            for key, default in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0))
        )
        a = weight / np.sqrt(variance + product.epsilon)
        return a, shift + (bias - mean) * a


def may_saturate(
    bindings: Bindings, header: Header, arrays: Mapping[str, np.ndarray], assignment: Mapping[str, int]
) -> bool:
    """Whether the sum of two products of a weight and an input byte can exceed 16 bits, in any layer."""
    artifact = _Artifact(header, {}, assignment)

    def magnitude(product: Product) -> int:
        return int(np.abs(arrays[f"{product.prefix}.codes"].astype(np.int16)).max(initial=0))

    signed = [product for product in bindings.products if product.kind != "int32"]
    return not all(artifact.fits(magnitude(product), product.layer) for product in signed)


def _named(prefix: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
    return {f"{prefix}.{key}": array for key, array in arrays.items()}


def _quantizer(artifact: _Artifact, quantizer: Quantizer) -> Arrays:
    scale = artifact.input_scale(quantizer.layer)
    zero = artifact.zero_point(quantizer.layer)
    low, high = artifact.code_range(quantizer.layer)

    def code(value: float) -> int:
        return int(np.clip(np.round(np.float32(value) / scale) + zero, low, high))

    low, high = (
        low if quantizer.least is None else code(quantizer.least),
        high if quantizer.greatest is None else code(quantizer.greatest),
    )
    return {
        "scale": np.asarray(scale, np.float32),
        "zero": np.asarray(zero, np.uint8),
        "low": np.asarray(low, np.uint8),
        "high": np.asarray(high, np.uint8),
        "clips": np.asarray((low, high) != (0, 255)),
    }


def _thresholds(product: Product, arrays: Arrays) -> np.ndarray:
    """The values at which the codes of a convolution's reader step up; none where it has no single reader."""
    if product.into is None:
        return np.zeros(0)
    scale, zero, low, high = (arrays[f"{product.into}.{key}"] for key in ("scale", "zero", "low", "high"))
    return (np.arange(int(low) + 1, int(high) + 1) - int(zero) - 0.5) * float(scale)


def _product(artifact: _Artifact, product: Product, thresholds: np.ndarray, filled: Callable[[int], bool]) -> Arrays:
    layer = product.layer
    high, width = artifact.header.widths[0], artifact.assignment[layer]
    codes = narrow(artifact.tensors[tensor_name(layer, "codes")], high, width)
    fine_shift = artifact.room(layer)
    shift = fine_shift if filled(width) else 0
    codes = codes << shift
    weight_scale = artifact.tensors[tensor_name(layer, "weight_scale")].astype(np.float64).reshape(-1)
    a, c = artifact.affine(product, len(codes))
    scale = a * (weight_scale * 2.0 ** (high - width - shift))
    input_scale = float(artifact.input_scale(layer))
    if product.kind in ("linear", "float"):
        return _float_result(codes.T if product.kind == "linear" else codes, scale, c)
    if product.kind == "int32":
        shape = (-1, *[1] * (codes.ndim - 2))
        multiplier, offset = (input_scale * scale).astype(np.float32), c.astype(np.float32)
        # Unsigned: ONNX Runtime has no fast kernel for a signed weight here.
        codes = (codes.astype(np.int16) + _SIGNED_ZERO_POINT).astype(np.uint8)
        zero = np.asarray(_SIGNED_ZERO_POINT, np.uint8)
        return {
            "codes": codes,
            "zero": zero,
            "multiplier": multiplier.reshape(shape),
            "offset": offset.reshape(shape),
        }
    if product.kind == "sums":
        return _sums(codes, scale, c)
    if product.kind in ("branch", "either"):
        found = _branch(artifact, product, codes, scale, c, 2**shift)
        if product.kind == "branch":
            return found
        # Weights that are packed are computed in floats, whatever the graph: there is no matrix of patches of them.
        in_bytes = shift != fine_shift or min(artifact.assignment.values()) >= _LEAST_BITS_IN_BYTES
        return found | _sums(codes, scale, c) | {"in_bytes": np.asarray(in_bytes)}
    codes, scale = _with_room_for_bias(codes, scale, np.abs(c) / input_scale)
    fine = 2 ** (fine_shift - shift)
    unit = input_scale * np.abs(scale) / fine
    bias, stretch = _whole_bias(c / unit, thresholds / unit[:, None], 2**fine_shift)
    scale = scale / stretch
    return _convolution(codes, scale, bias * np.sign(scale), input_scale * scale / fine)


def _convolution(codes: np.ndarray, scale: np.ndarray, bias: np.ndarray, bias_scale: np.ndarray) -> Arrays:
    return {
        "codes": codes,
        "scale": scale.astype(np.float32),
        "zero": np.zeros(len(codes), np.int8),
        "bias": bias.astype(np.int32),
        "bias_scale": bias_scale.astype(np.float32),
    }


def _branch(
    artifact: _Artifact, product: Product, codes: np.ndarray, scale: np.ndarray, c: np.ndarray, step: int
) -> Arrays:
    """A convolution whose result has 8 bits in every channel.

    Sums of products are multiples of `step`. Where the range of a channel holds at most 256 of them, every one has a byte of
    its own, and nothing is lost. The range begins at a multiple, so that the integer bias is exact.
    """
    least, greatest = (np.array(bound) for bound in product.ranges[artifact.row(product.layer)])
    grid = np.maximum(float(artifact.input_scale(product.layer)) * np.abs(scale) * step, _LEAST_SCALE)
    steps_below = np.clip(np.floor((least - c) / grid), -_GREATEST_BIAS // step, _GREATEST_BIAS // step)
    width = np.maximum((greatest - least) / 255, grid)
    scale = np.copysign(np.maximum(np.abs(scale), _LEAST_SCALE), scale) / width
    bias = -steps_below * step * np.sign(scale)
    bias_scale = float(artifact.input_scale(product.layer)) * scale
    return _convolution(codes, scale, bias, bias_scale) | {
        "step": width.astype(np.float32),
        "offset": (c + steps_below * grid).astype(np.float32),
        "mean": np.zeros(len(codes), np.float32),
        "variance": np.ones(len(codes), np.float32),
    }


def _whole_bias(bias: np.ndarray, thresholds: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole numbers that stand best for the biases of a convolution's channels, and how far to stretch its thresholds.

    Sums of products are multiples of `step`, so that a code steps up at one of few sums. With a whole bias and the thresholds a
    little further from zero, or nearer, all codes of a channel can often step up at the very sums at which they do with the
    bias itself. Every threshold bounds the factor to an interval; of the whole numbers around the bias, that is taken which
    lets most intervals meet, and of those the nearest.

    Args:
        bias: float64 [out], in units of the accumulator.
        thresholds: float64 [out, codes], none of them 0, where codes step up, in the same units.
        step: of the accumulator.

    Returns:
        (bias, factor), float64 [out]. A factor beside 1 divides the scale.
    """
    if not thresholds.shape[1]:
        return np.round(bias), np.ones_like(bias)
    sums = np.ceil((thresholds - bias[:, None]) / step) * step
    nearest = np.round(bias)
    best, best_factor, most = nearest, np.ones_like(bias), np.full(bias.shape, -np.inf)
    for candidate in (nearest, nearest - 1, nearest + 1):
        bounds = np.stack([sums - step, sums]) + candidate[:, None]
        bounds /= thresholds
        factor, met = _most_met(bounds.min(0), bounds.max(0))
        better = met > most
        best, best_factor = np.where(better, candidate, best), np.where(better, factor, best_factor)
        most = np.where(better, met, most)
    return best, best_factor


def _most_met(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In each row, a number that lies in as many intervals `low` to `high` as any does, and in how many it lies."""
    ends = np.concatenate([low, high], 1)
    order = ends.argsort(1, kind="stable")
    ends = np.take_along_axis(ends, order, 1)
    inside = np.where(order < low.shape[1], 1, -1).cumsum(1)
    # Not the last end, behind which there is no interval.
    at = inside[:, :-1].argmax(1)[:, None]
    middle = (np.take_along_axis(ends, at, 1) + np.take_along_axis(ends, at + 1, 1)) / 2
    return middle[:, 0], np.take_along_axis(inside, at, 1)[:, 0]


def _sums(codes: np.ndarray, scale: np.ndarray, c: np.ndarray) -> Arrays:
    return {
        "codes": codes,
        "sum_zero": np.zeros(len(codes), np.int8),
        "sum_scale": scale.astype(np.float32),
        "sum_bias": c.astype(np.float32),
    }


def _float_result(codes: np.ndarray, scale: np.ndarray, c: np.ndarray) -> Arrays:
    return {
        "codes": np.ascontiguousarray(codes),
        "scale": scale.astype(np.float32),
        "zero": np.zeros(len(scale), np.int8),
        "bias": c.astype(np.float32),
    }


def _with_room_for_bias(codes: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coarser codes for the channels whose products are so small beside their bias that it would not fit in int32.

    A batch normalization that has closed a channel (its weight 0, or nearly) makes such channels.
    """
    least = np.maximum(bias / _GREATEST_BIAS, _LEAST_SCALE)
    coarser = np.abs(scale) < least
    if not coarser.any():
        return codes, scale
    ratio = np.where(coarser, np.abs(scale) / least, 1.0).reshape(-1, *[1] * (codes.ndim - 1))
    return np.round(codes * ratio).astype(np.int8), np.where(coarser, np.copysign(least, scale), scale)
