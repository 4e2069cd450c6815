"""What SuperNet training draws."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn
from torch.nn import functional as F

import bitswitch as bs
from bitswitch.errors import UserError
from bitswitch.nn import make_transitional, switched
from bitswitch.training import (
    AssignmentSampler,
    Distillation,
    JointObjective,
    MultiPrecisionOptimizer,
    WidthSampler,
    sensitive_layers,
)

LAYERS = ("a", "b", "c", "d")


def sampler(**changes):
    given_ = {
        "layers": LAYERS,
        "widths": (4, 3, 2),
        "sensitive": frozenset({"b"}),
        "sampling": "hasb",
        "sigma": 0.5,
        "sandwich": False,
        "seed": 3,
        "steps": 500,
        "epochs": 4,
    }
    return AssignmentSampler(**given_ | changes)


def expected(one, layer, base, epoch):
    """The stated probability of each width, written down anew."""
    n = len(one.widths)
    if one.sampling == "hasb" and layer in one.sensitive:
        wheel = np.array([width / sum(one.widths) for width in one.widths])
    else:
        wheel = np.full(n, 1 / n)
    if base is None:
        return wheel
    sigma = one.sigma * (epoch + 1) / one.epochs if one.sampling != "fixed" else 0.0
    return sigma * wheel + (1 - sigma) * (np.array(one.widths) == base)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("sampling", ["hasb", "uniform"])
@pytest.mark.parametrize("widths", [(4, 3, 2), (8, 6, 4, 2)])
def test_frequencies_are_those_stated(sigma, sampling, widths):
    one = sampler(sigma=sigma, sampling=sampling, widths=widths)
    values = []
    for epoch in range(one.epochs):
        draws = [one.draw(epoch * one.steps + step) for step in range(one.steps)]
        for forward, base in enumerate(widths):
            for layer in LAYERS:
                counts = np.array([sum(d[forward][1][layer] == w for d in draws) for w in widths])
                values.append(chisquare(counts, len(draws) * expected(one, layer, base, epoch)).pvalue)
    # A right sampler's p-values are uniform: the least of n falls below 0.001 / n once in a thousand seeds.
    assert min(values) > 0.001 / len(values)
    assert 0.35 < np.mean(values) < 0.65


def test_sensitive_and_other_layers_differ():
    one = sampler(sigma=1.0, steps=2000, epochs=1)
    counts = {name: np.zeros(3) for name in LAYERS}
    for step in range(2000):
        for _, drawn in one.draw(step):
            for name, width in drawn.items():
                counts[name][one.widths.index(width)] += 1
    assert chisquare(counts["b"], 6000 * np.array([4, 3, 2]) / 9).pvalue > 0.001
    assert chisquare(counts["a"], 6000 * np.ones(3) / 3).pvalue > 0.001
    assert chisquare(counts["b"], 6000 * np.ones(3) / 3).pvalue < 1e-6


def test_sandwich_visits_the_ends():
    one = sampler(sandwich=True, sigma=0.0)
    assert one.names == ("4", "random", "2")
    seen = set()
    for step in range(50):
        (high, top), (base, middle), (low, bottom) = one.draw(step)
        assert (high, base, low) == (4, None, 2)
        assert top.uniform == 4 and bottom.uniform == 2
        seen.add(middle)
    assert len(seen) > 20


def test_fixed_draws_nothing():
    one = sampler(sampling="fixed", sigma=1.0)
    assert [a.uniform for step in range(20) for _, a in one.draw(step)] == [4, 3, 2] * 20


def test_the_wheel_grows_with_the_epochs():
    one = sampler(sigma=1.0, epochs=10, steps=200)
    mixed = [
        np.mean([a.uniform is None for step in range(200) for _, a in one.draw(epoch * 200 + step)])
        for epoch in (0, 4, 9)
    ]
    assert mixed[0] < mixed[1] < mixed[2]


@given(st.integers(0, 2**31 - 1), st.integers(0, 10**7))
def test_a_draw_depends_on_seed_and_step_alone(seed, step):
    one = sampler(seed=seed, epochs=10**7, steps=1, sigma=1.0)
    before = one.draw(step)
    one.draw(step + 1)
    np.random.seed(0)
    torch.manual_seed(1)
    assert sampler(seed=seed, epochs=10**7, steps=1, sigma=1.0).draw(step) == before


def test_seeds_and_steps_differ():
    one = sampler(sigma=1.0, epochs=1)
    assert one.draw(0) != one.draw(1)
    assert one.draw(0) != dataclasses.replace(one, seed=4).draw(0)


@pytest.mark.parametrize(
    ("above", "cap", "names"),
    [
        ("mean", 1.0, "cd"),
        (0.0, 1.0, "abcd"),
        (1.0, 1.0, "d"),
        (0.5, 1.0, "cd"),
        (0.0, 0.5, "cd"),
        ("mean", 0.3, "d"),
        ("mean", 0.0, ""),
    ],
)
def test_sensitive_layers(above, cap, names):
    traces = {"a": 0.0, "b": 1.0, "c": 5.0, "d": 7.0}
    assert sensitive_layers(traces, above=above, cap=cap) == set(names)


def test_equal_traces_are_all_at_the_mean_and_a_cap_bounds_them():
    traces = dict.fromkeys(LAYERS, 2.0)
    assert len(sensitive_layers(traces)) == 4 and len(sensitive_layers(traces, cap=0.5)) == 2
    # The mean of three numbers of 0.1 is above 0.1.
    assert len(sensitive_layers(dict.fromkeys("abc", 0.1))) == 3
    assert len(sensitive_layers({str(i): 1.0 for i in range(100)}, cap=0.29)) == 29
    for wrong in ({"cap": -0.5}, {"cap": 1.5}, {"above": 2.0}, {"above": "median"}):
        with pytest.raises(UserError, match="give a number from 0 to 1"):
            sensitive_layers(traces, **wrong)


@pytest.mark.parametrize("traces", [{}, {"a": float("nan"), "b": 1.0}])
def test_no_traces(traces):
    with pytest.raises(UserError, match="sensitivity stage again"):
        sensitive_layers(traces)


def supernet(**changes):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip
    x, y = torch.randn(16, 1, 8, 8), torch.randint(3, (16,))
    net(x)
    model = make_transitional(bs.quantize(net, bits=(8, 4, 2), example_inputs=x))
    drawn = sampler(layers=tuple(bs.widths(model)), widths=(8, 4, 2), sensitive=frozenset({"3"}), **changes)
    return model, drawn, x, y


def test_a_step_is_the_forwards_that_were_drawn():
    model, drawn, x, y = supernet(sigma=1.0, epochs=1)
    other, _, _, _ = supernet()
    objective = JointObjective(model, MultiPrecisionOptimizer(model, alrs="off"), sampler=drawn)
    losses = [objective.step(x, y, 0.5, number) for number in (7, 8)]
    by_hand = MultiPrecisionOptimizer(other, alrs="off")
    by_hand.factor = 0.5
    other.train()
    for number, seen in zip((7, 8), losses, strict=True):
        for (width, assignment), loss in zip(drawn.draw(number), seen, strict=True):
            with switched(other, assignment):
                expected_loss = F.cross_entropy(other(x), y)
            expected_loss.backward()
            by_hand.step(width, mixed=True)
            assert torch.equal(expected_loss.detach(), loss)
    for (name, mine), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_mixed_forward_leaves_the_widths_it_did_not_use_alone():
    model, _, x, y = supernet()
    optimizer = MultiPrecisionOptimizer(model)
    names = list(bs.widths(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with switched(model, dict(zip(names, (8, 2, 8), strict=True))):
        F.cross_entropy(model.train()(x), y).backward()
    optimizer.step(8, mixed=True)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    scales = {name for name in moved if "input_quantizer" in name}
    assert scales == {f"{name}.input_quantizer.scale_parameter.{w}" for name, w in zip(names, (8, 2, 8), strict=True)}
    norms = {name.split("variants.")[1].split(".")[0] for name in moved if "variants" in name}
    # The last layer has no batch normalization after it.
    assert norms == {"float>8", "8>2"}


def test_mixed_scales_move_at_the_rates_of_their_widths():
    rates = {8: 1.0, 4: 0.1, 2: 0.01}
    model, _, x, y = supernet()
    optimizer = MultiPrecisionOptimizer(model, lr=1e-2, eta=rates, alrs="relative", clip=1e9)
    names = list(bs.widths(model))
    start = {name: value.clone() for name, value in model.named_parameters()}
    with switched(model, dict(zip(names, (8, 2, 4), strict=True))):
        # Large enough that Adam's epsilon does not matter.
        (1e3 * F.cross_entropy(model.train()(x), y)).backward()
    peaks = {
        w: min(1.0, abs(float(dict(model.named_parameters())[f"{n}.input_quantizer.scale_parameter.{w}"].grad)))
        for n, w in zip(names, (8, 2, 4), strict=True)
    }
    optimizer.step(4, mixed=True)
    now = dict(model.named_parameters())
    for name, width in zip(names, (8, 2, 4), strict=True):
        key = f"{name}.input_quantizer.scale_parameter.{width}"
        # Adam's first step is the rate itself, whatever the gradient.
        assert abs(float((now[key] - start[key]).detach())) == pytest.approx(
            1e-2 * rates[width] * (1 - peaks[width]), rel=1e-3
        )


def taught_in_a_step(model, drawn, number, x, y):
    """What the teacher said to every forward of a step, and what the network says at its highest width before it."""
    seen = []

    class Spy(Distillation):
        def loss(self, logits, labels, taught):
            seen.append(taught)
            return super().loss(logits, labels, taught)

    objective = JointObjective(
        model, MultiPrecisionOptimizer(model), sampler=drawn, distillation=Spy(teacher="highest", weight=0.5)
    )
    with switched(model.train(), 8), torch.no_grad():
        highest = model(x)
    objective.step(x, y, 1.0, number)
    return seen, highest


def test_the_highest_width_teaches_a_supernet():
    model, drawn, x, y = supernet(sigma=1.0, epochs=1)
    number = next(n for n in range(50) if drawn.draw(n)[0][1].uniform is None)
    seen, highest = taught_in_a_step(model, drawn, number, x, y)
    assert len(seen) == 3 and all(torch.equal(taught, highest) for taught in seen)


def test_the_highest_width_teaches_steps_that_do_not_draw_it():
    model, _, x, y = supernet()
    drawn = WidthSampler(widths=(8, 4, 2), forwards=2, seed=0)
    number = next(n for n in range(50) if drawn.draw(n)[0][0] == 4)
    seen, highest = taught_in_a_step(model, drawn, number, x, y)
    assert len(seen) == 2 and all(torch.equal(taught, highest) for taught in seen)


@pytest.mark.parametrize("forwards", [1, 2, 3, 4])
def test_the_lowest_width_is_always_drawn_and_the_others_evenly(forwards):
    widths = (8, 6, 4, 2)
    drawn = WidthSampler(widths=widths, forwards=forwards, seed=3)
    steps = [drawn.draw(step) for step in range(3000)]
    for visits in steps:
        stands, has = zip(*visits, strict=True)
        assert stands == has == tuple(sorted(set(stands), reverse=True)) and len(visits) == forwards == len(drawn.names)
        assert stands[-1] == 2
    counts = [sum((width, width) in visits for visits in steps) for width in widths[:-1]]
    if forwards > 1:
        assert chisquare(counts).pvalue > 1e-3
    assert drawn.draw(7) == WidthSampler(widths=widths, forwards=forwards, seed=3).draw(7)
    if 1 < forwards < 4:
        other = WidthSampler(widths=widths, forwards=forwards, seed=4)
        assert any(other.draw(step) != visits for step, visits in enumerate(steps))


def test_a_step_moves_the_scales_of_the_widths_that_were_drawn_and_no_others():
    model, _, x, y = supernet()
    drawn = WidthSampler(widths=(8, 4, 2), forwards=2, seed=0)
    objective = JointObjective(model, MultiPrecisionOptimizer(model, alrs="off"), sampler=drawn)
    before = {name: value.clone() for name, value in model.named_parameters() if "input_quantizer.scale" in name}
    losses = objective.step(x, y, 1.0, 0)
    taken = {str(width) for width, _ in drawn.draw(0)}
    now = dict(model.named_parameters())
    assert losses.shape == (2,) and len(taken) == 2
    for name, value in before.items():
        assert torch.equal(now[name], value) == (name.rpartition(".")[2] not in taken), name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sampling": "fixed", "sandwich": True}, "sandwich=True draws its middle forward"),
        ({"sigma": 2}, "sigma=2: a share of layers is from 0 to 1"),
        ({"sigma": "1"}, "sigma='1': give a number"),
        ({"sensitive": frozenset({"e"})}, "sensitive: no layer is named 'e'"),
    ],
)
def test_what_cannot_be_drawn_is_told(changes, told):
    with pytest.raises(UserError, match=told):
        sampler(**changes)


def test_a_cap_of_less_than_a_layer_is_told():
    """HASB would draw as uniform sampling does."""
    for count in (3, 7, 9, 12):
        traces = {str(i): float(i) for i in range(count)}
        with pytest.raises(UserError, match=f"of {count} layers is less than one: use ") as caught:
            sensitive_layers(traces, cap=0.9 / count)
        least = float(str(caught.value).partition("use ")[2].partition(" ")[0])
        assert sensitive_layers(traces, cap=least) == {str(count - 1)} and not sensitive_layers(traces, cap=0)


def test_a_step_over_all_widths_draws_none():
    one = WidthSampler(widths=(8, 6, 4, 2), forwards=4, seed=0)
    assert one.names == ("8", "6", "4", "2") and one.draw(5) == [(width, width) for width in (8, 6, 4, 2)]
