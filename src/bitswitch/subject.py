"""The network that a file holds, and the data that it is for."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitswitch import artifact, files
from bitswitch.data import DataSet, Preprocessing, Shown, load_data, place_of, unseen
from bitswitch.errors import UserError
from bitswitch.export import load
from bitswitch.models import build, is_trusted, load_weights
from bitswitch.nn import Plan, apply
from bitswitch.training import load_checkpoint


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network, and what its file says of itself.

    Attributes:
        model: the network.
        widths: what it can be switched to; empty for a float network.
        held: those of an artifact whose planes are there.
        preprocessing, classes, data, data_config: of what it was trained on, None where the file does not tell.
        provenance: of an artifact.
        frontier: of an artifact.
    """

    model: nn.Module
    widths: tuple[int, ...]
    held: tuple[int, ...] = ()
    preprocessing: Mapping[str, Any] | None = None
    classes: tuple[str, ...] | None = None
    data: str | None = None
    data_config: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] | None = None
    frontier: tuple[Mapping[str, Any], ...] = ()


def subject_of(path: Path, network: str | None, bits: Sequence[int] | None = None) -> Subject:
    """The network of an artifact, of a run's checkpoint or of anybody's float weights.

    Args:
        path: of the file.
        network: its name where the file does not tell, or names the user's own code.
        bits: the widths that an artifact shall serve; it stands at the highest.

    Raises:
        UserError: the file cannot be used, or its network is not known.
    """
    if not files.is_file(path) or _is_artifact(path):
        # What is missing or a folder is told by the reader of artifacts, too.
        return _of_artifact(path, network, bits)
    if path.suffix != ".safetensors":
        state = load_checkpoint(path)
        if "model" in state and "about" in state:
            return _of_training(path, state, network)
    if network is None:
        raise UserError(f"{path} is a checkpoint of weights alone: name its network with --model")
    model = build(network)
    load_weights(model, path)
    return Subject(model=model, widths=())


def _is_artifact(path: Path) -> bool:
    # Of that suffix, what cannot be read is for the reader of artifacts to tell.
    return artifact.is_artifact(path, unreadable=path.suffix == ".safetensors")


def _of_artifact(path: Path, network: str | None, bits: Sequence[int] | None = None) -> Subject:
    """The artifact at its highest width; of one that is cut off, at the highest that was asked for or that it holds."""
    header = artifact.read_header(path)
    # Where it holds none, the loader says so.
    held = artifact.served_widths(path) or header.widths
    highest = max(bits) if bits and set(bits) <= set(header.widths) else held[0]
    config = header.provenance.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    return Subject(
        model=load(path, bits=highest, model=network),
        widths=header.widths,
        held=held,
        preprocessing=header.preprocessing,
        classes=header.classes,
        data=str(header.provenance["data"]) if header.provenance.get("data") else None,
        data_config=data if isinstance(data, dict) else None,
        provenance=header.provenance,
        frontier=header.frontier,
    )


def _of_training(path: Path, state: Mapping[str, Any], network: str | None) -> Subject:
    try:
        about, plan = state["about"], Plan.from_json(state["plan"]) if "plan" in state else None
        known = {key: about[key] for key in ("preprocessing", "data", "data_config")}
        named, args = str(about["network"]["name"]), dict(about["network"]["args"])
        for key in ("preprocessing", "data_config"):
            if not isinstance(known[key], dict | None):
                raise TypeError(f"{key} is a {type(known[key]).__name__}")
        classes, weights = tuple(about["classes"]), {str(key): value for key, value in state["model"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a whole checkpoint of a stage ({error!r})") from error
    name = network or named
    if network is None and not is_trusted(name):
        raise UserError(
            f"{path} names the network {name!r}, and no code is imported on the word of a file: give --model"
        )
    model = build(name, args)
    if plan is not None:
        apply(model, plan)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {name}: {' '.join(str(error).split())[:300]}") from error
    return Subject(model=model, widths=plan.widths if plan else (), classes=classes, **known)


def example_images(
    path: Path, count: int, *, data_name: str | None = None, network: str | None = None, shown: Shown
) -> Tensor:
    """The first training images for an artifact's network, float32 [count, C, H, W].

    Args:
        path: the artifact.
        count: how many.
        data_name: a data name or an image folder; the data it was trained on where None.
        network: its name where the file does not tell, or names the user's own code.
        shown: see `load_data`.

    Raises:
        UserError: the file, the network or the data cannot be used.
    """
    subject = _of_artifact(path, network)
    name = data_name or subject.data
    if not name:
        raise UserError(f"{path} does not say what data it is for: give them with --data")
    return data_for(path, name, subject, shown).sample(count)


def data_for(path: str | Path, name: str, subject: Subject, shown: Shown = unseen) -> DataSet:
    """The data as the network wants them: the same split as in its training, its own normalization and size."""
    config = subject.data_config or {}
    said = {key: config[key] for key in ("val_fraction", "unreadable") if key in config}
    try:
        data = load_data(*place_of(name, config.get("name")), **said, shown=shown)
    except TypeError as error:
        raise UserError(f"{path} tells of its data what they cannot have ({error}): {said}") from error
    if subject.preprocessing is not None:
        data = data.with_preprocessing(Preprocessing.from_json(dict(subject.preprocessing)))
    else:
        warnings.warn(
            f"{path} does not say how its images are made ready: those of {name} are by the mean and the standard deviation of "
            "their own; save it with preprocessing=",
            stacklevel=2,
        )
    if subject.classes is not None and subject.classes != data.classes:
        raise UserError(f"{name} has the classes {_few(data.classes)}, {path} was trained on {_few(subject.classes)}")
    return data


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''} ({len(names)})"
