"""Loads the compiled libraries, and says why when it cannot."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch

from .. import numbering, ops, schemas  # noqa: F401  (the schemas must exist before their implementations load)

_PACKAGE = Path(__file__).resolve().parent.parent
_WORDS = {"numbering": ctypes.c_char_p, "schemas": ctypes.c_char_p}
#: What each library is called by, and what that returns.
_ENTRY_POINTS: dict[str, dict[str, Any]] = {
    "_cpu": {
        **_WORDS, "cpu_isa": ctypes.c_int, "cpu_direct": ctypes.c_void_p, "cpu_release_buffers": ctypes.c_size_t
    },
    "_cuda": {**_WORDS, "cuda_unusable": ctypes.c_char_p},
}  # fmt: skip
#: Each with what the one before it has; the last differs in the linear heads' products of bfloat16.
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")


def _load(stem: str) -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    if os.environ.get("MLKERNELS_NATIVE", "1") == "0":
        return None, "switched off by MLKERNELS_NATIVE=0"
    found = sorted(_PACKAGE.glob(f"{stem}.*so"))
    if not found:
        reason = _PACKAGE / f"{stem}.error.txt"  # csrc/build.py leaves it
        if reason.exists():
            return None, f"not built: {reason.read_text().strip()}"
        build = _PACKAGE.parent / "csrc" / "build.py"
        if build.exists():  # it hides an installed package from a Python that is started in it
            return None, f"not built in the source tree: run `python {build}`, or start Python elsewhere"
        return None, "the installation has no compiled library"
    try:
        torch.ops.load_library(str(found[0]))
        library = ctypes.CDLL(str(found[0]))
        for name, returned in _ENTRY_POINTS[stem].items():
            entry = getattr(library, f"mlkernels_{name}", None)
            if entry is None:
                return None, f"{found[0].name} was built from older sources: build it again"
            entry.restype = returned
        for name, module in {"numbering": numbering, "schemas": schemas}.items():
            if getattr(library, f"mlkernels_{name}")() != module.signature().encode():
                return None, f"{found[0].name} was built from another mlkernels/{name}.py: build it again"
        return library, None
    except (OSError, RuntimeError) as error:
        return None, f"{found[0].name} does not load: {error}"


_cpu, cpu_missing = _load("_cpu")
_cuda: ctypes.CDLL | None = None
_cuda_missing: str | None
if torch.version.cuda is None:
    _built = ", though the kernels are built" if list(_PACKAGE.glob("_cuda.*so")) else ""
    _cuda_missing = f"this torch is built without CUDA{_built}"
else:
    _cuda, _cuda_missing = _load("_cuda")


def no_gpu() -> str:
    """Why torch has no device, as it says itself: a driver that is missing or too old is no missing GPU."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:
            return f"torch can use no GPU: {str(error).split('. ')[0]}"
    return "there is no GPU"


def cuda_missing() -> str | None:
    """Why there are no CUDA kernels on any device; asks for devices, which importing the package must not."""
    if _cuda is None:
        return _cuda_missing
    return None if torch.cuda.is_available() else no_gpu()


def cuda_unusable(index: int) -> str | None:
    """Why the CUDA kernels, where there are any, do not run on one of the devices. The operators ask the same."""
    if _cuda is None:
        return None
    words: bytes | None = _cuda.mlkernels_cuda_unusable(index)
    return None if words is None else words.decode()


def cpu_isa() -> str | None:
    """The instruction set that the CPU kernels use: one of ISAS (MLKERNELS_CPU forces one)."""
    return None if _cpu is None else ISAS[_cpu.mlkernels_cpu_isa()]


def cpu_direct() -> int | None:
    """The address of the CPU operators' bodies, for the fast path."""
    return None if _cpu is None else int(_cpu.mlkernels_cpu_direct())


def empty_cache() -> int:
    """Gives the memory that the CPU kernels keep for large gradients back to the system.

    They take gradients of 4 MB and more from buffers that earlier steps have left, because every page of fresh memory
    is a fault; never more is kept than gradients were alive at once, the system may take what is idle for a quarter of
    a second when it is short of memory, and what no step takes for ten seconds goes. ``MLKERNELS_CPU_BUFFERS=0`` in the
    environment leaves all of it to torch's allocator.

    Returns:
        How many bytes were given back; gradients that are alive keep theirs.

    Example:
        >>> import mlkernels
        >>> _ = mlkernels.empty_cache()
        >>> mlkernels.empty_cache()
        0
    """
    return 0 if _cpu is None else int(_cpu.mlkernels_cpu_release_buffers())
