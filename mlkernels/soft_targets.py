"""Cross entropy of class probabilities, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torchs_cross_entropy  # its own, whatever mlkernels.patch does
from typing_extensions import Never

from . import named
from .backends.reference import full_precision
from .call import COMMON, check_loss
from .checks import (
    check_class_vector,
    check_index,
    check_input,
    check_normalizer,
    check_range,
    check_row_weight,
    check_scalar,
    unknown_keywords,
)
from .spec import BackendName, Number, ReductionName
from .tracing import traced


def soft_cross_entropy(  # noqa: C901 - checks, one after the other
    of: Callable[..., Tensor],
    input: Tensor,
    target: Tensor,
    scale: Number,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_adjustment: Tensor | None = None,
    row_weight: Tensor | None = None,
    normalizer: Number | None = None,
    backend: BackendName | None = None,
    **unknown: Never,
) -> Tensor:
    """The loss of logits and class probabilities of their shape; "mean" divides by the number of rows, as torch's does.

    Args:
        of: the function that was called, for errors.
    """
    if unknown:
        raise unknown_keywords(of, unknown, COMMON)
    check_input(input)
    if target.shape != input.shape:
        raise ValueError(
            f"a floating target holds class probabilities and must have input's shape {tuple(input.shape)}, got "
            f"{tuple(target.shape)}; class indices are integers: target.long()"
        )
    if backend not in (None, "reference"):
        raise TypeError(
            f"target holds class probabilities, which only the reference backend serves; got backend={backend!r}"
        )
    if check_index("ignore_index", ignore_index) >= 0:
        raise ValueError(
            f"ignore_index has no meaning where target holds class probabilities: it must be < 0, got {ignore_index}"
        )
    if target.device != input.device:
        raise ValueError(f"target must be on input's device {input.device}, got {target.device}")
    check_loss(
        *named.cross_entropy(scale), weight=weight, reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss,
        softcap=softcap, logit_adjustment=logit_adjustment,
    )  # fmt: skip
    classes = 1 if input.dim() > 1 else 0
    for name, vector in (("weight", weight), ("logit_adjustment", logit_adjustment)):
        if vector is not None:
            check_class_vector(name, vector, input, input.shape[classes])
    scale = check_scalar("scale", scale)  # not per class, of which a row has no one
    if normalizer is not None:
        normalizer = check_normalizer(normalizer, input, reduction)
        if isinstance(normalizer, Tensor) and normalizer.device.type == "cpu" and not traced(normalizer):
            check_range("normalizer", normalizer)
    if row_weight is not None:
        check_row_weight(row_weight, input, input.select(classes, 0).shape)
    with full_precision(input.device):
        logits = input if input.dtype == torch.float64 else input.float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if logit_adjustment is not None:
            logits = logits + logit_adjustment.to(logits.dtype).reshape(-1, *[1] * (logits.dim() - 1 - classes))
        logits = logits * scale
        rows = torchs_cross_entropy(
            logits,
            target.to(logits.dtype),
            None if weight is None else weight.to(logits.dtype),
            reduction="none",
            label_smoothing=label_smoothing,
        )
        if z_loss > 0:
            rows = rows + z_loss * logits.logsumexp(classes).square()
        if row_weight is not None:
            rows = rows * row_weight.to(rows.dtype)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.mean() if normalizer is None else rows.sum() / normalizer
