"""What is refused before any stage begins: parts that are missing, a network that does not fit, batches, folders."""

import contextlib
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bitswitch import files
from bitswitch import search as room
from bitswitch.config import PretrainPart, QuantizedPart
from bitswitch.data import DataSet
from bitswitch.errors import UserError, nearest
from bitswitch.models import build, load_weights
from bitswitch.nn import make_transitional, quantized_layers
from bitswitch.pipeline.run import Run, about, build_network, float_network, quantized
from bitswitch.training.distributed import barrier, gather
from bitswitch.training.sampler import most_sensitive


def check_parts(run: Run, parts: Mapping[str, str]) -> None:
    """Refuse stages that the recipe has no part for.

    Args:
        run: what is asked for.
        parts: {stage: the part of the recipe that it needs}.

    Raises:
        UserError: a part is not there, or the recipe is a rival's, which gives no SuperNet.
    """
    for stage, part in parts.items():
        if getattr(run.recipe, part) is None:
            raise UserError(
                f"recipe {run.name} has no part supernet: give it one, or say bitswitch {stage} {run.typed} supernet.epochs=N"
            )
        if stage in ("supernet", "search") and run.recipe.train.method != "double_rounding":
            raise UserError(f"train.method={run.recipe.train.method} is for comparison and gives no SuperNet")


def check_shared(run: Run) -> None:
    """Refuse ranks that do not see one run directory, as on machines that each have their own; all ranks call this.

    Raises:
        UserError: they do not.
    """
    barrier()
    records = run.directory.path / "stages.json"
    # Rank 0 writes on when it has what all of them saw.
    seen = gather([files.file_digest(records) if files.is_file(records) else ""], run.world)
    if len(set(seen)) > 1:
        others = [rank for rank, one in enumerate(seen) if one != seen[0]]
        raise UserError(
            f"rank {others[0]} does not see what rank 0 wrote in {run.directory.path}: --out must be one folder that all "
            "machines share"
        )


def check_batches(run: Run, data: DataSet, stage: str) -> None:
    """Refuse a batch that the ranks cannot share, and micro-batches that do not divide a rank's.

    Raises:
        UserError: they do not, or there are no training images.
    """
    part, ranks = getattr(run.recipe, stage), run.world.size
    if isinstance(part, PretrainPart | QuantizedPart) and part.epochs:
        try:
            rank_batch = data.training_batch(part.batch_size, ranks) // ranks
        except UserError as error:
            raise UserError(f"stage {stage}: {error}") from error
        if rank_batch % part.micro_batches:
            raise UserError(
                f"{stage}.micro_batches={part.micro_batches}: a rank's batch of {rank_batch} images cannot be divided into so "
                "many equal parts"
            )


def check_network(run: Run, data: DataSet, stages: Sequence[str]) -> None:
    """Refuse a network that does not fit the data, or cannot be quantized, before hours are spent on it.

    Args:
        run: what is asked for.
        data: to train on.
        stages: that are to be done.

    Raises:
        UserError: it does not fit, its checkpoints could not be read again, or what is asked for cannot be had; see
            `check_mixed`.
    """
    name = run.recipe.model.name
    network, images = build_network(run.recipe, data).eval(), data.sample(2)
    if any(is_lazy(parameter) for parameter in network.parameters()):
        raise UserError(f"{name} has lazy modules, whose checkpoints cannot be read again: give them their sizes")
    for key, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{name} has {key!r}, a {type(value).__name__}, in its state: a checkpoint holds tensors alone"
            )
    if run.recipe.pretrain.checkpoint:
        load_weights(network, run.recipe.pretrain.checkpoint)
    try:
        with torch.no_grad():
            logits = network(images)
    except Exception as error:
        # Whatever the user's module does.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{name} cannot take images of {list(images.shape[1:])}: {reason}") from error
    _check_logits(run, data, logits, "")
    trained = build(**about(run, data)["network"])
    kept = network.state_dict().keys()
    before = {key: buffer.clone() for key, buffer in trained.named_buffers() if key not in kept}
    # Some need more images than these two when they train.
    with contextlib.suppress(Exception):
        logits = trained(images)
    _check_logits(run, data, logits, " in training")
    for key, now in trained.named_buffers():
        # What is made when it is needed, such as a cache, has another shape or is gone.
        was = before.get(key)
        if was is not None and now.shape == was.shape and bool(((now != was) & ~(now.isnan() & was.isnan())).any()):
            warnings.warn(
                f"{name} moves the buffer {key!r} in training, which its state_dict lacks (persistent=False), so that a run "
                "that is taken up starts it anew: if later steps read it, register it as persistent",
                stacklevel=2,
            )
    _check_weights(run, data, network, images)
    if "train" in stages:
        _check_quantized(run, data, network, stages)


def check_mixed(run: Run, data: DataSet, stages: Sequence[str]) -> None:
    """Refuse a SuperNet or a search that cannot be had, before the stages that come before it are done; pretrain is done.

    Raises:
        UserError: the cap is of less than one layer; the search ties layers or has a latency table of layers that there are
            not, or a budget that nothing meets.
    """
    _check_quantized(run, data, float_network(run, data).eval(), stages)


def _check_quantized(run: Run, data: DataSet, network: nn.Module, stages: Sequence[str]) -> None:
    model = quantized(run, data, network, images=2)
    layers, part = quantized_layers(model), run.recipe.search
    if "supernet" in stages and run.recipe.supernet is not None:
        most_sensitive(run.recipe.supernet.cap, len(layers))
    if "search" not in stages:
        return
    for layer in itertools.chain.from_iterable(part.tied):
        if layer not in layers:
            raise UserError(f"search.tied: no layer that is quantized is named {layer!r}{nearest(layer, layers)}")
    latency = None if part.latency is None else room.read_latency(part.latency)
    if run.recipe.supernet is not None and run.recipe.supernet.batch_norm == "transitional":
        model = make_transitional(model)
    costs = room.cost_tables(model, (data.sample(1),), latency)
    damage = {name: dict.fromkeys(run.recipe.bits, 0.0) for name in layers}
    problem = room.Problem(damage=damage, costs=costs, tied=part.tied)
    for budget in room.as_budgets(part.budgets or ()):
        problem.solve(budget)


def _check_logits(run: Run, data: DataSet, logits: Any, when: str) -> None:
    name = run.recipe.model.name
    if not isinstance(logits, Tensor):
        raise UserError(
            f"{name} gives a {type(logits).__name__}{when}, and a tensor of logits, [images, classes], is needed: turn off "
            "what else it gives in model.args (aux_logits=false), or name a function of your own that wraps it"
        )
    if logits.dim() != 2 or logits.shape[1] != len(data.classes):
        raise UserError(
            f"{name} gives {list(logits.shape[1:])} outputs for an image{when}, {data.name} has {len(data.classes)} classes: "
            "set the number of classes in model.args"
        )


@torch.no_grad()
def _check_weights(run: Run, data: DataSet, network: nn.Module, images: Tensor) -> None:
    """Refuse trained weights that come with an architecture of their own: checkpoints and artifacts are built without."""
    if run.recipe.model.args.get("weights") is None:
        return
    plain = build(**about(run, data)["network"]).eval()
    try:
        plain.load_state_dict(network.state_dict())
        same = torch.equal(plain(images), network(images))
    except RuntimeError:
        same = False
    if not same:
        raise UserError(
            f"{run.recipe.model.name} is another network with weights={run.recipe.model.args['weights']} than without: set "
            "in model.args what else these weights change (transform_input, aux_logits, image_size), too"
        )
