"""The state of models and optimizers by name, and writing it in place."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, shared ones once."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


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
