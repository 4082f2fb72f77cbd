"""How the examples' tests get at the scripts."""

from __future__ import annotations

import importlib
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parent.parent / "examples"


def script(name: str) -> ModuleType:
    """The script as a module; as when it is run, its own folder is where modules are looked for."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def check_picture(path: Path, height: int) -> None:
    """A PNG of at least this size."""
    picture = path.read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    sizes = struct.unpack(">2I", picture[16:24])
    assert sizes[0] > 800 and sizes[1] > height


def command(name: str, *options: str, by: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, or in those that Python starts ``by`` its arguments, which must end well."""
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *by, str(EXAMPLES / f"{name}.py"), *options]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done
