r"""The losses as modules: the functions of :mod:`mlkernels.functional` with their arguments kept.

An argument that is a number stays one; a tensor becomes a buffer; an :class:`torch.nn.Parameter` becomes a parameter of
the module and is trained. So a scale is trained by passing ``nn.Parameter(torch.tensor(16.0))``, and giving
``loss.parameters()`` to the optimizer; a tensor that requires a gradient and is no parameter is refused. ``weight`` and
``logit_adjustment`` are always buffers. Numbers are keyword-only. What each argument may be is what the function says.

Modules may be built under ``torch.device("meta")``: after ``to_empty()``, ``reset_parameters()`` puts back what they
were built with, and draws what is drawn.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from . import functional as F
from .call import Options, PerCall
from .center import CenterLoss
from .joint import JointLoss
from .lgm import LGMLoss
from .loss_module import FamilyLoss
from .multi_margin import MultiMarginLoss
from .spec import BeyondPiName, ClampName, GradientName, Number
from .two_scale import TwoScaleLoss

__all__ = [
    "ArcFaceLoss",
    "CenterLoss",
    "CosFaceLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "JointLoss",
    "LGMLoss",
    "MarginLoss",
    "ModulatedCrossEntropyLoss",
    "MultiMarginLoss",
    "PiecewiseLoss",
    "SphereFaceLoss",
    "TwoScaleLoss",
]


class CrossEntropyLoss(FamilyLoss, of=F.cross_entropy):
    r"""Cross entropy of scaled logits; see :func:`mlkernels.cross_entropy`.

    Example:
        >>> import torch, mlkernels
        >>> loss = mlkernels.CrossEntropyLoss(scale=torch.nn.Parameter(torch.tensor(16.0)))  # a trained scale
        >>> loss(torch.tensor([[0.5, 0.4]]), torch.tensor([0])).backward()
        >>> loss.scale.grad
        tensor(-0.0168)
    """

    def __init__(self, *, scale: Number = 1.0, **common: Unpack[Options]) -> None:
        super().__init__({"scale": scale}, common)


class FocalLoss(FamilyLoss, of=F.focal_loss):
    r"""Focal loss; see :func:`mlkernels.focal_loss`.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.FocalLoss(gamma=2.0)(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]))
        tensor(0.0109)
    """

    def __init__(self, *, gamma: Number = 2.0, **common: Unpack[Options]) -> None:
        super().__init__({"gamma": gamma}, common)


class ModulatedCrossEntropyLoss(FamilyLoss, of=F.modulated_cross_entropy):
    r"""Modulated cross entropy; see :func:`mlkernels.modulated_cross_entropy`.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.ModulatedCrossEntropyLoss(beta=4.0, gamma=5.0)(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]))
        tensor(0.0213)
    """

    def __init__(
        self,
        *,
        beta: Number = 4.0,
        gamma: Number = 5.0,
        alpha: Number = 1.0,
        kappa: Number = 1.0,
        **common: Unpack[Options],
    ) -> None:
        super().__init__({"beta": beta, "gamma": gamma, "alpha": alpha, "kappa": kappa}, common)


class MarginLoss(FamilyLoss, of=F.margin_cross_entropy):
    r"""The combined margin on cosines; see :func:`mlkernels.margin_cross_entropy`.

    Example:
        >>> import torch, mlkernels
        >>> loss = mlkernels.MarginLoss(m2=0.3, m3=0.1, scale=16.0, reduction="sum")
        >>> loss(torch.tensor([[0.8, 0.1], [0.3, 0.2]]), torch.tensor([0, 1]))
        tensor(7.9781)
    """

    def __init__(
        self,
        *,
        m1: Number = 1.0,
        m2: Number = 0.0,
        m3: Number = 0.0,
        scale: Number = 64.0,
        beyond_pi: BeyondPiName | None = None,
        gradient: GradientName = "exact",
        **common: Unpack[Options],
    ) -> None:
        own = {"m1": m1, "m2": m2, "m3": m3, "scale": scale, "beyond_pi": beyond_pi, "gradient": gradient}
        super().__init__(own, common)

    def forward(self, input: Tensor, target: Tensor, norm: Tensor | None = None, **batch: Unpack[PerCall]) -> Tensor:
        """The loss. ``norm`` (N, 1) belongs to the batch: the logits are then raw, not cosines (L-Softmax)."""
        return F.margin_cross_entropy(input, target, norm=norm, **self._arguments(batch))


class _OneMargin(Options, total=False):
    margin: Number
    scale: Number
    beyond_pi: BeyondPiName | None
    gradient: GradientName


class CosineLoss(FamilyLoss):
    """What the losses with one margin on cosines have in common; their functions have the defaults."""

    def __init__(self, **given: Unpack[_OneMargin]) -> None:
        common: Any = {**given}
        taken = inspect.signature(self._function).parameters
        own = ("margin", "scale", "beyond_pi", "gradient")
        super().__init__({name: common.pop(name, taken[name].default) for name in own}, common)


class ArcFaceLoss(CosineLoss, of=F.arcface_loss):
    r"""ArcFace on cosines; see :func:`mlkernels.arcface_loss`.

    Cosines of features and class weights are what ``mlkernels.LinearLoss(loss, ..., normalize=True)`` and
    ``linear_softmax_loss(..., loss=loss, normalize=True)`` make on the way.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.ArcFaceLoss(scale=8.0)(torch.tensor([[0.6, 0.5]]), torch.tensor([0]))
        tensor(2.9118)
    """


class CosFaceLoss(CosineLoss, of=F.cosface_loss):
    r"""CosFace on cosines; see :func:`mlkernels.cosface_loss`.

    Cosines of features and class weights are what ``mlkernels.LinearLoss(loss, ..., normalize=True)`` and
    ``linear_softmax_loss(..., loss=loss, normalize=True)`` make on the way.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.CosFaceLoss(scale=8.0)(torch.tensor([[0.6, 0.5]]), torch.tensor([0]))
        tensor(2.1269)
    """


class SphereFaceLoss(CosineLoss, of=F.sphereface_loss):
    r"""SphereFace (A-Softmax) on cosines; see :func:`mlkernels.sphereface_loss`.

    Cosines of features and class weights are what ``mlkernels.LinearLoss(loss, ..., normalize=True)`` and
    ``linear_softmax_loss(..., loss=loss, normalize=True)`` make on the way.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.SphereFaceLoss(scale=8.0)(torch.tensor([[0.6, 0.5]]), torch.tensor([0]))
        tensor(13.2544)
    """


class PiecewiseLoss(FamilyLoss, of=F.piecewise_cross_entropy):
    r"""The searchable piecewise-linear loss; see :func:`mlkernels.piecewise_cross_entropy`.

    Example:
        >>> import torch, mlkernels
        >>> loss = mlkernels.PiecewiseLoss(tau_slope=torch.tensor([1.0, 0.8]), tau_bias=torch.tensor([0.0, 0.1]))
        >>> loss(torch.tensor([[0.5, -0.5], [0.2, 0.4]]), torch.tensor([0, 0]))
        tensor(0.5883)
    """

    def __init__(
        self,
        *,
        t_slope: Tensor | None = None,
        t_bias: Tensor | None = None,
        tau_slope: Tensor | None = None,
        tau_bias: Tensor | None = None,
        scale: Number = 1.0,
        tau_min: float = 1e-6,
        clamp: ClampName = "min",
        **common: Unpack[Options],
    ) -> None:
        tables = {"t_slope": t_slope, "t_bias": t_bias, "tau_slope": tau_slope, "tau_bias": tau_bias}
        super().__init__({**tables, "scale": scale, "tau_min": tau_min, "clamp": clamp}, common)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        group: Tensor | None = None,
        norm: Tensor | None = None,
        **batch: Unpack[PerCall],
    ) -> Tensor:
        """The loss. ``group`` (of target's shape) and ``norm`` (N, 1) belong to the batch."""
        return F.piecewise_cross_entropy(input, target, group=group, norm=norm, **self._arguments(batch))
