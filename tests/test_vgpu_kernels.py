"""The compiled kernels themselves, executed by tools/vgpu, against the reference in float64: Triton's PTX, and nvcc's
with the launches of the library's own host code.

Every access is checked for bounds and alignment, every exchange between threads for a race. Some calls for each
backend; ``MLKERNELS_FULL=1``: every loss of the table, in every layout, for every target.
"""

from __future__ import annotations

import importlib.util
import os
from collections import defaultdict

import pytest

from tools import vgpu
from tools.vgpu import cases, count, faults, linear, worker
from tools.vgpu.cases import Case

FULL = os.environ.get("MLKERNELS_FULL") == "1"

pytestmark = pytest.mark.skipif(vgpu.unavailable() is not None, reason=f"no emulator: {vgpu.unavailable()}")


@pytest.fixture(scope="module")
def process():
    """Runs functions in a process in which Triton is not interpreted, one for each backend and device that it pretends
    to have: what a device has is asked once."""
    workers = defaultdict(worker.Worker)

    def run(backend, target, *call):
        try:
            return workers[backend, target](*call)
        except vgpu.Unavailable as error:
            pytest.skip(str(error))

    yield run
    for found in workers.values():
        found.close()


@pytest.fixture(scope="module")
def run(process):
    """Checks a case."""
    return lambda backend, target, case: process(backend, target, worker.check, backend, target, case)


# ---- calls -----------------------------------------------------------------------------------------------------------

# Few forms of Triton's kernels, as each takes a second or two to compile; whatever differs only in its data is free.
STRIDED = [
    Case(dtype="bfloat16", rows=4, classes=19, inner=(5, 7), kind="ignored"),
    Case(dtype="float16", rows=4, classes=19, inner=(5, 7), layout="last_every_second"),
    Case(dtype="bfloat16", rows=8, classes=24, inner=(5, 7), form="shared"),  # two classes of one row in a thread
    Case(loss="margin_monotone", dtype="float16", rows=8, classes=24, inner=(5, 7), form="shared",
         layout="last_every_second"),
    Case(dtype="bfloat16", rows=9, classes=20, layout="every_second", kind="confident"),
    Case(dtype="bfloat16", rows=12, classes=10, layout="transposed"),
    Case(dtype="bfloat16", rows=7, classes=33, layout="odd"),
    Case(dtype="float16", rows=2, classes=16, inner=(8, 2), layout="channels_last", kind="nan"),
]  # fmt: skip
LENGTHS = [
    Case(dtype="bfloat16", rows=3, classes=1, reduction="sum"),
    Case(dtype="bfloat16", rows=40, classes=2, upstream=1.0),
    Case(dtype="bfloat16", rows=3, classes=1000, layout="padded", options=("weight",)),
    Case(rows=2, classes=2051, kind="ignored"),
]
LOSSES = [
    Case(loss="two_scale_margin_modulated", form="row", rows=6, classes=10, reduction="none", train=True),
    Case(loss="piecewise_groups", form="shared", rows=6, classes=10, reduction="sum", train=True),
]
STREAMED = [Case(dtype="bfloat16", rows=2, classes=40000), Case(loss="two_scale", rows=2, classes=20000)]

#: So many rows that labels are counted, of several programs each; the last of these adds up the loss.
MANY = [Case(dtype="bfloat16", rows=2100, classes=10, kind="ignored", options=("weight", "row_weight"))]

TRITON = [("sm_90", case) for case in (*STRIDED, *LENGTHS, *LOSSES, *STREAMED[1:], *MANY)]
TRITON += [("sm_80", STRIDED[0]), ("sm_100", STRIDED[0])]

PATHS = [
    Case(rows=70, classes=12, forced=(("path", "short"), ("cluster", 4))),
    Case(rows=70, classes=12, options=("weight", "label_smoothing")),
    Case(dtype="bfloat16", rows=5, classes=1003,
         forced=(("path", "long"), ("warps", 2), ("cluster", 4), ("chunk", 32), ("teams", 1))),
    Case(dtype="bfloat16", rows=4, classes=1003, options=("weight", "label_smoothing", "z_loss"),
         forced=(("path", "streamed"), ("warps", 2), ("chunk", 32), ("slots", 2), ("teams", 1))),
]  # fmt: skip
CUDA = [("sm_90", case) for case in (*STRIDED, *LENGTHS, *LOSSES, *STREAMED, *PATHS)]
CUDA += [("sm_80", case) for case in (STRIDED[0], STREAMED[0])]


# ---- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("target,case", TRITON, ids=str)
def test_triton(run, target, case):
    run("triton", target, case)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("dtype, everything", [("bfloat16", False), ("float32", True)])
def test_linear_heads(process, dtype, everything):
    process("triton", "sm_90", linear.check, "sm_90", dtype, everything)


@pytest.mark.parametrize("target,case", CUDA, ids=str)
def test_cuda(run, target, case):
    run("cuda", target, case)


def test_a_process_has_one_device(process):
    process("cuda", "sm_90", worker.prepare, "cuda", "sm_90")
    with pytest.raises(ValueError, match="capability 90, got 80"):
        process("cuda", "sm_90", worker.prepare, "cuda", "sm_80")


@pytest.mark.parametrize("kind", faults.KINDS)
def test_faults_in_nvcc_s_kernels_are_found(process, kind):
    found = process("cuda", "sm_90", faults.put, kind, 8 if FULL else 1)
    assert None not in found, found


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"] if FULL else ["sm_90"])
@pytest.mark.parametrize("kind", faults.TRITON_KINDS)
def test_faults_in_triton_s_kernels_are_found(process, kind, target):
    """Of programs that come in groups; without a fault nothing is found."""
    found = process("triton in groups", target, faults.put_in_triton, target, kind)
    assert len(found) == 2 and None not in found, found


@pytest.mark.skipif(not FULL, reason="MLKERNELS_FULL=1 runs every loss in every layout")
@pytest.mark.parametrize("part", range(cases.PARTS))
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_everything(run, backend, target, part):
    if backend == "cuda" and target == "sm_100":
        pytest.skip("what runs there is the code of sm_90")

    def wrong(case: Case) -> str | None:
        try:
            run(backend, target, case)
        except (AssertionError, vgpu.Fault) as error:
            return f"{case}: {error}"
        return None

    failed = list(filter(None, map(wrong, cases.everything(part))))
    assert not failed, "\n".join(failed)


# ---- counts ----------------------------------------------------------------------------------------------------------


def test_counts_what_a_class_costs(process):
    """More with the gradient, and between what an H100 has time for and what no kernel can do without."""
    target = "sm_90"
    forward, both = (
        process("triton", target, count.of, "triton", target, 1000, "bfloat16", way) for way in (False, True)
    )
    assert 4 < forward < both < 38
