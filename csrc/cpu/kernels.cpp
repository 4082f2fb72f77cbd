// The row loops of the CPU, compiled once per instruction set (MLKERNELS_ISA).
//
// A row is read from memory once while it fits in the cache: maximum, exponentials and gradient are three sweeps over the
// same lines. Long float and double rows of class stride 1 are swept where they lie. Short rows, and rows whose classes
// lie apart, go a vector of rows at a time. All others (half types, softcap, adjustment, medium length, RowStats) are
// widened into a scratch row first and narrowed from one at the end.
#include <cstdlib>
#include <type_traits>
#include <utility>

#include "problem.h"
#include "sweeps.h"

namespace mlkernels {
namespace MLKERNELS_ISA {
namespace {

// ---- a row -----------------------------------------------------------------------------------------------------------

// A row on its way: what each stage leaves for the next. The stages are apart so that the transcendental functions of
// a tile of rows are evaluated together, a vector at a time.
template <class T>
struct Work {
  int64_t row, y;
  const T* u;  // the logits; PADDED: to whole vectors with -inf, and -inf at the label
  T* g;        // the exponentials, which become the gradient; or null
  Ahead ahead;
  T m;  // other_max, or 0 where there is no other class
  T sum;
  const Values<T>* values;
  Values<T> own;
  Statistics<T> r;
  RowScale<T> scale;
  Position<T> at;
  // What is left to do: the gradient is factor g_j - spread w_j, and target at the label. Nothing is where none is wanted.
  Coefficients<T> gradient{};
};

// Calls body(begin, length) for the columns other than y: all of a padded row, else the two pieces.
template <bool PADDED, class T, class Body>
inline void each_piece(const CpuProblem<T>& p, int64_t y, Body body) {
  constexpr int W = WIDTH<T>;
  if (PADDED) {
    body(0, (p.classes + W - 1) / W * W);
  } else {
    body(0, y);
    body(y + 1, p.classes - y - 1);
  }
}

// Exponentials into the gradient where there is one, and the sums.
template <bool PADDED, class T, class Factor, class Beside>
inline void exponentials(const CpuProblem<T>& p, Work<T>& w, Factor factor, Beside* with) {
  each_piece<PADDED>(p, w.y, [&](int64_t begin, int64_t n) {
    const T* u = w.u + begin;
    T* out = w.g ? w.g + begin : nullptr;
    const T s = w.scale.value;
    const Ahead next{w.ahead.row + begin * w.ahead.bytes, w.ahead.bytes};
    const Sums<T> sums = out ? (p.want_shift ? sweep_exp<T, true, true>(u, out, n, w.m, s, factor, next, with)
                                             : sweep_exp<T, true, false>(u, out, n, w.m, s, factor, next, with))
                             : (p.want_shift ? sweep_exp<T, false, true>(u, nullptr, n, w.m, s, factor, next)
                                             : sweep_exp<T, false, false>(u, nullptr, n, w.m, s, factor, next));
    w.sum += sums.e;
    w.r.shift += sums.shift;
  });
}

// The statistics: maximum (unless it is known already), scale and, unless an earlier visit left log S, the sum of
// exponentials.
template <bool PADDED, class T, class Beside>
inline void measure(const CpuProblem<T>& p, const Values<T>* shared, T target, Work<T>& w, Beside* with,
                    const T* top = nullptr) {
  if (!shared) fetch(p, w.row, w.y, p.group ? p.group[w.row] : 0, w.own);
  w.values = shared ? shared : &w.own;
  w.sum = 0;
  w.r = {target, -infinity<T>(), 0, 0};
  if (p.saved)
    w.r.other_max = p.saved[2 * w.row];
  else if (top)
    w.r.other_max = *top;
  else
    each_piece<PADDED>(p, w.y,
                       [&](int64_t begin, int64_t n) { w.r.other_max = sweep_max(w.u + begin, n, w.r.other_max); });
  w.scale = row_scale(p.spec, *w.values, target - w.r.other_max);
  w.m = w.r.other_max == -infinity<T>() ? T(0) : w.r.other_max;
  if (!p.saved || p.want_shift) exponentials<PADDED>(p, w, One{}, with);
  if (p.smoothing > 0 && (p.want_shift || !p.saved)) {
    const T* weight = p.weight;
    w.r.weighted = sweep_weighted(w.u, weight, w.y, w.m);
    w.r.weighted += sweep_weighted(w.u + w.y + 1, weight ? weight + w.y + 1 : nullptr, p.classes - w.y - 1, w.m);
  }
  if (p.want_square)
    each_piece<PADDED>(
        p, w.y, [&](int64_t begin, int64_t n) { w.r.square += sweep_square(w.u + begin, n, w.m, w.scale.value); });
}

constexpr int MAX_TILE = 16;

// log S and where the row stands, for a tile.
template <class T>
inline void stand(const CpuProblem<T>& p, Work<T>* tile, int count) {
  constexpr int W = WIDTH<T>;
  T a[MAX_TILE + W], delta[MAX_TILE + W], e[MAX_TILE + W];
  for (int b = 0; b < count; ++b) a[b] = p.saved ? p.saved[2 * tile[b].row + 1] : tile[b].sum;
  for (int b = count; b < (count + W - 1) / W * W; ++b) a[b] = 1;
  for (int b = 0; b < count; b += W) store(e + b, p.saved ? exp_nonpositive(-load(a + b)) : log_of_sum<T>(load(a + b)));
  for (int b = 0; b < count; ++b) {
    Statistics<T>& r = tile[b].r;
    const bool alone = p.saved ? a[b] == -infinity<T>() : a[b] == 0;
    r.log_sum = alone ? -infinity<T>() : p.saved ? a[b] : e[b];
    r.share = alone ? T(0) : p.saved ? e[b] : 1 / a[b];
    delta[b] = approach(p.spec, *tile[b].values, r, tile[b].scale, p.want_parameters, tile[b].at);
  }
  for (int b = count; b < (count + W - 1) / W * W; ++b) delta[b] = 0;
  for (int b = 0; b < count; b += W) {
    const Vec<T> d = load(delta + b);
    const Vec<T> x = exp_nonpositive(d < Vec<T>{} ? d : -d);
    store(e + b, x);
    store(a + b, log1p_of_fraction<T>(x));
  }
  for (int b = 0; b < count; ++b) locate(tile[b].r, delta[b], e[b], a[b], tile[b].at);
}

// RowStats.
template <class T>
void describe(const CpuProblem<T>& p, const Work<T>& w) {
  const T target = w.r.target, highest = target > w.r.other_max ? target : w.r.other_max;
  Counts<T> counts;
  counts.add(w.u, w.y, target);
  counts.add(w.u + w.y + 1, p.classes - w.y - 1, target);
  const bool has_nan = target != target || counts.undefined > 0;
  // What lies at the label of a padded row is not its logit.
  int64_t first = std::find(w.u, w.u + w.y, highest) - w.u;
  if (first == w.y && target != highest) first = std::find(w.u + w.y + 1, w.u + p.classes, highest) - w.u;
  p.logsumexp[w.row] = w.at.lse;
  p.log_prob[w.row] = -w.at.nll;
  p.entropy[w.row] = entropy(w.r, w.at);
  p.confidence[w.row] = has_nan ? nan<T>() : target - w.r.other_max;
  p.rank[w.row] = counts.above;
  p.prediction[w.row] = has_nan ? -1 : first;
}

// Exponentials to a gradient that has a slope.
template <bool PADDED, class T>
__attribute__((noinline)) void slope_out(const CpuProblem<T>& p, Work<T>& w) {
  each_piece<PADDED>(p, w.y, [&](int64_t begin, int64_t n) {
    sweep_slope(w.g + begin, w.u + begin, n, w.m, w.gradient.factor, w.gradient.slope);
  });
  w.gradient.factor = 1;
}

// The loss and, where wanted, what the gradient is made of.
template <bool PADDED, class T, class Beside>
inline void finish(const CpuProblem<T>& p, const Batch<T>& batch, Work<T>& w, Beside* with) {
  const T weight = p.weight ? p.weight[w.y] : T(1);
  const Factors<T> factors{p.by_class_factor, p.by_row_factor};
  const T loss = finish_row<true>(static_cast<const Problem<T>&>(p), p.spec, batch, factors, w.row, *w.values, w.r,
                                  w.at, weight, true, w.gradient);
  if (p.losses) p.losses[w.row] = loss;
  if (p.logsumexp) describe(p, w);
  if (p.saved && w.g && !p.want_shift) {
    exponentials<PADDED>(p, w, w.gradient.factor, with);
    w.gradient.factor = 1;
  }
  if (p.up_entropy && w.g) slope_out<PADDED>(p, w);
}

// Leaves nothing of a row's gradient to do but the target and, unless there was smoothing, the factor.
template <class T>
void spread_out(const CpuProblem<T>& p, Work<T>& w) {
  if (w.gradient.spread == 0) return;
  sweep_multiply(w.g, p.classes, w.gradient.factor);  // what lies at the label is overwritten later
  sweep_spread(w.g, p.weight, p.classes, w.gradient.spread);
  w.gradient.factor = 1;
}

template <class T>
void ignore_row(const CpuProblem<T>& p, int64_t row) {
  if (p.losses) p.losses[row] = 0;
  store_unread(p, row, T(0));
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

// Rows in place pay two pieces and two tails; below this many columns a padded copy is cheaper.
constexpr int64_t SHORT_ROW = 256;
constexpr int64_t ROW_IN_CACHE = 1 << 19;  // bytes: a row and its neighbour have to stay in the second cache

template <class T>
bool stays_in_cache(const CpuProblem<T>& p) {
  return p.classes * int64_t(sizeof(T)) <= ROW_IN_CACHE;
}

constexpr int64_t FIRST_CACHE = 1 << 15, SECOND_CACHE = 1 << 20;  // bytes
constexpr int64_t SHARED_LINES = 1 << 22;  // bytes of scratch, which every thread keeps, where rows share cache lines

// As many rows as stay in a cache with what is made of them.
int64_t tile_of(int64_t row_bytes, int64_t cache = FIRST_CACHE) {
  const int64_t size = cache / (2 * row_bytes);
  return size < 1 ? 1 : size > MAX_TILE ? MAX_TILE : size;
}

// The next rows that are kept, at most `size` of them, where they lie and where their gradients do: how many these are.
// Ignored ones are left as such.
template <class T, class S>
inline int next_tile(const CpuProblem<T>& p, int64_t& next, int64_t end, int64_t size, Work<T>* tile, const S** from,
                     S** to) {
  int count = 0;
  for (; next < end && count < size; ++next) {
    S* const g = p.grad ? static_cast<S*>(p.grad) + p.out.offset(next) : nullptr;
    if (p.label[next] == p.spec.ignore_index) {
      ignore_row(p, next);
      if (g) clear_row(g, p.out.class_stride, p.classes);
      continue;
    }
    tile[count].row = next;
    tile[count].y = p.label[next];
    from[count] = static_cast<const S*>(p.input) + p.in.offset(next);
    to[count++] = g;
  }
  return count;
}

// Later: how a gradient is multiplied while the next rows' exponentials are made.
template <class T, class Later>
void run_in_place(const CpuProblem<T>& p, int64_t begin, int64_t end) {
  constexpr bool STREAMED = std::is_same<Later, Leaving<T, T>>::value;
  const Batch<T> batch = batch_of(p);
  Values<T> values;
  if (p.uniform) fetch(p, 0, 0, 0, values);
  const int64_t row_bytes = p.classes * int64_t(sizeof(T));
  // All maxima of a tile before any exponential, which waits for its row's: worth it where rows are short or come from
  // beyond the second cache, of 1000 floats -4 % then and else +4 %. What more rows share, too.
  const bool maxima_first = row_bytes <= FIRST_CACHE / 16 || 2 * (end - begin) * row_bytes > SECOND_CACHE;
  const int64_t size = tile_of(row_bytes, maxima_first && 2 * row_bytes < FIRST_CACHE ? 2 * FIRST_CACHE : FIRST_CACHE);
  // One half is being written while the other leaves.
  T* half = STREAMED ? static_cast<T*>(scratch.get(size_t(2 * size * p.classes) * sizeof(T))) : nullptr;
  T* other = half + size * p.classes;
  Work<T> tile[MAX_TILE];
  Later later[MAX_TILE];
  for (int64_t next = begin; next < end;) {
    const T* from[MAX_TILE];
    T *to[MAX_TILE], top[MAX_TILE];
    const int count = next_tile(p, next, end, size, tile, from, to);
    for (int b = 0; b < count; ++b) {
      Work<T>& w = tile[b];
      w.u = from[b];
      w.g = STREAMED ? half + b * p.classes : to[b];
      if (maxima_first) top[b] = p.saved ? T(0) : max_but_one(w.u, p.classes, w.y);
    }
    for (int b = 0; b < count; ++b) {
      Work<T>& w = tile[b];
      const int64_t follows = w.row + (maxima_first ? size : 1), after = follows < end ? follows : w.row;
      w.ahead = {static_cast<const char*>(p.input) + p.in.offset(after) * int64_t(sizeof(T)),
                 stays_in_cache(p) ? int(sizeof(T)) : 0};
      measure<false>(p, p.uniform ? &values : nullptr, w.u[w.y], w, &later[b], maxima_first ? &top[b] : nullptr);
    }
    stand(p, tile, count);
    for (int b = 0; b < count; ++b) {
      Work<T>& w = tile[b];
      finish<false>(p, batch, w, &later[b]);
      if (!p.grad) continue;
      spread_out(p, w);
      later[b].rest();
      later[b] = {to[b], w.g, p.classes, w.gradient.factor, w.y, w.gradient.target};
    }
    for (int b = count; b < size; ++b) later[b].rest();
    std::swap(half, other);
  }
  for (Later& row : later) row.rest();
  if (STREAMED) fence();
}

template <class T, class S>
void run_through_scratch(const CpuProblem<T>& p, int64_t begin, int64_t end) {
  constexpr int W = WIDTH<T>;
  const int64_t padded = (p.classes + W - 1) / W * W;
  // Rows that are neighbours share the cache lines of each class: then as many as a line has go together, a vector of
  // padding keeping them out of each other's way in the first cache.
  const bool shared = p.rows > 1 && std::abs(p.in.offset(1) - p.in.offset(0)) < p.in.class_stride;
  const int64_t pitch = padded + (shared ? W : 0);
  const int64_t row_bytes = padded * int64_t(sizeof(T));
  const int64_t size = shared ? std::min(tile_of(row_bytes, SHARED_LINES), end - begin) : tile_of(row_bytes);
  const bool streamed = p.streamed && size == 1 && p.grad && p.preparation.softcap <= 0 && p.out.class_stride == 1;
  // Logits and gradients; one half is being written while the other leaves.
  const bool capped = p.preparation.softcap > 0;
  T* half = static_cast<T*>(scratch.get(size_t((streamed ? 4 : capped ? 3 : 2) * size * pitch) * sizeof(T)));
  T* other = streamed ? half + 2 * size * pitch : half;
  T* const slopes = capped && p.grad ? half + 2 * size * pitch : nullptr;  // of softcap
  Leaving<T, S> leaving;
  const S* input = static_cast<const S*>(p.input);
  const Batch<T> batch = batch_of(p);
  Values<T> values;
  if (p.uniform) fetch(p, 0, 0, 0, values);
  const bool searched = p.in.class_stride == 1 && p.preparation.none();  // the maximum is found while widening
  const bool direct = p.grad && p.out.class_stride == 1;
  const bool overwrite = p.smoothing <= 0 && !p.up_entropy;  // nothing reads the logits after their exponentials
  // Long rows come one at a time: the next one is then the row after this one.
  const bool fits = size == 1 && p.in.class_stride == 1 && stays_in_cache(p);
  const int lookahead = fits ? int(sizeof(S)) : 0;
  Work<T> tile[MAX_TILE];

  for (int64_t next = begin; next < end;) {
    T target[MAX_TILE], top[MAX_TILE];
    const S* from[MAX_TILE];
    S* to[MAX_TILE];
    const int count = next_tile(p, next, end, size, tile, from, to);
    if (count == 0) continue;
    T *const logits = half, *const grads = half + size * pitch;
    if (!searched) gather_rows(from, count, p.in.class_stride, p.classes, logits, pitch);
    for (int b = 0; b < count; ++b) {
      T* u = logits + b * pitch;
      top[b] = -infinity<T>();
      if (searched) {
        const int64_t y = tile[b].y;
        const Vec<T> before = sweep_widen(from[b], u, y, splat(top[b]));
        top[b] = max_of<T>(sweep_widen(from[b] + y + 1, u + y + 1, p.classes - y - 1, before));
        u[y] = widen(from[b][y]);
      }
      prepare_row(p.preparation, u, slopes ? slopes + b * pitch : nullptr, p.classes);
      for (int64_t j = p.classes; j < padded; ++j) u[j] = -infinity<T>();
      target[b] = u[tile[b].y];
      u[tile[b].y] = -infinity<T>();
      tile[b].u = u;
      tile[b].g = !p.grad ? nullptr : overwrite ? u : grads + b * pitch;
    }
    for (int b = 0; b < count; ++b) {
      tile[b].ahead = {reinterpret_cast<const char*>(input + p.in.offset(next < end ? next : next - 1)), lookahead};
      measure<true>(p, p.uniform ? &values : nullptr, target[b], tile[b], &leaving, searched ? &top[b] : nullptr);
    }
    stand(p, tile, count);
    for (int b = 0; b < count; ++b) {
      Work<T>& w = tile[b];
      finish<true>(p, batch, w, &leaving);
      if (p.grad) spread_out(p, w);
    }
    for (int b = 0; p.grad && b < count; ++b) {
      Work<T>& w = tile[b];
      if (streamed) {
        leaving.rest();
        leaving = {to[b], w.g, p.classes, w.gradient.factor, w.y, w.gradient.target};
        continue;
      }
      if (!p.grad) continue;
      if (slopes) {
        const T* const slope = slopes + b * pitch;
        sweep_product(w.g, slope, p.classes);
        w.gradient.target *= slope[w.y];
      }
      if (direct) {
        sweep_put(to[b], w.g, p.classes, w.gradient.factor);
        narrow(w.gradient.target, to[b][w.y]);
      } else {
        sweep_multiply(w.g, p.classes, w.gradient.factor);
        w.g[w.y] = w.gradient.target;
      }
    }
    if (p.grad && !direct) scatter_rows(to, count, p.out.class_stride, p.classes, tile[0].g, pitch);
    std::swap(half, other);
  }
  leaving.rest();
  if (streamed) fence();
}

// prepare_row of W rows, a class of which is a vector.
template <class T>
void prepare_lanes(const Preparation<T>& p, T* u, T* slope, int64_t classes) {
  constexpr int W = WIDTH<T>;
  prepare_row(Preparation<T>{p.softcap, nullptr}, u, slope, classes * W);
  if (!p.adds()) return;
  for (int64_t j = 0; j < classes; ++j) store(u + j * W, load(u + j * W) + added(p, j));
}

// Short rows, and rows whose classes lie apart: a vector holds one class of W rows. Every sweep is then C vectors long
// with no tail and no reduction, and where neighbouring rows are neighbours in memory (N, C, d...) nothing is transposed.
template <class T, class S>
void run_lanes(const CpuProblem<T>& given, int64_t begin, int64_t end) {
  constexpr int W = WIDTH<T>;
  static_assert(W <= MAX_TILE, "a tile is at least a vector");
  CpuProblem<T> p = given;
  p.saved = nullptr;  // the maximum and the sum cost less than another way through here
  const int64_t classes = p.classes;
  const bool capped = p.preparation.softcap > 0;
  T* e = static_cast<T*>(scratch.get(size_t(classes) * W * sizeof(T) * (capped ? 2 : 1)));
  T* const slopes = capped ? e + classes * W : nullptr;
  const Batch<T> batch = batch_of(p);
  Values<T> values;
  if (p.uniform) fetch(p, 0, 0, 0, values);
  const int64_t in_stride = p.in.class_stride, out_stride = p.out.class_stride;
  Work<T> tile[MAX_TILE];

  for (int64_t next = begin; next < end;) {
    const S* from[W];
    S* to[W];
    const int count = next_tile(p, next, end, W, tile, from, to);
    if (count == 0) continue;
    bool side_by_side = count == W;
    for (int b = 1; b < count; ++b) side_by_side &= from[b] == from[0] + b && (!p.grad || to[b] == to[0] + b);
    for (int b = count; b < W; ++b) from[b] = from[0];
    if (side_by_side) {
      for (int64_t j = 0; j < classes; ++j)
#pragma omp simd
        for (int b = 0; b < W; ++b) e[j * W + b] = widen(from[0][j * in_stride + b]);
    } else {
      for (int b = 0; b < W; ++b)
#pragma omp simd
        for (int64_t j = 0; j < classes; ++j) e[j * W + b] = widen(from[b][j * in_stride]);
    }
    if (!p.preparation.none()) prepare_lanes(p.preparation, e, slopes, classes);

    typename VecOf<T>::I label{};
    for (int b = 0; b < count; ++b) {
      T& at_label = e[tile[b].y * W + b];
      label[b] = tile[b].y;
      tile[b].r.target = at_label;
      at_label = -infinity<T>();
    }
    Vec<T> top = splat(-infinity<T>());
    for (int64_t j = 0; j < classes; ++j) top = larger(top, load(e + j * W));
    Vec<T> s{};
    for (int b = 0; b < count; ++b) {
      Work<T>& w = tile[b];
      if (!p.uniform) fetch(p, w.row, w.y, p.group ? p.group[w.row] : 0, w.own);
      w.values = p.uniform ? &values : &w.own;
      w.r.other_max = top[b];
      w.scale = row_scale(p.spec, *w.values, w.r.target - top[b]);
      s[b] = w.scale.value;
    }
    const Vec<T> m = top == splat(-infinity<T>()) ? Vec<T>{} : top;
    Vec<T> weighted{}, sum{}, shift{};
    if (p.smoothing > 0) {
      for (int64_t j = 0; j < classes; ++j) {
        const Vec<T> d = load(e + j * W) - m;
        weighted += label == typename VecOf<T>::I{} + decltype(label[0] + 0)(j) ? Vec<T>{}
                    : p.weight                                                  ? d * p.weight[j]
                                                                                : d;
      }
    }
    for (int64_t j = 0; j < classes; ++j) {
      const Vec<T> d = load(e + j * W) - m;
      const Vec<T> x = exp_nonpositive(d * s);
      sum += x;
      if (p.want_shift) shift += x == Vec<T>{} ? Vec<T>{} : x * d;
      store(e + j * W, x);
    }
    for (int b = 0; b < count; ++b) {
      Work<T>& w = tile[b];
      w.u = nullptr;
      w.g = p.grad ? e : nullptr;
      w.sum = sum[b];
      w.r.shift = shift[b];
      w.r.weighted = weighted[b];
    }
    stand(p, tile, count);
    Vec<T> factor{}, spread{};
    for (int b = 0; b < count; ++b) {
      finish<true>(p, batch, tile[b], static_cast<Alone*>(nullptr));
      factor[b] = tile[b].gradient.factor;
      spread[b] = tile[b].gradient.spread;
    }
    if (!p.grad) continue;
    for (int64_t j = 0; j < classes; ++j) {
      Vec<T> g = load(e + j * W) * factor;
      if (p.smoothing > 0) g -= p.weight ? spread * p.weight[j] : spread;
      store(e + j * W, g);
    }
    for (int b = 0; b < count; ++b) e[tile[b].y * W + b] = tile[b].gradient.target;
    if (capped) sweep_product(e, slopes, classes * W);
    if (side_by_side) {
      for (int64_t j = 0; j < classes; ++j) put(to[0] + j * out_stride, load(e + j * W), false);
    } else {
      for (int b = 0; b < count; ++b)
#pragma omp simd
        for (int64_t j = 0; j < classes; ++j) narrow(e[j * W + b], to[b][j * out_stride]);
    }
  }
}

// Columns from which a row is worth vectors of its own.
constexpr int64_t LONG_ROW = 48;
constexpr int64_t LANES_IN_CACHE = 1 << 18;  // bytes of a tile of rows whose classes lie apart

template <class T, class S>
void run_as(const CpuProblem<T>& p, int64_t begin, int64_t end) {
  const bool plain = !p.logsumexp && !p.up_entropy;
  const bool apart = p.in.class_stride != 1 || (p.grad && p.out.class_stride != 1);
  const bool fits = p.classes * BYTES <= LANES_IN_CACHE;
  if (plain && (p.classes < LONG_ROW || (apart && fits))) return run_lanes<T, S>(p, begin, end);
  if constexpr (std::is_same<T, S>::value) {
    if (p.preparation.none() && !apart && p.classes >= SHORT_ROW) {
      if (p.grad && p.streamed && stays_in_cache(p)) return run_in_place<T, Leaving<T, T>>(p, begin, end);
      return run_in_place<T, Waiting<T>>(p, begin, end);
    }
  }
  run_through_scratch<T, S>(p, begin, end);
}

void run_float(const CpuProblem<float>& p, int64_t begin, int64_t end) {
  if (p.storage == Storage::FLOAT) return run_as<float, float>(p, begin, end);
  if (p.storage == Storage::BFLOAT16) return run_as<float, bfloat16>(p, begin, end);
  run_as<float, float16>(p, begin, end);
}
void run_double(const CpuProblem<double>& p, int64_t begin, int64_t end) { run_as<double, double>(p, begin, end); }

}  // namespace

const Kernels kernels{run_float, run_double};

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
