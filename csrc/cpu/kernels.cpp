// The row loops of the CPU, compiled once per instruction set (MLKERNELS_ISA).
//
// A row is read from memory once while it fits in the cache: maximum, exponentials and gradient are three sweeps over the
// same lines. float and double rows of class stride 1 are swept where they lie; all others (half types, softcap,
// adjustment, short rows, other strides) are widened into a scratch row first and narrowed from one at the end.
#include "../finish.h"
#include "problem.h"
#include "vec.h"

#include <cstdlib>

namespace mlkernels {
namespace MLKERNELS_ISA {
namespace {

// ---- sweeps: one direction over n contiguous elements ----------------------------------------------------------------

template <class T>
T sweep_max(const T* u, int64_t n, T start) {
  constexpr int W = WIDTH<T>;
  Vec<T> a = splat(start), b = a, c = a, d = a;
  int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) {
    a = larger(a, load(u + j));
    b = larger(b, load(u + j + W));
    c = larger(c, load(u + j + 2 * W));
    d = larger(d, load(u + j + 3 * W));
  }
  for (; j + W <= n; j += W) a = larger(a, load(u + j));
  if (j < n) b = larger(b, load_first(u + j, int(n - j), start));
  return max_of<T>(larger(larger(a, b), larger(c, d)));
}

template <class T>
struct Sums {
  T e;      // of exp(s (u_j - m))
  T shift;  // of exp(s (u_j - m)) (u_j - m)
};

// e_j = factor exp(s (u_j - m)) to out (which may be u), their sum without the factor, and on demand the shifted sum.
template <class T, bool STORE, bool SHIFT>
Sums<T> sweep_exp(const T* u, T* out, int64_t n, T m, T s, T factor) {
  constexpr int W = WIDTH<T>;
  Vec<T> sum0{}, sum1{}, shift0{};
  const Vec<T> vm = splat(m), vs = splat(s);
  auto one = [&](Vec<T> x, Vec<T>& sum) {
    const Vec<T> d = x - vm;
    const Vec<T> e = exp_nonpositive(d * vs);
    sum += e;
    // A class of probability 0 contributes 0, also when its logit is -inf.
    if (SHIFT) shift0 += e == Vec<T>{} ? Vec<T>{} : e * d;
    return e;
  };
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) {
    const Vec<T> e0 = one(load(u + j), sum0), e1 = one(load(u + j + W), sum1);
    if (STORE) {
      store(out + j, e0 * factor);
      store(out + j + W, e1 * factor);
    }
  }
  for (; j < n; j += W) {
    const bool whole = j + W <= n;
    const Vec<T> e = one(whole ? load(u + j) : load_first(u + j, int(n - j), -infinity<T>()), sum0);
    if (STORE) {
      if (whole)
        store(out + j, e * factor);
      else
        store_first(out + j, int(n - j), e * factor);
    }
  }
  return {sum_of<T>(sum0 + sum1), SHIFT ? sum_of<T>(shift0) : T(0)};
}

// The sum of w_j (u_j - m); w null: ones.
template <class T>
T sweep_weighted(const T* u, const T* w, int64_t n, T m) {
  constexpr int W = WIDTH<T>;
  Vec<T> sum{};
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    const Vec<T> d = load(u + j) - m;
    sum += w ? d * load(w + j) : d;
  }
  T total = sum_of<T>(sum);
  for (; j < n; ++j) total += w ? (u[j] - m) * w[j] : u[j] - m;
  return total;
}

template <class T>
void sweep_multiply(T* g, int64_t n, T factor) {
  constexpr int W = WIDTH<T>;
  int64_t j = 0;
  for (; j + W <= n; j += W) store(g + j, load(g + j) * factor);
  if (j < n) store_first(g + j, int(n - j), load_first(g + j, int(n - j), T(0)) * factor);
}

