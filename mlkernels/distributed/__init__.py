"""Losses over classes that no single device holds."""

from .clip import clip_grad_norm_
from .module import ClassParallelLoss

__all__ = ["ClassParallelLoss", "clip_grad_norm_"]
