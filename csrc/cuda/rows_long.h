// Long rows: each is read once while it is on chip.
//
// A row is shared out over the warps of a block, or of a cluster of blocks. Each warp has a ring of places in shared
// memory, filled by asynchronous copies and used again as soon as the gradient of what lies there is written: the next
// row arrives while this one is still being worked on. Warps meet twice a row: over its maximum, over its sums.
//
// STREAMED: for rows that the rings do not hold. They are read forwards with a running maximum, and again backwards,
// so that the second reading begins with what the second-level cache still has.
//
// Bytes: one reading (STREAMED: two, with a gradient) and one writing of the logits. T: the accumulation type; S: storage.
// GENERAL: softcap, adjustment, smoothing, RowStats, gradients of parameters.
#pragma once

#include "visit.h"

namespace mlkernels {

// How a long row is shared out.
struct RowPlan {
  int chunk;     // vectors of 16 bytes that come together, a multiple of a warp's lanes
  int slots;     // places of a warp's ring
  int chunks;    // chunks of a warp's share of a row
};

namespace MLKERNELS_ISA {

constexpr int SUMS = 4;  // doubles that a warp tells the others

// Where things lie in shared memory.
struct LongPlaces {
  int barriers, told, ring;
  MLK_FN LongPlaces(const RowPlan& plan, int warp, int warps, int ranks) {
    barriers = warp * plan.slots * 8;
    told = (warps * plan.slots * 8 + 127) / 128 * 128;
    const int rings = told + (2 * warps * ranks * SUMS * 8 + 127) / 128 * 128;
    ring = rings + warp * plan.slots * plan.chunk * 16;
  }
};
inline int long_shared_bytes(const RowPlan& plan, int warps, int ranks) {
  return LongPlaces(plan, warps, warps, ranks).ring;
}

template <class T_, class S_, bool GENERAL, bool STREAMED>
struct RowsLong {
  using T = T_;
  using S = S_;
  static constexpr int V = PER_VECTOR<S>;
  static constexpr int THREADS = sizeof(T) == 8 ? 256 : 512, BLOCKS = 1;  // registers: 128 a thread, or 255
  static constexpr T INF = std::numeric_limits<T>::infinity();

  // The warp's share of a row that lies in memory at x.
  struct Span {
    const char* base;    // the 16-byte boundary before it
    int phase;           // elements between the two
    int64_t begin, end;  // vectors from base
    int64_t last;        // the row's last vector
  };
  static MLK_DEVICE Span span_of(const S* x, int64_t classes, const RowPlan& plan, int part) {
    Span out;
    out.phase = phase_of(x);
    out.base = reinterpret_cast<const char*>(x - out.phase);
    const int64_t vectors = (out.phase + classes + V - 1) / V, each = int64_t(plan.chunk) * plan.chunks;
    out.begin = part * each < vectors ? part * each : vectors;
    out.end = out.begin + each < vectors ? out.begin + each : vectors;
    out.last = vectors - 1;
    return out;
  }
  static MLK_DEVICE int chunk_size(const Span& span, const RowPlan& plan, int64_t from) {
    const int64_t left = span.end - from;
    return int(left < 0 ? 0 : left < plan.chunk ? left : plan.chunk);
  }

  // A place of the ring, and how often it has been filled.
  struct Place {
    int slot = 0, parity = 0;
    MLK_DEVICE void next(const RowPlan& plan) {
      if (++slot < plan.slots) return;
      slot = 0;
      parity ^= 1;
    }
  };

  // What the warp asks for next.
  struct Loader {
    int64_t row;
    Span span;
    int order = 0;
    Place place;
  };

  template <class Simt>
  struct Team {
    const Simt& simt;
    const Visit<T>& v;
    const RowPlan& plan;
    const LongPlaces at;
    const int part, parts;
    int teams;
    int per_row;    // chunks asked for per row: forwards, backwards
    int forwards;   // of those
    int told = 0;   // which half of the exchange is next
    Loader ahead;
    Place place;

