"""Which stages are done, which can be taken up, and doing them in order."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitswitch import files
from bitswitch.config import Recipe, to_yaml
from bitswitch.data import DataSet
from bitswitch.errors import UserError
from bitswitch.pipeline import checks, subnets, training
from bitswitch.pipeline.run import NOT_OF_THE_RESULT, Run, open_data, shown_by
from bitswitch.rundir import RunDirectory, changes
from bitswitch.training.distributed import barrier, from_first
from bitswitch.training.loop import seed_all


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """A stage.

    Attributes:
        work: does it; returns its result, plain JSON values, and the files that it made.
        config: the parts of the recipe that its result depends on.
        after: the stages whose product it reads.
        product: what stages after it read.
        part: of the recipe that must be there.
    """

    work: Callable[[Run, DataSet], tuple[dict[str, Any], list[Path]]]
    config: tuple[str, ...]
    after: tuple[str, ...]
    product: Callable[[RunDirectory], Path]
    part: str


def _checkpoint(stage: str) -> Callable[[RunDirectory], Path]:
    return lambda directory: directory.checkpoint(stage)


_STAGES = {
    "pretrain": _Stage(
        work=training.pretrain,
        config=("seed", "model", "data", "pretrain"),
        after=(),
        product=_checkpoint("pretrain"),
        part="pretrain",
    ),
    "train": _Stage(
        work=training.train,
        config=("seed", "bits", "model", "data", "train"),
        after=("pretrain",),
        product=_checkpoint("train"),
        part="train",
    ),
    "sensitivity": _Stage(
        work=subnets.sensitivity,
        config=("seed", "model", "data", "sensitivity"),
        after=("pretrain",),
        product=lambda directory: directory.sensitivity,
        part="sensitivity",
    ),
    "supernet": _Stage(
        work=training.supernet,
        config=("seed", "bits", "model", "data", "supernet"),
        after=("train", "sensitivity"),
        product=_checkpoint("supernet"),
        part="supernet",
    ),
    "search": _Stage(
        work=subnets.search,
        config=("seed", "bits", "model", "data", "search"),
        after=("supernet", "sensitivity"),
        product=lambda directory: directory.frontier,
        # Its SubNets are the SuperNet's.
        part="supernet",
    ),
}
STAGES = tuple(_STAGES)


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """The stages that a recipe asks for: those of mixed precision where it has a supernet part and is no rival's."""
    mixed = recipe.supernet is not None and recipe.train.method == "double_rounding"
    return STAGES if mixed else ("pretrain", "train")


def artifact_of(recipe: Recipe, directory: RunDirectory, typed: str) -> Path:
    """The artifact of a recipe's run: the SuperNet's where the recipe asks for one and it is trained, else joint training's.

    Args:
        recipe: with its overrides.
        directory: of the run.
        typed: the recipe's name or path.

    Raises:
        UserError: there is none, or it was made from another configuration.
    """
    records = directory.records()
    for stage, path in (("supernet", directory.supernet), ("train", directory.artifact)):
        if stage in stages_of(recipe) and records.get(stage, {}).get("done") and path.is_file():
            for one in _needed([stage]):
                record = records.get(one, {"done": False})
                found = changes(record["config"], _config(recipe, one)) if record["done"] else ["it is not done"]
                found += _other_file(recipe, one, record) if record["done"] else []
                for before in _STAGES[one].after if record["done"] else ():
                    product = _STAGES[before].product(directory)
                    if product.is_file() and record["inputs"].get(before) != files.file_digest(product):
                        found.append(f"{before} was done again since")
                advice = "say the overrides that it was made with, do it again, or use another --out"
                _refuse(directory, one, found, f"{advice}; or give the file, {path}")
            return path
    raise UserError(
        f"stage train is not done in {directory.path}: bitswitch run {typed} --out {directory.path} does it, with the same "
        "overrides"
    )


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
    checks.check_parts(run, {stage: _STAGES[stage].part for stage in stages})
    from_the_start = fresh and tuple(stages) == stages_of(run.recipe)
    forgotten = STAGES if from_the_start else stages if fresh else ()
    # Records that are damaged are not read where all are forgotten.
    records = {} if from_the_start else run.directory.records()
    records = {stage: record for stage, record in records.items() if stage not in forgotten}
    for stage in _needed(stages):
        _check_same(run, data, stage, records)
        if stage not in stages and not _is_done(run, stage, records.get(stage)):
            where = run.directory.path
            raise UserError(
                f"stage {stage} is not done in {where}: bitswitch {stage} {run.typed} --out {where} does it, with the same "
                "overrides"
            )
    left = [stage for stage in stages if not _is_done(run, stage, records.get(stage))]
    for stage in left:
        checks.check_batches(run, data, stage)
    for stage, before in _made_from(stages, left, records):
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


