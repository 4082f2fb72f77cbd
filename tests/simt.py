"""The CUDA kernels without a GPU: the same bodies, and the same library around them, over fibers on the CPU.

``install`` builds the library with the host's compiler and makes backend "cuda" serve CPU tensors in this process.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import mlkernels
from mlkernels import backends, ops

ROOT = Path(__file__).resolve().parent.parent
PATHS = ("short", "long", "streamed", "strided")


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    sys.path.insert(0, str(ROOT / "csrc"))
    import build

    try:
        path = build.make_simt()
    except build.CannotBuild as error:
        return None, str(error)
    operators = torch.library.Library("mlkernels_simt", "DEF")
    for overload in (*ops.CUDA[: len(ops._CUDA_FAKES)], ops.CUDA.refresh, torch.ops.mlkernels.multi_copy_.default):
        operators.define(str(overload._schema).split("::")[1], tags=(torch.Tag.pt2_compliant_tag,))
    for name, fake in ops._CUDA_FAKES.items():
        torch.library.register_fake(f"mlkernels_simt::{name}", fake, lib=operators)
    library.keep = operators
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path)), None


def operator(name: str):
    """One of the library's operators."""
    return getattr(torch.ops.mlkernels_simt, name).default


def install() -> None:
    """Backend "cuda" for CPU tensors, until the process ends."""
    if library()[0] is None:
        return
    kernels = ops.Kernels(*(operator(name) for name in ops._FAKES), refresh=operator("softmax_loss_refresh"))
    ops.CUDA = kernels
    backends._SERVES["cpu"] = (*backends._SERVES["cpu"], "cuda")
    why_not = backends._why_not
    backends._why_not = lambda name: None if name == "cuda" else why_not(name)
    assert mlkernels.available_backends()["cuda"] is None


@contextmanager
def forced(
    *, path: str | None = None, warps: int = 0, cluster: int = 0, chunk: int = 0, slots: int = 0, tile_rows: int = 0,
    teams: int = 0, seed: int = 1,
) -> Iterator[None]:  # fmt: skip
    """Launches of another shape than the device's, and fibers in another order."""
    found, _ = library()
    assert found is not None
    found.mlkernels_simt_force(
        0 if path is None else PATHS.index(path) + 1,
        *(warps, cluster, chunk, slots, tile_rows, teams),
        ctypes.c_uint64(seed),
    )
    try:
        yield
    finally:
        found.mlkernels_simt_force(0, 0, 0, 0, 0, 0, 0, ctypes.c_uint64(1))


@contextmanager
def unusable(why: str) -> Iterator[None]:
    """A library that is loaded on a device that its kernels do not run on."""
    found, _ = library()
    assert found is not None
    found.mlkernels_simt_unusable(why.encode())
    try:
        yield
    finally:
        found.mlkernels_simt_unusable(None)


def launches() -> int:
    """How many there were so far."""
    found, _ = library()
    assert found is not None
    return found.mlkernels_simt_launches()


@contextmanager
def banks() -> Iterator[list[float]]:
    """Into the list, at the end: the turns that accesses to shared memory took, by those without bank conflicts."""
    found, _ = library()
    assert found is not None
    turns, least = ctypes.c_uint64(), ctypes.c_uint64()
    factor: list[float] = []
    found.mlkernels_simt_banks(1, ctypes.byref(turns), ctypes.byref(least))
    try:
        yield factor
    finally:
        found.mlkernels_simt_banks(0, ctypes.byref(turns), ctypes.byref(least))
        factor.append(turns.value / least.value)
