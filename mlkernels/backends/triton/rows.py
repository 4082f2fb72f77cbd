"""The kernel that touches N x C elements: a row's statistics, and its gradient. It knows nothing of losses.

A program takes a tile of rows. Where they fit (ON_CHIP) they stay in registers: one read, and where a gradient is
wanted one write; one exponential per element. Longer rows go block by block: statistics in one pass, and the gradient
in a second one that walks backwards, so that it starts with what is still in the cache. Rows whose classes lie apart,
(N, C, d1, ...), are read along d.

A tile is (chunks, rows, lanes, vector): a chunk of a row is a vector of neighbours for each of a few threads, and all
chunks are the same threads'. So a thread has many classes of one row, and the row's scalar mathematics, which each of
its threads does, costs little.

No result depends on the rows beside it: tiles are chosen from C and the strides alone. Nothing is accumulated by
atomics: a tile leaves the sum of its own rows, ``total`` adds those up in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import numbering
from .finish import (
    DOMAIN_LOW,
    HEAD_A,
    INF,
    LOGIT_NORM,
    NORM,
    SCALE,
    SCALE_HIGH,
    TRANSFORM_A,
    TWO_SCALE,
    by_scale,
    coefficients,
    entropy,
    head_loss,
    legal,
    locate,
    row_loss,
    row_scale,
    tanh,
    transform_target,
)

NONE = tl.constexpr(int(numbering.Reduction.NONE))
MEAN = tl.constexpr(int(numbering.Reduction.MEAN))
LOG2_E = tl.constexpr(1.4426950408889634)  # exp is the hardware's exp2 of that, which a row's scale can take in
LOSS_SLOTS = tl.constexpr(numbering.LOSS_SLOTS)
TRAINABLE_SLOTS = tl.constexpr(numbering.TRAINABLE_SLOTS)
#: The slots whose gradient needs the mean logit.
NEED_SHIFT = tl.constexpr(sum(1 << slot for slot in numbering.OF_SCALE))
T_TABLES = tl.constexpr(sum(1 << slot for slot in numbering.TRANSFORM_TABLES[numbering.TransformKind.PIECEWISE]))
TAU_TABLES = tl.constexpr(sum(1 << slot for slot in numbering.HEAD_TABLES[numbering.HeadKind.TAU]))
# How a number reaches a kernel.
BY_VALUE = tl.constexpr(int(numbering.Mode.BY_VALUE))
SHARED = tl.constexpr(int(numbering.Mode.SHARED))
PER_CLASS = tl.constexpr(int(numbering.Mode.PER_CLASS))
MODE_BASE = tl.constexpr(len(numbering.Mode))  # the modes of all slots are the digits of a number
KIND_BITS, KIND_MASK = tl.constexpr(numbering.KIND_BITS), tl.constexpr((1 << numbering.KIND_BITS) - 1)
TRANSFORM = tl.constexpr(int(numbering.Field.TRANSFORM))
ROW_SCALE = tl.constexpr(int(numbering.Field.ROW_SCALE))
HEAD = tl.constexpr(int(numbering.Field.HEAD))
BEYOND_PI = tl.constexpr(int(numbering.Field.BEYOND_PI))
MARGIN_GRADIENT = tl.constexpr(int(numbering.Field.MARGIN_GRADIENT))
CLAMP = tl.constexpr(int(numbering.Field.CLAMP))
SMOOTHING = tl.constexpr(int(numbering.Slot.SMOOTHING))
Z_LOSS = tl.constexpr(int(numbering.Slot.Z_LOSS))
SOFTCAP = tl.constexpr(int(numbering.Slot.SOFTCAP))
NORMALIZER = tl.constexpr(int(numbering.Slot.NORMALIZER))
#: How many partial sums of weights there are at most; every program adds them up for itself.
PARTS = tl.constexpr(128)
#: So few labels may every program count for itself.
FEW = tl.constexpr(2048)


# ---- what a row is given ---------------------------------------------------------------------------------------------


@triton.jit
def multiple(number, UNIT: tl.constexpr):
    """A number that is a multiple of UNIT, told so that the compiler sees it: Triton itself looks for 16 only, and 1000
    classes would be read one by one."""
    if UNIT > 1:
        number = number // UNIT * UNIT
    return number


@triton.jit
def kind(structure, FIELD: tl.constexpr):
    """A kind or an option of a packed structure. Of a tuple Triton would make a kernel for each that holds a 1."""
    return (structure >> (KIND_BITS * FIELD)) & KIND_MASK


@triton.jit
def row_offset(row, sizes, strides, UNIT: tl.constexpr, DIMS: tl.constexpr, ACROSS: tl.constexpr):
    """Where rows begin, in elements. sizes: (d1, d2) of (N, d1, d2), of which rows have the first DIMS; strides:
    (class, N, d1, d2)."""
    outer = multiple(strides[1], UNIT)
    if DIMS == 1:
        offset = row * outer
    elif DIMS == 2:
        size = multiple(sizes[0], ACROSS)
        offset = row // size * multiple(outer, ACROSS) + row % size * multiple(strides[2], UNIT)
    else:
        size = multiple(sizes[1], ACROSS)
        rest = row // size
        middle = multiple(multiple(strides[2], UNIT), ACROSS)
        offset = rest // sizes[0] * multiple(outer, ACROSS) + rest % sizes[0] * middle
        offset += row % size * multiple(strides[3], UNIT)
    return offset


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
def prepared(u, cap, adjustment, col, valid, T: tl.constexpr, CAPPED: tl.constexpr):
    """Logits after softcap and adjustment."""
    if CAPPED:
        u = tl.where(u == INF, float("nan"), cap * tanh(u / cap))  # tanh would hide an overflow
    if adjustment is not None:
        u += tl.load(adjustment + col, valid, 0.0).to(T)
    return u


@triton.jit
def tally(label, weight, inside, classes, ignore_index):
    """What labels add to the sum of weights and to the number of rows that count."""
    y, kept, exists = label_of(label, inside, classes, ignore_index)
    if weight is not None:
        weights = tl.load(weight + y, exists, 0.0).to(tl.float64)
    else:
        weights = kept.to(tl.float64)
    return weights, kept.to(tl.int32)


@triton.jit
def divisors_of(normalizer, parts, count, target, weight, rows, classes, ignore_index, MODES: tl.constexpr):
    """What "mean" divides by, per class weight and per row: the normalizer, or from the parts that there are, or of FEW
    labels. Of both a sum for each lane of a warp: to add those up takes no shared memory, so that it can wait until it
    is needed."""
    lane = tl.arange(0, 32)
    if normalizer is not None:
        if MODES // MODE_BASE**NORMALIZER % MODE_BASE == SHARED:
            divisor = tl.load(normalizer).to(tl.float64)
        else:
            divisor = tl.full((), normalizer, tl.float64)
        weights = tl.where(lane == 0, legal(divisor > 0, divisor), 0.0)
        kept = weights
    elif parts is not None:
        weights, kept = tl.zeros((32,), tl.float64), tl.zeros((32,), tl.float64)
        for start in tl.static_range(0, PARTS, 32):
            part = start + lane
            weights += tl.load(parts + 2 * part, part < count, 0.0)
            kept += tl.load(parts + 2 * part + 1, part < count, 0.0)
    else:
        row = tl.arange(0, FEW)
        inside = row < rows
        each, ones = tally(tl.load(target + row, inside, 0), weight, inside, classes, ignore_index)
        weights = tl.where(lane == 0, tl.sum(each, 0), 0.0)
        kept = tl.where(lane == 0, tl.sum(ones, 0).to(tl.float64), 0.0)
    return weights, kept


@triton.jit
def factors_of(weights, kept, T: tl.constexpr):
    """What "mean" multiplies a row's terms by, per class weight and per row. Smoothing has a loss where the weights sum
    to 0: that is no mean either."""
    by_weight = tl.sum(weights, 0)
    return legal(by_weight != 0, 1.0 / by_weight).to(T), (1.0 / tl.sum(kept, 0)).to(T)


@triton.jit
def upstream_of(pointers, strides, f_class, f_row, row, kept, T: tl.constexpr):
    """The upstream gradients of a row's loss (per class weight, per row), logsumexp, log_prob and entropy."""
    zero = tl.zeros(row.shape, T)
    g_loss = zero + 1.0
    if pointers[0] is not None:
        g_loss = tl.load(pointers[0] + row.to(tl.int64) * strides[0], kept, 0.0).to(T)
    elif pointers[1] is not None or pointers[2] is not None or pointers[3] is not None:
        g_loss = zero
    g_lse, g_log_prob, g_entropy = zero, zero, zero
    if pointers[1] is not None:
        g_lse = tl.load(pointers[1] + row.to(tl.int64) * strides[1], kept, 0.0).to(T)
    if pointers[2] is not None:
        g_log_prob = tl.load(pointers[2] + row.to(tl.int64) * strides[2], kept, 0.0).to(T)
    if pointers[3] is not None:
        g_entropy = tl.load(pointers[3] + row.to(tl.int64) * strides[3], kept, 0.0).to(T)
    return g_loss * f_class, g_loss * f_row, g_lse, g_log_prob, g_entropy


