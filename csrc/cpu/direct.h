// What csrc/library_fast_path.cpp calls of the CPU library: the bodies of its operators, without a dispatcher in between.
#pragma once

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

// What is made belongs to the caller, gradients in the order of the bits of `needs`. False: the call was refused, and
// nothing was made; the operator says why.
struct Direct {
  const char* numbering;
  bool (*loss)(const DirectCall&, bool save, AtenTensorOpaque** loss, AtenTensorOpaque** saved);
  bool (*loss_with_gradients)(const DirectCall&, int64_t needs, AtenTensorOpaque** loss, AtenTensorOpaque** gradients);
  bool (*loss_backward)(const DirectCall&, AtenTensorOpaque* grad_loss, AtenTensorOpaque* saved, int64_t needs,
                        AtenTensorOpaque** gradients);
};

}  // namespace mlkernels
