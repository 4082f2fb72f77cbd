"""``python -m bench``; ``--help`` lists the options. ``python -m bench compare A B`` holds two results side by side."""

from __future__ import annotations

import shlex
import sys
import time
from argparse import ArgumentTypeError, Namespace
from functools import partial
from pathlib import Path

import torch

from . import ahead, cases, charts, compare, report
from .cases import DTYPES, LOSSES, MODES, Problem
from .measure import STATE_WIDTHS, Plan, Run, announce, attempt, in_fresh_processes, measure
from .options import backends_of, device_of, is_gpu, names_of, parser_of
from .peers import HEADLINE
from .report import PEERS

SUITES = ["losses", "state", "linear"]
BUDGET = 172.0  # seconds for a GPU, which is paid by the minute


def _shapes(text: str) -> list[tuple[int, ...]]:
    try:
        found = [tuple(int(size) for size in one.split("x")) for one in text.split(",")]
    except ValueError:
        found = [()]
    if any(len(shape) < 2 for shape in found):
        raise ArgumentTypeError(f"{text!r} is not like 256x1000,8x19x512x512")
    return found


def _options(given: list[str] | None) -> Namespace:
    parser = parser_of("bench", "Times each loss's forward and backward() beside its peers and a copy.")
    parser.add_argument(
        "--suites", type=names_of(SUITES), help=f"{','.join(SUITES)}; default: losses, on a GPU also state"
    )
    parser.add_argument("--quick", action="store_true", help="fewer problems and losses, no torch.compile")
    parser.add_argument("--set", choices=cases.SETS, help="another list of problems: other benchmarks', or edges")
    parser.add_argument("--shapes", type=_shapes, help="for instance 256x1000,8x19x512x512; of linear heads NxDxC")
    parser.add_argument("--dtype", type=names_of(DTYPES), help=",".join(DTYPES))
    parser.add_argument("--peers", type=names_of(PEERS), help=",".join(PEERS))
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes half of the time")
    parser.add_argument(
        "--processes",
        type=int,
        help="fresh ones, whose best and worst are reported; default: 4, on a GPU and for linear heads 1",
    )
    parser.add_argument("--seconds", type=float, help="for the whole run; default: as it comes, on a GPU 172")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="where JSON and picture go")
    return parser.parse_args(given)


def plan_of(options: Namespace, device: torch.device, backends: list[str]) -> Plan:
    """What the options ask for."""
    gpu = is_gpu(device)
    suites = options.suites or (SUITES[:2] if gpu and options.shapes is None else ["losses"])
    problems = cases.problems(gpu, options.quick) if "losses" in suites else []
    problems += cases.linear(gpu, options.quick) if "linear" in suites else []
    if options.shapes or options.dtype:
        shapes = options.shapes or list(dict.fromkeys(one.sizes for one in problems))
        problems = [Problem(shape, dtype) for dtype in options.dtype or ["float32"] for shape in shapes]
        if suites == ["linear"]:
            problems = [
                Problem((rows, classes), one.dtype, size) for one in problems for rows, size, classes in [one.shape]
            ]
    problems = cases.SETS.get(options.set, problems)
    peers = options.peers or PEERS
    if options.no_compile or (options.quick and not gpu):
        peers = [peer for peer in peers if peer != "compile"]
    return Plan(
        device,
        backends,
        options.losses or (LOSSES[:6] if gpu else HEADLINE if options.quick else LOSSES),
        peers,
        options.modes or (MODES if gpu else ["step"]),
        problems,
        STATE_WIDTHS if "state" in suites else (),
        patience=1 / 2 if options.quick and gpu else 1 / 3 if options.quick else 1.0,
        until=time.time() + (options.seconds or (BUDGET if gpu else float("inf"))),
    )


def main(given: list[str] | None = None) -> int:
    """Measures, prints, writes; the exit status."""
    given = sys.argv[1:] if given is None else given
    if given[:1] == ["compare"]:
        return compare.main(given[1:])
    options = _options(given)
    device = device_of(options, "bench")
    if device is None:
        return 1
    backends, missing = backends_of(options, device)
    for name, why in missing.items():
        print(f"bench: no backend {name!r}: {why}", file=sys.stderr)
    started = time.time()
    plan = plan_of(options, device, backends)
    say = partial(announce, started)
    first = Run()
    if "triton" in backends and is_gpu(device):
        say(f"compiling the kernels of {len(plan.problems)} problems")
        work = ahead.specialised(plan.problems, plan.names, device.type, plan.modes)
        attempt("compiling ahead", partial(ahead.compile_ahead, work, ahead.SECONDS, say), first)
        if options.compile:
            return 1 if first.failures else 0
    header = {"command": shlex.join(["python", "-m", "bench", *given]), **report.describe(device, backends)}

    def save(runs: list[Run]) -> Path:
        return report.write_json(report.as_json(report.Report(header, runs)), options.out)

    count = options.processes or (1 if is_gpu(device) or any(one.features for one in plan.problems) else 4)
    if count == 1:
        runs = [measure(plan, first, lambda run: save([run]), say)]
    else:
        runs = [first, *in_fresh_processes(plan, count, started, save)]
    found = report.Report(header, runs)
    print(report.text(found))
    data = report.write_json(report.as_json(found), options.out)
    print(f"wrote {data}")
    try:
        charts.figure(report.load(data)).savefig(data.with_suffix(".png"), dpi=150)
    except ImportError:
        print("no picture: there is no matplotlib")
    return 1 if found.failures() or missing else 0


if __name__ == "__main__":
    sys.exit(main())
