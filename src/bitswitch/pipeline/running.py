"""A training loop with what a user follows it by: progress, scores, metrics."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from bitswitch.config import PretrainPart, QuantizedPart
from bitswitch.data import DataSet, Shown, unseen
from bitswitch.pipeline.run import Run, shown_by
from bitswitch.training import Loop, Objective, ScaleGradients, evaluate, load_checkpoint
from bitswitch.training.evaluate import PrecisionChoice, with_less_at_once
from bitswitch.training.loop import Batches

_EVALUATION_BATCH = 256


def train_loop(
    run: Run,
    data: DataSet,
    stage: str,
    objective: Objective,
    batches: Batches,
    part: PretrainPart | QuantizedPart,
    precisions: Sequence[PrecisionChoice],
    extra: dict[str, Any],
    observed: ScaleGradients | None = None,
) -> None:
    """Train with a progress bar, `val` scored and a metrics row written for every precision and epoch.

    A width's row has its training loss, where the objective gives one of that name.
    """
    world = run.world
    pace = _Pace(part.batch_size)

    def on_epoch(epoch: int, losses: dict[str, float]) -> None:
        scores = scores_on(run, objective.model, data, "val", precisions) if data.size("val") else None
        rows = []
        for i, precision in enumerate(precisions):
            row = {"stage": stage, "epoch": epoch, **named(precision), "split": "val"}
            if (name := _short(precision)) in losses:
                row["train_loss"] = losses[name]
            rows.append(row | (scores[i] if scores else {}))
        pace.last = _summary(precisions, losses, scores)
        if world.first:
            run.directory.add_metrics(rows, tensorboard=run.tensorboard)
            if observed is not None:
                run.directory.add_scale_gradients([{"epoch": epoch, **row} for row in observed.rows()])

    loop = Loop(
        objective=objective,
        batches=batches,
        epochs=part.epochs,
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
        _tell_resumed(run, stage, done, part.epochs)
    with run.reporter.progress(stage, part.epochs * len(batches), done * len(batches)) as advance:
        loop.run()


def training_batches(run: Run, data: DataSet, batch_size: int) -> Batches:
    """This rank's training batches."""
    return data.training_batches(
        batch_size=batch_size,
        seed=run.recipe.seed,
        device=run.device,
        rank=run.world.rank,
        world=run.world.size,
    )


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

    def text(self) -> str:
        """Called once a step."""
        self.steps += 1
        rate = self.steps * self.batch_size / max(time.monotonic() - self.start, 1e-9)
        return f"{rate:,.0f} images/s {self.last}"


def _short(precision: PrecisionChoice) -> str:
    return "float" if precision is None else str(precision) if isinstance(precision, int) else "mixed"


def _summary(
    precisions: Sequence[PrecisionChoice], losses: Mapping[str, float], scores: Sequence[Mapping[str, Any]] | None
) -> str:
    """An epoch's scores, or its losses where there is no val."""
    if scores is None:
        return " ".join(f"{name}: {loss:.2f}" for name, loss in losses.items())
    return " ".join(f"{_short(one)}: {score['top1']:.2f}" for one, score in zip(precisions, scores, strict=True))


def scores_on(
    run: Run,
    model: nn.Module,
    data: DataSet,
    split: str,
    precisions: Sequence[PrecisionChoice],
    shown: Shown = unseen,
) -> list[dict[str, Any]]:
    """Scores on a split as plain values, the images shared among the ranks."""

    def score(images: int) -> list[dict[str, Any]]:
        batches = data.evaluation_batches(
            split, batch_size=images, device=run.device, rank=run.world.rank, world=run.world.size
        )
        # The first rank, which shows it, has the most.
        own = shown(split, batches, math.ceil(data.size(split) / images / run.world.size))
        return [dataclasses.asdict(score) for score in evaluate(model, own, precisions, world=run.world)]

    return with_less_at_once(score, _EVALUATION_BATCH, run.device, run.world)


def final_scores(
    run: Run, data: DataSet, stage: str, model: nn.Module, precisions: Sequence[PrecisionChoice]
) -> list[dict[str, Any]]:
    """Scores on `test` at the end of a stage, written to the metrics."""
    scores = scores_on(run, model, data, "test", precisions, shown_by(run.reporter))
    if run.world.first:
        pairs = zip(precisions, scores, strict=True)
        rows = [{"stage": stage, "epoch": None, **named(one), "split": "test"} | score for one, score in pairs]
        run.directory.add_metrics(rows)
    return scores


def named(precision: PrecisionChoice) -> dict[str, Any]:
    """How rows of metrics and results name a precision: {"bits": width or None}, and "assignment" for a mixture."""
    if isinstance(precision, Mapping):
        return {"bits": None, "assignment": dict(precision)}
    return {"bits": precision}
