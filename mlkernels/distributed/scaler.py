"""Loss scaling where some parameters are sharded and others are not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..positional import by_name


@by_name
class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` for plain and sharded parameters together, which torch refuses to mix; a step that is
    skipped is skipped on all ranks.

    Args:
        device: as torch's. process_group: the ranks that step together; None: all. They call ``step`` (or ``unscale_``)
            alike. options: torch's own, by keyword.

    Example:
        >>> import torch, mlkernels
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> classifier = mlkernels.distributed.ClassParallelLoss(mlkernels.CrossEntropyLoss(), 8, 100)
        >>> optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
        >>> scaler = mlkernels.distributed.GradScaler("cpu", init_scale=1024.0)
        >>> scaler.scale(classifier(torch.randn(4, 8), torch.arange(4))).backward()
        >>> _ = scaler.step(optimizer)
        >>> scaler.update()
        >>> dist.destroy_process_group()
    """

    def __init__(self, device: str = "cuda", *, process_group: dist.ProcessGroup | None = None, **options: Any) -> None:
        super().__init__(device, **options)
        self._process_group = process_group

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        every = [p for group in optimizer.param_groups for p in group["params"]]
        shards = SimpleNamespace(param_groups=[{"params": [_local(p) for p in every]}])
        found = super()._unscale_grads_(shards, inv_scale, found_inf, allow_fp16)  # type: ignore[arg-type]
        # A rank whose gradients are all right, or which has none, skips the step with the others.
        worst = torch.stack([each.to(found_inf.device) for each in (found_inf, *found.values())]).amax()
        dist.all_reduce(worst, dist.ReduceOp.MAX, self._process_group)
        return {device: worst.to(device) for device in (found or {found_inf.device: found_inf})}


def _local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter and its gradient, which is unscaled where it lies."""
    if not isinstance(parameter, DTensor):
        return parameter
    part: Tensor = cast(DTensor, parameter.detach()).to_local()
    gradient = parameter.grad
    part.grad = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return part
