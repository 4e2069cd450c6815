"""Run under torchrun, or alone: traces of a small network; every rank writes what it found and which batches it ran."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from bitswitch.search import hessian_trace
from bitswitch.training import distributed


def main(out):
    world = distributed.join("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3))
    batches = [(torch.randn(6, 2, 5, 5).double(), torch.arange(6) % 3) for _ in range(5)]
    visited, rounds = [], []

    def loss_fn(model, batch):
        visited.append(next(i for i, b in enumerate(batches) if b is batch))
        return F.cross_entropy(model(batch[0]), batch[1])

    traces = hessian_trace(
        model.double(),
        loss_fn,
        batches,
        target=0.3,
        rank=world.rank,
        ranks=world.size,
        progress=lambda probes, error: rounds.append(probes),
    )
    found = {name: [trace.mean, trace.standard_error] for name, trace in traces.items()}
    Path(out).mkdir(exist_ok=True)
    (Path(out) / f"{world.rank}.json").write_text(json.dumps({"traces": found, "rounds": rounds, "visited": visited}))
    distributed.leave()


if __name__ == "__main__":
    main(sys.argv[1])
