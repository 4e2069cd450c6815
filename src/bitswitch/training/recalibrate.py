"""Batch normalization statistics estimated anew at one precision."""

import itertools
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from bitswitch.errors import UserError
from bitswitch.nn import SwitchableBatchNorm, evaluating, switched
from bitswitch.nn.norm import BATCH_NORMS
from bitswitch.training.evaluate import PrecisionChoice


@torch.no_grad()
def recalibrate(model: nn.Module, images: Iterable[Tensor], precision: PrecisionChoice) -> None:
    """Replace the running statistics in use at a precision by the plain means over batches of images, in place.

    Args:
        model: made by `bitswitch.quantize`, or loaded.
        images: batches [N, C, H, W] on the model's device, of training images, augmented as in training.
        precision: the width or assignment that the statistics are for; None: the widths in use.

    Raises:
        UserError: there are no images, as from a generator that was used before, or a batch has one image where a
            normalization needs more. The statistics stay, as they do whatever stops this.
    """
    batches = iter(images)
    first = next(batches, None)
    if first is None:
        raise UserError("no images to recalibrate with: give a list of batches; a generator is empty the second time")
    if not isinstance(first, Tensor):
        raise UserError(f"images hold a {type(first).__name__}: give batches of images alone, each a tensor")
    with evaluating(model), switched(model, precision) if precision is not None else nullcontext():
        norms = _in_use(model)
        momenta = [norm.momentum for norm in norms]
        before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
        kept: set[nn.Module] = set()
        try:
            for norm in norms:
                norm.reset_running_stats()
                # None: the plain mean over all batches.
                norm.momentum = None
                norm.train()
            for x in itertools.chain([first], batches):
                model(x)
            # Others are such as those of a head that is for training alone.
            kept = {norm for norm in norms if norm.num_batches_tracked}
        except ValueError as error:
            # torch's own words.
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                "a batch of one image is too few to recalibrate batch normalization with: use more"
            ) from error
        finally:
            for norm, momentum, statistics in zip(norms, momenta, before, strict=True):
                norm.momentum = momentum
                if norm not in kept:
                    norm.load_state_dict(statistics, strict=False)


def _in_use(model: nn.Module) -> list[nn.BatchNorm2d]:
    """The batch normalizations with running statistics that a forward at the present widths visits."""
    switchable = [module for module in model.modules() if isinstance(module, SwitchableBatchNorm)]
    inside = {norm for module in switchable for norm in module.variants.values()}
    found = [module.variants[module.key] for module in switchable]
    found += [module for module in model.modules() if isinstance(module, BATCH_NORMS) and module not in inside]
    return [norm for norm in found if norm.track_running_stats]  # type: ignore[misc]
