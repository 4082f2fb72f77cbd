"""``python -m bench.limits``: the CPU against its limits, every loss of the family, in fresh processes.

*Small* calls, loss and ``backward()``, against ``F.cross_entropy`` by turns in one process: numbers as numbers, as
tensors, and trained. *Large* ones against a copy into memory that was written before, and against the same steps in
processes whose allocator is made to keep its memory (``mallopt``, without our own buffers). Small *heads* against the
chain written out. A verdict per target on the worst process; about twelve minutes on two cores. ``--parts small
--processes 1 --seconds 5`` is the table alone.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mlkernels
from mlkernels import Affine, Margin, Modulated, Truncated, TwoScale

from . import small_heads
from .cases import Problem, make_inputs
from .measure import Step, announce, cpu_clock, others_busy, stolen, take_turns
from .report import describe, write_json

PARTS = ("small", "large", "kept", "heads")
FORMS = ("numbers", "tensors", "trained")
SMALL = ((128, 10), (128, 100), (64, 1000), (256, 1000))
#: At least so many times as fast as ``F.cross_entropy``: numbers and, of small calls, tensors and what is trained.
WANTED = dict.fromkeys(SMALL[:3], (1.0, 0.8)) | {SMALL[3]: (2.6, 0.8)}
OF_NUMBERS = 1.3  # what a step with tensors may take of that with numbers
#: 8 MB to 1 GB of logits.
LARGE = {
    "float32": ((512, 4096), (2048, 4096), (1024, 32000), (2048, 131072)),
    "bfloat16": ((1024, 4096), (1024, 8000), (2048, 32000), (4096, 131072)),
}
OF_KEPT, OF_COPY = 1.1, 1.25
LAST_CACHE = 32 << 20  # bytes, where the system does not say


class Member(NamedTuple):
    """A loss of the family: ``of(**numbers, **tables)`` is a function of input and target."""

    of: Callable[..., Callable[..., Tensor]]
    numbers: dict[str, float]
    tables: Mapping[str, Tensor] = MappingProxyType({})
    cosines: bool = False


def _named(loss: Callable[..., Tensor]) -> Callable[..., Callable[..., Tensor]]:
    return functools.partial(functools.partial, loss)


def family() -> dict[str, Member]:
    """Every transform, scale and head, and those that have a name."""
    generator = torch.Generator().manual_seed(0)
    composed = functools.partial(functools.partial, mlkernels.softmax_loss)
    scaled = {"scale": 64.0}

    def tables(name: str, offset: float) -> dict[str, Tensor]:
        slope, bias = (0.1 * torch.randn(6, generator=generator) for _ in range(2))
        return {f"{name}_slope": 1 + slope, f"{name}_bias": offset + 0.2 * bias}

    def truncated(k: Any, scale: Any) -> Callable[..., Tensor]:
        return composed(head=Truncated(k), scale=scale)

    def affine(slope: Any, offset: Any, scale: Any) -> Callable[..., Tensor]:
        return composed(transform=Affine(slope=slope, offset=offset), scale=scale)

    def everything(m2: Any, m3: Any, low: Any, high: Any, **damping: Any) -> Callable[..., Tensor]:
        scale = TwoScale(low, high, eta=0.1)
        return composed(transform=Margin(m2=m2, m3=m3), scale=scale, head=Modulated(**damping))

    t, tau = tables("t", 0.0), tables("tau", 0.2)
    margin, modulated = _named(mlkernels.margin_cross_entropy), _named(mlkernels.modulated_cross_entropy)
    piecewise = _named(mlkernels.piecewise_cross_entropy)
    numbers = {"beta": 1.5, "gamma": 1.5, "alpha": 1.5, "kappa": 1.2}
    return {
        "cross_entropy": Member(_named(mlkernels.cross_entropy), {"scale": 1.7}),
        "focal": Member(_named(mlkernels.focal_loss), {"gamma": 2.0}),
        "modulated": Member(modulated, {"beta": 4.0, "gamma": 5.0, "alpha": 1.0, "kappa": 1.0}),
        "modulated, fractions": Member(modulated, {"beta": 3.0, "gamma": 0.5, "alpha": 2.0, "kappa": 0.75}),
        "truncated": Member(truncated, {"k": 0.2, "scale": 1.2}),
        "affine": Member(affine, {"slope": 1.3, "offset": -0.4, "scale": 1.5}),
        "margin": Member(margin, {"m1": 1.35, "m2": 0.2, "m3": 0.1} | scaled, cosines=True),
        "arcface": Member(_named(mlkernels.arcface_loss), {"margin": 0.5} | scaled, cosines=True),
        "cosface": Member(_named(mlkernels.cosface_loss), {"margin": 0.35} | scaled, cosines=True),
        "sphereface": Member(_named(mlkernels.sphereface_loss), {"margin": 3.5} | scaled, cosines=True),
        "two_scale": Member(_named(mlkernels.two_scale_cross_entropy), {"scale_low": 1.0, "scale_high": 4.0}),
        "piecewise t": Member(piecewise, {"scale": 32.0}, t, True),
        "piecewise tau": Member(piecewise, {"scale": 1.5}, tau),
        "piecewise": Member(piecewise, {"scale": 32.0}, t | tau, True),
        "two_scale, margin, modulated": Member(
            everything, {"m2": 0.3, "m3": 0.05, "low": 12.0, "high": 30.0} | numbers, cosines=True
        ),
    }


# ---- steps -----------------------------------------------------------------------------------------------------------


def step_of(loss: Callable[..., Tensor], input: Tensor, target: Tensor, leaves: Sequence[Tensor] = ()) -> Step:
    """Loss and backward, as a training step has them."""
    leaves = [input, *leaves]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(input, target).backward()

    return step


def _step(member: Member, form: str, input: Tensor, target: Tensor) -> Step:
    """A loss's in a form."""
    train = form == "trained"
    tensors = {name: torch.tensor(number, requires_grad=train) for name, number in member.numbers.items()}
    tables = {name: table.clone().requires_grad_(train) for name, table in member.tables.items()}
    numbers = member.numbers if form == "numbers" else tensors
    leaves = [*tensors.values(), *tables.values()] if train else []
    return step_of(member.of(**numbers, **tables), input, target, leaves)


