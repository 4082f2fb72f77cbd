// The primitives of simt.h without a device, over the fibers of machine.h.
#pragma once

#include <cmath>

#include "machine.h"

#define MLK_DEVICE inline

namespace mlkernels {

struct Simt {
  int thread() const { return self().thread; }
  int threads() const { return machine().threads; }
  int lane() const { return self().thread % LANES; }
  int warp() const { return self().thread / LANES; }
  int warps() const { return machine().threads / LANES; }
  int block() const { return self().block->index; }
  int blocks() const { return machine().blocks; }
  int rank() const { return self().block->rank; }
  int ranks() const { return machine().cluster; }

  template <class V>
  V exchange(V x, int from) const {
    return collective(EXCHANGE, x, from);
  }
  template <class V>
  V butterfly(V x, int mask) const {
    return collective(BUTTERFLY + mask, x, lane() ^ mask);
  }

  void warp_sync() const {
    collective(SYNC, 0, 0);
    ++self().warp_epoch;
  }
  void block_sync() const {
    machine().meet(self().block->waiting, machine().threads);
    ++self().block_epoch;
  }
  void cluster_sync() const {
    machine().meet(machine().at_cluster_sync, machine().threads * machine().cluster);
    ++self().block_epoch;
    ++self().cluster_epoch;
  }

  template <class V>
  V load(int at) const {
    check_place<V>(at);
    simt::Fiber& f = self();
    machine().note(f, at, int(sizeof(V)));
    ++f.accesses;
    for (int i = at; i < at + int(sizeof(V)); i += 2) {
      simt::Cell& cell = cell_of(*f.block, i);
      if (cell.launch != machine().cluster_launch || (cell.writer.thread == -1 && cell.barrier < 0))
        machine().fail("shared memory is read that nobody wrote, at " + std::to_string(i));
      if (cell.barrier >= 0) {
        const auto seen = f.seen.find(cell.barrier);
        if (cell.arriving || seen == f.seen.end() || seen->second < cell.phase)
          machine().fail("shared memory is read before its copy was waited for, at " + std::to_string(i));
      } else if (!ordered(cell.writer)) {
        machine().fail("shared memory is read that another thread wrote without a barrier between, at " +
                       std::to_string(i));
      }
      note_reader(cell);
    }
    V out;
    std::memcpy(&out, f.block->shared.data() + at, sizeof(V));
    return out;
  }
  template <class V>
  void store(int at, V value) const {
    check_place<V>(at);
    machine().note(self(), at, int(sizeof(V)));
    write(*self().block, at, &value, sizeof(V));
  }
  void store_remote(int rank, int at, double value) const {
    check_place<double>(at);
    write(reach(rank), at, &value, sizeof value);
  }

  bool comes_last(uint32_t* counter, uint32_t count) const {
    if (*counter >= count) machine().fail("a block comes that was not counted on");
    return ++*counter == count;
  }

