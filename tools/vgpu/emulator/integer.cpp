// Integer arithmetic, logic and bytes.
#include <algorithm>
#include <limits>

#include "alu.h"

namespace vgpu {

using namespace alu;

namespace {

// ---- logic -----------------------------------------------------------------------------------------------------------

// A bit of an undefined value may be decided by the other operand: compilers rely on 0 & x and, of predicates, 1 | x.
enum Logic : u8 { LOGIC_AND, LOGIC_OR, LOGIC_XOR };

u64 combined(int how, u64 a, u64 b) { return how == LOGIC_AND ? a & b : how == LOGIC_OR ? a | b : a ^ b; }

Next predicate_logic(Thread& t, const Instruction& i) {
  const bool a = value(t, i.in[0]) & 1, b = value(t, i.in[1]) & 1;
  const bool a_known = defined(t, i.in[0]), b_known = defined(t, i.in[1]);
  const bool decisive = i.kind == LOGIC_OR;  // 0 decides an AND, 1 an OR
  if (i.kind != LOGIC_XOR && ((a_known && a == decisive) || (b_known && b == decisive)))
    set(t, i.out[0], decisive);
  else
    set(t, i.out[0], combined(i.kind, a, b), a_known && b_known);
  return Next::STEP;
}
Next logic(Thread& t, const Instruction& i) {
  const u64 a = value(t, i.in[0]), b = value(t, i.in[1]);
  const u8 a_known = mask(t, i.in[0]), b_known = mask(t, i.in[1]);
  u8 known = a_known & b_known;
  if (known != 0xff && i.kind == LOGIC_AND)
    for (int k = 0; k < 8; ++k)
      if (((a_known >> k & 1) && !(a >> 8 * k & 0xff)) || ((b_known >> k & 1) && !(b >> 8 * k & 0xff)))
        known |= u8(1 << k);
  set_masked(t, i.out[0], combined(i.kind, a, b), known);
  return Next::STEP;
}

u32 looked_up(u32 a, u32 b, u32 c, int table) {  // lop3
  u32 result = 0;
  for (int k = 0; k < 8; ++k)
    if (table >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return result;
}

// ---- shifts and fields -----------------------------------------------------------------------------------------------

// By whole bytes the defined ones move along.
template <class T>
u8 shifted_mask(u8 known, u32 by, bool left) {
  constexpr u8 WHOLE = bytes_mask(sizeof(T));
  if (by >= 8 * sizeof(T)) return 0xff;
  known &= WHOLE;
  const u8 moved = left ? u8(known << by / 8 | ((1 << by / 8) - 1)) : u8(known >> by / 8 | ~(WHOLE >> by / 8));
  return moved | u8(~WHOLE);
}
template <class T>
Next shift(Thread& t, const Instruction& i) {
  const bool left = i.kind;
  const T x = get<T>(t, i.in[0]);
  const u32 by = u32(value(t, i.in[1]));
  constexpr u32 BITS = 8 * sizeof(T);
  T result;
  if (std::is_signed_v<T> && !left)
    result = T(x >> std::min(by, BITS - 1));
  else
    result = by >= BITS ? T(0) : left ? T(x << by) : T(x >> by);
  u8 known = defined(t, i.in[0]) && defined(t, i.in[1]) ? 0xff : 0;
  if (!known && defined(t, i.in[1]) && by % 8 == 0 && !std::is_signed_v<T>)
    known = shifted_mask<T>(mask(t, i.in[0]), by, left);
  set_masked(t, i.out[0], to_bits(result), known);
  return Next::STEP;
}

template <bool LEFT, bool WRAP>
struct Funnel {
  u32 operator()(u32 low, u32 high, u32 by) const {
    const u64 both = u64(high) << 32 | low;
    by = WRAP ? by & 31 : std::min(by, 32u);
    return LEFT ? u32(both << by >> 32) : u32(both >> by);
  }
};

// bfe
template <class T>
T extracted(T x, u32 start, u32 length) {
  constexpr u32 BITS = 8 * sizeof(T);
  using U = std::make_unsigned_t<T>;
  start &= 255;
  length &= 255;
  U result = start >= BITS ? U(0) : U(U(x) >> start);
  if (length < BITS) result &= U((U(1) << length) - 1);
  if (std::is_signed_v<T> && length > 0) {
    // Above the field, and where it reaches beyond x, are copies of its top bit.
    const u32 top = std::min(start + length - 1, BITS - 1), valid = start > top ? 0 : top - start + 1;
    if (valid < BITS && U(x) >> top & 1) result |= U(~U(0) << valid);
  }
  return T(result);
}
template <class T>
Next insert_field(Thread& t, const Instruction& i) {  // bfi
  constexpr u32 BITS = 8 * sizeof(T);
  const T field = get<T>(t, i.in[0]), into = get<T>(t, i.in[1]);
  const u32 start = value(t, i.in[2]) & 255, length = value(t, i.in[3]) & 255;
  const T bits = length >= BITS ? T(~T(0)) : T((T(1) << length) - 1);
  const T result = start >= BITS ? into : T((into & ~(bits << start)) | (field & bits) << start);
  bool known = true;
  for (size_t k = 0; k < 4; ++k) known &= defined(t, i.in[k]);
  set(t, i.out[0], to_bits(result), known);
  return Next::STEP;
}

u32 permuted(u32 low, u32 high, u32 selector) {
  const u64 both = u64(high) << 32 | low;
  u32 result = 0;
  for (int k = 0; k < 4; ++k) {
    const u32 which = selector >> 4 * k & 15;
    u8 byte = u8(both >> 8 * (which & 7));
    if (which & 8) byte = byte >> 7 ? 0xff : 0;  // copies of its sign
    result |= u32(byte) << 8 * k;
  }
  return result;
}
u32 reversed(u32 x) {
  u32 result = 0;
  for (int k = 0; k < 32; ++k) result |= (x >> k & 1) << (31 - k);
  return result;
}

// ---- division, which PTX leaves undefined by 0 and hardware does not -------------------------------------------------

template <class T>
T quotient(T a, T b) {
  if (b == 0) return T(~T(0));
  if (std::is_signed_v<T> && a == std::numeric_limits<T>::min() && b == T(-1)) return a;
  return T(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  return std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
}

// ---- products --------------------------------------------------------------------------------------------------------

template <class T>
struct Wide;
template <>
struct Wide<u16> {
  using type = u32;
};
template <>
struct Wide<s16> {
  using type = s32;
};
template <>
struct Wide<u32> {
  using type = u64;
};
template <>
struct Wide<s32> {
  using type = s64;
};
__extension__ typedef __int128 s128;
__extension__ typedef unsigned __int128 u128;
template <>
struct Wide<u64> {
  using type = u128;
};
template <>
struct Wide<s64> {
  using type = s128;
};

template <class T>
T high_product(T a, T b) {
  using W = typename Wide<T>::type;
  return T(W(a) * W(b) >> 8 * sizeof(T));
}

Type wide_of(Type type) { return bytes_of(type) == 2 ? Type::B32 : Type::B64; }

void decode_multiply(Compiler& c, const Opcode& op) {
  op.allow({"lo", "hi", "wide"});
  Handler& run = c.instruction.run;
  if (op.has("wide")) {
    c.operation(2, wide_of(op.type), op.type, op);
    run = by_sign(op, []<class T>(T) -> Handler {
      if constexpr (sizeof(T) == 8)
        return nullptr;
      else {
        using W = typename Wide<T>::type;
        return binary<T>([](T a, T b) { return W(W(a) * W(b)); });
      }
    });
    return;
  }
  c.operation(2, op.type, op);
  if (op.has("hi")) {
    run = by_sign(op, []<class T>(T) { return binary<T>([](T a, T b) { return high_product(a, b); }); });
  } else if (op.has("lo")) {
    run = by_bits(op, []<class T>(T) { return binary<T>([](T a, T b) { return T(u64(a) * b); }); });
  }
}

void decode_multiply_add(Compiler& c, const Opcode& op) {
  op.allow({"lo", "wide"});
  Handler& run = c.instruction.run;
  if (op.has("wide")) {
    c.operation(3, wide_of(op.type), op.type, op);
    c.instruction.in[2] = c.operand(c.operands[3], wide_of(op.type));
    run = by_sign(op, []<class T>(T) -> Handler {
      if constexpr (sizeof(T) == 8)
        return nullptr;
      else {
        using W = typename Wide<T>::type;
        using U = std::make_unsigned_t<W>;
        auto add = [](T a, T b, W x) { return U(U(W(W(a) * W(b))) + U(x)); };
        return ternary<T, decltype(add), W>(add);
      }
    });
  } else if (op.has("lo")) {
    c.operation(3, op.type, op);
    run = by_bits(op, []<class T>(T) { return ternary<T>([](T a, T b, T x) { return T(u64(a) * b + x); }); });
  }
}

void decode_logic(Compiler& c, const Opcode& op, Logic how) {
  op.allow({});
  c.operation(2, op.type, op);
  c.instruction.kind = u8(how);
  c.instruction.run = op.type == Type::PRED ? predicate_logic : logic;
}

void decode_shift(Compiler& c, const Opcode& op) {
  op.allow({});
  c.operation(2, op.type, op);
  c.instruction.in[1] = c.operand(c.operands[2], Type::U32);
  const bool left = op.name == "shl";
  c.instruction.kind = left;
  Handler& run = c.instruction.run;
  if (is_signed(op.type))
    run = by_sign(op, []<class T>(T) -> Handler { return shift<T>; });
  else
    run = by_bits(op, []<class T>(T) -> Handler { return shift<T>; });
}

void decode_funnel(Compiler& c, const Opcode& op) {
  op.allow({"l", "r", "wrap", "clamp"});
  c.operation(3, Type::B32, op);
  const bool left = op.has("l"), wrap = op.has("wrap");
  c.instruction.run = left ? (wrap ? ternary<u32>(Funnel<true, true>()) : ternary<u32>(Funnel<true, false>()))
                           : (wrap ? ternary<u32>(Funnel<false, true>()) : ternary<u32>(Funnel<false, false>()));
}

void decode_field(Compiler& c, const Opcode& op) {
  op.allow({});
  Instruction& i = c.instruction;
  if (op.name == "bfe") {
    c.operation(3, op.type, op);
    i.in[1] = c.operand(c.operands[2], Type::U32);
    i.in[2] = c.operand(c.operands[3], Type::U32);
    i.run = by_sign(op, []<class T>(T) -> Handler {
      auto extract = [](T x, u32 start, u32 length) { return extracted(x, start, length); };
      return [](Thread& t, const Instruction& i) {
        const bool known = (mask(t, i.in[0]) & mask(t, i.in[1]) & mask(t, i.in[2])) == 0xff;
        set(t, i.out[0], to_bits(decltype(extract){}(get<T>(t, i.in[0]), get<u32>(t, i.in[1]), get<u32>(t, i.in[2]))),
            known);
        return Next::STEP;
      };
    });
    return;
  }
  c.operation(4, op.type, op);
  i.in[2] = c.operand(c.operands[3], Type::U32);
  i.in[3] = c.operand(c.operands[4], Type::U32);
  i.run = by_bits(op, []<class T>(T) -> Handler { return insert_field<T>; });
}

void decode_lookup(Compiler& c, const Opcode& op) {
  c.expect(5, op);
  const auto table = c.number(c.operands[4], Type::U32);
  if (!table || *table > 255) op.unsupported();
  c.operands.pop_back();
  c.operation(3, Type::B32, op);
  c.instruction.immediate = s64(*table);
  c.instruction.run = [](Thread& t, const Instruction& i) {
    const bool known = (mask(t, i.in[0]) & mask(t, i.in[1]) & mask(t, i.in[2])) == 0xff;
    set(t, i.out[0], looked_up(get<u32>(t, i.in[0]), get<u32>(t, i.in[1]), get<u32>(t, i.in[2]), int(i.immediate)),
        known);
    return Next::STEP;
  };
}

}  // namespace

bool decode_integer(Compiler& c, const Opcode& op) {
  if (is_float(op.type) || op.type == Type::F32X2 || op.type == Type::F16X2 || op.type == Type::BF16X2) return false;
  Instruction& i = c.instruction;
  const std::string& name = op.name;
  auto plain = [&](int inputs) {
    op.allow({});
    c.operation(inputs, op.type, op);
  };
  if (name == "add" && (op.text == "add.s16x2" || op.text == "add.u16x2")) {
    c.operation(2, Type::B32, op);
    i.run = binary<u32>([](u32 a, u32 b) { return u32(u16(a + b)) | ((a >> 16) + (b >> 16)) << 16; });
  } else if (name == "add") {
    plain(2);
    i.run = by_bits(op, []<class T>(T) { return binary<T>([](T a, T b) { return T(a + b); }); });
  } else if (name == "sub") {
    plain(2);
    i.run = by_bits(op, []<class T>(T) { return binary<T>([](T a, T b) { return T(a - b); }); });
  } else if (name == "mul") {
    decode_multiply(c, op);
  } else if (name == "mad") {
    decode_multiply_add(c, op);
  } else if (name == "div") {
    plain(2);
    i.run = by_sign(op, []<class T>(T) { return binary<T>([](T a, T b) { return quotient(a, b); }); });
  } else if (name == "rem") {
    plain(2);
    i.run = by_sign(op, []<class T>(T) { return binary<T>([](T a, T b) { return remainder(a, b); }); });
  } else if (name == "min") {
    plain(2);
    i.run = by_sign(op, []<class T>(T) { return binary<T>([](T a, T b) { return std::min(a, b); }); });
  } else if (name == "max") {
    plain(2);
    i.run = by_sign(op, []<class T>(T) { return binary<T>([](T a, T b) { return std::max(a, b); }); });
  } else if (name == "and") {
    decode_logic(c, op, LOGIC_AND);
  } else if (name == "or") {
    decode_logic(c, op, LOGIC_OR);
  } else if (name == "xor") {
    decode_logic(c, op, LOGIC_XOR);
  } else if (name == "not") {
    plain(1);
    if (op.type == Type::PRED)
      i.run = unary<u8>([](u8 a) { return u8(!(a & 1)); });
    else
      i.run = by_bits(op, []<class T>(T) { return unary<T>([](T a) { return T(~a); }); });
  } else if (name == "neg") {
    plain(1);
    i.run = by_bits(op, []<class T>(T) { return unary<T>([](T a) { return T(T(0) - a); }); });
  } else if (name == "abs") {
    plain(1);
    i.run = by_sign(op, []<class T>(T) {
      return unary<T>([](T a) { return T(a < 0 ? std::make_unsigned_t<T>(0) - std::make_unsigned_t<T>(a) : a); });
    });
  } else if (name == "shl" || name == "shr") {
    decode_shift(c, op);
  } else if (name == "shf") {
    decode_funnel(c, op);
  } else if (name == "bfe" || name == "bfi") {
    decode_field(c, op);
  } else if (name == "lop3") {
    decode_lookup(c, op);
  } else if (name == "prmt") {
    plain(3);
    i.run = ternary<u32>([](u32 a, u32 b, u32 s) { return permuted(a, b, s); });
  } else if (name == "brev") {
    plain(1);
    i.run = bytes_of(op.type) == 4 ? unary<u32>([](u32 a) { return reversed(a); }) : nullptr;
  } else if (name == "popc" || name == "clz") {
    op.allow({});
    c.operation(1, Type::B32, op.type, op);
    const bool wide = bytes_of(op.type) == 8;
    if (name == "popc")
      i.run = wide ? unary<u64>([](u64 a) { return u32(std::popcount(a)); })
                   : unary<u32>([](u32 a) { return u32(std::popcount(a)); });
    else
      i.run = wide ? unary<u64>([](u64 a) { return u32(std::countl_zero(a)); })
                   : unary<u32>([](u32 a) { return u32(std::countl_zero(a)); });
  } else {
    return false;
  }
  return true;
}

}  // namespace vgpu
