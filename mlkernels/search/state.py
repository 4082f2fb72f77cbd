"""The state of models and optimizers by name, and writing it in place."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


def held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of an optimizer, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def without(group: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The options of a group: all but what names its parameters."""
    return {name: value for name, value in group.items() if name not in names}


def put(live: dict[Any, Any], values: dict[Any, Any], keep: tuple[str, ...] = ()) -> None:
    """Make ``live`` hold what ``values`` holds: in place where a tensor fits."""
    for key in [k for k in live if k not in values and k not in keep]:
        del live[key]
    for key, value in values.items():
        there = live.get(key)
        if (
            isinstance(value, Tensor)
            and isinstance(there, Tensor)
            and (there.shape, there.dtype, there.device) == (value.shape, value.dtype, value.device)
        ):
            there.detach().copy_(value)
        else:
            live[key] = value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
