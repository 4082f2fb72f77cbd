"""What a model, an optimizer and their like hold, set aside and put back to the bit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .state import named_tensors, put


class Snapshot:
    """A twin of the state of ``parts``: modules, optimizers, and anything else with a ``state_dict``.

    ``save`` may be called again; ``restore`` any number of times. Live tensors are written in place where they still
    fit; state that was born since ``save`` is taken away again.
    """

    def __init__(self, *parts: Any) -> None:
        self._parts = parts
        self._twins: list[Any] = []

    def save(self) -> None:
        """Set the state aside."""
        self._twins = [_save(part) for part in self._parts]

    def restore(self) -> None:
        """Put the state back."""
        for part, twin in zip(self._parts, self._twins, strict=True):
            _restore(part, twin)


def _save(part: Any) -> Any:
    if isinstance(part, nn.Module):
        return {name: tensor.detach().clone() for name, tensor in named_tensors(part).items()}
    if isinstance(part, torch.optim.Optimizer):
        state = {parameter: _copy(values) for parameter, values in part.state.items()}
        return state, [_copy({k: v for k, v in group.items() if k != "params"}) for group in part.param_groups]
    return copy.deepcopy(part.state_dict())


def _restore(part: Any, twin: Any) -> None:
    if isinstance(part, nn.Module):
        live = named_tensors(part)
        torch._foreach_copy_([live[name].detach() for name in twin], list(twin.values()))
    elif isinstance(part, torch.optim.Optimizer):
        state, groups = twin
        for parameter in [p for p in part.state if p not in state]:
            del part.state[parameter]
        for parameter, values in state.items():
            put(part.state[parameter], values)
        for group, options in zip(part.param_groups, groups, strict=True):
            put(group, options, keep=("params",))
    else:
        part.load_state_dict(copy.deepcopy(twin))


def _copy(values: dict[Any, Any]) -> dict[Any, Any]:
    return {k: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in values.items()}
