// The CPU implementations of mlkernels/ops.py: tensors to a Problem, rows to threads, row results to tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstdlib>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "call.h"
#include "cpu/buffers.h"
#include "cpu/direct.h"
#include "cpu/problem.h"

namespace mlkernels {
namespace {

// ---- which instruction set -------------------------------------------------------------------------------------------

int choose_isa() {
  int best = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = 1;
  if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    best = 2;
#endif
  const char* forced = std::getenv("MLKERNELS_CPU");
  if (forced && *forced) {
    const std::string name = forced;
    const int wanted = name == "baseline" ? 0 : name == "avx2" ? 1 : name == "avx512" ? 2 : -1;
    // Never an instruction that the machine lacks: an unknown or impossible wish is answered by the best there is.
    if (wanted >= 0 && wanted <= best) return wanted;
  }
  return best;
}

const int isa = choose_isa();

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels* const table[] = {&baseline::kernels, &avx2::kernels, &avx512::kernels};
  return *table[isa];
#else
  return baseline::kernels;
#endif
}

template <class T>
struct Run;
template <>
struct Run<float> {
  static void rows(const CpuProblem<float>& p, int64_t begin, int64_t end) { kernels().run_float(p, begin, end); }
};
template <>
struct Run<double> {
  static void rows(const CpuProblem<double>& p, int64_t begin, int64_t end) { kernels().run_double(p, begin, end); }
};

// ---- tensors to plain arrays -----------------------------------------------------------------------------------------

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_on(aoti_torch_device_type_cpu(), 0, sizes, dtype);
}

// Contiguous, of another's sizes.
Tensor empty_of(const Tensor& like, ScalarType dtype) {
  return empty_on(aoti_torch_device_type_cpu(), 0, like.sizes(), dtype);
}

// As torch.empty_like; a large one in memory that an earlier one has left.
Tensor gradient_like(const Tensor& input) {
  const ScalarType dtype = input.scalar_type();
  const size_t bytes = size_t(input.numel()) * input.element_size();
  Buffer* const buffer = bytes >= BUFFER_FROM ? take_buffer(bytes) : nullptr;
  if (!buffer && input.is_contiguous()) return empty_of(input, dtype);
  const Tensor like = input.is_contiguous() ? input : torch::stable::empty_like(input);
  if (!buffer) return like;
  const auto sizes = like.sizes(), strides = like.strides();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      buffer->data, int64_t(sizes.size()), sizes.data(), strides.data(), 0, int32_t(dtype),
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void*, void* context) { give_buffer(static_cast<Buffer*>(context)); }, buffer));
  return Tensor(handle);
}

// A tensor's elements in row order as U: borrowed where they lie so already, else converted.
template <class U>
struct Array {
  const U* data = nullptr;
  int64_t stride = 1;  // 0: one value for all
  std::unique_ptr<U[]> owned;
};

template <class U, class S>
void convert(const void* from, const Layout& layout, int64_t count, U* to) {
  const S* in = static_cast<const S*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<U>(in[layout.offset(i)]);
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
  U* to = out.owned.get();
  switch (type) {
    case ScalarType::Float: convert<U, float>(data, layout, count, to); break;
    case ScalarType::Double: convert<U, double>(data, layout, count, to); break;
    case ScalarType::Half: convert<U, torch::headeronly::Half>(data, layout, count, to); break;
    case ScalarType::BFloat16: convert<U, torch::headeronly::BFloat16>(data, layout, count, to); break;
    case ScalarType::Long: convert<U, int64_t>(data, layout, count, to); break;
    case ScalarType::Int: convert<U, int32_t>(data, layout, count, to); break;
    case ScalarType::Short: convert<U, int16_t>(data, layout, count, to); break;
    case ScalarType::Char: convert<U, int8_t>(data, layout, count, to); break;
    case ScalarType::Byte: convert<U, uint8_t>(data, layout, count, to); break;
    case ScalarType::UInt16: convert<U, uint16_t>(data, layout, count, to); break;
    case ScalarType::UInt32: convert<U, uint32_t>(data, layout, count, to); break;
    case ScalarType::UInt64: {
      const uint64_t* in = static_cast<const uint64_t*>(data);
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<U>(MLKERNELS_ISA::signed_label(in[layout.offset(i)]));
      break;
    }
    default: throw std::invalid_argument("a tensor has a dtype that the CPU kernels do not read");
  }
  return out;
}

template <class S>
void write_as(void* to, const double* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) static_cast<S*>(to)[i] = static_cast<S>(from[i]);
}

