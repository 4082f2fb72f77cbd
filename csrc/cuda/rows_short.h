// Short rows that lie one after another, many of them at once.
//
// A warp takes tiles of rows. A tile is one piece of memory whatever the number of classes, so it comes and goes 16 bytes
// at a time; its rows are worked on in shared memory, each by 1 ... 32 lanes that hold it in registers. Warps have
// nothing to do with each other, and the next tile is on its way while this one is worked on.
//
// Alone: a small batch is served by one block or cluster in one launch, which counts the rows for "mean" before it
// starts and adds up the loss when it is done.
//
// Bytes: one reading and one writing of the logits; rows with an ignored label are read with their neighbours.
// T: the accumulation type; S: storage; ELEMENTS: of a lane. GENERAL: softcap, adjustment, smoothing, RowStats,
// gradients of parameters.
#pragma once

#include "visit.h"

namespace mlkernels {

struct TilePlan {
  int lanes;  // of a row: a power of two
  int rows;   // of a tile, a multiple of LANES / lanes
  int slots;  // tiles that a warp's part of shared memory holds
  int alone;  // whether this launch is one block or cluster that does everything
};

namespace MLKERNELS_ISA {

struct TilePlaces {
  int barriers, told, ring, tile;
  MLK_FN TilePlaces(const TilePlan& plan, int64_t row_bytes, int warp, int warps, int ranks) {
    tile = int((plan.rows * row_bytes + 15) / 16 * 16 + 16);
    barriers = warp * plan.slots * 8;
    told = (warps * plan.slots * 8 + 127) / 128 * 128;
    const int rings = told + (plan.alone ? (4 * warps * ranks * 8 + 127) / 128 * 128 : 0);
    ring = rings + warp * plan.slots * tile;
  }
};
inline int tile_shared_bytes(const TilePlan& plan, int64_t row_bytes, int warps, int ranks) {
  return TilePlaces(plan, row_bytes, warps, warps, ranks).ring;
}

template <class T_, class S_, int ELEMENTS, bool GENERAL>
struct RowsShort {
  using T = T_;
  using S = S_;
  static constexpr int THREADS = 128, BLOCKS = GENERAL || ELEMENTS > 8 || sizeof(T) == 8 ? 2 : 3;
  static constexpr T INF = std::numeric_limits<T>::infinity();

  // Two sums over all threads of the launch, which is one block or cluster; the same bits for all of them.
  template <class Simt>
  static MLK_DEVICE void over_all(const Simt& simt, int told, double& a, double& b) {
    a = sum_over(simt, a);
    b = sum_over(simt, b);
    const int parts = simt.warps() * simt.ranks(), part = simt.rank() * simt.warps() + simt.warp();
    if (parts == 1) return;
    if (simt.ranks() > 1) {
      if (simt.lane() < simt.ranks()) {
        simt.store_remote(simt.lane(), told + 16 * part, a);
        simt.store_remote(simt.lane(), told + 16 * part + 8, b);
      }
      simt.cluster_sync();
    } else {
      if (simt.lane() == 0) {
        simt.store(told + 16 * part, a);
        simt.store(told + 16 * part + 8, b);
      }
      simt.block_sync();
    }
    a = b = 0;
    for (int i = simt.lane(); i < parts; i += LANES) {
      a += simt.template load<double>(told + 16 * i);
      b += simt.template load<double>(told + 16 * i + 8);
    }
    a = sum_over(simt, a);
    b = sum_over(simt, b);
  }