# ---- what a row leaves -----------------------------------------------------------------------------------------------


@triton.jit
def leave_loss(losses, tile, row, rows, kept, by_class, by_row, nothing, REDUCTION: tl.constexpr):
    """Row losses, or their sum over the tile's rows. nothing: what no rows sum up to, 0 or NaN."""
    by_class = tl.where(kept, by_class, 0.0)
    by_row = tl.where(kept, by_row, 0.0)
    if REDUCTION == NONE:
        tl.store(losses + row, by_class + by_row, row < rows)
    else:
        loss = tl.sum(by_class + by_row, 0)
        tl.store(losses + tile.to(tl.int64), loss + nothing if REDUCTION == MEAN else loss)


@triton.jit
def leave_stats(stats, row, rows, kept, exists, lse, nll, h, confidence, first, above, doubtful):
    """RowStats: logsumexp, log_prob, entropy, prediction, confidence, rank."""
    inside = row < rows
    tl.store(stats[0] + row, tl.where(kept, lse, 0.0), inside)
    tl.store(stats[1] + row, tl.where(kept, -nll, 0.0), inside)
    tl.store(stats[2] + row, tl.where(kept, h, 0.0), inside)
    tl.store(stats[3] + row, tl.where(kept & (doubtful == 0), first, -1).to(tl.int64), inside)
    confidence = tl.where(doubtful | (exists == 0), float("nan"), confidence)
    tl.store(stats[4] + row, tl.where(kept, confidence, 0.0), inside)
    tl.store(stats[5] + row, tl.where(kept, above, 0).to(tl.int64), inside)


