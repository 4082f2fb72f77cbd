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

// The first n of as many pairs as a register has.
inline void put_first(Pair* to, int64_t n, Halves pairs) {
  const __mmask16 there = n < W ? __mmask16((1u << n) - 1) : __mmask16(0xffff);
  _mm512_mask_storeu_epi32(to, there, (__m512i)pairs);
}

// n columns of two rows as pairs, at most as many as a register has halves.
template <int... I>
inline void interleave(Halves even, Halves odd, int64_t n, Pair* to, std::integer_sequence<int, I...>) {
  put_first(to, n, __builtin_shufflevector(even, odd, (I / 2 + I % 2 * 2 * W)...));
  if (n > W) put_first(to + W, n - W, __builtin_shufflevector(even, odd, (W + I / 2 + I % 2 * 2 * W)...));
}
inline void interleave(Halves even, Halves odd, int64_t n, Pair* to) {
  interleave(even, odd, n, to, std::make_integer_sequence<int, 2 * W>{});
}

inline Halves get_first(const bfloat16* from, int64_t n) {
  return (Halves)_mm512_maskz_loadu_epi16(n < 2 * W ? __mmask32((1u << n) - 1) : __mmask32(-1), from);
}

// Calls body(column, how many) for as many columns as W, and for the rest.
template <class Body>
inline void each_vector(int64_t columns, int64_t width, Body body) {
  int64_t k = 0;
  for (; k + width <= columns; k += width) body(k, width);
  if (k < columns) body(k, columns - k);
}

// A number as the sum of two.
inline Pair two(float x) {
  Pair pair;
  narrow(x, pair.low);
  narrow(x - widen(pair.low), pair.high);
  return pair;
}

void interleave(const bfloat16* from, int64_t stride, int64_t rows, int64_t columns, int64_t group, Pair* to) {
  for (int64_t first = 0; first < rows; first += group) {
    const int64_t count = std::min(group, rows - first);
    // Summed up by a power of two, so that nothing overflows.
    int power = 0;
    while (int64_t(1) << power < count) ++power;
    const bfloat16 share{uint16_t((127 - power) << 7)};
    const vint shares = splat(Pair{share, share});
    Pair* const mean = to + (count + 1) / 2 * columns;
    float* const sums = reinterpret_cast<float*>(mean);
    each_vector(columns, W, [&](int64_t k, int64_t n) { store_first(sums + k, int(n), vfloat{}); });
    for (int64_t row = 0; row < count; row += 2, from += 2 * stride, to += columns) {
      const bool both = row + 1 < count;
      each_vector(columns, 2 * W, [&](int64_t k, int64_t n) {
        interleave(get_first(from + k, n), both ? get_first(from + stride + k, n) : Halves{}, n, to + k);
      });
      each_vector(columns, W, [&](int64_t k, int64_t n) {
        const vfloat sum = load_first(sums + k, int(n), 0);
        store_first(sums + k, int(n), multiply_add(load_first(to + k, int(n), Pair{}), shares, sum));
      });
    }
    const float rest = float(int64_t(1) << power) / float(count);
    for (int64_t k = 0; k < columns; ++k) {
      float sum;
      __builtin_memcpy(&sum, sums + k, sizeof sum);
      bfloat16 one;
      narrow(sum * rest, one);
      mean[k] = {one, one};
    }
    to += columns;
  }
}

// A number between two of bfloat16 goes up as often as it is far from the lower one, by where it lies. Many that are nearly
// equal, as those of a fresh classifier, would all go the same way to the nearest, and their sum with them. What is added
// before the lower bits go are the fractions of whole multiples of two numbers (by 2^32), spread evenly along rows and
// classes, and along every second, third, … up to the 48th of them: rows come in kinds, and classes. Found by trying
// thousands; of the inverse of the plastic number every fourth multiple is nearly a whole number.
constexpr uint32_t ALONG_ROWS = 3689978203u, ALONG_CLASSES = 1665798771u;

// Along a row.
class Rounded {
  vuint fractions;
  __m512 limit;
  vfloat lost{};

