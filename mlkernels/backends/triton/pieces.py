"""Rows in pieces: what a tile of the classes adds to what is known of its rows, what follows from all of it, and the
gradient of a tile. For linear heads (``mlkernels/linear``), whose tiles are products that have just been made.

A tile (rows, classes) holds the classes from ``start`` on. A program takes a few rows, a warp each, and goes through
their part of the tile block by block: it is read once, and the gradient written once. What stands at the target does
not matter, and its gradient is 0: the target is apart. Ignored rows are not read.

What is known of rows is (numbers, rows) for coalesced accesses: ``reals`` hold M, V, W, then S, T and the second moment
at each scale that a row may have; ``wholes`` the lowest class at M, and how many logits are larger than the target's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import INF, LOGIT_NORM, NEED_SHIFT, ROW_SCALE, SMOOTHING, SOFTCAP, TWO_SCALE
from .elements import (
    ALONG_CLASSES,
    ALONG_ROWS,
    LOG2_E,
    by_place,
    is_label,
    moved,
    multiple,
    of_row,
    places,
    product,
    read_logits,
    row_offset,
    thread_sum,
)
from .finish import batch_of, by_scale, coefficients, entropy, finish, kind, row_loss, row_scale
from .operands import label_of, numbers, shared, store_parameters, upstream_of
from .rows import gradient_of
from .statistics import accumulated

#: The reals of a row: M, V, W, and then three sums per scale.
TOP, WEIGHTED, WEIGHTS, SUMS = (tl.constexpr(i) for i in range(4))
#: The wholes.
FIRST, ABOVE = tl.constexpr(0), tl.constexpr(1)
#: The coefficients of a row: a, b, d, g, s, M; and what its gradient has lost to rounding, which starts as 0.
FACTOR, SLOPE, SPREAD, OWN, SHARPNESS, RELATIVE, LOST = (tl.constexpr(i) for i in range(7))
COEFFICIENTS = tl.constexpr(7)
#: What is finished: the two terms of the loss, logsumexp, log p and entropy.
FINISHED = tl.constexpr(5)

DATA = ["rows", "classes", "every_class", "ignore_index", "start"]
UNALIGNED = ["stride", "out_stride"]


@triton.jit
def tile_rows(target, start, rows, classes, every_class, ignore_index, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """A program's rows: which they are, whether they are there and count, and where in the tile their label is, or
    -1."""
    tile = tl.program_id(0)
    row = (tile.to(tl.int64) if WIDE else tile) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    y, kept, _exists = label_of(tl.load(target + row, inside, 0), inside, every_class, ignore_index)
    local = y - start
    return row, inside, kept, tl.where((local >= 0) & (local < classes), local, -1).to(tl.int32)


@triton.jit(do_not_specialize=DATA, do_not_specialize_on_alignment=UNALIGNED)
def piece_statistics(
    tile,  # (rows, classes), rows stride apart
    target,  # (rows)
    target_logit,  # (rows): u_y, which is not in the tile
    scales,  # (1 or 2, rows)
    row_factor, column_factor,  # (rows), (classes), or None both
    vectors,  # of every class, as in rows.visit()
    reals, wholes,  # what is known, to which the tile is added
    values,  # numbers of the loss, see operands.number()
    rows, classes, every_class, ignore_index: tl.int64, stride, start: tl.int64,
    MODES: tl.constexpr, TWO: tl.constexpr, SHIFTED: tl.constexpr, SECOND: tl.constexpr, DESCRIBED: tl.constexpr,
    SMOOTHED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Adds a tile to what is known of its rows; reads each of its elements once.

    SHIFTED: T is wanted. SECOND: and the second moment. DESCRIBED: and the wholes. SMOOTHED: and V and W. UNIT: what
    the tile's classes, row stride and address are a multiple of; ALIGNED: what start is.
    """
    T: tl.constexpr = tl.float64 if tile.dtype.element_ty == tl.float64 else tl.float32
    classes = multiple(classes, UNIT)
    row, inside, kept, y = tile_rows(target, start, rows, classes, every_class, ignore_index, WIDE, ROWS)
    base = row_offset(row, (1, 1), (1, stride, 0, 0), UNIT, 1, 0)
    begins = multiple(start, ALIGNED)
    weight = vectors[0]
    if weight is not None:
        weight += begins
    preparation = (shared(values, SOFTCAP, MODES, T), begins, vectors)
    smoothing = 1.0 if SMOOTHED else 0.0
    at_target = tl.load(target_logit + row, inside, 0.0)
    apart = rows.to(tl.int64)
    low = tl.load(scales + row, kept, 1.0) * LOG2_E
    high = low
    if TWO:
        high = tl.load(scales + apart + row, kept, 1.0) * LOG2_E
    source = (tile, base, kept, classes, preparation, (1, stride, 0, 0), None)
    if column_factor is not None:
        factors = (tl.load(row_factor + row, inside, 1.0).to(T), column_factor)
        source = (tile, base, kept, classes, preparation, (1, stride, 0, 0), factors)
    top, sums, smoothed, described = accumulated(
        source, tl.cdiv(classes, CHUNKS * LANES * VECTOR), y, at_target, low[:, None], high[:, None],
        weight, smoothing,
        T, TWO, SHIFTED, SECOND, DESCRIBED, False, CAPPED, WIDE, 0, CHUNKS, ROWS, LANES, VECTOR,
    )  # fmt: skip

    known = reals + row
    before = tl.load(known, inside, 0.0)
    here = tl.max(top, 1)
    m = tl.where(before == before, tl.maximum(before, here), before)
    floor = tl.where(m == -INF, 0.0, m)
    move = tl.where(before == -INF, 0.0, before - floor)
    fall = tl.where(top == -INF, 0.0, top - floor[:, None])
    SCALES: tl.constexpr = 2 if TWO else 1
    doubtful = m != m
    for k in tl.static_range(SCALES):
        sharpness = high if k else low
        at = known + (SUMS + k) * apart
        total = tl.load(at, inside, 0.0)
        fade = tl.exp2(move * sharpness)
        if SHIFTED:
            at_shift = at + SCALES * apart
            shift = tl.load(at_shift, inside, 0.0)
            if SECOND:
                at_second = at_shift + SCALES * apart
                second = moved(tl.load(at_second, inside, 0.0), 2.0 * shift + move * total, move, sharpness)
                middle = 2.0 * sums[2 + k] + fall * sums[k]
                second += tl.sum(moved(sums[4 + k], middle, fall, sharpness[:, None]), 1)
                tl.store(at_second, second, inside)
            shift = moved(shift, total, move, sharpness)
            shift += tl.sum(moved(sums[2 + k], sums[k], fall, sharpness[:, None]), 1)
            tl.store(at_shift, shift, inside)
        total = tl.where(fade == 0, 0.0, product(fade, total))
        total += tl.sum(product(sums[k], tl.exp2(fall * sharpness[:, None])), 1)
        tl.store(at, total, inside)
        if k == 0:
            # A NaN, which maxima pass over and sums carry; but not one that is the scale's.
            doubtful = doubtful | ((total != total) & (low == low) & (m < INF))
    if SMOOTHED:
        seen = tl.load(known + WEIGHTS * apart, inside, 0.0)
        weighted = tl.load(known + WEIGHTED * apart, inside, 0.0) + tl.where(seen == 0, 0.0, product(move, seen))
        weighted += tl.sum(smoothed[0] + product(fall, smoothed[1]), 1)
        tl.store(known + WEIGHTED * apart, weighted, inside)
        tl.store(known + WEIGHTS * apart, seen + tl.sum(smoothed[1], 1), inside)
    tl.store(known, tl.where(doubtful, float("nan"), m), inside)
    if DESCRIBED:
        facts = wholes + row
        first = tl.load(facts + FIRST * apart, inside, 0)
        found = tl.min(tl.where(described[3] == here[:, None], described[2], classes), 1)
        found = tl.where(found < classes, start + found, every_class)
        first = tl.where(here > before, found, tl.where(here == before, tl.minimum(first, found), first))
        tl.store(facts + FIRST * apart, tl.where(doubtful, every_class, first), inside)
        above = tl.load(facts + ABOVE * apart, inside, 0)
        tl.store(facts + ABOVE * apart, above + tl.sum(described[1], 1), inside)


