"""The stages, each reading the run directory and writing to it, and evaluation of what they leave."""

import dataclasses
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from bitswitch import artifact, files
from bitswitch.config import Recipe, to_yaml
from bitswitch.data import DataSet, Preprocessing, load_data
from bitswitch.errors import UserError
from bitswitch.export import load, save
from bitswitch.models import build
from bitswitch.nn import Plan, apply, quantize, switched
from bitswitch.rundir import RunDirectory, changes
from bitswitch.training import (
    FloatObjective,
    JointObjective,
    Loop,
    MultiPrecisionOptimizer,
    Objective,
    Score,
    evaluate,
    load_checkpoint,
)
from bitswitch.version import __version__

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
        reporter: where the run tells how it goes.
    """

    name: str
    recipe: Recipe
    directory: RunDirectory
    device: torch.device
    reporter: Reporter


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: there is no such device here; use cpu") from error
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
    data = load_data(**run.recipe.data.model_dump())
    with run.directory.locked():
        records = {} if fresh and tuple(stages) == STAGES else run.directory.records()
        forgotten = set(stages) if fresh else set()
        records = {stage: record for stage, record in records.items() if stage not in forgotten}
        for stage in STAGES[: STAGES.index(stages[-1]) + 1]:
            _check_same(run, data, stage, records)
            if stage not in stages and not _is_done(run, records.get(stage)):
                raise UserError(
                    f"stage {stage} is not done in {run.directory.path}: bitswitch {stage} {run.name} does it"
                )
        if "train" in stages and not _is_done(run, records.get("pretrain")):
            _quantized(run, data, build_network(run.recipe, data), images=2)
        run.directory.write_records(records)
        files.write(run.directory.path / "config.yaml", to_yaml(run.recipe).encode())
        for stage in stages:
            _do(run, data, stage)
        return run.directory.records()


def _config(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The part of the configuration that a stage's result depends on."""
    whole = recipe.model_dump(mode="json", exclude={"data": set(_NOT_OF_THE_RESULT)})
    keys = {"pretrain": ("seed", "model", "data", "pretrain"), "train": ("seed", "bits", "model", "data", "train")}
    return {key: whole[key] for key in keys[stage]}


def _inputs(run: Run, data: DataSet, stage: str) -> dict[str, str]:
    """Digests of what a stage reads."""
    inputs = {"data": data.fingerprint()}
    checkpoint = run.directory.checkpoint("pretrain")
    if stage == "train" and checkpoint.exists():
        inputs["pretrain"] = files.file_digest(checkpoint)
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
    return bool(record and record["done"]) and all((run.directory.path / name).exists() for name in record["outputs"])  # type: ignore[index]


def _do(run: Run, data: DataSet, stage: str) -> None:
    """Do one stage, take it up where it was left, or skip it."""
    record = run.directory.records().get(stage)
    inputs = _inputs(run, data, stage)
    if record is not None:
        if record["inputs"] != inputs:
            raise UserError(
                f"{run.directory.path}: the {stage} stage was made from another pretrain stage than is there now: "
                f"do it again with bitswitch {stage} {run.name} --fresh"
            )
        if _is_done(run, record):
            for name, digest in record["outputs"].items():
                if files.file_digest(run.directory.path / name) != digest:
                    raise UserError(f"{run.directory.path / name} was changed since it was made: do {stage} --fresh")
            run.reporter.note(f"{stage}: done before, skipped")
            return
    if record is None:
        run.directory.checkpoint(stage).unlink(missing_ok=True)
    config = _config(run.recipe, stage)
    begun = {"done": False, "config": config, "inputs": inputs, "outputs": {}, "result": None}
    run.directory.record(stage, begun)
    torch.manual_seed(run.recipe.seed)
    result, outputs = {"pretrain": _pretrain, "train": _train}[stage](run, data)
    digests = {str(path.relative_to(run.directory.path)): files.file_digest(path) for path in outputs}
    run.directory.record(stage, begun | {"done": True, "outputs": digests, "result": result})


