import copy
import functools
import json
import math
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bitswitch as bs
from bitswitch.errors import UserError
from bitswitch.nn.plan import replace_attention
from bitswitch.search import probes
from bitswitch.search.hessian import hessian_trace
from bitswitch.search.traces import Tally, Trace, degrees, trace_of, worst_error

SCRIPT = str(Path(__file__).with_name("hessian_ranks.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


class Conv(nn.Module):
    """Groups, stride, circular padding, an activation in place, and a layer that is not used."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, stride=2, groups=2)
        self.fc = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3, bias=False)
        self.unused = nn.Linear(2, 2)
        self.activation = activation()

    def forward(self, x):
        x = F.relu(self.grouped(self.activation(self.norm(self.conv(x)))), inplace=True)
        return self.head(self.activation(self.fc(x.mean((2, 3)))))


class Answer(Conv):
    """As many of transformers' models answer."""

    def forward(self, input_ids):
        return {"logits": super().forward(input_ids)}


class Keeping(Conv):
    """Its loss looks at more than the outputs."""

    def __init__(self):
        super().__init__()
        self.fc.register_forward_hook(self.keep)

    def keep(self, layer, args, output):
        self.kept = output


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = (layer(self.norm(x)).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


class Attention(nn.Module):
    """nn.MultiheadAttention reads the weight of its out_proj and never runs it; its equal of linear layers is traced."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, activation="gelu")
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class Recurrent(nn.Module):
    """A layer that runs twice, and two that share a weight."""

    def __init__(self):
        super().__init__()
        self.again, self.one, self.other, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.other.weight = self.one.weight

    def forward(self, x):
        x = torch.tanh(self.again(torch.tanh(self.again(x))))
        return self.head(torch.tanh(self.other(torch.tanh(self.one(x)))).mean(1))


class TimeFirst(nn.Module):
    """The samples are not in the first dimension of `mix`'s input."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.mix(torch.tanh(self.embed(x)).transpose(0, 1)).transpose(0, 1)
        return self.head(torch.tanh(x).mean(1))


class Force(nn.Module):
    """Its output is a derivative in its input."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 1)

    def forward(self, x):
        x = x.detach().requires_grad_()
        energy = self.head(torch.tanh(self.mix(torch.tanh(self.embed(x))))).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0].mean(1)


class Frames(nn.Module):
    """Every layer sees the frames of all samples in its first dimension; outputs are means over a sample's frames."""

    def __init__(self, outputs, activation):
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, outputs)
        self.activation = activation()

    def forward(self, x):
        frames = self.activation(self.mix(self.activation(self.embed(x.flatten(0, 1)))))
        return self.head(frames).unflatten(0, x.shape[:2]).mean(1)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def of_answer(model, batch):
    return F.cross_entropy(model(input_ids=batch[0])["logits"], batch[1])


def contrastive(model, batch):
    """Every sample against every other."""
    z = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(3 * z @ z.T, torch.arange(len(z)).roll(1))


def views(model, batch):
    """The model runs twice."""
    return F.mse_loss(model(batch[0]), model(batch[0].flip(-1))) + cross_entropy(model, batch)


def with_decay(model, batch):
    """A penalty that does not pass through the outputs."""
    return cross_entropy(model, batch) + 0.1 * sum((layer.weight**2).sum() for layer in (model.fc, model.head))


def of_kept(model, batch):
    return cross_entropy(model, batch) + (model.kept**4).mean()


def indefinite(model, batch):
    return torch.sin(2 * model(batch[0])).sum(1).mean()


def penalized(model, batch, **options):
    """A penalty on the outputs' derivative in the inputs."""
    x = batch[0].detach().requires_grad_()
    output = model(x)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True, **options)
    return F.cross_entropy(output, batch[1]) + 5 * slope.square().sum()


def images():
    generator = torch.Generator().manual_seed(1)
    sizes = (6, 6, 5)
    return [(torch.randn(n, 2, 5, 5, generator=generator).double(), torch.arange(n) % 3) for n in sizes]


def tokens():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, 6, generator=generator).double(), torch.arange(n) % 3) for n in (4, 3)]