@triton.jit
def leave_parameters(
    by_parameter, bins, row, rows, kept, by_s, s, high, norm, by_target, target_parts, by_head, head_parts,
    t_bin, tau_bin, TWO: tl.constexpr, WANT: tl.constexpr,
):  # fmt: skip
    """The derivatives of each row's loss by the parameters in WANT, (slot, rows); tables: by the entry of its bin."""
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
                value = by_target * target_parts[slot - TRANSFORM_A]
            elif slot >= HEAD_A:
                value = by_head * head_parts[slot - HEAD_A]
            place = tl.full((), slot, tl.int64) * rows
            tl.store(by_parameter + place + row, tl.where(kept, value, 0.0), row < rows)
    if bins is not None:
        tl.store(bins + row, tl.where(kept, t_bin, 0), row < rows)
        tl.store(bins + rows + row, tl.where(kept, tau_bin, 0), row < rows)


# ---- a tile of rows --------------------------------------------------------------------------------------------------


@triton.jit
def of_row(x):
    """A number of each row, beside the tile's elements."""
    return x[None, :, None, None]


@triton.jit
def of_thread(x):
    """A number of each thread (of each row), beside the tile's elements."""
    return x[None, :, :, None]


@triton.jit
def thread_sum(x):
    return tl.sum(tl.sum(x, 0), 2)


@triton.jit
def thread_max(x):
    return tl.max(tl.max(x, 0), 2)


@triton.jit
def product(x, y):
    """x y, rounded. A product that is added up is fused into the addition; where threads exchange it, by each of them
    its own, so that they end with different last bits. Which elements they exchange is the compiler's choice."""
    return tl.fma(x, y, 0.0)


@triton.jit
def tilted_sum(d, sharpness):
    """Of a thread's own classes, exp2(sharpness d) d; one of probability 0 adds 0, also when its logit is -inf."""
    e = tl.exp2(d * of_thread(sharpness))
    return thread_sum(tl.where(e == 0, 0.0, e * d))


@triton.jit
def moved(shift, total, fall, sharpness):
    """A thread's tilted sum, where what it is relative to rises by -fall."""
    fade = tl.exp2(fall * sharpness)
    return tl.where(fade == 0, 0.0, product(fade, shift + fall * total))


