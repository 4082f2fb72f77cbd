"""The semantics in plain torch: the oracle of every kernel, and the backend where there is no kernel.

Readable first. It runs in float32 (half inputs are widened) or float64, is differentiable twice, works under
``torch.func`` and never synchronises; it makes a handful of N x C temporaries and makes no claim to speed.
The scalar part is in ``finish.py``.

A row may come whole or in pieces of its classes, in four steps. With u the softcapped, adjusted logits:

* :func:`statistics` of a piece: M = max u_j, S = sum e^{s(u_j - M)} and a few more, over the j != y that it holds;
  those of two pieces :func:`combine`;
* :func:`finish`: scalar work per row, and the only place that knows losses;
* :func:`coefficients`: the derivatives of what was finished by those numbers;
* :func:`gradient` of a piece: dL/du_j = e^{s(u_j - M)} (a + b (u_j - M)) - d w_j, and g at the target.

A whole row is one piece, and autograd takes the last two steps, as often as it is asked to.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import accumulated
from ..numbering import Reduction, Slot
from ..spec import constant_when_compiled
from .finish import Finished, Rows, Values, finish, row_scale, scales, sound, well_classified

# The rest of the steps, for those who take a row in pieces.
__all__ = ["Finished", "Rows", "Values", "finish", "row_scale", "scales", "well_classified"]


class RowStats(NamedTuple):
    r"""What the kernel learned of each row, target-shaped. Ignored rows hold 0, and -1 as prediction.

    Attributes:
        logsumexp: of the final z; differentiable.
        log_prob: log p of the target, of the final z; differentiable.
        entropy: :math:`-\sum_j p_j \log p_j` of the final z; differentiable.
        prediction: the class of the largest logit before transform and scale; the lowest index on ties, -1 where the
            row holds a NaN.
        confidence: the target's logit minus the largest other one, before transform and scale; +inf for C = 1.
        rank: how many logits are larger than the target's (0: right; < n: right among the top n).
    """

    logsumexp: Tensor
    log_prob: Tensor
    entropy: Tensor
    prediction: Tensor
    confidence: Tensor
    rank: Tensor


# ---- the four steps --------------------------------------------------------------------------------------------------


#: What happens to a logit first, by the names of the options.
PREPARATION = ("softcap", "logit_adjustment")


def prepared(f: Tensor, softcap: float | None, logit_adjustment: Tensor | None) -> Tensor:
    """u: logits, classes last, as a loss sees them: c tanh(f / c), where an overflow stays one, and adjusted."""
    if softcap is not None and softcap > 0:
        f = softcap * torch.tanh(f / softcap) * torch.where(f == math.inf, math.nan, 1.0).to(f.dtype)
    return f if logit_adjustment is None else f + logit_adjustment.to(f.dtype)


def through_cap(gradient: Tensor, f: Tensor, values: Values) -> Tensor:
    """dL/df from dL/du."""
    cap = values.consts[int(Slot.SOFTCAP)]
    if cap > 0:
        e = torch.exp(-2 * (f / cap).abs())  # 1 - tanh^2 without the difference, which cancels where tanh is near 1
        gradient = gradient * (4 * e / (1 + e).square())
    return gradient


def _of_classes(f: Tensor, values: Values, classes: slice | Tensor) -> Tensor:
    vector = values.vector(Slot.ADJUSTMENT)
    return prepared(f, values.consts[int(Slot.SOFTCAP)], None if vector is None else vector[classes])


def final_logits(f: Tensor, values: Values, start: int = 0) -> Tensor:
    """u of a piece that starts at a class."""
    return _of_classes(f, values, slice(start, start + f.shape[1]))


def final_target(f_y: Tensor, values: Values) -> Tensor:
    """u_y, (rows,)."""
    return _of_classes(f_y, values, values.label)


def statistics(
    u: Tensor,
    u_y: Tensor,
    scales: Tensor,
    values: Values,
    *,
    start: int = 0,
    top: Tensor | None = None,
    second: bool = False,
) -> Rows:
    """What a piece (rows, classes) that starts at a class knows of each row.

    What stands at the target does not matter. An ignored row is taken as it is: let it hold zeros.

    Args:
        u_y: (rows,), of the target, wherever it is. scales: (1 or 2, rows).
        top: what the sums are relative to; M, unless the caller knows better. second: whether squares are summed too.
    """
    index = torch.arange(start, start + u.shape[1], device=u.device)
    is_target = index == values.label.unsqueeze(1)
    others = torch.where(is_target, -math.inf, u)
    largest, first = torch.full_like(u_y, -math.inf).detach(), torch.full_like(values.label, values.classes)
    if u.shape[1]:
        largest = others.detach().amax(1)
        first = torch.where((others == largest.unsqueeze(1)) & ~is_target, index, values.classes).amin(1)
    above = (others > u_y.unsqueeze(1)).sum(1)
    top = largest if top is None else top
    d = others - torch.where(top == -math.inf, 0, top).unsqueeze(1)
    # A class of probability 0 contributes 0 to every sum: its -inf must not meet a 0 on the way to s.
    absent = (d == -math.inf).detach()
    d = torch.where(absent, 0, d)
    e = torch.where(absent, 0, torch.exp(scales.unsqueeze(2) * d))
    weighted = weights = None
    if values.smoothing > 0:
        # But smoothing counts such a class: the loss is infinite, and grows with s; NaN where its weight is 0.
        omega = values.vector(Slot.WEIGHT)
        omega = u.new_ones(u.shape[1]) if omega is None else omega[start : start + u.shape[1]]
        weighted = torch.where(is_target, 0, omega * torch.where(absent, u, d)).sum(1)
        weights = torch.where(is_target, 0, omega).sum(1)
    squares = (e * d * d).sum(2) if second else None
    return Rows(largest, e.sum(2), (e * d).sum(2), squares, weighted, weights, first, above)


def combine(a: Rows, b: Rows, scales: Tensor) -> Rows:
    """What both pieces know together; associative to rounding."""
    top = torch.maximum(a.top, b.top)
    equal, ahead = a.top == b.top, a.top > b.top
    move_a, move_b = (torch.where(rows.top == top, 0, rows.top - top) for rows in (a, b))
    share_a, share_b = torch.exp(scales * move_a), torch.exp(scales * move_b)

    def both(of_a: Tensor, of_b: Tensor) -> Tensor:
        return torch.where(share_a == 0, 0, share_a * of_a) + torch.where(share_b == 0, 0, share_b * of_b)

    total = both(a.total, b.total)
    shift = both(a.shift + move_a * a.total, b.shift + move_b * b.total)
    second = weighted = weights = None
    if a.second is not None and b.second is not None:
        second = both(
            a.second + move_a * (2 * a.shift + move_a * a.total), b.second + move_b * (2 * b.shift + move_b * b.total)
        )
    if a.weighted is not None and a.weights is not None and b.weighted is not None and b.weights is not None:
        weights = a.weights + b.weights
        # Where no class counts there is no M to move from.
        moved = torch.where(a.weights == 0, 0, move_a * a.weights) + torch.where(b.weights == 0, 0, move_b * b.weights)
        weighted = a.weighted + b.weighted + moved
    tied = torch.where(equal, torch.minimum(a.first, b.first), torch.maximum(a.first, b.first))
    first = torch.where(ahead, a.first, torch.where(b.top > a.top, b.first, tied))
    return Rows(top, total, shift, second, weighted, weights, first, a.above + b.above)


def chosen(rows: Rows, high: Tensor) -> Rows:
    """The sums (rows,) at the scale that each row turns out to have."""

    def one(sums: Tensor) -> Tensor:
        return sums[0] if sums.shape[0] == 1 else torch.where(high, sums[1], sums[0])

    second = None if rows.second is None else one(rows.second)
    return rows._replace(total=one(rows.total), shift=one(rows.shift), second=second)


class Coefficients(NamedTuple):
    """What a piece needs to write its gradient, each (rows,); slope and spread may be None: 0."""

    factor: Tensor  # a
    slope: Tensor | None  # b
    spread: Tensor | None  # d
    target: Tensor  # g
    scale: Tensor  # s
    top: Tensor  # M


def coefficients(
    rows: Rows, u_y: Tensor, values: Values, upstream: Finished, needs: Collection[int] = ()
) -> tuple[Coefficients, dict[int, Tensor]]:
    """How the pieces of each row write their gradients, and the gradients of the parameters whose slots are needed.

    Args:
        rows: of all pieces. upstream: the gradients of what finish returns; None: 0.
    """
    high = well_classified(u_y - rows.top, values)
    one = chosen(rows, high)
    with torch.enable_grad():
        params = {slot: values.params[slot].detach().requires_grad_() for slot in needs}
        own = values.replaced(params).marked(sound(rows.top, u_y, values))
        u_y = u_y.detach().requires_grad_()
        total, shift = one.total.detach().requires_grad_(), one.shift.detach().requires_grad_()
        weighted = None if one.weighted is None else one.weighted.detach().requires_grad_()
        s = row_scale(own, high)
        # The sums were made without the scale's gradient: dS/ds is T, and dT/ds the sum of squares.
        drift = s - s.detach()
        moved = one._replace(
            total=total + one.shift * drift,
            shift=shift if one.second is None else shift + one.second * drift,
            weighted=weighted,
        )
        finished = finish(moved, u_y, s, own)
        pairs = [(out, g) for out, g in zip(finished, upstream, strict=True) if out is not None and g is not None]
        leaves = [u_y, total, shift, *([] if weighted is None else [weighted]), *params.values()]
        target, by_total, by_shift, *found = torch.autograd.grad(
            [out for out, _ in pairs], leaves, [g for _, g in pairs], materialize_grads=True
        )
    spread = None if weighted is None else -found.pop(0)
    s = s.detach()
    slope = None if upstream.entropy is None else s * by_shift
    row = Coefficients(s * by_total + by_shift, slope, spread, target, s, rows.top)
    return row, dict(zip(params, found, strict=True))


def gradient(u: Tensor, row: Coefficients, values: Values, *, start: int = 0) -> Tensor:
    """dL/du of a piece (rows, classes) that starts at a class."""
    is_target = torch.arange(start, start + u.shape[1], device=u.device) == values.label.unsqueeze(1)
    d = u - torch.where(row.top == -math.inf, 0, row.top).unsqueeze(1)
    absent = d == -math.inf
    d = torch.where(absent, 0, d)
    e = torch.where(absent, 0, torch.exp(row.scale.unsqueeze(1) * d))
    others = e * row.factor.unsqueeze(1)
    if row.slope is not None:
        others = others + e * d * row.slope.unsqueeze(1)
    if row.spread is not None:
        omega = values.vector(Slot.WEIGHT)
        spread = row.spread.unsqueeze(1)
        others = others - (spread if omega is None else spread * omega[start : start + u.shape[1]])
    return torch.where(is_target, row.target.unsqueeze(1), others)


# ---- a batch ---------------------------------------------------------------------------------------------------------


def factors(values: Values) -> tuple[Tensor, Tensor]:
    """What by_class and by_row of each row are multiplied by: the reduction, known before any row is visited."""
    row_weight = values.params.get(Slot.ROW_WEIGHT)
    ones = torch.ones(values.label.shape, dtype=values.dtype, device=values.label.device)
    share = ones if row_weight is None else row_weight.detach().to(values.dtype).reshape(-1)
    share = torch.where(values.kept, share, 0)
    if values.reduction != Reduction.MEAN:
        return share, share
    if normalized(values):
        normalizer = values[Slot.NORMALIZER].detach()
        share = share / torch.where((normalizer > 0) & (normalizer < math.inf), normalizer, math.nan)
        return share, share
    omega = values.vector(Slot.WEIGHT)
    weights = torch.where(values.kept, ones if omega is None else omega[values.label], 0).sum()
    # Smoothing has a loss where weights sum to 0.
    return share / torch.where(weights == 0, math.nan, weights), share / values.kept.sum()


def normalized(values: Values) -> bool:
    """Whether a mean has a divisor of its own."""
    return Slot.NORMALIZER in values.params or values.consts[int(Slot.NORMALIZER)] != 0


def reduced(finished: Finished, values: Values) -> Tensor:
    """The rows' losses, or their sum: the mean is in the factors."""
    by_class, by_row = factors(values)
    assert finished.by_class is not None
    loss = finished.by_class * by_class
    if finished.by_row is not None:
        loss = loss + finished.by_row * by_row
    if values.reduction == Reduction.NONE:
        return loss
    total = loss.sum()
    if values.reduction == Reduction.MEAN and not normalized(values):
        total = torch.where(values.kept.any(), total, math.nan)  # also of no rows at all
    return total


