// The CPU's operators for heads (mlkernels/linear) that know a loss.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/call.h"
#include "cpu/row_finish.h"

namespace mlkernels {
namespace {

// From what is known of rows to what is finished of each, (5, rows); with `derive` to the coefficients of its gradient,
// (6, rows), given the upstream gradients of what is finished, and to the gradients of parameters.
std::tuple<Tensor, Tensor, std::vector<Tensor>> row_finish(
    const Tensor& target, const Tensor& target_logit, const Tensor& top, const Tensor& total,
    std::optional<Tensor> shift, std::optional<Tensor> second, std::optional<Tensor> weighted,
    std::vector<double> numbers, std::vector<Tensor> params, int64_t classes, std::optional<Tensor> by_class,
    std::optional<Tensor> by_row, std::optional<Tensor> logsumexp, std::optional<Tensor> log_prob,
    std::optional<Tensor> entropy, bool derive, int64_t needs) {
  return by_type(target_logit, [&](auto zero) {
    using T = decltype(zero);
    Call<T> call(target, numbers, params, classes);
    CpuProblem<T>& p = call.p;
    const int64_t n = p.rows, scales = p.spec.scale == Scale::TWO_SCALE ? 2 : 1;
    std::array<Array<T>, 11> arrays;
    size_t next = 0;
    const auto take = [&](const Tensor& tensor, int64_t count) {
      STD_TORCH_CHECK(tensor.numel() == count,
                      "row_finish takes a number per row, of S, T and the second moment one "
                      "per scale and row");
      Array<T>& array = arrays[next++];
      array = array_of<T>(tensor);
      array.repeat(count);
      return array.data;
    };
    const auto some = [&](const std::optional<Tensor>& tensor, int64_t count) {
      return tensor ? take(*tensor, count) : nullptr;
    };
    const KnownRows<T> known{0,
                             n,
                             take(target_logit, n),
                             take(top, n),
                             take(total, scales * n),
                             some(shift, scales * n),
                             some(second, scales * n),
                             scales,
                             some(weighted, n)};
    Tensor finished = empty({5, n}, type_of<T>()), row = empty({derive ? 6 : 0, n}, type_of<T>());
    T *f = static_cast<T*>(finished.data_ptr()), *c = derive ? static_cast<T*>(row.data_ptr()) : nullptr;
    FinishedRows<T> out{f, f + n, f + 2 * n, f + 3 * n, f + 4 * n};
    if (c) out.factor = c, out.slope = c + n, out.spread = c + 2 * n;
    if (c) out.target = c + 3 * n, out.scale = c + 4 * n, out.top = c + 5 * n;
    p.row_weight = nullptr;  // these are in the upstream gradients
    p.by_class_factor = p.by_row_factor = 0;
    out.up_by_class = some(by_class, n);
    out.up_by_row = some(by_row, n);
    p.up_logsumexp = some(logsumexp, n);
    p.up_log_prob = some(log_prob, n);
    p.up_entropy = some(entropy, n);
    p.up_logsumexp_stride = p.up_log_prob_stride = p.up_entropy_stride = 1;
    p.up_value = 1;
    p.grad = c;
    const ByParameter<T> parameters(call, needs);
    STD_TORCH_CHECK(derive || !needs, "gradients of parameters come with those of rows");
    STD_TORCH_CHECK((known.weighted || p.smoothing <= 0) && (known.shift || !(p.want_shift || p.up_entropy)) &&
                        (known.square || !p.want_square),
                    "row_finish lacks a sum: V for smoothing, T for gradients by a scale and of the entropy, and the "
                    "second moment for those of both");
    torch::stable::parallel_for(0, n, 256, [&](int64_t begin, int64_t end) { finish_rows(p, known, out, begin, end); });
    return std::tuple<Tensor, Tensor, std::vector<Tensor>>{finished, row, parameters.sums()};
  });
}

}  // namespace
}  // namespace mlkernels

STABLE_TORCH_LIBRARY_IMPL(mlkernels, CPU, m) { m.impl("row_finish", TORCH_BOX(&mlkernels::row_finish)); }
