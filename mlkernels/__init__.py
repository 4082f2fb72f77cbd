"""Fused softmax-family losses for PyTorch; see the README and :mod:`mlkernels.functional`."""

from . import functional, metrics, modules, schedule, search
from .backends import available_backends
from .backends.native import empty_cache
from .backends.reference import RowStats
from .checks import check_labels
from .functional import *
from .joint import Alternating
from .linear import LinearLoss, TileSGD, linear_cross_entropy, linear_softmax_loss
from .modules import *
from .patching import patch
from .spec import Affine, Margin, Modulated, PiecewiseLinear, Tau, Truncated, TwoScale
from .two_scale import cached_weight_norm, weight_norm_product

__version__ = "0.1.0"

__all__ = [
    "Affine",
    "Alternating",
    "LinearLoss",
    "Margin",
    "Modulated",
    "PiecewiseLinear",
    "RowStats",
    "Tau",
    "TileSGD",
    "Truncated",
    "TwoScale",
    "__version__",
    "available_backends",
    "cached_weight_norm",
    "check_labels",
    "empty_cache",
    "functional",
    "linear_cross_entropy",
    "linear_softmax_loss",
    "metrics",
    "patch",
    "schedule",
    "search",
    "weight_norm_product",
]
__all__ += functional.__all__
__all__ += modules.__all__


def __getattr__(name: str) -> object:
    if name == "distributed":  # imports DTensor, which takes as long as torch: for those who ask for it
        import importlib

        return importlib.import_module(".distributed", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "distributed"})
