// The CPU's operators for linear heads (mlkernels/linear): of pieces of rows, and of all classes of a chunk of rows.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/chunk.h"
#include "cpu/linear.h"

namespace mlkernels {
namespace {

// How many there are of a row.
int64_t scales_of(const Tensor& scales, int64_t rows) {
  STD_TORCH_CHECK(scales.dim() == 2 && scales.size(0) > 0 && scales.size(0) <= 2 && scales.size(1) == rows,
                  "scales must be (1 or 2, rows)");
  return scales.size(0);
}

template <class T, template <class> class Kind>
Kind<T> piece_of(const Tensor& tile, const Tensor& label, int64_t start, const Arguments& call) {
  STD_TORCH_CHECK(tile.dim() == 2, "tile must be (rows, classes)");
  Kind<T> p{};
  p.rows = tile.size(0);
  p.classes = tile.size(1);
  p.tile = array<T>(tile, p.rows * p.classes, "tile");
  p.start = start;
  p.label = array<int64_t>(label, p.rows, "label");
  lay_out_classes(p, call, vectors_from<T>(call, start, p.classes));
  return p;
}

void piece_statistics(const Tensor& tile, const Tensor& target_logit, const Tensor& label, int64_t start,
                      const Tensor& scales, const std::vector<double>& numbers, const std::vector<Tensor>& params,
                      const Tensor& top, const Tensor& total, std::optional<Tensor> shift, std::optional<Tensor> second,
                      std::optional<Tensor> weighted, std::optional<Tensor> weights, const Tensor& first,
                      const Tensor& above) {
  by_type(tile, [&](auto zero) {
    using T = decltype(zero);
    auto p = piece_of<T, PieceStatistics>(tile, label, start, Arguments(numbers, params));
    p.target_logit = array<T>(target_logit, p.rows, "target_logit");
    p.count = scales_of(scales, p.rows);
    const int64_t each = p.count * p.rows;
    p.scales = array<T>(scales, each, "scales");
    p.top = array<T>(top, p.rows, "top");
    p.total = array<T>(total, each, "total");
    p.shift = array<T>(shift, each, "shift");
    p.square = array<T>(second, each, "second");
    p.weighted = array<T>(weighted, p.rows, "weighted");
    p.weights = array<T>(weights, p.rows, "weights");
    STD_TORCH_CHECK(!p.weighted == !p.weights, "weighted and weights come together");
    p.first = array<int64_t>(first, p.rows, "first");
    p.above = array<int64_t>(above, p.rows, "above");
    run<T>(p, p.rows);
  });
}

// The numbers of each row that its gradient follows from.
template <class T>
void describe_rows(PieceGradient<T>& p, int64_t rows, const Tensor& factor, const std::optional<Tensor>& slope,
                   const std::optional<Tensor>& spread, const Tensor& scale, const Tensor& top) {
  p.factor = array<T>(factor, rows, "factor");
  p.slope = array<T>(slope, rows, "slope");
  p.spread = array<T>(spread, rows, "spread");
  p.scale = array<T>(scale, rows, "scale");
  p.top = array<T>(top, rows, "top");
}

void piece_gradient(const Tensor& tile, const Tensor& label, int64_t start, bool seen,
                    const std::vector<double>& numbers, const std::vector<Tensor>& params, const Tensor& factor,
                    std::optional<Tensor> slope, std::optional<Tensor> spread, const Tensor& scale, const Tensor& top) {
  by_type(tile, [&](auto zero) {
    using T = decltype(zero);
    auto p = piece_of<T, PieceGradient>(tile, label, start, Arguments(numbers, params));
    p.seen = seen;
    describe_rows(p, p.rows, factor, slope, spread, scale, top);
    run<T>(p, p.rows);
  });
}

// ---- all classes of a chunk of rows ----------------------------------------------------------------------------------

// The numbers of rows, as they lie one after another: (3 + 3 scales, rows) and (2, rows).
template <class T>
struct Numbers {
  T* reals;
  int64_t* whole;
  int64_t count, rows;

