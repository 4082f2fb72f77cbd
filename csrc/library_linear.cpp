// The CPU's operators for linear heads (mlkernels/linear) that know a loss.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "cpu/call.h"
#include "cpu/linear.h"
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
    p.row_weight = {};  // these are in the upstream gradients
    p.by_class_factor = p.by_row_factor = 0;
    out.up_by_class = some(by_class, n);
    out.up_by_row = some(by_row, n);
    p.up_logsumexp = {some(logsumexp, n), 1};
    p.up_log_prob = {some(log_prob, n), 1};
    p.up_entropy = {some(entropy, n), 1};
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

// ---- a linear head whose gradients are made with its loss -----------------------------------------------------------

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
// Calls body with a tensor's elements.
template <class Body>
void by_storage(const Tensor& tensor, Body body) {
  const void* const data = tensor.data_ptr();
  switch (storage_of(tensor.scalar_type())) {
    case Storage::FLOAT: return body(static_cast<const float*>(data));
    case Storage::DOUBLE: return body(static_cast<const double*>(data));
    case Storage::BFLOAT16: return body(static_cast<const bfloat16*>(data));
    default: return body(static_cast<const float16*>(data));
  }
}

constexpr int64_t PARAMETERS = (int64_t(1) << TRAINABLE_SLOTS) - 1;

// A norm; NaN where the squares overflow: no direction is 0, as 1 / inf would say.
template <class T>
T length_of(T squares) {
  return squares < MLKERNELS_ISA::infinity<T>() ? std::sqrt(squares) : MLKERNELS_ISA::nan<T>();
}

// All classes of a weight and all rows: what the operators of a whole linear head share.
template <class T>
struct WholeLinear {
  Tensor x;  // the rows that are left; their directions, where cosines are wanted
  const Tensor& weight;
  const std::optional<Tensor>& bias;
  const Tensor workspace;
  const std::vector<int64_t>& plan;
  std::vector<int64_t> cut;  // of the plan, that of classes
  Call<T> call;
  CpuProblem<T>& p;
  const int64_t n, classes, width, left;  // left: rows that are not ignored
  const int64_t several;                  // scales that a row may turn out to have
  Tensor label;
  std::vector<int64_t> index;     // where the rows that are left were, if not all are
  std::vector<T> length;          // of these rows, if x are their directions
  std::optional<Tensor> inverse;  // of the lengths of the weight's rows, then
  // What is multiplied for logits then, where features and weight are bfloat16: the rows about as long as 1, and what
  // makes directions of that.
  std::optional<Tensor> halves;
  std::vector<T> row_factor;

  WholeLinear(const LinearArguments& of)
      : x(of.x),
        weight(of.weight),
        bias(of.bias),
        workspace(buffer_of({of.workspace}, type_of<T>(), sizeof(T))),
        plan(of.plan),
        call(of.target, of.numbers, of.params, checked()),
        p(call.p),
        n(p.rows),
        classes(p.classes),
        width(weight.size(1)),
        left(int64_t(call.kept)),
        several(p.spec.scale == Scale::TWO_SCALE ? 2 : 1),
        label(contiguous_of<int64_t>(of.target)) {
    STD_TORCH_CHECK(x.size(0) == n && of.target.dim() == 1, "x must have a row for each label");
    cut.assign(plan.begin(), plan.begin() + 3);
    if (left < n) leave_out();
    if (of.normalize) take_directions();
  }
  WholeLinear(const WholeLinear&) = delete;

