"""Networks that are written in less usual ways: what they take, give, keep and call their tensors."""

from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bitswitch as bs
from bitswitch.errors import UserError
from bitswitch.export.graph import _outward
from bitswitch.export.onnx import export_file
from bitswitch.runtime import Session
from bitswitch.runtime.constants import _shifts_within_32_bits
from bitswitch.runtime.executable import Executable

IMAGES = torch.randn(8, 3, 9, 10, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(1))


class Plain(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, activation=None):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.middle = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.last, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 5)
        self.activation = activation or nn.ReLU()

    def forward(self, x):
        x = self.activation(self.middle(self.activation(self.stem(x))))
        return self.head(self.activation(self.last(x)).mean((2, 3)))


class Masked(Plain):
    """Some logits are -inf."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, False, False, True, False]))

    def forward(self, x):
        return super().forward(x).masked_fill(self.mask, float("-inf"))


class SameName(Plain):
    """A buffer has the name of an argument."""

    def __init__(self):
        super().__init__()
        self.register_buffer("x", torch.tensor([2.0]))

    def forward(self, x):
        return super().forward(x) * self.x


class SameNameOfTwo(Plain):
    """A buffer has the name of the second argument."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((5,), 2.0))

    def forward(self, x, mask=None):
        return super().forward(x) * self.mask + mask


class Wrapper(Plain):
    """Takes whatever it is given."""

    def forward(self, *given):
        return super().forward(*given)


class Rest(Plain):
    """Takes any number behind the first."""

    def forward(self, x, *rest):
        return super().forward(x) + rest[0] * rest[1]


class Optional(Plain):
    """Takes any number behind two, and is given none."""

    def forward(self, x, scale=None, *rest):
        return super().forward(x)


class Listed(Plain):
    """Takes a list."""

    def forward(self, x, rows):
        return super().forward(x) + rows[0] * rows[1]


class Keeping(Plain):
    """Keeps what it computed."""

    def forward(self, x):
        self.seen = self.middle(self.stem(x).relu())
        self.all = {"seen": [self.seen.relu()]}
        return self.head(self.last(self.all["seen"][0]).relu().mean((2, 3)))


class Weighted(Plain):
    """Its second input has no batch."""

    def forward(self, x, weights):
        return super().forward(x) * weights


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (Plain(nn.Hardtanh(0.0, float("inf"))), (IMAGES,)),
        (Plain(nn.Hardtanh(float("-inf"), 1.0)), (IMAGES,)),
        (Plain(nn.Hardtanh(-1.0, 1.0)), (IMAGES,)),
        (Masked(), (IMAGES,)),
        (SameName(), (IMAGES,)),
        (SameNameOfTwo(), (IMAGES, ROWS[0])),
        (Wrapper(), (IMAGES,)),
        (Rest(), (IMAGES, ROWS[0], ROWS[1])),
        (Rest(), (IMAGES, ROWS[0], torch.arange(1.0, 6.0))),
        (Optional(), (IMAGES,)),
        (Listed(), (IMAGES, [ROWS[0], ROWS[1]])),
    ],
    ids=[
        "no greatest",
        "no least",
        "both",
        "masked",
        "name",
        "second name",
        "any",
        "rest",
        "bare rest",
        "no rest",
        "list",
    ],
)
def test_it_is_exported(tmp_path, network, inputs):
    path = tmp_path / "m.safetensors"
    model = bs.quantize(network.eval(), bits=(8, 4), example_inputs=inputs)
    bs.save(model, path, example_inputs=inputs)
    bs.export_onnx(model, tmp_path / "m.onnx", example_inputs=inputs)
    with torch.no_grad():
        wanted = model(*inputs).numpy()
    flat = [x.numpy() for x in inputs if isinstance(x, torch.Tensor)]
    flat += [x.numpy() for given in inputs if isinstance(given, list) for x in given]
    found = Session(path).run(*flat)
    finite = np.isfinite(wanted)
    assert np.array_equal(found[~finite], wanted[~finite])
    assert np.abs(found[finite] - wanted[finite]).max() < 0.02 * wanted[finite].std()


def test_what_a_forward_kept_has_a_history(tmp_path):
    model = bs.quantize(Keeping(), bits=(8, 4), example_inputs=IMAGES)
    model(IMAGES).sum().backward()
    kept = model.seen
    assert kept.grad_fn is not None
    bs.export_onnx(model, tmp_path / "m.onnx", example_inputs=IMAGES)


