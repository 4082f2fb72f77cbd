// What a plain call is, what decides what it computes, and what Python has made of such a call.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <unordered_map>
#include <vector>

#include "../numbering.h"
#include "../schemas.h"

namespace mlkernels {

using at::Tensor;

constexpr int INPUT = SLOTS;  // the bit of `needs` that stands for the logits, or a linear head's features
constexpr int WEIGHT_BIT = INPUT + 1, BIAS_BIT = INPUT + 2;

// Of mlkernels/fast_path.py.
inline PyObject *describe, *resolve, *backward;
// Of mlkernels/linear: the type of logits that are a product, its attribute `plain` and its method that takes RowStats,
// and what its backward leaves.
inline PyObject *linear_type, *plain_name, *take_stats, *linear_backward;
// The names and the defaults of the shared arguments: these three, then EXTRAS; null where it is passed apart.
enum Option { IGNORED, REDUCED, BACKEND, EXTRA };
constexpr const char* OTHERS[] = {"ignore_index", "reduction", "backend"};
constexpr size_t OPTIONS = EXTRA + std::size(EXTRAS);
inline std::array<PyObject*, OPTIONS> names, defaults;
inline std::array<PyObject*, 3> reductions;
// Also where it was read from a file, and is another object.
inline bool is_word(PyObject* given, PyObject* word) {
  return given == word || (PyUnicode_CheckExact(given) && PyUnicode_Compare(given, word) == 0);
}
inline PyObject* cpu;                                     // the backend's name
inline c10::DispatchKeySet ordinary, ordinary_inference;  // the keys of a tensor of which there is nothing to say

// ---- what is plain ---------------------------------------------------------------------------------------------------

// Whether nobody traces, batches, casts or differentiates forward on this thread.
inline bool unwatched() {
  const auto here = c10::impl::tls_local_dispatch_key_set();
  c10::DispatchKeySet included = c10::default_included_set, excluded = c10::default_excluded_set;
  if (c10::InferenceMode::is_enabled()) {
    included = included.remove(c10::DispatchKey::ADInplaceOrView);
    excluded = excluded | c10::autograd_dispatch_keyset;
  }
  c10::DispatchKeySet without = here.excluded_;
#if __has_include(<ATen/core/NamedTensor.h>)
  without = without.remove(c10::DispatchKey::Named);  // torch 2.11 excludes it in every backward
#endif
  return here.included_ == included && without == excluded && at::impl::PythonTorchFunctionTLS::stack_len() == 0 &&
         !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

inline bool is_plain(const Tensor& tensor) {
  const c10::DispatchKeySet keys = tensor.unsafeGetTensorImpl()->key_set();
  return keys == ordinary || keys == ordinary_inference;
}

// A dense CPU tensor that is no subclass; null: something else.
inline const Tensor* tensor_of(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& tensor = THPVariable_Unpack(object);
  return is_plain(tensor) ? &tensor : nullptr;
}

inline bool is_real(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
}

inline bool is_half(const Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
}

// Of a dtype that the kernels read.
inline bool is_index(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  return type == at::kLong || type == at::kInt || type == at::kShort || type == at::kChar || type == at::kByte;
}

// A number as a key has it, NaN for None.
inline bool number_of(PyObject* object, double& number) {
  if (PyFloat_CheckExact(object)) {
    number = PyFloat_AS_DOUBLE(object);
    return number == number;
  }
  if (PyLong_CheckExact(object)) {
    int overflow;
    const long long integer = PyLong_AsLongLongAndOverflow(object, &overflow);
    number = double(integer);
    return !overflow && std::abs(integer) <= (1LL << 53);
  }
  number = std::numeric_limits<double>::quiet_NaN();
  return object == Py_None;
}

// The numbers of a structure: what is legal in a tensor.
struct Value {
  int slot;
  bool table, trainable;
  double above, low, high;

  bool holds(double number) const { return number > above && low <= number && number <= high; }
};

struct Structure {
  std::vector<Value> values;
  bool has_tables = false;
};

template <class T>
inline bool in_range(const Value& value, const Tensor& tensor) {
  const T* numbers = tensor.const_data_ptr<T>();
  const int64_t count = tensor.numel();
  bool good = true;
  for (int64_t i = 0; i < count; ++i) good &= value.holds(double(numbers[i])) || std::isnan(double(numbers[i]));
  return good;
}

// A tensor in the place of a number: 0-d, (C,) or (rows..., 1).
inline bool is_legal(const Value& value, const Tensor& tensor, int64_t classes, const Tensor& target) {
  if (!is_real(tensor) || (!value.trainable && (value.slot != ETA || tensor.requires_grad()))) return false;
  const auto sizes = tensor.sizes(), rows = target.sizes();
  const bool per_class = sizes.size() == 1 && sizes[0] == classes;
  const bool per_row = sizes.size() == rows.size() + 1 && sizes.back() == 1 && sizes.slice(0, rows.size()) == rows;
  if (!(sizes.empty() || per_class || per_row)) return false;
  if (!(value.above > -INFINITY || value.low > -INFINITY || value.high < INFINITY)) return true;
  if (!tensor.is_contiguous()) return false;
  switch (tensor.scalar_type()) {
    case at::kFloat: return in_range<float>(value, tensor);
    case at::kDouble: return in_range<double>(value, tensor);
    case at::kHalf: return in_range<at::Half>(value, tensor);
    default: return in_range<at::BFloat16>(value, tensor);
  }
}

// ---- calls that are remembered ---------------------------------------------------------------------------------------

// All that decides what a call computes, but for the tensors.
struct Key {
  const Structure* structure;
  int64_t ignore_index, mask, needs;
  int32_t reduction, backend, dtype, half_param;
  int32_t normalize, stats;               // of a linear head; else 0
  int64_t rows, width, classes, threads;  // of a linear head, which decide how it is cut; else 0
  std::array<double, WEIGHT> numbers;     // of the loss, one after another, then of EXTRAS by their slots

  bool operator==(const Key& other) const { return std::memcmp(this, &other, sizeof *this) == 0; }
  size_t hash() const {
    static_assert(sizeof(Key) % 8 == 0);
    std::array<uint64_t, sizeof(Key) / 8> words;
    std::memcpy(words.data(), this, sizeof *this);
    uint64_t mixed = 0;
    for (const uint64_t word : words) mixed = (mixed ^ word) * 0x9e3779b97f4a7c15u, mixed ^= mixed >> 29;
    return size_t(mixed);
  }
};

// What mlkernels/call.py has made of a call.
struct Resolved {
  Key key;
  PyObject* call = nullptr;  // null: not for the CPU's kernels
  std::vector<double> numbers;
  int64_t needs = 0, mask = 0;
  bool half = false, apart = false;
  bool linear = false, normalize = false, stats = false;
  std::array<int64_t, 5> plan{};
  int64_t workspace = 0;

  ~Resolved() {
    if (!call || !Py_IsInitialized()) return;
    const pybind11::gil_scoped_acquire gil;
    Py_DECREF(call);
  }
};
using Call = std::shared_ptr<const Resolved>;

// Of two calls in one place the later one stays.
inline std::array<Call, 256> calls;

inline Call ask_python(const Key& key, PyObject* const* arguments) {
  auto made = std::make_shared<Resolved>();
  made->key = key;
  THPObjectPtr found(PyObject_Vectorcall(resolve, arguments, 6, nullptr));
  if (!found) throw python_error();
  if (found.get() != Py_None) {
    PyObject *call, *numbers, *cut;
    long long needs;
    int half, apart;
    if (!PyArg_ParseTuple(found.get(), RESOLVED, &call, &PyList_Type, &numbers, &needs, &half, &apart, &PyTuple_Type,
                          &cut))
      throw python_error();
    made->linear = PyTuple_GET_SIZE(cut) > 0;
    made->normalize = key.normalize != 0;
    made->stats = key.stats != 0;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(cut); ++i)
      (i < 5 ? made->plan[size_t(i)] : made->workspace) = PyLong_AsLongLong(PyTuple_GET_ITEM(cut, i));
    if (PyErr_Occurred()) throw python_error();
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(numbers); ++i)
      made->numbers.push_back(PyFloat_AsDouble(PyList_GET_ITEM(numbers, i)));
    made->needs = needs;
    made->half = half != 0;
    made->apart = apart != 0;
    Py_INCREF(call);
    made->call = call;
  }
  return made;
}