void write(const Tensor& to, const double* from) {
  const int64_t count = to.numel();
  switch (to.scalar_type()) {
    case ScalarType::Float: return write_as<float>(to.data_ptr(), from, count);
    case ScalarType::Double: return write_as<double>(to.data_ptr(), from, count);
    case ScalarType::Half: {
      for (int64_t i = 0; i < count; ++i)
        static_cast<torch::headeronly::Half*>(to.data_ptr())[i] = static_cast<float>(from[i]);
      return;
    }
    default: {
      for (int64_t i = 0; i < count; ++i)
        static_cast<torch::headeronly::BFloat16*>(to.data_ptr())[i] = static_cast<float>(from[i]);
    }
  }
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
  int64_t groups = 0;
  double weight_total = 0, kept = 0;  // over the rows that are not ignored
  Reduction reduction;

  Call(const Tensor& input, const Tensor& target, const std::vector<double>& numbers, const std::vector<Tensor>& params)
      : arguments(numbers, params), tensors(arguments.tensors), reduction(arguments.spec.reduction) {
    lay_out(p, arguments, input, target);
    p.uniform = !tensors[GROUP];
    for (int slot = 0; slot < SLOTS; ++slot) {
      if (!tensors[slot] || slot == GROUP) continue;
      arrays[slot] = array_of<T>(*tensors[slot]);
      if (!arguments.is_tensor_number(slot)) continue;
      const Mode mode = arrays[slot].stride == 0 ? Mode::SHARED : mode_of(*tensors[slot]);
      p.values[slot] = {T(0), arrays[slot].data, mode, sizeof(T) == 8 ? Storage::DOUBLE : Storage::FLOAT};
      if (mode != Mode::SHARED) p.uniform = false;
    }
    lay_out_vectors(p, [&](int slot) { return vector_of_classes(slot); });
    p.row_weight = arrays[ROW_WEIGHT].data;
    p.row_weight_stride = arrays[ROW_WEIGHT].stride;
    if (p.weight) {
      double sum = 0;
      for (int64_t j = 0; j < p.classes; ++j) sum += double(p.weight[j]);
      p.weight_sum = T(sum);
    }
    read_labels(target);
    set_factors();
    if (p.spec.transform == Transform::PIECEWISE) p.t = tables(TRANSFORM_A, TRANSFORM_B);
    if (p.spec.head == Head::TAU) p.tau = tables(HEAD_A, HEAD_B);
    if (tensors[GROUP]) read_groups();
  }
  Call(const Call&) = delete;

  bool is_table(int slot) const { return mlkernels::is_table(p.spec, slot); }

  // One entry per class; an expanded scalar becomes one.
  const T* vector_of_classes(int slot) {
    Array<T>& array = arrays[slot];
    if (array.data && array.stride == 0 && p.classes > 1) {
      std::unique_ptr<T[]> all(new T[size_t(p.classes)]);
      for (int64_t j = 0; j < p.classes; ++j) all[j] = array.data[0];
      array.owned = std::move(all);
      array.data = array.owned.get();
    }
    return array.data;
  }

  Tables<T> tables(int slope, int bias) {
    const Tensor& table = *tensors[slope];
    for (const int slot : {slope, bias}) {
      Array<T>& array = arrays[slot];
      if (array.stride != 0) continue;  // an expanded scalar: give each entry its place
      const int64_t count = tensors[slot]->numel();
      std::unique_ptr<T[]> all(new T[size_t(count) + 1]);
      for (int64_t i = 0; i < count; ++i) all[i] = array.data[0];
      array.owned = std::move(all);
      array.data = array.owned.get();
    }
    if (table.dim() == 2) groups = table.size(0);
    return {arrays[slope].data, arrays[bias].data, int(table.size(table.dim() - 1)), groups};
  }

  void read_labels(const Tensor& target) {
    label = array_of<int64_t>(target);
    if (label.stride == 0 && p.rows > 1) {
      std::unique_ptr<int64_t[]> all(new int64_t[size_t(p.rows)]);
      for (int64_t i = 0; i < p.rows; ++i) all[i] = label.data[0];
      label.owned = std::move(all);
      label.data = label.owned.get();
    }
    p.label = label.data;
    for (int64_t i = 0; i < p.rows; ++i) {
      const int64_t y = p.label[i];
      if (y == p.spec.ignore_index) continue;
      if (y < 0 || y >= p.classes) out_of_range("target", target, y, i, p.classes);
      kept += 1;
      weight_total += p.weight ? double(p.weight[y]) : 1.0;
    }
  }

  void read_groups() {
    group = array_of<int64_t>(*tensors[GROUP]);
    if (group.stride == 0 && p.rows > 1) {
      std::unique_ptr<int64_t[]> all(new int64_t[size_t(p.rows)]);
      for (int64_t i = 0; i < p.rows; ++i) all[i] = group.data[0];
      group.owned = std::move(all);
      group.data = group.owned.get();
    }
    p.group = group.data;
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

  void run() {
    // Below this many elements, about 12 us, the other thread's 4 us cost more than it brings (bench/NOTES.md). What is
    // done once per row takes as long as so many elements.
    constexpr int64_t GRAIN = 36 << 10, PER_ROW = 96;
    const int64_t grain = GRAIN / (p.classes + PER_ROW) + 1;
    if (p.rows <= grain) {
      if (p.rows > 0) Run<T>::rows(p, 0, p.rows);
      return;
    }
    torch::stable::parallel_for(0, p.rows, grain, [this](int64_t begin, int64_t end) { Run<T>::rows(p, begin, end); });
  }
};

// Runs the rows and collects the gradients that are needed, in the order of their bits.
template <class T>
std::vector<Tensor> run_with_gradients(Call<T>& call, const Tensor& input, int64_t needs) {
  check_needs(call.arguments, needs);
  CpuProblem<T>& p = call.p;
  std::vector<Tensor> gradients;
  std::unique_ptr<T[]> by_row[TRAINABLE_SLOTS];
  std::unique_ptr<int[]> t_bin, tau_bin;
  const size_t rows = size_t(p.rows);
  for (int slot = 0; slot < TRAINABLE_SLOTS; ++slot) {
    if (!(needs >> slot & 1)) continue;
    by_row[slot].reset(new T[rows + 1]);
    p.by_parameter[slot] = by_row[slot].get();
    p.want_parameters = true;
    if (OF_SCALE >> slot & 1) p.want_shift = true, p.want_square = p.up_entropy;
    if (!call.is_table(slot)) continue;
    const bool of_t = is_table_of_t(p.spec, slot);
    std::unique_ptr<int[]>& bin = of_t ? t_bin : tau_bin;
    bin.reset(new int[rows + 1]);
    (of_t ? p.t_bin : p.tau_bin) = bin.get();
  }
  if (p.up_entropy) p.want_shift = true;
  Tensor grad;
  if (needs >> INPUT & 1) {
    grad = gradient_like(input);
    p.grad = grad.data_ptr();
    p.out = layout_of(grad, true);
    // Twice the second cache of two cores and more: whoever reads it next finds it in memory either way.
    constexpr int64_t STREAM_FROM = int64_t(8) << 20;
    p.streamed = grad.numel() * int64_t(grad.element_size()) >= STREAM_FROM;
  }
  call.run();

  // In row order and in double: the same bits on every run, whatever the number of threads.
  // Not in Python: torch's functions take 4 us for a number and 19 us for the tables of a small step (bench/NOTES.md).
  for (int slot = 0; slot < TRAINABLE_SLOTS; ++slot) {
    if (!(needs >> slot & 1)) continue;
    const Tensor& tensor = *call.tensors[slot];
    Tensor out = empty_of(tensor, tensor.scalar_type());
    const int64_t count = tensor.numel();
    std::vector<double> sums(size_t(count), 0.0);
    const T* values = by_row[slot].get();
    if (call.is_table(slot)) {
      const bool of_t = is_table_of_t(p.spec, slot);
      const int bins = of_t ? p.t.bins : p.tau.bins;
      const int* bin = of_t ? t_bin.get() : tau_bin.get();
      for (size_t i = 0; i < rows; ++i) {
        if (p.label[i] == p.spec.ignore_index) continue;
        sums[size_t((p.group ? p.group[i] : 0) * bins + bin[i])] += double(values[i]);
      }
    } else if (tensor.dim() == 0) {
      for (size_t i = 0; i < rows; ++i) sums[0] += double(values[i]);
    } else if (tensor.dim() == 1) {
      for (size_t i = 0; i < rows; ++i)
        if (p.label[i] != p.spec.ignore_index) sums[size_t(p.label[i])] += double(values[i]);
    } else {
      for (size_t i = 0; i < rows; ++i) sums[i] = double(values[i]);
    }
    write(out, sums.data());
    gradients.push_back(std::move(out));
  }
  if (needs >> INPUT & 1) gradients.push_back(std::move(grad));
  return gradients;
}

// Row losses and their sum.
template <class T>
struct Losses {
  Tensor result;
  std::unique_ptr<T[]> by_row;

  Losses(Call<T>& call, const Tensor& target) {
    if (call.reduction == Reduction::NONE) {
      result = empty_of(target, type_of<T>());
      call.p.losses = static_cast<T*>(result.data_ptr());
    } else {
      result = empty({}, type_of<T>());
      by_row.reset(new T[size_t(call.p.rows) + 1]);
      call.p.losses = by_row.get();
    }
  }

  void add_up(const Call<T>& call) {
    if (call.reduction == Reduction::NONE) return;
    double sum = 0 * double(call.p.by_class_factor);  // the mean of no rows is NaN
    for (int64_t i = 0; i < call.p.rows; ++i) sum += double(by_row[i]);
    *static_cast<T*>(result.data_ptr()) = T(sum);
  }
};

// ---- the operators; see ops.py ---------------------------------------------------------------------------------------

// Loss and gradients in one visit of each row.
std::tuple<Tensor, std::vector<Tensor>> softmax_loss_with_gradients(const Tensor& input, const Tensor& target,
                                                                    std::vector<double> numbers,
                                                                    std::vector<Tensor> params, int64_t needs) {
  return by_type(input, [&](auto zero) {
    Call<decltype(zero)> call(input, target, numbers, params);
    Losses<decltype(zero)> losses(call, target);
    call.p.up_value = 1;
    std::vector<Tensor> gradients = run_with_gradients(call, input, needs);
    losses.add_up(call);
    return std::tuple<Tensor, std::vector<Tensor>>{std::move(losses.result), std::move(gradients)};
  });
}

std::tuple<Tensor, Tensor> softmax_loss_with_gradient(const Tensor& input, const Tensor& target,
                                                      std::vector<double> numbers, std::vector<Tensor> params) {
  auto [loss, gradients] =
      softmax_loss_with_gradients(input, target, std::move(numbers), std::move(params), int64_t(1) << INPUT);
  return {std::move(loss), std::move(gradients[0])};
}

std::tuple<Tensor, Tensor> softmax_loss(const Tensor& input, const Tensor& target, std::vector<double> numbers,
                                        std::vector<Tensor> params, bool save) {
  return by_type(input, [&](auto zero) {
    using T = decltype(zero);
    Call<T> call(input, target, numbers, params);
    Losses<T> losses(call, target);
    Tensor saved = empty({save ? call.p.rows : 0, 2}, type_of<T>());
    if (save) call.p.save = static_cast<T*>(saved.data_ptr());
    call.run();
    losses.add_up(call);
    return std::tuple<Tensor, Tensor>{std::move(losses.result), std::move(saved)};
  });
}

using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Stats softmax_stats(const Tensor& input, const Tensor& target, std::vector<double> numbers,
                    std::vector<Tensor> params) {
  return by_type(input, [&](auto zero) {
    using T = decltype(zero);
    Call<T> call(input, target, numbers, params);
    Losses<T> losses(call, target);
    Tensor saved = empty({call.p.rows, 2}, type_of<T>());
    call.p.save = static_cast<T*>(saved.data_ptr());
    const auto of = [&](auto*& data) {
      Tensor made = empty_of(target, type_of<std::decay_t<decltype(*data)>>());
      data = static_cast<std::decay_t<decltype(data)>>(made.data_ptr());
      return made;
    };
    const Tensor logsumexp = of(call.p.logsumexp), log_prob = of(call.p.log_prob), entropy = of(call.p.entropy);
    const Tensor prediction = of(call.p.prediction), confidence = of(call.p.confidence), rank = of(call.p.rank);
    call.p.want_shift = true;
    call.run();
    losses.add_up(call);
    return Stats{losses.result, saved, logsumexp, log_prob, entropy, prediction, confidence, rank};
  });
}

std::vector<Tensor> softmax_loss_backward(std::optional<Tensor> grad_loss, std::optional<Tensor> grad_logsumexp,
                                          std::optional<Tensor> grad_log_prob, std::optional<Tensor> grad_entropy,
                                          const Tensor& input, const Tensor& target, std::vector<double> numbers,
                                          std::vector<Tensor> params, const Tensor& saved, int64_t needs) {
  return by_type(input, [&](auto zero) {
    using T = decltype(zero);
    Call<T> call(input, target, numbers, params);
    check_backward(call.arguments, target, grad_loss, {&grad_logsumexp, &grad_log_prob, &grad_entropy}, saved,
                   type_of<T>());
    CpuProblem<T>& p = call.p;
    std::array<Array<T>, 4> arrays;
    const auto take = [&](const std::optional<Tensor>& tensor, Array<T>& array, const T*& data, int64_t& stride) {
      if (!tensor) return;
      array = array_of<T>(*tensor);
      data = array.data;
      stride = array.stride;
    };
    take(grad_loss, arrays[0], p.up_loss, p.up_loss_stride);
    take(grad_logsumexp, arrays[1], p.up_logsumexp, p.up_logsumexp_stride);
    take(grad_log_prob, arrays[2], p.up_log_prob, p.up_log_prob_stride);
    take(grad_entropy, arrays[3], p.up_entropy, p.up_entropy_stride);
    if (call.reduction != Reduction::NONE) p.up_loss_stride = 0;
    if (saved.numel() > 0) p.saved = static_cast<const T*>(saved.data_ptr());
    return run_with_gradients(call, input, needs);
  });
}

// ---- the same without a dispatcher; see cpu/direct.h -----------------------------------------------------------------

Tensor owned(AtenTensorHandle borrowed) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(borrowed, &handle));
  return Tensor(handle);
}

