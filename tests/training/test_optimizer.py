import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bitswitch as bs
from bitswitch.errors import UserError
from bitswitch.training import paper_eta


def backward(model, images, width):
    with bs.switched(model, width):
        F.cross_entropy(model(images), torch.arange(len(images)) % 5).backward()


def groups(model):
    scales = {n for n, _ in model.named_parameters() if "quantizer" in n}
    return scales, {n for n, _ in model.named_parameters()} - scales


def test_one_step_is_adams(quantized, images):
    """Against torch's plain Adam with rates worked out here."""
    twin = copy.deepcopy(quantized)
    optimizer = bs.MultiPrecisionOptimizer(quantized, lr=1e-3, scale_lr=3e-3, eta="paper", weight_decay=1e-2)
    optimizer.factor = 0.5
    backward(quantized, images, 4)
    backward(twin, images, 4)
    named = dict(twin.named_parameters())
    scale_names, weight_names = groups(twin)
    offsets = {n for n in scale_names if ".offset." in n}
    active = [named[n].grad for n in scale_names - offsets if named[n].grad is not None]
    mean = torch.stack([g.abs().max() for g in active]).clamp(max=1).mean().item()
    rate = paper_eta(8, 4) * 3e-3 * 0.5 * (1 - mean)
    for n in scale_names:
        if named[n].grad is not None:
            named[n].grad.clamp_(-1, 1)
    plain = torch.optim.Adam(
        [
            {"params": [named[n] for n in weight_names], "lr": 5e-4, "weight_decay": 1e-2},
            {"params": [named[n] for n in scale_names - offsets], "lr": rate},
            {"params": [named[n] for n in offsets], "lr": rate / 3},
        ]
    )
    plain.step()
    optimizer.step(4)
    for n, p in quantized.named_parameters():
        assert torch.allclose(p, named[n], rtol=1e-5, atol=1e-8), n
        assert p.grad is None


def test_inactive_widths_are_left_exactly_as_they_were(quantized, images):
    optimizer = bs.MultiPrecisionOptimizer(quantized, lr=1e-2)
    for width in optimizer.widths:  # gives every width momentum
        backward(quantized, images, width)
        optimizer.step(width)
    others = {
        n: t.clone()
        for n, t in quantized.state_dict().items()
        if any(
            f".{w}" in f".{n}." and ("scale_parameter." in n or "offset." in n or "variants." in n) for w in (8, 6, 2)
        )
    }
    assert len(others) > 20
    backward(quantized, images, 4)
    optimizer.step(4)
    after = quantized.state_dict()
    assert all(torch.equal(after[n], t) for n, t in others.items() if ".4" not in n)
    assert any(not torch.equal(after[n], t) for n, t in others.items() if ".4" in n) or ".4" not in "".join(others)


def test_accumulate_moves_all_widths(quantized, images):
    before = {n: p.detach().clone() for n, p in quantized.named_parameters()}
    optimizer = bs.MultiPrecisionOptimizer(quantized)
    for width in optimizer.widths:
        backward(quantized, images, width)
    optimizer.step()
    moved = {n for n, p in quantized.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in before if "scale_parameter." in n} <= moved


def test_scales_have_no_weight_decay(quantized):
    before = {n: p.detach().clone() for n, p in quantized.named_parameters()}
    optimizer = bs.MultiPrecisionOptimizer(quantized, lr=1e-2, weight_decay=10.0)
    for p in quantized.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    scales, weights = groups(quantized)
    now = dict(quantized.named_parameters())
    assert all(torch.equal(now[n], before[n]) for n in scales)
    assert any(not torch.equal(now[n], before[n]) for n in weights)


