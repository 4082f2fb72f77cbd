"""Statistics of rows: of the classes that are not the label's, relative to m, the largest of their logits.

They are (m, s, whether that is the second of two scales); the sums (total, shift, weighted) of e_j = exp(s (u_j - m)),
of e_j (u_j - m) where SHIFTED, and under smoothing of w_j (u_j - m); and where DESCRIBED (doubts, above, first): how
many logits are NaN, how many larger than the label's, and the first class of the largest, the label's among them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import INF
from .elements import (
    LOG2_E,
    afresh,
    is_label,
    moved,
    of_row,
    of_thread,
    product,
    read_logits,
    row_sum,
    thread_max,
    thread_sum,
    tilted_sum,
)
from .finish import row_scale


@triton.jit
def statistics(
    u, col, valid, y, kept, target, known, scale, v, weight, smoothing,
    T: tl.constexpr, SHIFTED: tl.constexpr, DESCRIBED: tl.constexpr,
    CHUNKS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Of rows that a tile holds whole; and their e_j and u_j - m. known: (m, s, high), or None."""
    if known is None:
        m = tl.max(thread_max(u), 1)
        s, high = row_scale(scale, target - m, v)
    else:
        m, s, high = known
    d = u - of_row(tl.where(m == -INF, 0.0, m))
    weighted = tl.zeros(m.shape, T)
    if smoothing > 0:
        counted = tl.where(is_label(afresh(y, s), 0, CHUNKS, LANES, VECTOR) | (valid == 0), 0.0, d)
        if weight is not None:
            counted = product(counted, tl.load(weight + col, valid, 0.0).to(T))
        weighted = row_sum(counted)
    # After that: what is not needed beside the exponentials leaves them its registers.
    e = tl.exp2(d * of_row(tl.where(kept, s, 1.0) * LOG2_E))
    total, shift = weighted, tl.zeros(m.shape, T)
    if known is None:
        total = row_sum(e)
    if SHIFTED:
        # A class of probability 0 contributes 0, also when its logit is -inf.
        shift = row_sum(tl.where(e == 0, 0.0, e * d))
    doubts = tl.zeros(m.shape, tl.int32)
    above, first = doubts, doubts
    if DESCRIBED:
        again = is_label(afresh(y, s), 0, CHUNKS, LANES, VECTOR)
        doubts = row_sum((u != u).to(tl.int32))
        above = row_sum((u > of_row(target)).to(tl.int32))
        whole = tl.where(again, of_row(target), u)
        highest = tl.maximum(m, target)
        first = tl.where((whole == of_row(highest)) & valid, col, CHUNKS * LANES * VECTOR)
        first = tl.min(tl.min(tl.min(first, 0), 2), 1)
    return (m, s, high), (total, shift, weighted), (doubts, above, first), e, d


