"""Long runs: ``python -m tools.soak steps`` and ``python -m tools.soak threads``.

    python -m tools.soak steps --count 1e5     # training steps of several losses, and what the process holds
    python -m tools.soak threads --count 2000  # the same calls from many threads: each has the bits of one alone

Both end with an error where memory grows or a bit differs.
"""

from __future__ import annotations

import argparse
import gc
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import mlkernels

N, C = 32, 40
FLAT = 4 << 20  # bytes that the second half of a run may add


def resident() -> int:
    """Bytes that the process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def scenes(backend: str | None) -> list[Callable[[int], list[Tensor]]]:
    """Steps: each takes a seed and gives numbers that follow from it alone."""
    beta, row_scale = torch.tensor(2.0), torch.rand(N, 1) + 1

    def batch(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed % 97)
        target = torch.randint(C, (N,), generator=generator)
        target[::7] = -100
        return torch.randn(*(shape or (N, C)), generator=generator).requires_grad_(), target

    def step(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def cross_entropy(seed: int) -> list[Tensor]:
        x, target = batch(seed)
        return step(mlkernels.cross_entropy(x, target, label_smoothing=0.1, z_loss=1e-3, backend=backend), x)

    def trained(seed: int) -> list[Tensor]:
        x, target = batch(seed)
        own = beta.clone().requires_grad_(), row_scale.clone().requires_grad_()
        head = mlkernels.Modulated(beta=own[0], gamma=1.5)
        loss = mlkernels.softmax_loss(x, target, head=head, scale=own[1], backend=backend)
        return step(loss, x, *own)

    def half(seed: int) -> list[Tensor]:
        x, target = batch(seed)
        rows = mlkernels.focal_loss(x.bfloat16(), target, reduction="none", backend=backend)
        return step((rows * torch.arange(N)).sum(), x)

    def statistics(seed: int) -> list[Tensor]:
        x, target = batch(seed)
        loss, rows = mlkernels.softmax_loss(x, target, return_stats=True, backend=backend)
        return step(loss + rows.entropy.sum(), x)

    def linear(seed: int) -> list[Tensor]:
        x, target = batch(seed, N, 24)
        weight = batch(seed + 1, C, 24)[0]
        return step(mlkernels.linear_cross_entropy(x, weight, target, backend=backend), x, weight)

    def large(seed: int) -> list[Tensor]:  # a gradient from the buffers that are kept
        if seed % 25:
            return []
        x = torch.full((512, 4096), float(seed % 97)).requires_grad_()
        loss = mlkernels.cross_entropy(x, torch.arange(512), backend=backend)
        return [g[0].clone() if g.dim() else g for g in step(loss, x)]

    return [cross_entropy, trained, half, statistics, linear, large]


def steps(count: int, backend: str | None) -> int:
    """Memory before, halfway and after."""
    held, begun, all_scenes = [], time.monotonic(), scenes(backend)
    for i in range(count):
        if i in (count // 10, count // 2):
            gc.collect()
            held.append(resident())
        all_scenes[i % len(all_scenes)](i)
    gc.collect()
    held.append(resident())
    print(f"{count} steps, {time.monotonic() - begun:.0f} s; MB after 10 %, 50 % and 100 %:", *(h >> 20 for h in held))
    return int(held[2] - held[1] > FLAT)


def threads(count: int, backend: str | None, workers: int) -> int:
    """So many calls on each of some threads."""
    all_scenes = scenes(backend)
    wanted = {(k, seed): scene(seed) for k, scene in enumerate(all_scenes) for seed in range(97)}
    wrong: list[tuple[int, int]] = []

    def work(first: int) -> None:
        for i in range(count):
            k, seed = (first + i) % len(all_scenes), (first * 31 + i) % 97
            found = all_scenes[k](seed)
            if not all(map(torch.equal, found, wanted[k, seed])):
                wrong.append((k, seed))

    started = [threading.Thread(target=work, args=(first,)) for first in range(workers)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    print(f"{workers} threads, {workers * count} calls, {len(wrong)} with other bits", *wrong[:5])
    return int(bool(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("steps", "threads"))
    parser.add_argument("--count", type=float, default=1e4)
    parser.add_argument("--backend")
    parser.add_argument("--workers", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "steps":
        return steps(int(arguments.count), arguments.backend)
    return threads(int(arguments.count), arguments.backend, arguments.workers)


if __name__ == "__main__":
    sys.exit(main())
