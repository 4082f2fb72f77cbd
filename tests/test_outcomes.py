"""tools/outcomes.py: a run that is cut off keeps what it had, and is resumed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.outcomes import read, table

ROOT = Path(__file__).resolve().parent.parent
TESTS = """
import os, pathlib, pytest
def test_a(): pass
@pytest.mark.skip
def test_b(): pass
def test_c(): assert not pathlib.Path("repaired").exists(), "broken"; raise KeyError
@pytest.fixture
def broken():
    yield
    raise KeyError
def test_d(broken): pass
def test_e(): pathlib.Path("repaired").exists() or os._exit(3)
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_what_was_written_is_kept(tmp_path, workers):
    if workers:
        pytest.importorskip("xdist")
    checkout, file = tmp_path / "checkout", tmp_path / "kept" / "outcomes.txt"
    checkout.mkdir()
    (checkout / "test_x.py").write_text(TESTS)

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        line = ["-m", "pytest", "-p", "tools.outcomes", f"--outcomes={file}", "test_x.py", *options]
        line += ["-p", "xdist", "-n", str(workers), "--max-worker-restart=0"] if workers else []
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        return subprocess.run([sys.executable, *line], cwd=checkout, env=env, capture_output=True, text=True)

    # The process ends in the last test; with xdist a worker's, which is reported.
    done = run()
    ends = {"a": "passed", "b": "skipped", "c": "failed", "d": "error", **({"e": "failed"} if workers else {})}
    assert read(file) == {f"test_x.py::test_{name}": end for name, end in ends.items()}, done.stdout + done.stderr
    assert bool(workers) == ("1 files" in done.stdout)

    (checkout / "repaired").touch()
    done = run("--resume")
    ends |= {"e": "passed"}
    assert read(file) == {f"test_x.py::test_{name}": end for name, end in ends.items()}, done.stdout + done.stderr
    assert re.search(r"1 failed, 2 passed,( 2 deselected,)? 1 error in", done.stdout)
    counts = "test_x.py      2 passed      1 skipped      1 failed      1 error"
    assert table(read(file))[0] == counts and counts in done.stdout
    assert file.read_text().startswith(f"# Python {sys.version.split()[0]}, torch 2.")

    if not workers:
        run("-k", "test_a")  # without --resume, anew
        assert read(file) == {"test_x.py::test_a": "passed"}
