"""The kernels that touch N x C elements: a row's statistics, and its gradient. They know nothing of losses.

``on_chip`` holds whole rows in registers: one read, and where a gradient is wanted one write; one exponential per
element. ``streamed`` takes longer rows block by block: statistics in one pass, and the gradient in a second one that
walks backwards, so that it starts with what is still in the cache. Both take a tile of rows, so that many short rows
fill a program, and rows whose classes lie apart, (N, C, d1, ...), are read along d.

No result depends on the rows beside it: block sizes are chosen from C and the strides alone. Nothing is accumulated by
atomics: a program writes the sum of its own rows, ``total`` adds those up in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import spec
from .finish import (
    INF,
    TWO_SCALE,
    by_scale,
    head_loss,
    locate,
    row_gradient,
    row_loss,
    row_scale,
    tanh,
    transform_target,
)

NONE = tl.constexpr(int(spec.Reduction.NONE))
MEAN = tl.constexpr(int(spec.Reduction.MEAN))
LOG2_E = tl.constexpr(1.4426950408889634)  # exp is the hardware's exp2 of that, which a row's scale can take in
TRAINABLE = tl.constexpr(int(spec.Slot.HEAD_D) + 1)

#: How a number reaches a kernel, two bits a slot: by value, through a pointer, one per class, one per row.
BY_VALUE, SHARED, PER_CLASS, PER_ROW = 0, 1, 2, 3
#: The slots whose gradient needs the mean logit.
NEED_SHIFT = tl.constexpr(1 << spec.Slot.SCALE | 1 << spec.Slot.SCALE_HIGH | 1 << spec.Slot.LOGIT_NORM)
#: How many partial sums of weights there are at most; every program adds them up for itself.
PARTS = tl.constexpr(64)


# ---- what a row is given ---------------------------------------------------------------------------------------------


@triton.jit
def multiple(number, UNIT: tl.constexpr):
    """A number that is a multiple of UNIT, told so that the compiler sees it: Triton itself looks for 16 only, and 1000
    classes would be read one by one."""
    if UNIT > 1:
        number = number // UNIT * UNIT
    return number


@triton.jit
def row_offset(row, sizes, strides, WIDE: tl.constexpr, UNIT: tl.constexpr):
    """Where rows begin, in elements. sizes: (d1, d2) of (N, d1, d2); strides: (class, N, d1, d2)."""
    if WIDE:
        row = row.to(tl.int64)
    inner = row % sizes[1]
    rest = row // sizes[1]
    outer = rest // sizes[0] * multiple(strides[1], UNIT) + rest % sizes[0] * multiple(strides[2], UNIT)
    return outer + inner * multiple(strides[3], UNIT)


@triton.jit
def number(values, SLOT: tl.constexpr, MODES: tl.constexpr, y, row, kept, T: tl.constexpr):
    """A number of the loss, per row. An ignored row's own is not read."""
    MODE: tl.constexpr = (MODES >> (2 * SLOT)) & 3
    if MODE == 0:
        found = tl.full(row.shape, values[SLOT], T)
    elif MODE == 1:
        found = tl.load(values[SLOT]).to(T) + tl.zeros(row.shape, T)
    elif MODE == 2:
        found = tl.load(values[SLOT] + y, kept, 1.0).to(T)
    else:
        found = tl.load(values[SLOT] + row, kept, 1.0).to(T)
    return found


@triton.jit
def shared(values, SLOT: tl.constexpr, MODES: tl.constexpr, T: tl.constexpr):
    """A number that is the same for all rows, by value or (in float64) through a pointer: a scalar."""
    if (MODES >> (2 * SLOT)) & 3 == 0:
        found = tl.full((), values[SLOT], T)
    else:
        found = tl.load(values[SLOT]).to(T)
    return found


