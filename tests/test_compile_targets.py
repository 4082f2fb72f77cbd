"""Without a GPU: what the Triton backend launches compiles for every architecture, spills nothing, and moves 128 bits.

``aot.py`` does the compiling, in processes of their own: for sm_90 a spread of tiles and options, for the others every
kernel in the ways that differ most. Triton's cache serves the second time. ``MLKERNELS_FULL=1``: every tile, loss, form
and pair of options on each target, which takes hours; and sm_90's spread for sm_80 and sm_90 by the oldest Triton.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oldest_triton
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
FULL = os.environ.get("MLKERNELS_FULL") == "1"


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line for all specialisations of a kernel in a tile, with the most that one of them takes."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["kernel"], row["target"], row["tile"], str(row["warps"]), row["dtype"])
        groups.setdefault(key, []).append(row)
    yield "kernel           target       tile warps dtype forms registers shared spills  warps, KiB in flight, at least"
    for key, group in sorted(groups.items()):
        kernel, target, tile, warps, dtype = key
        most = {name: max(row.get(name, -1) for row in group) for name in ("registers", "shared", "spills")}
        numbers = f"{most['registers']:10}{most['shared']:7}{most['spills']:7}"
        least = {name: min(row.get(name, -1) for row in group) for name in ("warps_resident", "flight")}
        flight = f"{least['warps_resident']:7}{least['flight'] // 1024:5}" if least["flight"] >= 0 else ""
        yield f"{kernel:17}{target:8}{tile:>9}{warps:>6}{dtype:>6}{len(group):6}{numbers}{flight}"


@pytest.fixture(scope="module", params=["installed", *(["oldest"] if FULL else [])])
def everything(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What ``aot.py`` says; conftest.py prints it as a table at the end."""
    if request.param == "oldest":
        options = ("--spread", "--target", "sm_80", "--target", "sm_90")
        return [json.loads(line) for line in _compiled(*options, path=oldest_triton.folder()).splitlines()]
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of them compiles, the others wait for it
        folder = folder.parent
    with (folder / "aot.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = folder / "aot.jsonl"
        if not said.exists():
            said.write_text(_compiled(*(["--full"] if FULL else [])))
            rows = [
                row for row in map(json.loads, said.read_text().splitlines()) if "kernel" in row and "bad" not in row
            ]
            (folder / "aot.txt").write_text("\n".join([*_table(rows), f"{len(rows)} compiled"]))
    return [json.loads(line) for line in said.read_text().splitlines()]


def _compiled(*options: str, path: Path = ROOT) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "tests" / "aot.py"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(params=TARGETS)
def rows(request, everything) -> list[dict[str, Any]]:
    """A target's kernels."""
    reasons = [row["unavailable"] for row in everything if "unavailable" in row and row["target"] == request.param]
    reason = reasons[0] if reasons else "not asked for"
    if reason is not None:
        pytest.skip(f"this Triton does not compile for {request.param}: {reason}")
    return [row for row in everything if row["target"] == request.param and "kernel" in row and "bad" not in row]


def _told(rows: list[dict[str, Any]]) -> str:
    """For an assertion's message."""
    return "\n".join(["", *(json.dumps(row) for row in rows)])


def test_compiles(rows):
    failed = [row for row in rows if "error" in row]
    assert not failed, _told(failed)


def test_every_kernel(rows):
    """What arguments.py and linear.py launch is here."""
    text = "".join((ROOT / f"mlkernels/backends/triton/{name}.py").read_text() for name in ("arguments", "linear"))
    launched = set(re.findall(r"launch\(\s*(?:kernels|sums|pieces)\.(\w+)", text))
    assert launched and launched == {row["kernel"] for row in rows}


def test_no_spills(rows):
    spilling = [row for row in rows if row.get("spills", 0) > 0]
    assert not spilling, _told(spilling)


def test_wide_accesses(rows):
    """Aligned rows are read and written 128 bits at a time."""
    asked = [row for row in rows if row["wide_loads"] and "error" not in row]
    narrow = [
        row
        for row in asked
        if row["loads"] < row["wide_loads"]
        or row["stores"] < row["wide_stores"]
        or row["narrow"] >= row.get("narrow_limit", math.inf)
    ]
    assert any(row["wide_stores"] for row in asked)
    assert not narrow, _told(narrow)


def test_few_instructions(rows):
    """An H100 copies a bfloat16 logit in the time of 19 instructions, and writes its gradient in as much again. Of few
    rows each thread also counts some labels."""
    asked = [row for row in rows if "elements" in row and "executed" in row]
    costly = [
        row
        for row in asked
        if row["executed"] > (23 if row["wide_stores"] else 15) * row["elements"] + 11 * row.get("labels", 0)
    ]
    assert any("labels" in row for row in asked) or rows[0]["target"] != "sm_90"
    assert not costly, _told(costly)


def test_rows_side_by_side_are_read_by_twos(rows):
    """Of logits of two bytes a warp reads a whole line, and a thread has few rows."""
    asked = [row for row in rows if "halves_limit" in row]
    assert all(row["halves"] < row["halves_limit"] for row in asked), _told(asked)


def test_sums_have_much_on_the_way(rows):
    """Of memory 0.7 us away an H100's multiprocessor takes 18 KiB in that time."""
    least = {"visit": 0, "row_finish": 0, "piece_statistics": 18 << 10, "piece_gradient": 18 << 10}
    few = [row for row in rows if row.get("flight", 2**20) < least.get(row["kernel"], 2**15)]
    assert not few, _told(few)


def test_threads_agree_on_what_they_add_up(rows):
    """All of them store the sum, so it is the same bits in each: no product is fused into an exchange."""
    apart = [row for row in rows if row.get("fused", 0) > 0]
    assert not apart, _told(apart)


def test_a_bound_on_registers_costs_no_warps(rows):
    """Of plain losses: there are as many on a multiprocessor as without it, or without it something is spilled."""
    asked = [row for row in rows if "unbound" in row]
    fewer = [
        row
        for row in asked
        if row["warps_resident"] < (16 if row["unbound"]["spills"] else row["unbound"]["warps_resident"])
    ]
    assert not fewer, _told(fewer)


def test_a_spill_is_seen(everything):
    """Rows of 65536 classes in float32, held by 1024 threads with 64 registers each."""
    (row,) = (row for row in everything if "bad" in row)
    assert row["spills"] > 0, _told([row])
