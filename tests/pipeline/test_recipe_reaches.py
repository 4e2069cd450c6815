"""What a recipe says reaches what does it: a key without effect would still stand in config.yaml and in provenance."""

from types import SimpleNamespace

import pytest

from bitswitch.config import load_recipe
from bitswitch.errors import UserError
from bitswitch.pipeline import run as rooms
from bitswitch.pipeline import subnets, training
from bitswitch.training import World


def test_a_recipe_reaches_the_supernets_sampler(monkeypatch):
    given, words = {}, {"sampler": "uniform", "sigma": 0.25, "sandwich": "true", "epochs": 3}
    recipe = load_recipe("digits", [f"supernet.{key}={value}" for key, value in words.items()], seed=7)
    monkeypatch.setattr(training, "AssignmentSampler", lambda **options: given.update(options))
    monkeypatch.setattr(training, "quantized_layers", lambda model: {"a": None, "b": None})

    run = SimpleNamespace(recipe=recipe)
    training.supernet_sampler(run, None, {"a": 1.0, "b": 2.0}, 20)
    assert given["layers"] == ("a", "b") and given["widths"] == (8, 6, 4, 2) and given["sensitive"] == {"b"}
    assert (given["sampling"], given["sigma"], given["sandwich"]) == ("uniform", 0.25, True)
    assert (given["seed"], given["steps"], given["epochs"]) == (7, 20, 3)
    run.recipe = load_recipe("digits", ["supernet.sensitive=0", "supernet.cap=0.5"])
    training.supernet_sampler(run, None, {"a": 1.0, "b": 2.0}, 20)
    assert given["sensitive"] == {"b"}
    run.recipe = load_recipe("digits", ["supernet.sensitive=0"])
    training.supernet_sampler(run, None, {"a": 1.0, "b": 2.0}, 20)
    assert given["sensitive"] == {"a", "b"}


def test_a_recipe_reaches_what_trains_the_float_network(monkeypatch):
    given, words = {}, {"lr": 0.2, "momentum": 0.8, "weight_decay": 1e-3, "batch_size": 32, "precision": "bfloat16"}

    def batches(run, data, size):
        assert size == 32
        raise UserError("enough")

    monkeypatch.setattr(training, "build_network", lambda recipe, data: SimpleNamespace(to=lambda device: None))
    monkeypatch.setattr(training, "join_ranks", lambda run, model, part: None)
    monkeypatch.setattr(training, "FloatObjective", lambda model, **options: given.update(options))
    monkeypatch.setattr(training, "training_batches", batches)
    recipe = load_recipe("digits", [f"pretrain.{key}={value}" for key, value in words.items()])
    with pytest.raises(UserError, match="enough"):
        training.pretrain(SimpleNamespace(recipe=recipe, device="cpu", world=World()), None)
    assert (given["lr"], given["momentum"], given["weight_decay"]) == (0.2, 0.8, 1e-3)
    assert given["engine"].precision == "bfloat16"


def test_a_recipe_reaches_the_start_and_the_draws_of_joint_training(monkeypatch):
    def start(run, data, network, images):
        assert images == 77
        return SimpleNamespace(to=lambda device: "model")

    def objective(run, part, model, teacher, observed, sampler):
        assert model == "model"
        assert (sampler.widths, sampler.forwards, sampler.seed) == ((8, 6, 4, 2), 3, 7)
        raise UserError("enough")

    nowhere = SimpleNamespace(exists=lambda: False)
    monkeypatch.setattr(training, "float_network", lambda run, data: None)
    monkeypatch.setattr(training, "quantized", start)
    monkeypatch.setattr(training, "join_ranks", lambda run, model, part: None)
    monkeypatch.setattr(training, "joint_objective", objective)
    recipe = load_recipe("digits", ["train.forwards=3", "train.calibration_images=77"], seed=7)
    run = SimpleNamespace(recipe=recipe, device="cpu", directory=SimpleNamespace(checkpoint=lambda stage: nowhere))
    with pytest.raises(UserError, match="enough"):
        training.train(run, None)


def test_weights_to_start_from_are_no_part_of_what_a_file_names():
    recipe = load_recipe("digits", ["model.args={weights: DEFAULT, in_channels: 1}"])
    data = SimpleNamespace(classes=("a", "b"), name="x", preprocessing=SimpleNamespace(to_json=dict))
    known = rooms.about(SimpleNamespace(recipe=recipe), data)
    assert known["network"] == {"name": "cifar_resnet8", "args": {"in_channels": 1, "num_classes": 2}}
    assert recipe.model.args["weights"] == "DEFAULT"


def test_budgets_share_the_evaluations_of_the_genetic_search(monkeypatch):
    given = []

    def refine(problem, budget, score, *, evaluations, seed):
        given.append((budget["bits"], evaluations, seed))
        return [(SimpleNamespace(assignment=str(budget), damage=budget["bits"], cost=budget), 50.0)]

    monkeypatch.setattr(subnets.room, "frontier", lambda problem, budgets: [])
    monkeypatch.setattr(subnets.room, "refine", refine)
    recipe = load_recipe("digits", ["search.genetic_evaluations=8"], seed=7)
    run, budgets = SimpleNamespace(recipe=recipe), [{"bits": bits} for bits in (3, 4, 5)]
    choices = subnets._choices(run, None, budgets, recipe.search, None)
    assert given == [(3, 3, 7), (4, 3, 7), (5, 2, 7)]
    assert [choice.damage for choice in choices] == [3, 4, 5]


def test_a_recipe_reaches_the_optimizer_and_the_objective(monkeypatch):
    given = {}
    part = {"lr": 2e-3, "scale_lr": 3e-3, "weight_decay": 1e-3, "alrs": "printed", "eta": "paper", "clip": 0.5}
    words = ["distillation={teacher: highest, temperature: 3, weight: 0.25}", "order=accumulate"]
    recipe = load_recipe("digits", [f"train.{one}" for one in (*(f"{k}={v}" for k, v in part.items()), *words)])
    monkeypatch.setattr(training, "MultiPrecisionOptimizer", lambda model, **options: given.update(options))
    monkeypatch.setattr(training, "JointObjective", lambda model, optimizer, order, **rest: (order, rest))

    order, rest = training.joint_objective(SimpleNamespace(world=World()), recipe.train, None, None)
    assert given == part and order == "accumulate"
    how = rest["distillation"]
    assert (how.teacher, how.temperature, how.weight) == ("highest", 3.0, 0.25)


def test_a_recipe_reaches_quantize_and_the_engine(monkeypatch):
    given = {}
    words = {"keep": "[a]", "method": "lsq", "per_channel": "true", "scale_form": "raw", "lsq_factor": "false"}
    engine = {"precision": "bfloat16", "channels_last": "true", "compile": "true", "micro_batches": 2}
    recipe = load_recipe(
        "digits", ["bits=[4,2]", "supernet=null", *(f"train.{k}={v}" for k, v in (words | engine).items())]
    )
    monkeypatch.setattr(rooms, "quantize", lambda network, **options: given.update(options))

    run = SimpleNamespace(recipe=recipe, world=World())
    rooms.quantized(run, SimpleNamespace(sample=lambda images: images), None, images=9)
    assert given == {
        **{"example_inputs": 9, "bits": (4, 2), "keep": ("a",), "method": "lsq"},
        **{"per_channel": True, "scale_form": "raw", "lsq_factor": False},
    }
    made = rooms.engine(run, recipe.train)
    assert (made.precision, made.channels_last, made.compile, made.micro_batches) == ("bfloat16", True, True, 2)
