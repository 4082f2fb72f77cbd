"""Calls against the reference, at random or all of the table: ``python -m tools.vgpu.sweep {triton,cuda} ...``.

    sweep triton sm_90 60 1 long      # 60 s of random calls: seed 1, sizes short, long or huge
    sweep triton sm_90 --table 0 1    # two of the twelve parts of the table, see tools/vgpu/cases.py

The target is sm_80, sm_90 or, of Triton, sm_100. Every call that fails is printed as a
:class:`tools.vgpu.cases.Case`; the exit status tells whether there was one.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import time
from collections.abc import Iterator

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch

from . import Fault, cases
from .launches import launches
from .worker import prepare


def at_random(seconds: float, seed: int, sizes: str) -> Iterator[cases.Case]:
    """Calls for so long."""
    rng, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        yield cases.random_case(rng, sizes)


def main() -> int:
    parser = argparse.ArgumentParser(prog="sweep")
    parser.add_argument("backend", choices=("triton", "cuda"))
    parser.add_argument("target", nargs="?", default="sm_90")
    parser.add_argument("seconds", nargs="?", type=float, default=60.0)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("sizes", nargs="?", choices=("short", "long", "huge"), default="short")
    parser.add_argument("--table", nargs="+", type=int, choices=range(cases.PARTS), help="parts of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    prepare(arguments.backend, arguments.target)
    tried = at_random(arguments.seconds, arguments.seed, arguments.sizes)
    if arguments.table:
        tried = itertools.chain(*map(cases.everything, arguments.table))
    calls = failed = 0
    for case in tried:
        calls += 1
        try:
            cases.check(case, arguments.backend)
        except (Fault, AssertionError) as error:
            failed += 1
            print(f"{case!r}\n    {type(error).__name__}: {str(error)[:900]}", flush=True)
    launched = sum(launches.by_name.values())
    print(f"{calls} calls, {failed} failed, {launched} launches of {len(launches.kernels)} kernels, {launches.total}")
    for what, count in launches.warnings.most_common(20):
        print(f"warned {count} times: {what}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
