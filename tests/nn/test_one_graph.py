"""One function of tensors for all widths: the same numbers as the model's own forward, compiled once."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import bitswitch as bs
from bitswitch.nn import evaluating, make_transitional, quantized_layers
from bitswitch.nn.one_graph import OneGraph

WIDTHS = (8, 6, 4, 2)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler")
MIXTURES = [8, 2, {"1": 8, "3.0": 2}, {"1": 2, "3.0": 6}]


class Residual(nn.Module):
    """Normalizations, an addition, and an input below 0."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        setattr(self, "1", nn.Conv2d(8, 8, 3, padding=1, bias=False))
        self.norm1 = nn.BatchNorm2d(8)
        setattr(self, "2", nn.Conv2d(8, 8, 3, groups=2))
        setattr(self, "3", nn.Sequential(nn.Linear(8, 6), nn.ReLU()))
        self.last = nn.Linear(6, 4)

    def forward(self, x):
        y = F.relu(self.norm(self.first(x)))
        y = y + self.norm1(getattr(self, "1")(y))
        y = getattr(self, "2")(y)
        return self.last(getattr(self, "3")(y.mean((2, 3))))


def quantized(**options):
    torch.manual_seed(0)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    return bs.quantize(Residual().double(), bits=WIDTHS, example_inputs=x, **options), x


def outcome(model, forward, x, wanted):
    """Logits, gradients and statistics of a training step, the model as it was afterwards."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with bs.switched(model, wanted):
        logits = forward(x)
        logits.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    moved = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])
    }
    model.zero_grad()
    model.load_state_dict(state)
    return logits.detach(), gradients, moved


def check_same(model, forward, x, wanted, **tolerance):
    logits, gradients, moved = outcome(model, model, x, wanted)
    got, got_gradients, got_moved = outcome(model, forward, x, wanted)
    torch.testing.assert_close(got, logits, **tolerance)
    assert got_gradients.keys() == gradients.keys()
    assert got_moved.keys() == moved.keys()
    for found, true in ((got_gradients, gradients), (got_moved, moved)):
        for name in true:
            torch.testing.assert_close(
                found[name], true[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )
    return logits


@pytest.mark.parametrize("wanted", MIXTURES, ids=str)
@pytest.mark.parametrize("transitional", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"per_channel": True, "scale_form": "raw"}, {"method": "per_width"}, {"method": "lsq"},
                {"method": "adabits"}, {"method": "bit_mixer"}, {"method": "centred"}], ids=str
)  # fmt: skip
def test_the_twin_is_the_model(options, transitional, wanted):
    model, x = quantized(**options)
    if transitional:
        make_transitional(model)
    # Not to the last bit: the LSQ factor is a tensor's power here, a number's there.
    check_same(model, OneGraph(model, compiled=False), x, wanted, rtol=1e-12, atol=1e-12)


def test_it_follows_the_model_wherever_that_goes():
    model, x = quantized()
    forward = OneGraph(model, compiled=False)
    before = forward(x)
    model.eval()
    assert torch.equal(forward(x), model(x))
    assert not torch.equal(forward(x), before)
    other, _ = quantized()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(forward(x), model(x))
    model.float()
    assert torch.equal(forward(x.float()), model(x.float()))


def test_what_is_held_in_eval_mode_stays_there():
    model, x = quantized()
    model.train()
    forward = OneGraph(model, compiled=False)
    model.norm1.eval()
    for _ in range(2):
        check_same(model, forward, x, 4, rtol=1e-12, atol=1e-12)
        with evaluating(model):
            forward(x)
    assert model.training and not model.norm1.training


def test_the_twin_has_no_memory_of_its_own():
    model, _ = quantized()
    assert {tensor.device.type for tensor in OneGraph(model, compiled=False).twin.state_dict().values()} == {"meta"}


@needs_compiler
def test_one_compiled_graph_serves_all_widths_and_mixtures():
    model, x = quantized()
    make_transitional(model)
    torch._dynamo.reset()
    counters.clear()
    forward = OneGraph(model)
    layers = list(quantized_layers(model))
    mixtures = [*MIXTURES, *({name: 2 + 2 * (i % 4) for i, name in enumerate(layers, shift)} for shift in range(4))]
    logits = [check_same(model, forward, x, wanted, rtol=1e-9, atol=1e-9) for wanted in mixtures]
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert len({tuple(row.flatten().tolist()) for row in logits}) > 4


class Remembers(Residual):
    """A buffer that a forward replaces instead of writing into it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * x.detach().abs().mean()
        return super().forward(x) * (1 + self.seen)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_a_buffer_that_a_forward_replaces_is_the_models(compiled):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    model = bs.quantize(Remembers(), bits=WIDTHS, example_inputs=x).train()
    twin = copy.deepcopy(model)
    graph = OneGraph(twin, compiled=compiled)
    for width in (8, 2, 4):
        bs.switch(model, width)
        bs.switch(twin, width)
        torch.testing.assert_close(graph(x), model(x))
        torch.testing.assert_close(twin.seen, model.seen)
    assert model.seen > 0
