"""``python -m mlkernels``: what is installed, what runs here, and why the rest does not."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

import torch

from . import __version__, available_backends, fast_path
from .backends import native


def _triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[str]:
    yield f"cpu: {platform.machine()}, {torch.get_num_threads()} threads, kernels for {native.cpu_isa() or 'none'}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory, count = properties.total_memory / 2**30, properties.multi_processor_count
        why = native.cuda_unusable(index)
        but = f"; not for backend cuda: {why}" if why else ""
        yield f"cuda:{index}: {properties.name}, {memory:.0f} GiB, {count} multiprocessors{but}"


def main() -> None:
    """Prints the report."""
    lines = [
        ("mlkernels", __version__),
        ("torch", str(torch.__version__)),
        ("triton", _triton()),
        ("python", f"{platform.python_version()} on {platform.system()}"),
        *(("device", device) for device in _devices()),
        *((f"backend {name}", why or "available") for name, why in available_backends().items()),
        ("fast path", fast_path.missing or "available"),
    ]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
