import math

import numpy as np
import pytest
import torch
from torch import nn

import bitswitch as bs
from bitswitch.nn import ActivationQuantizer, WeightQuantizer

WIDTHS = (8, 4, 2)
NAN, INF = float("nan"), float("inf")
WRITTEN = [0.0, -0.0, -1.0, NAN, INF, -INF, 1e38, -1e38, 1e-45, 1e-30]
FORMS = ["raw", "log"]


def assert_good(scale):
    # The widest step is 64 times the shared scale: it must be a number too.
    for value in (scale * 64).reshape(-1).tolist():
        assert 0 < value < INF


@torch.no_grad()
def write(quantizer, value):
    for parameter in quantizer.parameters():
        parameter.fill_(value)


def data(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", WRITTEN)
@pytest.mark.parametrize("shape", [(), (6, 1)])
def test_a_weight_scale_survives_what_is_written(value, form, shape):
    quantizer = WeightQuantizer(WIDTHS, shape, form=form)
    write(quantizer, value)
    assert_good(quantizer.scale())
    weight = data(6, 5).requires_grad_()
    for width in WIDTHS:
        out = quantizer(weight, width)
        assert torch.isfinite(out).all()
        out.sum().backward()
        assert torch.isfinite(weight.grad).all()
        assert torch.isfinite(quantizer.scale_parameter.grad).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", WRITTEN)
@pytest.mark.parametrize("kind", ["unsigned", "signed", "zero_point"])
def test_an_activation_scale_survives_what_is_written(value, form, kind):
    quantizer = ActivationQuantizer(WIDTHS, kind, form=form)
    with torch.no_grad():
        for parameter in quantizer.scale_parameter.values():
            parameter.fill_(value)
    x = data(6, 5).requires_grad_()
    for width in WIDTHS:
        assert_good(quantizer.scale(width))
        out = quantizer(x, width)
        assert torch.isfinite(out).all()
        out.sum().backward()
        assert torch.isfinite(x.grad).all()
        assert torch.isfinite(quantizer.scale_parameter[str(width)].grad).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", WRITTEN)
def test_an_offset_survives_what_is_written(value, form):
    quantizer = ActivationQuantizer(WIDTHS, "zero_point", form=form)
    with torch.no_grad():
        for parameter in quantizer.offset.values():
            parameter.fill_(value)
    for width in WIDTHS:
        out = quantizer(data(6, 5), width)
        assert torch.isfinite(out).all()
        assert quantizer(torch.zeros(3), width).eq(0).all()


def network(form):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)
    )
    return bs.quantize(model, example_inputs=data(4, 3, 9, 9), bits=WIDTHS, scale_form=form)


def quantizers(model):
    return [m for m in model.modules() if isinstance(m, (ActivationQuantizer, WeightQuantizer))]


def assert_sound(model, x):
    for quantizer in quantizers(model):
        scales = [quantizer.scale()] if isinstance(quantizer, WeightQuantizer) else map(quantizer.scale, WIDTHS)
        for scale in scales:
            assert_good(scale)
    for width in WIDTHS:
        with bs.switched(model, width):
            assert torch.isfinite(model(x)).all(), width


@pytest.mark.parametrize("form", FORMS)
def test_a_network_survives_what_is_written(form):
    model = network(form)
    for value in WRITTEN:
        for quantizer in quantizers(model):
            with torch.no_grad():
                for name, parameter in quantizer.named_parameters():
                    if not name.startswith("offset"):
                        parameter.fill_(value)
        assert_sound(model, data(4, 3, 9, 9))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e6, momentum=0.9),
    "sgd up": lambda p: torch.optim.SGD(p, lr=1e6, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=10.0, weight_decay=1.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e20),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_breaks_a_scale(name, form):
    model, x = network(form), data(4, 3, 9, 9)
    scales = [p for q in quantizers(model) for n, p in q.named_parameters() if not n.startswith("offset")]
    before = [p.detach().clone() for p in scales]
    optimizer = OPTIMIZERS[name](scales)
    for _ in range(2):
        for width in WIDTHS:
            optimizer.zero_grad()
            with bs.switched(model, width):
                model(x).sum().backward()
            optimizer.step()
    assert any(not torch.equal(p, b) for p, b in zip(scales, before, strict=True))
    assert_sound(model, x)


@pytest.mark.parametrize("form", FORMS)
def test_our_own_optimizer_does_not_either(form):
    model, x = network(form), data(4, 3, 9, 9)
    optimizer = bs.MultiPrecisionOptimizer(model, lr=1e-3, scale_lr=1e4)
    for width in WIDTHS * 2:
        with bs.switched(model, width):
            model(x).sum().backward()
        optimizer.step(width)
    assert_sound(model, x)


def test_a_scale_thrown_below_zero_can_come_back():
    quantizer = ActivationQuantizer((4,), "signed", form="raw")
    x = data(100)
    parameter = quantizer.scale_parameter["4"]
    with torch.no_grad():
        parameter.fill_(-0.1)
    optimizer = torch.optim.Adam([parameter], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        (quantizer(x, 4) - x).square().sum().backward()
        assert math.isfinite(parameter.grad.item())
        optimizer.step()
    assert 0.1 < parameter.item() < 1


def test_a_scale_is_the_exponential_rounded_once():
    # Every library has an exp of its own in float32; of float64's, rounded, the bits are the same everywhere.
    logs = torch.linspace(-20, 20, 2001)
    quantizer = WeightQuantizer(WIDTHS, (len(logs),), form="log")
    with torch.no_grad():
        quantizer.scale_parameter.copy_(logs)
    expected = np.exp(logs.numpy().astype(np.float64)).astype(np.float32)
    assert np.array_equal(quantizer.scale().detach().numpy(), expected)
    assert not np.array_equal(logs.exp().numpy(), expected)
