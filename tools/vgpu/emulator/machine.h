// The machine: an instruction is a function that moves one thread on; a cluster of blocks runs at a time.
//
// Every register and every byte of shared memory knows whether it is defined. Every byte of shared and of global memory knows
// who touched it last (Shadow, GlobalShadow), in epochs that barriers advance, so that two accesses which nothing orders are a
// race even where the values happen to agree.
#pragma once

#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "values.h"

namespace vgpu {

struct Thread;
struct Instruction;
struct Machine;

enum class Next {
  STEP,
  JUMPED,
  BLOCKED,
  EXIT,
  YIELD
};  // BLOCKED: at this instruction still; YIELD: and let others go on

using Handler = Next (*)(Thread&, const Instruction&);

// What most handlers read lies in one line of the cache.
struct alignas(64) Instruction {
  Handler run = nullptr;
  s64 immediate = 0;
  int guard = -1;  // the predicate register of @p, -1: none
  bool negated = false;
  bool extend = false;       // by the sign
  u8 count = 1;              // of a vector
  u8 bytes = 4;              // of an element
  u8 kind = 0, variant = 0;  // the handler's own
  // Registers (>= 0), or constants (~index).
  std::array<int, 4> out;
  std::array<int, 6> in;
  int mask = NONE;  // the lanes of a warp that take part
  int target = -1;
  int line = 0;
  s64 offset = 0;  // of a second address

  static constexpr int NONE = -1 << 20;
  Instruction() {
    out.fill(NONE);
    in.fill(NONE);
  }
};

struct Parameter {
  std::string name, type;
  int offset, size, align;
};

// Arguments of a call: bytes from one place in a thread's scratch to another.
struct Call {
  struct Copy {
    int from, to, size;
  };
  int entry = -1;
  std::vector<Copy> arguments, results;
};

struct Function {
  std::string name;
  std::vector<Instruction> code;
  std::vector<std::string> texts;  // of the instructions, for messages
  std::vector<u64> hits;           // how often each has run
  std::vector<Parameter> parameters;
  std::vector<Call> calls;
  std::vector<u64> constants;
  std::vector<u8> defined;  // all of the constants are
  int parameter_bytes = 0, registers = 0, scratch = 0, local_bytes = 0;
  int most_threads = 0, required_threads = 0;
  int static_shared = 0, dynamic_align = 1;
};

// Addresses of the spaces that are no global memory. A block's rank + 1 is above SHARED_BITS of an address in a cluster.
constexpr u32 SHARED_BASE = 1024;
constexpr int SHARED_BITS = 24;
constexpr u32 SHARED_OFFSET = (1u << SHARED_BITS) - 1;
constexpr u64 PARAMETER_BASE = 0x10000000;
constexpr u64 LOCAL_BASE = 0x20000000;

// ---- shared memory ---------------------------------------------------------------------------------------------------

// Who touched a byte last, and in which epochs of the barriers around him.
struct Touch {
  static constexpr s32 NOBODY = -1, SEVERAL = -2;
  s32 thread = NOBODY;  // in the cluster
  s32 warp = -1;        // in the cluster; -1: several
  u32 block_epoch = 0, warp_epoch = 0, cluster_epoch = 0;
  u32 access = 0;  // the thread's count of accesses, which a proxy fence is compared with
  u32 pc = 0;
};

struct Shadow {
  static constexpr s32 NO_BARRIER = -1;
  static constexpr s32 BY_THREAD = 0x7fffffff;  // cp.async: whoever copied waits with wait_group
  Touch written, read;
  s32 barrier = NO_BARRIER;  // the mbarrier that an asynchronous copy completes on
  u32 phase = 0;             // and in which of its phases
  u32 in_flight = false, is_barrier = false;
  bool operator==(const Shadow& other) const {
    using Words = std::array<u64, 9>;
    const Words a = std::bit_cast<Words>(*this), b = std::bit_cast<Words>(other);
    u64 different = 0;
    for (size_t k = 0; k < a.size(); ++k) different |= a[k] ^ b[k];
    return different == 0;
  }
};

// Cells by pages that are cleared when first touched: most launches touch little of what they ask for.
template <class Cell>
class Pages {
 public:
  void restart(u32 bytes) {
    pages_.resize(bytes / PAGE + 1);
    ++now_;
  }
  Cell& operator[](u32 offset) { return *at(offset); }
  // And those after it, to the end of its page.
  static constexpr u32 PAGE = 256;
  Cell* at(u32 offset) {
    Page& page = pages_[offset / PAGE];
    if (page.made != now_) {
      page.made = now_;
      page.cells.assign(PAGE, Cell());
    }
    return &page.cells[offset % PAGE];
  }

