"""The host that runs the CUDA kernels (csrc/simt/machine.h) finds mistakes, also in the kernels themselves."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import simt

ROOT = Path(__file__).resolve().parent.parent
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

WAITED, BETWEEN, NOBODY = "before its copy was waited for", "without a barrier between", "that nobody wrote"
#: What is said of each faulty kernel: one of these in every order of its threads; nothing of the right ones.
SAID = {
    "right: block": ["none"],
    "right: warp": ["none"],
    "right: copies": ["none"],
    "right: cluster": ["none"],
    "a barrier before reading is missing": [BETWEEN, NOBODY],
    "a barrier before writing is missing": ["that another thread reads", BETWEEN],
    "a warp's barrier is missing": [BETWEEN, NOBODY],
    "a warp's barrier between warps": [BETWEEN, NOBODY],
    "an exchange is no barrier": [BETWEEN],
    "nobody wrote": [NOBODY],
    "beyond the end": ["beyond the end"],
    "misaligned": ["misaligned"],
    "not all threads at a barrier": ["deadlock"],
    "not all lanes at an exchange": ["deadlock"],
    "lanes at different collectives": ["different collectives"],
    "a copy is not waited for": [WAITED, NOBODY],
    "a copy into what is being read": ["overwrites what another thread is reading"],
    "the wrong parity": [WAITED, NOBODY],
    "the wrong barrier": [WAITED],
    "a copy without its fence": ["without before_copy"],
    "a barrier that is still busy": ["earlier one was waited for"],
    "another warp's copy": [WAITED, NOBODY],
    "a cluster's first barrier is missing": ["before the first cluster_sync"],
    "a cluster's barrier before reading is missing": [BETWEEN, NOBODY],
    "a block's barrier in place of a cluster's": [BETWEEN, NOBODY],
    "right: posted": ["none"],
    "what is posted is not waited for": [WAITED, NOBODY],
    "a number too few is expected": [WAITED, NOBODY, "more was stored"],
    "a number too many is expected": ["deadlock"],
    "one place for all that is posted": [WAITED, "two asynchronous stores", "wrong value"],
    "a block that has ended": ["that has ended"],
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    program = tmp_path_factory.mktemp("simt") / "faults"
    source = ROOT / "tests" / "simt_faults.cpp"
    subprocess.run([COMPILER, "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    found: dict[str, list[str]] = {}
    for line in subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines():
        name, _, error = line.split("|")
        found.setdefault(name, []).append(error)
    return found


def test_every_kernel_of_the_file_is_expected(said):
    assert set(said) == set(SAID)


@pytest.mark.parametrize("name", SAID)
def test_faults_are_found_in_every_order(said, name):
    assert len(said[name]) == 20
    for error in said[name]:
        assert any(part in error for part in SAID[name]), error


# ---- the kernels themselves, with a barrier or a wait taken out ------------------------------------------------------

#: file, what is taken out, what takes its place.
_LONG, _SHORT = "cuda/rows_long.h", "cuda/rows_short.h"
_FENCE, _SYNC, _WRITE = "      simt.before_copy();\n", "      simt.warp_sync();\n", "      if (v.grad) write"
BROKEN = {
    "the wait for a row's chunks": (_LONG, "simt.copy_wait(at.barriers + 8 * p.slot, p.parity);", ""),
    "the barrier before a place is filled again": (_LONG, f"{_FENCE}{_SYNC}      prefetch();", "      prefetch();"),
    "the barrier between posting and reading": (
        _LONG,
        "        simt.block_sync();\n      }\n      return",
        "      }\n      return",
    ),
    "the wait for a cluster's mailboxes": (_LONG, "        simt.copy_wait(8 * half, parity);\n", ""),
    "two halves of the exchange": (
        _LONG,
        "half = exchanges & 1, parity = exchanges >> 1 & 1",
        "half = 0, parity = exchanges & 1",
    ),
    "the wait for a tile": (_SHORT, "simt.copy_wait(at.barriers + 8 * slot, parity);", ""),
    "the fence before a tile is filled again": (_SHORT, _FENCE, ""),
    "the barrier before a tile is written out": (_SHORT, f"{_SYNC}{_WRITE}", _WRITE),
    "the barrier between blanking a target and reading": (
        _SHORT,
        "      simt.warp_sync();\n      state.target = simt.exchange",
        "      state.target = simt.exchange",
    ),
    "the barrier between a row's gradient and its target's": (
        _SHORT,
        "    if (lanes > 1) simt.warp_sync();  // the target's place",
        "    // the target's place",
    ),
}
FEW = ("the barrier before a place is filled again", "the barrier before a tile is written out")
PROGRAM = """
import sys; sys.path[:0] = [{tests!r}]
import torch, simt
import mlkernels
simt.install()
torch.manual_seed(0)
for seed in range(1, 7):
    for shape in ({{"path": "short", "slots": 2, "tile_rows": 1, "teams": 1, "cluster": -1, "warps": 1}},
                  {{"path": "short", "cluster": 2}},
                  {{"path": "long", "warps": 2, "slots": 5, "teams": 1, "chunk": 32}},
                  {{"path": "long", "warps": 1, "cluster": 2, "teams": 1, "chunk": 32}}):
        with simt.forced(seed=seed, **shape):
            x = torch.randn(9, 300, requires_grad=True)
            mlkernels.cross_entropy(x, torch.arange(9), backend="cuda").backward()
print("nothing found")
"""


def broken(tmp_path, name):
    """The run of a copy of the sources in which that is missing."""
    file, what, instead = BROKEN[name]
    for part in ("csrc", "mlkernels", "tests/simt.py"):
        target = tmp_path / part
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, target)
    source = tmp_path / "csrc" / file
    text = source.read_text()
    assert text.count(what) == 1
    source.write_text(text.replace(what, instead))
    spec = importlib.util.spec_from_file_location("build_of_the_copy", tmp_path / "csrc" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    here = (build.OBJECTS / "simt").relative_to(tmp_path)
    shutil.copytree(ROOT / here, tmp_path / here)  # all but the rows of float32 as they were built
    ninja = [*build.find_ninja(), "-f", str(here / "build.ninja")]
    subprocess.run([*ninja, str(here / "rows_float.o")], cwd=tmp_path, check=True)
    for path in (tmp_path / here).glob("*.o"):
        os.utime(path)  # the others are good as they are
    subprocess.run([*ninja, "-t", "restat"], cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(tests=str(tmp_path / "tests"))],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="fibers are tried on Linux")
def test_the_kernels_compile_for_the_host():
    """Where they do not, all that runs them is skipped."""
    assert simt.library()[1] is None


@pytest.mark.skipif(simt.library()[0] is None, reason="needs the kernels for the host")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[]
            if name in FEW
            else pytest.mark.skipif("not os.environ.get('MLKERNELS_FULL')", reason="MLKERNELS_FULL=1"),
        )
        for name in BROKEN
    ],
)
def test_a_kernel_without_its_barrier_fails(tmp_path, name):
    said = broken(tmp_path, name)
    assert "simt: " in said, said[-2000:]


@pytest.mark.skipif(simt.library()[0] is None, reason="needs the kernels for the host")
def test_whole_kernels_pass_that_program():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(tests=str(ROOT / "tests"))],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.stdout.endswith("nothing found\n"), done.stderr[-2000:]
