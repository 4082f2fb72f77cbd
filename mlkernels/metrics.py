"""Measures of a classifier, from the kernel's row statistics.

Each takes logits, or the :class:`~mlkernels.RowStats` that a loss returned on the way, which saves reading the
logits again. Rows with label ``ignore_index`` are left out; where no row is left the result is NaN. A kept row that
holds a NaN counts as wrong. The results are 0-d tensors on the logits' device, computed without a synchronisation;
:func:`macro_f1` and :func:`nmi`, which scikit-learn computes, are Python floats.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from . import softmax
from .checks import check_indices, check_number
from .softmax import RowStats
from .spec import spec

__all__ = [
    "accuracy",
    "classification_confidence",
    "close_enough",
    "macro_f1",
    "nmi",
    "superclass_accuracy",
    "top_n_accuracy",
]

_PLAIN = spec()


def accuracy(input: Tensor | RowStats, target: Tensor, *, ignore_index: int = -100) -> Tensor:
    r"""The share of rows whose largest logit is the target's (of equal ones, the one with the lowest index counts).

    Args:
        input: (N, C) or (N, C, d1, ...) logits, or the RowStats of a loss on them. target: (N,) or (N, d1, ...).

    Example:
        >>> import torch
        >>> from mlkernels import metrics
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
        >>> metrics.accuracy(logits, torch.tensor([0, 0, -100]))
        tensor(0.5000)

    Source: the two-scale loss, equation (11).
    """
    rows = _rows(input, target, ignore_index)
    return _share(rows.prediction == target, target, ignore_index)


def top_n_accuracy(input: Tensor | RowStats, target: Tensor, *, n: int = 5, ignore_index: int = -100) -> Tensor:
    r"""The share of rows with fewer than n logits larger than the target's.

    Args:
        input, target: as in :func:`accuracy`. n: >= 1.

    Example:
        >>> import torch
        >>> from mlkernels import metrics
        >>> metrics.top_n_accuracy(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), torch.tensor([1, 0]), n=2)
        tensor(0.5000)
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be an integer >= 1, got {n!r}")
    rows = _rows(input, target, ignore_index)
    # Nothing compares as larger than a NaN, so its rank is 0.
    ranked = (rows.prediction >= 0) & (rows.confidence == rows.confidence)
    return _share((rows.rank < n) & ranked, target, ignore_index)


