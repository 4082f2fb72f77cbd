"""Logits of which each rank has a part: what a loss of the family is called with in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import native
from ..linear.logits import LinearLogits
from ..linear.loop import Call, Wanted
from ..numbering import TRAINABLE, Slot
from .group import Group, offsets
from .loop import Shard, class_parallel_loss


class ShardedLogits(LinearLogits):
    """The logits of this rank's rows over the classes of all ranks, by its part of the weight."""

    def __init__(self, group: Group, classes: int, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.group, self.classes = group, classes
        self._sizes: tuple[int, ...] = ()
        #: Whether the ranks have met: an error that comes later is not told to the others.
        self.met = False

    def shaped(self) -> Tensor:
        leading = self.input.shape[:-1]
        return self.input.detach().new_empty(()).expand(leading[0], self.classes, *leading[1:])

    def most(
        self, rows: int, numbers: Sequence[float], params: dict[int, Tensor], return_stats: bool
    ) -> tuple[int, int]:
        # A collective that some ranks leave out, or make of another size, would be waited for by the others.
        signature = {
            "dtype": (str(self.input.dtype), str(self.weight.dtype)),
            "in_features": self.weight.shape[1],
            "num_classes": self.classes,
            "loss": list(numbers),
            "normalizer": params[Slot.NORMALIZER].item() if Slot.NORMALIZER in params else None,
            "return_stats": return_stats,
            "strategy": self.strategy,
            "memory": self.memory,
            "kernels": native.cpu_missing is None,
            "what requires a gradient": self.wanted(params),
        }
        self.met = True
        self._sizes = tuple(self.group.meet(rows, signature))
        # The largest shard on every rank: all cut their rows alike.
        return max(self._sizes) * self.group.size, offsets(self.classes, self.group.size)[1]

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
        shard = Shard(self.group, self._sizes, self.classes, offset)
        return class_parallel_loss(call, shard, wanted, x, self.weight, self.bias, target, *params)
