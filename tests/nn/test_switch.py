import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bitswitch as bs
from bitswitch.errors import UserError
from bitswitch.nn import QuantizedLayer, assignment, make_transitional, quantized_layers

WIDTHS = (8, 4, 2)
LAYERS = ["a", "b", "c"]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a, self.norm_a = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b, self.norm_b = nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6)
        self.c = nn.Conv2d(6, 6, 1)
        self.norm_sum = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.gelu(self.stem(x))
        x = self.norm_a(self.a(x)).relu()
        x = self.norm_sum(self.norm_b(self.b(x)) + self.c(x))
        return self.head(x.mean((2, 3)))


def images(seed=0, n=6):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def labels(n=6):
    return torch.arange(n) % 4


def quantized(seed=0, bits=WIDTHS, **options):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return bs.quantize(Residual(), example_inputs=images(), bits=bits, **options)


@pytest.fixture(scope="module")
def ready():
    return quantized()


@pytest.fixture
def model(ready):
    return copy.deepcopy(ready)


@torch.no_grad()
def at(model, width, x=None):
    with bs.switched(model, width):
        return model(images() if x is None else x)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, model):
    after = model.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def test_one_width_for_all_and_some_by_name(model):
    assert bs.widths(model) == dict.fromkeys(LAYERS, 8)
    bs.switch(model, 4)
    assert bs.widths(model) == dict.fromkeys(LAYERS, 4)
    bs.switch(model, {"b": 2})
    assert bs.widths(model) == {"a": 4, "b": 2, "c": 4}
    bs.switch(model, {})
    assert bs.widths(model) == {"a": 4, "b": 2, "c": 4}
    bs.switch(model, np.int64(8))
    assert bs.widths(model) == dict.fromkeys(LAYERS, 8)


def test_an_assignment_can_be_switched_to(model):
    bs.switch(model, {"a": 2, "c": 4})
    kept = assignment(model)
    bs.switch(model, 8)
    bs.switch(model, kept)
    assert bs.widths(model) == {"a": 2, "b": 8, "c": 4}


def test_every_width_computes_something_else(model):
    model.eval()
    outputs = [at(model, width) for width in WIDTHS]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    assert torch.equal(at(model, 8), outputs[0])


def test_switching_changes_no_tensor(model):
    before = snapshot(model)
    for width in (*WIDTHS, {"a": 2}):
        bs.switch(model, width)
    assert not changed(before, model)
    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "wanted",
    [3, 16, 0, True, None, "4", {"d": 8}, {"a": 3}, {"a": 4, "d": 8}, {"a": 4, "b": 5}, {"a": 4, "b": None}, {0: 8}],
    ids=repr,
)
def test_a_mistake_changes_nothing(model, wanted):
    bs.switch(model, {"a": 2, "c": 4})
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no quantized layer|has no width|is text|is no layer"):
        bs.switch(model, wanted)
    with (
        pytest.raises(ValueError, match=r"no quantized layer|has no width|is text|is no layer"),
        bs.switched(model, wanted),
    ):
        pytest.fail("the body ran")
    assert bs.widths(model) == {"a": 2, "b": 8, "c": 4}
    assert not changed(before, model)


@pytest.mark.parametrize("transitional", [False, True])
def test_layers_are_those_that_named_modules_gives(model, transitional):
    if transitional:
        model = make_transitional(model)
    whole = nn.ModuleDict({"first": model, "again": model, "inside": nn.Sequential(model.b, nn.ReLU())})
    wanted = {name: module for name, module in whole.named_modules() if isinstance(module, QuantizedLayer)}
    assert list(wanted) == ["first.a", "first.b", "first.c"]
    assert list(quantized_layers(whole).items()) == list(wanted.items())


def test_a_model_without_quantized_layers_is_refused():
    for call in (bs.widths, lambda m: bs.switch(m, 8), lambda m: bs.switched(m, 8).__enter__()):
        with pytest.raises(ValueError, match="Residual has no quantized layer"):
            call(Residual())


