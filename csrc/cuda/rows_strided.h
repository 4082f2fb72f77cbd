// Rows whose classes do not lie together, as in (N, C, d1, ...): one thread a row, neighbouring threads neighbouring rows.
// Any strides. Bytes: three readings and one writing, of which the caches serve what they hold.
//
// Pairs: a thread takes two rows that lie next to each other, where they do and few classes and a simple loss (is_simple)
// let it keep both in registers. One reading and one writing, of two elements at a time.
#pragma once

#include "visit.h"

namespace mlkernels {
namespace MLKERNELS_ISA {

struct StridedPlan {
  int pairs;  // whether rows go by pairs
};

template <class T_, class S_>
struct RowsStrided {
  using T = T_;
  using S = S_;
  // A multiprocessor's registers are 2 blocks' of 128 each, in which the numbers of a row of doubles do not fit.
  static constexpr int THREADS = 256, BLOCKS = sizeof(T) == 8 ? 1 : 2;
  static constexpr T INF = std::numeric_limits<T>::infinity();
  static constexpr int64_t CLASSES = sizeof(T) == 8 ? 0 : 24;  // that a pair may have
  static constexpr int BATCH = sizeof(T) == 8 ? 4 : 16;        // classes of a row that are read together

  template <class Simt>
  static MLK_DEVICE void run(const Simt& simt, const Visit<T>& v, const StridedPlan& plan) {
    if (v.unless_one && *v.unless_one == T(1)) return;
    const Batch<T> batch = batch_on_device(simt, v);
    const Factors<T> shared = shared_factors(simt, v);
    store_shared(simt, v, shared, batch);
    double loss = 0;
    const int64_t every = int64_t(simt.blocks()) * simt.threads();
    const int64_t first = int64_t(simt.block()) * simt.threads() + simt.thread();
    if (CLASSES > 0 && plan.pairs) {
      for (int64_t pair = first; pair < v.rows / 2; pair += every) visit_pair(v, batch, shared, 2 * pair, loss);
    } else {
      for (int64_t row = first; row < v.rows; row += every) visit(v, batch, shared, row, loss);
    }
    if (!v.partials) return;
    loss = sum_over(simt, loss);
    if (simt.lane() == 0) v.partials[int64_t(simt.block()) * simt.warps() + simt.warp()] = loss;
    reduce_partials(simt, v, simt.blocks(), int64_t(simt.blocks()) * simt.warps());
  }

  static constexpr int MOST = CLASSES > 0 ? int(CLASSES) : 1, GROUP = 4;  // classes are worked on or left out together

  // One of a pair, of which u holds the logits and then what its factor makes the gradient of.
  static MLK_DEVICE Coefficients<T> visit_held(const Visit<T>& v, const Batch<T>& batch, const Factors<T>& shared,
                                               int64_t row, const Label& label, T (&u)[MOST], double& loss) {
    const int classes = int(v.classes), y = int(label.y);
    if (label.status != LabelStatus::VALID) {
      const T value = value_of<T>(label.status);
      store_skipped(v, shared, row, label.status, loss);
      MLK_UNROLL
      for (int j = 0; j < MOST; ++j) u[j] = value;
      return {1, 0, 0, value, 0, 0};
    }
    RowState<T> state;
    numbers_of<true>(v, row, label, state.values);
    state.target = 0;
    state.m = -INF;
    MLK_UNROLL
    for (int j = 0; j < MOST; ++j) {
      if (j % GROUP == 0 && j >= classes) break;
      if (j == y) {
        state.target = u[j];
        u[j] = -INF;
      }
      state.m = larger(state.m, u[j]);
    }
    select_scale<true>(v, state);
    const T m = state.floor(), scale2 = state.scale2();
    RowSums<T> sums;
    MLK_UNROLL
    for (int j = 0; j < MOST; ++j) {
      if (j % GROUP == 0 && j >= classes) break;
      u[j] = exp2_of((u[j] - m) * scale2);
      sums.e += u[j];
    }
    Coefficients<T> c{};
    const T own = finish_visit<false, true>(v, batch, shared, row, label.y, state, sums, Counts{-1, 0}, true, c);
    store_loss<true>(v, row, own, loss);
    return c;
  }

