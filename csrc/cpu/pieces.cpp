// The loops over a tile of classes, compiled once per instruction set: backends/reference.py's statistics and combine in
// one, and its gradient. A tile is read where its product has just left it, in the cache, and written in place.
#include "pieces.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "products.h"
#include "sweeps.h"

namespace mlkernels {
namespace MLKERNELS_ISA {
namespace {

// Calls body(begin, length) for the columns other than y, which may lie outside.
template <class Body>
inline void each_part(int64_t y, int64_t classes, Body body) {
  if (y < 0 || y >= classes) return body(0, classes);
  if (y > 0) body(0, y);
  if (y + 1 < classes) body(y + 1, classes - y - 1);
}

template <class T>
int64_t count_above(const T* u, int64_t n, T limit) {
  int64_t above = 0;
  for (int64_t j = 0; j < n; ++j) above += u[j] > limit;
  return above;
}

// x_j *= factor factors_j
template <class T>
void multiply_by(T* x, const T* factors, int64_t n, T factor) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) x[j] *= factor * factors[j];
}

// From products to u, in place. slope: see prepare_row.
template <class T>
void logits_of(const Piece<T>& p, int64_t row, T* u, T* slope) {
  if (p.class_factor) multiply_by(u, p.class_factor, p.classes, p.row_factor[row]);
  if (p.bias) sweep_add(u, p.bias, p.classes, T(1));
  prepare_row(p.preparation, u, slope, p.classes);
}

template <class T>
void statistics(const PieceStatistics<T>& p, int64_t begin, int64_t end) {
  // The way back through softcap begins at the products.
  std::vector<T> scratch(p.preparation.softcap > 0 ? size_t(p.classes) : 0);
  for (int64_t row = begin; row < end; ++row) {
    T* u = p.tile + (row - p.first_row) * p.classes;
    if (p.preparation.softcap > 0) {
      std::copy(u, u + p.classes, scratch.begin());
      u = scratch.data();
    }
    logits_of(p, row, u, static_cast<T*>(nullptr));
    const int64_t y = p.label[row] - p.start;
    const T before = p.top[row];
    T top = -infinity<T>();
    each_part(y, p.classes, [&](int64_t from, int64_t n) { top = sweep_max(u + from, n, top); });
    if (top > before) {
      int64_t j = 0;
      while (j == y || u[j] != top) ++j;
      p.first[row] = p.start + j;
      for (int64_t k = 0; k < p.count; ++k) {
        const int64_t at = k * p.rows + row;
        const T move = before - top, share = m_exp(p.scales[at] * move);
        // What nothing is left of, or nothing was there of, is 0 and not 0 times infinity.
        const T total = p.total[at], shift = p.shift ? p.shift[at] : T(0);
        p.total[at] = share == 0 ? T(0) : share * total;
        if (p.shift) p.shift[at] = share == 0 ? T(0) : share * (shift + move * total);
        if (p.square) p.square[at] = share == 0 ? T(0) : share * (p.square[at] + move * (2 * shift + move * total));
      }
      if (p.weighted && p.weights[row] != 0) p.weighted[row] += (before - top) * p.weights[row];
      p.top[row] = top;
    } else if (before == -infinity<T>() && p.first[row] > p.start) {
      // Only classes of probability 0 so far: the lowest of them.
      const int64_t lowest = p.start + (y == 0 ? 1 : 0);
      if (lowest < p.start + p.classes && lowest < p.first[row]) p.first[row] = lowest;
    }
    if (p.above[row] >= 0) {
      each_part(y, p.classes,
                [&](int64_t from, int64_t n) { p.above[row] += count_above(u + from, n, p.target_logit[row]); });
    }
    const T m = p.top[row] == -infinity<T>() ? T(0) : p.top[row];
    each_part(y, p.classes, [&](int64_t from, int64_t n) {
      for (int64_t k = 0; k < p.count; ++k) {
        const int64_t at = k * p.rows + row;
        const T s = p.scales[at];
        const Ahead nothing{nullptr, 0};
        const Sums<T> sums = p.shift ? sweep_exp<T, false, true>(u + from, nullptr, n, m, s, T(1), nothing)
                                     : sweep_exp<T, false, false>(u + from, nullptr, n, m, s, T(1), nothing);
        p.total[at] += sums.e;
        if (p.shift) p.shift[at] += sums.shift;
        if (p.square) p.square[at] += sweep_square(u + from, n, m, p.scales[at]);
      }
      if (p.weighted) {
        const T* const w = p.weight ? p.weight + from : nullptr;
        p.weighted[row] += sweep_weighted(u + from, w, n, m);
        p.weights[row] += w ? std::accumulate(w, w + n, T(0)) : T(n);
      }
    });
    // A NaN, which maxima pass over and sums carry.
    const bool bad = p.total[row] != p.total[row] && p.scales[row] == p.scales[row] && p.top[row] < infinity<T>();
    if (bad) {
      p.top[row] = nan<T>();
      p.first[row] = INT64_MAX;
    }
  }
}

template <class T>
void gradient(const PieceGradient<T>& p, int64_t begin, int64_t end) {
  const bool capped = p.preparation.softcap > 0;
  std::vector<T> slopes(capped ? size_t(p.classes) : 0), scratch(p.slope ? size_t(p.classes) : 0);
  for (int64_t row = begin; row < end; ++row) {
    T* g = p.tile + (row - p.first_row) * p.classes;
    if (!p.seen || capped) logits_of(p, row, g, capped ? slopes.data() : nullptr);
    if (p.slope) std::copy(g, g + p.classes, scratch.begin());
    const T* const u = scratch.data();
    const int64_t y = p.label[row] - p.start;
    if (y >= 0 && y < p.classes) g[y] = -infinity<T>();
    const T m = p.top[row] == -infinity<T>() ? T(0) : p.top[row], s = p.scale[row], factor = p.factor[row];
    if (p.slope) {
      sweep_exp<T, true, false>(g, g, p.classes, m, s, T(1), Ahead{nullptr, 0});
      sweep_slope(g, u, p.classes, m, factor, p.slope[row]);
    } else {
      sweep_exp<T, true, false>(g, g, p.classes, m, s, factor, Ahead{nullptr, 0});
    }
    if (p.spread) sweep_spread(g, p.weight, p.classes, p.spread[row]);
    if (capped) sweep_product(g, slopes.data(), p.classes);
    if (y >= 0 && y < p.classes) g[y] = 0;
  }
}

template <class T, class S>
void directions_of(const Classes<T>& c, T* to) {
  constexpr int W = WIDTH<T>;
  for (int64_t k = 0; k < c.classes; ++k, to += c.width) {
    const S* from = static_cast<const S*>(c.data) + k * c.stride;
    const T factor = c.inverse ? c.inverse[k] : T(1);
    int64_t j = 0;
    for (; j + W <= c.width; j += W) store(to + j, get(from + j) * factor);
    for (; j < c.width; ++j) to[j] = T(widen(from[j])) * factor;
  }
}

// Calls body with an element of the storage that a weight has.
template <class T, class Body>
void by_storage(const Classes<T>& c, Body body) {
  if constexpr (sizeof(T) == 8)
    return body(double());
  else
    switch (c.storage) {
      case Storage::BFLOAT16: return body(bfloat16());
      case Storage::FLOAT16: return body(float16());
      default: return body(float());
    }
}

template <class T>
void directions(const Classes<T>& c, T* to) {
  by_storage(c, [&](auto element) { directions_of<T, decltype(element)>(c, to); });
}

template <class T>
void panels(const Classes<T>& c, T* to) {
  by_storage(c, [&](auto element) { panels_of<T, decltype(element)>(c, to); });
}

template <class T>
void along_length(T* gradient, const T* direction, const T* inverse, int64_t classes, int64_t n) {
  constexpr int W = WIDTH<T>;
  for (int64_t k = 0; k < classes; ++k, gradient += n, direction += n) {
    Vec<T> sum{};
    int64_t j = 0;
    for (; j + W <= n; j += W) sum += load(gradient + j) * load(direction + j);
    T along = sum_of<T>(sum);
    for (; j < n; ++j) along += gradient[j] * direction[j];
#pragma omp simd
    for (j = 0; j < n; ++j) gradient[j] = inverse[k] * (gradient[j] - along * direction[j]);
  }
}

template <class T>
void add(T* to, const T* from, T factor, int64_t n) {
  sweep_add(to, from, n, factor);
}

template <class T>
void cap(T* u, T* slope, int64_t n, T c) {
  prepare_row(Preparation<T>{c, nullptr}, u, slope, n);
}

template <class T>
constexpr PieceKernels<T> kernels_of() {
  return {multiply<T>, panels<T>, statistics<T>, gradient<T>, directions<T>, along_length<T>, add<T>, cap<T>};
}

}  // namespace

const AllPieceKernels piece_kernels{kernels_of<float>(), kernels_of<double>()};

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
