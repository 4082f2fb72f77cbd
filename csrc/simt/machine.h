// What runs the kernels of simt.h without a device: a thread is a fiber, a block runs as fibers that take turns in a random
// order, blocks (clusters) run one after another. It is made to find mistakes, not to be fast:
// * a barrier that not all threads reach is a deadlock, and said to be one; so is a warp whose lanes call different things;
// * asynchronous copies arrive late, and not in the order in which they were asked for;
// * a shadow of shared memory knows who wrote and who read each two bytes last, and when: an access that no barrier, or no
//   wait, separates from a conflicting one fails even where the values happen to agree;
// * shared memory that nobody wrote may not be read; vectors must lie at multiples of 16 bytes.
// And on demand it counts how often the lanes of a warp meet in a bank of shared memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "../half.h"

namespace mlkernels {
namespace simt {

// ---- fibers ----------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves what a function must keep, and goes on where another one has saved it: 30 ns, where ucontext asks the kernel.
extern "C" void mlkernels_switch(void** from, void* to) __asm__("mlkernels_switch_local");
__asm__(
    ".text\n"
    ".type mlkernels_switch_local,@function\n"
    "mlkernels_switch_local:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size mlkernels_switch_local,.-mlkernels_switch_local\n");
using Context = void*;
inline void change(Context& from, Context& to) { mlkernels_switch(&from, to); }
#else
using Context = ucontext_t;
inline void change(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

struct Block;

struct Fiber {
  static constexpr size_t STACK = 1 << 17;
  std::unique_ptr<char[]> stack;
  Context place{};
  Block* block = nullptr;
  int thread = 0, number = 0;  // in its block, in its cluster
  // How many barriers this thread has passed: what lies before one is ordered before what lies after it.
  uint32_t block_epoch = 0, warp_epoch = 0, cluster_epoch = 0;
  uint32_t collectives = 0;
  uint64_t accesses = 0, fenced = 0;       // of shared memory; before the last before_copy
  uint64_t together = 0;                   // accesses before the warp's last collective
  std::unordered_map<int, uint32_t> seen;  // by barrier: the phases that this thread has waited for
};

// Who touched two bytes of shared memory last.
struct Touch {
  int thread = -1;  // in its cluster; -1: nobody, MANY: several of one block
  int warp = -1;    // in its cluster; -1: several
  uint32_t block_epoch = 0, warp_epoch = 0, cluster_epoch = 0;
};
constexpr int MANY = -2;

struct Cell {
  uint64_t launch = 0;  // older than the running one: untouched
  Touch writer, reader;
  int barrier = -1;  // of the copy that wrote it; -1: a thread did
  uint32_t phase = 0;
  bool arriving = false;
};

struct Barrier {
  uint32_t completed = 0;  // phases
  bool busy = false;
  int expected = -1, arrived = 0;  // bytes of asynchronous stores
  std::vector<Fiber*> waiting;
};

struct Copy {
  Block* block;
  int barrier, to;
  const char* from;  // null: it is the value
  int bytes;
  unsigned char value[8];
};

// What the lanes of a warp access by one instruction: the n-th access of each since their last collective.
struct Request {
  int bytes = 0;
  std::vector<std::pair<int, int>> lanes;  // which, and where
};

// Of all requests so far: the turns that they would take if no two lanes met in a bank, and those that they take.
struct Banks {
  uint64_t least = 0, turns = 0;

  // 32 banks of 4 bytes; lanes that want the same word meet nobody. Wider accesses are served 128 bytes at a time.
  void add(const Request& request) {
    const int words = (request.bytes + 3) / 4, served = LANES / words;
    for (int from = 0; from < LANES; from += served) {
      std::vector<int> wanted[32];
      for (const auto& [lane, at] : request.lanes) {
        if (lane < from || lane >= from + served) continue;
        for (int word = at / 4; word < at / 4 + words; ++word) {
          std::vector<int>& of_bank = wanted[word % 32];
          if (std::find(of_bank.begin(), of_bank.end(), word) == of_bank.end()) of_bank.push_back(word);
        }
      }
      size_t turns_here = 0;
      for (const auto& of_bank : wanted) turns_here = std::max(turns_here, of_bank.size());
      least += turns_here > 0;
      turns += turns_here;
    }
  }
};

struct Warp {
  std::vector<Request> requests;  // since the last collective, where banks are counted
  int kind = 0;
  unsigned char value[2][LANES][16];
  std::vector<Fiber*> waiting;
};

struct Block {
  int index = 0, rank = 0;
  std::vector<unsigned char> shared;
  std::vector<Cell> cells;
  std::unordered_map<int, Barrier> barriers;
  std::vector<Warp> warps;
  std::vector<Fiber*> waiting;  // at block_sync
  int finished = 0;
};

// ---- one launch ------------------------------------------------------------------------------------------------------

class Machine {
 public:
  // The order of everything follows from it.
  uint64_t seed = 1;
  bool counts_banks = false;
  Banks banks;
  uint64_t launches = 0;  // so far
  // Of the running one: of a block; of all; of a cluster; of a block's memory.
  int threads = 0, blocks = 0, cluster = 0, shared_bytes = 0;
  uint64_t cluster_launch = 0;  // its number: every cluster is a launch of its own
  std::vector<Fiber*> at_cluster_sync;

  static Machine& get() {
    static Machine machine;
    return machine;
  }

  template <class Body>
  void run(int all_blocks, int warps, int cluster_size, int shared, Body body) {
    std::lock_guard<std::mutex> one_at_a_time(mutex_);
    ++launches;
    if (all_blocks % cluster_size != 0) throw std::runtime_error("simt: blocks must fill their clusters");
    body_ = std::ref(body);
    threads = warps * LANES;
    blocks = all_blocks;
    cluster = cluster_size;
    shared_bytes = shared;
    state_ = seed * 0x9E3779B97F4A7C15ull + 1;
    for (int first = 0; first < blocks; first += cluster) run_cluster(first);
  }

  Fiber& running() const { return *running_; }
  Block& neighbour(int rank) { return *team_[size_t(rank)]; }

  [[noreturn]] void fail(const std::string& what) {
    const Fiber& f = *running_;
    throw std::runtime_error("simt: " + what + " (block " + std::to_string(f.block->index) + ", thread " +
                             std::to_string(f.thread) + ")");
  }

  void wake(std::vector<Fiber*>& waiting) {
    ready_.insert(ready_.end(), waiting.begin(), waiting.end());
    waiting.clear();
  }

  // Gives the turn to another fiber; comes back once somebody has woken this one.
  void wait(std::vector<Fiber*>& in) {
    in.push_back(running_);
    give_turn();
  }

  // At a barrier of `count`; the last one to come opens it.
  void meet(std::vector<Fiber*>& in, int count) {
    if (int(in.size()) + 1 == count)
      wake(in);
    else
      wait(in);
  }

  // One lane's part of a request.
  void note(Fiber& fiber, int at, int bytes) {
    if (!counts_banks) return;
    std::vector<Request>& requests = fiber.block->warps[size_t(fiber.thread / LANES)].requests;
    const size_t which = size_t(fiber.accesses - fiber.together);
    if (requests.size() <= which) requests.resize(which + 1);
    requests[which].bytes = bytes;
    requests[which].lanes.emplace_back(fiber.thread % LANES, at);
  }
  void settle(Warp& warp) {
    for (const Request& request : warp.requests) banks.add(request);
    warp.requests.clear();
  }

  void ask(const Copy& copy) { copies_.push_back(copy); }
  void complete_stores(Barrier& barrier) {
    if (barrier.expected < 0 || barrier.arrived < barrier.expected) return;
    if (barrier.arrived > barrier.expected) fail("more was stored than a barrier expects");
    barrier.expected = -1;
    barrier.arrived = 0;
    ++barrier.completed;
    wake(barrier.waiting);
  }

  uint32_t random() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return uint32_t(state_ >> 32);
  }

 private:
  std::mutex mutex_;
  std::function<void()> body_;
  int unfinished_ = 0;
  uint64_t state_ = 1;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::unique_ptr<Block>> team_;
  std::vector<Fiber*> ready_;
  std::vector<Copy> copies_;
  Fiber* running_ = nullptr;
  std::string error_;
  Context home_{};

  void run_cluster(int first) {
    ++cluster_launch;
    ready_.clear();
    at_cluster_sync.clear();
    copies_.clear();
    error_.clear();
    while (int(team_.size()) < cluster) team_.push_back(std::make_unique<Block>());
    while (int(fibers_.size()) < cluster * threads) fibers_.push_back(std::make_unique<Fiber>());
    for (int rank = 0; rank < cluster; ++rank) {
      Block& block = *team_[size_t(rank)];
      block.index = first + rank;
      block.rank = rank;
      if (int(block.shared.size()) < shared_bytes) {
        block.shared.resize(size_t(shared_bytes) + 16);
        block.cells.resize(size_t(shared_bytes) / 2 + 8);
      }
      block.barriers.clear();
      block.warps.resize(size_t(threads / LANES));
      for (Warp& warp : block.warps) warp.waiting.clear();
      block.waiting.clear();
      block.finished = 0;
      for (int thread = 0; thread < threads; ++thread) {
        Fiber& f = *fibers_[size_t(rank * threads + thread)];
        f.block = &block;
        f.thread = thread;
        f.number = rank * threads + thread;
        f.block_epoch = f.warp_epoch = f.cluster_epoch = 1;
        f.collectives = 0;
        f.accesses = f.fenced = f.together = 0;
        f.seen.clear();
        prepare(f);
        ready_.push_back(&f);
      }
    }
    unfinished_ = cluster * threads;
    running_ = ready_.back();
    ready_.pop_back();
    change(home_, running_->place);
    for (int rank = 0; rank < cluster; ++rank)
      for (Warp& warp : team_[size_t(rank)]->warps) settle(warp);
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  static void entry() {
    Machine& machine = get();
    machine.enter();
    std::abort();  // a finished fiber is never resumed
  }

  void enter() {
    try {
      body_();
    } catch (const std::exception& error) {
      error_ = error.what();
    }
    --unfinished_;
    ++running_->block->finished;
    if (!error_.empty() || unfinished_ == 0) leave();
    give_turn();
  }

  // The copies on their way: one arrives.
  void deliver() {
    const size_t which = random() % copies_.size();
    const Copy copy = copies_[which];
    copies_[which] = copies_.back();
    copies_.pop_back();
    Barrier& barrier = copy.block->barriers[copy.barrier];
    std::memcpy(copy.block->shared.data() + copy.to, copy.from ? copy.from : reinterpret_cast<const char*>(copy.value),
                size_t(copy.bytes));
    for (int at = copy.to; at < copy.to + copy.bytes; at += 2) {
      Cell& cell = copy.block->cells[size_t(at / 2)];
      cell.arriving = false;
      cell.phase = barrier.completed + 1;
      if (copy.from) continue;
      cell.launch = cluster_launch;
      cell.barrier = copy.barrier;
    }
    if (!copy.from) {
      barrier.arrived += copy.bytes;
      complete_stores(barrier);
      return;
    }
    ++barrier.completed;
    barrier.busy = false;
    wake(barrier.waiting);
  }

  void leave() { change(running_->place, home_); }

  void give_turn() {
    while (true) {
      if (!copies_.empty() && (ready_.empty() || random() % 16 == 0)) deliver();
      if (!ready_.empty()) break;
      if (!copies_.empty()) continue;
      error_ = "simt: deadlock: " + std::to_string(unfinished_) +
               " threads wait for others that have finished or wait elsewhere";
      leave();
    }
    const size_t which = random() % ready_.size();
    Fiber* next = ready_[which];
    ready_[which] = ready_.back();
    ready_.pop_back();
    Fiber* self = running_;
    if (next == self) return;
    running_ = next;
    change(self->place, next->place);
  }

  void prepare(Fiber& f) {
    if (!f.stack) f.stack.reset(new char[Fiber::STACK]);
#if defined(__x86_64__)
    // As mlkernels_switch leaves it: six registers, and where to go; at the entry of a function rsp + 8 is a multiple of 16.
    uintptr_t top = reinterpret_cast<uintptr_t>(f.stack.get() + Fiber::STACK) / 16 * 16 - 8;
    void** at = reinterpret_cast<void**>(top);
    *--at = reinterpret_cast<void*>(&Machine::entry);
    for (int i = 0; i < 6; ++i) *--at = nullptr;
    f.place = at;
#else
    getcontext(&f.place);
    f.place.uc_stack.ss_sp = f.stack.get();
    f.place.uc_stack.ss_size = Fiber::STACK;
    f.place.uc_link = nullptr;
    makecontext(&f.place, &Machine::entry, 0);
#endif
  }
};

}  // namespace simt
}  // namespace mlkernels
