"""Logits of which each rank has a part: what a loss of the family is called with in their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..backends.reference import RowStats
from ..linear.autograd import has_hooks
from ..linear.logits import LinearLogits
from ..linear.loop import Call, Wanted
from ..linear.sampling import Sample
from ..numbering import IGNORE_INDEX, TRAINABLE
from . import agreement
from .group import Group, offsets, padded
from .loop import Shard, class_parallel_loss


class PartLogits(LinearLogits):
    """Logits of which this rank has a part."""

    def __init__(self, group: Group, classes: int, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.group, self.classes = group, classes
        #: Whether the ranks have met, and go on alike: what is raised then is raised on all.
        self.met = False

    def graphs(self) -> bool:
        return False

    def shaped(self) -> Tensor:
        leading = self.input.shape[:-1]
        return self.input.detach().new_empty(()).expand(leading[0], self.classes, *leading[1:])

    def shown(self, *found: Any) -> tuple[Tensor, RowStats | None]:
        self.met = False  # what another look at these logits is refused for is told again
        return super().shown(*found)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What is raised here is raised on all ranks, as the loss is taken or before."""
        try:
            yield
        except Exception as error:
            self.refused(error)
            raise

    def refused(self, error: Exception) -> None:
        if not self.met:
            self.met = True
            self.group.meet({}, error=error)


class ShardedLogits(PartLogits):
    """The logits of this rank's rows over the classes of all ranks, by its part of the weight."""

    def most(self, rows: int, call: Call, params: dict[int, Tensor]) -> int:
        # A collective that some ranks leave out, or make of another size, would be waited for by the others.
        signature = {
            "call": "loss",
            "dtype": (str(self.input.dtype), str(self.weight.dtype)),
            "in_features": self.weight.shape[1],
            "num_classes": self.classes,
            "bias": self.bias is not None,
            "normalize": call.normalize,
            "return_stats": call.return_stats,
            **self.cut._asdict(),
            "tile_update": call.update and call.update.update.optimizer.numbers(),
            "sample": self.sampler and (self.sampler.sample, self.sampler.correction, self.sampler.count),
            "kernels": type(call.pieces).__name__,
            "what requires a gradient": self.wanted(params),
            "hooks on saved tensors (checkpointing)": has_hooks(),
            **agreement.of_loss(call.numbers, params, call.per_row),
        }
        self.met = True
        self.sizes = tuple(rows for rows, _ in self.group.meet(signature, (rows, 0)))
        # The largest shard on every rank: all cut their rows alike.
        return offsets(self.classes, self.group.size)[1]

    def wanted(self, params: dict[int, Tensor]) -> Wanted:
        """Which gradients are."""
        grad = torch.is_grad_enabled()

        def needs(tensor: Tensor | None) -> bool:
            return grad and tensor is not None and tensor.requires_grad

        slots = tuple(int(slot) for slot, p in params.items() if needs(p) and slot in TRAINABLE)
        return Wanted(needs(self.input), needs(self.weight), needs(self.bias), slots)

    def labels(self, call: Call, target: Tensor) -> Tensor:
        # 64-bit integers: an ignore_index need not fit in what they come in. Ranks' dtypes may differ.
        shard = Shard(self.group, self.sizes, self.classes, 0)
        return shard.all_rows(target.long(), int(call.numbers[IGNORE_INDEX]), "labels")

    def classes_of(self, sample: Sample, number: Tensor) -> Tensor:
        most = max(b - a for a, b in zip(sample.starts, sample.starts[1:], strict=False))
        every = self.group.gathered(padded(sample.classes + sample.first, most, 0), "classes")
        starts = torch.tensor(sample.starts, device=number.device)
        owner = torch.bucketize(number, starts[1:], right=True).clamp(max=self.group.size - 1)
        return torch.where(number < 0, number, every[owner, (number - starts[owner]).clamp(0, most - 1)])

    def run(self, call: Call, x: Tensor, target: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
        wanted = self.wanted(dict(zip(call.slots, params, strict=True)))
        starts = offsets(self.classes, self.group.size) if self.sample is None else self.sample.starts
        shard = Shard(self.group, self.sizes, starts[-1], starts[self.group.rank])
        return class_parallel_loss(call, shard, wanted, x, self.leaf(call), self.part[1], target, *params)
