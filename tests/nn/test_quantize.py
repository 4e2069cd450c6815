import copy
import functools
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import bitswitch as bs
from bitswitch.errors import UserError
from bitswitch.nn import QuantizedLayer, SwitchableBatchNorm


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quiet(model, inputs, bits=(8, 2), **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return bs.quantize(model, example_inputs=inputs, bits=bits, **options)


def chain(activation=nn.ReLU, layers=4, features=8):
    modules = []
    for i in range(layers):
        modules += [nn.Linear(features, features), activation()] if i < layers - 1 else [nn.Linear(features, features)]
    return nn.Sequential(*modules)


def convs():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6, eps=1e-3, momentum=0.3),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1, groups=2),
        nn.BatchNorm2d(4, affine=False),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


@torch.no_grad()
def moved_by_switching(model, *inputs, width=2):
    before = model(*inputs)
    with bs.switched(model, width):
        after = model(*inputs)
    assert torch.isfinite(after).all()
    return not torch.equal(before, after)


class Net(nn.Module):
    """Two layers at either end, and whatever a test puts between them."""

    def __init__(self, **modules):
        super().__init__()
        self.start, self.early = nn.Linear(8, 8), nn.Linear(8, 8)
        for name, module in modules.items():
            setattr(self, name, module)
        self.late, self.end = nn.Linear(8, 8), nn.Linear(8, 8)

    def between(self, x):
        return x

    def forward(self, x):
        x = self.between(self.early(self.start(x).relu()))
        return self.end(self.late(x))


def test_the_original_is_untouched():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), nn.BatchNorm1d(5), chain()
    )
    model[2].eval()
    model[1].linear1.weight.requires_grad_(False)
    twin = copy.deepcopy(model)
    x = data(3, 5, 8)
    quantized = quiet(model, x)
    assert bs.widths(quantized)
    assert [(n, type(m), m.training) for n, m in model.named_modules()] == [
        (n, type(m), m.training) for n, m in twin.named_modules()
    ]
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert all(torch.equal(t, twin.state_dict()[n]) for n, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in twin.parameters()]
    assert model[1].activation_relu_or_gelu == twin[1].activation_relu_or_gelu
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert module.__dict__.keys() == other.__dict__.keys()
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in quantized.parameters()}
    assert not shared
    assert torch.equal(model.eval()(x), twin.eval()(x))


def test_the_copy_stands_at_the_highest_width():
    assert set(bs.widths(quiet(chain(), data(9, 8), bits=(6, 3))).values()) == {6}


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_the_originals(training):
    model = convs().train(training)
    model[4].train(not training)
    quantized = quiet(model, data(2, 3, 8, 8))
    assert quantized.training == training
    assert quantized[3].training == training
    assert quantized[4].training == (not training)
    assert {m.training for m in quantized[4].modules()} == {not training}


def test_running_statistics_do_not_move_while_quantizing():
    model = convs().train()
    quantized = quiet(model, data(2, 3, 8, 8))
    assert quantized[1].variants["8"].num_batches_tracked == 0


def test_first_and_last_are_those_that_run_first_and_last():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.middle, self.second, self.first = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            return self.last(self.middle(self.second(self.first(x))))

    quantized = quiet(Backwards(), data(9, 8))
    assert set(bs.widths(quantized)) == {"middle", "second"}
    assert type(quantized.first) is nn.Linear
    assert type(quantized.last) is nn.Linear


def test_keep_first_last_can_be_switched_off():
    assert list(bs.widths(quiet(chain(), data(9, 8), keep_first_last=False))) == ["0", "2", "4", "6"]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (["2"], ["4", "6", "8"]),
        ("2", ["4", "6", "8"]),
        (["2", "6"], ["4", "8"]),
        (["[24]"], ["6", "8"]),
        (["?"], None),
        (["0"], ["2", "4", "6", "8"]),
    ],
    ids=str,
)
def test_keep_by_name_and_pattern(keep, left):
    model = chain(layers=6)
    if left is None:
        with pytest.raises(ValueError, match="no layer to quantize"):
            quiet(model, data(9, 8), keep=keep)
    else:
        assert list(bs.widths(quiet(model, data(9, 8), keep=keep))) == left