def _made_from(stages: Sequence[str], left: Sequence[str], records: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of these stages, those with a record whose inputs hold what one that is to be done from the start has made before."""
    return [
        (stage, before)
        for stage in stages
        if stage in records
        for before in _STAGES[stage].after
        if before in left and before not in records and before in records[stage]["inputs"]
    ]


def _needed(stages: Sequence[str]) -> list[str]:
    """These stages and all whose products they read, in order."""
    wanted = set(stages)
    for name in reversed(STAGES):
        if name in wanted:
            wanted |= set(_STAGES[name].after)
    return [name for name in STAGES if name in wanted]


def _config(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The part of the configuration that a stage's result depends on."""
    # A starting checkpoint and a latency table count by their content, among the inputs.
    elsewhere: dict[str, Any] = {"data": set(NOT_OF_THE_RESULT), "pretrain": {"checkpoint"}, "search": {"latency"}}
    whole = recipe.model_dump(mode="json", exclude=elsewhere | {"train": {"record_scale_gradients"}})
    return {key: whole[key] for key in _STAGES[stage].config}


def _inputs(run: Run, data: DataSet, stage: str) -> dict[str, str]:
    """Digests of what a stage reads."""
    inputs = {"data": data.fingerprint(), "classes": _names(data)}
    for before in _STAGES[stage].after:
        product = _STAGES[before].product(run.directory)
        if product.exists():
            inputs[before] = files.file_digest(product)
    key, given = _file_of(run.recipe, stage)
    if given is not None:
        if not Path(given).is_file():
            raise UserError(f"{stage}.{key}={given}: there is no such file")
        inputs[key] = files.file_digest(Path(given))
    return inputs


def _file_of(recipe: Recipe, stage: str) -> tuple[str, str | None]:
    """The key of a stage's part that names a file, and the file."""
    named = {"pretrain": ("checkpoint", recipe.pretrain.checkpoint), "search": ("latency", recipe.search.latency)}
    return named.get(stage, ("", None))


def _names(data: DataSet) -> str:
    """A digest of the names of the classes, which checkpoints and artifacts hold."""
    return files.digest(files.canonical_json(list(data.classes)).encode())


def _other_file(recipe: Recipe, stage: str, record: Mapping[str, Any]) -> list[str]:
    """How the file that a stage's part names differs from the one that the stage was made from, in one entry or none."""
    key, given = _file_of(recipe, stage)
    before = record["inputs"].get(key)
    if given is None:
        return [] if before is None else [f"{stage}.{key} was a file, is none"]
    other = Path(given).is_file() and before != files.file_digest(Path(given))
    return [f"{stage}.{key} was another file, or none"] if other else []


def _check_same(run: Run, data: DataSet, stage: str, records: Mapping[str, Any]) -> None:
    """Refuse where a stage, done or begun, was made from something else than is asked for now."""
    record = records.get(stage)
    if record is None:
        return
    found = changes(record["config"], _config(run.recipe, stage))
    if record["inputs"]["data"] != data.fingerprint():
        found.append("the data are others")
    if record["inputs"].get("classes", _names(data)) != _names(data):
        found.append("the classes have other names")
    found += _other_file(run.recipe, stage, record)
    again = f"bitswitch {stage} {run.typed} --out {run.directory.path} --fresh does it again, with the same overrides"
    _refuse(run.directory, stage, found, f"{again}; or use another --out")


def _refuse(directory: RunDirectory, stage: str, found: Sequence[str], advice: str) -> None:
    """Where differences were found between what a stage was made from and what is asked for."""
    if found:
        raise UserError(f"{directory.path} holds a {stage} stage made otherwise ({'; '.join(found)}): {advice}")


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
        result, outputs = _STAGES[stage].work(run, data)
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
    inputs = _inputs(run, data, stage)
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
    begun = {"done": False, "config": _config(run.recipe, stage), "inputs": inputs, "outputs": {}, "result": None}
    run.directory.record(stage, begun)
    return begun
