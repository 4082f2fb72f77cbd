// cvt: between all of the types.
#include <limits>

#include "alu.h"

namespace vgpu {

using namespace alu;

namespace {

enum class Rounding { NONE, NEAREST, ZERO, DOWN, UP };  // to an integer

template <Rounding R, class F>
F rounded(F x) {
  switch (R) {
    case Rounding::NEAREST: return std::nearbyint(x);
    case Rounding::ZERO: return std::trunc(x);
    case Rounding::DOWN: return std::floor(x);
    case Rounding::UP: return std::ceil(x);
    default: return x;
  }
}

// Calls with one of the roundings as a constant.
template <class With>
Handler by_rounding(Rounding rounding, With with) {
  switch (rounding) {
    case Rounding::NEAREST: return with(std::integral_constant<Rounding, Rounding::NEAREST>());
    case Rounding::ZERO: return with(std::integral_constant<Rounding, Rounding::ZERO>());
    case Rounding::DOWN: return with(std::integral_constant<Rounding, Rounding::DOWN>());
    case Rounding::UP: return with(std::integral_constant<Rounding, Rounding::UP>());
    default: return with(std::integral_constant<Rounding, Rounding::NONE>());
  }
}

Rounding rounding_of(const Opcode& op) {
  return op.has("rni")   ? Rounding::NEAREST
         : op.has("rzi") ? Rounding::ZERO
         : op.has("rmi") ? Rounding::DOWN
         : op.has("rpi") ? Rounding::UP
                         : Rounding::NONE;
}

// Integers: bytes are the source's, kind is the target's; extend: by the sign of the source.
Next resize(Thread& t, const Instruction& i) {
  auto cut = [](u64 x, int bytes) { return x << (64 - 8 * bytes) >> (64 - 8 * bytes); };
  u64 bits = value(t, i.in[0]);
  bits = i.extend ? u64(s64(bits << (64 - 8 * i.bytes)) >> (64 - 8 * i.bytes)) : cut(bits, i.bytes);
  const u8 whole = bytes_mask(i.bytes), known = mask(t, i.in[0]) & whole;
  u8 result = known | u8(~bytes_mask(std::min(i.bytes, i.kind)));
  if (known == whole)
    result = 0xff;
  else if (i.extend && i.kind > i.bytes)
    result = 0;
  set_masked(t, i.out[0], cut(bits, i.kind), result);
  return Next::STEP;
}

float saturated(float x) { return x != x ? 0.0f : smaller(larger(x, 0.0f), 1.0f); }

Handler float_to_float(const Opcode& op, Type to, Type from) {
  const Rounding rounding = rounding_of(op);
  const bool flush = op.has("ftz"), nearest = op.has("rn");
  if (to == Type::F32 && from == Type::F32) {
    if (op.has("sat")) {
      if (rounding != Rounding::NONE) op.unsupported();
      return flush ? unary<float>([](float a) { return flushed(saturated(flushed(a))); })
                   : unary<float>([](float a) { return saturated(a); });
    }
    return by_rounding(rounding, [&](auto r) {
      constexpr Rounding R = decltype(r)::value;
      return flush ? unary<float>([](float a) { return rounded<R>(flushed(a)); })
                   : unary<float>([](float a) { return rounded<R>(a); });
    });
  }
  if (op.has("sat")) op.unsupported();
  if (to == Type::F64 && from == Type::F64)
    return by_rounding(rounding,
                       [](auto r) { return unary<double>([](double a) { return rounded<decltype(r)::value>(a); }); });
  if (rounding != Rounding::NONE) op.unsupported();
  switch (to) {
    case Type::F64:
      if (from == Type::F32)
        return flush ? unary<float>([](float a) { return double(flushed(a)); })
                     : unary<float>([](float a) { return double(a); });
      if (from == Type::F16) return unary<u16>([](u16 a) { return double(from_float16(a)); });
      if (from == Type::BF16) return unary<u16>([](u16 a) { return double(from_bfloat16(a)); });
      break;
    case Type::F32:
      if (from == Type::F16) return unary<u16>([](u16 a) { return from_float16(a); });
      if (from == Type::BF16) return unary<u16>([](u16 a) { return from_bfloat16(a); });
      if (from == Type::F64 && nearest)
        return flush ? unary<double>([](double a) { return flushed(float(a)); })
                     : unary<double>([](double a) { return float(a); });
      break;
    case Type::F16:
      if (from == Type::F32 && nearest) return unary<float>([](float a) { return to_float16(a); });
      if (from == Type::F64 && nearest) return unary<double>([](double a) { return to_float16(a); });
      break;
    case Type::BF16:
      if (from == Type::F32 && nearest) return unary<float>([](float a) { return to_bfloat16(a); });
      if (from == Type::F64 && nearest) return unary<double>([](double a) { return to_bfloat16(a); });
      break;
    default: break;
  }
  op.unsupported();
}

template <class I, class F>
Handler to_integer_from(const Opcode& op) {
  return by_rounding(rounding_of(op), [&](auto r) -> Handler {
    constexpr Rounding R = decltype(r)::value;
    if constexpr (std::is_same_v<F, float>)
      if (op.has("ftz")) return unary<float>([](float a) { return to_integer<I>(rounded<R>(flushed(a))); });
    return unary<F>([](F a) { return to_integer<I>(rounded<R>(a)); });
  });
}
template <class F>
Handler float_to_integer(const Opcode& op, Type to) {
  switch (to) {
    case Type::S32: return to_integer_from<s32, F>(op);
    case Type::U32: return to_integer_from<u32, F>(op);
    case Type::S64: return to_integer_from<s64, F>(op);
    case Type::U64: return to_integer_from<u64, F>(op);
    default: op.unsupported();
  }
}

template <class F>
Handler integer_to_float(const Opcode& op, Type from) {
  switch (from) {
    case Type::U8: return unary<u8>([](u8 a) { return F(a); });
    case Type::S8: return unary<s8>([](s8 a) { return F(a); });
    case Type::U16: return unary<u16>([](u16 a) { return F(a); });
    case Type::S16: return unary<s16>([](s16 a) { return F(a); });
    case Type::U32: return unary<u32>([](u32 a) { return F(a); });
    case Type::S32: return unary<s32>([](s32 a) { return F(a); });
    case Type::U64: return unary<u64>([](u64 a) { return F(a); });
    case Type::S64: return unary<s64>([](s64 a) { return F(a); });
    default: op.unsupported();
  }
}

// Two floats to a pair of halves: the first one is the upper.
template <class Narrow>
Handler to_pair(Narrow) {
  return [](Thread& t, const Instruction& i) {
    const u32 high = Narrow{}(get<float>(t, i.in[0])), low = Narrow{}(get<float>(t, i.in[1]));
    const u8 known = u8(0xf0 | (defined(t, i.in[0]) ? 12 : 0) | (defined(t, i.in[1]) ? 3 : 0));
    set_masked(t, i.out[0], high << 16 | low, known);
    return Next::STEP;
  };
}

}  // namespace

bool decode_convert(Compiler& c, const Opcode& op) {
  if (op.name != "cvt") return false;
  op.allow({"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "ftz", "sat"});
  if (op.types.size() != 2) op.unsupported();
  const Type to = op.types[0], from = op.types[1];
  Instruction& i = c.instruction;
  const bool nearest = op.has("rn") && !op.has("sat");
  if (to == Type::BF16X2 || to == Type::F16X2) {
    if (from != Type::F32 || !nearest) op.unsupported();
    c.operation(2, Type::B32, Type::F32, op);
    i.run = to == Type::BF16X2 ? to_pair([](float x) { return to_bfloat16(x); })
                               : to_pair([](float x) { return to_float16(x); });
    return true;
  }
  c.operation(1, to, from, op);
  if (is_float(to) && is_float(from)) {
    i.run = float_to_float(op, to, from);
  } else if (is_float(from)) {
    if (rounding_of(op) == Rounding::NONE || op.has("sat")) op.unsupported();
    i.run = from == Type::F32   ? float_to_integer<float>(op, to)
            : from == Type::F64 ? float_to_integer<double>(op, to)
                                : nullptr;
  } else if (is_float(to)) {
    if (!nearest) op.unsupported();
    i.run = to == Type::F32   ? integer_to_float<float>(op, from)
            : to == Type::F64 ? integer_to_float<double>(op, from)
                              : nullptr;
  } else {
    if (op.has("sat")) op.unsupported();
    i.bytes = u8(bytes_of(from));
    i.kind = u8(bytes_of(to));
    i.extend = is_signed(from);
    i.run = resize;
  }
  return true;
}

}  // namespace vgpu
