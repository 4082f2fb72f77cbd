// What library_cpu.cpp hands to the row loops: plain data, shared by every instruction set.
#pragma once

#include <cstdint>

#include "../spec.h"

namespace mlkernels {

enum class Storage : int { FLOAT, DOUBLE, BFLOAT16, FLOAT16 };

// Where the rows of an (N, C, d1, ...) tensor lie, in elements.
struct Layout {
  static constexpr int MAX_DIMS = 16;
  int dims;  // of the rows: N, d1, ...
  int64_t sizes[MAX_DIMS];
  int64_t strides[MAX_DIMS];
  int64_t class_stride;

  int64_t offset(int64_t row) const {
    if (dims == 1) return row * strides[0];
    int64_t at = 0;
    for (int d = dims - 1; d > 0; --d) {
      at += row % sizes[d] * strides[d];
      row /= sizes[d];
    }
    return at + row * strides[0];
  }
};

enum class Mode : int { SHARED, PER_CLASS, PER_ROW };

// A number of the loss, already in the accumulation type.
template <class T>
struct Parameter {
  const T* data;
  Mode mode;
};

template <class T>
struct Tables {
  const T* slope;  // (groups, bins)
  const T* bias;
  int bins;
};

// The visit: what one pass over the rows has to produce. Null pointers are not wanted.
template <class T>
struct Problem {
  Spec spec;
  int64_t rows, classes;
  Storage storage;
  const void* input;
  Layout in;
  void* grad;  // dL/dinput
  Layout out;
  bool streamed;          // grad is too large for the caches: write past them
  const int64_t* label;   // (rows), legal or ignore_index
  const int64_t* group;   // (rows) or null
  Parameter<T> values[TAU_MIN + 1];
  bool uniform;           // every row has the same values
  Tables<T> t, tau;
  const T* weight;        // (classes) or null
  const T* adjustment;    // (classes) or null
  T weight_sum, smoothing, z_loss, softcap;

  const T* saved;         // (rows, 2): m and log_sum of an earlier visit, or null
  T* save;                // (rows, 2)
  T* loss_by_class;       // (rows)
  T* loss_by_row;         // (rows), only with z_loss
  T *logsumexp, *log_prob, *confidence;  // (rows)
  int64_t *prediction, *rank;            // (rows)

  // Upstream gradients; each is a pointer with a stride of 0 or 1 rows, or null, and the factor of the reduction.
  const T *up_loss, *up_logsumexp, *up_log_prob;
  int64_t up_loss_stride, up_logsumexp_stride, up_log_prob_stride;
  T by_class_factor, by_row_factor;
  T* by_parameter[TRAINABLE_SLOTS];  // (rows) each, where that parameter's gradient is wanted
  bool want_parameters, want_shift;  // any of them; one that needs the mean logit
  int *t_bin, *tau_bin;              // (rows), with the tables' gradients
};

// One set of row loops per instruction set.
struct Kernels {
  void (*run_float)(const Problem<float>&, int64_t begin, int64_t end);
  void (*run_double)(const Problem<double>&, int64_t begin, int64_t end);
};

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace mlkernels
