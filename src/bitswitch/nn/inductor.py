"""Inductor, told what to keep for backward and what to compute again."""

from pathlib import Path
from typing import Any

import torch
from torch._functorch import config as partitioner
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy


def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """A backend of torch.compile that computes activations again in backward from what batch normalization keeps anyway.

    Left to itself Inductor keeps a float for every element that is quantized, written in forward and read in backward: on
    ResNet20 a step took 1.7 times the float step for that alone. And the five reads of a normalized activation (the value,
    mean, variance, weight, bias) must not be one too many to compute it where it is used.
    """
    kept = {
        f"ban_recompute_{why}": False for why in ("long_fusible_chains", "materialized_backward", "not_in_allowlist")
    }
    patches = {"realize_reads_threshold": 5, "joint_custom_post_pass": _KeepPoolings()}
    with partitioner.patch(kept):
        return compile_fx(graph, inputs, config_patches=patches)


class _KeepPoolings(CustomGraphPass):
    """Keeps the results of poolings: computed again, all that they read would be normalized anew for each window.

    On ResNet18 that one kernel took a ninth of a step.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            name = str(node.target)
            if node.op == "call_function" and "pool" in name and "backward" not in name:
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> Any:
        """For Inductor's cache."""
        return get_hash_for_files((str(Path(__file__)),))
