// The CPU's operators for heads (mlkernels/linear) that know a loss.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "cpu/call.h"
#include "cpu/heads.h"
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
                             nullptr,
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

// ---- a head whose gradients are made with its loss -------------------------------------------------------------------

// Some rows of a contiguous (rows) or (rows, width).
Tensor rows_of(const Tensor& all, int64_t first, int64_t count) {
  if (first == 0 && count == all.size(0)) return all;
  const int64_t width = all.dim() == 2 ? all.size(1) : 1;
  const std::array<int64_t, 2> sizes{count, width}, strides{width, 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(all.get(), all.dim(), sizes.data(), strides.data(), first * width, &handle));
  return Tensor(handle);
}

// The same numbers as U, one after another.
template <class U>
Tensor contiguous_of(const Tensor& tensor) {
  if (tensor.scalar_type() == type_of<U>() && tensor.is_contiguous()) return tensor;
  Array<U> array = array_of<U>(tensor);
  array.repeat(tensor.numel());
  Tensor out = empty_of(tensor, type_of<U>());
  std::copy(array.data, array.data + tensor.numel(), static_cast<U*>(out.data_ptr()));
  return out;
}

template <class T, class X, class S>
T dot(const X* a, const S* b, int64_t n) {
  using MLKERNELS_ISA::widen;
  constexpr int LANES = 16;
  T sums[LANES] = {};
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES)
    for (int k = 0; k < LANES; ++k) sums[k] += T(widen(a[j + k])) * T(widen(b[j + k]));
  for (int k = 0; j < n; ++j, ++k) sums[k] += T(widen(a[j])) * T(widen(b[j]));
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  return sums[0];
}
template <class T, class X>
T dot(const X* a, const void* b, Storage storage, int64_t at, int64_t n) {
  switch (storage) {
    case Storage::FLOAT: return dot<T>(a, static_cast<const float*>(b) + at, n);
    case Storage::DOUBLE: return dot<T>(a, static_cast<const double*>(b) + at, n);
    case Storage::BFLOAT16: return dot<T>(a, static_cast<const bfloat16*>(b) + at, n);
    default: return dot<T>(a, static_cast<const float16*>(b) + at, n);
  }
}

constexpr int64_t PARAMETERS = (int64_t(1) << TRAINABLE_SLOTS) - 1;

template <class T>
struct WholeHead {
  Tensor x;
  const Tensor& weight;
  const std::optional<Tensor>&bias, &inverse;
  const Tensor& room;
  const std::vector<int64_t>& plan;
  const std::vector<double>& numbers;
  std::vector<Tensor> params;  // those of classes contiguous and in T
  Call<T> call;
  CpuProblem<T>& p;
  const int64_t needs, n, classes, width, left;  // left: rows that are not ignored
  const bool tiles;                              // of whose gradient anything is needed
  ByParameter<T> parameters;
  Tensor label;
  std::vector<int64_t> index;  // where the rows that are left were, if not all are
  std::optional<Tensor> dx, dw, db;

  WholeHead(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_,
            const std::optional<Tensor>& inverse_, const Tensor& target, const Tensor& room_,
            const std::vector<int64_t>& plan_, const std::vector<double>& numbers_, const std::vector<Tensor>& params_,
            int64_t needs_)
      : x(x_),
        weight(weight_),
        bias(bias_),
        inverse(inverse_),
        room(room_),
        plan(plan_),
        numbers(numbers_),
        params(params_),
        call(target, numbers, params_, checked()),
        p(call.p),
        needs(needs_),
        n(p.rows),
        classes(p.classes),
        width(weight.size(1)),
        left(int64_t(call.kept)),
        tiles(needs >> INPUT & 7),
        parameters(call, needs & PARAMETERS),
        label(contiguous_of<int64_t>(target)) {
    STD_TORCH_CHECK(x.size(0) == n && target.dim() == 1, "x must have a row for each label");
    STD_TORCH_CHECK(!(needs >> (INPUT + 3)) && (bias || !(needs >> BIAS_BIT & 1)),
                    "needs asks for the gradient of what is no tensor");
    STD_TORCH_CHECK(!needs || call.reduction != Reduction::NONE, "gradients are made with a loss that is reduced");
    for (const Extra& extra : EXTRAS)
      if (const Tensor* given = call.tensors[extra.slot]; given && extra.per == Mode::PER_CLASS)
        params[size_t(given - params_.data())] = contiguous_of<T>(*given);
    if (left < n) leave_out();
    if (needs >> INPUT & 1) dx = empty({left, width}, type_of<T>());
    if (needs >> WEIGHT_BIT & 1) dw = room_like(room, {classes, width});
    if (needs >> BIAS_BIT & 1) db = empty({classes}, type_of<T>());
    for (const auto& sum : {dw, db})
      if (sum && left == 0) std::memset(sum->data_ptr(), 0, size_t(sum->numel()) * sizeof(T));
    p.up_value = 1;
    p.grad = tiles ? &p : nullptr;  // that one is wanted: where it goes the tiles know
  }
  WholeHead(const WholeHead&) = delete;