  // How many classes there are.
  int64_t checked() const {
    STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(1) == x.size(1),
                    "x must be (rows, width), weight (classes, width)");
    const ScalarType stored = x.scalar_type();
    STD_TORCH_CHECK((stored == type_of<T>() || stored == ScalarType::BFloat16) && x.is_contiguous(),
                    "x must be contiguous, float32, float64 or bfloat16");
    STD_TORCH_CHECK(weight.size(1) < 2 || weight.stride(1) == 1, "weight must have a stride of 1 along width");
    STD_TORCH_CHECK(plan.size() == 5 && plan[3] > 0, "plan must be five numbers");
    STD_TORCH_CHECK(
        !bias || (bias->numel() == weight.size(0) && bias->is_contiguous() && bias->scalar_type() == type_of<T>()),
        "bias is a number for each class, of the dtype of sums");
    return weight.size(0);
  }

  // Rows that are ignored, before the first product.
  void leave_out() {
    const size_t bytes = size_t(width) * x.element_size();
    Tensor rows = empty({left, width}, x.scalar_type()), labels = empty({left}, ScalarType::Long);
    index.reserve(size_t(left));
    for (int64_t row = 0; row < n; ++row) {
      if (p.label[row] == p.spec.ignore_index) continue;
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

  // Calls body(i) for each of so many rows or classes, on as many threads as that is worth.
  template <class Body>
  void each(int64_t count, Body body) const {
    torch::stable::parallel_for(0, count, (1 << 15) / (width + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }

  void take_directions() {
    STD_TORCH_CHECK(!bias, "cosines have no bias");
    if (x.scalar_type() == ScalarType::BFloat16) take_halves();
    const T* const from = static_cast<const T*>(x.data_ptr());
    Tensor unit = empty({left, width}, type_of<T>()), inverses = empty({classes}, type_of<T>());
    T *const to = static_cast<T*>(unit.data_ptr()), *const one_over = static_cast<T*>(inverses.data_ptr());
    length.resize(size_t(left));
    each(left, [&](int64_t i) {
      const T own = length[size_t(i)] = length_of(dot<T>(from + i * width, from + i * width, width));
      for (int64_t k = i * width; k < (i + 1) * width; ++k) to[k] = from[k] / own;
    });
    by_storage(weight, [&](const auto* rows) {
      each(classes, [&](int64_t j) {
        const auto* const row = rows + j * weight.stride(0);
        one_over[j] = 1 / length_of(dot<T>(row, row, width));
      });
    });
    x = unit;
    inverse = inverses;
  }

  // Rows of bfloat16, and the same widened. Divided by a power of 2 no bit is lost, and no product of two vectors is too
  // small where their lengths are numbers.
  void take_halves() {
    halves = empty({left, width}, ScalarType::BFloat16);
    Tensor wide = empty({left, width}, type_of<T>());
    row_factor.resize(size_t(left));
    const auto* const from = static_cast<const bfloat16*>(x.data_ptr());
    auto* const to = static_cast<bfloat16*>(halves->data_ptr());
    T* const widened = static_cast<T*>(wide.data_ptr());
    each(left, [&](int64_t i) {
      const T own = length_of(dot<T>(from + i * width, from + i * width, width));
      const bool usual = own > 0 && own < MLKERNELS_ISA::infinity<T>();
      const T power = usual ? std::ldexp(T(1), std::ilogb(own)) : T(1);
      row_factor[size_t(i)] = power / own;
      for (int64_t k = i * width; k < (i + 1) * width; ++k) {
        widened[k] = MLKERNELS_ISA::widen(from[k]);
        MLKERNELS_ISA::narrow(float(widened[k] / power), to[k]);
      }
    });
    x = wide;
  }

  // The target's product of each row, never taken from a tile.
  void of_targets(int64_t first, int64_t count, T* f_y) const {
    const T* const add = bias ? static_cast<const T*>(bias->data_ptr()) : nullptr;
    const T* const factor = inverse ? static_cast<const T*>(inverse->data_ptr()) : nullptr;
    by_storage(weight, [&](const auto* classes) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t y = p.label[place(first + i)], at = (first + i) * width;
        const auto* const row = classes + y * weight.stride(0);
        const T product = x.scalar_type() == ScalarType::BFloat16
                              ? dot<T>(static_cast<const bfloat16*>(x.data_ptr()) + at, row, width)
                              : dot<T>(static_cast<const T*>(x.data_ptr()) + at, row, width);
        f_y[i] = (factor ? product * factor[y] : product) + (add ? add[y] : T(0));
      }
    });
  }

  // All the scales that a row may turn out to have: of the least confident one, and of the most.
  void scales_of(int64_t first, int64_t rows, T* scales) const {
    const T confidence[] = {-MLKERNELS_ISA::infinity<T>(), MLKERNELS_ISA::infinity<T>()};
    MLKERNELS_ISA::Values<T> values;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = place(first + i);
      if (i == 0 || !p.uniform) fetch(p, row, p.label[row], p.group ? p.group[row] : 0, values);
      for (int64_t k = 0; k < several; ++k) scales[k * rows + i] = row_scale(p.spec, values, confidence[k]).value;
    }
  }

  // What is known of rows over all classes: f_y, u_y, then the reals of statistics_of, (numbers(), stride).
  int64_t numbers() const { return 5 + 3 * several; }
  struct Known {
    T* of;
    int64_t stride;
    T* at(int64_t number) const { return of + number * stride; }
  };

  // Of a chunk, whose lowest classes and counts go to whole, (2, count).
  void statistics(int64_t first, int64_t count, bool keep, int64_t want, const Known& known, int64_t* whole) const {
    // In the order of what is known.
    std::vector<T> scratch(size_t((numbers() + several) * count));
    T *const f_y = scratch.data(), *const u_y = f_y + count, *const reals = u_y + count;
    T* const scales = f_y + numbers() * count;
    of_targets(first, count, f_y);
    std::copy(f_y, u_y, u_y);
    if (p.preparation.softcap > 0) cap<T>(u_y, nullptr, count, p.preparation.softcap);
    if (p.preparation.adds())
      for (int64_t i = 0; i < count; ++i) u_y[i] += MLKERNELS_ISA::added(p.preparation, p.label[place(first + i)]);
    scales_of(first, count, scales);
    const Tensor rows = rows_of(x, first, count), labels = rows_of(label, first, count);
    statistics_of<T>(chunk(first, rows, labels, keep), u_y, scales, several, classes,
                     want + (p.smoothing > 0 ? Want::SMOOTHING : 0), reals, whole);
    for (int64_t k = 0; k < numbers(); ++k) std::copy(f_y + k * count, f_y + (k + 1) * count, known.at(k));
  }
  ChunkArguments<T> chunk(int64_t first, const Tensor& rows, const Tensor& labels, bool keep) const {
    ChunkArguments<T> made{rows, weight, bias, inverse, labels, 0, workspace, keep, cut, p.weight, p.preparation};
    if (!halves) return made;
    made.halves = static_cast<const bfloat16*>(halves->data_ptr()) + first * width;
    made.row_factor = row_factor.data() + first;
    return made;
  }

  // From there to the losses, if these are wanted, and to what else is.
  void finish(int64_t first, int64_t count, const Known& known, const FinishedRows<T>& out) const {
    const KnownRows<T> rows{first,
                            known.stride,
                            index.empty() ? nullptr : index.data() + first,
                            known.at(1),
                            known.at(2),
                            known.at(5),
                            p.want_shift ? known.at(5 + several) : nullptr,
                            p.want_square ? known.at(5 + 2 * several) : nullptr,
                            several,
                            p.smoothing > 0 ? known.at(3) : nullptr};
    torch::stable::parallel_for(0, count, 256,
                                [&](int64_t begin, int64_t end) { finish_rows(p, rows, out, begin, end); });
  }

  // A number for each row, as one that is ignored has it.
  template <class U>
  Tensor for_rows(U ignored, U*& data) const {
    Tensor made = empty({n}, type_of<U>());
    data = static_cast<U*>(made.data_ptr());
    if (left < n) std::fill(data, data + n, ignored);
    return made;
  }
  Tensor losses() {
    p.up_value = 1;
    return for_rows(T(0), p.losses);
  }
  Tensor reduced(const Tensor& losses) const {
    if (call.reduction == Reduction::NONE) return losses;
    double sum = 0 * double(p.by_class_factor);  // the mean of no rows is NaN
    for (int64_t i = 0; i < n; ++i) sum += double(p.losses[i]);
    Tensor loss = empty({}, type_of<T>());
    *static_cast<T*>(loss.data_ptr()) = T(sum);
    return loss;
  }
};

