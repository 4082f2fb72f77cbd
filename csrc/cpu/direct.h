// What csrc/library_fast_path.cpp calls of the CPU library: the bodies of its operators, without a dispatcher in between.
#pragma once

#include <cstddef>
#include <cstdint>

struct AtenTensorOpaque;

namespace mlkernels {

// The arguments that the operators share (mlkernels/ops.py); the tensors are borrowed.
struct DirectCall {
  AtenTensorOpaque *input, *target;
  const double* numbers;
  int64_t numbers_size;
  AtenTensorOpaque* const* params;
  int64_t params_size;
};

// A linear head: the call's input is its features.
struct DirectLinear {
  AtenTensorOpaque *weight, *bias;  // the bias may be null
  bool normalize;
  const int64_t* plan;  // the five numbers of the operator
  int64_t workspace;
};

// What is made belongs to the caller, gradients in the order of the bits of `needs`. False: the call was refused, and
// nothing was made; the operator says why.
struct Direct {
  const char* numbering;
  size_t size;  // of this, by which libraries that were not built together know each other
  const char* schemas;
  bool (*loss)(const DirectCall&, bool save, AtenTensorOpaque** loss, AtenTensorOpaque** saved);
  bool (*loss_with_gradients)(const DirectCall&, int64_t needs, AtenTensorOpaque** loss, AtenTensorOpaque** gradients);
  bool (*loss_backward)(const DirectCall&, AtenTensorOpaque* grad_loss, AtenTensorOpaque* saved, int64_t needs,
                        AtenTensorOpaque** gradients);
  bool (*linear_loss_with_gradients)(const DirectCall&, const DirectLinear&, int64_t needs, AtenTensorOpaque** loss,
                                     AtenTensorOpaque** gradients);
  // rows: null, or where the six of RowStats go.
  bool (*linear_rows)(const DirectCall&, const DirectLinear&, AtenTensorOpaque** loss, AtenTensorOpaque** saved,
                      AtenTensorOpaque** rows);
  // upstream: of the loss, logsumexp, log_prob and entropy, each of which may be null.
  bool (*linear_rows_backward)(const DirectCall&, const DirectLinear&, AtenTensorOpaque* saved,
                               AtenTensorOpaque* const* upstream, int64_t needs, AtenTensorOpaque** gradients);
};

}  // namespace mlkernels
