"""The CUDA library's launches, run by the emulator: its own objects, as nvcc made them, over ``cuda_runtime.cpp``.

The host code that ships chooses every kernel, its grid, cluster and shared memory, and fills its arguments. The kernels
themselves are nvcc's PTX of the same sources, from the same compilation or for another architecture. In a process that
calls :func:`install` the backend "cuda" of mlkernels serves CPU tensors.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import Kernel, Memory, Module, Unavailable, cache, command, digest
from .launches import launches, poisoned

ROOT = Path(__file__).resolve().parents[2]
PATHS = ("short", "long", "streamed", "strided")
#: By compute capability: multiprocessors, and the most shared memory of a block.
DEVICES = {"80": (108, 163 << 10), "90": (132, 227 << 10)}
_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint,
)  # fmt: skip


def _build() -> ModuleType:
    path = str(ROOT / "csrc")
    if path not in sys.path:
        sys.path.insert(0, path)
    import build

    return build


# ---- what is compiled ------------------------------------------------------------------------------------------------

_HERE = cache() / "cuda"
#: The architecture whose PTX the objects hold; that of others is compiled when asked for.
_ARCH = "90"


@functools.cache
def _make() -> tuple[Path, dict[str, Path]]:
    """The library, and the PTX of its objects by their names."""
    build = _build()
    try:
        nvcc, torch_path, cxx = build.find_nvcc(), build.find_torch(), build.find_compiler()
        root = build.cuda_root(nvcc)
        texts, units = {}, []
        # No machine code: only the host's code runs, and PTX.
        for unit in build.cuda_units(nvcc, cxx, _HERE, [], f"-gencode=arch=compute_{_ARCH},code=compute_{_ARCH}"):
            kept = _HERE / unit.output.stem
            kept.mkdir(parents=True, exist_ok=True)
            texts[unit.output.stem] = kept / f"{unit.output.stem.split('_')[0]}.ptx"
            units.append(unit._replace(command=[*unit.command, "--keep", "--keep-dir", str(kept)]))
        host = build.library_cuda(torch_path, cxx, root, [_ARCH])
        units.append(build.compiled(_HERE / "library_cuda.o", build.CSRC / "library_cuda.cpp", host))
        units.append(build.compiled(_HERE / "cuda_runtime.o", Path(__file__).with_name("cuda_runtime.cpp"), host))
        line = [*cxx, "-shared", *(str(unit.output) for unit in units)]
        line += [f"-Wl,--wrap=aoti_torch_{name}" for name in ("get_data_ptr", "empty_strided")]
        line += [f"-L{torch_path / 'lib'}", "-ltorch_cpu"]
        library = build.Unit(_HERE / "vgpu_cuda.so", [unit.output for unit in units], line)
        return build.make_units([*units, library])[-1], texts
    except build.DoesNotCompile:
        raise
    except build.CannotBuild as error:
        raise Unavailable(str(error)) from None


@functools.cache
def _contents() -> bytes:
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cu"))
    return b"".join(path.read_bytes() for path in sources)


@functools.cache
def text(arch: str, storage: str | None) -> str:
    """nvcc's PTX of the rows of a storage type, or without one of the others."""
    stem = "others" if storage is None else f"rows_{storage}"
    if arch == _ARCH:
        return _make()[1][stem].read_text()
    build = _build()
    flags = [flag for flag in build.NVCC_FLAGS if "compress" not in flag]
    line = [build.find_nvcc(), *flags, "-Icsrc", f"-arch=compute_{arch}", "-ptx", f"csrc/cuda/{stem.split('_')[0]}.cu"]
    line += [f"-DMLK_STORAGE={storage}"] if storage else []
    path = _HERE / f"{stem}.{arch}.{digest(*map(str, line), _contents())}.ptx"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        command([*line, "-o", partial], cwd=ROOT)
        partial.replace(path)
    return path.read_text()


_modules: dict[tuple[str, str | None], Module] = {}


def ptx(arch: str, storage: str | None) -> Module:
    """The kernels in it."""
    if (arch, storage) not in _modules:
        _modules[arch, storage] = Module(text(arch, storage))
    return _modules[arch, storage]


