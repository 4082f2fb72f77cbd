// Short rows that lie one after another, many of them at once.
//
// A warp takes tiles of rows. A tile is one piece of memory whatever the number of classes, so it comes and goes 16 bytes
// at a time; its rows are worked on in shared memory, each by 1 ... 32 lanes that hold it in registers. They share it out
// in the largest pieces that rows of this size are made of, wherever they lie, and begin with different ones where they
// would meet in a bank; sums are trees, in which that order makes no difference. Warps have nothing to do with each other,
// and the next tile, and the next label, are on their way while this one is worked on.
//
// Alone: a small batch is served by one block or cluster in one launch, which counts the rows for "mean" before it
// starts and adds up the loss when it is done.
//
// Bytes: one reading and one writing of the logits; rows with an ignored label are read with their neighbours.
// T: the accumulation type; S: storage; ELEMENTS: of a lane. GENERAL: softcap, adjustment, smoothing, RowStats,
// gradients of parameters.
#pragma once

#include <type_traits>

#include "visit.h"

namespace mlkernels {

struct TilePlan {
  int shift;  // a row has 1 << shift lanes
  int rows;   // of a tile, a multiple of LANES >> shift
  int slots;  // tiles that a warp's part of shared memory holds
  int alone;  // whether this launch is one block or cluster that does everything
};

namespace MLKERNELS_ISA {

struct TileOffsets {
  int barriers, mailbox, ring, tile;
  MLK_FN TileOffsets(const TilePlan& plan, int64_t row_bytes, int warp, int warps, int ranks) {
    tile = int((plan.rows * row_bytes + 15) / 16 * 16 + 16);
    barriers = warp * plan.slots * 8;
    mailbox = (warps * plan.slots * 8 + 127) / 128 * 128;
    const int rings = mailbox + (plan.alone ? (4 * warps * ranks * 8 + 127) / 128 * 128 : 0);
    ring = rings + warp * plan.slots * tile;
  }
};
inline int tile_shared_bytes(const TilePlan& plan, int64_t row_bytes, int warps, int ranks) {
  return TileOffsets(plan, row_bytes, warps, warps, ranks).ring;
}

template <class T_, class S_, int ELEMENTS, bool GENERAL>
struct RowsShort {
  using T = T_;
  using S = S_;
  static constexpr int THREADS = 128, BLOCKS = sizeof(S) == 2 && !GENERAL ? 3 : 2;  // registers: 168, or 255
  static constexpr T INF = std::numeric_limits<T>::infinity();
  static constexpr bool ONE = sizeof(T) == 4 && ELEMENTS <= 16;  // lane a row, always
  static constexpr int GROUP = ONE ? 4 : 8;                      // elements that are worked on or left out together
  // Whether pieces of this size may be dealt in turned order; others meet in twos at most.
  static constexpr bool turns(int bytes) { return GENERAL || bytes == 16; }

  template <class Simt>
  static MLK_DEVICE void run(const Simt& simt, const Visit<T>& v, const TilePlan& plan) {
    if (v.unless_one && *v.unless_one == T(1)) return;
    const TileOffsets at(plan, v.classes * int64_t(sizeof(S)), simt.warp(), simt.warps(), simt.ranks());
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
      fetch_vectors<S>(simt, v, at.barriers + 8 * slot, at.ring + slot * at.tile,
                       reinterpret_cast<const char*>(x - phase), 0, count, true);
    };
    for (int slot = 0; slot < plan.slots; ++slot) ask(mine + slot * every, slot);