def test_keep_of_a_block_keeps_all_inside():
    model = nn.Sequential(nn.Linear(8, 8), chain(), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8))
    assert list(bs.widths(quiet(model, data(9, 8), keep=["1"]))) == ["2.0"]
    assert list(bs.widths(quiet(model, data(9, 8), keep=["1.*"]))) == ["2.0"]
    assert list(bs.widths(quiet(model, data(9, 8), keep=["*.0"]))) == ["1.2", "1.4", "1.6"]


def test_keep_that_names_nothing_is_refused():
    with pytest.raises(ValueError, match=r"keep='block\.\*'"):
        quiet(chain(), data(9, 8), keep=["2", "block.*"])
    with pytest.raises(ValueError, match="did you mean 'early'"):
        quiet(Net(), data(9, 8), keep=["earyl"])


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8)), nn.Linear(8, 8), chain(layers=2), nn.Identity()],
    ids=["no layers", "one", "two", "identity"],
)
def test_nothing_to_quantize_is_refused(model):
    with pytest.raises(ValueError, match="no layer to quantize"):
        quiet(model, data(9, 8))


@pytest.mark.parametrize("bits", [(), (1,), (9, 4), (2, 8), (8, 8), 8, "8"], ids=repr)
def test_bad_widths_are_refused(bits):
    with pytest.raises(UserError, match="bits="):
        bs.quantize(chain(), example_inputs=data(9, 8), bits=bits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(bad):
    model = Net()
    with torch.no_grad():
        model.late.weight[0, 0] = bad
    with pytest.raises(UserError, match="'late'"):
        quiet(model, data(9, 8))
    x = data(9, 8)
    x[0, 0] = bad
    with pytest.raises(UserError, match="input of layer 'early'"):
        quiet(Net(), x)


def test_the_model_itself_may_be_the_layer():
    quantized = quiet(nn.Linear(8, 3), data(9, 8), keep_first_last=False)
    assert isinstance(quantized, QuantizedLayer)
    assert list(bs.widths(quantized).values()) == [8]
    assert moved_by_switching(quantized, data(9, 8))


def test_several_inputs_are_a_tuple():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = chain()

        def forward(self, x, gain, shift=None):
            return self.body(x * gain["by"]) + (0 if shift is None else shift)

    inputs = (data(9, 8), {"by": torch.tensor(2.0)}, torch.ones(8))
    quantized = quiet(Two(), inputs)
    assert list(bs.widths(quantized)) == ["body.2", "body.4"]
    assert moved_by_switching(quantized, *inputs)


def test_nested_modules_keep_their_names():
    class Tree(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"trunk": nn.ModuleList([chain(), nn.Sequential(chain(), nn.ReLU())])})

        def forward(self, x):
            for part in self.parts["trunk"]:
                x = part(x)
            return x

    quantized = quiet(Tree(), data(9, 8))
    wanted = [f"parts.trunk.0.{i}" for i in (2, 4, 6)] + [f"parts.trunk.1.0.{i}" for i in (0, 2, 4)]
    assert list(bs.widths(quantized)) == wanted
    assert all(isinstance(quantized.get_submodule(name), QuantizedLayer) for name in wanted)


def test_a_module_used_twice_stays_one_module():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.last = (nn.Linear(8, 8) for _ in range(3))
            self.b = self.a
            self.inner = nn.Sequential(self.a, nn.ReLU(), self.a)

        def forward(self, x):
            return self.last(self.inner(self.b(self.a(self.first(x)))))

    quantized = quiet(Twice(), data(9, 8))
    assert quantized.a is quantized.b is quantized.inner[0] is quantized.inner[2]
    assert isinstance(quantized.a, QuantizedLayer)
    assert list(bs.widths(quantized)) == ["a"]
    assert moved_by_switching(quantized, data(9, 8))
    again = copy.deepcopy(quantized)
    assert again.a is again.b is again.inner[0]


