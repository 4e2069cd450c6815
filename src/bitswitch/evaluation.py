"""Evaluation of an artifact, a run's checkpoint or anybody's float weights on any data."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitswitch import artifact
from bitswitch.data import DataSet, Preprocessing, load_data
from bitswitch.errors import UserError
from bitswitch.export import load
from bitswitch.machine import machine
from bitswitch.models import build, is_trusted, load_weights
from bitswitch.nn import Plan, apply
from bitswitch.training import World, evaluate, load_checkpoint, recalibrate

_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A network to evaluate, and what its file says of itself.

    Attributes:
        model: the network.
        widths: what it can be switched to; empty for a float network.
        preprocessing, classes, data, data_config: of what it was trained on, None where the file does not tell.
        provenance: of an artifact.
    """

    model: nn.Module
    widths: tuple[int, ...]
    preprocessing: Mapping[str, Any] | None = None
    classes: tuple[str, ...] | None = None
    data: str | None = None
    data_config: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] | None = None


def evaluate_file(
    path: str | Path,
    *,
    bits: Sequence[int] | None = None,
    data_name: str | None = None,
    split: str = "test",
    network: str | None = None,
    device: torch.device,
    world: World | None = None,
    recalibration_images: int = 0,
    confusion: bool = False,
) -> dict[str, Any]:
    """Score a file at every width asked for, each batch visited once.

    Args:
        path: an artifact; a checkpoint of the train stage; or a checkpoint of float weights, which needs `network`.
        bits: widths; all that the file has where None.
        data_name: a data name or an image folder; the data it was trained on where None.
        split: "test" or "val".
        network: its name where the file does not tell, or names the user's own code.
        device: where to compute.
        world: the ranks that share the images.
        recalibration_images: estimate batch normalization statistics anew from so many training images, at each width.
        confusion: add a matrix [class, predicted class] of counts to every result.

    Returns:
        {"results": [{"bits", "assignment", "top1", "top5", "top1_interval", "loss", "images", "split", "data"}],
        "provenance": {...}}; "bits" is None for float weights.

    Raises:
        UserError: the file, the widths, the network or the data cannot be used.
    """
    subject = _subject(Path(path), network)
    wanted = _precisions(path, subject, bits)
    name = data_name or subject.data
    if not name:
        raise UserError(f"{path} does not say what data it is for: give them with --data")
    data = _data(path, name, subject)
    model, world = subject.model.to(device), world or World()
    if recalibration_images:
        for precision in wanted:
            recalibrate(model, _images(data, recalibration_images, device), precision)
    batches = data.evaluation_batches(split, batch_size=_BATCH, device=device, rank=world.rank, world=world.size)
    matrices: list[Tensor] | None = [] if confusion else None
    scores = evaluate(model, batches, wanted, world=world, classes=len(data.classes), confusion=matrices)
    results = []
    for i, (width, score) in enumerate(zip(wanted, scores, strict=True)):
        row = {"bits": width, "assignment": None, **dataclasses.asdict(score), "split": split, "data": name}
        results.append(row | ({"confusion": matrices[i].tolist()} if matrices else {}))
    provenance = dict(subject.provenance or {}) | {"evaluated_on": machine(device)}
    if recalibration_images:
        provenance["recalibration_images"] = recalibration_images
    return {"results": results, "provenance": provenance}


def _subject(path: Path, network: str | None) -> _Subject:
    if not path.is_file() or _is_artifact(path):
        # What is missing or a folder is told by the reader of artifacts, too.
        return _of_artifact(path, network)
    if path.suffix != ".safetensors":
        state = load_checkpoint(path)
        if "plan" in state and "about" in state:
            return _of_training(path, state, network)
    if network is None:
        raise UserError(f"{path} is a checkpoint of weights alone: name its network with --model")
    model = build(network)
    load_weights(model, path)
    return _Subject(model=model, widths=())


def _is_artifact(path: Path) -> bool:
    return path.suffix == ".safetensors" and artifact.is_artifact(path)


def _of_artifact(path: Path, network: str | None) -> _Subject:
    header = artifact.read_header(path)
    config = header.provenance.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    return _Subject(
        model=load(path, model=network),
        widths=header.widths,
        preprocessing=header.preprocessing,
        classes=header.classes,
        data=str(header.provenance["data"]) if header.provenance.get("data") else None,
        data_config=data if isinstance(data, dict) else None,
        provenance=header.provenance,
    )


def _of_training(path: Path, state: Mapping[str, Any], network: str | None) -> _Subject:
    try:
        about, plan = state["about"], Plan.from_json(state["plan"])
        known = {key: about[key] for key in ("network", "preprocessing", "classes", "data", "data_config")}
        weights = dict(state["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a whole checkpoint of a train stage ({error!r})") from error
    name = network or about["network"]["name"]
    if network is None and not is_trusted(name):
        raise UserError(
            f"{path} names the network {name!r}, and no code is imported on the word of a file: give --model"
        )
    model = apply(build(name, known.pop("network")["args"]), plan)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {name}: {' '.join(str(error).split())[:300]}") from error
    return _Subject(model=model, widths=plan.widths, classes=tuple(known.pop("classes")), **known)


def _precisions(path: str | Path, subject: _Subject, bits: Sequence[int] | None) -> list[int | None]:
    if not subject.widths:
        if bits:
            raise UserError(f"{path} holds float weights and has no widths: leave --bits out")
        return [None]
    if bits and len(set(bits)) < len(bits):
        raise UserError(f"--bits {','.join(map(str, bits))}: name each width once")
    for width in bits or ():
        if width not in subject.widths:
            raise UserError(f"{path} has no width {width}: it has {', '.join(map(str, subject.widths))}")
    return list(bits or subject.widths)


def _data(path: str | Path, name: str, subject: _Subject) -> DataSet:
    """The data as the network wants them: the same split as in its training, its own normalization and size."""
    config = subject.data_config or {}
    said = {key: config[key] for key in ("val_fraction", "unreadable") if key in config}
    data = load_data(name, **said)
    if subject.preprocessing is not None:
        data = data.with_preprocessing(Preprocessing.from_json(dict(subject.preprocessing)))
    if subject.classes is not None and subject.classes != data.classes:
        raise UserError(f"{name} has the classes {_few(data.classes)}, {path} was trained on {_few(subject.classes)}")
    return data


def _images(data: DataSet, count: int, device: torch.device) -> list[Tensor]:
    return [part.to(device) for part in data.sample(count).split(_BATCH)]


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} ({len(names)})"
