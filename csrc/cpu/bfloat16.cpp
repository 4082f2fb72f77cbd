// Products of bfloat16 by vdpbf16ps, which adds the two products of a pair to a sum of float32, one after the other: twice
// the rate of float32's. It takes subnormal numbers for 0, in what it reads and in what it writes. Compiled for AVX-512 with
// BF16 alone; machines without it widen.
#include "pieces.h"
#include "products.h"

namespace mlkernels {
namespace MLKERNELS_ISA {
namespace {

constexpr int W = WIDTH<float>;
// As many elements of 16 bits as a register has.
typedef uint16_t Halves __attribute__((vector_size(BYTES)));

void panels(const Classes<float>& c, Pair* to) {
  const bfloat16* const from = static_cast<const bfloat16*>(c.data);
  // As bits: a pair is copied, and nothing is computed with it.
  const auto at = [&](int64_t j, int64_t k) { return reinterpret_cast<const char*>(from + j * c.stride + 2 * k); };
  const auto whole = [&](int64_t j, int64_t k) {
    vfloat v;
    __builtin_memcpy(&v, at(j, k), sizeof v);
    return v;
  };
  const auto one = [&](int64_t j, int64_t k) {
    float x;
    __builtin_memcpy(&x, at(j, k), sizeof x);
    return x;
  };
  transpose(c.classes, c.width / 2, whole, one, reinterpret_cast<float*>(to));
}

template <int... I>
inline void interleave(Halves even, Halves odd, Pair* to, std::integer_sequence<int, I...>) {
  const Halves low = __builtin_shufflevector(even, odd, (I / 2 + I % 2 * 2 * W)...);
  const Halves high = __builtin_shufflevector(even, odd, (W + I / 2 + I % 2 * 2 * W)...);
  __builtin_memcpy(to, &low, sizeof low);
  __builtin_memcpy(to + W, &high, sizeof high);
}
inline void interleave(Halves even, Halves odd, Pair* to) {
  interleave(even, odd, to, std::make_integer_sequence<int, 2 * W>{});
}

void interleave(const bfloat16* from, int64_t stride, int64_t rows, int64_t columns, Pair* to) {
  for (int64_t row = 0; row < rows; row += 2, from += 2 * stride, to += columns) {
    const bool both = row + 1 < rows;
    int64_t k = 0;
    for (; k + 2 * W <= columns; k += 2 * W) {
      Halves even, odd{};
      __builtin_memcpy(&even, from + k, sizeof even);
      if (both) __builtin_memcpy(&odd, from + stride + k, sizeof odd);
      interleave(even, odd, to + k);
    }
    for (; k < columns; ++k) to[k] = {from[k], both ? from[stride + k] : bfloat16{0}};
  }
}

inline Halves rounded(const float* x) { return (Halves)_mm512_cvtne2ps_pbh((__m512)load(x + W), (__m512)load(x)); }
inline bfloat16 rounded(float x) {
  bfloat16 to;
  narrow(x, to);
  return to;
}

void round(const Rounding& p, int64_t begin, int64_t end) {
  const int64_t half = (p.classes + 1) / 2;
  for (int64_t row = begin; row < end; row += 2) {
    const bool both = row + 1 < end;
    const float *const even = p.gradient + row * p.classes, *const odd = even + p.classes;
    Pair *const of_even = p.by_class + row * half, *const of_odd = of_even + half;
    Pair* const to = p.by_row + row / 2 * p.classes;
    int64_t j = 0;
    for (; j + 2 * W <= p.classes; j += 2 * W) {
      const Halves first = rounded(even + j), second = both ? rounded(odd + j) : Halves{};
      __builtin_memcpy(of_even + j / 2, &first, sizeof first);
      if (both) __builtin_memcpy(of_odd + j / 2, &second, sizeof second);
      interleave(first, second, to + j);
    }
    for (; j < p.classes; j += 2) {
      const bool last = j + 1 == p.classes;
      const bfloat16 nothing{0}, a = rounded(even[j]), b = last ? nothing : rounded(even[j + 1]);
      const bfloat16 c = both ? rounded(odd[j]) : nothing, d = both && !last ? rounded(odd[j + 1]) : nothing;
      of_even[j / 2] = {a, b};
      if (both) of_odd[j / 2] = {c, d};
      to[j] = {a, c};
      if (!last) to[j + 1] = {b, d};
    }
  }
}

int64_t next_large(const float* x, int64_t from, int64_t n, float limit) {
  const __m512 least = _mm512_set1_ps(limit);
  for (; from < n; from += W) {
    const int64_t left = std::min<int64_t>(n - from, W);
    const __mmask16 there = __mmask16((1u << left) - 1);
    const __m512 size = _mm512_abs_ps(_mm512_maskz_loadu_ps(there, x + from));
    const __mmask16 large = _mm512_mask_cmp_ps_mask(there, size, least, _CMP_GE_OQ);
    if (large) return from + __builtin_ctz(large);
  }
  return n;
}

void add(float* to, const bfloat16* from, float factor, int64_t n) {
  int64_t k = 0;
  for (; k + W <= n; k += W) store(to + k, load(to + k) + factor * get(from + k));
  for (; k < n; ++k) to[k] += factor * widen(from[k]);
}

}  // namespace

const PairKernels pair_kernels{multiply<float>, panels, interleave, round, next_large, add};

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
