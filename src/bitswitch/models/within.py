"""Building a network that must not be far greater than is known of it."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from bitswitch.errors import UserError
from bitswitch.models.registry import build

_BUILDING = threading.RLock()


class _TooGreat(BaseException):
    """More parameters than were expected; no Exception, which `build` would tell of as the network's own."""


def build_within(name: str, args: Mapping[str, Any], most: int, refused: str) -> nn.Module:
    """`build`, of a network with at most so many parameters; one with more is refused before it has taken much memory.

    Args:
        name: as for `build`.
        args: as for `build`.
        most: parameters that the network may have.
        refused: the error's words, in which {} becomes the number of parameters.

    Raises:
        UserError: it has more; or what `build` raises.
    """
    # It is made twice, and some networks throw parts away while they are made.
    with _stopped_above(4 * most + 2**24, refused):
        # Some compute with values, which meta tensors do not have. Bad arguments are told of when it is built in earnest.
        with contextlib.suppress(UserError), torch.device("meta"):
            asked = sum(parameter.numel() for parameter in build(name, args).parameters())
            if asked > most:
                raise _TooGreat(asked)
        return build(name, args)


@contextlib.contextmanager
def _stopped_above(most: int, refused: str) -> Iterator[None]:
    """End what builds a network in this thread with `refused`, the number put in, once it has made so many parameters."""
    me, made = threading.get_ident(), 0

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        if parameter is not None and threading.get_ident() == me:
            # Small ones cost as much to make as this many numbers.
            made += max(parameter.numel(), 1024)
            if made > most:
                raise _TooGreat(made)

    # torch goes through its hooks while another thread might change them.
    with _BUILDING:
        hook = register_module_parameter_registration_hook(count)
        try:
            yield
        except _TooGreat as error:
            raise UserError(refused.format(error)) from None
        finally:
            hook.remove()