  void barrier_init(int barrier) const {
    check_place<uint64_t>(barrier);
    self().block->barriers[barrier] = simt::Barrier();
  }
  void barriers_ready() const {}
  void before_copy() const { self().fenced = self().accesses; }
  void copy_async(int barrier, int to, const void* from, int vectors) const {
    if (self().accesses != self().fenced)
      machine().fail("a copy without before_copy after the accesses of this thread");
    collective(COPY, 0, 0);
    if (lane() != 0) return;
    simt::Fiber& f = self();
    simt::Block& block = *f.block;
    const auto found = block.barriers.find(barrier);
    if (found == block.barriers.end()) machine().fail("a copy without barrier_init");
    if (found->second.busy || (found->second.completed > 0 && f.seen[barrier] < found->second.completed))
      machine().fail("a copy is asked for before the barrier's earlier one was waited for");
    if (reinterpret_cast<uintptr_t>(from) % 16 || to % 16) machine().fail("a copy from or to a place not at 16 bytes");
    if (to < 0 || to + 16 * vectors > machine().shared_bytes) machine().fail("a copy beyond the end of shared memory");
    for (int at = to; at < to + 16 * vectors; at += 2) {
      simt::Cell& cell = cell_of(block, at);
      if (cell.launch == machine().cluster_launch) {
        if (cell.arriving) machine().fail("two copies to one place at once");
        if (cell.barrier < 0 && cell.writer.thread != -1 && !ordered(cell.writer, true))
          machine().fail("a copy overwrites what another thread is writing, at " + std::to_string(at));
        if (cell.reader.thread != -1 && !ordered(cell.reader, true))
          machine().fail("a copy overwrites what another thread is reading, at " + std::to_string(at));
      }
      cell = simt::Cell();
      cell.launch = machine().cluster_launch;
      cell.barrier = barrier;
      cell.arriving = true;
    }
    found->second.busy = true;
    machine().ask({&block, barrier, to, static_cast<const char*>(from), 16 * vectors, {}});
  }
  template <class V>
  void store_async(int rank, int at, V value, int barrier) const {
    check_place<V>(at);
    simt::Block& block = reach(rank);
    const auto found = block.barriers.find(barrier);
    if (found == block.barriers.end()) machine().fail("an asynchronous store without barrier_init");
    const simt::Cell& cell = cell_of(block, at);
    if (cell.launch == machine().cluster_launch && cell.barrier == barrier && cell.phase == found->second.completed + 1)
      machine().fail("two asynchronous stores to one place");
    simt::Copy copy{&block, barrier, at, nullptr, int(sizeof(V)), {}};
    std::memcpy(copy.value, &value, sizeof(V));
    machine().ask(copy);
  }
  void expect(int barrier, int bytes) const {
    simt::Barrier& b = self().block->barriers.at(barrier);
    if (b.expected >= 0) machine().fail("a barrier expects bytes already");
    b.expected = bytes;
    machine().complete_stores(b);
  }
  void copy_wait(int barrier, int parity) const {
    simt::Fiber& f = self();
    simt::Barrier& b = f.block->barriers.at(barrier);
    while (int((b.completed + 1) & 1) != parity) machine().wait(b.waiting);
    f.seen[barrier] = b.completed;
  }

 private:
  enum Kind { SYNC = 1000, EXCHANGE = 2000, COPY = 3000, BUTTERFLY = 4000 };

  static simt::Machine& machine() { return simt::Machine::get(); }
  static simt::Fiber& self() { return machine().running(); }

  template <class V>
  V collective(int kind, V x, int from) const {
    static_assert(sizeof(V) <= 16, "at most 16 bytes");
    simt::Fiber& f = self();
    simt::Warp& warp = f.block->warps[size_t(f.thread / LANES)];
    // Two sets of values in turn: a lane may be one call ahead of the slowest, never two.
    unsigned char (&values)[LANES][16] = warp.value[f.collectives++ & 1];
    if (warp.waiting.empty())
      warp.kind = kind;
    else if (warp.kind != kind)
      machine().fail("the lanes of a warp call different collectives");
    std::memcpy(values[f.thread % LANES], &x, sizeof(V));
    if (int(warp.waiting.size()) + 1 == LANES) machine().settle(warp);
    machine().meet(warp.waiting, LANES);
    f.together = f.accesses;
    if (from < 0 || from >= LANES) machine().fail("an exchange with lane " + std::to_string(from));
    V out;
    std::memcpy(&out, values[from], sizeof(V));
    return out;
  }

  template <class V>
  void check_place(int at) const {
    if (at < 0 || at + int(sizeof(V)) > machine().shared_bytes)
      machine().fail("an access beyond the end of shared memory, at " + std::to_string(at));
    if (at % int(sizeof(V))) machine().fail("a misaligned access to shared memory, at " + std::to_string(at));
  }

  static simt::Block& reach(int rank) {
    simt::Block& block = machine().neighbour(rank);
    if (machine().cluster > 1 && self().cluster_epoch < 2)
      machine().fail("another block is reached before the first cluster_sync");
    if (block.finished == machine().threads) machine().fail("a block is reached that has ended");
    return block;
  }

