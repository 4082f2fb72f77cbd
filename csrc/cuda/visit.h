// What the GPU's row kernels share: the call as they see it, and a row from its sums to its coefficients. Written over
// simt.h, so that a host runs it as well.
#pragma once

#include <type_traits>

#include "../simt/simt.h"  // first: elementary.h asks MLK_SIMT

#include "../rows.h"

namespace mlkernels {

// Labels, or groups.
struct Indices {
  const void* data;  // (rows), contiguous, or null
  Index type;
  MLK_FN explicit operator bool() const { return data; }
};

// A visit whose labels and numbers only the device knows.
template <class T>
struct Visit : Problem<T> {
  Indices label, group;
  const char *begin, *end;     // the memory of the logits: nothing outside is read
  const double* weight_total;  // the sum of all class weights, or null: few are added up by whoever needs them
  // What "mean" divides by where it is given (value 0 and no data: it is not), else the sums of the kept rows' weights and
  // of the kept rows, in parts. parts = 0: not needed; parts < 0: few rows, whoever needs the sums looks at the labels.
  Parameter<double> normalizer;
  const double* divisors;
  int parts;
  const T* known;       // what all rows share, as an earlier visit of them left it (store_shared); or null
  T* shared;            // the same of this one, left here; or null
  const T* unless_one;  // nothing is done where this upstream gradient is 1; or null
  bool simple;          // as is_simple says
  double* partials;     // (teams) where the loss is reduced
  uint32_t* arrived;    // how many teams' blocks have left theirs: the last one adds them up; null: another launch does
};

// Whether what "mean" divides by has to be counted.
template <class T>
MLK_FN bool is_counted(const Visit<T>& v) {
  return v.spec.reduction == Reduction::MEAN && !v.known && !v.normalizer.data && v.normalizer.value == 0;
}

// A loss that is reduced, or its single visit: no transform, one scale, a head without tables, all numbers from the host, no
// weights of classes or rows, smoothing or z-loss; nothing saved, and no upstream gradient but a number. Kernels have a path of their
// own for it, in which all that takes no instructions.
template <class T>
bool is_simple(const Visit<T>& v) {
  for (const Parameter<T>& number : v.values)
    if (number.data) return false;
  return v.spec.transform == Transform::IDENTITY && v.spec.scale == Scale::SINGLE && v.spec.head != Head::TAU &&
         v.spec.reduction != Reduction::NONE && !v.weight && !v.row_weight && !(v.smoothing > 0) && !(v.z_loss > 0) &&
         !v.group && !v.saved && !v.save && !v.up_loss && !v.up_logsumexp && !v.up_log_prob && !v.up_entropy;
}

namespace MLKERNELS_ISA {

constexpr int MOST_PARTS = 128;

// What many threads read of memory one after another is only quick if much of it is on its way at once: so many readings
// of a thread before the first is looked at.
constexpr int AT_ONCE = 8;

// out[k] = in[at + k every], 0 from `end` on.
template <class I, class O, int COUNT>
MLK_DEVICE void read_ahead(const I* in, int64_t at, int64_t every, int64_t end, O (&out)[COUNT]) {
  I found[COUNT];
  MLK_UNROLL
  for (int k = 0; k < COUNT; ++k) found[k] = at + k * every < end ? in[at + k * every] : I();
  MLK_UNROLL
  for (int k = 0; k < COUNT; ++k) {
    if constexpr (sizeof(I) == 8 && std::is_unsigned<I>::value)
      out[k] = signed_label(found[k]);
    else
      out[k] = O(found[k]);
  }
}
template <int COUNT>
MLK_DEVICE void read_indices(Indices in, int64_t at, int64_t every, int64_t end, int64_t (&out)[COUNT]) {
  const auto as = [&](auto kind) { read_ahead(static_cast<const decltype(kind)*>(in.data), at, every, end, out); };
  if (in.type == Index::INT64) return as(int64_t());  // nearly always: before any jump
  switch (in.type) {
    case Index::INT32: return as(int32_t());
    case Index::INT16: return as(int16_t());
    case Index::INT8: return as(int8_t());
    case Index::UINT8: return as(uint8_t());
    case Index::UINT16: return as(uint16_t());
    case Index::UINT32: return as(uint32_t());
    default: return as(uint64_t());
  }
}
MLK_DEVICE int64_t read_index(Indices in, int64_t at) {
  int64_t out[1];
  read_indices(in, at, 0, at + 1, out);
  return out[0];
}

// A row and its label.
enum class LabelStatus : int { VALID, IGNORED, INVALID };
struct Label {
  int64_t y, group;
  LabelStatus status;
};
// What the results and the gradient are of a row that is not looked at.
template <class T>
MLK_DEVICE T value_of(LabelStatus status) {
  return status == LabelStatus::INVALID ? nan<T>() : T(0);
}

template <bool SIMPLE = false, class T>
MLK_DEVICE Label checked_label(const Visit<T>& v, int64_t y, int64_t group) {
  if (y == v.spec.ignore_index) return {y, 0, LabelStatus::IGNORED};
  Label out{y, group, uint64_t(y) < uint64_t(v.classes) ? LabelStatus::VALID : LabelStatus::INVALID};
  const int64_t groups = v.t.groups > v.tau.groups ? v.t.groups : v.tau.groups;
  if (!SIMPLE && v.group && uint64_t(group) >= uint64_t(groups)) out.status = LabelStatus::INVALID;
  return out;
}
template <bool SIMPLE = false, class T>
MLK_DEVICE Label label_of(const Visit<T>& v, int64_t row, int64_t y) {
  const bool grouped = !SIMPLE && v.group && y != v.spec.ignore_index;
  return checked_label<SIMPLE>(v, y, grouped ? read_index(v.group, row) : 0);
}
template <class T>
MLK_DEVICE Label label_of(const Visit<T>& v, int64_t row) {
  return label_of(v, row, read_index(v.label, row));
}

// ---- elements --------------------------------------------------------------------------------------------------------

#ifdef __CUDACC__
template <class S>
MLK_DEVICE void narrow(float x, S& out) {
  out.bits = uint16_t(narrow_pair(x, 0.0f, S()));
}
#endif

template <class S, class T>
MLK_DEVICE S narrowed(T x) {
  S out;
  narrow(x, out);
  return out;
}

template <class S>
constexpr int PER_VECTOR = 16 / int(sizeof(S));

// A piece of a row as it lies in memory: 16 bytes, two halves, or one element.
template <int BYTES>
using PieceOf =
    std::conditional_t<BYTES == 16, Vec16,
                       std::conditional_t<BYTES == 8, uint64_t, std::conditional_t<BYTES == 4, uint32_t, uint16_t>>>;

MLK_DEVICE uint32_t word_of(const Vec16& piece, int word) { return piece.word[word]; }
template <class Piece>
MLK_DEVICE uint32_t word_of(const Piece& piece, int word) {
  return uint32_t(uint64_t(piece) >> 32 * word);
}
// A piece of nothing but this element.
template <class S, class Piece>
MLK_DEVICE Piece all_of(S element) {
  S all[sizeof(Piece) / sizeof(S)];
  MLK_UNROLL
  for (S& each : all) each = element;
  return bits_as<Piece>(all);
}
template <class T, class S, class Piece>
MLK_DEVICE T element_of(const Piece& piece, int e) {
  if constexpr (sizeof(S) == 2) {
    return widen(S{uint16_t(word_of(piece, e / 2) >> 16 * (e % 2))});
  } else if constexpr (sizeof(S) == 4) {
    return bits_as<T>(word_of(piece, e));
  } else {
    return bits_as<T>(uint64_t(word_of(piece, 2 * e)) | uint64_t(word_of(piece, 2 * e + 1)) << 32);
  }
}
template <class T, class S>
MLK_DEVICE void unpack(const Vec16& in, T (&out)[PER_VECTOR<S>]) {
  MLK_UNROLL
  for (int e = 0; e < PER_VECTOR<S>; ++e) out[e] = element_of<T, S>(in, e);
}
template <class S, class Piece, class T>
MLK_DEVICE Piece piece_from(const T* in) {
  if constexpr (sizeof(Piece) == 2) {
    return narrowed<S>(in[0]).bits;
  } else if constexpr (sizeof(S) == 2) {
    uint32_t words[sizeof(Piece) / 4];
    MLK_UNROLL
    for (int w = 0; w < int(sizeof(Piece) / 4); ++w) words[w] = narrow_pair(in[2 * w], in[2 * w + 1], S());
    return bits_as<Piece>(words);
  } else {
    Piece out;
    memcpy(&out, in, sizeof(Piece));
    return out;
  }
}

// How many elements lie between an address and the 16-byte boundary before it.
template <class S>
MLK_DEVICE int phase_of(const S* at) {
  return int((reinterpret_cast<uintptr_t>(at) & 15) / sizeof(S));
}

// ---- warps -----------------------------------------------------------------------------------------------------------

template <class Simt, class V>
MLK_DEVICE V sum_over(const Simt& simt, V x, int lanes = LANES) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) x += simt.butterfly(x, mask);
  return x;
}
template <class Simt, class V>
MLK_DEVICE V largest_over(const Simt& simt, V x) {
  for (int mask = LANES / 2; mask > 0; mask /= 2) x = larger(x, simt.butterfly(x, mask));
  return x;
}
// Two sums over all threads of a cluster, or of a block that is none; the same bits for all of them. By way of shared memory.
template <class Simt>
MLK_DEVICE void sum_over_cluster(const Simt& simt, int mailbox, double& a, double& b) {
  a = sum_over(simt, a);
  b = sum_over(simt, b);
  const int parts = simt.warps() * simt.ranks(), own = mailbox + 16 * (simt.rank() * simt.warps() + simt.warp());
  if (parts == 1) return;
  if (simt.ranks() > 1) {
    if (simt.lane() < simt.ranks()) {
      simt.store_remote(simt.lane(), own, a);
      simt.store_remote(simt.lane(), own + 8, b);
    }
    simt.cluster_sync();
  } else {
    if (simt.lane() == 0) {
      simt.store(own, a);
      simt.store(own + 8, b);
    }
    simt.block_sync();
  }
  a = b = 0;
  for (int i = simt.lane(); i < parts; i += LANES) {
    a += simt.template load<double>(mailbox + 16 * i);
    b += simt.template load<double>(mailbox + 16 * i + 8);
  }
  a = sum_over(simt, a);
  b = sum_over(simt, b);
}
MLK_FN int sum_over_cluster_bytes(int warps, int ranks) { return 16 * warps * ranks; }
// The sum of COUNT numbers, a power of two of them, by a tree: the same bits where neighbours change places. They come one by
// one, the i-th with its (constant) number, and no more than a sum of each level is kept.
template <int COUNT, class V>
struct Tree {
  V level[COUNT == 1 ? 1 : COUNT == 2 ? 2 : COUNT == 4 ? 3 : COUNT == 8 ? 4 : COUNT == 16 ? 5 : 6];
  MLK_DEVICE void add(int i, V x) {
    int at = 0;
    MLK_UNROLL
    for (; i >> at & 1; ++at) x = level[at] + x;
    level[at] = x;
  }
  MLK_DEVICE V sum() const { return level[sizeof(level) / sizeof(V) - 1]; }
};
template <int COUNT, class V>
MLK_DEVICE V sum_of(const V (&x)[COUNT]) {
  Tree<COUNT, V> tree;
  MLK_UNROLL
  for (int i = 0; i < COUNT; ++i) tree.add(i, x[i]);
  return tree.sum();
}

