// The arguments that operators share, checked, and what all libraries make of them; see mlkernels/ops.py. For the host
// alone.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "rows.h"

namespace mlkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType type_of() {
  return std::is_same<T, int64_t>::value ? ScalarType::Long : sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
}

inline Storage storage_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Storage::FLOAT;
    case ScalarType::Double: return Storage::DOUBLE;
    case ScalarType::BFloat16: return Storage::BFLOAT16;
    case ScalarType::Half: return Storage::FLOAT16;
    default: throw std::runtime_error("a tensor must be float16, bfloat16, float32 or float64");
  }
}
// None: these are no integers.
inline std::optional<Index> index_of(ScalarType type) {
  switch (type) {
    case ScalarType::Long: return Index::INT64;
    case ScalarType::Int: return Index::INT32;
    case ScalarType::Short: return Index::INT16;
    case ScalarType::Char: return Index::INT8;
    case ScalarType::Byte: return Index::UINT8;
    case ScalarType::UInt16: return Index::UINT16;
    case ScalarType::UInt32: return Index::UINT32;
    case ScalarType::UInt64: return Index::UINT64;
    default: return std::nullopt;
  }
}

template <class U>
U* data_of(const Tensor& tensor) {
  return static_cast<U*>(tensor.data_ptr());
}

// A new tensor, contiguous.
template <class Sizes>
Tensor empty_on(int32_t device_type, int32_t index, const Sizes& sizes, ScalarType dtype) {
  STD_TORCH_CHECK(int(sizes.size()) <= Layout::MAX_DIMS, "a tensor has more than ", Layout::MAX_DIMS, " dimensions");
  std::array<int64_t, Layout::MAX_DIMS> shape{}, strides{};
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    shape[d] = sizes.begin()[d];
    strides[d] = step;
    step *= shape[d];
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), shape.data(), strides.data(), int32_t(dtype),
                                                  device_type, index, &handle));
  return Tensor(handle);
}

// Rows of an (N, C, d...) tensor, or with classes = false of an (N, d...) one.
inline Layout layout_of(const Tensor& tensor, bool classes = true) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  STD_TORCH_CHECK(int(sizes.size()) <= Layout::MAX_DIMS, "a tensor has more than ", Layout::MAX_DIMS, " dimensions");
  Layout layout{};
  layout.class_stride = classes ? strides[1] : 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if ((classes && d == 1) || (sizes[d] == 1 && layout.dims > 0)) continue;
    int64_t& size = layout.sizes[layout.dims > 0 ? layout.dims - 1 : 0];
    int64_t& stride = layout.strides[layout.dims > 0 ? layout.dims - 1 : 0];
    // A dimension that continues the one before it is one dimension with it: fewer divisions per row.
    if (layout.dims > 0 && (stride == sizes[d] * strides[d] || size == 1)) {
      size *= sizes[d];
      stride = strides[d];
    } else {
      layout.sizes[layout.dims] = sizes[d];
      layout.strides[layout.dims++] = strides[d];
    }
  }
  if (layout.dims == 0) {
    layout.dims = 1;
    layout.sizes[0] = 1;
  }
  return layout;
}

// A number as the enumerator that it stands for; an unknown one is never another loss.
template <class Kind>
Kind kind_of(double number) {
  if (!(number >= 0 && number < Known<Kind>::COUNT) || number != double(int(number)))
    throw std::runtime_error(std::string("there is no ") + Known<Kind>::WORD + " with the number " +
                             std::to_string(number));
  return Kind(int(number));
}

inline Spec read_spec(const std::vector<double>& numbers) {
  return {kind_of<Transform>(numbers[TRANSFORM]),
          kind_of<Scale>(numbers[ROW_SCALE]),
          kind_of<Head>(numbers[HEAD]),
          kind_of<BeyondPi>(numbers[BEYOND_PI]),
          kind_of<MarginGradient>(numbers[MARGIN_GRADIENT]),
          kind_of<Clamp>(numbers[CLAMP]),
          kind_of<Reduction>(numbers[REDUCTION]),
          int64_t(numbers[IGNORE_INDEX])};
}

constexpr int INPUT = SLOTS;  // the bit of `needs` that stands for the logits

// The numbers and tensors of a call, by slot.
struct Arguments {
  Spec spec;
  std::array<double, SLOTS> numbers{};
  std::array<const Tensor*, SLOTS> tensors{};

