"""Which backends there are, why the others are not, and which one serves a tensor."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from ..spec import constant_when_compiled
from . import native

BACKENDS = ("reference", "cpu", "triton", "cuda")
#: The kernel backends per device type, best first, though on a GPU choice.json has the last word; "reference" serves
#: every device.
_SERVES: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "triton"), "cuda": ("triton", "cuda")}
#: Which of a GPU's backends serves how many classes, by architecture; ``python -m bench.tune`` measures and writes it.
CHOICE = Path(__file__).with_name("choice.json")
LAYOUTS = ("classes_side_by_side", "rows_side_by_side")


def _why_not_interpreted(of_triton: str, of_numpy: str) -> str | None:
    def older(version: str, major: int, minor: int) -> bool:
        return tuple(map(int, version.split(".")[:2])) < (major, minor)

    if older(of_triton, 3, 7) and not older(of_numpy, 2, 4):  # it converts arrays of one element, which numpy gave up
        return f"the interpreter of triton {of_triton} does not run with numpy {of_numpy}; pip install 'numpy<2.4'"
    return None


@functools.cache
def _why_not(name: str) -> str | None:
    if name == "cpu":
        return native.cpu_missing
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if interpreted():
            return _why_not_interpreted(importlib.import_module("triton").__version__, numpy.__version__)
        if torch.cuda.is_available():
            return None
        return f"{native.no_gpu()} (under TRITON_INTERPRET=1 Triton's interpreter runs on the CPU, slowly)"
    if name == "cuda":
        return native.cuda_missing()
    return None


def _why_not_on(device: torch.device, name: str) -> str | None:
    """The same for a device: in a machine of unlike GPUs there may be code for one and not for the other."""
    why = _why_not(name)
    if why is None and name == "cuda" and device.type == "cuda":
        why = native.cuda_unusable(torch.cuda.current_device() if device.index is None else device.index)
    return why


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def architecture(device: torch.device) -> str:
    """The device's generation, as the measured tables name it."""
    if device.type != "cuda":
        return "default"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


class Preferred(NamedTuple):
    """The backends by number of classes: those that serve so many at most, ascending, and the one for all others."""

    up_to: tuple[tuple[int, str], ...]
    others: str


def check_choice(table: Any, where: str) -> None:
    """A choice table, or a ValueError that says what is wrong with it."""

    def require(good: bool, what: str) -> None:
        if not good:
            raise ValueError(f"{where}: {what}")

    require(isinstance(table, dict) and "default" in table, "must be an object with an entry 'default'")
    for name, entry in table.items():
        require(isinstance(entry, dict), f"{name!r} must be an object, got {entry!r}")
        for layout in LAYOUTS:
            if layout not in entry and name != "default":
                continue  # the default's
            rows = entry.get(layout)
            of = f"{layout!r} of {name!r}"
            require(isinstance(rows, list) and len(rows) > 0, f"{of} must be a list of rows, got {rows!r}")
            for row in rows:
                good = isinstance(row, list) and len(row) == 2 and type(row[0]) is int and row[1] in _SERVES["cuda"]
                require(good, f"{of} must hold [classes, {' or '.join(map(repr, _SERVES['cuda']))}], got {row!r}")
            limits = [row[0] for row in rows]
            ascending = limits[-1] == 0 and limits[:-1] == sorted({*limits[:-1]}) and 0 not in limits[:-1]
            require(ascending and min(limits) == 0, f"{of} must ascend from 1 and end with 0, any number; got {limits}")


@functools.cache
def _preferred(device: torch.device) -> str | tuple[Preferred, Preferred]:
    # The interpreter is for tests: nobody wants it by default.
    names = (name for name in _SERVES.get(device.type, ()) if (name, device.type) != ("triton", "cpu"))
    usable = [name for name in names if _why_not_on(device, name) is None]
    if device.type != "cuda" or len(usable) < 2:
        return usable[0] if usable else "reference"
    table = json.loads(CHOICE.read_text())
    check_choice(table, str(CHOICE))
    own = {**table["default"], **table.get(architecture(device), {})}
    first, second = (
        Preferred(tuple((limit, name) for limit, name in rows[:-1]), rows[-1][1])
        for rows in (own[layout] for layout in LAYOUTS)
    )
    # Under torch.compile a layout may be a symbol: it is not looked at where the answer does not matter.
    return first.others if first == second == Preferred((), first.others) else (first, second)


@constant_when_compiled
def preferred(device: torch.device) -> str | tuple[Preferred, Preferred]:
    """What ``backend=None`` takes on a device; by number of classes for each of LAYOUTS where these count."""
    return _preferred(device)


def _unknown(backend: object) -> str:
    return f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}"


def check_backend(backend: str | None) -> None:
    """A ValueError for a name that no backend has; whether it serves a device is known where there are tensors."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(_unknown(backend))


@constant_when_compiled
def refusal(device: torch.device, backend: str) -> str | None:
    """Why a backend, called by its name, does not serve a device; None where it does."""
    if backend not in BACKENDS:
        return _unknown(backend)
    why = _why_not_on(device, backend)
    if why is not None:
        return f"backend {backend!r} is not available: {why}"
    if backend == "triton" and device.type == "cpu" and not interpreted():
        return "backend 'triton' serves tensors on 'cpu' only under TRITON_INTERPRET=1"
    if backend != "reference" and backend not in _SERVES.get(device.type, ()):
        return f"backend {backend!r} does not serve tensors on {device.type!r}"
    return None


if native.cpu_missing is not None:
    warnings.warn(f"mlkernels runs on its slow reference backend: {native.cpu_missing}", RuntimeWarning, stacklevel=2)


def _why_nowhere(name: str) -> str | None:
    """Why no device of the machine can use a backend."""
    why = _why_not(name)
    if why is not None or name != "cuda":
        return why
    reasons = [native.cuda_unusable(index) for index in range(torch.cuda.device_count())]
    if not reasons or None in reasons:
        return None
    if len({*reasons}) == 1:
        return reasons[0]
    return "; ".join(f"on cuda:{index}, {reason}" for index, reason in enumerate(reasons))


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """The backends by name: None where one can be used here, else why it cannot.

    Args:
        device: the answer for this device's tensors; by default a backend is there if any device can use it, which in a
            machine of unlike GPUs need not be the current one.

    Example:
        >>> import mlkernels
        >>> mlkernels.available_backends()["reference"] is None
        True
        >>> mlkernels.available_backends("cpu")["reference"] is None
        True
    """
    if device is None:
        return {name: _why_nowhere(name) for name in BACKENDS}
    device = torch.device(device)
    return {name: refusal(device, name) for name in BACKENDS}


def choose(device: torch.device, backend: str | None, classes: int = 0, rows_side_by_side: bool = False) -> str:
    """The backend that serves tensors of this device, or a ValueError.

    How many rows there are does not count: a row's results do not depend on the batch it is in, and two backends round
    differently. So what is small, and hangs on the host's time, is told by the classes: until a table is measured the
    CUDA kernels, whose operators cost the host less than Triton's, have rows of few classes where they load.
    """
    if backend is not None:
        why = refusal(device, backend)
        if why is not None:
            raise ValueError(why)
        return backend
    found = preferred(device)
    if isinstance(found, str):
        return found
    by_classes = found[1] if rows_side_by_side else found[0]
    for limit, name in by_classes.up_to:
        if classes <= limit:
            return name
    return by_classes.others
