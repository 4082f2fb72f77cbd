"""Cross entropy of class probabilities, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import Never

from .backends.reference import full_precision
from .checks import (
    check_class_vector,
    check_index,
    check_input,
    check_number,
    check_range,
    check_reduction,
    traced,
    unknown_keywords,
)
from .softmax import COMMON
from .spec import BackendName, Number, ReductionName


def soft_cross_entropy(
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
    backend: BackendName | None = None,
    **unknown: Never,
) -> Tensor:
    """Class probabilities as target, in plain torch."""
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
    check_reduction(reduction)
    classes = 1 if input.dim() > 1 else 0
    for name, vector in (("weight", weight), ("logit_adjustment", logit_adjustment)):
        if vector is not None:
            check_class_vector(name, vector, input, input.shape[classes])
    if not isinstance(scale, Tensor):
        scale = check_number("scale", scale)
    elif scale.shape not in ((), (1,)):
        raise ValueError(f"scale must be a number, 0-d or (1,) with class probabilities, got {tuple(scale.shape)}")
    elif scale.device.type == "cpu" and not traced(scale):
        check_range("scale", scale)
    label_smoothing = check_number("label_smoothing", label_smoothing)
    z_loss = check_number("z_loss", z_loss)
    with full_precision(input.device):
        logits = input if input.dtype == torch.float64 else input.float()
        if softcap is not None:
            softcap = check_number("softcap", softcap)
            logits = softcap * torch.tanh(logits / softcap)
        if logit_adjustment is not None:
            logits = logits + logit_adjustment.to(logits.dtype).reshape(-1, *[1] * (logits.dim() - 1 - classes))
        logits = logits * scale
        loss = torch.nn.functional.cross_entropy(
            logits,
            target.to(logits.dtype),
            None if weight is None else weight.to(logits.dtype),
            reduction=str(reduction),
            label_smoothing=label_smoothing,
        )
        if z_loss > 0:
            penalty = z_loss * logits.logsumexp(classes).square()
            loss = loss + (penalty if reduction == "none" else penalty.sum() if reduction == "sum" else penalty.mean())
    return loss