  Arguments(const std::vector<double>& given, const std::vector<Tensor>& params) {
    STD_TORCH_CHECK(given.size() >= CONSTS && given.size() <= CONSTS + SLOTS, "numbers has the wrong length");
    STD_TORCH_CHECK(given[MASK] >= 0 && given[MASK] < double(1u << SLOTS), "there are no slots of this mask");
    STD_TORCH_CHECK(given[IGNORE_INDEX] >= -0x1p63 && given[IGNORE_INDEX] < 0x1p63, "ignore_index is no int64");
    spec = read_spec(given);
    for (size_t at = CONSTS; at < given.size(); ++at) numbers[at - CONSTS] = given[at];
    const uint64_t mask = uint64_t(given[MASK]);
    size_t next = 0;
    for (int slot = 0; slot < SLOTS; ++slot) {
      if (!(mask >> slot & 1)) continue;
      STD_TORCH_CHECK(next < params.size(), "params holds fewer tensors than the mask says");
      tensors[size_t(slot)] = &params[next++];
    }
    STD_TORCH_CHECK(next == params.size(), "params holds more tensors than the mask says");
  }

  // Whether a slot holds a table of t, of either of t and tau, a number of the loss in a tensor.
  bool is_table_of_t(int slot) const { return TRANSFORM_TABLES[int(spec.transform)] >> slot & 1; }
  bool is_table(int slot) const { return is_table_of_t(slot) || HEAD_TABLES[int(spec.head)] >> slot & 1; }
  bool is_tensor_number(int slot) const { return slot < LOSS_SLOTS && tensors[size_t(slot)] && !is_table(slot); }
};

inline Mode mode_of(const Tensor& number) {
  return number.dim() == 0 ? Mode::SHARED : number.dim() == 1 ? Mode::PER_CLASS : Mode::PER_ROW;
}

// ---- checks ----------------------------------------------------------------------------------------------------------
// Python checks arguments with better words. These keep whoever calls an operator itself within its memory.

inline void check_table(const Tensor& slope, const Tensor& bias, const Tensor* group, int64_t& groups) {
  const int64_t dims = slope.dim();
  STD_TORCH_CHECK(dims == (group ? 2 : 1) && bias.dim() == dims && slope.numel() > 0 && slope.numel() == bias.numel() &&
                      slope.size(dims - 1) == bias.size(dims - 1) && slope.numel() <= INT32_MAX,
                  "tables must be alike, (M,) without a group and (G, M) with one, and have an entry");
  if (!group) return;
  STD_TORCH_CHECK(groups < 0 || groups == slope.size(0), "the tables of t and tau must have as many groups");
  groups = slope.size(0);
}

// How many classes there are.
inline int64_t check_shapes(const Tensor& input, const Tensor& target) {
  const int64_t dims = input.dim();
  STD_TORCH_CHECK(dims >= 2 && target.dim() == dims - 1, "input must be (N, C, d...) and target (N, d...)");
  for (int64_t d = 0; d < dims - 1; ++d)
    STD_TORCH_CHECK(target.size(d) == input.size(d > 0 ? d + 1 : 0), "target must have input's shape without C");
  return input.size(1);
}

inline void check_tensors(const Arguments& arguments, const Tensor& target, int64_t classes) {
  STD_TORCH_CHECK(index_of(target.scalar_type()), "target must hold integers");
  STD_TORCH_CHECK(classes >= 0, "there are less than no classes");
  const int64_t rows = target.numel();
  const auto& tensors = arguments.tensors;
  for (int slot = 0; slot < LOSS_SLOTS; ++slot) {
    if (!tensors[size_t(slot)]) continue;
    const Tensor& number = *tensors[size_t(slot)];
    (void)storage_of(number.scalar_type());
    const int64_t count = arguments.is_table(slot) ? number.numel()
                          : number.dim() == 0      ? 1
                          : number.dim() == 1      ? classes
                                                   : rows;
    STD_TORCH_CHECK(number.numel() == count, "a loss's own tensor must have one element, one per class or one per row");
  }
  for (const Extra& extra : EXTRAS) {
    const int64_t count = extra.per == Mode::PER_CLASS ? classes : extra.per == Mode::PER_ROW ? rows : 1;
    STD_TORCH_CHECK(!tensors[extra.slot] || tensors[extra.slot]->numel() == count, extra.name, " needs ", count,
                    " numbers");
  }
  const Tensor* const group = tensors[GROUP];
  STD_TORCH_CHECK(!group || index_of(group->scalar_type()), "group must hold integers");
  int64_t groups = -1;
  const auto check_tables = [&](int slope, int bias) {
    STD_TORCH_CHECK(tensors[size_t(slope)] && tensors[size_t(bias)], "a piecewise loss needs its tables");
    check_table(*tensors[size_t(slope)], *tensors[size_t(bias)], group, groups);
  };
  if (arguments.spec.transform == Transform::PIECEWISE) check_tables(TRANSFORM_A, TRANSFORM_B);
  if (arguments.spec.head == Head::TAU) check_tables(HEAD_A, HEAD_B);
}