@triton.jit
def numbers(values, MODES: tl.constexpr, y, row, kept, T: tl.constexpr, PIECEWISE: tl.constexpr, TAU: tl.constexpr):
    """The numbers by slot, up to TAU_MIN; a table's two slots are not numbers, and read as 0."""
    zero = tl.zeros(row.shape, T)
    if PIECEWISE:
        a, b = zero, zero
    else:
        a = number(values, 4, MODES, y, row, kept, T)
        b = number(values, 5, MODES, y, row, kept, T)
    if TAU:
        d, e = zero, zero
    else:
        d = number(values, 8, MODES, y, row, kept, T)
        e = number(values, 9, MODES, y, row, kept, T)
    return (
        number(values, 0, MODES, y, row, kept, T),
        number(values, 1, MODES, y, row, kept, T),
        number(values, 2, MODES, y, row, kept, T),
        number(values, 3, MODES, y, row, kept, T),
        a,
        b,
        number(values, 6, MODES, y, row, kept, T),
        number(values, 7, MODES, y, row, kept, T),
        d,
        e,
        number(values, 10, MODES, y, row, kept, T),
        number(values, 11, MODES, y, row, kept, T),
        shared(values, 12, MODES, T),
        shared(values, 13, MODES, T),
        shared(values, 14, MODES, T),
    )


@triton.jit
def label_of(target, row, rows, classes, ignore_index):
    """Each row's class, whether the row counts, and whether its class exists (else 0 stands for it)."""
    y = tl.load(target + row, row < rows, 0).to(tl.int64)
    kept = (row < rows) & (y != ignore_index)
    exists = kept & (y >= 0) & (y < classes)
    return tl.where(exists, y, 0).to(tl.int32), kept, exists


@triton.jit
def prepared(u, cap, adjustment, col, valid, T: tl.constexpr, CAPPED: tl.constexpr):
    """Logits after softcap and adjustment."""
    if CAPPED:
        u = tl.where(u == INF, float("nan"), cap * tanh(u / cap))  # tanh would hide an overflow
    if adjustment is not None:
        u += tl.load(adjustment + col, valid, 0.0).to(T)
    return u


@triton.jit
def prepared_load(pointers, mask, adjustment, at, cap, T: tl.constexpr, CAPPED: tl.constexpr):
    """The same for one logit of each row; NaN where there is none."""
    u = tl.load(pointers, mask, float("nan")).to(T)
    if CAPPED:
        u = tl.where(u == INF, float("nan"), cap * tanh(u / cap))
    if adjustment is not None:
        u += tl.load(adjustment + at, mask, 0.0).to(T)
    return u


@triton.jit
def upstream_of(pointers, strides, divisors, row, kept, T: tl.constexpr, REDUCTION: tl.constexpr):
    """The upstream gradients of a row's loss (per class weight, per row), logsumexp and log_prob."""
    zero = tl.zeros(row.shape, T)
    g_loss = zero + 1.0
    if pointers[0] is not None:
        g_loss = tl.load(pointers[0] + row.to(tl.int64) * strides[0], kept, 0.0).to(T)
    elif pointers[1] is not None or pointers[2] is not None:
        g_loss = zero
    g_class, g_row = g_loss, g_loss
    if REDUCTION == MEAN:
        part = tl.arange(0, PARTS)
        here = part < divisors[1]
        g_class = g_loss * (1.0 / tl.sum(tl.load(divisors[0] + 2 * part, here, 0.0), 0)).to(T)
        g_row = g_loss * (1.0 / tl.sum(tl.load(divisors[0] + 2 * part + 1, here, 0.0), 0)).to(T)
    g_lse, g_log_prob = zero, zero
    if pointers[1] is not None:
        g_lse = tl.load(pointers[1] + row.to(tl.int64) * strides[1], kept, 0.0).to(T)
    if pointers[2] is not None:
        g_log_prob = tl.load(pointers[2] + row.to(tl.int64) * strides[2], kept, 0.0).to(T)
    return g_class, g_row, g_lse, g_log_prob


# ---- what a row leaves -----------------------------------------------------------------------------------------------


@triton.jit
def leave_loss(losses, row, rows, kept, by_class, by_row, REDUCTION: tl.constexpr):
    """Row losses, or their sum over the program's rows."""
    by_class = tl.where(kept, by_class, 0.0)
    by_row = tl.where(kept, by_row, 0.0)
    if REDUCTION == NONE:
        tl.store(losses + row, by_class + by_row, row < rows)
    else:
        at = losses + 2 * tl.program_id(0)
        tl.store(at, tl.sum(by_class, 0))
        tl.store(at + 1, tl.sum(by_row, 0))