inline const Structure& structure_of(PyObject* spec) {
  static std::unordered_map<PyObject*, std::unique_ptr<Structure>> known;  // there is one Spec of a structure, for ever
  auto& structure = known[spec];
  if (structure) return *structure;
  THPObjectPtr found(PyObject_CallOneArg(describe, spec));
  if (!found) throw python_error();
  auto made = std::make_unique<Structure>();
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(found.get()); ++i) {
    Value value;
    int table, trainable;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(found.get(), i), DESCRIBED, &value.slot, &table, &trainable, &value.above,
                          &value.low, &value.high))
      throw python_error();
    value.table = table != 0;
    value.trainable = trainable != 0;
    made->has_tables |= value.table;
    made->values.push_back(value);
  }
  if (!structure) {  // another thread may have been here while Python ran
    Py_INCREF(spec);
    structure = std::move(made);
  }
  return *structure;
}

// ---- a call's arguments ----------------------------------------------------------------------------------------------

struct Arguments {
  Key key;
  Tensor input, target;
  Tensor weight, bias;  // of a linear head, whose features the input is
  int64_t classes = 0;
  std::array<Tensor, SLOTS> by_slot;
  bool grad = at::GradMode::is_enabled();

  // False: Python shall look at them.
  bool read(PyObject* const* arguments) {
    std::memset(&key, 0, sizeof key);
    PyObject* const values = arguments[1];
    PyObject* const common = arguments[5];
    const Tensor* const labels = tensor_of(arguments[3]);
    if (!labels || !is_index(*labels) || !PyTuple_CheckExact(values) || !PyDict_CheckExact(common)) return false;
    target = *labels;
    if (!(reinterpret_cast<PyObject*>(Py_TYPE(arguments[2])) == linear_type ? read_linear(arguments[2])
                                                                            : read_logits(arguments[2])))
      return false;
    key.structure = &structure_of(arguments[0]);
    key.dtype = int(input.scalar_type());
    need(input, INPUT);
    return read_options(common) && read_values(values) && read_group(arguments[4]);
  }

