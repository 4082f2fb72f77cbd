// How the long rows of rows_long.h are shared out over warps, and what lies where in shared memory.
#pragma once

#include "visit.h"

namespace mlkernels {

// How a long row is shared out.
struct RowPlan {
  int chunk;   // vectors of 16 bytes that come together; one more where the row does not begin with one
  int slots;   // places of a warp's ring
  int each;    // vectors of a warp's share of a row
  int chunks;  // chunks of those, the last one perhaps shorter
  MLK_FN int slot_bytes() const { return (chunk + 1) * 16; }
};

namespace MLKERNELS_ISA {

constexpr int SUMS = 4;  // numbers that a warp posts to the others, of 8 bytes at most

// Where things lie in shared memory.
struct LongOffsets {
  int barriers, mailbox, ring;  // and at 0 the barriers of a cluster's mailboxes
  MLK_FN LongOffsets(const RowPlan& plan, int warp, int warps, int ranks) {
    barriers = 16 + warp * plan.slots * 8;
    mailbox = (16 + warps * plan.slots * 8 + 127) / 128 * 128;
    const int rings = mailbox + (2 * warps * ranks * SUMS * 8 + 127) / 128 * 128;
    ring = rings + warp * plan.slots * plan.slot_bytes();
  }
};
inline int long_shared_bytes(const RowPlan& plan, int warps, int ranks) {
  return LongOffsets(plan, warps, warps, ranks).ring;
}

// u becomes (u - m) scale, of base-2 exponentials, up to a number that all of a row share and that `slip` returns: one
// multiplication with addition in place of two operations, and no digit is lost.
template <class T>
struct Exponent {
  T m, scale2, shifted;
  bool fused;  // large logits would make the slip large
  MLK_DEVICE explicit Exponent(const RowState<T>& state)
      : m(state.floor()), scale2(state.scale2()), shifted(m * scale2) {
    fused = sizeof(T) == 4 && m_abs(shifted) < T(1 << 18);
  }
  MLK_DEVICE T correction() const { return fused ? exp2_of(-multiply_add(m, scale2, -shifted)) : T(1); }
  template <bool FUSED>
  MLK_DEVICE T of(T u) const {
    return FUSED ? exp2_of(multiply_add(u, scale2, -shifted)) : exp2_of((u - m) * scale2);
  }
};

// A warp's share of a row that lies in memory at x.
struct Span {
  const char* base;    // the 16-byte boundary before the row
  int phase;           // elements between the two
  int64_t begin, end;  // classes
};
template <class S>
MLK_DEVICE Span span_of(const S* x, int64_t classes, const RowPlan& plan, int part) {
  Span out;
  out.phase = phase_of(x);
  out.base = reinterpret_cast<const char*>(x - out.phase);
  const int64_t share = int64_t(plan.each) * PER_VECTOR<S>, begin = part * share;
  out.begin = begin < classes ? begin : classes;
  out.end = out.begin + share < classes ? out.begin + share : classes;
  return out;
}

// A chunk of that: the classes [from, from + size), of which the first is element `lead` of the first of `count` vectors.
struct Chunk {
  int64_t from;
  int size, lead, count;
  int ring;  // where it lies in shared memory
  MLK_DEVICE int64_t first() const { return from - lead; }
  // Whether an element of its vectors belongs to it.
  MLK_DEVICE bool holds(int element) const { return uint32_t(element - lead) < uint32_t(size); }
};
// V: elements of a vector.
template <int V>
MLK_DEVICE Chunk chunk_at(const Span& span, const RowPlan& plan, int64_t which, int ring) {
  const int64_t from = span.begin + which * (plan.chunk * V), left = span.end - from;
  const int size = int(left < 0 ? 0 : left < plan.chunk * V ? left : plan.chunk * V);
  return {from, size, span.phase, size > 0 ? (span.phase + size + V - 1) / V : 0, ring};
}

// A place of a ring, and how often it has been filled.
struct RingSlot {
  int slot = 0, parity = 0;
  MLK_DEVICE void next(const RowPlan& plan) {
    if (++slot < plan.slots) return;
    slot = 0;
    parity ^= 1;
  }
};

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
