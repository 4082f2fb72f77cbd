// The CPU implementations of mlkernels/ops.py: tensors to a Problem, rows to threads, row results to tensors.
#include <cstdlib>
#include <cstring>

#include "cpu/call.h"
#include "cpu/direct.h"
#include "cpu/linear.h"
#include "operators.h"

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
  const char* const names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  const char* const forced = std::getenv("MLKERNELS_CPU");
  // Never an instruction that the machine lacks: an unknown or impossible wish is answered by the best there is.
  for (int isa = 0; forced && isa <= best; ++isa)
    if (std::strcmp(forced, names[isa]) == 0) return isa;
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

// The rows of a call, and their losses.
template <class T>
struct RowCall : Call<T> {
  using Call<T>::Call;
  using Call<T>::p;
  std::unique_ptr<T[]> losses;  // by row, where they are reduced
  T* reduced = nullptr;
  std::array<Array<T>, 4> upstream;
  size_t taken = 0;

  static Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) { return mlkernels::empty(sizes, dtype); }
  static Tensor empty_of(const Tensor& like, ScalarType dtype) { return mlkernels::empty_of(like, dtype); }

  Tensor loss_like(const Tensor& target) {
    const bool reduces = p.spec.reduction != Reduction::NONE;
    Tensor loss = reduces ? empty({}, type_of<T>()) : empty_of(target, type_of<T>());
    p.losses = data_of<T>(loss);
    if (!reduces) return loss;
    reduced = p.losses;
    losses.reset(new T[size_t(p.rows) + 1]);
    p.losses = losses.get();
    return loss;
  }
  static std::tuple<> factors() { return {}; }

  int64_t saved_rows() const { return p.rows; }
  Tensor save_rows() {
    Tensor saved = empty({p.rows, 2}, type_of<T>());
    p.save = data_of<T>(saved);
    return saved;
  }
  static void prepare_backward(const Tensor&, bool) {}
  PerRow<T> per_row(const std::optional<Tensor>& tensor) {
    if (!tensor) return {};
    Array<T>& array = upstream[taken++] = array_of<T>(*tensor);
    return {array.data, array.stride};
  }

  void run() {
    // Below this many elements, about 12 us, the other thread's 4 us cost more than it brings (bench/NOTES.md). What is
    // done once per row takes as long as so many elements.
    constexpr int64_t GRAIN = 36 << 10, PER_ROW = 96;
    const int64_t grain = GRAIN / (p.classes + PER_ROW) + 1;
    const auto rows = [this](int64_t begin, int64_t end) { std::get<RunRows<T>>(kernels())(p, begin, end); };
    if (p.rows > grain)
      torch::stable::parallel_for(0, p.rows, grain, rows);
    else if (p.rows > 0)
      rows(0, p.rows);
    if (!reduced) return;
    double sum = 0 * double(p.by_class_factor);  // the mean of no rows is NaN
    for (int64_t i = 0; i < p.rows; ++i) sum += double(losses[i]);
    *reduced = T(sum);
  }

  // Runs the rows and collects the gradients that are needed, in the order of their bits.
  std::vector<Tensor> run_with_gradients(const Tensor& input, int64_t needs) {
    const ByParameter<T> parameters(*this, needs);
    Tensor grad;
    if (needs >> INPUT & 1) {
      grad = gradient_like(input);
      p.grad = grad.data_ptr();
      p.out = layout_of(grad, true);
      // Twice the second cache of two cores and more: whoever reads it next finds it in memory either way.
      constexpr int64_t STREAM_FROM = int64_t(8) << 20;
      p.streamed = grad.numel() * int64_t(grad.element_size()) >= STREAM_FROM;
    }
    run();
    std::vector<Tensor> gradients = parameters.sums();
    if (needs >> INPUT & 1) gradients.push_back(std::move(grad));
    return gradients;
  }
};

using RowOperators = Operators<RowCall>;

// ---- the same without a dispatcher; see cpu/direct.h -----------------------------------------------------------------

