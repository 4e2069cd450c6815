"""What a recipe may say, and how a recipe and overrides become one checked configuration."""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from bitswitch import codes, files
from bitswitch.errors import UserError, nearest


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `on`, `yes` and `true` as true, of which pydantic would make 1.
        if _is_numeric(cls.model_fields[str(info.field_name)].annotation) and _holds_truth(value):
            raise ValueError("true and false are no numbers (in YAML on, off, yes and no are these, too)")
        return value


def _holds_truth(value: Any) -> bool:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return any(map(_holds_truth, value)) if isinstance(value, list | tuple) else isinstance(value, bool)


def _is_numeric(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(_is_numeric, get_args(annotation)))


class ModelPart(_Part):
    """The network: a name and keyword arguments; see `bitswitch.models.build`."""

    name: str
    args: dict[str, Any] = {}


class DataPart(_Part):
    """The data: a name, where they lie, how much of train is set aside as val; see `bitswitch.data.load_data`.

    `mean` and `std` replace the data's own, for weights that were trained with others."""

    name: str
    root: str | None = None
    val_fraction: float = Field(0.1, ge=0, lt=1)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    unreadable: Literal["refuse", "skip"] = "refuse"
    download: bool = False
    workers: int = Field(2, ge=0)
    cache: str | None = None


class EnginePart(_Part):
    """How forwards are computed; see `bitswitch.training.Engine`."""

    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    micro_batches: int = Field(1, ge=1)
    share_batch_norm: bool = False


class PretrainPart(EnginePart):
    """Float training: SGD with Nesterov momentum, cosine schedule, from scratch or from a checkpoint's weights."""

    checkpoint: str | None = None
    epochs: int = Field(200, ge=0)
    batch_size: int = Field(128, ge=1)
    lr: float = Field(0.1, gt=0, le=1e30)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0, le=1e30)


