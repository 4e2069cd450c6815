"""The reference here is written from the equations, in NumPy float64, and shares no code with what it checks."""

import numpy as np
import pytest
import torch

from bitswitch.numerics import double_round, learned_step, weight_codes, zero_point

PAIRS = [(8, 8), (8, 6), (8, 4), (8, 2), (4, 3), (4, 2), (2, 2), (7, 4)]


def reference_double_round(weight, scale, upstream, high, low, lsq_factor):
    """weight [out, n], scale () or [out, 1]; returns codes of high and low bits, output, both gradients."""
    ratio = 2.0 ** (high - low)
    q_high = np.clip(np.floor(weight / scale + 0.5), -(2 ** (high - 1)), 2 ** (high - 1) - 1)
    least, greatest = -(2 ** (low - 1)), 2 ** (low - 1) - 1
    q_low = np.clip(np.floor(q_high / ratio + 0.5), least, greatest)
    v = weight / (scale * ratio)
    inside = (least <= v) & (v <= greatest)
    bound = np.where(v < least, least, greatest)
    slope = np.where(inside, q_low - v, bound) * upstream * ratio
    shared_by = weight.size if scale.ndim == 0 else weight.shape[1]
    grad_scale = slope.sum() if scale.ndim == 0 else slope.sum(1, keepdims=True)
    if lsq_factor:
        grad_scale = grad_scale / np.sqrt(shared_by * greatest)
    return q_high, q_low, q_low * scale * ratio, upstream * inside, grad_scale


def reference_learned_step(x, scale, upstream, bounds, offset=None, lsq_factor=True, quotient=None):
    """x [rows, n], scale () or [rows, 1]; `quotient` where x / scale is to be rounded to a narrower float first."""
    least, greatest = bounds
    quotient = x / scale if quotient is None else quotient
    zp = 0.0 if offset is None else np.clip(np.rint(-offset / scale), 0, greatest)
    q = np.clip(np.rint(quotient) + zp, least, greatest)
    v = x / scale + zp
    inside = (least <= v) & (v <= greatest)
    slope = np.where(inside, q - v, np.where(v < least, least, greatest)) * upstream
    shared_by = x.size if scale.ndim == 0 else x.shape[1]
    grad_scale = slope.sum() if scale.ndim == 0 else slope.sum(1, keepdims=True)
    if lsq_factor:
        grad_scale = grad_scale / np.sqrt(shared_by * greatest)
    return q - zp, (q - zp) * scale, upstream * inside, grad_scale, (upstream * ~inside).sum()


def awkward(rng, units, least, greatest):
    """Ties, bounds and their neighbours, out of range, zeros of both signs, in whole numbers of `units`; and noise."""
    points = np.arange(least - 3, greatest + 3)
    corners = np.array([least, greatest, least - 2.0**-9, greatest + 2.0**-9, least + 2.0**-9, greatest - 2.0**-9])
    far = np.array([3.0 * least - 100, 3.0 * greatest + 100, 0.0, -0.0, -(2.0**-9), 2.0**-9])
    noise = rng.normal(0, greatest + 1, 200)
    values = np.concatenate([points, points + 0.5, corners, far, noise])
    return (values * units).astype(np.float32).astype(np.float64)


def leaf(array, dtype):
    return torch.tensor(array, dtype=dtype, requires_grad=True)


def run(function, dtype, upstream, *tensors):
    out = function(*tensors)
    out.backward(torch.tensor(upstream, dtype=dtype))
    return out.detach().double().numpy(), [t.grad.double().numpy() for t in tensors]