BOTH, OUTPUT, WEIGHT = ("output", "weight"), ("output",), ("weight",)
# model, loss, batches, the kinds of probes that it must get, the samples that may have their own
CASES = {
    "relu": (Conv, cross_entropy, images, OUTPUT, 6),
    "softplus": (functools.partial(Conv, nn.Softplus), cross_entropy, images, BOTH, 6),
    "indefinite": (functools.partial(Conv, nn.Tanh), indefinite, images, BOTH, 6),
    "answer": (Answer, of_answer, images, WEIGHT, 6),
    "contrastive": (Conv, contrastive, images, OUTPUT, 1),
    "contrastive, opaque": (Conv, lambda m, b: contrastive(m.forward, b), images, WEIGHT, 1),
    "views": (Conv, views, images, WEIGHT, 1),
    "decay": (Conv, with_decay, images, WEIGHT, 6),
    "keeping": (Keeping, of_kept, images, WEIGHT, 6),
    "transformer": (Transformer, cross_entropy, tokens, BOTH, 4),
    "attention": (Attention, cross_entropy, tokens, BOTH, 4),
    "recurrent": (Recurrent, cross_entropy, tokens, WEIGHT, 4),
    "time first": (TimeFirst, cross_entropy, tokens, BOTH, 1),
    "derivative": (Force, cross_entropy, tokens, WEIGHT, 1),
    "penalty": (functools.partial(Frames, 3, nn.Softplus), penalized, tokens, WEIGHT, 1),
    "penalty, materialized": (
        functools.partial(Frames, 3, nn.Softplus),
        functools.partial(penalized, materialize_grads=True),
        tokens,
        WEIGHT,
        1,
    ),
    # As many outputs as frames, and not.
    "frames": (functools.partial(Frames, 4, nn.ReLU), cross_entropy, tokens, OUTPUT, 4),
    "frames, softplus": (functools.partial(Frames, 3, nn.Softplus), cross_entropy, tokens, BOTH, 4),
}


@functools.cache
def case(name, count=None):
    """The network, its loss and so many batches, and the trace of every block of the whole Hessian, computed whole."""
    make, loss_fn, batches, *_ = CASES[name]
    torch.manual_seed(0)
    model, batches = make().double().eval(), batches()[:count]
    replace_attention(model)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    exact = {}
    for layer in hessian_trace(model, loss_fn, batches, target=None, probes=2):
        weight = model.get_parameter(f"{layer}.weight")
        owners = [(m, n) for m in model.modules() for n, p in m.named_parameters(recurse=False) if p is weight]

        def loss(w, owners=owners, weight=weight):
            for module, name in owners:
                del module._parameters[name]
                setattr(module, name, w)
            try:
                return sum(loss_fn(model, batch) for batch in batches) / len(batches)
            finally:
                for module, name in owners:
                    delattr(module, name)
                    module.register_parameter(name, weight)

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            block = torch.autograd.functional.hessian(loss, weight.detach())
        exact[layer] = block.reshape(weight.numel(), -1).trace().item()
    return model, loss_fn, batches, exact


def close(trace, exact):
    """Within 3 standard errors; some estimates have none, but for rounding."""
    return abs(trace.mean - exact) <= 3 * trace.standard_error + 1e-9 * abs(exact)


@pytest.mark.parametrize("name", CASES)
def test_the_model_gets_the_probes_that_it_allows(name):
    model, loss_fn, batches, exact = case(name)
    layers = {layer: model.get_submodule(layer) for layer in exact}
    found = probes.prober(model, loss_fn, batches[0], layers, 0, named=True)
    assert (found.kinds, found.samples) == CASES[name][3:]
    assert len(layers) >= 3


