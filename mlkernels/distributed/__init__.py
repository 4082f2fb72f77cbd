"""Losses over classes that no single device holds."""

from .clip import clip_grad_norm_
from .group import communication
from .module import ClassParallelLoss
from .vocabulary import class_parallel_softmax_loss

__all__ = ["ClassParallelLoss", "class_parallel_softmax_loss", "clip_grad_norm_", "communication"]
