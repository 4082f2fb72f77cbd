"""Measures problems: the candidates take turns, so that what disturbs one disturbs all alike.

A candidate first computes the problem once, beside the reference; one that fails, or computes something else, is
reported and not timed.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

import mlkernels
from mlkernels.ops import multi_copy_

from . import linear, peers
from .cases import FIRST, Inputs, Problem, input_sets, make_inputs

Step = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")

BLOCK = 4e-3  # seconds: long against the clock's resolution, short against the turns
BURST = 0.2e-3  # of small calls, whose fastest blocks count: what others on the machine do only adds
WARM_UP_BELOW = 50e-3  # a step longer than this leaves nothing in a cache that its next one could find
FEWEST, MOST = 3, 300  # turns of whole blocks


class Timing(NamedTuple):
    """Seconds per step, over the turns."""

    median: float
    best: float
    turns: int
    steps_per_turn: int


def _block(step: Step, count: int, cuda: bool) -> float:
    """Seconds per step of ``count`` steps in a row, the time to free what a step allocated included."""
    if cuda:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / count
    begin = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - begin) / count


def peak_memory(step: Step, device: torch.device) -> int | None:
    """Bytes that a step takes at most beyond what was there before it; None where the system does not say.

    On a CPU by the pages of the process, so what another library allocates counts too.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def pages(of: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(of))
        return 1024 * int(line.split()[1])

    try:
        mlkernels.empty_cache()  # or what the last steps left, here and in the heap, would count for nothing
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = pages("VmRSS")
        step()
        return max(0, pages("VmHWM") - before)
    except (OSError, StopIteration):
        return None


class Load(NamedTuple):
    """CPUs that other programs kept busy, and that the hypervisor gave to other machines: nothing mends those here."""

    others_busy: float = 0.0
    stolen: float = 0.0


class CpuClock(NamedTuple):
    """Seconds: of the wall, of this process's CPUs, of everybody's, of what the hypervisor gave to other machines."""

    wall: float
    own: float
    all: float
    stolen: float

    def load(self) -> Load:
        """Since then."""
        wall, own, everybody, stolen = (now - then for now, then in zip(cpu_clock(), self, strict=True))
        return Load(max(0.0, everybody - own) / wall, stolen / wall)


def cpu_clock() -> CpuClock:
    """Now; the last two are 0 where the system does not say."""
    try:
        # user nice system idle iowait irq softirq steal ...
        ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy, stolen = sum(ticks) - ticks[3] - ticks[4] - ticks[7], ticks[7]
        unit = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        busy, stolen, unit = 0, 0, 1
    return CpuClock(time.perf_counter(), time.process_time(), busy / unit, stolen / unit)


