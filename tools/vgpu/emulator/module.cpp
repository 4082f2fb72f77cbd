// What a text declares; the bodies of its functions are compiler.cpp's.
#include "module.h"

#include <algorithm>

#include "compiler.h"

namespace vgpu {

Type type_of(const std::string& name) {
  static const std::map<std::string, Type> TYPES{
      {"u8", Type::U8},       {"s8", Type::S8},         {"b8", Type::B8},       {"u16", Type::U16},
      {"s16", Type::S16},     {"b16", Type::B16},       {"u32", Type::U32},     {"s32", Type::S32},
      {"b32", Type::B32},     {"u64", Type::U64},       {"s64", Type::S64},     {"b64", Type::B64},
      {"f16", Type::F16},     {"bf16", Type::BF16},     {"f32", Type::F32},     {"f64", Type::F64},
      {"f16x2", Type::F16X2}, {"bf16x2", Type::BF16X2}, {"f32x2", Type::F32X2}, {"pred", Type::PRED},
  };
  const auto found = TYPES.find(name);
  return found == TYPES.end() ? Type::NONE : found->second;
}

std::string trimmed(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\n\r");
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(" \t\n\r") - first + 1);
}

std::pair<std::string, std::string> first_word(const std::string& text) {
  const size_t end = text.find_first_of(" \t\n\r");
  if (end == std::string::npos) return {text, ""};
  return {text.substr(0, end), trimmed(text.substr(end))};
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (const char c : text) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (c == separator && depth == 0) {
      parts.push_back(trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trimmed(part).empty() || !parts.empty()) parts.push_back(trimmed(part));
  return parts;
}

namespace {

int align_in(const std::string& declaration, int otherwise) {
  const size_t at = declaration.find(".align");
  return at == std::string::npos ? otherwise : std::stoi(declaration.substr(at + 6));
}
int aligned(int offset, int align) { return (offset + align - 1) / align * align; }

// .param [.align n] .type [.ptr .space .align n] name[bytes]
Parameter parameter_of(const std::string& declaration) {
  Parameter p{"", "", 0, 0, 0};
  Type type = Type::NONE;
  bool pointer = false;
  auto [word, rest] = first_word(declaration);
  while (!rest.empty()) {
    std::tie(word, rest) = first_word(rest);
    if (word == ".align") {
      const int align = std::stoi(rest);
      std::tie(word, rest) = first_word(rest);
      if (!pointer) p.align = align;  // else it is that of what is pointed at
    } else if (word == ".ptr") {
      pointer = true;
    } else if (word[0] == '.' && type == Type::NONE && type_of(word.substr(1)) != Type::NONE) {
      p.type = word.substr(1);
      type = type_of(p.type);
    }
  }
  if (type == Type::NONE) throw Fault("parameter " + declaration);
  const size_t bracket = word.find('[');
  p.name = word.substr(0, bracket);
  p.size = bytes_of(type) * (bracket == std::string::npos ? 1 : std::stoi(word.substr(bracket + 1)));
  if (!p.align) p.align = bytes_of(type);
  return p;
}

// Without comments, and without the lines that only a debugger or an assembler reads; lines keep their numbers.
std::string stripped(const std::string& text) {
  std::string plain;
  for (size_t k = 0; k < text.size();) {
    if (text.compare(k, 2, "//") == 0) {
      while (k < text.size() && text[k] != '\n') ++k;
    } else if (text.compare(k, 2, "/*") == 0) {
      const size_t end = std::min(text.find("*/", k + 2), text.size());
      plain.append(size_t(std::count(text.begin() + std::ptrdiff_t(k), text.begin() + std::ptrdiff_t(end), '\n')),
                   '\n');
      k = end + 2;
    } else {
      plain += text[k++];
    }
  }
  static const char* const IGNORED[] = {".loc", ".file", ".version", ".target", ".address_size"};
  std::string out;
  for (size_t k = 0; k < plain.size();) {
    const size_t end = std::min(plain.find('\n', k), plain.size());
    const std::string line = plain.substr(k, end - k), word = first_word(trimmed(line)).first;
    k = end + 1;
    if (word == ".section") break;  // debug information, to the end
    if (std::none_of(std::begin(IGNORED), std::end(IGNORED), [&](const char* name) { return word == name; }))
      out += line;
    out += '\n';
  }
  return out;
}

}  // namespace

std::vector<Parameter> parameters_of(const std::string& list, int* bytes) {
  std::vector<Parameter> found;
  int offset = 0;
  for (const std::string& declaration : split(list, ',')) {
    if (declaration.empty()) continue;
    Parameter p = parameter_of(declaration);
    p.offset = aligned(offset, p.align);
    offset = p.offset + p.size;
    found.push_back(p);
  }
  if (bytes) *bytes = offset;
  return found;
}

Variable variable_of(const std::string& declaration) {
  const size_t bracket = declaration.find('[');
  if (bracket == std::string::npos || declaration.find(".b8") == std::string::npos)
    throw Fault("declaration " + declaration);
  const size_t name = declaration.find_last_of(" \t", bracket) + 1;
  const std::string bytes = trimmed(declaration.substr(bracket + 1, declaration.find(']', bracket) - bracket - 1));
  return {declaration.substr(name, bracket - name), bytes.empty() ? -1 : std::stoi(bytes), align_in(declaration, 8)};
}

Module::Module(const std::string& text) : text_(stripped(text)) {
  const std::string& t = text_;
  int line = 1;
  size_t counted = 0;
  for (size_t at = 0;;) {
    at = t.find_first_not_of(" \t\n\r", at);
    if (at == std::string::npos) return;
    // A declaration ends with ; or with the body of a function; the parameters' list holds neither.
    size_t end = at;
    for (int depth = 0; end < t.size() && !(depth == 0 && (t[end] == ';' || t[end] == '{')); ++end)
      depth += (t[end] == '(') - (t[end] == ')');
    const std::string head = t.substr(at, end - at);
    const bool function = head.find(".entry") != std::string::npos || head.find(".func") != std::string::npos;
    if (!function) {
      const size_t stop = t.find(';', end);
      if (stop == std::string::npos) throw Fault("declaration " + head);
      if (head.find(".shared") != std::string::npos) shared_.push_back(variable_of(head));
      at = stop + 1;
    } else if (end >= t.size() || t[end] == ';') {  // declared, and defined elsewhere
      at = end + 1;
    } else {
      size_t close = end + 1;
      for (int depth = 1; close < t.size() && depth; ++close) depth += (t[close] == '{') - (t[close] == '}');
      line += int(std::count(t.begin() + std::ptrdiff_t(counted), t.begin() + std::ptrdiff_t(end + 1), '\n'));
      counted = end + 1;
      declare(head, end + 1, close - 1, line);
      at = close;
    }
  }
}

// .visible .entry name(parameters) directives, .func (results) name(parameters)
void Module::declare(const std::string& head, size_t begin, size_t end, int line) {
  Declaration d{head.find(".entry") != std::string::npos, "", "", "", "", begin, end, line};
  std::string rest = trimmed(head.substr(head.find(d.kernel ? ".entry" : ".func") + (d.kernel ? 6 : 5)));
  if (rest[0] == '(') {
    const size_t close = rest.find(')');
    d.results = rest.substr(1, close - 1);
    rest = trimmed(rest.substr(close + 1));
  }
  const size_t open = rest.find('(');
  d.name = first_word(rest.substr(0, open)).first;
  if (open == std::string::npos) {
    d.directives = rest;
  } else {
    size_t close = open + 1;
    for (int depth = 1; close < rest.size() && depth; ++close) depth += (rest[close] == '(') - (rest[close] == ')');
    d.parameters = rest.substr(open + 1, close - open - 2);
    d.directives = rest.substr(close);
  }
  declarations_[d.name] = d;
}

std::vector<std::string> Module::kernels() const {
  std::vector<std::string> names;
  for (const auto& [name, d] : declarations_)
    if (d.kernel) names.push_back(name);
  return names;
}

const Module::Declaration& Module::declaration(const std::string& name) const {
  const auto found = declarations_.find(name);
  if (found == declarations_.end()) throw Fault("there is no function " + name);
  return found->second;
}

std::vector<Variable> Module::shared_in(const Declaration& declaration) const {
  std::vector<Variable> found;
  for (size_t at = declaration.begin; (at = text_.find(".shared", at)) < declaration.end; ++at) {
    const size_t before = text_.find_last_not_of(" \t\n\r", at - 1);
    if (!strchr(";{}", text_[before])) continue;  // within an instruction
    found.push_back(variable_of(text_.substr(at, text_.find(';', at) - at)));
  }
  return found;
}

Function& Module::kernel(const std::string& name) {
  auto& function = functions_[name];
  if (!function) {
    auto made = std::make_unique<Function>();
    Compiler(*this, *made).compile(name);
    function = std::move(made);
  }
  return *function;
}

}  // namespace vgpu
