// What a loss is, as numbers: the same enumerations, in the same order, as mlkernels/spec.py.
#pragma once

#include <cstdint>

// Every kernel translation unit is compiled for one target (an instruction set of the host, or a device) and everything
// in the shared headers lives in that target's namespace: the linker must never pick one target's code for another.
#ifndef MLKERNELS_ISA
#define MLKERNELS_ISA host
#endif

#ifdef __CUDACC__
#define MLK_FN __host__ __device__ inline
#else
#define MLK_FN inline
#endif

namespace mlkernels {

enum Transform : int { IDENTITY = 0, MARGIN = 1, AFFINE = 2, PIECEWISE = 3, GIVEN = 4 };
enum Scale : int { SINGLE = 0, TWO_SCALE = 1 };
enum Head : int { LOG = 0, MODULATED = 1, TAU = 2, TRUNCATED = 3 };
enum BeyondPi : int { AUTO = 0, LINEAR = 1, MONOTONE = 2, EASY = 3, PLAIN = 4 };
enum MarginGradient : int { EXACT = 0, STRAIGHT_THROUGH = 1 };
enum Clamp : int { CLAMP_MIN = 0, CLAMP_CROSS_ENTROPY = 1 };
enum Reduction : int { REDUCE_NONE = 0, REDUCE_MEAN = 1, REDUCE_SUM = 2 };

enum Slot : int {
  SCALE = 0,
  SCALE_HIGH,
  ETA,
  LOGIT_NORM,
  TRANSFORM_A,  // m1, slope, t_slope, the given target logit
  TRANSFORM_B,  // m2, offset, t_bias
  TRANSFORM_C,  // m3
  NORM,
  HEAD_A,  // alpha, tau_slope, k
  HEAD_B,  // beta, tau_bias
  HEAD_C,  // gamma
  HEAD_D,  // kappa
  DOMAIN_LOW,
  DOMAIN_HIGH,
  TAU_MIN,
  SMOOTHING,
  Z_LOSS,
  SOFTCAP,
  WEIGHT,
  ADJUSTMENT,
  GROUP,
  SLOTS,
  TRAINABLE_SLOTS = HEAD_D + 1,
};

// Where the numbers that cross an op boundary lie: the six kinds and options, these three, then one per slot.
enum Number : int { REDUCTION = 6, IGNORE_INDEX = 7, MASK = 8, CONSTS = 9 };

struct Spec {
  int transform, scale, head, beyond_pi, gradient, clamp, reduction;
  int64_t ignore_index;
};

}  // namespace mlkernels
