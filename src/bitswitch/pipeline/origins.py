"""What a stage was made from, held against what is asked for now."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitswitch import files
from bitswitch.config import Recipe
from bitswitch.data import DataSet
from bitswitch.errors import UserError
from bitswitch.pipeline.run import NOT_OF_THE_RESULT, Run
from bitswitch.pipeline.stages import STAGES, needed, stages_of
from bitswitch.rundir import RunDirectory, changes


def config_of(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The part of the configuration that a stage's result depends on."""
    # A starting checkpoint and a latency table count by their content, among the inputs.
    elsewhere: dict[str, Any] = {"data": set(NOT_OF_THE_RESULT), "pretrain": {"checkpoint"}, "search": {"latency"}}
    whole = recipe.model_dump(mode="json", exclude=elsewhere | {"train": {"record_scale_gradients"}})
    return {key: whole[key] for key in STAGES[stage].config}


def inputs_of(run: Run, data: DataSet, stage: str) -> dict[str, str]:
    """Digests of what a stage reads."""
    inputs = {"data": data.fingerprint(), "classes": _names(data)}
    for before in STAGES[stage].after:
        product = STAGES[before].product(run.directory)
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


def check_same(run: Run, data: DataSet, stage: str, records: Mapping[str, Any]) -> None:
    """Refuse where a stage, done or begun, was made from something else than is asked for now."""
    record = records.get(stage)
    if record is None:
        return
    found = changes(record["config"], config_of(run.recipe, stage))
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


def made_from(stages: Sequence[str], left: Sequence[str], records: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of these stages, those with a record whose inputs hold what one that is to be done from the start has made before."""
    return [
        (stage, before)
        for stage in stages
        if stage in records
        for before in STAGES[stage].after
        if before in left and before not in records and before in records[stage]["inputs"]
    ]


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
            for one in needed([stage]):
                record = records.get(one, {"done": False})
                found = changes(record["config"], config_of(recipe, one)) if record["done"] else ["it is not done"]
                found += _other_file(recipe, one, record) if record["done"] else []
                for before in STAGES[one].after if record["done"] else ():
                    product = STAGES[before].product(directory)
                    if product.is_file() and record["inputs"].get(before) != files.file_digest(product):
                        found.append(f"{before} was done again since")
                advice = "say the overrides that it was made with, do it again, or use another --out"
                _refuse(directory, one, found, f"{advice}; or give the file, {path}")
            return path
    raise UserError(
        f"stage train is not done in {directory.path}: bitswitch run {typed} --out {directory.path} does it, with the same "
        "overrides"
    )
