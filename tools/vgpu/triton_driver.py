"""Triton's launches, run by the emulator: a driver of the kind that Triton itself has for each device.

Triton's own binder and compiler make every specialisation; what its driver would load and launch comes here. In a
process that calls :func:`install` the backend "triton" of mlkernels serves CPU tensors. Triton must not have been
imported under TRITON_INTERPRET=1, where ``triton.jit`` makes functions that nothing compiles.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.interpreter import InterpretedFunction

from . import Fault, Kernel, Memory, Module, Unavailable
from .launches import launches

#: The most shared memory of a block.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
_FORMATS = {"i1": "b", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q", "u64": "Q"}
_FORMATS |= {"fp32": "f", "fp64": "d"}


def _leaves(signature: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """The arguments that a kernel receives, with their types; tuples hold several, and constants are compiled in."""
    if isinstance(signature, (tuple, list)):
        for inner, part in zip(signature, value, strict=True):
            yield from _leaves(inner, part)
    elif signature != "constexpr":
        yield signature, value


def _pack(kernel: Kernel, arguments: Sequence[tuple[str, Any]]) -> tuple[bytes, Memory]:
    """The parameters' bytes, and the storages that their pointers lead to."""
    blob, memory = bytearray(kernel.parameter_bytes), Memory()
    # Behind the arguments Triton passes pointers to scratch memory, which is not asked for here.
    if len(arguments) > len(kernel.parameters):
        raise Fault(f"{len(arguments)} arguments for {len(kernel.parameters)} parameters")
    for (kind, value), (offset, size) in zip(arguments, kernel.parameters, strict=False):
        if kind[0] == "*":
            memory.add(value)
            form, value = "Q", value.data_ptr()
        else:
            form = _FORMATS[kind]
        if struct.calcsize(form) != size:
            raise Fault(f"an argument of type {kind} for a parameter of {size} bytes")
        struct.pack_into("<" + form, blob, offset, value)
    return bytes(blob), memory


class _Launcher:
    """What Triton calls for a launch."""

    def __init__(self, source: Any, metadata: Any):
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise Fault("a kernel that asks for scratch memory")
        self._signature = list(source.signature.values())
        self._metadata = metadata

    def __call__(
        self, x: int, y: int, z: int, stream: Any, function: Kernel, packed: Any, metadata: Any, enter: Any, leave: Any,
        *arguments: Any,
    ) -> None:  # fmt: skip
        if x * y * z == 0:
            return
        leaves = [leaf for pair in zip(self._signature, arguments, strict=True) for leaf in _leaves(*pair)]
        blob, memory = _pack(function, leaves)
        launches.run(
            f"triton {self._metadata.name}", function, blob, grid=(x, y, z), memory=memory,
            threads=(32 * self._metadata.num_warps, 1, 1), cluster=self._metadata.num_ctas,
            dynamic_shared=self._metadata.shared,
        )  # fmt: skip


class _Utils:
    def __init__(self, shared: int):
        self._shared = shared

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._shared, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Module, Kernel, int, int, int]:
        module = Module(binary.decode())
        return module, module.kernel(name), 0, 0, 1024

    def unload_module(self, module: Module) -> None:
        pass


class Driver(DriverBase):
    """A device of compute capability ``major.minor``, on CPU tensors."""

    def __init__(self, capability: int):
        super().__init__()
        self.capability = capability
        self.utils = _Utils(SHARED[capability])
        self.launcher_cls = _Launcher

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.capability, 10)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it has compiled by device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def _to_ptx_only(*arguments: Any) -> Any:
    """Compilations end with PTX: the assembler would take as long again. Without arguments this is asked for a key."""
    if not arguments:
        return "vgpu", "vgpu"
    arguments[1]["cubin"] = lambda source, metadata: source.encode()  # the stages
    return None


def install(target: str = "sm_90") -> None:
    """Backend "triton" for CPU tensors, compiled for this target, until the process ends or another target comes."""
    from mlkernels import backends
    from mlkernels.backends.triton import rows, tiles

    if isinstance(rows.visit, InterpretedFunction):
        raise Unavailable("Triton was imported under TRITON_INTERPRET=1")
    if not hasattr(knobs.runtime, "add_stages_inspection_hook"):
        raise Unavailable(f"Triton {triton.__version__} has no hook for the stages of a compilation")
    knobs.runtime.add_stages_inspection_hook = _to_ptx_only
    triton.runtime.driver.set_active(Driver(int(target.removeprefix("sm_"))))
    tiles.architecture = lambda device: target
    backends.interpreted = lambda: True  # what lets Triton have CPU tensors
    backends._why_not_interpreted = lambda triton, numpy: None
    backends._why_not.cache_clear()