// Its gradients: of parameters by the bits of their slots, then of x, weight and bias.
template <class T>
struct LinearGradients {
  const WholeLinear<T>& linear;
  CpuProblem<T>& p;
  const bool tiles;  // of whose gradient anything is needed
  const ByParameter<T> parameters;
  std::optional<Tensor> dx, dw, db;

  LinearGradients(WholeLinear<T>& linear_, int64_t needs)
      : linear(linear_), p(linear_.p), tiles(needs >> INPUT & 7), parameters(linear_.call, needs & PARAMETERS) {
    STD_TORCH_CHECK(!(needs >> (INPUT + 3)) && (linear.bias || !(needs >> BIAS_BIT & 1)),
                    "needs asks for the gradient of what is no tensor");
    if (needs >> INPUT & 1) dx = empty({linear.left, linear.width}, type_of<T>());
    if (needs >> WEIGHT_BIT & 1) dw = buffer_of({linear.classes, linear.width}, type_of<T>(), sizeof(T));
    if (needs >> BIAS_BIT & 1) db = empty({linear.classes}, type_of<T>());
    for (const auto& sum : {dw, db})
      if (sum && linear.left == 0) std::memset(sum->data_ptr(), 0, size_t(sum->numel()) * sizeof(T));
    if (linear.left < linear.n)
      for (int64_t row = 0; row < linear.n; ++row)
        if (p.label[row] == p.spec.ignore_index) MLKERNELS_ISA::store_parameters(p, row, T(0));
    p.grad = tiles ? &p : nullptr;  // that one is wanted: where it goes the tiles know
  }

