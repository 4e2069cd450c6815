"""What a recipe may say."""

import json
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from bitswitch import codes


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

    @field_validator("args")
    @classmethod
    def _stored_as_they_are(cls, value: dict[str, Any]) -> dict[str, Any]:
        # Checkpoints and artifacts hold them, by which the network is built again.
        try:
            same = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise ValueError(
                "give what JSON holds: text, finite numbers, true, false, null, lists, and mappings by text"
            )
        return value


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

    @model_validator(mode="after")
    def _eta_used(self) -> "QuantizedPart":
        factors = set(self.eta.values()) if isinstance(self.eta, dict) else {self.eta}
        if self.alrs == "off" and factors != {1}:
            raise ValueError("eta is a factor of ALRS, which alrs=off leaves out: set eta=1 with it")
        return self


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
        if self.sampler != "hasb" and (self.sensitive != "mean" or self.cap != 1):
            raise ValueError(
                f"supernet.sensitive and supernet.cap are hasb's, and sampler={self.sampler}: leave them out"
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
    def _taught(self) -> "Recipe":
        for name, part in (("train", self.train), ("supernet", self.supernet)):
            if part is not None and part.distillation.teacher == "highest" and len(self.bits) == 1:
                raise ValueError(
                    f"{name}.distillation.teacher=highest teaches the widths below it, and there are none: use float"
                )
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