  template <class Simt>
  static MLK_DEVICE void run(const Simt& simt, const Visit<T>& v, const TilePlan& plan) {
    if (v.unless_one && *v.unless_one == T(1)) return;
    const TilePlaces at(plan, v.classes * int64_t(sizeof(S)), simt.warp(), simt.warps(), simt.ranks());
    const int64_t tiles = (v.rows + plan.rows - 1) / plan.rows;
    const int64_t every = int64_t(simt.blocks()) * simt.warps();
    const int64_t mine = int64_t(simt.block()) * simt.warps() + simt.warp();
    for (int slot = simt.lane(); slot < plan.slots; slot += LANES) simt.barrier_init(at.barriers + 8 * slot);
    simt.barriers_ready();
    simt.warp_sync();
    if (simt.ranks() > 1) simt.cluster_sync();

    const auto ask = [&](int64_t tile, int slot) {
      if (tile >= tiles) return;
      const int64_t row = tile * plan.rows;
      const int64_t rows = v.rows - row < plan.rows ? v.rows - row : plan.rows;
      const S* x = static_cast<const S*>(v.input) + row * v.classes;
      const int phase = phase_of(x);
      const int count = int((phase + rows * v.classes + PER_VECTOR<S> - 1) / PER_VECTOR<S>);
      fetch_vectors<S>(simt, v, at.barriers + 8 * slot, at.ring + slot * at.tile, reinterpret_cast<const char*>(x - phase), 0,
                       count, true);
    };
    for (int slot = 0; slot < plan.slots; ++slot) ask(mine + slot * every, slot);

    Share<T> share{1, 1};
    double weights = 0, kept = 0;
    if (!plan.alone) {
      share = share_of(simt, v);
    } else if (v.spec.reduction == REDUCE_MEAN) {
      for (int64_t row = int64_t(simt.block()) * simt.threads() + simt.thread(); row < v.rows;
           row += int64_t(simt.blocks()) * simt.threads())
        count_row(v, row, weights, kept);
      over_all(simt, at.told, weights, kept);
      share = {T(1 / weights), T(1 / kept)};
    }
    const Batch<T> batch = batch_on_device(v);
    double by_class = 0, by_row = 0;
    int slot = 0, parity = 0;
    for (int64_t tile = mine; tile < tiles; tile += every) {
      simt.copy_wait(at.barriers + 8 * slot, parity);
      const int64_t first = tile * plan.rows;
      const int64_t rows = v.rows - first < plan.rows ? v.rows - first : plan.rows;
      const S* x = static_cast<const S*>(v.input) + first * v.classes;
      const int begin = at.ring + slot * at.tile + phase_of(x) * int(sizeof(S));
      const int together = LANES / plan.lanes;
      for (int64_t r = 0; r < rows; r += together)
        visit(simt, v, plan, batch, share, first, r + simt.lane() / plan.lanes, rows, begin, by_class, by_row);
      simt.warp_sync();
      if (v.grad) write_out(simt, begin, static_cast<S*>(v.grad) + first * v.classes, rows * v.classes);
      simt.before_copy();
      simt.warp_sync();
      ask(tile + plan.slots * every, slot);
      if (++slot == plan.slots) {
        slot = 0;
        parity ^= 1;
      }
    }
    if (v.spec.reduction == REDUCE_NONE || !v.losses) return;
    if (plan.alone) {
      over_all(simt, at.told + 16 * simt.warps() * simt.ranks(), by_class, by_row);
      if (v.spec.reduction == REDUCE_MEAN) {
        by_class /= weights;
        by_row = by_row == 0 ? 0.0 : by_row / kept;
      }
      if (simt.block() == 0 && simt.thread() == 0) *v.losses = T(by_class + by_row);
    } else {
      by_class = sum_over(simt, by_class);
      by_row = sum_over(simt, by_row);
      if (simt.lane() == 0) {
        v.partials[2 * mine] = by_class;
        v.partials[2 * mine + 1] = by_row;
      }
    }
  }