def test_two_layers_that_share_one_weight_still_share_it():
    model = chain(layers=5)
    model[4].weight = model[2].weight
    quantized = quiet(model, data(9, 8))
    assert quantized[4].weight is quantized[2].weight
    quantized(data(9, 8)).sum().backward()
    assert torch.isfinite(quantized[2].weight.grad).all()


def test_modules_called_through_a_plain_list_are_quantized():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
            self.norm = nn.BatchNorm1d(8)
            self.steps = [self.a, self.b, self.norm, self.c, self.d]

        def forward(self, x):
            for step in self.steps:
                x = step(x)
            return x

    quantized = quiet(Listed(), data(9, 8))
    assert list(bs.widths(quantized)) == ["b", "c"]
    assert moved_by_switching(quantized.eval(), data(9, 8))
    quantized.train()(data(9, 8))
    assert quantized.norm.variants["8"].num_batches_tracked == 1


def test_modules_that_only_a_plain_list_holds_still_run():
    class Hidden(Net):
        def __init__(self):
            super().__init__()
            self.hidden = [nn.Linear(8, 8), nn.ReLU()]

        def between(self, x):
            return self.hidden[1](self.hidden[0](x))

    quantized = quiet(Hidden(), data(9, 8))
    assert set(bs.widths(quantized)) == {"early", "late"}
    assert moved_by_switching(quantized, data(9, 8))