@contextmanager
def replaced(arch: str, storage: str | None, module: Module) -> Iterator[None]:
    """Other kernels in its place."""
    before = ptx(arch, storage)
    _modules[arch, storage] = module
    try:
        yield
    finally:
        _modules[arch, storage] = before


def _storage_of(name: str) -> str | None:
    """Which text holds a kernel, by the type that its mangled name ends its template arguments with."""
    if "RowsShort" not in name and "RowsLong" not in name and "RowsStrided" not in name:
        return None
    if "bfloat16" in name:
        return "bfloat16"
    if "float16" in name:
        return "float16"
    return "double" if "Idd" in name else "float"


# ---- the library -----------------------------------------------------------------------------------------------------


class _Library:
    def __init__(self) -> None:
        path, _ = _make()
        import mlkernels  # noqa: F401  (the schemas must exist before their implementations load)

        torch.ops.load_library(str(path))
        self.library = ctypes.CDLL(str(path))
        self.library.vgpu_why.restype = ctypes.c_char_p
        self.arch: str | None = None
        self.error: BaseException | None = None
        self._callback = _Callback(self._launch)
        self.library.vgpu_on_launch(self._callback)

    def _kernel(self, name: str) -> Kernel:
        return ptx(self.arch, _storage_of(name)).kernel(name)

    def _launch(self, name: bytes, arguments: Any, grid: Any, block: Any, cluster: int, shared: int) -> int:
        if self.error is not None:
            return 1
        try:
            kernel = self._kernel(name.decode())
            blob = bytearray(kernel.parameter_bytes)
            for pointer, (offset, size) in zip(arguments, kernel.parameters, strict=False):
                blob[offset : offset + size] = ctypes.string_at(pointer, size)
            pairs = (ctypes.c_uint64 * (2 << 14))()
            count = self.library.vgpu_storages(pairs, 1 << 14)
            memory = Memory((pairs[2 * k], pairs[2 * k + 1]) for k in range(count))
            launches.run(
                f"cuda sm_{self.arch} {name.decode()}", kernel, bytes(blob), grid=grid[:3], threads=block[:3],
                memory=memory, cluster=cluster, dynamic_shared=shared,
            )  # fmt: skip
        except BaseException as error:  # it must not cross the C frames above
            self.error = error
            return 1
        return 0

    def operator(self, name: str) -> Callable[..., Any]:
        """One of the package's operators, by the implementation that it has on a GPU."""
        overload = getattr(torch.ops.mlkernels_cuda, name).default
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.error = None
            self.library.vgpu_forget()
            try:
                with poisoned(), torch._C._AutoDispatchBelowAutograd():
                    found = overload.redispatch(keys, *arguments, **keywords)
            except Exception:
                if self.error is not None:
                    raise self.error from None
                raise
            if self.error is not None:
                raise self.error
            return found

        return call


@functools.cache
def library() -> _Library:
    return _Library()


def install(arch: str = "90") -> None:
    """Backend "cuda" for CPU tensors, on a device of this compute capability; a process has one, as the library asks
    a device once what it has."""
    from mlkernels import backends, ops

    found = library()
    if found.arch not in (None, arch):
        raise ValueError(f"this process has a device of compute capability {found.arch}, got {arch}: start another")
    found.arch = arch
    multiprocessors, shared = DEVICES[arch]
    found.library.vgpu_device(multiprocessors, int(arch) // 10, shared)
    ops.CUDA = ops.Kernels(*map(found.operator, ops._FAKES), refresh=found.operator("softmax_loss_refresh"))
    if "cuda" not in backends._SERVES["cpu"]:
        backends._SERVES["cpu"] = (*backends._SERVES["cpu"], "cuda")
        why_not = backends._why_not
        backends._why_not = lambda name: None if name == "cuda" else why_not(name)


@contextmanager
def forced(
    *, path: str | None = None, warps: int = 0, cluster: int = 0, chunk: int = 0, slots: int = 0, tile_rows: int = 0,
    teams: int = 0,
) -> Iterator[None]:  # fmt: skip
    """Launches of another shape than the device's."""
    force = library().library.vgpu_force
    force(0 if path is None else PATHS.index(path) + 1, warps, cluster, chunk, slots, tile_rows, teams)
    try:
        yield
    finally:
        force(0, 0, 0, 0, 0, 0, 0)