 private:
  struct Page {
    u32 made = 0;
    std::vector<Cell> cells;
  };
  std::vector<Page> pages_;
  u32 now_ = 0;
};

// ---- global memory, see races.cpp -------------------------------------------------------------------------------------

// Accesses of a thread that no barrier and no fence divides.
struct Stretch {
  s32 block, thread;
  u32 block_epoch, warp_epoch, cluster_epoch;
};
using Known = std::shared_ptr<const std::vector<u32>>;  // stretches that ended with a fence, by block and thread

// Who wrote and who read a byte last: numbers of stretches with flags below, 0: nobody.
struct GlobalShadow {
  u32 written = 0, read = 0;
  bool operator==(const GlobalShadow&) const = default;
};

// ---- mbarriers -------------------------------------------------------------------------------------------------------

struct Barrier {  // an mbarrier
  s64 expected = 0, pending = 0, transactions = 0;
  u32 completed = 0;  // phases
  int owner = -1;     // who initialised it, and when
  u32 block_epoch = 0, warp_epoch = 0, cluster_epoch = 0;
  bool fenced = false;
  std::vector<Thread*> waiting;
};

// ---- threads ---------------------------------------------------------------------------------------------------------

enum class State : u8 { READY, AT_WARP, AT_BLOCK, AT_CLUSTER, AT_MBARRIER, DONE };

struct Block;

struct Warp {
  Block* block = nullptr;
  int index = 0;
  u32 all = 0, waiting = 0, exited = 0;  // lanes
  Thread* lanes[32] = {};
};

struct Block {
  int index = 0, rank = 0;
  u32 at[3] = {};
  std::vector<u8> shared, defined;
  Pages<Shadow> shadows;
  std::map<u32, Barrier> barriers;
  std::vector<Warp> warps;
  int live = 0;  // threads
  struct Named {
    std::vector<Thread*> inside;
    int wanted = 0;
  } named[16];  // bar.sync 0 .. 15
};

struct Thread {
  Machine* machine;
  u64* registers;
  u8* masks;  // by register: its defined bytes
  const u64* constants;
  const u8* constant_masks;
  u32 pc;
  State state;
  Block* block;
  Warp* warp;
  int index, lane, id;  // in the block, in the warp, in the cluster
  u32 at[3];
  u32 block_epoch, warp_epoch, cluster_epoch;
  u32 accesses, fenced;                                       // of shared memory; before the last proxy fence
  enum class Arrival : u8 { NO, ARRIVED, COMPLETE } arrival;  // at the cluster's barrier
  std::vector<int> returns;
  u8* scratch;
  std::vector<u8> local, local_defined;
  std::unordered_map<u64, u32> seen;        // by barrier: the phase that this thread has waited for
  std::vector<u32> initialised;             // mbarriers that are not fenced yet
  u32 committed;                            // groups of cp.async
  int outstanding;                          // copies of it
  std::vector<std::pair<u32, u32>> copies;  // (address, bytes) since the last arrive of cp.async
  u32 stretch;                              // of its accesses to global memory, 0: one is to begin
  Known known;                              // what other clusters did before
  Known observed;                           // what its atomics saw of that, before a fence
  Known published;                          // what its atomics show of it and of its own: all before the last fence

  void restart();
};

struct Transfer {  // an asynchronous operation that has not arrived
  enum Kind { BULK, STORE, COPY, ARRIVE } kind;
  Thread* thread;
  Block* block;
  u32 to, barrier;
  const u8* from;
  u32 bytes, read;  // what is not read is 0
  u8 value[8];
  u32 group;
};

struct Allocation {
  u64 base, size;
  u32 index;
};

enum Flag : int {
  NO_RACES = 1,            // memory is not checked for races
  UNDEFINED_WARNS = 2,     // undefined values are warnings
  APPROXIMATE = 4,         // see approximated()
  LANE_CONFLICTS_WARN = 8  // lanes of a warp that store different values to one address are warnings
};

struct Counts {
  u64 steps, loads, stores, shared, bulk_copies, async_stores, collectives, waits;
};

struct Machine {
  Function* function = nullptr;
  const u8* parameters = nullptr;
  u32 grid[3], threads[3];
  int block_threads = 0, cluster_blocks = 1;
  u32 dynamic_shared = 0, shared_end = 0;
  int flags = 0;
  u64 most_steps = 0;

