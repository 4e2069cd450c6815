"""What people give by mistake is told in a line that says what to give instead."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bitswitch as bs
from bitswitch.data import Preprocessing, load_data
from bitswitch.errors import UserError
from bitswitch.nn import quantized_layers
from bitswitch.search import Trace
from bitswitch.training import Distillation, evaluate


def table(model, number):
    return {name: dict.fromkeys(layer.widths, number) for name, layer in quantized_layers(model).items()}


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m, f: bs.quantize(type(f), example_inputs=torch.ones(1)), "model is the class Small"),
        (lambda m, f: bs.quantize("net.pt", example_inputs=torch.ones(1)), "model is a str"),
        (lambda m, f: bs.quantize(f, example_inputs=torch.ones(1), keep=(f.fc,)), "keep holds a Linear: name layers"),
        (lambda m, f: bs.MultiPrecisionOptimizer(m.parameters()), "model is a generator"),
        (lambda m, f: bs.MultiPrecisionOptimizer(m, lr="1e-3"), "lr='1e-3': give a number"),
        (lambda m, f: bs.MultiPrecisionOptimizer(m, lr=None), "lr=None: give a number"),
        (lambda m, f: bs.save(m.state_dict(), "x.safetensors"), "model is a OrderedDict"),
        (lambda m, f: bs.switch(m, "avg<=4"), "'avg<=4' is text: give a width as a number"),
        (lambda m, f: bs.switch(m, bs.search(m, TRACES)[0]), "a Choice holds more than widths: give its .assignment"),
        (lambda m, f: bs.switch(m, {m.conv2: 4}), "is no layer's name"),
        (lambda m, f: bs.search(m, TRACES, budgets=[{"bitops": 4}]), "the cost 'bitops' needs example_inputs="),
        (lambda m, f: bs.search(m, TRACES, budgets=[{"latency": 4}]), "the cost 'latency' needs latency="),
        (lambda m, f: bs.search(m, TRACES, budgets=[{3: 4}]), "no cost is named 3"),
        (lambda m, f: bs.search(m, TRACES, budgets=[10**400]), "is neither a number nor {cost: number}"),
        (lambda m, f: bs.search(m, TRACES, budgets=[]), "budgets=[] names none"),
        (lambda m, f: bs.search(m, TRACES, damage=5), "table 'damage' is a int: give {layer: {width: number}}"),
        (lambda m, f: bs.search(m, TRACES, damage={"conv2": 5}), "table 'damage' gives layer 'conv2' a int"),
        (lambda m, f: bs.search(m, TRACES, damage=table(m, "a")), "table 'damage' holds a for layer"),
        (lambda m, f: bs.search(m, TRACES, latency=5), "table 'latency' is a int"),
        (lambda m, f: bs.search(m, TRACES, latency=table(m, True)), "table 'latency' holds True for layer"),
        (lambda m, f: bs.search(m, TRACES, tied=5), "tied=5: give groups of layers"),
        (lambda m, f: bs.search(m, TRACES, tied=[5]), "tied=[5]: give groups of layers"),
        (lambda m, f: bs.search(m, TRACES, tied=[[["conv2"]]]), "tied layers: no layer is named ['conv2']"),
        (lambda m, f: bs.hessian_trace(f, None, [], layers="conv2"), "layers='conv2': give a list, such as ['conv2']"),
        (
            lambda m, f: bs.hessian_trace(f, None, [], probes=float("inf")),
            "probes=inf: give a whole number of 2 or more",
        ),
        (lambda m, f: bs.hessian_trace(f, None, [], probes=1), "probes=1: give a whole number of 2 or more"),
        (lambda m, f: bs.hessian_trace(f, None, [], probes=2.0), "probes=2.0: give a whole number"),
        (lambda m, f: bs.hessian_trace(f, None, [], target="a"), "target='a': give a number"),
        (lambda m, f: bs.hessian_trace(f, None, [], seed=-1), "seed=-1: give a whole number"),
        (lambda m, f: bs.hessian_trace(f, None, [], rank="a"), "rank='a': give a whole number"),
        (lambda m, f: bs.switch(m, np.array([8])), "has no width array([8])"),
        (lambda m, f: bs.MultiPrecisionOptimizer(m, lr=float("inf")), "all but clip are finite"),
        (lambda m, f: bs.MultiPrecisionOptimizer(m, alrs="off", eta="paper"), "eta='paper' is a factor of ALRS"),
        (lambda m, f: bs.MultiPrecisionOptimizer(m, eta={8: "x", 6: 1, 4: 1, 2: 1}), "eta[8]='x': give a number"),
        (lambda m, f: Distillation(temperature=float("inf")), "a temperature is above 0 and finite"),
        (lambda m, f: Distillation(temperature="3"), "temperature='3': give a number"),
        (lambda m, f: load_data("digits", download=True), "leave out data.download"),
        (lambda m, f: load_data("digits").training_batch(0), "batch_size=0, world=1: give whole numbers above 0"),
        (
            lambda m, f: load_data("digits", val_fraction=0.9999).sample(1),
            "no training images left beside those of val",
        ),
        (lambda m, f: evaluate(f, [], [None], predictions=[]), "there are no images to evaluate"),
        (lambda m, f: Preprocessing.from_json({"shape": [3, 8, 8]}), "lacks mean and std"),
    ],
)
def test_it_is_told(quantized, network, call, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        call(quantized, network)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


TRACES = {name: Trace(1.0, 0.1) for name in ("conv2", "conv3", "conv4")}


def test_a_state_of_torchs_own_adam(quantized):
    optimizer = bs.MultiPrecisionOptimizer(quantized)
    with pytest.raises(UserError, match="lacks 'weights': it is of another kind of optimizer"):
        optimizer.load_state_dict(torch.optim.Adam(quantized.parameters()).state_dict())


def test_preprocessing_needs_no_resize_and_no_crop():
    value = {"shape": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3}
    assert Preprocessing.from_json(value).to_json() == value | {"resize": None, "crop": None}


class Several(nn.Module):
    """Gives more than logits, or takes more than images."""

    def __init__(self, gives):
        super().__init__()
        self.head, self.gives = nn.Linear(4, 3), gives

    def forward(self, x):
        return self.gives(self.head(x))


class Two(nn.Module):
    def forward(self, a, b):
        return a + b


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (Several(lambda logits: {"logits": logits}), "the network gives a dict"),
        (Several(lambda logits: (logits, logits)), "the network gives a tuple"),
        (Several(lambda logits: logits[:, 0]), r"the network gives a tensor \[2\] for 2 images"),
        (Several(lambda logits: logits[:1]), r"the network gives a tensor \[1, 3\] for 2 images"),
        (Several(lambda logits: logits[:, :, None]), r"the network gives a tensor \[2, 3, 1\] for 2 images"),
        (Two(), "cannot be called with images alone"),
    ],
)
def test_what_gives_no_logits_is_not_scored(network, told):
    with pytest.raises(UserError, match=told):
        evaluate(network, [(torch.randn(2, 4), torch.tensor([0, 1]))], [None])


def test_a_mistake_of_the_network_s_own_is_shown_whole():
    with pytest.raises(TypeError, match="unsupported operand"):
        evaluate(Several(lambda logits: logits + "1"), [(torch.randn(2, 4), torch.tensor([0, 1]))], [None])


def test_traces_of_a_network_with_hard_sigmoids():
    """Their second derivative is none of torch's; relu6(x + 3) / 6 is the same."""
    torch.manual_seed(0)

    def made(activation):
        torch.manual_seed(1)
        layers = (nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
        return nn.Sequential(*layers).eval()

    class Same(nn.Module):
        def forward(self, x):
            return F.relu6(x + 3) / 6

    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 3)]
    found, wanted = (
        bs.hessian_trace(made(activation), lambda n, b: F.cross_entropy(n(b[0]), b[1]), batches, probes=8)
        for activation in (nn.Hardsigmoid(), Same())
    )
    assert found == wanted and all(trace.mean != 0 for trace in found.values())