Tensor owned(AtenTensorHandle borrowed) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(borrowed, &handle));
  return Tensor(handle);
}
std::optional<Tensor> owned_if_any(AtenTensorHandle borrowed) {
  return borrowed ? std::optional<Tensor>(owned(borrowed)) : std::nullopt;
}

void hand_out(const Tensor& tensor, AtenTensorHandle* to) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.get(), to));
}
void hand_out(const std::vector<Tensor>& tensors, AtenTensorHandle* to) {
  for (const Tensor& tensor : tensors) hand_out(tensor, to++);
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

// Calls with(LinearArguments).
template <class With>
bool directly(const DirectCall& call, const DirectLinear& linear, With with) {
  return directly(call, [&](const Tensor& x, const Tensor& target, const std::vector<double>& numbers,
                            const std::vector<Tensor>& params) {
    const Tensor weight = owned(linear.weight);
    const std::optional<Tensor> bias = owned_if_any(linear.bias);
    const std::vector<int64_t> plan(linear.plan, linear.plan + 5);
    with(LinearArguments{x, weight, bias, linear.normalize, target, linear.workspace, plan, numbers, params});
  });
}

const Direct direct{
    NUMBERING,
    sizeof(Direct),
    SCHEMAS,
    [](const DirectCall& call, bool save, AtenTensorHandle* loss, AtenTensorHandle* saved) {
      return directly(call, [&](auto&&... arguments) {
        const auto [result, statistics] = RowOperators::softmax_loss(std::move(arguments)..., save);
        hand_out(result, loss);
        hand_out(statistics, saved);
      });
    },
    [](const DirectCall& call, int64_t needs, AtenTensorHandle* loss, AtenTensorHandle* gradients) {
      return directly(call, [&](auto&&... arguments) {
        const auto [result, made] = RowOperators::softmax_loss_with_gradients(std::move(arguments)..., needs);
        hand_out(result, loss);
        hand_out(made, gradients);
      });
    },
    [](const DirectCall& call, AtenTensorHandle grad_loss, AtenTensorHandle saved, int64_t needs,
       AtenTensorHandle* gradients) {
      return directly(call, [&](auto&&... arguments) {
        hand_out(RowOperators::softmax_loss_backward(owned(grad_loss), {}, {}, {}, std::move(arguments)...,
                                                     owned(saved), needs),
                 gradients);
      });
    },
    [](const DirectCall& call, const DirectLinear& linear, int64_t needs, AtenTensorHandle* loss,
       AtenTensorHandle* gradients) {
      return directly(call, linear, [&](const LinearArguments& arguments) {
        const auto [result, made] = linear_loss_with_gradients(arguments, needs);
        hand_out(result, loss);
        hand_out(made, gradients);
      });
    },
    [](const DirectCall& call, const DirectLinear& linear, AtenTensorHandle* loss, AtenTensorHandle* saved,
       AtenTensorHandle* rows) {
      return directly(call, linear, [&](const LinearArguments& arguments) {
        const auto [result, known, stats] = linear_rows(arguments, rows);
        hand_out(result, loss);
        hand_out(known, saved);
        hand_out(stats, rows);
      });
    },
    [](const DirectCall& call, const DirectLinear& linear, AtenTensorHandle saved, AtenTensorHandle const* upstream,
       int64_t needs, AtenTensorHandle* gradients) {
      return directly(call, linear, [&](const LinearArguments& arguments) {
        std::array<std::optional<Tensor>, 4> given;
        for (size_t i = 0; i < 4; ++i) given[i] = owned_if_any(upstream[i]);
        hand_out(linear_rows_backward(arguments, owned(saved), given, needs), gradients);
      });
    },
};

}  // namespace
}  // namespace mlkernels

MLK_EXPORT const mlkernels::Direct* mlkernels_cpu_direct() { return &mlkernels::direct; }
MLK_EXPORT int mlkernels_cpu_isa() { return mlkernels::isa; }
MLK_EXPORT size_t mlkernels_cpu_release_buffers() { return mlkernels::release_buffers(); }

STABLE_TORCH_LIBRARY_IMPL(mlkernels, CPU, m) { mlkernels::RowOperators::implement(m); }
