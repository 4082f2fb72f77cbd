"""Each loss as this package has it, and as a careful user writes it in eager PyTorch.

Others' kernels beside them, where they are installed. Whatever is measured is first held against the reference
(``disagreement``), on the device and the problem that it is measured on.

The eager chains touch N x C elements as seldom as eager code can: they transform the target's logit alone (gather, then
scatter) and take ``F.cross_entropy`` for the rest, where popular implementations run acos or a one-hot mask over the
whole matrix. ``torch.compile`` is given the same chains.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mlkernels

from .cases import Inputs, Problem

Function = Callable[..., Tensor]  # of the leaves and the target

SCALE, ANGLE, COSINE_MARGIN = 64.0, 0.5, 0.35
BETA, GAMMA, FOCAL_GAMMA = 4.0, 5.0, 2.0
# Mild, so that no probability is subnormal: those would time the exponential's slow path.
LOW, HIGH, ETA = 1.0, 4.0, 0.01
PIECEWISE_SCALE, TAU_MIN = 32.0, 1e-6


class Loss(NamedTuple):
    """One loss, twice."""

    ours: Callable[..., Tensor]  # takes the shared options too: reduction, backend
    eager: Function  # takes reduction
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

    def reduced(rows: Tensor, reduction: str) -> Tensor:
        return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.mean()

    def eager_modulated(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        nll = F.cross_entropy(input, target, reduction="none")
        return reduced((1 - torch.exp(-nll) ** BETA) ** GAMMA * nll, reduction)

    def eager_focal(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        nll = F.cross_entropy(input, target, reduction="none")
        return reduced((1 - torch.exp(-nll)) ** FOCAL_GAMMA * nll, reduction)

    def poly1(input: Tensor, target: Tensor, reduction: str = "mean", **options: Any) -> Tensor:
        nll = mlkernels.cross_entropy(input, target, reduction="none", **options)
        return reduced(nll - torch.expm1(-nll), reduction)

    def eager_poly1(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        nll = F.cross_entropy(input, target, reduction="none")
        return reduced(nll - torch.expm1(-nll), reduction)

    def eager_arcface(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        index = target[:, None]
        cosine = input.gather(1, index)
        sine = (1 - cosine * cosine).clamp(min=0).sqrt()
        turned = cosine * math.cos(ANGLE) - sine * math.sin(ANGLE)
        turned = torch.where(cosine > -math.cos(ANGLE), turned, cosine - ANGLE * math.sin(ANGLE))
        return F.cross_entropy(input.scatter(1, index, turned) * SCALE, target, reduction=reduction)

    def eager_cosface(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        index = target[:, None]
        lowered = input.gather(1, index) - COSINE_MARGIN
        return F.cross_entropy(input.scatter(1, index, lowered) * SCALE, target, reduction=reduction)

    def eager_two_scale(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        index = target[:, None]
        with torch.no_grad():
            runner_up = input.scatter(1, index, -math.inf).amax(1, keepdim=True)
            scale = torch.where(input.gather(1, index) - runner_up < ETA, LOW, HIGH).to(input.dtype)
        return F.cross_entropy(input * scale, target, reduction=reduction)

    def eager_piecewise(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        index = target[:, None]
        cosine = input.gather(1, index)
        piece = ((cosine.detach() + 1) * 3).floor().clamp(0, 5).long()
        bent = (t_slope[piece] * cosine + t_bias[piece]).to(input.dtype)
        p = torch.exp(-F.cross_entropy(input.scatter(1, index, bent) * PIECEWISE_SCALE, target, reduction="none"))
        piece = (p.detach() * 6).floor().clamp(0, 5).long()
        return reduced(-(tau_slope[piece] * p + tau_bias[piece]).clamp(min=TAU_MIN).log(), reduction)

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
        "poly1": Loss(poly1, eager_poly1, False),  # a loss of one's own: any torch function of the row losses
    }


# ---- who takes part --------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """Somebody's function of a problem's leaves and target."""

    loss: str
    by: str  # a backend of ours, or a peer
    function: Function
    destroys: bool = False  # its logits: the gradient lies there afterwards


def ours(device: torch.device, by: str | None) -> dict[str, functools.partial[Tensor]]:
    """A backend's losses, with the numbers of their peers."""
    return {name: functools.partial(loss.ours, backend=by) for name, loss in losses(device).items()}


def installed(module: str, name: str, **options: object) -> Function | None:
    """Another package's function with these options, where that is installed."""
    try:
        return functools.partial(getattr(importlib.import_module(module), name), **options)
    except ImportError:
        return None


#: Early versions of quack return the row losses unless asked for a mean.
INSTALLED = {
    "liger": functools.partial(installed, "liger_kernel.transformers.functional", "liger_cross_entropy"),
    "quack": functools.partial(installed, "quack.cross_entropy", "cross_entropy", reduction="mean"),
}
PEERS = ["eager", "compile", "liger", "quack"]
HEADLINE = ["cross_entropy", "modulated", "arcface"]
#: On a GPU the peers run at these; at C = 10 eager sums millions of row losses with a single thread block.
PEERS_AT = {("bfloat16", classes) for classes in (1000, 8192, 32768, 50257, 128256)} | {("float32", 8192)}
COMPILED_AT = {("bfloat16", 8192), ("bfloat16", 128256)}
#: On a CPU all losses here, elsewhere the headline's: compiling takes longer than measuring.
COMPILED_WHOLE = (1024, 8000)


