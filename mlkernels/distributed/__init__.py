"""Losses over classes that no single device holds."""

from .clip import clip_grad_norm_
from .group import communication
from .module import ClassParallelLoss
from .scaler import GradScaler
from .vocabulary import class_parallel_softmax_loss
from .wrap import data_parallel, sharded_parameters

__all__ = [
    "ClassParallelLoss",
    "GradScaler",
    "class_parallel_softmax_loss",
    "clip_grad_norm_",
    "communication",
    "data_parallel",
    "sharded_parameters",
]
