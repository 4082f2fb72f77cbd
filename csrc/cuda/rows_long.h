// Long rows: each is read once while it is on chip.
//
// A row is shared out over the warps of a block, or of a cluster of blocks. Each warp has a ring of places in shared
// memory, filled by asynchronous copies and used again as soon as the gradient of what lies there is written: the next
// row arrives while this one is still being worked on. Warps meet twice a row: over its maximum, over its sums.
//
// STREAMED: for rows that the rings do not hold. They are read forwards with a running maximum, and again backwards,
// so that the second reading begins with what the second-level cache still has.
//
// Shares and chunks are counted from the row's own beginning, and sums are kept apart by an element's place in them, so that
// a row's results are the same bits wherever it lies; the vectors that two chunks share come twice.
//
// Bytes: one reading (STREAMED: two, with a gradient) and one writing of the logits. T: the accumulation type; S: storage.
// GENERAL: softcap, adjustment, smoothing, RowStats, gradients of parameters and of the entropy.
#pragma once

#include "shares.h"

namespace mlkernels {
namespace MLKERNELS_ISA {

template <class T_, class S_, bool GENERAL, bool STREAMED>
struct RowsLong {
  using T = T_;
  using S = S_;
  static constexpr int V = PER_VECTOR<S>;
  static constexpr int THREADS = GENERAL || STREAMED || sizeof(T) == 8 ? 256 : 512,
                       BLOCKS = 1;  // registers: 255, or 128
  static constexpr T INF = std::numeric_limits<T>::infinity();

  // What the warp asks for next.
  struct Loader {
    int64_t row;
    Label next;  // the label of the row after it, read long before it is looked at
    Span span;
    bool edge;  // whether its vectors may reach beyond the logits' memory
    int order = 0;
    RingSlot place;
  };

  template <class Simt>
  struct Team {
    const Simt& simt;
    const Visit<T>& v;
    const RowPlan& plan;
    const LongOffsets at;
    const int part, parts;
    int teams;
    int per_row;        // chunks asked for per row: forwards, backwards
    int forwards;       // of those
    int exchanges = 0;  // so far
    Loader ahead;
    RingSlot place;

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

    MLK_DEVICE const S* row_at(int64_t row) const { return static_cast<const S*>(v.input) + v.in.offset(row); }

    // The chunk that comes `order`-th of a row, in its place of the ring.
    MLK_DEVICE Chunk chunk_of(const Span& span, const RingSlot& p, int order) const {
      const int which = order < forwards ? order : plan.chunks - 1 - (order - forwards);
      return chunk_at<V>(span, plan, which, at.ring + p.slot * plan.slot_bytes());
    }

    MLK_DEVICE Label label_before(int64_t row) const {
      return row < v.rows ? label_of(v, row) : Label{0, 0, LabelStatus::IGNORED};
    }

    // The first row from here on that is kept.
    MLK_DEVICE void seek(int64_t row) {
      while (row < v.rows) {
        const Label label = ahead.next;
        ahead.next = label_before(row + teams);
        if (label.status == LabelStatus::VALID) break;
        row += teams;
      }
      ahead.row = row;
      if (row >= v.rows) return;
      ahead.span = span_of(row_at(row), v.classes, plan, part);
      const int64_t vectors = (ahead.span.phase + v.classes + V - 1) / V;
      ahead.edge = ahead.span.base < v.begin || ahead.span.base + 16 * vectors > v.end;
    }

    MLK_DEVICE void prefetch() {
      if (ahead.row >= v.rows || per_row == 0) return;
      const Chunk chunk = chunk_of(ahead.span, ahead.place, ahead.order);
      fetch_vectors<S>(simt, v, at.barriers + 8 * ahead.place.slot, chunk.ring, ahead.span.base, chunk.from / V,
                       chunk.count, ahead.edge);
      ahead.place.next(plan);
      if (++ahead.order == per_row) {
        ahead.order = 0;
        seek(ahead.row + teams);
      }
    }

    MLK_DEVICE void release() {
      simt.before_copy();
      simt.warp_sync();
      prefetch();
    }

    MLK_DEVICE void wait_for(const RingSlot& p) const { simt.copy_wait(at.barriers + 8 * p.slot, p.parity); }

