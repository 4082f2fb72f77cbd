// Floating-point arithmetic. FP contraction is off in the build: what is fused is what PTX fuses.
#include "alu.h"

namespace vgpu {

using namespace alu;

namespace {

// A function of floats that reads and writes subnormals as zeros.
template <class F>
Handler unary_flushed(F) {
  return unary<float>([](float a) { return flushed(F{}(flushed(a))); });
}
template <class F>
Handler binary_flushed(F) {
  return binary<float>([](float a, float b) { return flushed(F{}(flushed(a), flushed(b))); });
}

template <class F>
Handler unary_float(const Opcode& op, F f) {
  if (op.type != Type::F32) op.unsupported();
  return op.has("ftz") ? unary_flushed(f) : unary<float>(f);
}
template <class F>
Handler binary_float(const Opcode& op, F f) {
  return op.has("ftz") ? binary_flushed(f) : binary<float>(f);
}

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Subtract {
  template <class T>
  T operator()(T a, T b) const {
    return a - b;
  }
};
struct Multiply {
  template <class T>
  T operator()(T a, T b) const {
    return a * b;
  }
};
struct FusedMultiplyAdd {
  float operator()(float a, float b, float c) const { return __builtin_fmaf(a, b, c); }
  double operator()(double a, double b, double c) const { return __builtin_fma(a, b, c); }
};

template <int MODE, class F>
Handler binary_in_mode(F) {
  return binary<float>(
      [](float a, float b) { return in_mode<MODE>([](float x, float y, float) { return F{}(x, y); }, a, b); });
}
template <int MODE>
Handler fma_in_mode() {
  return ternary<float>([](float a, float b, float c) { return in_mode<MODE>(FusedMultiplyAdd(), a, b, c); });
}

bool other_mode(const Opcode& op) { return op.has("rz") || op.has("rm") || op.has("rp"); }

template <class F>
void decode_binary(Compiler& c, const Opcode& op, F f) {
  op.allow({"rn", "rz", "rm", "rp", "ftz"});
  c.operation(2, op.type, op);
  Handler& run = c.instruction.run;
  if (op.type == Type::F64) {
    if (!other_mode(op)) run = binary<double>(f);
  } else if (op.type == Type::F32) {
    if (!other_mode(op))
      run = binary_float(op, f);
    else if (!op.has("ftz"))
      run = op.has("rz")   ? binary_in_mode<FE_TOWARDZERO>(f)
            : op.has("rm") ? binary_in_mode<FE_DOWNWARD>(f)
                           : binary_in_mode<FE_UPWARD>(f);
  }
}

void decode_fma(Compiler& c, const Opcode& op) {
  op.allow({"rn", "rz", "rm", "rp", "ftz"});
  c.operation(3, op.type, op);
  Handler& run = c.instruction.run;
  if (op.type == Type::F64) {
    if (op.has("rn")) run = ternary<double>(FusedMultiplyAdd());
  } else if (op.type == Type::F32) {
    if (!other_mode(op))
      run = op.has("ftz") ? ternary<float>([](float a, float b, float x) {
        return flushed(__builtin_fmaf(flushed(a), flushed(b), flushed(x)));
      })
                          : ternary<float>(FusedMultiplyAdd());
    else if (!op.has("ftz"))
      run = op.has("rz")   ? fma_in_mode<FE_TOWARDZERO>()
            : op.has("rm") ? fma_in_mode<FE_DOWNWARD>()
                           : fma_in_mode<FE_UPWARD>();
  }
}

// sm_100: add, sub and fma of halves to a float.
template <class F>
Handler mixed(bool bfloat, F) {
  auto run = [](auto widen) {
    return [](Thread& t, const Instruction& i) {
      const bool fused = i.count == 3;
      const float a = decltype(widen){}(get<u16>(t, i.in[0]));
      const float b = fused ? decltype(widen){}(get<u16>(t, i.in[1])) : 0;
      const int last = i.in[size_t(i.count) - 1];
      bool known = true;
      for (size_t k = 0; k < i.count; ++k) known &= defined(t, i.in[k]);
      set(t, i.out[0], to_bits(F{}(a, b, get<float>(t, last))), known);
      return Next::STEP;
    };
  };
  if (bfloat) return run([](u16 x) { return from_bfloat16(x); });
  return run([](u16 x) { return from_float16(x); });
}

void decode_mixed(Compiler& c, const Opcode& op) {
  op.allow({"rn"});
  const bool fused = op.name == "fma";
  if (op.types.size() != 2 || op.types[0] != Type::F32) op.unsupported();
  if (op.types[1] != Type::F16 && op.types[1] != Type::BF16) op.unsupported();
  c.operation(fused ? 3 : 2, Type::F32, Type::B16, op);
  Instruction& i = c.instruction;
  i.count = u8(fused ? 3 : 2);
  i.in[size_t(i.count) - 1] = c.operand(c.operands.back(), Type::F32);
  const bool bfloat = op.types[1] == Type::BF16;
  if (fused)
    i.run = mixed(bfloat, [](float a, float b, float x) { return __builtin_fmaf(a, b, x); });
  else if (op.name == "add")
    i.run = mixed(bfloat, [](float a, float, float x) { return a + x; });
  else if (op.name == "sub")
    i.run = mixed(bfloat, [](float a, float, float x) { return a - x; });
}

// sm_100: two floats in 64 bits.
template <class F>
Handler paired(F) {
  return [](Thread& t, const Instruction& i) {
    u64 result = 0;
    u8 known = 0xff;
    for (int h = 0; h < 2; ++h) {
      float x[3] = {};
      for (size_t k = 0; k < i.count; ++k) {
        x[k] = from_bits<float>(value(t, i.in[k]) >> 32 * h & 0xffffffff);
        if (i.kind) x[k] = flushed(x[k]);
        if ((mask(t, i.in[k]) >> 4 * h & 15) != 15) known &= u8(~(15 << 4 * h));
      }
      const float y = F{}(x[0], x[1], x[2]);
      result |= to_bits(i.kind ? flushed(y) : y) << 32 * h;
    }
    set_masked(t, i.out[0], result, known);
    return Next::STEP;
  };
}

void decode_paired(Compiler& c, const Opcode& op) {
  op.allow({"rn", "ftz"});
  Instruction& i = c.instruction;
  const bool fused = op.name == "fma";
  c.operation(fused ? 3 : 2, Type::B64, op);
  i.count = u8(fused ? 3 : 2);
  i.kind = op.has("ftz");
  if (fused)
    i.run = paired(FusedMultiplyAdd());
  else if (op.name == "add")
    i.run = paired([](float a, float b, float) { return a + b; });
  else if (op.name == "sub")
    i.run = paired([](float a, float b, float) { return a - b; });
  else if (op.name == "mul")
    i.run = paired([](float a, float b, float) { return a * b; });
}

// The larger, or smaller, of pairs of halves.
template <class F>
Handler of_halves(bool bfloat, F) {
  if (bfloat)
    return binary<u32>([](u32 a, u32 b) {
      auto one = [](u32 x, u32 y) { return u32(to_bfloat16(F{}(from_bfloat16(u16(x)), from_bfloat16(u16(y))))); };
      return one(a, b) | one(a >> 16, b >> 16) << 16;
    });
  return binary<u32>([](u32 a, u32 b) {
    auto one = [](u32 x, u32 y) { return u32(to_float16(F{}(from_float16(u16(x)), from_float16(u16(y))))); };
    return one(a, b) | one(a >> 16, b >> 16) << 16;
  });
}

template <class F>
void decode_extreme(Compiler& c, const Opcode& op, F f) {
  op.allow({"ftz", "NaN"});
  Instruction& i = c.instruction;
  const bool nan = op.has("NaN");
  if (op.type == Type::F32 && c.operands.size() == 4) {  // sm_100: of three
    c.operation(3, op.type, op);
    i.run = nan ? ternary<float>([](float a, float b, float x) {
      return a != a || b != b || x != x ? NOT_A_NUMBER : F{}(F{}(a, b), x);
    })
                : ternary<float>([](float a, float b, float x) { return F{}(F{}(a, b), x); });
    if (op.has("ftz")) op.unsupported();
    return;
  }
  c.operation(2, op.type, op);
  if (op.type == Type::F32)
    i.run = nan ? binary_float(op, [](float a, float b) { return a != a || b != b ? NOT_A_NUMBER : F{}(a, b); })
                : binary_float(op, f);
  else if (op.type == Type::F64 && !nan)
    i.run = binary<double>(f);
  else if ((op.type == Type::BF16X2 || op.type == Type::F16X2) && !nan)
    i.run = of_halves(op.type == Type::BF16X2, f);
}

// Divisions by what is beyond 2^126 are 0, or NaN of infinity.
float approximate_quotient(float a, float b) {
  if (std::fabs(b) > 0x1p126f && std::fabs(b) < INFINITY)
    return std::fabs(a) == INFINITY ? NOT_A_NUMBER : a != a ? a : 0.0f;
  return approximated(a / b, 2);
}

void decode_divide(Compiler& c, const Opcode& op) {
  op.allow({"rn", "approx", "full", "ftz"});
  c.operation(2, op.type, op);
  Handler& run = c.instruction.run;
  if (op.type == Type::F64)
    run = binary<double>([](double a, double b) { return a / b; });
  else if (op.type != Type::F32)
    run = nullptr;
  else if (op.has("approx"))
    run = binary_float(op, [](float a, float b) { return approximate_quotient(a, b); });
  else if (op.has("full"))
    run = binary_float(op, [](float a, float b) { return approximated(a / b, 2); });
  else
    run = binary_float(op, [](float a, float b) { return a / b; });
}

// Of the approximations for float64 hardware gives the upper half of the bits.
double upper_half(double x) { return std::bit_cast<double>(std::bit_cast<u64>(x) & 0xffffffff00000000ull); }

bool decode_function(Compiler& c, const Opcode& op) {
  const std::string& name = op.name;
  Handler& run = c.instruction.run;
  const bool wide = op.type == Type::F64, approx = op.has("approx");
  auto one = [&] {
    op.allow({"approx", "ftz", "rn"});
    c.operation(1, op.type, op);
  };
  if (name == "ex2") {
    one();
    run = unary_float(op, [](float a) { return approximated(float(std::exp2(double(a))), 2); });
  } else if (name == "lg2") {
    one();
    run = unary_float(op, [](float a) { return approximated(float(std::log2(double(a))), 2); });
  } else if (name == "sin") {
    one();
    run = unary_float(op, [](float a) { return std::sin(a); });
  } else if (name == "cos") {
    one();
    run = unary_float(op, [](float a) { return std::cos(a); });
  } else if (name == "tanh") {
    one();
    run = unary_float(op, [](float a) { return std::tanh(a); });
  } else if (name == "rcp") {
    one();
    if (wide)
      run = approx ? unary<double>([](double a) { return upper_half(1.0 / a); })
                   : unary<double>([](double a) { return 1.0 / a; });
    else
      run = approx ? unary_float(op, [](float a) { return approximated(1.0f / a, 1); })
                   : unary_float(op, [](float a) { return 1.0f / a; });
  } else if (name == "sqrt") {
    one();
    if (wide)
      run = unary<double>([](double a) { return std::sqrt(a); });
    else
      run = approx ? unary_float(op, [](float a) { return approximated(std::sqrt(a), 1); })
                   : unary_float(op, [](float a) { return std::sqrt(a); });
  } else if (name == "rsqrt") {
    one();
    run = wide ? unary<double>([](double a) { return upper_half(1.0 / std::sqrt(a)); })
               : unary_float(op, [](float a) { return approximated(float(1.0 / std::sqrt(double(a))), 1); });
  } else {
    return false;
  }
  return true;
}

void decode_sign(Compiler& c, const Opcode& op) {
  op.allow({"ftz"});
  c.operation(op.name == "copysign" ? 2 : 1, op.type, op);
  Handler& run = c.instruction.run;
  const bool wide = op.type == Type::F64;
  if (op.name == "copysign") {  // the sign of the first operand, the size of the second
    run = wide ? binary<double>([](double a, double b) { return std::copysign(b, a); })
               : binary_float(op, [](float a, float b) { return std::copysign(b, a); });
  } else if (op.name == "neg") {
    switch (op.type) {
      case Type::F64: run = unary<double>([](double a) { return -a; }); break;
      case Type::F32: run = unary_float(op, [](float a) { return -a; }); break;
      case Type::F16:
      case Type::BF16: run = unary<u16>([](u16 a) { return u16(a ^ 0x8000); }); break;
      default: run = unary<u32>([](u32 a) { return a ^ 0x80008000; });
    }
  } else {
    switch (op.type) {
      case Type::F64: run = unary<double>([](double a) { return std::fabs(a); }); break;
      case Type::F32: run = unary_float(op, [](float a) { return std::fabs(a); }); break;
      case Type::F16:
      case Type::BF16: run = unary<u16>([](u16 a) { return u16(a & 0x7fff); }); break;
      default: run = unary<u32>([](u32 a) { return a & 0x7fff7fff; });
    }
  }
}

}  // namespace

bool decode_float(Compiler& c, const Opcode& op) {
  const std::string& name = op.name;
  if (op.types.size() > 1) {
    decode_mixed(c, op);
  } else if (op.type == Type::F32X2) {
    decode_paired(c, op);
  } else if (name == "add") {
    decode_binary(c, op, Add());
  } else if (name == "sub") {
    decode_binary(c, op, Subtract());
  } else if (name == "mul") {
    decode_binary(c, op, Multiply());
  } else if (name == "fma") {
    decode_fma(c, op);
  } else if (name == "div") {
    decode_divide(c, op);
  } else if (name == "max") {
    decode_extreme(c, op, [](auto a, auto b) { return larger(a, b); });
  } else if (name == "min") {
    decode_extreme(c, op, [](auto a, auto b) { return smaller(a, b); });
  } else if (name == "neg" || name == "abs" || name == "copysign") {
    decode_sign(c, op);
  } else {
    return decode_function(c, op);
  }
  return true;
}

}  // namespace vgpu
