"""Sums over rows, in a fixed order: what "mean" divides by, the loss, the gradients of tables.

Nothing is accumulated by atomics: a program leaves the sum of its own rows, and one adds those up in order. Which one
that is may be counted by atomics, whoever it is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import INF, MODE_BASE, NORMALIZER, SHARED
from .finish import legal
from .operands import label_of

#: How many partial sums of weights there are at most; every program adds them up for itself.
PARTS = tl.constexpr(128)
#: So few labels may every program count for itself.
FEW = tl.constexpr(2048)
#: Of so many programs one adds up the losses.
GROUP = tl.constexpr(1024)


# ---- the mean's factors ----------------------------------------------------------------------------------------------


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
        weights = tl.where(lane == 0, legal((divisor > 0) & (divisor < INF), divisor), 0.0)
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
def factors_of(weights, kept, per_row, T: tl.constexpr):
    """What "mean" multiplies a row's terms by, per class weight and, where there are any, per row. Smoothing has a loss
    where the weights sum to 0: that is no mean either."""
    by_weight = tl.sum(weights, 0)
    f_class = legal(by_weight != 0, 1.0 / by_weight).to(T)
    f_row = f_class
    if per_row:
        f_row = (1.0 / tl.sum(kept, 0)).to(T)
    return f_class, f_row


@triton.jit(do_not_specialize=["rows", "classes", "ignore_index", "counters"])
def count(target, weight, parts, rows, classes, ignore_index: tl.int64, chunk, counters, BLOCK: tl.constexpr):
    """parts: (programs, 2), float64: the sum of weights and the number of the rows that count, of a chunk each. The
    counters behind them, as many, are set to 0.

    Reads each label once; a thread has 16 of them on the way.
    """
    pid = tl.program_id(0)
    for start in range(pid * BLOCK, counters, tl.num_programs(0) * BLOCK):
        counter = start + tl.arange(0, BLOCK)
        tl.store(parts + 2 * tl.num_programs(0) + counter, 0.0, counter < counters)
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


# ---- over all rows ---------------------------------------------------------------------------------------------------


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


@triton.jit
def comes_last(counter, programs):
    """Whether of so many programs this is the last to raise a counter that began at 0: it sees what each of them has
    stored before, where it does not read that from its own multiprocessor's cache."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="release", scope="gpu") == programs - 1
    if last:  # nobody else has to forget what he has read; an addition of nothing might be left out
        tl.atomic_add(counter, 1, sem="acquire", scope="gpu")
        tl.debug_barrier()
    return last


@triton.jit
def add_up(terms, loss, parts, count):
    """The loss: the terms, one of each program, added up in float64 by the last program of each GROUP, and those sums
    by the last of these.

    parts: where count has set counters to 0, behind as many parts; behind these is room for a sum of each group.
    """
    pid = tl.program_id(0)
    groups = tl.cdiv(tl.num_programs(0), GROUP)
    counters = parts + 2 * count  # of 64 bits: all of them together, then each group
    group = pid // GROUP
    size = tl.minimum(tl.num_programs(0) - group * GROUP, GROUP)
    at = tl.arange(0, GROUP)
    if comes_last((counters + 1 + group).to(tl.pointer_type(tl.int32)), size):
        own = tl.load(terms + group * GROUP + at, at < size, 0.0, cache_modifier=".cg")
        found = tl.sum(own.to(tl.float64), 0)
        if groups == 1:
            tl.store(loss, found.to(loss.dtype.element_ty))
        else:
            sums = counters + 1 + groups
            tl.store(sums + group, found)
            if comes_last(counters.to(tl.pointer_type(tl.int32)), groups):
                all_sums = tl.zeros((GROUP,), tl.float64)
                for start in range(0, groups, GROUP):
                    all_sums += tl.load(sums + start + at, at < groups - start, 0.0, cache_modifier=".cg")
                tl.store(loss, tl.sum(all_sums, 0).to(loss.dtype.element_ty))


@triton.jit(do_not_specialize=["rows", "chunk", "per_group", "apart"])
def bucket(values, keys, group, out, rows, chunk, per_group, apart, BLOCK: tl.constexpr):
    """out[bucket, program]: the sum, in float64, of a chunk of the bucket's values, rounded to what out holds.

    Those are the values whose key (their bin, of their group's bins) is the bucket, of those that begin apart times
    the bucket after the first. keys and group None: all.
    """
    mine = tl.program_id(0)
    pid = tl.program_id(1)
    found = tl.zeros((BLOCK,), tl.float64)
    begin = pid.to(tl.int64) * chunk
    here = tl.minimum(rows - begin, chunk).to(tl.int32)
    for start in range(0, here, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < here
        value = tl.load(values + mine.to(tl.int64) * apart + begin + row, inside, 0.0)
        if keys is not None:
            own = tl.load(keys + begin + row, inside, -1) == mine % per_group
            if group is not None:
                own = own & (tl.load(group + begin + row, inside, 0).to(tl.int64) == mine // per_group)
            value = tl.where(own, value, 0.0)
        found += value.to(tl.float64)
    whole = tl.sum(found, 0)
    if out.dtype.element_ty != tl.float64:  # by way of float32: the interpreter cannot round float64 to halves
        whole = whole.to(tl.float32)
    tl.store(out + mine * tl.num_programs(1) + pid, whole.to(out.dtype.element_ty))
