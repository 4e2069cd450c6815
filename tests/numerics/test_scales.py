import math

import numpy as np
import pytest
import torch

from bitswitch.numerics import bounded, sqnr, start_activation_scales, start_weight_scale
from bitswitch.numerics.scales import sample

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bounded_keeps_everything_within(dtype):
    values = [NAN, INF, -INF, 0.0, -0.0, -3.0, 1e38, -1e38, 1e-40, 0.5, 0.25, 2.0]
    value = torch.tensor(values, dtype=dtype, requires_grad=True)
    got = bounded(value, 0.25, 2.0)
    assert got.dtype == dtype
    assert got.tolist() == [0.25, 2.0, 0.25, 0.25, 0.25, 0.25, 2.0, 0.25, 0.25, 0.5, 0.25, 2.0]
    upstream = torch.arange(12, dtype=dtype)
    got.backward(upstream)
    assert torch.equal(value.grad, upstream)


def test_bounded_leaves_its_input_alone():
    value = torch.tensor([-1.0, 0.5, 9.0])
    bounded(value, 0.25, 2.0)
    assert value.tolist() == [-1.0, 0.5, 9.0]


def weight_error(weight, scale, high, low):
    q_high = np.clip(np.floor(weight / scale + 0.5), -(2 ** (high - 1)), 2 ** (high - 1) - 1)
    ratio = 2.0 ** (high - low)
    q_low = np.clip(np.floor(q_high / ratio + 0.5), -(2 ** (low - 1)), 2 ** (low - 1) - 1)
    return ((q_low * scale * ratio - weight) ** 2).sum()


def objective(weight, scale, widths):
    errors = [weight_error(weight, scale, widths[0], low) / (weight**2).sum() for low in widths]
    return sum(math.log(error + 0.01) for error in errors)


def brute_force(weight, widths):
    """The least objective over scales four times as dense and over a wider range than need be."""
    grid = np.abs(weight).max() * 2.0 ** (1 - widths[0]) * 2.0 ** np.arange(-8, 3, 1 / 50)
    return min(objective(weight, scale, widths) for scale in grid)


def weights(kind, shape=(8, 40)):
    rng = np.random.default_rng(4)
    draw = {
        "normal": lambda: rng.normal(0, 0.05, shape),
        "laplace": lambda: rng.laplace(0, 3.0, shape),
        "uniform": lambda: rng.uniform(-1, 1, shape),
        "one-sided": lambda: np.abs(rng.normal(0, 1e-4, shape)),
    }
    return draw[kind]().astype(np.float32)