AtenTensorHandle handed_out(const Tensor& tensor) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.get(), &handle));
  return handle;
}

// Calls with(input, target, numbers, params).
template <class With>
bool directly(const DirectCall& call, With with) {
  try {
    std::vector<Tensor> params;
    params.reserve(size_t(call.params_size));
    for (int64_t i = 0; i < call.params_size; ++i) params.push_back(owned(call.params[i]));
    with(owned(call.input), owned(call.target), std::vector<double>(call.numbers, call.numbers + call.numbers_size),
         std::move(params));
    return true;
  } catch (...) {
    return false;
  }
}

const Direct direct{
    NUMBERING,
    [](const DirectCall& call, bool save, AtenTensorHandle* loss, AtenTensorHandle* saved) {
      return directly(call, [&](const Tensor& input, const Tensor& target, std::vector<double> numbers,
                                std::vector<Tensor> params) {
        const auto [result, statistics] = softmax_loss(input, target, std::move(numbers), std::move(params), save);
        *loss = handed_out(result);
        *saved = handed_out(statistics);
      });
    },
    [](const DirectCall& call, int64_t needs, AtenTensorHandle* loss, AtenTensorHandle* gradients) {
      return directly(call, [&](const Tensor& input, const Tensor& target, std::vector<double> numbers,
                                std::vector<Tensor> params) {
        const auto [result, made] =
            softmax_loss_with_gradients(input, target, std::move(numbers), std::move(params), needs);
        *loss = handed_out(result);
        for (const Tensor& gradient : made) *gradients++ = handed_out(gradient);
      });
    },
    [](const DirectCall& call, AtenTensorHandle grad_loss, AtenTensorHandle saved, int64_t needs,
       AtenTensorHandle* gradients) {
      return directly(call, [&](const Tensor& input, const Tensor& target, std::vector<double> numbers,
                                std::vector<Tensor> params) {
        for (const Tensor& gradient : softmax_loss_backward(owned(grad_loss), {}, {}, {}, input, target,
                                                            std::move(numbers), std::move(params), owned(saved), needs))
          *gradients++ = handed_out(gradient);
      });
    },
};

}  // namespace
}  // namespace mlkernels

extern "C" __attribute__((visibility("default"))) const mlkernels::Direct* mlkernels_cpu_direct() {
  return &mlkernels::direct;
}
extern "C" __attribute__((visibility("default"))) int mlkernels_cpu_isa() { return mlkernels::isa; }
extern "C" __attribute__((visibility("default"))) size_t mlkernels_cpu_release_buffers() {
  return mlkernels::release_buffers();
}
// Of which numbers: a library that is older than numbering.py would take one loss for another.
extern "C" __attribute__((visibility("default"))) const char* mlkernels_numbering() { return mlkernels::NUMBERING; }

STABLE_TORCH_LIBRARY_IMPL(mlkernels, CPU, m) {
  m.impl("softmax_loss", TORCH_BOX(&mlkernels::softmax_loss));
  m.impl("softmax_loss_with_gradient", TORCH_BOX(&mlkernels::softmax_loss_with_gradient));
  m.impl("softmax_loss_with_gradients", TORCH_BOX(&mlkernels::softmax_loss_with_gradients));
  m.impl("softmax_stats", TORCH_BOX(&mlkernels::softmax_stats));
  m.impl("softmax_loss_backward", TORCH_BOX(&mlkernels::softmax_loss_backward));
}