def close_enough(
    input: Tensor | RowStats,
    target: Tensor,
    *,
    a: float = 0.1,
    scale: float | Tensor = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    r"""The share of rows whose target comes within a of the largest probability, :math:`p_y \ge \max_j p_j - a`.

    Args:
        input, target: as in :func:`accuracy`. RowStats must be those of the plain logits at ``scale``, with no target
            transform; or those of a two-scale loss with :math:`\eta \ge 0` and ``scale`` :math:`= R_1/R`: the rows at
            R2 are right, and right is close enough at any scale.
        a: >= 0; 0 is accuracy, but for equal logits.
        scale: of the logits, a number or 0-d; for a two-scale model :math:`R_1/R`.

    Example:
        >>> import torch
        >>> from mlkernels import metrics
        >>> logits = torch.tensor([[0.0, 0.1], [0.0, 5.0]])
        >>> metrics.close_enough(logits, torch.tensor([0, 0]), a=0.1)
        tensor(0.5000)

    Source: the two-scale loss, section 3.1.
    """
    if check_number("a", a) < 0:
        raise ValueError(f"a must be >= 0, got {a}")
    if not isinstance(scale, Tensor):
        check_number("scale", scale)
    rows = _rows(input, target, ignore_index, scale)
    # The largest other logit is `confidence` below the target's; where it is not the largest of all, the row is right.
    log_other = rows.log_prob - scale * rows.confidence
    return _share(rows.log_prob.exp() >= log_other.exp() - a, target, ignore_index)


def superclass_accuracy(
    input: Tensor | RowStats, target: Tensor, superclass: Tensor, *, ignore_index: int = -100
) -> Tensor:
    r"""The share of rows whose predicted class is of the target's superclass.

    Args:
        input, target: as in :func:`accuracy`. superclass: (C,), integer, the superclass of every class.

    Example:
        >>> import torch
        >>> from mlkernels import metrics
        >>> maple_oak_cat = torch.tensor([0, 0, 1])
        >>> metrics.superclass_accuracy(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([0]), maple_oak_cat)
        tensor(1.)

    Source: the two-scale loss, equation (20).
    """
    if not isinstance(superclass, Tensor) or superclass.is_floating_point() or superclass.dim() != 1:
        raise ValueError("superclass must be an integer tensor of shape (C,)")
    if isinstance(input, Tensor) and superclass.shape[0] != input.shape[1 if input.dim() > 1 else 0]:
        raise ValueError(f"superclass must have one entry per class, got {tuple(superclass.shape)}")
    if superclass.device != target.device:
        raise ValueError(f"superclass must be on target's device {target.device}, got {superclass.device}")
    rows = _rows(input, target, ignore_index)
    classes = superclass.shape[0]
    check_indices("target", target, classes, ignore_index)
    label, prediction = target.long(), rows.prediction
    legal = (label >= 0) & (label < classes) & (prediction >= 0) & (prediction < classes)
    same = superclass[torch.where(legal, label, 0)] == superclass[torch.where(legal, prediction, 0)]
    return _share(same & legal, target, ignore_index)


def classification_confidence(
    input: Tensor | RowStats,
    target: Tensor,
    *,
    logit_norm: float | Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    r"""The mean classification confidence, :math:`\delta X = X_y - \max_{j\ne y}X_j`; with R, normalised,
    :math:`\delta\hat X = \delta X/R`.

    Args:
        input, target: as in :func:`accuracy`.
        logit_norm: R > 0, a number or 0-d (:func:`mlkernels.weight_norm_product`). None: not normalised.

    Returns:
        0-d, of the statistics' dtype; float64 with a norm, as R may be beyond float32. The confidence of every row is
        ``RowStats.confidence``.

    Example:
        >>> import torch
        >>> from mlkernels import metrics
        >>> metrics.classification_confidence(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        tensor(-1.)

    Source: the two-scale loss, section 2.2.
    """
    if logit_norm is not None and not isinstance(logit_norm, Tensor):
        check_number("logit_norm", logit_norm)
    rows = _rows(input, target, ignore_index)
    kept = target != ignore_index
    confidence = rows.confidence.detach()
    if logit_norm is not None:
        confidence = confidence.double() / logit_norm
    return torch.where(kept, confidence, 0).sum() / kept.sum()


def macro_f1(input: Tensor | RowStats, target: Tensor, *, ignore_index: int = -100) -> float:
    """The mean over the classes, those that occur or are predicted, of F1. Needs scikit-learn.

    Args:
        input: logits or RowStats as in :func:`accuracy`, or predicted classes: an integer tensor of target's shape.
        target: (N,) or (N, d1, ...).

    Raises:
        ImportError: scikit-learn is not installed.

    Example:
        >>> import torch
        >>> from mlkernels import metrics
        >>> round(metrics.macro_f1(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])), 4)
        0.6667
    """
    score = _sklearn("f1_score")
    found, label = _to_host(input, target, ignore_index)
    if not label:
        return float("nan")
    classes = sorted({*found, *label} - {-1})
    return float(score(label, found, labels=classes, average="macro", zero_division=0))


def nmi(input: Tensor | RowStats, target: Tensor, *, ignore_index: int = -100) -> float:
    """Normalised mutual information of labels and predictions, or of labels and clusters. Needs scikit-learn.

    Args:
        input: logits or RowStats as in :func:`accuracy`, or each row's predicted class or cluster: an integer tensor of
            target's shape.
        target: (N,) or (N, d1, ...).

    Raises:
        ImportError: scikit-learn is not installed.

    Example:
        >>> import torch
        >>> from mlkernels import metrics
        >>> round(metrics.nmi(torch.tensor([7, 7, 3]), torch.tensor([0, 0, 1])), 4)  # clusters need no names
        1.0
    """
    score = _sklearn("normalized_mutual_info_score")
    found, label = _to_host(input, target, ignore_index)
    return float(score(label, found)) if label else float("nan")


def _rows(input: Tensor | RowStats, target: Tensor, ignore_index: int, scale: float | Tensor = 1.0) -> RowStats:
    """The row statistics: those given, or those of the plain logits."""
    if isinstance(input, RowStats):
        if not isinstance(target, Tensor) or target.shape != input.prediction.shape:
            got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise ValueError(f"target must have the statistics' shape {tuple(input.prediction.shape)}, got {got}")
        return RowStats(*(row.detach() for row in input))
    if not isinstance(input, Tensor):
        raise TypeError(f"input takes logits or RowStats, got {type(input).__name__}")
    with torch.no_grad():
        _, rows = softmax.apply(
            _PLAIN, (scale,), input, target, ignore_index=ignore_index, reduction="sum", return_stats=True
        )
    return cast(RowStats, rows)


def _share(hit: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    kept = target != ignore_index
    return (hit & kept).sum() / kept.sum()


def _to_host(input: Tensor | RowStats, target: Tensor, ignore_index: int) -> tuple[list[int], list[int]]:
    """Predictions and labels of the kept rows."""
    if isinstance(input, Tensor) and not input.is_floating_point():
        if input.shape != target.shape:
            wanted = tuple(target.shape)
            raise ValueError(f"input of predictions must have target's shape {wanted}, got {tuple(input.shape)}")
        found = input
    else:
        found = _rows(input, target, ignore_index).prediction
    pairs = zip(found.reshape(-1).tolist(), target.reshape(-1).tolist(), strict=True)
    kept = [(p, y) for p, y in pairs if y != ignore_index]
    return [p for p, _ in kept], [y for _, y in kept]


def _sklearn(name: str) -> Callable[..., Any]:
    try:
        metrics = importlib.import_module("sklearn.metrics")
    except ImportError as error:
        raise ImportError("this measure needs scikit-learn: pip install scikit-learn") from error
    return cast(Callable[..., Any], getattr(metrics, name))