// ---- rows ------------------------------------------------------------------------------------------------------------

// Counts the rows at, at + every, ... in what "mean" divides by.
template <class T>
MLK_DEVICE void count_rows(const Visit<T>& v, int64_t at, int64_t every, double& weights, double& rows) {
  for (; at < v.rows; at += AT_ONCE * every) {
    int64_t y[AT_ONCE];
    T weight[AT_ONCE];
    read_indices(v.label, at, every, v.rows, y);
    MLK_UNROLL
    for (int k = 0; k < AT_ONCE; ++k) {
      // A label that is none makes the loss NaN, whatever its weight.
      const bool counts = at + k * every < v.rows && y[k] != v.spec.ignore_index,
                 is_class = uint64_t(y[k]) < uint64_t(v.classes);
      weight[k] = !counts ? T(0) : v.weight && is_class ? v.weight[y[k]] : T(1);
      rows += counts;
    }
    MLK_UNROLL
    for (int k = 0; k < AT_ONCE; ++k) weights += double(weight[k]);
  }
}

// One over what "mean" divides by; NaN where that is nothing.
template <class T>
MLK_DEVICE Factors<T> factors_of(double weights, double rows) {
  return {T(1 / legal(weights != 0, weights)), T(1 / legal(rows != 0, rows))};
}

