import copy
import math
import threading

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import bitswitch as bs
from bitswitch import artifact, codes
from bitswitch.errors import UserError
from bitswitch.export import add_graph
from bitswitch.nn import freeze, quantized_layers
from bitswitch.nn import kept as kept_weights
from bitswitch.training import Engine

PLANES = {f"plane.{i}" for i in range(8)}


def trained(model, images, steps=3):
    optimizer = bs.MultiPrecisionOptimizer(model, lr=1e-2)
    labels = torch.arange(len(images)) % 5
    for _ in range(steps):
        for width in optimizer.widths:
            with bs.switched(model, width):
                F.cross_entropy(model(images), labels).backward()
            optimizer.step(width)
    return model.eval()


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("scale_form", ["log", "raw"])
@pytest.mark.parametrize("bits", [(8, 6, 4, 2), (4, 3, 2), (8,), (7, 5)])
def test_logits_are_equal_to_the_last_bit(tmp_path, network, images, per_channel, scale_form, bits):
    model = bs.quantize(network, example_inputs=images, bits=bits, per_channel=per_channel, scale_form=scale_form)
    trained(model, images)
    bs.save(model, tmp_path / "a")
    loaded = bs.load(tmp_path / "a", model=network)
    mixed = dict(zip(bs.widths(model), bits * 3, strict=False))
    for wanted in (*bits, mixed):
        bs.switch(model, wanted)
        bs.switch(loaded, wanted)
        assert torch.equal(model(images), loaded(images))


def test_load_stands_at_the_width_asked_for(tmp_path, quantized, network, images):
    bs.save(quantized, tmp_path / "a")
    assert set(bs.widths(bs.load(tmp_path / "a", model=network)).values()) == {8}
    assert set(bs.widths(bs.load(tmp_path / "a", bits=4, model=network)).values()) == {4}
    mixed = bs.widths(bs.load(tmp_path / "a", assignment={"conv3": 2}, model=network))
    assert mixed == {"conv2": 8, "conv3": 2, "conv4": 8}
    with pytest.raises(ValueError, match="no width 5"):
        bs.load(tmp_path / "a", bits=5, model=network)


def test_no_float_weight_of_a_quantized_layer_is_in_the_file(tmp_path, quantized):
    bs.save(quantized, tmp_path / "a")
    tensors = load_file(tmp_path / "a")
    weights = [layer.weight for layer in quantized_layers(quantized).values()]
    for name, array in tensors.items():
        assert not any(array.dtype != np.uint8 and array.size == weight.numel() for weight in weights), name


@pytest.mark.parametrize("bits", [(8, 6, 4, 2), (4, 3, 2)])
def test_the_file_is_small(tmp_path, bits):
    torch.manual_seed(0)
    model = bs.quantize(bs_resnet(), example_inputs=torch.randn(2, 3, 32, 32), bits=bits)
    bs.save(model, tmp_path / "a")
    _, tensors = artifact.read(tmp_path / "a")
    weights = sum(layer.weight.numel() for layer in quantized_layers(model).values())
    floats = sum(array.nbytes for name, array in tensors.items() if not name.endswith(".codes"))
    assert (tmp_path / "a").stat().st_size < 1.01 * (weights * bits[0] / 8 + floats) + 65536


def bs_resnet():
    from bitswitch.models import build

    return build("cifar_resnet20")


def test_every_width_is_narrowed_from_the_stored_codes(tmp_path, quantized, network):
    bs.save(quantized, tmp_path / "a")
    _, tensors = artifact.read(tmp_path / "a")
    loaded = bs.load(tmp_path / "a", model=network)
    for name, layer in quantized_layers(loaded).items():
        for width in (8, 6, 4, 2):
            narrow = codes.narrow(tensors[f"{name}.codes"], 8, width)
            expected = narrow * (tensors[f"{name}.weight_scale"] * np.float32(2 ** (8 - width)))
            assert np.array_equal(layer.weight_at(width).numpy(), expected)
            assert np.array_equal(quantized_layers(quantized)[name].weight_at(width).detach().numpy(), expected)


