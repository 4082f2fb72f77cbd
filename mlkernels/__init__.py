"""Fused softmax-family losses for PyTorch; see the README and :mod:`mlkernels.functional`."""

from .backends import available_backends
from .functional import *  # noqa: F403
from .functional import __all__ as _functions
from .softmax import RowStats, check_labels
from .spec import Affine, Margin, Modulated, PiecewiseLinear, Tau, Truncated, TwoScale