// The factors of every row but for its own weight; by a whole warp.
template <class Simt, class T>
MLK_DEVICE Factors<T> shared_factors(const Simt& simt, const Visit<T>& v) {
  if (v.known && v.spec.reduction == Reduction::MEAN) return {v.known[0], v.known[1]};
  if (v.parts == 0) {
    double by = v.spec.reduction == Reduction::MEAN ? v.normalizer.value : 1.0;
    if (v.normalizer.data) by = read_number<double>(v.normalizer.data, v.normalizer.storage, 0);
    by = legal(by > 0 && by < infinity<double>(), by);
    return factors_of<T>(by, by);
  }
  double weights = 0, rows = 0;
  if (v.parts < 0) {
    count_rows(v, simt.lane(), LANES, weights, rows);
  } else {
    for (int i = simt.lane(); i < v.parts; i += LANES) {
      weights += v.divisors[2 * i];
      rows += v.divisors[2 * i + 1];
    }
  }
  return factors_of<T>(sum_over(simt, weights), sum_over(simt, rows));
}

// Whether the sum of all class weights is needed.
template <class T>
MLK_FN bool is_weight_summed(const Visit<T>& v) {
  return v.smoothing > 0 && v.weight;
}
// Of what is kept for a later visit: where that sum lies.
template <class T>
MLK_FN int weight_sum_at(const Visit<T>& v) {
  return v.spec.reduction == Reduction::MEAN ? 2 : 0;
}
// For a later visit of the same rows: the factors of "mean", then the sum of all class weights, (2) each.
template <class Simt, class T>
MLK_DEVICE void store_shared(const Simt& simt, const Visit<T>& v, const Factors<T>& factors, const Batch<T>& batch) {
  if (!v.shared || simt.block() != 0 || simt.thread() != 0) return;
  if (v.spec.reduction == Reduction::MEAN) {
    v.shared[0] = factors.by_class;
    v.shared[1] = factors.by_row;
  }
  if (is_weight_summed(v)) v.shared[weight_sum_at(v)] = v.shared[weight_sum_at(v) + 1] = batch.weight_sum;
}

