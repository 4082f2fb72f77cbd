"""A GPU's compiled kernels, executed on the CPU: PTX, instruction by instruction and strictly; see ``README.md``.

>>> from tools.vgpu import Memory, Module
>>> kernel = Module(text).kernel(name)                      # doctest: +SKIP
>>> kernel.run(parameters, grid=(4, 1, 1), threads=(128, 1, 1), memory=Memory.of(x, y))  # doctest: +SKIP
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

SOURCES = Path(__file__).resolve().parent / "emulator"

#: What a launch may be told, see README.
NO_RACES, UNDEFINED_WARNS, APPROXIMATE, LANE_CONFLICTS_WARN = 1, 2, 4, 8


class Fault(Exception):
    """What a kernel, or a launch, does wrong."""


class Unavailable(Exception):
    """Why there is no emulator here, in one line."""


# ---- the library -----------------------------------------------------------------------------------------------------


def cache() -> Path:
    """Where what is compiled is kept: ``MLKERNELS_VGPU_CACHE``, or the checkout's build directory."""
    chosen = os.environ.get("MLKERNELS_VGPU_CACHE")
    path = Path(chosen) if chosen else Path(__file__).resolve().parents[2] / "build" / "vgpu"
    path.mkdir(parents=True, exist_ok=True)
    return path


def digest(*parts: str | bytes) -> str:
    """A name for what is made of these."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else part.encode())
        found.update(b"\0")
    return found.hexdigest()[:20]


def command(line: Sequence[str | Path], **options: Any) -> str:
    """Runs a compiler; what it says is the error, never a reason to do without: the sources are ours."""
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{Path(str(line[0])).name} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def compiler() -> str:
    """A C++ compiler."""
    found = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if not found:
        raise Unavailable("no C++ compiler")
    return found


def _flags() -> list[str]:
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
    flags += ["-ffp-contract=off"]  # what is fused is what PTX fuses
    if platform.machine().lower() in ("x86_64", "amd64"):
        flags += ["-mfma", "-mf16c"]
    return flags


def _made(path: Path, line: Sequence[str | Path]) -> None:
    """Has a compiler make a file, as a whole: another process may look for it."""
    work = path.with_name(f"{os.getpid()}-{path.name}")
    command([*line, "-o", work])
    work.replace(path)


@functools.cache
def _library() -> ctypes.CDLL:
    sources = sorted(SOURCES.iterdir())
    cxx, flags = compiler(), _flags()
    path = cache() / f"emulator-{digest(cxx, *flags, *(source.read_bytes() for source in sources))}.so"
    if not path.exists():
        headers = [source.read_bytes() for source in sources if source.suffix == ".h"]

        def compiled(source: Path) -> Path:
            made = cache() / f"{source.stem}-{digest(cxx, *flags, source.read_bytes(), *headers)}.o"
            if not made.exists():
                _made(made, [cxx, *flags, "-c", source])
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, (source for source in sources if source.suffix == ".cpp")))
        _made(path, [cxx, "-shared", *objects])
    library = ctypes.CDLL(str(path))
    for name, result, arguments in (
        ("error", ctypes.c_char_p, []),
        ("load", ctypes.c_void_p, [ctypes.c_char_p]),
        ("unload", None, [ctypes.c_void_p]),
        ("kernels", ctypes.c_char_p, [ctypes.c_void_p]),
        ("kernel", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
        ("parameter_bytes", ctypes.c_int, [ctypes.c_void_p]),
        ("parameters", ctypes.c_char_p, [ctypes.c_void_p]),
        ("hits", ctypes.c_char_p, [ctypes.c_void_p]),
        ("warnings", ctypes.c_char_p, []),
        ("run", ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]),
    ):
        function = getattr(library, f"vgpu_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def unavailable() -> str | None:
    """Why the emulator cannot be built here, None where it can."""
    try:
        _library()
    except Unavailable as error:
        return str(error)
    return None


# ---- launches --------------------------------------------------------------------------------------------------------


class _Launch(ctypes.Structure):
    _fields_ = (
        ("parameters", ctypes.c_char_p),
        ("allocations", ctypes.POINTER(ctypes.c_uint64)),
        ("allocation_count", ctypes.c_int32),
        ("parameter_bytes", ctypes.c_int32),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32),
        ("dynamic_shared", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("most_steps", ctypes.c_uint64),
        ("flags", ctypes.c_int32),
    )


class Counts(NamedTuple):
    """What a launch did."""

    steps: int
    loads: int
    stores: int
    shared: int
    bulk_copies: int
    async_stores: int
    collectives: int
    waits: int


class Memory:
    """The allocations that a launch may touch, as (address, bytes)."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()):
        self.ranges = dict(ranges)

    @classmethod
    def of(cls, *tensors: Any) -> Memory:
        """The whole storages of tensors: a view may be reached from its neighbours, as on a device."""
        memory = cls()
        for tensor in tensors:
            memory.add(tensor)
        return memory

    def add(self, tensor: Any) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self.ranges[storage.data_ptr()] = storage.nbytes()


