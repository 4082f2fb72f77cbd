"""The loop of a linear head: chunks of rows, tiles of classes, products, statistics, finish, gradients, products.

    for a chunk of rows:
        for a tile of classes: product, statistics        (kept under "stored")
        combine, finish, coefficients
        for a tile of classes: product unless it was kept, gradient, products for dX and dW

The target stands apart, twice: its logit is a product of its own, and its gradient is added at the end, so that neither
rounds with the tile that it lies in. Products and sums are in float32 (float64 for float64), whatever the operands are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import buffers
from ..backends import reference
from ..backends.reference import Coefficients, Finished, Rows, RowStats, Values
from ..numbering import IGNORE_INDEX, Slot
from . import threads
from .pieces import Factors, Pieces, Tile, Want
from .plan import Cut, Plan
from .products import add_at, add_product, along_length, lengths, multiply_into

#: Until somebody needs some.
NO_WORKSPACE = torch.empty(0)
SCALES = frozenset({Slot.SCALE, Slot.SCALE_HIGH, Slot.LOGIT_NORM})


class Kept(NamedTuple):
    """The rows that are not ignored."""

    #: Whether they were looked for; else all are gone through, and the ignored ones masked.
    known: bool
    #: Where they are, if not all are kept.
    where: Tensor | None = None


class Call(NamedTuple):
    """What of a call is no leaf; see :class:`mlkernels.backends.reference.Values` for the numbers."""

    numbers: list[float]
    slots: tuple[int, ...]
    per_row: frozenset[int]  # the slots whose tensors have a row each
    normalize: bool
    return_stats: bool
    pieces: Pieces
    dtype: torch.dtype
    plan: Plan = Plan(False, 0, 0)
    update: Any = None  # an Updating, where the backward is to step the weight
    kept: Kept = Kept(False)


def kept_rows(target: Tensor, call: Call, compact: bool) -> Kept:
    """Those of labels (N,): on a GPU by waiting for it once, if that is asked for."""
    if not compact and (target.device.type != "cpu" or call.pieces.masks):
        return Kept(False)
    index = (target.long() != int(call.numbers[IGNORE_INDEX])).nonzero().squeeze(1)
    return Kept(True, None if index.numel() == target.numel() else index)


def planned(call: Call, cut: Cut, classes: int, x: Tensor, weight: Tensor, target: Tensor) -> Call:
    """A call whose rows were looked at, and cut as its caller has it; classes: the most that a loop has."""
    kept = kept_rows(target, call, cut.compact)
    rows = target.numel() if kept.where is None else kept.where.numel()
    return call._replace(plan=threads.planned(rows, classes, x, weight, call, cut), kept=kept)


class Wanted(NamedTuple):
    """Which gradients are: of the features, the weight, the bias, and the parameters in these slots."""

    input: bool
    weight: bool
    bias: bool
    slots: tuple[int, ...]

    def __bool__(self) -> bool:
        return self.input or self.weight or self.bias or bool(self.slots)


class Inputs(NamedTuple):
    """A call's tensors."""

    x: Tensor  # (N, D)
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)
    target: Tensor  # (N,)
    params: Sequence[Tensor]  # in the order of their slots

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> Inputs:
        """From one after another."""
        x, weight, bias, target, *params = tensors
        return cls(x, weight, bias, target, params)


class Known(NamedTuple):
    """What the statistics of all classes leave of each row."""

    rows: Rows
    f_y: Tensor  # the target's product
    u_y: Tensor  # softcapped and adjusted

    @classmethod
    def of(cls, numbers: Sequence[Any]) -> Known | None:
        """From one after another, as :func:`numbers_of` has them; there are none where there are no rows."""
        return cls(Rows(*numbers[:-2]), *numbers[-2:]) if numbers else None


def numbers_of(known: Known | None) -> Sequence[Tensor | None]:
    """What is known, one after another."""
    return () if known is None else (*known.rows, known.f_y, known.u_y)


