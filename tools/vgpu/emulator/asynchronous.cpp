// mbarriers, and the operations that complete on them: bulk copies, st.async, cp.async. Each arrives some time after it was
// asked for, in a random order among those that have none.
#include "handlers.h"

namespace vgpu {

u64 barrier_key(const Block& block, u32 offset) { return u64(block.rank) << 32 | offset; }

namespace {

constexpr s64 MOST_TRANSACTIONS = (1 << 20) - 1;

u32 address_of(Thread& t, const Instruction& i) {
  need(t, i.in[0], "an address");
  return u32(value(t, i.in[0]) + u64(i.immediate));
}

Barrier& barrier_at(Thread& t, Block& block, u32 address, const char* what) {
  if (address % 8) fault(t, std::string("MISALIGNED mbarrier in ") + what);
  const auto found = block.barriers.find(address);
  if (found == block.barriers.end())
    fault(t, std::string(what) + " on an mbarrier that is not initialised, at " +
                 std::to_string(s64(address) - SHARED_BASE));
  Barrier& barrier = found->second;
  Touch made;
  made.thread = barrier.owner;
  made.warp = barrier.owner / 32;
  made.block_epoch = barrier.block_epoch;
  made.warp_epoch = barrier.warp_epoch;
  made.cluster_epoch = barrier.cluster_epoch;
  if (!ordered(t, made, false))
    fault(t, std::string(what) + " on an mbarrier that another thread initialised without a barrier between");
  return barrier;
}

// An asynchronous write is asked for: nobody may be using what it overwrites.
// proxy: it goes by the async proxy, which sees what threads did only after their fence.
void mark(Thread& t, Block& block, u32 address, u32 bytes, s32 barrier, bool proxy) {
  const u32 first = address - SHARED_BASE;
  const auto& running = t.machine->running;
  for (u32 byte = first; byte < first + bytes; ++byte) {
    Shadow& cell = block.shadows[byte];
    auto race = [&](const std::string& what) { fault(t, "RACE: " + what + ", at " + std::to_string(byte)); };
    if (cell.is_barrier) fault(t, "an asynchronous copy over an mbarrier object");
    if (cell.in_flight) race("two asynchronous copies into one place at once");
    if (!(t.machine->flags & NO_RACES)) {
      const Touch &written = cell.written, &read = cell.read;
      if (cell.barrier == Shadow::NO_BARRIER && written.thread >= 0) {
        const std::string who = "thread " + std::to_string(written.thread) + " wrote";
        if (!ordered(t, written, true)) race("an asynchronous copy overwrites what " + who + ", no barrier between");
        if (proxy && running[size_t(written.thread)]->fenced < written.access)
          race("an asynchronous copy over what " + who + " without fence.proxy.async");
      }
      if (read.thread != Touch::NOBODY && !ordered(t, read, true))
        race("an asynchronous copy overwrites what is being read");
      if (proxy && read.thread >= 0 && running[size_t(read.thread)]->fenced < read.access)
        race("an asynchronous copy over what thread " + std::to_string(read.thread) +
             " read without fence.proxy.async");
    }
    cell = Shadow();
    cell.in_flight = true;
    cell.barrier = barrier;
  }
}

}  // namespace

// ---- mbarriers -------------------------------------------------------------------------------------------------------

void barrier_progress(Machine& m, const Thread* t, Barrier& barrier) {
  auto wrong = [&](const std::string& what) { throw Fault("mbarrier: " + what + (t ? where(*t) : "")); };
  if (barrier.pending < 0) wrong("more arrivals than expected");
  if (barrier.pending == 0 && barrier.transactions < 0)
    wrong("transaction count below zero at the end of a phase (" + std::to_string(barrier.transactions) + ")");
  if (std::abs(barrier.transactions) > MOST_TRANSACTIONS) wrong("transaction count out of range");
  if (barrier.pending != 0 || barrier.transactions != 0) return;
  ++barrier.completed;
  barrier.pending = barrier.expected;
  m.wake(barrier.waiting);
}

Next barrier_init(Thread& t, const Instruction& i) {
  u32 address = address_of(t, i);
  Block& block = block_of(t, address, false);
  check_shared(t, block, address, 8, 8, "mbarrier.init");
  if (block.barriers.count(address)) fault(t, "mbarrier.init of one that is initialised already");
  need(t, i.in[1], "a count");
  const s64 count = u32(value(t, i.in[1]));
  if (count < 1 || count > MOST_TRANSACTIONS) fault(t, "mbarrier.init: a count of " + std::to_string(count));
  for (u32 byte = 0; byte < 8; ++byte) {
    Shadow& cell = block.shadows[address - SHARED_BASE + byte];
    if (cell.in_flight || cell.written.thread != Touch::NOBODY || cell.read.thread != Touch::NOBODY)
      fault(t, "mbarrier.init over memory that was used as data");
    cell.is_barrier = true;
  }
  Barrier& barrier = block.barriers[address];
  barrier.expected = barrier.pending = count;
  barrier.owner = t.id;
  barrier.block_epoch = t.block_epoch;
  barrier.warp_epoch = t.warp_epoch;
  barrier.cluster_epoch = t.cluster_epoch;
  t.initialised.push_back(address);
  return Next::STEP;
}
Next fence_init(Thread& t, const Instruction&) {
  for (const u32 address : t.initialised) t.block->barriers[address].fenced = true;
  t.initialised.clear();
  return Next::STEP;
}
Next fence_proxy(Thread& t, const Instruction& i) {
  t.fenced = t.accesses;
  return fence_init(t, i);
}

Next barrier_arrive(Thread& t, const Instruction& i) {
  u32 address = address_of(t, i);
  Block& block = block_of(t, address, i.kind);
  Barrier& barrier = barrier_at(t, block, address, "arrive");
  --barrier.pending;
  barrier_progress(*t.machine, &t, barrier);
  return Next::STEP;
}
Next barrier_expect(Thread& t, const Instruction& i) {
  u32 address = address_of(t, i);
  Block& block = block_of(t, address, i.kind);
  Barrier& barrier = barrier_at(t, block, address, "arrive.expect_tx");
  need(t, i.in[1], "a byte count");
  const s64 bytes = u32(value(t, i.in[1]));
  if (bytes > MOST_TRANSACTIONS) fault(t, "expect_tx of " + std::to_string(bytes) + " bytes");
  barrier.transactions += bytes;
  --barrier.pending;
  barrier_progress(*t.machine, &t, barrier);
  return Next::STEP;
}
Next barrier_wait(Thread& t, const Instruction& i) {
  Machine& m = *t.machine;
  u32 address = address_of(t, i);
  Block& block = block_of(t, address, false);
  Barrier& barrier = barrier_at(t, block, address, "wait");
  need(t, i.in[1], "a parity");
  const u32 parity = u32(value(t, i.in[1]));
  if (parity > 1) fault(t, "mbarrier wait: a parity of " + std::to_string(parity));
  ++m.counts.waits;
  if ((barrier.completed & 1) != parity) {
    t.seen[barrier_key(block, address - SHARED_BASE)] = barrier.completed;
    set(t, i.out[0], 1);
    return Next::STEP;
  }
  // Now and then it gives up, as hardware may: whoever does not ask again is found out.
  if (m.random() % 4 == 0) {
    set(t, i.out[0], 0);
    return Next::YIELD;
  }
  t.state = State::AT_MBARRIER;
  barrier.waiting.push_back(&t);
  return Next::BLOCKED;
}

// ---- operations that arrive later ------------------------------------------------------------------------------------

Next bulk_copy(Thread& t, const Instruction& i) {  // [to], [from], bytes, [barrier]
  Machine& m = *t.machine;
  ++m.counts.bulk_copies;
  u32 to = address_of(t, i);
  need(t, i.in[1], "an address");
  need(t, i.in[2], "a size");
  need(t, i.in[3], "an address");
  const u64 from = value(t, i.in[1]);
  const u32 bytes = u32(value(t, i.in[2]));
  u32 at = u32(value(t, i.in[3]));
  Block &block = block_of(t, to, true), &other = block_of(t, at, true);
  if (&block != &other) fault(t, "a bulk copy whose mbarrier is in another block");
  if (bytes % 16 || bytes == 0) fault(t, "a bulk copy of " + std::to_string(bytes) + " bytes");
  if (from % 16) fault(t, "MISALIGNED bulk copy source " + hex(from));
  check_shared(t, block, to, bytes, 16, "bulk copy");
  global_memory(t, from, bytes, false, 16);
  note_global_read(t, from, bytes);
  if (!barrier_at(t, block, at, "bulk copy").fenced)
    fault(t, "a bulk copy on an mbarrier whose initialisation was not fenced");
  mark(t, block, to, bytes, s32(at - SHARED_BASE), true);
  m.transfers.push_back({Transfer::BULK, &t, &block, to, at, reinterpret_cast<const u8*>(from), bytes, bytes, {}, 0});
  return Next::STEP;
}

Next async_store(Thread& t, const Instruction& i) {  // [to], value, [barrier]
  Machine& m = *t.machine;
  ++m.counts.async_stores;
  u32 to = address_of(t, i);
  need(t, i.in[1], "a value", i.bytes);
  need(t, i.in[2], "an address");
  u32 at = u32(value(t, i.in[2]));
  Block &block = block_of(t, to, true), &other = block_of(t, at, true);
  if (&block != &other) fault(t, "st.async: value and mbarrier in different blocks");
  check_shared(t, block, to, i.bytes, i.bytes, "st.async");
  if (!barrier_at(t, block, at, "st.async").fenced)
    fault(t, "st.async on an mbarrier whose initialisation was not fenced");
  for (u32 byte = to - SHARED_BASE; byte < to - SHARED_BASE + i.bytes; ++byte) {
    Shadow& cell = block.shadows[byte];
    if (cell.is_barrier) fault(t, "st.async over an mbarrier");
    if (cell.in_flight) fault(t, "RACE: two asynchronous stores into one place at once");
    // Whether its readers are done this thread knows by messages of its own protocol, which are not followed here.
    if (!(m.flags & NO_RACES) && cell.barrier == Shadow::NO_BARRIER && cell.written.thread != Touch::NOBODY)
      fault(t, "RACE: st.async over an ordinary write");
    cell.in_flight = true;
    cell.barrier = s32(at - SHARED_BASE);
  }
  Transfer transfer{Transfer::STORE, &t, &block, to, at, nullptr, i.bytes, i.bytes, {}, 0};
  const u64 bits = value(t, i.in[1]);
  memcpy(transfer.value, &bits, 8);
  m.transfers.push_back(transfer);
  return Next::STEP;
}

Next async_copy(Thread& t, const Instruction& i) {  // cp.async [to], [from], bytes (, how many of them are read)
  Machine& m = *t.machine;
  ++m.counts.bulk_copies;
  u32 to = address_of(t, i);
  need(t, i.in[1], "an address");
  const u64 from = value(t, i.in[1]) + u64(i.offset);
  const u32 bytes = i.bytes;
  Block& block = block_of(t, to, false);
  check_shared(t, block, to, bytes, bytes, "cp.async");
  u32 read = bytes;
  if (i.count > 1) {
    need(t, i.in[2], "a size");
    read = u32(value(t, i.in[2]));
    if (read > bytes) fault(t, "cp.async reads " + std::to_string(read) + " of " + std::to_string(bytes) + " bytes");
  }
  if (read) {
    global_memory(t, from, read, false, 1);
    note_global_read(t, from, read);
  }
  if (from % bytes) fault(t, "MISALIGNED cp.async source " + hex(from));
  mark(t, block, to, bytes, Shadow::BY_THREAD, false);
  ++t.outstanding;
  t.copies.push_back({to, bytes});
  m.transfers.push_back(
      {Transfer::COPY, &t, &block, to, 0, reinterpret_cast<const u8*>(from), bytes, read, {}, t.committed});
  return Next::STEP;
}

Next async_copy_arrive(Thread& t, const Instruction& i) {  // the copies of this thread so far complete on this mbarrier
  u32 address = address_of(t, i);
  Block& block = block_of(t, address, false);
  const u32 phase = barrier_at(t, block, address, "cp.async.mbarrier.arrive").completed + 1;
  for (const auto& [to, bytes] : t.copies) {
    for (u32 byte = to - SHARED_BASE; byte < to - SHARED_BASE + bytes; ++byte) {
      block.shadows[byte].barrier = s32(address - SHARED_BASE);
      block.shadows[byte].phase = phase;
    }
  }
  t.copies.clear();
  t.machine->transfers.push_back({Transfer::ARRIVE, &t, &block, 0, address, nullptr, 0, 0, {}, 0});
  return Next::STEP;
}

// One of the operations under way arrives.
void Machine::deliver() {
  size_t k = random() % transfers.size();
  auto of_thread = [&](size_t j) {
    return transfers[j].kind == Transfer::COPY || transfers[j].kind == Transfer::ARRIVE;
  };
  if (of_thread(k)) {  // in the order of its thread
    const Thread* owner = transfers[k].thread;
    for (k = 0; transfers[k].thread != owner || !of_thread(k);) ++k;
  }
  const Transfer transfer = transfers[k];
  transfers.erase(transfers.begin() + std::ptrdiff_t(k));
  Block& block = *transfer.block;
  current = nullptr;
  if (block.live == 0) throw Fault("an asynchronous operation arrives in the shared memory of a block that has EXITED");
  if (transfer.kind == Transfer::ARRIVE) {
    Barrier& barrier = block.barriers.at(transfer.barrier);
    --barrier.pending;
    barrier_progress(*this, nullptr, barrier);
    return;
  }
  const u32 first = transfer.to - SHARED_BASE;
  memcpy(&block.shared[first], transfer.kind == Transfer::STORE ? transfer.value : transfer.from, transfer.read);
  memset(&block.shared[first] + transfer.read, 0, transfer.bytes - transfer.read);
  memset(&block.defined[first], 1, transfer.bytes);
  for (u32 byte = first; byte < first + transfer.bytes; ++byte) {
    Shadow& cell = block.shadows[byte];
    cell.in_flight = false;
    cell.written = cell.read = Touch();
    if (transfer.kind != Transfer::COPY)
      cell.phase = block.barriers.at(transfer.barrier).completed + 1;
    else if (cell.barrier == Shadow::BY_THREAD)
      cell.phase = 0xffffffff;
  }
  if (transfer.kind == Transfer::COPY) {
    --transfer.thread->outstanding;
    return;
  }
  Barrier& barrier = block.barriers.at(transfer.barrier);
  barrier.transactions -= transfer.bytes;
  barrier_progress(*this, nullptr, barrier);
}

}  // namespace vgpu
