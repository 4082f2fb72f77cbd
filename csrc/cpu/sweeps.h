// One direction over n contiguous elements: what the loops over rows and over tiles are made of.
#pragma once

#include <algorithm>
#include <limits>

#include "../rows.h"
#include "vec.h"

namespace mlkernels {
namespace MLKERNELS_ISA {
namespace {

template <class T>
Vec<T> sweep_max(const T* u, int64_t n, Vec<T> a) {
  constexpr int W = WIDTH<T>;
  Vec<T> b = a, c = a, d = a;
  int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) {
    a = larger(a, load(u + j));
    b = larger(b, load(u + j + W));
    c = larger(c, load(u + j + 2 * W));
    d = larger(d, load(u + j + 3 * W));
  }
  for (; j + W <= n; j += W) a = larger(a, load(u + j));
  if (j < n) b = larger(b, load_first(u + j, int(n - j), -infinity<T>()));
  return larger(larger(a, b), larger(c, d));
}

template <class T>
T sweep_max(const T* u, int64_t n, T start) {
  return max_of<T>(sweep_max(u, n, splat(start)));
}

// Of a row without y.
template <class T>
T max_but_one(const T* u, int64_t n, int64_t y) {
  return max_of<T>(sweep_max(u + y + 1, n - y - 1, sweep_max(u, y, splat(-infinity<T>()))));
}

// How many of n logits are above a limit, and how many are NaN.
template <class T>
struct Counts {
  int64_t above = 0, undefined = 0;