@pytest.mark.parametrize("name", CASES)
def test_traces_are_the_exact_hessians(name):
    model, loss_fn, batches, exact = case(name)
    traces = hessian_trace(model, loss_fn, batches, target=None, probes=60, seed=1)
    assert list(traces) == [layer for layer, _ in model.named_modules() if layer in exact]
    assert all(close(trace, exact[layer]) for layer, trace in traces.items()), (traces, exact)
    total = sum(map(abs, exact.values()))
    assert all(trace.standard_error < 0.3 * total for trace in traces.values())
    assert sum(trace.standard_error > 0 for trace in traces.values()) >= 2


@pytest.mark.parametrize(("name", "target"), [("relu", 0.05), ("softplus", 0.4), ("transformer", 0.5)])
def test_traces_at_the_target_are_the_exact_hessians(name, target):
    model, loss_fn, batches, exact = case(name)
    rounds = []
    traces = hessian_trace(model, loss_fn, batches, target=target, seed=3, progress=lambda n, e: rounds.append((n, e)))
    assert all(close(trace, exact[layer]) for layer, trace in traces.items()), (traces, exact)
    assert worst_error(traces) == rounds[-1][1] <= target
    assert len(rounds) > 1 and all(error > target for _, error in rounds[:-1])


@pytest.mark.parametrize(
    ("name", "count", "layers"), [("softplus", 16, ["conv", "fc"]), ("answer", 8, ["conv", "grouped", "fc", "head"])]
)
def test_standard_errors_are_honest(name, count, layers):
    """Of 200 repeats, 90 to 99 % of the nominal 95 % intervals hold the exact trace."""
    model, loss_fn, batches, exact = case(name, 1)
    held = dict.fromkeys(layers, 0)
    for seed in range(200):
        traces = hessian_trace(model, loss_fn, batches, layers=layers, target=None, probes=count, seed=seed)
        for layer, trace in traces.items():
            held[layer] += abs(trace.mean - exact[layer]) <= 1.96 * trace.standard_error
    assert all(180 <= times <= 198 for times in held.values()), held


def test_standard_errors_are_honest_where_a_target_stops_it():
    """What stops at a small spread stops at those that are small by luck."""
    model, loss_fn, batches, exact = case("answer", 1)
    held, rounds = dict.fromkeys(["conv", "grouped", "fc", "head"], 0), []
    for seed in range(200):
        traces = hessian_trace(
            model, loss_fn, batches, layers=list(held), target=0.3, seed=seed, progress=lambda n, e: rounds.append(n)
        )
        for layer, trace in traces.items():
            held[layer] += abs(trace.mean - exact[layer]) <= 1.96 * trace.standard_error
    assert all(180 <= times <= 198 for times in held.values()), held
    assert len(rounds) > 400


def test_few_probes_widen_the_standard_error():
    """By Student's t: 12.706 in place of 1.96 at one degree of freedom."""
    job, one, many = probes.Job("weight", ("a",), 0, 2), Tally(), Tally()
    one.add(job, *probes.summary(torch.tensor([[1.0, 10.0], [3.0, 10.0]]).double()))
    assert trace_of("a", [one]) == Trace(12.0, pytest.approx(12.7062 / 1.95996, rel=1e-4))
    assert trace_of("a", [one, Tally(probes=1)]) == trace_of("a", [one])
    generator = torch.Generator().manual_seed(0)
    many.add(job, *probes.summary(torch.randn(2, 2000, generator=generator).double()))
    assert 1600 < degrees([many]) < 2400
    many.add(job, *probes.summary(torch.randn(2, 2000, generator=generator).double()))
    assert 3200 < degrees([many]) < 4800