  void need(const Tensor& tensor, int bit) {
    if (grad && tensor.requires_grad()) key.needs |= int64_t(1) << bit;
  }

  bool read_logits(PyObject* object) {
    const Tensor* const logits = tensor_of(object);
    if (!logits || !is_real(*logits)) return false;
    input = *logits;
    const auto sizes = input.sizes(), rows = target.sizes();
    if (sizes.size() < 2 || rows.size() + 1 != sizes.size() || sizes[1] == 0 || rows[0] != sizes[0] ||
        rows.slice(1) != sizes.slice(2))
      return false;
    classes = sizes[1];
    return true;
  }

  // Features and weight that products take as they are.
  bool read_linear(PyObject* object) {
    THPObjectPtr plain(PyObject_GetAttr(object, plain_name));
    if (!plain) throw python_error();
    if (plain.get() == Py_None) return false;
    PyObject* given[3];
    int normalize, stats;
    if (!PyArg_ParseTuple(plain.get(), PLAIN, &given[0], &given[1], &given[2], &normalize, &stats))
      throw python_error();
    const Tensor* tensors[3] = {};
    for (int i = 0; i < 3; ++i) {
      if (i == 2 && given[i] == Py_None) continue;
      tensors[i] = tensor_of(given[i]);
      if (!tensors[i] || is_half(*tensors[i]) || !tensors[i]->is_contiguous() || tensors[i]->dim() != (i < 2 ? 2 : 1) ||
          tensors[i]->scalar_type() != tensors[0]->scalar_type() || (grad && tensors[i]->is_inference()))
        return false;
    }
    key.normalize = normalize;
    key.stats = stats;
    input = *tensors[0];
    weight = *tensors[1];
    classes = weight.size(0);
    if (!is_real(input) || classes == 0 || weight.size(1) != input.size(1) || target.dim() != 1 ||
        target.size(0) != input.size(0))
      return false;
    need(weight, WEIGHT_BIT);
    if (tensors[2]) {
      bias = *tensors[2];
      if (bias.size(0) != classes) return false;
      need(bias, BIAS_BIT);
    }
    key.rows = input.size(0);
    key.width = input.size(1);
    key.classes = classes;
    key.threads = at::get_num_threads();
    return true;
  }