  // A row by its lanes; all lanes of the warp come here, also those that have no row.
  template <class Simt>
  static MLK_DEVICE void visit(const Simt& simt, const Visit<T>& v, const TilePlan& plan, const Batch<T>& batch,
                               const Share<T>& share, int64_t first_row, int64_t r, int64_t rows, int begin,
                               double& by_class, double& by_row) {
    const int lanes = plan.lanes, sub = simt.lane() % lanes;
    const bool exists = r < rows;
    const int64_t row = first_row + r;
    Label label{0, 0, Fate::IGNORED};
    if (exists) label = label_of(v, row);
    const bool kept = label.fate == Fate::KEPT;
    const int y = kept ? int(label.y) : 0;
    const int at = begin + int(r * v.classes) * int(sizeof(S));
    // This lane's elements are those at `mine`, `step` bytes apart, and the target is its own-th.
    const int count = kept ? (int(v.classes) - sub + lanes - 1) / lanes : 0;
    const int own = y % lanes == sub ? y / lanes : -1;
    const int mine = at + sub * int(sizeof(S)), step = lanes * int(sizeof(S));
    const auto element = [&](int place) { return T(widen(simt.template load<S>(place))); };

    Standing<T> stands;
    T u[ELEMENTS];
    stands.m = -INF;
    int first = -1;
    MLK_UNROLL
    for (int i = 0; i < ELEMENTS; ++i) {
      u[i] = -INF;
      if (i < count) {
        u[i] = element(mine + i * step);
        if (GENERAL) {
          u[i] = prepare(v, u[i], i * lanes + sub);
          if (i != own && (u[i] > stands.m || first < 0)) first = i * lanes + sub;
        }
      }
      if (i == own) u[i] = -INF;
      stands.m = larger(stands.m, u[i]);
    }
    stands.target = kept ? element(at + y * int(sizeof(S))) : T(0);
    if (GENERAL && kept) stands.target = prepare(v, stands.target, y);
    if (kept) fetch(static_cast<const Problem<T>&>(v), row, y, label.group, stands.values);
    Counts counts{-1, 0};
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      const T m = simt.butterfly(stands.m, mask);
      if (GENERAL) {
        const int other = simt.butterfly(first, mask);
        if (other >= 0 && (first < 0 || m > stands.m || (m == stands.m && other < first))) first = other;
      }
      stands.m = larger(stands.m, m);
    }
    counts.first = first;
    if (v.saved && kept) stands.m = v.saved[2 * row];
    T sum = 0, shift = 0, weighted = 0;
    int above = 0;
    if (kept) {
      stand(v, stands);
      const T m = stands.floor(), scale2 = stands.scale2();
      MLK_UNROLL
      for (int i = 0; i < ELEMENTS; ++i) {
        const int j = i * lanes + sub;
        const T d = u[i] - m;
        if (GENERAL && i < count && i != own) {
          if (v.smoothing > 0) weighted += v.weight ? d * v.weight[j] : d;
          above += u[i] > stands.target;
        }
        const T e = exp2_of(d * scale2);
        sum += e;
        if (GENERAL && v.want_shift) shift += e == 0 ? T(0) : e * d;
      }
    }
    sum = sum_over(simt, sum, lanes);
    if (GENERAL && v.want_shift) shift = sum_over(simt, shift, lanes);
    if (GENERAL) {
      weighted = sum_over(simt, weighted, lanes);
      above = sum_over(simt, above, lanes);
      counts.above = above;
    }
    Conclusion<T> c{};
    if (kept) {
      c = finish_row<GENERAL>(v, batch, share, row, y, stands, sum, shift, weighted, counts, sub == 0);
      if (sub == 0) leave_loss(v, row, c.loss, by_class, by_row);
    } else if (exists && sub == 0) {
      leave_fate(v, row, label.fate, by_class, by_row);
    }
    if (!v.grad) return;
    simt.warp_sync();  // the target's logit is read by all of the row's lanes
    if (!exists) return;
    if (!kept) {
      S value;
      narrow(label.fate == Fate::BAD ? nan<T>() : T(0), value);
      for (int j = sub; j < int(v.classes); j += lanes) simt.store(at + j * int(sizeof(S)), value);
      return;
    }
    const T m = stands.floor(), scale2 = stands.scale2();
    MLK_UNROLL
    for (int i = 0; i < ELEMENTS; ++i) {
      if (i >= count) continue;
      // The exponential again, rather than kept: the registers are worth more.
      T g = c.factor * exp2_of((u[i] - m) * scale2);
      const int j = i * lanes + sub;
      if (GENERAL) g -= v.weight && v.smoothing > 0 ? c.spread * v.weight[j] : c.spread;
      if (i == own) g = c.at_target;
      if (GENERAL) g = unprepare(v, g, i == own ? stands.target : u[i], j);
      S narrowed;
      narrow(g, narrowed);
      simt.store(mine + i * step, narrowed);
    }
  }
};

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
