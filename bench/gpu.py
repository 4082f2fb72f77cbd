"""``python -m bench.gpu``: the kernels on a GPU, as a fraction of its copy bandwidth, beside their peers.

Bytes are counted at the floor, u being one pass over the logits: 1u forward under ``no_grad``, 2u loss and gradient of
a mean (one visit), 3u split (``reduction="none"``, then ``backward`` with an upstream gradient per row); and per row
the labels, losses, saved statistics and upstream gradients that cannot be left out. The copy takes turns with
everything else, so a device whose clock drifts slows all alike.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mlkernels

from .measure import Step, Timing, take_turns
from .peers import ANGLE, BETA, ETA, GAMMA, HIGH, LOW, PIECEWISE_SCALE, SCALE, TAU_MIN, LossFunction, losses
from .run import describe, device_name

LOSSES = ["cross_entropy", "modulated", "arcface", "two_scale", "piecewise"]
COSINES = frozenset({"arcface", "piecewise"})
MODES = ["forward", "single", "split"]
CLASSES = [256, 1000, 4096, 8192, 16384, 32768, 50257, 128256, 262144, 2, 10, 100]
SEGMENTATION = (8, 19, 1024, 2048)
DTYPES = ["bfloat16", "float32"]
SMALL = [(128, 10), (128, 100), (256, 1000)]
CASES = [*map(str, CLASSES), "seg", "small", "fp16"]
QUICK = ["1000", "32768", "128256", "small", "fp16"]
# Where the peers run too; at C = 10 eager sums millions of row losses with a single thread block.
PEERS_AT = {("bfloat16", 1000), ("bfloat16", 8192), ("bfloat16", 32768), ("bfloat16", 128256), ("float32", 8192)}
COMPILED_AT = {("bfloat16", 8192), ("bfloat16", 128256)}

LABEL, LOSS, SAVED, UPSTREAM = 8, 4, 8, 4  # bytes per row
LOSS_SCALE = 65536.0
OF_COPY = ": of copy"

BUDGET = 225.0  # seconds for the whole run; what does not fit is skipped, and said to be
COMPILING = 90.0  # of them, for the kernels
SECONDS = 0.8  # for a problem, all its candidates together
ELEMENTS, COPIED = 2**30, 2**31  # of a problem's logits; bytes of the copy


# ---- what is measured ------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """Logits of one shape, classes in dimension 1, and one dtype."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.dtype}"

    @property
    def classes(self) -> int:
        return self.shape[1]

    @property
    def rows(self) -> int:
        return math.prod(self.shape) // self.classes

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def nbytes(self) -> int:
        """u: one pass over the logits."""
        return self.rows * self.classes * self.torch_dtype.itemsize


# On chip, streamed, and classes that lie apart.
TINY = [Problem((33, 100), "bfloat16"), Problem((3, 40000), "bfloat16"), Problem((2, 19, 5, 7), "float32")]


