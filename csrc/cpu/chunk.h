// A chunk of rows and all classes of a linear head, as threads share these: what library_pieces.cpp's loops go through.
#pragma once

#include <array>
#include <type_traits>

#include "call.h"
#include "linear.h"

extern "C" int mlkernels_cpu_isa();

namespace mlkernels {
namespace {

template <class T>
const PieceKernels<T>& kernels() {
#if defined(__x86_64__)
  static const AllPieceKernels* const table[] = {&baseline::piece_kernels, &avx2::piece_kernels, &avx512::piece_kernels,
                                                 &avx512::piece_kernels};
  return std::get<PieceKernels<T>>(*table[mlkernels_cpu_isa()]);
#else
  return std::get<PieceKernels<T>>(baseline::piece_kernels);
#endif
}

// Null where the instruction set has no products of bfloat16.
const PairKernels* pair_kernels() {
#if defined(__x86_64__)
  return mlkernels_cpu_isa() == 3 ? &avx512_bf16::pair_kernels : nullptr;
#else
  return nullptr;
#endif
}

// The gradient of a tile, and the same rounded while it is in the first cache.
struct RoundedGradient {
  PieceGradient<float> gradient;
  Rounding rounding;
};

template <class T>
void visit_rows(const Product<T>& p, int64_t a, int64_t b) {
  kernels<T>().multiply(p, a, b);
}
template <class T>
void visit_rows(const PieceStatistics<T>& p, int64_t a, int64_t b) {
  kernels<T>().statistics(p, a, b);
}
template <class T>
void visit_rows(const PieceGradient<T>& p, int64_t a, int64_t b) {
  kernels<T>().gradient(p, a, b);
}
void visit_rows(const Product<float, Pair>& p, int64_t a, int64_t b) { pair_kernels()->multiply(p, a, b); }
// Of groups of the tile's rows.
void visit_rows(const RoundedGradient& p, int64_t a, int64_t b) {
  constexpr int64_t STEP = 16;
  static_assert(TOGETHER % STEP == 0 && STEP % 2 == 0, "a step is of one group, and of pairs");
  const int64_t first = p.gradient.first_row, last = std::min(TOGETHER * b, p.rounding.rows);
  for (int64_t row = TOGETHER * a; row < last; row += STEP) {
    const int64_t end = std::min(row + STEP, last);
    kernels<float>().gradient(p.gradient, first + row, first + end);
    pair_kernels()->round(p.rounding, row, end);
  }
}

template <class U>
U* array(const Tensor& tensor, int64_t count, const char* name) {
  const ScalarType wanted = sizeof(U) == 4               ? ScalarType::Float
                            : std::is_integral<U>::value ? ScalarType::Long
                                                         : ScalarType::Double;
  STD_TORCH_CHECK(tensor.scalar_type() == wanted && tensor.numel() == count && tensor.is_contiguous(), name,
                  " must be contiguous, of ", count, " elements, of the tile's dtype, or int64 where it is an index");
  return static_cast<U*>(tensor.data_ptr());
}
template <class U>
U* array(const std::optional<Tensor>& tensor, int64_t count, const char* name) {
  return tensor ? array<U>(*tensor, count, name) : nullptr;
}
// Of a number for each class those from `start` on, at least so many.
template <class T>
auto vectors_from(const Arguments& call, int64_t start, int64_t classes) {
  STD_TORCH_CHECK(start >= 0 && start <= INT64_MAX / 2, "classes begin at 0 or later");
  return [&call, start, classes](int slot) -> const T* {
    const Tensor* const vector = call.tensors[size_t(slot)];
    if (!vector) return nullptr;
    STD_TORCH_CHECK(vector->numel() - start >= classes, "params hold a number for each class");
    return array<T>(*vector, vector->numel(), "a number for each class") + start;
  };
}
// Rows from `first` on, of so much work each, on as many threads as there are; on this one where it is one of them.
template <class T, class Work>
void run(const Work& work, int64_t first, int64_t rows, int64_t each) {
  // Below this much a second thread costs more than it brings.
  constexpr int64_t GRAIN = 1 << 15;
  torch::stable::parallel_for(0, rows, GRAIN / (each + 1) + 1, [&work, first](int64_t begin, int64_t end) {
    visit_rows(work, first + begin, first + end);
  });
}
template <class T, class Piece>
void run(const Piece& p, int64_t rows) {
  if (rows > 0 && p.classes > 0) run<T>(p, p.first_row, rows, p.classes);
}
template <class T, class E>
void run(const Product<T, E>& p) {
  run<T>(p, 0, p.rows, p.columns * (p.inner / 32 + 1));
}
// A chunk of rows and all classes of a weight. Each part is some tiles of classes, on a thread of its own; a tile has
// `block` rows at a time, so that it stays in that thread's cache from the product to what is made of it.
template <class T>
struct Chunk {
  int64_t rows, classes, width, parts, tile, block, tiles;
  const T* x;              // (rows, width)
  const bfloat16* halves;  // the same as they are, where logits are products of these and the weight so; or null
  const PairKernels* pairs = nullptr;  // where gradients are made of pairs, too
  Classes<T> all;                      // the weight
  bool copies;                         // whether a tile of it is widened or shortened for products along classes
  const T* inverse;
  const T* row_factor;     // as in ChunkArguments
  const T *bias, *weight;  // these and what is in the preparation: of these classes
  Preparation<T> preparation;
  const int64_t* label;
  int64_t offset;  // where these classes begin among those of labels
  T* workspace;
  bool keeps;  // the products of all tiles, one after another, in front

