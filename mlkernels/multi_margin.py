"""The multi-class margin loss, by torch's own kernel behind this package's conventions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from typing_extensions import Never

from . import buffers
from .checks import (
    accumulated,
    check_class_vector,
    check_indices,
    check_number,
    check_reduction,
    check_tensors,
    unknown_keywords,
)
from .loss_module import Loss, classes_of, reduced
from .positional import positional_arguments
from .spec import ReductionName
from .tracing import is_dual, traced


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    *rest: Never,
    reduction: ReductionName = "mean",
    **unknown: Never,
) -> Tensor:
    r"""Multi-class margin loss, :math:`L = \frac{\omega_y}{C}\sum_{j\ne y}\max(0, m - f_y + f_j)^p`.

    Gradient: :math:`\partial L/\partial f_j = \frac{\omega_y}{C}\,p\,\max(0, m - f_y + f_j)^{p-1}` for :math:`j \ne y`,
    0 where that maximum is, and at the target minus their sum.

    Exactly :func:`torch.nn.functional.multi_margin_loss`, its order of arguments too, with any integer labels and bad
    labels named; ``"mean"`` divides by N, and there is no ignore_index.

    Args:
        input: (N, C), (C,) or 0-d (one class), floating. target: (N,), of a single row also 0-d; any integer dtype.
        p: 1 or 2. margin: m. weight: (C,), any floating dtype.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        0-d, or of target's shape; float32 for half inputs.

    Raises:
        TypeError, ValueError: a bad argument, by name. IndexError: a label outside [0, C) on the CPU; on a GPU that row
            is NaN.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.multi_margin_loss(torch.tensor([[0.1, 0.2, 0.4, 0.8]]), torch.tensor([3]))
        tensor(0.3250)
    """
    if rest:
        raise positional_arguments(multi_margin_loss, rest)
    if unknown:
        raise unknown_keywords(multi_margin_loss, unknown)
    shape = target.shape if isinstance(target, Tensor) else ()
    if isinstance(input, Tensor) and input.dim() <= 2 and shape in ((), (1,)) and input.shape[:-1] in ((), (1,)):
        # A single row, with or without a dimension for it, and one label: all the same to torch.
        input, target = input.reshape(1, -1), target.reshape(1) if isinstance(target, Tensor) else target
    target = check_tensors(input, target)
    if input.dim() > 2:
        raise ValueError(f"input must be (C,) or (N, C), got {tuple(input.shape)}")
    margin = _check(p, margin, reduction)
    classes = input.shape[-1]
    # On the CPU torch's kernel looks at the labels itself.
    looks = input.is_cpu and not traced(input, target)
    all_legal = looks or check_indices("target", target, classes)
    accumulate = accumulated(input.dtype)
    if weight is not None:
        check_class_vector("weight", weight, input, classes)
        weight = weight.to(accumulate)
    label = target.long()
    if all_legal and input.shape[0] > 0:
        try:
            loss = _losses(input, label, int(p), margin, weight, accumulate, reduction)
        except RuntimeError:
            check_indices("target", target, classes)
            raise
    else:
        legal, y = classes_of(label, classes)
        loss = reduced(_losses(input, y, int(p), margin, weight, accumulate, "none"), reduction, legal=legal)
    return loss.reshape(shape) if reduction == "none" else loss


def _losses(
    input: Tensor,
    y: Tensor,
    p: int,
    margin: float,
    weight: Tensor | None,
    accumulate: torch.dtype,
    reduction: ReductionName,
) -> Tensor:
    if forward_ad._current_level >= 0 and is_dual(input):  # torch's kernel has no tangents
        return reduced(_in_plain_torch(input.to(accumulate), y, p, margin, weight), reduction)
    alone = input.requires_grad and torch.is_grad_enabled() and not (weight is not None and weight.requires_grad)
    if alone and buffers.serves(input.numel() * input.element_size(), input):
        return reduced(_kept_rows(input, y, p, margin, weight), reduction)
    return F.multi_margin_loss(input.to(accumulate), y, p, margin, weight, reduction=reduction)


def _in_plain_torch(logits: Tensor, y: Tensor, p: int, margin: float, weight: Tensor | None) -> Tensor:
    """The loss of each row."""
    own = logits.gather(1, y.unsqueeze(1))
    excess = (margin - own + logits).clamp(min=0) ** p
    others = torch.arange(logits.shape[1], device=logits.device) != y.unsqueeze(1)
    rows = torch.where(others, excess, 0).sum(1) / logits.shape[1]
    return rows if weight is None else rows * weight[y]


class _MultiMargin(torch.autograd.Function):
    """torch's row losses, whose N x C lie in memory that is kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, label: Tensor, p: int, margin: float, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, label, weight)
        ctx.options = p, margin
        rows: Tensor = torch.ops.aten.multi_margin_loss(_accumulated(input), label, p, margin, weight, _NONE)
        return rows

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        input, label, weight = ctx.saved_tensors
        p, margin = ctx.options
        again = torch.is_grad_enabled()
        if again or not buffers.serves(input.numel() * input.element_size(), input, upstream):
            with torch.enable_grad():
                rows = F.multi_margin_loss(input.to(upstream.dtype), label, p, margin, weight, reduction="none")
            return *torch.autograd.grad(rows, input, upstream, create_graph=again), None, None, None, None
        logits = _accumulated(input)
        gradient = buffers.empty(logits, logits.shape)
        torch.ops.aten.multi_margin_loss_backward.grad_input(
            upstream, logits, label, p, margin, weight, _NONE, grad_input=gradient
        )
        if gradient.dtype != input.dtype:
            gradient = buffers.empty(input, input.shape).copy_(gradient)
        return gradient, None, None, None, None


_kept_rows: Callable[..., Tensor] = _MultiMargin.apply
_NONE = 0  # torch's number of reduction="none"


def _accumulated(input: Tensor) -> Tensor:
    """Half logits in float32."""
    if input.dtype in (torch.float32, torch.float64):
        return input
    return buffers.empty(input, input.shape, torch.float32).copy_(input)


def _check(p: int, margin: float, reduction: ReductionName) -> float:
    """Everything but the tensors; the margin as a float."""
    if isinstance(p, Tensor) or p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}")
    check_reduction(reduction)
    return check_number("margin", margin)


class MultiMarginLoss(Loss):
    r"""Multi-class margin loss; see :func:`mlkernels.multi_margin_loss`.

    Args:
        p: 1 or 2. margin: m. weight: (C,), any floating dtype; not trained.
        reduction: ``"mean"`` (over N), ``"sum"`` or ``"none"``.

    Example:
        >>> import torch, mlkernels
        >>> mlkernels.MultiMarginLoss()(torch.tensor([[0.1, 0.2, 0.4, 0.8]]), torch.tensor([3]))
        tensor(0.3250)
    """

    _function = staticmethod(multi_margin_loss)

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
        _check(p, margin, reduction)
        if weight is not None:
            check_class_vector("weight", weight)
        super().__init__({"p": p, "margin": margin}, {"weight": weight, "reduction": reduction})