    // Calls body(at, i, u) for this lane's vectors of a chunk: u the logits of the other classes, -inf where there is none.
    template <class Body>
    MLK_DEVICE void each(const Chunk& chunk, int64_t y, Body body) const {
      int at = chunk.ring + 16 * simt.lane();
      for (int i = simt.lane(); i < chunk.count; i += LANES, at += 16 * LANES) {
        T u[V];
        unpack<T, S>(simt.template load<Vec16>(at), u);
        if (GENERAL) {
          MLK_UNROLL
          for (int e = 0; e < V; ++e) {
            const int64_t j = chunk.first() + i * V + e;
            if (chunk.holds(i * V + e)) u[e] = prepare(v.preparation, u[e], j);
            if (!chunk.holds(i * V + e) || j == y) u[e] = -INF;
          }
        }
        body(at, i, u);
      }
    }

    // Whether class y is in a chunk, and this lane reads its vector.
    MLK_DEVICE bool reads(const Chunk& chunk, int64_t y) const {
      return uint64_t(y - chunk.from) < uint64_t(chunk.size) && int(y - chunk.first()) / V % LANES == simt.lane();
    }

    // -inf in place of the target and of what does not belong to the chunk, by the lane that will read the vector: then no
    // element has to be looked at twice. Not where softcap would make a number of it.
    MLK_DEVICE void blank(const Chunk& chunk, int64_t y) const {
      if (GENERAL) return;
      const S nothing = narrowed<S>(-INF);
      const auto put = [&](int element) { simt.store(chunk.ring + element * int(sizeof(S)), nothing); };
      if (reads(chunk, y)) put(int(y - chunk.first()));
      if (chunk.count == 0) return;
      if (simt.lane() == 0)
        for (int element = 0; element < chunk.lead; ++element) put(element);
      if (simt.lane() == (chunk.count - 1) % LANES)
        for (int element = chunk.lead + chunk.size; element < chunk.count * V; ++element) put(element);
    }

    // To the mailboxes of all warps: K numbers of T's size each.
    template <int K>
    MLK_DEVICE int post(const T (&x)[K]) {
      // Two mailboxes in turn: whoever posts to one again has read the other, to which all had posted by then.
      const int half = exchanges & 1, parity = exchanges >> 1 & 1;
      ++exchanges;
      const int here = at.mailbox + half * parts * SUMS * 8, mine = here + part * SUMS * 8;
      if (simt.ranks() > 1) {
        // No barrier of the cluster: it would wait until this row's gradient is written, here and elsewhere.
        if (simt.thread() == 0) simt.expect(8 * half, parts * K * int(sizeof(T)));
        if (simt.lane() < simt.ranks()) {
          MLK_UNROLL
          for (int k = 0; k < K; ++k) simt.store_async(simt.lane(), mine + 8 * k, x[k], 8 * half);
        }
        simt.copy_wait(8 * half, parity);
      } else {
        if (simt.lane() == 0) {
          MLK_UNROLL
          for (int k = 0; k < K; ++k) simt.store(mine + 8 * k, x[k]);
        }
        simt.block_sync();
      }
      return here;
    }
    MLK_DEVICE T posted(int here, int part, int k) const { return simt.template load<T>(here + (part * SUMS + k) * 8); }

    // Sums over the team, the same bits for all of it.
    template <int K>
    MLK_DEVICE void sum_all(T (&x)[K]) {
      MLK_UNROLL
      for (int k = 0; k < K; ++k) x[k] = sum_over(simt, x[k]);
      if (parts == 1) return;
      const int here = post(x), lanes = parts < LANES ? parts : LANES;
      MLK_UNROLL
      for (int k = 0; k < K; ++k) {
        x[k] = 0;
        for (int i = simt.lane() % lanes; i < parts; i += lanes) x[k] += posted(here, i, k);
        x[k] = sum_over(simt, x[k], lanes);
      }
    }

