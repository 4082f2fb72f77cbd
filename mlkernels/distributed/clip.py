"""Gradient clipping where some parameters are sharded and others are not."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2.0) -> Tensor:
    r"""``torch.nn.utils.clip_grad_norm_`` for plain and sharded parameters together, which torch refuses to mix.

    The norm is that of the whole gradient, shards of other ranks included; all ranks call it alike.

    Args:
        parameters: of a backbone (plain, alike on all ranks) and of a :class:`ClassParallelLoss` (DTensors).
        max_norm: gradients are scaled by max_norm / norm where the norm is larger. norm_type: p > 0, inf included.

    Returns:
        The norm before, 0-d, the same on every rank.

    Example:
        >>> import torch
        >>> from mlkernels.distributed import clip_grad_norm_
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([weight], max_norm=1.0)
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    if not norm_type > 0 or not max_norm >= 0:
        raise ValueError(f"max_norm must be >= 0 and norm_type > 0, got {max_norm} and {norm_type}")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = []
    for gradient in gradients:
        if isinstance(gradient, DTensor) and norm_type == math.inf:
            norm = _largest(gradient)
        else:
            norm = torch.linalg.vector_norm(gradient, norm_type)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not norms:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)
    factor = max_norm / (total + 1e-6) if max_norm < math.inf else torch.ones_like(total)
    for gradient in gradients:
        own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        own.mul_(factor.clamp(max=1.0).to(own.device, own.dtype))
    return total


def _largest(gradient: DTensor) -> Tensor:
    """Its infinity norm; torch refuses that of an empty shard, on its rank alone, while the others wait."""
    own = gradient.to_local().detach().abs()
    largest = own.max() if own.numel() else own.new_zeros(())
    mesh = gradient.device_mesh
    return DTensor.from_local(largest, mesh, [Partial("max")] * mesh.ndim, run_check=False).full_tensor()
