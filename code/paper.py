"""The paper's own command lines, in terms of `bitswitch`: one parser for its three programs.

Every program prints the `bitswitch` command that it stands for, then runs it.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitswitch import cli
from bitswitch.config import load_recipe
from bitswitch.errors import UserError
from bitswitch.rundir import RunDirectory

RECIPES = {
    ("digits", "resnet8"): "digits",
    ("cifar10", "resnet20"): "cifar10-resnet20",
    ("imagenet", "resnet18"): "imagenet-resnet18",
    ("imagenet", "resnet50"): "imagenet-resnet50",
    ("imagenet", "mobilenetv2"): "imagenet-mobilenetv2",
}
# The SuperNet's schedule of a recipe that has none.
MIXED = {
    "cifar10-resnet20": "cifar10-resnet20-mixed",
    "imagenet-resnet18": "imagenet-resnet18-432-mixed",
    "imagenet-resnet50": "imagenet-resnet50-432-mixed",
    "imagenet-mobilenetv2": "imagenet-resnet18-432-mixed",
}
ARCHITECTURES = {"digits": "resnet8", "cifar10": "resnet20", "imagenet": "resnet18"}


def parser(program: str) -> argparse.ArgumentParser:
    """The options that the programs share, and `--cal_solve` of the last."""
    found = argparse.ArgumentParser(prog=f"python code/{program}", description=__doc__, allow_abbrev=False)
    found.add_argument("-bit_width_list", "--bit_width_list", default=None, help="'32', or widths such as '8,6,4,2'")
    found.add_argument("--dataset", default="cifar10", choices=list(ARCHITECTURES))
    found.add_argument("-a", "--arch", help="resnet20 (cifar10); resnet18, resnet50, mobilenetv2 (imagenet)")
    found.add_argument("--data", help="the folder of the images")
    found.add_argument("--epochs", type=int)
    found.add_argument("-b", "--batch-size", type=int)
    found.add_argument("--lr", type=float)
    found.add_argument("--pretrained", help="a checkpoint of float weights that -bit_width_list=32 starts from")
    found.add_argument("--seed", type=int)
    found.add_argument("-e", "--evaluate", action="store_true", help="score what the program trained, on test")
    found.add_argument("--multiprocessing_distributed", action="store_true", help="one process a GPU (CPU: --ranks)")
    found.add_argument("--ranks", type=int, help="processes of --multiprocessing_distributed")
    found.add_argument("--out", type=Path, help="run directory; runs/RECIPE where not given")
    if program.endswith("cal_hessian.py"):
        found.add_argument(
            "--cal_solve", action="store_true", help="solve the programme with the traces that are there"
        )
    return found


def words_of(program: str, arguments: Sequence[str]) -> tuple[list[str], int]:
    """What to type after `bitswitch`, and on how many processes.

    Raises:
        UserError: there is no recipe for the data set and network.
    """
    given = parser(program).parse_args(arguments)
    arch = given.arch or ARCHITECTURES[given.dataset]
    if (given.dataset, arch) not in RECIPES:
        known = ", ".join(f"{data} {network}" for data, network in RECIPES)
        raise UserError(f"there is no recipe for {given.dataset} {arch}; there are {known}")
    recipe = RECIPES[given.dataset, arch]
    out = given.out or Path("runs") / recipe
    stage = _stage(program, given)
    if given.evaluate:
        for option in ("epochs", "batch_size", "lr", "pretrained", "seed"):
            if getattr(given, option) is not None:
                raise UserError(f"--{option.replace('_', '-')} does not apply with --evaluate")
        words = _evaluation(stage, given, out)
    else:
        overrides, seed = _overrides(stage, given, recipe, out)
        words = [stage, recipe, *overrides, "--out", str(out)]
        if seed is not None:
            words += ["--seed", str(seed)]
    return words, _ranks(given)


def _stage(program: str, given: argparse.Namespace) -> str:
    if program.endswith("cal_hessian.py"):
        return "search" if given.cal_solve else "sensitivity"
    if program.startswith("Super_net/"):
        return "supernet"
    return "pretrain" if given.bit_width_list == "32" else "train"


def _evaluation(stage: str, given: argparse.Namespace, out: Path) -> list[str]:
    if stage == "pretrain":
        words = ["evaluate", str(RunDirectory(out).checkpoint("pretrain"))]
        return words + (["--data", given.data] if given.data else [])
    file = RunDirectory(out).artifact if stage == "train" else RunDirectory(out).supernet
    words = ["evaluate", str(file)]
    if stage in ("sensitivity", "search"):
        words += ["--assignment", str(RunDirectory(out).frontier)]
    elif given.bit_width_list:
        words += ["--bits", given.bit_width_list]
    return words + (["--data", given.data] if given.data else [])


def _overrides(stage: str, given: argparse.Namespace, recipe: str, out: Path) -> tuple[list[str], int | None]:
    """Those of the stages before, so that they count as done, with this command's laid over them; and the seed."""
    found = _earlier(recipe, out)
    before = found.pop("seed", None)
    if given.bit_width_list not in (None, "32"):
        try:
            found["bits"] = [int(width) for width in given.bit_width_list.split(",")]
        except ValueError as error:
            raise UserError(f"-bit_width_list {given.bit_width_list}: give widths such as 8,6,4,2") from error
    if given.data:
        found["data.root"] = given.data
    if given.pretrained:
        if stage != "pretrain":
            raise UserError(
                f"--pretrained does not apply to {stage}, which goes on from what -bit_width_list=32 made: give it there "
                "(with --epochs 0 to take it as it is)"
            )
        found["pretrain.checkpoint"] = given.pretrained
    if stage in ("supernet", "search") and load_recipe(recipe).supernet is None and "supernet" not in found:
        part = load_recipe(MIXED[recipe]).supernet
        assert part is not None
        found["supernet"] = part.model_dump(mode="json", exclude_unset=True)
    for option, key in (("epochs", "epochs"), ("batch_size", "batch_size"), ("lr", "lr")):
        value = getattr(given, option)
        if value is not None:
            if stage == "search" or (stage == "sensitivity" and key != "batch_size"):
                raise UserError(f"--{option.replace('_', '-')} does not apply to {stage}")
            found[f"{stage}.{key}"] = value
    seed = before if given.seed is None else given.seed
    return [f"{key}={json.dumps(value)}" for key, value in found.items()], seed


