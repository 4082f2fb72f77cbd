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
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mlkernels
from mlkernels.ops import multi_copy_

from .gpu_report import (
    DTYPES,
    LOSSES,
    MODES,
    OURS,
    Copies,
    Half,
    Problem,
    Report,
    Row,
    Small,
    floor_bytes,
    picture,
    text,
    write_json,
)
from .measure import Step, take_turns
from .peers import LossFunction, losses
from .run import describe

COSINES = frozenset({"arcface", "piecewise"})
#: What people have most of comes first: a run that is cut off has kept it.
FIRST = ["1000", "8192", "32768", "50257", "128256", "10", "seg"]
CLASSES = [1000, 8192, 32768, 50257, 128256, 10, 4096, 16384, 128255, 262144, 256, 2, 100]
SEGMENTATION = (8, 19, 1024, 2048)
SMALL = [(128, 10), (128, 100), (256, 1000)]
CASES = [*FIRST, "small", "copies", "fp16", *(str(c) for c in CLASSES if str(c) not in FIRST)]
QUICK = ["1000", "8192", "32768", "128256", "10", "seg", "small", "copies", "fp16"]
# Where the peers run too; at C = 10 eager sums millions of row losses with a single thread block.
PEERS_AT = {("bfloat16", classes) for classes in (1000, 8192, 32768, 50257, 128256)} | {("float32", 8192)}
COMPILED_AT = {("bfloat16", 8192), ("bfloat16", 128256)}

LOSS_SCALE = 65536.0
# A model of about 100M parameters and its Adam: 1,000 tensors, the smallest of one number.
STATE_WIDTHS = range(280, 1405, 9)

BUDGET = 172.0  # seconds for the whole run, unless told; what does not fit is skipped, and said to be
COMPILING = 80.0  # of them, for the kernels
SECONDS = 0.8  # for a problem, all its candidates together
ELEMENTS, COPIED = 2**30, 2**31  # of a problem's logits; bytes of the copy


# ---- what is measured ------------------------------------------------------------------------------------------------


def usable() -> list[str]:
    """Our backends that run here."""
    available = mlkernels.available_backends()
    return [name for name in OURS if available[name] is None]


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


def problem_name(problem: Problem) -> str:
    """Its name among the cases."""
    return "seg" if len(problem.shape) > 2 else str(problem.classes)


def input_sets(problem: Problem, cache: int) -> int:
    """How many sets of inputs to rotate over, so that none is left in a cache of so many bytes."""
    return max(1, min(64, math.ceil(4 * cache / problem.nbytes)))


def ours(device: torch.device, by: str | None) -> dict[str, Callable[..., Tensor]]:
    """A backend's losses as functions of input, target and reduction, with the numbers of their peers."""
    return {name: functools.partial(loss.ours, backend=by) for name, loss in losses(device).items() if name in LOSSES}


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


def quack() -> LossFunction | None:
    """quack's cross entropy, where it is installed."""
    try:
        from quack.cross_entropy import cross_entropy
    except ImportError:
        return None
    # Named, for early versions return the row losses.
    return functools.partial(cross_entropy, reduction="mean")


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


def captured(job: Callable[[], object]) -> Step:
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
    return graph.replay


def graphed(function: LossFunction, input: Tensor, target: Tensor) -> Callable[[], tuple[Tensor | None, Tensor]]:
    """Replays forward and backward from a CUDA graph; the gradient lies in the graph's own memory."""
    leaf = input.detach().clone().requires_grad_()

    def job() -> None:
        leaf.grad = None
        function(leaf, target).backward()

    play = captured(job)

    def replay() -> tuple[Tensor | None, Tensor]:
        # What the graph reads and writes lives as long as this does.
        play()
        return leaf.grad, target

    return replay


# ---- compiling ahead -------------------------------------------------------------------------------------------------

# One loss per specialisation of the kernels; the rest are served by the first's.
SPECIALISED = [("cross_entropy", "two_scale"), ("piecewise",)]


def few_rows(problem: Problem) -> Problem:
    """The same with so few rows that many fit the device at once, and the kernels that the many rows need.

    Few labels are counted where they are needed, more of them before. Should that rule change, kernels are compiled
    later, one by one: slower, but not timed either.
    """
    from mlkernels.backends.triton import launch

    if len(problem.shape) > 2:
        return problem
    return problem._replace(shape=(min(4 * launch._FEW, problem.rows), problem.classes))


