"""Networks at the edges of what is exported: filters all but gone, closed channels, heads without a norm or a bias."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import bitswitch as bs
from bitswitch.errors import UserError
from bitswitch.export.onnx import export_file
from bitswitch.runtime import Session
from bitswitch.runtime.source import read
from bitswitch.runtime.whole_bias import whole_bias

BITS = (8, 6, 4, 2)


class Chain(nn.Module):
    """Three convolutions; the batch normalization of the middle one is for a test to damage."""

    def __init__(self, groups):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.middle, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False, groups=groups), nn.BatchNorm2d(8)
        self.last, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm0(self.stem(x)).relu()
        x = self.norm1(self.middle(x)).relu()
        return self.head(self.norm2(self.last(x)).relu().mean((2, 3)))


@torch.no_grad()
def settle(model, x, widths=(None,)):
    """Running statistics of the batch, at each width."""
    model.train()
    for width in widths:
        if width is not None:
            bs.switch(model, width)
        for _ in range(100):
            model(x)
    return model.eval()


@pytest.mark.parametrize("groups", [1, 8])
def test_a_filter_that_training_has_all_but_removed(tmp_path, groups):
    """One step of its sums is wide beside what is read of them; no scale may change its sign for that."""
    torch.manual_seed(0)
    x, network = torch.randn(16, 3, 8, 8), Chain(groups)
    with torch.no_grad():
        network.middle.weight[0] *= 1e-3
        network.norm1.bias[0] = 2.0
    model = settle(bs.quantize(settle(network, x), bits=BITS, example_inputs=x), x, BITS)
    bs.save(model, tmp_path / "m.safetensors", example_inputs=x)
    for width in BITS:
        with torch.no_grad(), bs.switched(model, width):
            wanted = model(x).numpy()
        found = Session(tmp_path / "m.safetensors", bits=width).run(x.numpy())
        assert np.abs(found - wanted).max() < 0.25 * wanted.std(), width


def test_a_scale_is_never_stretched_beyond_its_bounds():
    generator = np.random.default_rng(0)
    for step in (1, 64):
        bias = generator.normal(0, 3, 500)
        thresholds = generator.choice([-1, 1], (500, 1)) * generator.lognormal(0, 2, (500, 3)).cumsum(1)
        _, factor, _ = whole_bias(bias, thresholds, generator.random((500, 3)), step)
        assert (factor >= 0.5).all() and (factor <= 2).all()


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("width", [4, 2])
def test_a_closed_channel_has_room_for_its_bias_in_packed_weights(tmp_path, weights, width):
    torch.manual_seed(0)
    x, network = torch.randn(16, 3, 8, 8), settle(Chain(8), torch.randn(16, 3, 8, 8))
    with torch.no_grad():
        network.norm1.weight[0], network.norm1.bias[0] = 0.0, 2.0
    model = settle(bs.quantize(network, bits=(8, 4, 2), example_inputs=x), x, (8, 4, 2))
    bs.switch(model, width)
    with np.errstate(invalid="raise"):
        bs.export_onnx(model, tmp_path / "m.onnx", example_inputs=x, weights=weights)


class Heads(nn.Module):
    """Ends in a convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("additions", ["requantized", "exact"])
def test_a_convolution_may_be_the_result(tmp_path, additions):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = bs.quantize(Heads().eval(), bits=BITS, example_inputs=x, keep_first_last=False).eval()
    bs.save(model, tmp_path / "m.safetensors", example_inputs=x, additions=additions)
    for width in BITS:
        bs.switch(model, width)
        bs.export_onnx(model, tmp_path / "m.onnx", example_inputs=x, additions=additions)


def test_a_stored_graph_of_exact_sums_has_int8_weights_alone(tmp_path):
    torch.manual_seed(0)
    x, path = torch.randn(4, 3, 8, 8), tmp_path / "m.safetensors"
    bs.save(bs.quantize(Chain(1).eval(), bits=BITS, example_inputs=x), path, example_inputs=x, additions="exact")
    export_file(path, tmp_path / "8.onnx", wanted=8, weights="int4")
    with pytest.raises(UserError, match="the stored graph keeps exact sums"):
        export_file(path, tmp_path / "4.onnx", wanted=4, weights="int4")
    assert not (tmp_path / "4.onnx").exists()


