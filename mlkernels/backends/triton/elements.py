"""The elements of a tile of rows: which thread has which, how they are read, and how threads add them up.

A tile is (chunks, rows, lanes, vector): a chunk of a row is a vector of neighbours for each of a few threads, and all
chunks are the same threads'. So a thread has many classes of one row, and the row's scalar mathematics, which each of
its threads does, costs little.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import INF
from .elementary import tanh

LOG2_E = tl.constexpr(1.4426950408889634)  # exp is the hardware's exp2 of that, which a row's scale can take in


# ---- who has what ----------------------------------------------------------------------------------------------------


@triton.jit
def of_row(x):
    """A number of each row, beside the tile's elements."""
    return x[None, :, None, None]


@triton.jit
def of_thread(x):
    """A number of each thread (of each row), beside the tile's elements."""
    return x[None, :, :, None]


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


# ---- sums and maxima -------------------------------------------------------------------------------------------------


@triton.jit
def thread_sum(x):
    return tl.sum(tl.sum(x, 0), 2)


@triton.jit
def thread_max(x):
    return tl.max(tl.max(x, 0), 2)


@triton.jit
def row_sum(x):
    return tl.sum(thread_sum(x), 1)


@triton.jit
def product(x, y):
    """x y, rounded. A product that is added up is fused into the addition; where threads exchange it, by each of them
    its own, so that they end with different last bits. Which elements they exchange is the compiler's choice."""
    return tl.fma(x, y, 0.0)


@triton.jit
def tilted_sum(d, times, sharpness):
    """Of a thread's own classes, exp2(sharpness d) d (times); one of probability 0 adds 0, also when its logit is
    -inf."""
    e = tl.exp2(d * of_thread(sharpness))
    tilted = e * d
    if times is not None:
        tilted *= times
    return thread_sum(tl.where(e == 0, 0.0, tilted))


@triton.jit
def moved(shift, total, fall, sharpness):
    """A thread's tilted sum, where what it is relative to rises by -fall."""
    fade = tl.exp2(fall * sharpness)
    return tl.where(fade == 0, 0.0, product(fade, shift + fall * total))


# ---- memory ----------------------------------------------------------------------------------------------------------


@triton.jit
def multiple(number, UNIT: tl.constexpr):
    """A number that is a multiple of UNIT, told so that the compiler sees it: Triton itself looks for 16 only, and 1000
    classes would be read one by one."""
    if UNIT > 1:
        number = number // UNIT * UNIT
    return number


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
def places(
    tensor, base, col, stride, WIDE: tl.constexpr, ACROSS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    """Where a tile's elements lie."""
    place = tensor + of_row(base) + (col.to(tl.int64) if WIDE else col) * stride
    # Triton deals to threads what it thinks is most contiguous, and a tie by its version. So it is told an order:
    # vectors, then lanes, then rows; a thread keeps all chunks. How much is accessed at once is for the alignment to
    # say, which is believed whatever it is: so it is what arguments.py found in sizes, strides and pointers.
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
def prepared(u, preparation, col, valid, T: tl.constexpr, CAPPED: tl.constexpr):
    """Logits after softcap and adjustment. preparation: the cap, the class of col 0, and the vectors of all classes."""
    cap, start, vectors = preparation
    adjustment = vectors[1]
    if CAPPED:
        u = tl.where(u == INF, float("nan"), cap * tanh(u / cap))  # tanh would hide an overflow
    if adjustment is not None:
        u += tl.load(adjustment + start + col, valid, 0.0).to(T)
    return u


@triton.jit
def element_factors(factors, col, valid, T: tl.constexpr):
    """What products of vectors are multiplied by to be those of directions: a factor for the row, one for the class."""
    return of_row(factors[0]) * tl.load(factors[1] + col, valid, 1.0).to(T)


#: Whole multiples of these, by 2^32, are spread evenly along rows and classes: csrc/cpu/bfloat16.cpp has the same,
#: and how they were found.
ALONG_ROWS, ALONG_CLASSES = tl.constexpr(3689978203), tl.constexpr(1665798771)


@triton.jit
def by_place(x, fractions, col):
    """Float32 as one of the two of bfloat16 that it is between, as often the one as it is near, by where it lies: what
    is nearly equal would all go to the nearest, and what that loses would add up. fractions: of each row, by 2^32."""
    bits = x.to(tl.uint32, bitcast=True)
    bits += (fractions + col.to(tl.uint32) * ALONG_CLASSES) >> 16
    return tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)


@triton.jit
def read_logits(
    source, first, T: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr, ACROSS: tl.constexpr,
    CHUNKS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The logits of the classes from the first on, as they lie and prepared; their columns, and whether there are."""
    input, base, read, classes, preparation, strides, factors = source
    col = first + (tl.arange(0, LANES) * VECTOR)[None, None, :, None] + offsets(CHUNKS, LANES, VECTOR)
    # In the tile's whole shape: what is read by class is then read by the threads that need it.
    col += of_row(tl.zeros_like(base).to(tl.int32))
    valid = col < classes
    place = places(input, base, col, strides[0], WIDE, ACROSS, LANES, VECTOR)
    raw = tl.load(place, of_row(read) & valid, -INF).to(T)
    if factors is not None:
        raw *= element_factors(factors, col, valid, T)
    u = prepared(raw, preparation, col, valid, T, CAPPED)
    if CAPPED:
        u = tl.where(valid, u, -INF)
    return raw, u, col, valid
