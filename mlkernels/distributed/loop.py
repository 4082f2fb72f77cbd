"""The loop of a linear head, over classes of which this rank has a part.

Features and labels are gathered; each rank's loop takes all rows and its own classes; what it knows of the rows is
combined, so that every rank finishes all of them alike; the gradients of the features go home.

J_r being what rank r calls backward on, the ranks together minimise J = (1/P) sum_r J_r. So a weight's gradient is
dJ/dW, and a rank's features get P dJ/dx, of which the average over ranks, which DDP and FSDP take of the backbone, is
the backbone's gradient of J.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import reference
from ..backends.reference import Rows, Values
from ..linear.autograd import by_argument, check_upstream, dtypes_of, later, makes_at_once, placed, save, scaled
from ..linear.loop import SCALES, Call, Inputs, Known, Linear, Wanted, forward, numbers_of
from ..linear.products import along_length, lengths
from ..numbering import IGNORE_INDEX, REDUCTION, Reduction, Slot
from .group import Group, padded


class Shard(NamedTuple):
    """Which part of what is whose."""

    group: Group
    sizes: tuple[int, ...]  # rows of each rank; none where every rank has all
    classes: int  # of all ranks
    offset: int  # where this rank's begin

    @property
    def mine(self) -> slice:
        """This rank's rows among all."""
        rank, most = self.group.rank, max(self.sizes)
        return slice(rank * most, rank * most + self.sizes[rank])

    def all_rows(self, rows: Tensor, fill: float | int, what: str) -> Tensor:
        """(n, ...) of each rank, padded to the most, one after another."""
        return self.group.gathered(padded(rows, max(self.sizes), fill), what).flatten(0, 1)


def gathered(call: Call, shard: Shard, inputs: Inputs) -> Inputs:
    """Features and what else is one per row, of all ranks."""
    every = []
    for slot, p in zip(call.slots, inputs.params, strict=True):
        if slot in call.per_row:
            p = shard.all_rows(p.long() if slot == Slot.GROUP else p.to(call.dtype), int(slot != Slot.GROUP), "rows")
        every.append(p)
    return inputs._replace(x=shard.all_rows(inputs.x, 0, "features"), params=every)


