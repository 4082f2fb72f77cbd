// The few vector operations that the row loops use, over the compiler's vector types: one width per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../half.h"

namespace mlkernels {
namespace MLKERNELS_ISA {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

typedef float vfloat __attribute__((vector_size(BYTES)));
typedef int32_t vint __attribute__((vector_size(BYTES)));
typedef uint32_t vuint __attribute__((vector_size(BYTES)));
typedef double vdouble __attribute__((vector_size(BYTES)));
typedef int64_t vlong __attribute__((vector_size(BYTES)));
typedef uint64_t vulong __attribute__((vector_size(BYTES)));

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef vfloat V;
  typedef vint I;
};
template <>
struct VecOf<double> {
  typedef vdouble V;
  typedef vlong I;
};
template <class T>
using Vec = typename VecOf<T>::V;
template <class T>
constexpr int WIDTH = BYTES / int(sizeof(T));

template <class T>
static inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}
template <class T>
static inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
static inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The first n < WIDTH elements; the others are `fill`. Nothing past p + n is touched.
static inline vfloat load_first(const float* p, int n, float fill) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), (__mmask16)((1u << n) - 1), p);
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return (vfloat)_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, lanes), _mm256_castsi256_ps(lanes));
#else
  vfloat v = splat(fill);
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
static inline vdouble load_first(const double* p, int n, double fill) {
#if defined(__AVX512F__)
  return (vdouble)_mm512_mask_loadu_pd(_mm512_set1_pd(fill), (__mmask8)((1u << n) - 1), p);
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  return (vdouble)_mm256_blendv_pd(_mm256_set1_pd(fill), _mm256_maskload_pd(p, lanes), _mm256_castsi256_pd(lanes));
#else
  vdouble v = splat(fill);
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
static inline void store_first(float* p, int n, vfloat v) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  _mm256_maskstore_ps(p, lanes, (__m256)v);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}
static inline void store_first(double* p, int n, vdouble v) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  _mm256_maskstore_pd(p, lanes, (__m256d)v);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// Past the caches, for an output that is too large to stay in them: the line is not read before it is overwritten.
// p is aligned to a whole vector. fence() before anyone else may look.
static inline void stream(float* p, vfloat v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
static inline void stream(double* p, vdouble v) {
#if defined(__AVX512F__)
  _mm512_stream_pd(p, (__m512d)v);
#elif defined(__AVX2__)
  _mm256_stream_pd(p, (__m256d)v);
#elif defined(__SSE2__)
  _mm_stream_pd(p, (__m128d)v);
#else
  store(p, v);
#endif
}
static inline void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The larger of each pair; a NaN in b is passed over (the sum of exponentials carries it).
template <class V>
static inline V larger(V a, V b) {
  return b > a ? b : a;
}

// All lanes by one operation, halving the vector until one lane is left.
template <class T, class Combine>
static inline T fold(Vec<T> v, Combine combine) {
  T lanes[WIDTH<T>];
  store(lanes, v);
  constexpr int QUARTER = 16 / int(sizeof(T));  // 16 bytes, the vector that every target has
  typedef T Small __attribute__((vector_size(16)));
  Small parts[BYTES / 16];
  __builtin_memcpy(parts, lanes, sizeof parts);
  for (int step = BYTES / 32; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) parts[i] = combine(parts[i], parts[i + step]);
  T out = parts[0][0];
  for (int i = 1; i < QUARTER; ++i) out = combine(out, parts[0][i]);
  return out;
}
template <class T>
static inline T sum_of(Vec<T> v) {
  return fold<T>(v, [](auto a, auto b) { return a + b; });
}
template <class T>
static inline T max_of(Vec<T> v) {
  return fold<T>(v, [](auto a, auto b) { return larger(a, b); });
}

// Whether each lane of a is less than that of b.
static inline bool all_less(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ)) == 0xff;
#else
  bool all = true;
  for (int i = 0; i < WIDTH<float>; ++i) all &= a[i] < b[i];
  return all;
#endif
}
static inline bool all_less(vdouble a, vdouble b) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LT_OQ) == 0xff;
#elif defined(__AVX2__)
  return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_LT_OQ)) == 0xf;
