"""Linear heads, "heads" for short in this package: classifier and loss in one, the logits never whole.

See :func:`linear_softmax_loss`. The ``head=`` of a loss, the function of log p that it is, is something else.
"""

from .functional import linear_cross_entropy, linear_softmax_loss
from .module import LinearLoss
from .update import TileSGD

__all__ = ["LinearLoss", "TileSGD", "linear_cross_entropy", "linear_softmax_loss"]
