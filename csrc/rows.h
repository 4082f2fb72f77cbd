// A call as plain data, and the steps of a row that every row loop shares: its numbers, its results. No torch, no CUDA
// types; which elements are read and written when is each loop's own business.
#pragma once

#include "finish.h"
#include "half.h"

namespace mlkernels {

enum class Storage : int { FLOAT, DOUBLE, BFLOAT16, FLOAT16 };
// Of labels and groups.
enum class Index : int { INT64, INT32, INT16, INT8, UINT8, UINT16, UINT32, UINT64 };

// Where the rows of an (N, C, d1, ...) tensor lie, in elements.
struct Layout {
  static constexpr int MAX_DIMS = 16;
  int dims;  // of the rows: N, d1, ...
  int64_t sizes[MAX_DIMS];
  int64_t strides[MAX_DIMS];
  int64_t class_stride;

  MLK_FN int64_t offset(int64_t row) const {
    if (dims == 1) return row * strides[0];
    int64_t at = 0;
    for (int d = dims - 1; d > 0; --d) {
      at += row % sizes[d] * strides[d];
      row /= sizes[d];
    }
    return at + row * strides[0];
  }
};

// A number of the loss: itself, or where it lies.
template <class T>
struct Parameter {
  T value;
  const void* data;  // null: BY_VALUE
  Mode mode;
  Storage storage;
};

// A number for each row, or one for all of them, or none.
template <class T>
struct PerRow {
  const T* data;   // null: none
  int64_t stride;  // 0: one for all

  MLK_FN explicit operator bool() const { return data; }
  MLK_FN T operator[](int64_t row) const { return data[row * stride]; }
};

template <class T>
struct Tables {
  const T* slope;  // (groups, bins)
  const T* bias;
  int bins;
  int64_t groups;
};

// What happens to a logit before a loss sees it: c tanh(f / c), then its class's number is added. What that is, is said
// here and in `added` alone.
template <class T>
struct Preparation {
  T softcap;            // 0: none
  const T* adjustment;  // (classes) or null

  MLK_FN bool adds() const { return adjustment; }
  MLK_FN bool none() const { return !(softcap > 0) && !adds(); }
  // Of a number and a vector for each slot.
  template <class Numbers, class VectorOf>
  static Preparation of(const Numbers& numbers, VectorOf vector_of) {
    return {T(numbers[SOFTCAP]), vector_of(ADJUSTMENT)};
  }
  // Of the classes from `start` on.
  Preparation from(int64_t start) const { return {softcap, adjustment ? adjustment + start : nullptr}; }
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
  Parameter<T> values[LOSS_SLOTS];
  Tables<T> t, tau;
  const T* weight;  // (classes) or null
  PerRow<T> row_weight;
  Preparation<T> preparation;
  T weight_sum, smoothing, z_loss;

  const T* saved;                                  // (rows, 2): m and log_sum of an earlier visit, or null
  T* save;                                         // (rows, 2)
  T* losses;                                       // (rows), or on a GPU the reduced loss; or null
  T *logsumexp, *log_prob, *entropy, *confidence;  // (rows)
  int64_t *prediction, *rank;                      // (rows)