def row_stats(rows: Rows, u_y: Tensor, finished: Finished, values: Values) -> RowStats:
    """What RowStats holds, each (rows,)."""
    u_y, label = u_y.detach(), values.label
    best = torch.where(u_y == rows.top, torch.minimum(label, rows.first), rows.first)
    best = torch.where(u_y > rows.top, label, best)
    seen = values.kept & (best < values.classes) & (u_y == u_y)
    confidence = torch.where(values.legal, u_y - rows.top, math.nan)
    assert finished.logsumexp is not None and finished.log_prob is not None and finished.entropy is not None
    return RowStats(
        finished.logsumexp,
        finished.log_prob,
        finished.entropy,
        torch.where(seen, best, -1),
        torch.where(values.kept, confidence, 0),
        torch.where(values.kept, rows.above, 0),
    )


@constant_when_compiled  # Dynamo of torch 2.11 does not ask it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """No autocast, where the device has such a thing and, unless a compiler asks, it is on."""
    kind = device.type
    if not _has_autocast(kind) or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(kind)):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def softmax_loss(
    input: Tensor, target: Tensor, numbers: Sequence[float], params: Sequence[Tensor]
) -> tuple[Tensor, RowStats]:
    """Any loss of the family, reduced, and its row statistics: each row is one piece.

    Args:
        input: (N, C) or (N, C, d1, ...), floating. target: (N) or (N, d1, ...), integer.
        numbers, params: see :class:`Values`.
    """
    with full_precision(input.device):
        classes = input.shape[1]
        accumulate = accumulated(input.dtype)
        values = Values(numbers, params, target.reshape(-1), classes, accumulate)
        f = input.movedim(1, -1).reshape(-1, classes).to(accumulate)
        # An ignored row is not read: whatever it holds, it holds no gradient.
        u = final_logits(torch.where(values.kept.unsqueeze(1), f, 0), values)
        column = values.label.unsqueeze(1)
        u_y = u.gather(1, column).squeeze(1)
        top = u.detach().scatter(1, column, -math.inf).amax(1)
        high = well_classified(u_y.detach() - top, values)
        marked = values.marked(sound(top, u_y, values))
        s = row_scale(marked, high)
        rows = chosen(statistics(u, u_y, s.unsqueeze(0), values, top=top * marked.mark), high)
        finished = finish(rows, u_y, s, values)
        loss, stats = reduced(finished, values), row_stats(rows, u_y, finished, values)
    if values.reduction == Reduction.NONE:
        loss = loss.reshape(target.shape)
    return loss, RowStats(*(row.reshape(target.shape) for row in stats))
