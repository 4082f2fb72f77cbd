"""The loop of a head, over classes of which this rank has a part.

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
from ..linear.autograd import check_upstream, later, makes_at_once, scaled
from ..linear.loop import SCALES, Call, Head, Known, Wanted, forward
from ..linear.products import along_length, lengths
from ..numbering import IGNORE_INDEX, REDUCTION, Reduction, Slot
from .group import Group, padded, slices


class Shard(NamedTuple):
    """Which part of what is whose."""

    group: Group
    sizes: tuple[int, ...]  # rows of each rank
    classes: int  # of all ranks
    offset: int  # where this rank's begin

    @property
    def mine(self) -> slice:
        """This rank's rows among all."""
        return slices(self.sizes, self.group.rank)

    def all_rows(self, rows: Tensor, fill: float | int, what: str) -> Tensor:
        """(n, ...) of each rank, padded to the most, one after another."""
        return self.group.gathered(padded(rows, max(self.sizes), fill), what).flatten(0, 1)


def gathered(call: Call, shard: Shard, x: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Features and what else is one per row, of all ranks."""
    every = []
    for slot, p in zip(call.slots, params, strict=True):
        if slot in call.per_row:
            p = shard.all_rows(p.long() if slot == Slot.GROUP else p.to(call.dtype), int(slot != Slot.GROUP), "rows")
        every.append(p)
    return shard.all_rows(x, 0, "features"), every


class PartHead(Head):
    """Of all rows this rank has some of the classes."""

    alone = False
    group: Group
    #: How many classes all ranks have.
    classes_of_all: int

    @property
    def every_class(self) -> int:
        return self.classes_of_all

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


class _ShardHead(PartHead):
    """All ranks' rows, and the classes of one; a row that pads is an ignored one."""

    def __init__(
        self, call: Call, shard: Shard, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
        params: Sequence[Tensor],
    ):  # fmt: skip
        self.shard, self.group, self.offset = shard, shard.group, shard.offset
        self.classes_of_all = shard.classes
        # An ignored row is not read, whatever it holds: its gradient comes home as 0 and stays it.
        kept = (target[shard.mine] != int(call.numbers[IGNORE_INDEX])).unsqueeze(1)
        self.own = torch.where(kept, x[shard.mine].to(call.dtype), 0)
        self.own_length = None
        if call.normalize:
            self.own_length = torch.where(kept, lengths(self.own, self.own.dtype), 1)
            self.own = self.own / self.own_length
        super().__init__(call, x, weight, bias, target, params)

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
    def forward(
        ctx: Any,
        call: Call,
        shard: Shard,
        wanted: Wanted,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        *params: Tensor,
    ) -> tuple[Tensor, ...]:
        at_once = makes_at_once(call, wanted)
        with reference.full_precision(x.device):
            x_all, params_all = gathered(call, shard, x, params)
            head = _ShardHead(call, shard, x_all, weight, bias, target, params_all)
            results, known, gradients = forward(head, wanted if at_once else None)
        ctx.call, ctx.shard, ctx.wanted, ctx.at_once = call, shard, wanted, at_once
        ctx.set_materialize_grads(False)
        results = tuple(r if r.dim() == 0 else r[shard.mine] for r in results)
        ctx.mark_non_differentiable(*results[4:])
        ctx.dtypes = [t.dtype for t in (x, weight, weight if bias is None else bias, *params)]
        if gradients is not None:
            ctx.present = [g is not None for g in gradients]
            ctx.save_for_backward(*(g for g in gradients if g is not None))
        else:
            numbers = [] if known is None else [*known.rows, known.f_y, known.u_y]
            ctx.present = [n is not None for n in numbers]
            ctx.save_for_backward(x_all, weight, bias, target, *params_all, *(n for n in numbers if n is not None))
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        check_upstream(upstream, "class-parallel heads have")
        call: Call = ctx.call
        shard: Shard = ctx.shard
        wanted: Wanted = ctx.wanted
        ranks = shard.group.size
        if call.update is not None:
            call.update.check()
        if ctx.at_once:
            assert upstream[0] is not None
            saved = iter(scaled(ctx.saved_tensors, shard.group.mean(upstream[0])))
            gradients = [next(saved) if there else None for there in ctx.present]
        else:
            x, weight, bias, target, *rest = ctx.saved_tensors
            params, numbers = rest[: len(call.slots)], iter(rest[len(call.slots) :])
            each = [next(numbers) if there else None for there in ctx.present]
            with reference.full_precision(x.device):
                head = _ShardHead(call, shard, x, weight, bias, target, params)
                sums = head.sums(wanted)
                every = _all_upstream(call, shard, head, upstream)
                known = Known(Rows(*each[:-2]), *each[-2:]) if each else None  # type: ignore[arg-type]
                later(sums, head, known, every)
                gradients = list(sums.finished())
        if gradients[0] is not None:
            gradients[0] = gradients[0] * ranks
        by_slot = dict(zip(wanted.slots, gradients[3:], strict=True))
        for slot, gradient in by_slot.items():
            if gradient is not None and slot in call.per_row:
                by_slot[slot] = ranks * gradient[shard.mine]
        ordered = [*gradients[:3], None, *(by_slot.get(slot) for slot in call.slots)]
        dtypes = [*ctx.dtypes[:3], torch.int64, *ctx.dtypes[3:]]
        return (None, None, None, *(g if g is None else g.to(d) for g, d in zip(ordered, dtypes, strict=True)))


def _all_upstream(call: Call, shard: Shard, head: Head, upstream: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The upstream gradients of all ranks, each with its part of J: all that there may be, on every rank, whichever
    outputs this one has used."""
    loss, *rows = (upstream[i] if i < len(upstream) else None for i in range(4))
    ranks = shard.group.size
    zero = head.x.new_zeros((), dtype=call.dtype)
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