def visit(problem: Problem, names: Iterable[str], kind: str, by: str | None, modes: Sequence[str] = MODES) -> None:
    """Each mode of a backend's losses once."""
    device = torch.device(kind)
    functions = ours(device, by)
    for name in names:
        sets = [make_inputs(problem, name in COSINES, device)]
        for mode in modes:
            our_step(functions[name], mode, sets)()
    if kind == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def specialised(wanted: Iterable[Problem], names: Sequence[str], kind: str) -> list[Step]:
    """What to run so that Triton's kernels of these problems are compiled, a few by each, so that processes share."""
    groups = [[name for name in group if name in names] for group in SPECIALISED]
    return [
        functools.partial(visit, problem, group, kind, "triton", [mode])
        for problem in wanted
        for group in groups
        if group
        for mode in MODES
    ]


def compile_ahead(work: Sequence[Step], seconds: float, say: Callable[[str], None]) -> None:
    """Fills Triton's cache on disk from many processes; one alone would compile for ten minutes."""
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


# ---- measuring -------------------------------------------------------------------------------------------------------


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


def candidates(
    problem: Problem, names: Sequence[str], backends: Sequence[str], sets: dict[bool, list[Inputs]]
) -> dict[str, Step]:
    """The steps of a problem by loss, mode, and backend or peer."""
    device = sets[False][0].input.device
    steps: dict[str, Step] = {}
    at = (problem.dtype, problem.classes)
    for by in backends:
        functions = ours(device, by)
        for name, mode in itertools.product(names, MODES):
            steps[f"{name} {mode} {by}"] = our_step(functions[name], mode, sets[name in COSINES])
    if at in PEERS_AT or len(problem.shape) > 2:
        eager = losses(device)
        for name in names:
            steps[f"{name} single eager"] = peer_step(eager[name].eager, sets[name in COSINES])
    if "cross_entropy" in names and at in PEERS_AT:
        own = sets[False]
        steps["cross_entropy single poly1"] = peer_step(poly1, own)
        if (peer := liger()) is not None:
            destroyed = [one._replace(input=one.input.detach().clone().requires_grad_()) for one in own]
            steps["cross_entropy single liger"] = peer_step(peer, destroyed)
        if problem.classes % 8 == 0 and (peer := quack()) is not None:  # others are not among its own tests
            steps["cross_entropy single quack"] = peer_step(peer, own)
        if at in COMPILED_AT:
            compiled = torch.compile(F.cross_entropy, fullgraph=True, dynamic=False)
            steps["cross_entropy single compile"] = peer_step(compiled, own)
    return steps


class Plan(NamedTuple):
    """What is measured, with what, and for how long."""

    device: torch.device
    backends: Sequence[str]
    names: Sequence[str]  # of losses
    seconds: float  # for a problem
    wanted: Sequence[Problem] = ()
    small: Sequence[Problem] = ()
    half: Sequence[Problem] = ()
    widths: Sequence[int] = ()  # of the training state's layers; none: it is left out
    copy_bytes: int = COPIED


def measure_problem(problem: Problem, plan: Plan, copied: tuple[Tensor, Tensor], report: Report) -> None:
    """All modes, backends and peers of one problem, in turns with the copy."""
    device = plan.device
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    count = input_sets(problem, cache)
    sets = {kind: [make_inputs(problem, kind, device) for _ in range(count)] for kind in (False, True)}
    steps = sound(candidates(problem, plan.names, plan.backends, sets), str(problem), report)
    steps["copy"] = functools.partial(copied[0].copy_, copied[1])
    timings = take_turns(steps, plan.seconds, device)
    bandwidth = 2 * copied[0].nbytes / timings.pop("copy").median
    report.copies.append(bandwidth)
    for key, timing in timings.items():
        loss, mode, by = key.split()
        fraction = floor_bytes(problem, mode) / timing.median / bandwidth
        report.rows.append(Row(problem, loss, mode, by, timing, fraction))


