"""Networks by name."""

import importlib
import re
from collections.abc import Mapping
from typing import Any

import torchvision
from torch import nn

from bitswitch.errors import UserError, nearest
from bitswitch.models.cifar_resnet import cifar_resnet

_CIFAR = re.compile(r"cifar_resnet(8|20|32|44|56|110)")
_OWN = [f"cifar_resnet{depth}" for depth in (8, 20, 32, 44, 56, 110)]


def is_trusted(name: str) -> bool:
    """Whether building the network runs no code but this package's and torchvision's."""
    return ":" not in name


def without_weights(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for `build` that give the same architecture, and fetch no trained weights for it."""
    found = {key: value for key, value in args.items() if key != "weights"}
    # Segmentation fetches those of the backbone unless it is told not to. Of detection they are part of the architecture.
    if name in torchvision.models.list_models(torchvision.models.segmentation):
        found["weights_backbone"] = None
    return found


def build(name: str, args: Mapping[str, Any] | None = None) -> nn.Module:
    """A float network by name.

    Args:
        name: "cifar_resnet20" (8, 20, 32, 44, 56, 110), a torchvision model's name, or "package.module:function", which is
            imported and called.
        args: keyword arguments for it.

    Raises:
        UserError: there is no such network, or it does not take these arguments.
    """
    args = dict(args or {})
    try:
        if match := _CIFAR.fullmatch(name):
            return cifar_resnet(int(match[1]), **args)
        if ":" in name:
            made = _imported(name)(**args)
            if not isinstance(made, nn.Module):
                raise UserError(f"network {name!r} gives a {type(made).__name__}, not a torch.nn.Module")
            return made
        if name in torchvision.models.list_models():
            return torchvision.models.get_model(name, **args)
    except TypeError as error:
        raise UserError(f"network {name!r} does not take the arguments {args}: {error}") from error
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        known = (ValueError, LookupError, OSError, RuntimeError, ArithmeticError, AssertionError)
        if is_trusted(name) and not isinstance(error, known):
            raise
        # Whatever the user's function does.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if args.get("weights") is not None and "num_classes" in reason:
            reason += (
                " Published weights are for their own classes: model.args={} with pretrain.epochs trains without them; a "
                "function of yours, model.name=package.module:function, can give them another last layer"
            )
        raise UserError(f"network {name!r} cannot be built with the arguments {args}: {reason}") from error
    hint = nearest(name, _OWN + torchvision.models.list_models())
    raise UserError(f"no network is named {name!r}{hint}; your own is named package.module:function")


def _imported(name: str) -> Any:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:
        # Whatever the user's module does while it is imported, such as end the program.
        raise UserError(f"network {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"network {name!r} is a {type(found).__name__}, not a function that returns a network")
    return found