  static int64_t of_reals(int64_t count) { return 3 + 3 * count; }
  T& top(int64_t row) const { return reals[row]; }
  T& weighted(int64_t row) const { return reals[rows + row]; }
  T& weights(int64_t row) const { return reals[2 * rows + row]; }
  T* total() const { return reals + 3 * rows; }
  T* shift() const { return total() + count * rows; }
  T* square() const { return shift() + count * rows; }
  int64_t& first(int64_t row) const { return whole[row]; }
  int64_t& above(int64_t row) const { return whole[rows + row]; }

  // Of no class at all.
  void begin(int64_t classes, bool ranks) const {
    std::fill(reals, reals + of_reals(count) * rows, T(0));
    std::fill(reals, reals + rows, -MLKERNELS_ISA::infinity<T>());
    std::fill(whole, whole + rows, classes);
    std::fill(whole + rows, whole + 2 * rows, ranks ? 0 : -1);
  }

  // What others know besides: backends/reference.py's combine.
  void add(const Numbers& b, const T* scales, int64_t row) const {
    const T ours = top(row), theirs = b.top(row);
    const bool bad = ours != ours || theirs != theirs;
    const T most = bad ? MLKERNELS_ISA::nan<T>() : std::max(ours, theirs);
    const T move_a = ours == most ? T(0) : ours - most, move_b = theirs == most ? T(0) : theirs - most;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t at = k * rows + row;
      const T share_a = MLKERNELS_ISA::m_exp(scales[at] * move_a), share_b = MLKERNELS_ISA::m_exp(scales[at] * move_b);
      // What nothing is left of is 0 and not 0 times infinity.
      const auto both = [&](T of_a, T of_b) {
        return (share_a == 0 ? T(0) : share_a * of_a) + (share_b == 0 ? T(0) : share_b * of_b);
      };
      const T a0 = total()[at], a1 = shift()[at], a2 = square()[at];
      const T b0 = b.total()[at], b1 = b.shift()[at], b2 = b.square()[at];
      square()[at] = both(a2 + move_a * (2 * a1 + move_a * a0), b2 + move_b * (2 * b1 + move_b * b0));
      shift()[at] = both(a1 + move_a * a0, b1 + move_b * b0);
      total()[at] = both(a0, b0);
    }
    const T wa = weights(row), wb = b.weights(row);
    weighted(row) += b.weighted(row) + (wa == 0 ? T(0) : move_a * wa) + (wb == 0 ? T(0) : move_b * wb);
    weights(row) += wb;
    const int64_t one = first(row), other = b.first(row);
    first(row) = ours > theirs    ? one
                 : theirs > ours  ? other
                 : ours == theirs ? std::min(one, other)
                                  : std::max(one, other);
    above(row) += b.above(row) > 0 ? b.above(row) : 0;
    top(row) = most;
  }
};

}  // namespace

template <class T>
void cap(T* u, T* slope, int64_t n, T c) {
  kernels<T>().cap(u, slope, n, c);
}
template void cap(float*, float*, int64_t, float);
template void cap(double*, double*, int64_t, double);

template <class T>
void statistics_of(const ChunkArguments<T>& of, const T* target_logit, const T* scales, int64_t count, int64_t classes,
                   int64_t want, T* all, int64_t* places) {
  const Chunk<T> chunk(of);
  const int64_t n = chunk.rows, reals = Numbers<T>::of_reals(count) * n;
  if (n == 0) return;
  std::vector<T> more(size_t((chunk.parts - 1) * reals));
  std::vector<int64_t> more_places(size_t((chunk.parts - 1) * 2 * n));
  const auto numbers = [&](int64_t part) -> Numbers<T> {
    if (part == 0) return {all, places, count, n};
    return {more.data() + (part - 1) * reals, more_places.data() + (part - 1) * 2 * n, count, n};
  };
  chunk.each_part([&](int64_t part) {
    const Numbers<T> own = numbers(part);
    own.begin(classes, want & Want::RANKS);
    PieceStatistics<T> p{};
    p.target_logit = target_logit;
    p.scales = scales;
    p.count = count;
    p.top = &own.top(0);
    p.total = own.total();
    p.shift = want & Want::SHIFT ? own.shift() : nullptr;
    p.square = want & Want::SECOND ? own.square() : nullptr;
    p.weighted = want & Want::SMOOTHING ? &own.weighted(0) : nullptr;
    p.weights = want & Want::SMOOTHING ? &own.weights(0) : nullptr;
    p.first = &own.first(0);
    p.above = &own.above(0);
    for (int64_t index = chunk.first_tile(part); index < chunk.first_tile(part + 1); ++index) {
      const typename Chunk<T>::Tile tile(chunk, part, index, true, false);
      chunk.each_block([&](int64_t row, int64_t rows) {
        tile.multiply(row, rows);
        tile.describe(p, row);
        run<T>(p, rows);
      });
    }
  });
  for (int64_t part = 1; part < chunk.parts; ++part)
    for (int64_t row = 0; row < n; ++row) numbers(0).add(numbers(part), scales, row);
}
template void statistics_of(const ChunkArguments<float>&, const float*, const float*, int64_t, int64_t, int64_t, float*,
                            int64_t*);