    // The largest m, and of those the lowest class.
    MLK_DEVICE void max_all(T& m, int64_t& first) {
      const auto merge = [&](T other, int64_t its) {
        if (GENERAL && its >= 0 && (first < 0 || other > m || (other == m && its < first))) first = its;
        m = larger(m, other);
      };
      const auto lanes_merge = [&](int lanes) {
        for (int mask = lanes / 2; mask > 0; mask /= 2) {
          const T other = simt.butterfly(m, mask);
          merge(other, GENERAL ? simt.butterfly(first, mask) : 0);
        }
      };
      lanes_merge(LANES);
      if (parts == 1) return;
      // A class in two numbers: a float does not hold every one.
      const T x[3] = {m, T(first < 0 ? -1 : first >> 16), T(first < 0 ? 0 : first & 0xffff)};
      const T y[1] = {m};
      const int here = GENERAL ? post(x) : post(y), lanes = parts < LANES ? parts : LANES;
      m = -INF;
      first = -1;
      for (int i = simt.lane() % lanes; i < parts; i += lanes) {
        int64_t its = -1;
        if (GENERAL) {
          const T high = posted(here, i, 1), low = posted(here, i, 2);
          its = high < 0 ? -1 : (int64_t(high) << 16) + int64_t(low);
        }
        merge(posted(here, i, 0), its);
      }
      lanes_merge(lanes);
    }

    // A lane's V sums, each of one element of its vectors, as one: in an order that the row's own beginning gives. Where
    // that is element `phase` of a vector, element 0 of the row's k-th vector's worth is there, and the last ones are the
    // next lane's first.
    MLK_DEVICE T in_order(T (&x)[V], int phase) const {
      if (phase != 0) {
        MLK_UNROLL
        for (int e = 0; e < V; ++e) {
          const T next = simt.exchange(x[e], (simt.lane() + 1) % LANES);
          if (e < phase) x[e] = next;
        }
        MLK_UNROLL
        for (int by = 1; by < V; by *= 2) {
          T turned[V];
          MLK_UNROLL
          for (int e = 0; e < V; ++e) turned[e] = x[(e + by) % V];
          MLK_UNROLL
          for (int e = 0; e < V; ++e) x[e] = phase & by ? turned[e] : x[e];
        }
      }
      return sum_of(x);
    }

    // ---- a row's passes ------------------------------------------------------------------------------------------------

    // The largest other logit of a chunk and of m, by lane; and the first class that has it.
    MLK_DEVICE void search(const Chunk& chunk, int64_t y, T& m, int64_t& first) const {
      if constexpr (sizeof(S) == 2 && !GENERAL) {  // in pairs, as they lie
        uint32_t pair = all_of<S, uint32_t>(narrowed<S>(-INF));
        int from = chunk.ring + 16 * simt.lane();
        for (int i = simt.lane(); i < chunk.count; i += LANES, from += 16 * LANES) {
          const Vec16 u = simt.template load<Vec16>(from);
          pair = larger_pair(
              pair, larger_pair(larger_pair(u.word[0], u.word[1], S()), larger_pair(u.word[2], u.word[3], S()), S()),
              S());
        }
        m = larger(m, larger(widen(S{uint16_t(pair)}), widen(S{uint16_t(pair >> 16)})));
      } else {
        each(chunk, y, [&](int, int i, const T(&u)[V]) {
          MLK_UNROLL
          for (int e = 0; e < V; ++e) {
            const int64_t j = chunk.first() + i * V + e;
            if (GENERAL && chunk.holds(i * V + e) && j != y && (u[e] > m || first < 0)) first = j;
            m = larger(m, u[e]);
          }
        });
      }
    }

    // The largest other logit, on chip.
    MLK_DEVICE void find_max(const Span& span, int64_t y, RowState<T>& state, Counts& counts) {
      state.m = -INF;
      RingSlot p = place;
      for (int k = 0; k < plan.chunks; ++k, p.next(plan)) {
        wait_for(p);
        const Chunk chunk = chunk_of(span, p, k);
        blank(chunk, y);
        search(chunk, y, state.m, counts.first);
      }
      max_all(state.m, counts.first);
    }

    // A lane's sums before they are one.
    struct Lanes {
      T e[V] = {}, shift[V] = {}, square[V] = {}, weighted[V] = {};
    };

