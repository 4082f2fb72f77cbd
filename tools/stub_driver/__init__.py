"""Triton's whole host path without a GPU: its own driver class over a ``libcuda.so.1`` that answers and counts.

    from tools import stub_driver

    stub = stub_driver.install()  # before Triton launches anything; TRITON_INTERPRET must not be set
    mlkernels.cross_entropy(x, y, backend="triton").backward()
    stub.launches, stub.modules

Kernels are compiled (``ptxas`` comes with Triton), loaded and launched by Triton's own code; nothing is computed, and
tensors lie in the host's memory. ``libcuda.c`` is compiled into a cache when it is first needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("libcuda.c")


def compiled(folder: Path | None = None) -> Path:
    """The library; its folder holds nothing else, so it can be searched for it."""
    text = SOURCE.read_bytes()
    cache = folder or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mlkernels" / "stub_driver"
    library = cache / hashlib.sha256(text).hexdigest()[:16] / "libcuda.so.1"
    if not library.exists():
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise RuntimeError("the stub driver needs a C compiler: set CC")
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:  # another process may be doing the same
            made = Path(work) / "libcuda.so.1"
            options = ["-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1"]
            subprocess.run([compiler, *options, str(SOURCE), "-o", str(made)], check=True)
            made.replace(library)
    return library


class _Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("modules", "launches", "pointers")]


class Launch(ctypes.Structure):
    """What the driver was told of a launch."""

    _fields_ = [
        ("name", ctypes.c_char * 128),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("device", ctypes.c_int),
        ("stream", ctypes.c_uint64),
    ]


_WATCHER = ctypes.CFUNCTYPE(None, ctypes.POINTER(Launch), ctypes.POINTER(ctypes.c_void_p))


class Stub:
    """The stub under Triton's driver."""

    def __init__(self, library: ctypes.CDLL, driver: Any):
        self._library, self.driver = library, driver
        library.stub_counts.restype = ctypes.POINTER(_Counts)
        library.stub_latest.restype = ctypes.POINTER(Launch)
        self._counts: _Counts = library.stub_counts().contents
        self._watcher: Any = None
        #: The device and the stream that torch would say are current.
        self.device, self.stream = 0, 0

    modules = property(lambda self: self._counts.modules, doc="Kernels loaded since the last reset.")
    launches = property(lambda self: self._counts.launches, doc="Kernels launched since the last reset.")
    pointers = property(lambda self: self._counts.pointers, doc="Addresses that the launcher asked about.")

    @property
    def latest(self) -> Launch:
        """The latest launch."""
        return Launch.from_buffer_copy(self._library.stub_latest().contents)

    def reset(self) -> None:
        """Counts from 0."""
        self._library.stub_reset()

    def watch(self, function: Callable[[Launch, Any], None] | None) -> None:
        """Calls a function at every launch, with what is launched and the addresses of its parameters."""
        self._watcher = _WATCHER(lambda what, parameters: function(what.contents, parameters)) if function else None
        self._library.stub_watch(self._watcher)


def install(capability: int = 90, folder: Path | None = None) -> Stub:
    """Puts the stub under Triton's driver and makes that the active one, for GPUs of a compute capability."""
    path = compiled(folder)
    # Opened for all: what is linked against or opens libcuda.so.1 from now on gets this one.
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.stub_capability(capability)
    assert library.cuInit(0) == 0
    os.environ["TRITON_LIBCUDA_PATH"] = str(path.parent)

    import triton
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    stub = Stub(library, driver)

    def make_current(device: int) -> None:
        stub.device = device
        library.cuCtxSetCurrent(ctypes.c_void_p(device + 1))

    # The four things that it has torch do, which on a CPU build cannot.
    driver.get_device_capability = lambda device: divmod(capability, 10)
    driver.get_current_device = lambda: stub.device
    driver.get_current_stream = lambda device: stub.stream
    driver.set_current_device = make_current
    make_current(0)
    triton.runtime.driver.set_active(driver)
    return stub


@contextlib.contextmanager
def served(architecture: str = "sm_90") -> Iterator[None]:
    """Meanwhile ``backend="triton"`` takes CPU tensors as it takes a GPU's, whose labels nobody looks at."""
    call = importlib.import_module("mlkernels.call")
    backends = importlib.import_module("mlkernels.backends")
    tiles = importlib.import_module("mlkernels.backends.triton.tiles")
    kept = backends.interpreted, backends._why_not_interpreted, call.check_indices, tiles.architecture
    backends.interpreted = lambda: True
    backends._why_not_interpreted = lambda triton, numpy: None  # nothing is: any numpy will do
    call.check_indices = lambda *arguments: None
    tiles.architecture = lambda device: architecture
    backends._why_not.cache_clear()
    try:
        yield
    finally:
        backends.interpreted, backends._why_not_interpreted, call.check_indices, tiles.architecture = kept
        backends._why_not.cache_clear()