def test_switched_restores_what_was(model):
    bs.switch(model, {"a": 2, "b": 4})
    with bs.switched(model, 8) as inside:
        assert inside is model
        assert set(bs.widths(model).values()) == {8}
        with bs.switched(model, {"c": 2}):
            assert bs.widths(model) == {"a": 8, "b": 8, "c": 2}
            bs.switch(model, 4)
        assert set(bs.widths(model).values()) == {8}
    assert bs.widths(model) == {"a": 2, "b": 4, "c": 8}


def test_switched_restores_after_an_exception(model):
    bs.switch(model, {"a": 2})
    with pytest.raises(KeyError), bs.switched(model, 4):
        bs.switch(model, {"b": 8})
        raise KeyError
    assert bs.widths(model) == {"a": 2, "b": 8, "c": 8}


def gradients(model):
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def equal_gradients(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] is None) == (other[name] is None), name
        assert one[name] is None or torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("wanted", [8, 4, 2, {"a": 2, "b": 8, "c": 4}], ids=str)
def test_backward_uses_the_widths_of_its_forward(model, wanted):
    model.eval()  # so that every forward sees the same statistics
    x = images().requires_grad_()

    def loss():
        return F.cross_entropy(model(x), labels())

    bs.switch(model, wanted)
    loss().backward()
    plain = gradients(model)
    plain_x, x.grad = x.grad, None
    for other in WIDTHS:
        bs.switch(model, wanted)
        late = loss()
        bs.switch(model, other)
        late.backward()
        equal_gradients(gradients(model), plain)
        assert torch.equal(x.grad, plain_x)
        x.grad = None
        with bs.switched(model, wanted):
            late = loss()
        late.backward()
        equal_gradients(gradients(model), plain)
        x.grad = None


def test_gradients_of_two_widths_differ_and_add_up(model):
    model.eval()
    alone = []
    for width in (8, 2):
        with bs.switched(model, width):
            F.cross_entropy(model(images()), labels()).backward()
        alone.append(gradients(model))
    assert not torch.equal(alone[0]["b.weight"], alone[1]["b.weight"])
    losses = []
    for width in (8, 2):
        with bs.switched(model, width):
            losses.append(F.cross_entropy(model(images()), labels()))
    sum(losses).backward()
    together = gradients(model)
    torch.testing.assert_close(together["b.weight"], alone[0]["b.weight"] + alone[1]["b.weight"])


def belongs_to(name, width):
    """Whether a tensor is one width's own: a scale, an offset, or anything in a batch normalization."""
    return f".{width}" in name.replace("variants", "") and ("quantizer" in name or "variants" in name)


def adamw(model):
    inner = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)

    def step(_width):
        inner.step()
        inner.zero_grad()

    return step


def sgd(model):
    inner = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)

    def step(_width):
        inner.step()
        inner.zero_grad()

    return step


def multi_precision(model):
    return bs.MultiPrecisionOptimizer(model, lr=3e-3, weight_decay=0.1, alrs="off").step


@pytest.mark.parametrize(
    ("make", "width", "scale_form"),
    [(make, width, "log") for make in (multi_precision, adamw, sgd) for width in WIDTHS]
    + [(multi_precision, 4, "raw"), (adamw, 2, "raw")],
)
def test_training_one_width_leaves_the_others_alone(ready, make, width, scale_form):
    model = copy.deepcopy(ready) if scale_form == "log" else quantized(scale_form="raw")
    model.train()
    step = make(model)

    def train(at_width):
        with bs.switched(model, at_width):
            loss = F.cross_entropy(model(images()), labels())
        loss.backward()
        step(at_width)

    for at_width in WIDTHS:  # momentum for everybody
        train(at_width)
    before = snapshot(model)
    for _ in range(2):
        train(width)
    moved = changed(before, model)
    for other in WIDTHS:
        own = {name for name in before if belongs_to(name, other)}
        # 2 inputs without, 1 with an offset; 3 norms of 5 tensors
        assert len(own) == 3 + sum("offset" in name for name in own) + 15
        if other == width:
            assert len(own & moved) >= len(own) - 1  # a scale may be at its optimum
        else:
            assert not own & moved
    assert {"stem.weight", "a.weight", "b.weight", "head.weight"} <= moved
    assert "a.weight_quantizer.scale_parameter" in moved