  explicit Chunk(const ChunkArguments<T>& of)
      : halves(of.halves),
        row_factor(of.row_factor),
        weight(of.weight),
        preparation(of.preparation),
        offset(of.offset) {
    const Tensor &x_ = of.x, &weight_ = of.linear_weight, &workspace_ = of.workspace;
    const std::vector<int64_t>& plan = of.plan;
    STD_TORCH_CHECK(x_.dim() == 2 && weight_.dim() == 2 && weight_.size(1) == x_.size(1) && plan.size() == 3 &&
                        plan[0] > 0 && plan[1] > 0 && plan[2] > 0,
                    "x must be (rows, width), weight (classes, width), plan three positive numbers");
    rows = x_.size(0);
    width = x_.size(1);
    classes = weight_.size(0);
    tile = std::min(plan[1], std::max<int64_t>(classes, 1));
    block = std::min(plan[2], std::max<int64_t>(rows, 1));
    tiles = (classes + tile - 1) / tile;
    parts = std::min(plan[0], std::max<int64_t>(tiles, 1));
    const bool multiplies_pairs = x_.scalar_type() == ScalarType::BFloat16;
    x = multiplies_pairs ? nullptr : array<T>(x_, rows * width, "x");
    STD_TORCH_CHECK(width < 2 || weight_.stride(1) == 1, "weight must have a stride of 1 along width");
    const ScalarType stored = weight_.scalar_type();
    STD_TORCH_CHECK((stored == ScalarType::Double) == (sizeof(T) == 8), "weight must be in float64 where x is");
    inverse = array<T>(of.inverse, classes, "inverse");
    copies = inverse || stored != type_of<T>();
    if (multiplies_pairs) {
      pairs = pair_kernels();
      STD_TORCH_CHECK(
          pairs && stored == ScalarType::BFloat16 && width % 2 == 0 && !inverse && x_.is_contiguous(),
          "x in bfloat16 must be contiguous, of an even width, the weight in bfloat16 too, as it is, and the "
          "instruction set avx512_bf16");
      halves = static_cast<const bfloat16*>(x_.data_ptr());
      if (block < rows) block += block % 2;
    }
    STD_TORCH_CHECK(
        !of.halves || (pair_kernels() && stored == ScalarType::BFloat16 && width % 2 == 0 && inverse),
        "x in bfloat16 has cosines with a weight in bfloat16, both of an even width, and by the instruction "
        "set avx512_bf16");
    all = {weight_.data_ptr(), storage_of(stored), classes, width, weight_.stride(0), inverse};
    bias = array<T>(of.bias, classes, "bias");
    label = array<int64_t>(of.label, rows, "label");
    keeps = of.keep;
    workspace = array<T>(workspace_, workspace_.numel(), "workspace");
    const int64_t of_features = pairs ? (rows + block - 1) / block * pair_rows(block) * width : 0;
    STD_TORCH_CHECK(workspace_.numel() >= kept() + parts * of_part() + (parts - 1) * rows * width + of_features,
                    "workspace is too small");
  }

  int64_t kept() const { return keeps ? rows * classes : 0; }
  int64_t of_tile() const { return keeps ? 0 : std::min(block, rows) * tile; }
  // How many pairs are in each of Tile::Pairs, one after another.
  std::array<int64_t, 4> of_pairs() const {
    const int64_t count = std::min(block, rows), half = (tile + 1) / 2;
    return {tile * (width / 2), (half + 1) * width, count * (half + 1), pair_rows(count) * tile};
  }
  int64_t of_part() const {
    const std::array<int64_t, 4> each = of_pairs();
    return of_tile() + (pairs ? each[0] + each[1] + each[2] + each[3] : tile * width * (copies ? 2 : 1));
  }
  T* own(int64_t part) const { return workspace + kept() + part * of_part(); }
  // Where a part sums up the gradient of x, if that is not where it is wanted.
  T* partial(int64_t part) const { return workspace + kept() + parts * of_part() + (part - 1) * rows * width; }
  // The features of a block as pairs of rows, by groups.
  Pair* pairs_of_rows(int64_t row) const {
    return reinterpret_cast<Pair*>(partial(parts)) + row / block * pair_rows(block) * width;
  }
  int64_t first_tile(int64_t part) const { return tiles * part / parts; }

