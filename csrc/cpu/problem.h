// What library_cpu.cpp hands to the row loops: plain data, shared by every instruction set.
#pragma once

#include <tuple>

#include "../rows.h"

namespace mlkernels {

// The CPU reads labels and numbers before it starts: they are legal, contiguous and of the accumulation type.
template <class T>
struct CpuProblem : Problem<T> {
  bool streamed;                     // grad is too large for the caches: write past them
  const int64_t* label;              // (rows), legal or ignore_index
  const int64_t* group;              // (rows) or null
  bool uniform;                      // every row has the same values
  T by_class_factor, by_row_factor;  // of every row, but for its own weight
};

// The row loops of an instruction set.
template <class T>
using RunRows = void (*)(const CpuProblem<T>&, int64_t begin, int64_t end);
using Kernels = std::tuple<RunRows<float>, RunRows<double>>;

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace mlkernels
