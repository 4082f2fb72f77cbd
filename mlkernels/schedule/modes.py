"""What an attempt changes beside the state: the global random generators, and the model's modes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


class Randomness:
    """The global generators: torch's on the CPU and on a model's devices, Python's, NumPy's."""

    def __init__(self, model: nn.Module) -> None:
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        self._devices = [device for device in devices if device.type not in ("cpu", "meta")]
        self._cpu = torch.get_rng_state()
        self._states = [torch.get_device_module(device).get_rng_state(device) for device in self._devices]
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - others use it

    def restore(self) -> None:
        """Puts all of them back."""
        torch.set_rng_state(self._cpu)
        for device, state in zip(self._devices, self._states, strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, then each as it was: a frozen batch norm stays frozen."""
    # Not model.eval() and model.train(): overridden ones merge and unmerge weights, which rounds them.
    modes = [(module, "training", module.training) for module in model.modules()]
    # After a forward without gradients DDP's next one would not broadcast the buffers.
    syncs = [
        (module, "require_forward_param_sync", module.require_forward_param_sync)
        for module in model.modules()
        if hasattr(module, "require_forward_param_sync")
    ]
    try:
        for module, name, _ in modes:
            setattr(module, name, False)
        yield
    finally:
        for module, name, value in (*modes, *syncs):
            setattr(module, name, value)
