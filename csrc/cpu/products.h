// Products of matrices that the caches hold, on this thread: a block of the result stays in registers for all of the sum.
#pragma once

#include <algorithm>
#include <utility>

#include "pieces.h"
#include "vec.h"

namespace mlkernels {
namespace MLKERNELS_ISA {

template <class V>
static inline V multiply_add(V a, V b, V sum) {
  return sum + a * b;
}

#if defined(__AVX512BF16__)
static inline vint splat(Pair x) {
  int bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return (vint)_mm512_set1_epi32(bits);
}
static inline vint load(const Pair* p) { return (vint)_mm512_loadu_si512(p); }
static inline vint load_first(const Pair* p, int n, Pair) {
  return (vint)_mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), p);
}
static inline vfloat multiply_add(vint a, vint b, vfloat sum) {
  return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

namespace {

// Rows and vectors of a block: with 32 registers 24 sums, 4 vectors of b and one of a; with 16 12, 3 and 1.
constexpr int ROWS = BYTES == 64 ? 6 : 4, VECTORS = BYTES == 64 ? 4 : 3;
template <class T>
constexpr int PANEL = VECTORS * WIDTH<T>;

#pragma GCC diagnostic push
#if !defined(__clang__)  // gcc does not see that what is read of `earlier` was written
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// n: columns of the last of N vectors.
template <int M, int N, bool PART, class T, class E>
void block(const Product<T, E>& p, const E* a, const E* b, int64_t stride, T* out, int n) {
  Vec<T> sums[M][N], earlier[M][N];
  // Else the sums of a part would live in memory, where an index can find them.
  const auto each = [](auto body) {
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) body(i, j);
    }
  };
  int64_t k = 0;
  do {
    if (k > 0) each([&](int i, int j) { earlier[i][j] = k > p.DEPTH ? earlier[i][j] + sums[i][j] : sums[i][j]; });
    each([&](int i, int j) { sums[i][j] = Vec<T>{}; });
    const int64_t end = p.inner - k > p.DEPTH ? k + p.DEPTH : p.inner;
    for (; k < end; ++k, a += p.a_inner, b += stride) {
      decltype(load(b)) columns[N];
      for (int j = 0; j < N; ++j)
        columns[j] = PART && j == N - 1 ? load_first(b + j * WIDTH<T>, n, E{}) : load(b + j * WIDTH<T>);
      for (int i = 0; i < M; ++i) {
        const auto row = splat(a[i * p.a_row]);
        for (int j = 0; j < N; ++j) sums[i][j] = multiply_add(row, columns[j], sums[i][j]);
      }
    }
  } while (k < p.inner);
  if (p.inner > p.DEPTH) each([&](int i, int j) { sums[i][j] += earlier[i][j]; });
  each([&](int i, int j) {
    T* const to = out + i * p.out_stride + j * WIDTH<T>;
    if (PART && j == N - 1)
      store_first(to, n, p.add ? load_first(to, n, T(0)) + sums[i][j] : sums[i][j]);
    else
      store(to, p.add ? load(to) + sums[i][j] : sums[i][j]);
  });
}
#pragma GCC diagnostic pop

template <int N, bool PART, class T, class E>
void strip(const Product<T, E>& p, int64_t begin, int64_t end, const E* b, int64_t stride, int64_t column, int n) {
  const auto at = [&](int64_t i) { return p.out + i * p.out_stride + column; };
  int64_t i = begin;
  for (; i + ROWS <= end; i += ROWS) block<ROWS, N, PART>(p, p.a + i * p.a_row, b, stride, at(i), n);
  for (; i + ROWS / 2 <= end; i += ROWS / 2) block<ROWS / 2, N, PART>(p, p.a + i * p.a_row, b, stride, at(i), n);
  for (; i < end; ++i) block<1, N, PART>(p, p.a + i * p.a_row, b, stride, at(i), n);
}

template <class T, class E, int... N>
void strip_of(const Product<T, E>& p, int64_t begin, int64_t end, const E* b, int64_t stride, int64_t column,
              int64_t columns, std::integer_sequence<int, N...>) {
  const int vectors = int((columns + WIDTH<T> - 1) / WIDTH<T>), n = int(columns - (vectors - 1) * WIDTH<T>);
  const auto one = [&](auto count) {
    constexpr int COUNT = decltype(count)::value;
    n == WIDTH<T> ? strip<COUNT, false>(p, begin, end, b, stride, column, n)
                  : strip<COUNT, true>(p, begin, end, b, stride, column, n);
  };
  ((vectors == N + 1 ? one(std::integral_constant<int, N + 1>{}) : void()), ...);
}

// Rows [begin, end) of a product.
template <class T, class E>
void multiply(const Product<T, E>& p, int64_t begin, int64_t end) {
  for (int64_t column = 0; column < p.columns; column += PANEL<T>) {
    const int64_t columns = std::min<int64_t>(PANEL<T>, p.columns - column);
    const E* const b = p.b + (p.b_stride ? column : column * p.inner);
    strip_of(p, begin, end, b, p.b_stride ? p.b_stride : columns, column, columns,
             std::make_integer_sequence<int, VECTORS>{});
  }
}

// Swaps the halves of blocks of STEP lanes between rows i and i + STEP; by steps of 1, 2, 4, … that transposes.
template <int STEP, class V, int... I>
inline void swap_blocks(V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int W = sizeof...(I);
  const V low = __builtin_shufflevector(a, b, (I & STEP ? W + I - STEP : I)...);
  b = __builtin_shufflevector(a, b, (I & STEP ? W + I : I + STEP)...);
  a = low;
}
template <int STEP, int W, class V>
inline void transpose_square(V* rows) {
  if constexpr (STEP < W) {
    for (int i = 0; i < W; ++i)
      if (!(i & STEP)) swap_blocks<STEP>(rows[i], rows[i + STEP], std::make_integer_sequence<int, W>{});
    transpose_square<2 * STEP, W>(rows);
  }
}

// (width, classes) by panels of columns, as `multiply` takes them where b_stride is 0. Of class j from k on there are
// a vector, whole(j, k), and a number, one(j, k).
template <class T, class Whole, class One>
void transpose(int64_t classes, int64_t width, Whole whole, One one, T* to) {
  constexpr int W = WIDTH<T>;
  for (int64_t first = 0; first < classes; first += PANEL<T>) {
    const int64_t columns = std::min<int64_t>(PANEL<T>, classes - first);
    T* const panel = to + first * width;
    for (int64_t column = 0; column < columns; column += W) {
      const int64_t count = std::min<int64_t>(W, columns - column), j = first + column;
      int64_t k = 0;
      for (; count == W && k + W <= width; k += W) {
        Vec<T> square[W];
        for (int i = 0; i < W; ++i) square[i] = whole(j + i, k);
        transpose_square<1, W>(square);
        for (int i = 0; i < W; ++i) store(panel + (k + i) * columns + column, square[i]);
      }
      for (; k < width; ++k)
        for (int64_t i = 0; i < count; ++i) panel[k * columns + column + i] = one(j + i, k);
    }
  }
}

template <class T, class S>
void panels_of(const Classes<T>& c, T* to) {
  const S* const from = static_cast<const S*>(c.data);
  const auto factor = [&](int64_t j) { return c.inverse ? c.inverse[j] : T(1); };
  transpose(
      c.classes, c.width, [&](int64_t j, int64_t k) -> Vec<T> { return get(from + j * c.stride + k) * factor(j); },
      [&](int64_t j, int64_t k) { return T(widen(from[j * c.stride + k])) * factor(j); }, to);
}

}  // namespace
}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