// g_j -= spread w_j; w null: ones.
template <class T>
void sweep_spread(T* g, const T* w, int64_t n, T spread) {
  for (int64_t j = 0; j < n; ++j) g[j] -= w ? spread * w[j] : spread;
}

// ---- between storage and scratch -------------------------------------------------------------------------------------

// R rows of class stride `stride` into scratch rows `pitch` apart.
template <class T, class S>
void gather_rows(const S* const* rows, int count, int64_t stride, int64_t classes, T* out, int64_t pitch) {
  if (stride == 1) {
    for (int b = 0; b < count; ++b) {
      const S* in = rows[b];
      T* to = out + b * pitch;
      for (int64_t j = 0; j < classes; ++j) to[j] = widen(in[j]);
    }
    return;
  }
  for (int64_t j = 0; j < classes; ++j)
    for (int b = 0; b < count; ++b) out[b * pitch + j] = widen(rows[b][j * stride]);
}

template <class T, class S>
void scatter_rows(S* const* rows, int count, int64_t stride, int64_t classes, const T* from, int64_t pitch) {
  if (stride == 1) {
    for (int b = 0; b < count; ++b) {
      S* to = rows[b];
      const T* in = from + b * pitch;
      for (int64_t j = 0; j < classes; ++j) narrow(in[j], to[j]);
    }
    return;
  }
  for (int64_t j = 0; j < classes; ++j)
    for (int b = 0; b < count; ++b) narrow(from[b * pitch + j], rows[b][j * stride]);
}

// softcap and adjustment, in place; afterwards the gradient's chain rule back through softcap.
template <class T>
void cap(T* u, int64_t n, T c, const T* adjustment) {
  if (c > 0) {
    const T inverse = 1 / c;
    for (int64_t j = 0; j < n; ++j) {
      const T x = u[j] * inverse;
      // tanh x = sign(x) (1 - e) / (1 + e), e = exp(-2 |x|), by expm1 so that small x keep their digits
      const T e = m_expm1(-2 * m_abs(x));
      const T t = -e / (2 + e);
      u[j] = c * (x < 0 ? -t : t);
    }
  }
  if (adjustment)
    for (int64_t j = 0; j < n; ++j) u[j] += adjustment[j];
}
template <class T>
void uncap(T* g, const T* u, int64_t n, T c, const T* adjustment) {
  const T inverse = 1 / c;
  for (int64_t j = 0; j < n; ++j) {
    const T t = (adjustment ? u[j] - adjustment[j] : u[j]) * inverse;
    g[j] *= (1 - t) * (1 + t);
  }
}

// ---- a row -----------------------------------------------------------------------------------------------------------

// The columns other than y, as at most two pieces.
struct Others {
  int64_t begin[2], length[2];
  int count;
};

