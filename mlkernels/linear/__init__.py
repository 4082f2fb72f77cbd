"""Heads: classifier and loss in one, the logits never whole. See :func:`linear_softmax_loss`."""

from .functional import linear_cross_entropy, linear_softmax_loss
from .module import LinearLoss

__all__ = ["LinearLoss", "linear_cross_entropy", "linear_softmax_loss"]
