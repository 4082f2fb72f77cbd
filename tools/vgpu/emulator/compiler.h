// From a function's text to instructions: scopes, names, operands. What an instruction does, the decode_* functions say.
#pragma once

#include <initializer_list>
#include <optional>
#include <unordered_map>

#include "module.h"

namespace vgpu {

// The parts of an opcode: fma.rn.ftz.f32.
struct Opcode {
  std::string text, name;
  std::vector<std::string> modifiers;  // types among them
  std::vector<Type> types;
  Type type = Type::NONE;  // the first

  explicit Opcode(const std::string& text);
  bool has(const char* modifier) const;
  // An error where another modifier is there: what is not known is not run.
  void allow(std::initializer_list<const char*> modifiers) const;
  [[noreturn]] void unsupported() const;
};

// What a call's argument, result or .param variable occupies of a thread's scratch.
struct Place {
  int offset, bytes;
};

class Compiler {
 public:
  Compiler(Module& module, Function& function) : module_(module), function_(function) {}
  void compile(const std::string& name);

  // For the decoders, which fill in `instruction`.
  Instruction instruction;
  std::vector<std::string> operands;
  std::string label;  // of a branch

  int operand(const std::string& text, Type type);  // a register, or a constant
  int constant(u64 bits);
  void expect(size_t count, const Opcode& op) const;
  // out[0] from the first operand, in[0], in[1], ... from those after it.
  void operation(int inputs, Type type, const Opcode& op) { operation(inputs, type, type, op); }
  void operation(int inputs, Type out, Type in, const Opcode& op);
  // p|q: two results
  void pair(const std::string& text, Type first, Type second);
  // A predicate to read, and whether it is negated.
  std::pair<int, bool> predicate(const std::string& text);
  void address(const std::string& text, int& base, s64& offset);
  int address(const std::string& text);  // without an offset
  std::optional<u64> number(const std::string& text, Type type) const;
  static std::vector<std::string> elements(const std::string& text);              // {a, b}, or a alone
  std::optional<Place> parameter_variable(const std::string& text, s64& offset);  // [name+offset]

 private:
  struct Scope {
    int parent = -1;
    std::unordered_map<std::string, int> registers;
    struct Range {
      std::string prefix;
      int first, count;
    };
    std::vector<Range> ranges;
    std::unordered_map<std::string, int> labels;
    std::unordered_map<std::string, Place> parameters;
  };
  struct Branch {
    size_t instruction;
    int scope;
    std::string label;
  };
  struct Signature {
    std::vector<Place> parameters, results;
  };

  void body(const Module::Declaration& declaration);
  void declare(const std::string& statement);
  void statement(const std::string& text, int line);
  void call(const std::string& text, int line);
  void decode(const std::string& opcode);
  void append(const std::string& text, int line);
  int register_of(const std::string& name) const;
  std::optional<u64> symbol(const std::string& name) const;
  Place variable(const std::string& name) const;
  std::vector<Place> reserve(const std::string& parameters);
  void open_scope();
  template <class F>
  auto find(int scope, F look) const -> decltype(look(Scope()));

  Module& module_;
  Function& function_;
  std::vector<Scope> scopes_;
  int scope_ = -1;
  bool kernel_ = true;  // in the kernel's own body, whose parameters are the launch's
  std::vector<Branch> branches_;
  std::map<std::string, int> entries_, locals_, shared_;
  std::map<std::string, Signature> signatures_;
  std::vector<std::string> called_;   // functions, in the order of their bodies
  std::vector<std::string> callees_;  // by call
  std::unordered_map<u64, int> constants_;
};

// Each looks at one kind of instruction, and says whether it was one.
bool decode_memory(Compiler& c, const Opcode& op);
bool decode_control(Compiler& c, const Opcode& op);
bool decode_synchronize(Compiler& c, const Opcode& op);
bool decode_compare(Compiler& c, const Opcode& op);
bool decode_integer(Compiler& c, const Opcode& op);
bool decode_float(Compiler& c, const Opcode& op);
bool decode_convert(Compiler& c, const Opcode& op);

}  // namespace vgpu
