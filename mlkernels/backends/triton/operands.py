"""What a row is given beside its logits, and what it leaves beside their gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import (
    BY_VALUE,
    DOMAIN_LOW,
    HEAD_A,
    LOGIT_NORM,
    LOSS_SLOTS,
    MEAN,
    MODE_BASE,
    NONE,
    NORM,
    PER_CLASS,
    SCALE,
    SCALE_HIGH,
    SHARED,
    T_TABLES,
    TAU_TABLES,
    TRAINABLE_SLOTS,
    TRANSFORM_A,
)

# ---- what it is given ------------------------------------------------------------------------------------------------


@triton.jit
def label_of(label, inside, classes, ignore_index):
    """Each row's class, whether the row counts, and whether its class exists (else 0 stands for it)."""
    y = label.to(tl.int64)
    kept = y != ignore_index
    if label.dtype == tl.uint64:
        kept = kept | (y < 0)  # what int64 does not hold
    kept = kept & inside
    exists = kept & (y >= 0) & (y < classes)
    return tl.where(exists, y, 0).to(tl.int32), kept, exists


@triton.jit
def number(values, SLOT: tl.constexpr, MODES: tl.constexpr, y, row, kept, T: tl.constexpr):
    """A number of the loss, per row. An ignored row's own is not read."""
    MODE: tl.constexpr = MODES // MODE_BASE**SLOT % MODE_BASE
    if MODE == BY_VALUE:
        found = tl.full(row.shape, values[SLOT], T)
    elif MODE == SHARED:
        found = tl.load(values[SLOT]).to(T) + tl.zeros(row.shape, T)
    elif MODE == PER_CLASS:
        found = tl.load(values[SLOT] + y, kept, 1.0).to(T)
    else:
        found = tl.load(values[SLOT] + row, kept, 1.0).to(T)
    return found


@triton.jit
def shared(values, SLOT: tl.constexpr, MODES: tl.constexpr, T: tl.constexpr):
    """A number that is the same for all rows, by value or (in float64) through a pointer: a scalar."""
    if MODES // MODE_BASE**SLOT % MODE_BASE == BY_VALUE:
        found = tl.full((), values[SLOT], T)
    else:
        found = tl.load(values[SLOT]).to(T)
    return found


@triton.jit
def numbers(values, MODES: tl.constexpr, y, row, kept, T: tl.constexpr, PIECEWISE: tl.constexpr, TAU: tl.constexpr):
    """The numbers of transform, scale and head, by slot; a table's two slots are not numbers, and read as 0."""
    TABLES: tl.constexpr = (T_TABLES if PIECEWISE else 0) + (TAU_TABLES if TAU else 0)
    found = ()
    for slot in tl.static_range(LOSS_SLOTS):
        if (TABLES >> slot) & 1:
            found = found + (tl.zeros(row.shape, T),)
        elif slot >= DOMAIN_LOW:
            found = found + (shared(values, slot, MODES, T),)
        else:
            found = found + (number(values, slot, MODES, y, row, kept, T),)
    return found


@triton.jit
def upstream_of(pointer, stride, row, kept, T: tl.constexpr):
    """An upstream gradient of each row; 0 where there is none."""
    if pointer is None:
        found = tl.zeros(row.shape, T)
    else:
        found = tl.load(pointer + row.to(tl.int64) * stride, kept, 0.0).to(T)
    return found


# ---- what it leaves --------------------------------------------------------------------------------------------------


@triton.jit
def store_loss(losses, tile, row, rows, kept, by_class, by_row, nothing, REDUCTION: tl.constexpr):
    """Row losses, or their sum over the tile's rows. nothing: what no rows sum up to, 0 or NaN."""
    by_class = tl.where(kept, by_class, 0.0)
    by_row = tl.where(kept, by_row, 0.0)
    if REDUCTION == NONE:
        tl.store(losses + row, by_class + by_row, row < rows)
    else:
        loss = tl.sum(by_class + by_row, 0)
        tl.store(losses + tile.to(tl.int64), loss + nothing if REDUCTION == MEAN else loss)


@triton.jit
def store_stats(stats, row, rows, kept, exists, at, h, confidence, described, doubtful):
    """RowStats: logsumexp, log_prob, entropy, prediction, confidence, rank."""
    nll, _q, _p, _others, lse, _alone = at
    _doubts, above, first = described
    inside = row < rows
    tl.store(stats[0] + row, tl.where(kept, lse, 0.0), inside)
    tl.store(stats[1] + row, tl.where(kept, -nll, 0.0), inside)
    tl.store(stats[2] + row, tl.where(kept, h, 0.0), inside)
    tl.store(stats[3] + row, tl.where(kept & (doubtful == 0), first, -1).to(tl.int64), inside)
    confidence = tl.where(doubtful | (exists == 0), float("nan"), confidence)
    tl.store(stats[4] + row, tl.where(kept, confidence, 0.0), inside)
    tl.store(stats[5] + row, tl.where(kept, above, 0).to(tl.int64), inside)


@triton.jit
def store_parameters(
    by_parameter, bins, row, rows, kept, nll, by_s, s, high, norm, by_target, own, by_head, head, TWO: tl.constexpr,
    WANT: tl.constexpr,
):  # fmt: skip
    """The derivatives of each row's loss by the parameters in WANT, (slot, rows); tables: by the entry of its bin.

    A row that is NaN has NaN for each: its scale and its bins nobody knows.

    own, head: what transform_target and head_loss return.
    """
    known = nll == nll
    zero = tl.zeros_like(s)
    n = tl.where(TWO, norm, 1.0)
    for slot in tl.static_range(TRAINABLE_SLOTS):
        if (WANT >> slot) & 1:
            value = zero
            if slot == SCALE:
                value = tl.where(high, 0.0, by_s / n)
            elif slot == SCALE_HIGH:
                value = tl.where(high, by_s / n, 0.0)
            elif slot == LOGIT_NORM:
                value = -by_s * s / n
            elif slot >= TRANSFORM_A and slot <= NORM:
                value = by_target * own[2 + slot - TRANSFORM_A]
            elif slot >= HEAD_A:
                value = by_head * head[2 + slot - HEAD_A]
            place = tl.full((), slot, tl.int64) * rows
            tl.store(by_parameter + place + row, tl.where(kept, tl.where(known, value, nll), 0.0), row < rows)
    if bins is not None:
        tl.store(bins + row, tl.where(kept & known, own[6], 0), row < rows)
        tl.store(bins + rows + row, tl.where(kept & known, head[6], 0), row < rows)
