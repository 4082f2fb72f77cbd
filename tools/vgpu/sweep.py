"""Random calls against the reference: ``python -m tools.vgpu.sweep {triton,cuda} [target] [seconds] [seed] [sizes]``.

The target is sm_80, sm_90 or, of Triton, sm_100; sizes are short, long or huge. Every call that fails is printed as a
:class:`tools.vgpu.cases.Case`; the exit status tells whether there was one.
"""

from __future__ import annotations

import os
import random
import sys
import time

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch

from . import Fault, cases
from .launches import launches
from .worker import prepare


def main(backend: str, target: str = "sm_90", seconds: str = "60", seed: str = "0", sizes: str = "short") -> int:
    torch.set_num_threads(1)
    prepare(backend, target)
    rng = random.Random(int(seed))
    end, calls, failed = time.monotonic() + float(seconds), 0, 0
    while time.monotonic() < end:
        case = cases.random_case(rng, sizes)
        calls += 1
        try:
            cases.check(case, backend)
        except (Fault, AssertionError) as error:
            failed += 1
            print(f"{case!r}\n    {type(error).__name__}: {str(error)[:900]}", flush=True)
    print(f"{calls} calls, {failed} failed, {sum(launches.by_name.values())} launches, {launches.total}")
    for what, count in launches.warnings.most_common(20):
        print(f"warned {count} times: {what}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
