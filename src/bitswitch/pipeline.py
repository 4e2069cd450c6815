"""The stages, each reading the run directory and writing to it."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from bitswitch import files
from bitswitch.config import EnginePart, Recipe, to_yaml
from bitswitch.data import DataSet, load_data
from bitswitch.errors import UserError
from bitswitch.export import load, save
from bitswitch.machine import machine, source_commit
from bitswitch.models import build, load_weights
from bitswitch.nn import Plan, apply, plan_of, quantize, switched
from bitswitch.rundir import RunDirectory, changes
from bitswitch.training import (
    Distillation,
    Engine,
    FloatObjective,
    JointObjective,
    Loop,
    MultiPrecisionOptimizer,
    Objective,
    ScaleGradients,
    World,
    evaluate,
    load_checkpoint,
)
from bitswitch.training.distributed import barrier, broadcast_model, from_first, share_batch_norm

STAGES = ("pretrain", "train")
# Where data lie and how they are read: no result depends on it. What they are counts, by their fingerprint.
_NOT_OF_THE_RESULT = ("root", "download", "workers", "cache")
_EVALUATION_BATCH = 256


class Reporter(Protocol):
    """Where a run tells how it goes."""

    def note(self, text: str) -> None:
        """A line."""

    def progress(self, stage: str, steps: int, done: int) -> AbstractContextManager[Callable[[str], None]]:
        """A progress bar over all steps of a stage; the function it gives advances by one and shows a text."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the stages of one command share.

    Attributes:
        name: of the recipe, for provenance.
        recipe: the checked configuration.
        directory: where results go.
        device: where tensors live.
        reporter: where the run tells how it goes; silent on ranks other than the first.
        world: this process among the others.
        tensorboard: write metrics for TensorBoard, too.
    """

    name: str
    recipe: Recipe
    directory: RunDirectory
    device: torch.device
    reporter: Reporter
    world: World = field(default_factory=World)
    tensorboard: bool = False


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, else the CPU; "cuda" is the rank's own GPU.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"--device {name}: bitswitch computes on cpu or cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: there is no such device here; use cpu") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def execute(run: Run, stages: Sequence[str], *, fresh: bool = False) -> dict[str, Any]:
    """Do the stages that are not done yet, in order.

    Args:
        run: configuration, directory, device.
        stages: of `STAGES`, in their order.
        fresh: do these stages again whatever is there.

    Returns:
        {stage: its record}.

    Raises:
        UserError: a stage before these is not done; the configuration or an input has changed since a stage was made.
    """
    if not run.world.first:
        # The first rank decodes and fills the cache.
        barrier()
    data = open_data(run.recipe)
    if run.world.first:
        barrier()
    with run.directory.locked() if run.world.first else nullcontext():
        if run.world.first:
            _prepare(run, data, stages, fresh)
        for stage in stages:
            _do(run, data, stage)
        return run.directory.records()


def open_data(recipe: Recipe) -> DataSet:
    """The recipe's data, with its own mean and standard deviation where the recipe gives them."""
    part = recipe.data.model_dump()
    own: dict[str, Any] = {key: tuple(value) for key in ("mean", "std") if (value := part.pop(key)) is not None}
    data = load_data(**part)
    return data.with_preprocessing(dataclasses.replace(data.preprocessing, **own)) if own else data


def _prepare(run: Run, data: DataSet, stages: Sequence[str], fresh: bool) -> None:
    """Refuse what cannot be done before anything is changed; then note what is asked for."""
    if strangers := run.directory.strangers():
        raise UserError(
            f"{run.directory.path} holds {strangers[0]} but no record of a run (stages.json): use an empty or new --out"
        )
    records = {} if fresh and tuple(stages) == STAGES else run.directory.records()
    forgotten = set(stages) if fresh else set()
    records = {stage: record for stage, record in records.items() if stage not in forgotten}
    for stage in STAGES[: STAGES.index(stages[-1]) + 1]:
        _check_same(run, data, stage, records)
        if stage not in stages and not _is_done(run, records.get(stage)):
            raise UserError(f"stage {stage} is not done in {run.directory.path}: bitswitch {stage} {run.name} does it")
    if not _is_done(run, records.get("pretrain")):
        _check_network(run, data, quantizable="train" in stages)
    run.directory.write_records(records)
    files.write(run.directory.path / "config.yaml", to_yaml(run.recipe).encode())