def test_a_linear_layer_needs_no_bias(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    layers = (nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
    model = bs.quantize(nn.Sequential(*layers).eval(), bits=(8, 4), example_inputs=x).eval()
    bs.save(model, tmp_path / "m.safetensors", example_inputs=x)
    bs.switch(model, 4)
    with torch.no_grad():
        wanted = model(x).numpy()
    assert np.abs(Session(tmp_path / "m.safetensors", bits=4).run(x.numpy()) - wanted).max() < 0.02
    bs.export_onnx(model, tmp_path / "m.onnx", example_inputs=x)


def test_a_network_may_answer_the_same_to_everything(tmp_path):
    torch.manual_seed(0)
    x, network = torch.randn(4, 3, 8, 8), Chain(1).eval()
    with torch.no_grad():
        network.norm2.weight.zero_()
        network.norm2.bias.fill_(0.3)
    model = bs.quantize(network, bits=BITS, example_inputs=x).eval()
    bs.save(model, tmp_path / "m.safetensors", example_inputs=x)


class Gated(nn.Module):
    """Its third convolution sees one pixel of each image, and what it gives is multiplied."""

    def __init__(self, conv, groups):
        super().__init__()
        self.stem, self.squeeze = conv(3, 16, 3, padding=1), conv(16, 8, 1)
        self.excite, self.head = conv(8, 16, 1, groups=groups), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        pixels = tuple(range(2, x.ndim))
        gate = self.excite(self.squeeze(x.mean(pixels, keepdim=True)).relu())
        return self.head((x * gate).mean(pixels))


@pytest.mark.parametrize(
    ("conv", "groups", "kind"), [(nn.Conv2d, 1, "sums"), (nn.Conv2d, 8, "int32"), (nn.Conv1d, 1, "int32")]
)
def test_a_range_is_not_taken_from_a_few_results(tmp_path, conv, groups, kind):
    """With eight bits in a range that four images showed, new ones lose what lies beyond it."""
    torch.manual_seed(0)
    shape = (3, 8, 8) if conv is nn.Conv2d else (3, 64)
    # Images that differ in what they have for a mean, which is all that the gate sees.
    images = torch.randn(200, *shape) + 2 * torch.randn(200, 3, *(1,) * (len(shape) - 1))
    few, new, path = images[:4], images[4:], tmp_path / "m.safetensors"
    model = bs.quantize(Gated(conv, groups).eval(), bits=BITS, example_inputs=images).eval()
    bs.save(model, path, example_inputs=few)
    kinds = {product.layer: product.kind for product in read(path).bindings.products}
    assert kinds["excite"] == kind
    for width in BITS:
        with torch.no_grad(), bs.switched(model, width):
            wanted = model(new).numpy()
        noise = np.square(Session(path, bits=width).run(new.numpy()) - wanted).sum()
        assert noise < 1e-4 * np.square(wanted).sum(), width
    with torch.no_grad(), bs.switched(model, 4):
        wanted = model(new).numpy()
    export_file(path, tmp_path / "4.onnx", wanted=4, weights="int4")
    session = onnxruntime.InferenceSession(tmp_path / "4.onnx")
    noise = np.square(session.run(None, {session.get_inputs()[0].name: new.numpy()})[0] - wanted).sum()
    assert noise < 1e-4 * np.square(wanted).sum()
    bs.save(model, path, example_inputs=images)
    kinds = {product.layer: product.kind for product in read(path).bindings.products}
    assert kinds["excite"] == ("bytes or sums" if kind == "sums" else "branch")


def test_an_empty_batch_holds_nothing_against_anything(tmp_path):
    x = torch.randn(4, 3)
    model = bs.quantize(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)), example_inputs=x)
    with pytest.raises(UserError, match="example_inputs: the batch is empty"):
        bs.save(model, tmp_path / "m", example_inputs=x[:0])
    with pytest.raises(UserError, match="classes='ab' is no tuple of names"):
        bs.save(model, tmp_path / "m", classes="ab")
    assert not (tmp_path / "m").exists()
