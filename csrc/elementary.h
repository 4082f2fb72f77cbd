// Elementary functions of float and double, on the host and on a device, as the scalar mathematics of a row uses them.
#pragma once
#define MLK_ELEMENTARY

#include <cmath>
#include <limits>

#include "spec.h"

namespace mlkernels {
namespace MLKERNELS_ISA {

// The C library's functions by overload; std:: ones are inline with external linkage, which see spec.h. Where there are
// polynomials instead, tools/polynomials.py computes them.
#define MLK_BOTH(NAME, FUNCTION)                          \
  MLK_FN float NAME(float x) { return ::FUNCTION##f(x); } \
  MLK_FN double NAME(double x) { return ::FUNCTION(x); }
MLK_BOTH(m_exp, exp)
MLK_BOTH(m_expm1, expm1)
MLK_BOTH(m_log, log)
MLK_BOTH(m_log1p, log1p)
MLK_BOTH(m_sqrt, sqrt)
MLK_BOTH(m_floor, floor)
MLK_BOTH(m_acos, acos)
MLK_BOTH(m_abs, fabs)
MLK_FN float c_pow(float x, float y) { return ::powf(x, y); }
MLK_FN double c_pow(double x, double y) { return ::pow(x, y); }
// 1 / x for 1 <= x < 2^100; NaN stays. On a device without the cases that do not occur, to half a unit in the last place.
MLK_FN float m_inverse(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return ::fmaf(::fmaf(-x, y, 1.0f), y, y);
#else
  return 1 / x;
#endif
}
MLK_FN double m_inverse(double x) { return 1 / x; }
// log1p(x) for 0 <= x <= 1; NaN stays.
#ifdef MLK_SIMT
MLK_FN float m_log1p_of_part(float x) {
  // 2 atanh(s), s = x / (2 + x) <= 1/3: half of the instructions of CUDA's own, to two units in the last place.
  const float s = x * m_inverse(2 + x), z = s * s;
  float p = 0.12144832f;
  p = p * z + 0.107153565f;
  p = p * z + 0.14308299f;
  p = p * z + 0.19999444f;
  p = p * z + 0.33333337f;
  return 2 * s + 2 * s * z * p;
}
#else
MLK_FN float m_log1p_of_part(float x) { return m_log1p(x); }
#endif
MLK_FN double m_log1p_of_part(double x) { return m_log1p(x); }
#ifdef MLK_SIMT
// sin(x + quarters pi / 2) for |x| < 10^4. CUDA's own keeps an array in local memory, for angles that no margin has.
template <class T>
MLK_FN T sine(T x, int quarters) {
  const T turns = m_floor(x * T(0.6366197723675814) + T(0.5));  // of pi / 2, which comes in three parts
  T r;
  if (sizeof(T) == 8)
    r = ((x - turns * T(1.57079625129699707031)) - turns * T(7.54978941586159635335e-8)) -
        turns * T(5.39030285815811905e-15);
  else
    r = ((x - turns * T(1.5703125)) - turns * T(4.837512969970703125e-4)) - turns * T(7.549789948768648e-8);
  const T z = r * r;
  T p = T(-2.5050747767528846e-08) + T(1.5896230510929358e-10) * z;
  p = p * z + T(2.755731362139936e-06);
  p = p * z - T(0.000198412698295895);
  p = p * z + T(0.008333333333322118);
  p = p * z - T(0.1666666666666663);
  const T sin_r = r + r * z * p;
  p = T(2.087570084131778e-09) - T(1.1358536467989107e-11) * z;
  p = p * z - T(2.755731417929712e-07);
  p = p * z + T(2.4801587288851738e-05);
  p = p * z - T(0.0013888888888873056);
  p = p * z + T(0.041666666666666595);
  const T cos_r = 1 - T(0.5) * z + z * z * p;
  const int quarter = (int(turns == turns ? turns : T(0)) + quarters) & 3;
  const T value = quarter & 1 ? cos_r : sin_r;
  return quarter & 2 ? -value : value;
}
MLK_FN float m_sin(float x) { return sine(x, 0); }
MLK_FN double m_sin(double x) { return sine(x, 0); }
MLK_FN float m_cos(float x) { return sine(x, 1); }
MLK_FN double m_cos(double x) { return sine(x, 1); }
#else
MLK_BOTH(m_sin, sin)
MLK_BOTH(m_cos, cos)
#endif
#undef MLK_BOTH

template <class T>
MLK_FN T infinity() {
  return std::numeric_limits<T>::infinity();
}
template <class T>
MLK_FN T nan() {
  return std::numeric_limits<T>::quiet_NaN();
}
// NaN, unless the parameter is in its range.
template <class T>
MLK_FN T legal(bool in_range, T value) {
  return in_range ? value : nan<T>();
}

// x^y for x >= 0. Exponents are nearly always small integers: four multiplications instead of a call.
template <class T>
MLK_FN T m_pow(T x, T y) {
  if (!(y >= 0 && y <= 15) || y != T(int(y))) return c_pow(x, y);
  T out = 1;
  for (int n = int(y); n > 0; n >>= 1) {
    if (n & 1) out *= x;
    x *= x;
  }
  return out;
}

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
