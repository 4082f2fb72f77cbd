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

enum class Transform : int { IDENTITY, MARGIN, AFFINE, PIECEWISE, GIVEN };
enum class Scale : int { SINGLE, TWO_SCALE };
enum class Head : int { LOG, MODULATED, TAU, TRUNCATED };
enum class BeyondPi : int { AUTO, LINEAR, MONOTONE, EASY, NONE };
enum class MarginGradient : int { EXACT, STRAIGHT_THROUGH };
enum class Clamp : int { MIN, CROSS_ENTROPY };
enum class Reduction : int { NONE, MEAN, SUM };

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
  NORMALIZER,
  WEIGHT,
  ADJUSTMENT,
  GROUP,
  ROW_WEIGHT,
  SLOTS,
  TRAINABLE_SLOTS = HEAD_D + 1,
};

// Where the numbers that cross an op boundary lie: the six kinds and options, these three, then one per slot.
enum Number : int { REDUCTION = 6, IGNORE_INDEX = 7, MASK = 8, CONSTS = 9 };

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