def take_turns(
    steps: dict[Name, Step], seconds: float, device: torch.device, block: float = BLOCK
) -> dict[Name, Timing]:
    """Times each step in about ``seconds`` for all together; every step has run at least twice before it counts."""
    cuda = device.type == "cuda"
    counts, warm_up = {}, {}
    for name, step in steps.items():
        once = _block(step, 1, cuda)
        if once < WARM_UP_BELOW:
            once = _block(step, 1, cuda)
        counts[name] = max(1, min(1000, round(block / once)))
        warm_up[name] = once < WARM_UP_BELOW
    taken: dict[Name, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        stop = time.perf_counter() + seconds
        for turn in range(round(MOST * BLOCK / block)):
            if turn >= FEWEST and time.perf_counter() >= stop:
                break
            shuffle(order)  # nobody always runs after the same neighbour
            for name in order:
                if warm_up[name]:
                    steps[name]()
                taken[name].append(_block(steps[name], counts[name], cuda))
    finally:
        gc.enable()
    return {
        name: Timing(statistics.median(times), min(times), len(times), counts[name]) for name, times in taken.items()
    }


# ---- steps -----------------------------------------------------------------------------------------------------------


def step_of(function: peers.Function, sets: Sequence[Inputs], mode: str, destroys: bool = False) -> Step:
    """One call of a function in one of the modes, with the next set of inputs."""
    turn = itertools.cycle(sets)

    def forward() -> None:
        one = next(turn)
        with torch.no_grad():
            function(*one.leaves, one.target)

    def step() -> None:
        one = next(turn)
        for leaf in one.leaves:
            leaf.grad = None  # before, not after: the memory of the last gradient is part of a training step
        function(*one.leaves, one.target).backward()

    def split() -> None:
        one = next(turn)
        for leaf in one.leaves:
            leaf.grad = None
        function(*one.leaves, one.target, reduction="none").backward(one.upstream)

    def in_place() -> None:
        one = next(turn)
        torch.autograd.grad(function(*one.leaves, one.target), one.leaves)  # .backward() would copy the gradient

    return in_place if destroys else {"forward": forward, "step": step, "split": split}[mode]


def training_step(loss: Callable[..., Tensor], inputs: Sequence[object], leaves: Sequence[Tensor]) -> Step:
    """Loss and backward, of a loss that is fast: as little around it as there is around the peer's."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(*inputs).backward()

    return step


def captured(job: Step) -> Step:
    """Replays what a job launches from a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            job()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()

    def replay() -> Step:
        graph.replay()
        return job  # what the graph reads and writes lives as long as this

    return replay


# ---- what is measured ------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """One measured thing; ``loss`` is "-" for a floor of the problem, like ``clone``."""

    problem: Problem
    loss: str
    mode: str
    by: str  # a backend of ours, or a peer


@dataclass
class Run:
    """What one process found."""

    timings: dict[Key, Timing] = field(default_factory=dict)
    bandwidth: dict[Problem, float] = field(default_factory=dict)  # of a copy, bytes per second, in the same turns
    memory: dict[Key, int] = field(default_factory=dict)  # at most, beyond inputs and gradients
    apart: dict[Key, float] = field(default_factory=dict)  # from the reference
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    load: Load = field(default_factory=Load)  # at most


class Plan(NamedTuple):
    """What is measured, with what, and for how long."""

    device: torch.device
    backends: Sequence[str]
    names: Sequence[str]  # of losses
    peers: Sequence[str]
    modes: Sequence[str]
    problems: Sequence[Problem]
    widths: Sequence[int] = ()  # of the training state's layers; none: it is left out
    patience: float = 1.0  # times as long as usual
    copy_bytes: int = 2**31  # on a GPU
    until: float = math.inf  # of time.time(): what is not begun by then is skipped
    right: frozenset[Key] | None = None  # what another process has checked and measured: the rest is left out

    def seconds(self, problem: Problem) -> float:
        """How long to measure: what the larger problems need for half a dozen turns of every candidate."""
        if self.device.type == "cuda":
            return 0.8 * self.patience
        return (5.0 if problem.elements < 1e6 else 15.0 if problem.elements < 1e7 else 28.0) * self.patience


#: A model of about 100M parameters and its Adam: 1,000 tensors, the smallest of one number.
STATE_WIDTHS = range(280, 1405, 9)


def first_line(error: BaseException | None) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def attempt(what: str, job: Callable[[], object], run: Run) -> bool:
    """Whether it ran; if not, the run says why."""
    try:
        job()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception as error:
        run.failures.append(f"{what}: {first_line(error)}")
        return False
    return True


def _checked(candidate: peers.Candidate, problem: Problem, inputs: Inputs, wanted: peers.Expected, run: Run) -> bool:
    """Whether a candidate computes the loss that it is measured at."""
    key = Key(problem, candidate.loss, "step", candidate.by)

    def check() -> None:
        own = inputs.clone() if candidate.destroys else inputs
        run.apart[key] = peers.disagreement(candidate.function, own, wanted)
        if not run.apart[key] <= peers.TOLERANCE[problem.dtype]:
            raise ValueError(f"another loss than the reference's, {run.apart[key]:.1e} apart: not timed")

    return attempt(f"{problem}, {candidate.loss} of {candidate.by}", check, run)


def _modes(problem: Problem, ours: bool, plan: Plan) -> list[str]:
    small = ("step", "graph") if plan.device.type == "cuda" else ("step",)
    wanted = small if problem.small else ("forward", "step", "split") if ours else ("step",)
    return [mode for mode in wanted if mode in plan.modes]


class Comparison(NamedTuple):
    """Who takes part in a problem, and what they are held against."""

    candidates: Sequence[peers.Candidate]
    reference: dict[str, peers.Function]
    cosines: dict[str, bool]


def comparison_of(problem: Problem, plan: Plan) -> Comparison:
    """A loss's, or a linear head's."""
    device = plan.device
    if problem.features:
        names = [name for name in plan.names if name in linear.LOSSES]
        reference = {name: linear.whole(name, device)["reference"] for name in names}
        return Comparison(linear.candidates(device, names, plan.peers), reference, dict.fromkeys(names, False))
    cosines = {name: loss.cosines for name, loss in peers.losses(device).items()}
    everybody = peers.candidates(problem, device, plan.backends, plan.names, plan.peers)
    return Comparison(everybody, dict(peers.ours(device, "reference")), cosines)


def _steps(candidate: peers.Candidate, problem: Problem, sets: list[Inputs], plan: Plan, run: Run) -> dict[Key, Step]:
    """A candidate's that run, by mode."""
    steps: dict[Key, Step] = {}
    for mode in _modes(problem, candidate.by in plan.backends, plan):
        key = Key(problem, candidate.loss, mode, candidate.by)
        what = f"{problem}, {candidate.loss} of {candidate.by}, {mode}"
        own = [one.clone() for one in sets] if candidate.destroys or mode == "graph" else sets
        step = step_of(candidate.function, own, "step" if mode == "graph" else mode, candidate.destroys)
        if not attempt(what, step, run):
            continue
        if mode == "graph":
            attempt(what, lambda key=key, step=step: steps.update({key: captured(step)}), run)
        else:
            steps[key] = step
    return steps


def _floors(problem: Problem, inputs: Inputs) -> dict[Key, Step]:
    """A linear head's three products; of logits on a CPU, their copy into fresh memory, which a gradient is."""
    if problem.features:
        return {Key(problem, "-", "step", "products"): functools.partial(linear.products, inputs)}
    (logits,) = inputs.leaves
    return {} if logits.is_cuda else {Key(problem, "-", "step", "clone"): logits.detach().clone}


def measure_problem(problem: Problem, plan: Plan, copied: tuple[Tensor, Tensor] | None, run: Run) -> None:
    """Everybody's steps of a problem, in turns with a copy; of a linear head also the memory that they take."""
    device, cuda = plan.device, plan.device.type == "cuda"
    # Logits that are small come from the cache, as they do in training.
    cache = torch.cuda.get_device_properties(device).L2_cache_size if cuda and not problem.small else 0
    sets: dict[bool, list[Inputs]] = {}
    wanted: dict[str, peers.Expected] = {}
    steps: dict[Key, Step] = {}
    comparison = comparison_of(problem, plan)
    if any(candidate.by == "compile" for candidate in comparison.candidates):
        torch._dynamo.reset()
    for candidate in comparison.candidates:
        name, kind = candidate.loss, comparison.cosines[candidate.loss]
        if kind not in sets:
            sets[kind] = [make_inputs(problem, kind, device) for _ in range(input_sets(problem, cache))]
        if plan.right is None:
            if name not in wanted:
                wanted[name] = peers.expected(comparison.reference[name], sets[kind][0], problem.classes)
            right = _checked(candidate, problem, sets[kind][0], wanted[name], run)
        else:
            right = Key(problem, name, "step", candidate.by) in plan.right
        if right:
            steps.update(_steps(candidate, problem, sets[kind], plan, run))
    wanted.clear()
    if not sets:
        return
    inputs = next(iter(sets.values()))[0]
    largest = inputs.leaves[-1].detach()
    turns = {**steps, **_floors(problem, inputs)}
    take_turns_with_copy(problem, turns, plan, copied or (torch.zeros_like(largest), largest), run)
    for key, step in steps.items() if problem.features else ():
        for leaf in inputs.leaves:
            leaf.grad = None
        if (peak := peak_memory(step, device)) is not None:
            run.memory[key] = max(0, peak - sum(leaf.nbytes for leaf in inputs.leaves))


def take_turns_with_copy(
    problem: Problem, steps: dict[Key, Step], plan: Plan, copied: tuple[Tensor, Tensor], run: Run
) -> None:
    """Times the steps of a problem, and the copy that they are compared with."""
    to, source = copied
    copy = Key(problem, "-", "step", "copy")
    begin = cpu_clock()
    timings = take_turns({**steps, copy: lambda: to.copy_(source)}, plan.seconds(problem), plan.device)
    run.load = Load(*map(max, run.load, begin.load()))
    run.bandwidth[problem] = 2 * to.nbytes / timings.pop(copy).median
    run.timings.update(timings)


def training_state(widths: Sequence[int], device: torch.device) -> list[Tensor]:
    """Square layers with biases and what Adam keeps of each parameter: the parameter, two averages, its step."""
    parameters = [torch.zeros(shape, device=device) for width in widths for shape in ((width, width), (width,))]
    averages = [torch.zeros_like(parameter) for parameter in parameters for _ in range(2)]
    return [*parameters, *averages, *(torch.zeros((), device=device) for _ in parameters)]


def measure_state(plan: Plan, copied: tuple[Tensor, Tensor] | None, run: Run) -> None:
    """A training state saved, restored, and not restored because a flag on the device says so.

    Its problem is so many tensors of their mean size.
    """
    device = plan.device
    live, twins = training_state(plan.widths, device), training_state(plan.widths, device)
    yes, no = torch.ones((), dtype=torch.bool, device=device), torch.zeros((), dtype=torch.bool, device=device)
    problem = Problem((len(live), sum(tensor.numel() for tensor in live) // len(live)), "float32")
    jobs: dict[tuple[str, str], Step] = {
        ("save", "multi_copy_"): lambda: multi_copy_(twins, live),
        ("restore", "multi_copy_"): lambda: multi_copy_(live, twins, yes),
        ("refused", "multi_copy_"): lambda: multi_copy_(live, twins, no),
        ("save", "_foreach_copy_"): lambda: torch._foreach_copy_(twins, live),
    }
    steps: dict[Key, Step] = {}
    for (what, by), job in jobs.items():
        if not attempt(f"training state, {what} by {by}", job, run):
            continue
        steps[Key(problem, what, "step", by)] = job
        if device.type == "cuda":
            key = Key(problem, what, "graph", by)
            attempt(f"{key}", lambda key=key, job=job: steps.update({key: captured(job)}), run)
    both = copied or tuple(torch.zeros(problem.elements, device=device) for _ in range(2))
    take_turns_with_copy(problem, steps, plan, both, run)


def measure(plan: Plan, run: Run, save: Callable[[Run], object], say: Callable[[str], None]) -> Run:
    """Everything, saved after each problem; what has no time left is skipped, and said to be."""
    copied = None
    if plan.device.type == "cuda":
        copied = tuple(torch.zeros(plan.copy_bytes, dtype=torch.uint8, device=plan.device) for _ in range(2))
    jobs = [(str(one), functools.partial(measure_problem, one, plan, copied, run)) for one in plan.problems]
    if plan.widths:
        # After what is most valuable: what the time cuts off is the end.
        valuable = [one for one in plan.problems if (one.dtype == "bfloat16" and one.classes in FIRST) or one.small]
        jobs.insert(len(valuable), ("training state", functools.partial(measure_state, plan, copied, run)))
    for what, job in jobs:
        if time.time() > plan.until:
            run.skipped.append(what)
            continue
        say(what)
        attempt(what, job, run)
        save(run)
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
    return run


def announce(started: float, what: str) -> None:
    """What comes next, with the seconds since."""
    print(f"[{time.time() - started:5.0f} s] {what}", file=sys.stderr, flush=True)


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """What it returns there."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _alone(plan: Plan, started: float, process: str) -> Run:
    return measure(plan, Run(), lambda run: None, lambda what: announce(started, f"{process}: {what}"))


def in_fresh_processes(plan: Plan, count: int, started: float, save: Callable[[list[Run]], object]) -> list[Run]:
    """Each measures everything, in an order of its own: a heap that lies otherwise is what users meet.

    The first one checks who computes what.
    """
    runs: list[Run] = []
    share = plan._replace(patience=plan.patience / count)
    for k in range(count):
        first = k % max(1, len(plan.problems))
        known = frozenset(key._replace(mode="step") for key in runs[0].timings) if runs else None
        turned = share._replace(problems=[*plan.problems[first:], *plan.problems[:first]], right=known)
        runs.append(in_fresh_process(_alone, turned, started, f"process {k + 1} of {count}"))
        save(runs)
    return runs
