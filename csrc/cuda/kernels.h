// Between library_cuda.cpp, which knows tensors, and the kernels, which know the machine. Plain C++.
#pragma once

#include <algorithm>

#include "multi_copy.h"
#include "rows_long.h"
#include "rows_short.h"
#include "sums.h"

namespace mlkernels {

constexpr int MOST_DEVICES = 64;

// The device that a launch goes to.
struct Device {
  int index, multiprocessors, major;
  int shared;  // bytes that a block may have
  void* stream;
};

enum class Path : int { SHORT, LONG, STREAMED, STRIDED };

// How a visit runs.
struct Choice {
  Path path;
  int warps, cluster;
  RowPlan rows;
  TilePlan tiles;
};

// What the tests on a host ask for instead; 0: nothing.
struct Forced {
  int path = 0;  // Path + 1
  int warps = 0, cluster = 0, chunk = 0, slots = 0, tile_rows = 0;
  int teams = 0;  // at most so many blocks or clusters
};
extern Forced forced;

// One set of row kernels per storage type.
template <class T>
struct RowKernels {
  Choice (*choose)(const Visit<T>&, const Device&);
  // Blocks, or clusters, of the launch; each of a SHORT or STRIDED one's warps leaves a partial sum, each LONG team one.
  int (*blocks)(const Visit<T>&, const Device&, const Choice&);
  void (*run)(const Visit<T>&, const Device&, const Choice&, int blocks);
};
extern const RowKernels<float> rows_float, rows_bfloat16, rows_float16;
extern const RowKernels<double> rows_double;

// A kernel of sums.h, by blocks of so many warps.
constexpr int SUM_WARPS = 8;
template <class Kernel, class... Visits>
void launch_sums(const Device&, int64_t blocks, const typename Kernel::Plan&, const Visits&...);

inline int64_t blocks_for(int64_t threads, const Device& device) {
  constexpr int64_t EACH = SUM_WARPS * LANES;
  return std::clamp<int64_t>((threads + EACH - 1) / EACH, 1, 4 * device.multiprocessors);
}

// Whether the kernels run on this device: 0, or CUDA's number of the reason.
int probe(int device);

void copy_many(const CopyTable& table, const Device& device);

}  // namespace mlkernels