template <class T>
void run_row(const Problem<T>& p, int64_t row, const T* u, int64_t columns, T* g, T target, const Others& others) {
  // columns >= classes: a scratch row is padded with -inf, and holds -inf at the label.
  const int64_t y = p.label[row];
  const bool want_grad = g != nullptr;
  bool want_parameters = false;
  for (int slot = 0; slot < TRAINABLE_SLOTS; ++slot) want_parameters |= p.by_parameter[slot] != nullptr;
  (void)columns;

  Values<T> values;
  for (int slot = 0; slot <= TAU_MIN; ++slot) {
    const Parameter<T>& v = p.values[slot];
    values.at[slot] = v.data[v.mode == Mode::SHARED ? 0 : v.mode == Mode::PER_CLASS ? y : row];
  }
  const int64_t group = p.group ? p.group[row] : 0;
  values.t = {p.t.slope + group * p.t.bins, p.t.bias + group * p.t.bins, p.t.bins};
  values.tau = {p.tau.slope + group * p.tau.bins, p.tau.bias + group * p.tau.bins, p.tau.bins};
  const Batch<T> batch{p.smoothing, p.smoothing / T(p.classes), p.z_loss, p.weight_sum, p.classes};
  const T weight = p.weight ? p.weight[y] : T(1);

  Row<T> r;
  r.target = target;
  T shift = 0, weighted = 0;
  const bool want_shift = want_parameters && (p.by_parameter[SCALE] || p.by_parameter[SCALE_HIGH] || p.by_parameter[LOGIT_NORM]);
  const bool one_sweep = p.saved != nullptr;  // the statistics are known: the exponentials are written as the gradient

  if (one_sweep) {
    r.other_max = p.saved[2 * row];
    r.log_sum = p.saved[2 * row + 1];
  } else {
    r.other_max = -infinity<T>();
    for (int i = 0; i < others.count; ++i) r.other_max = sweep_max(u + others.begin[i], others.length[i], r.other_max);
  }
  const RowScale<T> scale = row_scale(p.spec, values, r.target - r.other_max);
  const T m = r.other_max == -infinity<T>() ? T(0) : r.other_max;
  if (!one_sweep) {
    T sum = 0;
    for (int i = 0; i < others.count; ++i) {
      const T* from = u + others.begin[i];
      const int64_t n = others.length[i];
      const Sums<T> s = !want_grad  ? sweep_exp<T, false, false>(from, nullptr, n, m, scale.value, T(1))
                        : want_shift ? sweep_exp<T, true, true>(from, g + others.begin[i], n, m, scale.value, T(1))
                                     : sweep_exp<T, true, false>(from, g + others.begin[i], n, m, scale.value, T(1));
      sum += s.e;
      shift += s.shift;
    }
    r.log_sum = sum == 0 ? -infinity<T>() : m_log(sum);
  }
  if (p.smoothing > 0 && !(one_sweep && !want_shift)) {
    for (int i = 0; i < others.count; ++i) {
      const int64_t begin = others.begin[i];
      // A scratch row's padding and label hold -inf: those columns are left out by hand.
      const int64_t end = begin + others.length[i] > p.classes ? p.classes : begin + others.length[i];
      if (begin <= y && y < end) {
        weighted += sweep_weighted(u + begin, p.weight ? p.weight + begin : nullptr, y - begin, m);
        weighted += sweep_weighted(u + y + 1, p.weight ? p.weight + y + 1 : nullptr, end - y - 1, m);
      } else {
        weighted += sweep_weighted(u + begin, p.weight ? p.weight + begin : nullptr, end - begin, m);
      }
    }
  }

  const Position<T> at = locate(p.spec, values, r, scale, want_parameters);
  const HeadLoss<T> head = head_loss(p.spec, values, at.nll, want_parameters);
  if (p.loss_by_class) {
    const RowLoss<T> loss = row_loss(batch, at, head, weight, weighted);
    p.loss_by_class[row] = loss.by_class;
    if (p.loss_by_row) p.loss_by_row[row] = loss.by_row;
  }
  if (p.save) {
    p.save[2 * row] = r.other_max;
    p.save[2 * row + 1] = r.log_sum;
  }
  if (p.logsumexp) {
    p.logsumexp[row] = at.lse;
    p.log_prob[row] = -at.nll;
    p.confidence[row] = r.target - r.other_max;
    // u[y] of a scratch row is -inf, of a row in place the target itself: neither is counted or found below.
    int64_t larger_count = 0, first = -1;
    T highest = r.target;
    for (int64_t j = 0; j < p.classes; ++j) {
      if (j == y) continue;
      larger_count += u[j] > r.target;
      if (u[j] > highest) highest = u[j];
    }
    for (int64_t j = 0; j < p.classes && first < 0; ++j)
      if ((j == y ? r.target : u[j]) == highest) first = j;
    bool has_nan = r.target != r.target;
    for (int64_t j = 0; j < p.classes; ++j) has_nan |= u[j] != u[j];
    p.rank[row] = larger_count;
    p.prediction[row] = has_nan ? -1 : first;
  }
  if (!want_grad && !want_parameters) return;

  Upstream<T> up{0, 0, 0, 0};
  if (p.up_loss) {
    const T g_loss = p.up_loss[row * p.up_loss_stride];
    up.by_class = g_loss * p.by_class_factor;
    up.by_row = g_loss * p.by_row_factor;
  }
  if (p.up_logsumexp) up.lse = p.up_logsumexp[row * p.up_logsumexp_stride];
  if (p.up_log_prob) up.log_prob = p.up_log_prob[row * p.up_log_prob_stride];
  const RowGradient<T> gradient = row_gradient(batch, r, at, head, up, weight);

  if (one_sweep && (want_grad || want_shift)) {
    for (int i = 0; i < others.count; ++i) {
      const T* from = u + others.begin[i];
      T* to = want_grad ? g + others.begin[i] : nullptr;
      const int64_t n = others.length[i];
      if (want_grad && want_shift)
        shift += sweep_exp<T, true, true>(from, to, n, m, scale.value, gradient.others).shift;
      else if (want_grad)
        sweep_exp<T, true, false>(from, to, n, m, scale.value, gradient.others);
      else
        shift += sweep_exp<T, false, true>(from, nullptr, n, m, scale.value, T(1)).shift;
    }
  } else if (want_grad) {
    for (int i = 0; i < others.count; ++i) sweep_multiply(g + others.begin[i], others.length[i], gradient.others);
  }
  if (want_grad) {
    if (gradient.spread != 0) sweep_spread(g, p.weight, p.classes, gradient.spread);
    g[y] = gradient.target;
  }
  if (want_parameters) {
    T by[TRAINABLE_SLOTS];
    row_parameters(p.spec, values, batch, r, at, head, gradient, up, weight, shift, weighted, by);
    for (int slot = 0; slot < TRAINABLE_SLOTS; ++slot)
      if (p.by_parameter[slot]) p.by_parameter[slot][row] = by[slot];
    if (p.t_bin) p.t_bin[row] = at.target.bin;
    if (p.tau_bin) p.tau_bin[row] = head.bin;
  }
}

