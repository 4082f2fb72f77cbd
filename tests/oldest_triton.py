"""The Triton that the oldest torch brings, beside the one that is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

VERSION = "3.6.0"  # torch 2.11's
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mlkernels"


def folder() -> Path:
    """To put before all others in a process's path; skips the test where there is none."""
    found = CACHE / f"triton-{VERSION}"
    if not found.exists():
        if os.environ.get("MLKERNELS_FULL") != "1":
            pytest.skip(f"triton {VERSION} is not in {CACHE}; MLKERNELS_FULL=1 fetches it")
        made = found.with_suffix(".part")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(made)]
        done = subprocess.run([*command, f"triton=={VERSION}"], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"triton {VERSION} cannot be had: {done.stderr[-300:]}")
        made.rename(found)
    return found