    MLK_DEVICE Team(const Simt& simt, const Visit<T>& v, const RowPlan& plan)
        : simt(simt),
          v(v),
          plan(plan),
          at(plan, simt.warp(), simt.warps(), simt.ranks()),
          part(simt.rank() * simt.warps() + simt.warp()),
          parts(simt.ranks() * simt.warps()) {
      teams = simt.blocks() / simt.ranks();
      const bool sums = !v.saved || v.want_shift;
      forwards = sums || !STREAMED ? plan.chunks : 0;
      per_row = STREAMED ? forwards + (v.grad ? plan.chunks : 0) : sums || v.grad ? plan.chunks : 0;
    }

    MLK_DEVICE void sync() const {
      if (simt.ranks() > 1)
        simt.cluster_sync();
      else if (simt.warps() > 1)
        simt.block_sync();
      else
        simt.warp_sync();
    }

    MLK_DEVICE const S* row_at(int64_t row) const { return static_cast<const S*>(v.input) + v.in.offset(row); }

    // The chunk that comes `order`-th in a row's ring.
    MLK_DEVICE int64_t chunk_from(const Span& span, int order) const {
      const int chunk = order < forwards ? order : plan.chunks - 1 - (order - forwards);
      return span.begin + int64_t(chunk) * plan.chunk;
    }

    MLK_DEVICE void seek(int64_t row) {
      while (row < v.rows && label_of(v, row).fate != Fate::KEPT) row += teams;
      ahead.row = row;
      if (row < v.rows) ahead.span = span_of(row_at(row), v.classes, plan, part);
    }

    MLK_DEVICE int ring_at(const Place& p) const { return at.ring + p.slot * plan.chunk * 16; }

    MLK_DEVICE void ask() {
      if (ahead.row >= v.rows || per_row == 0) return;
      const int64_t from = chunk_from(ahead.span, ahead.order);
      fetch_vectors<S>(simt, v, at.barriers + 8 * ahead.place.slot, ring_at(ahead.place), ahead.span.base, from,
                       chunk_size(ahead.span, plan, from));
      ahead.place.next(plan);
      if (++ahead.order == per_row) {
        ahead.order = 0;
        seek(ahead.row + teams);
      }
    }

    MLK_DEVICE void release() {
      simt.before_copy();
      simt.warp_sync();
      ask();
    }

    MLK_DEVICE void arrived(const Place& p) const { simt.copy_wait(at.barriers + 8 * p.slot, p.parity); }

    // Calls body(i, u, special) for this lane's vectors of a chunk: u the other classes' logits, -inf where there is none.
    // special: the vector holds the target, or what does not belong to the row.
    template <class Body>
    MLK_DEVICE void each(const Span& span, int ring, int64_t from, int64_t y, Body body) const {
      const int count = chunk_size(span, plan, from);
      const int64_t target_vector = (y + span.phase) / V;
      for (int i = simt.lane(); i < count; i += LANES) {
        const int64_t vector = from + i;
        T u[V];
        unpack<T, S>(simt.template load<Vec16>(ring + 16 * i), u);
        const bool special = vector == 0 || vector == span.last || vector == target_vector;
        const int64_t j = vector * V - span.phase;
        if (GENERAL || special) {
          MLK_UNROLL
          for (int e = 0; e < V; ++e) {
            const bool inside = j + e >= 0 && j + e < v.classes;
            if (GENERAL && inside) u[e] = prepare(v, u[e], j + e);
            if (!inside || j + e == y) u[e] = -INF;
          }
        }
        body(i, j, u, special);
      }
    }

