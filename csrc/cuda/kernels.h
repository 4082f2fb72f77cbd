// Between library_cuda.cpp, which knows tensors, and the kernels, which know the machine. Plain C++.
#pragma once

#include "multi_copy.h"
#include "rows_long.h"
#include "rows_short.h"
#include "visit.h"

namespace mlkernels {

constexpr int MOST_DEVICES = 64;

// The device that a launch goes to.
struct Device {
  int index, multiprocessors, major;
  int shared;  // bytes that a block may have
  void* stream;
};

enum class Way : int { SHORT, LONG, STREAMED, APART };

// How a visit runs.
struct Choice {
  Way way;
  int warps, cluster;
  RowPlan rows;
  TilePlan tiles;
};

// What the tests on a host ask for instead; 0: nothing.
struct Forced {
  int way = 0;  // Way + 1
  int warps = 0, cluster = 0, chunk = 0, slots = 0, tile_rows = 0;
  int teams = 0;  // at most so many blocks or clusters
};
extern Forced forced;

// One set of row kernels per storage type.
template <class T>
struct RowKernels {
  Choice (*choose)(const Visit<T>&, const Device&);
  // Blocks, or clusters, of the launch; each of a SHORT or APART one's warps leaves a partial sum, each LONG team one.
  int (*blocks)(const Visit<T>&, const Device&, const Choice&);
  void (*run)(const Visit<T>&, const Device&, const Choice&, int blocks);
};
extern const RowKernels<float> rows_float, rows_bfloat16, rows_float16;
extern const RowKernels<double> rows_double;

struct Sums {
  template <class T>
  static void count(const Visit<T>& v, const Device& device, double* out, int blocks);
  template <class T>
  static void total(const Visit<T>& v, const Device& device, int64_t partials);
  template <class T>
  static void total_of(const T* in, int64_t count, double* out, const Device& device);
  template <class T>
  static void buckets(const Visit<T>& v, const Device& device, const T* values, const int* bins, int per_group,
                      int64_t buckets, int chunks, double* out);
  template <class T>
  static void keys(const Visit<T>& v, const Device& device, int64_t* out);
  template <class T>
  static void runs(const Visit<T>& v, const Device& device, const T* values, const int64_t* keys, const int64_t* order,
                   double* out);
  // out[i] = the sum of in[i * terms ...], in the storage of a parameter.
  template <class T>
  static void store(const T* in, int64_t count, int terms, void* out, Storage storage, const Device& device);
};

// Whether the kernels run on this device: 0, or CUDA's number of the reason.
int probe(int device);

void copy_many(const CopyTable& table, const Device& device);

}  // namespace mlkernels
