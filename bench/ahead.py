"""Compiles Triton's kernels ahead of a measurement, in many processes: one alone would compile for ten minutes."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait

import torch

from .cases import Problem, make_inputs
from .measure import Step, first_line, step_of
from .peers import losses, ours

SECONDS = 80.0
#: One loss per specialisation of the kernels; the rest are served by the first's.
SPECIALISED = [("cross_entropy", "two_scale"), ("piecewise",)]


def few_rows(problem: Problem) -> Problem:
    """The same with so few rows that many fit the device at once, and the kernels that the many rows need.

    Few labels are counted where they are needed, more of them before. Should that rule change, kernels are compiled
    later, one by one: slower, but not timed either.
    """
    from mlkernels.backends.triton import arguments

    if len(problem.shape) > 2:
        return problem
    return problem._replace(shape=(min(4 * arguments._FEW, problem.rows), problem.classes))


def visit(problem: Problem, names: Iterable[str], kind: str, by: str, modes: Sequence[str]) -> None:
    """Each mode of a backend's losses once."""
    device = torch.device(kind)
    catalogue, functions = losses(device), ours(device, by)
    for name in names:
        sets = [make_inputs(problem, catalogue[name].cosines, device)]
        for mode in modes:
            step_of(functions[name], sets, mode)()
    if kind == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def specialised(wanted: Iterable[Problem], names: Sequence[str], kind: str, modes: Sequence[str]) -> list[Step]:
    """What to run so that Triton's kernels of these problems are compiled, a few by each, so that processes share."""
    groups = [[name for name in group if name in names] for group in SPECIALISED]
    return [
        functools.partial(visit, problem, group, kind, "triton", [mode])
        for problem in map(few_rows, wanted)
        if not problem.features
        for group in groups
        if group
        for mode in modes
        if mode != "graph"
    ]


def compile_ahead(work: Sequence[Step], seconds: float, say: Callable[[str], None]) -> None:
    """Fills Triton's cache on disk."""
    workers = max(1, min(15, (os.cpu_count() or 2) - 1, len(work)))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    running = [pool.submit(job) for job in work]
    done, late = wait(running, timeout=seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    errors = [error for future in done if (error := future.exception()) is not None]
    if errors:
        say(f"compiling ahead failed {len(errors)} times: {first_line(errors[0])}")
    if late:
        say(f"compiled {len(done)} of {len(work)} in time; the rest when they are needed")
        wait([future for future in late if not future.cancelled()], timeout=20)  # nobody else on the device, please