@triton.jit
def leave_stats(stats, row, rows, kept, exists, lse, nll, confidence, first, above, doubtful):
    """RowStats: logsumexp, log_prob, prediction, confidence, rank."""
    inside = row < rows
    tl.store(stats[0] + row, tl.where(kept, lse, 0.0), inside)
    tl.store(stats[1] + row, tl.where(kept, -nll, 0.0), inside)
    tl.store(stats[2] + row, tl.where(kept & (doubtful == 0), first, -1).to(tl.int64), inside)
    confidence = tl.where(doubtful | (exists == 0), float("nan"), confidence)
    tl.store(stats[3] + row, tl.where(kept, confidence, 0.0), inside)
    tl.store(stats[4] + row, tl.where(kept, above, 0).to(tl.int64), inside)


@triton.jit
def leave_parameters(
    by_parameter, bins, row, rows, kept, by_s, s, high, norm, by_target, target_parts, by_head, head_parts,
    t_bin, tau_bin, TWO: tl.constexpr, WANT: tl.constexpr,
):  # fmt: skip
    """The derivatives of each row's loss by the parameters in WANT, (slot, rows); tables: by the entry of its bin."""
    zero = tl.zeros_like(s)
    n = tl.where(TWO, norm, 1.0)
    for slot in tl.static_range(TRAINABLE):
        if (WANT >> slot) & 1:
            value = zero
            if slot == 0:
                value = tl.where(high, 0.0, by_s / n)
            elif slot == 1:
                value = tl.where(high, by_s / n, 0.0)
            elif slot == 3:
                value = -by_s * s / n
            elif slot >= 4 and slot <= 7:
                value = by_target * target_parts[slot - 4]
            elif slot >= 8:
                value = by_head * head_parts[slot - 8]
            place = tl.full((), slot, tl.int64) * rows
            tl.store(by_parameter + place + row, tl.where(kept, value, 0.0), row < rows)
    if bins is not None:
        tl.store(bins + row, tl.where(kept, t_bin, 0), row < rows)
        tl.store(bins + rows + row, tl.where(kept, tau_bin, 0), row < rows)


