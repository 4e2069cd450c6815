import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

import bitswitch as bs
from bitswitch.nn import ActivationQuantizer, WeightQuantizer, freeze
from bitswitch.nn.layers import QUANTIZED, MultiheadAttention

WIDTHS = (8, 4, 2)


def data(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def quiet(model, inputs, bits=WIDTHS, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return bs.quantize(model, example_inputs=inputs, bits=bits, **options)


def rounded_twice(weight, scale, high, low):
    """The method's equations for weights, one by one."""
    q_high = torch.floor(weight / scale + 0.5).clamp(-(2 ** (high - 1)), 2 ** (high - 1) - 1)
    q_low = torch.floor(q_high / 2 ** (high - low) + 0.5).clamp(-(2 ** (low - 1)), 2 ** (low - 1) - 1)
    return q_low * (scale * 2 ** (high - low))


def stepped(x, scale, bits, kind, offset):
    least, greatest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind == "signed" else (0, 2**bits - 1)
    zp = torch.round(-offset / scale).clamp(0, greatest) if kind == "zero_point" else 0.0
    return (torch.clamp(torch.round(x / scale) + zp, least, greatest) - zp) * scale


CONVOLUTIONS = [
    {},
    {"bias": False},
    {"stride": 2},
    {"dilation": 2, "padding": 1},
    {"groups": 2},
    {"groups": 4, "padding": 1},
    {"padding": "same"},
    {"padding": "same", "dilation": 2, "padding_mode": "circular"},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "zeros"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 2, "padding_mode": "replicate", "stride": 2, "bias": False},
]
LAYERS = {
    **{f"Conv2d{o}": (lambda o=o: nn.Conv2d(4, 8, 3, **o), (2, 4, 7, 7)) for o in CONVOLUTIONS},
    **{f"Conv1d{o}": (lambda o=o: nn.Conv1d(4, 8, 3, **o), (2, 4, 9)) for o in CONVOLUTIONS},
    "Conv2d tall": (lambda: nn.Conv2d(4, 4, (3, 1), (1, 2), (1, 0)), (2, 4, 7, 7)),
    "Conv2d unbatched": (lambda: nn.Conv2d(4, 4, 3), (4, 7, 7)),
    "Conv1d unbatched": (lambda: nn.Conv1d(4, 4, 3), (4, 7)),
    "Linear": (lambda: nn.Linear(5, 3), (6, 5)),
    "Linear no bias": (lambda: nn.Linear(5, 3, bias=False), (6, 5)),
    "Linear 3-D": (lambda: nn.Linear(5, 3), (2, 6, 5)),
    "Linear 1-D": (lambda: nn.Linear(5, 3), (5,)),
}


@pytest.mark.parametrize("kind", ["unsigned", "signed", "zero_point"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_float_self_on_quantized_numbers(name, kind):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make(), data(*shape)
    twin = copy.deepcopy(layer)
    weights, inputs = WeightQuantizer(WIDTHS, (), form="raw"), ActivationQuantizer(WIDTHS, kind)
    torch.nn.init.constant_(weights.scale_parameter, 0.004)
    for width in WIDTHS:
        offset = torch.tensor(-0.7) if kind == "zero_point" else None
        inputs.set_scale(width, torch.tensor(2.3 / 2**width), offset)
    quantized = QUANTIZED[type(layer)].from_float(layer, weights, inputs)
    outputs = set()
    for width in WIDTHS:
        quantized.width = width
        with torch.no_grad():
            twin_now = copy.deepcopy(twin)
            twin_now.weight.copy_(rounded_twice(twin.weight, weights.scale(), 8, width))
            offset = inputs.offset[str(width)] if kind == "zero_point" else None
            wanted = twin_now(stepped(x, inputs.scale(width), width, kind, offset))
            got = quantized(x)
        assert got.shape == twin(x).shape
        assert torch.equal(got, wanted)
        outputs.add(got.double().sum().item())
    assert len(outputs) == 3


@pytest.mark.parametrize("per_channel", [False, True])
def test_frozen_layers_give_the_same_bits_at_every_width(per_channel):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2, padding=1), nn.Flatten(), nn.Linear(144, 5))
    x = data(2, 3, 8, 8)
    quantized = quiet(model, x, per_channel=per_channel, keep_first_last=False)
    frozen = freeze(copy.deepcopy(quantized))
    for name in bs.widths(quantized):
        one, other = quantized.get_submodule(name), frozen.get_submodule(name)
        assert other.weight is None
        assert other.codes.dtype == torch.int8
        assert other.codes.shape == one.weight.shape
        assert torch.equal(other.codes, one.stored_codes())
        assert other.squared_errors() == one.squared_errors()
        for width in WIDTHS:
            assert torch.equal(one.weight_at(width), other.weight_at(width))
    for width in WIDTHS:
        bs.switch(quantized, width)
        bs.switch(frozen, width)
        assert torch.equal(quantized(x), frozen(x))


def test_squared_errors_are_those_of_the_weight():
    torch.manual_seed(0)
    quantized = quiet(nn.Linear(20, 30), data(9, 20), keep_first_last=False)
    scale = quantized.weight_quantizer.scale().detach()
    for width, error in quantized.squared_errors().items():
        difference = rounded_twice(quantized.weight.detach(), scale, 8, width).double() - quantized.weight.double()
        assert error == pytest.approx(difference.square().sum().item(), rel=1e-9)
    errors = list(quantized.squared_errors().values())
    assert errors == sorted(errors)


def attention(**options):
    torch.manual_seed(1)
    module = nn.MultiheadAttention(12, 3, dtype=torch.float64, **options)
    with torch.no_grad():  # biases start at 0, which would hide them
        for parameter in module.parameters():
            parameter.normal_(0, 0.4)
    return module


def same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


TARGET, SOURCE, BATCH, HEADS = 5, 4, 2, 3


def masks(kind, batch, source):
    causal = torch.ones(TARGET, source, dtype=torch.bool).triu(1)
    each = causal.repeat(batch * HEADS, 1, 1)
    each[0, 3, 1] = each[HEADS - 1, 2, 1] = True
    if batch > 1:
        each[HEADS, 4, 0] = True
    bias = data(batch * HEADS, TARGET, source, dtype=torch.float64)
    return {
        "none": None,
        "bool 2-D": causal,
        "float 2-D": bias[0].masked_fill(causal, float("-inf")),
        "bool 3-D": each,
        "float 3-D": bias.masked_fill(each, float("-inf")),
    }[kind]


def paddings(kind, batch, source):
    hidden = torch.zeros(batch, source, dtype=torch.bool)
    hidden[0, -1] = True
    hidden[-1, 2] = True
    hidden = hidden if batch > 1 else hidden[0]
    return {
        "none": None,
        "bool": hidden,
        "float": data(*hidden.shape, dtype=torch.float64).masked_fill(hidden, float("-inf")),
    }[kind]


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@pytest.mark.parametrize("mask", ["none", "bool 2-D", "float 2-D", "bool 3-D", "float 3-D"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_attention_equals_torchs(batched, batch_first, mask, padding):
    batch = BATCH if batched else 1
    for bias, training in ((True, True), (False, False)):
        module = attention(batch_first=batch_first, bias=bias).train(training)
        equal = MultiheadAttention(copy.deepcopy(module))
        assert equal.training == training

        def tokens(length, seed):
            x = data(batch, length, 12, seed=seed, dtype=torch.float64)
            if not batched:
                return x[0]
            return x if batch_first else x.transpose(0, 1)

        x, memory = tokens(TARGET, 2), tokens(SOURCE, 3)
        for query, key, value in ((x, x, x), (x, memory, memory), (x, memory, memory * 2)):
            source = TARGET if key is x else SOURCE
            for need_weights, average in itertools.product((True, False), (True, False)):
                options = {
                    "key_padding_mask": paddings(padding, batch, source),
                    "attn_mask": masks(mask, batch, source),
                    "need_weights": need_weights,
                    "average_attn_weights": average,
                }
                same(equal(query, key, value, **options), module(query, key, value, **options))


def test_attention_has_torchs_gradients():
    module = attention(batch_first=True)
    equal = MultiheadAttention(copy.deepcopy(module))
    for attend in (module, equal):
        attend(*[data(2, 5, 12, seed=4, dtype=torch.float64)] * 3)[0].square().sum().backward()
    torch.testing.assert_close(equal.in_proj.weight.grad, module.in_proj_weight.grad)
    torch.testing.assert_close(equal.in_proj.bias.grad, module.in_proj_bias.grad)
    torch.testing.assert_close(equal.out_proj.weight.grad, module.out_proj.weight.grad)


def test_a_causal_hint_needs_its_mask_as_in_torch():
    module = attention()
    equal = MultiheadAttention(copy.deepcopy(module))
    x, causal = data(5, 2, 12, dtype=torch.float64), torch.ones(5, 5, dtype=torch.bool).triu(1)
    for need_weights in (True, False):
        options = {"attn_mask": causal, "is_causal": True, "need_weights": need_weights}
        same(equal(x, x, x, **options), module(x, x, x, **options))
    with pytest.raises((ValueError, RuntimeError)):
        module(x, x, x, is_causal=True, need_weights=False)
    with pytest.raises(ValueError, match="attn_mask"):
        equal(x, x, x, is_causal=True, need_weights=False)


def test_attention_drops_out_in_training_alone():
    module = attention(dropout=0.5, batch_first=True)
    equal = MultiheadAttention(module)
    x = data(2, 5, 12, dtype=torch.float64)
    for need_weights in (True, False):
        equal.train()
        assert not torch.equal(
            equal(x, x, x, need_weights=need_weights)[0], equal(x, x, x, need_weights=need_weights)[0]
        )
        equal.eval()
        assert torch.equal(equal(x, x, x, need_weights=need_weights)[0], equal(x, x, x, need_weights=need_weights)[0])


class Attending(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.start, self.attention, self.end = nn.Linear(12, 12), attention(**options).float(), nn.Linear(12, 12)

    def forward(self, x):
        x = self.start(x)
        return self.end(x + self.attention(x, x, x)[0])


@torch.no_grad()
def outputs_alone(model, *inputs, **options):
    """The output with everything at the highest width, and with each layer alone at 2 bits."""
    bs.switch(model, WIDTHS[0])
    outputs = {}
    for name in bs.widths(model):
        with bs.switched(model, {name: 2}):
            outputs[name] = model(*inputs, **options)
    return model(*inputs, **options), outputs


def assert_every_layer_counts(model, *inputs, **options):
    base, alone = outputs_alone(model, *inputs, **options)
    for name, output in alone.items():
        assert torch.isfinite(output).all()
        assert not torch.equal(output, base), name


def test_quantize_replaces_attention_by_its_equal():
    model, x = Attending(), data(5, 2, 12)
    quantized = quiet(model, x)
    assert set(bs.widths(quantized)) == {"attention.in_proj", "attention.out_proj"}
    assert type(model.attention) is nn.MultiheadAttention
    assert_every_layer_counts(quantized, x)
    kept = bs.quantize(model, example_inputs=x, keep=["attention.out_proj"], bits=WIDTHS)
    with torch.no_grad():
        torch.testing.assert_close(kept.attention.out_proj(x), model.attention.out_proj(x))
        torch.testing.assert_close(quantized(x), model(x), rtol=0.05, atol=0.15)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(("batch_first", "norm_first"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("stacked", [False, True])
def test_encoders_in_eval_run_their_quantized_layers(stacked, batch_first, norm_first, activation, padding):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(  # torch's fused path is for an even number of heads alone
        12, 2, 16, 0.1, activation=activation, batch_first=batch_first, norm_first=norm_first
    )
    if stacked:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: nested tensors are not for this layer
            model = nn.TransformerEncoder(model, 2)
    x = data(5, 5, 12)
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    hidden[0, 3:] = True
    quantized = quiet(model.eval(), x, keep_first_last=False)
    names = {"self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"}
    names = {f"layers.{i}.{name}" for i in (0, 1) for name in names} if stacked else names
    assert set(bs.widths(quantized)) == names
    options = {"src_key_padding_mask": hidden} if padding else {}
    assert_every_layer_counts(quantized, x, **options)
    with torch.no_grad():
        got, wanted = quantized(x, **options), model(x, **options)
    if padding:  # what stands at hidden places is torch's own affair: its fused path writes zeros there
        seen = ~hidden if batch_first else ~hidden.T
        got, wanted = got[seen], wanted[seen]
    torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.2)


def test_an_encoder_whose_attention_stays_float_runs_the_rest_quantized():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True).eval()
    model.self_attn = nn.MultiheadAttention(12, 2, add_zero_attn=True, batch_first=True).eval()
    with pytest.warns(UserWarning, match="self_attn"):
        quantized = bs.quantize(model, example_inputs=data(2, 5, 12), bits=WIDTHS, keep_first_last=False)
    assert set(bs.widths(quantized)) == {"linear1", "linear2"}
    assert_every_layer_counts(quantized, data(2, 5, 12))


def test_a_decoder_runs_its_quantized_layers():
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(12, 3, 16, 0.0, batch_first=True).eval()
    inputs = data(2, 5, 12), data(2, 4, 12, seed=1)
    quantized = quiet(model, inputs, keep_first_last=False)
    assert len(bs.widths(quantized)) == 6
    assert_every_layer_counts(quantized, *inputs)