  // Those of a chunk. kept: its products are in the workspace.
  void add(int64_t first, int64_t count, const typename WholeLinear<T>::Known& known, bool kept) const {
    FinishedRows<T> out{};
    std::vector<T> coefficients(size_t(6 * count));
    T** const places[] = {&out.factor, &out.slope, &out.spread, &out.target, &out.scale, &out.top};
    for (int i = 0; i < 6; ++i) *places[i] = coefficients.data() + i * count;
    linear.finish(first, count, known, out);
    if (!tiles) return;
    if (const T softcap = p.preparation.softcap; softcap > 0) {
      std::vector<T> f_y(known.at(0), known.at(0) + count), slope(size_t(count), T(0));
      cap<T>(f_y.data(), slope.data(), count, softcap);
      for (int64_t i = 0; i < count; ++i) out.target[i] *= slope[size_t(i)];
    }
    PieceGradient<T> piece{};
    piece.seen = kept;
    piece.factor = out.factor;
    piece.slope = p.up_entropy ? out.slope : nullptr;
    piece.spread = p.smoothing > 0 ? out.spread : nullptr;
    piece.scale = out.scale;
    piece.top = out.top;
    const auto data = [](const std::optional<Tensor>& sum) { return sum ? static_cast<T*>(sum->data_ptr()) : nullptr; };
    const Tensor rows = rows_of(linear.x, first, count), labels = rows_of(linear.label, first, count);
    gradients_of<T>(linear.chunk(first, rows, labels, kept), piece,
                    {dx ? data(dx) + first * linear.width : nullptr, data(dw), data(db), out.target, out.factor,
                     first == 0, first + count == linear.left});
  }

  std::vector<Tensor> all() {
    if (dx && linear.inverse) along_lengths();
    if (dx && linear.left < linear.n) dx = scattered(*dx);
    std::vector<Tensor> gradients = parameters.sums();
    for (const auto& one : {dx, dw, db})
      if (one) gradients.push_back(*one);
    return gradients;
  }

  // The gradient of the features from that of their directions.
  void along_lengths() const {
    const int64_t width = linear.width;
    const T* const directions = static_cast<const T*>(linear.x.data_ptr());
    T* const gradients = static_cast<T*>(dx->data_ptr());
    linear.each(linear.left, [&](int64_t i) {
      const T* const direction = directions + i * width;
      T* const gradient = gradients + i * width;
      const T along = dot<T>(gradient, direction, width), length = linear.length[size_t(i)];
      for (int64_t k = 0; k < width; ++k) gradient[k] = (gradient[k] - along * direction[k]) / length;
    });
  }

