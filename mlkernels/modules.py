r"""The losses as modules: the functions of :mod:`mlkernels.functional` with their arguments kept.

An argument that is a number stays one; a tensor becomes a buffer; an :class:`torch.nn.Parameter` becomes a parameter of
the module and is trained. So a scale is trained by passing ``nn.Parameter(torch.tensor(16.0))``, and giving
``loss.parameters()`` to the optimizer; a tensor that requires a gradient and is no parameter is refused. ``weight`` and
``logit_adjustment`` are always buffers. Numbers are keyword-only.

Modules may be built under ``torch.device("meta")``: after ``to_empty()``, ``reset_parameters()`` puts back what they
were built with, and draws what is drawn.
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from . import functional as F
from . import named
from .call import Options, PerCall
from .center import CenterLoss
from .joint import JointLoss
from .lgm import LGMLoss
from .loss_module import FamilyLoss
from .multi_margin import MultiMarginLoss
from .signatures import family
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


@family
class CrossEntropyLoss(FamilyLoss):
    r"""Cross entropy of scaled logits; see :func:`mlkernels.cross_entropy`.

    Args:
        scale: s > 0, a number or a tensor (0-d or (C,)); an ``nn.Parameter`` is trained.
        **common: as in :mod:`mlkernels.functional`.

    Example:
        >>> import torch, mlkernels
        >>> loss = mlkernels.CrossEntropyLoss(scale=torch.nn.Parameter(torch.tensor(16.0)))  # a trained scale
        >>> loss(torch.tensor([[0.5, 0.4]]), torch.tensor([0])).backward()
        >>> loss.scale.grad
        tensor(-0.0168)
    """

    _function = staticmethod(F.cross_entropy)
    _composed = staticmethod(named.cross_entropy)

    def __init__(self, *, scale: Number = 1.0, **common: Unpack[Options]) -> None:
        super().__init__({"scale": scale}, common)


@family
class FocalLoss(FamilyLoss):
    r"""Focal loss; see :func:`mlkernels.focal_loss`.

    Args:
        gamma: the focusing exponent, >= 0, a number or a tensor (0-d or (C,)); 0 is cross entropy.
        **common: as in :mod:`mlkernels.functional`.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.FocalLoss(gamma=2.0)(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]))
        tensor(0.0109)
    """

    _function = staticmethod(F.focal_loss)
    _composed = staticmethod(named.focal_loss)

    def __init__(self, *, gamma: Number = 2.0, **common: Unpack[Options]) -> None:
        super().__init__({"gamma": gamma}, common)


@family
class ModulatedCrossEntropyLoss(FamilyLoss):
    r"""Modulated cross entropy; see :func:`mlkernels.modulated_cross_entropy`.

    Args:
        beta: > 0. gamma, alpha, kappa: >= 0. Numbers or tensors (0-d or (C,)); gamma + kappa >= 1.
        **common: as in :mod:`mlkernels.functional`.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.ModulatedCrossEntropyLoss(beta=4.0, gamma=5.0)(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]))
        tensor(0.0213)
    """

    _function = staticmethod(F.modulated_cross_entropy)
    _composed = staticmethod(named.modulated_cross_entropy)

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


@family
class MarginLoss(FamilyLoss):
    r"""The combined margin on cosines; see :func:`mlkernels.margin_cross_entropy`.

    Args:
        m1: the multiplicative margin, > 0. m2: the additive angle, in radians. m3: the additive cosine. Numbers or
            tensors (0-d or (C,)).
        scale: s > 0, of all logits; a number or a tensor (0-d or (C,)).
        beyond_pi: ``"linear"``, ``"monotone"``, ``"easy"`` or ``"none"``; see :class:`mlkernels.Margin`.
        gradient: ``"exact"`` or ``"straight_through"``.
        **common: as in :mod:`mlkernels.functional`.

    Example:
        >>> import torch, mlkernels
        >>> loss = mlkernels.MarginLoss(m2=0.3, m3=0.1, scale=16.0, reduction="sum")
        >>> loss(torch.tensor([[0.8, 0.1], [0.3, 0.2]]), torch.tensor([0, 1]))
        tensor(7.9781)
    """

    _function = staticmethod(F.margin_cross_entropy)
    _composed = staticmethod(named.margin_cross_entropy)

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


@family
class ArcFaceLoss(FamilyLoss):
    r"""ArcFace on cosines; see :func:`mlkernels.arcface_loss`.

    What it takes are cosines of features and class weights, which ``mlkernels.LinearLoss(loss, ..., normalize=True)``
    and ``linear_softmax_loss(..., loss=loss, normalize=True)`` make on the way.

    Args:
        margin: the additive angle, in radians, a number or a tensor (0-d or (C,)).
        scale: s > 0, of all logits; a number or a tensor (0-d or (C,)).
        beyond_pi: ``"linear"``, ``"monotone"``, ``"easy"`` or ``"none"``; see :class:`mlkernels.Margin`.
        gradient: ``"exact"`` or ``"straight_through"``.
        **common: as in :mod:`mlkernels.functional`.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.ArcFaceLoss(scale=8.0)(torch.tensor([[0.6, 0.5]]), torch.tensor([0]))
        tensor(2.9118)
    """

    _function = staticmethod(F.arcface_loss)
    _composed = staticmethod(named.arcface_loss)

    def __init__(
        self,
        *,
        margin: Number = 0.5,
        scale: Number = 64.0,
        beyond_pi: BeyondPiName | None = None,
        gradient: GradientName = "exact",
        **common: Unpack[Options],
    ) -> None:
        super().__init__({"margin": margin, "scale": scale, "beyond_pi": beyond_pi, "gradient": gradient}, common)


@family
class CosFaceLoss(FamilyLoss):
    r"""CosFace on cosines; see :func:`mlkernels.cosface_loss`.

    What it takes are cosines of features and class weights, which ``mlkernels.LinearLoss(loss, ..., normalize=True)``
    and ``linear_softmax_loss(..., loss=loss, normalize=True)`` make on the way.

    Args:
        margin: the additive cosine, a number or a tensor (0-d or (C,)).
        scale: s > 0, of all logits; a number or a tensor (0-d or (C,)).
        beyond_pi: ``"linear"``, ``"monotone"``, ``"easy"`` or ``"none"``; see :class:`mlkernels.Margin`.
        gradient: ``"exact"`` or ``"straight_through"``.
        **common: as in :mod:`mlkernels.functional`.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.CosFaceLoss(scale=8.0)(torch.tensor([[0.6, 0.5]]), torch.tensor([0]))
        tensor(2.1269)
    """

    _function = staticmethod(F.cosface_loss)
    _composed = staticmethod(named.cosface_loss)

    def __init__(
        self,
        *,
        margin: Number = 0.35,
        scale: Number = 64.0,
        beyond_pi: BeyondPiName | None = None,
        gradient: GradientName = "exact",
        **common: Unpack[Options],
    ) -> None:
        super().__init__({"margin": margin, "scale": scale, "beyond_pi": beyond_pi, "gradient": gradient}, common)


@family
class SphereFaceLoss(FamilyLoss):
    r"""SphereFace (A-Softmax) on cosines; see :func:`mlkernels.sphereface_loss`.

    What it takes are cosines of features and class weights, which ``mlkernels.LinearLoss(loss, ..., normalize=True)``
    and ``linear_softmax_loss(..., loss=loss, normalize=True)`` make on the way.

    Args:
        margin: the multiplicative margin, > 0, a number or a tensor (0-d or (C,)).
        scale: s > 0, of all logits; a number or a tensor (0-d or (C,)).
        beyond_pi: ``"linear"``, ``"monotone"``, ``"easy"`` or ``"none"``; see :class:`mlkernels.Margin`.
        gradient: ``"exact"`` or ``"straight_through"``.
        **common: as in :mod:`mlkernels.functional`.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.SphereFaceLoss(scale=8.0)(torch.tensor([[0.6, 0.5]]), torch.tensor([0]))
        tensor(13.2544)
    """

    _function = staticmethod(F.sphereface_loss)
    _composed = staticmethod(named.sphereface_loss)

    def __init__(
        self,
        *,
        margin: Number = 4,
        scale: Number = 64.0,
        beyond_pi: BeyondPiName | None = None,
        gradient: GradientName = "exact",
        **common: Unpack[Options],
    ) -> None:
        super().__init__({"margin": margin, "scale": scale, "beyond_pi": beyond_pi, "gradient": gradient}, common)


@family
class PiecewiseLoss(FamilyLoss):
    r"""The searchable piecewise-linear loss; see :func:`mlkernels.piecewise_cross_entropy`.

    Args:
        t_slope, t_bias, tau_slope, tau_bias: (M,), or (G, M) for a population; None: identity.
        scale: s > 0, a number or a tensor (0-d or (C,)).
        tau_min: where tau is at most this the loss is clamped, in (0, 1].
        clamp: ``"min"`` or ``"cross_entropy"``; see :class:`mlkernels.Tau`.
        **common: as in :mod:`mlkernels.functional`.

    Example:
        >>> import torch, mlkernels
        >>> loss = mlkernels.PiecewiseLoss(tau_slope=torch.tensor([1.0, 0.8]), tau_bias=torch.tensor([0.0, 0.1]))
        >>> loss(torch.tensor([[0.5, -0.5], [0.2, 0.4]]), torch.tensor([0, 0]))
        tensor(0.5883)
    """

    _function = staticmethod(F.piecewise_cross_entropy)
    _composed = staticmethod(named.piecewise_cross_entropy)

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
