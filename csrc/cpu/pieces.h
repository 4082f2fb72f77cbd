// What library_pieces.cpp hands to the loops over tiles: plain data, shared by every instruction set.
#pragma once

#include <algorithm>
#include <cmath>

#include <tuple>
#include <type_traits>

#include "../rows.h"

namespace mlkernels {

// Some classes of rows from `first_row` on, classes from `start` on: products, which become u (with the statistics, unless
// there is a softcap), which becomes the gradient.
template <class T>
struct Piece {
  T* tile;                  // (., classes)
  int64_t rows, first_row;  // of all rows, which the other arrays have, and the tile's first
  int64_t classes, start;
  const int64_t* label;                        // (rows)
  const T *bias = nullptr, *weight = nullptr;  // of these classes, or null
  // What makes cosines of the products, where these are of vectors: of rows, and of these classes; or null, both.
  const T *row_factor = nullptr, *class_factor = nullptr;
  Preparation<T> preparation;
};

// The numbers of each row, to which those of this piece are added; null pointers are not wanted.
template <class T>
struct PieceStatistics : Piece<T> {
  const T* target_logit;  // (rows)
  const T* scales;        // (count, rows)
  int64_t count;
  T *top, *weighted, *weights;  // (rows): M, V, W
  T *total, *shift, *square;    // (count, rows): S, T, and the second moment
  int64_t *first, *above;       // (rows): the lowest class at M; how many are larger than the target, -1: not wanted
};

// dL/du_j = exp(s (u_j - M)) (factor + slope (u_j - M)) - spread w_j, and 0 at the target.
template <class T>
struct PieceGradient : Piece<T> {
  bool seen;                                       // the tile has been through the statistics
  const T *factor, *slope, *spread, *scale, *top;  // (rows); slope and spread may be null
};

// Classes' rows of a weight (classes, width) of any storage, as they are multiplied.
template <class T>
struct Classes {
  const void* data;
  Storage storage;
  int64_t classes, width, stride;  // between classes, in elements
  const T* inverse;                // (classes), 1 over their lengths, or null
};

// Two neighbours along the sum of a product.
struct Pair {
  bfloat16 low, high;
};

// out = a b, or out + a b.
template <class T, class E = T>
struct Product {
  T* out;  // (rows, columns)
  int64_t out_stride;
  const E* a;  // (rows, inner)
  int64_t a_row, a_inner;
  const E* b;        // (inner, columns)
  int64_t b_stride;  // between rows; 0: `panels` has made it
  int64_t rows, columns, inner;
  bool add;
  // So much is summed up by itself before it joins the rest, as a short sum rounds less: as exact as torch's products.
  // Results of products of bfloat16 are rounded to that in the end.
  static constexpr int64_t DEPTH = std::is_same_v<T, E> ? 64 : INT64_MAX;
};

template <class T>
struct PieceKernels {
  void (*multiply)(const Product<T>&, int64_t begin, int64_t end);
  // Classes transposed, as a product takes them.
  void (*panels)(const Classes<T>&, T* to);
  void (*statistics)(const PieceStatistics<T>&, int64_t begin, int64_t end);
  void (*gradient)(const PieceGradient<T>&, int64_t begin, int64_t end);
  // To (classes, width), widened, of length 1 where so asked.
  void (*directions)(const Classes<T>&, T* to);
  // The gradient by a class from that by its direction, in place: r (h - (h . w) w).
  void (*along_length)(T* gradient, const T* direction, const T* inverse, int64_t classes, int64_t n);
  // to += factor from
  void (*add)(T* to, const T* from, T factor, int64_t n);
  // Logits to c tanh(u / c), and the slope of that.
  void (*cap)(T* u, T* slope, int64_t n, T c);
};
using AllPieceKernels = std::tuple<PieceKernels<float>, PieceKernels<double>>;

// Rows of which, as pairs, what they have in common is a pair too: their number is even, as pairs go.
constexpr int64_t TOGETHER = 64;
// The pairs of so many rows, and one more for each group.
static inline int64_t pair_rows(int64_t rows) { return (rows + 1) / 2 + (rows + TOGETHER - 1) / TOGETHER; }

// A row's gradient, whose absolute values often sum up to the target's, has MOST of this size at most. What these lose is
// added by itself.
constexpr int MOST = 32;
static inline float large_from(float target, float factor) {
  return std::max(std::abs(target), std::abs(factor)) / MOST;
}

// Some rows of the gradient of a tile, (rows, classes), rounded to bfloat16 for the two products that read it. What that
// loses is summed up along each row, and in each group along the classes: a pair more of each, which meets the mean of what
// is multiplied. So the products lose nothing of what their terms have in common.
struct Rounding {
  const float* gradient;
  int64_t rows, classes;
  int64_t first_row, start;  // where they lie in a chunk of rows and all classes
  Pair *by_class, *by_row;   // (rows, 1 + half of the classes), (pair_rows(rows), classes), what is odd filled up by 0
  const float *target, *factor;  // (rows) of the chunk
};

// Products of bfloat16 as it is, into float32, where the instruction set has them.
struct PairKernels {
  void (*multiply)(const Product<float, Pair>&, int64_t begin, int64_t end);
  // Classes transposed, as a product takes them: pairs along the width, which is even.
  void (*panels)(const Classes<float>&, Pair* to);
  // Rows (rows, columns) as pairs of neighbours, what is odd filled up by 0; after those of each group, whose rows are an
  // even number, their mean, twice.
  void (*interleave)(const bfloat16* from, int64_t stride, int64_t rows, int64_t columns, int64_t group, Pair* to);
  // Of one group, in order; begin is even.
  void (*round)(const Rounding&, int64_t begin, int64_t end);
  // The first index from `from` on of a number of at least `limit`; n: there is none.
  int64_t (*next_large)(const float* x, int64_t from, int64_t n, float limit);
  // to += factor from
  void (*add)(float* to, const bfloat16* from, float factor, int64_t n);
};

namespace avx512_bf16 {
extern const PairKernels pair_kernels;
}
namespace baseline {
extern const AllPieceKernels piece_kernels;
}
namespace avx2 {
extern const AllPieceKernels piece_kernels;
}
namespace avx512 {
extern const AllPieceKernels piece_kernels;
}

}  // namespace mlkernels
