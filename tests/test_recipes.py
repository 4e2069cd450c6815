"""Every recipe of the paper's rows resolves, builds its network and takes two steps on stand-in data."""

import copy
import functools

import pytest
import torch

import bitswitch as bs
from accuracy import OURS, VARIANTS
from bitswitch import pipeline
from bitswitch.config import load_recipe, recipe_names, to_yaml
from bitswitch.errors import UserError
from bitswitch.models import build
from bitswitch.nn import make_transitional, quantized_layers
from bitswitch.pipeline.training import supernet_sampler
from bitswitch.rundir import RunDirectory
from bitswitch.search import bitops, layer_costs

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8)
# network: quantized layers, their parameters and MACs at 224 (32 for the CIFAR network), counted by hand: all
# convolutions (with those of shortcuts) but the first, without the last linear layer.
#   ResNet18: 11,166,912 convolution weights and 1,813,561,344 MACs, less 9,408 and 118,013,952 of the first layer (1,000
#     classes: the last linear layer's 512,000 MACs are not among the first number).
SIZES = {
    "resnet18": (19, 11_166_912 - 9_408, 1_813_561_344 - 118_013_952),
    "resnet50": (52, 23_454_912 - 9_408, 4_087_136_256 - 118_013_952),
    "mobilenet_v2": (51, 2_189_760 - 864, 299_494_272 - 10_838_016),
    "cifar_resnet20": (18, 267_696 - 432, 40_550_400 - 442_368),
}
WITHOUT_DOWNLOAD = ["model.args={}"]


def run_of(name, tmp_path, *overrides):
    recipe = load_recipe(name, [*WITHOUT_DOWNLOAD, *overrides])
    return pipeline.Run(
        name=name,
        typed=name,
        recipe=recipe,
        directory=RunDirectory(tmp_path),
        device=torch.device("cpu"),
        reporter=None,
    )


@functools.cache
def quantized(name, bits, method, keep):
    """(float network, quantized network): many recipes share them."""
    torch.manual_seed(0)
    network = build(name, {"num_classes": 10})
    return network, bs.quantize(network, example_inputs=IMAGES, bits=bits, method=method, keep=keep)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "digits"])
def test_two_steps(name, tmp_path, monkeypatch):
    monkeypatch.setattr("bitswitch.numerics.scales._SAMPLE", 1 << 10)
    run = run_of(name, tmp_path)
    method, keep = run.recipe.train.method, run.recipe.train.keep
    # A recipe of mixed precision trains as the one it extends does; what is its own is the SuperNet.
    part = run.recipe.train if run.recipe.supernet is None else run.recipe.supernet
    network, model = copy.deepcopy(quantized(run.recipe.model.name, run.recipe.bits, method, keep))
    sampler = None
    if run.recipe.supernet is not None:
        sampler = supernet_sampler(
            run, make_transitional(model), {name: i for i, name in enumerate(bs.widths(model))}, 2
        )
    teacher = network if part.distillation.teacher == "float" else None
    objective = pipeline.joint_objective(run, part, model, teacher, sampler=sampler)
    before = [p.clone() for p in model.parameters()]
    for number in range(2):
        losses = objective.step(IMAGES, LABELS, 1.0, number)
        assert losses.shape == (len(run.recipe.bits),) and losses.isfinite().all()
    moved = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    # Much of an untrained MobileNet is dead on 32 x 32 pixels; of a SuperNet's pairs few are visited in two steps.
    assert moved > (0.4 if sampler is None else 0.15) * len(before)


def test_the_rows_of_the_paper_are_there():
    found = {}
    for name in recipe_names():
        r = load_recipe(name)
        found[name] = (r.model.name, r.bits, r.train.alrs, r.train.distillation.teacher, r.train.method)
    rows = set(found.values())
    mixed = {
        (r.model.name, r.bits, r.supernet.distillation.teacher) for r in map(load_recipe, recipe_names()) if r.supernet
    }
    for network in ("resnet18", "resnet50"):
        for teacher in ("none", "float"):
            assert (network, (4, 3, 2), teacher) in mixed
        for bits in ((8, 6, 4, 2), (4, 3, 2)):
            for teacher in ("none", "float"):
                assert (network, bits, "relative", teacher, "double_rounding") in rows
    for bits in ((8, 6, 4, 2), (8, 6, 4)):
        for teacher in ("none", "float"):
            assert ("mobilenet_v2", bits, "relative", teacher, "double_rounding") in rows
    assert ("resnet50", (4, 3, 2), "relative", "none", "per_width") in rows
    for bits in ((8, 6, 4, 2), (4, 3, 2)):
        for alrs in ("relative", "off"):
            assert ("cifar_resnet20", bits, alrs, "none", "double_rounding") in rows