@triton.jit
def accumulated(
    source, blocks, y, target, low_scale, high_scale, weight, smoothing,
    T: tl.constexpr, TWO: tl.constexpr, SHIFTED: tl.constexpr, SECOND: tl.constexpr, DESCRIBED: tl.constexpr,
    WHOLE: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr, ACROSS: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Of rows that come block by block, what every thread finds in its own classes: the largest logit, sums relative to
    it at both scales, those of weights, and the description, the label's logit among them where WHOLE. SECOND: sums of
    e_j (u_j - m)^2, too."""
    classes = source[3]
    none = tl.zeros((ROWS, LANES), T)
    top = none - INF
    low_total, high_total, counted, seen = none, none, none, none
    low_shift, high_shift, low_second, high_second = none, none, none, none
    best = none - INF
    above = tl.zeros((ROWS, LANES), tl.int32)
    first, doubts = above + classes, above
    for block in range(blocks):
        start = block * (CHUNKS * LANES * VECTOR)
        _raw, u, col, valid = read_logits(source, start, T, CAPPED, WIDE, ACROSS, CHUNKS, LANES, VECTOR)
        mine = is_label(y, start, CHUNKS, LANES, VECTOR)
        u = tl.where(mine, -INF, u)
        higher = tl.maximum(top, thread_max(u))
        floor_here = tl.where(higher == -INF, 0.0, higher)
        rise = tl.where(top == -INF, 0.0, top - floor_here)  # <= 0
        d = u - of_thread(floor_here)
        if SECOND:
            low_second = moved(low_second, 2.0 * low_shift + rise * low_total, rise, low_scale)
            low_second += tilted_sum(d, d, low_scale)
            if TWO:
                high_second = moved(high_second, 2.0 * high_shift + rise * high_total, rise, high_scale)
                high_second += tilted_sum(d, d, high_scale)
        if SHIFTED:
            low_shift = moved(low_shift, low_total, rise, low_scale) + tilted_sum(d, None, low_scale)
            if TWO:
                high_shift = moved(high_shift, high_total, rise, high_scale) + tilted_sum(d, None, high_scale)
        low_total = low_total * tl.exp2(rise * low_scale) + thread_sum(tl.exp2(d * of_thread(low_scale)))
        if TWO:
            high_total = high_total * tl.exp2(rise * high_scale)
            high_total += thread_sum(tl.exp2(d * of_thread(high_scale)))
        if smoothing > 0:
            skipped = mine | (valid == 0)
            weights = tl.full((CHUNKS, ROWS, LANES, VECTOR), 1.0, T)
            if weight is not None:
                weights = tl.load(weight + col, valid, 0.0).to(T)
            weights = tl.where(skipped, 0.0, weights)
            counted += rise * seen + thread_sum(product(tl.where(skipped, 0.0, d), weights))
            seen += thread_sum(weights)
        if DESCRIBED:
            doubts += thread_sum((u != u).to(tl.int32))
            above += thread_sum((u > of_row(target)).to(tl.int32))
            described = u
            counts = valid
            if WHOLE:
                described = tl.where(mine, of_row(target), u)
            else:
                counts = valid & (mine == 0)
            peak = thread_max(described)
            place = tl.where((described == of_thread(peak)) & counts, col, classes)
            place = tl.min(tl.min(place, 0), 2)
            first = tl.where(peak > best, place, tl.where(peak == best, tl.minimum(first, place), first))
            best = tl.maximum(best, peak)
        top = higher
    sums = (low_total, high_total, low_shift, high_shift, low_second, high_second)
    return top, sums, (counted, seen), (doubts, above, first, best)


@triton.jit
def streamed_statistics(
    source, blocks, y, target, scale, v, weight, smoothing,
    T: tl.constexpr, TWO: tl.constexpr, SHIFTED: tl.constexpr, DESCRIBED: tl.constexpr, CAPPED: tl.constexpr,
    WIDE: tl.constexpr, ACROSS: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Of rows that come block by block. Every thread keeps a maximum and sums of its own; they meet once, after the
    last block. TWO: a row's scale is known only then, so that the sums are kept for both."""
    zero = tl.zeros(target.shape, T)
    low_scale = (row_scale(scale, zero - INF, v)[0] * LOG2_E)[:, None]
    high_scale = (row_scale(scale, zero + INF, v)[0] * LOG2_E)[:, None]
    top, sums, smoothed, described = accumulated(
        source, blocks, y, target, low_scale, high_scale, weight, smoothing,
        T, TWO, SHIFTED, False, DESCRIBED, True, CAPPED, WIDE, ACROSS, CHUNKS, ROWS, LANES, VECTOR,
    )  # fmt: skip
    low_total, high_total, low_shift, high_shift, _low_second, _high_second = sums
    counted, seen = smoothed
    m = tl.max(top, 1)
    s, high = row_scale(scale, target - m, v)
    floor = tl.where(m == -INF, 0.0, m)
    fall = tl.where(top == -INF, 0.0, top - floor[:, None])
    total = tl.sum(product(low_total, tl.exp2(fall * low_scale)), 1)
    if TWO:
        total = tl.where(high, tl.sum(product(high_total, tl.exp2(fall * high_scale)), 1), total)
    weighted = tl.sum(counted + fall * seen, 1)
    shift = zero
    if SHIFTED:
        shift = tl.sum(moved(low_shift, low_total, fall, low_scale), 1)
        if TWO:
            shift = tl.where(high, tl.sum(moved(high_shift, high_total, fall, high_scale), 1), shift)
    doubts = tl.zeros(m.shape, tl.int32)
    above, first = doubts, doubts
    if DESCRIBED:
        doubts, above = tl.sum(described[0], 1), tl.sum(described[1], 1)
        best = described[3]
        first = tl.min(tl.where(best == tl.max(best, 1)[:, None], described[2], source[3]), 1)
    return (m, s, high), (total, shift, weighted), (doubts, above, first)


@triton.jit
def streamed_sums(
    source, blocks, y, kept, floor, s, weight, smoothing,
    T: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
    ACROSS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """What an earlier visit of rows that come block by block has not saved: shift, and where WEIGHTED weighted."""
    shift, weighted = tl.zeros(s.shape, T), tl.zeros(s.shape, T)
    if SHIFTED:
        sharpness = (tl.where(kept, s, 1.0) * LOG2_E)[:, None]
        shift_here = tl.zeros((ROWS, LANES), T)
        for block in range(blocks):
            start = block * (CHUNKS * LANES * VECTOR)
            _raw, u, _col, _valid = read_logits(source, start, T, CAPPED, WIDE, ACROSS, CHUNKS, LANES, VECTOR)
            u = tl.where(is_label(y, start, CHUNKS, LANES, VECTOR), -INF, u)
            shift_here += tilted_sum(u - of_row(floor), None, sharpness)
        shift = tl.sum(shift_here, 1)
    if WEIGHTED:
        if smoothing > 0:
            for block in range(blocks):
                start = block * (CHUNKS * LANES * VECTOR)
                _raw, u, col, valid = read_logits(source, start, T, CAPPED, WIDE, ACROSS, CHUNKS, LANES, VECTOR)
                counted = tl.where(is_label(y, start, CHUNKS, LANES, VECTOR) | (valid == 0), 0.0, u - of_row(floor))
                if weight is not None:
                    counted = product(counted, tl.load(weight + col, valid, 0.0).to(T))
                weighted += row_sum(counted)
    return shift, weighted
