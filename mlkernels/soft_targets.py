"""Cross entropy of class probabilities, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torchs_cross_entropy  # its own, whatever mlkernels.patch does

from . import named
from .backends.finish import row_term
from .backends.reference import Finished, Values, final_logits, full_precision, reduced
from .call import COMMON, Common, bind
from .checks import accumulated, check_index, check_input, check_scalar, unknown_keywords
from .numbering import Reduction, Slot
from .spec import Number


def soft_cross_entropy(
    of: Callable[..., Tensor], input: Tensor, target: Tensor, scale: Number, common: Common
) -> Tensor:
    """The loss of logits and class probabilities of their shape; "mean" divides by the number of rows, as torch's does.

    Args:
        of: the function that was called, for errors.
    """
    given: dict[str, Any] = {**COMMON, **common}
    if len(given) > len(COMMON):
        raise unknown_keywords(of, {name: given[name] for name in given if name not in COMMON}, COMMON)
    check_input(input)
    if target.shape != input.shape:
        raise ValueError(
            f"a floating target holds class probabilities and must have input's shape {tuple(input.shape)}, got "
            f"{tuple(target.shape)}; class indices are integers: target.long()"
        )
    if given["backend"] not in (None, "reference"):
        raise TypeError(
            "target holds class probabilities, which only the reference backend serves; got "
            f"backend={given['backend']!r}"
        )
    if check_index("ignore_index", given["ignore_index"]) >= 0:
        raise ValueError(
            "ignore_index has no meaning where target holds class probabilities: it must be < 0, got "
            f"{given['ignore_index']}"
        )
    if target.device != input.device:
        raise ValueError(f"target must be on input's device {input.device}, got {target.device}")
    scale = check_scalar("scale", scale)  # not per class, of which a row has no one
    # All else is checked as with labels, of which there are none.
    labels = input.new_zeros(input.shape[:1] + input.shape[2:] if input.dim() > 1 else (), dtype=torch.long)
    checked: Common = {**common, "backend": "reference"}
    call, batch, rows, params = bind(*named.cross_entropy(scale), input, labels, None, **checked)
    with full_precision(input.device):
        values = Values(call.numbers, params, rows.reshape(-1), batch.shape[1], accumulated(input.dtype))

        def by_rows(tensor: Tensor) -> Tensor:
            return tensor.movedim(1, -1).reshape(-1, values.classes).to(values.dtype)

        logits = final_logits(by_rows(batch), values) * values[Slot.SCALE]
        probabilities = by_rows(target.reshape(batch.shape))
        weight = values.vector(Slot.WEIGHT)
        losses = torchs_cross_entropy(logits, probabilities, weight, reduction="none", label_smoothing=values.smoothing)
        term = row_term(logits.logsumexp(1), values)
        losses = losses if term is None else losses + term
        loss = reduced(Finished(None, losses, None, None, None), values)
    return loss.reshape(labels.shape) if values.reduction == Reduction.NONE else loss
