// A text of PTX, and the functions that are made of it.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "machine.h"

namespace vgpu {

// Parts at a separator that is in no brackets; without the space around them.
std::vector<std::string> split(const std::string& text, char separator);
std::string trimmed(const std::string& text);
// The end of the first word, and what follows it.
std::pair<std::string, std::string> first_word(const std::string& text);
// The parameters of a list in the order of their offsets, and how many bytes they take.
std::vector<Parameter> parameters_of(const std::string& list, int* bytes = nullptr);

// .shared .align 16 .b8 name[64]
struct Variable {
  std::string name;
  int bytes, align;  // bytes -1: as many as the launch says
};
Variable variable_of(const std::string& declaration);

class Module {
 public:
  explicit Module(const std::string& text);

  struct Declaration {
    bool kernel;
    std::string name, parameters, results, directives;
    size_t begin, end;  // of its body
    int line;
  };

  std::vector<std::string> kernels() const;
  Function& kernel(const std::string& name);  // compiled when first asked for

  const Declaration& declaration(const std::string& name) const;
  const std::string& text() const { return text_; }
  const std::vector<Variable>& shared() const { return shared_; }
  std::vector<Variable> shared_in(const Declaration& declaration) const;  // what its body declares

 private:
  void declare(const std::string& head, size_t begin, size_t end, int line);

  std::string text_;
  std::map<std::string, Declaration> declarations_;
  std::map<std::string, std::unique_ptr<Function>> functions_;
  std::vector<Variable> shared_;
};

}  // namespace vgpu
