"""The large-margin Gaussian mixture loss: the family's kernel on the logits of a Gaussian per class."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Never

from . import buffers, softmax
from .backends.reference import full_precision
from .call import Common, Options, check_loss
from .checks import (
    accumulated,
    check_device,
    check_floating,
    check_index,
    check_number,
    check_scalar,
    check_size,
    check_tensors,
    unknown_keywords,
)
from .loss_module import Loss, classes_of, reduced
from .numbering import TransformKind
from .positional import positional_arguments
from .spec import BackendName, Number, ReductionName, spec
from .tracing import is_jit_tracing, traced

_GIVEN = spec(TransformKind.GIVEN)


def lgm_loss(
    input: Tensor,
    target: Tensor,
    means: Tensor,
    *rest: Never,
    log_variance: Tensor | None = None,
    alpha: Number = 0.1,
    lambda_: float = 0.1,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    backend: BackendName | None = None,
    **unknown: Never,
) -> Tensor:
    r"""Large-margin Gaussian mixture loss.

    .. math::
        d_k = \tfrac12 (x-\mu_k)^\top\Lambda_k^{-1}(x-\mu_k),\quad
        z_k = -(1+\alpha[k=y])\,d_k - \tfrac12\log|\Lambda_k|,\quad
        L = -\log\operatorname{softmax}(z)_y + \lambda\,(d_y + \tfrac12\log|\Lambda_y|)

    .. math::
        \partial L/\partial x = \sum_k \bigl((1+\alpha[k=y])([k=y] - p_k) + \lambda[k=y]\bigr)\Lambda_k^{-1}(x-\mu_k)

    Args:
        input: (N, D) features.
        target: (N,) classes, any integer dtype.
        means: (C, D), :math:`\mu_k`; may require a gradient.
        log_variance: (C, D), the logarithm of the diagonal of :math:`\Lambda_k`; None: :math:`\Lambda_k = I`.
        alpha: the margin on the target's distance, >= 0, a number or a tensor, 0-d or (1,).
        lambda_: the weight of the likelihood term, >= 0.
        weight: (C,) class weights. They weigh both terms of a row, and ``"mean"`` divides both by the sum of
            ``weight[target]`` over the rows not ignored: a weight of 2 is what repeating the row would be.
        label_smoothing: of the classification term only.
        ignore_index, reduction, backend: as in :mod:`mlkernels.functional`.

    Returns:
        0-d, or (N,); float32 for half inputs.

    Raises:
        TypeError, ValueError: a bad argument, by name. IndexError: a label outside [0, C) on the CPU; on a GPU that row
            is NaN.

    Example:
        >>> import torch, mlkernels
        >>> features, means = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
        >>> mlkernels.lgm_loss(features, torch.tensor([0]), means, alpha=0.1, lambda_=0.1)
        tensor(0.2607)

    Source: Wan et al., Rethinking Feature Distribution for Loss Functions in Image Classification, the L-GM loss.
    """
    if rest:
        raise positional_arguments(lgm_loss, rest)
    if unknown:
        raise unknown_keywords(lgm_loss, unknown)
    ignore_index = check_index("ignore_index", ignore_index)
    target = check_tensors(input, target, ignore_index)
    alpha, lambda_ = _check(input, means, log_variance, alpha, lambda_)
    accumulate = accumulated(input.dtype)
    classes = means.shape[0]
    with full_precision(input.device):
        label = target.long()
        plain = _all_kept(input, label, classes, ignore_index)
        if plain:
            x, y = input.to(accumulate), label
        else:
            kept = label != ignore_index
            legal, y = classes_of(label, classes)
            # An ignored row is not read: whatever it holds, it holds no gradient.
            x = torch.where(kept.unsqueeze(1), input, 0).to(accumulate)
        mu = means.to(accumulate)
        log_var = None if log_variance is None else log_variance.to(accumulate)

        logits, half_log_det = class_logits(x, mu, log_var)
        square = (x - F.embedding(y, mu)).square()
        own = square if log_var is None else square * torch.exp(-F.embedding(y, log_var))
        distance = 0.5 * own.sum(1)
        half_log_det_y = None if half_log_det is None else half_log_det[y]

        # The target's logit is given rather than computed from the GEMM's by the affine transform that it equals: the
        # GEMM form cancels terms of the size of |x|^2 and is least accurate where d_y is small. Its target column then
        # takes no part in loss or gradient.
        target_logit = -(1 + alpha) * distance
        likelihood = distance
        if half_log_det_y is not None:
            target_logit = target_logit - half_log_det_y
            likelihood = likelihood + half_log_det_y
        # No call of Common, which Dynamo does not trace.
        options: Common = {
            "weight": weight, "ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing,
            "backend": backend,
        }  # fmt: skip
        loss = softmax.loss(_GIVEN, (target_logit.unsqueeze(1), 1.0), logits, target, None, options)
        if lambda_ == 0:
            return loss
        if not plain:
            poison = torch.where(legal | ~kept, 1.0, math.nan).to(accumulate)
            likelihood = torch.where(kept, likelihood * poison, 0)
        omega = None
        if weight is not None or not plain:
            omega = torch.ones_like(distance) if weight is None else weight.detach().to(accumulate)[y]
            likelihood = likelihood * omega
        divisor: float | Tensor | None = None
        if reduction == "mean":
            weights = omega if plain or omega is None else torch.where(kept, omega, 0)
            divisor = len(label) if weights is None else weights.sum()
        return loss + lambda_ * reduced(likelihood, reduction, divisor)


def _all_kept(input: Tensor, label: Tensor, classes: int, ignore_index: int) -> bool:
    """Whether every label is seen to be a class and none is ignored: no row is masked then."""
    if not input.is_cpu or traced(input, label) or is_jit_tracing():
        return False
    if label.numel() == 0 or 0 <= ignore_index < classes:
        return False
    low, high = label.aminmax()
    return int(low) >= 0 and int(high) < classes


def class_logits(x: Tensor, mu: Tensor, log_var: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """-d_k - log|Lambda_k| / 2, (N, C), by one GEMM; and log|Lambda_k| / 2, (C,), or None where that is 0."""
    # Distances do not know where the origin is; the GEMM's rounding does.
    origin = mu.detach().mean(0)
    x, mu = x - origin, mu - origin
    if log_var is None:
        squares = 0.5 * mu.square().sum(1), 0.5 * x.square().sum(1, keepdim=True)
        return _logits(*squares, x, mu, -1, None), None
    precision = torch.exp(-log_var)
    scaled = precision * mu
    rows = torch.cat((x.square(), x), 1)
    columns = torch.cat((0.5 * precision, -scaled), 1)
    half_log_det = 0.5 * log_var.sum(1)
    return _logits(0.5 * (scaled * mu).sum(1), None, rows, columns, 1, half_log_det), half_log_det


def _logits(
    by_class: Tensor, by_row: Tensor | None, rows: Tensor, columns: Tensor, sign: int, half_log_det: Tensor | None
) -> Tensor:
    """-max(by_class + by_row + sign rows columns^T, 0) - half_log_det."""
    if buffers.serves(len(rows) * len(columns) * rows.element_size(), rows, columns):
        return _kept_logits(by_class, by_row, rows, columns, sign, half_log_det)
    distance = torch.addmm(by_class, rows, columns.t(), alpha=sign)
    if by_row is not None:
        distance = distance + by_row
    logits = -distance.clamp(min=0)
    return logits if half_log_det is None else logits - half_log_det


class _Logits(torch.autograd.Function):
    """The same to the bit, in place and in memory that is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        by_class: Tensor,
        by_row: Tensor | None,
        rows: Tensor,
        columns: Tensor,
        sign: int,
        half_log_det: Tensor | None,
    ) -> Tensor:
        out = buffers.empty(rows, (len(rows), len(columns)))
        torch.addmm(by_class, rows, columns.t(), alpha=sign, out=out)
        if by_row is not None:
            out += by_row
        clamped = torch.lt(out, 0, out=buffers.empty(rows, out.shape, torch.bool))
        out.clamp_(min=0).neg_()
        if half_log_det is not None:
            out -= half_log_det
        ctx.save_for_backward(rows, columns, clamped)
        ctx.sign, ctx.terms = sign, (by_row is not None, half_log_det is not None)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        rows, columns, clamped = ctx.saved_tensors
        kept = not torch.is_grad_enabled() and buffers.serves(upstream.numel() * upstream.element_size(), upstream)
        room = {"out": buffers.empty(upstream, upstream.shape)} if kept else {}
        # By minus the distance: its sign is the last to be taken.
        by = torch.where(clamped, upstream.new_zeros(()), upstream, **room)
        has_row, has_det = ctx.terms
        wanted = ctx.needs_input_grad
        return (
            -by.sum(0) if wanted[0] else None,
            -by.sum(1, keepdim=True) if has_row and wanted[1] else None,
            by @ columns * -ctx.sign if wanted[2] else None,
            by.t() @ rows * -ctx.sign if wanted[3] else None,
            None,
            -upstream.sum(0) if has_det and wanted[5] else None,
        )


