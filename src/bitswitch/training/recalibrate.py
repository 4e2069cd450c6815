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
        UserError: there are no images, as from a generator that was used before; the statistics stay.
    """
    batches = iter(images)
    first = next(batches, None)
    if first is None:
        raise UserError("no images to recalibrate with: give a list of batches; a generator is empty the second time")
    with evaluating(model), switched(model, precision) if precision is not None else nullcontext():
        norms = _in_use(model)
        momenta = [norm.momentum for norm in norms]
        before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
                # None: the plain mean over all batches.
                norm.momentum = None
                norm.train()
            for x in itertools.chain([first], batches):
                model(x)
        finally:
            for norm, momentum, statistics in zip(norms, momenta, before, strict=True):
                norm.momentum = momentum
                if not norm.num_batches_tracked:
                    # Such as those of a head that is for training alone.
                    norm.load_state_dict(statistics, strict=False)


def _in_use(model: nn.Module) -> list[nn.BatchNorm2d]:
    """The batch normalizations with running statistics that a forward at the present widths visits."""
    switchable = [module for module in model.modules() if isinstance(module, SwitchableBatchNorm)]
    inside = {norm for module in switchable for norm in module.variants.values()}
    found = [module.variants[module.key] for module in switchable]
    found += [module for module in model.modules() if isinstance(module, BATCH_NORMS) and module not in inside]
    return [norm for norm in found if norm.track_running_stats]  # type: ignore[misc]