  // Upstream gradients; where up_loss is none it is up_value.
  T up_value;
  PerRow<T> up_loss, up_logsumexp, up_log_prob, up_entropy;
  T* by_parameter[TRAINABLE_SLOTS];               // (rows) each, where that parameter's gradient is wanted
  bool want_parameters, want_shift, want_square;  // any of them; sums of Statistics
  int *t_bin, *tau_bin;                           // (rows), with the tables' gradients
};

namespace MLKERNELS_ISA {

#ifdef __CUDACC__
#define MLK_UNROLL _Pragma("unroll")
#else
#define MLK_UNROLL
#endif

template <class T>
MLK_FN T read_number(const void* data, Storage storage, int64_t index) {
  switch (storage) {
    case Storage::FLOAT: return T(static_cast<const float*>(data)[index]);
    case Storage::DOUBLE: return T(static_cast<const double*>(data)[index]);
    case Storage::BFLOAT16: return T(widen(static_cast<const bfloat16*>(data)[index]));
    default: return T(widen(static_cast<const float16*>(data)[index]));
  }
}

// A label as the 64-bit integer that it is compared as. One beyond those becomes the largest, which is no class, and no
// ignore_index either: that comes as a double.
MLK_FN int64_t signed_label(uint64_t label) { return label > uint64_t(INT64_MAX) ? INT64_MAX : int64_t(label); }

// A row's numbers. y and group are legal, or nothing here depends on them.
template <class T>
MLK_FN void fetch(const Problem<T>& p, int64_t row, int64_t y, int64_t group, Values<T>& values) {
  MLK_UNROLL
  for (int slot = 0; slot < LOSS_SLOTS; ++slot) {
    const Parameter<T>& v = p.values[slot];
    values.at[slot] = v.value;
    if (v.data)
      values.at[slot] = read_number<T>(v.data, v.storage,
                                       v.mode == Mode::SHARED      ? 0
                                       : v.mode == Mode::PER_CLASS ? y
                                                                   : row);
  }
  values.t = {p.t.slope + group * p.t.bins, p.t.bias + group * p.t.bins, p.t.bins};
  values.tau = {p.tau.slope + group * p.tau.bins, p.tau.bias + group * p.tau.bins, p.tau.bins};
}

template <class T>
MLK_FN Batch<T> batch_of(const Problem<T>& p) {
  return {p.smoothing, p.smoothing / T(p.classes), p.z_loss, p.weight_sum, p.classes};
}

// A row's factors, from those that all rows share.
template <bool BARE = false, class T>
MLK_FN Factors<T> factors_of(const Problem<T>& p, const Factors<T>& shared, int64_t row) {
  if (BARE || !p.row_weight) return shared;
  const T weight = p.row_weight[row];
  return {shared.by_class * weight, shared.by_row * weight};
}

// The derivatives by parameters of a row that has none: 0 where it is ignored, NaN where it is NaN, whose scale and bins
// nobody knows.
template <class T>
MLK_SELDOM void store_parameters(const Problem<T>& p, int64_t row, T value) {
  MLK_UNROLL
  for (int slot = 0; slot < TRAINABLE_SLOTS; ++slot)
    if (p.by_parameter[slot]) p.by_parameter[slot][row] = value;
  if (p.t_bin) p.t_bin[row] = 0;
  if (p.tau_bin) p.tau_bin[row] = 0;
}

// A row that stands at `at`: its loss, and where one is wanted what its gradient is made of; all other results are left
// where they belong. leaves: this thread is the one to.
// PARAMETERS: whether gradients of parameters or of the entropy may be wanted at all. BARE: nothing is saved, and no
// upstream gradient but up_value. spec: the problem's, of which the caller may know more than that.
template <bool PARAMETERS, bool BARE = false, class T>
MLK_FN T finish_row(const Problem<T>& p, const Spec& spec, const Batch<T>& batch, const Factors<T>& shared, int64_t row,
                    const Values<T>& values, const Statistics<T>& r, const Position<T>& at, T weight, bool leaves,
                    Coefficients<T>& gradient) {
  const Factors<T> factors = factors_of<BARE>(p, shared, row);
  const HeadLoss<T> head = head_loss(spec, values, at.nll, PARAMETERS && p.want_parameters);
  const T loss = finish(batch, factors, r, at, head, weight);
  if (!BARE && p.save && leaves) {
    p.save[2 * row] = r.other_max;
    p.save[2 * row + 1] = r.log_sum;
  }
  if (!p.grad && !(PARAMETERS && p.want_parameters)) return loss;
  Upstream<T> up{0, 0, 0, 0};
  const T g_loss = !BARE && p.up_loss ? p.up_loss[row] : p.up_value;
  up.by_class = g_loss * factors.by_class;
  up.by_row = g_loss * factors.by_row;
  if (!BARE && p.up_logsumexp) up.lse = p.up_logsumexp[row];
  if (!BARE && p.up_log_prob) up.log_prob = p.up_log_prob[row];
  gradient = coefficients(batch, r, at, head, up, weight);
  T of_entropy = 0;
  if (PARAMETERS && p.up_entropy) {
    const T g = p.up_entropy[row];
    add_entropy(r, at, g, gradient);
    if (p.want_square) of_entropy = g * entropy_by_scale(r, at);
  }
  if (PARAMETERS && p.want_parameters && leaves && at.nll != at.nll) {
    store_parameters(p, row, at.nll);
  } else if (PARAMETERS && p.want_parameters && leaves) {
    T by[TRAINABLE_SLOTS];
    row_parameters(spec, values, batch, r, at, head, gradient, up, weight, of_entropy, by);
    MLK_UNROLL
    for (int slot = 0; slot < TRAINABLE_SLOTS; ++slot)
      if (p.by_parameter[slot]) p.by_parameter[slot][row] = by[slot];
    if (p.t_bin) p.t_bin[row] = at.target.bin;
    if (p.tau_bin) p.tau_bin[row] = head.bin;
  }
  return loss;
}

// The results, but for the loss, of a row that is not looked at: 0 where its label is ignored, NaN where it is no label.
template <class T>
MLK_FN void store_unread(const Problem<T>& p, int64_t row, T value) {
  if (p.save) p.save[2 * row] = p.save[2 * row + 1] = 0;
  if (p.logsumexp) {
    p.logsumexp[row] = p.log_prob[row] = p.entropy[row] = p.confidence[row] = value;
    p.prediction[row] = -1;
    p.rank[row] = 0;
  }
  store_parameters(p, row, value);
}

// softcap: c tanh(x / c), and an overflow stays one.
template <class T>
MLK_FN T cap(T x, T c) {
  const T u = x / c;
  // tanh u = sign(u) (1 - e) / (1 + e), e = exp(-2 |u|), by expm1 so that small u keep their digits
  const T e = m_expm1(-2 * m_abs(u));
  const T t = -e / (2 + e);
  return x == infinity<T>() ? nan<T>() : c * (u < 0 ? -t : t);
}
// Its derivative, where its value is y.
template <class T>
MLK_FN T cap_slope(T y, T c) {
  const T t = y / c;
  return (1 - t) * (1 + t);
}

// What is added to the logit of class j, where adds() says that something is.
template <class T>
MLK_FN T added(const Preparation<T>& p, int64_t j) {
  return p.adjustment[j];
}
// A logit as the loss sees it.
template <class T>
MLK_FN T prepare(const Preparation<T>& p, T x, int64_t j) {
  if (p.softcap > 0) x = cap(x, p.softcap);
  return p.adds() ? x + added(p, j) : x;
}
// A gradient's way back through that, where it was u.
template <class T>
MLK_FN T unprepare(const Preparation<T>& p, T gradient, T u, int64_t j) {
  return p.softcap > 0 ? gradient * cap_slope(p.adds() ? u - added(p, j) : u, p.softcap) : gradient;
}

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