template void statistics_of(const ChunkArguments<double>&, const double*, const double*, int64_t, int64_t, int64_t,
                            double*, int64_t*);

namespace {

// The same of a gradient that is rounded to bfloat16: what the large ones of a row lose is added apart, as the target is.
// The others' squares sum up to little, and so do those of their errors: dx and dw are hardly worse than by float32.
template <class T>
void add_pairs(const Chunk<T>& chunk, const typename Chunk<T>::Tile& tile, const ChunkGradients<T>& out, T* dx,
               bool adds_dx, T* dw, bool adds_dw, int64_t row, int64_t rows) {
  if constexpr (std::is_same_v<T, float>) {
    const int64_t width = chunk.width, classes = tile.classes, along_classes = (classes + 1) / 2 + 1;
    if (dx)
      run<T>(Product<T, Pair>{dx + row * width, width, tile.pairs.by_class, along_classes, 1, tile.pairs.weight, width,
                              rows, width, along_classes, adds_dx});
    if (dw)
      run<T>(Product<T, Pair>{dw, width, tile.pairs.by_row, 1, classes, chunk.pairs_of_rows(row), width, classes, width,
                              pair_rows(rows), adds_dw});
    const bfloat16* const weight = static_cast<const bfloat16*>(chunk.all.data) + tile.start * chunk.all.stride;
    for (int64_t i = row; i < row + rows; ++i) {
      const float* const g = tile.block(row) + (i - row) * classes;
      const float limit = large_from(out.target[i], out.factor[i]);
      int64_t j = chunk.pairs->next_large(g, 0, classes, limit);
      for (int count = 0; j < classes && count < MOST; ++count, j = chunk.pairs->next_large(g, j + 1, classes, limit)) {
        const Pair pair = tile.pairs.by_class[(i - row) * along_classes + j / 2];
        const float rest = g[j] - MLKERNELS_ISA::widen(j % 2 ? pair.high : pair.low);
        if (rest == 0 || !std::isfinite(rest)) continue;
        if (dx) chunk.pairs->add(dx + i * width, weight + j * chunk.all.stride, rest, width);
        if (dw) chunk.pairs->add(dw + j * width, chunk.halves + i * width, rest, width);
      }
      const int64_t y = chunk.label[i] - chunk.offset - tile.start;
      if (dw && y >= 0 && y < classes) chunk.pairs->add(dw + y * width, chunk.halves + i * width, out.target[i], width);
    }
  }
}

// to += the sum of some rows, 16 of them at a time and these sums by 16, as a short sum rounds less. scratch: two rows.
template <class T>
void add_columns(T* to, const T* from, int64_t rows, int64_t columns, T* scratch) {
  T *const few = scratch, *const many = scratch + columns;
  std::fill(many, many + columns, T(0));
  for (int64_t row = 0; row < rows; row += 16) {
    std::copy(from + row * columns, from + (row + 1) * columns, few);
    for (int64_t i = row + 1; i < std::min(row + 16, rows); ++i)
      kernels<T>().add(few, from + i * columns, T(1), columns);
    kernels<T>().add(many, few, T(1), columns);
    if (row % 256 != 240 && row + 16 < rows) continue;
    kernels<T>().add(to, many, T(1), columns);
    std::fill(many, many + columns, T(0));
  }
}

// What a tile's gradient contributes: to the part's own sum of dx, and to its classes, to these the targets' with the
// others': apart both sums would be large where what they leave is small.
template <class T>
void add_tile(const Chunk<T>& chunk, const typename Chunk<T>::Tile& tile, const ChunkGradients<T>& out, T* dx,
              bool begins, int64_t row, int64_t rows, T* scratch) {
  const int64_t width = chunk.width, classes = tile.classes;
  T* const g = tile.block(row);
  const bool adds = row > 0 || !out.first;
  T* const dw = out.weight ? out.weight + tile.start * width : nullptr;
  if (chunk.pairs)
    add_pairs(chunk, tile, out, dx, !begins, dw, adds, row, rows);
  else if (dx)
    run<T>(Product<T>{dx + row * width, width, g, classes, 1, tile.weight, tile.weight_stride, rows, width, classes,
                      !begins});
  for (int64_t i = row; i < row + rows; ++i) {
    const int64_t y = chunk.label[i] - chunk.offset - tile.start;
    if (y >= 0 && y < classes) g[(i - row) * classes + y] = out.target[i];
  }
  if (dw && !chunk.pairs)
    run<T>(Product<T>{dw, width, g, 1, classes, chunk.x + row * width, width, classes, width, rows, adds});
  if (!out.bias) return;
  if (!adds) std::fill(out.bias + tile.start, out.bias + tile.start + classes, T(0));
  add_columns(out.bias + tile.start, g, rows, classes, scratch);
}

}  // namespace