class Kernel:
    """A kernel of a :class:`Module`."""

    def __init__(self, module: Module, name: str):
        self._module = module  # owns what the handle points to
        self.name = name
        self._library = module._library
        self._handle = self._library.vgpu_kernel(module._handle, name.encode())
        if not self._handle:
            raise Fault(self._library.vgpu_error().decode())
        self.parameter_bytes: int = self._library.vgpu_parameter_bytes(self._handle)
        lines = self._library.vgpu_parameters(self._handle).decode().splitlines()
        #: (offset, bytes) of each parameter.
        self.parameters = [tuple(map(int, line.split())) for line in lines]
        #: What the last launch was warned of.
        self.warnings: list[str] = []

    def run(
        self,
        parameters: bytes,
        *,
        grid: Sequence[int],
        threads: Sequence[int],
        memory: Memory,
        cluster: int = 1,
        dynamic_shared: int = 0,
        seed: int = 1,
        flags: int = 0,
        most_steps: int = 0,
    ) -> Counts:
        """Runs a launch.

        Args:
            parameters: as many bytes as the kernel has parameters, laid out as PTX does.
            grid, threads: three numbers each; cluster: blocks of a cluster, along x.
            memory: what the kernel may touch.
            seed: of the order in which threads and asynchronous operations take their turns.
            most_steps: instructions before the launch is given up, 0: never.

        Raises:
            Fault: at the first thing that is wrong.
        """
        pairs = [number for pair in memory.ranges.items() for number in pair]
        launch = _Launch(
            parameters, (ctypes.c_uint64 * max(1, len(pairs)))(*pairs), len(pairs) // 2, len(parameters),
            (ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*threads), cluster, dynamic_shared, seed, most_steps,
            flags,
        )  # fmt: skip
        counts = (ctypes.c_uint64 * len(Counts._fields))()
        failed = self._library.vgpu_run(self._handle, ctypes.byref(launch), counts)
        self.warnings = self._library.vgpu_warnings().decode().splitlines()
        if failed:
            raise Fault(self._library.vgpu_error().decode())
        return Counts(*counts)

    def hits(self) -> dict[int, int]:
        """How often the instructions of each line have run, in all launches so far."""
        found: dict[int, int] = {}
        for line in self._library.vgpu_hits(self._handle).decode().splitlines():
            number, count = map(int, line.split())
            found[number] = max(found.get(number, 0), count)
        return found


class Module:
    """A text of PTX; its kernels are translated when first asked for."""

    def __init__(self, text: str):
        self._library = _library()
        self._handle = self._library.vgpu_load(text.encode())
        if not self._handle:
            raise Fault(self._library.vgpu_error().decode())
        self.names: list[str] = self._library.vgpu_kernels(self._handle).decode().split()
        self._kernels: dict[str, Kernel] = {}

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.vgpu_unload(self._handle)
            self._handle = None

    def kernel(self, name: str | None = None) -> Kernel:
        """The kernel of this name; without one the only one that there is."""
        if name is None:
            (name,) = self.names
        if name not in self._kernels:
            self._kernels[name] = Kernel(self, name)
        return self._kernels[name]