def test_inference_moves_no_statistics(model):
    model.eval()
    before = snapshot(model)
    for width in WIDTHS:
        at(model, width)
    assert not changed(before, model)


@pytest.mark.parametrize(
    ("norm", "layer"), [("norm_a", "a"), ("norm_b", "b"), ("norm_sum", "c")], ids=["a", "b", "the last of two branches"]
)
def test_a_norm_follows_the_layer_before_it(model, norm, layer):
    assert getattr(model, norm).follows is getattr(model, layer)
    model.train()
    for width in WIDTHS:
        before = snapshot(model)
        bs.switch(model, {name: width if name == layer else WIDTHS[0] for name in LAYERS})
        model(images())
        moved = {name for name in changed(before, model) if name.startswith(f"{norm}.")}
        assert moved
        assert all(f"variants.{width}." in name for name in moved)


def test_two_models_do_not_meet():
    one, two = quantized(0).eval(), quantized(1).eval()
    alone = {(i, width): at(m, width) for i, m in enumerate((one, two)) for width in WIDTHS}
    for first in WIDTHS:
        for second in WIDTHS:
            bs.switch(one, first)
            bs.switch(two, second)
            with torch.no_grad():
                assert torch.equal(one(images()), alone[0, first])
                assert torch.equal(two(images()), alone[1, second])
            assert set(bs.widths(one).values()) == {first}
    one.train()
    before = snapshot(two)
    one(images())
    assert not changed(before, two)


def test_a_deep_copy_is_independent(model):
    model.eval()
    twin = copy.deepcopy(model)
    wanted = {width: at(model, width) for width in WIDTHS}
    bs.switch(twin, 2)
    assert set(bs.widths(model).values()) == {8}
    with torch.no_grad():
        assert torch.equal(model(images()), wanted[8])
        assert torch.equal(twin(images()), wanted[2])
    bs.switch(model, 4)
    assert set(bs.widths(twin).values()) == {2}
    for norm, layer in (("norm_a", "a"), ("norm_b", "b"), ("norm_sum", "c")):
        assert getattr(twin, norm).follows is getattr(twin, layer)
        assert getattr(twin, norm).follows is not getattr(model, layer)
    before = snapshot(model)
    twin.train()(images())
    moved = changed(before, twin)
    assert moved
    assert all("variants.2." in name for name in moved)
    assert not changed(before, model)


def test_a_copy_of_a_switched_model_stands_where_it_stood(model):
    bs.switch(model, {"a": 2, "b": 4})
    assert bs.widths(copy.deepcopy(model)) == {"a": 2, "b": 4, "c": 8}


def test_a_state_dict_fits_at_any_width(model):
    other = quantized(5)
    bs.switch(model, 2)
    bs.switch(other, {"a": 4})
    other.load_state_dict(model.state_dict(), strict=True)
    assert bs.widths(other) == {"a": 4, "b": 8, "c": 8}
    for width in WIDTHS:
        assert torch.equal(at(model.eval(), width), at(other.eval(), width))


def test_a_switch_to_bits_that_are_not_loaded_changes_nothing(tmp_path, quantized, network):
    bs.save(quantized, tmp_path / "a")
    model = bs.load(tmp_path / "a", model=network, bits=4)
    before = bs.widths(model)
    first, *_, last = before
    with pytest.raises(UserError, match="8 bits are not loaded"):
        bs.switch(model, {first: 2, last: 8})
    assert bs.widths(model) == before


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile])
def test_a_wrapped_model_is_saved_and_upgraded_as_the_model_in_it(tmp_path, quantized, network, images, wrap):
    bs.save(wrap(quantized), tmp_path / "a")
    model = bs.load(tmp_path / "a", model=network, bits=2)
    wrapped = wrap(model)
    inner = wrapped.module if hasattr(wrapped, "module") else model
    bs.upgrade(wrapped, 8)
    assert set(bs.widths(inner).values()) == {8}
    assert torch.equal(inner(images), bs.load(tmp_path / "a", model=network)(images))
