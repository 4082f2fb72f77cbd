"""``python -m bench``; ``--help`` lists the options."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import report
from .run import PEERS, measure
from .shapes import CASES, HEADLINE, LOSSES, QUICK, Case


def _names(known: list[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse


def _shapes(text: str) -> list[tuple[int, int]]:
    try:
        return [(int(rows), int(classes)) for rows, classes in (one.split("x") for one in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 256x1000,1024x8000") from None


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Times each loss's forward and backward().")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and losses, no torch.compile, under 40 s")
    parser.add_argument("--shapes", type=_shapes, help="for instance 256x1000,1024x8000")
    parser.add_argument("--losses", type=_names(LOSSES), help=",".join(LOSSES))
    parser.add_argument("--peers", type=_names(PEERS), help=f"{','.join(PEERS)}; the floors are always measured")
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    parser.add_argument("--dtype", type=_names(dtypes), help=f"of {','.join(dtypes)}")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes half of the time")
    parser.add_argument("--device", type=torch.device, help="default: cuda where there is one, else cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="where JSON and picture go")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    options = _arguments(given)
    cases = QUICK if options.quick else CASES
    if options.shapes or options.dtype:
        shapes = options.shapes or list(dict.fromkeys((case.rows, case.classes) for case in cases))
        cases = [Case(rows, classes, dtype) for dtype in options.dtype or ["float32"] for rows, classes in shapes]
    names = options.losses or (HEADLINE if options.quick else LOSSES)
    peers = options.peers or PEERS
    if options.quick or options.no_compile:
        peers = [peer for peer in peers if peer != "compile"]
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "ours" not in peers:
        peers = ["ours", *peers]  # all ratios are to ours

    started = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {what}", file=sys.stderr, flush=True)

    run = measure(cases, names, peers, device, 1 / 3 if options.quick else 1.0, say)
    print(report.text(run))
    for path in report.write(run, options.out):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