@triton.jit(do_not_specialize=DATA, do_not_specialize_on_alignment=UNALIGNED)
def piece_gradient(
    tile,  # (rows, classes), rows stride apart
    out,  # the same, of any floating dtype, rows out_stride apart
    target,  # (rows)
    row_coefficients,  # (COEFFICIENTS, rows)
    row_factor, column_factor,  # (rows), (classes), or None both
    vectors,  # of every class, as in rows.visit()
    values,  # numbers of the loss, see operands.number()
    rows, classes, every_class, ignore_index: tl.int64, stride, out_stride, start: tl.int64,
    MODES: tl.constexpr, TILTED: tl.constexpr, SMOOTHED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile, 0 at the target and in ignored rows; reads and writes each element once. In bfloat16 by
    place, and what that loses of a row is added to what it has lost: no other program has the row."""
    T: tl.constexpr = tl.float64 if tile.dtype.element_ty == tl.float64 else tl.float32
    classes = multiple(classes, UNIT)
    row, inside, kept, y = tile_rows(target, start, rows, classes, every_class, ignore_index, WIDE, ROWS)
    base = row_offset(row, (1, 1), (1, stride, 0, 0), UNIT, 1, 0)
    out_base = row_offset(row, (1, 1), (1, out_stride, 0, 0), UNIT, 1, 0)
    begins = multiple(start, ALIGNED)
    weight = vectors[0]
    if weight is not None:
        weight += begins
    preparation = (shared(values, SOFTCAP, MODES, T), begins, vectors)
    smoothing = 1.0 if SMOOTHED else 0.0
    apart = rows.to(tl.int64)
    at = row_coefficients + row
    zero = tl.zeros((ROWS,), T)
    tilt, spread = zero, zero
    factor = tl.load(at + FACTOR * apart, kept, 0.0)
    if TILTED:
        tilt = tl.load(at + SLOPE * apart, kept, 0.0)
    if SMOOTHED:
        spread = tl.load(at + SPREAD * apart, kept, 0.0)
    sharpness = of_row(tl.load(at + SHARPNESS * apart, kept, 1.0) * LOG2_E)
    top = tl.load(at + RELATIVE * apart, kept, 0.0)
    floor = of_row(tl.where(top == -INF, 0.0, top))
    source = (tile, base, kept, classes, preparation, (1, stride, 0, 0), None)
    if column_factor is not None:
        factors = (tl.load(row_factor + row, inside, 1.0).to(T), column_factor)
        source = (tile, base, kept, classes, preparation, (1, stride, 0, 0), factors)
    PLACED: tl.constexpr = out.dtype.element_ty == tl.bfloat16
    fractions = row.to(tl.uint32) * ALONG_ROWS + begins.to(tl.uint32) * ALONG_CLASSES
    lost = tl.zeros((ROWS, LANES), T)
    BLOCK: tl.constexpr = CHUNKS * LANES * VECTOR
    for block in range(tl.cdiv(classes, BLOCK)):
        first = block * BLOCK
        raw, u, col, valid = read_logits(source, first, T, CAPPED, WIDE, 0, CHUNKS, LANES, VECTOR)
        mine = is_label(y, first, CHUNKS, LANES, VECTOR)
        u = tl.where(mine, -INF, u)
        if CAPPED:
            raw = tl.where(mine, 0.0, raw)
        d = u - floor
        e = tl.exp2(d * sharpness)
        g = gradient_of(
            first, kept, y, raw, e, d, (factor, tilt, spread, zero), weight, smoothing, preparation[0], col, valid,
            source[6], T, TILTED, CAPPED, 0, CHUNKS, LANES, VECTOR,
        )  # fmt: skip
        if PLACED:
            exact = g
            g = by_place(g, of_row(fractions), col)
            rest = exact - g
            if SMOOTHED:  # elsewhere what is behind the last class is 0
                rest = tl.where(valid, rest, 0.0)
            lost += thread_sum(rest)
        place = places(out, out_base, col, 1, WIDE, 0, LANES, VECTOR)
        tl.store(place, g.to(out.dtype.element_ty), of_row(inside) & valid)
    if PLACED:
        so_far = tl.load(at + LOST * apart, inside, 0.0)
        tl.store(at + LOST * apart, so_far + tl.sum(lost, 1), inside)


@triton.jit(do_not_specialize=["rows", "classes", "apart", "t_bins", "tau_bins", "groups", "structure", "ignore_index"])
def row_finish(
    target,  # (rows)
    target_logit,  # (rows): u_y
    known,  # M, S, T, second moment, V, W: (rows) or (scales, rows), rows of these apart; each but M and S or None
    values, t_tables, tau_tables, group, weight,  # of the loss, as in rows.visit()
    upstream,  # the upstream gradients of what is finished, (rows) each or None
    # results, each but the first or None
    finished,  # (FINISHED, rows)
    row_coefficients,  # (COEFFICIENTS, rows)
    by_parameter,  # (TRAINABLE_SLOTS, rows)
    bins,  # (2, rows)
    rows, classes, apart, t_bins, tau_bins, groups, structure, ignore_index: tl.int64,
    MODES: tl.constexpr, WANT: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From what is known of all classes to each row's loss, to the coefficients of its gradient, and to the derivatives
    by the loss's parameters. What is finished of an ignored row is 0, and so are its coefficients."""
    T: tl.constexpr = target_logit.dtype.element_ty
    PIECEWISE: tl.constexpr = t_tables is not None
    TAU: tl.constexpr = tau_tables is not None
    if t_tables is not None:
        t_tables = (t_tables[0], t_tables[1], t_bins, groups)
    if tau_tables is not None:
        tau_tables = (tau_tables[0], tau_tables[1], tau_bins, groups)
    scale = kind(structure, ROW_SCALE)
    smoothing = shared(values, SMOOTHING, MODES, T)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    y, kept, exists = label_of(tl.load(target + row, inside, 0), inside, classes, ignore_index)
    v = numbers(values, MODES, y, row, exists, T, PIECEWISE, TAU)
    own_group = tl.zeros(row.shape, tl.int64)
    if group is not None:
        own_group = tl.load(group + row, kept, 0).to(tl.int64)
    w_y = tl.full(row.shape, 1.0, T)
    if weight is not None:
        w_y = tl.load(weight + y, exists, 1.0).to(T)

    # ---- statistics
    zero = tl.zeros(row.shape, T)
    at_target = tl.load(target_logit + row, exists, float("nan"))
    m = tl.load(known[0] + row, kept, 0.0)
    s, high = row_scale(scale, at_target - m, v)
    place = row.to(tl.int64)
    if TWO:
        place += tl.where(high, apart, 0)
    total = tl.load(known[1] + place, kept, 1.0)
    shift, second, weighted, every_weight = zero, zero, zero, zero + w_y
    if known[2] is not None:
        shift = tl.load(known[2] + place, kept, 0.0)
    if known[3] is not None:
        second = tl.load(known[3] + place, kept, 0.0)
    if known[4] is not None:
        weighted = tl.load(known[4] + row, kept, 0.0)
        every_weight += tl.load(known[5] + row, kept, 0.0)
    log_sum = tl.log(total)
    share = tl.where(total == 0, 0.0, 1.0 / total)

    # ---- finish
    own, at, head = finish(structure, at_target, m, log_sum, s, v, own_group, t_tables, tau_tables, T, PIECEWISE, TAU)
    h = None
    if known[2] is not None:
        h = entropy(share, s, at, shift)
    batch = batch_of(values, MODES, T, classes, smoothing, every_weight)
    by_class, by_row = row_loss(batch, s, at, head[0], w_y, weighted)
    results = (by_class, by_row, at[4], -at[0], zero if h is None else h)
    for i in tl.static_range(FINISHED):
        tl.store(finished + i * rows.to(tl.int64) + row, tl.where(kept, results[i], 0.0), inside)

    # ---- coefficients
    if row_coefficients is not None or by_parameter is not None:
        up = (
            upstream_of(upstream[0], 1, row, kept, T), upstream_of(upstream[1], 1, row, kept, T),
            upstream_of(upstream[2], 1, row, kept, T), upstream_of(upstream[3], 1, row, kept, T),
        )  # fmt: skip
        g_h = None
        if upstream[4] is not None:
            g_h = upstream_of(upstream[4], 1, row, kept, T)
        of_gradient, z = coefficients(batch, share, s, own[1], at, h, head[1], w_y, up, g_h)
        if row_coefficients is not None:
            top = tl.where(m < INF, m, float("nan"))  # else a probability of 0 would be left out of a row that is NaN
            results = (of_gradient[0], of_gradient[1], of_gradient[2], of_gradient[3], s, top, zero)
            for i in tl.static_range(COEFFICIENTS):
                value = tl.where(kept, results[i], 0.0)
                tl.store(row_coefficients + i * rows.to(tl.int64) + row, value, inside)
        if by_parameter is not None:
            by_s = zero
            if NEED_SHIFT & WANT:
                by_s = by_scale(classes, every_weight, share, m, s, own[0], at, h, w_y, weighted, shift, second, g_h, z)
            by_head = up[0] * (1.0 - smoothing) * w_y
            store_parameters(
                by_parameter, bins, row, rows, kept, at[0], by_s, s, high, v[LOGIT_NORM], s * z[3], own, by_head,
                head, scale == TWO_SCALE, WANT,
            )  # fmt: skip
