"""The losses that have a name, as compositions: what functions compute and what modules check when they are built.

Each function takes the own arguments of the loss of its name.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from .checks import wrong_type
from .numbering import HeadKind, ScaleKind, TransformKind
from .spec import BeyondPiName, ClampName, GradientName, Number, Spec, spec

Composition: TypeAlias = tuple[Spec, tuple[Number | None, ...]]
"""The structure of a loss, and its values in the order of ``Spec.slots``."""

_MARGIN = TransformKind.MARGIN
CROSS_ENTROPY = spec(function="cross_entropy")
_FOCAL = spec(head=HeadKind.MODULATED, function="focal_loss")
_MODULATED = spec(head=HeadKind.MODULATED, function="modulated_cross_entropy")
_TWO_SCALE = spec(scale=ScaleKind.TWO_SCALE, function="two_scale_cross_entropy")


def cross_entropy(scale: Number) -> Composition:
    return CROSS_ENTROPY, (scale,)


def focal_loss(gamma: Number) -> Composition:
    return _FOCAL, (1.0, 1.0, gamma, 1.0, 1.0)


def modulated_cross_entropy(beta: Number, gamma: Number, alpha: Number, kappa: Number) -> Composition:
    return _MODULATED, (1.0, beta, gamma, alpha, kappa)


def margin_cross_entropy(
    m1: Number,
    m2: Number,
    m3: Number,
    scale: Number,
    beyond_pi: BeyondPiName | None,
    gradient: GradientName,
    norm: Number | None = None,
) -> Composition:
    structure = spec(_MARGIN, beyond_pi=beyond_pi, gradient=gradient, function="margin_cross_entropy")
    return structure, (m1, m2, m3, norm, scale)


def arcface_loss(margin: Number, scale: Number, beyond_pi: BeyondPiName | None, gradient: GradientName) -> Composition:
    structure = spec(_MARGIN, beyond_pi=beyond_pi, gradient=gradient, function="arcface_loss")
    return structure, (1.0, margin, 0.0, None, scale)


def cosface_loss(margin: Number, scale: Number, beyond_pi: BeyondPiName | None, gradient: GradientName) -> Composition:
    structure = spec(_MARGIN, beyond_pi=beyond_pi, gradient=gradient, function="cosface_loss")
    return structure, (1.0, 0.0, margin, None, scale)


def sphereface_loss(
    margin: Number, scale: Number, beyond_pi: BeyondPiName | None, gradient: GradientName
) -> Composition:
    structure = spec(_MARGIN, beyond_pi=beyond_pi, gradient=gradient, function="sphereface_loss")
    return structure, (margin, 0.0, 0.0, None, scale)


def two_scale_cross_entropy(
    scale_low: Number, scale_high: Number, eta: float, logit_norm: Tensor | None
) -> Composition:
    return _TWO_SCALE, (scale_low, scale_high, eta, logit_norm)


def piecewise_cross_entropy(
    t_slope: Tensor | None,
    t_bias: Tensor | None,
    tau_slope: Tensor | None,
    tau_bias: Tensor | None,
    scale: Number,
    tau_min: float,
    clamp: ClampName,
    norm: Number | None = None,
) -> Composition:
    t_slope, t_bias = _tables("t", t_slope, t_bias)
    tau_slope, tau_bias = _tables("tau", tau_slope, tau_bias)
    transform = TransformKind.IDENTITY if t_slope is None else TransformKind.PIECEWISE
    head = HeadKind.LOG if tau_slope is None else HeadKind.TAU
    values: tuple[Number | None, ...] = (scale,)
    if t_slope is not None:
        values = (t_slope, t_bias, norm, -1.0, 1.0, *values)
    elif norm is not None:
        raise ValueError("norm divides the argument of t: it needs t_slope or t_bias, got neither")
    if tau_slope is not None:
        values = (*values, tau_slope, tau_bias, tau_min)
    return spec(transform, head=head, clamp=clamp, function="piecewise_cross_entropy"), values


def _tables(name: str, slope: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A slope and a bias; of which one is None, by the identity's."""
    for suffix, table in (("slope", slope), ("bias", bias)):
        if table is not None and not isinstance(table, Tensor):
            raise wrong_type(f"{name}_{suffix}", "a floating tensor of shape (M,) or (G, M)", table)
    if slope is None and bias is not None:
        slope = torch.ones_like(bias)
    if bias is None and slope is not None:
        bias = torch.zeros_like(slope)
    return slope, bias