def test_the_header_holds_the_squared_errors(tmp_path, quantized):
    bs.save(quantized, tmp_path / "a")
    for entry in artifact.read_header(tmp_path / "a").layers:
        layer = quantized_layers(quantized)[entry.name]
        for width, error in entry.squared_error.items():
            expected = (layer.weight_at(width) - layer.weight).double().square().sum().item()
            assert math.isclose(error, expected, rel_tol=1e-4) and error == float(np.float32(error))


def test_saving_a_loaded_model_gives_the_same_file(tmp_path, quantized, network):
    bs.save(quantized, tmp_path / "a")
    bs.save(bs.load(tmp_path / "a", model=network), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_a_file_says_beside_its_tensors_is_kept(tmp_path, quantized, network):
    shipped = bs.load("resnet20-cifar10-mixed")
    bs.save(shipped, tmp_path / "a")
    header, kept = (artifact.read_header(path) for path in (artifact.located("resnet20-cifar10-mixed"), tmp_path / "a"))
    for key in ("network", "preprocessing", "classes", "provenance", "frontier"):
        assert getattr(header, key) == getattr(kept, key) and getattr(header, key), key
    bs.save(shipped, tmp_path / "a", classes=tuple("abcdefghij"), provenance={"seed": 7})
    header = artifact.read_header(tmp_path / "a")
    assert header.classes == tuple("abcdefghij") and header.provenance == {"seed": 7} and header.frontier
    with torch.no_grad():
        next(p for name, p in shipped.named_parameters() if name.endswith("bias")).add_(1)
    with pytest.warns(UserWarning, match="changed since"):
        bs.save(shipped, tmp_path / "a")
    header = artifact.read_header(tmp_path / "a")
    # What was measured is another network's.
    assert header.network and header.preprocessing and not header.provenance and not header.frontier


def test_codes_that_were_replaced_twice_are_still_others_than_the_files(tmp_path, quantized, network):
    bs.save(quantized, tmp_path / "a")
    with torch.no_grad():
        for layer in quantized_layers(quantized).values():
            layer.weight.neg_()
    bs.save(quantized, tmp_path / "b")
    loaded, other = (bs.load(tmp_path / name, model=network, bits=2) for name in "ab")
    for _ in range(2):
        loaded.load_state_dict(other.state_dict())
    with pytest.raises(UserError, match="other codes than those of"):
        bs.upgrade(loaded)


def test_a_header_that_no_reader_would_take_is_not_written(tmp_path, quantized):
    bs.save(quantized, tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(UserError, match="would exceed 16,777,216 bytes"):
        bs.save(quantized, tmp_path / "a", provenance={"note": "a" * 2**24})
    assert (tmp_path / "a").read_bytes() == before


def test_a_function_that_gives_the_network_keeps_its_own(tmp_path, quantized, network):
    bs.save(quantized, tmp_path / "a")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    loaded = bs.load(tmp_path / "a", model=lambda: network)
    assert loaded is not network and network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_what_search_returns_is_a_frontier(tmp_path, quantized, network):
    choices = bs.search(quantized, dict.fromkeys(bs.widths(quantized), 1.0), budgets=[3, 6])
    rows = [{"assignment": dict(c.assignment), "cost": dict(c.cost), "damage": c.damage} for c in choices]
    for frontier in (choices, rows):
        bs.save(quantized, tmp_path / "a", frontier=frontier)
        assert bs.widths(bs.load(tmp_path / "a", model=network, assignment="avg<=3")) == choices[-1].assignment
    with pytest.raises(UserError, match="int 4 is no choice"):
        bs.save(quantized, tmp_path / "a", frontier=[4])


def test_freezing_changes_no_logit(quantized, images):
    quantized.eval()
    before = quantized(images)
    assert torch.equal(freeze(quantized)(images), before)
    assert all(layer.weight is None for layer in quantized_layers(quantized).values())


def test_saving_does_not_change_the_model(tmp_path, quantized):
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    bs.save(quantized, tmp_path / "a")
    after = quantized.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_named_network_is_built_again(tmp_path):
    model = bs.quantize(bs_resnet(), example_inputs=torch.randn(2, 3, 32, 32)).eval()
    bs.save(model, tmp_path / "a", network={"name": "cifar_resnet20", "args": {}})
    state = torch.get_rng_state()
    loaded = bs.load(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), loaded(x))


def test_no_code_is_imported_on_the_word_of_a_file(tmp_path, quantized, network):
    bs.save(quantized, tmp_path / "a", network={"name": "os:getcwd", "args": {}})
    with pytest.raises(UserError, match="no code is imported"):
        bs.load(tmp_path / "a")
    assert bs.load(tmp_path / "a", model=network)


def test_a_file_without_a_network_asks_for_it(tmp_path, quantized):
    bs.save(quantized, tmp_path / "a")
    with pytest.raises(UserError, match="does not name its network"):
        bs.load(tmp_path / "a")


def test_another_network_is_refused(tmp_path, quantized, network):
    bs.save(quantized, tmp_path / "a")
    with pytest.raises(UserError, match="another network"):
        bs.load(tmp_path / "a", model=nn.Sequential(nn.Linear(3, 3)))
    network.conv3 = nn.Conv2d(8, 14, 1, groups=2)
    with pytest.raises(UserError, match="'conv3' has another shape"):
        bs.load(tmp_path / "a", model=network)


def test_a_different_float_part_is_refused(tmp_path, quantized, network):
    bs.save(quantized, tmp_path / "a")
    network.extra = nn.Linear(2, 2)
    with pytest.raises(UserError, match="extra"):
        bs.load(tmp_path / "a", model=network)


def test_what_cannot_be_stored_is_refused_by_name(tmp_path, quantized, network):
    with pytest.raises(UserError, match="not a quantized model"):
        bs.save(network, tmp_path / "a")
    with pytest.raises(UserError, match="float64"):
        bs.save(quantized.double(), tmp_path / "a")
    quantized.float()
    quantized.steps = torch.tensor([2**40])
    with pytest.raises(UserError, match="'steps'"):
        bs.save(quantized, tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["conv2.weight", "fc.bias"])
def test_a_diverged_model_is_refused(tmp_path, quantized, where):
    with torch.no_grad():
        quantized.get_parameter(where).view(-1)[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        bs.save(quantized, tmp_path / "a")


class Shared(nn.Module):
    """A quantized layer, a float layer and a batch normalization used twice each, and a mask."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.middle, self.norm, self.kept = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.again = nn.Sequential(self.middle, self.norm, self.kept)
        self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        x = self.kept(self.norm(self.middle(self.first(x))).relu())
        return self.last(self.again(x).relu())


def test_shared_modules_and_masks_are_stored_once(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 6)
    network = Shared()
    network(x)
    model = bs.quantize(network, example_inputs=x, keep=["kept"]).eval()
    bs.save(model, tmp_path / "a")
    tensors = load_file(tmp_path / "a")
    assert not [name for name in tensors if name.startswith("again") or "scratch" in name]
    assert "middle.weight" not in tensors and "kept.weight" in tensors
    loaded = bs.load(tmp_path / "a", model=Shared())
    for width in (8, 2):
        bs.switch(model, width)
        bs.switch(loaded, width)
        assert torch.equal(model(x), loaded(x))
    assert torch.equal(loaded.mask, network.mask)


def test_a_root_that_is_a_layer(tmp_path):
    x = torch.randn(16, 6)
    model = bs.quantize(nn.Linear(6, 4), example_inputs=x, keep_first_last=False)
    bs.save(model, tmp_path / "a")
    assert set(load_file(tmp_path / "a")) == {"weight_scale", "input_scale", "bias"} | PLANES
    assert torch.equal(bs.load(tmp_path / "a", model=nn.Linear(6, 4))(x), model(x))


@pytest.mark.parametrize("count", [3, 5])
def test_a_batch_normalization_of_another_number_of_widths(tmp_path, quantized, network, count):
    bs.save(quantized, tmp_path / "a")
    header, tensors = artifact.read(tmp_path / "a")
    tensors["bn2.bias"] = np.resize(tensors["bn2.bias"], (count, 8))
    artifact.write(tmp_path / "a", header, tensors)
    with pytest.raises(UserError, match=r"'bn2\.bias' holds"):
        bs.load(tmp_path / "a", model=network)


# Float weights that are made from the codes.


def kept(model):
    """{layer: widths whose float weight is kept, the oldest first}."""
    return {name: list(layer.kept._weights) for name, layer in quantized_layers(model).items()}


def anew(layer):
    return layer.codes * layer.weight_quantizer.scale()


@pytest.fixture
def loaded(tmp_path, quantized, network):
    bs.save(quantized, tmp_path / "a")
    return bs.load(tmp_path / "a", model=network)


def test_a_loaded_model_holds_integers_and_no_float_weight(loaded, images):
    floats = {name for name, tensor in loaded.state_dict().items() if tensor.is_floating_point()}
    assert not any(name.endswith("weight") and name.split(".")[0] in bs.widths(loaded) for name in floats)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert all(layer.weight is None and layer.codes.dtype == torch.int8 for layer in quantized_layers(loaded).values())
    assert set(map(tuple, kept(loaded).values())) == {()}
    before = set(loaded.state_dict())
    loaded(images)
    assert set(loaded.state_dict()) == before


def test_the_float_weight_of_the_width_in_use_is_kept(loaded, images):
    first = loaded(images)
    weights = {name: layer.weight_at(8) for name, layer in quantized_layers(loaded).items()}
    assert torch.equal(loaded(images), first)
    assert all(layer.weight_at(8) is weights[name] for name, layer in quantized_layers(loaded).items())
    bs.switch(loaded, 2)
    loaded(images)
    assert set(map(tuple, kept(loaded).values())) == {(2,)}


@pytest.mark.parametrize(
    ("copies", "expected"), [(-1, []), (0, []), (0.9, []), (1, [2]), (2.5, [8, 2]), (9, [6, 4, 8, 2])]
)
def test_a_budget_of_bytes(tmp_path, quantized, network, images, copies, expected):
    bs.save(quantized, tmp_path / "a")
    size = 4 * sum(layer.stored_shape.numel() for layer in quantized_layers(quantized).values())
    loaded = bs.load(tmp_path / "a", model=network, cache_bytes=int(copies * size))
    for width in (8, 6, 4, 8, 2):  # the latest used stay
        with torch.no_grad(), bs.switched(loaded, width), bs.switched(quantized.eval(), width):
            assert torch.equal(loaded(images), quantized(images))
        held = [weight for layer in quantized_layers(loaded).values() for weight in layer.kept._weights.values()]
        assert sum(weight.nbytes for weight in held) <= max(copies, 0) * size
    assert set(map(tuple, kept(loaded).values())) == {tuple(expected)}
    other = copy.deepcopy(loaded)
    for width in (8, 6, 4, 8, 2):
        with torch.no_grad(), bs.switched(other, width):
            other(images)
    assert kept(other) == kept(loaded)


def test_a_budget_of_bytes_is_any_number(tmp_path, quantized, network):
    bs.save(quantized, tmp_path / "a")
    for number in (1e7, np.int64(10**7)):
        assert bs.load(tmp_path / "a", model=network, cache_bytes=number)
    for wrong in ("x", True, float("nan")):
        with pytest.raises(UserError, match=r"cache_bytes=.*: give a number"):
            bs.load(tmp_path / "a", model=network, cache_bytes=wrong)


def test_what_is_kept_follows_its_codes_and_scales(loaded, images):
    layer = loaded.conv2
    loaded(images)
    with torch.no_grad():
        layer.weight_quantizer.scale_parameter.mul_(2)
    assert torch.equal(layer.weight_at(8), anew(layer))
    with torch.no_grad():
        layer.codes.zero_()
    assert not layer.weight_at(8).any()
    state = loaded.state_dict()
    state["conv2.codes"] = state["conv2.codes"] + 1
    loaded.load_state_dict(state)
    assert layer.weight_at(8).all()
    for name in state:
        state[name] = state[name] * 0
    loaded.load_state_dict(state, assign=True)
    assert not layer.weight_at(8).any()


def test_copies_and_other_types_make_their_own(loaded, images, tmp_path):
    expected = loaded(images)
    other = copy.deepcopy(loaded)
    assert set(map(tuple, kept(other).values())) == {()} and set(map(tuple, kept(loaded).values())) == {(8,)}
    assert torch.equal(other(images), expected)
    bs.switch(other, 2)
    assert not torch.equal(other(images), expected) and torch.equal(loaded(images), expected)
    doubled = copy.deepcopy(loaded).double()
    assert doubled.conv2.weight_at(8).dtype == torch.float64
    loaded.to(memory_format=torch.channels_last)
    assert loaded.conv2.weight_at(8).is_contiguous(memory_format=torch.channels_last)
    torch.save(other, tmp_path / "pickle")
    again = torch.load(tmp_path / "pickle", weights_only=False)
    assert bs.widths(again) == bs.widths(other) and torch.equal(again(images), other(images))


def test_a_weight_made_in_inference_mode_serves_a_backward(loaded, images):
    with torch.inference_mode():
        loaded(images)
    x = images.clone().requires_grad_()
    loaded(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_model_loaded_in_inference_mode_follows_another_state(tmp_path, quantized, network, images):
    bs.save(quantized, tmp_path / "a")
    with torch.no_grad():
        for layer in quantized_layers(quantized).values():
            layer.weight_quantizer.scale_parameter.mul_(1.5)
    bs.save(quantized, tmp_path / "b")
    with torch.inference_mode():
        loaded, other = (bs.load(tmp_path / name, model=network) for name in "ab")
        loaded(images)
        loaded.load_state_dict(other.state_dict())
        assert torch.equal(loaded(images), other(images))


def test_a_backward_after_a_switch_uses_the_widths_of_its_forward(loaded, images):
    gradients = []
    for switch_first in (True, False):
        bs.switch(loaded, 8)
        x = images.clone().requires_grad_()
        loss = loaded(x).sum()
        if switch_first:
            bs.switch(loaded, 2)
            loaded(images)
        loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_scales_of_a_loaded_model_can_learn(loaded, images):
    loaded(images)
    scale = loaded.conv2.weight_quantizer.scale_parameter.requires_grad_()
    loaded(images).sum().backward()
    assert scale.grad.abs() > 0
    with torch.no_grad():
        scale.mul_(3)
    scale.requires_grad_(False)
    assert torch.equal(loaded.conv2.weight_at(8), anew(loaded.conv2))


@pytest.mark.parametrize("width", [8, 2])
@pytest.mark.parametrize("strict", [False, True])
def test_a_fixed_width_can_be_exported(tmp_path, quantized, network, images, width, strict):
    bs.save(quantized, tmp_path / "a")
    loaded = bs.load(tmp_path / "a", bits=width, model=network)
    with torch.no_grad():
        expected = loaded(images)
        program = torch.export.export(loaded, (images,), strict=strict)
        assert torch.equal(program.module()(images), expected)
    # The graph holds the integers.
    assert program.state_dict["conv2.codes"].dtype == torch.int8 and not program.constants
    assert torch.equal(loaded(images), expected)


@pytest.mark.parametrize("grad", [False, True])
def test_a_fixed_width_can_be_compiled(loaded, images, grad):
    compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        for width in (8, 2, 8):
            bs.switch(loaded, width)
            # The same operations by other kernels: equal up to float32.
            torch.testing.assert_close(compiled(images), loaded(images), rtol=1e-5, atol=1e-5)
    assert set(map(tuple, kept(loaded).values())) == {(8,)}


def test_a_network_far_greater_than_its_file_is_not_built(tmp_path):
    model = bs.quantize(bs_resnet(), example_inputs=torch.randn(2, 3, 32, 32))
    bs.save(model, tmp_path / "a", network={"name": "cifar_resnet20", "args": {"num_classes": 10**13}})
    with pytest.raises(UserError, match=r"of 640\d+ parameters, and holds"):
        bs.load(tmp_path / "a")
    # This one cannot be built without values.
    bs.save(model, tmp_path / "a", network={"name": "regnet_y_400mf", "args": {"num_classes": 10**6}})
    with pytest.raises(UserError, match=r"of 4\d{8} parameters, and holds"):
        bs.load(tmp_path / "a")
    blocks = [[1, 8, 10**6, 1]]
    bs.save(model, tmp_path / "a", network={"name": "mobilenet_v2", "args": {"inverted_residual_setting": blocks}})
    with pytest.raises(UserError, match="parameters, and holds"):
        bs.load(tmp_path / "a")
    bs.save(model, tmp_path / "a", network={"name": "cifar_resnet20", "args": {}})
    with pytest.raises(UserError, match=r"^model='resnet50' has \d+ parameters, and .* holds \d+$"):
        bs.load(tmp_path / "a", model="resnet50")
    assert bs.load(tmp_path / "a")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_memory_is_used_again_only_where_nobody_can_hold_it(loaded, images):
    bs.switch(loaded, 8)
    with torch.no_grad():
        loaded(images)
        first = {name: layer.kept._weights[8].data_ptr() for name, layer in quantized_layers(loaded).items()}
        bs.switch(loaded, 4)
        loaded(images)
    assert first == {name: layer.kept._weights[4].data_ptr() for name, layer in quantized_layers(loaded).items()}
    lent = loaded.conv2.weight_at(4)
    before = lent.clone()
    with torch.no_grad():
        bs.switch(loaded, 2)
        traced = torch.jit.trace(loaded, images)
        expected = traced(images)
        for width in (8, 6):
            bs.switch(loaded, width)
            loaded(images)
    assert torch.equal(lent, before) and torch.equal(traced(images), expected)


def test_a_weight_that_another_thread_computes_with_is_left_alone(loaded):
    layer, held = loaded.conv2, []
    # As a forward without gradients takes it.
    thread = threading.Thread(target=lambda: held.append(layer._weight(8, lent=False)))
    thread.start()
    thread.join()
    before = held[0].clone()
    for width in (4, 8, 2):
        layer._weight(width, lent=False)
    assert torch.equal(held[0], before)


def test_a_weight_made_of_codes_that_were_replaced_meanwhile_is_not_kept(loaded, monkeypatch):
    layer, replaced, began = loaded.conv2, threading.Event(), threading.Event()
    dequantized, other = kept_weights._dequantized, layer.codes + 1

    def slowly(codes, *args, **kwargs):
        made = dequantized(codes, *args, **kwargs)
        if codes is not other:
            began.set()
            # Where threads wait for each other, the second cannot be done before this one is.
            replaced.wait(0.3)
        return made

    def weight(codes):
        return layer.kept.at(codes, layer.weight_quantizer, 8, torch.float32, lent=False)

    monkeypatch.setattr(kept_weights, "_dequantized", slowly)
    first = threading.Thread(target=weight, args=(layer.codes,))
    first.start()
    assert began.wait(60)
    expected = weight(other).clone()
    replaced.set()
    first.join()
    assert torch.equal(weight(other), expected)
    assert torch.equal(expected, other * layer.weight_quantizer.scale())


def test_a_loaded_model_is_run_by_an_engine_that_compiles(loaded, images, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    with torch.no_grad():
        assert torch.equal(Engine(compile=True).forward_of(loaded)(images), loaded(images))


def test_codes_that_come_and_go_are_not_taken_for_each_other(loaded, images):
    loaded.requires_grad_(False)
    shape, draw = loaded.conv2.codes.shape, torch.Generator().manual_seed(0)
    variants = [torch.randint(-128, 128, shape, generator=draw, dtype=torch.int8) for _ in range(8)]
    with torch.no_grad():
        found = [
            torch.func.functional_call(loaded, {"conv2.codes": one.clone()}, (images,))
            for one in variants
            for _ in "ab"
        ]
        for one, *outputs in zip(variants, found[::2], found[1::2], strict=True):
            other = copy.deepcopy(loaded)
            other.conv2.codes = one
            assert all(torch.equal(output, other(images)) for output in outputs)


@pytest.mark.parametrize("kind", ["pruned", "weight_norm", "spectral_norm"])
def test_a_weight_that_is_computed_from_others_is_not_stored(tmp_path, network, images, kind):
    model = bs.quantize(network, example_inputs=images)
    if kind == "pruned":
        prune.l1_unstructured(model.conv2, "weight", 0.5)
    else:
        getattr(torch.nn.utils.parametrizations, kind)(model.conv2)
    with pytest.raises(UserError, match="the weight of 'conv2' is computed from others"):
        bs.save(model, tmp_path / "a")
    with pytest.raises(UserError, match=r"the weight of this .*Conv2d is computed from others"):
        freeze(model)
    assert not list(tmp_path.iterdir())
    if kind == "pruned":
        prune.remove(model.conv2, "weight")
    else:
        torch.nn.utils.parametrize.remove_parametrizations(model.conv2, "weight")
    bs.save(model, tmp_path / "a")
    assert torch.equal(bs.load(tmp_path / "a", model=network)(images), model.eval()(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_outlast_half_precision(tmp_path, loaded, dtype):
    bs.save(loaded.to(dtype), tmp_path / "b")
    ours, theirs = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    scales = [name for name in ours if "scale" in name or "offset" in name]
    assert scales and all(np.array_equal(ours[name], theirs[name]) for name in scales)


def another(network, images, path):
    """The artifact of the same architecture with other weights."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.1)
    bs.save(bs.quantize(other, example_inputs=images), path)
    return path


def through_a_file(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def test_a_state_says_how_many_planes_its_codes_have(tmp_path, quantized, network, images):
    bs.save(quantized, tmp_path / "a")
    whole, part = bs.load(tmp_path / "a", model=network), bs.load(tmp_path / "a", bits=2, model=network)
    truth = whole(images)
    whole.load_state_dict(through_a_file(part.state_dict(), tmp_path / "state"))
    for use in (lambda: bs.switch(whole, 8), lambda: bs.save(whole, tmp_path / "b"), lambda: bs.upgrade(whole)):
        with pytest.raises(UserError, match=r"8 bits are not loaded|nothing to upgrade them from"):
            use()
    assert not (tmp_path / "b").exists()
    whole.load_state_dict(through_a_file(bs.load(tmp_path / "a", model=network).state_dict(), tmp_path / "state"))
    bs.switch(whole, 8)
    assert torch.equal(whole(images), truth)


def test_the_codes_of_one_file_are_not_upgraded_from_another(tmp_path, quantized, network, images):
    bs.save(quantized, tmp_path / "a")
    other = bs.load(another(network, images, tmp_path / "b"), bits=4, model=network)
    part = bs.load(tmp_path / "a", bits=2, model=network)
    part.load_state_dict(bs.load(tmp_path / "a", bits=2, model=network).state_dict())  # its own
    bs.upgrade(part, 4)
    part.load_state_dict(other.state_dict())
    assert torch.equal(part(images), other(images))
    for model in (part, copy.deepcopy(part)):
        with pytest.raises(UserError, match="nothing to upgrade them from"):
            bs.upgrade(model, 8)
        assert torch.equal(model(images), other(images))


def test_a_state_brings_the_errors_of_its_weights(tmp_path, quantized, network, images):
    bs.save(quantized, tmp_path / "a")
    other = bs.load(another(network, images, tmp_path / "b"), model=network)
    loaded = bs.load(tmp_path / "a", model=network)
    loaded.load_state_dict(other.state_dict())
    bs.save(loaded, tmp_path / "c")
    assert artifact.read_header(tmp_path / "c").layers == artifact.read_header(tmp_path / "b").layers


def test_a_state_without_its_notes_fits_the_codes_it_has_alone(tmp_path, quantized, network, images):
    bs.save(quantized, tmp_path / "a")
    loaded = bs.load(tmp_path / "a", model=network)
    loaded.load_state_dict(dict(bs.load(tmp_path / "a", model=network).state_dict()))
    other = bs.load(another(network, images, tmp_path / "b"), model=network)
    with pytest.raises(RuntimeError, match=r"conv2\.codes are others .* use bitswitch\.save"):
        loaded.load_state_dict(dict(other.state_dict()))
    assert torch.equal(loaded.conv2.codes, quantized.conv2.stored_codes())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_network_of_half_precision_comes_back(tmp_path, network, images, dtype):
    """The weights that are made from codes are of the network's type, at every width, and those of training."""
    network, images = network.to(dtype), images.to(dtype)
    model = bs.quantize(network, example_inputs=images).eval()
    bs.save(model, tmp_path / "a")
    loaded = bs.load(tmp_path / "a", model=network)
    for width in (8, 2, 6, 4, 8):
        bs.switch(model, width)
        bs.switch(loaded, width)
        assert loaded.conv2.weight_at(width).dtype == dtype
        assert torch.equal(loaded.conv2.weight_at(width), model.conv2.weight_at(width))
        assert torch.allclose(loaded(images), model(images), atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("source", ["loaded", "raw", "log"])
def test_a_model_is_turned_into_another_type(tmp_path, network, images, dtype, source):
    if source == "loaded":
        bs.save(bs.quantize(network, example_inputs=images), tmp_path / "a")
        model = bs.load(tmp_path / "a", model=network)
    else:
        model = bs.quantize(network, example_inputs=images, scale_form=source).eval()
    for width in (8, 4, 2):
        bs.switch(model, width)
        truth = model.float()(images)
        turned = copy.deepcopy(model).to(dtype)(images.to(dtype))
        assert turned.dtype == dtype
        if width == 8:
            assert torch.allclose(turned.float(), truth, atol=0.1)
    assert model.float()(images).dtype == torch.float32


def test_a_compiled_model_is_what_was_compiled(tmp_path, quantized, network):
    bs.save(quantized, tmp_path / "a")
    compiled = torch.compile(quantized, backend="eager")
    bs.save(compiled, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    bs.switch(compiled, {"conv2": 2})
    assert bs.widths(compiled) == bs.widths(quantized) and bs.widths(compiled)["conv2"] == 2
    loaded = bs.load(tmp_path / "a", model=network, bits=2)
    bs.upgrade(torch.compile(loaded, backend="eager"), 8)
    assert set(bs.widths(loaded).values()) == {8}


def test_a_layer_that_was_replaced_is_named(tmp_path, quantized):
    quantized.conv3 = nn.Conv2d(8, 12, 1, groups=2, bias=False)
    with pytest.raises(UserError, match="'conv3' of this Small is no quantized layer any more"):
        bs.save(quantized, tmp_path / "a")


def test_state_that_is_no_tensor_is_refused(tmp_path, network, images):
    class Counting(nn.GELU):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    network.gelu = Counting()
    with pytest.raises(UserError, match=r"'gelu\._extra_state' in the state is a dict"):
        bs.save(bs.quantize(network, example_inputs=images), tmp_path / "a")


def test_what_load_cannot_call_or_read_as_a_width_is_told(tmp_path, quantized):
    bs.save(quantized, tmp_path / "a")
    with pytest.raises(UserError, match=r"Linear.* cannot be called with the arguments \{\}: .*in_features"):
        bs.load(tmp_path / "a", model=nn.Linear)
    with pytest.raises(UserError, match="'4' is text: one width for all layers is a whole number, 4"):
        bs.load(tmp_path / "a", bits="4", model=nn.Linear)


def test_a_url_is_not_written(tmp_path, quantized, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("memory://h", "https://example.org/a.safetensors"):
        with pytest.raises(UserError, match="a URL is read, not written"):
            bs.save(quantized, url)
    assert not list(tmp_path.iterdir())


def test_integers_of_any_type_are_stored(tmp_path, network, images):
    network.register_buffer("order", torch.tensor([1, -2], dtype=torch.int8))
    network.register_buffer("mask", torch.tensor([True, False]))
    model = bs.quantize(network, example_inputs=images)
    bs.save(model, tmp_path / "a")
    loaded = bs.load(tmp_path / "a", model=network)
    assert loaded.order.dtype == torch.int8 and loaded.order.tolist() == [1, -2]
    assert loaded.mask.dtype == torch.bool and loaded.mask.tolist() == [True, False]


@pytest.mark.parametrize("path", ["resnet20-cifar10", "https://example.org/model.safetensors"])
def test_a_graph_is_not_added_to_what_is_not_the_users(tmp_path, monkeypatch, images, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no file of this machine's to write to"):
        add_graph(path, images)
    assert not list(tmp_path.iterdir())


def test_a_network_whose_layer_runs_another_forward_is_another(tmp_path, quantized, network, images):
    bs.save(quantized, tmp_path / "a")
    network.conv2.forward = lambda x: x
    told = "a does not fit this Small: this is another network than the one quantized: of 'conv2', its forward was replaced"
    with pytest.raises(UserError, match=told):
        bs.load(tmp_path / "a", model=network)


def test_a_quantized_model_is_not_the_network_of_a_file(tmp_path, quantized):
    bs.save(quantized, tmp_path / "a")
    with pytest.raises(UserError, match="quantized already, 'conv2' for one: give the float network"):
        bs.load(tmp_path / "a", model=quantized)