def test_a_second_input_without_a_batch(tmp_path):
    network, inputs = Weighted().eval(), (IMAGES, torch.arange(1.0, 6.0))
    bs.save(bs.quantize(network, bits=(8, 4), example_inputs=inputs), tmp_path / "m", example_inputs=inputs)
    export_file(tmp_path / "m", tmp_path / "m.onnx", model=bs.load(tmp_path / "m", model=network))
    assert (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("name", ["codes", "weight_scale", "input_scale"])
def test_tensors_by_our_own_names_are_refused(tmp_path, name):
    network = Plain()
    network.middle.register_buffer(name, torch.tensor(7.0))
    with pytest.raises(UserError, match=f"has '{name}' of its own"):
        bs.quantize(network, example_inputs=IMAGES)
    model = bs.quantize(Plain(), example_inputs=IMAGES)
    if name != "codes":
        model.middle.register_buffer(name, torch.tensor(7.0))
        with pytest.raises(UserError, match=f"'middle.{name}' is a tensor of the network"):
            bs.save(model, tmp_path / "m")
        assert not (tmp_path / "m").exists()


class Counting(Plain):
    """Holds whole numbers."""

    def __init__(self, dtype, numbers=(1, 2, 3)):
        super().__init__()
        self.register_buffer("numbers", torch.tensor(numbers).to(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int64], ids=str)
def test_whole_numbers_of_every_type(tmp_path, dtype):
    bs.save(bs.quantize(Counting(dtype), example_inputs=IMAGES), tmp_path / "m")
    found = bs.load(tmp_path / "m", model=Counting(dtype)).numbers
    assert found.dtype == dtype and found.tolist() == [1, 2, 3]


def test_whole_numbers_beyond_31_bits_are_refused(tmp_path):
    model = bs.quantize(Counting(torch.uint32, (2**31,)), example_inputs=IMAGES)
    with pytest.raises(UserError, match=r"numbers.*does not fit"):
        bs.save(model, tmp_path / "m")


def test_a_network_without_values_is_not_filled(tmp_path):
    bs.save(bs.quantize(Plain(), example_inputs=IMAGES), tmp_path / "m")
    with torch.device("meta"):
        empty = Plain()
    with pytest.raises(UserError, match="meta device"):
        bs.load(tmp_path / "m", model=empty)


def test_a_graphs_options_need_a_graph(tmp_path):
    with pytest.raises(UserError, match="give example_inputs="):
        bs.save(bs.quantize(Plain(), example_inputs=IMAGES), tmp_path / "m", additions="exact")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("code", [-128, -3, 1, 127])
@pytest.mark.parametrize("inputs", [60_000, 200_000])
@pytest.mark.parametrize(("zero", "low", "high"), [(0, 0, 255), (128, 0, 255), (7, 0, 63)])
def test_codes_are_shifted_as_far_as_their_sums_allow(code, inputs, zero, low, high):
    given = SimpleNamespace(zero_point=lambda _: zero, code_range=lambda _: (low, high), assignment={"a": 8})
    codes = np.full((2, inputs), code, np.int8)
    codes[1] = 0
    greatest, most = inputs * max(abs(code * (high - zero)), abs(code * (low - zero))), 2**31 - 2**29
    if greatest >= most:
        with pytest.raises(UserError, match="32 bits may not hold"):
            _shifts_within_32_bits(given, "a", codes)
    else:
        shift = _shifts_within_32_bits(given, "a", codes)
        assert greatest << shift < most <= greatest << (shift + 1)


@pytest.mark.parametrize("low", [-1.0, 1.0])
def test_sums_that_32_bits_may_not_hold(tmp_path, low):
    """70,000 products of the greatest weight and the greatest input; of weights of both signs they cancel."""
    inputs = torch.tensor([[-0.88, 0, 0], [-0.48, 0, 0], [0, 0, 0.0]])
    network = nn.Sequential(nn.Linear(3, 70_000), nn.ReLU(), nn.Linear(70_000, 2), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        network[0].weight.zero_()
        network[0].weight[:, 0] = 1
        network[0].bias.fill_(1)
        network[2].weight.fill_(-1.0)
        network[2].weight[:, ::2] = low
    model = bs.quantize(network, example_inputs=inputs, bits=(8, 2)).eval()
    model[2].weight_quantizer.set_scale(torch.tensor(1 / 128))
    model[2].input_quantizer.set_scale(8, torch.tensor(1 / 255))
    if low < 0:
        with pytest.raises(UserError, match=r"layer '2' sums 70000 products, which 32 bits may not hold at 8 bits"):
            bs.save(model, tmp_path / "m", example_inputs=inputs)
        return
    bs.save(model, tmp_path / "m", example_inputs=inputs)
    session = Session(tmp_path / "m")
    for width in (8, 2):
        session.switch(width)
        # In float32, torch's own sum of so many is off by two per cent.
        layer = model[2]
        with torch.no_grad():
            hidden = layer.input_quantizer(network[:2](inputs), width).double()
            sums = hidden @ layer.weight_at(width).double().T + layer.bias.double()
            wanted = model[3](sums.float()).numpy()
        assert np.allclose(session.run(inputs.numpy()), wanted, rtol=1e-6, atol=1e-5)


class Length(Plain):
    """The size of the batch is asked for with len."""

    def forward(self, x):
        return super().forward(x) + torch.zeros(1, 5).expand(len(x), -1)


class OneSize(Plain):
    """A batch of eight images alone."""

    def forward(self, x):
        return super().forward(x).view(8, 5)


class LastIsDictionary(Plain):
    """The last argument is a dictionary."""

    def forward(self, x, more):
        return {"sum": super().forward(x + more["b"]), "other": super().forward(x - more["a"])}


@pytest.mark.parametrize("batch", [8, 1])
def test_a_length_that_a_forward_asks_for_stays_free(tmp_path, batch):
    model = bs.quantize(Length().eval(), example_inputs=IMAGES)
    bs.save(model, tmp_path / "a", example_inputs=IMAGES[:batch])
    bs.export_onnx(model, tmp_path / "a.onnx", example_inputs=IMAGES[:batch])
    onnx = Executable((tmp_path / "a.onnx").read_bytes(), {})
    for run in (Session(tmp_path / "a").run, lambda x: onnx.run([x])[0]):
        for images in (1, 3, 8):
            assert run(IMAGES[:images].numpy()).shape == (images, 5)


def test_a_network_for_batches_of_one_size_is_told(tmp_path):
    model = bs.quantize(OneSize().eval(), example_inputs=IMAGES)
    for write in (bs.save, bs.export_onnx):
        with pytest.raises(UserError, match="makes a constant of the batch's size, here 8"):
            write(model, tmp_path / "a", example_inputs=IMAGES)
    assert not list(tmp_path.iterdir())


def test_the_last_argument_may_be_a_dictionary(tmp_path):
    inputs = (IMAGES, {"b": IMAGES.flip(0), "a": IMAGES / 2})
    model = bs.quantize(LastIsDictionary().eval(), example_inputs=inputs)
    bs.save(model, tmp_path / "a", example_inputs=inputs)
    found = Session(tmp_path / "a").run(IMAGES.numpy(), IMAGES.flip(0).numpy(), (IMAGES / 2).numpy())
    for one, expected in zip(found, model(*inputs).values(), strict=True):
        np.testing.assert_allclose(one, expected.detach().numpy(), atol=1e-2)


class Shifted(nn.Module):
    """An addition whose one side lies far from zero, and has two channels that batch normalization has closed."""

    def __init__(self, offset, groups):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.c, self.norm = nn.Conv2d(12, 12, 3, padding=1, groups=groups), nn.BatchNorm2d(12)
        self.after, self.fc = nn.BatchNorm2d(12), nn.Linear(12, 5)
        with torch.no_grad():
            self.norm.bias.copy_(torch.randn(12) + offset)
            self.norm.weight[:2] = torch.tensor([0.0, 1e-6])
            self.after.running_mean.fill_(offset)
            self.after.running_var.fill_(0.5)

    def forward(self, x):
        x = self.a(x).relu()
        return self.fc(self.after(self.norm(self.c(self.b(x).relu())) + x).relu().amax((2, 3)))


@pytest.mark.parametrize("groups", [1, 12])
@pytest.mark.parametrize("offset", [0, 200, -3000])
def test_a_branch_far_from_zero_keeps_its_range(tmp_path, offset, groups):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 12, 12)
    model = bs.quantize(Shifted(offset, groups).eval(), example_inputs=x).eval()
    bs.save(model, tmp_path / "m", example_inputs=x)
    session = Session(tmp_path / "m")
    for width in (8, 4):
        session.switch(width)
        with torch.no_grad(), bs.switched(model, width):
            expected = model(x).numpy()
        noise, signal = np.square(session.run(x.numpy()) - expected).sum(), np.square(expected - expected.mean(0)).sum()
        # Rounding to a byte of each channel's range leaves 40 dB.
        assert noise < 1e-3 * signal, (width, noise / signal)


@given(st.floats(-1e6, 1e6, width=32), st.floats(2**-10, 1e6, width=32))
def test_a_range_that_is_written_holds_the_one_that_was_seen(least, width):
    greatest = float(np.float32(least) + np.float32(width))
    low, high = _outward(least, greatest)
    assert low <= least and greatest <= high
    assert high - low <= 1.021 * (greatest - least)
    assert len(repr(low)) < 20 and _outward(least, least) == (least, least)


def test_results_that_are_not_finite_have_no_range(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 9, 9)
    model = bs.quantize(Shifted(0, 1).eval(), example_inputs=x).eval()
    with torch.no_grad():
        for variant in model.norm.variants.values():
            variant.weight.fill_(3e38)
            variant.running_var.fill_(1e-6)
    with pytest.raises(UserError, match="layer 'c' gives values that are not finite on example_inputs at 8 bits"):
        bs.save(model, tmp_path / "m", example_inputs=1e3 * x)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("weights", ["int4", "int2"])
@pytest.mark.parametrize("shape", [(32, 10), (8, 5, 10)])
def test_packed_weights_of_linear_layers(tmp_path, weights, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    network = nn.Sequential(
        nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 4)
    )
    model = bs.quantize(network, example_inputs=x).eval()
    bs.save(model, tmp_path / "m", example_inputs=x)
    first, second = bs.widths(model)
    for wanted in (2, {first: 2, second: 8}):
        export_file(tmp_path / "m", tmp_path / "m.onnx", wanted=wanted, weights=weights, model=model, example_inputs=x)
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
        with torch.no_grad(), bs.switched(model, wanted):
            expected = model(x).numpy()
        assert np.allclose(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], expected, atol=1e-5)