@pytest.mark.parametrize(
    ("activation", "kind"),
    [
        (nn.ReLU, "unsigned"),
        (nn.ReLU6, "unsigned"),
        (nn.Sigmoid, "unsigned"),
        (nn.Identity, "signed"),
        (nn.Tanh, "signed"),
        (nn.GELU, "zero_point"),
        (nn.SiLU, "zero_point"),
    ],
)
def test_the_kind_of_an_input_is_chosen_from_data(activation, kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight.normal_()
        model[0].bias.zero_()
    quantized = quiet(model, data(64, 8), bits=(8, 4, 2))
    assert quantized[2].input_quantizer.kind == kind
    assert set(quantized[2].input_quantizer.offset) == ({"8", "4", "2"} if kind == "zero_point" else set())


def test_every_width_has_a_norm_that_starts_as_the_float_one():
    torch.manual_seed(0)
    model = convs()
    with torch.no_grad():
        model[4].weight.uniform_(0.5, 2)
    model(data(2, 3, 8, 8))
    quantized = quiet(model, data(2, 3, 8, 8), bits=(8, 4, 2))
    for i in (1, 4, 7):
        assert isinstance(quantized[i], SwitchableBatchNorm)
        assert list(quantized[i].variants) == ["8", "4", "2"]
        tensors = []
        for norm in quantized[i].variants.values():
            assert (norm.eps, norm.momentum, norm.affine) == (model[i].eps, model[i].momentum, model[i].affine)
            assert all(torch.equal(t, model[i].state_dict()[n]) for n, t in norm.state_dict().items())
            tensors += [t.data_ptr() for t in norm.state_dict().values()]
        assert len(set(tensors)) == len(tensors)
    assert quantized[1].follows is quantized[3]  # nothing quantized ran before it
    assert quantized[4].follows is quantized[3]
    assert quantized[7].follows is quantized[6]


class Functional(Net):
    def between(self, x):
        return F.linear(x, self.middle.weight)


class Transposed(Net):
    def between(self, x):
        return x @ self.middle.weight.t()


class Read(Net):
    def between(self, x):
        return self.middle(x) + F.linear(x, self.middle.weight)


class Module(Net):
    def between(self, x):
        return self.middle(x)


class Product(Net):
    def between(self, x):
        return F.linear(x, self.middle)


class Matmul(Net):
    def between(self, x):
        return x @ self.middle


class Added(Net):
    def between(self, x):
        return torch.addmm(self.early.bias, x, self.middle)


class Turned(Net):
    def between(self, x):
        return x @ self.middle.t().view(8, 8)


class Spread(Net):
    def between(self, x):
        return F.conv_transpose1d(x.unsqueeze(-1), self.middle.T.unflatten(0, (8, 1)).transpose(1, 2)).squeeze(-1)


class OwnAttention(nn.MultiheadAttention):
    pass


class Up(Net):
    def between(self, x):
        return self.middle(x.unsqueeze(-1)).squeeze(-1)


class Volume(Net):
    def between(self, x):
        return self.middle(x.view(-1, 1, 2, 2, 2)).flatten(1)


class Recurrent(Net):
    def between(self, x):
        return self.middle(x)[0]


class Attention(Net):
    def between(self, x):
        memory = x[:, : self.middle.kdim]
        return self.middle(x, memory, memory)[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 8)
        self.body = chain()
        self.middle = nn.Linear(8, 8, bias=False)
        self.middle.weight = self.embedding.weight

    def forward(self, x):
        return self.middle(self.body(self.embedding(x.argmax(-1))))


class OwnLinear(nn.Linear):
    pass


def with_other_forward(module, wrap):
    module.forward = wrap(module)
    return module


def written_over(module):
    return types.MethodType(lambda self, x: F.linear(x, self.weight, self.bias), module)


def wrapped(module):
    """As libraries that move modules between devices do."""
    return functools.partial(lambda module, *inputs: type(module).forward(module, *inputs), module)


class Normalized(nn.Module):
    """A batch normalization of the user's own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


class Upright(Net):
    def between(self, x):
        return self.middle(torch.stack([x, x.roll(1, -1), x**2], -1))[..., 0]


class SelfAttention(Net):
    def between(self, x):
        return self.middle(x, x, x)[0]


STAYS_FLOAT = {
    "functional": (lambda: Functional(middle=nn.Linear(8, 8)), "read by a functional call"),
    "transposed": (lambda: Transposed(middle=nn.Linear(8, 8)), "read by a functional call"),
    "called and read": (lambda: Read(middle=nn.Linear(8, 8)), "read by a functional call"),
    "weight_norm": (lambda: Module(middle=weight_norm(nn.Linear(8, 8))), "cannot be swapped"),
    "subclass": (lambda: Module(middle=OwnLinear(8, 8)), "OwnLinear cannot be swapped"),
    "transposed convolution": (lambda: Up(middle=nn.ConvTranspose1d(8, 8, 1)), "ConvTranspose1d cannot be swapped"),
    "lstm": (lambda: Recurrent(middle=nn.LSTM(8, 8)), "LSTM cannot be swapped"),
    "never runs": (lambda: Net(middle=nn.Linear(8, 8)), "did not run"),
    "kdim": (lambda: Attention(middle=nn.MultiheadAttention(8, 2, kdim=4, vdim=4)), "kdim"),
    "add_bias_kv": (lambda: Attention(middle=nn.MultiheadAttention(8, 2, add_bias_kv=True)), "add_bias_kv"),
    "add_zero_attn": (lambda: Attention(middle=nn.MultiheadAttention(8, 2, add_zero_attn=True)), "add_zero_attn"),
    "other forward": (
        lambda: Module(middle=with_other_forward(nn.Linear(8, 8), written_over)),
        "forward was replaced",
    ),
    "wrapped forward": (lambda: Module(middle=with_other_forward(nn.Linear(8, 8), wrapped)), "forward was replaced"),
    "wrapped attention": (
        lambda: SelfAttention(middle=with_other_forward(nn.MultiheadAttention(8, 2), wrapped)),
        "forward was replaced",
    ),
    "statistics of instances": (
        lambda: Upright(middle=nn.InstanceNorm1d(8, track_running_stats=True)),
        "running statistics are shared by all widths",
    ),
    "statistics of its own": (lambda: Module(middle=Normalized()), "running statistics are shared by all widths"),
    "three dimensions": (lambda: Volume(middle=nn.Conv3d(1, 1, 1)), "Conv3d cannot be swapped"),
    "bare parameter": (lambda: Product(middle=nn.Parameter(torch.randn(8, 8))), "outside any layer"),
    "bare parameter, addmm": (lambda: Added(middle=nn.Parameter(torch.randn(8, 8))), "outside any layer"),
    "bare parameter, views": (lambda: Turned(middle=nn.Parameter(torch.randn(8, 8))), "outside any layer"),
    "bare parameter, transposed": (lambda: Spread(middle=nn.Parameter(torch.randn(8, 8))), "outside any layer"),
    "attention of its own": (
        lambda: SelfAttention(middle=OwnAttention(8, 2)),
        "OwnAttention cannot be swapped",
    ),
    "bare parameter, @": (lambda: Matmul(middle=nn.Parameter(torch.randn(8, 8))), "outside any layer"),
}


@pytest.mark.parametrize("case", STAYS_FLOAT)
def test_what_stays_float_is_named_and_still_works(case):
    torch.manual_seed(0)
    make, why = STAYS_FLOAT[case]
    model, x = make(), data(9, 8)
    with pytest.warns(UserWarning, match=rf"stays float:.*\bmiddle\b \(.*{why}") as caught:
        quantized = bs.quantize(model, example_inputs=x, bits=(8, 2))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    # Its weight is not told of beside it.
    assert str(caught[0].message).count("middle") == 1
    assert len(bs.widths(quantized)) >= 2
    assert not any(name.startswith("middle") for name in bs.widths(quantized))
    for width in (8, 2):
        with bs.switched(quantized, width):
            assert torch.isfinite(quantized(x)).all()
    quantized(x).sum().backward()
    assert moved_by_switching(quantized, x)
    if isinstance(model, Net) and isinstance(model.middle, nn.Module):  # what the user asks for himself is not news
        quiet(model, x, keep=["middle"])


def test_attention_keeps_its_hooks_and_attributes():
    torch.manual_seed(0)
    model, x = SelfAttention(middle=nn.MultiheadAttention(8, 2)), data(9, 8)
    model.middle.register_forward_hook(lambda module, inputs, output: (output[0] * 0, output[1]))
    model.middle.tag = "mine"
    quantized = quiet(model, x)
    assert quantized.middle.tag == "mine"
    assert "middle.in_proj" in bs.widths(quantized)
    assert torch.equal(quantized(x), quantized.end(quantized.late(torch.zeros(9, 8))))


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mid, self.last = nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3), nn.Linear(4, 3)
        self.image, self.norm, self.flat = nn.Conv2d(1, 1, 1), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.norm(input=self.mid(input=self.first(x).relu()))
        x = self.image(input=x.unsqueeze(1)).squeeze(1)
        return self.last(self.flat(input=x.mean(-1)))


def test_layers_are_called_with_the_names_of_torch():
    quantized = quiet(ByName(), data(9, 2, 8))
    assert list(bs.widths(quantized)) == ["mid", "image", "flat"] and isinstance(quantized.norm, SwitchableBatchNorm)
    assert moved_by_switching(quantized, data(9, 2, 8))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_network_that_cannot_be_copied_is_told_in_a_line():
    model = chain()
    torch.nn.utils.weight_norm(model[2])
    model(data(9, 8))
    with pytest.raises(UserError, match=r"cannot be copied .*torch\.nn\.utils\.parametrizations"):
        bs.quantize(model, example_inputs=data(9, 8))


def test_a_tied_head_is_the_last_layer():
    """It stays float as every last layer does, and nothing else takes its place."""
    quantized = quiet(Tied(), data(9, 8))
    assert list(bs.widths(quantized)) == ["body.2", "body.4", "body.6"]


def test_hooks_and_frozen_parameters_are_taken_over():
    model, seen = chain(), []
    model[2].register_forward_hook(lambda *_: seen.append("hook"))
    model[2].weight.requires_grad_(False)
    quantized = quiet(model, data(9, 8))
    seen.clear()
    quantized(data(9, 8))
    assert seen == ["hook"]
    assert not quantized[2].weight.requires_grad
    assert quantized[4].weight.requires_grad


@pytest.mark.parametrize("scale_form", ["log", "raw"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_scales_have_the_shape_and_the_form_asked_for(per_channel, scale_form):
    model = convs()
    quantized = quiet(model, data(2, 3, 8, 8), per_channel=per_channel, scale_form=scale_form)
    scale = quantized[3].weight_quantizer.scale()
    assert scale.shape == ((6, 1, 1, 1) if per_channel else ())
    stored = quantized[3].weight_quantizer.scale_parameter
    assert torch.allclose(scale, stored.exp() if scale_form == "log" else stored)
    # Fine enough to be a start: at 8 bits the weight is nearly what it was.
    assert torch.allclose(
        quantized[3].weight_at(8), model[3].weight, atol=float(model[3].weight.detach().abs().max()) / 50
    )


def test_a_float64_network_stays_float64():
    quantized = quiet(chain().double(), data(9, 8).double())
    assert {p.dtype for p in quantized.parameters()} == {torch.float64}
    assert quantized(data(9, 8).double()).dtype == torch.float64


def test_eight_bits_are_close_to_float_and_fewer_are_farther():
    torch.manual_seed(0)
    model, x = chain(nn.GELU, features=32), data(64, 32)
    quantized = quiet(model, x, bits=(8, 6, 4, 2))
    with torch.no_grad():
        wanted = model(x)
        errors = []
        for width in (8, 6, 4, 2):
            bs.switch(quantized, width)
            errors.append(float((quantized(x) - wanted).norm() / wanted.norm()))
    assert errors == sorted(errors)
    assert errors[0] < 0.02


def test_a_state_dict_goes_through_a_strict_round_trip():
    torch.manual_seed(0)
    x = data(2, 3, 8, 8)
    one, other = quiet(convs(), x), quiet(convs(), 3 * x)
    one.train()(x)
    bs.switch(one, 2)
    one(x)
    state = copy.deepcopy(one.state_dict())
    assert other.load_state_dict(state, strict=True) == ([], [])
    assert other.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in other.state_dict().items())
    for width in (8, 2):
        bs.switch(one, width)
        bs.switch(other, width)
        assert torch.equal(one.eval()(x), other.eval()(x))


def test_quantizing_is_repeatable():
    torch.manual_seed(0)
    model, x = convs(), data(2, 3, 8, 8)
    one, two = quiet(model, x).state_dict(), quiet(model, x).state_dict()
    assert all(torch.equal(t, two[n]) for n, t in one.items())


def test_what_is_changed_in_place_later_is_seen_as_it_was():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            x = self.a(x)
            y = self.b(x)
            torch.relu_(x)
            return self.d(self.c(x + y))

    quantized = quiet(InPlace(), data(64, 8))
    assert quantized.b.input_quantizer.kind != "unsigned"


def unseen(x):
    return torch.from_numpy(np.tanh(x.detach().numpy()))


def assigned(x):
    out = torch.zeros(len(x), 10, *x.shape[2:])
    out[:, :8] = x
    return out[:, :8]


def written_to_a_view(x):
    out = torch.zeros(len(x), 10, *x.shape[2:])
    out.narrow(1, 0, 8).copy_(x)
    return out[:, :8]


@pytest.mark.parametrize("between", [F.silu, assigned, written_to_a_view, unseen])
def test_norms_follow_the_layer_before_whatever_lies_between(between):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4))
            self.norms, self.last = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3)), nn.Linear(8, 5)

        def forward(self, x):
            x = self.convs[0](x)
            for conv, norm in zip(self.convs[1:], self.norms, strict=True):
                x = norm(between(conv(x)))
            return self.last(x.mean((2, 3)))

    plan = bs.quantize(Network(), bits=(8, 4), example_inputs=torch.randn(8, 3, 10, 10)).bitswitch_plan
    assert plan.norms == {f"norms.{i}": f"convs.{i + 1}" for i in range(3)}
    if between is not unseen:
        assert plan.before == {"norms.0": None, "norms.1": "convs.1", "norms.2": "convs.2"}


def test_a_state_of_other_meaning_is_not_loaded():
    """Names and shapes are alike, but the codes' range, the form of scales, or the narrowing is not."""
    float_network = chain().eval()
    inputs = data(64, 8)
    model = quiet(float_network, inputs, keep_first_last=False)
    assert model.get_submodule("0").input_quantizer.kind == "signed"
    others = {
        "input 'unsigned'": quiet(float_network, inputs.abs(), keep_first_last=False),
        "scale_form 'raw'": quiet(float_network, inputs, keep_first_last=False, scale_form="raw"),
        "narrowing 'floor'": quiet(float_network, inputs, keep_first_last=False, method="adabits"),
    }
    for words, other in others.items():
        with pytest.raises(RuntimeError, match=f"0.*has {words} and the state was made with"):
            other.load_state_dict(model.state_dict())
    again = quiet(float_network, inputs * 1.5, keep_first_last=False)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(inputs), model(inputs))
    again.load_state_dict(dict(model.state_dict()))  # without notes, as older files are


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize(
    ("make", "inputs", "words"),
    [
        (chain, torch.empty(0, 8), "input of layer '2' is empty on the example inputs"),
        (
            lambda: chain(nn.Identity).to(torch.cfloat),
            torch.ones(4, 8, dtype=torch.cfloat),
            "input of layer '2' is complex",
        ),
        (lambda: nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)), torch.ones(4, 8), "lazy modules without shapes yet"),
        (
            lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d(affine=False)),
            torch.ones(4, 3),
            "has lazy modules",
        ),
    ],
    ids=["empty", "complex", "lazy", "lazy buffers"],
)
def test_inputs_and_layers_that_have_no_scale(make, inputs, words):
    with pytest.raises(UserError, match=words):
        bs.quantize(make(), example_inputs=inputs)