template <class T>
void ignore_row(const Problem<T>& p, int64_t row) {
  if (p.loss_by_class) p.loss_by_class[row] = 0;
  if (p.loss_by_row) p.loss_by_row[row] = 0;
  if (p.save) p.save[2 * row] = p.save[2 * row + 1] = 0;
  if (p.logsumexp) {
    p.logsumexp[row] = p.log_prob[row] = p.confidence[row] = 0;
    p.prediction[row] = -1;
    p.rank[row] = 0;
  }
  for (int slot = 0; slot < TRAINABLE_SLOTS; ++slot)
    if (p.by_parameter[slot]) p.by_parameter[slot][row] = 0;
  if (p.t_bin) p.t_bin[row] = 0;
  if (p.tau_bin) p.tau_bin[row] = 0;
}

template <class S>
void clear_row(S* g, int64_t stride, int64_t classes) {
  S zero;
  std::memset(&zero, 0, sizeof zero);
  for (int64_t j = 0; j < classes; ++j) g[j * stride] = zero;
}

// ---- all rows of a thread --------------------------------------------------------------------------------------------

// Scratch of a thread, kept between calls: allocating it anew would cost more than a small problem.
struct Scratch {
  void* data = nullptr;
  size_t bytes = 0;
  ~Scratch() { std::free(data); }
  void* get(size_t wanted) {
    if (wanted > bytes) {
      std::free(data);
      bytes = (wanted + 4095) / 4096 * 4096;
      data = std::aligned_alloc(4096, bytes);
      if (!data) std::abort();
    }
    return data;
  }
};
thread_local Scratch scratch;

template <class T, class S>
constexpr bool SAME = false;
template <class T>
constexpr bool SAME<T, T> = true;

// Rows in place pay two pieces and two tails; below this many columns a padded copy is cheaper.
constexpr int64_t SHORT_ROW = 256;