  // How many classes there are.
  int64_t checked() const {
    STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(1) == x.size(1),
                    "x must be (rows, width), weight (classes, width)");
    const ScalarType stored = x.scalar_type();
    STD_TORCH_CHECK((stored == type_of<T>() || stored == ScalarType::BFloat16) && x.is_contiguous(),
                    "x must be contiguous, float32, float64 or bfloat16");
    STD_TORCH_CHECK(weight.size(1) < 2 || weight.stride(1) == 1, "weight must have a stride of 1 along width");
    STD_TORCH_CHECK(plan.size() == 5 && plan[3] > 0, "plan must be five numbers");
    for (const auto& of_class : {bias, inverse})
      STD_TORCH_CHECK(!of_class || (of_class->numel() == weight.size(0) && of_class->is_contiguous() &&
                                    of_class->scalar_type() == type_of<T>()),
                      "bias and inverse are a number for each class, of the room's dtype");
    return weight.size(0);
  }

  // Rows that are ignored, before the first product.
  void leave_out() {
    const size_t bytes = size_t(width) * x.element_size();
    Tensor rows = empty({left, width}, x.scalar_type()), labels = empty({left}, ScalarType::Long);
    index.reserve(size_t(left));
    for (int64_t row = 0; row < n; ++row) {
      if (p.label[row] == p.spec.ignore_index) {
        MLKERNELS_ISA::leave_parameters(p, row, T(0));
        continue;
      }
      const size_t at = index.size();
      std::memcpy(static_cast<char*>(rows.data_ptr()) + at * bytes,
                  static_cast<const char*>(x.data_ptr()) + size_t(row) * bytes, bytes);
      static_cast<int64_t*>(labels.data_ptr())[at] = p.label[row];
      index.push_back(row);
    }
    x = rows;
    label = labels;
  }
  int64_t place(int64_t i) const { return index.empty() ? i : index[size_t(i)]; }

  // The target's product of each row, never taken from a tile.
  void of_targets(int64_t first, int64_t count, T* f_y) const {
    const Storage storage = storage_of(weight.scalar_type());
    const bool half = x.scalar_type() == ScalarType::BFloat16;
    const void* const rows = x.data_ptr();
    const T* const add = bias ? static_cast<const T*>(bias->data_ptr()) : nullptr;
    const T* const factor = inverse ? static_cast<const T*>(inverse->data_ptr()) : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t y = p.label[place(first + i)], at = (first + i) * width, from = y * weight.stride(0);
      const T product = half ? dot<T>(static_cast<const bfloat16*>(rows) + at, weight.data_ptr(), storage, from, width)
                             : dot<T>(static_cast<const T*>(rows) + at, weight.data_ptr(), storage, from, width);
      f_y[i] = (factor ? product * factor[y] : product) + (add ? add[y] : T(0));
    }
  }

  // All the scales that a row may turn out to have: of the least confident one, and of the most.
  void scales_of(int64_t first, int64_t rows, int64_t count, T* scales) const {
    const T confidence[] = {-MLKERNELS_ISA::infinity<T>(), MLKERNELS_ISA::infinity<T>()};
    MLKERNELS_ISA::Values<T> values;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = place(first + i);
      if (i == 0 || !p.uniform) fetch(p, row, p.label[row], p.group ? p.group[row] : 0, values);
      for (int64_t k = 0; k < count; ++k) scales[k * rows + i] = row_scale(p.spec, values, confidence[k]).value;
    }
  }

  // A chunk of rows: statistics of all classes, finish, gradients.
  void visit(int64_t first, int64_t count) const {
    const int64_t several = p.spec.scale == Scale::TWO_SCALE ? 2 : 1;
    const bool keep = tiles && plan[4];
    const double softcap = double(p.preparation.softcap);
    const std::vector<int64_t> cut(plan.begin(), plan.begin() + 3);
    const Tensor rows = rows_of(x, first, count), labels = rows_of(label, first, count);
    Tensor u_y = empty({count}, type_of<T>()), scales = empty({several, count}, type_of<T>());
    T* const u = static_cast<T*>(u_y.data_ptr());
    of_targets(first, count, u);
    const std::vector<T> f_y(u, u + (softcap > 0 ? count : 0));
    for (int64_t i = 0; i < count; ++i) u[i] = MLKERNELS_ISA::prepare(p.preparation, u[i], p.label[place(first + i)]);
    scales_of(first, count, several, static_cast<T*>(scales.data_ptr()));
    const int64_t want = (p.want_shift ? 1 : 0) + (p.smoothing > 0 ? 8 : 0);
    const auto [known_reals, places] = linear_statistics(rows, weight, bias, inverse, labels, 0, numbers, params, room,
                                                         keep, cut, u_y, scales, classes, want);
    const T* const reals = static_cast<const T*>(known_reals.data_ptr());
    const T* const sums = reals + 3 * count;
    const int64_t* const where = index.empty() ? nullptr : index.data() + first;
    const KnownRows<T> known{first,
                             count,
                             where,
                             u,
                             reals,
                             sums,
                             p.want_shift ? sums + several * count : nullptr,
                             nullptr,
                             several,
                             p.smoothing > 0 ? reals + count : nullptr};
    FinishedRows<T> out{};
    Tensor row[6];
    if (tiles) {
      T** const places_of[] = {&out.factor, &out.slope, &out.spread, &out.target, &out.scale, &out.top};
      for (int i = 0; i < 6; ++i) {
        row[i] = empty({count}, type_of<T>());
        *places_of[i] = static_cast<T*>(row[i].data_ptr());
      }
    }
    torch::stable::parallel_for(0, count, 256,
                                [&](int64_t begin, int64_t end) { finish_rows(p, known, out, begin, end); });
    if (!tiles) return;
    for (size_t i = 0; i < f_y.size(); ++i) out.target[i] *= cap_slope_at(f_y[i], p.preparation.softcap);
    std::optional<Tensor> spread, features;
    if (p.smoothing > 0) spread = row[2];
    if (dx) features = rows_of(*dx, first, count);
    linear_gradient(rows, weight, bias, inverse, labels, 0, numbers, params, room, keep, cut, row[0], {}, spread,
                    row[3], row[4], row[5], features, dw, db, first == 0, first + count == left);
  }

  // Of c tanh(f / c). 1 - tanh^2 without the difference, which cancels where tanh is near 1.
  static T cap_slope_at(T f, T c) {
    const T e = MLKERNELS_ISA::m_exp(-2 * MLKERNELS_ISA::m_abs(f / c));
    return 4 * e / ((1 + e) * (1 + e));
  }

  // Rows that were left at the places of all.
  Tensor scattered(const Tensor& rows) const {
    Tensor all = empty({n, width}, type_of<T>());
    const T* from = static_cast<const T*>(rows.data_ptr());
    T* const to = static_cast<T*>(all.data_ptr());
    std::fill(to, to + n * width, T(0));
    for (const int64_t row : index) {
      std::copy(from, from + width, to + row * width);
      from += width;
    }
    return all;
  }

  std::tuple<Tensor, std::vector<Tensor>> run() {
    Tensor losses = empty({n}, type_of<T>());
    p.losses = static_cast<T*>(losses.data_ptr());
    if (left < n) std::fill(p.losses, p.losses + n, T(0));
    for (int64_t first = 0; first < left; first += plan[3]) visit(first, std::min(plan[3], left - first));
    if (dx && left < n) dx = scattered(*dx);
    std::vector<Tensor> gradients = parameters.sums();
    for (const auto& one : {dx, dw, db})
      if (one) gradients.push_back(*one);
    if (call.reduction == Reduction::NONE) return {losses, gradients};
    double sum = 0 * double(p.by_class_factor);  // the mean of no rows is NaN
    for (int64_t i = 0; i < n; ++i) sum += double(p.losses[i]);
    Tensor loss = empty({}, type_of<T>());
    *static_cast<T*>(loss.data_ptr()) = T(sum);
    return {loss, gradients};
  }
};

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> linear_loss_with_gradients(const Tensor& x, const Tensor& weight,
                                                                   std::optional<Tensor> bias,
                                                                   std::optional<Tensor> inverse, const Tensor& target,
                                                                   const Tensor& room, std::vector<int64_t> plan,
                                                                   std::vector<double> numbers,
                                                                   std::vector<Tensor> params, int64_t needs) {
  return by_type(x, [&](auto zero) {
    return WholeHead<decltype(zero)>(x, weight, bias, inverse, target, room, plan, numbers, params, needs).run();
  });
}

}  // namespace mlkernels

STABLE_TORCH_LIBRARY_IMPL(mlkernels, CPU, m) {
  m.impl("row_finish", TORCH_BOX(&mlkernels::row_finish));
  m.impl("linear_loss_with_gradients", TORCH_BOX(&mlkernels::linear_loss_with_gradients));
}
