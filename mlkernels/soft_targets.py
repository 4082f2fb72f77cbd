"""Cross entropy of class probabilities, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torchs_cross_entropy  # its own, whatever mlkernels.patch does

from .backends.reference import PREPARATION, full_precision, prepared
from .call import COMMON, MOST_CALLS, PLAIN, Common, Options, check_loss
from .checks import (
    accumulated,
    check_class_vector,
    check_device,
    check_index,
    check_input,
    check_normalizer,
    check_row_weight,
    check_scalar,
    unknown_keywords,
)
from .loss_module import reduced
from .numbering import PER_CLASS
from .spec import Number, spec

CROSS_ENTROPY = spec(function="cross_entropy")

#: What a call is remembered by, as :mod:`mlkernels.call` does: of its numbers nothing is looked at twice.
_PLAIN_OPTIONS = tuple(name for name in Options.__annotations__ if name not in PER_CLASS.values())
_checked: set[tuple[object, ...]] = set()


def soft_cross_entropy(
    of: Callable[..., Tensor], input: Tensor, target: Tensor, scale: Number, common: Common
) -> Tensor:
    """The loss of logits and class probabilities of their shape; "mean" divides by the number of rows, as torch's does.

    Args:
        of: the function that was called, for errors.
    """
    given: dict[str, Any] = {**COMMON, **common}
    if len(given) > len(COMMON):
        raise unknown_keywords(of, {name: value for name, value in given.items() if name not in COMMON}, COMMON)
    check_input(input)
    if target.shape != input.shape:
        raise ValueError(
            f"a floating target holds class probabilities and must have input's shape {tuple(input.shape)}, got "
            f"{tuple(target.shape)}; class indices are integers: target.long()"
        )
    options = tuple(given[name] for name in _PLAIN_OPTIONS)
    plain = type(scale) is float and type(given["ignore_index"]) is int and PLAIN.issuperset(map(type, options))
    plain = plain and not torch.compiler.is_compiling()
    if not plain or (scale, *options) not in _checked:
        _check(scale, given)
        if plain and len(_checked) < MOST_CALLS:
            _checked.add((scale, *options))
    check_device("target", target, input)
    row_weight, normalizer = given["row_weight"], given["normalizer"]
    classes = 1 if input.dim() > 1 else 0
    for name in PER_CLASS.values():
        if given[name] is not None:
            check_class_vector(name, given[name], input, input.shape[classes])
    scale = check_scalar("scale", scale)  # not per class, of which a row has no one
    if normalizer is not None:
        normalizer = check_normalizer(normalizer, input, given["reduction"])
    if row_weight is not None:
        check_row_weight(row_weight, input, input.select(classes, 0).shape)
    with full_precision(input.device):
        return _loss(input, target, classes, scale, given, row_weight, normalizer)


def _check(scale: Number, given: dict[str, Any]) -> None:
    """Everything but how the tensors fit the batch."""
    backend, ignored = given["backend"], given["ignore_index"]
    if backend not in (None, "reference"):
        raise TypeError(
            f"target holds class probabilities, which only the reference backend serves; got backend={backend!r}"
        )
    if check_index("ignore_index", ignored) >= 0:
        raise ValueError(
            f"ignore_index has no meaning where target holds class probabilities: it must be < 0, got {ignored}"
        )
    check_loss(CROSS_ENTROPY, (scale,), **{name: given[name] for name in Options.__annotations__})


def _loss(
    input: Tensor,
    target: Tensor,
    classes: int,
    scale: float | Tensor,
    given: dict[str, Any],
    row_weight: Tensor | None,
    normalizer: float | Tensor | None,
) -> Tensor:
    weight, logits, reduction = given["weight"], input.to(accumulated(input.dtype)), given["reduction"]
    if any(given[name] is not None for name in PREPARATION):
        logits = prepared(logits.movedim(classes, -1), **{name: given[name] for name in PREPARATION})
        logits = logits.movedim(-1, classes)
    if isinstance(scale, Tensor) or scale != 1:
        logits = logits * scale
    plain = row_weight is None and normalizer is None and not given["z_loss"] > 0
    rows = torchs_cross_entropy(
        logits,
        target.to(logits.dtype),
        None if weight is None else weight.to(logits.dtype),
        reduction=reduction if plain else "none",
        label_smoothing=given["label_smoothing"],
    )
    if plain:
        return rows
    if given["z_loss"] > 0:
        rows = rows + given["z_loss"] * logits.logsumexp(classes).square()
    if row_weight is not None:
        rows = rows * row_weight.to(rows.dtype)
    return reduced(rows, reduction, normalizer)
