"""Each loss as this package has it, and as a careful user writes it in eager PyTorch.

The eager chains touch N x C elements as seldom as eager code can: they transform the target's logit alone (gather, then
scatter) and take ``F.cross_entropy`` for the rest, where popular implementations run acos or a one-hot mask over the
whole matrix. ``torch.compile`` is given the same chains.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mlkernels

from .shapes import Case

LossFunction = Callable[[Tensor, Tensor], Tensor]

SCALE, ANGLE, COSINE_MARGIN = 64.0, 0.5, 0.35
BETA, GAMMA, FOCAL_GAMMA = 4.0, 5.0, 2.0
# Mild, so that no probability is subnormal: those would time the exponential's slow path.
LOW, HIGH, ETA = 1.0, 4.0, 0.01
PIECEWISE_SCALE, TAU_MIN = 32.0, 1e-6


class Loss(NamedTuple):
    """One loss, twice."""

    ours: Callable[..., Tensor]  # takes the shared options too: reduction, backend
    eager: LossFunction
    cosines: bool  # whether it takes cosines, not logits


def losses(device: torch.device) -> dict[str, Loss]:
    """The losses by name, their tables on the device."""
    generator = torch.Generator().manual_seed(0)

    def table(centre: float, spread: float) -> Tensor:
        return (centre + spread * torch.randn(6, generator=generator)).to(device)

    t_slope, t_bias, tau_slope = table(1.0, 0.1), table(0.0, 0.1), table(1.0, 0.1)
    tau_bias = table(0.2, 0.02)  # positive: tau is not clamped
    piecewise = {"t_slope": t_slope, "t_bias": t_bias, "tau_slope": tau_slope, "tau_bias": tau_bias}
    two_scale = {"scale_low": LOW, "scale_high": HIGH, "eta": ETA}

    def eager_modulated(input: Tensor, target: Tensor) -> Tensor:
        nll = F.cross_entropy(input, target, reduction="none")
        return ((1 - torch.exp(-nll) ** BETA) ** GAMMA * nll).mean()

    def eager_focal(input: Tensor, target: Tensor) -> Tensor:
        nll = F.cross_entropy(input, target, reduction="none")
        return ((1 - torch.exp(-nll)) ** FOCAL_GAMMA * nll).mean()

    def eager_arcface(input: Tensor, target: Tensor) -> Tensor:
        index = target[:, None]
        cosine = input.gather(1, index)
        sine = (1 - cosine * cosine).clamp(min=0).sqrt()
        turned = cosine * math.cos(ANGLE) - sine * math.sin(ANGLE)
        turned = torch.where(cosine > -math.cos(ANGLE), turned, cosine - ANGLE * math.sin(ANGLE))
        return F.cross_entropy(input.scatter(1, index, turned) * SCALE, target)

    def eager_cosface(input: Tensor, target: Tensor) -> Tensor:
        index = target[:, None]
        return F.cross_entropy(input.scatter(1, index, input.gather(1, index) - COSINE_MARGIN) * SCALE, target)

    def eager_two_scale(input: Tensor, target: Tensor) -> Tensor:
        index = target[:, None]
        with torch.no_grad():
            runner_up = input.scatter(1, index, -math.inf).amax(1, keepdim=True)
            scale = torch.where(input.gather(1, index) - runner_up < ETA, LOW, HIGH).to(input.dtype)
        return F.cross_entropy(input * scale, target)

    def eager_piecewise(input: Tensor, target: Tensor) -> Tensor:
        index = target[:, None]
        cosine = input.gather(1, index)
        piece = ((cosine.detach() + 1) * 3).floor().clamp(0, 5).long()
        bent = (t_slope[piece] * cosine + t_bias[piece]).to(input.dtype)
        p = torch.exp(-F.cross_entropy(input.scatter(1, index, bent) * PIECEWISE_SCALE, target, reduction="none"))
        piece = (p.detach() * 6).floor().clamp(0, 5).long()
        return -(tau_slope[piece] * p + tau_bias[piece]).clamp(min=TAU_MIN).log().mean()

    own = functools.partial
    return {
        "cross_entropy": Loss(mlkernels.cross_entropy, F.cross_entropy, False),
        "modulated": Loss(own(mlkernels.modulated_cross_entropy, beta=BETA, gamma=GAMMA), eager_modulated, False),
        "focal": Loss(own(mlkernels.focal_loss, gamma=FOCAL_GAMMA), eager_focal, False),
        "arcface": Loss(own(mlkernels.arcface_loss, margin=ANGLE, scale=SCALE), eager_arcface, True),
        "cosface": Loss(own(mlkernels.cosface_loss, margin=COSINE_MARGIN, scale=SCALE), eager_cosface, True),
        "two_scale": Loss(own(mlkernels.two_scale_cross_entropy, **two_scale), eager_two_scale, False),
        "piecewise": Loss(
            own(mlkernels.piecewise_cross_entropy, scale=PIECEWISE_SCALE, tau_min=TAU_MIN, **piecewise),
            eager_piecewise,
            True,
        ),
    }


class Inputs(NamedTuple):
    """The same tensors for every candidate of a case."""

    logits: Tensor
    cosines: Tensor
    target: Tensor
    buffer: Tensor  # warm memory to copy into


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Every other row confident, as in training; no value so far out that its exponential is subnormal."""
    generator = torch.Generator().manual_seed(case.rows * case.classes)
    shape = (case.rows, case.classes)
    target = torch.randint(case.classes, (case.rows,), generator=generator)
    confident = torch.arange(0, case.rows, 2)
    logits = 1.5 * torch.randn(shape, generator=generator)
    logits[confident, target[confident]] += 8
    cosines = (0.1 * torch.randn(shape, generator=generator)).clamp_(-0.6, 0.6)
    cosines[confident, target[confident]] += 0.35

    def leaf(values: Tensor) -> Tensor:
        return values.to(device, case.torch_dtype).requires_grad_()

    inputs = Inputs(leaf(logits), leaf(cosines), target.to(device), torch.empty(shape, dtype=case.torch_dtype))
    return inputs._replace(buffer=torch.zeros_like(inputs.logits))


def disagreement(first: LossFunction, second: LossFunction, input: Tensor, target: Tensor) -> float:
    """The larger of the losses' relative and the gradients' normwise relative difference."""
    found: list[tuple[Tensor, Tensor]] = []
    for function in (first, second):
        input.grad = None
        loss = function(input, target)
        loss.backward()
        assert input.grad is not None
        found.append((loss.detach().double(), input.grad))
    input.grad = None
    (loss, gradient), (other_loss, other_gradient) = found
    by_loss = (other_loss - loss).abs() / loss.abs()
    by_gradient = torch.linalg.vector_norm((other_gradient - gradient).float())
    by_gradient = by_gradient / torch.linalg.vector_norm(gradient.float())
    return max(by_loss.item(), by_gradient.item())
