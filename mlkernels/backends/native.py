"""Loads the compiled libraries, and says why when it cannot."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from .. import ops  # noqa: F401  (the schemas must exist before their implementations load)

_PACKAGE = Path(__file__).resolve().parent.parent


def _load(stem: str) -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    if os.environ.get("MLKERNELS_NATIVE", "1") == "0":
        return None, "switched off by MLKERNELS_NATIVE=0"
    found = sorted(_PACKAGE.glob(f"{stem}.*so"))
    if not found:
        reason = _PACKAGE / f"{stem}.error.txt"  # csrc/build.py leaves it
        return None, f"not built: {reason.read_text().strip() if reason.exists() else 'run csrc/build.py'}"
    try:
        torch.ops.load_library(str(found[0]))
        return ctypes.CDLL(str(found[0])), None
    except (OSError, RuntimeError) as error:
        return None, f"{found[0].name} does not load: {error}"


_cpu, cpu_missing = _load("_cpu")
_cuda: ctypes.CDLL | None = None
cuda_missing: str | None
if torch.version.cuda is None:
    built = ", though the kernels are built" if list(_PACKAGE.glob("_cuda.*so")) else ""
    cuda_missing = f"this torch is built without CUDA{built}"
else:
    _cuda, cuda_missing = _load("_cuda")
    if cuda_missing is None and not torch.cuda.is_available():
        cuda_missing = "there is no GPU"


def cpu_isa() -> str | None:
    """The instruction set that the CPU kernels use: baseline, avx2 or avx512 (MLKERNELS_CPU forces one)."""
    return None if _cpu is None else ("baseline", "avx2", "avx512")[_cpu.mlkernels_cpu_isa()]