  void add(const T* u, int64_t n, T limit) {
    typedef typename VecOf<T>::I I;  // counts by lane: a row has fewer classes than 2^31 vectors
    constexpr int W = WIDTH<T>;
    I higher{}, unequal{};
    const Vec<T> least = splat(limit);
    int64_t j = 0;
    for (; j + W <= n; j += W) {
      const Vec<T> x = load(u + j);
      higher -= x > least;
      unequal -= x != x;
    }
    for (int lane = 0; lane < W; ++lane) {
      above += higher[lane];
      undefined += unequal[lane];
    }
    for (; j < n; ++j) {
      above += u[j] > limit;
      undefined += u[j] != u[j];
    }
  }
};

template <class T>
struct Sums {
  T e;      // of exp(s (u_j - m))
  T shift;  // of exp(s (u_j - m)) (u_j - m)
};

// What to fetch while a sweep is busy with arithmetic: the next row, at the same columns. bytes: per column; 0: nothing.
struct Ahead {
  const char* row;
  int bytes;
};

// A factor that costs nothing.
struct One {};
template <class V>
static inline V operator*(V x, One) {
  return x;
}

// What else to do with each vector: nothing.
struct Alone {
  void vector() {}
};

// e_j = factor exp(s (u_j - m)) to out (which may be u), their sum without the factor, and on demand the shifted sum.
template <class T, bool STORE, bool SHIFT, class Factor, class Beside = Alone>
Sums<T> sweep_exp(const T* u, T* out, int64_t n, T m, T s, Factor factor, Ahead ahead, Beside* with = nullptr) {
  constexpr int W = WIDTH<T>;
  Vec<T> sum0{}, sum1{}, shift0{};
  const Vec<T> vm = splat(m), vs = splat(s);
  Beside beside = with ? *with : Beside{};  // in registers
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
    if (ahead.bytes) {
      __builtin_prefetch(ahead.row + j * ahead.bytes, 0, 2);
      __builtin_prefetch(ahead.row + (j + W) * ahead.bytes, 0, 2);
    }
    const Vec<T> e0 = one(load(u + j), sum0), e1 = one(load(u + j + W), sum1);
    if (STORE) {
      store(out + j, e0 * factor);
      store(out + j + W, e1 * factor);
    }
    beside.vector();
    beside.vector();
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
  if (with) *with = beside;
  return {sum_of<T>(sum0 + sum1), SHIFT ? sum_of<T>(shift0) : T(0)};
}

// The sum of exp(s (u_j - m)) (u_j - m)^2.
template <class T>
T sweep_square(const T* u, int64_t n, T m, T s) {
  constexpr int W = WIDTH<T>;
  Vec<T> sum{};
  for (int64_t j = 0; j < n; j += W) {
    const Vec<T> d = (j + W <= n ? load(u + j) : load_first(u + j, int(n - j), -infinity<T>())) - m;
    const Vec<T> e = exp_nonpositive(d * s);
    sum += e == Vec<T>{} ? Vec<T>{} : e * d * d;
  }
  return sum_of<T>(sum);
}

// g_j = (factor + slope (u_j - m)) g_j, where g_j = exp(s (u_j - m)).
template <class T>
void sweep_slope(T* g, const T* u, int64_t n, T m, T factor, T slope) {
  constexpr int W = WIDTH<T>;
  const auto one = [&](Vec<T> e, Vec<T> d) { return factor * e + (e == Vec<T>{} ? Vec<T>{} : slope * e * d); };
  int64_t j = 0;
  for (; j + W <= n; j += W) store(g + j, one(load(g + j), load(u + j) - m));
  if (j < n)
    store_first(g + j, int(n - j), one(load_first(g + j, int(n - j), T(0)), load_first(u + j, int(n - j), T(0)) - m));
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

// g_j *= by_j
template <class T>
void sweep_product(T* g, const T* by, int64_t n) {
  constexpr int W = WIDTH<T>;
  int64_t j = 0;
  for (; j + W <= n; j += W) store(g + j, load(g + j) * load(by + j));
  if (j < n) store_first(g + j, int(n - j), load_first(g + j, int(n - j), T(0)) * load_first(by + j, int(n - j), T(0)));
}

// out_j = factor e_j; they do not overlap. By itself: what a lambda captures is read again after every store.
template <class T, class S>
void sweep_put(S* out, const T* e, int64_t n, T factor) {
  constexpr int W = WIDTH<T>;
  int64_t j = 0;
  for (; j + W <= n; j += W) put(out + j, load(e + j) * factor, false);
  if (j < n && n >= W) return put(out + n - W, load(e + n - W) * factor, false);
  for (; j < n; ++j) narrow(e[j] * factor, out[j]);
}

// A gradient, factor e_j and the target at y, on its way past the caches. A vector leaves whenever one of the next row's
// exponentials is made, so that memory has something to do while there is arithmetic.
template <class T, class S>
struct Leaving {
  static constexpr int W = WIDTH<T>;
  S* out = nullptr;
  const T* e = nullptr;
  T factor{};
  int64_t next = 0, label = 0, tail = 0;

  Leaving() = default;
  // A streamed vector goes to its own alignment; what is left at both ends, and the one that holds the label, go at once.
  Leaving(S* out_, const T* e_, int64_t n, T factor_, int64_t y, T target) : out(out_), e(e_), factor(factor_) {
    const auto plain = [&](int64_t from, int64_t to) { sweep_put(out + from, e + from, to - from, factor); };
    const int64_t past = int64_t(reinterpret_cast<uintptr_t>(out) % (W * sizeof(S)) / sizeof(S));
    const int64_t first = past ? W - past : 0;
    const int64_t head = first < n ? first : n;
    tail = head + (n - head) / W * W;
    label = y < head || y >= tail ? tail : head + (y - head) / W * W;
    next = label == head ? head + W : head;
    plain(0, head);
    if (label < tail) plain(label, label + W);
    plain(tail, n);
    narrow(target, out[y]);
    if (subnormal()) rest();
  }
  // A product below the normal numbers takes so long that it holds up the exponentials beside it; a sample tells.
  bool subnormal() const {
    const Vec<T> least = splat(std::numeric_limits<T>::min() / (factor < 0 ? -factor : factor));
    const int64_t step = std::max<int64_t>((tail - next) / (16 * W), 1) * W;
    Vec<T> found{};
    for (int64_t j = next; j < tail; j += step) found = larger(found, load(e + j) < least ? load(e + j) : Vec<T>{});
    return max_of<T>(found) > 0;
  }
  void vector() {
    if (next >= tail) return;
    put(out + next, load(e + next) * factor, true);
    next += W;
    if (next == label) next += W;
  }
  void rest() {
    for (Leaving left = *this; left.next < left.tail;) left.vector();
    next = tail;
  }
};

// The same of a gradient that stays in the caches, where it lies: out is e.
template <class T>
struct Waiting {
  static constexpr int W = WIDTH<T>;
  T* g = nullptr;
  T factor{}, target{};
  int64_t next = 0, n = 0, label = 0;

  Waiting() = default;
  Waiting(T* out, const T*, int64_t n_, T factor_, int64_t y, T target_)
      : g(out), factor(factor_), target(target_), next(factor == 1 ? n_ : 0), n(n_), label(y) {
    g[label] = 0;
  }
  void vector() {
    if (next + W > n) return;
    store(g + next, load(g + next) * factor);
    next += W;
  }
  void rest() {
    if (!g) return;
    sweep_multiply(g + next, n - next, factor);
    g[label] = target;
    g = nullptr;
  }
};

// to_j += factor from_j
template <class T>
void sweep_add(T* to, const T* from, int64_t n, T factor) {
  constexpr int W = WIDTH<T>;
  int64_t j = 0;
  for (; j + W <= n; j += W) store(to + j, load(to + j) + load(from + j) * factor);
  for (; j < n; ++j) to[j] += from[j] * factor;
}

// g_j -= spread w_j; w null: ones.
template <class T>
void sweep_spread(T* g, const T* w, int64_t n, T spread) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) g[j] -= w ? spread * w[j] : spread;
}

// softcap: c tanh(x / c), where an overflow stays one, and its derivative.
template <class T>
struct Capped {
  Vec<T> value, slope;
};
template <class T>
struct Cap {
  T c, inverse;

