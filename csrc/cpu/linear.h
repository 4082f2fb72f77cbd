// The operators of linear heads that the libraries' other files call too; see mlkernels/ops.py.
#pragma once

#include <array>
#include <tuple>

#include "../arguments.h"
#include "pieces.h"

namespace mlkernels {

// A chunk of rows, some classes, and how threads share these. plan: parts, classes, block.
template <class T>
struct ChunkArguments {
  const Tensor &x, &linear_weight;
  const std::optional<Tensor>&bias, &inverse;
  const Tensor& label;
  int64_t offset;  // where these classes begin among those of labels
  const Tensor& workspace;
  bool keep;  // the products lie in the workspace
  const std::vector<int64_t>& plan;
  const T* weight = nullptr;  // this and what is in the preparation: of these classes
  Preparation<T> preparation{};
  // Of x and weight of directions, what is multiplied instead for logits, and what makes cosines of that: (rows, width),
  // (rows); or null, both.
  const bfloat16* halves = nullptr;
  const T* row_factor = nullptr;
};

// What is asked of the statistics.
struct Want {
  static constexpr int64_t SHIFT = 1, SECOND = 2, RANKS = 4, SMOOTHING = 8;
};

// Of library_pieces.cpp. What is known of each row: reals (3 + 3 count, rows) of M, V, W, S, T and the second moment,
// whole (2, rows) of the lowest class at M and how many logits are larger than the target's. scales: (count, rows).
template <class T>
void statistics_of(const ChunkArguments<T>& of, const T* target_logit, const T* scales, int64_t count, int64_t classes,
                   int64_t want, T* reals, int64_t* whole);

// Logits to c tanh(u / c), as tiles have it, and the slope of that, if it is wanted.
template <class T>
void cap(T* u, T* slope, int64_t n, T c);

// Where the gradients of a chunk go, and what they are made of beside PieceGradient's coefficients.
template <class T>
struct ChunkGradients {
  T *x, *weight, *bias;  // (rows, width), (classes, width), (classes); null: not wanted
  const T* target;       // (rows), dL/df_y, which is added where its class is
  const T* factor;       // (rows), that of the exponentials
  bool first, last;      // chunk: weight and bias are written, and not added to; complete, and follow from directions'
};
template <class T>
void gradients_of(const ChunkArguments<T>& of, const PieceGradient<T>& p, const ChunkGradients<T>& out);

// needs: the bits of slots, then those of x, weight and bias.
constexpr int WEIGHT_BIT = INPUT + 1, BIAS_BIT = INPUT + 2;

// What the operators of a whole linear head share. workspace: how many numbers it takes. plan: parts, classes, block;
// rows of a chunk; whether its products are kept.
struct LinearArguments {
  const Tensor &x, &weight;
  const std::optional<Tensor>& bias;
  bool normalize;
  const Tensor& target;
  int64_t workspace;
  const std::vector<int64_t>& plan;
  const std::vector<double>& numbers;
  const std::vector<Tensor>& params;
};

// Of library_linear.cpp; see mlkernels/schemas.py.
std::tuple<Tensor, std::vector<Tensor>> linear_loss_with_gradients(const LinearArguments& of, int64_t needs);
std::tuple<Tensor, Tensor, std::vector<Tensor>> linear_rows(const LinearArguments& of, bool stats);
std::vector<Tensor> linear_rows_backward(const LinearArguments& of, const Tensor& saved,
                                         const std::array<std::optional<Tensor>, 4>& upstream, int64_t needs);

// Contiguous, with anything in it; large ones in memory that earlier ones have left.
Tensor buffer_of(std::vector<int64_t> sizes, ScalarType type, size_t itemsize);

}  // namespace mlkernels