    // The sums (or with MAX the largest of the first two, lexicographically) of all warps of the team.
    template <bool MAX>
    MLK_DEVICE void combine(double (&x)[SUMS]) {
      over_lanes<MAX>(x);
      if (parts == 1) return;
      const int here = at.told + told * parts * SUMS * 8;
      told ^= 1;
      if (simt.lane() < simt.ranks()) {
        MLK_UNROLL
        for (int k = 0; k < SUMS; ++k) {
          const int to = here + (part * SUMS + k) * 8;
          if (simt.ranks() > 1)
            simt.store_remote(simt.lane(), to, x[k]);
          else
            simt.store(to, x[k]);
        }
      }
      sync();
      MLK_UNROLL
      for (int k = 0; k < SUMS; ++k) x[k] = MAX && k == 0 ? -std::numeric_limits<double>::infinity() : 0.0;
      for (int i = simt.lane(); i < parts; i += LANES) {
        double other[SUMS];
        MLK_UNROLL
        for (int k = 0; k < SUMS; ++k) other[k] = simt.template load<double>(here + (i * SUMS + k) * 8);
        merge<MAX>(x, other);
      }
      over_lanes<MAX>(x);
    }
    template <bool MAX>
    static MLK_DEVICE void merge(double (&x)[SUMS], const double (&other)[SUMS]) {
      if (MAX) {
        // The second: minus the index of the first largest, below zero; 0: none was seen.
        const bool takes = other[0] > x[0] || (other[0] == x[0] && other[1] != 0 && (x[1] == 0 || other[1] > x[1]));
        x[0] = takes ? other[0] : x[0];
        x[1] = takes ? other[1] : x[1];
      } else {
        MLK_UNROLL
        for (int k = 0; k < SUMS; ++k) x[k] += other[k];
      }
    }
    template <bool MAX>
    MLK_DEVICE void over_lanes(double (&x)[SUMS]) const {
      for (int mask = LANES / 2; mask > 0; mask /= 2) {
        double other[SUMS];
        MLK_UNROLL
        for (int k = 0; k < (MAX ? 2 : SUMS); ++k) other[k] = simt.butterfly(x[k], mask);
        merge<MAX>(x, other);
      }
    }

    // ---- a row's passes ------------------------------------------------------------------------------------------------

    // The largest other logit, on chip.
    MLK_DEVICE void find_max(const Span& span, int64_t y, Standing<T>& stands, Counts& counts) {
      T m = -INF;
      int64_t first = -1;
      Place p = place;
      for (int k = 0; k < plan.chunks; ++k, p.next(plan)) {
        arrived(p);
        each(span, ring_at(p), chunk_from(span, k), y, [&](int, int64_t j, const T(&u)[V], bool) {
          MLK_UNROLL
          for (int e = 0; e < V; ++e) {
            if (GENERAL) note_first(j + e, y, u[e], m, first);
            m = larger(m, u[e]);
          }
        });
      }
      double x[SUMS] = {double(m), first < 0 ? 0.0 : -double(first) - 1, 0, 0};
      combine<true>(x);
      stands.m = T(x[0]);
      counts.first = x[1] == 0 ? -1 : int64_t(-x[1]) - 1;
    }
    // In the order of classes, before m knows of it.
    MLK_DEVICE void note_first(int64_t j, int64_t y, T u, T m, int64_t& first) const {
      if (j >= 0 && j < v.classes && j != y && (u > m || first < 0)) first = j;
    }

    struct Sums {
      T e = 0, shift = 0, weighted = 0;
      int above = 0;
    };

    MLK_DEVICE void add(Sums& sums, int64_t y, int64_t j, T u, T m, T scale2, T target) const {
      const T d = u - m;
      const T e = exp2_of(d * scale2);
      sums.e += e;
      if (GENERAL && v.want_shift) sums.shift += e == 0 ? T(0) : e * d;  // a class of probability 0 adds 0, also at -inf
      if (GENERAL && j >= 0 && j < v.classes && j != y) {
        if (v.smoothing > 0) sums.weighted += v.weight ? d * v.weight[j] : d;
        sums.above += u > target;
      }
    }

    // The sums, on chip, once the scale is known.
    MLK_DEVICE void add_up(const Span& span, int64_t y, const Standing<T>& stands, bool releases, Sums& sums) {
      const T m = stands.floor(), scale2 = stands.scale2();
      Place p = place;
      for (int k = 0; k < plan.chunks; ++k, p.next(plan)) {
        arrived(p);
        each(span, ring_at(p), chunk_from(span, k), y, [&](int, int64_t j, const T(&u)[V], bool) {
          MLK_UNROLL
          for (int e = 0; e < V; ++e) add(sums, y, j + e, u[e], m, scale2, stands.target);
        });
        if (releases) release();
      }
    }

