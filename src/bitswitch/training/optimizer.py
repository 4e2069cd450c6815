"""Two Adams for a network of several precisions: one for the weights, one for the scales."""

import copy
import math
from collections.abc import Mapping
from itertools import chain
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bitswitch.errors import UserError, check_number, check_word
from bitswitch.nn import ActivationQuantizer, PerWidthWeightQuantizer, WeightQuantizer, quantized_layers
from bitswitch.training.alrs import AlrsForm, adapted_rate, paper_eta


class MultiPrecisionOptimizer:
    """Adam for weights and everything that is not a scale, a second Adam without weight decay for the scales, ALRS.

    A parameter that took no part in a step has no gradient and is left exactly as it is: the scales, offsets and batch
    normalizations of the widths that were not active keep their values, momentum included.

    Args:
        model: made by `bitswitch.quantize`.
        lr: learning rate of the weights.
        scale_lr: learning rate of the scales, lambda of ALRS; where None, `lr`. For scales learned as logarithms it is
            the relative change of a scale in one step, or less where a gradient is as small as Adam's eps, 1e-8: those of
            8-bit scales of inputs can be.
        weight_decay: of the weights; scales have none.
        alrs: "relative", "printed" or "off"; see `bitswitch.training.adapted_rate`.
        eta: ALRS's factor of each width: "paper", or one number for all widths, or {width: number}.
        clip: every element of a scale's gradient is clipped to [-clip, clip].

    Attributes:
        widths: the candidate widths, highest first: the order in which a joint step visits them.
        factor: what a schedule multiplies every learning rate by; 1 at first.

    Raises:
        UserError: the model has no quantized layers or nothing to train, or eta misses a width.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 5e-4,
        *,
        scale_lr: float | None = None,
        weight_decay: float = 5e-5,
        alrs: AlrsForm = "relative",
        eta: Literal["paper"] | float | Mapping[int, float] = 1.0,
        clip: float = 1.0,
    ) -> None:
        check_word("alrs", alrs, get_args(AlrsForm))
        numbers = {"lr": lr, "scale_lr": scale_lr, "weight_decay": weight_decay, "clip": clip}
        for name, number in numbers.items():
            if name != "scale_lr" or number is not None:
                check_number(name, number)
        if not (
            0 < lr < math.inf
            and (scale_lr is None or 0 < scale_lr < math.inf)
            and 0 <= weight_decay < math.inf
            and clip > 0
        ):
            raise UserError(
                "lr, scale_lr and clip are greater than 0, weight_decay is not negative, all but clip are finite"
            )
        lists = {layer.widths: name for name, layer in quantized_layers(model).items()}
        if len(lists) > 1:
            told = ", ".join(f"{name} {list(widths)}" for widths, name in lists.items())
            raise UserError(
                f"layers have other widths than others ({told}): quantize them together, or train them apart"
            )
        self.widths = next(iter(lists))
        self.lr = lr
        self.scale_lr = lr if scale_lr is None else scale_lr
        self.alrs = alrs
        self.clip = clip
        self.factor = 1.0
        self.eta = self._etas(eta)
        if alrs == "off" and set(self.eta.values()) != {1.0}:
            raise UserError(f"eta={eta!r} is a factor of ALRS, which alrs='off' leaves out: leave eta out, too")
        if not all(0 <= value < math.inf for value in self.eta.values()):
            raise UserError(f"eta={eta!r}: a learning rate's factor is finite and not negative")
        groups = _scales(model)
        scales = {id(parameter) for group in groups.values() for parameter in group}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in scales]
        if not any(groups.values()):
            raise UserError(
                "this model has no scale to train: all are frozen (requires_grad is False), as those of a model loaded from an "
                "artifact are, which holds codes and no weights"
            )
        # Fused: one kernel over all parameters, and a learning rate that may be a tensor, so that ALRS waits for nothing.
        fused = all(parameter.is_floating_point() for parameter in rest)
        self._weights = torch.optim.Adam(rest, lr=lr, weight_decay=weight_decay, fused=fused) if rest else None
        self._scales = torch.optim.Adam(
            [{"params": group, "name": name} for name, group in groups.items() if group], lr=self.scale_lr, fused=True
        )
        # Without the prefixes of torch.compile and DistributedDataParallel.
        names = {id(p): name.replace("_orig_mod.", "").removeprefix("module.") for name, p in model.named_parameters()}
        self._names = [names[id(parameter)] for parameter in (*rest, *(p for group in groups.values() for p in group))]

    def _etas(self, eta: Literal["paper"] | float | Mapping[int, float]) -> dict[int, float]:
        if eta == "paper":
            return {width: paper_eta(self.widths[0], width) for width in self.widths}
        if isinstance(eta, Real):
            check_number("eta", eta)
            return dict.fromkeys(self.widths, float(eta))
        if not isinstance(eta, Mapping) or set(eta) != set(self.widths):
            raise UserError(f"eta={eta!r}: give 'paper', one number, or one for each of {list(self.widths)}")
        for width in self.widths:
            check_number(f"eta[{width}]", eta[width])
        return {width: float(eta[width]) for width in self.widths}

    def step(self, width: int | None = None, *, mixed: bool = False) -> None:
        """One step from the gradients that are there, then clear them.

        Args:
            width: the bit-width of the forward that gave the gradients; None where several widths' were summed.
            mixed: the forward stood for `width`, but some of its layers had others.

        Where widths were summed or mixed, each width's own scales move at that width's rate, and the shared weight scales at
        the rate of `width`, or of the highest.

        Raises:
            UserError: no candidate width, or there are gradients of another one's scales; nothing has moved.
        """
        if width is not None and width not in self.widths:
            raise UserError(f"width {width!r} is not one of {list(self.widths)}")
        # A tensor or a NumPy number is equal to a width, and no member of a set of widths.
        width = None if width is None else int(width)
        if width is not None and not mixed:
            self._check_gradients(width)
        if self._weights is not None:
            for group in self._weights.param_groups:
                group["lr"] = self.lr * self.factor
            _lay_alike(self._weights)
            self._weights.step()
            self._weights.zero_grad(set_to_none=True)
        self._step_scales(width, mixed=mixed or width is None)

    def _check_gradients(self, width: int) -> None:
        given = (g["name"] for g in self._scales.param_groups if any(p.grad is not None for p in g["params"]))
        others = {self._own_width(name, width) for name in given} - {width}
        if others:
            told = " and ".join(map(str, sorted(others, reverse=True)))
            raise UserError(
                f"step({width}) found gradients of {told} bits: step after the backward of each width, with that width; "
                f"where several widths' are summed, say step(), and where layers had others, step({width}, mixed=True); "
                "zero_grad() drops what is left from before, zeros too"
            )

    def _step_scales(self, width: int | None, *, mixed: bool) -> None:
        present = {g["name"]: [p.grad for p in g["params"] if p.grad is not None] for g in self._scales.param_groups}
        # ALRS's gradients are the clipped ones.
        self._clip(present)
        rate = self.scale_lr * self.factor
        if not mixed:
            assert width is not None
            active = [grad for name, grads in present.items() if not name.startswith("offset") for grad in grads]
            one = adapted_rate(rate, self.eta[width], active, self.alrs)
        for group in self._scales.param_groups:
            if mixed:
                own = self._own_width(group["name"], width)
                # An offset goes with the scale: its own gradient is in other units.
                scales = present.get(group["name"].replace("offset", "inputs"), [])
                group["lr"] = adapted_rate(rate, self.eta[own], scales, self.alrs)
            else:
                group["lr"] = one
            if group["name"].startswith("offset"):
                # An offset is in units of the data, as a weight is, whatever form the scales are learned in.
                group["lr"] = group["lr"] * (self.lr / self.scale_lr)
        self._scales.step()
        self._scales.zero_grad(set_to_none=True)

    def _own_width(self, name: str, width: int | None) -> int:
        return width or self.widths[0] if name == "weights" else int(name.rpartition(" ")[2])

    def _clip(self, present: Mapping[str, list[Tensor]]) -> None:
        gradients = [gradient for group in present.values() for gradient in group]
        if gradients:
            torch._foreach_clamp_min_(gradients, -self.clip)
            torch._foreach_clamp_max_(gradients, self.clip)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in (self._weights, self._scales):
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, without pickled objects."""
        return {
            "weights": self._weights.state_dict() if self._weights is not None else None,
            "scales": self._scales.state_dict(),
            "factor": self.factor,
            "names": list(self._names),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`: what Adam remembers, and `factor`; rates and weight decay stay this optimizer's own.

        Raises:
            UserError: it is of another kind of optimizer, or of other parameters: some were frozen then and are not now, or
                the other way round.
        """
        if missing := [key for key in ("weights", "scales", "factor") if key not in state]:
            raise UserError(f"the state lacks {missing[0]!r}: it is of another kind of optimizer")
        optimizers = [(self._weights, state["weights"]), (self._scales, state["scales"])]
        # A state of an earlier version has no names.
        same = state.get("names", self._names) == self._names
        if not same or not all(_is_state_of(optimizer, saved) for optimizer, saved in optimizers):
            raise UserError(
                "the state is of an optimizer of other parameters: quantize with the same options, and freeze the same ones "
                "before both are made, or after"
            )
        for optimizer, saved in optimizers:
            if optimizer is not None:
                decays = [group["weight_decay"] for group in optimizer.param_groups]
                # torch would go on with the very tensors of the other optimizer.
                optimizer.load_state_dict(copy.deepcopy(saved))
                for group, decay in zip(optimizer.param_groups, decays, strict=True):
                    group["weight_decay"] = decay
        self.factor = state["factor"]


def _lay_alike(optimizer: torch.optim.Optimizer) -> None:
    """Give moments the strides of their parameters, which may have come to another memory format since.

    torch's fused kernel goes through all of them in the order of memory.
    """
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state and state[name].stride() != parameter.stride():
                laid = torch.empty_like(parameter, dtype=state[name].dtype)
                # Of a parameter that is a part of another tensor there is none of its strides.
                if laid.stride() == parameter.stride():
                    state[name] = laid.copy_(state[name])


def _is_state_of(optimizer: torch.optim.Optimizer | None, saved: Mapping[str, Any] | None) -> bool:
    """Whether a state has as many parameters in each group, and moments of their shapes, which torch does not look at."""
    if optimizer is None or saved is None:
        return optimizer is saved
    own, theirs = ([group["params"] for group in groups] for groups in (optimizer.param_groups, saved["param_groups"]))
    if list(map(len, own)) != list(map(len, theirs)):
        return False
    moments = ((p, saved["state"].get(number, {})) for p, number in zip(chain(*own), chain(*theirs), strict=True))
    return all(state[name].shape == p.shape for p, state in moments for name in ("exp_avg", "exp_avg_sq") if state)


def _scales(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Scales and offsets by group: "weights", shared; of each width "weights <width>", "inputs <width>", "offset <width>"."""
    groups: dict[str, list[nn.Parameter]] = {"weights": []}
    for module in model.modules():
        if isinstance(module, WeightQuantizer):
            groups["weights"] += module.scale_parameters()
        elif isinstance(module, PerWidthWeightQuantizer):
            for width, parameter in module.scale_parameter.items():
                groups.setdefault(f"weights {width}", []).append(parameter)
        elif isinstance(module, ActivationQuantizer):
            for width, parameter in module.scale_parameter.items():
                groups.setdefault(f"inputs {width}", []).append(parameter)
            for width, parameter in module.offset.items():
                groups.setdefault(f"offset {width}", []).append(parameter)
    return {name: [p for p in group if p.requires_grad] for name, group in groups.items()}
