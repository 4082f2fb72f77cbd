// Arithmetic as functions of values: a result is defined if all that it is made of is.
#pragma once

#include "compiler.h"

namespace vgpu {

namespace alu {

template <class T, class F>
Handler unary(F) {
  return [](Thread& t, const Instruction& i) {
    set(t, i.out[0], to_bits(F{}(get<T>(t, i.in[0]))), defined(t, i.in[0]));
    return Next::STEP;
  };
}
template <class T, class F>
Handler binary(F) {
  return [](Thread& t, const Instruction& i) {
    set(t, i.out[0], to_bits(F{}(get<T>(t, i.in[0]), get<T>(t, i.in[1]))),
        (mask(t, i.in[0]) & mask(t, i.in[1])) == 0xff);
    return Next::STEP;
  };
}
template <class T, class F, class U = T>
Handler ternary(F) {
  return [](Thread& t, const Instruction& i) {
    const bool known = (mask(t, i.in[0]) & mask(t, i.in[1]) & mask(t, i.in[2])) == 0xff;
    set(t, i.out[0], to_bits(F{}(get<T>(t, i.in[0]), get<T>(t, i.in[1]), get<U>(t, i.in[2]))), known);
    return Next::STEP;
  };
}

// The widths of an integer operation, by type.
template <class Pick>
Handler by_bits(const Opcode& op, Pick pick) {
  switch (bytes_of(op.type)) {
    case 2: return pick(u16());
    case 4: return pick(u32());
    case 8: return pick(u64());
    default: op.unsupported();
  }
}
template <class Pick>
Handler by_sign(const Opcode& op, Pick pick) {
  switch (op.type) {
    case Type::U16: return pick(u16());
    case Type::S16: return pick(s16());
    case Type::U32: return pick(u32());
    case Type::S32: return pick(s32());
    case Type::U64: return pick(u64());
    case Type::S64: return pick(s64());
    default: op.unsupported();
  }
}

}  // namespace alu
}  // namespace vgpu