    // Maximum and sums at once, with a running maximum; for both scales where it will depend on the maximum which counts.
    struct Running {
      T m = -INF;
      T e[2] = {0, 0}, shift[2] = {0, 0};
    };
    MLK_DEVICE void lift(Running& r, T top, const T (&scale2)[2], int scales) const {
      if (!(top > r.m)) return;
      MLK_UNROLL
      for (int k = 0; k < 2; ++k) {
        if (k >= scales) continue;
        const T factor = r.m == -INF ? T(0) : exp2_of((r.m - top) * scale2[k]);
        r.shift[k] = r.m == -INF ? T(0) : factor * (r.shift[k] + r.e[k] * (r.m - top));
        r.e[k] = r.e[k] != r.e[k] ? r.e[k] : r.e[k] * factor;  // a NaN is not lost
      }
      r.m = top;
    }
    MLK_DEVICE void run_through(const Span& span, int64_t y, Standing<T>& stands, Counts& counts, Sums& sums) {
      const int scales = v.spec.scale == TWO_SCALE ? 2 : 1;
      T scale2[2];
      // On either side of the threshold, by the rule itself.
      stands.scale = row_scale(v.spec, stands.values, -INF);
      scale2[0] = stands.scale2();
      stands.scale = row_scale(v.spec, stands.values, INF);
      scale2[1] = stands.scale2();
      Running r;
      if (v.saved) r.m = stands.m;
      int64_t first = -1;
      // Of (u - target), because the maximum is not known yet.
      const T origin = stands.target - stands.target == 0 ? stands.target : T(0);
      double weights = 0;
      for (int k = 0; k < plan.chunks; ++k, place.next(plan)) {
        arrived(place);
        each(span, ring_at(place), chunk_from(span, k), y, [&](int, int64_t j, const T(&u)[V], bool) {
          T top = -INF;
          MLK_UNROLL
          for (int e = 0; e < V; ++e) {
            if (GENERAL) note_first(j + e, y, u[e], larger(r.m, top), first);
            top = larger(top, u[e]);
          }
          lift(r, top, scale2, scales);
          const T m = r.m == -INF ? T(0) : r.m;
          MLK_UNROLL
          for (int e = 0; e < V; ++e) {
            const T d = u[e] - m;
            MLK_UNROLL
            for (int s = 0; s < 2; ++s) {
              if (s >= scales) continue;
              const T x = exp2_of(d * scale2[s]);
              r.e[s] += x;
              if (GENERAL && v.want_shift) r.shift[s] += x == 0 ? T(0) : x * d;
            }
            if (GENERAL && j + e >= 0 && j + e < v.classes && j + e != y) {
              if (v.smoothing > 0) {
                const T w = v.weight ? v.weight[j + e] : T(1);
                sums.weighted += w * (u[e] - origin);
                weights += double(w);
              }
              sums.above += u[e] > stands.target;
            }
          }
        });
        release();
      }
      if (!v.saved) {
        double x[SUMS] = {double(r.m), first < 0 ? 0.0 : -double(first) - 1, 0, 0};
        combine<true>(x);
        stands.m = T(x[0]);
        counts.first = x[1] == 0 ? -1 : int64_t(-x[1]) - 1;
        lift(r, stands.m, scale2, scales);
      }
      stand(v, stands);
      // With a single scale there is one sum; with two, the first belongs to the lower side of the threshold.
      const bool high = scales == 2 && stands.scale.selected == SCALE_HIGH;
      sums.e = high ? r.e[1] : r.e[0];
      sums.shift = high ? r.shift[1] : r.shift[0];
      sums.weighted += T(weights) * (origin - stands.floor());
    }

    // The gradient; the ring's places are given back one by one.
    MLK_DEVICE void write_gradient(const Span& span, int64_t row, int64_t y, const Standing<T>& stands,
                                   const Conclusion<T>& c) {
      S* g = static_cast<S*>(v.grad) + v.out.offset(row);
      const bool together = phase_of(g) == span.phase;
      const T m = stands.floor(), scale2 = stands.scale2();
      const T at_target = GENERAL ? unprepare(v, c.at_target, stands.target, y) : c.at_target;
      for (int k = 0; k < plan.chunks; ++k, place.next(plan)) {
        const int64_t from = chunk_from(span, STREAMED ? forwards + k : k);
        const int ring = ring_at(place);
        arrived(place);
        each(span, ring, from, y, [&](int i, int64_t j, T(&u)[V], bool special) {
          MLK_UNROLL
          for (int e = 0; e < V; ++e) {
            T x = c.factor * exp2_of((u[e] - m) * scale2);
            if (GENERAL && j + e >= 0 && j + e < v.classes) {
              x = unprepare(v, x - (v.weight && v.smoothing > 0 ? c.spread * v.weight[j + e] : c.spread), u[e], j + e);
            }
            if (special && j + e == y) x = at_target;
            u[e] = x;
          }
          if (!together) {
            simt.store(ring + 16 * i, pack<T, S>(u));
          } else if (special && (j < 0 || j + V > v.classes)) {
            MLK_UNROLL
            for (int e = 0; e < V; ++e)
              if (j + e >= 0 && j + e < v.classes) narrow(u[e], g[j + e]);
          } else {
            store_vector(g + j, pack<T, S>(u));
          }
        });
        if (!together) {
          simt.warp_sync();
          int64_t begin = from * V - span.phase, end = begin + int64_t(chunk_size(span, plan, from)) * V;
          const int64_t skipped = begin < 0 ? -begin : 0;
          begin += skipped;
          if (end > v.classes) end = v.classes;
          if (end > begin) write_out(simt, ring + int(skipped) * int(sizeof(S)), g + begin, end - begin);
        }
        release();
      }
    }