  // Rows that were left at the places of all.
  Tensor scattered(const Tensor& rows) const {
    const int64_t width = linear.width;
    Tensor all = empty({linear.n, width}, type_of<T>());
    const T* from = static_cast<const T*>(rows.data_ptr());
    T* const to = static_cast<T*>(all.data_ptr());
    std::fill(to, to + linear.n * width, T(0));
    for (const int64_t row : linear.index) {
      std::copy(from, from + width, to + row * width);
      from += width;
    }
    return all;
  }
};

template <class T>
std::tuple<Tensor, std::vector<Tensor>> at_once(const LinearArguments& of, int64_t needs) {
  WholeLinear<T> linear(of);
  STD_TORCH_CHECK(!needs || linear.call.reduction != Reduction::NONE, "gradients are made with a loss that is reduced");
  const Tensor losses = linear.losses();
  LinearGradients<T> gradients(linear, needs);
  const bool keep = gradients.tiles && of.plan[4];
  const int64_t most = std::min(of.plan[3], linear.left);
  std::vector<T> numbers(size_t(linear.numbers() * most));
  std::vector<int64_t> whole(size_t(2 * most));
  for (int64_t first = 0; first < linear.left; first += most) {
    const int64_t count = std::min(most, linear.left - first);
    const typename WholeLinear<T>::Known known{numbers.data(), count};
    linear.statistics(first, count, keep, linear.p.want_shift ? Want::SHIFT : 0, known, whole.data());
    if (needs)
      gradients.add(first, count, known, keep);
    else
      linear.finish(first, count, known, {});
  }
  return {linear.reduced(losses), gradients.all()};
}

// Losses, what is known of each row, and where they are wanted RowStats.
template <class T>
std::tuple<Tensor, Tensor, std::vector<Tensor>> losses_and_rows(const LinearArguments& of, bool stats) {
  WholeLinear<T> linear(of);
  CpuProblem<T>& p = linear.p;
  bool scaled = false;
  for (int slot = 0; slot < SLOTS; ++slot) scaled |= (OF_SCALE >> slot & 1) && linear.call.tensors[slot];
  p.want_shift = stats;
  const int64_t n = linear.n, left = linear.left;
  const int64_t want =
      (stats || scaled ? Want::SHIFT : 0) + (stats && scaled ? Want::SECOND : 0) + (stats ? Want::RANKS : 0);
  const Tensor losses = linear.losses();
  Tensor saved = empty({linear.numbers(), n}, type_of<T>());
  T* const numbers = static_cast<T*>(saved.data_ptr());
  if (left < n) std::fill(numbers, numbers + linear.numbers() * n, T(0));
  std::vector<Tensor> rows;
  T* reals[4] = {};
  int64_t* wholes[2] = {};
  if (stats) {
    for (int i = 0; i < 3; ++i) rows.push_back(linear.for_rows(T(0), reals[i]));
    rows.push_back(linear.for_rows(int64_t(-1), wholes[0]));
    rows.push_back(linear.for_rows(T(0), reals[3]));
    rows.push_back(linear.for_rows(int64_t(0), wholes[1]));
  }
  for (int64_t first = 0; first < left; first += of.plan[3]) {
    const int64_t count = std::min(of.plan[3], left - first);
    const typename WholeLinear<T>::Known known{numbers + first, n};
    std::vector<int64_t> whole(size_t(2 * count));
    linear.statistics(first, count, false, want, known, whole.data());
    std::vector<T> finished(size_t(stats ? 5 * count : 0));
    FinishedRows<T> out{};
    T** const places[] = {&out.by_class, &out.by_row, &out.logsumexp, &out.log_prob, &out.entropy};
    for (int i = 0; stats && i < 5; ++i) *places[i] = finished.data() + i * count;
    linear.finish(first, count, known, out);
    const int64_t *const lowest = whole.data(), *const above = lowest + count;
    for (int64_t i = 0; stats && i < count; ++i) {
      const int64_t row = linear.place(first + i), y = p.label[row];
      const T u_y = known.at(1)[i], top = known.at(2)[i];
      for (int k = 0; k < 3; ++k) reals[k][row] = finished[size_t((2 + k) * count + i)];
      const int64_t best = u_y > top ? y : u_y == top ? std::min(y, lowest[i]) : lowest[i];
      wholes[0][row] = best < linear.classes && u_y == u_y ? best : -1;
      reals[3][row] = u_y - top;
      wholes[1][row] = above[i];
    }
  }
  return {linear.reduced(losses), saved, rows};
}

