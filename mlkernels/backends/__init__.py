"""Which backends there are, why the others are not, and which one serves a tensor."""

from __future__ import annotations

import warnings

import torch

from . import native

#: In order of preference per device type; "reference" serves every device.
_PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu",)}
BACKENDS = ("reference", "cpu", "triton", "cuda")


def _why_not(name: str) -> str | None:
    if name == "cpu":
        return native.cpu_missing
    if name in ("triton", "cuda"):
        return "not part of this version"
    return None


_missing = {name: _why_not(name) for name in BACKENDS}
_default = {
    device: next((name for name in names if _missing[name] is None), "reference")
    for device, names in _PREFERENCE.items()
}

if _missing["cpu"] is not None:
    warnings.warn(f"mlkernels runs on its slow reference backend: {_missing['cpu']}", RuntimeWarning, stacklevel=2)


def available_backends() -> dict[str, str | None]:
    """The backends by name: None where one can be used here, else why it cannot.

    Example:
        >>> import mlkernels
        >>> mlkernels.available_backends()["reference"] is None
        True
    """
    return dict(_missing)


def choose(device: torch.device, backend: str | None) -> str:
    """The backend that serves tensors of this device, or a ValueError."""
    if backend is None:
        return _default.get(device.type, "reference")
    if backend not in _missing:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
    why = _missing[backend]
    if why is not None:
        raise ValueError(f"backend {backend!r} is not available: {why}")
    if backend != "reference" and backend not in _PREFERENCE.get(device.type, ()):
        raise ValueError(f"backend {backend!r} does not serve tensors on {device.type!r}")
    return backend