#else
  bool all = true;
  for (int i = 0; i < WIDTH<double>; ++i) all &= a[i] < b[i];
  return all;
#endif
}

// x >= 0 with a sign.
template <class V, class Bits>
static inline V signed_as(V x, Bits sign) {
  Bits bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  bits |= sign;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
static inline vuint sign_of(vfloat x) {
  vuint bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u;
}
static inline vulong sign_of(vdouble x) {
  vulong bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits & 0x8000000000000000ULL;
}

// exp(x) for x <= 0, to 1 ulp or so; 0 below the smallest normal number; NaN for NaN.
static inline vfloat exp_nonpositive(vfloat x) {
  const vfloat low = splat(-87.33654f);
  // n = round(x / ln 2), by adding and subtracting 1.5 * 2^23; r = x - n ln 2, ln 2 in two parts. Below `low` all of
  // this is nonsense (NaN for -inf), and dropped at the end.
  const float magic = 12582912.0f;
  const vfloat shifted = x * 1.44269504f + magic;
  const vfloat n = shifted - magic;
  const vfloat r = (x - n * 0.693145752f) - n * 1.42860677e-06f;
  // exp on [-ln 2 / 2, ln 2 / 2]: 1 + r + r^2 q(r), q of least relative error (4e-9), by tools/polynomials.py.
  vfloat q = r * 0.0013814601f + 0.00836871f;
  q = q * r + 0.04166839f;
  q = q * r + 0.16666521f;
  q = q * r + 0.49999994f;
  const vfloat y = (q * (r * r) + r) + 1.0f;
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ), (__m512)y, (__m512)n);
#else
  vuint bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - (0x4B400000u - 127u)) << 23;
  vfloat power;
  __builtin_memcpy(&power, &bits, sizeof power);
  const vfloat result = y * power;
  return x < low ? vfloat{} : result;
#endif
}
static inline vdouble exp_nonpositive(vdouble x) {
  const vdouble low = splat(-708.396418532264);
  const double magic = 6755399441055744.0;
  const vdouble shifted = x * 1.4426950408889634 + magic;
  const vdouble n = shifted - magic;
  const vdouble r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  // The Taylor series to r^13: 5e-18 at ln 2 / 2.
  vdouble q = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  q = q * r + 1.0 / 39916800.0;
  q = q * r + 1.0 / 3628800.0;
  q = q * r + 1.0 / 362880.0;
  q = q * r + 1.0 / 40320.0;
  q = q * r + 1.0 / 5040.0;
  q = q * r + 1.0 / 720.0;
  q = q * r + 1.0 / 120.0;
  q = q * r + 1.0 / 24.0;
  q = q * r + 1.0 / 6.0;
  q = q * r + 0.5;
  const vdouble y = (q * (r * r) + r) + 1.0;
  vulong bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - (0x4338000000000000ULL - 1023ULL)) << 52;
  vdouble power;
  __builtin_memcpy(&power, &bits, sizeof power);
  const vdouble result = y * power;
  return x < low ? vdouble{} : result;
}

// P of tanh(x) = x + x^3 P(x^2) for z = x^2 <= 1, of least relative error (8e-9, 4e-17), by tools/polynomials.py.
static inline vfloat tanh_series(vfloat z) {
  vfloat p = z * -0.00035845296f + 0.002301369f;
  p = p * z - 0.007946115f;
  p = p * z + 0.021486664f;
  p = p * z - 0.053879805f;
  p = p * z + 0.13332345f;
  p = p * z - 0.33333296f;
  return p;
}
static inline vdouble tanh_series(vdouble z) {
  vdouble p = z * -6.269329832390532e-08 + 6.544963270827082e-07;
  p = p * z - 3.4196824394164607e-06;
  p = p * z + 1.2341335369337565e-05;
  p = p * z - 3.608663204301943e-05;
  p = p * z + 9.476818311009086e-05;
  p = p * z - 0.0002380438759695621;
  p = p * z + 0.000589618693411587;
  p = p * z - 0.001455721330056791;
  p = p * z + 0.0035921056071892975;
  p = p * z - 0.008863232451847215;
  p = p * z + 0.021869488259839958;
  p = p * z - 0.05396825395342744;
  p = p * z + 0.13333333333292874;
  p = p * z - 0.33333333333332943;
  return p;
}