inline void check_backward(const Arguments& arguments, const Tensor& target, const std::optional<Tensor>& of_loss,
                           std::initializer_list<const std::optional<Tensor>*> of_rows, const Tensor& saved,
                           int64_t saved_rows, ScalarType accumulated) {
  const int64_t rows = target.numel();
  STD_TORCH_CHECK(!of_loss || of_loss->numel() == (arguments.spec.reduction == Reduction::NONE ? rows : 1),
                  "grad_loss must have the loss's shape");
  for (const auto* one : of_rows) STD_TORCH_CHECK(!*one || (*one)->numel() == rows, "an upstream gradient per row");
  STD_TORCH_CHECK(saved.numel() == 0 ||
                      (saved.numel() == 2 * saved_rows && saved.is_contiguous() && saved.scalar_type() == accumulated),
                  "saved must be what the loss returned, or empty");
}

// What of a problem is said by shapes and numbers.
template <class T>
void lay_out(Problem<T>& p, const Arguments& arguments, const Tensor& target, int64_t classes) {
  check_tensors(arguments, target, classes);
  p.spec = arguments.spec;
  p.rows = target.numel();
  p.classes = classes;
  for (int slot = 0; slot < LOSS_SLOTS; ++slot)
    p.values[slot] = {T(arguments.numbers[size_t(slot)]), nullptr, Mode::BY_VALUE, Storage::DOUBLE};
  p.smoothing = T(arguments.numbers[SMOOTHING]);
  p.z_loss = T(arguments.numbers[Z_LOSS]);
  p.weight_sum = T(p.classes);
}
// What the gradients that `needs` asks for take of a visit, whose upstream gradients are laid out.
template <class T>
void lay_out_needs(Problem<T>& p, const Arguments& arguments, int64_t needs) {
  int64_t known = 0;
  for (int slot = 0; slot < TRAINABLE_SLOTS; ++slot)
    known |= int64_t(arguments.tensors[size_t(slot)] != nullptr) << slot;
  STD_TORCH_CHECK(!(needs & ~(known | int64_t(1) << INPUT)), "needs asks for the gradient of what is no tensor");
  p.want_parameters = needs & known;
  p.want_shift |= needs & OF_SCALE || p.up_entropy;
  p.want_square = needs & OF_SCALE && p.up_entropy;
}
template <class T>
void lay_out_input(Problem<T>& p, const Tensor& input) {
  p.storage = storage_of(input.scalar_type());
  p.input = input.data_ptr();
  p.in = layout_of(input);
}

// What the loops over classes see of a call: vector_of(slot) has a number for each of their classes, or is null.
template <class T, template <class> class Kind, class VectorOf>
void lay_out_classes(Kind<T>& p, const Arguments& arguments, VectorOf vector_of) {
  p.weight = vector_of(WEIGHT);
  p.preparation = Preparation<T>::of(arguments.numbers, vector_of);
}

// The tables of piecewise functions, whose numbers vector_of(slot) has.
template <class T, class VectorOf>
void lay_out_tables(Problem<T>& p, const Arguments& arguments, VectorOf vector_of) {
  const auto tables = [&](int slope, int bias) -> Tables<T> {
    const Tensor& table = *arguments.tensors[size_t(slope)];
    const int64_t dims = table.dim();
    return {vector_of(slope), vector_of(bias), int(table.size(dims - 1)), dims == 2 ? table.size(0) : 0};
  };
  if (p.spec.transform == Transform::PIECEWISE) p.t = tables(TRANSFORM_A, TRANSFORM_B);
  if (p.spec.head == Head::TAU) p.tau = tables(HEAD_A, HEAD_B);
}

// Calls with(T{}) for the accumulation type.
template <class With>
auto by_type(const Tensor& input, With with) {
  return input.scalar_type() == ScalarType::Double ? with(double()) : with(float());
}

}  // namespace mlkernels
