// What the CPU's operators make of the arguments that they share: numbers and labels read, checked and laid out; and of
// derivatives by row the gradients of parameters. For library_*.cpp alone.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "../arguments.h"
#include "buffers.h"
#include "problem.h"

namespace mlkernels {

// ---- new tensors -----------------------------------------------------------------------------------------------------

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_on(aoti_torch_device_type_cpu(), 0, sizes, dtype);
}

// Contiguous, of another's sizes.
inline Tensor empty_of(const Tensor& like, ScalarType dtype) {
  return empty_on(aoti_torch_device_type_cpu(), 0, like.sizes(), dtype);
}

// In memory that an earlier one has left, and this one leaves to later ones.
template <class Sizes>
Tensor in_buffer(Buffer* buffer, const Sizes& sizes, const Sizes& strides, ScalarType dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      buffer->data, int64_t(sizes.size()), sizes.data(), strides.data(), 0, int32_t(dtype),
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void*, void* context) { give_buffer(static_cast<Buffer*>(context)); }, buffer));
  return Tensor(handle);
}

// ---- tensors to plain arrays -----------------------------------------------------------------------------------------

// A tensor's elements in row order as U: borrowed where they lie so already, else converted.
template <class U>
struct Array {
  const U* data = nullptr;
  int64_t stride = 1;  // 0: one value for all
  std::unique_ptr<U[]> owned;

  // Gives each its place.
  void repeat(int64_t count) {
    if (stride != 0 || count < 2) return;
    std::unique_ptr<U[]> all(new U[size_t(count)]);
    std::fill_n(all.get(), count, data[0]);
    owned = std::move(all);
    data = owned.get();
    stride = 1;
  }
};

// Calls body with an element of a dtype.
template <class Body>
void by_dtype(ScalarType type, Body body) {
  switch (type) {
    case ScalarType::Float: return body(float());
    case ScalarType::Double: return body(double());
    case ScalarType::Half: return body(float16());
    case ScalarType::BFloat16: return body(bfloat16());
    case ScalarType::Long: return body(int64_t());
    case ScalarType::Int: return body(int32_t());
    case ScalarType::Short: return body(int16_t());
    case ScalarType::Char: return body(int8_t());
    case ScalarType::Byte: return body(uint8_t());
    case ScalarType::UInt16: return body(uint16_t());
    case ScalarType::UInt32: return body(uint32_t());
    case ScalarType::UInt64: return body(uint64_t());
    default: throw std::runtime_error("a tensor has a dtype that the CPU kernels do not read");
  }
}

template <class U>
Array<U> array_of(const Tensor& tensor) {
  Array<U> out;
  const int64_t count = tensor.numel();
  const void* data = tensor.data_ptr();
  const ScalarType type = tensor.scalar_type();
  if (type == type_of<U>()) {
    bool flat = true;  // every element is the same one
    for (const int64_t stride : tensor.strides()) flat &= stride == 0;
    if (flat || tensor.is_contiguous()) {
      out.data = static_cast<const U*>(data);
      out.stride = flat ? 0 : 1;
      return out;
    }
  }
  out.owned.reset(new U[size_t(count) + 1]);
  out.data = out.owned.get();
  const Layout layout = layout_of(tensor, false);
  by_dtype(type, [&](auto element) {
    using S = decltype(element);
    const S* const in = static_cast<const S*>(data);
    for (int64_t i = 0; i < count; ++i) {
      const S x = in[layout.offset(i)];
      if constexpr (std::is_same_v<S, uint64_t>)
        out.owned[size_t(i)] = static_cast<U>(MLKERNELS_ISA::signed_label(x));
      else if constexpr (std::is_integral_v<S>)
        out.owned[size_t(i)] = static_cast<U>(x);
      else
        out.owned[size_t(i)] = static_cast<U>(MLKERNELS_ISA::widen(x));
    }
  });
  return out;
}

inline void write(const Tensor& to, const double* from) {
  by_dtype(to.scalar_type(), [&](auto element) {
    using S = decltype(element);
    S* const out = static_cast<S*>(to.data_ptr());
    const int64_t count = to.numel();
    if constexpr (!std::is_integral_v<S>)
      for (int64_t i = 0; i < count; ++i) MLKERNELS_ISA::narrow(from[i], out[i]);
  });
}

// ---- a call ----------------------------------------------------------------------------------------------------------

// The arguments that the operators share, checked and laid out. The order of the numbers is that of ops.py.
template <class T>
struct Call {
  CpuProblem<T> p{};
  Array<int64_t> label, group;
  std::array<Array<T>, SLOTS> arrays;
  const Arguments arguments;
  const std::array<const Tensor*, SLOTS>& tensors;
  double weight_total = 0, kept = 0;  // over the rows that are not ignored
  Reduction reduction;

