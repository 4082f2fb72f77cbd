// Memory of every space, and who may touch which byte of it when.
#include <algorithm>
#include <cstdio>

#include "handlers.h"

namespace vgpu {

std::string hex(u64 x) {
  char text[32];
  snprintf(text, sizeof text, "0x%llx", (unsigned long long)x);
  return text;
}

// ---- global memory ---------------------------------------------------------------------------------------------------

namespace {

bool inside(const Allocation& a, u64 address, u32 bytes) {
  return address - a.base < a.size && address + bytes <= a.base + a.size;
}

u64 load_bits(const u8* from, int bytes, bool extend) {
  switch (bytes) {
    case 1: return extend ? u64(s64(s8(*from))) : *from;
    case 2: {
      u16 x;
      memcpy(&x, from, 2);
      return extend ? u64(s64(s16(x))) : x;
    }
    case 4: {
      u32 x;
      memcpy(&x, from, 4);
      return extend ? u64(s64(s32(x))) : x;
    }
    default: {
      u64 x;
      memcpy(&x, from, 8);
      return x;
    }
  }
}

// Where an instruction's vector lies.
struct Access {
  u64 address;
  u32 bytes;
  Access(Thread& t, const Instruction& i) : bytes(u32(i.count) * i.bytes) {
    need(t, i.in[0], "an address");
    address = value(t, i.in[0]) + u64(i.immediate);
  }
};

// Elements with their defined bytes, into registers.
void load_elements(Thread& t, const Instruction& i, const u8* from, const u8* known) {
  const u8 whole = bytes_mask(i.bytes);
  for (int e = 0; e < i.count; ++e, from += i.bytes, known += i.bytes) {
    u8 mask = 0;
    for (int k = 0; k < i.bytes; ++k) mask |= u8((known[k] ? 1 : 0) << k);
    // The bytes above are zeros, or copies of the sign.
    mask |= i.extend && mask != whole ? 0 : u8(~whole);
    set_masked(t, i.out[e], load_bits(from, i.bytes, i.extend), mask);
  }
}
void store_elements(Thread& t, const Instruction& i, u8* to, u8* known) {
  for (int e = 0; e < i.count; ++e, to += i.bytes, known += i.bytes) {
    const u64 bits = value(t, i.in[1 + e]);
    const u8 own = mask(t, i.in[1 + e]);
    memcpy(to, &bits, i.bytes);
    for (int k = 0; k < i.bytes; ++k) known[k] = own >> k & 1;
  }
}

}  // namespace

u8* global_memory(Thread& t, u64 address, u32 bytes, bool write, u32 align) {
  Machine& m = *t.machine;
  const char* kind = write ? "store" : "load";
  if (address % align)
    fault(t, std::string("MISALIGNED global ") + kind + " of " + std::to_string(align) + " bytes at " + hex(address));
  if (inside(m.recent[0], address, bytes)) return reinterpret_cast<u8*>(address);
  if (inside(m.recent[1], address, bytes)) {
    std::swap(m.recent[0], m.recent[1]);
    return reinterpret_cast<u8*>(address);
  }
  auto after = std::upper_bound(m.allocations.begin(), m.allocations.end(), address,
                                [](u64 x, const Allocation& a) { return x < a.base; });
  std::string what =
      std::string("OUT OF BOUNDS global ") + kind + " of " + std::to_string(bytes) + " bytes at " + hex(address);
  if (after == m.allocations.begin()) fault(t, what);
  const Allocation& before = *--after;
  if (!inside(before, address, bytes)) {
    what += ": nearest allocation " + hex(before.base) + "+" + std::to_string(before.size);
    fault(t, what + " (offset " + std::to_string(s64(address - before.base)) + ")");
  }
  m.recent[1] = m.recent[0];
  m.recent[0] = before;
  return reinterpret_cast<u8*>(address);
}

Next load_global(Thread& t, const Instruction& i) {
  ++t.machine->counts.loads;
  const Access at(t, i);
  const u8* from = global_memory(t, at.address, at.bytes, false, at.bytes);
  note_global_read(t, at.address, at.bytes);
  for (int e = 0; e < i.count; ++e) set(t, i.out[e], load_bits(from + e * i.bytes, i.bytes, i.extend));
  return Next::STEP;
}
Next store_global(Thread& t, const Instruction& i) {
  ++t.machine->counts.stores;
  const Access at(t, i);
  u8* to = global_memory(t, at.address, at.bytes, true, at.bytes);
  bool same = true;
  for (int e = 0; e < i.count; ++e) {
    need(t, i.in[1 + e], "a value stored to global memory", i.bytes);
    const u64 bits = value(t, i.in[1 + e]);
    same &= !memcmp(to + e * i.bytes, &bits, i.bytes);
    memcpy(to + e * i.bytes, &bits, i.bytes);
  }
  note_global_write(t, at.address, at.bytes, same);
  return Next::STEP;
}

Next add_global(Thread& t, const Instruction& i) {
  ++t.machine->counts.loads;
  ++t.machine->counts.stores;
  const Access at(t, i);
  u8* place = global_memory(t, at.address, at.bytes, true, at.bytes);
  need(t, i.in[1], "a value added to global memory", i.bytes);
  note_global_add(t, at.address, at.bytes, i.kind);
  const u32 before = u32(load_bits(place, 4, false)), after = before + u32(value(t, i.in[1]));
  memcpy(place, &after, 4);
  set(t, i.out[0], before);
  return Next::STEP;
}

// ---- parameters, and what calls pass ---------------------------------------------------------------------------------

Next load_parameter(Thread& t, const Instruction& i) {
  const Access at(t, i);
  const u64 offset = at.address - PARAMETER_BASE;
  if (at.address % at.bytes) fault(t, "MISALIGNED parameter load at " + std::to_string(offset));
  if (offset + at.bytes > u64(t.machine->function->parameter_bytes))
    fault(t, "parameter load out of bounds at " + std::to_string(s64(offset)));
  const u8* from = t.machine->parameters + offset;
  for (int e = 0; e < i.count; ++e) set(t, i.out[e], load_bits(from + e * i.bytes, i.bytes, i.extend));
  return Next::STEP;
}
Next load_scratch(Thread& t, const Instruction& i) {
  const u8* from = t.scratch + value(t, i.in[0]) + i.immediate;
  for (int e = 0; e < i.count; ++e) set(t, i.out[e], load_bits(from + e * i.bytes, i.bytes, i.extend));
  return Next::STEP;
}
Next store_scratch(Thread& t, const Instruction& i) {
  u8* to = t.scratch + value(t, i.in[0]) + i.immediate;
  for (int e = 0; e < i.count; ++e) {
    need(t, i.in[1 + e], "an argument", i.bytes);
    const u64 bits = value(t, i.in[1 + e]);
    memcpy(to + e * i.bytes, &bits, i.bytes);
  }
  return Next::STEP;
}

// ---- local memory ----------------------------------------------------------------------------------------------------

namespace {

bool is_local(const Thread& t, u64 address) { return address - LOCAL_BASE < t.local.size(); }

u64 local_offset(Thread& t, const Access& at, const char* kind) {
  const u64 offset = at.address - LOCAL_BASE;
  if (offset % at.bytes) fault(t, std::string("MISALIGNED local ") + kind);
  if (offset >= t.local.size() || offset + at.bytes > t.local.size())
    fault(t, std::string("OUT OF BOUNDS local ") + kind + " of " + std::to_string(at.bytes) + " bytes");
  return offset;
}

}  // namespace

Next load_local(Thread& t, const Instruction& i) {
  const u64 offset = local_offset(t, Access(t, i), "load");
  load_elements(t, i, &t.local[offset], &t.local_defined[offset]);
  return Next::STEP;
}
Next store_local(Thread& t, const Instruction& i) {
  const u64 offset = local_offset(t, Access(t, i), "store");
  store_elements(t, i, &t.local[offset], &t.local_defined[offset]);
  return Next::STEP;
}
Next load_generic(Thread& t, const Instruction& i) {
  return is_local(t, Access(t, i).address) ? load_local(t, i) : load_global(t, i);
}
Next store_generic(Thread& t, const Instruction& i) {
  return is_local(t, Access(t, i).address) ? store_local(t, i) : store_global(t, i);
}

// ---- shared memory ---------------------------------------------------------------------------------------------------

Block& block_of(Thread& t, u32& address, bool in_cluster) {
  Machine& m = *t.machine;
  const u32 rank = address >> SHARED_BITS;  // plus 1
  address &= SHARED_OFFSET;
  if (rank == 0) return *t.block;
  if (!in_cluster) {
    if (int(rank) - 1 == t.block->rank) return *t.block;
    fault(t, "a shared::cluster address in a shared::cta access");
  }
  if (int(rank) > m.cluster_blocks) fault(t, "an address of a block outside the cluster");
  Block& block = *m.blocks[rank - 1];
  // Whether a block has started is known by a cluster barrier only.
  if (&block != t.block && t.cluster_epoch < 2)
    fault(t, "another block's shared memory is reached before any cluster barrier");
  return block;
}

void check_shared(Thread& t, Block& block, u32 address, u32 bytes, u32 align, const char* what) {
  const u32 end = t.machine->shared_end;
  if (address < SHARED_BASE || address + bytes > end)
    fault(t, std::string("OUT OF BOUNDS shared ") + what + " of " + std::to_string(bytes) + " bytes at " +
                 std::to_string(s64(address) - SHARED_BASE) + " of " + std::to_string(end - SHARED_BASE));
  if (address % align)
    fault(t, std::string("MISALIGNED shared ") + what + " of " + std::to_string(align) + " bytes at " +
                 std::to_string(address - SHARED_BASE));
  if (block.live == 0) fault(t, "shared memory of a block that has exited");
}

// Whether a barrier lies between what the touch says and now: for this thread, or for its whole warp.
bool ordered(const Thread& t, const Touch& touch, bool whole_warp) {
  if (touch.thread == t.id && !whole_warp) return true;
  const int rank = touch.warp >= 0 ? touch.warp / t.machine->warps() : t.block->rank;
  if (rank != t.block->rank) return touch.cluster_epoch < t.cluster_epoch;
  if (touch.block_epoch < t.block_epoch) return true;
  return touch.warp == t.id / 32 && touch.warp_epoch < t.warp_epoch;
}

namespace {

Touch touch_of(const Thread& t) {
  return {t.id, t.id / 32, t.block_epoch, t.warp_epoch, t.cluster_epoch, t.accesses, t.pc};
}

// An asynchronous copy made the byte: has this thread waited for it?
bool waited(const Thread& t, const Block& block, const Shadow& cell) {
  const auto seen = t.seen.find(barrier_key(block, u32(cell.barrier)));
  return seen != t.seen.end() && seen->second >= cell.phase;
}

std::string at_byte(u32 byte) { return ", at " + std::to_string(byte); }

void note_read(Thread& t, Block& block, Shadow& cell, u32 byte) {
  if (cell.is_barrier) fault(t, "ordinary read of an mbarrier object" + at_byte(byte));
  if (cell.in_flight)
    fault(t, "RACE: shared memory is read while an asynchronous copy into it is in flight" + at_byte(byte));
  if (cell.barrier != Shadow::NO_BARRIER) {
    if (!waited(t, block, cell))
      fault(t, "RACE: shared memory is read before this thread waited for its asynchronous copy" + at_byte(byte));
  } else if (cell.written.thread != Touch::NOBODY && !ordered(t, cell.written, false)) {
    fault(t, "RACE: shared memory is read that thread " + std::to_string(cell.written.thread) +
                 " wrote without a barrier between" + at_byte(byte));
  }
  const Touch before = cell.read;
  cell.read = touch_of(t);
  if (before.thread != Touch::NOBODY && before.thread != t.id && before.block_epoch == t.block_epoch) {
    cell.read.thread = Touch::SEVERAL;
    if (before.warp != t.id / 32) cell.read.warp = -1;
  }
}

void note_write(Thread& t, Block& block, Shadow& cell, u32 byte, bool same) {
  if (cell.is_barrier) fault(t, "ordinary write of an mbarrier object" + at_byte(byte));
  if (cell.in_flight)
    fault(t, "RACE: shared memory is written while an asynchronous copy into it is in flight" + at_byte(byte));
  const Touch& written = cell.written;
  if (cell.barrier != Shadow::NO_BARRIER) {
    if (&block != t.block || !waited(t, block, cell))
      fault(t, "RACE: shared memory is written before this thread waited for its asynchronous copy" + at_byte(byte));
  } else if (written.thread != Touch::NOBODY && !same && !ordered(t, written, false)) {
    const bool one_instruction = written.warp == t.id / 32 && written.pc == t.pc;
    if (!one_instruction || !(t.machine->flags & LANE_CONFLICTS_WARN))
      fault(t, std::string(one_instruction ? "RACE: lanes of a warp store different values to one address"
                                           : "RACE: two writes without a barrier between") +
                   " (other thread " + std::to_string(written.thread) + ")" + at_byte(byte));
    t.machine->lane_conflict = true;
  }
  if (cell.read.thread != Touch::NOBODY && !ordered(t, cell.read, false))
    fault(t, "RACE: shared memory is overwritten that thread " + std::to_string(cell.read.thread) + " reads" +
                 at_byte(byte));
  cell.barrier = Shadow::NO_BARRIER;
  cell.written = touch_of(t);
  cell.read = Touch();
}

// Notes every byte. Neighbours that were touched alike are alike afterwards, so what the first one took serves them all.
template <class Note>
void note(Thread& t, Block& block, u32 address, u32 bytes, Note note_one) {
  ++t.accesses;
  ++t.machine->counts.shared;
  if (t.machine->flags & NO_RACES) return;
  // An access is aligned, so it lies within a page.
  const u32 first = address - SHARED_BASE;
  Shadow* const cells = block.shadows.at(first);
  const Shadow before = cells[0];
  note_one(cells[0], first);
  for (u32 k = 1; k < bytes; ++k) {
    if (cells[k] == before)
      cells[k] = cells[0];
    else
      note_one(cells[k], first + k);
  }
}

}  // namespace

void note_read(Thread& t, Block& block, u32 address, u32 bytes) {
  note(t, block, address, bytes, [&](Shadow& cell, u32 byte) { note_read(t, block, cell, byte); });
}
void note_write(Thread& t, Block& block, u32 address, u32 bytes, bool same) {
  note(t, block, address, bytes, [&](Shadow& cell, u32 byte) { note_write(t, block, cell, byte, same); });
}

Next load_shared(Thread& t, const Instruction& i) {
  const Access at(t, i);
  u32 address = u32(at.address);
  Block& block = block_of(t, address, i.kind);
  check_shared(t, block, address, at.bytes, at.bytes, "load");
  note_read(t, block, address, at.bytes);
  load_elements(t, i, &block.shared[address - SHARED_BASE], &block.defined[address - SHARED_BASE]);
  return Next::STEP;
}

Next store_shared(Thread& t, const Instruction& i) {
  Machine& m = *t.machine;
  const Access at(t, i);
  u32 address = u32(at.address);
  Block& block = block_of(t, address, i.kind);
  check_shared(t, block, address, at.bytes, at.bytes, "store");
  u8* to = &block.shared[address - SHARED_BASE];
  u8* known = &block.defined[address - SHARED_BASE];
  // Two lanes may store one value to one place: whoever is last, it is there.
  bool same = true;
  for (int e = 0; e < i.count && same; ++e) {
    const u64 bits = value(t, i.in[1 + e]);
    same = defined(t, i.in[1 + e]) && !memcmp(to + e * i.bytes, &bits, i.bytes);
    for (int k = 0; k < i.bytes; ++k) same &= known[e * i.bytes + k] != 0;
  }
  m.lane_conflict = false;
  note_write(t, block, address, at.bytes, same);
  if (m.lane_conflict)
    ++m.warnings["lanes of a warp store DIFFERENT values to one shared address: line " + std::to_string(i.line) + " " +
                 m.text(i)];
  store_elements(t, i, to, known);
  return Next::STEP;
}

Next map_address(Thread& t, const Instruction& i) {
  const Machine& m = *t.machine;
  need(t, i.in[0], "an address");
  need(t, i.in[1], "a rank");
  const u32 address = u32(value(t, i.in[0])), rank = u32(value(t, i.in[1]));
  if (rank >= u32(m.cluster_blocks))
    fault(t, "mapa: rank " + std::to_string(rank) + " of a cluster of " + std::to_string(m.cluster_blocks));
  if (address < SHARED_BASE || address >= m.shared_end) fault(t, "mapa: not an address of shared memory");
  set(t, i.out[0], (address & SHARED_OFFSET) | (rank + 1) << SHARED_BITS);
  return Next::STEP;
}

}  // namespace vgpu