def problems(names: Iterable[str], elements: int) -> list[Problem]:
    """The problems of about so many elements: for each number of classes and for "seg", bfloat16 first."""
    found = []
    for dtype in DTYPES:
        for name in names:
            if name.isdigit():
                # Rows in sixteens, as training has them: Triton specialises on that.
                found.append(Problem((max(1, elements // int(name) // 16) * 16, int(name)), dtype))
            elif name == "seg":
                found.append(Problem(SEGMENTATION, dtype))
    return found


def floor_bytes(problem: Problem, mode: str) -> int:
    """What has to be read and written once per direction."""
    u, rows = problem.nbytes, problem.rows
    if mode == "forward":
        return u + rows * LABEL
    if mode == "single":
        return 2 * u + rows * LABEL
    forward, backward = LABEL + LOSS + SAVED, LABEL + SAVED + UPSTREAM
    return 3 * u + rows * (forward + backward)


def input_sets(problem: Problem, cache: int) -> int:
    """How many sets of inputs to rotate over, so that none is left in a cache of so many bytes."""
    return max(1, min(64, math.ceil(4 * cache / problem.nbytes)))


def ours(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """The losses as functions of input, target and reduction, with the numbers of ``bench.peers``."""

    def table(first: float, last: float) -> Tensor:
        return torch.linspace(first, last, 6, device=device)

    return {
        "cross_entropy": mlkernels.cross_entropy,
        "modulated": functools.partial(mlkernels.modulated_cross_entropy, beta=BETA, gamma=GAMMA),
        "arcface": functools.partial(mlkernels.arcface_loss, margin=ANGLE, scale=SCALE),
        "two_scale": functools.partial(
            mlkernels.two_scale_cross_entropy, scale_low=LOW, scale_high=HIGH, eta=ETA
        ),
        "piecewise": functools.partial(
            mlkernels.piecewise_cross_entropy,
            t_slope=table(0.9, 1.1),
            t_bias=table(-0.1, 0.1),
            tau_slope=table(0.9, 1.1),
            tau_bias=table(0.15, 0.25),
            scale=PIECEWISE_SCALE,
            tau_min=TAU_MIN,
        ),
    }  # fmt: skip


def poly1(input: Tensor, target: Tensor) -> Tensor:
    """A loss of one's own: any torch function of the per-row loss."""
    nll = mlkernels.cross_entropy(input, target, reduction="none")
    return (nll + 1 - torch.exp(-nll)).mean()


def liger() -> LossFunction | None:
    """Liger-Kernel's cross entropy, where it is installed."""
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        return None
    return liger_cross_entropy


class Inputs(NamedTuple):
    """One set of inputs."""

    input: Tensor
    target: Tensor
    upstream: Tensor  # of the row losses


def make_inputs(problem: Problem, cosines: bool, device: torch.device) -> Inputs:
    """As ``bench.peers`` makes them, every other row confident, but on the device: the host would take a minute."""
    shape, dtype = problem.shape, problem.torch_dtype
    rows = (shape[0], *shape[2:])
    generator = torch.Generator(device).manual_seed(0)
    target = torch.randint(problem.classes, rows, generator=generator, device=device)
    input = torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.1 if cosines else 1.5, generator=generator)
    if cosines:
        input.clamp_(-0.6, 0.6)
    boost = torch.zeros(rows, dtype=dtype, device=device)
    boost.view(-1)[::2] = 0.35 if cosines else 8.0
    input.scatter_add_(1, target[:, None], boost[:, None])
    upstream = torch.rand(rows, generator=generator, device=device)
    return Inputs(input.requires_grad_(), target, upstream)


def gpu() -> torch.device | None:
    """The current one, if there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


# ---- steps -----------------------------------------------------------------------------------------------------------


def our_step(function: Callable[..., Tensor], mode: str, sets: Sequence[Inputs]) -> Step:
    """One call of a loss of this package in one of the modes."""
    turn = itertools.cycle(sets)

    def forward() -> None:
        with torch.no_grad():
            function(*next(turn)[:2])

    def single() -> None:
        input, target, _ = next(turn)
        input.grad = None
        function(input, target).backward()

    def split() -> None:
        input, target, upstream = next(turn)
        input.grad = None
        function(input, target, reduction="none").backward(upstream)

    return {"forward": forward, "single": single, "split": split}[mode]


def peer_step(function: LossFunction, sets: Sequence[Inputs]) -> Step:
    """A mean and its gradient; not accumulated, for Liger's gradient lies where the logits were."""
    turn = itertools.cycle(sets)

    def step() -> None:
        input, target, _ = next(turn)
        torch.autograd.grad(function(input, target), input)

    return step


def graphed(function: LossFunction, input: Tensor, target: Tensor) -> Callable[[], tuple[Tensor | None, Tensor]]:
    """Replays forward and backward from a CUDA graph; the gradient lies in the graph's own memory."""
    leaf = input.detach().clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            leaf.grad = None
            function(leaf, target).backward()
    torch.cuda.current_stream().wait_stream(side)
    leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(leaf, target).backward()

    def replay() -> tuple[Tensor | None, Tensor]:
        # What the graph reads and writes lives as long as this does.
        graph.replay()
        return leaf.grad, target

    return replay


# ---- compiling ahead -------------------------------------------------------------------------------------------------

# One loss per specialisation of the kernels; the rest are served by the first's.
SPECIALISED = [("cross_entropy", "two_scale"), ("piecewise",)]


def few_rows(problem: Problem) -> Problem:
    """The same with so few rows that many fit the device at once, and the kernels that the many rows need.

    Triton specialises on numbers that are 1 or divisible by 16, and one of them is how many partial sums of the labels'
    weights there are. Should that rule change, kernels are compiled later, one by one: slower, but not timed either.
    """
    from mlkernels.backends.triton import launch

    if len(problem.shape) > 2:
        return problem
    _, parts = launch._chunks(problem.rows)
    if parts > launch._PARTS:
        parts = math.ceil(parts / math.ceil(parts / launch._PARTS))
    rows = launch._SUM_BLOCK * (1 if parts == 1 else 2 if parts % 16 else 16)
    return problem._replace(shape=(min(rows, problem.rows), problem.classes))


def visit(problem: Problem, names: Iterable[str], kind: str) -> None:
    """Every mode of the losses once."""
    device = torch.device(kind)
    functions = ours(device)
    for name in names:
        sets = [make_inputs(problem, name in COSINES, device)]
        for mode in MODES:
            our_step(functions[name], mode, sets)()
    if kind == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def specialised(wanted: Iterable[Problem], names: Sequence[str], kind: str) -> list[Step]:
    """What to run so that the kernels of these problems are compiled."""
    groups = [[name for name in group if name in names] for group in SPECIALISED]
    return [functools.partial(visit, problem, group, kind) for problem in wanted for group in groups if group]


def compile_ahead(work: Sequence[Step], seconds: float, say: Callable[[str], None]) -> None:
    """Fills Triton's cache on disk from many processes; one alone would compile for ten minutes."""
    workers = max(1, min(12, (os.cpu_count() or 2) - 2, len(work)))
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


# ---- measuring -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One measured thing."""

    problem: Problem
    loss: str
    mode: str
    peer: str
    timing: Timing
    fraction: float  # of the copy bandwidth, at the floor's bytes


class Small(NamedTuple):
    """A small problem: seconds per forward and backward, from a CUDA graph and without one."""

    problem: Problem
    loss: str
    peer: str
    graph: float | None
    plain: float


class Half(NamedTuple):
    """Relative error of a float16 gradient against float64, and the share of its elements that are wrongly zero."""

    loss: str
    way: str
    error: float
    zeros: float


@dataclass
class Report:
    """Everything of one run."""

    header: dict[str, Any]
    copies: list[float] = field(default_factory=list)  # bytes per second, by problem
    rows: list[Row] = field(default_factory=list)
    small: list[Small] = field(default_factory=list)
    half: list[Half] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def find(self, problem: Problem, loss: str, mode: str, peer: str = "ours") -> Row | None:
        return next((row for row in self.rows if row[:4] == (problem, loss, mode, peer)), None)

    def problems(self) -> list[Problem]:
        return list(dict.fromkeys(row.problem for row in self.rows))


def first_line(error: BaseException | None) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def attempt(what: str, job: Step, report: Report) -> bool:
    """Whether it ran; if not, the report says why."""
    try:
        job()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception as error:
        report.failures.append(f"{what}: {first_line(error)}")
        return False
    return True


def sound(steps: dict[str, Step], where: str, report: Report) -> dict[str, Step]:
    """The steps that run. What is compiled at the first call is compiled here."""
    return {name: step for name, step in steps.items() if attempt(f"{where}, {name}", step, report)}


def candidates(problem: Problem, names: Sequence[str], sets: dict[bool, list[Inputs]]) -> dict[str, Step]:
    """The steps of a problem by loss, mode and peer."""
    device = sets[False][0].input.device
    functions = ours(device)
    steps: dict[str, Step] = {}
    at = (problem.dtype, problem.classes)
    for name in names:
        own = sets[name in COSINES]
        for mode in MODES:
            steps[f"{name} {mode} ours"] = our_step(functions[name], mode, own)
        if at in PEERS_AT or len(problem.shape) > 2:
            steps[f"{name} single eager"] = peer_step(losses(device)[name].eager, own)
    if "cross_entropy" in names and at in PEERS_AT:
        own = sets[False]
        steps["cross_entropy single poly1"] = peer_step(poly1, own)
        if (peer := liger()) is not None:
            destroyed = [one._replace(input=one.input.detach().clone().requires_grad_()) for one in own]
            steps["cross_entropy single liger"] = peer_step(peer, destroyed)
        if at in COMPILED_AT:
            compiled = torch.compile(F.cross_entropy, fullgraph=True, dynamic=False)
            steps["cross_entropy single compile"] = peer_step(compiled, own)
    return steps


def measure_problem(
    problem: Problem, names: Sequence[str], copied: tuple[Tensor, Tensor], seconds: float, report: Report
) -> None:
    """All modes and peers of one problem, in turns with the copy."""
    device = copied[0].device
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    count = input_sets(problem, cache)
    sets = {kind: [make_inputs(problem, kind, device) for _ in range(count)] for kind in (False, True)}
    steps = sound(candidates(problem, names, sets), str(problem), report)
    steps["copy"] = functools.partial(copied[0].copy_, copied[1])
    timings = take_turns(steps, seconds, device)
    bandwidth = 2 * copied[0].nbytes / timings.pop("copy").median
    report.copies.append(bandwidth)
    for key, timing in timings.items():
        loss, mode, peer = key.split()
        fraction = floor_bytes(problem, mode) / timing.median / bandwidth
        report.rows.append(Row(problem, loss, mode, peer, timing, fraction))


def measure_small(problem: Problem, names: Sequence[str], seconds: float, report: Report, device: torch.device) -> None:
    """Forward and backward of a problem that is all launches. Not rotated: logits that small come from the cache."""
    functions = ours(device)
    steps: dict[str, Step] = {}
    chosen = [(name, "ours", functions[name]) for name in names] + [("cross_entropy", "eager", F.cross_entropy)]
    for name, peer, function in chosen:
        one = make_inputs(problem, name in COSINES, device)
        key, plain = f"{name} {peer}", our_step(function, "single", [one])

        def capture(key: str = key, function: LossFunction = function, one: Inputs = one) -> None:
            steps[f"{key} graph"] = graphed(function, one.input, one.target)

        if attempt(f"{problem}, {key}", plain, report):
            steps[f"{key} plain"] = plain
            if device.type == "cuda":
                attempt(f"{problem}, {key} in a CUDA graph", capture, report)
    timings = {key: timing.median for key, timing in take_turns(steps, seconds, device).items()}
    for name, peer, _ in chosen:
        if (plain_time := timings.get(f"{name} {peer} plain")) is not None:
            report.small.append(Small(problem, name, peer, timings.get(f"{name} {peer} graph"), plain_time))


def measure_half(problem: Problem, names: Sequence[str], report: Report, device: torch.device) -> None:
    """Gradients of a float16 mean under a loss scale, beside those of its row losses, each against float64."""
    functions = ours(device)
    for name in names:
        one = make_inputs(problem, name in COSINES, device)
        exact = one.input.detach().double().requires_grad_()
        tables = {
            key: value.double()
            for key, value in getattr(functions[name], "keywords", {}).items()
            if isinstance(value, Tensor)
        }
        function = functools.partial(functions[name], **tables)
        function(exact, one.target, backend="reference").backward()
        scaled = one.input.detach().clone().requires_grad_()
        (functions[name](scaled, one.target) * LOSS_SCALE).backward()
        split = one.input.detach().clone().requires_grad_()
        upstream = torch.full_like(one.upstream, LOSS_SCALE / problem.rows)
        functions[name](split, one.target, reduction="none").backward(upstream)
        assert exact.grad is not None
        for way, leaf in (("scaled mean", scaled), ("split", split)):
            assert leaf.grad is not None
            found = leaf.grad.double() / LOSS_SCALE
            error = torch.linalg.vector_norm(found - exact.grad) / torch.linalg.vector_norm(exact.grad)
            # What float16 cannot hold even when scaled is zero on either way.
            lost = (found == 0) & (exact.grad.abs() * LOSS_SCALE > 6e-8)
            report.half.append(Half(name, way, error.item(), lost.double().mean().item()))


def measure(
    report: Report,
    wanted: Sequence[Problem],
    small: Sequence[Problem],
    half: Sequence[Problem],
    names: Sequence[str],
    device: torch.device,
    copy_bytes: int,
    seconds: float,
    deadline: float,
    save: Callable[[], object],
    say: Callable[[str], None],
) -> None:
    """Everything, saved after each problem; what the deadline (of ``time.perf_counter``) forbids is skipped."""
    copied = tuple(torch.zeros(copy_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    jobs: list[tuple[str, Callable[[], None]]] = [
        *(
            (f"{problem}, small", functools.partial(measure_small, problem, names, seconds, report, device))
            for problem in small
        ),
        *(
            (f"{problem}, loss scale", functools.partial(measure_half, problem, names, report, device))
            for problem in half
        ),
        *(
            (str(problem), functools.partial(measure_problem, problem, names, copied, seconds, report))
            for problem in wanted
        ),
    ]
    for what, job in jobs:
        if time.perf_counter() > deadline:
            report.skipped.append(what)
            continue
        say(what)
        attempt(what, job, report)
        save()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    save()


def smoke(device: torch.device) -> int:
    """Every loss and mode once on each of the tiny problems; how many there were."""
    for problem in TINY:
        visit(problem, LOSSES, device.type)
    return len(TINY) * len(LOSSES) * len(MODES)


# ---- targets ---------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What was asked for and what was measured."""

    what: str
    value: float
    bound: float
    at_least: bool

    @property
    def reached(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        factor = self.bound / self.value if self.at_least else self.value / self.bound
        verdict = "reached" if self.reached else f"missed by {factor:.2f}x"
        return f"{self.what:<64} {self.value:>8.3g}  {'>=' if self.at_least else '<='} {self.bound:<5g} {verdict}"


def wanted_fraction(problem: Problem, mode: str) -> float | None:
    """Of the copy bandwidth; None where nothing was asked for."""
    if problem.classes < 256:
        return 0.80
    if problem.classes <= 32768:
        return 0.90
    return 0.85 if mode == "split" and problem.classes >= 128256 else None


def check(report: Report) -> list[Outcome]:
    """The issue's targets that this run measured."""
    found = []
    for row in report.rows:
        bound = wanted_fraction(row.problem, row.mode)
        if row.peer == "ours" and row.loss in LOSSES and bound is not None:
            found.append(Outcome(f"{row.problem}, {row.loss}, {row.mode}{OF_COPY}", row.fraction, bound, True))
    for row in report.rows:
        own = report.find(row.problem, row.loss, row.mode)
        if row.peer == "ours" or own is None:
            continue
        plain = row.loss == "cross_entropy"
        bound = {"liger": 1.4, "compile": 1.2, "eager": 3.0 if plain else 8.0}.get(row.peer)
        if bound is None:
            continue
        what = f"{row.problem}, {row.loss}: {row.peer} / ours"
        found.append(Outcome(what, row.timing.median / own.timing.median, bound, True))
    found += [
        Outcome(f"{one.problem}, {one.loss}: us from a CUDA graph", one.graph * 1e6, 15, False)
        for one in report.small
        if one.peer == "ours" and one.graph is not None
    ]
    errors = {(one.loss, one.way): one.error for one in report.half}
    for (loss, way), error in errors.items():
        if way == "scaled mean" and errors.get((loss, "split")):
            ratio = error / errors[loss, "split"]
            found.append(Outcome(f"float16, {loss}: error under a loss scale / split", ratio, 1.05, False))
    return found


# ---- what comes out --------------------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """Everything, for other programs."""
    return {
        "schema": "gpu 1",
        **report.header,
        "copy_gb_s": [rate / 1e9 for rate in report.copies],
        "rows": [
            {
                "shape": row.problem.shape,
                "dtype": row.problem.dtype,
                "loss": row.loss,
                "mode": row.mode,
                "peer": row.peer,
                **row.timing._asdict(),
                "floor_bytes": floor_bytes(row.problem, row.mode),
                "of_copy": row.fraction,
            }
            for row in report.rows
        ],
        "small": [{**one._asdict(), "problem": str(one.problem)} for one in report.small],
        "half": [one._asdict() for one in report.half],
        "failures": report.failures,
        "skipped": report.skipped,
        "targets": [{**one._asdict(), "reached": one.reached} for one in check(report)],
    }


def _cell(report: Report, problem: Problem, loss: str) -> str:
    parts = []
    for mode in MODES:
        row, bound = report.find(problem, loss, mode), wanted_fraction(problem, mode)
        missed = row is not None and bound is not None and row.fraction < bound
        parts.append("-" if row is None else f"{100 * row.fraction:.0f}{'*' if missed else ''}")
    return "/".join(parts)


def _rate(rates: list[float]) -> str:
    return f"{min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} GB/s" if rates else "not measured"


def text(report: Report) -> str:
    """The table for a terminal."""
    header = report.header
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items() if version)
    commit = (header["commit"] or "no commit")[:10]
    lines = [
        f"{header['device']}, backend {header['backend']}; {versions}; {header['date']}; {commit}",
        f"copy {_rate(report.copies)}; percent of it at the floor's bytes, forward/single visit/split; * below target",
        f"{'':<24}" + "".join(f"{name:>15}" for name in LOSSES),
    ]
    lines += [
        f"{problem!s:<24}" + "".join(f"{_cell(report, problem, loss):>15}" for loss in LOSSES)
        for problem in report.problems()
    ]
    if any(row.peer != "ours" for row in report.rows):
        lines += [
            "",
            "Times as long as ours, forward + backward of a mean (poly1: a loss of one's own on our row losses):",
        ]
    for problem in report.problems():
        cells = []
        for row in report.rows:
            own = report.find(problem, row.loss, row.mode)
            if row.problem == problem and row.peer != "ours" and own is not None:
                cells.append(f"{row.loss} {row.peer} {row.timing.median / own.timing.median:.2f}x")
        if cells:
            lines.append(f"{problem!s:<24}" + ", ".join(cells))
    if report.small:
        lines += ["", "Small problems, forward + backward, us (CUDA graph / without):"]
    for problem in dict.fromkeys(one.problem for one in report.small):
        cells = [
            f"{one.loss if one.peer == 'ours' else 'F.cross_entropy'} "
            f"{'-' if one.graph is None else f'{one.graph * 1e6:.1f}'}/{one.plain * 1e6:.1f}"
            for one in report.small
            if one.problem == problem
        ]
        lines.append(f"{problem!s:<24}" + ", ".join(cells))
    if report.half:
        lines += ["", "float16 gradients against float64 (relative error, share lost to zero):"]
    lines += [f"  {one.loss:<14} {one.way:<12} {one.error:.2e}  {one.zeros:.1%}" for one in report.half]
    outcomes = check(report)
    of_copy = [one for one in outcomes if one.what.endswith(OF_COPY)]
    others = [one for one in outcomes if not one.what.endswith(OF_COPY)]
    for name, some in (("bandwidth", of_copy), ("other", others)):
        lines += ["", f"Targets, {name}: {sum(one.reached for one in some)} of {len(some)} reached"]
        missed = sorted((one for one in some if not one.reached), key=lambda one: one.value / one.bound)
        # The table marks those of the bandwidth; here are the worst.
        lines += [f"  {one}" for one in (missed[:5] if some is of_copy else missed)]
    lines += [f"FAILED: {what}" for what in report.failures]
    lines += [f"skipped, no time: {what}" for what in report.skipped]
    return "\n".join(lines)


def picture(report: Report, path: Path) -> None:
    """A panel per mode and dtype: percent of the copy bandwidth over the number of classes, a line per loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dtypes = [dtype for dtype in DTYPES if any(problem.dtype == dtype for problem in report.problems())]
    figure = Figure(figsize=(14, 0.8 + 3.6 * max(1, len(dtypes))), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(max(1, len(dtypes)), len(MODES), squeeze=False, sharey=True)
    for line, dtype in zip(grid, dtypes, strict=False):
        own = sorted((p for p in report.problems() if p.dtype == dtype), key=lambda p: (len(p.shape) > 2, p.classes))
        names = [f"{p.classes}" if len(p.shape) == 2 else f"{p.classes}\nimages" for p in own]
        for axes, mode in zip(line, MODES, strict=True):
            for loss in LOSSES:
                rows = [report.find(problem, loss, mode) for problem in own]
                heights = [math.nan if row is None else 100 * row.fraction for row in rows]
                axes.plot(range(len(own)), heights, marker="o", markersize=3, linewidth=1, label=loss.replace("_", " "))
            bounds = [100 * (wanted_fraction(problem, mode) or math.nan) for problem in own]
            axes.step(range(len(own)), bounds, where="mid", color="black", linestyle=":", linewidth=1, label="target")
            axes.set(title=f"{dtype}, {mode}", ylim=(0, 110))
            axes.set_xticks(range(len(own)), names, rotation=60)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("% of copy bandwidth")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.suptitle(
        f"{report.header['device']}: bytes at the floor over time, in percent of a copy ({_rate(report.copies)}), "
        "by number of classes",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def stem(header: dict[str, Any]) -> str:
    """The name of a run's files."""
    device = re.sub(r"[^a-z0-9]+", "-", header["device"].lower()).strip("-")
    return f"{device}-{header['date'][:19].replace(':', '')}"


def write_json(report: Report, folder: Path) -> Path:
    """Whole or not at all: a run may be stopped at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem(report.header)}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(as_json(report), indent=1) + "\n")
    part.replace(path)
    return path


# ---- the command -----------------------------------------------------------------------------------------------------


def _names(known: list[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return text.split(",")

    return parse


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Measures the losses on a GPU.")
    parser.add_argument("--quick", action="store_true", help="three numbers of classes, an eighth of the elements")
    parser.add_argument("--smoke", action="store_true", help="a few tiny launches of every loss, nothing timed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="where JSON and picture go")
    parser.add_argument("--losses", type=_names(LOSSES), default=LOSSES, help=",".join(LOSSES))
    parser.add_argument("--cases", type=_names(CASES), help=",".join(CASES))
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """Measures, prints, writes; the exit status."""
    options = _arguments(given)
    device = gpu()
    if device is None:
        print("bench.gpu: no GPU here (torch.cuda.is_available() is False)", file=sys.stderr)
        return 1
    started = time.perf_counter()
    if options.smoke:
        # The workers are not watched by a compute-sanitizer, which would slow their compiling.
        compile_ahead(specialised(TINY, LOSSES, device.type), COMPILING, print)
        print(f"smoke: {smoke(device)} steps ran on {device_name(device)}")
        return 0

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {what}", file=sys.stderr, flush=True)

    cases = options.cases or (QUICK if options.quick else CASES)
    wanted = problems(cases, ELEMENTS // 8 if options.quick else ELEMENTS)
    report = Report(describe(device))
    say(f"compiling the kernels of {len(wanted)} problems")
    small = [Problem(shape, "float32") for shape in SMALL] if "small" in cases else []
    half = [Problem((4096, 1000), "float16")] if "fp16" in cases else []
    work = specialised([*small, *half, *map(few_rows, wanted)], options.losses, device.type)
    attempt("compiling ahead", functools.partial(compile_ahead, work, COMPILING, say), report)
    measure(
        report,
        wanted,
        small,
        half,
        options.losses,
        device,
        COPIED,
        SECONDS / 2 if options.quick else SECONDS,
        started + BUDGET,
        lambda: write_json(report, options.out),
        say,
    )
    print(text(report))
    data = write_json(report, options.out)
    print(f"wrote {data}")
    try:
        picture(report, data.with_suffix(".png"))
    except ImportError:
        print("no picture: there is no matplotlib")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
