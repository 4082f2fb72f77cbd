#include "compiler.h"

#include <algorithm>

#include "handlers.h"

namespace vgpu {

// ---- opcodes ---------------------------------------------------------------------------------------------------------

Opcode::Opcode(const std::string& opcode) : text(opcode), modifiers(split(opcode, '.')) {
  name = modifiers[0];
  modifiers.erase(modifiers.begin());
  for (const std::string& modifier : modifiers)
    if (type_of(modifier) != Type::NONE) types.push_back(type_of(modifier));
  if (!types.empty()) type = types[0];
}
bool Opcode::has(const char* modifier) const {
  return std::find(modifiers.begin(), modifiers.end(), modifier) != modifiers.end();
}
void Opcode::allow(std::initializer_list<const char*> allowed) const {
  for (const std::string& modifier : modifiers) {
    const bool known = std::any_of(allowed.begin(), allowed.end(), [&](const char* a) { return modifier == a; });
    if (!known && type_of(modifier) == Type::NONE) throw Fault("unknown modifier ." + modifier + " of " + text);
  }
}
void Opcode::unsupported() const { throw Fault("unsupported instruction " + text); }

// ---- names -----------------------------------------------------------------------------------------------------------

// What the innermost scope that knows something says; nothing where none does.
template <class F>
auto Compiler::find(int scope, F look) const -> decltype(look(Scope())) {
  for (; scope >= 0; scope = scopes_[size_t(scope)].parent)
    if (auto found = look(scopes_[size_t(scope)])) return found;
  return {};
}

int Compiler::register_of(const std::string& name) const {
  size_t digits = name.size();
  while (digits > 0 && isdigit(static_cast<unsigned char>(name[digits - 1]))) --digits;
  const auto found = find(scope_, [&](const Scope& scope) -> std::optional<int> {
    const auto own = scope.registers.find(name);
    if (own != scope.registers.end()) return own->second;
    if (digits == name.size()) return {};
    for (const Scope::Range& range : scope.ranges) {
      if (name.compare(0, digits, range.prefix) != 0) continue;
      const int index = std::stoi(name.substr(digits));
      if (index < range.count) return range.first + index;
    }
    return {};
  });
  return found.value_or(-1);
}

// The address of a variable or a parameter.
std::optional<u64> Compiler::symbol(const std::string& name) const {
  if (kernel_)
    for (const Parameter& p : function_.parameters)
      if (p.name == name) return PARAMETER_BASE + u64(p.offset);
  if (const auto local = locals_.find(name); local != locals_.end()) return LOCAL_BASE + u64(local->second);
  if (const auto shared = shared_.find(name); shared != shared_.end()) return u64(shared->second);
  return {};
}

Place Compiler::variable(const std::string& name) const {
  const auto found = find(scope_, [&](const Scope& scope) -> std::optional<Place> {
    const auto own = scope.parameters.find(name);
    if (own == scope.parameters.end()) return {};
    return own->second;
  });
  if (!found) throw Fault("unknown parameter " + name);
  return *found;
}

int Compiler::constant(u64 bits) {
  const auto [found, fresh] = constants_.try_emplace(bits, int(function_.constants.size()));
  if (fresh) {
    function_.constants.push_back(bits);
    function_.defined.push_back(0xff);
  }
  return ~found->second;
}

std::optional<u64> Compiler::number(const std::string& text, Type type) const {
  if (text.empty()) return {};
  auto prefixed = [&](char kind, size_t length) {
    return text.size() == length && text[0] == '0' && tolower(text[1]) == kind;
  };
  if (prefixed('f', 10)) {
    const u32 bits = u32(std::stoul(text.substr(2), nullptr, 16));
    return type == Type::F64 ? to_bits(double(std::bit_cast<float>(bits))) : bits;
  }
  if (prefixed('d', 18)) {
    const u64 bits = std::stoull(text.substr(2), nullptr, 16);
    return type == Type::F32 ? to_bits(float(std::bit_cast<double>(bits))) : bits;
  }
  const bool negative = text[0] == '-';
  std::string digits = negative || text[0] == '+' ? text.substr(1) : text;
  if (digits.empty() || !isdigit(static_cast<unsigned char>(digits[0]))) return {};
  if (digits.find('.') != std::string::npos) {
    const double x = std::stod(text);
    return type == Type::F64 ? to_bits(x) : to_bits(float(x));
  }
  while (digits.back() == 'U') digits.pop_back();
  const u64 x = std::stoull(digits, nullptr, 0);
  return negative ? u64(-s64(x)) : x;
}

// ---- operands --------------------------------------------------------------------------------------------------------

int Compiler::operand(const std::string& text, Type type) {
  if (text == "_") return function_.registers++;  // a result that nobody reads
  const int found = register_of(text);
  if (found >= 0) return found;
  if (const auto bits = number(text, type)) {
    const int bytes = bytes_of(type);
    return constant(type == Type::PRED || bytes == 8 ? *bits : *bits & ((u64(1) << 8 * bytes) - 1));
  }
  if (const auto address = symbol(text)) return constant(*address);
  throw Fault("unknown operand '" + text + "'");
}

void Compiler::expect(size_t count, const Opcode& op) const {
  if (operands.size() != count)
    throw Fault(op.text + " takes " + std::to_string(count) + " operands, not " + std::to_string(operands.size()));
}

void Compiler::operation(int inputs, Type out, Type in, const Opcode& op) {
  expect(size_t(inputs) + 1, op);
  instruction.out[0] = operand(operands[0], out);
  for (int k = 0; k < inputs; ++k) instruction.in[size_t(k)] = operand(operands[size_t(k) + 1], in);
}

void Compiler::pair(const std::string& text, Type first, Type second) {
  const size_t bar = text.find('|');
  instruction.out[0] = operand(trimmed(text.substr(0, bar)), first);
  instruction.count = bar == std::string::npos ? 1 : 2;
  if (instruction.count == 2) instruction.out[1] = operand(trimmed(text.substr(bar + 1)), second);
}

std::pair<int, bool> Compiler::predicate(const std::string& text) {
  const bool negated = text[0] == '!';
  return {operand(negated ? text.substr(1) : text, Type::PRED), negated};
}

std::vector<std::string> Compiler::elements(const std::string& text) {
  return text[0] == '{' ? split(text.substr(1, text.size() - 2), ',') : std::vector<std::string>{text};
}

namespace {

// [base+offset]
std::pair<std::string, std::string> address_parts(const std::string& text) {
  if (text.size() < 3 || text[0] != '[' || text.back() != ']') throw Fault("no address: " + text);
  const std::string inside = trimmed(text.substr(1, text.size() - 2));
  const size_t plus = inside.find('+', 1);
  if (plus == std::string::npos) return {inside, ""};
  return {trimmed(inside.substr(0, plus)), trimmed(inside.substr(plus + 1))};
}

}  // namespace

void Compiler::address(const std::string& text, int& base, s64& offset) {
  const auto [name, plus] = address_parts(text);
  offset = 0;
  if (!plus.empty()) {
    const auto bits = number(plus, Type::S64);
    if (!bits) throw Fault("offset of the address " + text);
    offset = s64(*bits);
  }
  base = operand(name, Type::U64);
}
int Compiler::address(const std::string& text) {
  int base = 0;
  s64 offset = 0;
  address(text, base, offset);
  if (offset) throw Fault("an offset that is not supported here: " + text);
  return base;
}

std::optional<Place> Compiler::parameter_variable(const std::string& text, s64& offset) {
  const auto [name, plus] = address_parts(text);
  offset = plus.empty() ? 0 : s64(number(plus, Type::S64).value_or(0));
  return find(scope_, [&name = name](const Scope& scope) -> std::optional<Place> {
    const auto own = scope.parameters.find(name);
    if (own == scope.parameters.end()) return {};
    return own->second;
  });
}

// ---- statements ------------------------------------------------------------------------------------------------------

void Compiler::append(const std::string& text, int line) {
  constexpr size_t LONGEST = 160;
  instruction.line = line;
  std::string shown = text.substr(0, LONGEST);
  std::replace_if(shown.begin(), shown.end(), [](char c) { return c == '\n' || c == '\t'; }, ' ');
  function_.code.push_back(instruction);
  function_.texts.push_back(shown);
}

void Compiler::decode(const std::string& opcode) {
  const Opcode op(opcode);
  for (auto* decoder : {decode_memory, decode_control, decode_synchronize, decode_compare, decode_convert,
                        decode_integer, decode_float})
    if (decoder(*this, op)) {
      if (!instruction.run) op.unsupported();
      return;
    }
  op.unsupported();
}

void Compiler::statement(const std::string& text, int line) {
  instruction = Instruction();
  label.clear();
  std::string rest = text;
  try {
    if (text[0] == '@') {
      std::string guard;
      std::tie(guard, rest) = first_word(text);
      std::tie(instruction.guard, instruction.negated) = predicate(guard.substr(1));
      if (instruction.guard < 0) throw Fault("a guard must be a register");
    }
    const auto [opcode, arguments] = first_word(rest);
    if (Opcode(opcode).name == "call") {
      if (instruction.guard >= 0) throw Fault("a predicated call");
      return call(arguments, line);
    }
    operands = split(arguments, ',');
    decode(opcode);
  } catch (const std::exception& error) {
    throw Fault(std::string(error.what()) + " at line " + std::to_string(line) + ": " + text);
  }
  if (!label.empty()) branches_.push_back({function_.code.size(), scope_, label});
  append(text, line);
}

std::vector<Place> Compiler::reserve(const std::string& parameters) {
  constexpr int ALIGN = 16;
  std::vector<Place> places;
  for (const Parameter& p : parameters_of(parameters)) {
    function_.scratch = (function_.scratch + ALIGN - 1) / ALIGN * ALIGN;
    places.push_back({function_.scratch, p.size});
    function_.scratch += p.size;
  }
  return places;
}

// (results), name, (arguments): a function's own parameters have one place, so there is no recursion.
void Compiler::call(const std::string& text, int line) {
  std::string name, results, arguments;
  for (const std::string& part : split(text, ',')) {
    if (part[0] == '(')
      (name.empty() ? results : arguments) = trimmed(part.substr(1, part.size() - 2));
    else
      name = part;
  }
  if (!signatures_.count(name)) {
    const Module::Declaration& declaration = module_.declaration(name);
    signatures_[name] = {reserve(declaration.parameters), reserve(declaration.results)};
    called_.push_back(name);
  }
  const Signature& signature = signatures_[name];
  const auto given = split(arguments, ','), taken = split(results, ',');
  if (given.size() != signature.parameters.size() || taken.size() != signature.results.size())
    throw Fault("the arguments of a call do not match " + name);
  Call call;
  for (size_t k = 0; k < given.size(); ++k)
    call.arguments.push_back(
        {variable(given[k]).offset, signature.parameters[k].offset, signature.parameters[k].bytes});
  for (size_t k = 0; k < taken.size(); ++k)
    call.results.push_back({signature.results[k].offset, variable(taken[k]).offset, signature.results[k].bytes});
  instruction.immediate = s64(function_.calls.size());
  function_.calls.push_back(call);
  callees_.push_back(name);
  instruction.run = vgpu::call;
  append("call " + text, line);
  instruction.run = after_call;
  append("after call " + text, line);
}

void Compiler::open_scope() {
  Scope inner;
  inner.parent = scope_;
  scope_ = int(scopes_.size());
  scopes_.push_back(inner);
}

void Compiler::declare(const std::string& statement) {
  const auto [directive, rest] = first_word(statement);
  Scope& scope = scopes_[size_t(scope_)];
  if (directive == ".reg") {
    for (const std::string& name : split(first_word(rest).second, ',')) {
      const size_t range = name.find('<');
      const int count = range == std::string::npos ? 1 : std::stoi(name.substr(range + 1));
      if (range == std::string::npos)
        scope.registers[name] = function_.registers;
      else
        scope.ranges.push_back({trimmed(name.substr(0, range)), function_.registers, count});
      function_.registers += count;
    }
  } else if (directive == ".param") {
    scope.parameters[parameters_of(statement)[0].name] = reserve(statement)[0];
  } else if (directive == ".local" || directive == ".shared") {
    const Variable v = variable_of(statement);
    if (directive == ".shared" && !kernel_) throw Fault("shared memory of a function that is called: " + v.name);
    int& bytes = directive == ".local" ? function_.local_bytes : function_.static_shared;
    bytes = (bytes + v.align - 1) / v.align * v.align;
    if (directive == ".local")
      locals_[v.name] = bytes;
    else
      shared_[v.name] = int(SHARED_BASE) + bytes;
    bytes += v.bytes;
  } else if (directive != ".pragma" && directive != ".loc") {
    throw Fault("unknown directive " + statement.substr(0, 60));
  }
}

void Compiler::body(const Module::Declaration& declaration) {
  const std::string& t = module_.text();
  int line = declaration.line;
  size_t counted = declaration.begin;
  auto line_at = [&](size_t at) {
    line += int(std::count(t.begin() + std::ptrdiff_t(counted), t.begin() + std::ptrdiff_t(at), '\n'));
    counted = at;
    return line;
  };
  auto of_name = [](char c) { return isalnum(static_cast<unsigned char>(c)) || strchr("_$%.", c); };
  scope_ = -1;
  open_scope();
  kernel_ = declaration.kernel;
  if (!kernel_) {
    const Signature& signature = signatures_[declaration.name];
    const auto parameters = parameters_of(declaration.parameters), results = parameters_of(declaration.results);
    for (size_t k = 0; k < parameters.size(); ++k)
      scopes_.back().parameters[parameters[k].name] = signature.parameters[k];
    for (size_t k = 0; k < results.size(); ++k) scopes_.back().parameters[results[k].name] = signature.results[k];
  }
  for (size_t at = declaration.begin;;) {
    at = t.find_first_not_of(" \t\n\r;", at);
    if (at >= declaration.end) break;
    if (t[at] == '{') {
      open_scope();
      ++at;
      continue;
    }
    if (t[at] == '}') {
      scope_ = scopes_[size_t(scope_)].parent;
      ++at;
      continue;
    }
    size_t name = at;
    while (name < declaration.end && of_name(t[name])) ++name;
    const size_t colon = t.find_first_not_of(" \t", name);
    if (name > at && t[colon] == ':' && t[colon + 1] != ':') {
      scopes_[size_t(scope_)].labels[t.substr(at, name - at)] = int(function_.code.size());
      at = colon + 1;
      continue;
    }
    size_t end = at;
    for (bool quoted = false; end < declaration.end && (t[end] != ';' || quoted); ++end) quoted ^= t[end] == '"';
    const std::string text = trimmed(t.substr(at, end - at));
    if (text[0] == '.')
      declare(text);
    else
      statement(text, line_at(at));
    at = end + 1;
  }
  instruction = Instruction();
  instruction.run = give_back;
  append("(end of " + declaration.name + ")", line);
}

void Compiler::compile(const std::string& name) {
  const Module::Declaration& kernel = module_.declaration(name);
  Function& f = function_;
  f.name = name;
  f.parameters = parameters_of(kernel.parameters, &f.parameter_bytes);
  auto directive = [&](const char* what) {
    const size_t at = kernel.directives.find(what);
    return at == std::string::npos ? 0 : std::stoi(kernel.directives.substr(at + strlen(what)));
  };
  f.most_threads = directive(".maxntid");
  f.required_threads = directive(".reqntid");
  for (const Variable& v : module_.shared()) {
    if (v.bytes < 0) continue;
    f.static_shared = (f.static_shared + v.align - 1) / v.align * v.align;
    shared_[v.name] = int(SHARED_BASE) + f.static_shared;
    f.static_shared += v.bytes;
  }
  // What the launch asks for lies behind all of that, and behind what the body declares.
  int before = f.static_shared;
  for (const Variable& v : module_.shared_in(kernel)) before = (before + v.align - 1) / v.align * v.align + v.bytes;
  for (const Variable& v : module_.shared()) {
    if (v.bytes >= 0) continue;
    f.dynamic_align = std::max(f.dynamic_align, v.align);
    shared_[v.name] = int(SHARED_BASE) + (before + v.align - 1) / v.align * v.align;
  }
  body(kernel);
  for (size_t k = 0; k < called_.size(); ++k) {  // bodies call others
    const std::string function = called_[k];
    entries_[function] = int(f.code.size());
    body(module_.declaration(function));
  }
  for (const Branch& branch : branches_) {
    const auto target = find(branch.scope, [&](const Scope& scope) -> std::optional<int> {
      const auto own = scope.labels.find(branch.label);
      if (own == scope.labels.end()) return {};
      return own->second;
    });
    if (!target) throw Fault("unknown label " + branch.label);
    f.code[branch.instruction].target = *target;
  }
  for (size_t k = 0; k < f.calls.size(); ++k) f.calls[k].entry = entries_.at(callees_[k]);
  f.scratch += 16;
  f.hits.assign(f.code.size(), 0);
}

}  // namespace vgpu
