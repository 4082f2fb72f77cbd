"""Wrappers of whole models, which must leave alone what belongs to one rank."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .module import ClassParallelLoss


def sharded_parameters(module: nn.Module) -> set[nn.Parameter]:
    """The parameters of every :class:`ClassParallelLoss` within a module: what ``fully_shard`` is to leave alone.

    Its shards belong to one rank each, and its loss's own parameters come out equal on all ranks by themselves:
    ``fully_shard(model, ignored_params=sharded_parameters(model))``.
    """
    parts = (part for part in module.modules() if isinstance(part, ClassParallelLoss))
    return {parameter for part in parts for parameter in part.parameters()}


def data_parallel(module: nn.Module, **options: Any) -> DistributedDataParallel:
    """``DistributedDataParallel`` around a module that holds a :class:`ClassParallelLoss`, which torch refuses: what is
    replicated is averaged, and what is sharded is left alone.

    Args:
        module: a model and its linear head. options: torch's own, by keyword; ``process_group`` is that of the head.

    Example:
        >>> import torch, mlkernels
        >>> import torch.distributed as dist
        >>> from mlkernels.distributed import ClassParallelLoss, data_parallel
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> class Training(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.backbone = torch.nn.Linear(8, 8)
        ...         self.classifier = ClassParallelLoss(mlkernels.CrossEntropyLoss(), 8, 100)
        ...
        ...     def forward(self, input, target):
        ...         return self.classifier(self.backbone(input), target)
        >>> training = data_parallel(Training())
        >>> training(torch.randn(4, 8), torch.arange(4)).backward()
        >>> dist.destroy_process_group()
    """
    if sharded_parameters(module).issuperset(module.parameters()):
        raise ValueError(
            "module has nothing but class-parallel linear heads, which need no wrapper: their gradients are whole"
        )
    parts = [(name, part) for name, part in module.named_modules() if isinstance(part, ClassParallelLoss)]
    names = [f"{name}.{own}" for name, part in parts for own, _ in (*part.named_parameters(), *part.named_buffers())]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    return DistributedDataParallel(module, **options)
