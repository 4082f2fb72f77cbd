// The CPU's operators of pieces, for heads (mlkernels/linear): tensors to plain arrays, rows to threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "cpu/pieces.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

extern "C" int mlkernels_cpu_isa();

namespace mlkernels {
namespace {

const PieceKernels& kernels() {
#if defined(__x86_64__)
  static const PieceKernels* const table[] = {&baseline::piece_kernels, &avx2::piece_kernels, &avx512::piece_kernels};
  return *table[mlkernels_cpu_isa()];
#else
  return baseline::piece_kernels;
#endif
}

template <class T>
struct Run;
template <>
struct Run<float> {
  static void rows(const PieceStatistics<float>& p, int64_t a, int64_t b) { kernels().statistics_float(p, a, b); }
  static void rows(const PieceGradient<float>& p, int64_t a, int64_t b) { kernels().gradient_float(p, a, b); }
};
template <>
struct Run<double> {
  static void rows(const PieceStatistics<double>& p, int64_t a, int64_t b) { kernels().statistics_double(p, a, b); }
  static void rows(const PieceGradient<double>& p, int64_t a, int64_t b) { kernels().gradient_double(p, a, b); }
};

template <class U>
U* array(const Tensor& tensor, int64_t count, const char* name) {
  const ScalarType wanted = sizeof(U) == 4               ? ScalarType::Float
                            : std::is_integral<U>::value ? ScalarType::Long
                                                         : ScalarType::Double;
  STD_TORCH_CHECK(tensor.scalar_type() == wanted && tensor.numel() == count && tensor.is_contiguous(), name,
                  " must be contiguous, of ", count, " elements, of the tile's dtype, or int64 where it is an index");
  return static_cast<U*>(tensor.data_ptr());
}
template <class U>
U* array(const std::optional<Tensor>& tensor, int64_t count, const char* name) {
  return tensor ? array<U>(*tensor, count, name) : nullptr;
}

template <class T, template <class> class Kind>
Kind<T> piece_of(const Tensor& tile, const Tensor& label, int64_t start, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& adjustment, double softcap) {
  STD_TORCH_CHECK(tile.dim() == 2, "tile must be (rows, classes)");
  Kind<T> p{};
  p.rows = tile.size(0);
  p.classes = tile.size(1);
  p.tile = array<T>(tile, p.rows * p.classes, "tile");
  p.start = start;
  p.label = array<int64_t>(label, p.rows, "label");
  p.softcap = T(softcap);
  for (const auto& vector : {weight, adjustment})
    STD_TORCH_CHECK(!vector || (start >= 0 && vector->numel() >= start + p.classes),
                    "a tile must lie within the classes");
  if (weight) p.weight = array<T>(*weight, weight->numel(), "weight") + start;
  if (adjustment) p.adjustment = array<T>(*adjustment, adjustment->numel(), "adjustment") + start;
  return p;
}

template <class T, class Piece>
void run(const Piece& p) {
  if (p.rows == 0 || p.classes == 0) return;
  // Below this many elements a second thread costs more than it brings.
  constexpr int64_t GRAIN = 1 << 15;
  torch::stable::parallel_for(0, p.rows, GRAIN / p.classes + 1,
                              [&p](int64_t begin, int64_t end) { Run<T>::rows(p, begin, end); });
}

template <class T>
void statistics_of(const Tensor& tile, const Tensor& target_logit, const Tensor& label, int64_t start,
                   const Tensor& scales, const std::optional<Tensor>& weight, const std::optional<Tensor>& adjustment,
                   double softcap, const Tensor& top, const Tensor& total, const std::optional<Tensor>& shift,
                   const std::optional<Tensor>& second, const std::optional<Tensor>& weighted,
                   const std::optional<Tensor>& weights, const Tensor& first, const Tensor& above) {
  auto p = piece_of<T, PieceStatistics>(tile, label, start, weight, adjustment, softcap);
  p.target_logit = array<T>(target_logit, p.rows, "target_logit");
  p.count = scales.size(0);
  const int64_t each = p.count * p.rows;
  p.scales = array<T>(scales, each, "scales");
  p.top = array<T>(top, p.rows, "top");
  p.total = array<T>(total, each, "total");
  p.shift = array<T>(shift, each, "shift");
  p.square = array<T>(second, each, "second");
  p.weighted = array<T>(weighted, p.rows, "weighted");
  p.weights = array<T>(weights, p.rows, "weights");
  STD_TORCH_CHECK(!p.weighted == !p.weights, "weighted and weights come together");
  p.first = array<int64_t>(first, p.rows, "first");
  p.above = array<int64_t>(above, p.rows, "above");
  run<T>(p);
}

void piece_statistics(const Tensor& tile, const Tensor& target_logit, const Tensor& label, int64_t start,
                      const Tensor& scales, std::optional<Tensor> weight, std::optional<Tensor> adjustment,
                      double softcap, const Tensor& top, const Tensor& total, std::optional<Tensor> shift,
                      std::optional<Tensor> second, std::optional<Tensor> weighted, std::optional<Tensor> weights,
                      const Tensor& first, const Tensor& above) {
  (tile.scalar_type() == ScalarType::Double ? statistics_of<double>
                                            : statistics_of<float>)(tile, target_logit, label, start, scales, weight,
                                                                    adjustment, softcap, top, total, shift, second,
                                                                    weighted, weights, first, above);
}

template <class T>
void gradient_of(const Tensor& tile, const Tensor& label, int64_t start, bool seen, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& adjustment, double softcap, const Tensor& factor,
                 const std::optional<Tensor>& slope, const std::optional<Tensor>& spread, const Tensor& scale,
                 const Tensor& top) {
  auto p = piece_of<T, PieceGradient>(tile, label, start, weight, adjustment, softcap);
  p.seen = seen;
  p.factor = array<T>(factor, p.rows, "factor");
  p.slope = array<T>(slope, p.rows, "slope");
  p.spread = array<T>(spread, p.rows, "spread");
  p.scale = array<T>(scale, p.rows, "scale");
  p.top = array<T>(top, p.rows, "top");
  run<T>(p);
}

void piece_gradient(const Tensor& tile, const Tensor& label, int64_t start, bool seen, std::optional<Tensor> weight,
                    std::optional<Tensor> adjustment, double softcap, const Tensor& factor, std::optional<Tensor> slope,
                    std::optional<Tensor> spread, const Tensor& scale, const Tensor& top) {
  (tile.scalar_type() == ScalarType::Double
       ? gradient_of<double>
       : gradient_of<float>)(tile, label, start, seen, weight, adjustment, softcap, factor, slope, spread, scale, top);
}

}  // namespace
}  // namespace mlkernels

STABLE_TORCH_LIBRARY_IMPL(mlkernels, CPU, m) {
  m.impl("piece_statistics", TORCH_BOX(&mlkernels::piece_statistics));
  m.impl("piece_gradient", TORCH_BOX(&mlkernels::piece_gradient));
}
