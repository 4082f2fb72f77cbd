"""``python -m bench.schedule``: what MILS adds to an iteration without an attempt, and what an attempt is made of."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import TensorDataset

import mlkernels
from mlkernels.schedule import MILS, Snapshot
from mlkernels.schedule.modes import Randomness

from .measure import Timing, cpu_clock, take_turns
from .options import gpu

BATCH, CLASSES = 128, 10


def _layers(width: int, size: int) -> nn.Module:
    """A small network of the usual parts, and a larger one."""
    if size == 1:
        return nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, CLASSES))
    blocks: list[nn.Module] = []
    for k in range(4):
        blocks += [nn.Conv2d(3 if k == 0 else width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


#: By name: the network, and the shape of one input.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "64-128-10, about 0.5 ms": (lambda: _layers(128, 1), (64,)),
    "four convolutions of 16x16x16": (lambda: _layers(16, 16), (3, 16, 16)),
}


def _measure(build: Callable[[], nn.Module], shape: tuple[int, ...], seconds: float, device: torch.device) -> str:
    x = torch.randn(4 * BATCH, *shape, device=device)
    y = torch.randint(CLASSES, (4 * BATCH,), device=device)
    hopeless = TensorDataset(x, torch.full_like(y, CLASSES))  # always a tie: as many right as before, none
    batch, target = x[:BATCH].clone(), y[:BATCH].clone()

    def make(**options: object) -> MILS:
        torch.manual_seed(0)
        model = build().to(device)
        # A learning rate of 0 does the same work, and the weights stay in a sane range for as long as it takes.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        return MILS(model, optimizer, primary=mlkernels.cross_entropy, auxiliary=mlkernels.cross_entropy,
                    observation=(hopeless, BATCH), **options)  # type: ignore[arg-type]  # fmt: skip

    ordinary, rejected = make(participation=0.0), make(participation=1.0)
    accepted = make(participation=1.0, accept="not_worse")
    # The same model with MILS and without: another one would lie elsewhere in memory, and a percent apart.
    model, (optimizer,) = ordinary.model, ordinary.optimizers
    snapshot = Snapshot(model, optimizer)

    def plain() -> None:
        optimizer.zero_grad()
        mlkernels.cross_entropy(model(batch), target).backward()
        optimizer.step()

    plain()
    snapshot.save()
    steps = {
        "a plain iteration": plain,
        "with MILS, no attempt": lambda: ordinary.step(batch, target),
        "an attempt, accepted": lambda: accepted.step(batch, target),
        "an attempt, rejected": lambda: rejected.step(batch, target),
        "  keeping global generators": lambda: Randomness(model).restore(),
        "  drawing the observation set": lambda: ordinary._observe(),
        "  an observation pass": lambda: ordinary._score(batch, target),
        "  save": snapshot.save,
        "  restore": snapshot.restore,
    }
    begin = cpu_clock()
    times = take_turns(steps, seconds, device)
    return _table(times, snapshot.nbytes, begin.load().others_busy)


def _table(times: dict[str, Timing], nbytes: int, busy: float) -> str:
    # The best turn: what others on the machine do only ever adds.
    plain, ordinary, accepted, rejected, chance, draw, score, save, restore = (timing.best for timing in times.values())
    lines = [f"{'':30} {'best':>11} {'median':>11} {'best / plain':>13}"]
    for name, timing in times.items():
        best, median = (f"{1e6 * seconds:8.1f} us" for seconds in (timing.best, timing.median))
        lines.append(f"{name:30} {best} {median} {timing.best / plain:13.3f}")
    parts = chance + draw + 2 * score + save + plain
    lines += [
        f"without an attempt MILS adds {1e6 * (ordinary - plain):+.1f} us",
        f"accepted / (generators, drawing, 2 passes, save, 1 step): {accepted / parts:.2f}",
        f"rejected / (the same, restore, 1 step more): {rejected / (parts + restore + plain):.2f}",
        f"snapshot: {nbytes} bytes; meanwhile others kept {busy:.2f} CPUs busy",
    ]
    return "\n".join(lines)


def main(given: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m bench.schedule", description="What MILS costs, part by part.")
    parser.add_argument("--seconds", type=float, default=20.0, help="per network")
    parser.add_argument("--device", type=torch.device, help="default: cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(given)
    device = options.device or gpu() or torch.device("cpu")
    torch.set_num_threads(options.threads)
    for name, (build, shape) in NETWORKS.items():
        print(f"{name}, batch {BATCH}, {device}")
        print(_measure(build, shape, options.seconds, device) + "\n")


if __name__ == "__main__":
    main()
