"""Which backends there are, why the others are not, and which one serves a tensor."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch

from . import native

BACKENDS = ("reference", "cpu", "triton", "cuda")
#: The kernel backends per device type, best first; "reference" serves every device.
_SERVES: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "triton"), "cuda": ("triton",)}


@functools.cache
def _why_not(name: str) -> str | None:
    if name == "cpu":
        return native.cpu_missing
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if interpreted() or torch.cuda.is_available():
            return None
        return "there is no GPU (under TRITON_INTERPRET=1 its interpreter runs on the CPU, slowly)"
    if name == "cuda":
        return native.cuda_missing()
    return None


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _default(device_type: str) -> str:
    # The interpreter is for tests: nobody wants it by default.
    names = (name for name in _SERVES.get(device_type, ()) if (name, device_type) != ("triton", "cpu"))
    return next((name for name in names if _why_not(name) is None), "reference")


if native.cpu_missing is not None:
    warnings.warn(f"mlkernels runs on its slow reference backend: {native.cpu_missing}", RuntimeWarning, stacklevel=2)


def available_backends() -> dict[str, str | None]:
    """The backends by name: None where one can be used here, else why it cannot.

    Example:
        >>> import mlkernels
        >>> mlkernels.available_backends()["reference"] is None
        True
    """
    return {name: _why_not(name) for name in BACKENDS}


def choose(device: torch.device, backend: str | None) -> str:
    """The backend that serves tensors of this device, or a ValueError."""
    if backend is None:
        return _default(device.type)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
    why = _why_not(backend)
    if why is not None:
        raise ValueError(f"backend {backend!r} is not available: {why}")
    if backend == "triton" and device.type == "cpu" and not interpreted():
        raise ValueError("backend 'triton' serves tensors on 'cpu' only under TRITON_INTERPRET=1")
    if backend != "reference" and backend not in _SERVES.get(device.type, ()):
        raise ValueError(f"backend {backend!r} does not serve tensors on {device.type!r}")
    return backend
