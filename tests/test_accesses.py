"""No access that Triton compiles is wider than the addresses of the actual tensors allow, nor narrower where they are
ordinary. What the kernels say of addresses is believed: a wrong word is a fault, or silently another element."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "tests" / "accesses.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_access_is_wider_than_its_addresses_allow(rows):
    wrong = [row for row in rows if any(row["allowed"] % width for width in row["found"])]
    assert not wrong, "\n".join(map(str, wrong))


def test_ordinary_tensors_are_accessed_as_widely_as_there_is(rows):
    """Rows 16 bytes at a time, or whole; rows side by side 4."""
    ordinary = {
        ("aligned", "bfloat16"): 16,
        ("aligned", "float32"): 16,
        ("a multiple of 8", "bfloat16"): 16,
        ("a multiple of 2", "bfloat16"): 4,
        ("sliced", "bfloat16"): 4,
        ("sliced", "float32"): 8,
        ("begins at 4", "bfloat16"): 8,
        ("streamed", "bfloat16"): 16,
        ("few", "bfloat16"): 8,
        ("one row, expanded", "bfloat16"): 16,
        ("transposed", "bfloat16"): 4,
        ("images of 14", "bfloat16"): 4,
        ("images of 14", "float32"): 4,
        ("channels last", "bfloat16"): 16,
    }
    found = {(row["layout"], row["dtype"]): row["found"][-1] for row in rows if row["tensor"] == "grad"}
    assert {key: found[key] for key in ordinary} == ordinary


def test_row_dimensions_that_continue_each_other_are_one():
    from mlkernels.backends.triton.arguments import _collapsed

    whole = torch.empty(2, 5, 3, 4, 6)
    assert _collapsed(whole, whole) == ((72, 1), (72, 360, 1, 0), (72, 360, 1, 0))
    rows_apart = torch.empty(2, 5, 3, 4, 7)[..., :6]
    assert _collapsed(rows_apart, whole) == ((12, 6), (84, 420, 7, 1), (72, 360, 6, 1))
    assert _collapsed(whole, rows_apart) == ((12, 6), (72, 360, 6, 1), (84, 420, 7, 1))
    all_apart = torch.empty(2, 5, 3, 5, 7)[..., :4, :6]
    assert _collapsed(all_apart, whole) is None and _collapsed(all_apart[:1], whole[:1]) is not None