def test_piecewise_linear_networks_take_few_probes():
    """No noise from other layers, nor from signs over weights."""
    model, loss_fn, batches, _ = case("relu")
    apart = hessian_trace(model, loss_fn, batches, target=None, probes=20)
    opaque = hessian_trace(model, lambda m, b: loss_fn(m.forward, b), batches, target=None, probes=20)
    assert worst_error(apart) < worst_error(opaque) / 4


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model, batches = Conv().double(), images()
    model.fc.eval()
    model.conv.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        free = hessian_trace(model, cross_entropy, batches, target=None, probes=2)
    assert model.training and model.norm.training and not model.fc.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv.weight"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["fc.weight"]
    assert model.fc.weight.grad.eq(1).all()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    model.conv.weight.requires_grad_(True)
    assert free == hessian_trace(model, cross_entropy, batches, target=None, probes=2)


def test_the_model_is_left_as_it_was_after_an_error():
    model = Conv().double()
    model.conv.weight.requires_grad_(False)
    with pytest.raises(RuntimeError):
        hessian_trace(model, cross_entropy, [(torch.randn(2, 3, 5, 5).double(), torch.arange(2))])
    assert model.training and not model.conv.weight.requires_grad and model.fc.weight.requires_grad
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_a_target_or_a_budget_stops_it():
    model, loss_fn, batches, _ = case("softplus")
    few = []
    hessian_trace(model, loss_fn, batches, target=1e-9, probes=12, progress=lambda n, e: few.append(n))
    assert few[0] == 5 and max(few) == 12
    two = []
    hessian_trace(model, loss_fn, batches, target=1e-9, probes=2, progress=lambda n, e: two.append(n))
    assert two == [2, 2]  # once all together, once each alone


def test_the_noise_of_other_layers_is_left_behind():
    """A layer that goes on alone does so with new probes, and without those that held other layers' noise."""
    tally, together, alone = (
        Tally(),
        probes.Job("weight", ("a", "b"), 0, 5),
        probes.Job("weight", ("a",), 5, 4),
    )
    tally.add(together, 100.0, 400.0, 900.0)
    tally.add(alone, 1.0, 4.0, 3.0)
    tally.add(probes.Job("weight", ("a",), 9, 4), 2.0, 2.0, 1.0)
    assert (tally.drawn, tally.probes, tally.total / 8, tally.of_mean()) == (13, 8, 1.5, (16 * 4 + 16 * 2) / 64)
    assert tally.uncertainty == 256 * 3 + 256 * 1


def test_worst_error():
    assert worst_error({"a": Trace(-10.0, 1.0), "b": Trace(90.0, 4.5)}) == 0.1
    # Of the sum's hundredth, where the trace is less.
    assert worst_error({"a": Trace(100.0, 0.0), "b": Trace(0.0, 0.5)}) == 0.5
    assert worst_error({"a": Trace(0.0, 0.0)}) == 0.0


def test_the_same_seed_gives_the_same_probes():
    model, loss_fn, batches, _ = case("softplus")
    run = functools.partial(hessian_trace, model, loss_fn, batches, target=None, probes=3)
    one, same, other = (run(seed=seed) for seed in (0, 0, 1))
    assert one == same != other


class Stream:
    """Batches that are made when they are asked for; counts how many there are at a time, and visits."""

    def __init__(self, batches):
        self.batches, self.visits, self.alive = batches, 0, 0

    def __iter__(self):
        self.visits += 1
        for x, y in self.batches:
            x = x.clone()
            weakref.finalize(x, self.gone)
            self.alive += 1
            assert self.alive <= 2  # the one in use, and this
            yield x, y

    def gone(self):
        self.alive -= 1


def test_batches_are_streamed():
    model, loss_fn, batches, _ = case("relu")
    stream, rounds = Stream(batches * 4), []
    traces = hessian_trace(model, loss_fn, stream, target=0.02, progress=lambda n, e: rounds.append(n))
    assert stream.visits == len(rounds) > 1
    assert traces == hessian_trace(model, loss_fn, batches * 4, target=0.02)


