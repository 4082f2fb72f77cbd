"""The schemas of the package's operators, and what Python tells the fast path: what a library was built for.

``ops.py`` defines the operators, ``csrc/build.py`` writes ``csrc/schemas.h`` from this (:func:`header`), and a library
that was built from another one is not used. It imports nothing of the package, nor torch.
"""

from __future__ import annotations

import zlib

# What the operators of a loss share, see ops.py.
_COMMON = "Tensor input, Tensor target, float[] numbers, Tensor[] params"
_UPSTREAM = "Tensor? grad_loss, Tensor? grad_logsumexp, Tensor? grad_log_prob, Tensor? grad_entropy"
_OF_LOSSES = (
    # loss; (m, log S) per row where save.
    f"softmax_loss({_COMMON}, bool save) -> (Tensor, Tensor)",
    # loss; the gradient of the logits for an upstream gradient of 1, in the same pass over each row.
    f"softmax_loss_with_gradient({_COMMON}) -> (Tensor, Tensor)",
    # The same, for whatever `needs` asks.
    f"softmax_loss_with_gradients({_COMMON}, int needs) -> (Tensor, Tensor[])",
    # loss, (m, log S) and RowStats' logsumexp, log_prob, entropy, prediction, confidence, rank.
    f"softmax_stats({_COMMON}) -> ({', '.join(['Tensor'] * 8)})",
    # `saved` may be empty: the row statistics are then computed again.
    f"softmax_loss_backward({_UPSTREAM}, {_COMMON}, Tensor saved, int needs) -> Tensor[]",
)
_OF_GPUS = (
    # Factors are what "mean" makes of a row's terms, (1, 2), else (0, 2): labels are counted once. CUDA's have one pair
    # more where smoothing needs the sum of the class weights: twice that. They come last of what a loss with gradients
    # returns, for refresh, and lie behind the (m, log S) of rows, for the backward.
    *(schema[:-1] + ", Tensor)" if "_with_gradient" in schema else schema for schema in _OF_LOSSES),
    # Writes a gradient that was made for an upstream gradient of 1 anew, unless the device finds that it is 1.
    f"softmax_loss_refresh(Tensor grad_loss, Tensor factors, {_COMMON}, Tensor(a!) gradient) -> ()",
)
# Of linear heads (mlkernels/linear): what a tile of classes adds to what is known of its rows, and its gradient, in
# place, as statistics and gradient of backends/reference.py have them. Of numbers and params those of classes are read.
_TILE = "Tensor(a!) tile, {}Tensor label, int start, {}float[] numbers, Tensor[] params"
# The same for all classes of a weight and a chunk of rows, the products included: what is known of each row, that is
# (3 + 3 scales, rows) of M, V, W, S, T, the second moment and (2, rows) of first and above; the gradients of rows and
# classes.
_CLASSES = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? inverse, Tensor label, int offset, float[] numbers, "
    "Tensor[] params, Tensor(a!) workspace, bool kept, int[] plan"
)
# And for all rows of a loss, those that are ignored left out; workspace: how many numbers it takes.
_LINEAR = (
    "Tensor x, Tensor weight, Tensor? bias, bool normalize, Tensor target, int workspace, int[] plan, "
    "float[] numbers, Tensor[] params"
)
_OF_LINEAR = (
    (f"piece_statistics({_TILE.format('Tensor target_logit, ', 'Tensor scales, ')}, Tensor(b!) top, Tensor(c!) total, "
     "Tensor(d!)? shift, Tensor(e!)? second, Tensor(f!)? weighted, Tensor(g!)? weights, Tensor(h!) first, "
     "Tensor(i!) above) -> ()"),
    (f"piece_gradient({_TILE.format('', 'bool seen, ')}, Tensor factor, Tensor? slope, Tensor? spread, Tensor scale, "
     "Tensor top) -> ()"),
    f"linear_statistics({_CLASSES}, Tensor target_logit, Tensor scales, int classes, int want) -> (Tensor, Tensor)",
    (f"linear_gradient({_CLASSES}, Tensor factor, Tensor? slope, Tensor? spread, Tensor target, Tensor scale, "
     "Tensor top, Tensor(b!)? dx, Tensor(c!)? dw, Tensor(d!)? db, bool first, bool last) -> ()"),
    # Both, and the finish between them, of a linear head: the loss, and for an upstream of 1 the gradients that `needs`
    # asks for, of parameters by the bits of their slots, then of x, weight and bias.
    f"linear_loss_with_gradients({_LINEAR}, int needs) -> (Tensor, Tensor[])",
    # The same gradients made later: the loss, what is known of each row, that is (numbers, rows) of f_y, u_y and the
    # reals of above, and RowStats where wanted; then the gradients for any upstream ones.
    f"linear_rows({_LINEAR}, bool stats) -> (Tensor, Tensor, Tensor[])",
    f"linear_rows_backward({_LINEAR}, Tensor saved, {_UPSTREAM}, int needs) -> Tensor[]",
    # From there to what backends/finish.py's Finished holds, (5, rows); with `derive` also to the coefficients of the
    # gradient, (6, rows), and for whatever `needs` asks, given the upstream gradients of what is finished.
    ("row_finish(Tensor target, Tensor target_logit, Tensor top, Tensor total, Tensor? shift, Tensor? second, "
     "Tensor? weighted, float[] numbers, Tensor[] params, int classes, Tensor? by_class, Tensor? by_row, "
     "Tensor? logsumexp, Tensor? log_prob, Tensor? entropy, bool derive, int needs) -> (Tensor, Tensor, Tensor[])"),
    "buffer_like(Tensor like, int[] sizes) -> Tensor",
    # Each dst from the src at its place, bit for bit; with a flag (one boolean) only where the device finds it true.
    "multi_copy_(Tensor(a!)[] dst, Tensor[] src, Tensor? flag=None) -> ()",
)  # fmt: skip
#: By the library that they are defined in. What C++ implements: those of linear/graph.py are Python's own.
SCHEMAS = {"mlkernels": (*_OF_LOSSES, *_OF_LINEAR), "mlkernels_cuda": _OF_GPUS, "mlkernels_triton": _OF_GPUS}

#: What Python tells the fast path (fast_path.py, and a linear head's `plain`), as PyArg_ParseTuple reads it.
FORMATS = {"DESCRIBED": "ippddd", "RESOLVED": "OO!LppO!", "SET_UP": "KO!O!OOO", "LINEAR": "OOOO", "PLAIN": "OOOpp"}


def signature() -> str:
    """What a library that was built from this says of itself."""
    schemas = (f"{library}::{schema}" for library, each in SCHEMAS.items() for schema in each)
    return f"{zlib.crc32(repr([*schemas, FORMATS]).encode()):08x}"


def header() -> str:
    """``csrc/schemas.h``."""
    formats = "\n".join(f'constexpr char {name}[] = "{format}";' for name, format in FORMATS.items())
    return (
        "// Written by csrc/build.py from mlkernels/schemas.py, where it is changed.\n#pragma once\n\n"
        f"namespace mlkernels {{\n\n// What Python tells the fast path, as PyArg_ParseTuple reads it.\n{formats}\n\n"
        "// Of this and of the operators' schemas: a library says of which they are.\n"
        f'constexpr char SCHEMAS[] = "{signature()}";\n\n'
        "}  // namespace mlkernels\n"
    )
