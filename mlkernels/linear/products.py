"""Products that are rounded no earlier than their sums: half operands into float32.

On a GPU the tensor cores do that where ``out_dtype`` says so. The CPU has no such thing: there operands are widened.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def multiply_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a b, in the dtype of out."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":
        return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(sum: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum + a b, in its place and dtype."""
    if a.dtype == sum.dtype:
        return sum.addmm_(a, b)
    if a.device.type == "cpu":
        return sum.addmm_(a.to(sum.dtype), b.to(sum.dtype))
    if _adds_in_place(a.device, a.dtype, sum.dtype):
        torch.ops.aten.addmm.dtype_out(sum, a, b, sum.dtype, out=sum)
        return sum
    return sum.add_(torch.mm(a, b, out_dtype=sum.dtype))


@functools.cache
def _adds_in_place(device: torch.device, operands: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether this torch adds such a product to a sum of another dtype; some take one of the operands' alone.

    The meta tensors of torch 2.11 take the dtype for beta.
    """
    a, sum = (torch.zeros(16, 16, dtype=kind, device=device) for kind in (operands, dtype))
    try:
        torch.ops.aten.addmm.dtype_out(sum, a, a, dtype, out=sum)
    except (RuntimeError, TypeError):
        return False
    return True


def add_at(sums: Tensor, index: Tensor, rows: Tensor) -> None:
    """Adds each row at its index, the same bits on every run: on a GPU index_add_ is atomic, and index_put_ sorts."""
    if sums.device.type == "cpu":
        sums.index_add_(0, index, rows)
    else:
        sums.index_put_((index,), rows, accumulate=True)


def lengths(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The norms (..., 1) of rows (..., D). NaN where the squares overflow: no direction is 0, as 1/inf would say."""
    found: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=dtype)
    return torch.where(found < math.inf, found, math.nan)


def along_length(gradient: Tensor, direction: Tensor, length: Tensor | None) -> Tensor:
    """The gradient of features from that of their directions, where it is these that are multiplied."""
    if length is None:
        return gradient
    return (gradient - (gradient * direction).sum(1, keepdim=True) * direction) / length
