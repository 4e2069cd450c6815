"""Run under torchrun, or alone: a few joint steps in float64 or float32; rank 0 writes what it saw."""

import sys
import weakref

import torch
import torch.distributed as dist
from torch import nn

import bitswitch as bs
from bitswitch.training import Engine, JointObjective, MultiPrecisionOptimizer, evaluate
from bitswitch.training import distributed as ranks


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)),
    )


def check_odd_buffers(world):
    """gloo reads numbers side by side, and does not know every dtype."""
    odd, expected = (
        nn.Module(),
        {"strided": torch.arange(12.0).view(3, 4)[:, ::2], "short": torch.tensor([1, 2, 3]).short()},
    )
    expected |= {"expanded": torch.ones(1, 3), "flag": torch.tensor(True), "none": torch.zeros(0, 2)}
    for name, tensor in expected.items():
        base = torch.zeros(tensor.shape[0], 4)[:, ::2] if name == "strided" else torch.zeros_like(tensor)
        odd.register_buffer(name, base if world.rank else tensor)
    ranks.broadcast_buffers(odd, world)
    assert all(torch.equal(getattr(odd, name), tensor) for name, tensor in expected.items())


def main(out, dtype, steps, micro_batches):
    world = ranks.join("cpu")
    check_odd_buffers(world)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(32, 3, 8, 8, generator=generator).to(dtype)
    labels = torch.randint(0, 5, (32,), generator=generator)
    model = bs.quantize(network().to(dtype), example_inputs=images).train()
    if world.rank:
        for parameter in model.parameters():  # rank 0's are to be taken
            parameter.data.add_(1)
    ranks.broadcast_model(model, world)
    ranks.share_batch_norm(model, world)
    first = {}
    optimizer = MultiPrecisionOptimizer(model, lr=1e-3)

    def keep(width):
        if len(first) < 4:
            first[width] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    engine = Engine(world=world, micro_batches=micro_batches)
    objective = JointObjective(model, optimizer, engine=engine, on_gradients=keep)
    batches = [(images[i : i + 7], labels[i : i + 7]) for i in range(0, 32, 7)][world.rank :: world.size]
    scores = evaluate(model, batches, [8, 6, 4, 2], world=world)
    share = slice(world.rank * (32 // world.size), (world.rank + 1) * (32 // world.size))
    losses = [ranks.average(objective.step(images[share], labels[share], 1.0), world) for _ in range(steps)]
    if world.first:
        rows = [[s.top1, s.top5, s.loss, s.images] for s in scores]
        torch.save({"first": first, "losses": torch.stack(losses), "scores": rows, "state": model.state_dict()}, out)
    group = weakref.ref(dist.group.WORLD) if dist.is_initialized() else lambda: None
    ranks.leave()
    assert group() is None, "the process group, and so gloo's threads, outlive it: at the end of Python they may abort"


if __name__ == "__main__":
    main(sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
