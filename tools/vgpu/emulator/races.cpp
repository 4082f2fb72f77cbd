// Races on global memory: what a launch does to one byte must be ordered by barriers, or be atomic.
//
// A thread's accesses are known by stretches, which barriers and fences divide. One stretch is before another of its cluster
// by the epochs of their barriers. Between clusters there is one way: whoever fences and then adds to a counter makes known
// what was before his fence; whoever adds to the counter later and then fences knows it, and so does whom he meets at a
// barrier. An addition that releases or acquires is its own fence. A fence of less than the device counts for nothing, nor
// does a shuffle.
#include <algorithm>

#include "handlers.h"

namespace vgpu {

namespace {

// Of a byte's last readers there is kept a stretch of one of them, and how far they lie apart.
enum Readers : u32 { ONE, OF_WARP, OF_BLOCK, OF_BLOCKS };
constexpr u32 ATOMIC = 1;
constexpr int NUMBER = 2;  // the bits of a stretch's number begin here

u32 begin_stretch(Thread& t) {
  auto& stretches = t.machine->stretches;
  stretches.push_back({t.block->index, t.index, t.block_epoch, t.warp_epoch, t.cluster_epoch});
  return t.stretch = u32(stretches.size() - 1);
}
u32 stretch_of(Thread& t) {
  const Stretch& s = t.machine->stretches[t.stretch];
  const bool goes_on = t.stretch != 0 && s.block_epoch == t.block_epoch && s.warp_epoch == t.warp_epoch &&
                       s.cluster_epoch == t.cluster_epoch;
  return goes_on ? t.stretch : begin_stretch(t);
}

// Whether all that `readers` say of stretch `a` is before stretch `b`, by barriers alone.
bool before(const Machine& m, u32 a, Readers readers, u32 b) {
  const Stretch &x = m.stretches[a], &y = m.stretches[b];
  if (x.block == y.block) {
    if (readers == ONE && x.thread == y.thread) return a <= b;
    if (x.block_epoch < y.block_epoch) return true;
    return readers <= OF_WARP && x.thread / 32 == y.thread / 32 && x.warp_epoch < y.warp_epoch;
  }
  return m.cluster_of(x.block) == m.cluster_of(y.block) && x.cluster_epoch < y.cluster_epoch;
}

bool ordered(Thread& t, u32 touch, Readers readers) {
  const Machine& m = *t.machine;
  const u32 stretch = touch >> NUMBER;
  if (readers == OF_BLOCKS) return false;
  if (before(m, stretch, readers, stretch_of(t))) return true;
  if (!t.known) return false;
  const auto cluster = [&](u32 s) { return m.cluster_of(m.stretches[s].block); };
  const int its = cluster(stretch);
  auto known = std::lower_bound(t.known->begin(), t.known->end(), its, [&](u32 s, int c) { return cluster(s) < c; });
  for (; known != t.known->end() && cluster(*known) == its; ++known)
    if (before(m, stretch, readers, *known)) return true;
  return false;
}

[[noreturn]] void race(const Thread& t, const std::string& what, u32 touch, const std::string& does) {
  const Stretch& s = t.machine->stretches[touch >> NUMBER];
  fault(t, "RACE: global memory is " + what + " that block " + std::to_string(s.block) + ", thread " +
               std::to_string(s.thread) + " " + does + ", and nothing orders the two");
}

void read(Thread& t, GlobalShadow& cell, u32 now) {
  if (cell.written && !ordered(t, cell.written, ONE)) race(t, "read", cell.written, "wrote");
  Readers readers = ONE;
  if (cell.read) {
    const Readers others = Readers(cell.read & 3);
    const Stretch &before = t.machine->stretches[cell.read >> NUMBER], &own = t.machine->stretches[now];
    if (ordered(t, cell.read, others))
      readers = ONE;
    else if (before.block != own.block)
      readers = OF_BLOCKS;
    else
      readers = std::max(others, before.thread / 32 == own.thread / 32 ? OF_WARP : OF_BLOCK);
  }
  cell.read = now << NUMBER | readers;
}

void write(Thread& t, GlobalShadow& cell, u32 now, bool same) {
  const bool known =
      same && !(cell.written & ATOMIC) && t.machine->stretches[cell.written >> NUMBER].block == t.block->index;
  if (cell.written && !known && !ordered(t, cell.written, ONE)) race(t, "overwritten", cell.written, "wrote");
  if (cell.read && !ordered(t, cell.read, Readers(cell.read & 3))) race(t, "overwritten", cell.read, "reads");
  cell = {now << NUMBER, 0};
}

void add(Thread& t, GlobalShadow& cell, u32 now) {
  if (cell.written && !(cell.written & ATOMIC) && !ordered(t, cell.written, ONE))
    race(t, "added to", cell.written, "wrote");
  if (cell.read && !ordered(t, cell.read, Readers(cell.read & 3))) race(t, "added to", cell.read, "reads");
  cell = {now << NUMBER | ATOMIC, 0};
}

// Notes every byte; neighbours that were touched alike are alike afterwards. The allocation was found just before.
template <class Note>
void note(Thread& t, u64 address, u32 bytes, Note note_one) {
  Machine& m = *t.machine;
  if (m.flags & NO_RACES) return;
  const Allocation& allocation = m.recent[0];
  auto& shadows = m.global_shadows[allocation.index];
  constexpr u32 PAGE = Pages<GlobalShadow>::PAGE;
  u32 first = u32(address - (allocation.base & ~u64(PAGE - 1)));
  const u32 now = stretch_of(t);
  while (bytes > 0) {
    const u32 count = std::min(bytes, PAGE - first % PAGE);
    GlobalShadow* const cells = shadows.at(first);
    const GlobalShadow before = cells[0];
    note_one(cells[0], now);
    for (u32 k = 1; k < count; ++k) {
      if (cells[k] == before)
        cells[k] = cells[0];
      else
        note_one(cells[k], now);
    }
    first += count;
    bytes -= count;
  }
}

// What two know; of a thread's stretches the last.
Known joined(const Machine& m, const Known& a, const Known& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  const auto of = [&](u32 s) { return std::pair(m.stretches[s].block, m.stretches[s].thread); };
  std::vector<u32> both;
  std::merge(a->begin(), a->end(), b->begin(), b->end(), std::back_inserter(both),
             [&](u32 x, u32 y) { return std::pair(of(x), x) < std::pair(of(y), y); });
  auto last = std::make_shared<std::vector<u32>>();
  for (size_t k = 0; k < both.size(); ++k)
    if (k + 1 == both.size() || of(both[k]) != of(both[k + 1])) last->push_back(both[k]);
  return last;
}

void acquire(Thread& t) {
  t.known = joined(*t.machine, t.known, t.observed);
  t.observed.reset();
}
void release(Thread& t) {
  const auto own = std::make_shared<std::vector<u32>>(1, begin_stretch(t));
  t.published = joined(*t.machine, t.known, own);
  t.stretch = 0;
}

}  // namespace

void note_global_read(Thread& t, u64 address, u32 bytes) {
  note(t, address, bytes, [&](GlobalShadow& cell, u32 now) { read(t, cell, now); });
}
void note_global_write(Thread& t, u64 address, u32 bytes, bool same) {
  note(t, address, bytes, [&](GlobalShadow& cell, u32 now) { write(t, cell, now, same); });
}
void note_global_add(Thread& t, u64 address, u32 bytes, u32 order) {
  if (order & RELEASES) release(t);
  note(t, address, bytes, [&](GlobalShadow& cell, u32 now) { add(t, cell, now); });
  Known& counter = t.machine->counters[address];
  t.observed = joined(*t.machine, t.observed, counter);
  counter = joined(*t.machine, counter, t.published);
  if (order & ACQUIRES) acquire(t);
}

void fence(Thread& t) {
  acquire(t);
  release(t);
}

void meet(const Machine& m, Thread* const* first, Thread* const* last) {
  Known all;
  for (auto t = first; t != last; ++t) all = joined(m, all, (*t)->known);
  if (all)
    for (auto t = first; t != last; ++t) (*t)->known = all;
}

}  // namespace vgpu
