r"""The losses by name.

Every function of the family is :math:`L = \varphi(\log p_y)`, :math:`p = \operatorname{softmax}(z)`, with
:math:`z_j = s f_j` and :math:`z_y = s\,t(f_y)`; they differ in the target transform t, the row scale s and the head
:math:`\varphi`. With :math:`w = -d\varphi/d\log p_y`, the gradient is
:math:`\partial L/\partial f_j = s\,w\,(p_j - [j=y])`, at the target times :math:`t'(f_y)`. They share these arguments,
which follow :func:`torch.nn.functional.cross_entropy`:

Args:
    input: (N, C), (N, C, d1, ...) or (C,) logits, half, bfloat16, float or double; read in place, of any stride.
    target: (N,), (N, d1, ...) or 0-d class indices of any integer dtype.
    **common: those of :class:`mlkernels.call.Common`.

Returns:
    The loss: 0-d, or of target's shape under ``"none"``; float32 for half inputs, else of input's dtype.

Raises:
    TypeError, ValueError: a bad argument, by name, before anything is computed.
    IndexError: on the CPU, a label outside [0, C) that is not ignore_index, with its row. On a GPU that row's loss and
        gradient are NaN; see :func:`mlkernels.check_labels`.

A parameter (a scale, a margin, an exponent) is a real number (Python's, NumPy's) or a tensor: 0-d, (1,): shared; (C,):
per class, by the label; target.shape + (1,), that is (N, 1): per row; it may require a gradient, and is keyword-only.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor
from typing_extensions import Never, Unpack

from . import softmax
from .backends.reference import RowStats
from .call import Common
from .center import center_loss
from .checks import check_flag
from .lgm import lgm_loss
from .multi_margin import multi_margin_loss
from .numbering import HeadKind, ScaleKind, TransformKind
from .signatures import family, filled
from .soft_targets import CROSS_ENTROPY, soft_cross_entropy
from .spec import BeyondPiName, ClampName, GradientName, Head, Number, Transform, TwoScale, compose, spec
from .tables import piecewise

__all__ = [
    "arcface_loss",
    "center_loss",
    "cosface_loss",
    "cross_entropy",
    "focal_loss",
    "lgm_loss",
    "margin_cross_entropy",
    "modulated_cross_entropy",
    "multi_margin_loss",
    "piecewise_cross_entropy",
    "softmax_loss",
    "sphereface_loss",
    "two_scale_cross_entropy",
]

__doc__ = filled(__doc__)

_MARGIN = TransformKind.MARGIN
_FOCAL = spec(head=HeadKind.MODULATED, function="focal_loss")
_MODULATED = spec(head=HeadKind.MODULATED, function="modulated_cross_entropy")
_TWO_SCALE = spec(scale=ScaleKind.TWO_SCALE, function="two_scale_cross_entropy")


@family
def cross_entropy(input: Tensor, target: Tensor, *rest: Never, scale: Number = 1.0, **common: Unpack[Common]) -> Tensor:
    r"""Cross entropy of scaled logits, :math:`L = -\log\operatorname{softmax}(s f)_y`.

    Gradient: :math:`\partial L/\partial f_j = s\,(p_j - [j=y])`.

    Args:
        scale: s > 0, a number or a tensor (0-d, (C,) or (N, 1)).
        **common: as in :mod:`mlkernels.functional`.

    A floating ``target`` of input's shape (class probabilities) is served by the reference backend.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.cross_entropy(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]))
        tensor(0.2395)
    """
    if isinstance(target, Tensor) and target.is_floating_point() and not rest:
        return soft_cross_entropy(cross_entropy, input, target, scale, common)
    return softmax.loss(CROSS_ENTROPY, (scale,), input, target, None, common, rest)


@family
def focal_loss(input: Tensor, target: Tensor, *rest: Never, gamma: Number = 2.0, **common: Unpack[Common]) -> Tensor:
    r"""Focal loss of the softmax, :math:`L = (1-p_y)^\gamma(-\log p_y)`.

    Gradient: :math:`\partial L/\partial f_j = w\,(p_j - [j=y])`,
    :math:`w = (1-p_y)^\gamma - \gamma\,p_y(1-p_y)^{\gamma-1}\log p_y`.

    Args:
        gamma: the focusing exponent, >= 0, a number or a tensor (0-d, (C,) or (N, 1)); 0 is cross entropy. Below 1 the
            gradient stays finite at p = 1.
        **common: as in :mod:`mlkernels.functional`.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.focal_loss(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]), gamma=2.0)
        tensor(0.0109)

    Source: Lin et al., Focal Loss for Dense Object Detection, equation (4), with the softmax's p.
    """
    return softmax.loss(_FOCAL, (1.0, 1.0, gamma, 1.0, 1.0), input, target, None, common, rest)


@family
def modulated_cross_entropy(
    input: Tensor,
    target: Tensor,
    *rest: Never,
    beta: Number = 4.0,
    gamma: Number = 5.0,
    alpha: Number = 1.0,
    kappa: Number = 1.0,
    **common: Unpack[Common],
) -> Tensor:
    r"""Modulated cross entropy, :math:`L = \alpha\,(1-p_y^\beta)^\gamma\,(-\log p_y)^\kappa`.

    Gradient: :math:`\partial L/\partial f_j = w\,(p_j - [j=y])`, with :math:`\ell = -\log p_y`,
    :math:`w = \alpha(1-p_y^\beta)^\gamma\ell^{\kappa-1}\bigl(\kappa + \gamma\beta\ell\,p_y^\beta/(1-p_y^\beta)\bigr)`.

    The factor tends to 1 for small p and leaves the loss alone; it tends to 0 for p -> 1; :math:`\beta` widens the
    range in which the loss is not damped. The family holds the classics: focal (1, :math:`\gamma`, 1, 1), cross entropy
    (:math:`\beta`, 0, 1, 1) and generalised cross entropy (q, 1, 1/q, 0), as (beta, gamma, alpha, kappa).

    Args:
        beta: > 0. gamma: >= 0. alpha: >= 0. kappa: >= 0. Numbers or tensors (0-d, (C,) or (N, 1)).
            gamma + kappa must be >= 1, or the gradient diverges at p = 1.
        **common: as in :mod:`mlkernels.functional`.

    Example:
        >>> import torch, mlkernels
        >>> logits, target = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
        >>> mlkernels.modulated_cross_entropy(logits, target)
        tensor(0.0213)
        >>> q = 0.7  # generalised cross entropy: (1 - p^q) / q
        >>> mlkernels.modulated_cross_entropy(logits, target, beta=q, gamma=1.0, alpha=1 / q, kappa=0.0)
        tensor(0.2205)

    Source: the modulated cross entropy paper, equations (1) and (4). Reconstructed: the formula did not survive in the
    text at hand; this is the candidate with every property that the text states (see docs/losses.md).
    """
    return softmax.loss(_MODULATED, (1.0, beta, gamma, alpha, kappa), input, target, None, common, rest)


@family
def margin_cross_entropy(
    input: Tensor,
    target: Tensor,
    *rest: Never,
    m1: Number = 1.0,
    m2: Number = 0.0,
    m3: Number = 0.0,
    scale: Number = 64.0,
    norm: Number | None = None,
    beyond_pi: BeyondPiName | None = None,
    gradient: GradientName = "exact",
    **common: Unpack[Common],
) -> Tensor:
    r"""Cross entropy with angular margins, :math:`z_y = s(\cos(m_1\theta + m_2) - m_3)`, :math:`z_j = s f_j`.

    Gradient: :math:`\partial L/\partial f_j = s\,(p_j - [j=y])`, at the target times
    :math:`m_1\sin(m_1\theta + m_2)/\sin\theta` (1 under ``"straight_through"``).

    ``input`` holds cosines, :math:`f_y = \cos\theta`, except with ``norm`` (L-Softmax on raw logits), where
    :math:`z_y = n\,t(f_y/n)`; then ``scale`` is usually 1.

    Args:
        m1: the multiplicative margin, > 0. m2: the additive angle, in radians. m3: the additive cosine. Numbers or
            tensors (0-d, (C,) or (N, 1)).
        scale: s > 0, of all logits; a number or a tensor (0-d, (C,) or (N, 1)).
        beyond_pi: ``"linear"``, ``"monotone"``, ``"easy"`` or ``"none"``; see :class:`mlkernels.Margin`.
        gradient: ``"exact"`` or ``"straight_through"``.
        norm: (N, 1), n > 0.
        **common: as in :mod:`mlkernels.functional`.

    Example:
        >>> import torch, mlkernels
        >>> cosines, target = torch.tensor([[0.8, 0.1], [0.3, 0.2]]), torch.tensor([0, 1])
        >>> mlkernels.margin_cross_entropy(cosines, target, m2=0.3, m3=0.1, scale=16.0, reduction="none")
        tensor([2.0450e-03, 7.9761e+00])

    Source: ArcFace, equation (4) (the combined margin).
    """
    structure = spec(_MARGIN, beyond_pi=beyond_pi, gradient=gradient, function="margin_cross_entropy")
    return softmax.loss(structure, (m1, m2, m3, norm, scale), input, target, None, common, rest)


@family
def arcface_loss(
    input: Tensor,
    target: Tensor,
    *rest: Never,
    margin: Number = 0.5,
    scale: Number = 64.0,
    beyond_pi: BeyondPiName | None = None,
    gradient: GradientName = "exact",
    **common: Unpack[Common],
) -> Tensor:
    r"""ArcFace on cosines, :math:`z_y = s\cos(\theta + m)`: an additive angular margin, in radians.

    Gradient: :math:`\partial L/\partial f_j = s\,(p_j - [j=y])`, at the target times
    :math:`\cos m + f_y\sin m/\sqrt{1-f_y^2}`.

    Args:
        margin: the additive angle, in radians, a number or a tensor (0-d, (C,) or (N, 1)).
        scale: s > 0, of all logits; a number or a tensor (0-d, (C,) or (N, 1)).
        beyond_pi: ``"linear"``, ``"monotone"``, ``"easy"`` or ``"none"``; see :class:`mlkernels.Margin`.
        gradient: ``"exact"`` or ``"straight_through"``.
        **common: as in :mod:`mlkernels.functional`.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.arcface_loss(torch.tensor([[0.6, 0.5]]), torch.tensor([0]), scale=8.0)
        tensor(2.9118)

    Source: Deng et al., ArcFace, equation (3).
    """
    structure = spec(_MARGIN, beyond_pi=beyond_pi, gradient=gradient, function="arcface_loss")
    return softmax.loss(structure, (1.0, margin, 0.0, None, scale), input, target, None, common, rest)


@family
def cosface_loss(
    input: Tensor,
    target: Tensor,
    *rest: Never,
    margin: Number = 0.35,
    scale: Number = 64.0,
    beyond_pi: BeyondPiName | None = None,
    gradient: GradientName = "exact",
    **common: Unpack[Common],
) -> Tensor:
    r"""CosFace on cosines, :math:`z_y = s(\cos\theta - m)`: an additive cosine margin.

    Gradient: :math:`\partial L/\partial f_j = s\,(p_j - [j=y])`.

    Args:
        margin: the additive cosine, a number or a tensor (0-d, (C,) or (N, 1)).
        scale: s > 0, of all logits; a number or a tensor (0-d, (C,) or (N, 1)).
        beyond_pi: ``"linear"``, ``"monotone"``, ``"easy"`` or ``"none"``; see :class:`mlkernels.Margin`.
        gradient: ``"exact"`` or ``"straight_through"``.
        **common: as in :mod:`mlkernels.functional`.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.cosface_loss(torch.tensor([[0.6, 0.5]]), torch.tensor([0]), scale=8.0)
        tensor(2.1269)

    Source: Wang et al., CosFace, equation (4).
    """
    structure = spec(_MARGIN, beyond_pi=beyond_pi, gradient=gradient, function="cosface_loss")
    return softmax.loss(structure, (1.0, 0.0, margin, None, scale), input, target, None, common, rest)


@family
def sphereface_loss(
    input: Tensor,
    target: Tensor,
    *rest: Never,
    margin: Number = 4,
    scale: Number = 64.0,
    beyond_pi: BeyondPiName | None = None,
    gradient: GradientName = "exact",
    **common: Unpack[Common],
) -> Tensor:
    r"""SphereFace (A-Softmax) on cosines, :math:`z_y = s\,\psi(\theta)`, :math:`\psi` the monotone continuation of
    :math:`\cos m\theta`.

    Gradient: :math:`\partial L/\partial f_j = s\,(p_j - [j=y])`, at the target times
    :math:`m\,|\sin m\theta|/\sin\theta`.

    Args:
        margin: the multiplicative margin, > 0, not only an integer; a number or a tensor (0-d, (C,) or (N, 1)).
        scale: s > 0, of all logits; a number or a tensor (0-d, (C,) or (N, 1)).
        beyond_pi: ``"linear"``, ``"monotone"``, ``"easy"`` or ``"none"``; see :class:`mlkernels.Margin`.
        gradient: ``"exact"`` or ``"straight_through"``.
        **common: as in :mod:`mlkernels.functional`.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.sphereface_loss(torch.tensor([[0.6, 0.5]]), torch.tensor([0]), scale=8.0)
        tensor(13.2544)

    Source: Liu et al., SphereFace, equation (7).
    """
    structure = spec(_MARGIN, beyond_pi=beyond_pi, gradient=gradient, function="sphereface_loss")
    return softmax.loss(structure, (margin, 0.0, 0.0, None, scale), input, target, None, common, rest)


@family
def two_scale_cross_entropy(
    input: Tensor,
    target: Tensor,
    scale_low: Number,
    scale_high: Number,
    *rest: Never,
    eta: float = 0.01,
    logit_norm: Tensor | None = None,
    **common: Unpack[Common],
) -> Tensor:
    r"""Two-scale cross entropy: :math:`L = -\log\operatorname{softmax}(\tfrac{r}{R} X)_y` with
    :math:`r = R_1` where :math:`\delta X < \eta`, else :math:`R_2`.

    :math:`\delta X = X_y - \max_{j\ne y}X_j` is the row's confidence, of the raw logits; equality takes :math:`R_2`.

    Gradient: :math:`\partial L/\partial X_j = \tfrac{r}{R}(p_j - [j=y])`. The selection has none; that of the scale
    that no row selected is exactly 0.

    Args:
        scale_low: R1 > 0, a number or a 0-d tensor. scale_high: R2 > 0. eta: the threshold.
        logit_norm: R > 0, 0-d; None: 1. Differentiated where it requires a gradient.
        **common: as in :mod:`mlkernels.functional`.

    The separation variant (17) is ``scale_low=1, scale_high=R_s``.

    Example:
        >>> import torch, mlkernels
        >>> logits, target = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
        >>> mlkernels.two_scale_cross_entropy(logits, target, 1.0, 10.0, reduction="none")
        tensor([4.5399e-05, 1.3133e+00])

    Source: the two-scale loss, equations (13), (14), (16), (17).
    """
    return softmax.loss(_TWO_SCALE, (scale_low, scale_high, eta, logit_norm), input, target, None, common, rest)


@family
def piecewise_cross_entropy(
    input: Tensor,
    target: Tensor,
    *rest: Never,
    t_slope: Tensor | None = None,
    t_bias: Tensor | None = None,
    tau_slope: Tensor | None = None,
    tau_bias: Tensor | None = None,
    group: Tensor | None = None,
    norm: Number | None = None,
    scale: Number = 1.0,
    tau_min: float = 1e-6,
    clamp: ClampName = "min",
    **common: Unpack[Common],
) -> Tensor:
    r"""The searchable loss :math:`L = -\log\tau(p^t_y)` with piecewise-linear t on [-1, 1] and :math:`\tau` on [0, 1].

    :math:`t(x) = a^t_k x + b^t_k` on the k-th of M equal bins, :math:`\tau` likewise; :math:`p^t_y` is the target's
    probability with t applied to its logit. Pieces are independent: t and :math:`\tau` are in general not continuous.

    Gradient: :math:`\partial L/\partial f_j = s\,w\,(p_j - [j=y])`, at the target times its :math:`a^t_k`;
    :math:`w = a^\tau_k\,p^t_y/\tau(p^t_y)`, where the loss is clamped 0 (or 1, see ``clamp``).

    Args:
        t_slope, t_bias, tau_slope, tau_bias: (M,), or (G, M) for a population of G losses in one call; None: identity
            (slope 1, bias 0). Tensors may require a gradient.
        group: of target's shape, which of the G losses each row has; required exactly when tables are (G, M).
        norm: (N, 1), n > 0: the target's logit is :math:`n\,t(f_y/n)`.
        scale: s > 0, a number or a tensor (0-d, (C,) or (N, 1)).
        tau_min: where :math:`\tau \le` tau_min, in (0, 1], the loss is clamped.
        clamp: ``"min"`` or ``"cross_entropy"``; see :class:`mlkernels.Tau`.
        **common: as in :mod:`mlkernels.functional`.

    Example:
        >>> import torch, mlkernels
        >>> logits, target = torch.tensor([[0.5, -0.5], [0.2, 0.4]]), torch.tensor([0, 0])
        >>> slope, bias = torch.tensor([1.0, 0.8]), torch.tensor([0.0, 0.1])
        >>> mlkernels.piecewise_cross_entropy(logits, target, tau_slope=slope, tau_bias=bias, reduction="none")
        tensor([0.3786, 0.7981])

    Source: Li et al., AM-LFS, equation (16).
    """
    parts = piecewise(t_slope, t_bias, tau_slope, tau_bias, norm, scale, tau_min, clamp)
    return softmax.loss(*parts, input, target, group, common, rest)


class _Composed(Common, total=False):
    transform: Transform | None
    scale: Number | TwoScale
    head: Head | None
    target_logit: Tensor | None
    group: Tensor | None


@overload
def softmax_loss(
    input: Tensor, target: Tensor, *, return_stats: Literal[False] = False, **composed: Unpack[_Composed]
) -> Tensor: ...


@overload
def softmax_loss(
    input: Tensor, target: Tensor, *, return_stats: Literal[True], **composed: Unpack[_Composed]
) -> tuple[Tensor, RowStats]: ...


@family
def softmax_loss(
    input: Tensor,
    target: Tensor,
    *rest: Never,
    transform: Transform | None = None,
    scale: Number | TwoScale = 1.0,
    head: Head | None = None,
    target_logit: Tensor | None = None,
    group: Tensor | None = None,
    return_stats: bool = False,
    **common: Unpack[Common],
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Any composition of the family: target transform x row scale x head.

    .. math:: z_j = s f_j,\quad z_y = s\,t(f_y),\quad \ell = z_y - \operatorname{logsumexp}(z),\quad L = \varphi(\ell)

    Args:
        transform: :class:`~mlkernels.Margin`, :class:`~mlkernels.Affine` or :class:`~mlkernels.PiecewiseLinear`;
            None: identity.
        scale: a number, a tensor (0-d, (C,) or (N, 1)), or :class:`~mlkernels.TwoScale`.
        head: :class:`~mlkernels.Modulated`, :class:`~mlkernels.Tau` or :class:`~mlkernels.Truncated`;
            None: :math:`-\ell`.
        target_logit: (N, 1), differentiable, replaces :math:`t(f_y)`: a target transform of your own.
        group: see :func:`piecewise_cross_entropy`.
        return_stats: return ``(loss, RowStats)``.
        **common: as in :mod:`mlkernels.functional`.

    A head of your own is any torch function of the row losses, at the cost of N scalars more.

    Example:
        >>> import torch, mlkernels
        >>> logits, target = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 2])
        >>> mlkernels.softmax_loss(logits, target, scale=mlkernels.TwoScale(1.0, 2.0), head=mlkernels.Modulated())
        tensor(0.7679)
        >>> loss, rows = mlkernels.softmax_loss(logits, target, return_stats=True)
        >>> rows.prediction, rows.rank
        (tensor([0, 1]), tensor([0, 1]))
        >>> nll = mlkernels.softmax_loss(logits, target, reduction="none")  # poly-1: -log p + eps (1 - p)
        >>> (nll + 2.0 * -torch.expm1(-nll)).mean()
        tensor(1.8966)
    """
    structure, values = compose(transform, scale, head, target_logit)
    if return_stats is not False and not rest:
        check_flag("return_stats", return_stats)
        return softmax.apply(structure, values, input, target, group, common, True)  # type: ignore[return-value]
    return softmax.loss(structure, values, input, target, group, common, rest)
