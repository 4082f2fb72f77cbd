"""``python -m bench.limits``: the CPU against its limits, every loss of the family, in fresh processes.

*Small* calls, loss and ``backward()``, against ``F.cross_entropy`` by turns in one process: numbers as numbers, as
tensors, and trained. *Large* ones against a copy into memory that was written before, and against the same steps in
processes whose allocator is made to keep its memory (``mallopt``, without our own buffers). Small *linear* heads
against the chain written out. A verdict per target on the worst process; about twelve minutes on two cores. ``--parts
small --processes 1 --seconds 5`` is the table alone.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mlkernels
from mlkernels import Affine, Margin, Modulated, Truncated, TwoScale

from . import small_linear
from .cases import Problem, make_inputs
from .measure import BURST, Step, announce, cpu_clock, in_fresh_process, take_turns, training_step
from .options import names_of
from .report import Outcome, describe, markdown, write_json

BASE = "F.cross_entropy"
FORMS = ("numbers", "tensors", "trained")
SMALL = ((128, 10), (128, 100), (64, 1000), (256, 1000))
#: At least so many times as fast as ``F.cross_entropy``: numbers and, of small calls, tensors and what is trained.
WANTED = dict.fromkeys(SMALL[:3], (1.0, 0.8)) | {SMALL[3]: (2.6, 0.8)}
OF_NUMBERS = 1.3  # what a step with tensors may take of that with numbers
#: 8 MB to 1 GB of logits.
LARGE = [
    *(Problem(shape, "float32") for shape in ((512, 4096), (2048, 4096), (1024, 32000), (2048, 131072))),
    *(Problem(shape, "bfloat16") for shape in ((1024, 4096), (1024, 8000), (2048, 32000), (4096, 131072))),
]
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


def _step(member: Member, form: str, input: Tensor, target: Tensor) -> Step:
    """A loss's in a form."""
    train = form == "trained"
    tensors = {name: torch.tensor(number, requires_grad=train) for name, number in member.numbers.items()}
    tables = {name: table.clone().requires_grad_(train) for name, table in member.tables.items()}
    numbers = member.numbers if form == "numbers" else tensors
    leaves = [*tensors.values(), *tables.values()] if train else []
    return training_step(member.of(**numbers, **tables), (input, target), (input, *leaves))


def _plain(problem: Problem) -> tuple[dict[bool, Tensor], Tensor]:
    """Logits, or cosines, and labels."""
    inputs = {cosines: make_inputs(problem, cosines, torch.device("cpu")) for cosines in (False, True)}
    return {cosines: one.leaves[0] for cosines, one in inputs.items()}, inputs[False].target


Found = dict[str, dict[str, float]]  # by problem, by loss and form: seconds


def _best(steps: dict[str, Step], seconds: float) -> dict[str, float]:
    """Of bursts by turns the fastest."""
    return {name: timing.best for name, timing in take_turns(steps, seconds, torch.device("cpu"), BURST).items()}


def small(seconds: float) -> Found:
    """Small calls, everybody by turns."""
    found: Found = {}
    for shape in SMALL:
        problem = Problem(shape, "float32")
        logits, target = _plain(problem)
        steps = {BASE: training_step(F.cross_entropy, (logits[False], target), (logits[False],))}
        for (name, member), form in itertools.product(family().items(), FORMS):
            steps[f"{name}: {form}"] = _step(member, form, logits[member.cosines], target)
        found[str(problem)] = _best(steps, seconds)
    return found


def linear(seconds: float) -> Found:
    """Small linear heads, ours and the chain written out by turns."""
    return {"×".join(map(str, shape)): _best(small_linear.steps(shape), seconds) for shape in small_linear.SHAPES}


def large(seconds: float) -> Found:
    """Large calls with numbers, and a copy; the medians of turns."""
    found: Found = {}
    for problem in LARGE:
        logits, target = _plain(problem)
        source = logits[False].detach()
        to = torch.zeros_like(source)
        steps: dict[str, Step] = {"copy": functools.partial(to.copy_, source)}
        for name, member in family().items():
            steps[name] = _step(member, "numbers", logits[member.cosines], target)
        timings = take_turns(steps, seconds, torch.device("cpu"))
        found[str(problem)] = {name: timing.median for name, timing in timings.items()}
    return found


def kept(seconds: float) -> Found:
    """The same where glibc keeps what is freed: no mapping of its own for anything large, and nothing given back."""
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max = -1, -4
    if not (mallopt(mmap_max, 0) and mallopt(trim_threshold, -1)):
        raise RuntimeError("mallopt refuses")
    return large(seconds)


PARTS = {"small": small, "large": large, "kept": kept, "linear": linear}
CHOICES = ["small", "large", "linear"]  # large takes kept along