@pytest.mark.parametrize("widths", [(8, 6, 4, 2), (4, 3, 2), (8,), (2,), (8, 2)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform", "one-sided"])
def test_the_weight_scale_is_the_best_for_all_widths_together(kind, widths):
    weight = weights(kind)
    scale = start_weight_scale(torch.from_numpy(weight), widths)
    assert scale.shape == ()
    weight = weight.astype(np.float64)
    # The grid that the code searches has steps of 6 %; the test below shows what a wrong objective costs.
    assert objective(weight, scale.item(), widths) <= brute_force(weight, widths) + 0.07


@pytest.mark.parametrize("alone", [8, 2])
def test_the_weight_scale_is_not_one_widths_alone(alone):
    weight = weights("laplace").astype(np.float64)
    scale = start_weight_scale(torch.from_numpy(weight), (alone,)).item() * 2.0 ** (alone - 8)
    assert objective(weight, scale, (8, 6, 4, 2)) > brute_force(weight, (8, 6, 4, 2)) + 0.15


def test_a_weight_scale_follows_the_size_of_its_weights():
    weight = torch.from_numpy(weights("normal"))
    scale = start_weight_scale(weight, (8, 4, 2)).item()
    # Powers of two: the same mantissas, so that the same candidate is the best.
    assert [start_weight_scale(weight * 2.0**power, (8, 4, 2)).item() / 2.0**power for power in (-20, 20)] == [
        scale
    ] * 2


def test_the_weight_scale_per_channel_is_each_channels_own():
    weight = torch.from_numpy(np.concatenate([weights(k, (2, 60)) for k in ("normal", "laplace", "uniform")]))
    weight[3] = 0
    got = start_weight_scale(weight.reshape(6, 3, 4, 5), (8, 4, 2), per_channel=True)
    assert got.shape == (6, 1, 1, 1)
    for row in range(6):
        alone = start_weight_scale(weight[row], (8, 4, 2))
        assert got[row].item() == pytest.approx(alone.item(), rel=1e-6)
    assert got[3].item() == 2.0**-7


@pytest.mark.parametrize(("widths", "wanted"), [((8, 4), 2.0**-7), ((4, 2), 2.0**-3), ((2,), 0.5)])
def test_zero_weights_have_a_scale(widths, wanted):
    assert start_weight_scale(torch.zeros(4, 3), widths).item() == wanted
    assert start_weight_scale(torch.zeros(4, 3), widths, per_channel=True).tolist() == [[wanted]] * 4


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_scales_of_tiny_and_huge_data_are_positive_and_finite(size):
    data = torch.linspace(-1, 1, 50) * size
    scales = [
        start_weight_scale(data, (8, 2)),
        *start_activation_scales(data, [(-128, 127), (-2, 1)])[0],
        *start_activation_scales(data, [(0, 255), (0, 3)], with_offset=True)[0],
    ]
    for scale in scales:
        assert 0 < scale.item() < INF


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_weight_scale_has_its_weights_dtype(dtype):
    assert start_weight_scale(torch.randn(4, 4, dtype=dtype), (8, 2)).dtype == dtype


def test_a_large_weight_is_sampled_and_its_scale_serves_the_whole():
    weight = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    scale = start_weight_scale(weight, (2,)).item()
    grid = [weight_error(weight.numpy(), s, 2, 2) for s in np.arange(0.5, 1.6, 0.05)]
    assert weight_error(weight.numpy(), scale, 2, 2) <= 1.02 * min(grid)


def step_error(x, scale, bounds, zp=0.0):
    codes = np.clip(np.rint(x / scale) + zp, *bounds)
    return (((codes - zp) * scale - x) ** 2).sum()


@pytest.mark.parametrize("kind", ["relu", "symmetric", "uniform"])
def test_activation_scales_are_each_widths_best(kind):
    rng = np.random.default_rng(6)
    x = {
        "relu": np.maximum(rng.normal(0.1, 2, 3000), 0),
        "symmetric": rng.laplace(0, 0.3, 3000),
        "uniform": rng.uniform(-4, 4, 3000),
    }[kind].astype(np.float32)
    ranges = [(0, 2**b - 1) if kind == "relu" else (-(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in (8, 4, 3, 2)]
    scales, offsets, errors = start_activation_scales(torch.from_numpy(x), ranges)
    assert offsets is None
    assert scales.shape == errors.shape == (4,)
    x = x.astype(np.float64)
    for scale, error, bounds in zip(scales.tolist(), errors.tolist(), ranges, strict=True):
        peak = np.abs(x).max() / bounds[1]
        best = min(step_error(x, s, bounds) for s in peak * 2.0 ** np.arange(-6.5, 1.5, 1 / 40))
        assert step_error(x, scale, bounds) <= 1.06 * best
        assert error == pytest.approx(step_error(x, scale, bounds) / (x**2).sum(), rel=1e-3)


@pytest.mark.parametrize("shift", [0.2, 0.5, 2.0])
def test_offsets_follow_the_lower_end_of_the_data(shift):
    rng = np.random.default_rng(8)
    x = (rng.exponential(1.0, 3000) - shift).astype(np.float32)
    ranges = [(0, 255), (0, 15), (0, 3)]
    scales, offsets, errors = start_activation_scales(torch.from_numpy(x), ranges, with_offset=True)
    assert offsets.shape == scales.shape == (3,)
    x = x.astype(np.float64)
    for scale, offset, error, bounds in zip(scales.tolist(), offsets.tolist(), errors.tolist(), ranges, strict=True):
        zp = min(max(np.rint(-x.min() / scale), 0), bounds[1])
        assert -offset / scale == pytest.approx(zp, abs=1e-4)
        assert error == pytest.approx(step_error(x, scale, bounds, zp) / (x**2).sum(), rel=1e-3)
        best = INF
        for s in (x.max() - x.min()) / bounds[1] * 2.0 ** np.arange(-6, 1, 1 / 40):
            best = min(best, step_error(x, s, bounds, min(max(np.rint(-x.min() / s), 0), bounds[1])))
        assert step_error(x, scale, bounds, zp) <= 1.05 * best


@pytest.mark.parametrize("with_offset", [False, True])
def test_all_zero_activations_have_scales(with_offset):
    scales, offsets, errors = start_activation_scales(torch.zeros(2, 7), [(0, 255), (0, 3)], with_offset=with_offset)
    assert scales.tolist() == pytest.approx([1 / 255, 1 / 3])
    assert errors.tolist() == [0.0, 0.0]
    assert (offsets is None) != with_offset
    if with_offset:
        assert offsets.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("value", [3.0, -3.0])
def test_constant_activations_have_finite_scales(value):
    for with_offset in (False, True):
        for bounds in ((-8, 7), (0, 15)):
            scales, offsets, _ = start_activation_scales(torch.full((9,), value), [bounds], with_offset=with_offset)
            assert 0 < scales.item() < INF
            assert offsets is None or math.isfinite(offsets.item())


def test_sqnr_is_a_power_ratio_in_decibels():
    signal = torch.tensor([3.0, -4.0])
    assert sqnr(signal, signal + torch.tensor([0.3, 0.4])) == pytest.approx(20.0, abs=1e-4)
    assert sqnr(signal, torch.zeros(2)) == pytest.approx(0.0)
    assert sqnr(signal, -signal) == pytest.approx(10 * math.log10(0.25))
    assert sqnr(signal, signal) == INF


def test_sqnr_of_equal_silence_is_infinite():
    assert sqnr(torch.zeros(3), torch.zeros(3)) == INF


def test_sqnr_does_not_lose_small_noise_in_float32():
    signal = torch.full((1000,), 1e4)
    noisy = signal.clone()
    noisy[0] += 0.0078125
    assert sqnr(signal, noisy) == pytest.approx(10 * math.log10(1000 * 1e8 / 0.0078125**2), abs=1e-6)


@pytest.mark.parametrize("shape", [(256, 256, 3, 3), (512, 16, 32, 32), (256, 256, 768)])
def test_a_sample_meets_every_column_tap_and_feature(shape):
    """A stride that divides a size would see one column of every image, or one tap of every kernel."""
    last = shape[-1]
    columns = torch.arange(last, dtype=torch.float32).expand(shape)
    kept = sample(columns)[0]
    assert kept.numel() <= 1 << 16
    counts = kept.long().bincount(minlength=last)
    assert counts.min() > 0.8 * kept.numel() / last


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_in_half_precision_have_scales_that_are_not_rounded(dtype, per_channel):
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = start_weight_scale(weight, (8, 4, 2), per_channel=per_channel)
    assert found.dtype == torch.float32
    assert torch.equal(found, start_weight_scale(weight.float(), (8, 4, 2), per_channel=per_channel))
