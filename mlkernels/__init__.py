"""Fused softmax-family losses for PyTorch; see the README and :mod:`mlkernels.functional`."""

from . import functional, metrics, schedule, search
from .backends import available_backends
from .backends.native import empty_cache
from .checks import check_labels
from .functional import (
    arcface_loss,
    center_loss,
    cosface_loss,
    cross_entropy,
    focal_loss,
    lgm_loss,
    margin_cross_entropy,
    modulated_cross_entropy,
    multi_margin_loss,
    piecewise_cross_entropy,
    softmax_loss,
    sphereface_loss,
    two_scale_cross_entropy,
)
from .joint import Alternating
from .linear import LinearLoss, TileSGD, linear_cross_entropy, linear_softmax_loss
from .modules import (
    ArcFaceLoss,
    CenterLoss,
    CosFaceLoss,
    CrossEntropyLoss,
    FocalLoss,
    JointLoss,
    LGMLoss,
    MarginLoss,
    ModulatedCrossEntropyLoss,
    MultiMarginLoss,
    PiecewiseLoss,
    SphereFaceLoss,
    TwoScaleLoss,
)
from .patching import patch
from .softmax import RowStats
from .spec import Affine, Margin, Modulated, PiecewiseLinear, Tau, Truncated, TwoScale
from .two_scale import cached_weight_norm, weight_norm_product

__version__ = "0.1.0"

__all__ = [
    "Affine",
    "Alternating",
    "ArcFaceLoss",
    "CenterLoss",
    "CosFaceLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "JointLoss",
    "LGMLoss",
    "LinearLoss",
    "Margin",
    "MarginLoss",
    "Modulated",
    "ModulatedCrossEntropyLoss",
    "MultiMarginLoss",
    "PiecewiseLinear",
    "PiecewiseLoss",
    "RowStats",
    "SphereFaceLoss",
    "Tau",
    "TileSGD",
    "Truncated",
    "TwoScale",
    "TwoScaleLoss",
    "__version__",
    "arcface_loss",
    "available_backends",
    "cached_weight_norm",
    "center_loss",
    "check_labels",
    "cosface_loss",
    "cross_entropy",
    "empty_cache",
    "focal_loss",
    "functional",
    "lgm_loss",
    "linear_cross_entropy",
    "linear_softmax_loss",
    "margin_cross_entropy",
    "metrics",
    "modulated_cross_entropy",
    "multi_margin_loss",
    "patch",
    "piecewise_cross_entropy",
    "schedule",
    "search",
    "softmax_loss",
    "sphereface_loss",
    "two_scale_cross_entropy",
    "weight_norm_product",
]


def __getattr__(name: str) -> object:
    if name == "distributed":  # imports DTensor, which takes as long as torch: for those who ask for it
        import importlib

        return importlib.import_module(".distributed", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
