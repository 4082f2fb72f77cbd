"""Memory that is kept from step to step, for what the CPU's operators do not allocate themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import native
from .tracing import functorch_level, is_batched, observed

#: As csrc/cpu/buffers.h has it: smaller ones torch's allocator keeps itself.
BUFFER_FROM = 4 << 20


def serves(nbytes: int, *tensors: Tensor) -> bool:
    """Whether so much memory shall come from here: of plain tensors on the CPU, whose autograd is the usual one."""
    if observed(*tensors) or nbytes < BUFFER_FROM:  # in this order: sizes may be symbols
        return False
    return (
        all(tensor.device.type == "cpu" for tensor in tensors)
        and native.cpu_missing is None
        and functorch_level() is None
        and forward_ad._current_level < 0
        and not any(map(is_batched, tensors))
    )


def empty(like: Tensor, sizes: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous, with anything in it, of a dtype, which is another's where none is given."""
    if dtype is not None and dtype != like.dtype:
        like = torch.empty((), dtype=dtype)
    found: Tensor = torch.ops.mlkernels.buffer_like.default(like, sizes)
    return found
