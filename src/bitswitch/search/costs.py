"""Costs of layers at each width: what a choice of widths is budgeted by."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from bitswitch import files
from bitswitch.errors import UserError
from bitswitch.nn import QuantizedLayer, evaluating, quantized_layers, unwrapped
from bitswitch.search.programme import Problem, Table, check_table, no_cost


@dataclass(frozen=True)
class LayerCost:
    """What a layer's precision is multiplied with.

    Attributes:
        weights: how many the layer has.
        macs: multiply-accumulate operations for one image.
    """

    weights: int
    macs: int


def layer_costs(model: nn.Module, example_inputs: tuple[Any, ...]) -> dict[str, LayerCost]:
    """Count every quantized layer's weights and operations in one forward of real size.

    Args:
        model: made by `bitswitch.quantize`, or loaded.
        example_inputs: what the model is called with; the first axis of the first tensor is the batch.

    Returns:
        {layer: its cost}, in the order of definition; a layer that did not run has no operations.

    Raises:
        UserError: the inputs have no tensor with a batch.
    """
    layers = quantized_layers(model)
    batch = next((len(x) for x in tree_leaves(example_inputs) if isinstance(x, Tensor) and x.dim()), 0)
    if not batch:
        raise UserError("example_inputs hold no image to count operations for")
    whole = _results_of(model, example_inputs)
    # What does not grow with the batch, such as a layer that reads learned positions, is computed whole for one image, too.
    without_one = tree_map_only(Tensor, lambda x: x[:-1] if x.dim() and len(x) == batch else x, example_inputs)
    less: dict[str, int] = {}
    if batch > 1:
        # Some take batches of one size alone.
        with suppress(Exception):
            less = _results_of(model, without_one)
    per_image = {name: count // (1 if less.get(name) == count else batch) for name, count in whole.items()}
    shapes = {name: layer.stored_shape for name, layer in layers.items()}
    return {
        name: LayerCost(shape.numel(), per_image.get(name, 0) * (shape.numel() // shape[0]))
        for name, shape in shapes.items()
    }


def _results_of(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, int]:
    """How many numbers every quantized layer that runs gives."""
    found: dict[str, int] = {}

    def count(name: str, _input: Tensor, output: Tensor) -> None:
        found[name] = found.get(name, 0) + output.numel()

    _run_once(model, inputs, count)
    return found


def shared_inputs(model: nn.Module, example_inputs: tuple[Any, ...]) -> list[list[str]]:
    """Groups of quantized layers that read one and the same tensor, such as a block's first convolution and its shortcut's.

    Args:
        model: made by `bitswitch.quantize`, or loaded.
        example_inputs: what the model is called with.

    Returns:
        Groups of two layers or more, in the order of definition.
    """
    layers = quantized_layers(model)
    # The tensors are held, so that no two have one identity.
    readers: dict[int, tuple[Tensor, list[str]]] = {}

    def read(name: str, given: Tensor, _output: Tensor) -> None:
        readers.setdefault(id(given), (given, []))[1].append(name)

    _run_once(model, example_inputs, read)
    groups = [[name for name in layers if name in names] for _, names in readers.values()]
    return [group for group in groups if len(group) > 1]


@torch.no_grad()
def _run_once(model: nn.Module, example_inputs: tuple[Any, ...], see: Callable[[str, Tensor, Tensor], None]) -> None:
    """One forward in eval mode: `see` gets the name, input and output of every quantized layer that runs."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _layer, args, named, output: see(name, args[0] if args else named["input"], output)

    with ExitStack() as stack:
        for name, layer in quantized_layers(model).items():
            stack.callback(layer.register_forward_hook(hook(name), with_kwargs=True).remove)
        with evaluating(model):
            model(*example_inputs)


def bitops(costs: Mapping[str, LayerCost], widths: Mapping[str, int]) -> int:
    """Bit operations for one image: the sum over layers of weight bits x activation bits x MACs.

    The first and the last layer, which stay float, are not counted.
    """
    return sum(cost.macs * widths[name] ** 2 for name, cost in costs.items())