def test_attention_whose_weights_are_computed_stays_float():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    weight_norm(attention.out_proj)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model.self_attn = attention
    with pytest.warns(UserWarning, match=r"self_attn \(attention with .* or weights that are computed\)"):
        assert bs.quantize(model, example_inputs=torch.randn(4, 3, 8), keep_first_last=False, keep=None)


def test_a_network_that_reads_its_batch_normalization_finds_that_of_the_width(images):
    class Gated(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[0](x)) * self[1].weight.abs().mean() + self[1].running_mean.sum())

    gated = Gated(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    model = bs.quantize(gated, example_inputs=images, keep_first_last=False).eval()
    with torch.no_grad():
        model[1].variants["4"].weight.mul_(0.5)
    found = {}
    for width in (8, 4):
        bs.switch(model, width)
        model(images)
        found[width] = (model[1].weight, model[1].eps)
    assert found == {width: (model[1].variants[str(width)].weight, 1e-5) for width in (8, 4)}
    with pytest.raises(AttributeError, match="no attribute 'wieght'"):
        _ = model[1].wieght


@pytest.fixture(params=["compiled", "data parallel", "distributed"])
def wrap(request):
    """What a network is wrapped in to run fast or on several devices."""
    if request.param == "compiled":
        yield lambda model: torch.compile(model, backend="eager")
    elif request.param == "data parallel":
        yield lambda model: torch.compile(nn.DataParallel(model), backend="eager")
    else:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        yield nn.parallel.DistributedDataParallel
        torch.distributed.destroy_process_group()


def test_a_wrapped_network_is_quantized_switched_and_saved_by_its_own_names(tmp_path, network, images, wrap):
    model = bs.quantize(wrap(network), example_inputs=images)
    assert bs.widths(model) == bs.widths(bs.quantize(network, example_inputs=images))
    wrapped, one = wrap(model), next(iter(bs.widths(model)))
    bs.switch(wrapped, {one: 2})
    assert bs.widths(model)[one] == bs.widths(wrapped)[one] == 2
    bs.switch(wrapped, 8)
    bs.save(wrapped, tmp_path / "m")
    assert bs.widths(bs.load(tmp_path / "m", model=network))


def test_what_is_quantized_in_inference_mode_can_be_trained(network, images):
    with torch.inference_mode():
        model = bs.quantize(network, example_inputs=images * 1)
    optimizer = bs.MultiPrecisionOptimizer(model)
    before = model.conv2.weight.detach().clone()
    model(images).sum().backward()
    optimizer.step(8)
    assert not torch.equal(model.conv2.weight, before)