@triton.jit
def row_sum(x):
    return tl.sum(thread_sum(x), 1)


@triton.jit
def offsets(CHUNKS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The columns of a thread's own classes from its first; constants of the code."""
    chunk = tl.arange(0, CHUNKS) * (LANES * VECTOR)
    return chunk[:, None, None, None] + tl.arange(0, VECTOR)[None, None, None, :]


@triton.jit
def is_label(y, first, CHUNKS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Where, of the classes from the first on, a row's label is: one comparison with a constant per element."""
    mine = (y - first)[:, None] - (tl.arange(0, LANES) * VECTOR)[None, :]
    return of_thread(mine) == offsets(CHUNKS, LANES, VECTOR)


@triton.jit
def afresh(y, number):
    """y; made to look as if it depended on a number that is never negative, so that masks of it are computed again
    instead of kept: dozens of them are more than there are predicates."""
    return tl.where(number < 0, -1, y)


@triton.jit
def places(
    tensor, base, col, stride, WIDE: tl.constexpr, ACROSS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    """Where a tile's elements lie."""
    place = tensor + of_row(base) + (col.to(tl.int64) if WIDE else col) * stride
    # Triton deals to threads what it thinks is most contiguous, and a tie by its version. So it is told an order:
    # vectors, then lanes, then rows; a thread keeps all chunks. How much is accessed at once is for the alignment to
    # say, which is believed whatever it is: so it is what launch.py found in sizes, strides and pointers.
    BYTES: tl.constexpr = tensor.dtype.element_ty.primitive_bitwidth // 8
    if ACROSS:
        # A thread has 4 bytes of neighbours. Where these are not all rows but two lanes, Triton 3.9 would believe that
        # lanes are neighbours in memory; and there is nothing to order, as no other thread has any.
        lanes: tl.constexpr = 4 if LANES * ACROSS * BYTES > 4 else 1
        place = tl.multiple_of(tl.max_contiguous(place, [1, 8, lanes, 2]), [BYTES, ACROSS * BYTES, BYTES, BYTES])
    else:
        place = tl.multiple_of(tl.max_contiguous(place, [1, 2, 4, 8]), [BYTES, BYTES, BYTES, VECTOR * BYTES])
    return place


@triton.jit
def read_logits(
    input, base, first, read, classes, cap, adjustment, strides, T: tl.constexpr, CAPPED: tl.constexpr,
    WIDE: tl.constexpr, ACROSS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The logits of the classes from the first on, as they lie and prepared; their columns, and whether there are."""
    col = first + (tl.arange(0, LANES) * VECTOR)[None, None, :, None] + offsets(CHUNKS, LANES, VECTOR)
    # In the tile's whole shape: what is read by class is then read by the threads that need it.
    col += of_row(tl.zeros_like(base).to(tl.int32))
    valid = col < classes
    place = places(input, base, col, strides[0], WIDE, ACROSS, LANES, VECTOR)
    raw = tl.load(place, of_row(read) & valid, -INF).to(T)
    u = prepared(raw, cap, adjustment, col, valid, T, CAPPED)
    if CAPPED:
        u = tl.where(valid, u, -INF)
    return raw, u, col, valid


@triton.jit
def leave_gradient(
    gradient, base, first, inside, kept, y, raw, e, d, row_coefficients, weight, smoothing, cap, col, valid, strides,
    T: tl.constexpr, TILTED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr, ACROSS: tl.constexpr,
    CHUNKS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The gradient of the classes from the first on, of which e are the exponentials and d the logits less the largest.
    Ignored rows get zeros. TILTED: the entropy has a part in it."""
    factor, tilt, spread, own_gradient = row_coefficients
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
    g = tl.where(is_label(y, first, CHUNKS, LANES, VECTOR), of_row(tl.where(kept, own_gradient, 0.0)), g)
    if CAPPED:
        slack = tanh(raw / cap)
        g = g * ((1.0 - slack) * (1.0 + slack))
    if ACROSS or CHUNKS * LANES * VECTOR <= 32:
        g = tl.where(of_row(kept), g, 0.0)
    place = places(gradient, base, col, strides[0], WIDE, ACROSS, LANES, VECTOR)
    tl.store(place, g.to(gradient.dtype.element_ty), of_row(inside) & valid)


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
    weight,  # (classes) or None
    weight_sum,  # its sum; or None
    adjustment,  # (classes) or None
    row_weight,  # (rows) or None
    normalizer,  # what MEAN divides by, by value or a pointer; or None
    divisors,  # (parts, 2): sums of weights and of rows; for MEAN, where there are not FEW rows
    factors,  # (2): what MEAN makes of a row's terms, left here, or CONDITIONAL: of an earlier visit; or None
    upstream,  # the upstream gradients of loss, logsumexp, log_prob and entropy, each or None
    saved,  # (rows, 2): m and log_sum of an earlier visit, or None
    # results, each or None
    losses,  # (rows), or (tiles) where it is reduced
    save,  # (rows, 2)
    stats,  # RowStats, (rows) each
    gradient,  # as input, by the out_ strides
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
    upstream_strides = (up_loss, up_lse, up_log_prob, up_entropy)
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
    smoothing = shared(values, SMOOTHING, MODES, T)
    z_loss = shared(values, Z_LOSS, MODES, T)
    every_weight = tl.full((), classes, T)
    if weight_sum is not None:
        every_weight = tl.load(weight_sum).to(T)
    TILTED: tl.constexpr = upstream[3] is not None
    if REDUCTION == MEAN:
        if CONDITIONAL:
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
        read = inside if DROPPED else kept
        own = input + base + (y.to(tl.int64) if WIDE else y) * in_strides[0]
        at_target = prepared(tl.load(own, exists, float("nan")).to(T), cap, adjustment, y, exists, T, CAPPED)

        # ---- statistics of the classes that are not the label's
        zero = tl.zeros(row.shape, T)
        weighted, shift, second, h = zero, zero, zero, zero
        if saved is not None:
            m = tl.load(saved + 2 * row, kept, 0.0)
            log_sum = tl.load(saved + 2 * row + 1, kept, 0.0)
            share = tl.where(log_sum == -INF, 0.0, tl.exp(-log_sum))
            s, high = row_scale(scale, at_target - m, v)
        if ON_CHIP:
            raw, u, col, valid = read_logits(
                input, base, 0, read, classes, cap, adjustment, in_strides,
                T, CAPPED, WIDE, ACROSS, CHUNKS, LANES, VECTOR,
            )  # fmt: skip
            u = tl.where(is_label(y, 0, CHUNKS, LANES, VECTOR), -INF, u)
            if saved is None:
                m = tl.max(thread_max(u), 1)
                s, high = row_scale(scale, at_target - m, v)
            floor = tl.where(m == -INF, 0.0, m)
            d = u - of_row(floor)
            if smoothing > 0:
                counted = tl.where(is_label(afresh(y, s), 0, CHUNKS, LANES, VECTOR) | (valid == 0), 0.0, d)
                if weight is not None:
                    counted = product(counted, tl.load(weight + col, valid, 0.0).to(T))
                weighted = row_sum(counted)
            # After that: what is not needed beside the exponentials leaves them its registers.
            e = tl.exp2(d * of_row(tl.where(kept, s, 1.0) * LOG2_E))
            if saved is None:
                total = row_sum(e)
            if stats is not None or TILTED:
                shift = row_sum(tl.where(e == 0, 0.0, e * d))
            if stats is not None:
                again = is_label(afresh(y, s), 0, CHUNKS, LANES, VECTOR)
                doubts = row_sum((u != u).to(tl.int32))
                above = row_sum((u > of_row(at_target)).to(tl.int32))
                whole = tl.where(again, of_row(at_target), u)
                highest = tl.maximum(m, at_target)
                first = tl.where((whole == of_row(highest)) & valid, col, BLOCK)
                first = tl.min(tl.min(tl.min(first, 0), 2), 1)
        elif saved is None:
            # Every thread keeps a maximum and sums of its own; they meet once, after the last block.
            low_scale = (row_scale(scale, zero - INF, v)[0] * LOG2_E)[:, None]
            high_scale = (row_scale(scale, zero + INF, v)[0] * LOG2_E)[:, None]
            none = tl.zeros((ROWS, LANES), T)
            top = none - INF
            low_total, high_total, counted, seen = none, none, none, none
            low_shift, high_shift = none, none
            best = none - INF
            above_here = tl.zeros((ROWS, LANES), tl.int32)
            first_here, doubts_here = above_here, above_here
            for block in range(blocks):
                start = block * BLOCK
                raw, u, col, valid = read_logits(
                    input, base, start, read, classes, cap, adjustment, in_strides,
                    T, CAPPED, WIDE, ACROSS, CHUNKS, LANES, VECTOR,
                )  # fmt: skip
                mine = is_label(y, start, CHUNKS, LANES, VECTOR)
                u = tl.where(mine, -INF, u)
                higher = tl.maximum(top, thread_max(u))
                floor_here = tl.where(higher == -INF, 0.0, higher)
                rise = tl.where(top == -INF, 0.0, top - floor_here)  # <= 0
                d = u - of_thread(floor_here)
                if stats is not None or TILTED:
                    low_shift = moved(low_shift, low_total, rise, low_scale) + tilted_sum(d, low_scale)
                    if TWO:
                        high_shift = moved(high_shift, high_total, rise, high_scale) + tilted_sum(d, high_scale)
                low_total = low_total * tl.exp2(rise * low_scale) + thread_sum(tl.exp2(d * of_thread(low_scale)))
                if TWO:
                    high_total = high_total * tl.exp2(rise * high_scale)
                    high_total += thread_sum(tl.exp2(d * of_thread(high_scale)))
                if smoothing > 0:
                    skipped = mine | (valid == 0)
                    weights = tl.where(skipped, 0.0, tl.full((CHUNKS, ROWS, LANES, VECTOR), 1.0, T))
                    if weight is not None:
                        weights = weights * tl.load(weight + col, valid, 0.0).to(T)
                    counted += rise * seen + thread_sum(product(tl.where(skipped, 0.0, d), weights))
                    seen += thread_sum(weights)
                if stats is not None:
                    doubts_here += thread_sum((u != u).to(tl.int32))
                    above_here += thread_sum((u > of_row(at_target)).to(tl.int32))
                    whole = tl.where(mine, of_row(at_target), u)
                    peak = thread_max(whole)
                    place = tl.where((whole == of_thread(peak)) & valid, col, classes)
                    place = tl.min(tl.min(place, 0), 2)
                    first_here = tl.where((peak > best) | (block == 0), place, first_here)
                    best = tl.maximum(best, peak)
                top = higher
            m = tl.max(top, 1)
            s, high = row_scale(scale, at_target - m, v)
            floor = tl.where(m == -INF, 0.0, m)
            fall = tl.where(top == -INF, 0.0, top - floor[:, None])
            total = tl.sum(product(low_total, tl.exp2(fall * low_scale)), 1)
            if TWO:
                total = tl.where(high, tl.sum(product(high_total, tl.exp2(fall * high_scale)), 1), total)
            weighted = tl.sum(counted + fall * seen, 1)
            if stats is not None or TILTED:
                shift = tl.sum(moved(low_shift, low_total, fall, low_scale), 1)
                if TWO:
                    shift = tl.where(high, tl.sum(moved(high_shift, high_total, fall, high_scale), 1), shift)
            if stats is not None:
                doubts, above = tl.sum(doubts_here, 1), tl.sum(above_here, 1)
                peak = tl.max(best, 1)
                first = tl.min(tl.where(best == peak[:, None], first_here, classes), 1)
        else:
            floor = tl.where(m == -INF, 0.0, m)
            sharpness = tl.where(kept, s, 1.0) * LOG2_E
            if TILTED:
                shift_here = tl.zeros((ROWS, LANES), T)
                for block in range(blocks):
                    start = block * BLOCK
                    raw, u, col, valid = read_logits(
                        input, base, start, read, classes, cap, adjustment, in_strides,
                        T, CAPPED, WIDE, ACROSS, CHUNKS, LANES, VECTOR,
                    )  # fmt: skip
                    u = tl.where(is_label(y, start, CHUNKS, LANES, VECTOR), -INF, u)
                    shift_here += tilted_sum(u - of_row(floor), sharpness[:, None])
                shift = tl.sum(shift_here, 1)
            if by_parameter is not None:
                if smoothing > 0:
                    for block in range(blocks):
                        start = block * BLOCK
                        raw, u, col, valid = read_logits(
                            input, base, start, read, classes, cap, adjustment, in_strides,
                            T, CAPPED, WIDE, ACROSS, CHUNKS, LANES, VECTOR,
                        )  # fmt: skip
                        counted = tl.where(
                            is_label(y, start, CHUNKS, LANES, VECTOR) | (valid == 0), 0.0, u - of_row(floor)
                        )
                        if weight is not None:
                            counted = product(counted, tl.load(weight + col, valid, 0.0).to(T))
                        weighted += row_sum(counted)
        if saved is None:
            log_sum = tl.log(total)
            share = tl.where(total == 0, 0.0, 1.0 / total)

        # ---- the loss
        transform, beyond_pi = kind(structure, TRANSFORM), kind(structure, BEYOND_PI)
        gradient_of_t = kind(structure, MARGIN_GRADIENT)
        t, slope, ta, tb, tc, tn, t_bin = transform_target(
            transform, beyond_pi, gradient_of_t, at_target, v, own_group, t_tables, T, PIECEWISE
        )
        nll, q, p, others, lse, alone = locate(at_target, m, log_sum, s, t)
        head, clamp = kind(structure, HEAD), kind(structure, CLAMP)
        phi, w, ha, hb, hc, hd, tau_bin = head_loss(head, clamp, nll, v, own_group, tau_tables, T, TAU)
        f_class, f_row, nothing = 1.0, 1.0, 0.0
        if REDUCTION == MEAN:
            if CONDITIONAL:
                f_class, f_row = earlier
            else:
                f_class, f_row = factors_of(all_weights, all_kept, T)
                nothing = 0.0 * f_class
                if factors is not None:
                    if tile == 0:
                        tl.store(factors, f_class)
                        tl.store(factors + 1, f_row)
        if row_weight is not None:
            own_weight = tl.load(row_weight + row, kept, 0.0).to(T)
            f_class, f_row = own_weight * f_class, own_weight * f_row
        if losses is not None:
            by_class, by_row = row_loss(
                classes, smoothing, z_loss, every_weight, s, nll, others, lse, alone, phi, w_y, weighted
            )
            leave_loss(losses, tile, row, rows, kept, by_class * f_class, by_row * f_row, nothing, REDUCTION)
        if save is not None:
            tl.store(save + 2 * row, tl.where(kept, m, 0.0), inside)
            tl.store(save + 2 * row + 1, tl.where(kept, log_sum, 0.0), inside)
        if stats is not None or TILTED:
            h = entropy(share, s, nll, q, p, others, alone, shift)
        if stats is not None:
            doubtful = exists & ((doubts > 0) | (at_target != at_target))
            leave_stats(stats, row, rows, kept, exists, lse, nll, h, at_target - m, first, above, doubtful)

        # ---- the gradients
        if gradient is not None or by_parameter is not None:
            g_class, g_row, g_lse, g_log_prob, g_h = upstream_of(
                upstream, upstream_strides, f_class, f_row, row, kept, T
            )
            if not TILTED:
                g_h = None
            a, b, spread, own_gradient, pull, part, flat, dz_y = coefficients(
                classes, smoothing, z_loss, every_weight, share, s, slope, nll, q, p, others, lse, alone, w, w_y, h,
                g_class, g_row, g_lse, g_log_prob, g_h,
            )  # fmt: skip
            row_coefficients = (a, b, spread, own_gradient)
            if gradient is not None:
                out = row_offset(row, sizes, out_strides, UNIT, DIMS, ACROSS)
            if ON_CHIP:
                if NEED_SHIFT & WANT:
                    # A class of probability 0 contributes 0, also when its logit is -inf.
                    if TILTED:
                        second = row_sum(tl.where(e == 0, 0.0, e * d * d))
                    else:
                        shift = row_sum(tl.where(e == 0, 0.0, e * d))
                if gradient is not None:
                    leave_gradient(
                        gradient, out, 0, inside, kept, afresh(y, share), raw, e, d, row_coefficients, weight,
                        smoothing, cap, col, valid, out_strides, T, TILTED, CAPPED, WIDE, ACROSS, CHUNKS, LANES, VECTOR,
                    )  # fmt: skip
            elif gradient is not None or NEED_SHIFT & WANT:
                sharpness = of_row(tl.where(kept, s, 1.0) * LOG2_E)
                sum_here = tl.zeros((ROWS, LANES), T)
                for back in range(blocks):
                    start = (blocks - 1 - back) * BLOCK
                    raw, u, col, valid = read_logits(
                        input, base, start, read, classes, cap, adjustment, in_strides,
                        T, CAPPED, WIDE, ACROSS, CHUNKS, LANES, VECTOR,
                    )  # fmt: skip
                    u = tl.where(is_label(y, start, CHUNKS, LANES, VECTOR), -INF, u)
                    d = u - of_row(floor)
                    e = tl.exp2(d * sharpness)
                    if NEED_SHIFT & WANT:
                        sum_here += thread_sum(tl.where(e == 0, 0.0, e * d * d if TILTED else e * d))
                    if gradient is not None:
                        leave_gradient(
                            gradient, out, start, inside, kept, y, raw, e, d, row_coefficients, weight, smoothing, cap,
                            col, valid, out_strides, T, TILTED, CAPPED, WIDE, ACROSS, CHUNKS, LANES, VECTOR,
                        )  # fmt: skip
                if TILTED:
                    second = tl.sum(sum_here, 1)
                else:
                    shift = tl.sum(sum_here, 1)
            if by_parameter is not None:
                by_s = by_scale(
                    classes, alone, m, share, s, t, nll, p, q, others, pull, part, flat, w_y, every_weight, weighted,
                    shift, second, h, g_h,
                )  # fmt: skip
                by_head = g_class * (1.0 - smoothing) * w_y
                leave_parameters(
                    by_parameter, bins, row, rows, kept, by_s, s, high, v[LOGIT_NORM], s * dz_y, (ta, tb, tc, tn),
                    by_head, (ha, hb, hc, hd), t_bin, tau_bin, scale == TWO_SCALE, WANT,
                )  # fmt: skip


# ---- sums, in a fixed order ------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "classes", "ignore_index"])
def count(target, weight, parts, rows, classes, ignore_index: tl.int64, chunk, BLOCK: tl.constexpr):
    """parts: (programs, 2), float64: the sum of weights and the number of the rows that count, of a chunk each.

    Reads each label once; a thread has 16 of them on the way.
    """
    pid = tl.program_id(0)
    target += pid.to(tl.int64) * chunk
    here = tl.minimum(rows - pid.to(tl.int64) * chunk, chunk).to(tl.int32)
    row = tl.arange(0, BLOCK)
    weights = tl.zeros((BLOCK,), tl.float64)
    kept = tl.zeros((BLOCK,), tl.int32)
    whole = here // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):  # without a mask, which would take the labels one by one
        each, ones = tally(tl.load(target + start + row), weight, row >= 0, classes, ignore_index)
        if weight is not None:
            weights += each
        kept += ones
    inside = whole + row < here
    each, ones = tally(tl.load(target + whole + row, inside, 0), weight, inside, classes, ignore_index)
    kept += ones
    number = tl.sum(kept, 0).to(tl.float64)
    tl.store(parts + 2 * pid, number if weight is None else tl.sum(weights + each, 0))
    tl.store(parts + 2 * pid + 1, number)


@triton.jit(do_not_specialize=["count"])
def total(terms, loss, count, BLOCK: tl.constexpr):
    """The loss: the terms, (count), added up in float64 by one program."""
    at = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    whole = count // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        sums += tl.load(terms + start + at).to(tl.float64)
    sums += tl.load(terms + whole + at, at < count - whole, 0.0).to(tl.float64)
    tl.store(loss, tl.sum(sums, 0).to(loss.dtype.element_ty))


@triton.jit(do_not_specialize=["rows", "per_group"])
def bucket(values, keys, group, sums, rows, chunk, per_group, BLOCK: tl.constexpr):
    """sums[bucket, program]: of the values whose key (their bin, of their group's bins) is the program's bucket.

    keys and group None: one bucket for all.
    """
    mine = tl.program_id(0)
    pid = tl.program_id(1)
    found = tl.zeros((BLOCK,), tl.float64)
    begin = pid.to(tl.int64) * chunk
    here = tl.minimum(rows - begin, chunk).to(tl.int32)
    for start in range(0, here, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < here
        value = tl.load(values + begin + row, inside, 0.0)
        if keys is not None:
            own = tl.load(keys + begin + row, inside, -1) == mine % per_group
            if group is not None:
                own = own & (tl.load(group + begin + row, inside, 0).to(tl.int64) == mine // per_group)
            value = tl.where(own, value, 0.0)
        found += value.to(tl.float64)
    tl.store(sums + mine * tl.num_programs(1) + pid, tl.sum(found, 0))
