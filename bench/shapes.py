"""What is measured: shapes, dtypes, and how long each may take."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Case(NamedTuple):
    """One problem: N x C logits of one dtype."""

    rows: int
    classes: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.rows}x{self.classes} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def nbytes(self) -> int:
        """u: one pass over the logits."""
        return self.rows * self.classes * self.torch_dtype.itemsize

    @property
    def seconds(self) -> float:
        """How long to measure: what the larger problems need for half a dozen turns of every candidate."""
        elements = self.rows * self.classes
        return 5.0 if elements < 1e6 else 15.0 if elements < 1e7 else 28.0


SHAPES = [(128, 10), (128, 100), (256, 1000), (1024, 8000), (1024, 32000)]
LARGE = SHAPES[-2:]
# bfloat16 where bandwidth decides; on the small shapes it is all overhead, the same for every dtype.
CASES = [Case(*shape, "float32") for shape in SHAPES] + [Case(*shape, "bfloat16") for shape in LARGE]
QUICK = [Case(*shape, "float32") for shape in SHAPES[:1] + SHAPES[2:4]]

LOSSES = ["cross_entropy", "modulated", "focal", "arcface", "cosface", "two_scale", "piecewise"]
# The losses that the targets are about; only these are compiled everywhere, for compiling takes longer than measuring.
HEADLINE = ["cross_entropy", "modulated", "arcface"]
COMPILE_ALL = Case(1024, 8000, "float32")


def is_compiled(case: Case, loss: str) -> bool:
    """Whether torch.compile's version of this one is worth its compile time."""
    return case == COMPILE_ALL or (loss in HEADLINE and case.dtype == "float32")