@pytest.mark.parametrize("lsq_factor", [True, False])
@pytest.mark.parametrize("per_channel", [False, True], ids=["per_tensor", "per_channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("high", "low"), PAIRS)
def test_double_round_on_ties_bounds_and_noise(high, low, dtype, per_channel, lsq_factor):
    rng = np.random.default_rng(high * 10 + low)
    # Powers of two, so that ties and bounds are exact in float32.
    scale = np.array([[2.0**-5], [2.0**-9], [4.0]]) if per_channel else np.array(2.0**-6)
    wide = 2.0 ** (high - low)
    rows = [
        np.concatenate(
            [
                awkward(rng, s, -(2 ** (high - 1)), 2 ** (high - 1) - 1),
                awkward(rng, s * wide, -(2 ** (low - 1)), 2 ** (low - 1) - 1),
            ]
        )
        for s in scale.reshape(-1)
    ]
    weight = np.stack(rows)
    upstream = rng.normal(size=weight.shape).astype(np.float32).astype(np.float64)
    q_high, q_low, wanted, grad_weight, grad_scale = reference_double_round(
        weight, scale, upstream, high, low, lsq_factor
    )
    w, s = leaf(weight, dtype), leaf(scale, dtype)
    codes = weight_codes(w.detach(), s.detach(), high)
    assert codes.dtype == torch.int8
    assert np.array_equal(codes.numpy(), q_high)
    got, (got_weight, got_scale) = run(
        lambda w, s: double_round(w, s, high=high, low=low, lsq_factor=lsq_factor), dtype, upstream, w, s
    )
    assert np.array_equal(got / (scale * wide), q_low)
    assert np.array_equal(got, wanted)
    assert np.array_equal(got_weight, grad_weight)
    assert got_scale.shape == scale.shape
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-3}
    np.testing.assert_allclose(got_scale, grad_scale, **tolerance)


@pytest.mark.parametrize("lsq_factor", [True, False])
@pytest.mark.parametrize("per_channel", [False, True], ids=["per_tensor", "per_channel"])
@pytest.mark.parametrize(("high", "low"), PAIRS)
def test_double_round_at_any_scale(high, low, per_channel, lsq_factor):
    rng = np.random.default_rng(7)
    scale = rng.uniform(0.01, 0.03, (5, 1)) if per_channel else np.array(0.0173)
    weight = rng.normal(0, 0.02 * 2 ** (high - 2), (5, 40))
    upstream = rng.normal(size=weight.shape)
    q_high, q_low, wanted, grad_weight, grad_scale = reference_double_round(
        weight, scale, upstream, high, low, lsq_factor
    )
    w, s = leaf(weight, torch.float64), leaf(scale, torch.float64)
    assert np.array_equal(weight_codes(w.detach(), s.detach(), high).numpy(), q_high)
    got, (got_weight, got_scale) = run(
        lambda w, s: double_round(w, s, high=high, low=low, lsq_factor=lsq_factor), torch.float64, upstream, w, s
    )
    assert np.array_equal(np.rint(got / (scale * 2 ** (high - low))), q_low)
    np.testing.assert_allclose(got, wanted, rtol=1e-14)
    assert np.array_equal(got_weight, grad_weight)
    np.testing.assert_allclose(got_scale, grad_scale, rtol=1e-12)


def test_double_round_differs_from_one_rounding_where_the_method_says():
    # 31.5 rounds to 32, a tie between 0 and 1 at 2 bits, which goes up; rounded once, 31.5 / 64 would be 0.
    weight = torch.tensor([31.5, 31.49, -32.5, -32.51], dtype=torch.float64)
    got = double_round(weight, torch.tensor(1.0, dtype=torch.float64), high=8, low=2)
    assert got.tolist() == [64.0, 0.0, 0.0, -64.0]


def test_double_round_of_a_convolutions_weight_per_channel():
    rng = np.random.default_rng(3)
    weight, scale = rng.normal(size=(4, 3, 2, 2)), rng.uniform(0.01, 0.1, (4, 1, 1, 1))
    upstream = rng.normal(size=weight.shape)
    _, _, wanted, grad_weight, grad_scale = reference_double_round(
        weight.reshape(4, -1), scale.reshape(4, 1), upstream.reshape(4, -1), 8, 4, True
    )
    got, (got_weight, got_scale) = run(
        lambda w, s: double_round(w, s, high=8, low=4),
        torch.float64,
        upstream,
        leaf(weight, torch.float64),
        leaf(scale, torch.float64),
    )
    np.testing.assert_allclose(got.reshape(4, -1), wanted, rtol=1e-14)
    assert np.array_equal(got_weight.reshape(4, -1), grad_weight)
    np.testing.assert_allclose(got_scale, grad_scale.reshape(4, 1, 1, 1), rtol=1e-12)


UNSIGNED, SIGNED = (0, 15), (-8, 7)


@pytest.mark.parametrize("lsq_factor", [True, False])
@pytest.mark.parametrize("per_channel", [False, True], ids=["per_tensor", "per_channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bounds", [(0, 255), UNSIGNED, (0, 3), (-128, 127), SIGNED, (-2, 1)], ids=str)
def test_learned_step_on_ties_bounds_and_noise(bounds, dtype, per_channel, lsq_factor):
    rng = np.random.default_rng(bounds[1])
    scale = np.array([[0.25], [2.0**-7], [8.0]]) if per_channel else np.array(2.0**-4)
    x = np.stack([awkward(rng, s, *bounds) for s in scale.reshape(-1)])
    upstream = rng.normal(size=x.shape).astype(np.float32).astype(np.float64)
    q, wanted, grad_x, grad_scale, _ = reference_learned_step(x, scale, upstream, bounds, lsq_factor=lsq_factor)
    got, (got_x, got_scale) = run(
        lambda x, s: learned_step(x, s, bounds=bounds, lsq_factor=lsq_factor),
        dtype,
        upstream,
        leaf(x, dtype),
        leaf(scale, dtype),
    )
    assert np.array_equal(got / scale, q)
    assert np.array_equal(got, wanted)
    assert np.array_equal(got_x, grad_x)
    assert got_scale.shape == scale.shape
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-3}
    np.testing.assert_allclose(got_scale, grad_scale, **tolerance)


@pytest.mark.parametrize("lsq_factor", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("zp", [0, 2, 4, 14, 15, 40, -6])
def test_learned_step_with_an_offset_on_ties_and_bounds(zp, dtype, lsq_factor):
    rng = np.random.default_rng(zp + 10)
    scale, offset = np.array(0.125), np.array(-zp * 0.125)
    held = min(max(zp, 0), 15)
    x = awkward(rng, 0.125, 0, 15) - held * 0.125
    if held % 2:  # ties at an odd zero-point have a test of their own
        x = x[np.mod(x / 0.125, 1) != 0.5]
    upstream = rng.normal(size=x.shape).astype(np.float32).astype(np.float64)
    q, wanted, grad_x, grad_scale, grad_offset = reference_learned_step(
        x, scale, upstream, UNSIGNED, offset, lsq_factor
    )
    got, (got_x, got_scale, got_offset) = run(
        lambda x, s, z: learned_step(x, s, bounds=UNSIGNED, offset=z, lsq_factor=lsq_factor),
        dtype,
        upstream,
        leaf(x, dtype),
        leaf(scale, dtype),
        leaf(offset, dtype),
    )
    assert np.array_equal(got / scale, q)
    assert np.array_equal(got, wanted)
    assert np.array_equal(got_x, grad_x)
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-4}
    np.testing.assert_allclose(got_scale, grad_scale, **tolerance)
    np.testing.assert_allclose(got_offset, grad_offset, **tolerance)


@pytest.mark.parametrize("zp", [2, 3])
def test_the_gradient_of_a_step_rounds_ties_as_its_forward_does(zp):
    scale, offset = np.array(0.5), np.array(-zp * 0.5)
    x = np.array([0.5, 1.5, 2.5, -0.5]) * 0.5
    for i in range(4):  # one by one: neighbouring ties round apart and would cancel in the sum
        one, upstream = x[i : i + 1], np.ones(1)
        q, wanted, _, grad_scale, _ = reference_learned_step(one, scale, upstream, UNSIGNED, offset, False)
        got, (_, got_scale, _) = run(
            lambda x, s, z: learned_step(x, s, bounds=UNSIGNED, offset=z, lsq_factor=False),
            torch.float64,
            upstream,
            *(leaf(a, torch.float64) for a in (one, scale, offset)),
        )
        assert np.array_equal(got, wanted)
        assert got_scale == grad_scale, f"x / s = {one[0] / 0.5}, q = {q}"


@pytest.mark.parametrize("bounds", [(0, 255), (0, 3), (-128, 127), (-2, 1)], ids=str)
def test_learned_step_divides_in_float32(bounds):
    rng = np.random.default_rng(11)
    x, scale = rng.normal(0, 3, 4000).astype(np.float32), np.float32(0.0371)
    q, _, _, _, _ = reference_learned_step(
        x.astype(np.float64), np.array(scale, np.float64), np.ones(4000), bounds, quotient=x / scale
    )
    got = learned_step(torch.from_numpy(x), torch.tensor(scale), bounds=bounds)
    assert np.array_equal(got.numpy(), q.astype(np.float32) * scale)


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("lsq_factor", [True, False])
def test_learned_step_on_random_float64(with_offset, lsq_factor):
    rng = np.random.default_rng(5)
    x, scale = rng.normal(0.2, 1, (6, 50)), np.array(0.137)
    offset = np.array(-0.9) if with_offset else None
    upstream = rng.normal(size=x.shape)
    q, wanted, grad_x, grad_scale, grad_offset = reference_learned_step(
        x, scale, upstream, UNSIGNED, offset, lsq_factor
    )
    tensors = [leaf(a, torch.float64) for a in (x, scale, offset) if a is not None]
    got, grads = run(
        lambda x, s, z=None: learned_step(x, s, bounds=UNSIGNED, offset=z, lsq_factor=lsq_factor),
        torch.float64,
        upstream,
        *tensors,
    )
    assert np.array_equal(np.rint(got / scale), q)
    np.testing.assert_allclose(got, wanted, rtol=1e-14)
    assert np.array_equal(grads[0], grad_x)
    np.testing.assert_allclose(grads[1], grad_scale, rtol=1e-12)
    if with_offset:
        np.testing.assert_allclose(grads[2], grad_offset, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("zp", [None, 4])
def test_learned_step_computes_half_precision_in_float32(dtype, zp):
    rng = np.random.default_rng(2)
    narrow_x = torch.tensor(rng.normal(0, 1, 500)).to(dtype)
    x, scale = narrow_x.double().numpy(), np.array(np.float32(0.0613), np.float64)
    offset = None if zp is None else np.array(np.float32(-zp * 0.0613), np.float64)
    upstream = torch.tensor(rng.normal(size=500)).to(dtype).double().numpy()
    quotient = x.astype(np.float32) / np.float32(scale)
    q, _, grad_x, grad_scale, grad_offset = reference_learned_step(
        x, scale, upstream, UNSIGNED, offset, quotient=quotient
    )
    leaves = [narrow_x.clone().requires_grad_(), leaf(scale, torch.float32)]
    if offset is not None:
        leaves.append(leaf(offset, torch.float32))
    out = learned_step(leaves[0], leaves[1], bounds=UNSIGNED, offset=leaves[2] if offset is not None else None)
    assert out.dtype == dtype
    assert torch.equal(out, torch.from_numpy(q.astype(np.float32) * np.float32(scale)).to(dtype))
    out.backward(torch.tensor(upstream, dtype=dtype))
    assert [t.grad.dtype for t in leaves] == [t.dtype for t in leaves]
    assert np.array_equal(leaves[0].grad.double().numpy(), grad_x)
    np.testing.assert_allclose(leaves[1].grad.item(), grad_scale, rtol=1e-4, atol=1e-5)
    if offset is not None:
        np.testing.assert_allclose(leaves[2].grad.item(), grad_offset, rtol=1e-4)


@pytest.mark.parametrize(
    ("offset", "wanted"),
    [(0.0, 0), (-0.25, 0), (-0.75, 2), (-0.5, 1), (-1.25, 2), (-7.4, 15), (-7.6, 15), (-1e9, 15), (0.6, 0), (1e9, 0)],
)
def test_the_zero_point_is_a_whole_number_within_the_codes(offset, wanted):
    got = zero_point(torch.tensor(offset), torch.tensor(0.5), 15)
    assert got.item() == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stored_codes_of_half_precision_are_those_of_training(dtype):
    weight, scale = torch.tensor(np.random.default_rng(3).normal(0, 0.1, 4000)).to(dtype), torch.tensor(0.00137)
    codes = weight_codes(weight, scale, 8)
    quotient = weight.float().numpy() / np.float32(0.00137)
    assert np.array_equal(codes.numpy(), np.clip(np.floor(quotient + np.float32(0.5)), -128, 127))
    assert torch.equal((codes.float() * scale).to(dtype), double_round(weight, scale, high=8, low=8))


def test_zero_padding_is_exact_with_any_offset():
    for offset in np.linspace(-3, 1, 41):
        out = learned_step(torch.zeros(3), torch.tensor(0.137), bounds=UNSIGNED, offset=torch.tensor(float(offset)))
        assert out.eq(0).all()


def both(values, **given):
    x = torch.tensor(values, requires_grad=True)
    s = torch.tensor(0.5, requires_grad=True)
    yield x, s, double_round(x, s, high=8, low=4)
    for options in ({"bounds": UNSIGNED}, {"bounds": SIGNED}, {"bounds": UNSIGNED, "offset": torch.tensor(-1.0)}):
        x, s = x.detach().clone().requires_grad_(), s.detach().clone().requires_grad_()
        yield x, s, learned_step(x, s, **options, **given)


def test_nan_reaches_the_output_and_nothing_else():
    for x, _, out in both([0.3, float("nan"), -1.0, 100.0]):
        assert out.isnan().tolist() == [False, True, False, False]
        out.nansum().backward()
        assert x.grad[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4, 2)])
