"""The kernel that touches N x C elements: a row's statistics, and its gradient. What is between is in ``finish.py``.

A program takes a tile of rows. Where they fit (ON_CHIP) they stay in registers: one read, and where a gradient is
wanted one write; one exponential per element. Longer rows go block by block: statistics in one pass, and the gradient
in a second one that walks backwards, so that it starts with what is still in the cache. Rows whose classes lie apart,
(N, C, d1, ...), are read along d.

A row takes four steps, as in ``reference.py`` and ``csrc/finish.h``: statistics, finish, coefficients, gradient. No
result depends on the rows beside it: tiles are chosen from C and the strides alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import INF, LOGIT_NORM, MEAN, NEED_SHIFT, ROW_SCALE, SMOOTHING, SOFTCAP, TWO_SCALE
from .elementary import tanh_slope
from .elements import (
    LOG2_E,
    afresh,
    element_factors,
    is_label,
    multiple,
    of_row,
    places,
    prepared,
    read_logits,
    row_offset,
    row_sum,
    thread_sum,
)
from .finish import batch_of, by_scale, coefficients, entropy, finish, has_row_term, kind, row_loss, row_scale
from .operands import (
    label_of,
    numbers,
    shared,
    store_loss,
    store_parameters,
    store_stats,
    upstream_of,
)
from .statistics import statistics, streamed_statistics, streamed_sums
from .sums import add_up, divisors_of, factors_of

# ---- gradient --------------------------------------------------------------------------------------------------------


@triton.jit
def gradient_of(
    first, kept, y, raw, e, d, row_coefficients, weight, smoothing, cap, col, valid, factors,
    T: tl.constexpr, TILTED: tl.constexpr, CAPPED: tl.constexpr, ACROSS: tl.constexpr,
    CHUNKS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dL/du_j = e_j (a + b (u_j - m)) - d w_j, and g at the label, of the classes from the first on, of which e and d
    are e_j and u_j - m. Of ignored rows 0. TILTED: there is a b."""
    factor, tilt, spread, own = row_coefficients
    # They were read as -inf: their exponentials are 0, and so is all that they are multiplied by.
    factor = of_row(tl.where(kept, factor, 0.0))
    if TILTED:
        g = tl.where(e == 0, 0.0, e * (factor + d * of_row(tl.where(kept, tilt, 0.0))))
    else:
        g = e * factor
    if smoothing > 0:
        apart = of_row(tl.where(kept, spread, 0.0))
        if weight is not None:
            apart = apart * tl.load(weight + col, valid, 0.0).to(T)
        g -= apart
    g = tl.where(is_label(y, first, CHUNKS, LANES, VECTOR), of_row(tl.where(kept, own, 0.0)), g)
    if CAPPED:
        g = g * tanh_slope(raw / cap)
    if factors is not None:
        g *= element_factors(factors, col, valid, T)
    if factors is not None or ACROSS or CHUNKS * LANES * VECTOR <= 32:
        g = tl.where(of_row(kept), g, 0.0)
    return g