    Factors<T> shared{1, 1};
    if (plan.alone && is_counted(v)) {
      double weights = 0, kept = 0;
      count_rows(v, int64_t(simt.block()) * simt.threads() + simt.thread(), int64_t(simt.blocks()) * simt.threads(),
                 weights, kept);
      sum_over_cluster(simt, at.mailbox, weights, kept);
      shared = factors_of<T>(weights, kept);
    } else {
      shared = shared_factors(simt, v);
    }
    const Batch<T> batch = batch_on_device(simt, v);
    store_shared(simt, v, shared, batch);
    const int shift = ONE ? 0 : plan.shift, together = LANES >> shift, own = simt.lane() >> shift;
    const Split split = split_of(v, shift, own);
    double loss = 0;
    int slot = 0, parity = 0;
    const auto label_at = [&](int64_t row) { return row < v.rows ? read_index(v.label, row) : int64_t(0); };
    int64_t next = label_at(mine * plan.rows + own);
    for (int64_t tile = mine; tile < tiles; tile += every) {
      simt.copy_wait(at.barriers + 8 * slot, parity);
      const int64_t first = tile * plan.rows;
      const int64_t rows = v.rows - first < plan.rows ? v.rows - first : plan.rows;
      const S* x = static_cast<const S*>(v.input) + first * v.classes;
      const int begin = at.ring + slot * at.tile + phase_of(x) * int(sizeof(S));
      const int64_t after = (tile + every) * plan.rows + own;
      const auto pass = [&](auto simple) {
        for (int r = own; r - own < int(rows); r += together) {
          constexpr bool SIMPLE = decltype(simple)::value;
          const bool exists = r < int(rows);
          Label label{0, 0, LabelStatus::IGNORED};
          if (exists) label = label_of<SIMPLE>(v, first + r, next);
          // Read now, looked at after this row.
          const bool last = r - own + together >= int(rows);
          next = label_at(last ? after : first + r + together);
          visit<SIMPLE>(simt, v, split, batch, shared, first + r, exists, label,
                        begin + r * int(v.classes) * int(sizeof(S)), loss);
        }
      };
      if (!GENERAL && v.simple)
        pass(std::integral_constant<bool, !GENERAL>());
      else
        pass(std::false_type());
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
    if (v.spec.reduction == Reduction::NONE || !v.losses) return;
    if (plan.alone) {
      double none = 0;
      sum_over_cluster(simt, at.mailbox + 16 * simt.warps() * simt.ranks(), loss, none);
      if (simt.block() == 0 && simt.thread() == 0) *v.losses = T(loss);
    } else {
      loss = sum_over(simt, loss);
      if (simt.lane() == 0) v.partials[mine] = loss;
      reduce_partials(simt, v, simt.blocks(), every);
    }
  }

  // How a row is dealt to its lanes: in pieces of 16 bytes, two halves, or an element, whichever is the largest that rows
  // of this size are made of. In general it is the element: each has to be looked at by itself.
  struct Split {
    int shift;     // a row has 1 << shift lanes
    int piece;     // bytes
    int most;      // elements of a lane, at most
    int turn;      // a lane's i-th piece is its (i ^ turn)-th
    bool aligned;  // whether pieces lie at multiples of their size
  };
  static MLK_DEVICE Split split_of(const Visit<T>& v, int shift, int own) {
    const int bytes = int(v.classes) * int(sizeof(S));
    Split out;
    out.shift = shift;
    out.piece = GENERAL ? int(sizeof(S)) : bytes % 16 == 0 ? 16 : sizeof(S) == 2 && bytes % 4 == 0 ? 4 : int(sizeof(S));
    const int per = out.piece / int(sizeof(S));
    out.most = per * ((int(v.classes) / per + (1 << shift) - 1) >> shift);
    out.aligned = reinterpret_cast<uintptr_t>(v.input) % out.piece == 0;
    out.turn = 0;
    // Of the lanes that are served at once, a word each or four, every period-th row begins in the same banks. With rows a
    // multiple of that many pieces long, so do pieces that differ in the bits of turn.
    const int word = out.piece < 4 ? 4 : out.piece;
    if ((!GENERAL && out.piece < 16) || bytes % word != 0) return out;
    const int served = 128 / word, step = bytes / word, common = step & -step;
    const int pieces = (common < served ? common : served) >> shift;
    if (pieces <= 1) return out;
    const int period = served / (pieces << shift);
    out.turn = (own / period & (pieces - 1)) * (out.piece < 4 && shift == 0 ? 2 : 1);
    return out;
  }
  // Calls with(a piece) for that size.
  template <class With>
  static MLK_DEVICE void by_piece(int piece, With with) {
    if constexpr (!GENERAL) {
      if (piece == 16) return with(Vec16());
    }
    if constexpr (!GENERAL && sizeof(S) == 2) {
      if (piece == 4) return with(uint32_t());
    }
    with(PieceOf<int(sizeof(S))>());
  }