  // Of rows whose logits are there.
  Call(const Tensor& input, const Tensor& target, const std::vector<double>& numbers, const std::vector<Tensor>& params)
      : Call(target, numbers, params, check_shapes(input, target)) {
    lay_out_input(p, input);
  }

  Call(const Tensor& target, const std::vector<double>& numbers, const std::vector<Tensor>& params, int64_t classes)
      : arguments(numbers, params), tensors(arguments.tensors), reduction(arguments.spec.reduction) {
    lay_out(p, arguments, target, classes);
    p.uniform = !tensors[GROUP];
    for (int slot = 0; slot < SLOTS; ++slot) {
      if (!tensors[slot] || slot == GROUP) continue;
      arrays[slot] = array_of<T>(*tensors[slot]);
      if (!arguments.is_tensor_number(slot)) continue;
      const Mode mode = arrays[slot].stride == 0 ? Mode::SHARED : mode_of(*tensors[slot]);
      p.values[slot] = {T(0), arrays[slot].data, mode, sizeof(T) == 8 ? Storage::DOUBLE : Storage::FLOAT};
      if (mode != Mode::SHARED) p.uniform = false;
    }
    lay_out_classes(p, arguments, [&](int slot) { return vector_of(slot, p.classes); });
    lay_out_tables(p, arguments, [&](int slot) { return vector_of(slot, tensors[slot]->numel()); });
    p.row_weight = {arrays[ROW_WEIGHT].data, arrays[ROW_WEIGHT].stride};
    if (p.weight) {
      double sum = 0;
      for (int64_t j = 0; j < p.classes; ++j) sum += double(p.weight[j]);
      p.weight_sum = T(sum);
    }
    read_labels(target);
    set_factors();
    if (tensors[GROUP]) read_groups();
  }
  Call(const Call&) = delete;

  const T* vector_of(int slot, int64_t count) {
    arrays[slot].repeat(count);
    return arrays[slot].data;
  }

  void read_labels(const Tensor& target) {
    label = array_of<int64_t>(target);
    label.repeat(p.rows);
    p.label = label.data;
    int64_t count = 0;
    for (int64_t i = 0; i < p.rows; ++i) {
      const int64_t y = p.label[i];
      if (y == p.spec.ignore_index) continue;
      if (y < 0 || y >= p.classes) out_of_range("target", target, y, i, p.classes);
      ++count;
      if (p.weight) weight_total += double(p.weight[y]);
    }
    kept = double(count);
    if (!p.weight) weight_total = kept;
  }

  void read_groups() {
    group = array_of<int64_t>(*tensors[GROUP]);
    group.repeat(p.rows);
    p.group = group.data;
    const int64_t groups = std::max(p.t.groups, p.tau.groups);
    for (int64_t i = 0; i < p.rows; ++i)
      if (p.group[i] < 0 || p.group[i] >= groups) out_of_range("group", *tensors[GROUP], p.group[i], i, groups);
  }

  [[noreturn]] static void out_of_range(const char* name, const Tensor& labels, int64_t value, int64_t row,
                                        int64_t count) {
    std::string said = std::to_string(value);
    if (labels.scalar_type() == ScalarType::UInt64)  // as it was given, which may be more than int64 holds
      said = std::to_string(static_cast<const uint64_t*>(labels.data_ptr())[layout_of(labels, false).offset(row)]);
    // What data sets mark rows without a class by.
    const bool marks = name == std::string("target") && (value < 0 || value == 255);
    throw std::out_of_range(std::string(name) + " " + said + " at row " + std::to_string(row) +
                            " is out of range [0, " + std::to_string(count) + ")" +
                            (marks ? "; to leave such rows out pass ignore_index=" + said : ""));
  }

  // One over what "mean" divides by; NaN where that is nothing.
  void set_factors() {
    p.by_class_factor = p.by_row_factor = 1;
    if (reduction != Reduction::MEAN) return;
    const double given = tensors[NORMALIZER] ? double(*arrays[NORMALIZER].data) : arguments.numbers[NORMALIZER];
    if (tensors[NORMALIZER] || given != 0) {
      p.by_class_factor = p.by_row_factor = T(1 / MLKERNELS_ISA::legal(given > 0 && std::isfinite(given), given));
    } else {
      p.by_class_factor = T(1 / MLKERNELS_ISA::legal(weight_total != 0, weight_total));
      p.by_row_factor = T(1 / MLKERNELS_ISA::legal(kept != 0, kept));
    }
  }
};

