"""Training: multi-precision objectives, ALRS, the loop, checkpoints, evaluation."""

from bitswitch.training.alrs import AlrsForm, adapted_rate, paper_eta
from bitswitch.training.checkpoints import load_checkpoint, save_checkpoint
from bitswitch.training.distillation import Distillation
from bitswitch.training.distributed import World
from bitswitch.training.engine import Engine
from bitswitch.training.evaluate import Score, evaluate
from bitswitch.training.loop import Loop, cosine
from bitswitch.training.objectives import FloatObjective, JointObjective, Objective
from bitswitch.training.observe import ScaleGradients
from bitswitch.training.optimizer import MultiPrecisionOptimizer
from bitswitch.training.recalibrate import recalibrate
from bitswitch.training.sampler import AssignmentSampler, Sampling, WidthSampler, sensitive_layers

__all__ = [
    "AlrsForm",
    "AssignmentSampler",
    "Distillation",
    "Engine",
    "FloatObjective",
    "JointObjective",
    "Loop",
    "MultiPrecisionOptimizer",
    "Objective",
    "Sampling",
    "ScaleGradients",
    "Score",
    "WidthSampler",
    "World",
    "adapted_rate",
    "cosine",
    "evaluate",
    "load_checkpoint",
    "paper_eta",
    "recalibrate",
    "save_checkpoint",
    "sensitive_layers",
]