template <class T>
void gradients_of(const ChunkArguments<T>& of, const PieceGradient<T>& p, const ChunkGradients<T>& out) {
  const Chunk<T> chunk(of);
  const int64_t width = chunk.width;
  if (chunk.pairs)
    chunk.each_block([&](int64_t row, int64_t rows) {
      chunk.pairs->interleave(chunk.halves + row * width, width, rows, width, TOGETHER, chunk.pairs_of_rows(row));
    });
  chunk.each_part([&](int64_t part) {
    PieceGradient<T> own = p;
    T* const dx = !out.x ? nullptr : part == 0 ? out.x : chunk.partial(part);
    const int64_t begin = chunk.first_tile(part), end = chunk.first_tile(part + 1);
    if (dx && begin == end) std::fill(dx, dx + chunk.rows * width, T(0));
    std::vector<T> scratch(size_t(out.bias ? 2 * chunk.tile : 0));
    // Last first: what was kept last may be in the caches yet.
    for (int64_t index = end; index-- > begin;) {
      const typename Chunk<T>::Tile tile(chunk, part, index, !chunk.keeps, true);
      chunk.each_block([&](int64_t row, int64_t rows) {
        if (!chunk.keeps) tile.multiply(row, rows);
        tile.describe(own, row);
        tile.differentiate(own, out.target, rows);
        add_tile(chunk, tile, out, dx, index == end - 1, row, rows, scratch.data());
      });
      if (out.weight && out.last && chunk.inverse)
        kernels<T>().along_length(out.weight + tile.start * width, tile.weight, chunk.inverse + tile.start,
                                  tile.classes, width);
    }
  });
  if (!out.x) return;
  torch::stable::parallel_for(0, chunk.rows, (1 << 15) / (width + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<T> direction(static_cast<size_t>(width));
    for (int64_t i = begin; i < end; ++i) {
      T* const dx = out.x + i * width;
      for (int64_t part = 1; part < chunk.parts; ++part)
        kernels<T>().add(dx, chunk.partial(part) + i * width, T(1), width);
      const int64_t y = chunk.label[i] - chunk.offset;
      if (y < 0 || y >= chunk.classes) continue;
      kernels<T>().directions(chunk.some(y, 1), direction.data());
      kernels<T>().add(dx, direction.data(), out.target[i], width);
    }
  });
}