def _pretrain(run: Run, data: DataSet) -> tuple[dict[str, Any], list[Path]]:
    part = run.recipe.pretrain
    model = build_network(run.recipe, data).to(run.device)
    objective = FloatObjective(model, lr=part.lr, momentum=part.momentum, weight_decay=part.weight_decay)
    _train_loop(run, data, "pretrain", objective, part.epochs, part.batch_size, [None], {})
    (score,) = _final_scores(run, data, "pretrain", model, [None])
    return {"float": score}, [run.directory.checkpoint("pretrain")]


def _train(run: Run, data: DataSet) -> tuple[dict[str, Any], list[Path]]:
    part, widths = run.recipe.train, run.recipe.bits
    checkpoint = run.directory.checkpoint("train")
    network = build_network(run.recipe, data)
    network.load_state_dict(load_checkpoint(run.directory.checkpoint("pretrain"))["model"])
    if checkpoint.exists():
        plan = Plan.from_json(load_checkpoint(checkpoint)["plan"])
        model = apply(network, plan).to(run.device)
    else:
        model = _quantized(run, data, network, images=part.calibration_images).to(run.device)
    optimizer = MultiPrecisionOptimizer(
        model,
        lr=part.lr,
        scale_lr=part.scale_lr,
        weight_decay=part.weight_decay,
        alrs=part.alrs,
        eta=part.eta,
        clip=part.clip,
    )
    extra = {"plan": model.bitswitch_plan.to_json()}  # type: ignore[union-attr, operator]
    objective = JointObjective(model, optimizer, part.order)
    _train_loop(run, data, "train", objective, part.epochs, part.batch_size, list(widths), extra)
    scores = dict(zip(map(str, widths), _final_scores(run, data, "train", model, list(widths)), strict=True))
    _save_artifact(run, data, model, scores)
    return scores, [run.directory.checkpoint("train"), run.directory.artifact]


def build_network(recipe: Recipe, data: DataSet) -> nn.Module:
    """The recipe's float network, freshly initialised; the CIFAR networks learn the number of classes from the data."""
    return build(recipe.model.name, _network_args(recipe, data))


def _network_args(recipe: Recipe, data: DataSet) -> dict[str, Any]:
    name, args = recipe.model.name, dict(recipe.model.args)
    if ":" not in name:
        args.setdefault("classes" if name.startswith("cifar_resnet") else "num_classes", len(data.classes))
    return args


def _quantized(run: Run, data: DataSet, network: nn.Module, *, images: int) -> nn.Module:
    """The quantized copy, its activation scales started from the first training images."""
    part = run.recipe.train
    return quantize(
        network,
        example_inputs=data.sample(images),
        bits=run.recipe.bits,
        keep=part.keep,
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
) -> None:
    """Train with a progress bar, `val` scored and a metrics row written for every precision and epoch."""
    batches = data.training_batches(batch_size=batch_size, seed=run.recipe.seed, device=run.device)
    shown = ""

    def on_epoch(epoch: int, losses: dict[str, float]) -> None:
        nonlocal shown
        scores = _scores(objective.model, data, "val", precisions, run.device) if data.size("val") else None
        rows = []
        for i, (name, loss) in enumerate(losses.items()):
            row = {"stage": stage, "epoch": epoch, "bits": precisions[i], "split": "val", "train_loss": loss}
            rows.append(row | (dataclasses.asdict(scores[i]) if scores else {}))
            shown = " ".join([*([] if i == 0 else [shown]), f"{name}: {scores[i].top1 if scores else loss:.2f}"])
        run.directory.add_metrics(rows)

    loop = Loop(
        objective=objective,
        batches=batches,
        epochs=epochs,
        checkpoint=run.directory.checkpoint(stage),
        extra=extra,
        on_step=lambda: advance(shown),
        on_epoch=on_epoch,
    )
    done = loop.resume()
    run.directory.rewind_metrics(stage, done)
    if done:
        run.reporter.note(f"{stage}: taken up after epoch {done} of {epochs}")
    with run.reporter.progress(stage, epochs * len(batches), done * len(batches)) as advance:
        loop.run()


