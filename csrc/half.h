// Elements as they are stored, of 16 bits among others, and as they are computed with.
#pragma once

#include <cstring>

#include "spec.h"

namespace mlkernels {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

namespace MLKERNELS_ISA {

// The same bits as another type.
template <class To, class From>
MLK_FN To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

MLK_FN float widen(float x) { return x; }
MLK_FN double widen(double x) { return x; }
MLK_FN float widen(bfloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
MLK_FN float widen(float16 x) {
#ifdef __CUDA_ARCH__
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
#else
  // Branch-free, exact: the exponent is rebased by a multiplication, which normalises subnormals too.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  const float value = bits_as<float>(magnitude) * 5.192296858534828e33f;  // 2^112
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;   // inf and NaN
  return bits_as<float>(bits_as<uint32_t>(value) | sign | special);
#endif
}

MLK_FN void narrow(float x, float& out) { out = x; }
MLK_FN void narrow(double x, double& out) { out = x; }
#ifndef __CUDACC__
// Round to nearest, ties to even; NaN stays NaN.
MLK_FN void narrow(float x, bfloat16& out) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
MLK_FN void narrow(float x, float16& out) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Normal results: rebase the exponent and round the 13 lost bits. Subnormal ones: adding 1/2 aligns and rounds.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t small = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t out_bits = magnitude < 0x38800000u ? small : normal;
  out_bits = magnitude >= 0x47800000u ? 0x7c00u : out_bits;  // 2^16 and above: inf (65520 rounds there by itself)
  out_bits = magnitude > 0x7f800000u ? 0x7e00u : out_bits;
  out.bits = uint16_t(sign | out_bits);
}
#endif

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