_kept_logits: Callable[..., Tensor] = _Logits.apply


def _check(
    input: Tensor, means: Tensor, log_variance: Tensor | None, alpha: Number, lambda_: float
) -> tuple[Number, float]:
    """Everything but the labels; the numbers as floats."""
    if input.dim() != 2:
        raise ValueError(f"input must be (N, D), got {tuple(input.shape)}")
    own = {"means": means} if log_variance is None else {"means": means, "log_variance": log_variance}
    for name, value in own.items():
        check_floating(name, value, " of shape (C, D)")
        check_device(name, value, input)
    if means.dim() != 2 or means.shape[1] != input.shape[1] or means.shape[0] == 0:
        raise ValueError(f"means must be (C, {input.shape[1]}) with C > 0, got {tuple(means.shape)}")
    if log_variance is not None and log_variance.shape != means.shape:
        raise ValueError(
            f"log_variance must have the shape of means, {tuple(means.shape)}, got {tuple(log_variance.shape)}"
        )
    if isinstance(alpha, Tensor):
        check_device("alpha", alpha, input)
    return check_scalar("alpha", alpha), check_number("lambda_", lambda_)


class LGMLoss(Loss):
    r"""Large-margin Gaussian mixture loss with its Gaussians; see :func:`mlkernels.lgm_loss`.

    Args:
        num_features: D. num_classes: C.
        alpha: the margin, >= 0, a number or a 0-d tensor.
        lambda_: the weight of the likelihood term, >= 0.
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

    _function = staticmethod(lgm_loss)
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
        num_features = check_size("num_features", num_features)
        num_classes = check_size("num_classes", num_classes)
        check_scalar("alpha", alpha)
        check_number("lambda_", lambda_)
        common: Options = {
            "weight": weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "backend": backend,
        }
        check_loss(spec(), (1.0,), **common)
        means = nn.Parameter(torch.empty(num_classes, num_features, device=device, dtype=dtype))
        log_variance = nn.Parameter(torch.empty_like(means)) if diagonal else None
        super().__init__(
            {"means": means, "log_variance": log_variance, "alpha": alpha, "lambda_": lambda_},
            dict(common),
        )
        self._draw()

    def logits(self, input: Tensor) -> Tensor:
        r"""The class logits of features, :math:`-d_k-\tfrac12\log|\Lambda_k|`: (N, D) to (N, C), without the margin."""
        dtype = accumulated(input.dtype)
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