  static simt::Cell& cell_of(simt::Block& block, int at) { return block.cells[size_t(at / 2)]; }

  // Whether a barrier lies between that and what this thread does now. whole_warp: the other lanes of the warp are not
  // excepted, nor is this one's own order of any use: the copy engine does not know it.
  bool ordered(const simt::Touch& touch, bool whole_warp = false) const {
    const simt::Fiber& f = self();
    if (touch.thread == f.number && !whole_warp) return true;
    const int rank = touch.warp >= 0 ? touch.warp * LANES / machine().threads : f.block->rank;
    if (rank != f.block->rank) return touch.cluster_epoch < f.cluster_epoch;
    if (touch.block_epoch < f.block_epoch) return true;
    return touch.warp == f.number / LANES && touch.warp_epoch < f.warp_epoch;
  }

  simt::Touch now() const {
    const simt::Fiber& f = self();
    return {f.number, f.number / LANES, f.block_epoch, f.warp_epoch, f.cluster_epoch};
  }

  void note_reader(simt::Cell& cell) const {
    const simt::Touch mine = now();
    simt::Touch& last = cell.reader;
    const bool together = last.thread != -1 && last.thread != mine.thread && last.block_epoch == mine.block_epoch;
    const int warp = last.warp;
    last = mine;
    if (!together) return;
    last.thread = simt::MANY;
    if (warp != mine.warp) last.warp = -1;
  }

  void write(simt::Block& block, int at, const void* from, size_t bytes) const {
    simt::Machine& m = machine();
    ++self().accesses;
    for (int i = at; i < at + int(bytes); i += 2) {
      simt::Cell& cell = cell_of(block, i);
      if (cell.launch == m.cluster_launch) {
        if (cell.barrier >= 0) {
          const auto seen = self().seen.find(cell.barrier);
          if (cell.arriving || &block != self().block || seen == self().seen.end() || seen->second < cell.phase)
            m.fail("shared memory is written while a copy may arrive there, at " + std::to_string(i));
        } else if (cell.writer.thread != -1 && !ordered(cell.writer)) {
          m.fail("two threads write without a barrier between, at " + std::to_string(i));
        }
        if (cell.reader.thread != -1 && !ordered(cell.reader) &&
            !(cell.reader.thread == self().number && &block == self().block))
          m.fail("shared memory is overwritten that another thread reads, at " + std::to_string(i));
      } else {
        cell = simt::Cell();
        cell.launch = m.cluster_launch;
      }
      cell.barrier = -1;
      cell.writer = now();
      cell.reader = simt::Touch();
    }
    std::memcpy(block.shared.data() + at, from, bytes);
  }
};

// ---- arithmetic and storage ------------------------------------------------------------------------------------------

inline float exp2_of(float x) { return ::exp2f(x); }
inline double exp2_of(double x) { return ::exp2(x); }

template <class S>
uint32_t narrow_pair(float low, float high, S) {
  S two[2];
  MLKERNELS_ISA::narrow(low, two[0]);
  MLKERNELS_ISA::narrow(high, two[1]);
  return uint32_t(two[0].bits) | uint32_t(two[1].bits) << 16;
}

inline float larger(float a, float b) { return b > a || a != a ? b : a; }
inline double larger(double a, double b) { return b > a || a != a ? b : a; }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }

template <class S>
uint32_t larger_pair(uint32_t a, uint32_t b, S) {
  uint32_t out = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint16_t x = uint16_t(a >> shift), y = uint16_t(b >> shift);
    const float u = MLKERNELS_ISA::widen(S{x}), w = MLKERNELS_ISA::widen(S{y});
    out |= uint32_t(w > u || u != u ? y : x) << shift;
  }
  return out;
}

inline void check_vector(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16) throw std::runtime_error("simt: a vector not at 16 bytes");
}
inline Vec16 load_vector(const void* at) {
  check_vector(at);
  Vec16 out;
  std::memcpy(&out, at, 16);
  return out;
}
inline void store_vector(void* at, const Vec16& v) {
  check_vector(at);
  std::memcpy(at, &v, 16);
}

}  // namespace mlkernels
