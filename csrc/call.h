// What both libraries make of the arguments that their operators share; see mlkernels/ops.py. For the host alone.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "spec.h"

namespace mlkernels {

// A number as the enumerator that it stands for; an unknown one is never another loss.
template <class Kind>
Kind kind_of(double number) {
  if (!(number >= 0 && number < Known<Kind>::COUNT) || number != double(int(number)))
    throw std::invalid_argument(std::string("there is no ") + Known<Kind>::WORD + " with the number " +
                                std::to_string(number));
  return Kind(int(number));
}

inline Spec read_spec(const std::vector<double>& numbers) {
  return {kind_of<Transform>(numbers[TRANSFORM]),
          kind_of<Scale>(numbers[ROW_SCALE]),
          kind_of<Head>(numbers[HEAD]),
          kind_of<BeyondPi>(numbers[BEYOND_PI]),
          kind_of<MarginGradient>(numbers[MARGIN_GRADIENT]),
          kind_of<Clamp>(numbers[CLAMP]),
          kind_of<Reduction>(numbers[REDUCTION]),
          int64_t(numbers[IGNORE_INDEX])};
}

// Whether a slot holds a table: of t, or of t or tau.
inline bool is_table_of_t(const Spec& spec, int slot) { return TRANSFORM_TABLES[int(spec.transform)] >> slot & 1; }
inline bool is_table(const Spec& spec, int slot) {
  return (TRANSFORM_TABLES[int(spec.transform)] | HEAD_TABLES[int(spec.head)]) >> slot & 1;
}

}  // namespace mlkernels