def cost_tables(
    model: nn.Module, example_inputs: tuple[Any, ...] | None = None, latency: Table | None = None
) -> dict[str, Table]:
    """Additive cost tables {cost: {layer: {width: number}}} of a quantized network.

    Args:
        model: made by `bitswitch.quantize`, or loaded.
        example_inputs: what the model is called with, for "bitops"; that cost is left out where None.
        latency: {layer: {width: time}}, measured; left out where None.

    Returns:
        "bits": the average width over layers, as in the paper; "weight_bits": the average over weights; "bytes": of the
        narrowed model, codes packed at their widths and every layer's padded to a byte, everything else 4 bytes a number;
        "bitops": weight bits x activation bits x MACs for one image; "latency": as given.

    Raises:
        UserError: the latency table lacks a layer or width, or holds what is no time.
    """
    layers = quantized_layers(model)
    widths = {name: layer.widths for name, layer in layers.items()}
    counts = {name: layer.stored_shape.numel() for name, layer in layers.items()}
    total = sum(counts.values())
    # What does not depend on widths is counted once, with the first layer.
    rest = dict.fromkeys(layers, 0) | {next(iter(layers)): 4 * _numbers_besides(model)}
    tables: dict[str, Table] = {
        "bits": {name: {w: w / len(layers) for w in widths[name]} for name in layers},
        "weight_bits": {name: {w: w * counts[name] / total for w in widths[name]} for name in layers},
        "bytes": {name: {w: -(-counts[name] * w // 8) + rest[name] for w in widths[name]} for name in layers},
    }
    if example_inputs is not None:
        macs = layer_costs(model, example_inputs)
        tables["bitops"] = {name: {w: macs[name].macs * w * w for w in widths[name]} for name in layers}
    if latency is not None:
        reference = {name: dict.fromkeys(widths[name], 0.0) for name in layers}
        check_table("latency", latency, reference)
        if any(latency[name][w] < 0 for name in layers for w in widths[name]):
            raise UserError("table 'latency' holds a time below 0")
        tables["latency"] = {name: {w: float(latency[name][w]) for w in widths[name]} for name in layers}
    return tables


def _numbers_besides(model: nn.Module) -> int:
    """How many numbers the model holds besides the quantized weights, each once."""
    model = unwrapped(model)
    # By name: a float layer may share its weight with a quantized one, and keeps it.
    layers = [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantizedLayer)]
    weights = {f"{name}.{key}".removeprefix(".") for name in layers for key in ("weight", "codes")}
    state = model.state_dict(keep_vars=True).items()
    rest = {id(tensor): tensor for name, tensor in state if name not in weights and isinstance(tensor, Tensor)}
    return sum(tensor.numel() for tensor in rest.values())


def read_latency(path: str | Path) -> dict[str, dict[int, float]]:
    """A latency table from a JSON file: {"layers": {layer: {"8": time, ...}}}, or that inside {"latency": ...}.

    Raises:
        UserError: it cannot be read, or is not of that form.
    """
    found = files.read_json(path)
    try:
        found = found.get("latency", found)["layers"]
        return {name: {int(width): float(time) for width, time in row.items()} for name, row in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'latency table {path} is not of the form {{"layers": {{"name": {{"8": time, ...}}}}}} ({error!r})'
        ) from error


def budgets_between(problem: Problem, cost: str, points: int) -> list[dict[str, float]]:
    """`points` budgets for one cost, evenly from the least to the greatest sum that the problem's choices can have.

    Raises:
        UserError: there is no such cost.
    """
    if cost not in problem.costs:
        raise no_cost(cost, problem.costs)
    least, greatest = problem.bounds(cost)
    if points == 1:
        return [{cost: greatest}]
    return [{cost: least + (greatest - least) * i / (points - 1)} for i in range(points)]


def as_budgets(budgets: Sequence[float | Mapping[str, float]]) -> list[dict[str, float]]:
    """Budgets as mappings: a bare number is the average width, and so is "avg".

    Raises:
        UserError: they are no list of numbers and mappings of numbers.
    """
    if isinstance(budgets, (str, Mapping)) or not isinstance(budgets, Iterable):
        raise UserError(f"budgets={budgets!r}: give a list, such as [{budgets!r}]")
    found = []
    for one in budgets:
        given = one if isinstance(one, Mapping) else {"bits": one}
        try:
            budget: dict[str, float] = {}
            for cost, most in given.items():
                name = "bits" if cost == "avg" else cost
                # Both names of one cost may be there. NaN stays, and is told of later.
                budget[name] = float(np.minimum(_number(most), budget.get(name, np.inf)))
            found.append(budget)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"budget {str(one)[:80]} is neither a number nor {{cost: number}}, such as {{'bits': 4}}"
            ) from error
    return found


def _number(value: Any) -> float:
    if isinstance(value, str):
        raise TypeError(value)
    return float(value)
