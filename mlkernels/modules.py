r"""The losses as modules: the functions of :mod:`mlkernels.functional` with their arguments kept.

An argument that is a number stays one; a tensor becomes a buffer; an :class:`torch.nn.Parameter` becomes a parameter of
the module and is trained. So a scale is trained by passing ``nn.Parameter(torch.tensor(16.0))``, and giving
``loss.parameters()`` to the optimizer; a tensor that requires a gradient and is no parameter is refused. ``weight`` and
``logit_adjustment`` are always buffers. Numbers are keyword-only.

Modules may be built under ``torch.device("meta")``: after ``to_empty()``, ``reset_parameters()`` puts back what they
were built with, and draws what is drawn.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Never, Unpack

from . import functional as F
from .backends.reference import full_precision
from .checks import check_number, check_range, traced, unknown_keywords
from .lgm import class_logits
from .softmax import COMMON, Common
from .spec import BackendName, BeyondPiName, ClampName, GradientName, Number, ReductionName
from .weight_norm import weight_norm_product

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


class _Loss(nn.Module):
    """A function and the arguments kept for it."""

    _function: ClassVar[Callable[..., Tensor]]
    _buffers_always: ClassVar[frozenset[str]] = frozenset({"weight", "logit_adjustment"})
    _drawn: ClassVar[frozenset[str]] = frozenset()
    """What ``reset_parameters`` draws: everything else it puts back."""

    def __init__(self, own: dict[str, Any], common: dict[str, Any]) -> None:
        super().__init__()
        self._own, self._common = tuple(own), tuple(common)
        self._initial: dict[str, Tensor] = {}
        for name, value in (own | common).items():
            self._keep(name, value)

    def _keep(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and name not in self._drawn:
            self._initial[name] = value.detach().clone()
        if name in self._buffers_always:
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(f"{name} is not differentiated: it must not require a gradient; pass {name}.detach()")
            self.register_buffer(name, value)
        elif isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        elif isinstance(value, Tensor):
            if value.requires_grad:
                raise ValueError(
                    f"{name} requires a gradient, and as no nn.Parameter would be in no optimizer: pass "
                    f"nn.Parameter({name}) to train it, {name}.detach() to keep it"
                )
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)

    def reset_parameters(self) -> None:
        """Puts back the tensors that the loss was built with, for one that ``to_empty()`` took off the meta device.

        Raises:
            ValueError: a tensor that was on the meta device itself: there is nothing to put back.
        """
        for name, initial in self._initial.items():
            if initial.is_meta:
                raise ValueError(
                    f"{name} was given on the meta device and has no value to go back to: build it on a device "
                    "(device='cpu'), or load a state_dict"
                )
        with torch.no_grad():
            for name, initial in self._initial.items():
                getattr(self, name).copy_(initial)

    def _kept(self, names: Sequence[str]) -> dict[str, Any]:
        buffers, always = self._buffers, self._buffers_always
        return {name: buffers[name] if name in always else getattr(self, name) for name in names}

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of the kept arguments."""
        return type(self)._function(input, target, **self._kept(self._own + self._common))

    def extra_repr(self) -> str:
        """The loss's own arguments, and the common ones that are not at their defaults; tensors by their shapes."""
        own = inspect.signature(type(self)._function).parameters
        defaults = COMMON | {name: parameter.default for name, parameter in own.items()}
        shown = self._kept(self._own)
        for name, value in self._kept(self._common).items():
            if isinstance(value, Tensor) or value != defaults[name]:
                shown[name] = value
        return ", ".join(f"{name}={_shown(value)}" for name, value in shown.items())