def peers_at(problem: Problem, loss: str, kind: str) -> list[str]:
    """Whose time a problem and loss are worth on a kind of device."""
    if kind != "cuda":
        compiled = problem.dtype == "float32" and (loss in HEADLINE or problem.shape == COMPILED_WHOLE)
        return ["eager", "compile"] if compiled else ["eager"]
    at = (problem.dtype, problem.classes)
    if problem.small:
        return ["eager"] if loss == "cross_entropy" else []
    if len(problem.shape) > 2:
        return ["eager"]
    if loss != "cross_entropy" or at not in PEERS_AT:
        return ["eager"] if at in PEERS_AT else []
    # Other numbers of classes are not among quack's own tests.
    return [
        "eager",
        "liger",
        *(["quack"] if problem.classes % 8 == 0 else []),
        *(["compile"] if at in COMPILED_AT else []),
    ]


def candidates(
    problem: Problem, device: torch.device, backends: Sequence[str], names: Sequence[str], peers: Sequence[str]
) -> list[Candidate]:
    """Ours by backend, then the peers that are there."""
    catalogue = losses(device)
    found = [Candidate(name, by, ours(device, by)[name]) for by in backends for name in names]
    for name in names:
        for by in peers_at(problem, name, device.type):
            eager = catalogue[name].eager
            if by not in peers:
                continue
            if by == "eager":
                found.append(Candidate(name, by, eager))
            elif by == "compile":
                found.append(Candidate(name, by, torch.compile(eager, fullgraph=True, dynamic=False)))
            elif (function := INSTALLED[by]()) is not None:
                found.append(Candidate(name, by, function, destroys=by == "liger"))
    return found


# ---- the same loss? --------------------------------------------------------------------------------------------------

#: Relative. In half precision peers round every intermediate, which ours does not.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02, "float64": 1e-6}
CHUNK = 2**24  # elements of logits that the reference takes at a time; on a GPU 16 times as many
COMPARED = 2**20  # of a weight's gradient, rows


class Expected(NamedTuple):
    """A mean loss and its gradients; those for the first rows and classes."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


def expected(reference: Function, inputs: Inputs, classes: int) -> Expected:
    """By the reference in float32 at least, some rows at a time; ``reference`` takes ``reduction="sum"``."""
    rows, target = inputs.leaves[0], inputs.target
    wide = torch.promote_types(rows.dtype, torch.float32)
    others = [leaf.detach().to(wide).requires_grad_() for leaf in inputs.leaves[1:]]
    chunk_size = CHUNK * (16 if rows.is_cuda else 1)
    count = max(1, chunk_size // (classes * target[0].numel()))
    loss, first = torch.zeros((), dtype=torch.float64), None
    for chunk, labels in zip(rows.detach().split(count), target.split(count), strict=True):
        leaf = chunk.to(wide).requires_grad_()
        with torch.set_grad_enabled(first is None or bool(others)):
            part = reference(leaf, *others, labels, reduction="sum") / target.numel()
            if part.requires_grad:
                part.backward()
        loss += part.detach().double().cpu()
        first = leaf.grad if first is None else first
    return Expected(loss, (first, *(leaf.grad[:COMPARED].clone() for leaf in others)))


def evaluated(
    function: Function, leaves: Sequence[Tensor], *others: Tensor, upstream: Tensor | float = 1.0
) -> tuple[Tensor, ...]:
    """A loss, and its gradients by the leaves."""
    loss = function(*leaves, *others)
    up = torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device)
    return loss.detach(), *torch.autograd.grad(loss, leaves, up)


def apart(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over that of what is wanted."""
    difference = torch.linalg.vector_norm(found.to(wanted) - wanted)
    return (difference / torch.linalg.vector_norm(wanted)).item()


def wrong(
    what: Iterable[str], found: Iterable[Tensor], wanted: Iterable[Tensor], allowed: Iterable[float]
) -> str | None:
    """The first result that is wrong, if one is."""
    for name, one, other, bound in zip(what, found, wanted, allowed, strict=True):
        if not (error := apart(one, other)) <= bound:
            return f"wrong {name}: off by {error:.3g} of its norm, {bound:.1g} is allowed"
    return None


def disagreement(function: Function, inputs: Inputs, wanted: Expected) -> float:
    """The largest of the loss's relative and the gradients' normwise relative differences."""
    loss, *gradients = evaluated(function, inputs.leaves, inputs.target)
    worst = ((loss.double().cpu() - wanted.loss) / wanted.loss).abs().item()
    for gradient, right in zip(gradients, wanted.gradients, strict=True):
        error = apart(gradient[: len(right)], right)
        worst = error if math.isnan(error) else max(worst, error)
    return worst