    // The sums, on chip, once the scale is known.
    MLK_DEVICE void accumulate(const Span& span, int64_t y, const RowState<T>& state, bool releases, RowSums<T>& sums,
                               int& above) {
      const Exponent<T> exponent(state);
      Lanes lanes;
      if (exponent.fused)
        accumulate_chunks<sizeof(T) == 4>(span, y, state, exponent, releases, lanes, above);
      else
        accumulate_chunks<false>(span, y, state, exponent, releases, lanes, above);
      sums.e = in_order(lanes.e, span.phase) * exponent.correction();
      if (!GENERAL) return;
      sums.shift = in_order(lanes.shift, span.phase) * exponent.correction();
      if (v.want_square) sums.square = in_order(lanes.square, span.phase) * exponent.correction();
      sums.weighted = in_order(lanes.weighted, span.phase);
    }
    template <bool FUSED>
    MLK_DEVICE void accumulate_chunks(const Span& span, int64_t y, const RowState<T>& state,
                                      const Exponent<T>& exponent, bool releases, Lanes& sums, int& above) {
      RingSlot p = place;
      for (int k = 0; k < plan.chunks; ++k, p.next(plan)) {
        wait_for(p);
        const Chunk chunk = chunk_of(span, p, k);
        if (v.saved) blank(chunk, y);
        each(chunk, y, [&](int, int i, const T(&u)[V]) {
          MLK_UNROLL
          for (int e = 0; e < V; ++e) {
            const T power = exponent.template of<FUSED>(u[e]);
            sums.e[e] += power;
            if (!GENERAL) continue;
            const T d = u[e] - exponent.m;
            if (v.want_shift)
              sums.shift[e] += power == 0 ? T(0) : power * d;  // a class of probability 0 adds 0, also at -inf
            if (v.want_square) sums.square[e] += power == 0 ? T(0) : power * d * d;
            const int64_t j = chunk.first() + i * V + e;
            if (!chunk.holds(i * V + e) || j == y) continue;
            if (v.smoothing > 0) sums.weighted[e] += v.weight ? d * v.weight[j] : d;
            above += u[e] > state.target;
          }
        });
        if (releases) release();
      }
    }

    // Maximum and sums at once, with a maximum that runs from chunk to chunk; for both scales where it will depend on the
    // maximum which counts.
    struct RunningSums {
      T m = -INF;
      T e[2][V] = {}, shift[2][V] = {};
    };
    MLK_DEVICE void rescale(RunningSums& r, T top, const T (&scale2)[2], int scales) const {
      if (!(top > r.m)) return;
      MLK_UNROLL
      for (int s = 0; s < 2; ++s) {
        if (s >= scales) continue;
        const T factor = r.m == -INF ? T(0) : exp2_of((r.m - top) * scale2[s]);
        MLK_UNROLL
        for (int e = 0; e < V; ++e) {
          T& sum = r.e[s][e];
          if (GENERAL) r.shift[s][e] = r.m == -INF ? T(0) : factor * (r.shift[s][e] + sum * (r.m - top));
          sum = sum != sum ? sum : sum * factor;  // a NaN is not lost
        }
      }
      r.m = top;
    }
    // Sums of (u - target), because the maximum is not known yet.
    static MLK_DEVICE T origin(const RowState<T>& state) {
      return state.target - state.target == 0 ? state.target : T(0);
    }

    MLK_DEVICE void run_through(const Span& span, int64_t y, RowState<T>& state, Counts& counts, RowSums<T>& sums,
                                int& above) {
      const int scales = v.spec.scale == Scale::TWO_SCALE && !v.saved ? 2 : 1;
      T scale2[2];
      RunningSums r;
      if (v.saved) {
        r.m = state.m;
        select_scale(v, state);
        scale2[0] = scale2[1] = state.scale2();
      } else {
        // On either side of the threshold, by the rule itself.
        state.scale = row_scale(v.spec, state.values, -INF);
        scale2[0] = state.scale2();
        state.scale = row_scale(v.spec, state.values, INF);
        scale2[1] = state.scale2();
      }
      T mine = -INF, square[V] = {}, weighted[V] = {};
      for (int k = 0; k < plan.chunks; ++k, place.next(plan)) {
        wait_for(place);
        const Chunk chunk = chunk_of(span, place, k);
        blank(chunk, y);
        if (!v.saved) {
          search(chunk, y, mine, counts.first);
          rescale(r, largest_over(simt, mine), scale2, scales);
        }
        const T m = r.m == -INF ? T(0) : r.m;
        each(chunk, y, [&](int, int i, const T(&u)[V]) {
          MLK_UNROLL
          for (int e = 0; e < V; ++e) {
            const T d = u[e] - m;
            MLK_UNROLL
            for (int s = 0; s < 2; ++s) {
              if (s >= scales) continue;
              const T power = exp2_of(d * scale2[s]);
              r.e[s][e] += power;
              if (GENERAL && v.want_shift) r.shift[s][e] += power == 0 ? T(0) : power * d;
              if (GENERAL && v.want_square) square[e] += power == 0 ? T(0) : power * d * d;  // its scale is known
            }
            const int64_t j = chunk.first() + i * V + e;
            if (!GENERAL || !chunk.holds(i * V + e) || j == y) continue;
            if (v.smoothing > 0) weighted[e] += (v.weight ? v.weight[j] : T(1)) * (u[e] - origin(state));
            above += u[e] > state.target;
          }
        });
        release();
      }
      if (!v.saved) {
        state.m = mine;
        max_all(state.m, counts.first);
        rescale(r, state.m, scale2, scales);
        select_scale(v, state);
      }
      // With a single scale there is one sum; with two, the first belongs to the lower side of the threshold.
      const bool high = scales == 2 && state.scale.selected == SCALE_HIGH;
      T e[V], shift[V];
      MLK_UNROLL
      for (int i = 0; i < V; ++i) {
        e[i] = high ? r.e[1][i] : r.e[0][i];
        shift[i] = high ? r.shift[1][i] : r.shift[0][i];
      }
      sums.e = in_order(e, span.phase);
      if (!GENERAL) return;
      sums.shift = in_order(shift, span.phase);
      if (v.want_square) sums.square = in_order(square, span.phase);
      sums.weighted = in_order(weighted, span.phase);
    }

