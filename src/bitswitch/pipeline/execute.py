"""Which stages are done, which can be taken up, and doing them in order."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from bitswitch import files
from bitswitch.config import Recipe, to_yaml
from bitswitch.data import DataSet
from bitswitch.errors import UserError
from bitswitch.pipeline import checks, subnets
from bitswitch.pipeline.origins import check_same, config_of, inputs_of, made_from
from bitswitch.pipeline.run import Run, open_data, shown_by
from bitswitch.pipeline.stages import STAGES, needed, stages_of
from bitswitch.training.distributed import barrier, from_first
from bitswitch.training.loop import seed_all


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
    data = open_data(run.recipe, shown_by(run.reporter))
    if run.world.first:
        barrier()
    with run.directory.locked() if run.world.first else nullcontext():
        if run.world.first:
            _prepare(run, data, stages, fresh)
        checks.check_shared(run)
        for stage in stages:
            _do(run, data, stage)
        return run.directory.records()


def _prepare(run: Run, data: DataSet, stages: Sequence[str], fresh: bool) -> None:
    """Refuse what cannot be done before anything is changed; then note what is asked for."""
    if strangers := run.directory.strangers():
        raise UserError(
            f"{run.directory.path} holds {strangers[0]} but no record of a run (stages.json): use an empty or new --out"
        )
    checks.check_parts(run, {stage: STAGES[stage].part for stage in stages})
    from_the_start = fresh and tuple(stages) == stages_of(run.recipe)
    forgotten = STAGES if from_the_start else stages if fresh else ()
    # Records that are damaged are not read where all are forgotten.
    records = {} if from_the_start else run.directory.records()
    records = {stage: record for stage, record in records.items() if stage not in forgotten}
    for stage in needed(stages):
        check_same(run, data, stage, records)
        if stage not in stages and not _is_done(run, stage, records.get(stage)):
            where = run.directory.path
            raise UserError(
                f"stage {stage} is not done in {where}: bitswitch {stage} {run.typed} --out {where} does it, with the same "
                "overrides"
            )
    left = [stage for stage in stages if not _is_done(run, stage, records.get(stage))]
    for stage in left:
        checks.check_batches(run, data, stage)
    for stage, before in made_from(stages, left, records):
        run.reporter.note(
            f"{stage} was made from another {before} stage than the one that is done now: unless both end alike, this stops "
            f"before {stage}, for bitswitch {stage} {run.typed} --out {run.directory.path} --fresh"
        )
    if "search" in stages:
        subnets.check(run, data)
    if not _is_done(run, "pretrain", records.get("pretrain")):
        checks.check_network(run, data, stages)
    elif {"supernet", "search"} & set(left):
        checks.check_mixed(run, data, left)
    run.directory.write_records(records)
    for stage in forgotten:
        run.directory.rewind_metrics(stage, 0)
    config = run.directory.path / "config.yaml"
    if left or not config.exists():
        # Where nothing is to be done, parts of other stages may be said otherwise than they were done.
        files.write(config, to_yaml(run.recipe).encode())


def _is_done(run: Run, stage: str, record: Mapping[str, Any] | None) -> bool:
    if record is None or not record["done"]:
        return False
    # The search writes the SuperNet's artifact again, so that it is no output of the stage that made it.
    made = [*record["outputs"], *([run.directory.supernet.name] if stage == "supernet" else [])]
    return all((run.directory.path / name).exists() for name in made)


def _do(run: Run, data: DataSet, stage: str) -> None:
    """Do one stage, take it up where it was left, or skip it."""
    begun = _begin(run, data, stage) if run.world.first else None
    if not from_first(begun is not None, run.world):
        return
    seed_all(run.recipe.seed)
    try:
        result, outputs = STAGES[stage].work(run, data)
    except ValueError as error:
        # torch's own words, of a batch normalization that has one number to take the statistics of.
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"stage {stage}: a part of a batch is one image, too few for batch normalization: raise {stage}.batch_size"
            + (f", or lower {stage}.micro_batches" if hasattr(getattr(run.recipe, stage), "micro_batches") else "")
        ) from error
    except torch.OutOfMemoryError as error:
        raise UserError(f"{run.device} is out of memory in stage {stage}: {_less_memory(run.recipe, stage)}") from error
    except (RuntimeError, ImportError, OSError) as error:
        reason = _reason_of_compiler(error)
        if reason is None:
            raise
        # A process that is killed while it compiles leaves an empty library behind, which torch would load again for ever.
        raise UserError(
            f"torch.compile failed in stage {stage} ({reason}): set {stage}.compile=false; or, if a process was killed while "
            f"it compiled, delete {_compilers_cache()} and go on with the same command"
        ) from error
    if begun is not None:
        digests = {str(path.relative_to(run.directory.path)): files.file_digest(path) for path in outputs}
        run.directory.record(stage, begun | {"done": True, "outputs": digests, "result": result})
    barrier()


def _reason_of_compiler(error: Exception) -> str | None:
    """In one line, what stopped the compiler; None where something else failed."""
    # Slow to import; whoever compiles has it.
    loaded = sys.modules.get("torch._dynamo.exc")
    if loaded is not None and isinstance(error, loaded.BackendCompilerFailed):
        return " ".join(str(error.inner_exception).split())[:200]
    # A library of the cache that cannot be loaded is a plain error of the import.
    if loaded is not None and _compilers_cache() in str(error):
        return " ".join(str(error).split())[:200]
    return None


def _compilers_cache() -> str:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def _less_memory(recipe: Recipe, stage: str) -> str:
    part = getattr(recipe, stage)
    if hasattr(part, "micro_batches"):
        return (
            f"raise {stage}.micro_batches (now {part.micro_batches}), lower {stage}.batch_size, or set "
            f"{stage}.precision=bfloat16"
        )
    return f"lower {stage}.batch_size" if hasattr(part, "batch_size") else "use another --device"


def _begin(run: Run, data: DataSet, stage: str) -> dict[str, Any] | None:
    """Note that a stage is begun, and return its record; None where it is done."""
    record = run.directory.records().get(stage)
    inputs = inputs_of(run, data, stage)
    if record is not None and "classes" not in record["inputs"]:
        # Of an earlier version.
        del inputs["classes"]
    if record is None:
        # What a training would take up. The file of a stage that has none is replaced when the new one is there.
        run.directory.checkpoint(stage).unlink(missing_ok=True)
    elif record["inputs"] != inputs:
        differ = [name for name in {**record["inputs"], **inputs} if record["inputs"].get(name) != inputs.get(name)]
        raise UserError(
            f"{run.directory.path}: the {stage} stage was made from other inputs than are there now "
            f"({', '.join(differ)} changed): do it again with bitswitch {stage} {run.typed} --out {run.directory.path} --fresh"
        )
    elif _is_done(run, stage, record):
        for name, digest in record["outputs"].items():
            if files.file_digest(run.directory.path / name) != digest:
                raise UserError(f"{run.directory.path / name} was changed since it was made: do {stage} --fresh")
        run.reporter.note(f"{stage}: done before, skipped")
        return None
    begun = {"done": False, "config": config_of(run.recipe, stage), "inputs": inputs, "outputs": {}, "result": None}
    run.directory.record(stage, begun)
    return begun