@triton.jit
def gradient(
    out, base, first, inside, kept, y, raw, e, d, row_coefficients, weight, smoothing, cap, col, valid, strides,
    T: tl.constexpr, TILTED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
    ACROSS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Writes it."""
    g = gradient_of(
        first, kept, y, raw, e, d, row_coefficients, weight, smoothing, cap, col, valid, None,
        T, TILTED, CAPPED, ACROSS, CHUNKS, LANES, VECTOR,
    )  # fmt: skip
    place = places(out, base, col, strides[0], WIDE, ACROSS, LANES, VECTOR)
    tl.store(place, g.to(out.dtype.element_ty), of_row(inside) & valid)


@triton.jit
def streamed_gradient(
    out, base, source, blocks, inside, kept, y, floor, s, row_coefficients, weight, smoothing, strides,
    T: tl.constexpr, SUMMED: tl.constexpr, TILTED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
    ACROSS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The same block by block, if there is an out; and, where SUMMED, the sum of e_j (u_j - m), or where TILTED, which
    has that already, of e_j (u_j - m)^2."""
    sharpness = of_row(tl.where(kept, s, 1.0) * LOG2_E)
    found = tl.zeros((ROWS, LANES), T)
    for back in range(blocks):
        start = (blocks - 1 - back) * (CHUNKS * LANES * VECTOR)
        raw, u, col, valid = read_logits(source, start, T, CAPPED, WIDE, ACROSS, CHUNKS, LANES, VECTOR)
        u = tl.where(is_label(y, start, CHUNKS, LANES, VECTOR), -INF, u)
        d = u - of_row(floor)
        e = tl.exp2(d * sharpness)
        if SUMMED:
            found += thread_sum(tl.where(e == 0, 0.0, e * d * d if TILTED else e * d))
        if out is not None:
            gradient(
                out, base, start, inside, kept, y, raw, e, d, row_coefficients, weight, smoothing, source[4][0], col,
                valid, strides, T, TILTED, CAPPED, WIDE, ACROSS, CHUNKS, LANES, VECTOR,
            )  # fmt: skip
    return tl.sum(found, 1)


# ---- the kernel ------------------------------------------------------------------------------------------------------


#: What are numbers to visit, not structure: no value of theirs compiles another kernel. Of the strides of logits a 1
#: does: it says what lies side by side.
DATA = [
    "rows", "classes", "d1", "d2", "up_loss", "up_lse", "up_log_prob", "up_entropy", "t_bins", "tau_bins", "groups",
    "parts", "structure", "ignore_index",
]  # fmt: skip
UNALIGNED = [
    "in_class", "in_outer", "in_middle", "in_inner", "out_class", "out_outer", "out_middle", "out_inner", "turns",
]  # fmt: skip


@triton.jit(do_not_specialize=DATA, do_not_specialize_on_alignment=UNALIGNED)
def visit(
    # data
    input,  # (rows, classes) by the in_ strides
    target,  # (rows)
    values,  # 18 numbers, each by value or a pointer; see number()
    t_tables, tau_tables,  # (slope, bias) of a piecewise t and of tau, (groups, bins) each; or None
    group,  # (rows) or None
    vectors,  # of all classes, (classes) each or None, in the order of numbering.PER_CLASS; the weights come first
    weight_sum,  # their sum; or None
    row_weight,  # (rows) or None
    normalizer,  # what MEAN divides by, by value or a pointer; or None
    divisors,  # (parts, 2): sums of weights and of rows; for MEAN, where there are not FEW rows. See also add_up()
    factors,  # (2): what MEAN makes of a row's terms, left here, or CONDITIONAL: of an earlier visit; or None
    upstream,  # the upstream gradients of loss, logsumexp, log_prob and entropy, each or None
    saved,  # (rows, 2): m and log_sum of an earlier visit, behind them, for MEAN, its factors; or None
    # results, each or None
    losses,  # (rows), or (tiles) where it is reduced
    loss,  # (): their sum, where there are divisors
    save,  # (rows, 2): what saved is to a later visit
    stats,  # RowStats, (rows) each
    grad,  # the gradient: as input, by the out_ strides
    by_parameter,  # (TRAINABLE_SLOTS, rows)
    bins,  # (2, rows)
    # shapes: rows are (N, d1, d2)
    rows, classes, d1, d2,
    # strides: of the classes, and of N, d1 and d2
    in_class, in_outer, in_middle, in_inner, out_class, out_outer, out_middle, out_inner,
    up_loss, up_lse, up_log_prob, up_entropy,
    # of the tables and of divisors
    t_bins, tau_bins, groups, parts,
    # the loss: see kind()
    structure, ignore_index: tl.int64,
    turns,  # how many tiles a program takes
    MODES: tl.constexpr, WANT: tl.constexpr, REDUCTION: tl.constexpr, CAPPED: tl.constexpr, CONDITIONAL: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr, ACROSS: tl.constexpr,
    ON_CHIP: tl.constexpr, TWO: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Loss, statistics and gradients of tiles of rows.

    CONDITIONAL: nothing is done where the upstream gradient is 1, for which the results are there already.
    UNIT: a divisor of C, of all row strides and of where the tensors begin; 1 unless classes are neighbours in memory.
    DIMS: how many dimensions rows have. ACROSS: it is rows that are neighbours, and how many of them make an aligned
    access; ignored ones are then read with their neighbours, and dropped. ON_CHIP: a tile holds whole rows. TWO: the
    scale of a row is known only after its maximum, so that block by block the sum is kept for both.
    """
    if CONDITIONAL:
        turns = tl.where(tl.load(upstream[0]) == 1.0, 0, turns)
    rows = multiple(rows, ACROSS)
    classes = multiple(classes, UNIT)
    scale = kind(structure, ROW_SCALE)
    sizes = (d1, d2)
    in_strides = (multiple(in_class, ACROSS), in_outer, in_middle, in_inner)
    out_strides = (multiple(out_class, ACROSS), out_outer, out_middle, out_inner)
    if t_tables is not None:
        t_tables = (t_tables[0], t_tables[1], t_bins, groups)
    if tau_tables is not None:
        tau_tables = (tau_tables[0], tau_tables[1], tau_bins, groups)
    T: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    PIECEWISE: tl.constexpr = t_tables is not None
    TAU: tl.constexpr = tau_tables is not None
    BLOCK: tl.constexpr = CHUNKS * LANES * VECTOR
    # Short rows, too, are read before their labels have come: their neighbours are in the same sectors.
    DROPPED: tl.constexpr = ACROSS or BLOCK <= 32
    blocks = tl.cdiv(classes, BLOCK)
    cap = shared(values, SOFTCAP, MODES, T)
    preparation = (cap, 0, vectors)
    weight = vectors[0]
    smoothing = shared(values, SMOOTHING, MODES, T)
    every_weight = tl.full((), classes, T)
    if weight_sum is not None:
        every_weight = tl.load(weight_sum).to(T)
    batch = batch_of(values, MODES, T, classes, smoothing, every_weight)
    TILTED: tl.constexpr = upstream[3] is not None
    SHIFTED: tl.constexpr = TILTED or stats is not None
    KNOWN: tl.constexpr = CONDITIONAL or saved is not None
    if REDUCTION == MEAN:
        behind = tl.full((), 2, tl.int64) * rows
        if saved is not None:
            factors = saved + behind
        elif save is not None:
            factors = save + behind
        if KNOWN:
            earlier = (tl.load(factors), tl.load(factors + 1))
        else:
            all_weights, all_kept = divisors_of(
                normalizer, divisors, parts, target, weight, rows, classes, ignore_index, MODES
            )

    for turn in range(turns):
        tile = tl.program_id(0) * turns + turn
        row = (tile.to(tl.int64) if WIDE else tile) * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        label = tl.load(target + row, inside, 0)
        y, kept, exists = label_of(label, inside, classes, ignore_index)
        v = numbers(values, MODES, y, row, exists, T, PIECEWISE, TAU)
        own_group = tl.zeros(row.shape, tl.int64)
        if group is not None:
            own_group = tl.load(group + row, kept, 0).to(tl.int64)
        w_y = tl.full(row.shape, 1.0, T)
        if weight is not None:
            w_y = tl.load(weight + y, exists, 1.0).to(T)
        base = row_offset(row, sizes, in_strides, UNIT, DIMS, ACROSS)
        place = input + base + (y.to(tl.int64) if WIDE else y) * in_strides[0]
        at_target = prepared(tl.load(place, exists, float("nan")).to(T), preparation, y, exists, T, CAPPED)

        # ---- statistics
        source = (input, base, inside if DROPPED else kept, classes, preparation, in_strides, None)
        known = None
        if saved is not None:
            m = tl.load(saved + 2 * row, kept, 0.0)
            log_sum = tl.load(saved + 2 * row + 1, kept, 0.0)
            share = tl.where(log_sum == -INF, 0.0, tl.exp(-log_sum))
            s, high = row_scale(scale, at_target - m, v)
            known = (m, s, high)
        if ON_CHIP:
            raw, u, col, valid = read_logits(source, 0, T, CAPPED, WIDE, ACROSS, CHUNKS, LANES, VECTOR)
            u = tl.where(is_label(y, 0, CHUNKS, LANES, VECTOR), -INF, u)
            standing, sums, described, e, d = statistics(
                u, col, valid, y, kept, at_target, known, scale, v, weight, smoothing,
                T, SHIFTED, stats is not None, CHUNKS, LANES, VECTOR,
            )  # fmt: skip
            m, s, high = standing
            total, shift, weighted = sums
        elif saved is None:
            standing, sums, described = streamed_statistics(
                source, blocks, y, at_target, scale, v, weight, smoothing,
                T, TWO, SHIFTED, stats is not None, CAPPED, WIDE, ACROSS, CHUNKS, ROWS, LANES, VECTOR,
            )  # fmt: skip
            m, s, high = standing
            total, shift, weighted = sums
        floor = tl.where(m == -INF, 0.0, m)
        if not ON_CHIP and saved is not None:
            shift, weighted = streamed_sums(
                source, blocks, y, kept, floor, s, weight, smoothing,
                T, SHIFTED, by_parameter is not None, CAPPED, WIDE, ACROSS, CHUNKS, ROWS, LANES, VECTOR,
            )  # fmt: skip
        if saved is None:
            log_sum = tl.log(total)
            share = tl.where(total == 0, 0.0, 1.0 / total)

        # ---- finish
        own, at, head = finish(
            structure, at_target, m, log_sum, s, v, own_group, t_tables, tau_tables, T, PIECEWISE, TAU
        )
        f_class, f_row, nothing = 1.0, 1.0, 0.0
        if REDUCTION == MEAN:
            if KNOWN:
                f_class, f_row = earlier
            else:
                f_class, f_row = factors_of(all_weights, all_kept, has_row_term(batch), T)
                nothing = 0.0 * f_class
                if factors is not None:
                    if tile == 0:
                        tl.store(factors, f_class)
                        tl.store(factors + 1, f_row)
        if row_weight is not None:
            own_weight = tl.load(row_weight + row, kept, 0.0).to(T)
            f_class, f_row = own_weight * f_class, own_weight * f_row
        if losses is not None:
            by_class, by_row = row_loss(batch, s, at, head[0], w_y, weighted)
            store_loss(losses, tile, row, rows, kept, by_class * f_class, by_row * f_row, nothing, REDUCTION)
        if save is not None:
            tl.store(save + 2 * row, tl.where(kept, m, 0.0), inside)
            tl.store(save + 2 * row + 1, tl.where(kept, log_sum, 0.0), inside)
        h = None
        if SHIFTED:
            h = entropy(share, s, at, shift)
        if stats is not None:
            doubtful = exists & ((described[0] > 0) | (at_target != at_target))
            store_stats(stats, row, rows, kept, exists, at, h, at_target - m, described, doubtful)

        # ---- coefficients, gradient
        if grad is not None or by_parameter is not None:
            g_loss = upstream_of(upstream[0], up_loss, row, kept, T)
            if upstream[0] is None and upstream[1] is None and upstream[2] is None and upstream[3] is None:
                g_loss += 1.0
            g_lse = upstream_of(upstream[1], up_lse, row, kept, T)
            g_log_prob = upstream_of(upstream[2], up_log_prob, row, kept, T)
            g_h = None
            if TILTED:
                g_h = upstream_of(upstream[3], up_entropy, row, kept, T)
            up = (g_loss * f_class, g_loss * f_row, g_lse, g_log_prob)
            row_coefficients, z = coefficients(batch, share, s, own[1], at, h, head[1], w_y, up, g_h)
            out = base
            if grad is not None:
                out = row_offset(row, sizes, out_strides, UNIT, DIMS, ACROSS)
            second = shift
            if ON_CHIP:
                if NEED_SHIFT & WANT:
                    if TILTED:
                        second = row_sum(tl.where(e == 0, 0.0, e * d * d))
                    else:
                        shift = row_sum(tl.where(e == 0, 0.0, e * d))
                if grad is not None:
                    gradient(
                        grad, out, 0, inside, kept, afresh(y, share), raw, e, d, row_coefficients, weight, smoothing,
                        cap, col, valid, out_strides, T, TILTED, CAPPED, WIDE, ACROSS, CHUNKS, LANES, VECTOR,
                    )  # fmt: skip
            elif grad is not None or NEED_SHIFT & WANT:
                found = streamed_gradient(
                    grad, out, source, blocks, inside, kept, y, floor, s, row_coefficients, weight, smoothing,
                    out_strides, T, NEED_SHIFT & WANT, TILTED, CAPPED, WIDE, ACROSS, CHUNKS, ROWS, LANES, VECTOR,
                )  # fmt: skip
                if TILTED:
                    second = found
                else:
                    shift = found
            if by_parameter is not None:
                by_s = by_scale(classes, every_weight, share, m, s, own[0], at, h, w_y, weighted, shift, second, g_h, z)
                by_head = up[0] * (1.0 - smoothing) * w_y
                store_parameters(
                    by_parameter, bins, row, rows, kept, at[0], by_s, s, high, v[LOGIT_NORM], s * z[3], own, by_head,
                    head, scale == TWO_SCALE, WANT,
                )  # fmt: skip
    if loss is not None:
        add_up(losses, loss, divisors, parts)