def _check_network(run: Run, data: DataSet, *, quantizable: bool) -> None:
    """Refuse a network that does not fit the data, or cannot be quantized, before hours are spent on it."""
    network, images = build_network(run.recipe, data).eval(), data.sample(2)
    if run.recipe.pretrain.checkpoint:
        load_weights(network, run.recipe.pretrain.checkpoint)
    try:
        with torch.no_grad():
            logits = network(images)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{run.recipe.model.name} cannot take images of {list(images.shape[1:])}: {reason}") from error
    if logits.dim() != 2 or logits.shape[1] != len(data.classes):
        raise UserError(
            f"{run.recipe.model.name} gives {list(logits.shape[1:])} outputs for an image, {data.name} has "
            f"{len(data.classes)} classes: set the number of classes in model.args"
        )
    if quantizable:
        _quantized(run, data, network, images=2)


def _config(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The part of the configuration that a stage's result depends on."""
    # A starting checkpoint counts by its content, among the inputs.
    elsewhere = {"data": set(_NOT_OF_THE_RESULT), "pretrain": {"checkpoint"}, "train": {"record_scale_gradients"}}
    whole = recipe.model_dump(mode="json", exclude=elsewhere)
    keys = {"pretrain": ("seed", "model", "data", "pretrain"), "train": ("seed", "bits", "model", "data", "train")}
    return {key: whole[key] for key in keys[stage]}


def _inputs(run: Run, data: DataSet, stage: str) -> dict[str, str]:
    """Digests of what a stage reads."""
    inputs = {"data": data.fingerprint()}
    before = run.directory.checkpoint("pretrain")
    if stage == "train" and before.exists():
        inputs["pretrain"] = files.file_digest(before)
    if stage == "pretrain" and run.recipe.pretrain.checkpoint:
        path = Path(run.recipe.pretrain.checkpoint)
        if not path.is_file():
            raise UserError(f"pretrain.checkpoint={path}: there is no such file")
        inputs["checkpoint"] = files.file_digest(path)
    return inputs


def _check_same(run: Run, data: DataSet, stage: str, records: Mapping[str, Any]) -> None:
    """Refuse where a stage, done or begun, was made from something else than is asked for now."""
    record = records.get(stage)
    if record is None:
        return
    found = changes(record["config"], _config(run.recipe, stage))
    if record["inputs"]["data"] != data.fingerprint():
        found.append("the data are others")
    if found:
        raise UserError(
            f"{run.directory.path} holds a {stage} stage made otherwise ({'; '.join(found)}): "
            f"do it again with --fresh, or use another --out"
        )


def _is_done(run: Run, record: Mapping[str, Any] | None) -> bool:
    if record is None or not record["done"]:
        return False
    return all((run.directory.path / name).exists() for name in record["outputs"])


def _do(run: Run, data: DataSet, stage: str) -> None:
    """Do one stage, take it up where it was left, or skip it."""
    begun = _begin(run, data, stage) if run.world.first else None
    if not from_first(begun is not None, run.world):
        return
    torch.manual_seed(run.recipe.seed)
    try:
        result, outputs = {"pretrain": _pretrain, "train": _train}[stage](run, data)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{run.device} is out of memory in stage {stage}: raise {stage}.micro_batches (now "
            f"{getattr(run.recipe, stage).micro_batches}), lower {stage}.batch_size, or set {stage}.precision=bfloat16"
        ) from error
    if begun is not None:
        digests = {str(path.relative_to(run.directory.path)): files.file_digest(path) for path in outputs}
        run.directory.record(stage, begun | {"done": True, "outputs": digests, "result": result})
    barrier()


def _begin(run: Run, data: DataSet, stage: str) -> dict[str, Any] | None:
    """Note that a stage is begun, and return its record; None where it is done."""
    record = run.directory.records().get(stage)
    inputs = _inputs(run, data, stage)
    if record is None:
        run.directory.checkpoint(stage).unlink(missing_ok=True)
    elif record["inputs"] != inputs:
        raise UserError(
            f"{run.directory.path}: the {stage} stage was made from other inputs than are there now "
            f"({'; '.join(changes(record['inputs'], inputs))}): do it again with bitswitch {stage} {run.name} --fresh"
        )
    elif _is_done(run, record):
        for name, digest in record["outputs"].items():
            if files.file_digest(run.directory.path / name) != digest:
                raise UserError(f"{run.directory.path / name} was changed since it was made: do {stage} --fresh")
        run.reporter.note(f"{stage}: done before, skipped")
        return None
    begun = {"done": False, "config": _config(run.recipe, stage), "inputs": inputs, "outputs": {}, "result": None}
    run.directory.record(stage, begun)
    return begun


def _engine(run: Run, part: EnginePart) -> Engine:
    return Engine(
        precision=part.precision,
        channels_last=part.channels_last,
        compile=part.compile,
        micro_batches=part.micro_batches,
        world=run.world,
    )


def _pretrain(run: Run, data: DataSet) -> tuple[dict[str, Any], list[Path]]:
    part = run.recipe.pretrain
    model = build_network(run.recipe, data)
    if part.checkpoint:
        load_weights(model, part.checkpoint)
    _join_ranks(run, model.to(run.device), part)
    objective = FloatObjective(
        model, lr=part.lr, momentum=part.momentum, weight_decay=part.weight_decay, engine=_engine(run, part)
    )
    _train_loop(run, data, "pretrain", objective, part.epochs, part.batch_size, [None], {})
    (score,) = _final_scores(run, data, "pretrain", model, [None])
    return {"float": score}, [run.directory.checkpoint("pretrain")]


def _train(run: Run, data: DataSet) -> tuple[dict[str, Any], list[Path]]:
    part, widths = run.recipe.train, run.recipe.bits
    model = _start_of_training(run, data).to(run.device)
    _join_ranks(run, model, part)
    observed = ScaleGradients(model) if part.record_scale_gradients else None
    teacher = _float_network(run, data).to(run.device) if part.distillation.teacher == "float" else None
    objective = joint_objective(run, model, teacher, observed)
    extra = {"plan": plan_of(model).to_json(), "about": _about(run, data)}
    _train_loop(run, data, "train", objective, part.epochs, part.batch_size, list(widths), extra, observed)
    scores = dict(zip(map(str, widths), _final_scores(run, data, "train", model, list(widths)), strict=True))
    outputs = [run.directory.checkpoint("train")]
    if part.method != "double_rounding":
        run.reporter.note(
            f"train: {part.method} is for comparison and has no artifact; its checkpoint can be evaluated"
        )
        return scores, outputs
    if run.world.first:
        _save_artifact(run, data, model, scores)
    return scores, [*outputs, run.directory.artifact]


def joint_objective(
    run: Run, model: nn.Module, teacher: nn.Module | None, observed: ScaleGradients | None = None
) -> JointObjective:
    """The joint objective as the recipe says.

    Args:
        run: has the recipe.
        model: quantized.
        teacher: the float network, where the recipe's distillation asks for it.
        observed: records gradients of scales.
    """
    part = run.recipe.train
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
        engine=_engine(run, part),
        on_gradients=observed.add if observed else None,
    )