def test_batches_that_can_be_visited_once():
    model, loss_fn, batches, _ = case("relu")
    with pytest.raises(UserError, match="only once: give a list or a loader, or target=None"):
        hessian_trace(model, loss_fn, iter(batches))
    once = hessian_trace(model, loss_fn, iter(batches), target=None, probes=3)
    assert once == hessian_trace(model, loss_fn, batches, target=None, probes=3)


@pytest.mark.parametrize("name", ["relu", "softplus"])
def test_batches_of_one_sample(name):
    model, loss_fn, batches, _ = case(name)
    ones = [(x[None], y[None]) for x, y in zip(batches[0][0][:3], batches[0][1][:3], strict=True)]
    traces = hessian_trace(model, loss_fn, ones, target=None, probes=60)
    three = hessian_trace(model, loss_fn, [(batches[0][0][:3], batches[0][1][:3])], target=None, probes=60)
    for layer in traces:
        error = (traces[layer].standard_error ** 2 + three[layer].standard_error ** 2) ** 0.5
        assert abs(traces[layer].mean - three[layer].mean) <= 3.5 * error + 1e-9


@pytest.mark.parametrize("name", ["relu", "softplus", "recurrent"])
def test_float32(name):
    model, loss_fn, batches, exact = case(name)
    single = copy.deepcopy(model).float()
    traces = hessian_trace(single, loss_fn, [(x.float(), y) for x, y in batches], target=None, probes=60, seed=1)
    assert all(abs(t.mean - exact[n]) <= 3 * t.standard_error + 1e-5 * abs(exact[n]) for n, t in traces.items())


def test_attention_is_traced_and_searched_as_it_is_quantized():
    torch.manual_seed(0)
    model, batches = Attention(), [(x.float(), y) for x, y in tokens()]
    before = copy.deepcopy(model.state_dict())
    traces = hessian_trace(model, cross_entropy, batches, target=None, probes=2)
    quantized = bs.quantize(model, example_inputs=batches[0][0], bits=(8, 4), keep_first_last=False)
    assert traces.keys() == bs.widths(quantized).keys() >= {"encoder.self_attn.in_proj"}
    (choice,) = bs.search(quantized, traces, budgets=[8])
    assert choice.assignment.to_json().keys() == traces.keys()
    assert type(model.encoder.self_attn) is nn.MultiheadAttention
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("loss", "words"), [(lambda m, b: 1.0, "a float"), (lambda m, b: m(b[0]), r"of shape \[6, 3\]")]
)
def test_a_loss_that_is_no_number_is_told(loss, words):
    with pytest.raises(UserError, match=f"the loss is {words}: loss_fn"):
        hessian_trace(Conv().double(), loss, images())


def test_layers_by_name():
    model, loss_fn, batches, exact = case("recurrent")
    traces = hessian_trace(model, loss_fn, batches, layers=["head", "again"], target=None, probes=60)
    assert list(traces) == ["again", "head"]
    assert all(close(trace, exact[layer]) for layer, trace in traces.items())


