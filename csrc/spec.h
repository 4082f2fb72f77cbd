// What a loss is: numbering.h has the kinds and the slots.
#pragma once

#include <cstdint>

#include "numbering.h"

// Every kernel translation unit is compiled for one target (an instruction set of the host, or a device) and everything
// in the shared headers lives in that target's namespace: the linker must never pick one target's code for another.
#ifndef MLKERNELS_ISA
#define MLKERNELS_ISA host
#endif

// MLK_SELDOM: what a host seldom does, out of the way of what it always does.
#ifdef __CUDACC__
#define MLK_FN __host__ __device__ inline
#define MLK_SELDOM MLK_FN
#else
#define MLK_FN inline
#define MLK_SELDOM __attribute__((noinline)) inline
#endif

namespace mlkernels {

struct Spec {
  Transform transform;
  Scale scale;
  Head head;
  BeyondPi beyond_pi;
  MarginGradient gradient;
  Clamp clamp;
  Reduction reduction;
  int64_t ignore_index;
};

}  // namespace mlkernels