def _scores(
    model: nn.Module, data: DataSet, split: str, precisions: Sequence[Any], device: torch.device
) -> list[Score]:
    batches = data.evaluation_batches(split, batch_size=_EVALUATION_BATCH, device=device)
    return evaluate(model, batches, precisions)


def _final_scores(
    run: Run, data: DataSet, stage: str, model: nn.Module, precisions: Sequence[int | None]
) -> list[dict[str, Any]]:
    """Scores on `test` at the end of a stage, as plain values, written to the metrics."""
    scores = [dataclasses.asdict(s) for s in _scores(model, data, "test", precisions, run.device)]
    pairs = zip(precisions, scores, strict=True)
    rows = [{"stage": stage, "epoch": None, "bits": bits, "split": "test"} | score for bits, score in pairs]
    run.directory.add_metrics(rows)
    return scores


def _save_artifact(run: Run, data: DataSet, model: nn.Module, scores: Mapping[str, Any]) -> None:
    """Save, load again, and hold the two against each other before the stage counts as done."""
    float_score = run.directory.records()["pretrain"]["result"]["float"]
    save(
        model,
        run.directory.artifact,
        network={"name": run.recipe.model.name, "args": _network_args(run.recipe, data)},
        preprocessing=data.preprocessing.to_json(),
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
            "commit": source_commit(),
            **machine(run.device),
        },
    )
    again = load(run.directory.artifact, model=run.recipe.model.name).to(run.device)
    images, _ = next(data.evaluation_batches("test", batch_size=64, device=run.device))
    model.eval()
    for width in run.recipe.bits:
        with torch.no_grad(), switched(model, width), switched(again, width):
            if not torch.equal(model(images), again(images)):
                raise RuntimeError(f"the saved artifact does not give the trained model's logits at {width} bits")


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} ({len(names)})"


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """What a result depends on beside configuration and data."""
    device = device or torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (platform.machine() or "unknown")
    return {
        "bitswitch": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
    }


def source_commit() -> str | None:
    """The commit of the checkout that this package runs from, marked where files differ; None outside of one."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+changes"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def evaluate_artifact(
    path: str | Path,
    *,
    bits: Sequence[int] | None = None,
    data_name: str | None = None,
    split: str = "test",
    network: str | None = None,
    device: torch.device,
) -> dict[str, Any]:
    """Score an artifact at every width asked for, each batch visited once.

    Args:
        path: the artifact.
        bits: widths; all that the file has where None.
        data_name: a data name or an image folder; the data it was trained on where None.
        split: "test" or "val".
        network: its name where the file does not tell, or names the user's own code.
        device: where to compute.

    Returns:
        {"results": [{"bits", "assignment", "top1", "top5", "loss", "images", "split", "data"}], "provenance": {...}}.

    Raises:
        UserError: the file, the widths, the network or the data cannot be used.
    """
    header = artifact.read_header(path)
    wanted = header.widths if bits is None else tuple(bits)
    for width in wanted:
        if width not in header.widths:
            raise UserError(f"{path} has no width {width}: it has {', '.join(map(str, header.widths))}")
    name = data_name or header.provenance.get("data")
    if not name or header.preprocessing is None:
        raise UserError(f"{path} does not say what data it is for: give them with --data")
    model = load(path, model=network).to(device)
    trained_on = header.provenance.get("config", {}).get("data", {})
    said = {key: trained_on[key] for key in ("val_fraction", "unreadable") if key in trained_on}
    data = load_data(name, **said).with_preprocessing(Preprocessing.from_json(header.preprocessing))
    if header.classes is not None and header.classes != data.classes:
        raise UserError(f"{name} has the classes {_few(data.classes)}, {path} was trained on {_few(header.classes)}")
    scores = _scores(model, data, split, list(wanted), device)
    results = [
        {"bits": width, "assignment": None, **dataclasses.asdict(score), "split": split, "data": name}
        for width, score in zip(wanted, scores, strict=True)
    ]
    return {"results": results, "provenance": dict(header.provenance) | {"evaluated_on": machine(device)}}
