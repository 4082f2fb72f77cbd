// What threads do together: collectives of a warp, barriers of a block and of a cluster.
#include <algorithm>

#include "handlers.h"

namespace vgpu {

// ---- collectives of a warp -------------------------------------------------------------------------------------------

Next collective(Thread& t, const Instruction&) {
  t.state = State::AT_WARP;
  t.warp->waiting |= 1u << t.lane;
  return Next::BLOCKED;
}

namespace {

struct Lanes {
  u32 members;
  int count = 0;
  Thread* threads[32];
  Thread** begin() { return threads; }
  Thread** end() { return threads + count; }
  Thread* const* begin() const { return threads; }
  Thread* const* end() const { return threads + count; }
};

void shuffle(const Lanes& lanes, const Instruction& i) {
  u64 bits[32] = {};
  u8 masks[32] = {};
  for (const Thread* t : lanes) {
    bits[t->lane] = value(*t, i.in[0]);
    masks[t->lane] = mask(*t, i.in[0]);
  }
  for (Thread* t : lanes) {
    need(*t, i.in[1], "a lane");
    const int by = int(value(*t, i.in[1]) & 31);
    const u32 control = u32(value(*t, i.in[2])), clamp = control & 31, segment = control >> 8 & 31;
    const int first = int(u32(t->lane) & segment), last = int((u32(t->lane) & segment) | (clamp & ~segment));
    int from = 0;
    bool inside = false;
    switch (i.variant) {
      case BUTTERFLY:
        from = t->lane ^ by;
        inside = from <= last;
        break;
      case INDEX:
        from = first | (by & int(~segment));
        inside = from <= last;
        break;
      case UP:
        from = t->lane - by;
        inside = from >= last;
        break;  // the clamp is the first lane of the segment here
      default: from = t->lane + by; inside = from <= last;
    }
    if (!inside) from = t->lane;
    if (!(lanes.members >> from & 1)) fault(*t, "shfl reads lane " + std::to_string(from) + " that does not take part");
    set_masked(*t, i.out[0], bits[from], masks[from]);
    if (i.count > 1) set(*t, i.out[1], inside);
  }
}

u32 reduced(int how, u32 a, u32 b) {
  switch (how) {
    case ADD: return a + b;
    case MIN_U: return std::min(a, b);
    case MAX_U: return std::max(a, b);
    case MIN_S: return u32(std::min(s32(a), s32(b)));
    case MAX_S: return u32(std::max(s32(a), s32(b)));
    case AND: return a & b;
    case OR: return a | b;
    case XOR: return a ^ b;
  }
  const float x = std::bit_cast<float>(a), y = std::bit_cast<float>(b);
  if ((how == MIN_NAN || how == MAX_NAN) && (x != x || y != y)) return NAN_BITS;
  return std::bit_cast<u32>(how == MAX_F || how == MAX_NAN ? larger(x, y) : smaller(x, y));
}

void reduce(const Lanes& lanes, const Instruction& i) {
  u32 result = u32(value(*lanes.threads[0], i.in[0]));
  bool known = defined(*lanes.threads[0], i.in[0]);
  for (int k = 1; k < lanes.count; ++k) {
    known &= defined(*lanes.threads[k], i.in[0]);
    result = reduced(i.variant, result, u32(value(*lanes.threads[k], i.in[0])));
  }
  for (Thread* t : lanes) set(*t, i.out[0], result, known);
}

void vote(const Lanes& lanes, const Instruction& i) {
  u32 ballot = 0;
  bool known = true;
  for (const Thread* t : lanes) {
    const bool yes = (value(*t, i.in[0]) & 1) != u64(i.immediate);  // immediate: the predicate is negated
    known &= defined(*t, i.in[0]);
    ballot |= u32(yes) << t->lane;
  }
  const bool all = ballot == lanes.members;
  const u32 result = i.variant == BALLOT ? ballot
                     : i.variant == ANY  ? ballot != 0
                     : i.variant == ALL  ? all
                                         : all || !ballot;
  for (Thread* t : lanes) set(*t, i.out[0], result, known);
}

void elect(const Lanes& lanes, const Instruction& i) {
  const int leader = std::countr_zero(lanes.members);
  for (Thread* t : lanes) {
    set(*t, i.out[0], u64(leader));
    set(*t, i.out[1], t->lane == leader);
  }
}

// ldmatrix and stmatrix: matrices of 8 rows of 16 bytes, the rows' addresses from 8 lanes, two elements to a lane.
struct Element {
  int lane, half;
};
Element holder(bool transposed, int row, int column) {
  if (transposed) return {column * 4 + row / 2, row % 2};
  return {row * 4 + column / 2, column % 2};
}

void matrix(Warp& warp, const Lanes& lanes, const Instruction& i) {
  if (lanes.members != 0xffffffffu) fault(*lanes.threads[0], "ldmatrix and stmatrix take all 32 lanes");
  const bool store = i.kind == STORE_MATRIX;
  for (int k = 0; k < i.count; ++k) {
    u32 loaded[32] = {};
    u8 masks[32];
    std::fill(masks, masks + 32, u8(0xf0));
    for (int row = 0; row < 8; ++row) {
      Thread& t = *warp.lanes[8 * k + row];
      need(t, i.in[0], "an address");
      const u32 address = u32(value(t, i.in[0]) + u64(i.immediate)), offset = address - SHARED_BASE;
      check_shared(t, *t.block, address, 16, 16, store ? "stmatrix" : "ldmatrix");
      u8 bytes[16], known[16];
      if (store) {
        for (int column = 0; column < 8; ++column) {
          const Element e = holder(i.variant, row, column);
          const Thread& other = *warp.lanes[e.lane];
          const u16 bits = u16(u32(value(other, i.in[1 + k])) >> 16 * e.half);
          const u8 own = u8(mask(other, i.in[1 + k]) >> 2 * e.half);
          memcpy(bytes + 2 * column, &bits, 2);
          known[2 * column] = own & 1;
          known[2 * column + 1] = own >> 1 & 1;
        }
        const bool whole = std::all_of(known, known + 16, [](u8 b) { return b != 0; });
        const bool same =
            whole && !memcmp(&t.block->shared[offset], bytes, 16) && !memcmp(&t.block->defined[offset], known, 16);
        note_write(t, *t.block, address, 16, same);
        memcpy(&t.block->shared[offset], bytes, 16);
        memcpy(&t.block->defined[offset], known, 16);
        continue;
      }
      note_read(t, *t.block, address, 16);
      for (int column = 0; column < 8; ++column) {
        const Element e = holder(i.variant, row, column);
        u16 bits;
        memcpy(&bits, &t.block->shared[offset + 2 * column], 2);
        loaded[e.lane] |= u32(bits) << 16 * e.half;
        for (int b = 0; b < 2; ++b)
          masks[e.lane] |= u8((t.block->defined[offset + 2 * column + b] ? 1 : 0) << (2 * e.half + b));
      }
    }
    if (store) continue;
    for (int lane = 0; lane < 32; ++lane) set_masked(*warp.lanes[lane], i.out[k], loaded[lane], masks[lane]);
  }
}

}  // namespace

// A lane has arrived at a collective: once all that it names are there, they do it.
void try_collective(Warp& warp, Thread& t) {
  Machine& m = *t.machine;
  const Instruction& i = m.function->code[t.pc];
  m.current = &i;
  need(t, i.mask, "a member mask");
  const u32 members = u32(value(t, i.mask));
  if (!(members >> t.lane & 1)) fault(t, "the executing lane is not in the member mask " + hex(members));
  if (members & ~warp.all) fault(t, "member mask names lanes that do not exist: " + hex(members));
  if (members & warp.exited)
    fault(t, "member mask " + hex(members) + " names lanes that have EXITED: " + hex(members & warp.exited));
  if ((warp.waiting & members) != members) return;
  Lanes lanes;
  lanes.members = members;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(members >> lane & 1)) continue;
    Thread& other = *warp.lanes[lane];
    if (other.pc != t.pc)
      fault(t, "lanes of one warp wait in different collectives: lane " + std::to_string(lane) + " at line " +
                   std::to_string(m.function->code[other.pc].line) + " " + m.function->texts[other.pc]);
    if (u32(value(other, i.mask)) != members) fault(t, "lanes of one warp name different masks");
    lanes.threads[lanes.count++] = &other;
  }
  ++m.counts.collectives;
  switch (i.kind) {
    case SHUFFLE: shuffle(lanes, i); break;
    case WARP_BARRIER:
      for (Thread* other : lanes) ++other->warp_epoch;
      meet(m, lanes.begin(), lanes.end());
      break;
    case REDUCE: reduce(lanes, i); break;
    case VOTE: vote(lanes, i); break;
    case ELECT: elect(lanes, i); break;
    default: matrix(warp, lanes, i);
  }
  warp.waiting &= ~members;
  for (Thread* other : lanes) {
    ++other->pc;
    other->state = State::READY;
    m.ready.push_back(other);
  }
}

