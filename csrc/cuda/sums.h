// The sums around a visit: what "mean" divides by, the reduced loss, the gradients of parameters. All in double and in a
// fixed order: the same bits on every run, and none by atomics.
#pragma once

#include "visit.h"

namespace mlkernels {
namespace MLKERNELS_ISA {

struct SumKernel {
  static constexpr int THREADS = 256, BLOCKS = 2;
};

// Ahead of a visit, (blocks, 2): the sums of the kept rows' class weights, and of the kept rows, in `parts`; then, by one
// block more where it is asked for, the sum of all class weights.
template <class T>
struct Prologue : SumKernel {
  struct Plan {
    int parts;
    double* out;
  };
  template <class Simt>
  static MLK_DEVICE void run(const Simt& simt, const Visit<T>& v, const Plan& plan) {
    double weights = 0, rows = 0;
    if (simt.block() < plan.parts) {
      count_rows(v, int64_t(simt.block()) * simt.threads() + simt.thread(), int64_t(plan.parts) * simt.threads(),
                 weights, rows);
    } else {
      for (int64_t j = simt.thread(); j < v.classes; j += 4 * AT_ONCE * simt.threads()) {
        double some[4 * AT_ONCE];
        read_ahead(v.weight, j, simt.threads(), v.classes, some);
        weights += sum_of(some);
      }
    }
    sum_over_cluster(simt, 0, weights, rows);
    if (simt.thread() != 0) return;
    if (v.arrived && simt.block() == 0) *v.arrived = 0;
    plan.out[2 * simt.block()] = weights;
    plan.out[2 * simt.block() + 1] = rows;
  }
};

// The reduced loss from the teams' partial sums, by one block: where no launch before the teams' could set a counter.
template <class T>
struct TotalLoss : SumKernel {
  struct Plan {
    int64_t partials;
  };
  template <class Simt>
  static MLK_DEVICE void run(const Simt& simt, const Visit<T>& v, const Plan& plan) {
    double sum = sum_of_partials(v, plan.partials, simt.thread(), simt.threads()), none = 0;
    sum_over_cluster(simt, 0, sum, none);
    if (simt.warp() != 0) return;
    if (v.rows == 0) sum = 0 * double(shared_factors(simt, v).by_class);  // no visit; the mean of none is NaN
    if (simt.lane() == 0) *v.losses = T(sum);
  }
};

// A parameter's gradient from those of the rows, per bucket: block (bucket, chunk) adds up the chunk's rows of its bucket.
// bins null: one bucket for all; else the bucket is the row's bin, of its group's.
template <class T>
struct SumBuckets : SumKernel {
  struct Plan {
    const T* values;  // (rows)
    const int* bins;
    int per_group;
    int chunks;
    double* out;  // (buckets, chunks)
  };
  template <class Simt>
  static MLK_DEVICE void run(const Simt& simt, const Visit<T>& v, const Plan& plan) {
    const int64_t bucket = simt.block() / plan.chunks, chunk = simt.block() % plan.chunks;
    double sum = 0, none = 0;
    const int64_t every = int64_t(plan.chunks) * simt.threads();
    for (int64_t row = chunk * simt.threads() + simt.thread(); row < v.rows; row += AT_ONCE * every) {
      T value[AT_ONCE];
      int64_t y[AT_ONCE] = {}, group[AT_ONCE] = {}, bin[AT_ONCE] = {};
      read_ahead(plan.values, row, every, v.rows, value);
      if (plan.bins) {
        read_ahead(plan.bins, row, every, v.rows, bin);
        read_indices(v.label, row, every, v.rows, y);
        if (v.group) read_indices(v.group, row, every, v.rows, group);
      }
      MLK_UNROLL
      for (int k = 0; k < AT_ONCE; ++k) {
        if (row + k * every >= v.rows) break;
        if (plan.bins) {
          const Label label = checked_label(v, y[k], group[k]);
          if (label.status == LabelStatus::IGNORED) continue;
          if ((label.status == LabelStatus::VALID ? label.group * plan.per_group : 0) + bin[k] != bucket) continue;
        }
        sum += double(value[k]);
      }
    }
    sum_over_cluster(simt, 0, sum, none);
    if (simt.thread() == 0) plan.out[simt.block()] = sum;
  }
};

// Labels as the sort of SumRuns wants them: those that are none, or are ignored, come last.
template <class T>
struct SortKeys : SumKernel {
  struct Plan {
    int64_t* out;  // (rows)
  };
  template <class Simt>
  static MLK_DEVICE void run(const Simt& simt, const Visit<T>& v, const Plan& plan) {
    const int64_t every = int64_t(simt.blocks()) * simt.threads();
    for (int64_t row = int64_t(simt.block()) * simt.threads() + simt.thread(); row < v.rows; row += AT_ONCE * every) {
      int64_t y[AT_ONCE], group[AT_ONCE] = {};
      read_indices(v.label, row, every, v.rows, y);
      if (v.group) read_indices(v.group, row, every, v.rows, group);
      MLK_UNROLL
      for (int k = 0; k < AT_ONCE; ++k) {
        if (row + k * every >= v.rows) break;
        const LabelStatus status = checked_label(v, y[k], group[k]).status;
        plan.out[row + k * every] = status == LabelStatus::VALID     ? y[k]
                                    : status == LabelStatus::INVALID ? v.classes
                                                                     : v.classes + 1;
      }
    }
  }
};

// out[i] = the sum of in[i * terms ...], as a parameter's type.
template <class T>
struct StoreSums : SumKernel {
  struct Plan {
    const T* in;
    int64_t count;
    int terms;
    void* out;
    Storage storage;
  };
  template <class Simt>
  static MLK_DEVICE void run(const Simt& simt, const Plan& plan) {
    // A warp for each where there are terms to add.
    const int lanes = plan.terms > 1 ? LANES : 1, mine = simt.thread() % lanes;
    const int64_t every = int64_t(simt.blocks()) * simt.threads() / lanes;
    for (int64_t i = (int64_t(simt.block()) * simt.threads() + simt.thread()) / lanes; i < plan.count; i += every) {
      double sum = 0;
      for (int k = mine; k < plan.terms; k += lanes) sum += double(plan.in[i * plan.terms + k]);
      if (lanes > 1) sum = sum_over(simt, sum);
      if (mine != 0) continue;
      switch (plan.storage) {
        case Storage::FLOAT: static_cast<float*>(plan.out)[i] = float(sum); break;
        case Storage::DOUBLE: static_cast<double*>(plan.out)[i] = sum; break;
        case Storage::BFLOAT16: narrow(float(sum), static_cast<bfloat16*>(plan.out)[i]); break;
        default: narrow(float(sum), static_cast<float16*>(plan.out)[i]);
      }
    }
  }
};

// Per class: the rows in the order of their labels, a warp for each row that begins a class. out is zero before.
template <class T>
struct SumRuns : SumKernel {
  static constexpr int RUN_AT_ONCE = 4;  // most classes have a few rows
  struct Plan {
    const T* values;       // (rows)
    const int64_t* keys;   // (rows), sorted
    const int64_t* order;  // (rows): which row each is
    double* out;           // (classes)
  };
  template <class Simt>
  static MLK_DEVICE void run(const Simt& simt, const Visit<T>& v, const Plan& plan) {
    const int64_t every = int64_t(simt.blocks()) * simt.warps();
    for (int64_t at = int64_t(simt.block()) * simt.warps() + simt.warp(); at < v.rows; at += every) {
      const int64_t key = plan.keys[at];
      if (key >= v.classes || (at > 0 && plan.keys[at - 1] == key)) continue;
      double sum = 0;
      bool more = true;
      for (int64_t i = at + simt.lane(); more && i < v.rows; i += RUN_AT_ONCE * LANES) {
        int64_t its[RUN_AT_ONCE], order[RUN_AT_ONCE];
        T value[RUN_AT_ONCE];
        read_ahead(plan.keys, i, LANES, v.rows, its);
        read_ahead(plan.order, i, LANES, v.rows, order);
        MLK_UNROLL
        for (int k = 0; k < RUN_AT_ONCE; ++k) {
          more = its[k] == key && i + k * LANES < v.rows;
          value[k] = more ? plan.values[order[k]] : T(0);
        }
        MLK_UNROLL
        for (int k = 0; k < RUN_AT_ONCE; ++k) sum += double(value[k]);
      }
      sum = sum_over(simt, sum);
      if (simt.lane() == 0) plan.out[key] = sum;
    }
  }
};

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