    // The gradient; the ring's places are given back one by one.
    MLK_DEVICE void write_gradient(const Span& span, int64_t row, int64_t y, const RowState<T>& state,
                                   const Coefficients<T>& c) {
      const Exponent<T> exponent(state);
      if (exponent.fused)
        write_chunks<sizeof(T) == 4>(span, row, y, state, c, exponent);
      else
        write_chunks<false>(span, row, y, state, c, exponent);
    }
    template <bool FUSED>
    MLK_DEVICE void write_chunks(const Span& span, int64_t row, int64_t y, const RowState<T>& state,
                                 const Coefficients<T>& c, const Exponent<T>& exponent) {
      S* const g = static_cast<S*>(v.grad) + v.out.offset(row);
      const bool together = phase_of(g) == span.phase, blanks = STREAMED || (v.saved && !v.want_shift);
      const T factor = c.factor * exponent.correction();
      const T at_target = GENERAL ? unprepare(v.preparation, c.target, state.target, y) : c.target;
      for (int k = 0; k < plan.chunks; ++k, place.next(plan)) {
        wait_for(place);
        const Chunk chunk = chunk_of(span, place, STREAMED ? forwards + k : k);
        if (blanks) blank(chunk, y);
        // Vectors that the chunk fills; the others, its first and its last, are left to their lanes below.
        const int whole_from = chunk.lead > 0 ? 1 : 0, whole_to = (chunk.lead + chunk.size) / V;
        S* to = g + chunk.first() + simt.lane() * V;
        each(chunk, y, [&](int at, int i, T(&u)[V]) {
          MLK_UNROLL
          for (int e = 0; e < V; ++e) {
            const T power = exponent.template of<FUSED>(u[e]);
            T x = factor * power;
            const int64_t j = chunk.first() + i * V + e;
            if (GENERAL && chunk.holds(i * V + e))
              x = unprepare(v.preparation, gradient_at(v, c, factor, power, u[e] - exponent.m, j), u[e], j);
            u[e] = x;
          }
          if (!together) {
            simt.store(at, piece_from<S, Vec16>(u));
          } else if (i >= whole_from && i < whole_to) {
            store_vector(to, piece_from<S, Vec16>(u));
          } else {
            MLK_UNROLL
            for (int e = 0; e < V; ++e)
              if (chunk.holds(i * V + e)) narrow(u[e], to[e]);
          }
          to += LANES * V;
        });
        // By the lane that wrote what lay there before.
        if (reads(chunk, y)) {
          const S value = narrowed<S>(at_target);
          if (together)
            g[y] = value;
          else
            simt.store(chunk.ring + int(y - chunk.first()) * int(sizeof(S)), value);
        }
        if (!together) {
          simt.warp_sync();
          if (chunk.size > 0) write_out(simt, chunk.ring + chunk.lead * int(sizeof(S)), g + chunk.from, chunk.size);
        }
        release();
      }
    }

    // ---- a row ---------------------------------------------------------------------------------------------------------

