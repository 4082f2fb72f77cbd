"""``python -m bench compare A B``: what two results have in common, B's times as multiples of A's."""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

from .charts import time_text
from .report import Report, load


def lines(a: Report, b: Report) -> list[str]:
    """A line for each time that both have, the largest change first; apart where the processes' ranges do not meet."""
    found = []
    for key in {*a.measured()} & {*b.measured()}:
        before, after = a.medians(key), b.medians(key)
        ratio = statistics.median(after) / statistics.median(before)
        apart = min(after) > max(before) or max(after) < min(before)
        verdict = ("slower" if ratio > 1 else "faster") if apart and min(len(before), len(after)) > 1 else ""
        what = f"{key.problem}, {key.loss}, {key.mode}, {key.by}"
        times = f"{time_text(statistics.median(before)):>10} {time_text(statistics.median(after)):>10}"
        found.append((-abs(math.log(ratio)), f"{what:<56} {times} {ratio:>7.3f}  {verdict}".rstrip()))
    return [line for _, line in sorted(found)]


def main(given: list[str]) -> int:
    """Prints them; the exit status is 1 where there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("a", type=Path, help="JSON that python -m bench wrote")
    parser.add_argument("b", type=Path)
    options = parser.parse_args(given)
    a, b = load(options.a), load(options.b)
    for name, one in (("A", a), ("B", b)):
        header = one.header
        torch, commit = header["versions"]["torch"], (header["commit"] or "no commit")[:10]
        print(f"{name}: {header['device']}, torch {torch}, {commit}, {header['date']}")
        for caveat in header["caveats"]:
            print(f"   {caveat}")
    if a.header["device"] != b.header["device"]:
        print("These are two machines: times say little, ratios to peers more.")
    found = lines(a, b)
    print(f"{'':<56} {'A':>10} {'B':>10} {'B / A':>7}" if found else "They have no problem and loss in common.")
    print("\n".join(found))
    return 0 if found else 1
