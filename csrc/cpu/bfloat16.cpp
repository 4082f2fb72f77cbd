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

// A number between two of bfloat16 goes up as often as it is far from the lower one, by where it lies. Many that are nearly
// equal, as those of a fresh classifier, would all go the same way to the nearest, and their sum with them. What is added
// before the lower bits go are the fractions of whole multiples of two numbers, spread evenly along rows and classes
// (powers of the inverse of the plastic number, by 2^32).
constexpr uint32_t ALONG_ROWS = 3242174889u, ALONG_CLASSES = 2447445414u;

inline uint32_t fraction(int64_t row, int64_t column) {
  return uint32_t(row) * ALONG_ROWS + uint32_t(column) * ALONG_CLASSES;
}
inline bfloat16 rounded(float x, uint32_t fraction) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7f800000) != 0x7f800000) bits += fraction >> 16;  // finite
  return bfloat16{uint16_t(bits >> 16)};
}

// Along a row.
class Rounded {
  vuint fractions;

  __m512i one(const float* x) {
    const __m512 numbers = (__m512)load(x);
    const __mmask16 finite = __mmask16(~_mm512_fpclass_ps_mask(numbers, 0x01 | 0x08 | 0x10 | 0x80));
    const __m512i bits = _mm512_castps_si512(numbers);
    const __m512i sum = _mm512_mask_add_epi32(bits, finite, bits, (__m512i)(fractions >> 16));
    fractions += W * ALONG_CLASSES;
    return sum;
  }

 public:
  Rounded(int64_t row, int64_t column) {
    for (int i = 0; i < W; ++i) fractions[i] = fraction(row, column + i);
  }
  // The next numbers, as many as a register has halves.
  Halves next(const float* x) {
    const Halves low = (Halves)one(x), high = (Halves)one(x + W);
    return upper(low, high, std::make_integer_sequence<int, 2 * W>{});
  }
  template <int... I>
  static Halves upper(Halves low, Halves high, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(low, high, (2 * I + 1)...);
  }
};

void round(const Rounding& p, int64_t begin, int64_t end) {
  const int64_t half = (p.classes + 1) / 2;
  for (int64_t row = begin; row < end; row += 2) {
    const bool both = row + 1 < end;
    const float *const even = p.gradient + row * p.classes, *const odd = even + p.classes;
    Pair *const of_even = p.by_class + row * half, *const of_odd = of_even + half;
    Pair* const to = p.by_row + row / 2 * p.classes;
    const int64_t place = p.first_row + row;
    Rounded evens(place, p.start), odds(place + 1, p.start);
    int64_t j = 0;
    for (; j + 2 * W <= p.classes; j += 2 * W) {
      const Halves first = evens.next(even + j), second = both ? odds.next(odd + j) : Halves{};
      __builtin_memcpy(of_even + j / 2, &first, sizeof first);
      if (both) __builtin_memcpy(of_odd + j / 2, &second, sizeof second);
      interleave(first, second, to + j);
    }
    for (; j < p.classes; j += 2) {
      const bool last = j + 1 == p.classes;
      const auto one = [&](const float* x, int64_t row, int64_t column, bool there) {
        return there ? rounded(x[column], fraction(row, p.start + column)) : bfloat16{0};
      };
      const bfloat16 a = one(even, place, j, true), b = one(even, place, j + 1, !last);
      const bfloat16 c = one(odd, place + 1, j, both), d = one(odd, place + 1, j + 1, both && !last);
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