  explicit Cap(T c_) : c(c_), inverse(std::min(1 / c_, std::numeric_limits<T>::max())) {}
  Capped<T> operator()(Vec<T> x) const {
    const Vec<T> u = x * inverse, z = u * u, one = splat(T(1));
    const Vec<T> bend = z * tanh_series(z), t = u + u * bend, near = x + x * bend, slope = one - t * t;
    if (all_less(z, one)) return {near, slope};
    // e = exp(-2 |u|), w = 2 e / (1 + e): |tanh u| = 1 - w, and its slope, w (2 - w), does not cancel.
    const Vec<T> e = exp_nonpositive(signed_as(u, sign_of(-one)) * T(2));
    const Vec<T> w = (e + e) / (e + T(1)), far = signed_as(c - c * w, sign_of(x));
    return {x == splat(infinity<T>()) ? splat(nan<T>()) : z < one ? near : far, z < one ? slope : w * (T(2) - w)};
  }
};

// Logits as the loss sees them, in place. slope: where what softcap makes of a gradient goes, or null.
template <class T>
void prepare_row(const Preparation<T>& p, T* u, T* slope, int64_t n) {
  constexpr int W = WIDTH<T>;
  if (p.softcap > 0) {
    const Cap<T> capped(p.softcap);
    int64_t j = 0;
    for (; j + W <= n; j += W) {
      const Capped<T> x = capped(load(u + j));
      store(u + j, x.value);
      if (slope) store(slope + j, x.slope);
    }
    if (j < n) {
      const Capped<T> x = capped(load_first(u + j, int(n - j), T(0)));
      store_first(u + j, int(n - j), x.value);
      if (slope) store_first(slope + j, int(n - j), x.slope);
    }
  }
  if (!p.adds()) return;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) u[j] += added(p, j);
}

// ---- between storage and scratch -------------------------------------------------------------------------------------

// Classes that lie apart are on pages of their own, which the processor does not foresee. At most two lines hold rows that
// are neighbours.
constexpr int64_t CLASSES_AHEAD = 32;

template <int WRITTEN, class S>
inline void fetch_class(S* const* rows, int count, int64_t offset) {
  __builtin_prefetch(rows[0] + offset, WRITTEN);
  __builtin_prefetch(rows[count - 1] + offset, WRITTEN);
}

// Rows of class stride `stride` into scratch rows `pitch` apart.
template <class T, class S>
void gather_rows(const S* const* rows, int count, int64_t stride, int64_t classes, T* out, int64_t pitch) {
  if (stride == 1) {
    for (int b = 0; b < count; ++b) {
      const S* in = rows[b];
      T* to = out + b * pitch;
#pragma omp simd
      for (int64_t j = 0; j < classes; ++j) to[j] = widen(in[j]);
    }
    return;
  }
  for (int64_t j = 0; j < classes; ++j) {
    fetch_class<0>(rows, count, (j + CLASSES_AHEAD) * stride);
    for (int b = 0; b < count; ++b) out[b * pitch + j] = widen(rows[b][j * stride]);
  }
}

// n contiguous elements, and the largest of them and of `top`: a row is widened and searched in one sweep.
template <class T, class S>
Vec<T> sweep_widen(const S* in, T* out, int64_t n, Vec<T> top) {
  constexpr int W = WIDTH<T>;
  Vec<T> other = top;
  const auto one = [&](int64_t j, Vec<T>& largest) {
    const Vec<T> x = get(in + j);
    store(out + j, x);
    largest = larger(largest, x);
  };
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) {
    one(j, top);
    one(j + W, other);
  }
  if (n >= W) {  // the last vector may begin in the one before
    if (j + W < n) one(j, top);
    if (j < n) one(n - W, other);
  } else {
    for (; j < n; ++j) {
      out[j] = widen(in[j]);
      top[0] = out[j] > top[0] ? out[j] : top[0];
    }
  }
  return larger(top, other);
}

template <class T, class S>
void scatter_rows(S* const* rows, int count, int64_t stride, int64_t classes, const T* from, int64_t pitch) {
  if (stride == 1) {
    for (int b = 0; b < count; ++b) {
      S* to = rows[b];
      const T* in = from + b * pitch;
#pragma omp simd
      for (int64_t j = 0; j < classes; ++j) narrow(in[j], to[j]);
    }
    return;
  }
  for (int64_t j = 0; j < classes; ++j) {
    fetch_class<1>(rows, count, (j + CLASSES_AHEAD) * stride);
    for (int b = 0; b < count; ++b) narrow(from[b * pitch + j], rows[b][j * stride]);
  }
}
}  // namespace
}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