def _alone(part: str, seconds: float, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    begin = cpu_clock()
    found = PARTS[part](seconds)
    return {"part": part, "found": found, **begin.load()._asdict()}


# ---- verdicts --------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """A target of many: the worst of their outcomes, whose it is, and how many of how many miss it."""

    outcome: Outcome
    where: str
    missed: int
    of: int

    def __str__(self) -> str:
        state = f"MISSED by {self.missed} of {self.of}" if self.missed else "reached"
        what, value, bound, at_least = self.outcome
        return f"{what} {'>=' if at_least else '<='} {bound}: {state}; worst {value:.2f} ({self.where})"


def _verdict(what: str, ratios: Mapping[str, float], bound: float, at_least: bool = False) -> Verdict:
    outcomes = {name: Outcome(what, ratio, bound, at_least) for name, ratio in ratios.items()}
    where = max(outcomes, key=lambda name: outcomes[name].missed_by)
    return Verdict(outcomes[where], where, sum(not one.reached for one in outcomes.values()), len(outcomes))


def _ratios(runs: Sequence[Found], problem: str, others: Mapping[str, str]) -> dict[str, list[float]]:
    """How many times as long as another a step takes, in each process."""
    return {name: [run[problem][name] / run[problem][other] for run in runs] for name, other in others.items()}


def _of_chain(runs: Sequence[Found]) -> dict[str, dict[str, list[float]]]:
    """By linear head and step, ours over the chain written out."""
    return {
        problem: _ratios(runs, problem, {name: f"{name}: eager" for name in found if not name.endswith(": eager")})
        for problem, found in (runs[0].items() if runs else ())
    }


def _worst(runs: Sequence[Found], problem: str, form: str, other: str) -> dict[str, float]:
    """By loss and form, how many times as long as the other a form takes, where it is the most."""
    losses = {name: name.removesuffix(f": {form}") for name in runs[0][problem] if name.endswith(f": {form}")}
    each = _ratios(runs, problem, {name: other.format(loss) for name, loss in losses.items()})
    return {name: max(ratios) for name, ratios in each.items()}


def verdicts(processes: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Every target that was measured, on the worst process of each loss."""
    by_part = {part: [one["found"] for one in processes if one["part"] == part] for part in PARTS}
    found = []
    for problem, ratios in _of_chain(by_part["linear"]).items():
        worst = {name: max(each) for name, each in ratios.items()}
        found.append(_verdict(f"{problem}, linear: of the chain written out", worst, 1.0))
    runs = by_part["small"]
    for shape in SMALL if runs else ():
        problem = str(Problem(shape, "float32"))
        for form in FORMS:
            speed = {name.rpartition(":")[0]: 1 / ratio for name, ratio in _worst(runs, problem, form, BASE).items()}
            least = WANTED[shape][form != "numbers"]
            found.append(_verdict(f"{problem}, {form}: times as fast as {BASE}", speed, least, True))
        cost = [_worst(runs, problem, form, "{}: numbers") for form in FORMS[1:]]
        found.append(_verdict(f"{problem}, tensors and trained: of numbers", cost[0] | cost[1], OF_NUMBERS))
    cache = last_cache()
    for one in LARGE if by_part["large"] else ():
        problem = str(one)
        copied = dict.fromkeys(by_part["large"][0][problem].keys() - {"copy"}, "copy")
        of_copy = {name: max(each) for name, each in _ratios(by_part["large"], problem, copied).items()}
        if by_part["kept"]:
            if_kept = _ratios(by_part["kept"], problem, copied)
            of_kept = {name: ratio / statistics.median(if_kept[name]) for name, ratio in of_copy.items()}
            found.append(_verdict(f"{problem}: of a step whose memory is kept", of_kept, OF_KEPT))
        if one.dtype == "float32" and one.nbytes > cache:
            found.append(_verdict(f"{problem}: of a warm copy", of_copy, OF_COPY))
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
    for name in runs[0][problems[0]]:
        best = [min(run[problem][name] for run in runs) for problem in problems]
        ratios = [max(_ratios(runs, problem, {name: BASE})[name]) for problem in problems]
        cells = [f"{1e6 * one:9.1f} ({1 / ratio:.2f})".rjust(18) for one, ratio in zip(best, ratios, strict=True)]
        lines.append(f"{name:36}" + "".join(cells))
    return "\n".join(lines)


def table_of_linear(runs: Sequence[Found]) -> str:
    """As docs/heads.md has it: of the chain written out, the median of the processes."""
    found = _of_chain(runs)
    medians = {name: [statistics.median(each[name]) for each in found.values()] for name in next(iter(found.values()))}
    rows = ([name, *(f"{one:.2f}".removeprefix("0") for one in cells)] for name, cells in medians.items())
    return "\n".join(markdown(["N, D, C", *found], rows))


def text(processes: Sequence[dict[str, Any]]) -> str:
    """All of it, to be read."""
    by_part = {part: [one["found"] for one in processes if one["part"] == part] for part in PARTS}
    parts = [make(by_part[part]) for part, make in (("small", table), ("linear", table_of_linear)) if by_part[part]]
    parts += map(str, verdicts(processes))
    busy = max(one["others_busy"] for one in processes)
    if busy > 0.1:
        parts.append(f"NOT QUIET: others kept {busy:.1f} CPUs busy")
    return "\n".join(parts)


def main(given: Sequence[str] | None = None) -> int:
    """Measures, prints, writes; 0 where every target was reached."""
    parser = argparse.ArgumentParser(prog="python -m bench.limits", description=__doc__)
    parser.add_argument("--parts", type=names_of(CHOICES), default=CHOICES, help=f"{','.join(CHOICES)}; default all")
    parser.add_argument("--processes", type=int, default=4, help="fresh ones of each part")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each problem of a process")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="where JSON goes; default: nowhere")
    options = parser.parse_args(given)
    started = time.time()
    jobs = []
    for index in range(options.processes):
        jobs += [part for part in CHOICES if part in options.parts]
        jobs += ["kept"] * ("large" in options.parts and index % 2 == 0)
    processes: list[dict[str, Any]] = []
    for part in jobs:
        announce(started, f"{part}, process {len(processes) + 1} of {len(jobs)}")
        os.environ["MLKERNELS_CPU_BUFFERS"] = "0" if part == "kept" else "1"
        processes.append(in_fresh_process(_alone, part, options.seconds, options.threads))
    print(text(processes))
    if options.out is not None:
        header = {"command": "python -m bench.limits", **describe(torch.device("cpu"), ["cpu"])}
        content = header | {"threads": options.threads, "processes": processes}
        print(f"wrote {write_json(content, options.out, 'limits-')}")
    return int(any(one.missed for one in verdicts(processes)))


if __name__ == "__main__":
    sys.exit(main())