def test_state_goes_on_where_it_was(quantized, images):
    optimizer = bs.MultiPrecisionOptimizer(quantized)
    optimizer.factor = 0.5
    backward(quantized, images, 8)
    optimizer.step(8)
    twin = copy.deepcopy(quantized)
    other = bs.MultiPrecisionOptimizer(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, opt in ((quantized, optimizer), (twin, other)):
        backward(model, images, 8)
        opt.step(8)
    for (n, p), (_, q) in zip(quantized.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(p, q), n


def test_frozen_parameters_stay(quantized, images):
    quantized.conv1.requires_grad_(False)
    before = quantized.conv1.weight.clone()
    optimizer = bs.MultiPrecisionOptimizer(quantized, lr=1e-1)
    backward(quantized, images, 8)
    optimizer.step(8)
    assert torch.equal(quantized.conv1.weight, before)


@pytest.mark.parametrize("eta", ["pape", {8: 1.0}, None])
def test_bad_eta(quantized, eta):
    with pytest.raises(UserError, match="eta"):
        bs.MultiPrecisionOptimizer(quantized, eta=eta)


def test_bad_width_and_model(quantized, network):
    with pytest.raises(UserError, match="width 5"):
        bs.MultiPrecisionOptimizer(quantized).step(5)
    with pytest.raises(UserError, match="no quantized layer"):
        bs.MultiPrecisionOptimizer(network)


def test_gradients_of_another_width_are_refused_and_nothing_moves(quantized, images):
    optimizer = bs.MultiPrecisionOptimizer(quantized)
    before = {name: p.detach().clone() for name, p in quantized.named_parameters()}
    backward(quantized, images, 8)
    with pytest.raises(UserError, match=r"step\(4\) found gradients of 8 bits"):
        optimizer.step(4)
    backward(quantized, images, 4)
    backward(quantized, images, 2)
    with pytest.raises(UserError, match=r"step\(4\) found gradients of 8 and 2 bits.*step\(\).*mixed=True"):
        optimizer.step(4)
    assert all(torch.equal(p, before[name]) for name, p in quantized.named_parameters())
    optimizer.step()
    assert not any(torch.equal(p, before[n]) for n, p in quantized.named_parameters() if "scale_parameter.8" in n)


def test_accumulated_scales_of_a_width_have_its_own_rate(network, images):
    """Weight scales that every width has for itself, too."""
    model = bs.quantize(network, bits=(8, 2), example_inputs=images, method="per_width")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "quantizer" in name}
    for width in (8, 2):
        backward(model, images, width)
    bs.MultiPrecisionOptimizer(model, lr=1e-2, eta={8: 1.0, 2: 0.0}).step()
    for name, parameter in model.named_parameters():
        if name in before:
            # With its eta at 0 a width's scales stand still; the others' first step is Adam's, nearly the rate.
            moved = not torch.equal(parameter, before[name])
            assert moved == name.endswith(".8"), name


def test_a_state_of_other_parameters_is_refused(quantized):
    def frozen(names):
        model = copy.deepcopy(quantized)
        for name, parameter in model.named_parameters():
            if any(name.startswith(one) for one in names):
                parameter.requires_grad_(False)
        return model

    everything = [name for name, _ in quantized.named_parameters() if "quantizer" not in name]
    for before, after in (([], everything), (everything, []), ([], ["conv1"])):
        state = bs.MultiPrecisionOptimizer(frozen(before)).state_dict()
        optimizer = bs.MultiPrecisionOptimizer(frozen(after))
        with pytest.raises(UserError, match="of other parameters"):
            optimizer.load_state_dict(state)


def test_a_state_of_as_many_other_parameters_is_refused():
    """Of other shapes, fused Adam would read what is not there; of the same, it would move the wrong weights."""
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)]
    quantized = bs.quantize(nn.Sequential(*layers), bits=(8, 4), example_inputs=x)
    models = [copy.deepcopy(quantized) for _ in range(2)]
    models[0][2].weight.requires_grad_(False)
    models[1][4].weight.requires_grad_(False)
    state, other = bs.MultiPrecisionOptimizer(models[0]).state_dict(), bs.MultiPrecisionOptimizer(models[1])
    with pytest.raises(UserError, match="of other parameters"):
        other.load_state_dict(state)
    # What an earlier version wrote, and what a wrapper renamed, still goes on.
    bs.MultiPrecisionOptimizer(models[0]).load_state_dict({key: state[key] for key in ("weights", "scales", "factor")})
    bs.MultiPrecisionOptimizer(torch.compile(models[0])).load_state_dict(state)


def test_an_offset_moves_at_the_rate_of_its_scale_however_steps_are_taken(images):
    """Its own gradients, in units of the data, are beyond the 1 at which ALRS stands still."""
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    quantized = bs.quantize(
        nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)),
        bits=(8, 2),
        example_inputs=x,
    )
    rates = []
    for how in ({"width": 2}, {"width": 2, "mixed": True}, {}):
        model = copy.deepcopy(quantized)
        optimizer = bs.MultiPrecisionOptimizer(model)
        with bs.switched(model, 2):
            model(x).square().mean().backward()
        (offset,) = (p for name, p in model.named_parameters() if name.endswith("offset.2"))
        offset.grad = torch.full_like(offset, 3.0)
        optimizer.step(**how)
        rates.append({g["name"]: float(g["lr"]) for g in optimizer._scales.param_groups})
    for rate in rates:
        assert rate["offset 2"] == pytest.approx(rate["inputs 2"]) and rate["offset 2"] > 4e-4


def test_complex_parameters_are_trained_too():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mid, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.phase = nn.Parameter(torch.ones(8, dtype=torch.complex64))

        def forward(self, x):
            return self.last((self.mid(self.first(x).relu()) * self.phase).abs())

    model = bs.quantize(Complex(), bits=(8, 4), example_inputs=torch.randn(16, 8))
    before, optimizer = model.phase.detach().clone(), bs.MultiPrecisionOptimizer(model)
    with bs.switched(model, 8):
        model(torch.randn(16, 8)).square().mean().backward()
    optimizer.step(8)
    assert not torch.equal(model.phase, before)


def test_rates_and_weight_decay_stay_its_own(quantized):
    state = bs.MultiPrecisionOptimizer(quantized, lr=1e-2, weight_decay=0.1).state_dict()
    optimizer = bs.MultiPrecisionOptimizer(quantized, lr=1e-3, weight_decay=0.0)
    optimizer.load_state_dict(state)
    assert [group["weight_decay"] for group in optimizer._weights.param_groups] == [0.0]
    assert optimizer.lr == 1e-3