def test_empty_tensors(shape):
    for x, s, out in both(np.zeros(shape, np.float32)):
        assert out.shape == shape
        out.sum().backward()
        assert x.grad.shape == shape
        assert s.grad.item() == 0.0


def test_negative_zero_is_zero():
    for _, _, out in both([-0.0, 0.0]):
        assert out.eq(0).all()


def test_inputs_are_not_modified():
    for x, s, out in both([-9.0, -0.3, 0.3, 9.0, 900.0]):
        out.sum().backward()
        assert x.tolist() == pytest.approx([-9.0, -0.3, 0.3, 9.0, 900.0])
        assert s.item() == 0.5


@pytest.mark.parametrize("wanted", ["value", "scale", "neither"])
def test_only_the_gradients_asked_for(wanted):
    for function in (
        lambda x, s: double_round(x, s, high=8, low=4),
        lambda x, s: learned_step(x, s, bounds=UNSIGNED, offset=torch.tensor(-1.0)),
    ):
        x = torch.randn(9).requires_grad_(wanted == "value")
        s = torch.tensor(0.1).requires_grad_(wanted == "scale")
        out = function(x, s)
        assert out.requires_grad == (wanted != "neither")
        if out.requires_grad:
            out.sum().backward()
        assert (x.grad is not None) == (wanted == "value")
        assert (s.grad is not None) == (wanted == "scale")
