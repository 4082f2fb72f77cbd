// Rows whose classes do not lie together, as in (N, C, d1, ...): one thread a row, neighbouring threads neighbouring rows.
// Any strides. Bytes: three readings and one writing, of which the caches serve what they hold.
#pragma once

#include "visit.h"

namespace mlkernels {
namespace MLKERNELS_ISA {

struct ApartPlan {};

template <class T_, class S_>
struct RowsApart {
  using T = T_;
  using S = S_;
  static constexpr int THREADS = 256, BLOCKS = 2;
  static constexpr T INF = std::numeric_limits<T>::infinity();

  template <class Simt>
  static MLK_DEVICE void run(const Simt& simt, const Visit<T>& v, const ApartPlan&) {
    if (v.unless_one && *v.unless_one == T(1)) return;
    const Batch<T> batch = batch_on_device(v);
    const Share<T> share = share_of(simt, v);
    double by_class = 0, by_row = 0;
    const int64_t every = int64_t(simt.blocks()) * simt.threads();
    for (int64_t row = int64_t(simt.block()) * simt.threads() + simt.thread(); row < v.rows; row += every)
      visit(v, batch, share, row, by_class, by_row);
    if (!v.partials) return;
    by_class = sum_over(simt, by_class);
    by_row = sum_over(simt, by_row);
    if (simt.lane() == 0) {
      const int64_t warp = int64_t(simt.block()) * simt.warps() + simt.warp();
      v.partials[2 * warp] = by_class;
      v.partials[2 * warp + 1] = by_row;
    }
  }

  static MLK_DEVICE void visit(const Visit<T>& v, const Batch<T>& batch, const Share<T>& share, int64_t row,
                               double& by_class, double& by_row) {
    const S* x = static_cast<const S*>(v.input) + v.in.offset(row);
    S* g = v.grad ? static_cast<S*>(v.grad) + v.out.offset(row) : nullptr;
    const int64_t in_step = v.in.class_stride, out_step = v.out.class_stride;
    const Label label = label_of(v, row);
    if (label.fate != Fate::KEPT) {
      leave_fate(v, row, label.fate, by_class, by_row);
      S value;
      narrow(label.fate == Fate::BAD ? nan<T>() : T(0), value);
      if (g)
        for (int64_t j = 0; j < v.classes; ++j) g[j * out_step] = value;
      return;
    }
    const int64_t y = label.y;
    const auto logit = [&](int64_t j) { return prepare(v, T(widen(x[j * in_step])), j); };
    Standing<T> stands;
    fetch(static_cast<const Problem<T>&>(v), row, y, label.group, stands.values);
    stands.target = logit(y);
    stands.m = -INF;
    Counts counts{-1, 0};
    if (v.saved) {
      stands.m = v.saved[2 * row];
    } else {
      MLK_UNROLL_4
      for (int64_t j = 0; j < v.classes; ++j) {
        const T u = logit(j);
        if (j == y) continue;
        if (u > stands.m || counts.first < 0) counts.first = j;
        stands.m = larger(stands.m, u);
      }
    }
    stand(v, stands);
    const T m = stands.floor(), scale2 = stands.scale2();
    T sum = 0, shift = 0, weighted = 0;
    if (!v.saved || v.want_shift) {
      // Sums of sums: an error that grows with the square root of the classes at most.
      constexpr int64_t TOGETHER = 64;
      for (int64_t from = 0; from < v.classes; from += TOGETHER) {
        const int64_t to = from + TOGETHER < v.classes ? from + TOGETHER : v.classes;
        T some = 0, some_shift = 0, some_weighted = 0;
      MLK_UNROLL_4
        for (int64_t j = from; j < to; ++j) {
          const T u = logit(j);
          if (j == y) continue;
          const T d = u - m, e = exp2_of(d * scale2);
          some += e;
          if (v.want_shift) some_shift += e == 0 ? T(0) : e * d;
          if (v.smoothing > 0) some_weighted += v.weight ? d * v.weight[j] : d;
          counts.above += u > stands.target;
        }
        sum += some;
        shift += some_shift;
        weighted += some_weighted;
      }
    }
    const Conclusion<T> c = finish_row<true>(v, batch, share, row, y, stands, sum, shift, weighted, counts, true);
    leave_loss(v, row, c.loss, by_class, by_row);
    if (!g) return;
      MLK_UNROLL_4
    for (int64_t j = v.classes - 1; j >= 0; --j) {  // what was read last is still near
      const T u = logit(j);
      T out = c.factor * exp2_of((u - m) * scale2) - (v.weight && v.smoothing > 0 ? c.spread * v.weight[j] : c.spread);
      if (j == y) out = c.at_target;
      S value;
      narrow(unprepare(v, out, u, j), value);
      g[j * out_step] = value;
    }
  }
};

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