class LinearPart(Linear):
    """Of all rows this rank has some of the classes."""

    alone = False

    def __init__(self, call: Call, shard: Shard, inputs: Inputs):
        self.shard, self.group, self.offset = shard, shard.group, shard.offset
        super().__init__(call, inputs)

    @property
    def every_class(self) -> int:
        return self.shard.classes

    def owned(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Whether this rank has a label's class, and which of its own it is; 0 stands for another's."""
        label = label - self.offset
        own = (label >= 0) & (label < self.classes)
        return own, torch.where(own, label, 0)

    def of_target(self, part: slice, values: Values) -> Tensor:
        own, label = self.owned(values.label)
        f_y = self.x.new_zeros(label.shape, dtype=self.call.dtype)
        if self.classes:
            f_y = torch.where(own, self.of_owned(part, label), 0)
        # Ranks are counted against the target's logit, which must be known ahead then.
        return self.group.gathered(f_y, "targets").sum(0) if self.call.return_stats else f_y

    def of_owned(self, part: slice, label: Tensor) -> Tensor:
        """The logit of a class of its own for each row."""
        raise NotImplementedError

    def combined(self, rows: Rows, f_y: Tensor, scales: Tensor) -> tuple[Rows, Tensor]:
        stats = self.call.return_stats
        left_out = [] if stats else ["first", "above"]
        if not stats and SCALES.isdisjoint(self.call.slots):
            left_out.append("shift")  # of the entropy and of dL/ds
        rows, found = self.group.combined(rows, f_y, scales, left_out)
        return rows, f_y if stats else found


class _LinearShard(LinearPart):
    """All ranks' rows, and the classes of one; a row that pads is an ignored one."""

    def __init__(self, call: Call, shard: Shard, inputs: Inputs):
        x, target = inputs.x, inputs.target
        # An ignored row is not read, whatever it holds: its gradient comes home as 0 and stays it.
        kept = (target[shard.mine] != int(call.numbers[IGNORE_INDEX])).unsqueeze(1)
        self.own = torch.where(kept, x[shard.mine].to(call.dtype), 0)
        self.own_length = None
        if call.normalize:
            self.own_length = torch.where(kept, lengths(self.own, self.own.dtype), 1)
            self.own = self.own / self.own_length
        super().__init__(call, shard, inputs)

    def of_owned(self, part: slice, label: Tensor) -> Tensor:
        f_y = self.dots(part, label)
        return f_y if self.bias is None else f_y + self.bias[label]

    def own_target(self, part: slice, label: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        own, label = self.owned(label)
        return super().own_target(part, label, torch.where(own, gradient, 0))

    def of_features(self, gradient: Tensor) -> Tensor:
        sizes, group = self.shard.sizes, self.shard.group
        if self.factors is not None:  # it is of vectors, and own_length will make it that
            assert self.length is not None
            gradient = gradient * self.length
        mine = group.home(self.scattered(gradient).unflatten(0, (group.size, max(sizes))))[: sizes[group.rank]]
        return along_length(mine, self.own, self.own_length)


class _ClassParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, shard: Shard, wanted: Wanted, *tensors: Any) -> tuple[Tensor, ...]:
        at_once, inputs = makes_at_once(call, wanted), Inputs.of(tensors)
        with reference.full_precision(inputs.x.device):
            inputs = gathered(call, shard, inputs)
            results, known, gradients = forward(_LinearShard(call, shard, inputs), wanted if at_once else None)
        ctx.call, ctx.shard, ctx.wanted, ctx.at_once, ctx.dtypes = call, shard, wanted, at_once, dtypes_of(tensors)
        ctx.set_materialize_grads(False)
        results = tuple(r if r.dim() == 0 else r[shard.mine] for r in results)
        ctx.mark_non_differentiable(*results[4:])
        if gradients is not None:
            save(ctx, (), gradients)
        else:
            save(ctx, (*inputs[:4], *inputs.params), numbers_of(known))
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        check_upstream(upstream, "class-parallel linear heads have")
        call: Call = ctx.call
        shard: Shard = ctx.shard
        if call.update is not None:
            call.update.check()
        if ctx.at_once:
            assert upstream[0] is not None
            gradients = [*placed(ctx, scaled(ctx.saved_tensors, shard.group.mean(upstream[0])))]
        else:
            tensors = ctx.saved_tensors
            inputs, numbers = Inputs.of(tensors[: len(ctx.dtypes)]), placed(ctx, tensors[len(ctx.dtypes) :])
            with reference.full_precision(inputs.x.device):
                linear = _LinearShard(call, shard, inputs)
                sums = linear.sums(ctx.wanted)
                later(sums, linear, Known.of(numbers), _all_upstream(call, shard, linear, upstream))
                gradients = [*sums.finished()]
        if gradients[0] is not None:
            gradients[0] = gradients[0] * shard.group.size
        for at, slot in enumerate(ctx.wanted.slots, 3):
            gradient = gradients[at]
            if gradient is not None and slot in call.per_row:
                gradients[at] = shard.group.size * gradient[shard.mine]
        return (None, None, None, *by_argument(call, ctx.wanted, gradients, ctx.dtypes))


def _all_upstream(call: Call, shard: Shard, linear: Linear, upstream: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The upstream gradients of all ranks, each with its part of J: all that there may be, on every rank, whichever
    outputs this one has used."""
    loss, *rows = (upstream[i] if i < len(upstream) else None for i in range(4))
    ranks = shard.group.size
    zero = linear.x.new_zeros((), dtype=call.dtype)
    nothing = zero.expand(shard.sizes[shard.group.rank])
    if call.numbers[REDUCTION] == Reduction.NONE:
        of_loss = shard.all_rows((nothing if loss is None else loss).to(zero.dtype), 0, "upstream") / ranks
    else:
        of_loss = shard.group.mean((zero if loss is None else loss).to(zero.dtype))
    if not call.return_stats:
        return [of_loss]
    together = torch.stack([(nothing if g is None else g).to(zero.dtype) for g in rows], 1)
    return [of_loss, *(shard.all_rows(together, 0, "upstream") / ranks).unbind(1)]


class_parallel_loss: Callable[..., tuple[Tensor, ...]] = _ClassParallelLoss.apply
