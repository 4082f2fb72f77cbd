// Rows that came in pieces, finished: from what is known of all classes to each row's loss, to the coefficients of its
// gradient, and to the derivatives by the loss's parameters. For library_*.cpp alone.
#pragma once

#include "problem.h"

namespace mlkernels {

// What is known of some of the rows over all classes but the target.
template <class T>
struct KnownRows {
  int64_t first, rows;              // which these are,
  const int64_t* index;             // (rows): or where they are, if not one after another
  const T *target_logit, *top;      // (rows): u_y, M
  const T *total, *shift, *square;  // (count, rows): S, T, the second moment; the latter two may be null
  int64_t count;                    // 2: at either scale that a row may turn out to have
  const T* weighted;                // (rows): V, or null
};

// What is made of them; null pointers are not wanted.
template <class T>
struct FinishedRows {
  T *by_class, *by_row, *logsumexp, *log_prob, *entropy;  // (rows), all or none: backends/finish.py's Finished
  T *factor, *slope, *spread, *target, *scale, *top;      // (rows), all or none: its gradient's coefficients
  const T *up_by_class, *up_by_row;  // (rows): what the loss's terms are multiplied by; null: the problem's factors
};

template <class T>
void finish_rows(const CpuProblem<T>& p, const KnownRows<T>& known, const FinishedRows<T>& out, int64_t begin,
                 int64_t end) {
  using namespace MLKERNELS_ISA;
  const Batch<T> batch = batch_of(p);
  Batch<T> class_terms = batch, row_terms = batch;
  class_terms.z_loss = row_terms.smoothing = 0;
  Values<T> values{};
  if (p.uniform) fetch(p, 0, 0, 0, values);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = known.index ? known.index[i] : known.first + i, y = p.label[row];
    if (y == p.spec.ignore_index) {
      if (p.losses) p.losses[row] = 0;
      for (T* const result : {out.by_class, out.by_row, out.logsumexp, out.log_prob, out.entropy, out.factor, out.slope,
                              out.spread, out.target, out.scale, out.top})
        if (result) result[i] = 0;
      store_parameters(p, row, T(0));
      continue;
    }
    if (!p.uniform) fetch(p, row, y, p.group ? p.group[row] : 0, values);
    const T top = known.top[i], weight = p.weight ? p.weight[y] : T(1);
    const RowScale<T> scale = row_scale(p.spec, values, known.target_logit[i] - top);
    const int64_t place = known.count == 2 && scale.selected == SCALE_HIGH ? known.rows + i : i;
    const T total = known.total[place];
    Statistics<T> r{known.target_logit[i], top, m_log(total), total == 0 ? T(0) : 1 / total};
    if (known.shift) r.shift = known.shift[place];
    if (known.square) r.square = known.square[place];
    if (known.weighted) r.weighted = known.weighted[i];
    Position<T> at;
    const T delta = approach(p.spec, values, r, scale, p.want_parameters, at);
    const T e = m_exp(-m_abs(delta));
    locate(r, delta, e, m_log1p(e), at);
    if (out.by_class) {
      const HeadLoss<T> head = head_loss(p.spec, values, at.nll, false);
      out.by_class[i] = finish(class_terms, Factors<T>{1, 0}, r, at, head, weight);
      out.by_row[i] = finish(row_terms, Factors<T>{0, 1}, r, at, HeadLoss<T>{}, T(0));
      out.logsumexp[i] = at.lse;
      out.log_prob[i] = -at.nll;
      out.entropy[i] = known.shift ? entropy(r, at) : T(0);
    }
    if (!out.factor && !p.losses) continue;
    Factors<T> factors{p.by_class_factor, p.by_row_factor};
    if (out.up_by_class) factors.by_class = out.up_by_class[i];
    if (out.up_by_row) factors.by_row = out.up_by_row[i];
    Coefficients<T> gradient{};
    const T loss = finish_row<true>(static_cast<const Problem<T>&>(p), p.spec, batch, factors, row, values, r, at,
                                    weight, true, gradient);
    if (p.losses) p.losses[row] = loss;
    if (!out.factor) continue;
    out.factor[i] = gradient.factor;
    out.slope[i] = gradient.slope;
    out.spread[i] = gradient.spread;
    out.target[i] = gradient.target;
    out.scale[i] = scale.value;
    out.top[i] = top;
  }
}

}  // namespace mlkernels
