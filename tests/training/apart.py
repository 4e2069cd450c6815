"""Run under torchrun: a network that leaves out one of two equal layers, in another way on each rank where told to."""

import sys
from pathlib import Path

import torch
from torch import nn

import bitswitch as bs
from bitswitch.errors import UserError
from bitswitch.training import Engine, JointObjective, Loop, MultiPrecisionOptimizer
from bitswitch.training import distributed as ranks


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 5)
        self.either = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.chosen = (0, 1)

    def forward(self, x):
        x = self.first(x).relu()
        for i in self.chosen:
            x = self.either[i](x).relu()
        return self.last(x)


class Batches:
    def __len__(self):
        return 2

    def epoch(self, epoch):
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(2):
            yield torch.randn(16, 8, generator=generator), torch.randint(0, 5, (16,), generator=generator)


def main(checkpoint, apart):
    world = ranks.join("cpu")
    torch.manual_seed(0)
    model = bs.quantize(Network(), bits=(8, 4), example_inputs=torch.randn(16, 8)).train()
    model.chosen = (world.rank if apart == "apart" else 0,)
    objective = JointObjective(model, MultiPrecisionOptimizer(model), engine=Engine(world=world))
    try:
        Loop(
            objective=objective,
            batches=Batches(),
            epochs=1,
            checkpoint=checkpoint,
            extra={},
            on_step=lambda: None,
            on_epoch=lambda *_: None,
            world=world,
        ).run()
        print("trained", flush=True)
    except UserError as error:
        print(error, flush=True)
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