  __m512i one(const float* x, int64_t n, vfloat& rests) {
    const __m512 numbers = (__m512)load_first(x, int(n), 0);
    const __mmask16 finite = __mmask16(~_mm512_fpclass_ps_mask(numbers, 0x01 | 0x08 | 0x10 | 0x80));
    const __mmask16 small = _mm512_cmp_ps_mask(_mm512_abs_ps(numbers), limit, _CMP_LT_OQ);
    const __m512i bits = _mm512_castps_si512(numbers);
    const __m512i sum = _mm512_mask_add_epi32(bits, finite, bits, (__m512i)(fractions >> 16));
    const __m512 upper = _mm512_castsi512_ps(_mm512_and_epi32(sum, _mm512_set1_epi32(int(0xffff0000))));
    const vfloat rest = (vfloat)_mm512_maskz_sub_ps(small, numbers, upper);
    lost += rest;
    rests += rest;
    fractions += W * ALONG_CLASSES;
    return sum;
  }

 public:
  Rounded(int64_t row, int64_t column, float limit_) : limit(_mm512_set1_ps(limit_)) {
    for (int i = 0; i < W; ++i) fractions[i] = uint32_t(row) * ALONG_ROWS + uint32_t(column + i) * ALONG_CLASSES;
  }
  // The next n numbers, as many as a register has halves at most; what they lose is added to rests.
  Halves next(const float* x, int64_t n, vfloat (&rests)[2]) {
    const Halves low = (Halves)one(x, std::min<int64_t>(n, W), rests[0]);
    const Halves high = n > W ? (Halves)one(x + W, n - W, rests[1]) : Halves{};
    return upper(low, high, std::make_integer_sequence<int, 2 * W>{});
  }
  template <int... I>
  static Halves upper(Halves low, Halves high, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(low, high, (2 * I + 1)...);
  }
  float all_lost() const { return sum_of<float>(lost); }
};

void round(const Rounding& p, int64_t begin, int64_t end) {
  const int64_t half = (p.classes + 1) / 2, group = begin / TOGETHER, last = std::min((group + 1) * TOGETHER, p.rows);
  Pair* const rest = p.by_row + (pair_rows(last) - 1) * p.classes;
  float* const sums = reinterpret_cast<float*>(rest);
  if (begin == group * TOGETHER)
    each_vector(p.classes, W, [&](int64_t j, int64_t n) { store_first(sums + j, int(n), vfloat{}); });
  for (int64_t row = begin; row < end; row += 2) {
    const bool both = row + 1 < end;
    const float *const even = p.gradient + row * p.classes, *const odd = even + p.classes;
    Pair *const of_even = p.by_class + row * (half + 1), *const of_odd = of_even + half + 1;
    Pair* const to = p.by_row + (row / 2 + group) * p.classes;
    const int64_t place = p.first_row + row;
    const auto large = [&](int64_t at) { return large_from(p.target[at], p.factor[at]); };
    Rounded evens(place, p.start, large(place)), odds(place + 1, p.start, both ? large(place + 1) : 0);
    each_vector(p.classes, 2 * W, [&](int64_t j, int64_t n) {
      vfloat rests[2] = {};
      const Halves first = evens.next(even + j, n, rests), second = both ? odds.next(odd + j, n, rests) : Halves{};
      put_first(of_even + j / 2, (n + 1) / 2, first);
      if (both) put_first(of_odd + j / 2, (n + 1) / 2, second);
      interleave(first, second, n, to + j);
      each_vector(n, W, [&](int64_t k, int64_t m) {
        float* const at = sums + j + k;
        store_first(at, int(m), load_first(at, int(m), 0) + rests[k / W]);
      });
    });
    of_even[half] = two(evens.all_lost());
    if (both) of_odd[half] = two(odds.all_lost());
  }
  if (end < last) return;
  for (int64_t j = 0; j < p.classes; ++j) {
    float sum;
    __builtin_memcpy(&sum, sums + j, sizeof sum);
    rest[j] = two(sum);
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
