"""How forwards and backwards are computed: precision, memory format, compilation, micro-batches, ranks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bitswitch.errors import UserError, check_word
from bitswitch.nn import ActivationQuantizer, QuantizedLayer
from bitswitch.nn.one_graph import OneGraph
from bitswitch.training.distributed import World, average_gradients

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What objectives compute with.

    Attributes:
        precision: "bfloat16" runs forwards under autocast; parameters, scales and quantizer arithmetic stay float32.
        channels_last: keep images and convolution weights in that memory format.
        compile: torch.compile the network's forward; of a quantized one, one graph for all widths and mixtures.
        micro_batches: a batch is computed in so many parts, whose gradients are averaged before a step.
        world: this process among the others.
    """

    precision: Precision = "float32"
    channels_last: bool = False
    compile: bool = False
    micro_batches: int = 1
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        check_word("precision", self.precision, get_args(Precision))
        if self.micro_batches < 1:
            raise UserError(f"micro_batches={self.micro_batches!r}: a batch has one part at least")

    def place(self, model: nn.Module) -> nn.Module:
        """The model in the memory format of this engine, in place."""
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def forward_of(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """A function from images to float32 logits (float64 for a float64 network)."""
        call: Any = _compiled(model) if self.compile else model

        def forward(x: Tensor) -> Tensor:
            if self.channels_last and x.dim() == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                logits = call(x)
            return logits.to(torch.promote_types(logits.dtype, torch.float32))

        return forward

    def parts(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches of a batch.

        Raises:
            UserError: the batch cannot be divided evenly.
        """
        if len(x) % self.micro_batches:
            raise UserError(
                f"a rank's batch of {len(x)} images cannot be divided into micro_batches={self.micro_batches} equal parts"
            )
        return zip(x.chunk(self.micro_batches), y.chunk(self.micro_batches), strict=True)

    def finish_gradients(self, model: nn.Module) -> None:
        """Average gradients over ranks, and give activation scales the LSQ factor of the whole batch.

        A quantizer sees one part of a batch and takes 1 / sqrt(N Qp) with that part's N. (Of an input that has no batch, such
        as learned positions, N is the same for every part, and its factor becomes smaller than the whole batch's.)
        """
        average_gradients(model.parameters(), self.world)
        shares = self.world.size * self.micro_batches
        if shares == 1:
            return
        for module in model.modules():
            if isinstance(module, ActivationQuantizer) and module.lsq_factor:
                for parameter in module.scale_parameter.values():
                    if parameter.grad is not None:
                        parameter.grad.mul_(shares**-0.5)


def _compiled(model: nn.Module) -> Callable[..., Any]:
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    # One graph takes float weights; of integer codes torch compiles one for each width.
    return OneGraph(model) if layers and all(layer.codes is None for layer in layers) else torch.compile(model)