def test_layers_of_other_widths_are_refused():
    halves = torch.nn.Sequential(
        bs.quantize(
            torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))),
            bits=(8, 4),
            example_inputs=torch.randn(3, 4),
        ),
        bs.quantize(
            torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))),
            bits=(6, 2),
            example_inputs=torch.randn(3, 4),
        ),
    )
    with pytest.raises(UserError, match=r"other widths than others \(0\.1 \[8, 4\], 1\.1 \[6, 2\]\)"):
        bs.MultiPrecisionOptimizer(halves)


@pytest.mark.parametrize("clip", [0.01, 0.5, 2.0])
def test_alrs_reads_clipped_gradients(quantized, clip):
    """The paper's section 3: g_b is the mean of clipped gradients."""
    optimizer = bs.MultiPrecisionOptimizer(quantized, scale_lr=1e-3, clip=clip)
    for name, parameter in quantized.named_parameters():
        if "quantizer" in name and (".4" in name or "weight_quantizer" in name):
            parameter.grad = torch.full_like(parameter, -0.9)
    optimizer.step(4)
    rates = {group["name"]: float(group["lr"]) for group in optimizer._scales.param_groups}
    assert rates["weights"] == pytest.approx(1e-3 * (1 - min(0.9, clip)))


def trained(steps, memory_format=None, at=2):
    """A network after some steps, which comes to another memory format on the way."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    images = torch.randn(8, 3, 8, 8)
    model = bs.quantize(net, bits=(8, 2), example_inputs=images).double()
    optimizer = bs.MultiPrecisionOptimizer(model, lr=1e-2)
    for step in range(steps):
        if memory_format is not None and step == at:
            model.to(memory_format=memory_format)
        backward(model, images.double(), 8)
        optimizer.step(8)
    return model, optimizer, images.double()


def test_a_network_may_come_to_another_memory_format():
    plain, _, _ = trained(4)
    moved, _, _ = trained(4, torch.channels_last)
    for (name, a), b in zip(plain.named_parameters(), moved.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), name


def test_a_state_goes_on_in_another_memory_format():
    plain, _, _ = trained(3)
    half, before, images = trained(2)
    model = copy.deepcopy(half).to(memory_format=torch.channels_last)
    optimizer = bs.MultiPrecisionOptimizer(model, lr=1e-2)
    optimizer.load_state_dict(before.state_dict())
    backward(model, images, 8)
    optimizer.step(8)
    for (name, a), b in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert torch.allclose(a, b[1], rtol=1e-9, atol=1e-12), name


def test_two_optimizers_of_one_state_share_nothing():
    plain, _, images = trained(3)
    model, first, _ = trained(2)
    branch = copy.deepcopy(model)
    second = bs.MultiPrecisionOptimizer(branch, lr=1e-2)
    second.load_state_dict(first.state_dict())
    for one, optimizer in ((model, first), (branch, second)):
        backward(one, images, 8)
        optimizer.step(8)
        for a, b in zip(plain.parameters(), one.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_state_whose_moments_have_other_shapes_is_refused():
    """The names are the same; fused Adam would read and write past the end of moments that are too small."""
    torch.manual_seed(0)
    x, layers = torch.randn(16, 8), [nn.Linear(8, 8) for _ in range(4)]
    one, other = (bs.quantize(nn.Sequential(*layers), per_channel=way, example_inputs=x) for way in (False, True))
    optimizer = bs.MultiPrecisionOptimizer(one)
    one(x).sum().backward()
    optimizer.step(8)
    state, fresh = optimizer.state_dict(), bs.MultiPrecisionOptimizer(other)
    with pytest.raises(UserError, match="of other parameters: quantize with the same options"):
        fresh.load_state_dict(state)
    assert not fresh.state_dict()["scales"]["state"]
    bs.MultiPrecisionOptimizer(bs.quantize(nn.Sequential(*layers), example_inputs=x)).load_state_dict(state)


@pytest.mark.parametrize("width", [np.int64(4), torch.tensor(4)])
def test_a_width_may_be_a_number_of_numpy_or_torch(quantized, images, width):
    optimizer = bs.MultiPrecisionOptimizer(quantized)
    with bs.switched(quantized, 4):
        quantized(images).sum().backward()
    optimizer.step(width)
    with bs.switched(quantized, 2):
        quantized(images).sum().backward()
    with pytest.raises(UserError, match=r"step\(4\) found gradients of 2 bits"):
        optimizer.step(width)


def test_a_model_whose_scales_are_frozen_is_refused(quantized):
    with pytest.raises(UserError, match=r"no scale to train: all are frozen \(requires_grad is False\)"):
        bs.MultiPrecisionOptimizer(quantized.requires_grad_(False))


def test_an_infinite_weight_decay_is_refused(quantized):
    with pytest.raises(UserError, match="all but clip are finite"):
        bs.MultiPrecisionOptimizer(quantized, weight_decay=float("inf"))