template void gradients_of(const ChunkArguments<float>&, const PieceGradient<float>&, const ChunkGradients<float>&);
template void gradients_of(const ChunkArguments<double>&, const PieceGradient<double>&, const ChunkGradients<double>&);

namespace {

std::tuple<Tensor, Tensor> linear_statistics(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                             std::optional<Tensor> inverse, const Tensor& label, int64_t offset,
                                             const std::vector<double>& numbers, const std::vector<Tensor>& params,
                                             const Tensor& workspace, bool keep, std::vector<int64_t> plan,
                                             const Tensor& target_logit, const Tensor& scales, int64_t classes,
                                             int64_t want) {
  return by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const Arguments call(numbers, params);
    ChunkArguments<T> of{x, weight, bias, inverse, label, offset, workspace, keep, plan};
    lay_out_classes(of, call, vectors_from<T>(call, offset, weight.size(0)));
    const int64_t n = label.numel(), count = scales_of(scales, n);
    Tensor reals = empty({Numbers<T>::of_reals(count), n}, type_of<T>()), whole = empty({2, n}, ScalarType::Long);
    statistics_of(of, array<T>(target_logit, n, "target_logit"), array<T>(scales, count * n, "scales"), count, classes,
                  want, static_cast<T*>(reals.data_ptr()), static_cast<int64_t*>(whole.data_ptr()));
    return std::tuple<Tensor, Tensor>{reals, whole};
  });
}

void linear_gradient(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> inverse,
                     const Tensor& label, int64_t offset, const std::vector<double>& numbers,
                     const std::vector<Tensor>& params, const Tensor& workspace, bool kept, std::vector<int64_t> plan,
                     const Tensor& factor, std::optional<Tensor> slope, std::optional<Tensor> spread,
                     const Tensor& target, const Tensor& scale, const Tensor& top, std::optional<Tensor> dx,
                     std::optional<Tensor> dw, std::optional<Tensor> db, bool first, bool last) {
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const Arguments call(numbers, params);
    ChunkArguments<T> of{x, weight, bias, inverse, label, offset, workspace, kept, plan};
    lay_out_classes(of, call, vectors_from<T>(call, offset, weight.size(0)));
    const int64_t n = label.numel();
    PieceGradient<T> p{};
    p.seen = kept;
    describe_rows(p, n, factor, slope, spread, scale, top);
    gradients_of<T>(of, p,
                    {array<T>(dx, x.numel(), "dx"), array<T>(dw, weight.numel(), "dw"),
                     array<T>(db, weight.size(0), "db"), array<T>(target, n, "target"), p.factor, first, last});
  });
}

}  // namespace

Tensor buffer_of(std::vector<int64_t> sizes, ScalarType type, size_t itemsize) {
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1;
  for (size_t d = sizes.size(); d-- > 0; count *= sizes[d]) {
    STD_TORCH_CHECK(sizes[d] >= 0 && (sizes[d] == 0 || count <= (int64_t(1) << 56) / sizes[d]),
                    "no buffer of such sizes");
    strides[d] = count;
  }
  const size_t bytes = size_t(count) * itemsize;
  Buffer* const buffer = bytes >= BUFFER_FROM ? take_buffer(bytes) : nullptr;
  if (!buffer) return empty_on(aoti_torch_device_type_cpu(), 0, sizes, type);
  return in_buffer(buffer, sizes, strides, type);
}

// The operator.
static Tensor buffer_like(const Tensor& like, std::vector<int64_t> sizes) {
  return buffer_of(std::move(sizes), like.scalar_type(), like.element_size());
}

}  // namespace mlkernels

STABLE_TORCH_LIBRARY_IMPL(mlkernels, CPU, m) {
  m.impl("piece_statistics", TORCH_BOX(&mlkernels::piece_statistics));
  m.impl("piece_gradient", TORCH_BOX(&mlkernels::piece_gradient));
  m.impl("linear_statistics", TORCH_BOX(&mlkernels::linear_statistics));
  m.impl("linear_gradient", TORCH_BOX(&mlkernels::linear_gradient));
  m.impl("buffer_like", TORCH_BOX(&mlkernels::buffer_like));
}
