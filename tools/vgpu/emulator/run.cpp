// The scheduler: threads take turns in a seeded random order, clusters follow each other in another. And the interface for C.
#include <algorithm>

#include "handlers.h"
#include "module.h"

namespace vgpu {

bool approximate = false;

std::string where(const Thread& t) {
  const Machine& m = *t.machine;
  std::string at = " [block " + std::to_string(t.block->index) + " (rank " + std::to_string(t.block->rank) +
                   "), thread " + std::to_string(t.index);
  if (m.current) at += ", ptx line " + std::to_string(m.current->line) + ": " + m.text(*m.current);
  return at + "]";
}
void fault(const Thread& t, const std::string& what) { throw Fault(what + where(t)); }

namespace {

// Where an undefined register's value comes from: its first undefined source, again and again.
std::string origin(const Thread& t, int operand) {
  constexpr int MOST = 24;
  const Function& f = *t.machine->function;
  std::string path;
  std::vector<int> seen;
  for (int step = 0; step < MOST; ++step) {
    const Instruction* writer = nullptr;
    for (const Instruction& i : f.code) {
      const bool off = i.guard >= 0 && bool(t.registers[i.guard] & 1) == i.negated;
      if (!off && std::find(i.out.begin(), i.out.end(), operand) != i.out.end()) writer = &i;
    }
    if (!writer) return path + "\n      <- never written";
    path += "\n      <- line " + std::to_string(writer->line) + ": " + t.machine->text(*writer);
    const auto next =
        std::find_if(writer->in.begin(), writer->in.end(), [&](int in) { return in >= 0 && !defined(t, in); });
    if (next == writer->in.end() || std::find(seen.begin(), seen.end(), *next) != seen.end()) return path;
    seen.push_back(operand = *next);
  }
  return path;
}

}  // namespace

void undefined(Thread& t, int operand, const char* what) {
  const std::string message = std::string("UNDEFINED value used as ") + what + where(t);
  if (!(t.machine->flags & UNDEFINED_WARNS)) throw Fault(message + (operand >= 0 ? origin(t, operand) : ""));
  ++t.machine->warnings[message];
}

// ---- control ---------------------------------------------------------------------------------------------------------

Next nothing(Thread&, const Instruction&) { return Next::STEP; }
Next leave(Thread&, const Instruction&) { return Next::EXIT; }
Next trap(Thread& t, const Instruction&) { fault(t, "trap"); }
Next jump(Thread& t, const Instruction& i) {
  t.pc = u32(i.target);
  return Next::JUMPED;
}

Next call(Thread& t, const Instruction& i) {
  constexpr size_t DEEPEST = 8;
  const Call& c = t.machine->function->calls[size_t(i.immediate)];
  for (const Call::Copy& copy : c.arguments) memcpy(t.scratch + copy.to, t.scratch + copy.from, size_t(copy.size));
  t.returns.push_back(int(t.pc) + 1);
  if (t.returns.size() > DEEPEST) fault(t, "calls are too deep");
  t.pc = u32(c.entry);
  return Next::JUMPED;
}
Next after_call(Thread& t, const Instruction& i) {
  const Call& c = t.machine->function->calls[size_t(i.immediate)];
  for (const Call::Copy& copy : c.results) memcpy(t.scratch + copy.to, t.scratch + copy.from, size_t(copy.size));
  return Next::STEP;
}
Next give_back(Thread& t, const Instruction&) {
  if (t.returns.empty()) return Next::EXIT;
  t.pc = u32(t.returns.back());
  t.returns.pop_back();
  return Next::JUMPED;
}

namespace {

using Special = u32 (*)(const Thread&);
struct Named {
  const char* name;
  Special read;
};
const Named SPECIAL[] = {
    {"%tid.x", [](const Thread& t) { return t.at[0]; }},
    {"%tid.y", [](const Thread& t) { return t.at[1]; }},
    {"%tid.z", [](const Thread& t) { return t.at[2]; }},
    {"%ntid.x", [](const Thread& t) { return t.machine->threads[0]; }},
    {"%ntid.y", [](const Thread& t) { return t.machine->threads[1]; }},
    {"%ntid.z", [](const Thread& t) { return t.machine->threads[2]; }},
    {"%ctaid.x", [](const Thread& t) { return t.block->at[0]; }},
    {"%ctaid.y", [](const Thread& t) { return t.block->at[1]; }},
    {"%ctaid.z", [](const Thread& t) { return t.block->at[2]; }},
    {"%nctaid.x", [](const Thread& t) { return t.machine->grid[0]; }},
    {"%nctaid.y", [](const Thread& t) { return t.machine->grid[1]; }},
    {"%nctaid.z", [](const Thread& t) { return t.machine->grid[2]; }},
    {"%laneid", [](const Thread& t) { return u32(t.lane); }},
    {"%warpid", [](const Thread& t) { return u32(t.warp->index); }},
    {"%nwarpid", [](const Thread& t) { return u32(t.machine->warps()); }},
    {"%cluster_ctarank", [](const Thread& t) { return u32(t.block->rank); }},
    {"%cluster_nctarank", [](const Thread& t) { return u32(t.machine->cluster_blocks); }},
    {"%cluster_ctaid.x", [](const Thread& t) { return u32(t.block->rank); }},
    {"%cluster_nctaid.x", [](const Thread& t) { return u32(t.machine->cluster_blocks); }},
    {"%clusterid.x", [](const Thread& t) { return u32(t.block->index / t.machine->cluster_blocks); }},
    {"%dynamic_smem_size", [](const Thread& t) { return t.machine->dynamic_shared; }},
};

}  // namespace

int special_register_of(const std::string& name) {
  for (size_t k = 0; k < std::size(SPECIAL); ++k)
    if (name == SPECIAL[k].name) return int(k);
  return -1;
}
Next special_register(Thread& t, const Instruction& i) {
  set(t, i.out[0], SPECIAL[i.kind].read(t));
  return Next::STEP;
}

// ---- threads ---------------------------------------------------------------------------------------------------------

void Thread::restart() {
  pc = 0;
  state = State::READY;
  block_epoch = warp_epoch = cluster_epoch = 1;
  accesses = fenced = committed = 0;
  outstanding = 0;
  arrival = Arrival::NO;
  returns.clear();
  seen.clear();
  initialised.clear();
  copies.clear();
  stretch = 0;
  known = observed = published = nullptr;
}

// The blocks of a cluster, every byte of their memory undefined.
void Machine::start(int first) {
  const Function& f = *function;
  const int total = block_threads * cluster_blocks;
  const u32 bytes = shared_end - SHARED_BASE;
  constexpr u8 POISON = 0xcd;
  while (int(blocks.size()) < cluster_blocks) blocks.push_back(std::make_unique<Block>());
  while (int(running.size()) < total) running.push_back(std::make_unique<Thread>());
  running.resize(size_t(total));
  registers.resize(size_t(f.registers) * size_t(total));
  masks.assign(size_t(f.registers) * size_t(total), 0);
  scratch.resize(size_t(f.scratch) * size_t(total));
  ready.clear();
  at_cluster.clear();
  transfers.clear();
  arrived = 0;
  live = total;
  for (int rank = 0; rank < cluster_blocks; ++rank) {
    Block& b = *blocks[size_t(rank)];
    b.index = first + rank;
    b.rank = rank;
    b.at[0] = u32(b.index) % grid[0];
    b.at[1] = u32(b.index) / grid[0] % grid[1];
    b.at[2] = u32(b.index) / (grid[0] * grid[1]);
    b.shared.assign(bytes + 16, POISON);
    b.defined.assign(bytes + 16, 0);
    b.shadows.restart(bytes + 16);
    b.barriers.clear();
    b.live = block_threads;
    for (Block::Named& named : b.named) named = {};
    b.warps.assign(size_t(warps()), Warp());
    for (int w = 0; w < warps(); ++w) {
      b.warps[size_t(w)].block = &b;
      b.warps[size_t(w)].index = w;
    }
    for (int index = 0; index < block_threads; ++index) {
      const int id = rank * block_threads + index;
      Thread& t = *running[size_t(id)];
      t.restart();
      t.machine = this;
      t.registers = &registers[size_t(f.registers) * size_t(id)];
      t.masks = &masks[size_t(f.registers) * size_t(id)];
      t.constants = f.constants.data();
      t.constant_masks = f.defined.data();
      t.scratch = &scratch[size_t(f.scratch) * size_t(id)];
      t.local.assign(size_t(f.local_bytes), POISON);
      t.local_defined.assign(size_t(f.local_bytes), 0);
      t.block = &b;
      t.warp = &b.warps[size_t(index / 32)];
      t.index = index;
      t.lane = index % 32;
      t.id = id;
      t.at[0] = u32(index) % threads[0];
      t.at[1] = u32(index) / threads[0] % threads[1];
      t.at[2] = u32(index) / (threads[0] * threads[1]);
      t.warp->lanes[t.lane] = &t;
      t.warp->all |= 1u << t.lane;
      ready.push_back(&t);
    }
  }
}

void Machine::exit(Thread& t) {
  const Function& f = *function;
  if (!t.returns.empty()) fault(t, "exit within a function");
  t.state = State::DONE;
  t.warp->exited |= 1u << t.lane;
  --t.block->live;
  --live;
  auto stuck = [&](const Thread& other, const std::string& what) {
    current = &f.code[other.pc];
    fault(other, what);
  };
  for (int lane = 0; lane < 32; ++lane) {
    if (!(t.warp->waiting >> lane & 1)) continue;
    const Thread& other = *t.warp->lanes[lane];
    if (value(other, f.code[other.pc].mask) >> t.lane & 1)
      stuck(other, "a lane waits in a collective for lane " + std::to_string(t.lane) + " that has EXITED");
  }
  for (const Block::Named& named : t.block->named)
    if (!named.inside.empty() && t.block->live < named.wanted)
      stuck(*named.inside[0], "bar.sync waits although thread " + std::to_string(t.index) + " has EXITED");
  if (t.block->live == 0) {
    for (const Transfer& transfer : transfers)
      if (transfer.block == t.block)
        fault(t, "a block ends while an asynchronous operation into its shared memory is in flight");
    for (const auto& [address, barrier] : t.block->barriers)
      if (barrier.transactions != 0 || barrier.pending != barrier.expected)
        ++warnings["a block ends within a phase of an mbarrier (" + std::to_string(barrier.pending) + " of " +
                   std::to_string(barrier.expected) + " arrivals, " + std::to_string(barrier.transactions) +
                   " bytes pending)"];
  }
  if (cluster_blocks > 1) cluster_progress(*this);
}

void Machine::deadlock() {
  constexpr int MOST = 8;
  static const char* const STATES[] = {"ready", "warp", "block barrier", "cluster barrier", "mbarrier", "done"};
  std::map<std::string, int> waiting;
  for (const auto& t : running)
    if (t->state != State::DONE)
      ++waiting["line " + std::to_string(function->code[t->pc].line) + " " + function->texts[t->pc] + " (" +
                STATES[int(t->state)] + ")"];
  std::string message = "DEADLOCK:";
  int said = 0;
  for (const auto& [what, count] : waiting)
    if (said++ < MOST) message += " " + std::to_string(count) + "x{" + what + "}";
  throw Fault(message);
}

// A thread goes on until it must wait; now and then it is made to pause before.
void Machine::turn(Thread& t) {
  constexpr u32 SHORT = 64;
  const Function& f = *function;
  const Instruction* code = f.code.data();
  u64* hits = function->hits.data();
  u64 left = random() & 3 ? ~u64(0) : 1 + random() % SHORT;
  const u64 limit = most_steps ? most_steps : ~u64(0);
  u64 steps = counts.steps;
  bool again = true;
  while (left-- > 0) {
    const Instruction& i = code[t.pc];
    current = &i;
    ++hits[t.pc];
    if (++steps > limit) fault(t, "more than " + std::to_string(limit) + " instructions");
    if (i.guard >= 0) {
      need(t, i.guard, "a guard", 1);
      if (bool(t.registers[i.guard] & 1) == i.negated) {
        ++t.pc;
        continue;
      }
    }
    const Next next = i.run(t, i);
    if (next == Next::STEP) {
      ++t.pc;
      continue;
    }
    if (next == Next::JUMPED) continue;
    if (next == Next::YIELD) {
      ++t.pc;
      break;
    }
    again = false;
    if (next == Next::EXIT)
      exit(t);
    else if (t.state == State::AT_WARP)
      try_collective(*t.warp, t);
    break;
  }
  counts.steps = steps;
  if (again) ready.push_back(&t);
}

void Machine::run_cluster(int first) {
  start(first);
  while (true) {
    if (!transfers.empty() && (ready.empty() || random() % 8 == 0)) {
      deliver();
      continue;
    }
    if (ready.empty()) {
      if (live == 0) return;
      deadlock();
    }
    const size_t k = random() % ready.size();
    Thread& t = *ready[k];
    ready[k] = ready.back();
    ready.pop_back();
    turn(t);
  }
}

void Machine::run() {
  constexpr u32 MOST_BLOCKS = 65535;  // along y and z
  const Function& f = *function;
  block_threads = int(threads[0] * threads[1] * threads[2]);
  if (f.most_threads && block_threads > f.most_threads) throw Fault("more threads than .maxntid");
  if (f.required_threads && block_threads != f.required_threads) throw Fault("not as many threads as .reqntid");
  if (block_threads % 32 || block_threads < 32 || block_threads > 1024)
    throw Fault("a block of " + std::to_string(block_threads) + " threads");
  if (!grid[0] || !grid[1] || !grid[2] || grid[1] > MOST_BLOCKS || grid[2] > MOST_BLOCKS) throw Fault("grid size");
  if (cluster_blocks < 1 || grid[0] % u32(cluster_blocks)) throw Fault("the grid does not fill its clusters");
  const u32 align = u32(f.dynamic_align);
  shared_end = SHARED_BASE + (u32(f.static_shared) + align - 1) / align * align + dynamic_shared;
  if (shared_end > SHARED_OFFSET) throw Fault("more shared memory than there is");
  std::sort(allocations.begin(), allocations.end(), [](auto& a, auto& b) { return a.base < b.base; });
  std::vector<int> order;
  for (u32 first = 0; first < grid[0] * grid[1] * grid[2]; first += u32(cluster_blocks)) order.push_back(int(first));
  for (size_t k = order.size(); k > 1; --k) std::swap(order[k - 1], order[random() % k]);
  for (const int first : order) run_cluster(first);
}

}  // namespace vgpu

