"""What the adapters have in common: each launch is run, counted, and seeded anew."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from . import Counts, Fault, Kernel, Memory


class Launches:
    """Runs launches, and keeps count."""

    def __init__(self) -> None:
        #: MLKERNELS_VGPU_FLAGS: a sum of the flags in tools/vgpu/__init__.py.
        self.flags = int(os.environ.get("MLKERNELS_VGPU_FLAGS", "0"))
        self.seed = 0
        self.most_steps = 3_000_000_000
        self.by_name: collections.Counter[str] = collections.Counter()
        #: What was launched: one for each way that a kernel was compiled.
        self.kernels: set[Kernel] = set()
        self.warnings: collections.Counter[str] = collections.Counter()
        self.total = Counts(*[0] * len(Counts._fields))

    def run(
        self, name: str, kernel: Kernel, parameters: bytes, *, grid: Sequence[int], threads: Sequence[int],
        memory: Memory, cluster: int = 1, dynamic_shared: int = 0,
    ) -> None:  # fmt: skip
        self.seed += 1
        self.by_name[name] += 1
        self.kernels.add(kernel)
        try:
            counts = kernel.run(
                parameters, grid=grid, threads=threads, memory=memory, cluster=cluster, dynamic_shared=dynamic_shared,
                seed=self.seed, flags=self.flags, most_steps=self.most_steps,
            )  # fmt: skip
        except Fault as fault:
            where = f"grid {tuple(grid)}, {threads[0]} threads, clusters of {cluster}, seed {self.seed}"
            raise Fault(f"{name} ({where}): {fault}") from None
        self.total = Counts(*map(sum, zip(self.total, counts, strict=True)))
        self.warnings.update(f"{name}: {warning.split(' ', 1)[1]}" for warning in kernel.warnings)


launches = Launches()


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, or the largest integer, until something is written to them."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled
