"""The numbers that go where an integer graph leaves them open, at an assignment. NumPy alone.

Activation codes are unsigned bytes: those of a signed quantizer lie 128 higher, with a zero-point of 128; those of what is
never negative may lie at a byte's upper end, so that its saturation clips them. Weight codes of l < 8 bits are shifted left to
fill a byte and their scale is divided by as much. That is the same weight exactly, and the integer bias, whose unit is the
product of both scales, loses less by its rounding. They are shifted only so far that the sum of two products of an unsigned and
a signed byte stays below 2^15, where x86 without VNNI saturates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from bitswitch.artifact import Header, tensor_name
from bitswitch.codes import narrow, signed_range, unsigned_range
from bitswitch.errors import UserError
from bitswitch.runtime.bindings import Bindings, Product, Quantizer
from bitswitch.runtime.whole_bias import GREATEST_BIAS, LEAST_SCALE, whole_bias, with_room

Arrays = dict[str, np.ndarray]

_SIGNED_ZERO_POINT = 128
_SATURATION = 2**15
# Of products of weights with input bytes: the rest of an accumulator is for the bias.
_GREATEST_SUM = 2**31 - GREATEST_BIAS
# A byte of a branch is fine enough where every layer has this many bits.
_LEAST_BITS_IN_BYTES = 8
# One scale for all channels of a branch is fine enough where it makes the noise at most this many times as strong (6 dB).
_MOST_NOISE = 4
# A whole bias is fine enough where it moves at most this share of the thresholds that results come near.
_MOST_MOVED = 2e-2


def values(
    bindings: Bindings,
    header: Header,
    tensors: Mapping[str, np.ndarray],
    assignment: Mapping[str, int],
    *,
    filled: Callable[[int], bool] = lambda width: True,
    saturating: bool = False,
) -> Arrays:
    """Every constant that the graph leaves open, by name.

    Args:
        bindings: of the graph.
        header: of the artifact.
        tensors: of the artifact, by name.
        assignment: the width of every layer.
        filled: whether codes of a width are shifted to fill a byte; otherwise they are what `codes.narrow` gives.
        saturating: whether input codes of fewer bits lie at the upper end of a byte, where the quantizer's own saturation clips
            them, wherever what is quantized is never negative. Only where two products may exceed 16 bits.
    """
    artifact = _Artifact(header, tensors, assignment)
    found: Arrays = {}
    for quantizer in bindings.quantizers:
        found |= _named(quantizer.prefix, _quantizer(artifact, quantizer, saturating))
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

    @property
    def uniform(self) -> bool:
        """Whether all layers have one width."""
        return len(set(self.assignment.values())) == 1

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

    def density(self, product: Product, values: np.ndarray, channels: int) -> np.ndarray:
        """How often results of a product come near values, relative to each other, [channels, values].

        Batch normalization has made them normally distributed, with its bias as mean and its weight as standard deviation.
        """
        if product.norm is None:
            return np.ones((channels, len(values)))
        weight, shift = (
            self._norm(product.norm, key, default, channels) for key, default in (("weight", 1.0), ("bias", 0.0))
        )
        found = np.exp(-0.5 * ((values - shift[:, None]) / np.maximum(np.abs(weight), LEAST_SCALE)[:, None]) ** 2)
        # Where a channel is closed or far from all values they are alike.
        return np.maximum(found / np.maximum(found.max(1, initial=0, keepdims=True), LEAST_SCALE), 1e-6)


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


def _quantizer(artifact: _Artifact, quantizer: Quantizer, saturating: bool) -> Arrays:
    scale = artifact.input_scale(quantizer.layer)
    zero = artifact.zero_point(quantizer.layer)
    low, high = artifact.code_range(quantizer.layer)

    def code(value: float) -> int:
        return int(np.clip(np.round(np.float32(value) / scale) + zero, low, high))

    low, high = (
        low if quantizer.least is None else code(quantizer.least),
        high if quantizer.greatest is None else code(quantizer.greatest),
    )
    clips = (low, high) != (0, 255)
    if saturating and quantizer.nonnegative and zero == low == 0:
        zero, low, high, clips = 255 - high, 255 - high, 255, False
    return {
        "scale": np.asarray(scale, np.float32),
        "zero": np.asarray(zero, np.uint8),
        "low": np.asarray(low, np.uint8),
        "high": np.asarray(high, np.uint8),
        "clips": np.asarray(clips),
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
    fine_shift = min(artifact.room(layer), _shifts_within_32_bits(artifact, layer, codes))
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
    # Weights that are packed are computed in floats, whatever the graph: there is no matrix of patches of them.
    all_in_bytes = shift != fine_shift or min(artifact.assignment.values()) >= _LEAST_BITS_IN_BYTES
    if product.kind == "branch":
        return _bytes_of_channels(artifact, product, codes, scale, c, 2**shift)[0]
    if product.kind == "bytes or sums":
        found, exact = _bytes_of_channels(artifact, product, codes, scale, c, 2**shift)
        common = _bytes(artifact, product, codes, scale, c)
        # Those that are packed lose their bytes (`export.onnx`): a scale for every channel leaves their bias exact.
        alike = (
            shift == fine_shift
            and not exact
            and _are_alike(found["step"], product.common_ranges[artifact.row(layer)][2])
        )
        # The ranges are of networks of one width: in a mixture results may lie elsewhere.
        in_bytes = all_in_bytes or (exact and artifact.uniform)
        flags = {"in_bytes": np.asarray(in_bytes), "alike": np.asarray(alike)}
        return _sums(codes, scale, c) | ((found | common) if alike else (common | found)) | flags
    sums = _sums(codes, scale, c)
    fine = 2 ** (fine_shift - shift)
    codes, scale = with_room(codes, scale, np.abs(c) / input_scale * fine)
    unit = input_scale * np.abs(scale) / fine
    density = artifact.density(product, thresholds, len(codes))
    bias, stretch, moved = whole_bias(c / unit, thresholds / unit[:, None], density, 2**fine_shift)
    scale = scale / stretch
    found = _convolution(codes, scale, bias * np.sign(scale), input_scale * scale / fine)
    if product.kind == "conv":
        return found
    in_bytes = all_in_bytes or bool(moved.mean() <= _MOST_MOVED)
    return (sums | found if in_bytes else found | sums) | {"in_bytes": np.asarray(in_bytes)}


def _shifts_within_32_bits(artifact: _Artifact, layer: str, codes: np.ndarray) -> int:
    """By how many bits codes can be shifted so that no sum of products with input bytes leaves an int32 beside its bias.

    Raises:
        UserError: as they are, their sums can.
    """
    if codes[0].size * 2**15 < _GREATEST_SUM:
        return 7
    zero = artifact.zero_point(layer)
    low, high = (byte - zero for byte in artifact.code_range(layer))
    rows = codes.reshape(len(codes), -1)
    above, below = (bound(rows, 0).sum(1, dtype=np.int64) for bound in (np.maximum, np.minimum))
    greatest = int(max((above * high + below * low).max(), -(above * low + below * high).min()))
    if greatest >= _GREATEST_SUM:
        raise UserError(
            f"layer {layer!r} sums {codes[0].size} products, which 32 bits may not hold at {artifact.assignment[layer]} bits: "
            "keep it float (keep=)"
        )
    return ((_GREATEST_SUM - 1) // max(greatest, 1)).bit_length() - 1


def _convolution(codes: np.ndarray, scale: np.ndarray, bias: np.ndarray, bias_scale: np.ndarray) -> Arrays:
    return {
        "codes": codes,
        "scale": scale.astype(np.float32),
        "zero": np.zeros(len(codes), np.int8),
        "bias": bias.astype(np.int32),
        "bias_scale": bias_scale.astype(np.float32),
    }


def _bytes_of_channels(
    artifact: _Artifact, product: Product, codes: np.ndarray, scale: np.ndarray, c: np.ndarray, step: int
) -> tuple[Arrays, bool]:
    """A convolution whose result has 8 bits in every channel; and whether these are its very sums, in all channels.

    Sums of products are multiples of `step`. Where the range of a channel holds at most 256 of them, as is usual with codes of
    2 bits, every one has a byte of its own, and nothing is lost: what bytes are left lies half below the range, half above.
    The range begins at a multiple, so that the integer bias is exact.
    """
    # A mixture's results are thought to lie where those of its widths do.
    rows = [artifact.row(product.layer)] if artifact.uniform else range(len(product.ranges))
    ranges = np.array([product.ranges[row] for row in rows])
    least, greatest = ranges[:, 0].min(0), ranges[:, 1].max(0)
    grid = np.maximum(float(artifact.input_scale(product.layer)) * np.abs(scale) * step, LEAST_SCALE)
    unused = np.maximum(255 - np.ceil((greatest - least) / grid), 0)
    steps_below = np.floor((least - c) / grid) - unused // 2
    steps_below = np.clip(steps_below, -GREATEST_BIAS // step, GREATEST_BIAS // step)
    width = np.maximum((greatest - least) / 255, grid)
    scale = np.copysign(np.maximum(np.abs(scale), LEAST_SCALE), scale) / width
    bias = -steps_below * step * np.sign(scale)
    bias_scale = float(artifact.input_scale(product.layer)) * scale
    return _convolution(codes, scale, bias, bias_scale) | {
        "step": width.astype(np.float32),
        "offset": (c + steps_below * grid).astype(np.float32),
        "mean": np.zeros(len(codes), np.float32),
        "variance": np.ones(len(codes), np.float32),
    }, bool((width == grid).all())


def _bytes(artifact: _Artifact, product: Product, codes: np.ndarray, scale: np.ndarray, c: np.ndarray) -> Arrays:
    """A convolution whose result has 8 bits, on one scale for all channels."""
    low, high, _ = product.common_ranges[artifact.row(product.layer)]
    step = max((high - low) / 255, LEAST_SCALE)
    input_scale = float(artifact.input_scale(product.layer))
    codes, scale = with_room(codes, scale, np.abs(c) / input_scale)
    bias = np.round(c / (input_scale * scale))
    return _convolution(codes, scale / step, bias, input_scale * scale / step) | {
        "common_step": np.asarray(step, np.float32),
        "common_zero": np.asarray(np.round(-low / step), np.uint8),
    }


def _are_alike(steps: np.ndarray, loss: float) -> bool:
    """Whether one range for all channels loses little more than the rounding to a step for each."""
    return bool(loss**2 <= _MOST_NOISE * np.square(steps, dtype=np.float64).mean() / 12)


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
