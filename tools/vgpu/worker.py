"""A process in which the backends "triton" and "cuda" run PTX: for tests whose own process interprets Triton."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def prepare(backend: str, target: str) -> None:
    """Makes a backend of this process run PTX for sm_80, sm_90, ..."""
    if backend == "triton":
        from . import triton_driver

        gc.set_threshold(100_000, 50)  # of the objects that Triton's compiler makes: a tenth of its time

        triton_driver.install(target)
    else:
        from . import cuda_host

        cuda_host.install(target.removeprefix("sm_"))


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as mlkernels' launches say
    import torch

    torch.set_num_threads(1)


def check(backend: str, target: str, case: Any) -> None:
    """:func:`tools.vgpu.cases.check` in this process."""
    from . import cases

    prepare(backend, target)
    if not case.forced:
        return cases.check(case, backend)
    from . import cuda_host

    with cuda_host.forced(**dict(case.forced)):
        return cases.check(case, backend)


class Worker:
    """Runs functions of this package in a process of their own; what they raise is raised here."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_start)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._pool.submit(function, *arguments).result()

    def close(self) -> None:
        self._pool.shutdown()