// ---- the interface ---------------------------------------------------------------------------------------------------

namespace {

std::string last_error, answer;

// One machine for all launches: what it holds is used again.
vgpu::Machine& machine() {
  static vgpu::Machine one;
  return one;
}

}  // namespace

#define VGPU_EXPORT extern "C" __attribute__((visibility("default")))

VGPU_EXPORT const char* vgpu_error() { return last_error.c_str(); }

VGPU_EXPORT void* vgpu_load(const char* text) {
  try {
    return new vgpu::Module(text);
  } catch (const std::exception& e) {
    last_error = e.what();
    return nullptr;
  }
}
VGPU_EXPORT void vgpu_unload(void* module) { delete static_cast<vgpu::Module*>(module); }

// By line: the names of the kernels.
VGPU_EXPORT const char* vgpu_kernels(void* module) {
  answer.clear();
  for (const std::string& name : static_cast<vgpu::Module*>(module)->kernels()) answer += name + "\n";
  return answer.c_str();
}
VGPU_EXPORT void* vgpu_kernel(void* module, const char* name) {
  try {
    return &static_cast<vgpu::Module*>(module)->kernel(name);
  } catch (const std::exception& e) {
    last_error = std::string(name) + ": " + e.what();
    return nullptr;
  }
}
VGPU_EXPORT int vgpu_parameter_bytes(void* kernel) { return static_cast<vgpu::Function*>(kernel)->parameter_bytes; }
// By line: offset and size of a parameter.
VGPU_EXPORT const char* vgpu_parameters(void* kernel) {
  answer.clear();
  for (const vgpu::Parameter& p : static_cast<vgpu::Function*>(kernel)->parameters)
    answer += std::to_string(p.offset) + " " + std::to_string(p.size) + "\n";
  return answer.c_str();
}
// By line: an instruction's line in the text, and how often it has run.
VGPU_EXPORT const char* vgpu_hits(void* kernel) {
  const vgpu::Function& f = *static_cast<vgpu::Function*>(kernel);
  answer.clear();
  for (size_t k = 0; k < f.code.size(); ++k)
    answer += std::to_string(f.code[k].line) + " " + std::to_string(f.hits[k]) + "\n";
  return answer.c_str();
}
// By line: how often, and what.
VGPU_EXPORT const char* vgpu_warnings() {
  answer.clear();
  for (const auto& [what, count] : machine().warnings) answer += std::to_string(count) + " " + what + "\n";
  return answer.c_str();
}

