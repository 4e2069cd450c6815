import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bitswitch.errors import UserError
from bitswitch.search.hessian import hessian_trace, worst_error


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3, bias=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.fc(F.softplus(self.norm(self.conv(x))).mean((2, 3)))))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Net().double().train()


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 2, 5, 5, generator=generator).double(), torch.arange(n) % 3) for n in (6, 6, 6)]


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def exact(model, batches):
    """The trace of every block of the whole Hessian, computed whole."""
    model.eval()
    traces = {}
    for name in ("conv", "fc", "head"):
        weight = model.get_parameter(f"{name}.weight")

        def loss(w, name=name):
            total = 0
            for x, y in batches:
                out = torch.func.functional_call(model, {f"{name}.weight": w}, (x,))
                total = total + F.cross_entropy(out, y)
            return total / len(batches)

        hessian = torch.autograd.functional.hessian(loss, weight.detach())
        traces[name] = hessian.reshape(weight.numel(), weight.numel()).trace().item()
    model.train()
    return traces


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_traces_are_the_exact_hessians(model, batches, exact, groups):
    traces = hessian_trace(model, loss_fn, batches, probes=200, groups=groups)
    assert list(traces) == ["conv", "fc", "head"]
    for name, trace in traces.items():
        assert abs(trace.mean - exact[name]) <= 3 * trace.standard_error, name
        assert 0 < trace.standard_error < 0.5 * abs(exact[name]) + 0.1


def test_standard_errors_are_honest(model, batches, exact):
    """Of 200 repeats, near 95 % of the nominal 95 % intervals hold the exact trace (t, 19 degrees of freedom)."""
    held = dict.fromkeys(exact, 0)
    for seed in range(200):
        for name, trace in hessian_trace(model, loss_fn, batches[:1], probes=20, seed=seed).items():
            held[name] += abs(trace.mean - one_batch(model, batches, name)) <= 2.093 * trace.standard_error
    assert all(180 <= count <= 198 for count in held.values()), held


_ONE = {}


def one_batch(model, batches, name):
    if name not in _ONE:
        _ONE[name] = hessian_trace_exact(model, batches[0], name)
    return _ONE[name]


def hessian_trace_exact(model, batch, name):
    model.eval()
    weight = model.get_parameter(f"{name}.weight")
    hessian = torch.autograd.functional.hessian(
        lambda w: F.cross_entropy(torch.func.functional_call(model, {f"{name}.weight": w}, (batch[0],)), batch[1]),
        weight.detach(),
    )
    model.train()
    return hessian.reshape(weight.numel(), weight.numel()).trace().item()


def test_the_model_is_left_as_it_was(model, batches):
    before = {n: t.clone() for n, t in model.state_dict().items()}
    hessian_trace(model, loss_fn, batches, probes=2)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_it_stops_at_the_target(model, batches):
    rounds = []
    traces = hessian_trace(
        model, loss_fn, batches, probes=10, target=0.15, groups=3, progress=lambda n, e: rounds.append((n, e))
    )
    assert worst_error(traces) <= 0.15 and rounds[-1][1] == worst_error(traces)
    assert all(error > 0.15 for _, error in rounds[:-1])
    few = []
    hessian_trace(model, loss_fn, batches, probes=5, target=1e-9, most_probes=10, progress=lambda n, e: few.append(n))
    assert few == [5, 10]


def test_the_same_seed_gives_the_same_probes(model, batches):
    one, same, other = (hessian_trace(model, loss_fn, batches, probes=3, seed=s) for s in (0, 0, 1))
    assert one == same != other


def test_bad_input(model, batches):
    with pytest.raises(UserError, match="did you mean 'conv'"):
        hessian_trace(model, loss_fn, batches, layers=["convv"])
    with pytest.raises(UserError, match="does not depend on layer 'unused'"):
        hessian_trace(model, loss_fn, batches, layers=["unused"])
    with pytest.raises(UserError, match="no batches"):
        hessian_trace(model, loss_fn, [])
    with pytest.raises(UserError, match="'conv' is not finite"):
        hessian_trace(model, lambda m, b: loss_fn(m, b) * torch.nan, batches, layers=["conv"])
