// What both libraries make of the arguments that their operators share; see mlkernels/ops.py. For the host alone.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "spec.h"

namespace mlkernels {

// A number as the enumerator that it stands for; an unknown one is never another loss.
template <class Kind>
Kind kind_of(double number, Kind last, const char* name) {
  if (!(number >= 0 && number <= double(int(last))) || number != double(int(number)))
    throw std::invalid_argument("there is no " + std::string(name) + " with the number " + std::to_string(number));
  return Kind(int(number));
}

inline Spec read_spec(const std::vector<double>& numbers) {
  return {kind_of(numbers[0], Transform::GIVEN, "transform"),
          kind_of(numbers[1], Scale::TWO_SCALE, "row scale"),
          kind_of(numbers[2], Head::TRUNCATED, "head"),
          kind_of(numbers[3], BeyondPi::NONE, "beyond_pi"),
          kind_of(numbers[4], MarginGradient::STRAIGHT_THROUGH, "gradient of a margin"),
          kind_of(numbers[5], Clamp::CROSS_ENTROPY, "clamp"),
          kind_of(numbers[REDUCTION], Reduction::SUM, "reduction"),
          int64_t(numbers[IGNORE_INDEX])};
}

}  // namespace mlkernels