  bool read_options(PyObject* common) {
    std::array<PyObject*, OPTIONS> given = defaults;
    PyObject *name, *value;
    for (Py_ssize_t at = 0; PyDict_Next(common, &at, &name, &value);) {
      size_t option = 0;
      while (option < OPTIONS && names[option] != name) ++option;
      if (option == OPTIONS) return false;
      given[option] = value;
    }
    if (!PyLong_CheckExact(given[IGNORED])) return false;
    int overflow;
    key.ignore_index = PyLong_AsLongLongAndOverflow(given[IGNORED], &overflow);
    while (key.reduction < 3 && !is_word(given[REDUCED], reductions[size_t(key.reduction)])) ++key.reduction;
    key.backend = is_word(given[BACKEND], cpu);
    if (overflow || key.reduction == 3 || (!key.backend && given[BACKEND] != Py_None)) return false;
    for (size_t i = 0; i < std::size(EXTRAS); ++i)
      if (names[EXTRA + i] && !read_extra(given[EXTRA + i], EXTRAS[i])) return false;
    return true;
  }

  // A number, or a tensor with one per class or row.
  bool read_extra(PyObject* object, const Extra& extra) {
    if (extra.slot < WEIGHT) return number_of(object, key.numbers[extra.slot]);
    if (object == Py_None) return true;
    const Tensor* const vector = tensor_of(object);
    if (!vector || !is_real(*vector) || vector->requires_grad()) return false;
    const bool fits = extra.per == Mode::PER_ROW ? vector->sizes() == target.sizes()
                                                 : vector->dim() == 1 && vector->size(0) == classes;
    if (fits) take(*vector, extra.slot);
    return fits;
  }

  void take(const Tensor& tensor, int slot) {
    by_slot[size_t(slot)] = tensor;
    key.mask |= int64_t(1) << slot;
  }

  bool read_values(PyObject* values) {
    const std::vector<Value>& known = key.structure->values;
    if (size_t(PyTuple_GET_SIZE(values)) != known.size()) return false;
    for (size_t i = 0; i < known.size(); ++i) {
      PyObject* const object = PyTuple_GET_ITEM(values, Py_ssize_t(i));
      const Value& value = known[i];
      if (!value.table && number_of(object, key.numbers[i])) continue;
      const Tensor* const tensor = tensor_of(object);
      if (!tensor || !(value.table ? is_real(*tensor) : is_legal(value, *tensor, classes, target))) return false;
      key.numbers[i] = 0;
      take(*tensor, value.slot);
      if (!grad || !value.trainable || !tensor->requires_grad()) continue;
      key.needs |= int64_t(1) << value.slot;
      key.half_param |= is_half(*tensor);
    }
    return true;
  }

  // The shapes of tables, which say whether there is a group.
  bool read_group(PyObject* object) {
    if (object != Py_None) {
      const Tensor* const group = tensor_of(object);
      if (!group || !is_index(*group) || group->sizes() != target.sizes()) return false;
      take(*group, GROUP);
    }
    if (!key.structure->has_tables) return object == Py_None;
    const Tensor* slope = nullptr;  // of a pair that is not complete
    int64_t groups = -1;
    for (const Value& value : key.structure->values) {
      if (!value.table) continue;
      const Tensor& table = by_slot[size_t(value.slot)];
      if (table.dim() != (object == Py_None ? 1 : 2) || table.numel() == 0) return false;
      if (slope && slope->sizes() != table.sizes()) return false;
      slope = slope ? nullptr : &table;
      if (groups >= 0 && table.dim() == 2 && table.size(0) != groups) return false;
      groups = table.size(0);
    }
    return true;
  }
};

}  // namespace mlkernels
