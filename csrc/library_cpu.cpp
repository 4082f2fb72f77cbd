// The CPU implementations of mlkernels/ops.py: tensors to a Problem, rows to threads, row results to tensors.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <tuple>

#include "cpu/call.h"
#include "cpu/direct.h"
#include "cpu/heads.h"

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
  if (best == 2 && __builtin_cpu_supports("avx512bf16")) best = 3;
#endif
  const char* forced = std::getenv("MLKERNELS_CPU");
  if (forced && *forced) {
    const std::string name = forced;
    const int wanted = name == "baseline"      ? 0
                       : name == "avx2"        ? 1
                       : name == "avx512"      ? 2
                       : name == "avx512_bf16" ? 3
                                               : -1;
    // Never an instruction that the machine lacks: an unknown or impossible wish is answered by the best there is.
    if (wanted >= 0 && wanted <= best) return wanted;
  }
  return best;
}

const int isa = choose_isa();

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels* const table[] = {&baseline::kernels, &avx2::kernels, &avx512::kernels, &avx512::kernels};
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

// As torch.empty_like; a large one in memory that an earlier one has left.
Tensor gradient_like(const Tensor& input) {
  const ScalarType dtype = input.scalar_type();
  const size_t bytes = size_t(input.numel()) * input.element_size();
  Buffer* const buffer = bytes >= BUFFER_FROM ? take_buffer(bytes) : nullptr;
  if (!buffer && input.is_contiguous()) return empty_of(input, dtype);
  const Tensor like = input.is_contiguous() ? input : torch::stable::empty_like(input);
  if (!buffer) return like;
  return in_buffer(buffer, like.sizes(), like.strides(), dtype);
}

// ---- a call ----------------------------------------------------------------------------------------------------------

template <class T>
void run(const CpuProblem<T>& p) {
  // Below this many elements, about 12 us, the other thread's 4 us cost more than it brings (bench/NOTES.md). What is
  // done once per row takes as long as so many elements.
  constexpr int64_t GRAIN = 36 << 10, PER_ROW = 96;
  const int64_t grain = GRAIN / (p.classes + PER_ROW) + 1;
  if (p.rows <= grain) {
    if (p.rows > 0) Run<T>::rows(p, 0, p.rows);
    return;
  }
  torch::stable::parallel_for(0, p.rows, grain, [&p](int64_t begin, int64_t end) { Run<T>::rows(p, begin, end); });
}

// Runs the rows and collects the gradients that are needed, in the order of their bits.
template <class T>
std::vector<Tensor> run_with_gradients(Call<T>& call, const Tensor& input, int64_t needs) {
  CpuProblem<T>& p = call.p;
  const ByParameter<T> parameters(call, needs);
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
  run(p);
  std::vector<Tensor> gradients = parameters.sums();
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
    run(call.p);
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
    run(call.p);
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
                   target.numel(), type_of<T>());
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
    sizeof(Direct),
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
    [](const DirectCall& call, const DirectHead& head, int64_t needs, AtenTensorHandle* loss,
       AtenTensorHandle* gradients) {
      return directly(
          call, [&](const Tensor& x, const Tensor& target, std::vector<double> numbers, std::vector<Tensor> params) {
            const std::optional<Tensor> bias = head.bias ? std::optional<Tensor>(owned(head.bias)) : std::nullopt;
            const auto [result, made] = linear_loss_with_gradients(
                x, owned(head.weight), bias, {}, target, room_like(x, {head.room}),
                std::vector<int64_t>(head.plan, head.plan + 5), std::move(numbers), std::move(params), needs);
            *loss = handed_out(result);
            for (const Tensor& gradient : made) *gradients++ = handed_out(gradient);
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