template <class T, class S>
void run_in_place(const Problem<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t y = p.label[row];
    S* g = p.grad ? static_cast<S*>(p.grad) + p.out.offset(row) : nullptr;
    if (y == p.spec.ignore_index) {
      ignore_row(p, row);
      if (g) clear_row(g, 1, p.classes);
      continue;
    }
    const T* u = static_cast<const T*>(p.input) + p.in.offset(row);
    const Others others{{0, y + 1}, {y, p.classes - y - 1}, 2};
    run_row(p, row, u, p.classes, reinterpret_cast<T*>(g), u[y], others);
  }
}

template <class T, class S>
void run_through_scratch(const Problem<T>& p, int64_t begin, int64_t end) {
  constexpr int W = WIDTH<T>;
  constexpr int MAX_TILE = 16;
  const int64_t pitch = (p.classes + W - 1) / W * W;
  // Rows whose classes are far apart are read several at a time: their neighbours share cache lines.
  const bool apart = p.in.class_stride != 1 || (p.grad && p.out.class_stride != 1);
  int64_t tile = apart ? (1 << 16) / (pitch * int64_t(sizeof(T))) : 1;
  tile = tile < 1 ? 1 : tile > MAX_TILE ? MAX_TILE : tile;
  T* logits = static_cast<T*>(scratch.get(size_t(2 * tile * pitch) * sizeof(T)));
  T* grads = logits + tile * pitch;
  const Others others{{0, 0}, {pitch, 0}, 1};
  const S* input = static_cast<const S*>(p.input);
  S* output = static_cast<S*>(p.grad);

  for (int64_t first = begin; first < end;) {
    const S* from[MAX_TILE];
    S* to[MAX_TILE];
    int64_t rows[MAX_TILE];
    int count = 0;
    for (; first < end && count < tile; ++first) {
      S* g = output ? output + p.out.offset(first) : nullptr;
      if (p.label[first] == p.spec.ignore_index) {
        ignore_row(p, first);
        if (g) clear_row(g, p.out.class_stride, p.classes);
        continue;
      }
      rows[count] = first;
      from[count] = input + p.in.offset(first);
      to[count++] = g;
    }
    gather_rows(from, count, p.in.class_stride, p.classes, logits, pitch);
    for (int b = 0; b < count; ++b) {
      T* u = logits + b * pitch;
      T* g = output ? grads + b * pitch : nullptr;
      if (p.softcap > 0 || p.adjustment) cap(u, p.classes, p.softcap, p.adjustment);
      const int64_t y = p.label[rows[b]];
      const T target = u[y];
      for (int64_t j = p.classes; j < pitch; ++j) u[j] = -infinity<T>();
      u[y] = -infinity<T>();
      run_row(p, rows[b], u, pitch, g, target, others);
      if (g && p.softcap > 0) {
        u[y] = target;
        uncap(g, u, p.classes, p.softcap, p.adjustment);
      }
    }
    if (output) scatter_rows(to, count, p.out.class_stride, p.classes, grads, pitch);
  }
}

template <class T, class S>
void run_as(const Problem<T>& p, int64_t begin, int64_t end) {
  if constexpr (SAME<T, S>) {
    const bool plain = p.softcap <= 0 && !p.adjustment && p.in.class_stride == 1 && (!p.grad || p.out.class_stride == 1);
    if (plain && p.classes >= SHORT_ROW) return run_in_place<T, S>(p, begin, end);
  }
  run_through_scratch<T, S>(p, begin, end);
}

void run_float(const Problem<float>& p, int64_t begin, int64_t end) {
  if (p.storage == Storage::FLOAT) return run_as<float, float>(p, begin, end);
  if (p.storage == Storage::BFLOAT16) return run_as<float, bfloat16>(p, begin, end);
  run_as<float, float16>(p, begin, end);
}
void run_double(const Problem<double>& p, int64_t begin, int64_t end) { run_as<double, double>(p, begin, end); }

}  // namespace

const Kernels kernels{run_float, run_double};

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