def _plain(problem: Problem) -> tuple[dict[bool, Tensor], Tensor]:
    """Logits, or cosines, and labels."""
    inputs = {cosines: make_inputs(problem, cosines, torch.device("cpu")) for cosines in (False, True)}
    return {cosines: one.leaves[0] for cosines, one in inputs.items()}, inputs[False].target


Found = dict[str, dict[str, float]]  # by problem, by loss and form: seconds


def small(seconds: float) -> Found:
    """Small calls, everybody by turns."""
    found: Found = {}
    for shape in SMALL:
        problem = Problem(shape, "float32")
        logits, target = _plain(problem)
        steps = {"F.cross_entropy": step_of(F.cross_entropy, logits[False], target)}
        for (name, member), form in itertools.product(family().items(), FORMS):
            steps[f"{name}: {form}"] = _step(member, form, logits[member.cosines], target)
        for step in steps.values():
            for _ in range(20):
                step()
        found[str(problem)] = _best(steps, seconds)
    return found


BURST = 6


def _best(steps: dict[str, Step], seconds: float) -> dict[str, float]:
    """Of bursts by turns the fastest: what others on the machine do only adds."""
    best = dict.fromkeys(steps, math.inf)
    order = list(steps.items())
    clock = time.perf_counter
    stop = clock() + seconds
    while clock() < stop:
        order = order[1:] + order[:1]
        for name, step in order:
            step()
            begin = clock()
            for _ in range(BURST):
                step()
            best[name] = min(best[name], (clock() - begin) / BURST)
    return best