class DistillationPart(_Part):
    """Knowledge distillation; see `bitswitch.training.Distillation`."""

    teacher: Literal["none", "float", "highest"] = "none"
    temperature: float = Field(1.0, gt=0)
    weight: float = Field(0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _used(self) -> "DistillationPart":
        if self.model_fields_set and "teacher" not in self.model_fields_set:
            raise ValueError("a temperature and a weight are a teacher's: set teacher, too, float or highest")
        return self


class QuantizedPart(EnginePart):
    """What joint and SuperNet training share: two Adams, cosine schedule, ALRS, distillation."""

    distillation: DistillationPart = DistillationPart()
    epochs: int = Field(200, ge=1)
    batch_size: int = Field(128, ge=1)
    lr: float = Field(5e-4, gt=0, le=1e30)
    scale_lr: float | None = Field(None, gt=0, le=1e30)
    weight_decay: float = Field(5e-5, ge=0, le=1e30)
    order: Literal["each", "accumulate"] = "each"
    alrs: Literal["relative", "printed", "off"] = "relative"
    eta: Literal["paper"] | float | dict[int, float] = 1.0
    clip: float = Field(1.0, gt=0)

    @field_validator("eta")
    @classmethod
    def _not_negative(cls, value: Any) -> Any:
        factors = value.values() if isinstance(value, dict) else [0.0 if value == "paper" else value]
        if min(factors, default=0.0) < 0:
            raise ValueError("a learning rate's factor is not negative")
        return value

    @field_validator("alrs", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        # YAML reads a bare `off` as false.
        return "off" if value is False else value


class TrainPart(QuantizedPart):
    """Joint multi-precision training, from the float network.

    A step visits every width, or with `forwards` the lowest and forwards - 1 others drawn evenly."""

    method: Literal["double_rounding", "per_width", "lsq", "adabits", "bit_mixer", "centred"] = "double_rounding"
    scale_form: Literal["raw", "log"] = "log"
    per_channel: bool = False
    lsq_factor: bool = True
    forwards: int | None = Field(None, ge=1)
    keep: tuple[str, ...] = ()
    calibration_images: int = Field(512, ge=1)
    record_scale_gradients: bool = False


class SensitivityPart(_Part):
    """Hessian traces of the float network on training images; see `bitswitch.hessian_trace`."""

    images: int = Field(1000, ge=1)
    batch_size: int = Field(128, ge=1)
    target: float = Field(0.1, gt=0)
    probes: int = Field(1000, ge=2)


class SupernetPart(QuantizedPart):
    """SuperNet training, from the multi-precision network; see `bitswitch.training.AssignmentSampler`.

    `sensitive` is "mean" or a quantile; `watched` random mixtures are scored on val after every epoch."""

    sampler: Literal["hasb", "uniform", "fixed"] = "hasb"
    sigma: float = Field(0.5, ge=0, le=1)
    sandwich: bool = False
    sensitive: Literal["mean"] | float = "mean"
    cap: float = Field(1.0, gt=0, le=1)
    batch_norm: Literal["transitional", "switchable"] = "transitional"
    watched: int = Field(4, ge=0)

    @model_validator(mode="after")
    def _drawn(self) -> "SupernetPart":
        if self.sandwich and self.sampler == "fixed":
            raise ValueError(
                "supernet.sandwich=true draws its middle forward: use sampler=hasb or uniform, or sandwich=false"
            )
        return self

    @field_validator("sensitive")
    @classmethod
    def _quantile(cls, value: Any) -> Any:
        if value != "mean" and not 0 <= value <= 1:
            raise ValueError("use mean, or a quantile from 0 to 1")
        return value


class SearchPart(_Part):
    """The programme; see `bitswitch.search`.

    Budgets are those listed (a number: the average bits; {cost: most}: any costs at once), or else `points` of them, evenly
    from the least to the greatest sum of the cost `budget`. Choices are scored on `val_images` of val."""

    damage: Literal["hessian", "linear", "accuracy"] = "hessian"
    budget: str = "bits"
    points: int = Field(16, ge=1)
    budgets: tuple[float | dict[str, float], ...] | None = None
    tied: tuple[tuple[str, ...], ...] = ()
    tie_shared_inputs: bool = False
    latency: str | None = None
    alternatives: bool = False
    genetic_evaluations: int = Field(0, ge=0)
    val_images: int = Field(10_000, ge=0)

    @field_validator("budgets")
    @classmethod
    def _budgets(cls, value: Any) -> Any:
        if value is not None and (not value or {} in value):
            raise ValueError("give at least one budget, each with a cost, such as [4, {bits: 3, bytes: 90000}]")
        return value


class Recipe(_Part):
    """A whole run."""

    seed: int = Field(0, ge=0, lt=2**31)
    bits: tuple[int, ...] = (8, 6, 4, 2)
    model: ModelPart
    data: DataPart
    pretrain: PretrainPart = PretrainPart()
    train: TrainPart = TrainPart()
    sensitivity: SensitivityPart = SensitivityPart()
    supernet: SupernetPart | None = None
    search: SearchPart = SearchPart()

    @field_validator("bits", mode="before")
    @classmethod
    def _widths(cls, value: Any) -> Any:
        return codes.check_widths(value)

    @model_validator(mode="after")
    def _etas(self) -> "Recipe":
        for name, part in (("train", self.train), ("supernet", self.supernet)):
            if part is not None and isinstance(part.eta, dict) and set(part.eta) != set(self.bits):
                raise ValueError(f"{name}.eta={part.eta}: give one factor for each of bits={list(self.bits)}")
        return self

    @model_validator(mode="after")
    def _forwards(self) -> "Recipe":
        if (self.train.forwards or 0) > len(self.bits):
            raise ValueError(
                f"train.forwards={self.train.forwards}: a step visits at most all of bits={list(self.bits)}"
            )
        if self.train.forwards == 1 and len(self.bits) > 1:
            raise ValueError(
                f"train.forwards=1: only {self.bits[-1]} bits would be trained; use bits=[{self.bits[-1]}]"
            )
        return self


def recipe_names() -> list[str]:
    """The built-in recipes."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("bitswitch.recipes").iterdir() if ".yaml" in p.name
    )


def load_recipe(recipe: str, overrides: Sequence[str] = (), *, seed: int | None = None) -> Recipe:
    """A checked configuration.

    Args:
        recipe: a built-in recipe's name, or the path of a YAML file; its key `extends` names another that it is laid over.
        overrides: "key.of.part=value"; the value is read as YAML.
        seed: in place of the recipe's.

    Raises:
        UserError: no such recipe, not YAML, an unknown key, or a value that does not fit.
    """
    value = _read(recipe)
    for override in overrides:
        _override(value, override)
    if seed is not None:
        value["seed"] = seed
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise UserError(f"recipe {recipe}: {_first(error, value)}") from error


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def part_digest(value: Any) -> str:
    """A digest of plain JSON values."""
    return files.digest(files.canonical_json(value).encode())


def _read(recipe: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        if recipe not in recipe_names():
            hint = nearest(recipe, recipe_names())
            raise UserError(
                f"no recipe is named {recipe!r}{hint}; there are: {', '.join(recipe_names())}, or a .yaml file"
            )
        text = resources.files("bitswitch.recipes").joinpath(f"{recipe}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UserError(f"recipe {recipe} cannot be read: {reason}") from error
    value = _yaml(text, f"recipe {recipe}")
    if not isinstance(value, dict):
        raise UserError(f"recipe {recipe} is not a mapping of keys to values")
    parent = value.pop("extends", None)
    if parent is None:
        return value
    if not isinstance(parent, str) or recipe in above:
        raise UserError(f"recipe {recipe}: extends={parent!r} does not name another recipe that ends the chain")
    if path.suffix and Path(parent).suffix:
        parent = str(path.parent / parent)
    return _laid_over(_read(parent, (*above, recipe)), value)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings merged; everything else of `above` replaces that of `below`."""
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = _laid_over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


class _Loader(yaml.SafeLoader):
    """YAML without what nobody means: a key said twice, of which the last would count, and numbers to base 60 (1:30 is 90)."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, since what a merge key brings in comes later.
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key[1]!r} is there twice", node.start_mark
                )
        return node

    def number_or_text(self, node: yaml.ScalarNode) -> Any:
        """What has a colon is text."""
        if ":" in node.value:
            return node.value
        return self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.number_or_text)


def _yaml(text: str, where: str) -> Any:
    try:
        value = yaml.load(text, _Loader)
        # What holds itself, by an anchor, is no plain value.
        json.dumps(value, default=str)
        return value
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        # The latter from values of a type that YAML knows, such as a date that there is not.
        raise UserError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _override(value: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not key=value, such as train.epochs=30")
    *parents, last = key.split(".")
    for parent in parents:
        # A part that is left out is null where a recipe was printed.
        inner = value.get(parent)
        inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise UserError(f"override {override!r}: {parent!r} has no keys inside")
        # A copy: through an anchor of YAML, another part may be the same mapping.
        value[parent] = value = dict(inner)
    value[last] = _yaml(text, f"the value of {key}")
    if " #" in text and "#" not in str(value[last]):
        raise UserError(
            f"override {override!r}: YAML takes what follows ' #' for a comment: quote the value, {key}=\"'...'\""
        )


def _first(error: ValidationError, value: Any) -> str:
    """The first thing that is wrong, in one line."""
    found = [(_location(one["loc"], value, one["type"] == "missing"), one) for one in error.errors()]
    # Of alternatives, the one that fits furthest is likely the one that was meant.
    start = found[0][0]
    location, first = max((one for one in found if one[0][: len(start)] == start), key=lambda one: len(one[0]))
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        elsewhere = [f"{part}.{key}" for part in _PARTS if key in _known_keys([part])]
        near = nearest(location[-1], known).replace("'", f"'{key.removesuffix(location[-1])}", 1)
        hint = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else near
        return f"unknown key {key!r}{hint}; known here: {', '.join(known)}"
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    if first["type"] == "model_type":
        return f"{key}={first['input']!r}: give its keys, such as {key}.{_known_keys(location)[0]}=..."
    same = [one["msg"] for at, one in found if at == location]
    message = first["msg"].removeprefix("Value error, ")
    if len(same) > 1 and all(one.startswith(_SHOULD) for one in same):
        message = _SHOULD + " or ".join(one.removeprefix(_SHOULD).partition(", unable")[0] for one in same)
    if not key:
        return message
    if first["type"] == "string_type" and not isinstance(first["input"], list | dict):
        told = "" if isinstance(first["input"], bool) else f", {key}=\"'{first['input']}'\""
        message += f": quote it{told}"
    return f"{key}={first['input']!r}: {message[0].lower()}{message[1:]}" if key != "bits" else message


def _location(parts: Sequence[str | int], value: Any, missing: bool) -> list[str]:
    """The keys that lead to what is wrong or missing, without the names of alternatives of a union, which no user wrote."""
    keys = []
    for i, part in enumerate(parts):
        if isinstance(value, dict) and (part in value or (missing and i == len(parts) - 1)):
            keys.append(str(part))
            value = value.get(part)
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            value = value[part]
    return keys


_SHOULD = "Input should be "
_PARTS = ("model", "data", "pretrain", "train", "sensitivity", "supernet", "search")


def _known_keys(location: Sequence[str]) -> list[str]:
    part: Any = Recipe
    for name in location:
        annotation = part.model_fields[name].annotation
        # A part that may be left out is a union with None.
        part = next((one for one in get_args(annotation) if hasattr(one, "model_fields")), annotation)
    return list(part.model_fields)