def measure_small(problem: Problem, plan: Plan, report: Report) -> None:
    """Forward and backward of a problem that is all launches. Not rotated: logits that small come from the cache."""
    steps: dict[str, Step] = {}
    chosen = [(name, by, function) for by in plan.backends for name, function in ours(plan.device, by).items()]
    chosen = [one for one in chosen if one[0] in plan.names] + [("cross_entropy", "eager", F.cross_entropy)]
    for name, by, function in chosen:
        one = make_inputs(problem, name in COSINES, plan.device)
        key, plain = f"{name} {by}", our_step(function, "single", [one])

        def capture(key: str = key, function: LossFunction = function, one: Inputs = one) -> None:
            steps[f"{key} graph"] = graphed(function, one.input, one.target)

        if attempt(f"{problem}, {key}", plain, report):
            steps[f"{key} plain"] = plain
            if plan.device.type == "cuda":
                attempt(f"{problem}, {key} in a CUDA graph", capture, report)
    timings = {key: timing.median for key, timing in take_turns(steps, plan.seconds, plan.device).items()}
    for name, by, _ in chosen:
        if (plain_time := timings.get(f"{name} {by} plain")) is not None:
            report.small.append(Small(problem, name, by, timings.get(f"{name} {by} graph"), plain_time))


def measure_half(problem: Problem, plan: Plan, report: Report) -> None:
    """Gradients of a float16 mean under a loss scale, beside those of its row losses, each against float64."""
    exact_losses = ours(plan.device, "reference")
    for name, by in itertools.product(plan.names, plan.backends):
        function = ours(plan.device, by)[name]
        one = make_inputs(problem, name in COSINES, plan.device)
        exact = one.input.detach().double().requires_grad_()
        tables = {
            key: value.double() for key, value in exact_losses[name].keywords.items() if isinstance(value, Tensor)
        }
        exact_losses[name](exact, one.target, **tables).backward()
        scaled = one.input.detach().clone().requires_grad_()
        (function(scaled, one.target) * LOSS_SCALE).backward()
        split = one.input.detach().clone().requires_grad_()
        upstream = torch.full_like(one.upstream, LOSS_SCALE / problem.rows)
        function(split, one.target, reduction="none").backward(upstream)
        assert exact.grad is not None
        for way, leaf in (("scaled mean", scaled), ("split", split)):
            assert leaf.grad is not None
            found = leaf.grad.double() / LOSS_SCALE
            error = torch.linalg.vector_norm(found - exact.grad) / torch.linalg.vector_norm(exact.grad)
            # What float16 cannot hold even when scaled is zero on either way.
            lost = (found == 0) & (exact.grad.abs() * LOSS_SCALE > 6e-8)
            report.half.append(Half(name, by, way, error.item(), lost.double().mean().item()))


def training_state(widths: Sequence[int], device: torch.device) -> list[Tensor]:
    """Square layers with biases and what Adam keeps of each parameter: the parameter, two averages, its step."""
    parameters = [torch.zeros(shape, device=device) for width in widths for shape in ((width, width), (width,))]
    averages = [torch.zeros_like(parameter) for parameter in parameters for _ in range(2)]
    return [*parameters, *averages, *(torch.zeros((), device=device) for _ in parameters)]


def measure_state(plan: Plan, copied: tuple[Tensor, Tensor], report: Report) -> None:
    """A training state saved, restored, and not restored because a flag on the device says so."""
    device = plan.device
    live, twins = training_state(plan.widths, device), training_state(plan.widths, device)
    yes, no = torch.ones((), dtype=torch.bool, device=device), torch.zeros((), dtype=torch.bool, device=device)
    jobs: dict[str, Step] = {
        "save multi_copy_": lambda: multi_copy_(twins, live),
        "restore multi_copy_": lambda: multi_copy_(live, twins, yes),
        "refused multi_copy_": lambda: multi_copy_(live, twins, no),
        "save _foreach_copy_": lambda: torch._foreach_copy_(twins, live),
    }
    steps = sound({f"{key} plain": job for key, job in jobs.items()}, "training state", report)
    if device.type == "cuda":
        for key, job in jobs.items():

            def capture(key: str = key, job: Step = job) -> None:
                steps[f"{key} graph"] = captured(job)

            attempt(f"training state, {key} in a CUDA graph", capture, report)
    steps["copy"] = functools.partial(copied[0].copy_, copied[1])
    timings = {key: timing.median for key, timing in take_turns(steps, plan.seconds, device).items()}
    bandwidth = 2 * copied[0].nbytes / timings["copy"]
    nbytes = sum(tensor.nbytes for tensor in live)
    for key in jobs:
        if (plain := timings.get(f"{key} plain")) is not None:
            what, by = key.split()
            graph = timings.get(f"{key} graph")
            report.states.append(Copies(what, by, nbytes, len(live), graph, plain, bandwidth))