def heads(seconds: float) -> Found:
    """Small heads, ours and the chain written out by turns."""
    return {"×".join(map(str, shape)): _best(small_heads.steps(shape), seconds) for shape in small_heads.SHAPES}


def large(seconds: float, kept: bool) -> Found:
    """Large calls with numbers, and a copy; the medians of turns."""
    if kept:
        keep_memory()
    found: Found = {}
    for dtype, shapes in LARGE.items():
        for shape in shapes:
            problem = Problem(shape, dtype)
            logits, target = _plain(problem)
            source = logits[False].detach()
            to = torch.zeros_like(source)
            steps: dict[str, Step] = {"copy": functools.partial(to.copy_, source)}
            for name, member in family().items():
                steps[name] = _step(member, "numbers", logits[member.cosines], target)
            timings = take_turns(steps, seconds, torch.device("cpu"))
            found[str(problem)] = {name: timing.median for name, timing in timings.items()}
    return found


def keep_memory() -> None:
    """Has glibc keep what is freed: no mapping of its own for anything large, and nothing given back."""
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max = -1, -4
    if not (mallopt(mmap_max, 0) and mallopt(trim_threshold, -1)):
        raise RuntimeError("mallopt refuses")


def _alone(part: str, seconds: float, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    begin = cpu_clock()
    by_part = {"small": small, "heads": heads}
    found = by_part[part](seconds) if part in by_part else large(seconds, part == "kept")
    end = cpu_clock()
    return {"part": part, "found": found, "others_busy": others_busy(begin, end), "stolen": stolen(begin, end)}


# ---- verdicts --------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    target: str
    reached: bool
    worst: float
    where: str
    missed: int
    of: int


def _verdict(target: str, ratios: dict[str, float], wanted: float, at_least: bool) -> Verdict:
    where, worst = (min if at_least else max)(ratios.items(), key=lambda one: one[1])
    missed = sum(not (one >= wanted if at_least else one <= wanted) for one in ratios.values())
    return Verdict(f"{target} {'>=' if at_least else '<='} {wanted}", missed == 0, worst, where, missed, len(ratios))


def _each(runs: Sequence[Found], problem: str) -> Iterator[tuple[str, list[float]]]:
    """Each step of a problem, its seconds in each process."""
    for name in runs[0][problem]:
        yield name, [run[problem][name] for run in runs]


def verdicts(processes: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Every target that was measured, on the worst process of each loss."""
    by_part = {part: [one["found"] for one in processes if one["part"] == part] for part in PARTS}
    found = []
    for problem, ratios in (small_heads.ratios(by_part["heads"]) if by_part["heads"] else {}).items():
        worst = {name: max(each) for name, each in ratios.items()}
        found.append(_verdict(f"{problem}, heads: of the chain written out", worst, 1.0, False))
    runs = by_part["small"]
    for shape in SMALL if runs else ():
        problem = str(Problem(shape, "float32"))
        bases = [run[problem]["F.cross_entropy"] for run in runs]
        speed: dict[str, dict[str, float]] = {form: {} for form in FORMS}
        cost: dict[str, float] = {}
        for name, seconds in _each(runs, problem):
            loss, _, form = name.rpartition(": ")
            if not loss:
                continue
            speed[form][loss] = min(base / one for base, one in zip(bases, seconds, strict=True))
            if form != "numbers":
                pairs = zip(seconds, (run[problem][f"{loss}: numbers"] for run in runs), strict=True)
                cost[name] = max(one / plain for one, plain in pairs)
        wanted = WANTED[shape]
        for form in FORMS:
            least = wanted[form != "numbers"]
            found.append(_verdict(f"{problem}, {form}: times as fast as F.cross_entropy", speed[form], least, True))
        found.append(_verdict(f"{problem}, tensors and trained: of numbers", cost, OF_NUMBERS, False))
    if not by_part["large"]:
        return found
    cache = last_cache()
    for dtype, shapes in LARGE.items():
        for one in (Problem(shape, dtype) for shape in shapes):
            problem = str(one)
            copies = [run[problem]["copy"] for run in by_part["large"]]
            of_copy = {
                name: max(a / b for a, b in zip(seconds, copies, strict=True))
                for name, seconds in _each(by_part["large"], problem)
                if name != "copy"
            }
            if by_part["kept"]:
                kept = {
                    name: statistics.median(run[problem][name] / run[problem]["copy"] for run in by_part["kept"])
                    for name in of_copy
                }
                of_kept = {name: ratio / kept[name] for name, ratio in of_copy.items()}
                found.append(_verdict(f"{problem}: of a step whose memory is kept", of_kept, OF_KEPT, False))
            if dtype == "float32" and one.nbytes > cache:
                found.append(_verdict(f"{problem}: of a warm copy", of_copy, OF_COPY, False))
    return found


def last_cache() -> int:
    """Bytes of the last cache."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
    except (OSError, KeyError, ValueError):
        return LAST_CACHE


def table(runs: Sequence[Found]) -> str:
    """Small calls: microseconds of the best process, and how many times as fast as F.cross_entropy the worst one is."""
    problems = [str(Problem(shape, "float32")) for shape in SMALL]
    lines = [f"{'us (of F.cross_entropy)':36}" + "".join(f"{problem.split()[0]:>18}" for problem in problems)]

    def line(name: str) -> str:
        cells = []
        for problem in problems:
            best = min(run[problem][name] for run in runs)
            ratio = min(run[problem]["F.cross_entropy"] / run[problem][name] for run in runs)
            cells.append(f"{1e6 * best:9.1f} ({ratio:.2f})".rjust(18))
        return f"{name:36}" + "".join(cells)

    return "\n".join([*lines, *map(line, runs[0][problems[0]])])


def text(processes: Sequence[dict[str, Any]]) -> str:
    """All of it, to be read."""
    parts = []
    runs = [one["found"] for one in processes if one["part"] == "small"]
    if runs:
        parts.append(table(runs))
    heads = [one["found"] for one in processes if one["part"] == "heads"]
    if heads:
        parts.append(small_heads.table(heads))
    for one in verdicts(processes):
        state = "reached" if one.reached else f"MISSED by {one.missed} of {one.of}"
        parts.append(f"{one.target}: {state}; worst {one.worst:.2f} ({one.where})")
    busy = max(one["others_busy"] for one in processes)
    if busy > 0.1:
        parts.append(f"NOT QUIET: others kept {busy:.1f} CPUs busy")
    return "\n".join(parts)


def main(given: Sequence[str] | None = None) -> int:
    """Measures, prints, writes; 0 where every target was reached."""
    parser = argparse.ArgumentParser(prog="python -m bench.limits", description=__doc__)
    parser.add_argument("--parts", default="small,large,heads", help="small, large, heads; default all")
    parser.add_argument("--processes", type=int, default=4, help="fresh ones of each part")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each problem of a process")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="where JSON goes; default: nowhere")
    options = parser.parse_args(given)
    started = time.time()
    jobs = []
    for index in range(options.processes):
        jobs += [part for part in ("small", "large", "heads") if part in options.parts]
        jobs += ["kept"] * ("large" in options.parts and index % 2 == 0)
    processes: list[dict[str, Any]] = []
    for part in jobs:
        announce(started, f"{part}, process {len(processes) + 1} of {len(jobs)}")
        os.environ["MLKERNELS_CPU_BUFFERS"] = "0" if part == "kept" else "1"
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            processes.append(pool.submit(_alone, part, options.seconds, options.threads).result())
    print(text(processes))
    if options.out is not None:
        header = {"command": "python -m bench.limits", **describe(torch.device("cpu"), ["cpu"])}
        content = header | {"threads": options.threads, "processes": processes}
        print(f"wrote {write_json(content, options.out, 'limits-')}")
    return int(any(not one.reached for one in verdicts(processes)))


if __name__ == "__main__":
    sys.exit(main())
