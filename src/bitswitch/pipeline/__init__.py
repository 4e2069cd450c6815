"""Stages joined, each reading the run directory and writing to it."""

from bitswitch.pipeline.execute import execute
from bitswitch.pipeline.origins import artifact_of
from bitswitch.pipeline.run import Reporter, Run, choose_device, open_data
from bitswitch.pipeline.stages import stages_of
from bitswitch.pipeline.training import joint_objective

__all__ = [
    "Reporter",
    "Run",
    "artifact_of",
    "choose_device",
    "execute",
    "joint_objective",
    "open_data",
    "stages_of",
]