def measure(
    plan: Plan, report: Report, deadline: float, save: Callable[[], object], say: Callable[[str], None]
) -> None:
    """Everything, saved after each problem; what the deadline (of ``time.perf_counter``) forbids is skipped."""
    copied = tuple(torch.zeros(plan.copy_bytes, dtype=torch.uint8, device=plan.device) for _ in range(2))

    def of(problem: Problem) -> tuple[str, Step]:
        return str(problem), functools.partial(measure_problem, problem, plan, copied, report)

    # The most valuable first: what the deadline cuts off is the end.
    first = [problem for problem in plan.wanted if problem.dtype == DTYPES[0] and problem_name(problem) in FIRST]
    jobs = [of(problem) for problem in first]
    jobs += [(f"{problem}, small", functools.partial(measure_small, problem, plan, report)) for problem in plan.small]
    if plan.widths:
        jobs.append(("training state", functools.partial(measure_state, plan, copied, report)))
    jobs += [
        (f"{problem}, loss scale", functools.partial(measure_half, problem, plan, report)) for problem in plan.half
    ]
    jobs += [of(problem) for problem in plan.wanted if problem not in first]
    for what, job in jobs:
        if time.perf_counter() > deadline:
            report.skipped.append(what)
            continue
        say(what)
        attempt(what, job, report)
        save()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
    save()


# ---- the command -----------------------------------------------------------------------------------------------------


def names_of(known: list[str]) -> Callable[[str], list[str]]:
    """An option that is a list of some of these, by comma."""

    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return text.split(",")

    return parse


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Measures the losses on a GPU.")
    parser.add_argument("--quick", action="store_true", help="the most valuable cases, an eighth of the elements")
    parser.add_argument("--compile", action="store_true", help="fills Triton's cache for the measurement, no more")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="where JSON and picture go")
    parser.add_argument(
        "--backends", type=names_of(list(OURS)), help=f"of {','.join(OURS)}; default: those that are there"
    )
    parser.add_argument("--losses", type=names_of(LOSSES), default=LOSSES, help=",".join(LOSSES))
    parser.add_argument("--seconds", type=float, default=BUDGET, help="for the whole run; default %(default)s")
    parser.add_argument("--cases", type=names_of(CASES), help=",".join(CASES))
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """Measures, prints, writes; the exit status."""
    options = _arguments(given)
    device = gpu()
    if device is None:
        print("bench.gpu: no GPU here (torch.cuda.is_available() is False)", file=sys.stderr)
        return 1
    here = usable()
    backends = [name for name in options.backends or here if name in here]
    missing = [name for name in options.backends or () if name not in here]
    for name in missing:
        print(f"bench.gpu: no backend {name!r}: {mlkernels.available_backends()[name]}", file=sys.stderr)
    started = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {what}", file=sys.stderr, flush=True)

    cases = options.cases or (QUICK if options.quick else CASES)
    plan = Plan(
        device,
        backends,
        options.losses,
        SECONDS / 2 if options.quick else SECONDS,
        problems(cases, ELEMENTS // 8 if options.quick else ELEMENTS),
        [Problem(shape, "float32") for shape in SMALL] if "small" in cases else [],
        [Problem((4096, 1000), "float16")] if "fp16" in cases else [],
        STATE_WIDTHS if "copies" in cases else (),
        COPIED,
    )
    report = Report(describe(device))
    if "triton" in backends:
        say(f"compiling the kernels of {len(plan.wanted)} problems")
        work = specialised([*plan.small, *plan.half, *map(few_rows, plan.wanted)], plan.names, device.type)
        if options.compile:
            compile_ahead(work, COMPILING, say)
            say("compiled")
            return 0
        attempt("compiling ahead", functools.partial(compile_ahead, work, COMPILING, say), report)
    measure(plan, report, started + options.seconds, lambda: write_json(report, options.out), say)
    print(text(report))
    data = write_json(report, options.out)
    print(f"wrote {data}")
    try:
        picture(report, data.with_suffix(".png"))
    except ImportError:
        print("no picture: there is no matplotlib")
    return 1 if report.failures or missing else 0


if __name__ == "__main__":
    sys.exit(main())