  // A piece that may not lie at a multiple of its size.
  template <class Piece, class Simt>
  static MLK_DEVICE Piece load_piece(const Simt& simt, int at, bool aligned) {
    if constexpr (sizeof(Piece) > sizeof(S)) {
      if (!aligned) {
        S each[sizeof(Piece) / sizeof(S)];
        MLK_UNROLL
        for (int e = 0; e < int(sizeof(Piece) / sizeof(S)); ++e)
          each[e] = simt.template load<S>(at + e * int(sizeof(S)));
        return bits_as<Piece>(each);
      }
    }
    return simt.template load<Piece>(at);
  }
  template <class Piece, class Simt>
  static MLK_DEVICE void store_piece(const Simt& simt, int at, const Piece& piece, bool aligned) {
    if constexpr (sizeof(Piece) > sizeof(S)) {
      if (!aligned) {
        S each[sizeof(Piece) / sizeof(S)];
        memcpy(each, &piece, sizeof(Piece));
        MLK_UNROLL
        for (int e = 0; e < int(sizeof(Piece) / sizeof(S)); ++e) simt.store(at + e * int(sizeof(S)), each[e]);
        return;
      }
    }
    simt.store(at, piece);
  }

  // A row by its lanes; all lanes of the warp come here, also those that have no row.
  template <bool SIMPLE, class Simt>
  static MLK_DEVICE void visit(const Simt& simt, const Visit<T>& v, const Split& split, const Batch<T>& batch,
                               const Factors<T>& shared, int64_t row, bool exists, const Label& label, int at,
                               double& loss) {
    const int shift = ONE ? 0 : split.shift, lanes = 1 << shift, sub = simt.lane() & (lanes - 1);
    const bool kept = exists && label.status == LabelStatus::VALID;
    const int y = kept ? int(label.y) : 0, target_at = at + y * int(sizeof(S));
    const int mine = at + sub * split.piece, turn = split.turn * (split.piece << shift);
    const auto place_of = [&](int i, int bytes) {
      const int place = i * (bytes << shift);
      return mine + (turns(bytes) ? place ^ turn : place);
    };
    const auto pieces_of = [&](int per) { return kept ? (int(v.classes) / per - sub + lanes - 1) >> shift : 0; };
    // In general a piece is an element, and this is its class.
    const auto class_of = [&](int i) { return (i ^ split.turn) * lanes + sub; };

    RowState<T> state;
    state.target = 0;
    const S nothing = narrowed<S>(-INF);
    if (kept && sub == 0) {
      state.target = T(widen(simt.template load<S>(target_at)));
      // -inf in its place: no element has to be asked whether it is the target. Softcap would make a number of it.
      if (!GENERAL) simt.store(target_at, nothing);
    }
    if (lanes > 1) {
      simt.warp_sync();
      state.target = simt.exchange(state.target, simt.lane() - sub);
    }
    if (kept) {
      if (GENERAL) state.target = prepare(v.preparation, state.target, y);
      numbers_of<SIMPLE>(v, row, label, state.values);
    }

    T u[ELEMENTS];
    int first = -1;
    state.m = -INF;
    by_piece(split.piece, [&](auto kind) {
      using Piece = decltype(kind);
      constexpr int PER = int(sizeof(Piece) / sizeof(S));
      const int count = pieces_of(PER);
      [[maybe_unused]] uint32_t pair = 0;
      if constexpr (sizeof(S) == 2) pair = all_of<S, uint32_t>(nothing);
      MLK_UNROLL
      for (int i = 0; i < ELEMENTS / PER; ++i) {
        if (i * PER % GROUP == 0 && i * PER >= split.most) break;
        Piece one = all_of<S, Piece>(nothing);
        if (i < count) one = load_piece<Piece>(simt, place_of(i, int(sizeof(Piece))), split.aligned);
        if constexpr (sizeof(S) == 2 && PER > 1) {  // two halves at a time
          MLK_UNROLL
          for (int w = 0; w < PER / 2; ++w) pair = larger_pair(pair, word_of(one, w), S());
        }
        MLK_UNROLL
        for (int e = 0; e < PER; ++e) {
          T& x = u[i * PER + e];
          x = element_of<T, S>(one, e);
          if (GENERAL) {
            const int j = class_of(i);
            if (i < count) x = prepare(v.preparation, x, j);
            if (i < count && j != y && (x > state.m || first < 0 || (x == state.m && j < first))) first = j;
            if (j == y) x = -INF;
          }
          if constexpr (sizeof(S) != 2 || PER == 1) state.m = larger(state.m, x);
        }
      }
      if constexpr (sizeof(S) == 2 && PER > 1) state.m = larger(element_of<T, S>(pair, 0), element_of<T, S>(pair, 1));
    });
    Counts counts{-1, 0};
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      const T m = simt.butterfly(state.m, mask);
      if (GENERAL) {
        const int other = simt.butterfly(first, mask);
        if (other >= 0 && (first < 0 || m > state.m || (m == state.m && other < first))) first = other;
      }
      state.m = larger(state.m, m);
    }
    counts.first = first;
    if (!SIMPLE && v.saved && kept) state.m = v.saved[2 * row];
    RowSums<T> all;
    int above = 0;
    if (kept) {
      select_scale<SIMPLE>(v, state);
      const T m = state.floor(), scale2 = state.scale2();
      const int count = pieces_of(1);
      Tree<ELEMENTS / GROUP, T> sums, shifts, squares, weights;
      MLK_UNROLL
      for (int group = 0; group < ELEMENTS / GROUP; ++group) {
        RowSums<T> some;
        if (group * GROUP < split.most) {
          Tree<GROUP, T> powers, shift_by, square_by, weight_by;
          MLK_UNROLL
          for (int k = 0; k < GROUP; ++k) {
            const int i = group * GROUP + k;
            const T d = u[i] - m;
            const T power = exp2_of(d * scale2);
            powers.add(k, power);
            if (GENERAL) {
              const int j = class_of(i);
              const bool other = i < count && j != y;
              above += other && u[i] > state.target;
              shift_by.add(k, v.want_shift && power != 0 ? power * d : T(0));
              square_by.add(k, v.want_square && power != 0 ? power * d * d : T(0));
              weight_by.add(k, other && v.smoothing > 0 ? (v.weight ? d * v.weight[j] : d) : T(0));
            } else {
              u[i] = power;  // what the gradient needs
            }
          }
          some.e = powers.sum();
          if (GENERAL) {
            some.shift = shift_by.sum();
            some.square = square_by.sum();
            some.weighted = weight_by.sum();
          }
        }
        sums.add(group, some.e);
        shifts.add(group, some.shift);
        squares.add(group, some.square);
        weights.add(group, some.weighted);
      }
      all = {sums.sum(), shifts.sum(), squares.sum(), weights.sum()};
    }
    all.e = sum_over(simt, all.e, lanes);
    if (GENERAL && v.want_shift) all.shift = sum_over(simt, all.shift, lanes);
    if (GENERAL && v.want_square) all.square = sum_over(simt, all.square, lanes);
    if (GENERAL) {
      all.weighted = sum_over(simt, all.weighted, lanes);
      above = sum_over(simt, above, lanes);
      counts.above = above;
    }
    Coefficients<T> c{};
    if (kept) {
      const T own = finish_visit<GENERAL, SIMPLE>(v, batch, shared, row, y, state, all, counts, sub == 0, c);
      if (sub == 0) store_loss<SIMPLE>(v, row, own, loss);
    } else if (exists && sub == 0) {
      store_skipped(v, shared, row, label.status, loss);
    }
    if (!v.grad) return;
    if (GENERAL) simt.warp_sync();  // the target's logit was read by another lane than its own
    if (kept) {
      const T m = state.floor(), scale2 = state.scale2();
      by_piece(split.piece, [&](auto kind) {
        using Piece = decltype(kind);
        constexpr int PER = int(sizeof(Piece) / sizeof(S));
        const int count = pieces_of(PER);
        MLK_UNROLL
        for (int i = 0; i < ELEMENTS / PER; ++i) {
          if (i * PER % GROUP == 0 && i * PER >= split.most) break;
          if (i >= count) continue;
          T g[PER];
          MLK_UNROLL
          for (int e = 0; e < PER; ++e) {
            const T x = u[i * PER + e];
            if (GENERAL) {
              // The exponential again, rather than kept: the registers are worth more.
              const int j = class_of(i);
              g[e] = unprepare(v.preparation, gradient_at(v, c, c.factor, exp2_of((x - m) * scale2), x - m, j), x, j);
            } else {
              g[e] = c.factor * x;
            }
          }
          store_piece(simt, place_of(i, int(sizeof(Piece))), piece_from<S, Piece>(g), split.aligned);
        }
      });
    } else if (exists) {
      const S value = narrowed<S>(value_of<T>(label.status));
      for (int j = sub; j < int(v.classes); j += lanes) simt.store(at + j * int(sizeof(S)), value);
    }
    if (lanes > 1) simt.warp_sync();  // the target's place is another lane's
    if (kept && sub == 0)
      simt.store(target_at, narrowed<S>(GENERAL ? unprepare(v.preparation, c.target, state.target, y) : c.target));
  }
};

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
