// Written by csrc/build.py from mlkernels/numbering.py, where it is changed.
#pragma once

namespace mlkernels {

// What happens to the target's logit.
enum class Transform : int {
  IDENTITY = 0,
  MARGIN = 1,
  AFFINE = 2,
  PIECEWISE = 3,
  GIVEN = 4,
};

// How a row finds its scale.
enum class Scale : int {
  SINGLE = 0,
  TWO_SCALE = 1,
};

// The function of log p that is the loss.
enum class Head : int {
  LOG = 0,
  MODULATED = 1,
  TAU = 2,
  TRUNCATED = 3,
};

// What a margin does where m1*theta + m2 > pi. AUTO: linear where m1 = 1, else monotone.
enum class BeyondPi : int {
  AUTO = 0,
  LINEAR = 1,
  MONOTONE = 2,
  EASY = 3,
  NONE = 4,
};

// The derivative of a margin: its own, or 1.
enum class MarginGradient : int {
  EXACT = 0,
  STRAIGHT_THROUGH = 1,
};

// What the loss is where tau(p) <= minimum.
enum class Clamp : int {
  MIN = 0,
  CROSS_ENTROPY = 1,
};

// How row losses become the result.
enum class Reduction : int {
  NONE = 0,
  MEAN = 1,
  SUM = 2,
};

// How a number of the loss reaches a kernel: as it is, or in a tensor of one, one per class, one per row.
enum class Mode : int {
  BY_VALUE = 0,
  SHARED = 1,
  PER_CLASS = 2,
  PER_ROW = 3,
};

// How many there are of a kind, and the word for it.
template <class Kind>
struct Known;
template <>
struct Known<Transform> {
  static constexpr int COUNT = 5;
  static constexpr const char* WORD = "transform";
};
template <>
struct Known<Scale> {
  static constexpr int COUNT = 2;
  static constexpr const char* WORD = "row scale";
};
template <>
struct Known<Head> {
  static constexpr int COUNT = 4;
  static constexpr const char* WORD = "head";
};
template <>
struct Known<BeyondPi> {
  static constexpr int COUNT = 5;
  static constexpr const char* WORD = "beyond_pi";
};
template <>
struct Known<MarginGradient> {
  static constexpr int COUNT = 2;
  static constexpr const char* WORD = "gradient of a margin";
};
template <>
struct Known<Clamp> {
  static constexpr int COUNT = 2;
  static constexpr const char* WORD = "clamp";
};
template <>
struct Known<Reduction> {
  static constexpr int COUNT = 3;
  static constexpr const char* WORD = "reduction";
};

// Where each number of a loss lies; the meaning of TRANSFORM_* and HEAD_* depends on the kind, see VALUES.
enum Slot : int {
  SCALE = 0,  // scale, scale_low
  SCALE_HIGH = 1,  // scale_high
  ETA = 2,  // eta
  LOGIT_NORM = 3,  // logit_norm
  TRANSFORM_A = 4,  // m1, slope, t_slope, target_logit
  TRANSFORM_B = 5,  // m2, offset, t_bias
  TRANSFORM_C = 6,  // m3
  NORM = 7,  // norm
  HEAD_A = 8,  // alpha, tau_slope, k
  HEAD_B = 9,  // beta, tau_bias
  HEAD_C = 10,  // gamma
  HEAD_D = 11,  // kappa
  DOMAIN_LOW = 12,  // domain
  DOMAIN_HIGH = 13,  // domain
  TAU_MIN = 14,  // tau_min
  SMOOTHING = 15,  // label_smoothing
  Z_LOSS = 16,  // z_loss
  SOFTCAP = 17,  // softcap
  NORMALIZER = 18,  // normalizer
  WEIGHT = 19,  // weight
  ADJUSTMENT = 20,  // logit_adjustment
  GROUP = 21,  // group
  ROW_WEIGHT = 22,  // row_weight
};

constexpr int SLOTS = 23;
constexpr int LOSS_SLOTS = 15;  // the numbers of transform, scale and head
constexpr int TRAINABLE_SLOTS = 12;  // the trainable ones are among these
constexpr unsigned OF_SCALE = 1u << SCALE | 1u << SCALE_HIGH | 1u << LOGIT_NORM;  // their gradient takes the mean logit

// The slots that hold tables, by kind.
constexpr unsigned TRANSFORM_TABLES[] = {0, 0, 0, 1u << TRANSFORM_A | 1u << TRANSFORM_B, 0};
constexpr unsigned HEAD_TABLES[] = {0, 0, 1u << HEAD_A | 1u << HEAD_B, 0};

// What every loss may be given, and how many numbers a tensor of it has.
struct Extra {
  Slot slot;
  Mode per;
  const char* name;
};
constexpr Extra EXTRAS[] = {{SMOOTHING, Mode::BY_VALUE, "label_smoothing"}, {Z_LOSS, Mode::BY_VALUE, "z_loss"}, {SOFTCAP, Mode::BY_VALUE, "softcap"}, {NORMALIZER, Mode::SHARED, "normalizer"}, {WEIGHT, Mode::PER_CLASS, "weight"}, {ADJUSTMENT, Mode::PER_CLASS, "logit_adjustment"}, {GROUP, Mode::PER_ROW, "group"}, {ROW_WEIGHT, Mode::PER_ROW, "row_weight"}};

// Where everything lies in the numbers that cross an op boundary: a structure, what all losses have, the slots.
enum Field : int {
  TRANSFORM = 0,
  ROW_SCALE = 1,
  HEAD = 2,
  BEYOND_PI = 3,
  MARGIN_GRADIENT = 4,
  CLAMP = 5,
  REDUCTION = 6,
  IGNORE_INDEX = 7,
  MASK = 8,
  CONSTS = 9,
};

// Of all this: a library says of which numbering it is.
constexpr char NUMBERING[] = "d493afca";

}  // namespace mlkernels