def test_the_papers_settings():
    for name in recipe_names():
        recipe = load_recipe(name)
        if name.startswith("imagenet"):
            assert (recipe.train.epochs, recipe.train.batch_size, recipe.pretrain.epochs) == (90, 256, 0)
        elif name.startswith("cifar10"):
            assert (recipe.train.epochs, recipe.train.batch_size) == (200, 128)
        if name != "digits":
            assert (recipe.train.lr, recipe.train.weight_decay) == (5e-4, 5e-5)


def test_a_variant_is_an_override():
    one = load_recipe("cifar10-resnet20", ["bits=[4]", "train.method=lsq"])
    assert one.bits == (4,) and one.train.method == "lsq"


@pytest.mark.parametrize(
    ("name", "decided"), [("cifar10-resnet20-best", OURS), ("cifar10-resnet20-432-best", f"{OURS}-hot-432")]
)
def test_the_best_recipes_are_those_that_were_decided(name, decided):
    assert load_recipe(name, ["train.epochs=15"]) == load_recipe(
        "cifar10-resnet20", [*VARIANTS[decided], "train.epochs=15"]
    )


@pytest.mark.parametrize("name", SIZES)
def test_what_the_paper_quantizes_is_quantized(name, monkeypatch):
    monkeypatch.setattr("bitswitch.numerics.scales._SAMPLE", 1 << 10)
    side = 32 if name.startswith("cifar") else 224
    x = torch.randn(1, 3, side, side)
    model = bs.quantize(build(name), example_inputs=x)
    layers, weights, macs = SIZES[name]
    costs = layer_costs(model, (x,))
    assert len(costs) == layers
    assert sum(cost.weights for cost in costs.values()) == weights
    assert sum(cost.macs for cost in costs.values()) == macs
    for width in (8, 6, 4, 2):
        assert bitops(costs, dict.fromkeys(costs, width)) == macs * width**2


def test_mobilenets_bottlenecks_keep_both_signs():
    """Inputs of expansion layers come from a linear layer: an unsigned quantizer would clip half of them."""
    torch.manual_seed(0)
    network = build("mobilenet_v2").train()
    with torch.no_grad():
        for _ in range(20):
            network(IMAGES)
    model = bs.quantize(network, example_inputs=IMAGES)
    seen = {}
    for name, layer in quantized_layers(model).items():
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: (m, args[0])}))
    with torch.no_grad():
        model.eval()(IMAGES)
    two_sided = 0
    for layer, x in seen.values():
        if bool((x < 0).any()):
            two_sided += 1
            assert layer.input_quantizer.kind in ("signed", "zero_point")
            negative = x[x < 0]
            kept = layer.input_quantizer(x, 8)[x < 0]
            assert float((kept - negative).norm() / negative.norm()) < 0.1
    assert two_sided == 17


def test_a_merged_mapping_is_no_key_said_twice(tmp_path):
    text = (
        "extends: digits\nmodel:\n  args:\n    common: &c {width: 8, depth: 2}\n    stages: [{first: &f {<<: *c, width: 16}}]\n"
        "    head: {<<: *f, classes: 10}\n"
    )
    (tmp_path / "a.yaml").write_text(text)
    args = load_recipe(str(tmp_path / "a.yaml")).model.args
    assert args["head"] == {"width": 16, "depth": 2, "classes": 10}
    (tmp_path / "a.yaml").write_text(f"{text}    head: 3\n")
    with pytest.raises(UserError, match="the key 'head' is there twice"):
        load_recipe(str(tmp_path / "a.yaml"))


def test_recipes_extend_one_another(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: cifar10-resnet20\ntrain: {epochs: 3}\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\ntrain: {lr: 1.0e-2}\n")
    recipe = load_recipe(str(tmp_path / "b.yaml"))
    assert (recipe.train.epochs, recipe.train.lr, recipe.model.name) == (3, 1e-2, "cifar_resnet20")
    (tmp_path / "c.yaml").write_text(to_yaml(recipe))
    assert load_recipe(str(tmp_path / "c.yaml")) == recipe
    (tmp_path / "d.yaml").write_text("extends: d.yaml\n")
    with pytest.raises(UserError, match="extends"):
        load_recipe(str(tmp_path / "d.yaml"))
    (tmp_path / "e.yaml").write_text("extends: nothing\n")
    with pytest.raises(UserError, match="no recipe is named 'nothing'"):
        load_recipe(str(tmp_path / "e.yaml"))
