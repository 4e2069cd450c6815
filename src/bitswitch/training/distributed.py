"""Several processes: one batch shared among them, one result on all of them.

Gradients are reduced explicitly after each backward, not by DistributedDataParallel: a joint step runs one backward for
each width, and in each most widths' scales and batch normalizations have no gradient, which DDP would wait for. All ranks
are at the same widths, so the parameters that have a gradient are the same on all of them; a network that leaves out layers
at random, in another way on each rank, is not for several ranks, and the loop tells.
"""

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitswitch.errors import UserError
from bitswitch.nn.norm import BATCH_NORMS

if dist.is_available():
    # Its functions take the group of the moment of the import as a default. Imported later, by torch's optimizers say,
    # they keep the group alive past leave(), and a thread of gloo that is still there when Python ends aborts the process.
    import torch.distributed.nn.functional


@dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        rank: from 0; rank 0 alone writes.
        size: how many processes there are.
        local_rank: among those of this machine, the index of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0


def launched() -> World:
    """This process among those that torchrun started; alone where it started none.

    Raises:
        UserError: what says so in the environment is no number.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World()
    try:
        return World(*(int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK are numbers that torchrun sets: {error}") from error


def join(device_type: str) -> World:
    """Join the processes that torchrun started; alone where it started none.

    Raises:
        UserError: the others cannot be reached.
    """
    world = launched()
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return world
    try:
        # Rank 0 may read a million files while the others wait; torchrun ends them if it dies.
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timedelta(days=1))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {world.rank} cannot join the other processes ({reason}): "
            f"is the port free? torchrun --standalone finds one, --master-port names one"
        ) from error
    return world


def leave() -> None:
    """Leave the other processes, where there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    words = ("Connection closed by peer", "Connection reset by peer", "NCCL", "gloo")
    return dist.is_available() and "RANK" in os.environ and any(word in str(error) for word in words)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def broadcast_model(model: nn.Module, world: World) -> None:
    """Every rank takes rank 0's parameters and buffers."""
    if world.size > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            _broadcast(tensor)


@torch.no_grad()
def broadcast_buffers(model: nn.Module, world: World) -> None:
    """Every rank takes rank 0's buffers."""
    if world.size > 1:
        for tensor in model.buffers():
            _broadcast(tensor)


def _broadcast(tensor: Tensor) -> None:
    """In place. gloo reads a tensor's numbers as if they were side by side, and does not know every dtype."""
    raw = tensor.reshape(-1).contiguous().view(torch.uint8)
    dist.broadcast(raw, 0)
    tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace every gradient that is there by its mean over the ranks, in one reduction for each dtype."""
    if world.size == 1:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_type.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.div_(world.size).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def average(tensor: Tensor, world: World) -> Tensor:
    """The mean of the ranks' tensors, on every rank."""
    if world.size == 1:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor.div_(world.size)


def from_first(value: Any, world: World) -> Any:
    """Rank 0's plain value on every rank."""
    if world.size == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, 0)
    return held[0]


def gather(values: list[Any], world: World) -> list[Any]:
    """All ranks' plain values on every rank, in the order of ranks."""
    if world.size == 1:
        return values
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, values)
    return [value for part in found for value in part]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient)
        return gradient


class _SharedStatistics:
    """A batch normalization whose batch statistics are those of all ranks' images together."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the batch normalization's own forward on the whole batch."""
        if not self.training:
            return super().forward(x)  # type: ignore[misc]
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = wide.numel() // wide.shape[1] * dist.get_world_size()
        mean = _SumOverRanks.apply(wide.sum(dims)) / count
        centred = wide - mean.view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(dims)) / count
        self._move_statistics(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def _move_statistics(self: Any, mean: Tensor, variance: Tensor) -> None:
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class _SharedBatchNorm1d(_SharedStatistics, nn.BatchNorm1d):
    pass


class _SharedBatchNorm2d(_SharedStatistics, nn.BatchNorm2d):
    pass


class _SharedBatchNorm3d(_SharedStatistics, nn.BatchNorm3d):
    pass


_SHARED = {
    nn.BatchNorm1d: _SharedBatchNorm1d,
    nn.BatchNorm2d: _SharedBatchNorm2d,
    nn.BatchNorm3d: _SharedBatchNorm3d,
}


def share_batch_norm(model: nn.Module, world: World) -> None:
    """Let every batch normalization use all ranks' images, in place; torch's SyncBatchNorm does so on CUDA alone.

    Parameters, buffers and their names stay, so that checkpoints fit any number of ranks.

    Warns:
        UserWarning: a class of one's own, which may compute anything, keeps statistics of each rank.
    """
    if world.size > 1:
        own = {type(module) for module in model.modules() if isinstance(module, BATCH_NORMS)}
        own -= {*_SHARED, *_SHARED.values(), nn.SyncBatchNorm}
        if own and world.first:
            names = ", ".join(sorted(kind.__name__ for kind in own))
            warnings.warn(
                f"share_batch_norm knows torch's batch normalizations alone: {names} keep statistics of each rank",
                UserWarning,
                stacklevel=2,
            )
        for module in model.modules():
            module.__class__ = _SHARED.get(type(module), type(module))  # type: ignore[arg-type]
