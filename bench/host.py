"""``python -m bench.host``: what the host pays for a step on the Triton backend, without a GPU.

Loss and backward of small problems over the stub driver (``tools/stub_driver``): everything that Python, torch and
Triton do for a step, but for the device's own time. Beside it, in the same run and by turns, ``F.cross_entropy`` and
the ``cpu`` backend, which compute. Microseconds, the median of all turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from tools import stub_driver

from .measure import Step, take_turns, training_step

SIZES = ((128, 100), (32, 10))
GOAL = 2.0  # times F.cross_entropy, at the first size


def steps_of(rows: int, classes: int) -> dict[str, Step]:
    """Training steps by name; the first is what the others are compared with."""
    import mlkernels
    from mlkernels.backends.triton import replay

    x = torch.randn(rows, classes, requires_grad=True)
    y = torch.randint(classes, (rows,))
    margin = torch.tensor(0.5, requires_grad=True)

    def step(loss: Callable[..., torch.Tensor], **options: Any) -> Step:
        return training_step(partial(loss, **options), (x, y), (x,))

    ours = step(mlkernels.cross_entropy, backend="triton")

    def plainly() -> None:
        replay._enabled = False
        try:
            ours()
        finally:
            replay._enabled = True

    return {
        "F.cross_entropy": step(F.cross_entropy),
        "cpu": step(mlkernels.cross_entropy, backend="cpu"),
        "triton": ours,
        "triton, focal": step(mlkernels.focal_loss, gamma=2.0, backend="triton"),
        "triton, not replayed": plainly,
        "triton, trained margin": step(mlkernels.arcface_loss, margin=margin, backend="triton"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="per size")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    stub = stub_driver.install()
    import triton

    print(f"torch {torch.__version__}, triton {triton.__version__}; microseconds for loss and backward")
    for rows, classes in SIZES:
        steps = steps_of(rows, classes)
        launches = {}
        with stub_driver.served():
            for name, run in steps.items():
                for _ in range(5):
                    run()
                stub.reset()
                run()
                launches[name] = stub.launches
            times = take_turns(steps, seconds, torch.device("cpu"))
        base = times["F.cross_entropy"].median
        print(f"\n{rows} x {classes}{'launches':>40}")
        for name, taken in times.items():
            print(f"  {name:24}{1e6 * taken.median:8.1f}  x{taken.median / base:.2f}{launches[name] or '':>8}")
        if (rows, classes) == SIZES[0]:
            reached = times["triton"].median <= GOAL * base
            print(f"  goal: at most x{GOAL:.1f} of F.cross_entropy: {'reached' if reached else 'missed'}")


if __name__ == "__main__":
    main()