// By a whole warp.
template <class Simt, class T>
MLK_DEVICE Batch<T> batch_on_device(const Simt& simt, const Visit<T>& v) {
  if (v.simple) return {0, 0, 0, v.weight_sum, v.classes};
  Batch<T> out = batch_of(v);
  if (!is_weight_summed(v)) return out;
  if (v.known) {
    out.weight_sum = v.known[weight_sum_at(v)];
  } else if (v.weight_total) {
    out.weight_sum = T(*v.weight_total);
  } else {
    double sum = 0;
    for (int64_t j = simt.lane(); j < v.classes; j += AT_ONCE * LANES) {
      double some[AT_ONCE];
      read_ahead(v.weight, j, LANES, v.classes, some);
      sum += sum_of(some);
    }
    out.weight_sum = T(sum_over(simt, sum));
  }
  return out;
}

// A row between its maximum and its end.
template <class T>
struct RowState {
  Values<T> values;
  RowScale<T> scale;
  T target, m;  // m may be -inf
  MLK_DEVICE T floor() const { return m == -infinity<T>() ? T(0) : m; }
  MLK_DEVICE T scale2() const { return scale.value * T(1.4426950408889634); }  // of base-2 exponentials
};

// The spec, and a row's numbers; SIMPLE: where the launch is known to be.
template <bool SIMPLE, class T>
MLK_DEVICE Spec spec_of(const Visit<T>& v) {
  Spec out = v.spec;
  if (SIMPLE) {
    out.transform = Transform::IDENTITY;
    out.scale = Scale::SINGLE;
    if (out.head == Head::TAU) out.head = Head::LOG;
  }
  return out;
}
template <bool SIMPLE, class T>
MLK_DEVICE void numbers_of(const Visit<T>& v, int64_t row, const Label& label, Values<T>& values) {
  if constexpr (SIMPLE) {
    MLK_UNROLL
    for (int slot = 0; slot < LOSS_SLOTS; ++slot) values.at[slot] = v.values[slot].value;
  } else {
    fetch(static_cast<const Problem<T>&>(v), row, label.y, label.group, values);
  }
}

