"""Batch normalizations per width and per pair of widths."""

import copy

import pytest
import torch
from torch import nn

import bitswitch as bs
from bitswitch.errors import UserError
from bitswitch.models import build
from bitswitch.nn import Plan, SwitchableBatchNorm, TransitionalBatchNorm, apply, make_transitional, plan_of


class Branches(nn.Module):
    """A residual block whose addition joins two convolutions, then one more convolution and the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.main, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.side, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.after, self.norm3 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.norm0(self.stem(x)).relu()
        x = (self.norm1(self.main(x)) + self.norm2(self.side(x))).relu()
        x = self.norm3(self.after(nn.functional.max_pool2d(x, 2))).relu()
        return self.head(x.mean((2, 3)))


def transitional(net=None, bits=(4, 2)):
    torch.manual_seed(0)
    return make_transitional(bs.quantize(net or Branches(), bits=bits, example_inputs=torch.randn(8, 3, 8, 8)))


def test_the_layer_before_is_the_quantized_one_that_ran_last():
    model = transitional()
    # Through the addition and the pooling: of the two branches, `side` ran last.
    assert plan_of(model).before == {"norm0": None, "norm1": None, "norm2": None, "norm3": "side"}
    assert list(model.norm3.variants) == ["4>4", "4>2", "2>4", "2>2"]
    assert list(model.norm1.variants) == ["float>4", "float>2"]


def test_a_float_layer_between_is_passed_over():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(1)
    )
    net.append(nn.Linear(16, 3))
    model = bs.quantize(net, bits=(4, 2), example_inputs=torch.randn(4, 3, 8, 8), keep=("2",))
    assert plan_of(model).before == {"4": "1"} and plan_of(model).norms == {"4": "3"}


def test_one_layer_that_runs_twice_has_equal_pairs_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.again, self.norm, self.head = (
                nn.Conv2d(3, 4, 3, padding=1),
                nn.Conv2d(4, 4, 3, padding=1),
                nn.BatchNorm2d(4),
                nn.Linear(4, 2),
            )

        def forward(self, x):
            x = self.stem(x)
            for _ in range(2):
                x = self.norm(self.again(x))
            return self.head(x.mean((2, 3)))

    model = bs.quantize(Twice(), bits=(4, 2), example_inputs=torch.randn(4, 3, 8, 8))
    norm = TransitionalBatchNorm(model.norm, model.again, model.again)
    assert list(norm.variants) == ["4>4", "2>2"]


def test_every_pair_starts_from_the_variant_of_the_width_here():
    model = bs.quantize(Branches(), bits=(4, 2), example_inputs=torch.randn(8, 3, 8, 8))
    for norm in (model.norm0, model.norm1, model.norm2, model.norm3):
        for i, variant in enumerate(norm.variants.values()):
            nn.init.constant_(variant.weight, 1.0 + i)
    x = torch.randn(2, 3, 8, 8)
    model.eval()
    before = {}
    for width in (4, 2):
        with bs.switched(model, width):
            before[width] = model(x)
    make_transitional(model)
    for width in (4, 2):
        with bs.switched(model, width):
            assert torch.equal(model(x), before[width])
    with bs.switched(model, {"side": 2, "after": 4}):
        assert model.norm3.key == "2>4" and float(model.norm3.variants["2>4"].weight[0].detach()) == 1.0
    with bs.switched(model, {"side": 4, "after": 2}):
        assert model.norm3.key == "4>2" and float(model.norm3.variants["4>2"].weight[0].detach()) == 2.0


def test_only_the_pair_in_use_learns():
    model = transitional().train()
    before = copy.deepcopy(model.state_dict())
    with bs.switched(model, {"main": 4, "side": 2, "after": 4}):
        model(torch.randn(8, 3, 8, 8)).square().sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and "variants" in name}
    assert {name.rpartition(".")[0] for name in touched} == {
        # What follows no quantized layer in the data flow follows the first.
        "norm0.variants.float>4",
        "norm1.variants.float>4",
        "norm2.variants.float>2",
        "norm3.variants.2>4",
    }
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[0] for name in moved} == {name.rpartition(".")[0] for name in touched}


def test_a_plan_makes_the_same_structure_again():
    model = transitional(build("cifar_resnet8", {"num_classes": 10}), bits=(8, 4, 2))
    plan = Plan.from_json(plan_of(model).to_json())
    again = apply(build("cifar_resnet8", {"num_classes": 10}), plan)
    again.load_state_dict(model.state_dict())
    assert plan_of(again) == plan_of(model) and plan.transitional
    x = torch.randn(2, 3, 32, 32)
    widths = {name: (8, 4, 2)[i % 3] for i, name in enumerate(plan.layers)}
    bs.switch(model, widths)
    bs.switch(again, widths)
    assert torch.equal(model.eval()(x), again.eval()(x))


def test_saved_and_loaded(tmp_path):
    model = transitional().eval()
    for norm in (model.norm1, model.norm3):
        for i, variant in enumerate(norm.variants.values()):
            nn.init.constant_(variant.running_mean, 0.1 * i)
    bs.save(model, tmp_path / "model.safetensors")
    again = bs.load(tmp_path / "model.safetensors", model=Branches())
    assert plan_of(again).transitional
    x = torch.randn(2, 3, 8, 8)
    for widths in ({"main": 4, "side": 2, "after": 4}, {"main": 2, "side": 4, "after": 2}):
        with bs.switched(model, widths), bs.switched(again, widths):
            assert torch.equal(model(x), again(x))


def test_a_copy_follows_its_own_layers():
    model = transitional()
    other = copy.deepcopy(model)
    bs.switch(other, 2)
    assert model.norm3.key == "4>4" and other.norm3.key == "2>2"


def test_a_float_model_is_refused():
    with pytest.raises(UserError, match="not a quantized model"):
        make_transitional(Branches())


def test_transitional_norms_survive_a_second_call():
    model = transitional()
    nn.init.constant_(model.norm3.variants["2>4"].weight, 7.0)
    assert float(make_transitional(model).norm3.variants["2>4"].weight[0].detach()) == 7.0


def test_hooks_and_attributes_stay_on_a_normalization_that_becomes_transitional():
    model = bs.quantize(Branches(), bits=(4, 2), example_inputs=torch.randn(8, 3, 8, 8))
    norm = next(module for module in model.modules() if isinstance(module, SwitchableBatchNorm))
    calls = []
    norm.register_forward_hook(lambda *_: calls.append(1))
    norm.note = "theirs"
    make_transitional(model)
    model(torch.randn(8, 3, 8, 8))
    assert type(norm) is TransitionalBatchNorm and calls and norm.note == "theirs"
    assert norm.key in norm.variants and len(norm.variants) == len(list(norm._keys()))


@pytest.mark.parametrize("make", [lambda model: model, make_transitional])
def test_a_momentum_that_is_set_is_every_widths(make):
    model = make(bs.quantize(Branches(), bits=(4, 2), example_inputs=torch.randn(8, 3, 8, 8)))
    model.norm1.momentum, model.norm1.eps = 0.0, 1e-3
    before = copy.deepcopy(model.norm1.state_dict())
    for width in (4, 2):
        with bs.switched(model, width):
            model.train()(torch.randn(8, 3, 8, 8))
            assert (model.norm1.momentum, model.norm1.eps) == (0.0, 1e-3)
    moved = [name for name, tensor in model.norm1.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved and all(name.endswith("num_batches_tracked") for name in moved)