  static int64_t size_of(Storage s) { return s == Storage::DOUBLE ? 8 : s == Storage::FLOAT ? 4 : 2; }
  Classes<T> some(int64_t start, int64_t count) const {
    Classes<T> these = all;
    these.classes = count;
    these.data = static_cast<const char*>(all.data) + start * all.stride * size_of(all.storage);
    these.inverse = inverse ? inverse + start : nullptr;
    return these;
  }

  // What lies in a part's own workspace, and how its tiles are walked through.
  struct Tile {
    int64_t start, classes;  // among this weight's
    const T *weight, *transposed;
    int64_t weight_stride;
    T* products;
    // Of the weight: transposed, along the width, and along the classes. Of a gradient: along the classes, and the rows.
    struct Pairs {
      Pair *transposed, *weight, *by_class, *by_row;
    } pairs{};
    const Chunk& chunk;

    Tile(const Chunk& c, int64_t part, int64_t index, bool multiplies, bool gradients) : chunk(c) {
      start = index * c.tile;
      classes = std::min(c.tile, c.classes - start);
      T* const own = c.own(part);
      products = c.keeps ? c.workspace + start * c.rows : own;
      T* const panels = own + c.of_tile();
      transposed = panels;
      const Classes<T> these = c.some(start, classes);
      if constexpr (std::is_same_v<T, float>) {
        if (c.pairs) {
          const std::array<int64_t, 4> each = c.of_pairs();
          Pair* const first = reinterpret_cast<Pair*>(panels);
          pairs = {first, first + each[0], first + each[0] + each[1], first + each[0] + each[1] + each[2]};
          if (multiplies) c.pairs->panels(these, pairs.transposed);
          const auto* const from = static_cast<const bfloat16*>(these.data);
          if (gradients) c.pairs->interleave(from, these.stride, classes, c.width, classes, pairs.weight);
          return;
        }
      }
      pairs.transposed = reinterpret_cast<Pair*>(panels);
      if constexpr (std::is_same_v<T, float>) {
        if (multiplies && c.halves) pair_kernels()->panels(these, pairs.transposed);
      }
      if (multiplies && !c.halves) kernels<T>().panels(these, panels);
      weight = c.copies ? panels + c.tile * c.width : static_cast<const T*>(these.data);
      weight_stride = c.copies ? c.width : c.all.stride;
      if (gradients && c.copies) kernels<T>().directions(these, panels + c.tile * c.width);
    }

    // Of rows from `row` on.
    T* block(int64_t row) const { return chunk.keeps ? products + row * classes : products; }
    void multiply(int64_t row, int64_t count) const {
      if constexpr (std::is_same_v<T, float>) {
        const int64_t half = chunk.width / 2;
        const Pair* const x = reinterpret_cast<const Pair*>(chunk.halves) + row * half;
        if (chunk.halves)
          return run<T>(
              Product<T, Pair>{block(row), classes, x, half, 1, pairs.transposed, 0, count, classes, half, false});
      }
      run<T>(Product<T>{block(row), classes, chunk.x + row * chunk.width, chunk.width, 1, transposed, 0, count, classes,
                        chunk.width, false});
    }
    // The gradient of rows that `p` describes.
    void differentiate(const PieceGradient<T>& p, const T* target, int64_t count) const {
      if constexpr (std::is_same_v<T, float>) {
        const Rounding rounding{p.tile,         count,        classes, p.first_row, p.start,
                                pairs.by_class, pairs.by_row, target,  p.factor};
        if (chunk.pairs)
          return run<T>(RoundedGradient{p, rounding}, 0, (count + TOGETHER - 1) / TOGETHER, TOGETHER * classes);
      }
      run<T>(p, count);
    }
    template <class Piece>
    void describe(Piece& p, int64_t row) const {
      p.tile = block(row);
      p.rows = chunk.rows;
      p.first_row = row;
      p.classes = classes;
      p.start = chunk.offset + start;
      p.label = chunk.label;
      p.preparation = chunk.preparation.from(start);
      p.bias = chunk.bias ? chunk.bias + start : nullptr;
      p.weight = chunk.weight ? chunk.weight + start : nullptr;
      p.row_factor = chunk.row_factor;
      p.class_factor = chunk.row_factor ? chunk.inverse + start : nullptr;
    }
  };

  template <class Body>
  void each_part(Body body) const {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) body(part);
    });
  }
  template <class Body>
  void each_block(Body body) const {
    for (int64_t row = 0; row < rows; row += block) body(row, std::min(block, rows - row));
  }
};

}  // namespace
}  // namespace mlkernels
