"""Measures of a classifier, from the kernel's row statistics.

Each takes logits, or the :class:`~mlkernels.RowStats` that a loss returned on the way, which saves reading the
logits again. Rows with label ``ignore_index`` are left out; where no row is left the result is NaN. A kept row that
holds a NaN counts as wrong. The results are 0-d tensors on the logits' device, computed without a synchronisation;
:func:`macro_f1` and :func:`nmi`, which scikit-learn computes, are Python floats. :class:`Running` has each over many
batches.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeAlias, cast

import torch
from torch import Tensor

from . import softmax
from .backends.reference import RowStats
from .call import Common
from .checks import (
    check_device,
    check_index,
    check_index_dtype,
    check_indices,
    check_number,
    check_scalar,
    unknown_keywords,
    widened,
    wrong_type,
)
from .positional import by_name
from .spec import spec

__all__ = [
    "Running",
    "accuracy",
    "classification_confidence",
    "close_enough",
    "macro_f1",
    "nmi",
    "superclass_accuracy",
    "top_n_accuracy",
]

_PLAIN = spec()
_P = ParamSpec("_P")
_Sum: TypeAlias = tuple[Tensor, Tensor]
"""What a measure divides: a sum over the rows that are kept, and their number."""
_sums: dict[Callable[..., Tensor | float], Callable[..., _Sum]] = {}


def _measure(sums: Callable[_P, _Sum]) -> Callable[_P, Tensor]:
    """The quotient of the two; :class:`Running` adds each of them up."""

    @by_name
    @functools.wraps(sums)
    def measure(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        total, count = sums(*args, **kwargs)
        return total / count

    measure.__signature__ = inspect.signature(sums).replace(return_annotation="Tensor")  # type: ignore[attr-defined]
    _sums[measure] = sums
    return measure


@_measure
def accuracy(input: Tensor | RowStats, target: Tensor, *, ignore_index: int = -100) -> _Sum:
    r"""The fraction of rows whose largest logit is the target's (of equal ones, the one with the lowest index counts).

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
    rows, label, kept = _rows(input, target, ignore_index)
    return ((rows.prediction == label) & kept).sum(), kept.sum()


@_measure
def top_n_accuracy(input: Tensor | RowStats, target: Tensor, *, n: int = 5, ignore_index: int = -100) -> _Sum:
    r"""The fraction of rows with fewer than n logits larger than the target's.

    Args:
        input, target: as in :func:`accuracy`. n: >= 1.

    Example:
        >>> import torch
        >>> from mlkernels import metrics
        >>> metrics.top_n_accuracy(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), torch.tensor([1, 0]), n=2)
        tensor(0.5000)
    """
    n = check_index("n", n)
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    rows, _, kept = _rows(input, target, ignore_index)
    # Nothing compares as larger than a NaN, so its rank is 0.
    ranked = (rows.prediction >= 0) & (rows.confidence == rows.confidence)
    return ((rows.rank < n) & ranked & kept).sum(), kept.sum()


@_measure
def close_enough(
    input: Tensor | RowStats,
    target: Tensor,
    *,
    a: float = 0.1,
    scale: float | Tensor = 1.0,
    ignore_index: int = -100,
) -> _Sum:
    r"""The fraction of rows whose target comes within a of the largest probability, :math:`p_y \ge \max_j p_j - a`.

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
    a = check_number("a", a)
    scale = check_scalar("scale", scale)
    rows, _, kept = _rows(input, target, ignore_index, scale)
    # The largest other logit is `confidence` below the target's; where it is not the largest of all, the row is right.
    log_other = rows.log_prob - scale * rows.confidence
    return ((rows.log_prob.exp() >= log_other.exp() - a) & kept).sum(), kept.sum()


@_measure
def superclass_accuracy(
    input: Tensor | RowStats, target: Tensor, superclass: Tensor, *, ignore_index: int = -100
) -> _Sum:
    r"""The fraction of rows whose predicted class is of the target's superclass.

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
    rows, label, kept = _rows(input, target, ignore_index)
    check_index_dtype("superclass", superclass)
    classes = superclass.numel()
    if superclass.dim() != 1 or (isinstance(input, Tensor) and classes != input.shape[1 if input.dim() > 1 else 0]):
        raise ValueError(f"superclass must be (C,), one entry per class, got {tuple(superclass.shape)}")
    check_device("superclass", superclass, target, "target")
    check_indices("target", label, classes, ignore_index)
    prediction = rows.prediction
    legal = (label >= 0) & (label < classes) & (prediction >= 0) & (prediction < classes)
    same = superclass[torch.where(legal, label, 0)] == superclass[torch.where(legal, prediction, 0)]
    return (same & legal & kept).sum(), kept.sum()


@_measure
def classification_confidence(
    input: Tensor | RowStats,
    target: Tensor,
    *,
    logit_norm: float | Tensor | None = None,
    ignore_index: int = -100,
) -> _Sum:
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
    if logit_norm is not None:
        logit_norm = check_scalar("logit_norm", logit_norm)
    rows, _, kept = _rows(input, target, ignore_index)
    confidence = rows.confidence
    if logit_norm is not None:
        confidence = confidence.double() / logit_norm
    return torch.where(kept, confidence, 0).sum(), kept.sum()