def _join_ranks(run: Run, model: nn.Module, part: EnginePart) -> None:
    """The same start on all ranks, and statistics that they share if the recipe says so."""
    broadcast_model(model, run.world)
    if part.share_batch_norm:
        share_batch_norm(model, run.world)


def _float_network(run: Run, data: DataSet) -> nn.Module:
    """The network as the pretrain stage left it."""
    network = build(**_about(run, data)["network"])
    load_weights(network, run.directory.checkpoint("pretrain"))
    return network


def _start_of_training(run: Run, data: DataSet) -> nn.Module:
    """The quantized network: by the plan of a checkpoint where there is one, else with scales started from data."""
    network, checkpoint = _float_network(run, data), run.directory.checkpoint("train")
    if checkpoint.exists():
        try:
            return apply(network, Plan.from_json(load_checkpoint(checkpoint)["plan"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"{checkpoint} is not a checkpoint of this stage: do it again with --fresh") from error
    return _quantized(run, data, network, images=run.recipe.train.calibration_images)


def build_network(recipe: Recipe, data: DataSet) -> nn.Module:
    """The recipe's float network; the number of classes comes from the data.

    Raises:
        UserError: there is no such network, or its weights cannot be had.
    """
    return build(recipe.model.name, _network_args(recipe, data))


def _network_args(recipe: Recipe, data: DataSet) -> dict[str, Any]:
    args = dict(recipe.model.args)
    if ":" not in recipe.model.name:
        args.setdefault("num_classes", len(data.classes))
    return args


def _about(run: Run, data: DataSet) -> dict[str, Any]:
    """What a reader of a checkpoint or artifact needs to use it."""
    args = _network_args(run.recipe, data)
    # Trained weights to start from are no part of the architecture, and would be fetched again.
    args.pop("weights", None)
    return {
        "network": {"name": run.recipe.model.name, "args": args},
        "preprocessing": data.preprocessing.to_json(),
        "classes": list(data.classes),
        "data": data.name,
        "data_config": run.recipe.data.model_dump(mode="json", exclude=set(_NOT_OF_THE_RESULT)),
    }


def _quantized(run: Run, data: DataSet, network: nn.Module, *, images: int) -> nn.Module:
    """The quantized copy, its activation scales started from the first training images."""
    part = run.recipe.train
    return quantize(
        network,
        example_inputs=data.sample(images),
        bits=run.recipe.bits,
        keep=part.keep,
        method=part.method,
        per_channel=part.per_channel,
        scale_form=part.scale_form,
        lsq_factor=part.lsq_factor,
    )


def _train_loop(
    run: Run,
    data: DataSet,
    stage: str,
    objective: Objective,
    epochs: int,
    batch_size: int,
    precisions: Sequence[int | None],
    extra: dict[str, Any],
    observed: ScaleGradients | None = None,
) -> None:
    """Train with a progress bar, `val` scored and a metrics row written for every precision and epoch."""
    world = run.world
    batches = data.training_batches(
        batch_size=batch_size, seed=run.recipe.seed, device=run.device, rank=world.rank, world=world.size
    )
    pace = _Pace(batch_size)

    def on_epoch(epoch: int, losses: dict[str, float]) -> None:
        scores = _scores(run, objective.model, data, "val", precisions) if data.size("val") else None
        rows = []
        for i, loss in enumerate(losses.values()):
            row = {"stage": stage, "epoch": epoch, "bits": precisions[i], "split": "val", "train_loss": loss}
            rows.append(row | (scores[i] if scores else {}))
        pace.tell(losses, scores)
        if world.first:
            run.directory.add_metrics(rows, tensorboard=run.tensorboard)
            if observed is not None:
                run.directory.add_scale_gradients([{"epoch": epoch, **row} for row in observed.rows()])

    loop = Loop(
        objective=objective,
        batches=batches,
        epochs=epochs,
        checkpoint=run.directory.checkpoint(stage),
        extra={**extra, "ranks": world.size},
        on_step=lambda: advance(pace.text()),
        on_epoch=on_epoch,
        seed=run.recipe.seed,
        world=world,
    )
    done = loop.resume()
    if world.first:
        run.directory.rewind_metrics(stage, done)
        _tell_resumed(run, stage, done, epochs)
    with run.reporter.progress(stage, epochs * len(batches), done * len(batches)) as advance:
        loop.run()


def _tell_resumed(run: Run, stage: str, done: int, epochs: int) -> None:
    if not done:
        return
    before = load_checkpoint(run.directory.checkpoint(stage)).get("ranks", run.world.size)
    other = "" if before == run.world.size else f"; it ran on {before} processes before, on {run.world.size} now"
    run.reporter.note(f"{stage}: taken up after epoch {done} of {epochs}{other}")


class _Pace:
    """What a progress bar says: the last scores, and images per second since the run began."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.steps = 0
        self.start = time.monotonic()
        self.last = ""

    def tell(self, losses: Mapping[str, float], scores: Sequence[Mapping[str, Any]] | None) -> None:
        """Remember an epoch's scores, or its losses where there is no val."""
        parts = [
            f"{name}: {scores[i]['top1'] if scores else loss:.2f}" for i, (name, loss) in enumerate(losses.items())
        ]
        self.last = " ".join(parts)

    def text(self) -> str:
        """Called once a step."""
        self.steps += 1
        rate = self.steps * self.batch_size / max(time.monotonic() - self.start, 1e-9)
        return f"{rate:,.0f} images/s {self.last}"


def _scores(run: Run, model: nn.Module, data: DataSet, split: str, precisions: Sequence[Any]) -> list[dict[str, Any]]:
    """Scores on a split as plain values, the images shared among the ranks."""
    batches = data.evaluation_batches(
        split, batch_size=_EVALUATION_BATCH, device=run.device, rank=run.world.rank, world=run.world.size
    )
    return [dataclasses.asdict(score) for score in evaluate(model, batches, precisions, world=run.world)]


def _final_scores(
    run: Run, data: DataSet, stage: str, model: nn.Module, precisions: Sequence[int | None]
) -> list[dict[str, Any]]:
    """Scores on `test` at the end of a stage, written to the metrics."""
    scores = _scores(run, model, data, "test", precisions)
    if run.world.first:
        pairs = zip(precisions, scores, strict=True)
        rows = [{"stage": stage, "epoch": None, "bits": bits, "split": "test"} | score for bits, score in pairs]
        run.directory.add_metrics(rows)
    return scores


def _save_artifact(run: Run, data: DataSet, model: nn.Module, scores: Mapping[str, Any]) -> None:
    """Save, load again, and hold the two against each other before the stage counts as done."""
    float_score = run.directory.records()["pretrain"]["result"]["float"]
    about = _about(run, data)
    save(
        model,
        run.directory.artifact,
        network=about["network"],
        preprocessing=about["preprocessing"],
        classes=data.classes,
        provenance={
            "recipe": run.name,
            "seed": run.recipe.seed,
            "data": data.name,
            "data_sha256": data.fingerprint(),
            "split": "test",
            "float_top1": float_score["top1"],
            "top1": {bits: score["top1"] for bits, score in scores.items()},
            "config": run.recipe.model_dump(mode="json", exclude={"data": set(_NOT_OF_THE_RESULT)}),
            "ranks": run.world.size,
            "commit": source_commit(),
            **machine(run.device),
        },
    )
    # In the same memory format, which chooses the kernels: law 1 holds within one.
    again = _engine(run, run.recipe.train).place(
        load(run.directory.artifact, model=run.recipe.model.name).to(run.device)
    )
    images, _ = next(data.evaluation_batches("test", batch_size=64, device=run.device))
    model.eval()
    for width in run.recipe.bits:
        with torch.no_grad(), switched(model, width), switched(again, width):
            if not torch.equal(model(images), again(images)):
                raise RuntimeError(f"the saved artifact does not give the trained model's logits at {width} bits")
