"""What compiled kernels execute per class: ``python -m tools.vgpu.count {triton,cuda} [target] [dtype] [classes ...]``.

Instructions of PTX, of all threads, for a mean of cross entropy: without a gradient, and with it. Two batches of
different size leave what a row costs without what a launch costs. The assembler merges and splits some of them, so
these are no instructions of the machine; and no times: latencies, bank conflicts and caches are not in them.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch

import mlkernels

from .cases import DTYPES
from .launches import launches
from .worker import prepare

CLASSES = (10, 100, 1000, 4096, 32768)
#: So many that each batch is launched as a large one is.
ELEMENTS, FEWEST_ROWS = 1 << 20, 4


def executed(backend: str, rows: int, classes: int, dtype: torch.dtype, gradient: bool) -> int:
    """The instructions of one call."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(rows, classes, generator=generator).to(dtype).requires_grad_(gradient)
    target = torch.randint(classes, (rows,), generator=generator)
    before = launches.total.steps
    loss = mlkernels.cross_entropy(input, target, backend=backend)
    if gradient:
        loss.backward()
    return launches.total.steps - before


def of(backend: str, target: str, classes: int, dtype_name: str, gradient: bool) -> float:
    """What a class of one more row costs."""
    prepare(backend, target)
    launches.flags |= 1  # races are another command's
    dtype = DTYPES[dtype_name]
    rows = max(FEWEST_ROWS, ELEMENTS // classes)
    more = executed(backend, 3 * rows, classes, dtype, gradient) - executed(backend, rows, classes, dtype, gradient)
    return more / (2 * rows * classes)


def main(backend: str, target: str = "sm_90", dtype: str = "bfloat16", *classes: str) -> int:
    torch.set_num_threads(1)
    print(f"{backend}, {target}, {dtype}: PTX instructions per class")
    print(f"{'classes':>8} {'forward':>9} {'with gradient':>14}")
    for count in map(int, classes or map(str, CLASSES)):
        forward, both = (of(backend, target, count, dtype, gradient) for gradient in (False, True))
        print(f"{count:>8} {forward:>9.1f} {both:>14.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