class Linear:
    """A call's tensors as the loop reads them: ignored rows left out, or masked where nobody knows which they are."""

    #: Where the classes of this head begin among those of the loss, and whether it has them all.
    offset, alone = 0, True

    def __init__(self, call: Call, inputs: Inputs):
        x, weight, bias, target, params = inputs
        self.call, self.weight = call, weight.detach()
        self.bias = None if bias is None else bias.detach().to(call.dtype)
        self.classes = weight.shape[0]
        by_slot = {slot: p.detach() for slot, p in zip(call.slots, params, strict=True)}
        by_slot = {s: p if s == Slot.GROUP else p.to(call.dtype).contiguous() for s, p in by_slot.items()}
        x = x.detach()
        #: Where the rows that are left were, if not all are.
        self.index = call.kept.where
        self.count = target.numel()
        mask: Tensor | None = None
        if self.index is not None:
            x, target = x[self.index], target[self.index]
            by_slot = {s: p[self.index] if s in call.per_row else p for s, p in by_slot.items()}
        elif not call.kept.known:
            mask = (target.long() != int(call.numbers[IGNORE_INDEX])).unsqueeze(1)
            x = torch.where(mask, x, 0)
        #: What products are made of; they are in the dtype of the call.
        self.operands = call.pieces.operands(x.dtype, weight.dtype) or call.dtype
        if call.plan.parts and threads.multiplies_pairs(x.dtype, weight, call.normalize):
            self.operands = x.dtype
        x = x.to(self.operands)
        if call.plan.parts:
            x = x.contiguous()
            if call.dtype == torch.float64 or (weight.shape[1] > 1 and weight.stride(1) != 1):
                self.weight = self.weight.to(call.dtype if call.dtype == torch.float64 else weight.dtype).contiguous()
        self.inverse = self.length = None
        #: What products are multiplied by to be those of directions, where that is for the pieces to do.
        self.factors: Factors | None = None
        if call.normalize:
            self.length = lengths(x, call.dtype)
            if mask is not None:
                self.length = torch.where(mask, self.length, 1)
            self.inverse = lengths(self.weight, call.dtype).reciprocal()
            if call.pieces.takes_factors:
                self.factors = (self.length.reciprocal().squeeze(1), self.inverse.squeeze(1))
            else:
                x = x / self.length
        self.x, self.target, self.params = x.to(self.operands), target.contiguous(), by_slot
        plan = call.plan
        # Once for all: fresh memory costs more than what is done in it.
        size = plan.rows * (self.classes if plan.stored else plan.classes)
        self.workspace = NO_WORKSPACE if plan.parts else x.new_empty(size, dtype=call.dtype)
        self.gradient_workspace: Tensor | None = None
        if self.operands != call.dtype and not plan.parts:
            self.gradient_workspace = x.new_empty(plan.rows * plan.classes)

    @functools.cached_property
    def values(self) -> Values:
        """The loss as all rows see it."""
        return self.of(slice(None))

    @property
    def copies(self) -> bool:
        """Whether a tile's part of the weight is made anew, widened or of length 1."""
        return self.inverse is not None or self.weight.dtype != self.call.dtype

    def of(self, part: slice) -> Values:
        """The loss as a chunk of the rows sees it."""
        params = [p[part] if s in self.call.per_row else p for s, p in self.params.items()]
        return Values(self.call.numbers, params, self.target[part], self.every_class, self.call.dtype)

    @property
    def every_class(self) -> int:
        """How many classes the loss has."""
        return self.classes

    def sums(self, wanted: Wanted) -> Sums:
        """Where its gradients are summed up."""
        return Sums(self, wanted)

    def combined(self, rows: Rows, f_y: Tensor, scales: Tensor) -> tuple[Rows, Tensor]:
        """What is known of a chunk's rows over all classes, and their targets' products."""
        return rows, f_y

    def own_target(self, part: slice, label: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Labels among this head's classes, and the targets' gradients where they are, by what is multiplied."""
        if self.factors is not None:
            gradient = gradient * self.factors[0][part] * self.factors[1][label]
        return label, gradient

    def chunks(self) -> Iterator[slice]:
        """The rows, cut."""
        rows, size = self.target.numel(), self.call.plan.rows
        for start in range(0, rows, size):
            yield slice(start, min(start + size, rows))

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """The classes, cut: where each tile starts, and its part of the weight."""
        for start in range(0, self.classes, self.call.plan.classes):
            yield start, self.part(slice(start, start + self.call.plan.classes))

    def part(self, classes: slice | Tensor) -> Tensor:
        """Rows of the weight, as products take them: of length 1 where so asked, unless the pieces make that of it."""
        part = self.weight[classes].to(self.operands)
        return part if self.inverse is None or self.factors is not None else part * self.inverse[classes]

    def tile(self, part: slice, start: int, f: Tensor) -> Tile:
        """The products of a chunk and some classes from start on, as the pieces take them."""
        factors = self.factors and (self.factors[0][part], self.factors[1][start : start + f.shape[1]])
        return Tile(f, self.offset + start, factors)

    def product(self, part: slice, start: int, weight: Tensor) -> Tensor:
        """The logits of a chunk and a tile, where memory was set aside for them: kept, or in place of the last ones."""
        x, classes = self.x[part], weight.shape[0]
        begin = start * x.shape[0] if self.call.plan.stored else 0
        out = self.workspace[begin : begin + x.shape[0] * classes].view(x.shape[0], classes)
        if self.bias is None:
            return multiply_into(out, x, weight.T)
        if x.dtype != out.dtype:
            return multiply_into(out, x, weight.T).add_(self.bias[start : start + classes])
        return torch.addmm(self.bias[start : start + classes], x, weight.T, out=out)

    def gradient(self, part: slice, values: Values, start: int, f: Tensor, row: Coefficients, seen: bool) -> Tensor:
        """That of the products of a chunk and a tile, as the next products take it; what it holds is lost."""
        out = None if self.gradient_workspace is None else self.gradient_workspace[: f.numel()].view(f.shape)
        return self.call.pieces.gradient(self.tile(part, start, f), row, values, seen, out)

    def of_target(self, part: slice, values: Values) -> Tensor:
        """The target's logit of each row, never taken from a tile."""
        f_y = self.dots(part, values.label)
        return f_y if self.bias is None else f_y + self.bias[values.label]

    def dots(self, part: slice, label: Tensor) -> Tensor:
        """The product of each row with a class of its own."""
        dots = (self.x[part].to(self.call.dtype) * self.part(label)).sum(1)
        return dots if self.factors is None else dots * self.factors[0][part] * self.factors[1][label]

    def along_lengths(self, gradient: Tensor, start: int, vectors: Tensor) -> None:
        """The gradient of a tile of the weight from that of its directions, in place."""
        assert self.inverse is not None
        inverse = self.inverse[start : start + vectors.shape[0]]
        direction = vectors if self.factors is None else vectors * inverse
        gradient.sub_((gradient * direction).sum(1, keepdim=True) * direction)
        if self.factors is None:  # else it was multiplied by that
            gradient.mul_(inverse)

    def of_features(self, gradient: Tensor) -> Tensor:
        """The gradient of all features from that of what the loop has seen of them."""
        if self.factors is None:
            return self.scattered(along_length(gradient, self.x, self.length))
        direction = self.x * self.factors[0].unsqueeze(1)
        return self.scattered(gradient - (gradient * direction).sum(1, keepdim=True) * direction)

    def scattered(self, rows: Tensor, fill: float = 0) -> Tensor:
        """Results of the rows that were left at the places of all."""
        if self.index is None:
            return rows
        return rows.new_full((self.count, *rows.shape[1:]), fill).index_copy_(0, self.index, rows)

    def gathered(self, upstream: Tensor | None) -> Tensor | None:
        """An upstream gradient (N,) of the rows that are left."""
        return upstream if upstream is None or self.index is None else upstream[self.index]


class Sums:
    """The gradients, as they are summed up."""

    def __init__(self, linear: Linear, wanted: Wanted):
        self.linear, self.wanted = linear, wanted
        dtype = linear.call.dtype
        self.input = torch.zeros_like(linear.x, dtype=dtype) if wanted.input else None
        common = wanted.input and linear.gradient_workspace is not None and linear.classes > 0  # tiles are rounded
        self.common = linear.weight.mean(0, dtype=dtype) if common else None  # before any class steps
        self.weight: Tensor | None = None
        if wanted.weight and linear.call.update is None:  # the first chunk of rows writes it
            x, shape = linear.x, linear.weight.shape
            self.weight = buffers.empty(x, shape, dtype) if linear.call.plan.parts else x.new_empty(shape, dtype=dtype)
            if linear.x.shape[0] == 0:
                self.weight.zero_()
        self.bias = linear.x.new_zeros(linear.classes, dtype=dtype) if wanted.bias else None
        self.slots = {slot: torch.zeros_like(linear.params[slot]) for slot in wanted.slots}

    def add_tile(self, part: slice, start: int, weight: Tensor, gradient: Tensor) -> None:
        """What a tile's gradient contributes."""
        classes = slice(start, start + weight.shape[0])
        if self.input is not None:
            add_product(self.input[part], gradient, weight)
        if self.weight is not None:
            make = multiply_into if part.start == 0 else add_product
            make(self.weight[classes], gradient.T, self.linear.x[part])
        if self.bias is not None:
            self.bias[classes] += gradient.sum(0, dtype=self.bias.dtype)

    def add_target(self, part: slice, label: Tensor, gradient: Tensor) -> None:
        """What the targets' own gradients contribute."""
        linear = self.linear
        if linear.classes == 0:
            return
        label, gradient = linear.own_target(part, label, gradient)
        column = gradient.unsqueeze(1)
        if self.input is not None:
            self.input[part] += column * linear.part(label)
        if self.weight is not None:
            add_at(self.weight, label, column * linear.x[part])
        if self.bias is not None:
            add_at(self.bias, label, gradient)

    def finished(self) -> tuple[Tensor | None, ...]:
        """Of features, weight, bias and parameters: those of lengths follow from those of directions."""
        linear = self.linear
        if self.weight is not None and linear.inverse is not None and not linear.call.plan.parts:
            for start, vectors in linear.tiles():
                linear.along_lengths(self.weight[start : start + vectors.shape[0]], start, vectors)
        slots = (linear.scattered(g) if slot in linear.call.per_row else g for slot, g in self.slots.items())
        return (None if self.input is None else linear.of_features(self.input), self.weight, self.bias, *slots)


def _known(linear: Linear, part: slice, values: Values, want: Want, keep: bool) -> tuple[Known, list[Tensor]]:
    """The statistics of a chunk over all classes, and its logits by tile where they are kept."""
    f_y = linear.of_target(part, values)
    u_y = reference.final_target(f_y, values)
    scales, pieces = reference.scales(values), linear.call.pieces
    kept: list[Tensor] = []
    if linear.call.plan.parts:
        rows = threads.statistics(linear, part, values, u_y, scales, want, keep)
        kept.append(linear.workspace)
    else:
        rows = pieces.begin(u_y, values, want)
        for start, weight in linear.tiles():
            f = linear.product(part, start, weight)
            rows = pieces.statistics(linear.tile(part, start, f), u_y, values, rows, scales, want)
            kept.append(f)
    rows, f_y = linear.combined(rows, f_y, scales)
    return Known(rows, f_y, reference.final_target(f_y, values)), kept if keep else []


def finish_chunk(
    linear: Linear, part: slice, values: Values, known: Known, sums: Sums | None, upstream: Finished | None
) -> tuple[Finished, Coefficients | None]:
    """What follows of a chunk's rows, and with an upstream gradient what its tiles take for theirs, the targets' those
    by their products; parameters get theirs."""
    call, slots = linear.call, () if sums is None else sums.wanted.slots
    finished, row, by_slot = call.pieces.finish(known.rows, known.u_y, values, upstream, slots, want(call))
    for slot, gradient in by_slot.items():
        assert sums is not None
        if slot in call.per_row:
            sums.slots[slot][part] = gradient
        else:
            sums.slots[slot] += gradient
    if row is not None and values.consts[Slot.SOFTCAP] > 0:
        row.target.copy_(reference.through_cap(row.target, known.f_y, values))
    return finished, row


def add_chunk(sums: Sums, linear: Linear, part: slice, values: Values, kept: list[Tensor], row: Coefficients) -> None:
    """A chunk's gradients."""
    if not (sums.wanted.input or sums.wanted.weight or sums.wanted.bias):
        return
    if linear.call.plan.parts:
        dx = None if sums.input is None else sums.input[part]
        threads.gradients(linear, part, values, row, dx, sums.weight, sums.bias, bool(kept))
        return
    for index, (start, weight) in enumerate(linear.tiles()):
        f = kept[index] if kept else linear.product(part, start, weight)
        sums.add_tile(part, start, weight, linear.gradient(part, values, start, f, row, bool(kept)))
    linear.call.pieces.add_lost(sums.input, part, row, sums.common)
    sums.add_target(part, values.label, row.target)


def upstream_of(linear: Linear, part: slice, loss: Tensor | None, rows: Sequence[Tensor | None]) -> Finished:
    """The upstream gradients of what finish returns, of a chunk: those of the loss with the reduction's factors."""
    by_class = by_row = None
    if loss is not None:
        of_class, of_row = (factor[part] for factor in reference.factors(linear.values))
        g = loss if loss.dim() == 0 else loss[part]
        by_class, by_row = g * of_class, g * of_row
    return Finished(by_class, by_row, *(None if g is None else g[part] for g in rows))


def _joined(parts: Sequence[Sequence[Tensor | None]]) -> Sequence[Tensor | None]:
    """Chunks of rows together again: of tensors (..., rows) or None."""
    if len(parts) == 1:
        return parts[0]
    return [None if each[0] is None else torch.cat(each, -1) for each in zip(*parts, strict=True)]


def want(call: Call) -> Want:
    """What is asked of the statistics."""
    scaled = not SCALES.isdisjoint(call.slots)
    return Want(scaled or call.return_stats, scaled and call.return_stats, call.return_stats)


def forward(
    linear: Linear, wanted: Wanted | None
) -> tuple[tuple[Tensor, ...], Known | None, tuple[Tensor | None, ...] | None]:
    """The results; what is known of each row, which gradients made later take; and where they are wanted at once, the
    gradients at an upstream of 1."""
    call = linear.call
    sums = None if wanted is None else linear.sums(wanted)
    one = torch.ones((), dtype=call.dtype, device=linear.x.device)
    finished: list[Finished] = []
    every: list[Known] = []
    for part in linear.chunks():
        values = linear.of(part)
        known, kept = _known(linear, part, values, want(call), call.plan.stored and sums is not None)
        upstream = None if sums is None else upstream_of(linear, part, one, (None, None, None))
        each, row = finish_chunk(linear, part, values, known, sums, upstream)
        finished.append(each)
        every.append(known)
        if sums is not None and row is not None:
            add_chunk(sums, linear, part, values, kept, row)
    nothing = linear.x.new_zeros(0, dtype=call.dtype)
    whole = Finished(*_joined(finished)) if finished else Finished(nothing, nothing)
    all_rows = Known.of(_joined([numbers_of(known) for known in every])) if every else None
    loss = reference.reduced(whole, linear.values)
    results: tuple[Tensor, ...] = (linear.scattered(loss) if loss.dim() else loss,)
    if call.return_stats:
        stats = RowStats(nothing, nothing, nothing, nothing.long(), nothing, nothing.long())
        if all_rows is not None:
            stats = reference.row_stats(all_rows.rows, all_rows.u_y, whole, linear.values)
        results += tuple(linear.scattered(row, -1 if row is stats.prediction else 0) for row in stats)
    return results, all_rows, None if sums is None else sums.finished()