template <bool SIMPLE = false, class T>
MLK_DEVICE void select_scale(const Visit<T>& v, RowState<T>& state) {
  state.scale = row_scale(spec_of<SIMPLE>(v), state.values, state.target - state.m);
}

// Over the other classes, as Statistics has them.
template <class T>
struct RowSums {
  T e = 0, shift = 0, square = 0, weighted = 0;
};
struct Counts {   // for RowStats
  int64_t first;  // the first of the largest other logits, -1: there is none
  int64_t above;
};

// With saved statistics, the sum of exponentials is not used. GENERAL: RowStats, gradients of parameters and of the entropy
// may be wanted.
template <bool GENERAL, bool SIMPLE = false, class T>
MLK_DEVICE T finish_visit(const Visit<T>& v, const Batch<T>& any, const Factors<T>& shared, int64_t row, int64_t y,
                          const RowState<T>& state, const RowSums<T>& sums, const Counts& counts, bool stores,
                          Coefficients<T>& gradient) {
  const Spec spec = spec_of<SIMPLE>(v);
  const Batch<T> batch = SIMPLE ? Batch<T>{0, 0, 0, any.weight_sum, any.classes} : any;
  Statistics<T> r{state.target, state.m, 0, 0, sums.shift, sums.square, sums.weighted};
  if (!SIMPLE && v.saved) {
    r.log_sum = v.saved[2 * row + 1];
    r.share = r.log_sum == -infinity<T>() ? T(0) : m_exp(-r.log_sum);
  } else {
    r.log_sum = sums.e == 0 ? -infinity<T>() : m_log(sums.e);
    r.share = sums.e == 0 ? T(0) : m_inverse(sums.e);
  }
  Position<T> at;
  const T delta = approach(spec, state.values, r, state.scale, GENERAL && v.want_parameters, at);
  const T e = m_exp(-m_abs(delta));
  locate(r, delta, e, m_log1p_of_part(e), at);
  if (GENERAL && v.logsumexp && stores) {
    const bool doubtful = sums.e != sums.e || r.target != r.target;
    v.logsumexp[row] = at.lse;
    v.log_prob[row] = -at.nll;
    v.entropy[row] = entropy(r, at);
    v.confidence[row] = doubtful ? nan<T>() : r.target - r.other_max;
    v.rank[row] = counts.above;
    int64_t best = counts.first;
    if (best < 0 || r.target > r.other_max || (r.target == r.other_max && y < best)) best = y;
    v.prediction[row] = doubtful ? -1 : best;
  }
  const T weight = !SIMPLE && v.weight ? v.weight[y] : T(1);
  return finish_row<GENERAL, SIMPLE>(static_cast<const Problem<T>&>(v), spec, batch, shared, row, state.values, r, at,
                                     weight, stores, gradient);
}

// One element of the gradient, but the target's, and but for the way back through softcap: power is exp(s (u - m)).
// factor: its own, perhaps multiplied by what power lacks.
template <class T>
MLK_DEVICE T gradient_at(const Visit<T>& v, const Coefficients<T>& c, T factor, T power, T from_max, int64_t j) {
  T x = factor * power;
  if (v.up_entropy) x += power == 0 ? T(0) : c.slope * power * from_max;
  return x - (v.weight && v.smoothing > 0 ? c.spread * v.weight[j] : c.spread);
}

// A row's loss to where it goes: its place, or the sum of whoever has this row.
template <bool SIMPLE = false, class T>
MLK_DEVICE void store_loss(const Visit<T>& v, int64_t row, T loss, double& total) {
  if (!SIMPLE && v.spec.reduction == Reduction::NONE) {
    if (v.losses) v.losses[row] = loss;
  } else {
    total += double(loss);
  }
}

// The teams' sums, in an order that `every` threads share out.
template <class T>
MLK_DEVICE double sum_of_partials(const Visit<T>& v, int64_t partials, int64_t mine, int64_t every) {
  double sum = 0;
  for (int64_t i = mine; i < partials; i += 2 * AT_ONCE * every) {
    double some[2 * AT_ONCE];
    read_ahead(v.partials, i, every, partials, some);
    sum += sum_of(some);
  }
  return sum;
}
// By all threads of a block, of `blocks`, whose teams have left their sums.
template <class Simt, class T>
MLK_DEVICE void reduce_partials(const Simt& simt, const Visit<T>& v, int blocks, int64_t partials) {
  if (!v.arrived) return;
  simt.block_sync();
  if (simt.warp() != 0) return;
  int last = 0;
  if (simt.lane() == 0) last = simt.comes_last(v.arrived, uint32_t(blocks));
  if (!simt.exchange(last, 0)) return;
  simt.warp_sync();
  const double sum = sum_over(simt, sum_of_partials(v, partials, simt.lane(), LANES));
  if (simt.lane() == 0) *v.losses = T(sum);
}

