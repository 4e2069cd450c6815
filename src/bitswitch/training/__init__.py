"""Training: multi-precision objectives, ALRS, the loop, checkpoints, evaluation."""

from bitswitch.training.alrs import AlrsForm, adapted_rate, paper_eta
from bitswitch.training.checkpoints import load_checkpoint, save_checkpoint
from bitswitch.training.evaluate import Score, evaluate
from bitswitch.training.loop import Loop, cosine
from bitswitch.training.objectives import FloatObjective, JointObjective, Objective
from bitswitch.training.optimizer import MultiPrecisionOptimizer

__all__ = [
    "AlrsForm",
    "FloatObjective",
    "JointObjective",
    "Loop",
    "MultiPrecisionOptimizer",
    "Objective",
    "Score",
    "adapted_rate",
    "cosine",
    "evaluate",
    "load_checkpoint",
    "paper_eta",
    "save_checkpoint",
]
