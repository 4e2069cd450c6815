"""Artifacts of a run: saved, loaded again and held against the trained model before a stage counts as done."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitswitch.config import EnginePart
from bitswitch.data import DataSet
from bitswitch.export import load, save
from bitswitch.machine import machine, source_commit
from bitswitch.nn import switched
from bitswitch.pipeline.run import NOT_OF_THE_RESULT, Run, about, engine


def save_artifact(
    run: Run,
    data: DataSet,
    model: nn.Module,
    path: Path,
    part: EnginePart,
    scores: Mapping[str, Any],
    frontier: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write an artifact with all that a reader needs, and hold what it loads against the model, to the last bit.

    Args:
        run: has recipe, directory and device.
        data: what it was trained on.
        model: trained.
        path: of the artifact.
        part: of the recipe by which the model was trained.
        scores: {width: score on test}.
        frontier: choices of the search.
    """
    float_score = run.directory.records()["pretrain"]["result"]["float"]
    known = about(run, data)
    save(
        model,
        path,
        network=known["network"],
        preprocessing=known["preprocessing"],
        classes=data.classes,
        frontier=frontier,
        provenance={
            "recipe": run.name,
            "seed": run.recipe.seed,
            "data": data.name,
            "data_sha256": data.fingerprint(),
            "split": "test",
            "float_top1": float_score["top1"],
            "top1": {bits: score["top1"] for bits, score in scores.items()},
            "config": run.recipe.model_dump(mode="json", exclude={"data": set(NOT_OF_THE_RESULT)}),
            "ranks": run.world.size,
            "commit": source_commit(),
            **machine(run.device),
        },
    )
    # In the same memory format, which chooses the kernels: law 1 holds within one.
    again = engine(run, part).place(load(path, model=run.recipe.model.name).to(run.device))
    images, _ = next(data.evaluation_batches("test", batch_size=64, device=run.device))
    model.eval()
    # Every width, and every choice that the file offers.
    precisions = [*run.recipe.bits, *(choice["assignment"] for choice in frontier)]
    for precision in precisions:
        with torch.no_grad(), switched(model, precision), switched(again, precision):
            if not torch.equal(model(images), again(images)):
                raise RuntimeError(f"the saved artifact does not give the trained model's logits at {precision} bits")
