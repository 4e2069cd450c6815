"""Knowledge distillation (Hinton et al., arXiv 1503.02531)."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

from bitswitch.errors import UserError, check_number, check_word

Teacher = Literal["none", "float", "highest"]


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Who teaches, and how much it counts.

    Attributes:
        teacher: "none"; "float", the float network that training started from, for every width; "highest", the highest
            width of the same network in the same step, for the widths below it.
        temperature: T, which both sides' logits are divided by.
        weight: w in `(1 - w) * cross-entropy + w * T^2 * KL(teacher || student)`.
    """

    teacher: Teacher = "none"
    temperature: float = 1.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        check_word("teacher", self.teacher, get_args(Teacher))
        check_number("temperature", self.temperature)
        check_number("weight", self.weight)
        if not (0 < self.temperature < math.inf and 0 <= self.weight <= 1):
            given = f"temperature={self.temperature!r}, weight={self.weight!r}"
            raise UserError(f"{given}: a temperature is above 0 and finite, a weight from 0 to 1")

    def loss(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        """Mean loss over a batch.

        Args:
            logits: of the student, [N, classes].
            labels: int64 [N].
            teacher: the teacher's logits, [N, classes], detached; None: cross-entropy alone.
        """
        loss = F.cross_entropy(logits, labels)
        if teacher is None:
            return loss
        student = F.log_softmax(logits / self.temperature, 1)
        target = F.log_softmax(teacher / self.temperature, 1)
        # "batchmean": the default reduction would divide by the number of classes as well.
        divergence = F.kl_div(student, target, reduction="batchmean", log_target=True)
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * divergence
