// Written by csrc/build.py from mlkernels/schemas.py, where it is changed.
#pragma once

namespace mlkernels {

// What Python tells the fast path, as PyArg_ParseTuple reads it.
constexpr char DESCRIBED[] = "ippddd";
constexpr char RESOLVED[] = "OO!LppO!";
constexpr char SET_UP[] = "KO!O!OOO";
constexpr char LINEAR[] = "OOOO";
constexpr char PLAIN[] = "OOOpp";

// Of this and of the operators' schemas: a library says of which they are.
constexpr char SCHEMAS[] = "d3d2e3e5";

}  // namespace mlkernels