  static MLK_DEVICE void visit_pair(const Visit<T>& v, const Batch<T>& batch, const Factors<T>& shared, int64_t row,
                                    double& loss) {
    using Pair = PieceOf<sizeof(S) == 2 ? 4 : 8>;
    const int classes = int(v.classes);
    const S* x = static_cast<const S*>(v.input) + v.in.offset(row);
    const Label label[2] = {label_of<true>(v, row, read_index(v.label, row)),
                            label_of<true>(v, row + 1, read_index(v.label, row + 1))};
    T u[2][MOST];
    MLK_UNROLL
    for (int j = 0; j < MOST; ++j) {
      if (j % GROUP == 0 && j >= classes) break;
      u[0][j] = u[1][j] = -INF;
      if (j < classes) {
        const Pair both = *reinterpret_cast<const Pair*>(x);
        u[0][j] = element_of<T, S>(both, 0);
        u[1][j] = element_of<T, S>(both, 1);
      }
      x += v.in.class_stride;
    }
    const Coefficients<T> first = visit_held(v, batch, shared, row, label[0], u[0], loss);
    const Coefficients<T> second = visit_held(v, batch, shared, row + 1, label[1], u[1], loss);
    if (!v.grad) return;
    S* g = static_cast<S*>(v.grad) + v.out.offset(row);
    MLK_UNROLL
    for (int j = 0; j < MOST; ++j) {
      if (j >= classes) break;
      const T both[2] = {j == label[0].y ? first.target : first.factor * u[0][j],
                         j == label[1].y ? second.target : second.factor * u[1][j]};
      *reinterpret_cast<Pair*>(g) = piece_from<S, Pair>(both);
      g += v.out.class_stride;
    }
  }

  static MLK_DEVICE void visit(const Visit<T>& v, const Batch<T>& batch, const Factors<T>& shared, int64_t row,
                               double& loss) {
    const S* x = static_cast<const S*>(v.input) + v.in.offset(row);
    S* g = v.grad ? static_cast<S*>(v.grad) + v.out.offset(row) : nullptr;
    const int64_t in_step = v.in.class_stride, out_step = v.out.class_stride;
    const Label label = label_of(v, row);
    if (label.status != LabelStatus::VALID) {
      store_skipped(v, shared, row, label.status, loss);
      const S value = narrowed<S>(value_of<T>(label.status));
      if (g)
        for (int64_t j = 0; j < v.classes; ++j) g[j * out_step] = value;
      return;
    }
    const int64_t y = label.y;
    // Calls body(j, u) for the classes [from, from + BATCH) that there are; all are read before the first is looked at.
    const auto batch_from = [&](int64_t from, auto body) {
      S read[BATCH];
      const S* at = x + from * in_step;
      MLK_UNROLL
      for (int k = 0; k < BATCH; ++k) read[k] = from + k < v.classes ? at[k * in_step] : S();
      MLK_UNROLL
      for (int k = 0; k < BATCH; ++k)
        if (from + k < v.classes) body(from + k, prepare(v.preparation, T(widen(read[k])), from + k));
    };
    RowState<T> state;
    fetch(static_cast<const Problem<T>&>(v), row, y, label.group, state.values);
    state.target = prepare(v.preparation, T(widen(x[y * in_step])), y);
    state.m = -INF;
    Counts counts{-1, 0};
    if (v.saved) {
      state.m = v.saved[2 * row];
    } else {
      for (int64_t from = 0; from < v.classes; from += BATCH)
        batch_from(from, [&](int64_t j, T u) {
          if (j == y) return;
          if (u > state.m || counts.first < 0) counts.first = j;
          state.m = larger(state.m, u);
        });
    }
    select_scale(v, state);
    const T m = state.floor(), scale2 = state.scale2();
    RowSums<T> sums;
    if (!v.saved || v.want_shift) {
      // Sums of sums: an error that grows with the square root of the classes at most.
      constexpr int64_t TOGETHER = 64;
      for (int64_t from = 0; from < v.classes; from += TOGETHER) {
        RowSums<T> some;
        for (int64_t at = from; at < from + TOGETHER && at < v.classes; at += BATCH)
          batch_from(at, [&](int64_t j, T u) {
            if (j == y) return;
            const T d = u - m, e = exp2_of(d * scale2);
            some.e += e;
            if (v.want_shift) some.shift += e == 0 ? T(0) : e * d;
            if (v.want_square) some.square += e == 0 ? T(0) : e * d * d;
            if (v.smoothing > 0) some.weighted += v.weight ? d * v.weight[j] : d;
            counts.above += u > state.target;
          });
        sums.e += some.e;
        sums.shift += some.shift;
        sums.square += some.square;
        sums.weighted += some.weighted;
      }
    }
    Coefficients<T> c{};
    const T own = finish_visit<true>(v, batch, shared, row, y, state, sums, counts, true, c);
    store_loss(v, row, own, loss);
    if (!g) return;
    for (int64_t from = (v.classes - 1) / BATCH * BATCH; from >= 0; from -= BATCH)  // what was read last is still near
      batch_from(from, [&](int64_t j, T u) {
        const T d = u - m;
        T out = gradient_at(v, c, c.factor, exp2_of(d * scale2), d, j);
        if (j == y) out = c.target;
        g[j * out_step] = narrowed<S>(unprepare(v.preparation, out, u, j));
      });
  }
};

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