    // ---- a row ---------------------------------------------------------------------------------------------------------

    MLK_DEVICE void visit(int64_t row, const Label& label, const Batch<T>& batch, const Share<T>& share, bool leaves,
                          double& by_class, double& by_row) {
      const S* x = row_at(row);
      const Span span = span_of(x, v.classes, plan, part);
      Standing<T> stands;
      Counts counts{-1, 0};
      Sums sums;
      fetch(static_cast<const Problem<T>&>(v), row, label.y, label.group, stands.values);
      stands.target = widen(x[label.y]);
      if (GENERAL) stands.target = prepare(v, stands.target, label.y);
      if (v.saved) stands.m = v.saved[2 * row];
      const bool adds = !v.saved || v.want_shift;
      if (STREAMED) {
        if (adds)
          run_through(span, label.y, stands, counts, sums);
        else
          stand(v, stands);
      } else {
        if (!v.saved) find_max(span, label.y, stands, counts);
        stand(v, stands);
        if (adds) add_up(span, label.y, stands, !v.grad, sums);
      }
      double x4[SUMS] = {double(sums.e), double(sums.shift), double(sums.weighted), double(sums.above)};
      if (adds) combine<false>(x4);
      counts.above = x4[3] == x4[3] ? int64_t(x4[3]) : 0;
      const Conclusion<T> c = finish_row<GENERAL>(v, batch, share, row, label.y, stands, T(x4[0]), T(x4[1]), T(x4[2]), counts, leaves);
      if (leaves) leave_loss(v, row, c.loss, by_class, by_row);
      if (v.grad)
        write_gradient(span, row, label.y, stands, c);
      else if (!STREAMED && adds)
        for (int k = 0; k < plan.chunks; ++k) place.next(plan);
    }
  };

  template <class Simt>
  static MLK_DEVICE void run(const Simt& simt, const Visit<T>& v, const RowPlan& plan) {
    if (v.unless_one && *v.unless_one == T(1)) return;
    Team<Simt> team(simt, v, plan);
    for (int slot = simt.lane(); slot < plan.slots; slot += LANES) simt.barrier_init(team.at.barriers + 8 * slot);
    simt.barriers_ready();
    team.sync();
    const int first = simt.block() / simt.ranks();
    team.seek(first);
    for (int k = 0; k < plan.slots; ++k) team.ask();

    const Batch<T> batch = batch_on_device(v);
    const Share<T> share = share_of(simt, v);
    const bool leaves = team.part == 0 && simt.lane() == 0;
    double by_class = 0, by_row = 0;
    for (int64_t row = first; row < v.rows; row += team.teams) {
      const Label label = label_of(v, row);
      if (label.fate == Fate::KEPT) {
        team.visit(row, label, batch, share, leaves, by_class, by_row);
        continue;
      }
      if (leaves) leave_fate(v, row, label.fate, by_class, by_row);
      if (v.grad)
        fill(static_cast<S*>(v.grad) + v.out.offset(row), v.classes, label.fate == Fate::BAD ? nan<T>() : T(0),
             team.part * LANES + simt.lane(), team.parts * LANES);
    }
    if (leaves && v.partials) {
      v.partials[2 * first] = by_class;
      v.partials[2 * first + 1] = by_row;
    }
    // A block whose shared memory others still write to must not end.
    if (simt.ranks() > 1) simt.cluster_sync();
  }
};

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
