"""The stages that train: float, joint, SuperNet."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from bitswitch import files
from bitswitch.assignment import Assignment
from bitswitch.config import QuantizedPart
from bitswitch.data import DataSet
from bitswitch.errors import UserError
from bitswitch.models import load_weights
from bitswitch.nn import Plan, apply, make_transitional, plan_of, quantized_layers
from bitswitch.pipeline.run import (
    Run,
    about,
    build_network,
    engine,
    float_network,
    from_checkpoint,
    join_ranks,
    quantized,
)
from bitswitch.pipeline.running import final_scores, train_loop, training_batches
from bitswitch.pipeline.saving import save_artifact
from bitswitch.training import (
    AssignmentSampler,
    Distillation,
    FloatObjective,
    JointObjective,
    MultiPrecisionOptimizer,
    ScaleGradients,
    WidthSampler,
    load_checkpoint,
    sensitive_layers,
)


def pretrain(run: Run, data: DataSet) -> tuple[dict[str, Any], list[Path]]:
    """Train the float network."""
    part = run.recipe.pretrain
    model = build_network(run.recipe, data)
    if part.checkpoint:
        load_weights(model, part.checkpoint)
    join_ranks(run, model.to(run.device), part)
    objective = FloatObjective(
        model, lr=part.lr, momentum=part.momentum, weight_decay=part.weight_decay, engine=engine(run, part)
    )
    batches = training_batches(run, data, part.batch_size)
    train_loop(run, data, "pretrain", objective, batches, part, [None], {"about": about(run, data)})
    (score,) = final_scores(run, data, "pretrain", model, [None])
    return {"float": score}, [run.directory.checkpoint("pretrain")]


def train(run: Run, data: DataSet) -> tuple[dict[str, Any], list[Path]]:
    """Train all widths together, and write the artifact."""
    part, widths = run.recipe.train, run.recipe.bits
    model = _start_of_training(run, data).to(run.device)
    join_ranks(run, model, part)
    observed = ScaleGradients(model) if part.record_scale_gradients else None
    teacher = _teacher(run, data, part)
    drawn = None
    if part.forwards is not None:
        drawn = WidthSampler(widths=widths, forwards=part.forwards, seed=run.recipe.seed)
    objective = joint_objective(run, part, model, teacher, observed=observed, sampler=drawn)
    extra = {"plan": plan_of(model).to_json(), "about": about(run, data)}
    batches = training_batches(run, data, part.batch_size)
    train_loop(run, data, "train", objective, batches, part, list(widths), extra, observed)
    scores = dict(zip(map(str, widths), final_scores(run, data, "train", model, list(widths)), strict=True))
    outputs = [run.directory.checkpoint("train")]
    if part.method != "double_rounding":
        run.reporter.note(
            f"train: {part.method} is for comparison and has no artifact; its checkpoint can be evaluated"
        )
        return scores, outputs
    if run.world.first:
        save_artifact(run, data, model, run.directory.artifact, part, scores)
    return scores, [*outputs, run.directory.artifact]


def supernet(run: Run, data: DataSet) -> tuple[dict[str, Any], list[Path]]:
    """Train the SuperNet from the multi-precision network, and write its artifact, without a frontier as yet."""
    part, widths = run.recipe.supernet, run.recipe.bits
    assert part is not None
    model = from_checkpoint(run, data, "train")
    if part.batch_norm == "transitional":
        make_transitional(model)
    join_ranks(run, model.to(run.device), part)
    batches = training_batches(run, data, part.batch_size)
    layers = tuple(quantized_layers(model))
    sampler = supernet_sampler(run, model, traces_of(run, layers), len(batches))
    objective = joint_objective(run, part, model, _teacher(run, data, part), sampler=sampler)
    mixtures = watched_mixtures(layers, widths, part.watched)
    extra = {"plan": plan_of(model).to_json(), "about": about(run, data)}
    train_loop(run, data, "supernet", objective, batches, part, [*widths, *mixtures], extra)
    scores = dict(zip(map(str, widths), final_scores(run, data, "supernet", model, list(widths)), strict=True))
    if run.world.first:
        save_artifact(run, data, model, run.directory.supernet, part, scores)
    # The artifact is not among the outputs: the search writes it again, with its frontier.
    return scores, [run.directory.checkpoint("supernet")]


def supernet_sampler(run: Run, model: nn.Module, traces: Mapping[str, float], steps: int) -> AssignmentSampler:
    """What draws the assignments, as the recipe says.

    Args:
        run: has the recipe.
        model: quantized.
        traces: of the Hessian, for every quantized layer.
        steps: in an epoch.
    """
    part = run.recipe.supernet
    assert part is not None
    return AssignmentSampler(
        layers=tuple(quantized_layers(model)),
        widths=run.recipe.bits,
        sensitive=sensitive_layers(traces, above=part.sensitive, cap=part.cap),
        sampling=part.sampler,
        sigma=part.sigma,
        sandwich=part.sandwich,
        seed=run.recipe.seed,
        steps=steps,
        epochs=part.epochs,
    )


def watched_mixtures(layers: tuple[str, ...], widths: tuple[int, ...], count: int) -> list[Assignment]:
    """The random assignments on which a SuperNet is followed, the same in every run: every layer drawn evenly."""
    drawn = np.random.default_rng(0).choice(np.array(widths), (count, len(layers)))
    return [Assignment(tuple(zip(layers, row, strict=True))) for row in drawn.tolist()]


def traces_of(run: Run, layers: tuple[str, ...]) -> dict[str, float]:
    """The traces of the quantized layers that the sensitivity stage found.

    Raises:
        UserError: the file is damaged, or of another network.
    """
    path = run.directory.sensitivity
    try:
        found = files.read_json(path)["layers"]
        return {name: float(found[name]["trace"]) for name in layers}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not hold the traces of this network ({error!r}): do it again with bitswitch sensitivity "
            f"{run.typed} --out {run.directory.path} --fresh"
        ) from error


def _teacher(run: Run, data: DataSet, part: QuantizedPart) -> nn.Module | None:
    return float_network(run, data).to(run.device) if part.distillation.teacher == "float" else None


def joint_objective(
    run: Run,
    part: QuantizedPart,
    model: nn.Module,
    teacher: nn.Module | None,
    *,
    observed: ScaleGradients | None = None,
    sampler: AssignmentSampler | WidthSampler | None = None,
) -> JointObjective:
    """The objective of joint or SuperNet training as the recipe says.

    Args:
        run: has the world.
        part: of the recipe.
        model: quantized.
        teacher: the float network, where the recipe's distillation asks for it.
        observed: records gradients of scales.
        sampler: draws the assignments of SuperNet training, or the widths of joint training.
    """
    optimizer = MultiPrecisionOptimizer(
        model,
        lr=part.lr,
        scale_lr=part.scale_lr,
        weight_decay=part.weight_decay,
        alrs=part.alrs,
        eta=part.eta,
        clip=part.clip,
    )
    return JointObjective(
        model,
        optimizer,
        part.order,
        distillation=Distillation(**part.distillation.model_dump()),
        teacher=teacher,
        engine=engine(run, part),
        on_gradients=observed.add if observed else None,
        sampler=sampler,
    )


def _start_of_training(run: Run, data: DataSet) -> nn.Module:
    """The quantized network: by the plan of a checkpoint where there is one, else with scales started from data."""
    network, checkpoint = float_network(run, data), run.directory.checkpoint("train")
    if checkpoint.exists():
        try:
            return apply(network, Plan.from_json(load_checkpoint(checkpoint)["plan"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"{checkpoint} is not a checkpoint of this stage: do it again with --fresh") from error
    return quantized(run, data, network, images=run.recipe.train.calibration_images)