def _shown(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else repr(value)


class _FamilyLoss(_Loss):
    """A loss of the softmax family: what all of them take."""

    def __init__(self, own: dict[str, Any], common: Common) -> None:
        unknown = {name: value for name, value in common.items() if name not in COMMON}
        if unknown:
            raise unknown_keywords(type(self), unknown, COMMON)
        super().__init__(own, COMMON | common)


class CrossEntropyLoss(_FamilyLoss):
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

    def __init__(self, *, scale: Number = 1.0, **common: Unpack[Common]) -> None:
        super().__init__({"scale": scale}, common)


class FocalLoss(_FamilyLoss):
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

    def __init__(self, *, gamma: Number = 2.0, **common: Unpack[Common]) -> None:
        super().__init__({"gamma": gamma}, common)


class ModulatedCrossEntropyLoss(_FamilyLoss):
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

    def __init__(
        self,
        *,
        beta: Number = 4.0,
        gamma: Number = 5.0,
        alpha: Number = 1.0,
        kappa: Number = 1.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__({"beta": beta, "gamma": gamma, "alpha": alpha, "kappa": kappa}, common)


class MarginLoss(_FamilyLoss):
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

    def __init__(
        self,
        *,
        m1: Number = 1.0,
        m2: Number = 0.0,
        m3: Number = 0.0,
        scale: Number = 64.0,
        beyond_pi: BeyondPiName | None = None,
        gradient: GradientName = "exact",
        **common: Unpack[Common],
    ) -> None:
        own = {"m1": m1, "m2": m2, "m3": m3, "scale": scale, "beyond_pi": beyond_pi, "gradient": gradient}
        super().__init__(own, common)

    def forward(self, input: Tensor, target: Tensor, norm: Tensor | None = None) -> Tensor:
        """The loss. ``norm`` (N, 1) belongs to the batch: the logits are then raw, not cosines (L-Softmax)."""
        own, common = self._kept(self._own), self._kept(self._common)
        return F.margin_cross_entropy(input, target, norm=norm, **own, **common)


class ArcFaceLoss(_FamilyLoss):
    r"""ArcFace on cosines; see :func:`mlkernels.arcface_loss`.

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

    def __init__(
        self,
        *,
        margin: Number = 0.5,
        scale: Number = 64.0,
        beyond_pi: BeyondPiName | None = None,
        gradient: GradientName = "exact",
        **common: Unpack[Common],
    ) -> None:
        super().__init__({"margin": margin, "scale": scale, "beyond_pi": beyond_pi, "gradient": gradient}, common)


class CosFaceLoss(_FamilyLoss):
    r"""CosFace on cosines; see :func:`mlkernels.cosface_loss`.

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

    def __init__(
        self,
        *,
        margin: Number = 0.35,
        scale: Number = 64.0,
        beyond_pi: BeyondPiName | None = None,
        gradient: GradientName = "exact",
        **common: Unpack[Common],
    ) -> None:
        super().__init__({"margin": margin, "scale": scale, "beyond_pi": beyond_pi, "gradient": gradient}, common)


class SphereFaceLoss(_FamilyLoss):
    r"""SphereFace (A-Softmax) on cosines; see :func:`mlkernels.sphereface_loss`.

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

    def __init__(
        self,
        *,
        margin: Number = 4,
        scale: Number = 64.0,
        beyond_pi: BeyondPiName | None = None,
        gradient: GradientName = "exact",
        **common: Unpack[Common],
    ) -> None:
        super().__init__({"margin": margin, "scale": scale, "beyond_pi": beyond_pi, "gradient": gradient}, common)


class PiecewiseLoss(_FamilyLoss):
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
        **common: Unpack[Common],
    ) -> None:
        tables = {"t_slope": t_slope, "t_bias": t_bias, "tau_slope": tau_slope, "tau_bias": tau_bias}
        super().__init__({**tables, "scale": scale, "tau_min": tau_min, "clamp": clamp}, common)

    def forward(self, input: Tensor, target: Tensor, group: Tensor | None = None, norm: Tensor | None = None) -> Tensor:
        """The loss. ``group`` (of target's shape) and ``norm`` (N, 1) belong to the batch."""
        own, common = self._kept(self._own), self._kept(self._common)
        return F.piecewise_cross_entropy(input, target, group=group, norm=norm, **own, **common)


class TwoScaleLoss(_FamilyLoss):
    r"""Two-scale cross entropy with its scales; see :func:`mlkernels.two_scale_cross_entropy`.

    With R = ``logit_norm``, the network's size now, and :math:`R(\alpha^0)` = ``initial_norm``, its size at the start:

    * ``"trainable"`` (14): :math:`z = (r/R)X`, r = R1 where :math:`\delta X<\eta`, else R2; both are trained. At the
      start :math:`R_1 = R(\alpha^0)`, :math:`R_2 = 10\,R_1`.
    * ``"fixed"`` (16): the same, neither trained.
    * ``"separation"`` (17): z = X where :math:`\delta X < \eta`, else :math:`R_s X`; :math:`R_s` is trained, 10 at the
      start. It has no use for ``initial_norm`` and ``logit_norm``, and leaves them unread.

    The scales are ``scale_low`` and ``scale_high``: under ``parametrization="absolute"`` R1 and R2 themselves, in
    float64; under ``"relative"`` :math:`\rho_i` with :math:`R_i = \rho_i R(\alpha^0)`, 1 and 10 at the start. The two
    are the same loss but train differently: :math:`dL/dR_1 \propto 1/R`, so that for a deep network (R = 10^24.7 for
    WRN-28-10) R1 stands still; there take ``"relative"``. r/R is formed from logarithms in float64, then rounded.

    The single-scale baseline, :math:`R_2 := R_1`, is ``eta=math.inf``: every row takes R1.

    Args:
        initial_norm: :math:`R(\alpha^0) > 0`: a number, a 0-d tensor, or the model, for its
            :func:`weight_norm_product` now. None: R = 1, the logits are used as they come, and ``forward`` takes no
            norm.
        eta: the threshold on the confidence :math:`\delta X`.
        variant: ``"trainable"``, ``"fixed"`` or ``"separation"``.
        parametrization: ``"absolute"`` or ``"relative"``.
        detach_norm: no gradient by R. It would only move weights along themselves.
        **common: as in :mod:`mlkernels.functional`.

    Example:
        >>> import torch, mlkernels
        >>> model = torch.nn.Linear(2, 3)
        >>> loss = mlkernels.TwoScaleLoss(model, parametrization="relative")
        >>> optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
        >>> logits, target = model(torch.randn(8, 2)), torch.randint(3, (8,))
        >>> loss(logits, target, model).backward()  # R is that of the model now
        >>> loss.probabilities(logits, model).shape  # at R1: those to predict with
        torch.Size([8, 3])
        >>> loss.scale_low, loss.scale_high
        (Parameter containing:
        tensor(1., requires_grad=True), Parameter containing:
        tensor(10., requires_grad=True))

    Source: the two-scale loss, equations (9), (13), (14), (16), (17) and the numerical section.
    """

    _function = staticmethod(F.two_scale_cross_entropy)
    eta: float
    scale_low: Tensor
    scale_high: Tensor
    log_unit: Tensor

    def __init__(
        self,
        initial_norm: float | Tensor | nn.Module | None = None,
        *,
        eta: float = 0.01,
        variant: Literal["trainable", "fixed", "separation"] = "trainable",
        parametrization: Literal["absolute", "relative"] = "absolute",
        detach_norm: bool = True,
        **common: Unpack[Common],
    ) -> None:
        if variant not in ("trainable", "fixed", "separation"):
            raise ValueError(f"variant must be 'trainable', 'fixed' or 'separation', got {variant!r}")
        if parametrization not in ("absolute", "relative"):
            raise ValueError(f"parametrization must be 'absolute' or 'relative', got {parametrization!r}")
        super().__init__({"eta": eta}, common)
        self.variant, self.parametrization, self.detach_norm = variant, parametrization, detach_norm
        self.normalized = initial_norm is not None and variant != "separation"
        given = isinstance(initial_norm, Tensor | nn.Module)
        for name, value in self._start(initial_norm).items():
            # What the loss starts from is known even where a default device of "meta" keeps no number.
            kept = value if given else value.to(torch.get_default_device())
            trained = (name == "scale_low" and variant == "trainable") or (name == "scale_high" and variant != "fixed")
            self._keep(name, nn.Parameter(kept) if trained else kept)
            self._initial[name] = value.clone()

    def _start(self, initial_norm: float | Tensor | nn.Module | None) -> dict[str, Tensor]:
        """The scales, and their unit."""
        separation = self.variant == "separation"
        log_initial = torch.zeros((), dtype=torch.float64, device="cpu")
        if initial_norm is not None and not separation:
            log_initial = _log_norm("initial_norm", initial_norm).detach()
        # The unit of the scales, and the scales in that unit.
        absolute = self.parametrization == "absolute" and not separation
        log_unit = torch.zeros_like(log_initial) if absolute else log_initial
        low = log_initial.exp() if absolute else torch.ones((), device=log_initial.device)
        # Once, not in a step: a synchronisation does not matter here.
        finite = traced(low) or low.is_meta or bool(log_initial.isfinite() & (low > 0) & (10 * low < math.inf))
        if not finite:
            raise ValueError(
                f"initial_norm must be finite and > 0, got 10^{float(log_initial) / math.log(10):.1f}"
                + ("; a norm beyond float64 takes parametrization='relative'" if absolute else "")
            )
        return {"scale_low": low, "scale_high": 10 * low, "log_unit": log_unit}

    def reset_parameters(self, initial_norm: float | Tensor | nn.Module | None = None) -> None:
        """The scales as at the start: those of ``initial_norm``, or of the one that the loss was built with.

        A model on the meta device has no norm: give it again once it has its weights.
        """
        if initial_norm is not None:
            self._initial.update(self._start(initial_norm))
        super().reset_parameters()

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        logit_norm: float | Tensor | nn.Module | None = None,
        *,
        log_norm: float | Tensor | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            input: (N, C, ...) logits X. target: (N, ...) class indices.
            logit_norm: R > 0, the network's size now: the model, for its :func:`weight_norm_product` now, or that
                product itself, a number or 0-d.
            log_norm: log R instead, where R is beyond float64: ``weight_norm_product(model, log=True)``, which is what
                is used of a model.
        """
        low, high = self._scales(input, logit_norm, log_norm)
        return F.two_scale_cross_entropy(input, target, low, high, eta=self.eta, **self._kept(self._common))

    def probabilities(
        self,
        input: Tensor,
        logit_norm: float | Tensor | nn.Module | None = None,
        *,
        log_norm: float | Tensor | None = None,
    ) -> Tensor:
        r"""Test-time probabilities, :math:`\operatorname{softmax}(R_1 X/R)`: a row's scale would depend on its label.

        Args: as in ``forward``; R is that of the model as it is at test time.

        Returns: of input's shape; float32 for half inputs.
        """
        low, _ = self._scales(input, logit_norm, log_norm)
        return torch.softmax(input.to(low.dtype) * low, 1 if input.dim() > 1 else 0)

    def _scales(
        self, input: Tensor, logit_norm: float | Tensor | nn.Module | None, log_norm: float | Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """R1/R and R2/R in the precision of the loss, by which the functional has no norm left to divide by."""
        accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
        if self.variant == "separation":
            return self.scale_low.to(accumulate), self.scale_high.to(accumulate)
        if logit_norm is not None and log_norm is not None:
            raise ValueError("log_norm is the logarithm of logit_norm: give one of them, got both")
        if self.normalized != (logit_norm is not None or log_norm is not None):
            raise ValueError(
                "logit_norm (or log_norm) is required where the loss was built with an initial_norm, got neither: "
                "loss(input, target, model) takes the model's norm now"
                if self.normalized
                else "logit_norm has no meaning where the loss was built without an initial_norm"
            )
        factor = self.log_unit
        if logit_norm is not None:
            factor = factor - self._norm("logit_norm", logit_norm)
        elif log_norm is not None:
            factor = factor - self._norm("log_norm", log_norm)
        factor = factor.exp()
        return (self.scale_low * factor).to(accumulate), (self.scale_high * factor).to(accumulate)

    def _norm(self, name: str, value: float | Tensor | nn.Module) -> float | Tensor:
        """log R, detached if so chosen."""
        if isinstance(value, nn.Module):
            if name == "log_norm":
                raise ValueError(
                    "log_norm must be a number or a floating 0-d tensor, got a model: that is a logit_norm"
                )
            return weight_norm_product(value, log=True, detach=self.detach_norm)
        if isinstance(value, Tensor):
            _check_scalar(name, value)
            value = value.detach() if self.detach_norm else value
            return value.double() if name == "log_norm" else value.double().log()
        number = check_number(name, value)
        return number if name == "log_norm" else math.log(number)

    def extra_repr(self) -> str:
        """The options, and what of the common arguments is not at its default."""
        return (
            f"{super().extra_repr()}, variant={self.variant!r}, parametrization={self.parametrization!r}, "
            f"detach_norm={self.detach_norm}"
        )


def _check_scalar(name: str, value: Tensor) -> None:
    if value.shape not in ((), (1,)) or not value.is_floating_point():
        raise ValueError(f"{name} must be a number or a floating 0-d tensor, got {tuple(value.shape)} {value.dtype}")
    if name != "log_norm" and value.device.type == "cpu" and not traced(value):
        check_range("logit_norm", value)


def _log_norm(name: str, value: float | Tensor | nn.Module) -> Tensor:
    """log R of a number, a tensor or a model, in float64."""
    if isinstance(value, nn.Module):
        return weight_norm_product(value, log=True)
    if not isinstance(value, Tensor):
        value = torch.tensor(check_number(name, value), dtype=torch.float64, device="cpu")
    if value.dim() != 0 or not value.is_floating_point():
        raise ValueError(f"{name} must be a number, a floating 0-d tensor or a model, got {tuple(value.shape)}")
    # Once, at construction: a synchronisation does not matter here.
    if not (traced(value) or value.is_meta or bool(value > 0)):
        raise ValueError(f"{name} must be > 0, got {float(value)}")
    return value.double().log()


class MultiMarginLoss(_Loss):
    r"""Multi-class margin loss; see :func:`mlkernels.multi_margin_loss`.

    Args:
        p: 1 or 2. margin: m. weight: (C,), any floating dtype; not trained.
        reduction: ``"mean"`` (over N), ``"sum"`` or ``"none"``.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.MultiMarginLoss()(torch.tensor([[0.1, 0.2, 0.4, 0.8]]), torch.tensor([3]))
        tensor(0.3250)
    """

    _function = staticmethod(F.multi_margin_loss)

    def __init__(
        self,
        p: int = 1,
        margin: float = 1.0,
        weight: Tensor | None = None,
        *,
        reduction: ReductionName = "mean",
        **unknown: Never,
    ) -> None:
        if unknown:
            raise unknown_keywords(MultiMarginLoss, unknown)
        super().__init__({"p": p, "margin": margin}, {"weight": weight, "reduction": reduction})


class CenterLoss(_Loss):
    r"""Center loss with its centers; see :func:`mlkernels.center_loss`.

    Args:
        num_features: D. num_classes: C.
        rate: None: ``centers`` (C, D) is a parameter for the optimizer. A number > 0: ``centers`` is a buffer, and
            every forward in training mode moves it, after the loss is computed and without gradient, by

            .. math:: c_j \leftarrow c_j - \text{rate}\cdot\frac{\sum_{i: y_i = j}(c_j - x_i)}{1 + \#\{i: y_i = j\}}

            Under ``torch.distributed`` over the rows of all ranks: every rank calls it, and the centers are equal, from
            the first forward on those of the first rank. On the CPU an error of one rank's call, a bad label for
            instance, is an error on all of them, and no center moves.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        process_group: of the ranks that move the centers together; None: all. Ranks that train models of their own pass
            a group of one each.

    Centers start from N(0, 1); ``reset_parameters()`` draws them again.

    Example:
        >>> import torch, mlkernels
        >>> loss = mlkernels.CenterLoss(num_features=2, num_classes=3, rate=0.5)
        >>> _ = loss.centers.zero_()
        >>> loss(torch.tensor([[4.0, 0.0]]), torch.tensor([1]))
        tensor(8.)
        >>> loss.centers[1]
        tensor([1., 0.])

    Source: Wen et al., A Discriminative Feature Learning Approach for Deep Face Recognition, equations (2) to (4).
    """

    _function = staticmethod(F.center_loss)
    _drawn = frozenset({"centers"})
    centers: Tensor

    def __init__(
        self,
        *,
        num_features: int,
        num_classes: int,
        rate: float | None = None,
        reduction: ReductionName = "mean",
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Never,
    ) -> None:
        if unknown:
            raise unknown_keywords(CenterLoss, unknown)
        if rate is not None:
            rate = check_number("rate", rate)
        centers = torch.empty(num_classes, num_features, device=device, dtype=dtype)
        super().__init__({"centers": nn.Parameter(centers) if rate is None else centers}, {"reduction": reduction})
        self.rate, self.process_group = rate, process_group
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the centers from N(0, 1)."""
        nn.init.normal_(self.centers)
        self._agreed = False  # whether the ranks' centers are equal

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._agreed = False

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of (N, D) features; then, with a rate and in training mode, the centers' step."""
        if self.rate is None or not self.training:
            return super().forward(input, target)
        shared = dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1
        if shared and not self._agreed:
            dist.broadcast(self.centers, group=self.process_group, group_src=0)
            self._agreed = True
        try:
            loss = super().forward(input, target)
        except Exception:
            if shared and self.centers.device.type == "cpu":  # else the other ranks would wait for this one
                sums = self._zeros()
                sums[-1, -1] = 1
                dist.all_reduce(sums, group=self.process_group)
            raise
        self._move(input.detach(), target, self.rate, shared)
        return loss

    @torch.no_grad()
    def _move(self, input: Tensor, target: Tensor, rate: float, shared: bool) -> None:
        sums = self._zeros()
        classes, accumulate = self.centers.shape[0], sums.dtype
        centers = self.centers.to(accumulate)
        label = target.long()
        legal = (label >= 0) & (label < classes)
        y = torch.where(legal, label, 0)
        # A bad label moves nothing: on a GPU its row is already NaN in the loss.
        gap = torch.where(legal.unsqueeze(1), centers[y] - input.to(accumulate), 0)
        sums.index_add_(0, y, torch.cat((gap, legal.to(accumulate).unsqueeze(1)), 1))
        if shared:
            dist.all_reduce(sums, group=self.process_group)
            if sums.device.type == "cpu" and not traced(sums) and bool(sums[-1, -1] > 0):
                raise RuntimeError("CenterLoss failed on another rank, whose error says why; no center was moved")
        sums = sums[:classes]
        self.centers.copy_(centers - rate * sums[:, :-1] / (1 + sums[:, -1:]))

    def _zeros(self) -> Tensor:
        """For sums and counts by class, in one tensor for one exchange; the last row says whether a rank failed."""
        accumulate = torch.float64 if self.centers.dtype == torch.float64 else torch.float32
        classes, features = self.centers.shape
        return self.centers.new_zeros(classes + 1, features + 1, dtype=accumulate)

    def extra_repr(self) -> str:
        """Sizes, rate and reduction."""
        return f"num_features={self.centers.shape[1]}, num_classes={self.centers.shape[0]}, rate={self.rate}" + (
            "" if self.reduction == "mean" else f", reduction={self.reduction!r}"
        )


class LGMLoss(_Loss):
    r"""Large-margin Gaussian mixture loss with its Gaussians; see :func:`mlkernels.lgm_loss`.

    Args:
        num_features: D. num_classes: C.
        alpha: the margin, >= 0, a number or a 0-d tensor. lambda_: the weight of the likelihood term, >= 0.
        diagonal: train ``log_variance`` (C, D), from 0; False: identity covariances.
        weight, ignore_index, reduction, label_smoothing, backend: as in :func:`mlkernels.lgm_loss`.

    ``means`` (C, D) is a parameter that starts from N(0, 1); ``reset_parameters()`` draws it again.

    Example:
        >>> import torch, mlkernels
        >>> loss = mlkernels.LGMLoss(num_features=2, num_classes=3, diagonal=True)
        >>> loss(torch.randn(8, 2), torch.randint(3, (8,))).backward()
        >>> loss.means.grad.shape, loss.log_variance.grad.shape
        (torch.Size([3, 2]), torch.Size([3, 2]))
    """

    _function = staticmethod(F.lgm_loss)
    _drawn = frozenset({"means", "log_variance"})
    means: nn.Parameter
    log_variance: nn.Parameter | None

    def __init__(
        self,
        *,
        num_features: int,
        num_classes: int,
        alpha: Number = 0.1,
        lambda_: float = 0.1,
        diagonal: bool = False,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: ReductionName = "mean",
        label_smoothing: float = 0.0,
        backend: BackendName | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Never,
    ) -> None:
        if unknown:
            raise unknown_keywords(LGMLoss, unknown)
        means = nn.Parameter(torch.empty(num_classes, num_features, device=device, dtype=dtype))
        log_variance = nn.Parameter(torch.empty_like(means)) if diagonal else None
        super().__init__(
            {"means": means, "log_variance": log_variance, "alpha": alpha, "lambda_": lambda_},
            {
                "weight": weight,
                "ignore_index": ignore_index,
                "reduction": reduction,
                "label_smoothing": label_smoothing,
                "backend": backend,
            },
        )
        self._draw()

    def logits(self, input: Tensor) -> Tensor:
        r"""The class logits of features, :math:`-d_k-\tfrac12\log|\Lambda_k|`: (N, D) to (N, C), without the margin."""
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        log_variance = None if self.log_variance is None else self.log_variance.to(dtype)
        with full_precision(input.device):
            return class_logits(input.to(dtype), self.means.to(dtype), log_variance)[0]

    def reset_parameters(self) -> None:
        """Draws the means from N(0, 1) and sets every variance to 1."""
        super().reset_parameters()
        self._draw()

    def _draw(self) -> None:
        nn.init.normal_(self.means)
        if self.log_variance is not None:
            nn.init.zeros_(self.log_variance)


class _Called(nn.Module):
    """A plain function among modules."""

    def __init__(self, function: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: Any, target: Any) -> Tensor:
        loss: Tensor = self.function(input, target)
        return loss

    def extra_repr(self) -> str:
        return str(getattr(self.function, "__name__", self.function))


class JointLoss(nn.Module):
    r"""Several losses at once.

    * ``"fixed"``: :math:`\sum_k a_k L_k`.
    * ``"trainable"``: :math:`a L_1 + (1-a) L_2`, where a is the sigmoid of the parameter ``logit``. It moves towards
      the smaller loss.
    * ``"uncertainty"``: :math:`\sum_k e^{-s_k} L_k + s_k/2`, ``log_variance`` = s is trained. For losses that are
      >= 0: where an :math:`L_k` is negative it is unbounded below.

    Args:
        losses: modules or functions, each called with ``(input, target)``. The parameters of modules are among this
            one's; a function brings none.
        weights: the :math:`a_k`, one number per loss; for ``"trainable"`` and ``"uncertainty"`` those at the start,
            there :math:`a, 1-a` and :math:`e^{-s_k}`. None: all 1 (``"trainable"``: one half each).
        mode: ``"fixed"``, ``"trainable"`` or ``"uncertainty"``.
        inputs: where the model's output is a tuple: for each loss the index of the part that it takes; or a tuple of
            indices, of which the first is its input and the others follow the target (a two-scale loss's norm, say); or
            None for the whole output. None: every loss takes the whole output.

    Example:
        >>> import torch, mlkernels
        >>> losses = [mlkernels.CrossEntropyLoss(), mlkernels.CenterLoss(num_features=2, num_classes=3)]
        >>> loss = mlkernels.JointLoss(losses, weights=[1.0, 0.003], inputs=[0, 1])
        >>> logits, features = torch.randn(4, 3), torch.randn(4, 2)
        >>> loss((logits, features), torch.tensor([0, 1, 2, 0])).shape
        torch.Size([])
        >>> [name for name, _ in loss.named_parameters()]
        ['losses.1.centers']
        >>> joint = mlkernels.JointLoss([mlkernels.CrossEntropyLoss(), mlkernels.FocalLoss()], mode="trainable")
        >>> optimizer = torch.optim.SGD(joint.parameters(), lr=0.1)
        >>> [round(float(weight.detach()), 4) for weight in joint.weights]
        [0.5, 0.5]

    Source: Kendall et al., Multi-Task Learning Using Uncertainty to Weigh Losses, for ``"uncertainty"``.
    """

    logit: nn.Parameter
    log_variance: nn.Parameter

    def __init__(
        self,
        losses: Sequence[Callable[[Any, Any], Tensor]],
        *,
        weights: Sequence[float] | None = None,
        mode: Literal["fixed", "trainable", "uncertainty"] = "fixed",
        inputs: Sequence[int | tuple[int, ...] | None] | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("fixed", "trainable", "uncertainty"):
            raise ValueError(f"mode must be 'fixed', 'trainable' or 'uncertainty', got {mode!r}")
        if not losses:
            raise ValueError("losses must hold at least one loss, got none")
        if mode == "trainable" and len(losses) != 2:
            raise ValueError(f"losses must be two under mode='trainable', got {len(losses)}")
        if weights is None:
            weights = [0.5, 0.5] if mode == "trainable" else [1.0] * len(losses)
        weights = [check_number("weights", weight) for weight in weights]
        if len(weights) != len(losses):
            raise ValueError(f"weights must be one per loss, {len(losses)}, got {len(weights)}")
        if inputs is not None and len(inputs) != len(losses):
            raise ValueError(f"inputs must be one per loss, {len(losses)}, got {len(inputs)}")
        for part in inputs or ():
            if part == () or isinstance(part, bool) or not isinstance(part, int | tuple | None):
                raise ValueError(f"inputs must be indices, tuples of indices or None, got {part!r}")
        if mode != "fixed" and min(weights) <= 0:
            raise ValueError(f"weights must be > 0 under mode={mode!r}, got {weights}")
        if mode == "trainable" and not math.isclose(sum(weights), 1.0):
            raise ValueError(f"weights must add up to 1 under mode='trainable', got {weights}")
        self.losses = nn.ModuleList(loss if isinstance(loss, nn.Module) else _Called(loss) for loss in losses)
        self.mode = mode
        self.inputs = [None] * len(losses) if inputs is None else list(inputs)
        self.fixed = weights
        if mode == "trainable":
            self.logit = nn.Parameter(torch.empty(()))
        elif mode == "uncertainty":
            self.log_variance = nn.Parameter(torch.empty(len(weights)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The weights of the losses as at the start; the losses themselves have their own."""
        if self.mode == "trainable":
            self.logit.fill_(math.log(self.fixed[0] / self.fixed[1]))
        elif self.mode == "uncertainty":
            self.log_variance.copy_(torch.tensor([-math.log(weight) for weight in self.fixed], device="cpu"))

    def forward(self, input: Any, target: Any) -> Tensor:
        """The weighted sum of the losses of (input, target)."""
        each: list[Tensor] = []
        for loss, part in zip(self.losses, self.inputs, strict=True):
            first, *more = part if isinstance(part, tuple) else (part,)
            each.append(loss(input if first is None else input[first], target, *(input[index] for index in more)))
        terms = [weight * loss for weight, loss in zip(self.weights, each, strict=True)]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total + 0.5 * self.log_variance.sum() if self.mode == "uncertainty" else total

    @property
    def weights(self) -> Sequence[float | Tensor]:
        """The factors of the losses now: numbers, or 0-d tensors where they are trained."""
        if self.mode == "trainable":
            # sigmoid(-x) keeps 1 - a where a rounds to 1.
            logit = self.logit.reshape(())
            return torch.sigmoid(logit), torch.sigmoid(-logit)
        return self.fixed if self.mode == "fixed" else torch.exp(-self.log_variance).unbind()

    def extra_repr(self) -> str:
        """The mode, and the weights where they are fixed."""
        return f"weights={self.fixed}, mode='fixed'" if self.mode == "fixed" else f"mode={self.mode!r}"
