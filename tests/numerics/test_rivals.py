"""Figure 2 of arXiv 2502.01199: the staircases of the rivals at 2, 3 and 4 bits, by hand from their definitions."""

import pytest
import torch

import bitswitch as bs
from bitswitch.errors import UserError
from bitswitch.nn import WeightQuantizer
from bitswitch.nn.quantizers import weight_quantizer
from bitswitch.numerics import double_round

# Codes for values v = -8.6 ... at scale 1 and 4 highest bits. Worked out by hand from:
#   double rounding: q4 = clip(floor(v + .5), -8, 7); q_l = clip(floor(q4 / 2^D + .5))
#   AdaBits:         q4 the same;                      q_l = floor(q4 / 2^D)
#   centred:         as AdaBits at the highest width; below, half a step above it (a test of its own)
#   Bit-Mixer:       q4 = clip(floor(v + .5), -7, 7);  q_l = max(floor(q4 / 2^D), -(2^(l-1) - 1))
VALUES = [-9.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
STAIRS = {
    ("double_rounding", 4): [-8, -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 7],
    ("double_rounding", 3): [-4, -4, -3, -3, -2, -2, -1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3],
    ("double_rounding", 2): [-2, -2, -2, -1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
    ("adabits", 4): [-8, -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 7],
    ("adabits", 3): [-4, -4, -4, -3, -3, -2, -2, -1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 3],
    ("adabits", 2): [-2, -2, -2, -2, -2, -1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 1],
    ("centred", 4): [-8, -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 7],
    ("bit_mixer", 4): [-7, -7, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 7],
    ("bit_mixer", 3): [-3, -3, -3, -3, -3, -2, -2, -1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 3],
    ("bit_mixer", 2): [-1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 1],
}
# A float master and a scale for every width: LSQ rounds half to even, the paper's variant half up.
OWN_SCALE = {
    ("lsq", 3): ([-4.5, -3.5, -2.5, -0.5, 0.5, 1.5, 2.5, 3.5], [-4, -4, -2, 0, 0, 2, 2, 3]),
    ("lsq", 2): ([-2.5, -1.5, -0.5, 0.5, 1.5], [-2, -2, 0, 0, 1]),
    ("per_width", 3): ([-4.5, -3.5, -2.5, -0.5, 0.5, 1.5, 2.5, 3.5], [-4, -3, -2, 0, 1, 2, 3, 3]),
    ("per_width", 2): ([-2.5, -1.5, -0.5, 0.5, 1.5], [-2, -1, 0, 1, 1]),
}


def quantizer(method):
    made = weight_quantizer(method, (4, 3, 2), (), form="raw", lsq_factor=True)
    for parameter in made.parameters():
        parameter.data.fill_(0.5)
    return made


@pytest.mark.parametrize(("method", "bits"), STAIRS)
def test_staircases(method, bits):
    weights = 0.5 * torch.tensor(VALUES)
    expected = 0.5 * 2 ** (4 - bits) * torch.tensor(STAIRS[method, bits], dtype=torch.float32)
    assert quantizer(method)(weights, bits).tolist() == expected.tolist()


@pytest.mark.parametrize("bits", [3, 2])
def test_centred_levels_lie_half_a_step_above_floor(bits):
    weights, step = 0.5 * torch.tensor(VALUES), 0.5 * 2 ** (4 - bits)
    levels = quantizer("centred")(weights, bits)
    assert (levels / step - 0.5).tolist() == STAIRS["adabits", bits]
    assert (2 * levels / step).unique().tolist() == list(range(1 - 2**bits, 2**bits, 2))


@pytest.mark.parametrize(("method", "bits"), OWN_SCALE)
def test_staircases_with_a_scale_for_each_width(method, bits):
    values, codes = OWN_SCALE[method, bits]
    assert quantizer(method)(0.5 * torch.tensor(values), bits).tolist() == [0.5 * code for code in codes]


@pytest.mark.parametrize("narrowing", ["floor", "floor_symmetric", "centred"])
def test_rivals_gradients(narrowing):
    """Straight through within the range that the rival has; the scale's by element, with the factor 2^D."""
    weight = torch.tensor([-9.0, -5.0, -3.0, 1.0, 3.9, 4.1, 9.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    double_round(weight, scale, high=4, low=2, narrowing=narrowing, lsq_factor=False).sum().backward()
    middle = 0.5 if narrowing == "centred" else 0
    v = weight.detach() / 4 - middle
    least = -1 if narrowing == "floor_symmetric" else -2
    inside = (v >= least) & (v <= 1)
    codes = ((weight.detach() + 0.5).floor().clamp(-7 if least == -1 else -8, 7) / 4).floor().clamp(least, 1)
    per_element = torch.where(inside, codes - v, v.clamp(least, 1) + middle)
    assert torch.equal(weight.grad, inside.double())
    assert torch.allclose(scale.grad, 4 * per_element.sum())


@pytest.mark.parametrize("method", ["per_width", "lsq", "adabits", "bit_mixer", "centred"])
def test_rivals_train_and_cannot_be_saved(tmp_path, network, images, method):
    model = bs.quantize(network, example_inputs=images, method=method)
    optimizer = bs.MultiPrecisionOptimizer(model, lr=1e-2)
    first, last = {}, {}
    for _ in range(10):
        for width in optimizer.widths:
            with bs.switched(model, width):
                loss = torch.nn.functional.cross_entropy(model(images), torch.arange(16) % 5)
            loss.backward()
            optimizer.step(width)
            first.setdefault(width, loss.item())
            last[width] = loss.item()
    assert all(last[width] < first[width] for width in last)
    with pytest.raises(UserError, match="cannot be saved"):
        bs.save(model, tmp_path / "a")
    with pytest.raises(UserError, match="for comparison"):
        model.conv2.weight_quantizer.codes(model.conv2.weight)
    assert not list(tmp_path.iterdir())


def test_the_scale_of_each_rival_starts_for_its_own_rule():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    scales = {}
    for method in ("double_rounding", "adabits", "bit_mixer", "centred"):
        made = weight_quantizer(method, (4, 2), (), form="raw", lsq_factor=True)
        assert isinstance(made, WeightQuantizer)
        made.start(weight)
        scales[method] = made.scale().item()
        errors = {s: sum((made(weight, w) - weight).square().sum().item() for w in (4, 2)) for s in [1]}
        assert errors[1] < 2 * weight.square().sum().item()
    assert len(set(scales.values())) > 1 and scales["centred"] != scales["adabits"]