    MLK_DEVICE void visit(int64_t row, const Label& label, const Batch<T>& batch, const Factors<T>& shared, bool stores,
                          double& loss) {
      const S* x = row_at(row);
      const Span span = span_of(x, v.classes, plan, part);
      RowState<T> state;
      Counts counts{-1, 0};
      RowSums<T> sums;
      int above = 0;
      const bool simple = !GENERAL && v.simple;
      if (simple)
        numbers_of<true>(v, row, label, state.values);
      else
        numbers_of<false>(v, row, label, state.values);
      state.target = widen(x[label.y]);
      if (GENERAL) state.target = prepare(v.preparation, state.target, label.y);
      if (v.saved) state.m = v.saved[2 * row];
      const bool adds = !v.saved || v.want_shift;
      if (STREAMED) {
        if (adds)
          run_through(span, label.y, state, counts, sums, above);
        else
          select_scale(v, state);
      } else {
        if (!v.saved) find_max(span, label.y, state, counts);
        select_scale(v, state);
        if (adds) accumulate(span, label.y, state, !v.grad, sums, above);
      }
      if (adds && GENERAL) {
        // Also a count in two numbers.
        T x[3] = {sums.e, sums.shift, sums.weighted};
        T n[2] = {T(above & 0xffff), T(above >> 16)};
        sum_all(x);
        if (v.logsumexp) sum_all(n);
        sums.e = x[0];
        sums.shift = x[1];
        sums.weighted = x[2];
        if (v.want_square) {
          T square[1] = {sums.square};
          sum_all(square);
          sums.square = square[0];
        }
        counts.above = int64_t(n[0]) + (int64_t(n[1]) << 16);
        if (STREAMED && v.smoothing > 0)
          sums.weighted += (batch.weight_sum - (v.weight ? v.weight[label.y] : T(1))) * (origin(state) - state.floor());
      } else if (adds) {
        T x[1] = {sums.e};
        sum_all(x);
        sums.e = x[0];
      }
      Coefficients<T> c{};
      const auto finished = [&](auto known) {
        return finish_visit<GENERAL, decltype(known)::value>(v, batch, shared, row, label.y, state, sums, counts,
                                                             stores, c);
      };
      const T own = simple ? finished(std::integral_constant<bool, !GENERAL>()) : finished(std::false_type());
      if (stores) store_loss(v, row, own, loss);
      if (v.grad)
        write_gradient(span, row, label.y, state, c);
      else if (!STREAMED && adds)
        for (int k = 0; k < plan.chunks; ++k) place.next(plan);
    }
  };

  template <class Simt>
  static MLK_DEVICE void run(const Simt& simt, const Visit<T>& v, const RowPlan& plan) {
    if (v.unless_one && *v.unless_one == T(1)) return;
    Team<Simt> team(simt, v, plan);
    for (int slot = simt.lane(); slot < plan.slots; slot += LANES) simt.barrier_init(team.at.barriers + 8 * slot);
    if (simt.thread() < 2 && simt.ranks() > 1) simt.barrier_init(8 * simt.thread());
    simt.barriers_ready();
    if (simt.ranks() > 1)
      simt.cluster_sync();
    else
      simt.block_sync();
    const int first = simt.block() / simt.ranks();
    team.ahead.next = team.label_before(first);
    team.seek(first);
    for (int k = 0; k < plan.slots; ++k) team.prefetch();

    const Batch<T> batch = batch_on_device(simt, v);
    const Factors<T> shared = shared_factors(simt, v);
    store_shared(simt, v, shared, batch);
    const bool stores = team.part == 0 && simt.lane() == 0;
    double loss = 0;
    Label next = team.label_before(first);
    for (int64_t row = first; row < v.rows; row += team.teams) {
      const Label label = next;
      next = team.label_before(row + team.teams);  // here by the time that it is looked at
      if (label.status == LabelStatus::VALID) {
        team.visit(row, label, batch, shared, stores, loss);
        continue;
      }
      if (stores) store_skipped(v, shared, row, label.status, loss);
      if (v.grad)
        fill(static_cast<S*>(v.grad) + v.out.offset(row), v.classes, value_of<T>(label.status),
             team.part * LANES + simt.lane(), team.parts * LANES);
    }
    if (stores && v.partials) v.partials[first] = loss;
    if (simt.rank() == 0) reduce_partials(simt, v, team.teams, team.teams);
  }
};

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
