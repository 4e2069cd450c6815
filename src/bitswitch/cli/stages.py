"""The commands that do stages of a recipe."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitswitch import files
from bitswitch.cli.console import TerminalReporter, emit, stdout_kept_clean
from bitswitch.cli.tables import show_run
from bitswitch.cli.words import Device, Fresh, Json, Out, Overrides, RecipeName, Seed, TensorBoard, ranks, run_directory
from bitswitch.config import load_recipe
from bitswitch.errors import require

if TYPE_CHECKING:
    from bitswitch.pipeline import Run

COMMANDS: dict[str, tuple[list[str] | None, str]] = {
    "run": (None, "Every stage of a recipe in order; takes up where it stopped."),
    "pretrain": (["pretrain"], "Train the float network."),
    "train": (["train"], "Train all bit-widths together, from the float network, and write the artifact."),
    "sensitivity": (["sensitivity"], "Traces of the float network's Hessian, layer by layer."),
    "supernet": (["supernet"], "Train the SuperNet, from the multi-precision network."),
    "search": (["search"], "Find the best SubNets for a range of budgets."),
}
"""{command: (its stages, or None for all that the recipe asks for; what it does)}."""


def command_of(stages: Sequence[str] | None) -> Callable[..., None]:
    """The function behind a command that does stages and shows what they reached."""

    def command(
        recipe: RecipeName,
        overrides: Overrides = None,
        json_: Json = False,
        device: Device = "auto",
        seed: Seed = None,
        out: Out = None,
        fresh: Fresh = False,
        tensorboard: TensorBoard = False,
    ) -> None:
        from bitswitch import pipeline

        if tensorboard:
            require("tensorboard", "tensorboard")
        config = load_recipe(recipe, overrides or [], seed=seed)
        wanted = pipeline.stages_of(config) if stages is None else stages
        with ranks(device) as (world, place):
            run = pipeline.Run(
                name=Path(recipe).stem,
                typed=recipe,
                recipe=config,
                directory=run_directory(out, recipe),
                device=place,
                reporter=TerminalReporter(silent=not world.first),
                world=world,
                tensorboard=tensorboard,
            )
            with stdout_kept_clean():
                records = pipeline.execute(run, wanted, fresh=fresh)
        if world.first:
            document = _document(run, {s: r for s, r in records.items() if s in wanted or s == "pretrain"})
            emit(document, json_, lambda: show_run(document))

    return command


def _document(run: "Run", records: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for stage in ("pretrain", "train", "supernet"):
        for bits, score in records.get(stage, {"result": {}})["result"].items():
            rows.append({"stage": stage, "bits": None if bits == "float" else int(bits), "split": "test", **score})
    document: dict[str, Any] = {"results": rows, "run": str(run.directory.path), "artifact": None, "bytes": None}
    if run.directory.artifact.name in records.get("train", {"outputs": ()})["outputs"]:
        document |= {"artifact": str(run.directory.artifact), "bytes": run.directory.artifact.stat().st_size}
    if "supernet" in records and run.directory.supernet.is_file():
        document["supernet"] = str(run.directory.supernet)
    if "sensitivity" in records:
        document["sensitivity"] = files.read_json(run.directory.sensitivity)
    if "search" in records:
        document["frontier"] = files.read_json(run.directory.frontier)
    return document