def test_ranks_share_the_batches(tmp_path):
    seen = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        command = [sys.executable] if ranks == 1 else [*TORCHRUN, str(ranks)]
        done = subprocess.run([*command, SCRIPT, str(out)], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        seen.append([json.loads(path.read_text()) for path in sorted(out.iterdir())])
    (one,), (two, other) = seen
    assert two["traces"] == other["traces"] and two["rounds"] == one["rounds"] and len(one["rounds"]) > 1
    # The first batch, unwatched and watched, to see how the model can be probed.
    assert len(one["visited"]) == 5 * len(one["rounds"]) + 2
    assert len(two["visited"]) < len(one["visited"]) > len(other["visited"])
    for layer, (mean, error) in one["traces"].items():
        assert two["traces"][layer] == pytest.approx([mean, error], rel=1e-9)


def test_bad_input():
    model, loss_fn, batches, _ = case("relu")
    with pytest.raises(UserError, match="did you mean 'conv'"):
        hessian_trace(model, loss_fn, batches, layers=["convv"])
    with pytest.raises(UserError, match="no convolution or linear layer is named 0"):
        hessian_trace(model, loss_fn, batches, layers=(number for number in (0, 2)))
    with pytest.raises(UserError, match="does not depend on layer 'unused'"):
        hessian_trace(model, loss_fn, batches, layers=["unused", "fc"])
    with pytest.raises(UserError, match="depends on no layer's weight"):
        hessian_trace(model, lambda m, b: loss_fn(m, b).detach(), batches)
    with pytest.raises(UserError, match="no batches"):
        hessian_trace(model, loss_fn, [])
    with pytest.raises(UserError, match="probes=1: give a whole number of 2 or more"):
        hessian_trace(model, loss_fn, batches, probes=1)
    for target in (0, -1, math.nan, math.inf):
        with pytest.raises(UserError, match="target="):
            hessian_trace(model, loss_fn, batches, target=target)
    with pytest.raises(UserError, match="rank=3 is none of ranks=1"):
        hessian_trace(model, loss_fn, batches, rank=3)
    with pytest.raises(UserError, match=r"layers=\[\]"):
        hessian_trace(model, loss_fn, batches, layers=[])
    quantized = bs.quantize(Conv(), keep=("unused",), example_inputs=torch.randn(4, 2, 5, 5))
    with pytest.raises(UserError, match=r"the model is quantized.*give the float network"):
        hessian_trace(quantized, loss_fn, batches)


@pytest.mark.parametrize("name", ["relu", "softplus", "answer", "recurrent"])
@pytest.mark.parametrize("bad", [0, 1])
def test_what_is_not_finite_is_refused(name, bad):
    """In the first batch, or in a later one."""
    model, loss_fn, batches, exact = case(name)
    x, y = batches[bad]
    batches = [*batches[:bad], (x * torch.nan, y), *batches[bad + 1 :]]
    with pytest.raises(UserError, match=f"layer '{next(iter(exact))}' is not finite: check the model and the data"):
        hessian_trace(model, loss_fn, batches)


def test_a_layer_that_runs_more_often_later_is_refused():
    model, _, batches, _ = case("relu")
    again = batches[1][0]

    def loss_fn(model, batch):
        if batch[0] is again:
            model.fc(torch.randn(6, 4).double())
        return cross_entropy(model, batch)

    with pytest.raises(UserError, match="'fc' ran once on the first batch and more often on a later one"):
        hessian_trace(model, loss_fn, batches)


def test_a_layer_that_does_not_run_on_a_batch_adds_nothing():
    class Routed(Conv):
        def forward(self, x):
            return super().forward(x) if len(x) == 6 else self.head(x.mean((2, 3))[:, [0, 1, 0, 1, 0]])

    torch.manual_seed(0)
    model, batches = Routed().double(), images()
    routed = hessian_trace(model, cross_entropy, [batches[0], batches[2]], target=None, probes=40)
    alone = hessian_trace(model, cross_entropy, [batches[0]], target=None, probes=40)
    assert routed["fc"].mean == pytest.approx(alone["fc"].mean / 2)
    assert routed["head"].mean != pytest.approx(alone["head"].mean / 2)


def test_a_target_that_is_never_reached_ends_with_the_probes():
    model, loss_fn, batches, _ = case("softplus")
    assert hessian_trace(model, loss_fn, batches, target=1e-200, probes=30)


def test_a_compiled_network_is_traced_by_its_own_names():
    model, loss_fn, batches, _ = case("relu")
    compiled = hessian_trace(torch.compile(model, backend="eager"), loss_fn, batches, target=None, probes=4)
    assert compiled == hessian_trace(model, loss_fn, batches, target=None, probes=4)


def test_where_new_tensors_lie_by_default_does_not_matter():
    model, loss_fn, batches, _ = case("softplus")
    expected = hessian_trace(model, loss_fn, batches, target=None, probes=4)
    with torch.device("meta"):
        assert hessian_trace(model, loss_fn, batches, target=None, probes=4) == expected