struct vgpu_Launch {
  const uint8_t* parameters;
  const uint64_t* allocations;  // pairs of address and size
  int32_t allocation_count, parameter_bytes;
  uint32_t grid[3], threads[3];
  uint32_t cluster, dynamic_shared;
  uint64_t seed, most_steps;
  int32_t flags;
};

// 0, or 1: an error.
VGPU_EXPORT int vgpu_run(void* kernel, const vgpu_Launch* launch, uint64_t* counts) {
  vgpu::Machine& m = machine();
  try {
    m.function = static_cast<vgpu::Function*>(kernel);
    if (launch->parameter_bytes != m.function->parameter_bytes)
      throw vgpu::Fault("the launch gives " + std::to_string(launch->parameter_bytes) +
                        " bytes of parameters, the kernel takes " + std::to_string(m.function->parameter_bytes));
    m.parameters = launch->parameters;
    std::copy(launch->grid, launch->grid + 3, m.grid);
    std::copy(launch->threads, launch->threads + 3, m.threads);
    m.cluster_blocks = int(launch->cluster);
    m.dynamic_shared = launch->dynamic_shared;
    m.seed = launch->seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
    m.most_steps = launch->most_steps;
    m.flags = launch->flags;
    vgpu::approximate = launch->flags & vgpu::APPROXIMATE;
    m.allocations.clear();
    m.global_shadows.resize(size_t(launch->allocation_count));
    for (int k = 0; k < launch->allocation_count; ++k) {
      m.allocations.push_back({launch->allocations[2 * k], launch->allocations[2 * k + 1], uint32_t(k)});
      m.global_shadows[size_t(k)].restart(uint32_t(launch->allocations[2 * k + 1]) + m.global_shadows[0].PAGE);
    }
    m.recent[0] = m.recent[1] = {};
    m.stretches.assign(1, {});
    m.counters.clear();
    m.counts = {};
    m.warnings.clear();
    m.current = nullptr;
    m.run();
    memcpy(counts, &m.counts, sizeof m.counts);
    return 0;
  } catch (const std::exception& e) {
    last_error = e.what();
    return 1;
  }
}