  std::vector<Allocation> allocations;
  Allocation recent[2] = {};
  std::vector<Pages<GlobalShadow>> global_shadows;  // by allocation
  std::vector<Stretch> stretches;
  std::unordered_map<u64, Known> counters;  // by address: what whoever adds to it learns

  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Thread>> running;
  std::vector<Thread*> ready, at_cluster;
  std::vector<Transfer> transfers;
  std::vector<u64> registers;
  std::vector<u8> masks, scratch;
  int live = 0, arrived = 0;

  const Instruction* current = nullptr;
  bool lane_conflict = false;
  Counts counts{};
  std::map<std::string, u64> warnings;

  u64 seed = 0;
  u32 random() {
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return u32(seed >> 32);
  }

  const std::string& text(const Instruction& instruction) const {
    return function->texts[size_t(&instruction - function->code.data())];
  }
  int warps() const { return (block_threads + 31) / 32; }
  int cluster_of(int block) const { return block / cluster_blocks; }
  void wake(std::vector<Thread*>& threads) {
    for (Thread* thread : threads) {
      thread->state = State::READY;
      ready.push_back(thread);
    }
    threads.clear();
  }
  void run();

 private:
  void start(int first);
  void run_cluster(int first);
  void turn(Thread& t);
  void exit(Thread& t);
  void deliver();
  [[noreturn]] void deadlock();
};

// ---- what handlers use -----------------------------------------------------------------------------------------------

inline u64 value(const Thread& t, int operand) {
  const u64* from = operand >= 0 ? t.registers + operand : t.constants + ~operand;
  return *from;
}
inline u8 mask(const Thread& t, int operand) {
  const u8* from = operand >= 0 ? t.masks + operand : t.constant_masks + ~operand;
  return *from;
}
template <class T>
inline T get(const Thread& t, int operand) {
  return from_bits<T>(value(t, operand));
}
inline bool defined(const Thread& t, int operand) { return mask(t, operand) == 0xff; }

constexpr u8 bytes_mask(int bytes) { return u8((1 << bytes) - 1); }

inline void set_masked(Thread& t, int operand, u64 bits, u8 mask) {
  t.registers[operand] = bits;
  t.masks[operand] = mask;
}
inline void set(Thread& t, int operand, u64 bits, bool defined = true) {
  set_masked(t, operand, bits, defined ? 0xff : 0);
}

std::string hex(u64 x);
std::string where(const Thread& t);
[[noreturn]] void fault(const Thread& t, const std::string& what);
void undefined(Thread& t, int operand, const char* what);
// An operand whose value decides something: an address, a predicate, what is stored to global memory.
inline void need(Thread& t, int operand, const char* what, int bytes = 8) {
  const u8 wanted = bytes_mask(bytes);
  if ((mask(t, operand) & wanted) != wanted) [[unlikely]]
    undefined(t, operand, what);
}

// memory.cpp
u8* global_memory(Thread& t, u64 address, u32 bytes, bool write, u32 align);
Block& block_of(Thread& t, u32& address, bool in_cluster);  // and the address within it
void check_shared(Thread& t, Block& block, u32 address, u32 bytes, u32 align, const char* what);
void note_read(Thread& t, Block& block, u32 address, u32 bytes);
void note_write(Thread& t, Block& block, u32 address, u32 bytes, bool same);
bool ordered(const Thread& t, const Touch& touch, bool whole_warp);

// races.cpp: the allocation is the one that global_memory() found last
void note_global_read(Thread& t, u64 address, u32 bytes);
void note_global_write(Thread& t, u64 address, u32 bytes, bool same);
enum Order : u32 { RELAXED = 0, ACQUIRES = 1, RELEASES = 2 };  // a sum
void note_global_add(Thread& t, u64 address, u32 bytes, u32 order);
void fence(Thread& t);                                                   // for the whole device
void meet(const Machine& m, Thread* const* first, Thread* const* last);  // at a barrier

// synchronize.cpp
void try_collective(Warp& warp, Thread& t);
void cluster_progress(Machine& m);

// asynchronous.cpp
u64 barrier_key(const Block& block, u32 offset);
void barrier_progress(Machine& m, const Thread* t, Barrier& barrier);

}  // namespace vgpu
