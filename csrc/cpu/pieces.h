// What library_pieces.cpp hands to the loops over tiles: plain data, shared by every instruction set.
#pragma once

#include <cstdint>

namespace mlkernels {

// Some classes of every row, from `start` on: products, which become u, which becomes the gradient.
template <class T>
struct Piece {
  T* tile;  // (rows, classes)
  int64_t rows, classes, start;
  const int64_t* label;  // (rows)
  T softcap;             // 0: none
  const T* weight;       // of these classes, or null
  const T* adjustment;   // of these classes, or null
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
  bool seen;                                       // the tile holds u, not products
  const T *factor, *slope, *spread, *scale, *top;  // (rows); slope and spread may be null
};

struct PieceKernels {
  void (*statistics_float)(const PieceStatistics<float>&, int64_t begin, int64_t end);
  void (*statistics_double)(const PieceStatistics<double>&, int64_t begin, int64_t end);
  void (*gradient_float)(const PieceGradient<float>&, int64_t begin, int64_t end);
  void (*gradient_double)(const PieceGradient<double>&, int64_t begin, int64_t end);
};

namespace baseline {
extern const PieceKernels piece_kernels;
}
namespace avx2 {
extern const PieceKernels piece_kernels;
}
namespace avx512 {
extern const PieceKernels piece_kernels;
}

}  // namespace mlkernels
