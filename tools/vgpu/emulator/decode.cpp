// Which handler an instruction has, and where its operands go: all but arithmetic.
#include "compiler.h"
#include "handlers.h"

namespace vgpu {

namespace {

Type unsigned_of(int bytes) {
  return bytes == 8 ? Type::B64 : bytes == 4 ? Type::B32 : bytes == 2 ? Type::B16 : Type::B8;
}

int vector_of(const Opcode& op) { return op.has("v2") ? 2 : op.has("v4") ? 4 : 1; }

enum class Space { GLOBAL, SHARED, CLUSTER, LOCAL, PARAMETER, GENERIC };
Space space_of(const Opcode& op) {
  if (op.has("global")) return Space::GLOBAL;
  if (op.has("shared::cluster")) return Space::CLUSTER;
  if (op.has("shared") || op.has("shared::cta")) return Space::SHARED;
  if (op.has("local")) return Space::LOCAL;
  return op.has("param") ? Space::PARAMETER : Space::GENERIC;
}

void decode_load(Compiler& c, const Opcode& op) {
  op.allow({"global", "shared", "shared::cta", "shared::cluster", "param", "local", "v2", "v4", "volatile", "relaxed",
            "nc", "L1::no_allocate", "L1::evict_first", "L1::evict_last", "L1::evict_normal", "ca", "cg", "cs",
            "L2::cache_hint"});
  if (op.has("L2::cache_hint")) c.operands.resize(2);
  c.expect(2, op);
  Instruction& i = c.instruction;
  i.count = u8(vector_of(op));
  i.bytes = u8(bytes_of(op.type));
  i.extend = is_signed(op.type);
  const auto out = Compiler::elements(c.operands[0]);
  if (out.size() != i.count) throw Fault("vector width of " + op.text);
  for (size_t k = 0; k < out.size(); ++k) i.out[k] = c.operand(out[k], op.type);
  const Space space = space_of(op);
  if (space == Space::PARAMETER) {
    if (const auto place = c.parameter_variable(c.operands[1], i.immediate)) {
      i.in[0] = c.constant(u64(place->offset));
      i.run = load_scratch;
      return;
    }
  }
  c.address(c.operands[1], i.in[0], i.immediate);
  i.kind = space == Space::CLUSTER;
  switch (space) {
    case Space::GLOBAL: i.run = load_global; break;
    case Space::SHARED:
    case Space::CLUSTER: i.run = load_shared; break;
    case Space::LOCAL: i.run = load_local; break;
    case Space::PARAMETER: i.run = load_parameter; break;
    case Space::GENERIC: i.run = load_generic;
  }
}

void decode_addition(Compiler& c, const Opcode& op) {
  Instruction& i = c.instruction;
  i.bytes = 4;
  i.out[0] = c.operand(c.operands[0], op.type);
  c.address(c.operands[1], i.in[0], i.immediate);
  if (op.has("acquire") || op.has("acq_rel")) i.kind |= ACQUIRES;
  if (op.has("release") || op.has("acq_rel")) i.kind |= RELEASES;
  i.run = add_global;
}

void decode_async_store(Compiler& c, const Opcode& op) {
  op.allow({"async", "weak", "shared::cluster", "mbarrier::complete_tx::bytes"});
  if (!op.has("mbarrier::complete_tx::bytes")) op.unsupported();
  c.expect(3, op);
  Instruction& i = c.instruction;
  i.bytes = u8(bytes_of(op.type));
  c.address(c.operands[0], i.in[0], i.immediate);
  i.in[1] = c.operand(c.operands[1], op.type);
  i.in[2] = c.address(c.operands[2]);
  i.run = async_store;
}

void decode_store(Compiler& c, const Opcode& op) {
  if (op.has("async")) return decode_async_store(c, op);
  op.allow({"global", "shared", "shared::cta", "shared::cluster", "param", "local", "v2", "v4", "volatile", "relaxed",
            "L1::no_allocate", "L1::evict_first", "L1::evict_last", "L1::evict_normal", "wb", "cg", "cs"});
  c.expect(2, op);
  Instruction& i = c.instruction;
  i.count = u8(vector_of(op));
  i.bytes = u8(bytes_of(op.type));
  const auto in = Compiler::elements(c.operands[1]);
  if (in.size() != i.count) throw Fault("vector width of " + op.text);
  for (size_t k = 0; k < in.size(); ++k) i.in[1 + k] = c.operand(in[k], op.type);
  const Space space = space_of(op);
  if (space == Space::PARAMETER) {
    const auto place = c.parameter_variable(c.operands[0], i.immediate);
    if (!place) throw Fault("unknown parameter " + c.operands[0]);
    i.in[0] = c.constant(u64(place->offset));
    i.run = store_scratch;
    return;
  }
  c.address(c.operands[0], i.in[0], i.immediate);
  i.kind = space == Space::CLUSTER;
  switch (space) {
    case Space::GLOBAL: i.run = store_global; break;
    case Space::SHARED:
    case Space::CLUSTER: i.run = store_shared; break;
    case Space::LOCAL: i.run = store_local; break;
    default: i.run = store_generic;
  }
}

Next move(Thread& t, const Instruction& i) {
  set_masked(t, i.out[0], value(t, i.in[0]), mask(t, i.in[0]));
  return Next::STEP;
}
// mov.b32 %r, {%a, %b}
Next pack(Thread& t, const Instruction& i) {
  u64 bits = 0;
  u8 known = u8(~bytes_mask(i.count * i.bytes));
  for (int e = 0; e < i.count; ++e) {
    const u64 element = value(t, i.in[size_t(e)]) & ((u64(1) << 8 * i.bytes) - 1);
    bits |= element << (8 * i.bytes * e);
    known |= u8((mask(t, i.in[size_t(e)]) & bytes_mask(i.bytes)) << (i.bytes * e));
  }
  set_masked(t, i.out[0], bits, known);
  return Next::STEP;
}
Next unpack(Thread& t, const Instruction& i) {
  const u64 bits = value(t, i.in[0]);
  const u8 known = mask(t, i.in[0]), element = bytes_mask(i.bytes);
  for (int e = 0; e < i.count; ++e)
    set_masked(t, i.out[size_t(e)], bits >> (8 * i.bytes * e) & ((u64(1) << 8 * i.bytes) - 1),
               u8((known >> (i.bytes * e) & element) | u8(~element)));
  return Next::STEP;
}

void decode_move(Compiler& c, const Opcode& op) {
  c.expect(2, op);
  op.allow({});
  Instruction& i = c.instruction;
  const std::string &to = c.operands[0], &from = c.operands[1];
  const bool packs = from[0] == '{';
  if (packs || to[0] == '{') {
    const auto parts = Compiler::elements(packs ? from : to);
    if (parts.size() > i.out.size()) op.unsupported();
    i.count = u8(parts.size());
    i.bytes = u8(bytes_of(op.type) / int(parts.size()));
    auto& elements = i.out;
    for (size_t k = 0; k < parts.size(); ++k) {
      const int operand = c.operand(parts[k], unsigned_of(i.bytes));
      if (packs)
        i.in[k] = operand;
      else
        elements[k] = operand;
    }
    if (packs)
      i.out[0] = c.operand(to, op.type);
    else
      i.in[0] = c.operand(from, op.type);
    i.run = packs ? pack : unpack;
    return;
  }
  i.out[0] = c.operand(to, op.type);
  const int special = special_register_of(from);
  if (special >= 0) {
    i.kind = u8(special);
    i.run = special_register;
    return;
  }
  i.in[0] = c.operand(from, op.type);
  i.run = move;
}

void decode_async_copy(Compiler& c, const Opcode& op) {
  Instruction& i = c.instruction;
  if (op.has("bulk")) {
    if (op.text != "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes") op.unsupported();
    c.expect(4, op);
    c.address(c.operands[0], i.in[0], i.immediate);
    i.in[1] = c.address(c.operands[1]);
    i.in[2] = c.operand(c.operands[2], Type::U32);
    i.in[3] = c.address(c.operands[3]);
    i.run = bulk_copy;
  } else if (op.has("mbarrier")) {
    if (!op.has("noinc")) op.unsupported();
    c.expect(1, op);
    c.address(c.operands[0], i.in[0], i.immediate);
    i.run = async_copy_arrive;
  } else if (op.has("cg") || op.has("ca")) {
    if (c.operands.size() < 3 || c.operands.size() > 4) op.unsupported();
    c.address(c.operands[0], i.in[0], i.immediate);
    c.address(c.operands[1], i.in[1], i.offset);
    const auto bytes = c.number(c.operands[2], Type::U32);
    if (!bytes || (*bytes != 4 && *bytes != 8 && *bytes != 16) || (op.has("cg") && *bytes != 16)) op.unsupported();
    i.bytes = u8(*bytes);
    i.count = u8(c.operands.size() - 2);
    if (i.count > 1) i.in[2] = c.operand(c.operands[3], Type::U32);
    i.run = async_copy;
  }
}

}  // namespace

bool decode_memory(Compiler& c, const Opcode& op) {
  Instruction& i = c.instruction;
  if (op.name == "mov") {
    decode_move(c, op);
  } else if (op.name == "cvta") {
    // Addresses of global and local memory are generic ones as they are; a generic address of shared memory is not known.
    op.allow({"to", "global", "local"});
    if (!op.has("global") && !op.has("local")) op.unsupported();
    c.operation(1, Type::U64, op);
    i.run = move;
  } else if (op.name == "ld" && op.has("acquire")) {  // of a counter: it adds nothing
    op.allow({"global", "acquire", "gpu"});
    if (!op.has("gpu") || bytes_of(op.type) != 4) op.unsupported();
    c.expect(2, op);
    decode_addition(c, op);
    i.in[1] = c.constant(0);
  } else if (op.name == "ld" || op.name == "ldu") {
    decode_load(c, op);
  } else if (op.name == "st") {
    decode_store(c, op);
  } else if (op.name == "atom") {
    op.allow({"global", "add", "relaxed", "acquire", "release", "acq_rel", "gpu"});
    if (!op.has("add") || op.type != Type::U32) op.unsupported();
    c.expect(3, op);
    decode_addition(c, op);
    i.in[1] = c.operand(c.operands[2], op.type);
  } else if (op.name == "cp" && op.has("async")) {
    decode_async_copy(c, op);
  } else if (op.name == "mapa") {
    if (op.text != "mapa.shared::cluster.u32") op.unsupported();
    c.operation(2, Type::U32, op);
    i.run = map_address;
  } else {
    return false;
  }
  return true;
}

bool decode_control(Compiler& c, const Opcode& op) {
  Instruction& i = c.instruction;
  if (op.name == "bra") {
    op.allow({"uni"});
    c.expect(1, op);
    c.label = c.operands[0];
    i.run = jump;
  } else if (op.name == "ret") {
    i.run = give_back;
  } else if (op.name == "exit") {
    i.run = leave;
  } else if (op.name == "trap") {
    i.run = trap;
  } else {
    return false;
  }
  return true;
}

// ---- synchronization -------------------------------------------------------------------------------------------------

namespace {

u8 chosen(const Opcode& op, std::initializer_list<std::pair<const char*, int>> choices) {
  for (const auto& [name, number] : choices)
    if (op.has(name)) return u8(number);
  op.unsupported();
}

void decode_collective(Compiler& c, const Opcode& op, Collective kind) {
  Instruction& i = c.instruction;
  i.kind = u8(kind);
  i.run = collective;
  if (!op.has("sync")) op.unsupported();
  c.expect(kind == SHUFFLE ? 5 : kind == WARP_BARRIER ? 1 : kind == ELECT ? 2 : 3, op);
  i.mask = c.operand(c.operands.back(), Type::B32);
  switch (kind) {
    case SHUFFLE:
      op.allow({"sync", "bfly", "idx", "up", "down"});
      i.variant = chosen(op, {{"bfly", BUTTERFLY}, {"idx", INDEX}, {"up", UP}, {"down", DOWN}});
      c.pair(c.operands[0], Type::B32, Type::PRED);
      for (size_t k = 0; k < 3; ++k) i.in[k] = c.operand(c.operands[1 + k], Type::B32);
      break;
    case REDUCE: {
      op.allow({"sync", "add", "min", "max", "and", "or", "xor", "NaN"});
      const bool real = op.type == Type::F32, sign = op.type == Type::S32, nan = op.has("NaN");
      if (real)
        i.variant = chosen(op, {{"min", nan ? MIN_NAN : MIN_F}, {"max", nan ? MAX_NAN : MAX_F}});
      else
        i.variant = chosen(op, {{"add", ADD},
                                {"min", sign ? MIN_S : MIN_U},
                                {"max", sign ? MAX_S : MAX_U},
                                {"and", AND},
                                {"or", OR},
                                {"xor", XOR}});
      i.out[0] = c.operand(c.operands[0], Type::B32);
      i.in[0] = c.operand(c.operands[1], Type::B32);
      break;
    }
    case VOTE: {
      op.allow({"sync", "ballot", "any", "all", "uni"});
      i.variant = chosen(op, {{"ballot", BALLOT}, {"any", ANY}, {"all", ALL}, {"uni", UNIFORM}});
      i.out[0] = c.operand(c.operands[0], i.variant == BALLOT ? Type::B32 : Type::PRED);
      const auto [predicate, negated] = c.predicate(c.operands[1]);
      i.in[0] = predicate;
      i.immediate = negated;
      break;
    }
    case ELECT: c.pair(c.operands[0], Type::B32, Type::PRED); break;
    default: break;
  }
}

void decode_matrix(Compiler& c, const Opcode& op) {
  op.allow({"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta"});
  if (!op.has("m8n8") || op.type != Type::B16) op.unsupported();
  c.expect(2, op);
  Instruction& i = c.instruction;
  const bool load = op.name == "ldmatrix";
  i.kind = u8(load ? LOAD_MATRIX : STORE_MATRIX);
  i.variant = op.has("trans");
  i.count = u8(op.has("x4") ? 4 : op.has("x2") ? 2 : 1);
  const auto elements = Compiler::elements(c.operands[load ? 0 : 1]);
  if (elements.size() != i.count) throw Fault("vector width of " + op.text);
  c.address(c.operands[load ? 1 : 0], i.in[0], i.immediate);
  for (size_t k = 0; k < elements.size(); ++k) (load ? i.out[k] : i.in[1 + k]) = c.operand(elements[k], Type::B32);
  i.mask = c.constant(0xffffffffu);
  i.run = collective;
}

void decode_barrier(Compiler& c, const Opcode& op) {
  Instruction& i = c.instruction;
  if (op.has("cluster")) {
    op.allow({"cluster", "arrive", "wait", "release", "acquire", "aligned"});
    i.run = op.has("arrive") ? cluster_arrive : cluster_wait;
    return;
  }
  op.allow({"sync", "cta", "aligned"});
  if (!op.has("sync") || c.operands.empty() || c.operands.size() > 2) op.unsupported();
  i.count = u8(c.operands.size());
  for (size_t k = 0; k < c.operands.size(); ++k) i.in[k] = c.operand(c.operands[k], Type::U32);
  i.run = block_barrier;
}

void decode_mbarrier(Compiler& c, const Opcode& op) {
  op.allow({"init", "arrive", "expect_tx", "try_wait", "test_wait", "parity", "shared", "shared::cta",
            "shared::cluster", "release", "acquire", "cta", "cluster"});
  Instruction& i = c.instruction;
  i.kind = op.has("shared::cluster");
  if (op.has("init")) {
    c.expect(2, op);
    c.address(c.operands[0], i.in[0], i.immediate);
    i.in[1] = c.operand(c.operands[1], Type::U32);
    i.run = barrier_init;
    return;
  }
  const bool arrive = op.has("arrive"), expect = op.has("expect_tx");
  if (!arrive && !(op.has("parity") && (op.has("try_wait") || op.has("test_wait")))) op.unsupported();
  c.expect(arrive && !expect ? 2 : 3, op);
  c.address(c.operands[1], i.in[0], i.immediate);
  if (arrive) {
    if (c.operands[0] != "_") op.unsupported();  // the state that it returns
    if (expect) i.in[1] = c.operand(c.operands[2], Type::U32);
    i.run = expect ? barrier_expect : barrier_arrive;
  } else {
    i.out[0] = c.operand(c.operands[0], Type::PRED);
    i.in[1] = c.operand(c.operands[2], Type::U32);
    i.run = barrier_wait;
  }
}

}  // namespace

bool decode_synchronize(Compiler& c, const Opcode& op) {
  Instruction& i = c.instruction;
  if (op.name == "shfl") {
    decode_collective(c, op, SHUFFLE);
  } else if (op.name == "redux") {
    decode_collective(c, op, REDUCE);
  } else if (op.name == "vote") {
    decode_collective(c, op, VOTE);
  } else if (op.name == "elect") {
    decode_collective(c, op, ELECT);
  } else if (op.name == "bar" && op.has("warp")) {
    decode_collective(c, op, WARP_BARRIER);
  } else if (op.name == "ldmatrix" || op.name == "stmatrix") {
    decode_matrix(c, op);
  } else if (op.name == "bar" || op.name == "barrier") {
    decode_barrier(c, op);
  } else if (op.name == "mbarrier") {
    decode_mbarrier(c, op);
  } else if (op.name == "fence" || op.name == "membar") {
    if (op.has("mbarrier_init"))
      i.run = fence_init;
    else if (op.has("proxy"))
      i.run = op.text.find("async") != std::string::npos ? fence_proxy : nullptr;
    else
      i.run = op.has("gl") || op.has("gpu") || op.has("sys") ? device_fence : nothing;  // memory is coherent here
  } else {
    return false;
  }
  return true;
}

// ---- comparisons -----------------------------------------------------------------------------------------------------

namespace {

enum Comparison : u8 { EQ, NE, LT, LE, GT, GE, UNORDERED = 8, NUM = 16, IS_NAN = 17 };
enum Combine : u8 { NOTHING, WITH_AND, WITH_OR, WITH_XOR };

template <class T>
bool compare(int how, T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    const bool nan = a != a || b != b;
    if (how == NUM) return !nan;
    if (how == IS_NAN) return nan;
    if (nan) return how & UNORDERED;
  }
  switch (how & 7) {
    case EQ: return a == b;
    case NE: return a != b;
    case LT: return a < b;
    case LE: return a <= b;
    case GT: return a > b;
    default: return a >= b;
  }
}

// The second predicate of setp p|q is that of the opposite, combined alike.
void conclude(Thread& t, const Instruction& i, bool p, bool known) {
  bool q = !p;
  if (i.variant != NOTHING) {
    const bool other = (value(t, i.in[2]) & 1) != u64(i.immediate);
    known &= defined(t, i.in[2]);
    auto combined = [&](bool x) {
      return i.variant == WITH_AND ? x && other : i.variant == WITH_OR ? x || other : x != other;
    };
    p = combined(p);
    q = combined(q);
  }
  set(t, i.out[0], p, known);
  if (i.count > 1) set(t, i.out[1], q, known);
}

template <class T, class Read>
Next set_predicate(Thread& t, const Instruction& i, Read read) {
  const T a = read(t, i.in[0]), b = read(t, i.in[1]);
  conclude(t, i, compare(i.kind, a, b), defined(t, i.in[0]) && defined(t, i.in[1]));
  return Next::STEP;
}
template <class T>
Handler compare_as() {
  return [](Thread& t, const Instruction& i) {
    return set_predicate<T>(t, i, [](Thread& t, int o) { return get<T>(t, o); });
  };
}

// Of pairs: one predicate for each.
Next compare_halves(Thread& t, const Instruction& i) {
  const auto read = i.extend ? from_bfloat16 : from_float16;
  const u32 a = u32(value(t, i.in[0])), b = u32(value(t, i.in[1]));
  const u8 known = mask(t, i.in[0]) & mask(t, i.in[1]);
  for (int h = 0; h < 2; ++h)
    set(t, i.out[size_t(h)], compare(i.kind, read(u16(a >> 16 * h)), read(u16(b >> 16 * h))),
        (known >> 2 * h & 3) == 3);
  return Next::STEP;
}

Handler comparison_of(const Opcode& op) {
  switch (op.type) {
    case Type::U16:
    case Type::B16: return compare_as<u16>();
    case Type::S16: return compare_as<s16>();
    case Type::U32:
    case Type::B32: return compare_as<u32>();
    case Type::S32: return compare_as<s32>();
    case Type::U64:
    case Type::B64: return compare_as<u64>();
    case Type::S64: return compare_as<s64>();
    case Type::F64: return compare_as<double>();
    case Type::F32:
      if (!op.has("ftz")) return compare_as<float>();
      return [](Thread& t, const Instruction& i) {
        return set_predicate<float>(t, i, [](Thread& t, int o) { return flushed(get<float>(t, o)); });
      };
    case Type::BF16:
      return [](Thread& t, const Instruction& i) {
        return set_predicate<float>(t, i, [](Thread& t, int o) { return from_bfloat16(get<u16>(t, o)); });
      };
    case Type::F16:
      return [](Thread& t, const Instruction& i) {
        return set_predicate<float>(t, i, [](Thread& t, int o) { return from_float16(get<u16>(t, o)); });
      };
    case Type::BF16X2:
    case Type::F16X2: return compare_halves;
    default: op.unsupported();
  }
}

Next select(Thread& t, const Instruction& i) {
  const int from = value(t, i.in[2]) & 1 ? i.in[0] : i.in[1];
  set_masked(t, i.out[0], value(t, from), defined(t, i.in[2]) ? mask(t, from) : 0);
  return Next::STEP;
}

void decode_set_predicate(Compiler& c, const Opcode& op) {
  static const std::map<std::string, int> HOW{
      {"eq", EQ},
      {"ne", NE},
      {"lt", LT},
      {"le", LE},
      {"gt", GT},
      {"ge", GE},
      {"lo", LT},
      {"ls", LE},
      {"hi", GT},
      {"hs", GE},
      {"equ", EQ | UNORDERED},
      {"neu", NE | UNORDERED},
      {"ltu", LT | UNORDERED},
      {"leu", LE | UNORDERED},
      {"gtu", GT | UNORDERED},
      {"geu", GE | UNORDERED},
      {"num", NUM},
      {"nan", IS_NAN},
  };
  Instruction& i = c.instruction;
  const auto how = op.modifiers.empty() ? HOW.end() : HOW.find(op.modifiers[0]);
  if (how == HOW.end()) op.unsupported();
  op.allow({how->first.c_str(), "and", "or", "xor", "ftz"});
  i.kind = u8(how->second);
  i.variant = op.has("and") ? WITH_AND : op.has("or") ? WITH_OR : op.has("xor") ? WITH_XOR : NOTHING;
  c.expect(i.variant ? 4 : 3, op);
  c.pair(c.operands[0], Type::PRED, Type::PRED);
  i.in[0] = c.operand(c.operands[1], op.type);
  i.in[1] = c.operand(c.operands[2], op.type);
  if (i.variant) {
    const auto [predicate, negated] = c.predicate(c.operands[3]);
    i.in[2] = predicate;
    i.immediate = negated;
  }
  i.run = comparison_of(op);
  if (i.run == compare_halves) {
    if (i.count != 2 || i.variant) op.unsupported();
    i.extend = op.type == Type::BF16X2;
  }
}

}  // namespace

bool decode_compare(Compiler& c, const Opcode& op) {
  if (op.name == "setp") {
    decode_set_predicate(c, op);
  } else if (op.name == "selp") {
    c.operation(3, op.type, op);
    c.instruction.in[2] = c.predicate(c.operands[3]).first;
    c.instruction.run = select;
  } else {
    return false;
  }
  return true;
}

}  // namespace vgpu
