// PTX's types, and how their values lie in a register: 64 bits each, narrower ones in the low bits.
#pragma once

#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace vgpu {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

// What a launch, or a text, does wrong. The message is all that the caller sees.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Type : u8 {
  NONE,
  U8,
  S8,
  B8,
  U16,
  S16,
  B16,
  U32,
  S32,
  B32,
  U64,
  S64,
  B64,
  F16,
  BF16,
  F32,
  F64,
  F16X2,
  BF16X2,
  F32X2,
  PRED,
};

Type type_of(const std::string& name);  // "f32"; NONE where it is no type

inline int bytes_of(Type type) {
  switch (type) {
    case Type::U8:
    case Type::S8:
    case Type::B8:
    case Type::PRED: return 1;
    case Type::U16:
    case Type::S16:
    case Type::B16:
    case Type::F16:
    case Type::BF16: return 2;
    case Type::U64:
    case Type::S64:
    case Type::B64:
    case Type::F64:
    case Type::F32X2: return 8;
    default: return 4;
  }
}
inline bool is_signed(Type type) {
  return type == Type::S8 || type == Type::S16 || type == Type::S32 || type == Type::S64;
}
inline bool is_float(Type type) {
  return type == Type::F32 || type == Type::F64 || type == Type::F16 || type == Type::BF16;
}

// ---- bits ------------------------------------------------------------------------------------------------------------

template <int BYTES>
struct Unsigned;
template <>
struct Unsigned<1> {
  using type = u8;
};
template <>
struct Unsigned<2> {
  using type = u16;
};
template <>
struct Unsigned<4> {
  using type = u32;
};
template <>
struct Unsigned<8> {
  using type = u64;
};

template <class T>
inline T from_bits(u64 bits) {
  return std::bit_cast<T>(typename Unsigned<sizeof(T)>::type(bits));
}
template <class T>
inline u64 to_bits(T value) {
  return std::bit_cast<typename Unsigned<sizeof(T)>::type>(value);
}

// ---- halves ----------------------------------------------------------------------------------------------------------

// What hardware makes of every NaN that it computes.
inline constexpr u32 NAN_BITS = 0x7fffffff;
inline const float NOT_A_NUMBER = std::bit_cast<float>(NAN_BITS);

inline float from_bfloat16(u16 bits) { return std::bit_cast<float>(u32(bits) << 16); }
inline float from_float16(u16 bits) { return float(std::bit_cast<_Float16>(bits)); }
inline u16 to_bfloat16(float x) {
  const u32 bits = std::bit_cast<u32>(x);
  if (x != x) return 0x7fff;
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u16 to_float16(float x) { return x != x ? 0x7fff : std::bit_cast<u16>(_Float16(x)); }
inline u16 to_float16(double x) { return x != x ? 0x7fff : std::bit_cast<u16>(_Float16(x)); }
// Rounded once: to float by way of "odd", which keeps what the second rounding must know.
inline u16 to_bfloat16(double x) {
  const float near = float(x);
  if (double(near) == x || near - near != 0) return to_bfloat16(near);
  u32 bits = std::bit_cast<u32>(near);
  if (std::fabs(double(near)) > std::fabs(x)) --bits;
  return to_bfloat16(std::bit_cast<float>(bits | 1));
}

// ---- float arithmetic ------------------------------------------------------------------------------------------------

// Subnormals to zero, as .ftz has it.
inline float flushed(float x) {
  const u32 bits = std::bit_cast<u32>(x);
  return bits & 0x7f800000 ? x : std::bit_cast<float>(bits & 0x80000000u);
}

// A number beats a NaN, and -0 is less than +0.
template <class T>
inline T larger(T a, T b) {
  if (a != a) return b != b ? T(NOT_A_NUMBER) : b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
template <class T>
inline T smaller(T a, T b) {
  if (a != a) return b != b ? T(NOT_A_NUMBER) : b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}

// A result in another rounding mode. The volatile copies keep the arithmetic between the two calls.
template <int MODE, class F>
inline float in_mode(F compute, float a, float b, float c = 0) {
  volatile float x = a, y = b, z = c;
  const int before = fegetround();
  fesetround(MODE);
  volatile float result = compute(x, y, z);
  fesetround(before);
  return result;
}

// Conversions saturate, and make 0 of NaN, or of NaN to 64 bits what hardware makes of it.
template <class I, class F>
inline I to_integer(F x) {
  if (x != x) return sizeof(I) == 8 ? I(u64(1) << 63) : I(0);
  constexpr F OVER = F(sizeof(I) == 8 ? 0x1p63 : 0x1p31) * (std::is_signed_v<I> ? 1 : 2);
  if (x >= OVER) return std::numeric_limits<I>::max();
  if (x <= (std::is_signed_v<I> ? -OVER : F(0))) return std::numeric_limits<I>::min();
  return I(x);
}

// The results of .approx instructions are off by what PTX allows where a launch asks for it (Flag::APPROXIMATE): always
// the same result for the same number, and exact for powers of two and what is no normal number.
extern bool approximate;
inline float approximated(float exact, int ulps) {
  const u32 bits = std::bit_cast<u32>(exact);
  if (!approximate || exact == 0 || exact - exact != 0 || !(bits & 0x7f800000) || !(bits & 0x7fffff)) return exact;
  u32 hash = bits * 2654435761u;
  hash ^= hash >> 15;
  hash *= 2246822519u;
  hash ^= hash >> 13;
  const int off = int(hash % u32(2 * ulps + 1)) - ulps;
  const u32 moved = bits + u32(off);
  if (!((moved ^ bits) & 0xff800000)) return std::bit_cast<float>(moved);
  // Into another binade: no further than its edge.
  if (off < 0) return std::bit_cast<float>(bits & 0xff800000);
  return (moved ^ bits) >> 31 || (moved & 0x7f800000) == 0x7f800000 ? exact : std::bit_cast<float>(moved);
}

}  // namespace vgpu