template <class T>
std::vector<Tensor> gradients_of_rows(const LinearArguments& of, const Tensor& saved,
                                      const std::array<std::optional<Tensor>, 4>& upstream, int64_t needs) {
  WholeLinear<T> linear(of);
  CpuProblem<T>& p = linear.p;
  check_backward(linear.call.arguments, of.target, upstream[0], {&upstream[1], &upstream[2], &upstream[3]},
                 empty({0}, type_of<T>()), 0, type_of<T>());
  STD_TORCH_CHECK(
      saved.numel() == linear.numbers() * linear.n && saved.is_contiguous() && saved.scalar_type() == type_of<T>(),
      "saved must be what the forward returned");
  const std::array<PerRow<T>*, 4> to{&p.up_loss, &p.up_logsumexp, &p.up_log_prob, &p.up_entropy};
  std::array<Array<T>, 4> arrays;
  for (size_t i = 0; i < 4; ++i) {
    if (!upstream[i]) continue;
    arrays[i] = array_of<T>(*upstream[i]);
    *to[i] = {arrays[i].data, arrays[i].stride};
  }
  if (linear.call.reduction != Reduction::NONE) p.up_loss.stride = 0;
  LinearGradients<T> gradients(linear, needs);
  T* const numbers = static_cast<T*>(saved.data_ptr());
  for (int64_t first = 0; first < linear.left; first += of.plan[3])
    gradients.add(first, std::min(of.plan[3], linear.left - first), {numbers + first, linear.n}, false);
  return gradients.all();
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> linear_loss_with_gradients(const LinearArguments& of, int64_t needs) {
  return by_type(of.x, [&](auto zero) { return at_once<decltype(zero)>(of, needs); });
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> linear_rows(const LinearArguments& of, bool stats) {
  return by_type(of.x, [&](auto zero) { return losses_and_rows<decltype(zero)>(of, stats); });
}

std::vector<Tensor> linear_rows_backward(const LinearArguments& of, const Tensor& saved,
                                         const std::array<std::optional<Tensor>, 4>& upstream, int64_t needs) {
  return by_type(of.x, [&](auto zero) { return gradients_of_rows<decltype(zero)>(of, saved, upstream, needs); });
}

namespace {

// The operators, whose arguments LinearArguments are.
auto loss_with_gradients(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, bool normalize,
                         const Tensor& target, int64_t workspace, std::vector<int64_t> plan,
                         std::vector<double> numbers, std::vector<Tensor> params, int64_t needs) {
  return linear_loss_with_gradients({x, weight, bias, normalize, target, workspace, plan, numbers, params}, needs);
}
auto rows(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, bool normalize, const Tensor& target,
          int64_t workspace, std::vector<int64_t> plan, std::vector<double> numbers, std::vector<Tensor> params,
          bool stats) {
  return linear_rows({x, weight, bias, normalize, target, workspace, plan, numbers, params}, stats);
}
auto rows_backward(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, bool normalize,
                   const Tensor& target, int64_t workspace, std::vector<int64_t> plan, std::vector<double> numbers,
                   std::vector<Tensor> params, const Tensor& saved, std::optional<Tensor> grad_loss,
                   std::optional<Tensor> grad_logsumexp, std::optional<Tensor> grad_log_prob,
                   std::optional<Tensor> grad_entropy, int64_t needs) {
  return linear_rows_backward({x, weight, bias, normalize, target, workspace, plan, numbers, params}, saved,
                              {grad_loss, grad_logsumexp, grad_log_prob, grad_entropy}, needs);
}

}  // namespace
}  // namespace mlkernels

STABLE_TORCH_LIBRARY_IMPL(mlkernels, CPU, m) {
  m.impl("row_finish", TORCH_BOX(&mlkernels::row_finish));
  m.impl("linear_loss_with_gradients", TORCH_BOX(&mlkernels::loss_with_gradients));
  m.impl("linear_rows", TORCH_BOX(&mlkernels::rows));
  m.impl("linear_rows_backward", TORCH_BOX(&mlkernels::rows_backward));
}