// ---- barriers of a block ---------------------------------------------------------------------------------------------

namespace {

void release(Machine& m, Block::Named& named) {
  // Whole warps, each at one instruction.
  std::map<Warp*, std::pair<u32, u32>> warps;  // lanes, pc
  for (const Thread* t : named.inside) {
    auto [found, fresh] = warps.try_emplace(t->warp, 0, t->pc);
    if (found->second.second != t->pc)
      fault(*t, "bar.sync: lanes of a warp are at different barriers, another at line " +
                    std::to_string(m.function->code[found->second.second].line));
    found->second.first |= 1u << t->lane;
  }
  for (const auto& [warp, lanes] : warps)
    if (lanes.first != warp->all)
      fault(*warp->lanes[0], "bar.sync: not all lanes of a warp are there: " + hex(lanes.first));
  for (Thread* t : named.inside) {
    ++t->pc;
    ++t->block_epoch;
  }
  meet(m, named.inside.data(), named.inside.data() + named.inside.size());
  m.wake(named.inside);
}

}  // namespace

Next block_barrier(Thread& t, const Instruction& i) {
  Machine& m = *t.machine;
  need(t, i.in[0], "a barrier's number");
  const u64 number = value(t, i.in[0]);
  if (number > 15) fault(t, "bar.sync: there are barriers 0 to 15");
  Block::Named& named = t.block->named[number];
  const int wanted = i.count > 1 ? int(value(t, i.in[1])) : m.block_threads;
  if (wanted % 32 || wanted <= 0) fault(t, "bar.sync: a thread count that is no multiple of 32");
  if (!named.inside.empty() && named.wanted != wanted) fault(t, "bar.sync with different counts");
  if (t.block->live < wanted)
    fault(t, "bar.sync although threads of the block have exited (" + std::to_string(t.block->live) + " live of " +
                 std::to_string(wanted) + ")");
  named.wanted = wanted;
  named.inside.push_back(&t);
  t.state = State::AT_BLOCK;
  if (int(named.inside.size()) == wanted) release(m, named);
  return Next::BLOCKED;
}