// What a row that is not looked at leaves, but for its gradient. The mean of no other rows is NaN.
template <class T>
MLK_DEVICE void store_skipped(const Visit<T>& v, const Factors<T>& shared, int64_t row, LabelStatus status,
                              double& total) {
  const T value = value_of<T>(status);
  store_unread(static_cast<const Problem<T>&>(v), row, value);
  store_loss(v, row, value * shared.by_class, total);
}

// ---- copies between shared and global memory -------------------------------------------------------------------------

// The vectors [first, first + count) of a span of elements that begins `phase` elements after the 16-byte boundary `base`,
// asked for by a warp into its place `to`. What would reach beyond the logits' memory is read element by element.
template <class S, class Simt, class T>
MLK_DEVICE void fetch_vectors(const Simt& simt, const Visit<T>& v, int barrier, int to, const char* base, int64_t first,
                              int count, bool edge) {
  const char* from = base + 16 * first;
  const bool before = edge && count > 0 && from < v.begin;
  const bool beyond = edge && count > 0 && from + 16 * int64_t(count) > v.end && !(before && count == 1);
  for (int side = 0; edge && side < 2; ++side) {
    if (!(side == 0 ? before : beyond)) continue;
    const int vector = side == 0 ? 0 : count - 1;
    if (simt.lane() < PER_VECTOR<S>) {
      const char* at = from + 16 * int64_t(vector) + int(sizeof(S)) * simt.lane();
      S value{};
      if (at >= v.begin && at < v.end) value = *reinterpret_cast<const S*>(at);
      simt.store(to + 16 * vector + int(sizeof(S)) * simt.lane(), value);
    }
    simt.before_copy();
    simt.warp_sync();
  }
  simt.copy_async(barrier, to + 16 * before, from + 16 * before, count - before - beyond);
}

// `count` elements from shared memory, where they begin at `at`, to anywhere: by a warp, 16 bytes at a time.
template <class S, class Simt>
MLK_DEVICE void write_out(const Simt& simt, int at, S* to, int64_t count) {
  constexpr int V = PER_VECTOR<S>;
  const int phase = phase_of(to);
  int64_t head = phase ? V - phase : 0;
  if (head > count) head = count;
  const int64_t vectors = (count - head) / V, tail = head + vectors * V;
  const auto one = [&](int64_t j) { return simt.template load<S>(at + int(sizeof(S)) * int(j)); };
  for (int64_t j = simt.lane(); j < head; j += LANES) to[j] = one(j);
  const bool together = (at + int(sizeof(S)) * int(head)) % 16 == 0;
  for (int64_t i = simt.lane(); i < vectors; i += LANES) {
    const int64_t j = head + V * i;
    Vec16 vector;
    if (together) {
      vector = simt.template load<Vec16>(at + int(sizeof(S)) * int(j));
    } else {
      S each[V];
      MLK_UNROLL
      for (int e = 0; e < V; ++e) each[e] = one(j + e);
      vector = bits_as<Vec16>(each);
    }
    store_vector(to + j, vector);
  }
  for (int64_t j = tail + simt.lane(); j < count; j += LANES) to[j] = one(j);
}

// A whole row of one value, by the threads [mine, mine + every, ...).
template <class S, class T>
MLK_DEVICE void fill(S* to, int64_t count, T value, int mine, int every) {
  constexpr int V = PER_VECTOR<S>;
  const int phase = phase_of(to);
  int64_t head = phase ? V - phase : 0;
  if (head > count) head = count;
  const int64_t vectors = (count - head) / V, tail = head + vectors * V;
  const S one = narrowed<S>(value);
  const Vec16 vector = all_of<S, Vec16>(one);
  for (int64_t j = mine; j < head; j += every) to[j] = one;
  for (int64_t i = mine; i < vectors; i += every) store_vector(to + head + V * i, vector);
  for (int64_t j = tail + mine; j < count; j += every) to[j] = one;
}

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