def _earlier(recipe: str, out: Path) -> dict[str, Any]:
    """In what the run directory's resolved recipe differs from the recipe, {"key.of.part": value}.

    Raises:
        UserError: a run of another network or other data is there.
    """
    path = out / "config.yaml"
    if not path.is_file():
        return {}
    there, own = load_recipe(str(path)), load_recipe(recipe)
    if there.model != own.model or there.data.name != own.data.name:
        raise UserError(f"{out} holds a run of {there.model.name} on {there.data.name}: name another folder with --out")
    return _differences(own.model_dump(mode="json"), there.model_dump(mode="json"), "")


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str) -> dict[str, Any]:
    found = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            found |= _differences(old, value, f"{prefix}{key}.")
        elif old != value:
            found[f"{prefix}{key}"] = value
    return found


def _ranks(given: argparse.Namespace) -> int:
    if given.ranks is not None and (given.ranks < 1 or not given.multiprocessing_distributed):
        raise UserError(f"--ranks {given.ranks}: so many processes, 1 or more, go with --multiprocessing_distributed")
    if not given.multiprocessing_distributed:
        return 1
    import torch

    return given.ranks or torch.cuda.device_count() or min(2, os.cpu_count() or 1)


def main(program: str) -> None:
    """Print the `bitswitch` command that the command line stands for, and run it."""
    try:
        words, ranks = words_of(program, sys.argv[1:])
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    launch = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    print(shlex.join([*launch, "bitswitch", *words]), file=sys.stderr, flush=True)
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", *launch[1:], "bitswitch", *words]
        os.execv(sys.executable, command)
    cli.main(words)