// ---- the barrier of a cluster ----------------------------------------------------------------------------------------

void cluster_progress(Machine& m) {
  if (m.arrived < m.live || m.live == 0) return;
  m.arrived = 0;
  std::vector<Thread*> came;
  for (const auto& t : m.running)
    if (t->arrival == Thread::Arrival::ARRIVED) came.push_back(t.get());
  meet(m, came.data(), came.data() + came.size());
  for (Thread* t : m.at_cluster) {
    ++t->pc;
    ++t->block_epoch;
    ++t->cluster_epoch;
    t->arrival = Thread::Arrival::NO;
  }
  m.wake(m.at_cluster);
  for (auto& t : m.running)
    if (t->arrival == Thread::Arrival::ARRIVED) t->arrival = Thread::Arrival::COMPLETE;
}

Next cluster_arrive(Thread& t, const Instruction&) {
  if (t.arrival != Thread::Arrival::NO) fault(t, "barrier.cluster.arrive twice without wait");
  t.arrival = Thread::Arrival::ARRIVED;
  ++t.machine->arrived;
  ++t.pc;
  cluster_progress(*t.machine);
  return Next::JUMPED;
}
Next cluster_wait(Thread& t, const Instruction&) {
  if (t.arrival == Thread::Arrival::NO) fault(t, "barrier.cluster.wait without arrive");
  if (t.arrival == Thread::Arrival::COMPLETE) {
    t.arrival = Thread::Arrival::NO;
    ++t.block_epoch;
    ++t.cluster_epoch;
    return Next::STEP;
  }
  t.state = State::AT_CLUSTER;
  t.machine->at_cluster.push_back(&t);
  return Next::BLOCKED;
}

// A fence for the whole device.
Next device_fence(Thread& t, const Instruction&) {
  fence(t);
  return Next::STEP;
}

}  // namespace vgpu