// 2 atanh(s) = log((1 + s) / (1 - s)), by its series in s^2.
template <class T, int TERMS>
static inline Vec<T> twice_atanh(Vec<T> s) {
  const Vec<T> square = s * s;
  Vec<T> sum = splat(T(2) / T(2 * TERMS + 1));
  for (int k = TERMS - 1; k > 0; --k) sum = sum * square + T(2) / T(2 * k + 1);
  return s * square * sum + (s + s);
}
// log(1 + e) for e in [0, 1], as accurate for tiny e; NaN for NaN.
template <class T>
static inline Vec<T> log1p_of_fraction(Vec<T> e) {
  return twice_atanh<T, sizeof(T) == 4 ? 7 : 16>(e / (e + T(2)));
}
// log(x) for finite x >= 1; NaN for NaN.
template <class T>
static inline Vec<T> log_of_sum(Vec<T> x) {
  typedef typename VecOf<T>::I I;
  constexpr bool SINGLE_PRECISION = sizeof(T) == 4;
  constexpr int MANTISSA = SINGLE_PRECISION ? 23 : 52;
  // x = 2^k f with f in [sqrt(1/2), sqrt(2)): the exponent above that of sqrt(1/2).
  const auto root = SINGLE_PRECISION ? 0x3f3504f3LL : 0x3fe6a09e667f3bcdLL;
  I bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const I k = (bits - decltype(bits[0] + 0)(root)) >> MANTISSA;
  bits -= k << MANTISSA;
  Vec<T> f;
  __builtin_memcpy(&f, &bits, sizeof f);
  const Vec<T> exponent = __builtin_convertvector(k, Vec<T>);
  const Vec<T> result =
      exponent * T(0.693147180559945309417) + twice_atanh<T, SINGLE_PRECISION ? 4 : 10>((f - T(1)) / (f + T(1)));
  return x == x ? result : x;
}

// ---- storage ------------------------------------------------------------------------------------------------------

// A whole vector from storage.
static inline vfloat get(const float* p) { return load(p); }
static inline vdouble get(const double* p) { return load(p); }
typedef uint16_t vhalf __attribute__((vector_size(BYTES / 2)));
static inline vfloat get(const bfloat16* p) {
#if defined(__AVX512F__)  // gcc converts a vector by halves
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const vint wide = (vint)_mm512_maskz_cvtepu16_epi32(0xffff, bits) << 16;
#elif defined(__AVX2__)
  const vint wide = (vint)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) << 16;
#else
  vhalf bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  const vint wide = __builtin_convertvector(bits, vint) << 16;
#endif
  vfloat v;
  __builtin_memcpy(&v, &wide, sizeof v);
  return v;
}
static inline vfloat get(const float16* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vfloat v{};
  for (int i = 0; i < WIDTH<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

// A whole vector to storage, plainly or past the caches.
template <class T>
static inline void put(T* p, Vec<T> v, bool streamed) {
  if (streamed)
    stream(p, v);
  else
    store(p, v);
}
static inline void put_bits(void* p, vhalf bits, bool streamed) {
#if defined(__AVX512F__)
  if (streamed) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)bits);
#elif defined(__AVX2__)
  if (streamed) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)bits);
#endif
  __builtin_memcpy(p, &bits, sizeof bits);
}
static inline void put(bfloat16* p, vfloat v, bool streamed) {
  vuint bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vuint kept = (bits & 0x7fffffff) > 0x7f800000 ? vuint{} + 0x7fc0 : rounded;
  put_bits(p, __builtin_convertvector(kept, vhalf), streamed);
}
static inline void put(float16* p, vfloat v, bool streamed) {
#if defined(__AVX512F__)
  put_bits(p, (vhalf)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT), streamed);
#elif defined(__F16C__)
  put_bits(p, (vhalf)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT), streamed);
#else
  (void)streamed;
  for (int i = 0; i < WIDTH<float>; ++i) narrow(v[i], p[i]);
#endif
}

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