// The derivatives by parameters, by row: where row loops write those that `needs` asks for, and the gradients that these
// sum up to.
template <class T>
struct ByParameter {
  Call<T>& call;
  const int64_t needs;
  std::unique_ptr<T[]> all;  // derivatives, a slot's after the other's
  std::unique_ptr<int[]> t_bin, tau_bin;

  ByParameter(Call<T>& call_, int64_t needs_) : call(call_), needs(needs_) {
    lay_out_needs(call.p, call.arguments, needs);
    CpuProblem<T>& p = call.p;
    const size_t rows = size_t(p.rows);
    const int count = __builtin_popcountll(uint64_t(needs & ((int64_t(1) << TRAINABLE_SLOTS) - 1)));
    if (count == 0) return;
    all.reset(new T[size_t(count) * rows + 1]);
    T* next = all.get();
    for (int slot = 0; slot < TRAINABLE_SLOTS; ++slot) {
      if (!(needs >> slot & 1)) continue;
      p.by_parameter[slot] = next;
      next += rows;
      if (!call.arguments.is_table(slot)) continue;
      const bool of_t = call.arguments.is_table_of_t(slot);
      std::unique_ptr<int[]>& bin = of_t ? t_bin : tau_bin;
      bin.reset(new int[rows + 1]);
      (of_t ? p.t_bin : p.tau_bin) = bin.get();
    }
  }

  // Of a number that all rows share, by slot. Four at once: an addition waits for the one before it.
  std::array<double, TRAINABLE_SLOTS> sums_of_shared() const {
    std::array<double, TRAINABLE_SLOTS> found{};
    std::array<int, TRAINABLE_SLOTS + 3> slots;
    int count = 0;
    for (int slot = 0; slot < TRAINABLE_SLOTS; ++slot)
      if ((needs >> slot & 1) && call.tensors[slot]->dim() == 0) slots[count++] = slot;
    for (int i = count; i < count + 3; ++i) slots[i] = count > 0 ? slots[0] : 0;
    for (int first = 0; first < count; first += 4) {
      const int* const these = slots.data() + first;
      const auto& by_row = call.p.by_parameter;
      const T *const a = by_row[these[0]], *const b = by_row[these[1]], *const c = by_row[these[2]],
                     *const d = by_row[these[3]];
      double total[4] = {};
      for (int64_t i = 0; i < call.p.rows; ++i) {
        total[0] += double(a[i]);
        total[1] += double(b[i]);
        total[2] += double(c[i]);
        total[3] += double(d[i]);
      }
      for (int i = 0; i < 4; ++i) found[these[i]] = total[i];
    }
    return found;
  }

  // In row order and in double: the same bits on every run, whatever the number of threads.
  // Not in Python: torch's functions take 4 us for a number and 19 us for the tables of a small step (bench/NOTES.md).
  std::vector<Tensor> sums() const {
    const CpuProblem<T>& p = call.p;
    const size_t rows = size_t(p.rows);
    const std::array<double, TRAINABLE_SLOTS> shared = sums_of_shared();
    std::vector<Tensor> gradients;
    gradients.reserve(size_t(__builtin_popcountll(uint64_t(needs))));
    for (int slot = 0; slot < TRAINABLE_SLOTS; ++slot) {
      if (!(needs >> slot & 1)) continue;
      const Tensor& tensor = *call.tensors[slot];
      Tensor out = empty_of(tensor, tensor.scalar_type());
      const int64_t count = tensor.numel();
      if (tensor.dim() == 0) {
        write(out, &shared[slot]);
        gradients.push_back(std::move(out));
        continue;
      }
      std::vector<double> total(size_t(count), 0.0);
      const T* values = p.by_parameter[slot];
      if (call.arguments.is_table(slot)) {
        const bool of_t = call.arguments.is_table_of_t(slot);
        const int bins = of_t ? p.t.bins : p.tau.bins;
        const int* bin = of_t ? t_bin.get() : tau_bin.get();
        for (size_t i = 0; i < rows; ++i) {
          if (p.label[i] == p.spec.ignore_index) continue;
          total[size_t((p.group ? p.group[i] : 0) * bins + bin[i])] += double(values[i]);
        }
      } else if (tensor.dim() == 1) {
        for (size_t i = 0; i < rows; ++i)
          if (p.label[i] != p.spec.ignore_index) total[size_t(p.label[i])] += double(values[i]);
      } else {
        for (size_t i = 0; i < rows; ++i) total[i] = double(values[i]);
      }
      write(out, total.data());
      gradients.push_back(std::move(out));
    }
    return gradients;
  }
};

}  // namespace mlkernels
