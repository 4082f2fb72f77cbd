// The scalar mathematics of a row: from its statistics to its loss, and to the coefficients of its gradient.
// The same functions in the same order as backends/finish.py. No torch, no CUDA types; T is float or double.
//
// With u the logits (after softcap and adjustment) and everything relative to m = max over j != y of u_j:
//   z_j = s u_j, z_y = s t(u_y), delta = s m + log_sum - z_y, -log p = softplus(delta), 1 - p = sigmoid(delta).
// Loops over elements leave Statistics, finish makes a row's loss of them, coefficients what its gradient is made of.
#pragma once

#include "elementary.h"

namespace mlkernels {
namespace MLKERNELS_ISA {

// A piecewise-linear function: slope and bias of `bins` equal pieces.
template <class T>
struct Pieces {
  const T* slope;  // (bins)
  const T* bias;   // (bins)
  int bins;
};

// The numbers of a loss as one row sees them.
template <class T>
struct Values {
  T at[LOSS_SLOTS];
  Pieces<T> t, tau;  // this row's group
};

// What a pass over a row's classes knows of it; sums are over j != y, e_j = exp(s (u_j - m)).
template <class T>
struct Statistics {
  T target;        // u_y
  T other_max;     // m; -inf where there is no other class
  T log_sum;       // log of S, the sum of e_j; -inf where there is no other class
  T share;         // 1 / S; 0 where there is no other class
  T shift = 0;     // the sum of e_j (u_j - m), for derivatives by s and the entropy
  T square = 0;    // the sum of e_j (u_j - m)^2, for the entropy's derivative by s
  T weighted = 0;  // the sum of w_j (u_j - m), for smoothing
};

// ---- transforms: t(u_y) --------------------------------------------------------------------------------------------

template <class T>
struct Target {
  T value = 0, slope = 1;    // t and dt/du
  T da = 0, db = 0, dc = 0;  // by the transform's parameters
  T dnorm = 0;
  int bin = 0;  // of a piecewise t
};

// The floor of sqrt(1 - x^2) where it divides: derivatives of angles stay finite, and within fp16 at s = 64.
template <class T>
MLK_FN T root_floor() {
  return T(1) / 1024;
}

// cos(m1 theta + m2) - m3 with the chosen continuation beyond pi, and that of a negative m2 below 0.
template <class T>
MLK_FN Target<T> margin(const Spec& spec, T x, T m1, T m2, T m3, bool derive) {
  const T pi = T(3.14159265358979323846);
  const bool single = m1 == 1;
  BeyondPi beyond = spec.beyond_pi;
  if (beyond == BeyondPi::AUTO) beyond = single ? BeyondPi::LINEAR : BeyondPi::MONOTONE;
  const T square = 1 - x * x;
  const T root = m_sqrt(square > 0 ? square : T(0));
  const T divisor = root > root_floor<T>() ? root : root_floor<T>();
  Target<T> out;
  out.dc = -1;
  const T clamped = x > 1 ? T(1) : (x < -1 ? T(-1) : x);  // NaN stays
  T cosine, sine, theta = 0;
  if (single) {
    // cos(theta + m2) without an arc cosine, x not clamped: a zero margin is exactly x.
    const T cos_m = m_cos(m2), sin_m = m_sin(m2);
    cosine = x * cos_m - sin_m * root;
    sine = x * sin_m + cos_m * root;
    out.slope = sin_m == 0 ? cos_m : cos_m + x * sin_m / divisor;  // also for an x of -inf
    if (beyond == BeyondPi::MONOTONE || derive) theta = m_acos(clamped);
    if (beyond == BeyondPi::LINEAR && m2 > 0 && (m2 >= pi || x < -cos_m)) {
      out.value = x - m2 * sin_m - m3;
      out.slope = 1;
      out.db = -sin_m - m2 * cos_m;
      return out;
    }
    // A negative margin ends at the cosine's maximum: beyond it, easy rows would be pushed away.
    const bool rises = beyond == BeyondPi::LINEAR || (beyond == BeyondPi::EASY && x > 0);
    if (rises && m2 < 0 && (m2 <= -pi || x > cos_m)) {
      out.value = x + (1 - cos_m) - m3;
      out.slope = 1;
      out.db = sin_m;
      return out;
    }
  } else {
    theta = m_acos(clamped);
    const T phi = m1 * theta + m2;
    cosine = m_cos(phi);
    sine = m_sin(phi);
    out.slope = m1 * sine / divisor;
  }
  out.value = cosine - m3;
  out.da = -theta * sine;
  out.db = -sine;
  if (beyond == BeyondPi::MONOTONE) {
    // Beyond pi, not at it: there a zero margin must leave a logit that is no cosine alone.
    const T turns = (m1 * theta + m2) / pi;
    const T turn = turns > 0 ? -m_floor(-turns) - 1 : m_floor(turns);
    const T sign = turn - 2 * m_floor(turn / 2) == 0 ? T(1) : T(-1);
    out.value = sign * cosine - 2 * turn - m3;
    out.slope *= sign;
    out.da *= sign;
    out.db *= sign;
  } else if (beyond == BeyondPi::EASY && !(x > 0)) {
    out.value = x;
    out.slope = 1;
    out.da = out.db = out.dc = 0;
  } else if (beyond == BeyondPi::LINEAR && !single) {
    out.value = nan<T>();
  }
  if (spec.gradient == MarginGradient::STRAIGHT_THROUGH) out.slope = 1;
  return out;
}

// The index of x's bin, clamped; 0 for NaN, before the integer cast.
template <class T>
MLK_FN int bin_of(T x, T low, T high, int count) {
  const T index = m_floor((x - low) * (T(count) / (high - low)));
  return index >= 0 ? (index < T(count - 1) ? int(index) : count - 1) : 0;
}

template <class T>
MLK_FN Target<T> transform_target(const Spec& spec, const Values<T>& values, T x, bool derive) {
  Target<T> out;
  const T a = values.at[TRANSFORM_A], b = values.at[TRANSFORM_B];
  switch (spec.transform) {
    case Transform::IDENTITY: out.value = x; return out;
    case Transform::GIVEN:
      out.value = a;
      out.slope = 0;
      out.da = 1;
      return out;
    case Transform::AFFINE:
      out.value = a * x + b;
      out.slope = a;
      out.da = x;
      out.db = 1;
      return out;
    case Transform::MARGIN:
    case Transform::PIECEWISE: {
      const T norm = values.at[NORM];  // 0: none
      const bool normed = norm != 0;
      const T u = normed ? x / legal(norm > 0, norm) : x;
      if (spec.transform == Transform::MARGIN) {
        out = margin(spec, u, legal(a > 0, a), b, values.at[TRANSFORM_C], derive);
      } else {
        out.bin = bin_of(u, values.at[DOMAIN_LOW], values.at[DOMAIN_HIGH], values.t.bins);
        out.slope = values.t.slope[out.bin];
        out.value = out.slope * u + values.t.bias[out.bin];
        out.da = u;
        out.db = 1;
      }
      if (normed) {
        out.dnorm = out.value - u * out.slope;
        out.value *= norm;
        out.da *= norm;
        out.db *= norm;
        out.dc *= norm;
      }
      return out;
    }
  }
  out.value = nan<T>();  // no such transform
  return out;
}

// ---- row scales ----------------------------------------------------------------------------------------------------

template <class T>
struct RowScale {
  T value;       // s
  int selected;  // the slot that it comes from
};

template <class T>
MLK_FN RowScale<T> row_scale(const Spec& spec, const Values<T>& values, T confidence) {
  RowScale<T> out{values.at[SCALE], SCALE};
  if (spec.scale == Scale::TWO_SCALE) {
    const T norm = values.at[LOGIT_NORM];
    if (!(confidence < values.at[ETA])) out = {values.at[SCALE_HIGH], SCALE_HIGH};
    out.value /= legal(norm > 0, norm);
  } else if (spec.scale != Scale::SINGLE) {
    out.value = nan<T>();  // no such scale
  }
  out.value = legal(out.value > 0, out.value);
  return out;
}

// ---- heads: phi(log p) ---------------------------------------------------------------------------------------------

template <class T>
struct HeadLoss {
  T value = 0, slope = 1;            // phi and w = -dphi/dlog p
  T da = 0, db = 0, dc = 0, dd = 0;  // by the head's parameters
  int bin = 0;                       // of tau
};

// alpha (1 - p^beta)^gamma (-log p)^kappa; (m/nll)^gamma nll^(gamma+kappa) near p = 1, where m = 1 - p^beta -> 0.
template <class T>
MLK_FN HeadLoss<T> modulated(T nll, T alpha, T beta, T gamma, T kappa, bool derive) {
  HeadLoss<T> out;
  if (!(alpha >= 0 && beta > 0 && gamma >= 0 && kappa >= 0) || nll != nll) {
    out.value = out.slope = out.da = out.db = out.dc = out.dd = nan<T>();
    return out;
  }
  if (nll == infinity<T>()) {  // p = 0: the damping is the constant 1
    const T bare = m_pow(nll, kappa);
    out.value = alpha * bare;
    out.slope = kappa == 0 ? T(0) : alpha * kappa * m_pow(nll, kappa - 1);
    out.da = bare;
    out.dd = out.value * nll;
    return out;
  }
  const T x = beta * nll;
  const T power = m_exp(-x);                     // p^beta
  const T m = x > 1 ? 1 - power : -m_expm1(-x);  // no cancellation where power < 1/2
  const T h = x > 0 ? x * power / m : T(1);
  T bare;  // m^gamma nll^(kappa-1)
  if (x < T(0.25)) {
    const T exponent = gamma + kappa - 1;
    bare = m_pow(nll > 0 ? m / nll : beta, gamma) * (exponent == 0 ? T(1) : m_pow(nll, exponent));
  } else {
    bare = m_pow(m, gamma) * (kappa == 1 ? T(1) : m_pow(nll, kappa - 1));
  }
  out.slope = alpha * bare * (kappa + gamma * h);
  // Where gamma + kappa < 1 and p = 1 that diverges, but the loss does not.
  out.da = nll > 0 ? bare * nll : (gamma + kappa == 0 ? T(1) : T(0));
  out.value = alpha * out.da;
  if (derive && out.value > 0) {  // 0 times a logarithm is 0
    out.db = out.value * gamma * h / beta;
    out.dc = out.value * (power < T(0.5) ? m_log1p(-power) : m_log(m));
    out.dd = out.value * m_log(nll);
  }
  return out;
}

// -log tau(p), tau(p) = a p + b on p's bin.
template <class T>
MLK_FN HeadLoss<T> tau(const Spec& spec, const Values<T>& values, T nll) {
  HeadLoss<T> out;
  const T p = m_exp(-nll);
  out.bin = bin_of(p, T(0), T(1), values.tau.bins);
  const T a = values.tau.slope[out.bin], b = values.tau.bias[out.bin], minimum = values.at[TAU_MIN];
  const T level = a * p + b;
  if (b == 0 && a > 0) {
    // Not clamped, so identity tables are cross entropy for every p; b's own derivative, -1/tau, is floored.
    out.value = nll - m_log(a);
    out.slope = 1;
    out.da = -1 / a;
    out.db = -1 / (level > minimum ? level : minimum);
  } else if (level <= minimum) {
    out.value = -m_log(minimum);
    out.slope = 0;
    if (spec.clamp == Clamp::CROSS_ENTROPY) {
      out.value += nll;
      out.slope = 1;
    }
  } else {
    out.value = -m_log(level);
    out.slope = a * p / level;
    out.da = -p / level;
    out.db = -1 / level;
  }
  return out;
}

// -log max(p, k).
template <class T>
MLK_FN HeadLoss<T> truncated(T nll, T k) {
  HeadLoss<T> out;
  const T ceiling = -m_log(legal(k > 0 && k <= 1, k));
  out.value = nll > ceiling ? ceiling : nll + (ceiling - ceiling);  // a NaN ceiling reaches the loss
  out.slope = nll > ceiling ? T(0) : T(1) + (ceiling - ceiling);
  out.da = nll > ceiling ? -1 / k : T(0);
  return out;
}

template <class T>
MLK_FN HeadLoss<T> head_loss(const Spec& spec, const Values<T>& values, T nll, bool derive) {
  HeadLoss<T> out;
  out.value = nll;
  if (spec.head == Head::LOG) return out;  // before any jump
  switch (spec.head) {
    case Head::LOG: return out;
    case Head::MODULATED:
      return modulated(nll, values.at[HEAD_A], values.at[HEAD_B], values.at[HEAD_C], values.at[HEAD_D], derive);
    case Head::TAU: return tau(spec, values, nll);
    case Head::TRUNCATED: return truncated(nll, values.at[HEAD_A]);
  }
  out.value = out.slope = nan<T>();  // no such head
  return out;
}

// ---- finish: from statistics to the loss ------------------------------------------------------------------------------

// Where the row stands: its scale, its target and its log p.
template <class T>
struct Position {
  RowScale<T> scale;
  Target<T> target;
  T nll;  // -log p
  T q;    // 1 - p
  T p;
  T others;    // logsumexp(z) - s m
  T lse;       // logsumexp(z)
  bool alone;  // no other class has a chance
};

// delta, whose sign says whether the row is right: from here on exp(-|delta|) and log1p of that are all it takes, and a
// backend may compute them for many rows at once.
template <class T>
MLK_FN T approach(const Spec& spec, const Values<T>& values, const Statistics<T>& row, const RowScale<T>& scale,
                  bool derive, Position<T>& at) {
  at.scale = scale;
  at.target = transform_target(spec, values, row.target, derive);
  const T z_y = scale.value * at.target.value;
  at.alone = row.log_sum == -infinity<T>();
  // The difference of the logits first: at |z| = 300 anything added before it costs 1e-5 in p.
  T delta = at.alone ? -infinity<T>() - z_y : row.log_sum + scale.value * (row.other_max - at.target.value);
  // An infinite logit of the target's is no certainty but an overflow; a row without any chance is none, whatever t makes
  // of it.
  const bool none = at.alone && !(row.target > -infinity<T>());
  if (!(row.target < infinity<T>() && z_y < infinity<T>()) || none) delta = nan<T>();
  at.lse = delta > 0 ? scale.value * row.other_max + row.log_sum : z_y;
  return delta;
}

// e = exp(-|delta|), tail = log1p(e).
template <class T>
MLK_FN void locate(const Statistics<T>& row, T delta, T e, T tail, Position<T>& at) {
  const bool wrong = delta > 0;
  const T near = m_inverse(1 + e), far = e * near;
  at.nll = wrong ? delta + tail : tail;
  at.q = wrong ? near : far;
  at.p = wrong ? far : near;
  at.others = row.log_sum + (wrong ? tail : tail - delta);  // log_sum + softplus(-delta)
  at.lse += tail;
}

// The parts of a batch that every row shares.
template <class T>
struct Batch {
  T smoothing;       // epsilon
  T smoothing_part;  // epsilon / C
  T z_loss;
  T weight_sum;  // sum of all class weights; C without weights
  int64_t classes;
};

// What a row's terms are multiplied by: its part in a mean, and its weight.
template <class T>
struct Factors {
  T by_class, by_row;
};

template <class T>
MLK_FN T finish(const Batch<T>& batch, const Factors<T>& factors, const Statistics<T>& row, const Position<T>& at,
                const HeadLoss<T>& head, T weight) {
  T by_class = weight * head.value;
  if (batch.smoothing > 0) {
    // Where no other class has a chance, weighted alone knows whether there is one.
    const T others = at.alone ? T(0) : (batch.weight_sum - weight) * at.others;
    const T spread = weight * at.nll + others - at.scale.value * row.weighted;
    by_class = (1 - batch.smoothing) * by_class + batch.smoothing_part * spread;
  }
  const T loss = by_class * factors.by_class;
  return batch.z_loss > 0 ? loss + batch.z_loss * at.lse * at.lse * factors.by_row : loss;
}

// H = -sum of p_j log p_j. A class of probability 0 adds 0.
template <class T>
MLK_SELDOM T entropy(const Statistics<T>& row, const Position<T>& at) {
  const T own = at.p == 0 ? T(0) : at.p * at.nll;
  return at.alone || at.q == 0 ? own : own + at.q * (at.others - at.scale.value * (row.shift * row.share));
}

// ---- coefficients: from the upstream gradients to what the gradient is made of ----------------------------------------

// Upstream gradients of a row, the loss's with its factors.
template <class T>
struct Upstream {
  T by_class, by_row, lse, log_prob;
};

// dL/du_j = e_j (factor + slope (u_j - m)) - spread w_j for j != y, and target for the target's own.
template <class T>
struct Coefficients {
  T factor, slope, spread, target;
  T dz_y;
  T by_probability;  // the coefficient of p_j alone: what z-loss and logsumexp add to every class
};

template <class T>
MLK_FN Coefficients<T> coefficients(const Batch<T>& batch, const Statistics<T>& row, const Position<T>& at,
                                    const HeadLoss<T>& head, const Upstream<T>& up, T weight) {
  Coefficients<T> out;
  const T pull = up.by_class * (1 - batch.smoothing) * weight * head.slope - up.log_prob;  // of (p_j - 1[j = y])
  const T part = up.by_class * batch.smoothing_part;
  const T every = (batch.z_loss > 0 ? up.by_row * 2 * batch.z_loss * at.lse : T(0)) + up.lse;
  const T flat = every + part * batch.weight_sum;
  const T s = at.scale.value;
  out.by_probability = every;
  // Of a single class smoothing leaves exactly nothing.
  out.dz_y = every * at.p - pull * at.q + part * (batch.weight_sum * at.p - weight);
  out.spread = s * part;
  // The largest other class has exp(0) = 1, so log_sum >= 0 wherever there is one.
  out.factor = at.alone ? 0 * out.dz_y : s * (pull + flat) * (at.q * row.share);
  out.slope = 0;
  out.target = s * at.target.slope * out.dz_y;
  return out;
}

// The same for an upstream gradient of the entropy, added: dH/dz_j = -p_j (log p_j + H).
template <class T>
MLK_SELDOM void add_entropy(const Statistics<T>& row, const Position<T>& at, T up, Coefficients<T>& out) {
  const T s = at.scale.value, h = entropy(row, at), each = s * up * (at.q * row.share);
  if (!(at.alone || at.q == 0)) {
    out.factor -= each * (h - at.others);
    out.slope = -s * each;
  }
  if (at.p != 0) out.dz_y -= up * at.p * (h - at.nll);
  out.target = s * at.target.slope * out.dz_y;
}

// dH/ds. The sum of dH/dz_j is 0: m may be taken from every u_j.
template <class T>
MLK_SELDOM T entropy_by_scale(const Statistics<T>& row, const Position<T>& at) {
  if (at.alone) return 0;
  const T s = at.scale.value, h = entropy(row, at);
  const T own = at.p == 0 ? T(0) : at.p * (h - at.nll) * (at.target.value - row.other_max);
  const T rest = at.q == 0 ? T(0) : at.q * row.share * (s * row.square + (h - at.others) * row.shift);
  return -(own + rest);
}

// The derivatives of a row's loss by its parameters, one per trainable slot; tables: by the entry of the row's bin.
// of_entropy: what the entropy's upstream gradient adds to that by s. Not of a row that is NaN: see store_parameters.
template <class T>
MLK_FN void row_parameters(const Spec& spec, const Values<T>& values, const Batch<T>& batch, const Statistics<T>& row,
                           const Position<T>& at, const HeadLoss<T>& head, const Coefficients<T>& gradient,
                           const Upstream<T>& up, T weight, T of_entropy, T* out /* TRAINABLE_SLOTS */) {
  for (int slot = 0; slot < TRAINABLE_SLOTS; ++slot) out[slot] = 0;
  const T t = at.target.value;
  const T every = gradient.by_probability;
  const T pull = up.by_class * (1 - batch.smoothing) * weight * head.slope - up.log_prob;
  const T part = up.by_class * batch.smoothing_part;
  const T expected = at.p > 0 ? at.p * t : T(0);  // p_y t: 0 where p is, also when t is -inf
  // Smoothing counts classes that have no chance, in weighted.
  T by_scale = every * expected;
  if (at.alone) {
    if (part != 0) by_scale += part * ((batch.weight_sum * at.p - weight) * t - row.weighted);
  } else {
    const T flat = every + part * batch.weight_sum;
    const T mean = row.other_max + row.shift * row.share;  // of u_j for j != y, under p
    by_scale = flat * (at.q * mean + expected);
    if (pull != 0) by_scale += pull * at.q * (mean - t);  // t may be -inf
    if (part != 0) by_scale -= part * (row.weighted + row.other_max * (batch.weight_sum - weight) + weight * t);
  }
  by_scale += of_entropy;
  if (spec.scale == Scale::TWO_SCALE) {
    const T norm = values.at[LOGIT_NORM];
    const bool high = at.scale.selected == SCALE_HIGH;  // no index that only the row knows: out stays in registers
    out[SCALE] = high ? T(0) : by_scale / norm;
    out[SCALE_HIGH] = high ? by_scale / norm : T(0);
    out[LOGIT_NORM] = -by_scale * at.scale.value / norm;
  } else {
    out[SCALE] = by_scale;
  }
  const T by_target = at.scale.value * gradient.dz_y;
  out[TRANSFORM_A] = by_target * at.target.da;
  out[TRANSFORM_B] = by_target * at.target.db;
  out[TRANSFORM_C] = by_target * at.target.dc;
  out[NORM] = by_target * at.target.dnorm;
  const T by_head = up.by_class * (1 - batch.smoothing) * weight;
  out[HEAD_A] = by_head * head.da;
  out[HEAD_B] = by_head * head.db;
  out[HEAD_C] = by_head * head.dc;
  out[HEAD_D] = by_head * head.dd;
}

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