@by_name
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


@by_name
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


class Running:
    """A measure over many batches: what it would be of all their rows at once.

    Args:
        measure: a function of this module.
        **options: its keyword arguments, the same for all batches; ``update`` takes more.

    ``total`` and ``count`` (float64, on the logits' device; None at first) are summed without a synchronisation. Over
    ranks sum them before ``compute``: ``torch.distributed.all_reduce(running.total)``, and ``count``. Of
    :func:`macro_f1` and :func:`nmi` each batch's predictions and labels are kept in the host's memory.

    Example:
        >>> import torch
        >>> from mlkernels import metrics
        >>> top_2 = metrics.Running(metrics.top_n_accuracy, n=2)
        >>> for labels in (torch.tensor([1, 0]), torch.tensor([1])):
        ...     top_2.update(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])[: len(labels)], labels)
        >>> top_2.compute()
        tensor(0.6667, dtype=torch.float64)
    """

    total: Tensor | None
    count: Tensor | None

    def __init__(self, measure: Callable[..., Tensor | float], **options: Any) -> None:
        if measure not in _sums and measure not in (macro_f1, nmi):
            raise TypeError(f"measure takes a function of mlkernels.metrics, got {measure!r}")
        unknown = {name: value for name, value in options.items() if name not in inspect.signature(measure).parameters}
        if unknown:
            raise unknown_keywords(measure, unknown)
        self.measure, self.options = measure, options
        self.reset()

    def reset(self) -> None:
        """Forgets all batches."""
        self.total = self.count = None
        self._found: list[int] = []
        self._labels: list[int] = []

    def update(self, input: Tensor | RowStats, target: Tensor, **options: Any) -> None:
        """Adds a batch; its arguments are those of the measure."""
        options = self.options | options
        sums = _sums.get(self.measure)
        if sums is None:
            found, labels = _to_host(input, target, options.get("ignore_index", -100))
            self._found += found
            self._labels += labels
            return
        total, count = (part.double() for part in sums(input, target, **options))
        self.total = total if self.total is None else self.total + total
        self.count = count if self.count is None else self.count + count

    def compute(self) -> Tensor | float:
        """The measure of all batches so far; NaN where no row was kept."""
        if self.measure not in _sums:
            return self.measure(
                torch.tensor(self._found, dtype=torch.long), torch.tensor(self._labels, dtype=torch.long)
            )
        return torch.tensor(float("nan")) if self.total is None or self.count is None else self.total / self.count

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"Running({self.measure.__name__}{options})"


def _rows(
    input: Tensor | RowStats, target: Tensor, ignore_index: int, scale: float | Tensor = 1.0
) -> tuple[RowStats, Tensor, Tensor]:
    """The row statistics, those given or those of the plain logits; the labels as int64; and which rows are kept."""
    ignore_index = check_index("ignore_index", ignore_index)
    check_index_dtype("target", target)
    if isinstance(input, RowStats):
        if target.shape != input.prediction.shape:
            wanted = tuple(input.prediction.shape)
            raise ValueError(f"target must have the statistics' shape {wanted}, got {tuple(target.shape)}")
        rows, classes = RowStats(*(row.detach() for row in input)), 2**63
    else:
        if not isinstance(input, Tensor):
            raise wrong_type("input", "logits or RowStats", input)
        with torch.no_grad():
            options: Common = {"ignore_index": ignore_index, "reduction": "sum"}
            _, found = softmax.apply(_PLAIN, (scale,), input, target, None, options, True)
        rows, classes = cast(RowStats, found), input.shape[1 if input.dim() > 1 else 0]
    label = widened("target", target, classes, ignore_index)
    return rows, label, label != ignore_index


def _to_host(input: Tensor | RowStats, target: Tensor, ignore_index: int) -> tuple[list[int], list[int]]:
    """Predictions and labels of the kept rows."""
    check_index_dtype("target", target)
    if isinstance(input, Tensor) and not input.is_floating_point():
        if input.shape != target.shape:
            wanted = tuple(target.shape)
            raise ValueError(f"input of predictions must have target's shape {wanted}, got {tuple(input.shape)}")
        found = input
    else:
        found = _rows(input, target, ignore_index)[0].prediction
    pairs = zip(found.reshape(-1).tolist(), target.reshape(-1).tolist(), strict=True)
    kept = [(p, y) for p, y in pairs if y != ignore_index]
    return [p for p, _ in kept], [y for _, y in kept]


def _sklearn(name: str) -> Callable[..., Any]:
    try:
        metrics = importlib.import_module("sklearn.metrics")
    except ImportError as error:
        raise ImportError("this measure needs scikit-learn: pip install scikit-learn") from error
    return cast(Callable[..., Any], getattr(metrics, name))
