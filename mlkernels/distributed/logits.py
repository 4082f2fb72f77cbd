"""Logits of which each rank has a part: what a loss of the family is called with in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..linear import threads
from ..linear.autograd import has_hooks
from ..linear.logits import LinearLogits
from ..linear.loop import Call, Wanted
from ..numbering import TRAINABLE
from . import agreement
from .group import Group, offsets
from .loop import Shard, class_parallel_loss


class PartLogits(LinearLogits):
    """Logits of which this rank has a part."""

    def __init__(self, group: Group, classes: int, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.group, self.classes = group, classes
        #: Whether the ranks have met, and go on alike: what is raised then is raised on all.
        self.met = False

    def shaped(self) -> Tensor:
        leading = self.input.shape[:-1]
        return self.input.detach().new_empty(()).expand(leading[0], self.classes, *leading[1:])

    def refused(self, error: Exception) -> None:
        if not self.met:
            self.met = True
            self.group.meet({}, error=error)


class ShardedLogits(PartLogits):
    """The logits of this rank's rows over the classes of all ranks, by its part of the weight."""

    def most(self, rows: int, call: Call, params: dict[int, Tensor]) -> tuple[int, int]:
        # A collective that some ranks leave out, or make of another size, would be waited for by the others.
        signature = {
            "call": "loss",
            "dtype": (str(self.input.dtype), str(self.weight.dtype)),
            "in_features": self.weight.shape[1],
            "num_classes": self.classes,
            "bias": self.bias is not None,
            "normalize": call.normalize,
            "return_stats": call.return_stats,
            "strategy": self.strategy,
            "memory": self.memory,
            "tile_update": self.begin is not None,
            "kernels": (type(call.pieces).__name__, threads.count() > 0),
            "what requires a gradient": self.wanted(params),
            "hooks on saved tensors (checkpointing)": has_hooks(),
            **agreement.of_loss(call.numbers, params, call.per_row),
        }
        self.met = True
        self.sizes = tuple(rows for rows, _ in self.group.meet(signature, (rows, 0)))
        # The largest shard on every rank: all cut their rows alike.
        return max(self.sizes) * self.group.size, offsets(self.classes, self.group.size)[1]

    def wanted(self, params: dict[int, Tensor]) -> Wanted:
        """Which gradients are."""
        grad = torch.is_grad_enabled()

        def needs(tensor: Tensor | None) -> bool:
            return grad and tensor is not None and tensor.requires_grad

        slots = tuple(int(slot) for slot, p in params.items() if needs(p) and slot in TRAINABLE)
        return Wanted(needs(self.input), needs(self.weight), needs(self.bias), slots)

    def run(self, call: Call, x: Tensor, target: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
        wanted = self.wanted(dict(zip(call.slots, params, strict=True)))
        offset = offsets(self.classes, self.group.size)[self.group.rank]
        shard = Shard(self.group, self.sizes, self.classes, offset)
        results = class_parallel_loss(call, shard, wanted, x, self.leaf(call), self.bias, target, *params)
        self.met = False  # what another look at these logits is refused for is told again
        return results