# ---- rows that fit in registers --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["structure", "ignore_index"])
def on_chip(
    # data
    input,  # (rows, classes) by in_strides
    target,  # (rows)
    values,  # 18 numbers, each by value or a pointer; see number()
    t_tables, tau_tables,  # (slope, bias, bins, groups) of a piecewise t and of tau, each or None
    group,  # (rows) or None
    weight,  # (classes) or None
    weight_sum,  # its sum; or None
    adjustment,  # (classes) or None
    divisors,  # (parts, 2): sums of weights and of rows, and how many parts; for MEAN
    upstream,  # the upstream gradients of loss, logsumexp and log_prob, each or None
    saved,  # (rows, 2): m and log_sum of an earlier visit, or None
    # results, each or None
    losses,  # (rows), or (programs, 2) where it is reduced
    save,  # (rows, 2)
    stats,  # RowStats, (rows) each
    gradient,  # as input, by out_strides
    by_parameter,  # (11, rows)
    bins,  # (2, rows)
    # shapes
    rows, classes, sizes,
    # strides
    in_strides, out_strides, upstream_strides,
    # the loss: transform, scale, head, beyond_pi, gradient, clamp
    structure, ignore_index,
    MODES: tl.constexpr, WANT: tl.constexpr, REDUCTION: tl.constexpr, CAPPED: tl.constexpr, CONDITIONAL: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr, ACROSS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile of whole rows: reads each logit once (1u), writes each gradient once (1u). C <= COLS.

    CONDITIONAL: nothing is done where the upstream gradient is 1, for which the results are there already.
    UNIT: a divisor of C and of all row strides. ACROSS: it is rows that are neighbours in memory; ignored ones are then
    read with their neighbours, and dropped.
    """
    if CONDITIONAL:
        if tl.load(upstream[0]) == 1.0:
            return
    classes = multiple(classes, UNIT)
    T: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    PIECEWISE: tl.constexpr = t_tables is not None
    TAU: tl.constexpr = tau_tables is not None
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y, kept, exists = label_of(target, row, rows, classes, ignore_index)
    v = numbers(values, MODES, y, row, exists, T, PIECEWISE, TAU)
    cap = shared(values, 17, MODES, T)
    own_group = tl.zeros_like(row)
    if group is not None:
        own_group = tl.load(group + row, kept, 0).to(tl.int32)

    col = tl.arange(0, COLS)
    valid = col < classes
    if WIDE:
        at = col.to(tl.int64) * in_strides[0]
    else:
        at = col * in_strides[0]
    base = row_offset(row, sizes, in_strides, WIDE, UNIT)
    read = row < rows if ACROSS else kept
    raw = tl.load(input + base[:, None] + at[None, :], read[:, None] & valid[None, :], -INF).to(T)
    own = input + base + (y.to(tl.int64) * in_strides[0] if WIDE else y * in_strides[0])
    at_target = prepared_load(own, exists, adjustment, y, cap, T, CAPPED)
    u = prepared(raw, cap, adjustment, col[None, :], valid[None, :], T, CAPPED)
    is_target = col[None, :] == y[:, None]
    u = tl.where(is_target | (valid[None, :] == 0), -INF, u)

    if saved is not None:
        m = tl.load(saved + 2 * row, kept, 0.0)
    else:
        m = tl.max(u, 1)
    confidence = at_target - m
    s, high = row_scale(structure[1], confidence, v)
    s = tl.where(kept, s, 1.0)
    floor = tl.where(m == -INF, 0.0, m)
    d = u - floor[:, None]
    w_y = tl.full(row.shape, 1.0, T)
    every_weight = tl.full((), classes, T)
    if weight is not None:
        w_y = tl.load(weight + y, exists, 1.0).to(T)
        if weight_sum is not None:
            every_weight = tl.load(weight_sum).to(T)
    smoothing = shared(values, 15, MODES, T)
    z_loss = shared(values, 16, MODES, T)
    weighted = tl.zeros(row.shape, T)
    if smoothing > 0:
        counted = tl.where(is_target | (valid[None, :] == 0), 0.0, d)
        if weight is not None:
            counted = counted * tl.load(weight + col, valid, 0.0).to(T)[None, :]
        weighted = tl.sum(counted, 1)
    # After that: what is not needed beside the exponentials leaves them its registers.
    e = tl.exp2(d * (s * LOG2_E)[:, None])
    if saved is not None:
        log_sum = tl.load(saved + 2 * row + 1, kept, 0.0)
        share = tl.where(log_sum == -INF, 0.0, tl.exp(-log_sum))
    else:
        total = tl.sum(e, 1)
        log_sum = tl.log(total)
        share = tl.where(total == 0, 0.0, 1.0 / total)

    t, slope, ta, tb, tc, tn, t_bin = transform_target(
        structure[0], structure[3], structure[4], at_target, v, own_group, t_tables, T, PIECEWISE
    )
    nll, q, p, others, lse, alone = locate(at_target, m, log_sum, s, t)
    phi, w, ha, hb, hc, hd, tau_bin = head_loss(structure[2], structure[5], nll, v, own_group, tau_tables, T, TAU)
    if losses is not None:
        by_class, by_row = row_loss(
            classes, smoothing, z_loss, every_weight, s, nll, others, lse, alone, phi, w_y, weighted
        )
        leave_loss(losses, row, rows, kept, by_class, by_row, REDUCTION)
    if save is not None:
        tl.store(save + 2 * row, tl.where(kept, m, 0.0), row < rows)
        tl.store(save + 2 * row + 1, tl.where(kept, log_sum, 0.0), row < rows)
    if stats is not None:
        doubtful = (tl.sum((u != u).to(tl.int32), 1) > 0) | (at_target != at_target)
        above = tl.sum((u > at_target[:, None]).to(tl.int32), 1)
        highest = tl.maximum(m, at_target)
        whole = tl.where(is_target, at_target[:, None], u)
        first = tl.min(tl.where((whole == highest[:, None]) & valid[None, :], col[None, :], COLS), 1)
        leave_stats(stats, row, rows, kept, exists, lse, nll, confidence, first, above, doubtful & exists)

    if gradient is not None or by_parameter is not None:
        g_class, g_row, g_lse, g_log_prob = upstream_of(upstream, upstream_strides, divisors, row, kept, T, REDUCTION)
        factor, spread, own_gradient, pull, part, flat, dz_y = row_gradient(
            classes, smoothing, z_loss, every_weight, share, s, slope, q, p, lse, alone, w, w_y,
            g_class, g_row, g_lse, g_log_prob,
        )  # fmt: skip
        if by_parameter is not None:
            shift = tl.zeros(row.shape, T)
            if NEED_SHIFT & WANT:
                # A class of probability 0 contributes 0, also when its logit is -inf.
                shift = tl.sum(tl.where(e == 0, 0.0, e * d), 1)
            by_s = by_scale(alone, m, share, t, p, q, pull, part, flat, w_y, every_weight, shift, weighted)
            by_head = g_class * (1.0 - smoothing) * w_y
            leave_parameters(
                by_parameter, bins, row, rows, kept, by_s, s, high, v[3], s * dz_y, (ta, tb, tc, tn), by_head,
                (ha, hb, hc, hd), t_bin, tau_bin, structure[1] == TWO_SCALE, WANT,
            )  # fmt: skip
        if gradient is not None:
            # An ignored row was read as -inf: its exponentials are 0, and so is all that they are multiplied by.
            factor, spread = tl.where(kept, factor, 0.0), tl.where(kept, spread, 0.0)
            own_gradient = tl.where(kept, own_gradient, 0.0)
            g = e * factor[:, None]
            if smoothing > 0:
                if weight is not None:
                    g -= spread[:, None] * tl.load(weight + col, valid, 0.0).to(T)[None, :]
                else:
                    g -= spread[:, None]
            g = tl.where(is_target, own_gradient[:, None], g)
            if CAPPED:
                slack = tanh(raw / cap)
                g = g * ((1.0 - slack) * (1.0 + slack))
            if ACROSS:
                g = tl.where(kept[:, None], g, 0.0)
            if WIDE:
                to = col.to(tl.int64) * out_strides[0]
            else:
                to = col * out_strides[0]
            base = row_offset(row, sizes, out_strides, WIDE, UNIT)
            place = gradient + base[:, None] + to[None, :]
            tl.store(place, g.to(gradient.dtype.element_ty), (row < rows)[:, None] & valid[None, :])


# ---- longer rows -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["structure", "ignore_index"])
def streamed(
    input, target, values, t_tables, tau_tables, group, weight, weight_sum, adjustment, divisors, upstream, saved,
    losses, save, stats, gradient, by_parameter, bins,
    rows, classes, sizes,
    in_strides, out_strides, upstream_strides,
    structure, ignore_index,
    MODES: tl.constexpr, WANT: tl.constexpr, REDUCTION: tl.constexpr, CAPPED: tl.constexpr, CONDITIONAL: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr, ACROSS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    TWO: tl.constexpr,
):  # fmt: skip
    """The same for rows of any length: statistics in one pass (1u), the gradient in one backwards (2u).

    TWO: the row's scale is known only after its maximum, so the sum is kept for both scales.
    """
    if CONDITIONAL:
        if tl.load(upstream[0]) == 1.0:
            return
    classes = multiple(classes, UNIT)
    T: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    PIECEWISE: tl.constexpr = t_tables is not None
    TAU: tl.constexpr = tau_tables is not None
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y, kept, exists = label_of(target, row, rows, classes, ignore_index)
    v = numbers(values, MODES, y, row, exists, T, PIECEWISE, TAU)
    cap = shared(values, 17, MODES, T)
    own_group = tl.zeros_like(row)
    if group is not None:
        own_group = tl.load(group + row, kept, 0).to(tl.int32)
    base = row_offset(row, sizes, in_strides, WIDE, UNIT)
    own = input + base + (y.to(tl.int64) * in_strides[0] if WIDE else y * in_strides[0])
    at_target = prepared_load(own, exists, adjustment, y, cap, T, CAPPED)
    smoothing = shared(values, 15, MODES, T)
    z_loss = shared(values, 16, MODES, T)
    w_y = tl.full(row.shape, 1.0, T)
    every_weight = tl.full((), classes, T)
    if weight is not None:
        w_y = tl.load(weight + y, exists, 1.0).to(T)
        if weight_sum is not None:
            every_weight = tl.load(weight_sum).to(T)

    zero = tl.zeros(row.shape, T)
    m = zero - INF
    weighted = zero
    log_sum, share = zero, zero
    blocks = tl.cdiv(classes, COLS)
    read = row < rows if ACROSS else kept
    if saved is not None:
        m = tl.load(saved + 2 * row, kept, 0.0)
        log_sum = tl.load(saved + 2 * row + 1, kept, 0.0)
        share = tl.where(log_sum == -INF, 0.0, tl.exp(-log_sum))
        s, high = row_scale(structure[1], at_target - m, v)
        if by_parameter is not None:
            if smoothing > 0:
                floor = tl.where(m == -INF, 0.0, m)
                for block in range(blocks):
                    col = block * COLS + tl.arange(0, COLS)
                    valid = col < classes
                    at = (col.to(tl.int64) if WIDE else col) * in_strides[0]
                    u = tl.load(input + base[:, None] + at[None, :], read[:, None] & valid[None, :], 0.0).to(T)
                    u = prepared(u, cap, adjustment, col[None, :], valid[None, :], T, CAPPED)
                    counted = tl.where((col[None, :] == y[:, None]) | (valid[None, :] == 0), 0.0, u - floor[:, None])
                    if weight is not None:
                        counted = counted * tl.load(weight + col, valid, 0.0).to(T)[None, :]
                    weighted += tl.sum(counted, 1)
    else:
        # The first scale's sum; the second's where there is one. Not positive: NaN, like everything after it.
        low_scale = row_scale(structure[1], zero - INF, v)[0] * LOG2_E
        high_scale = row_scale(structure[1], zero + INF, v)[0] * LOG2_E
        low_total, high_total, seen = zero, zero, zero
        above = tl.zeros(row.shape, tl.int32)
        first = tl.zeros(row.shape, tl.int32)
        best = zero - INF
        doubts = tl.zeros(row.shape, tl.int32)
        for block in range(blocks):
            col = block * COLS + tl.arange(0, COLS)
            valid = col < classes
            at = (col.to(tl.int64) if WIDE else col) * in_strides[0]
            u = tl.load(input + base[:, None] + at[None, :], read[:, None] & valid[None, :], -INF).to(T)
            u = prepared(u, cap, adjustment, col[None, :], valid[None, :], T, CAPPED)
            is_target = col[None, :] == y[:, None]
            skipped = is_target | (valid[None, :] == 0)
            u = tl.where(skipped, -INF, u)
            higher = tl.maximum(m, tl.max(u, 1))
            floor = tl.where(higher == -INF, 0.0, higher)
            rise = tl.where(m == -INF, 0.0, m - floor)  # <= 0
            d = u - floor[:, None]
            low_total = low_total * tl.exp2(rise * low_scale) + tl.sum(tl.exp2(d * low_scale[:, None]), 1)
            if TWO:
                high_total = high_total * tl.exp2(rise * high_scale) + tl.sum(tl.exp2(d * high_scale[:, None]), 1)
            if smoothing > 0:
                counted = tl.where(skipped, 0.0, d)
                weights = tl.where(skipped, 0.0, tl.full((ROWS, COLS), 1.0, T))
                if weight is not None:
                    weights = weights * tl.load(weight + col, valid, 0.0).to(T)[None, :]
                weighted += rise * seen + tl.sum(counted * weights, 1)
                seen += tl.sum(weights, 1)
            if stats is not None:
                doubts += tl.sum((u != u).to(tl.int32), 1)
                above += tl.sum((u > at_target[:, None]).to(tl.int32), 1)
                whole = tl.where(is_target, at_target[:, None], u)
                top = tl.max(whole, 1)
                here = tl.min(tl.where((whole == top[:, None]) & valid[None, :], col[None, :], classes), 1)
                first = tl.where((top > best) | (block == 0), here, first)
                best = tl.maximum(best, top)
            m = higher
        confidence = at_target - m
        s, high = row_scale(structure[1], confidence, v)
        total = low_total
        if TWO:
            total = tl.where(high, high_total, low_total)
        log_sum = tl.log(total)
        share = tl.where(total == 0, 0.0, 1.0 / total)

    t, slope, ta, tb, tc, tn, t_bin = transform_target(
        structure[0], structure[3], structure[4], at_target, v, own_group, t_tables, T, PIECEWISE
    )
    nll, q, p, others, lse, alone = locate(at_target, m, log_sum, s, t)
    phi, w, ha, hb, hc, hd, tau_bin = head_loss(structure[2], structure[5], nll, v, own_group, tau_tables, T, TAU)
    if losses is not None:
        by_class, by_row = row_loss(
            classes, smoothing, z_loss, every_weight, s, nll, others, lse, alone, phi, w_y, weighted
        )
        leave_loss(losses, row, rows, kept, by_class, by_row, REDUCTION)
    if save is not None:
        tl.store(save + 2 * row, tl.where(kept, m, 0.0), row < rows)
        tl.store(save + 2 * row + 1, tl.where(kept, log_sum, 0.0), row < rows)
    if stats is not None:
        doubtful = (doubts > 0) | (at_target != at_target)
        leave_stats(stats, row, rows, kept, exists, lse, nll, at_target - m, first, above, doubtful & exists)

    if gradient is not None or by_parameter is not None:
        g_class, g_row, g_lse, g_log_prob = upstream_of(upstream, upstream_strides, divisors, row, kept, T, REDUCTION)
        factor, spread, own_gradient, pull, part, flat, dz_y = row_gradient(
            classes, smoothing, z_loss, every_weight, share, s, slope, q, p, lse, alone, w, w_y,
            g_class, g_row, g_lse, g_log_prob,
        )  # fmt: skip
        shift = zero
        if gradient is not None or NEED_SHIFT & WANT:
            floor = tl.where(m == -INF, 0.0, m)
            s = tl.where(kept, s, 1.0)
            factor, spread = tl.where(kept, factor, 0.0), tl.where(kept, spread, 0.0)
            own_gradient = tl.where(kept, own_gradient, 0.0)
            if gradient is not None:
                out = row_offset(row, sizes, out_strides, WIDE, UNIT)
            for back in range(blocks):
                col = (blocks - 1 - back) * COLS + tl.arange(0, COLS)
                valid = col < classes
                at = (col.to(tl.int64) if WIDE else col) * in_strides[0]
                raw = tl.load(input + base[:, None] + at[None, :], read[:, None] & valid[None, :], -INF).to(T)
                u = prepared(raw, cap, adjustment, col[None, :], valid[None, :], T, CAPPED)
                is_target = col[None, :] == y[:, None]
                u = tl.where(is_target | (valid[None, :] == 0), -INF, u)
                d = u - floor[:, None]
                e = tl.exp2(d * (s * LOG2_E)[:, None])
                if NEED_SHIFT & WANT:
                    shift += tl.sum(tl.where(e == 0, 0.0, e * d), 1)
                if gradient is not None:
                    g = e * factor[:, None]
                    if smoothing > 0:
                        if weight is not None:
                            g -= spread[:, None] * tl.load(weight + col, valid, 0.0).to(T)[None, :]
                        else:
                            g -= spread[:, None]
                    g = tl.where(is_target, own_gradient[:, None], g)
                    if CAPPED:
                        slack = tanh(raw / cap)
                        g = g * ((1.0 - slack) * (1.0 + slack))
                    if ACROSS:
                        g = tl.where(kept[:, None], g, 0.0)
                    to = (col.to(tl.int64) if WIDE else col) * out_strides[0]
                    place = gradient + out[:, None] + to[None, :]
                    tl.store(place, g.to(gradient.dtype.element_ty), (row < rows)[:, None] & valid[None, :])
        if by_parameter is not None:
            by_s = by_scale(alone, m, share, t, p, q, pull, part, flat, w_y, every_weight, shift, weighted)
            by_head = g_class * (1.0 - smoothing) * w_y
            leave_parameters(
                by_parameter, bins, row, rows, kept, by_s, s, high, v[3], s * dz_y, (ta, tb, tc, tn), by_head,
                (ha, hb, hc, hd), t_bin, tau_bin, structure[1] == TWO_SCALE, WANT,
            )  # fmt: skip


# ---- sums, in a fixed order ------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["ignore_index"])
def count(target, weight, parts, rows, classes, ignore_index, chunk, BLOCK: tl.constexpr):
    """parts: (programs, 2), float64: the sum of weights and the number of the rows that count, of a chunk each."""
    pid = tl.program_id(0)
    weights = tl.zeros((BLOCK,), tl.float64)
    kept_rows = tl.zeros((BLOCK,), tl.float64)
    end = tl.minimum((pid + 1) * chunk, rows)
    for start in range(pid * chunk, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        y, kept, exists = label_of(target, row, end, classes, ignore_index)
        one = tl.where(kept, 1.0, 0.0)
        kept_rows += one.to(tl.float64)
        if weight is not None:
            weights += tl.load(weight + y, exists, 0.0).to(tl.float64)
        else:
            weights += one.to(tl.float64)
    tl.store(parts + 2 * pid, tl.sum(weights, 0))
    tl.store(parts + 2 * pid + 1, tl.sum(kept_rows, 0))


@triton.jit
def total(terms, sums, divisors, count, chunk, BLOCK: tl.constexpr, FINAL: tl.constexpr):
    """The two columns of terms, (count, 2), added up in float64: per chunk into sums, (programs, 2).

    FINAL: one program has them all, and makes one number of them, each column divided by its divisor if there are any.
    """
    pid = tl.program_id(0)
    a = tl.zeros((BLOCK,), tl.float64)
    b = tl.zeros((BLOCK,), tl.float64)
    end = tl.minimum((pid + 1) * chunk, count)
    for start in range(pid * chunk, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        a += tl.load(terms + 2 * at, at < end, 0.0).to(tl.float64)
        b += tl.load(terms + 2 * at + 1, at < end, 0.0).to(tl.float64)
    first, second = tl.sum(a, 0), tl.sum(b, 0)
    if FINAL:
        if divisors is not None:
            part = tl.arange(0, PARTS)
            here = part < divisors[1]
            first = first / tl.sum(tl.load(divisors[0] + 2 * part, here, 0.0), 0)
            kept = tl.sum(tl.load(divisors[0] + 2 * part + 1, here, 0.0), 0)
            second = tl.where(second == 0, 0.0, second / kept)
        tl.store(sums, (first + second).to(sums.dtype.element_ty))
    else:
        tl.store(sums + 2 * pid, first)
        tl.store(sums + 2 * pid + 1, second)


@triton.jit
def bucket(values, keys, group, sums, rows, chunk, per_group, BLOCK: tl.constexpr):
    """sums[bucket, program]: of the values whose key (their bin, of their group's bins) is the program's bucket.

    keys and group None: one bucket for all.
    """
    mine = tl.program_id(0)
    pid = tl.program_id(1)
    found = tl.zeros((BLOCK,), tl.float64)
    end = tl.minimum((pid + 1) * chunk, rows)
    for start in range(pid * chunk, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < end
        if keys is not None:
            key = tl.load(keys + row, inside, -1)
            if group is not None:
                key += tl.load(group + row, inside, 0).to(tl.int32) * per_group
            inside = inside & (key == mine)
        found += tl.load(values + row, inside, 0.0).to(tl.float64)
    tl.store(sums + mine * tl.num_programs(1) + pid, tl.sum(found, 0))
