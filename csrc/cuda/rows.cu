// The row kernels of one storage type, and which of them serves which rows. Compiled once per type (MLK_STORAGE).
#include <algorithm>

#include "launch.h"
#include "rows_strided.h"

namespace mlkernels {
namespace MLKERNELS_ISA {
namespace {

using S = MLK_STORAGE;
using T = std::conditional_t<sizeof(S) == 8, double, float>;

bool general(const Visit<T>& v) {
  return !v.preparation.none() || v.smoothing > 0 || v.logsumexp || v.up_entropy || v.want_parameters;
}

// Whether two rows that follow one another lie next to each other, in memory that is read and written in pairs.
bool in_pairs(const Layout& layout, const void* data) {
  const int last = layout.dims - 1;
  bool even = reinterpret_cast<uintptr_t>(data) % (2 * sizeof(S)) == 0 && layout.strides[last] == 1 &&
              layout.sizes[last] % 2 == 0 && layout.class_stride % 2 == 0;
  for (int d = 0; d < last; ++d) even &= layout.strides[d] % 2 == 0;
  return even;
}

bool one_after_another(const Layout& layout, int64_t classes) {
  return layout.dims == 1 && (layout.strides[0] == classes || layout.sizes[0] <= 1) &&
         (layout.class_stride == 1 || classes == 1);
}

int power_of_two_from(int64_t x) {
  int out = 1;
  while (out < x) out *= 2;
  return out;
}

// ---- sizes -----------------------------------------------------------------------------------------------------------
// By calculation: none of these numbers has been measured yet.

constexpr int FEW = sizeof(T) == 8 ? 8 : 16,
              MANY = sizeof(T) == 8 ? 8 : 32;  // columns that a lane holds; more doubles spill
constexpr int64_t FEW_COLUMNS = FEW;           // up to here FEW of them, and a row has one lane
constexpr int64_t SHORT_ROW = LANES * MANY;
constexpr int64_t TILE_BYTES = 4096;
constexpr int64_t BYTES_OF_A_WARP = 8192;  // of a long row
constexpr int CHUNK = 256;                 // vectors: 4 kB; every chunk costs a warp some 70 instructions a pass
constexpr int64_t ALONE_ROWS = 4096, ALONE_ELEMENTS = 1 << 19;  // one cluster is quicker than three launches up to here

// What the tests on a host ask for, else our own choice.
int either(int asked, int64_t own) { return asked ? asked : int(own); }

int64_t row_bytes(const Visit<T>& v) { return v.classes * int64_t(sizeof(S)); }
int tile_bytes(const Visit<T>& v, const Choice& c) {
  return tile_shared_bytes(c.tiles, row_bytes(v), c.warps, c.cluster);
}

bool plan_short(const Visit<T>& v, const Device& device, Choice& out) {
  out.path = Path::SHORT;
  out.warps = either(forced.warps, 4);
  TilePlan& tiles = out.tiles;
  const int held = v.classes <= FEW_COLUMNS ? FEW : MANY;
  tiles.shift = 0;
  while (held << tiles.shift < v.classes) ++tiles.shift;
  const int together = LANES >> tiles.shift;
  const int64_t groups = std::max<int64_t>(1, std::min<int64_t>(TILE_BYTES / row_bytes(v), 512) / together);
  tiles.rows = either(forced.tile_rows, groups) * together;
  tiles.slots = either(forced.slots, 2);
  tiles.alone = 0;
  out.cluster = 1;
  if (v.rows <= ALONE_ROWS && v.rows * v.classes <= ALONE_ELEMENTS) {
    // As many warps as there are tiles, each tile no larger than it has to be.
    if (!forced.tile_rows) tiles.rows = together;
    const int64_t wanted = ((v.rows + tiles.rows - 1) / tiles.rows + out.warps - 1) / out.warps;
    const int most = device.major >= 9 ? 8 : 1;
    if (wanted <= 4 * most || v.rows * v.classes <= 1 << 14) {
      tiles.alone = 1;
      out.cluster = int(std::min<int64_t>(power_of_two_from(std::max<int64_t>(wanted, 1)), most));
    }
  }
  if (forced.cluster) {
    tiles.alone = forced.cluster > 0;
    out.cluster = std::max(1, forced.cluster);
  }
  return tile_bytes(v, out) <= device.shared;
}

// A row's worth of vectors: of its own size alone, never of where it lies, as all that its sums depend on.
int64_t vectors_of(const Visit<T>& v) { return (v.classes + PER_VECTOR<S> - 1) / PER_VECTOR<S>; }

// Equal shares for the warps, in chunks of equal size but for the last one; in whole passes of a warp's lanes also where
// a chunk has a vector more because rows begin within one, as they do where the classes are no multiple of a vector.
void share_out(Choice& out, const Visit<T>& v, int cluster) {
  const int64_t longest = either(forced.chunk, CHUNK) / LANES, parts = out.warps * cluster;
  const int64_t wanted = (vectors_of(v) + parts - 1) / parts, spare = v.classes % PER_VECTOR<S> != 0;
  int64_t passes = (wanted + LANES - 1) / LANES;
  const auto chunks = [&] { return (passes + longest - 1) / longest; };
  while (passes * LANES - chunks() * spare < wanted) ++passes;
  out.rows.chunks = int(chunks());
  out.rows.chunk = int((passes + chunks() - 1) / chunks() * LANES - spare);
  out.rows.each = int(passes * LANES - chunks() * spare);
}

// Places that a warp's ring may have.
int64_t most_slots(const Choice& c, const Device& device) {
  const RowPlan none{c.rows.chunk, 0, 0, 0};
  return (device.shared - long_shared_bytes(none, c.warps, c.cluster) - 128) / c.warps / (none.slot_bytes() + 8);
}

// Rows that `cluster` blocks hold; false if they do not.
bool plan_long(const Visit<T>& v, const Device& device, int cluster, Choice& out) {
  out.path = Path::LONG;
  out.cluster = cluster;
  const int most_warps =
      (general(v) ? RowsLong<T, S, true, false>::THREADS : RowsLong<T, S, false, false>::THREADS) / LANES;
  const int wanted = power_of_two_from((vectors_of(v) * 16 + BYTES_OF_A_WARP - 1) / BYTES_OF_A_WARP);
  out.warps = either(forced.warps, std::min(most_warps, wanted));
  share_out(out, v, cluster);
  const int64_t most = most_slots(out, device);
  out.rows.slots = int(std::min<int64_t>(most, 2 * out.rows.chunks));
  if (forced.slots) out.rows.slots = std::max(forced.slots, out.rows.chunks);
  return most >= out.rows.chunks;
}

// Whether the next row can be on its way while this one is worked on.
bool deep(const Choice& c) { return 2 * c.rows.slots >= 3 * c.rows.chunks; }

Choice plan_streamed(const Visit<T>& v, const Device& device) {
  Choice out{};
  (void)plan_long(v, device, 1, out);
  out.path = Path::STREAMED;
  out.warps = std::min(out.warps, RowsLong<T, S, true, true>::THREADS / LANES);
  share_out(out, v, 1);
  out.rows.slots = either(forced.slots, most_slots(out, device));
  return out;
}

// ---- which path ------------------------------------------------------------------------------------------------------

template <bool GENERAL>
using ShortFew = RowsShort<T, S, FEW, GENERAL>;
template <bool GENERAL>
using ShortMany = RowsShort<T, S, MANY, GENERAL>;

StridedPlan strided_plan(const Visit<T>& v) {
  return {v.simple && !general(v) && v.classes <= RowsStrided<T, S>::CLASSES && in_pairs(v.in, v.input) &&
          (!v.grad || in_pairs(v.out, v.grad))};
}

// Calls with<Body>(plan, bytes of shared memory) for the kernel of a choice.
template <class With>
auto dispatch(const Visit<T>& v, const Choice& c, With with) {
  const bool g = general(v);
  const auto tiles = [&](auto body) { return with(body, c.tiles, tile_bytes(v, c)); };
  const auto rings = [&](auto body) { return with(body, c.rows, long_shared_bytes(c.rows, c.warps, c.cluster)); };
  switch (c.path) {
    case Path::SHORT:
      if (v.classes <= FEW_COLUMNS) return g ? tiles(ShortFew<true>()) : tiles(ShortFew<false>());
      return g ? tiles(ShortMany<true>()) : tiles(ShortMany<false>());
    case Path::LONG: return g ? rings(RowsLong<T, S, true, false>()) : rings(RowsLong<T, S, false, false>());
    case Path::STREAMED: return g ? rings(RowsLong<T, S, true, true>()) : rings(RowsLong<T, S, false, true>());
    default: return with(RowsStrided<T, S>(), strided_plan(v), 0);
  }
}

// Blocks, or clusters, that run at once.
int teams_of(const Visit<T>& v, const Device& device, const Choice& c) {
  return dispatch(v, c, [&](auto body, const auto& plan, int shared) {
    return at_once<decltype(body), Visit<T>, std::decay_t<decltype(plan)>>(device, c.warps, c.cluster, shared);
  });
}

int blocks_of(const Visit<T>& v, const Device& device, const Choice& c) {
  if (c.path == Path::SHORT && c.tiles.alone) return c.cluster;
  const int64_t work = c.path == Path::SHORT     ? ((v.rows + c.tiles.rows - 1) / c.tiles.rows + c.warps - 1) / c.warps
                       : c.path == Path::STRIDED ? (v.rows + c.warps * LANES - 1) / (c.warps * LANES)
                                                 : v.rows;
  const int64_t teams = forced.teams ? forced.teams : teams_of(v, device, c);
  return int(std::max<int64_t>(1, std::min(work, teams))) * c.cluster;
}

Choice choose(const Visit<T>& v, const Device& any) {
  Choice out{};
  Device device = any;
  device.major = compiled_major<RowsLong<T, S, true, false>, Visit<T>, RowPlan>(any);
  const bool grad = v.grad != nullptr;
  const Choice strided{Path::STRIDED, either(forced.warps, 8), 1, {}, {}};
  const bool together =
      (v.in.class_stride == 1 || v.classes == 1) && (!grad || v.out.class_stride == 1 || v.classes == 1);
  if (!together || forced.path == int(Path::STRIDED) + 1) return strided;
  const bool packed = one_after_another(v.in, v.classes) && (!grad || one_after_another(v.out, v.classes));
  const bool may_be_short = packed && v.classes <= SHORT_ROW;
  if (may_be_short && (!forced.path || forced.path == int(Path::SHORT) + 1) && plan_short(v, device, out)) return out;
  if (v.classes < LANES && !forced.path) return strided;  // a few columns of a wider matrix
  if (forced.path == int(Path::STREAMED) + 1) return plan_streamed(v, device);
  const int most = forced.cluster > 0 ? forced.cluster : device.major >= 9 ? 16 : 1;
  // The smallest cluster that holds a row and a half, else the last one that holds a row.
  bool holds = false;
  for (int cluster = forced.cluster > 0 ? forced.cluster : 1; cluster <= most; cluster *= 2) {
    Choice found{};
    if (!plan_long(v, device, cluster, found)) continue;
    if (forced.cluster > 0) return found;
    // A cluster of 16 is more than every device promises.
    if (cluster > 1 && teams_of(v, device, found) == 0) break;
    out = found;
    holds = true;
    if (deep(out)) break;
  }
  return holds ? out : plan_streamed(v, device);
}

void run(const Visit<T>& v, const Device& device, const Choice& c, int blocks) {
  dispatch(v, c, [&](auto body, const auto& plan, int shared) {
    launch<decltype(body)>(device, blocks, c.warps, c.cluster, shared, v, plan);
  });
}

}  // namespace
}  // namespace MLKERNELS_ISA

#define MLK_JOIN_(a, b) a##b
#define MLK_JOIN(a, b) MLK_JOIN_(a, b)
const RowKernels<MLKERNELS_ISA::T> MLK_JOIN(rows_, MLK_STORAGE){MLKERNELS_ISA::choose, MLKERNELS_ISA::blocks_of,
                                                                MLKERNELS_ISA::run};

}  // namespace mlkernels
