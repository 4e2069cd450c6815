"""Whole numbers that stand for the biases of a convolution whose results become codes. NumPy alone."""

import numpy as np

LEAST_SCALE = 1e-30
# A bias beyond this would leave an int32 accumulator too little room for the products.
GREATEST_BIAS = 2**29
# How far a scale may be stretched: never to 0 or below, which would turn the channel over.
_FACTORS = (0.5, 2.0)
# Relative: some roundings to float32.
_LEAST_ROOM = 1e-6
# Sums of weights that differ by roundings are alike.
_ALIKE = 1 - 1e-9


def whole_bias(
    bias: np.ndarray, thresholds: np.ndarray, density: np.ndarray, step: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The whole numbers that stand best for the biases of a convolution's channels, and how far to stretch its thresholds.

    Sums of products are multiples of `step`, so that a code steps up at one of few sums. With a whole bias and the thresholds a
    little further from zero, or nearer, all codes of a channel can often step up at the very sums at which they do with the
    bias itself. Every threshold bounds the factor to an interval; of the whole numbers around the bias, that is taken which
    lets most intervals meet, weighted by how often a sum is near, and of those the nearest.

    Args:
        bias: float64 [out], in units of the accumulator.
        thresholds: float64 [out, codes], none of them 0, where codes step up, in the same units.
        density: float64 [out, codes], of sums near the thresholds.
        step: of the accumulator.

    Returns:
        (bias, factor, moved), float64 [out]. A factor beside 1 divides the scale; of the density at thresholds, a share
        `moved` is at thresholds whose codes step up elsewhere than with the bias itself.
    """
    if not thresholds.shape[1]:
        return np.round(bias), np.ones_like(bias), np.zeros_like(bias)
    sums = np.ceil((thresholds - bias[:, None]) / step) * step
    nearest = np.round(bias)
    best, best_factor, most = nearest, np.ones_like(bias), np.full(bias.shape, -np.inf)
    for candidate in (nearest, nearest - 1, nearest + 1):
        bounds = np.stack([sums - step, sums]) + candidate[:, None]
        # Where a step of the sums is wide beside the thresholds, intervals reach below 0: no scale may.
        bounds = np.clip(bounds / thresholds, *_FACTORS)
        factor, met = _most_met(bounds.min(0), bounds.max(0), density)
        better = met * _ALIKE > most
        best, best_factor = np.where(better, candidate, best), np.where(better, factor, best_factor)
        most = np.where(better, met, most)
    return best, best_factor, 1 - most / density.sum(1)


def _most_met(low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In each row, a number in the intervals `low` to `high` whose weights have the greatest sum, and that sum.

    Of several such places the widest is taken, and none that is hardly a place, such as where one interval ends and the next
    begins: the numbers are rounded to float32 later.
    """
    ends = np.concatenate([low, high], 1)
    order = ends.argsort(1, kind="stable")
    ends = np.take_along_axis(ends, order, 1)
    inside = np.take_along_axis(np.concatenate([weight, -weight], 1), order, 1).cumsum(1)
    # Not the last end, behind which there is no interval.
    inside, widths = inside[:, :-1], np.diff(ends, axis=1)
    roomy = widths > _LEAST_ROOM * np.abs(ends[:, 1:])
    # Thresholds beyond a million steps of the sums have no such place: a closed channel's, where none matters.
    inside = np.where(roomy | ~roomy.any(1, keepdims=True), inside, 0)
    most = inside.max(1, keepdims=True) * _ALIKE
    at = np.where(inside >= most, widths, -1).argmax(1)[:, None]
    middle = (np.take_along_axis(ends, at, 1) + np.take_along_axis(ends, at + 1, 1)) / 2
    return middle[:, 0], np.take_along_axis(inside, at, 1)[:, 0]


def with_room(codes: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coarser codes for the channels whose products are so small beside their bias that it would not fit in int32.

    A batch normalization that has closed a channel (its weight 0, or nearly) makes such channels.
    """
    least = np.maximum(bias / GREATEST_BIAS, LEAST_SCALE)
    coarser = np.abs(scale) < least
    if not coarser.any():
        return codes, scale
    ratio = np.where(coarser, np.abs(scale) / least, 1.0).reshape(-1, *[1] * (codes.ndim - 1))
    return np.round(codes * ratio).astype(np.int8), np.where(coarser, np.copysign(least, scale), scale)
