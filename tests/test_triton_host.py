"""Without a GPU: Triton's whole host path, its own driver class over a driver that answers and counts.

``triton_host.py`` makes the calls, in a process of its own: with the Triton that is installed, and with the one that
the oldest torch brings, where that has been had already or under ``MLKERNELS_FULL=1``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import oldest_triton
import pytest

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="there is no C compiler"),
]


@pytest.fixture(scope="module", params=["installed", "oldest"])
def seen(request) -> dict[str, Any]:
    """What ``triton_host.py`` says."""
    paths = [ROOT, ROOT / "tests", *([oldest_triton.folder()] if request.param == "oldest" else [])]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, reversed(paths)))
    command = [sys.executable, str(ROOT / "tests" / "triton_host.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert request.param == "installed" or found["triton"] == oldest_triton.VERSION
    return found


def test_one_visit_per_structure_of_arguments(seen):
    """Which parameters are tensors decides, and whether loss or refresh; the kind of loss does not."""
    rows = seen["compilations"]
    structures = {row["structure"] for row in rows}
    assert len(structures) < len(rows) / 4
    assert sum(row["compiled"].get("visit", 0) for row in rows) == 2 * len(structures)
    first = {row["structure"]: row["loss"] for row in reversed(rows)}
    late = [row for row in rows if row["compiled"] and first[row["structure"]] != row["loss"]]
    assert not late, late
    assert all(row["again"] == 0 for row in rows)


def test_numbers_compile_nothing(seen):
    assert seen["data"] == dict.fromkeys(seen["data"], 0)


def test_few_launches(seen):
    """Loss, sum, and the look at the upstream gradient; of many rows a count for both directions, and no sum."""
    assert {row["launches"] for row in seen["compilations"]} == {3}
    few, many = seen["launches"].values()
    assert few == {"visit": 2, "total": 1}
    assert many == {"visit": 2, "count": 1}


def test_losses_are_added_up_in_order(seen):
    """Once in a group of programs, once over all groups: what orders it is in the code, whichever Triton made it."""
    assert seen["orders"] == [[0, 0], [2, 2]]


def test_replays_launch_what_triton_would(seen):
    """The same arguments at every place, from other tensors than those of the tape."""
    wrong = [row for row in seen["replays"] if not row["same"] or row["taped"] != 2]
    assert not wrong, wrong
    # A tape outlives the call that it was made from, whose logits it must not keep.
    assert not [row for row in seen["replays"] if row["tensors kept"]]


def test_a_tape_serves_no_other_call(seen):
    """Numbers that decide by being positive, where memory begins, numbers of float64."""
    assert seen["unlike"] == dict.fromkeys(seen["unlike"], True)


def test_linear_heads(seen):
    """Two launches for each of four tiles and one for the rows; from tapes, of each width one, with another start."""
    assert seen["linear"] == {
        "launches": {"piece_statistics": 4, "row_finish": 1, "piece_gradient": 4},
        "taped": 4, "same": True, "again": 0,
    }  # fmt: skip


def test_nothing_warns(seen):
    assert seen["warned"] == []


def test_surroundings(seen):
    """The current stream, hooks, the device of the tensors, threads."""
    found = seen["surroundings"]
    assert found["stream"] == 77
    assert (found["hooked"], found["hooked afterwards"]) == (2, 0)
    assert (found["devices"], found["device afterwards"]) == ([1], 0)
    assert found["threads"] == {"wrong": [], "same": [True, True]}


def test_a_repeated_call_is_cheap(seen):
    """Five times as fast where it was measured; bench/NOTES.md has the figures."""
    assert seen["microseconds"]["played"] < 0.6 * seen["microseconds"]["plain"], seen["microseconds"]
