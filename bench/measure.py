"""Timing that is fair on a noisy machine: the candidates take turns, so that what disturbs one disturbs all alike."""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

Step = Callable[[], object]

BLOCK = 4e-3  # seconds: long against the clock's resolution, short against the turns
WARM_UP_BELOW = 50e-3  # a step longer than this leaves nothing in a cache that its next one could find
FEWEST, MOST = 3, 300  # turns


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


class CpuClock(NamedTuple):
    """Seconds: of the wall, of this process's CPUs, of everybody's, of what the hypervisor gave to other machines."""

    wall: float
    own: float
    all: float
    stolen: float


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


def others_busy(begin: CpuClock, end: CpuClock) -> float:
    """How many CPUs other programs kept busy in between."""
    return max(0.0, (end.all - begin.all) - (end.own - begin.own)) / (end.wall - begin.wall)


def stolen(begin: CpuClock, end: CpuClock) -> float:
    """How many CPUs the hypervisor gave to other machines; nothing here can be done about those."""
    return (end.stolen - begin.stolen) / (end.wall - begin.wall)


def take_turns(steps: dict[str, Step], seconds: float, device: torch.device) -> dict[str, Timing]:
    """Times each step in about ``seconds`` for all together; every step has run at least twice before it counts."""
    cuda = device.type == "cuda"
    counts, warm_up = {}, {}
    for name, step in steps.items():
        _block(step, 1, cuda)
        once = _block(step, 1, cuda)
        counts[name] = max(1, min(1000, round(BLOCK / once)))
        warm_up[name] = once < WARM_UP_BELOW
    taken: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        stop = time.perf_counter() + seconds
        for turn in range(MOST):
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
