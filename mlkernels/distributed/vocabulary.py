"""Losses on logits of which each rank has a slice of the classes, as vocabulary-parallel trainers have them.

All rows are on every rank already. Each visits its slice; what it knows of the rows is combined, one collective; every
rank finishes all rows alike, and writes the gradient of its slice: nothing travels then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from ..backends import reference
from ..backends.reference import RowStats
from ..checks import accumulated, check_class_indices, check_input, check_plain, check_size
from ..linear.autograd import check_upstream, has_hooks, later, placed, save
from ..linear.functional import loss_of
from ..linear.logits import by_rows
from ..linear.loop import Call, Inputs, Known, Linear, Sums, Wanted, forward, kept_rows, numbers_of
from ..linear.pieces import pieces_for
from ..linear.plan import TILE, Plan
from ..numbering import TRAINABLE
from ..positional import by_name
from ..softmax import Asked
from ..tracing import is_dual
from . import agreement
from .group import Group, check_untraced, group_of
from .logits import PartLogits
from .loop import LinearPart, Shard


class _LinearSlice(LinearPart):
    """A linear head of no features, whose products are there already."""

    def __init__(self, call: Call, shard: Shard, logits: Tensor, target: Tensor, params: Sequence[Tensor]):
        #: What stands behind the last class pads: it is not read.
        self.logits = logits.detach()[:, : max(0, shard.classes - shard.offset)]
        nothing = logits.new_empty(0, dtype=call.dtype)
        rows, classes = self.logits.shape
        super().__init__(call, shard, Inputs(nothing.expand(rows, 0), nothing.expand(classes, 0), None, target, params))

    def product(self, part: slice, start: int, weight: Tensor) -> Tensor:
        tile = self.logits[:, start : start + weight.shape[0]]
        tile = tile[part] if self.index is None else tile.index_select(0, self.index[part])
        if self.index is None and not tile.is_cpu:
            tile = torch.where(self.values.kept[part].unsqueeze(1), tile, 0)
        return self.workspace[: tile.numel()].view(tile.shape).copy_(tile)

    def of_owned(self, part: slice, label: Tensor) -> Tensor:
        found = self.logits[self.rows_of(part), label].to(self.call.dtype)
        return torch.where(self.values.kept[part], found, 0)

    def rows_of(self, part: slice) -> Tensor:
        """Which of the logits' rows a part of those that are kept is of."""
        every = torch.arange(len(self.logits), device=self.logits.device) if self.index is None else self.index
        return every[part]

    def sums(self, wanted: Wanted) -> Sums:
        return _SliceSums(self, wanted)


class _SliceSums(Sums):
    """The gradient of the slice, a tile at a time."""

    def __init__(self, linear: Linear, wanted: Wanted):
        super().__init__(linear, wanted)
        assert isinstance(linear, _LinearSlice)
        new = torch.empty_like if linear.index is None else torch.zeros_like
        self.logits = new(linear.logits, memory_format=torch.contiguous_format) if wanted.input else None

    def add_tile(self, part: slice, start: int, weight: Tensor, gradient: Tensor) -> None:
        assert self.logits is not None
        tile, index = self.logits[:, start : start + weight.shape[0]], self.linear.index
        if index is None:
            tile[part] = gradient
        else:
            tile.index_copy_(0, index[part], gradient.to(tile.dtype))

    def add_target(self, part: slice, label: Tensor, gradient: Tensor) -> None:
        linear = self.linear
        assert isinstance(linear, _LinearSlice) and self.logits is not None
        if linear.classes:
            own, label = linear.owned(label)
            row = linear.rows_of(part)
            there = self.logits[row, label]
            self.logits[row, label] = torch.where(own, gradient.to(there.dtype), there)

    def finished(self) -> tuple[Tensor | None, ...]:
        return (self.logits, *super().finished()[3:])


class _SlicedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, shard: Shard, logits: Tensor, target: Tensor, *params: Tensor
    ) -> tuple[Tensor, ...]:
        with reference.full_precision(logits.device):
            results, known, _ = forward(_LinearSlice(call, shard, logits, target, params), None)
        ctx.call, ctx.shard = call, shard
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[4:])
        save(ctx, (logits, target, *params), numbers_of(known))
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        check_upstream(upstream, "losses on slices of logits have")
        call: Call = ctx.call
        logits, target, *rest = ctx.saved_tensors
        params, known = rest[: len(call.slots)], Known.of(placed(ctx, rest[len(call.slots) :]))
        needs = ctx.needs_input_grad
        slots = tuple(slot for slot, need in zip(call.slots, needs[4:], strict=True) if need and slot in TRAINABLE)
        with reference.full_precision(logits.device):
            linear = _LinearSlice(call, ctx.shard, logits, target, params)
            sums = linear.sums(Wanted(needs[2], False, False, slots))
            later(sums, linear, known, upstream)
            gradient, *of_params = sums.finished()
        if gradient is not None and gradient.shape != logits.shape:
            gradient = torch.nn.functional.pad(gradient, (0, logits.shape[1] - gradient.shape[1]))
        by_slot = dict(zip(slots, of_params, strict=True))
        found = zip((by_slot.get(slot) for slot in call.slots), params, strict=True)
        return None, None, gradient, None, *(g if g is None else g.to(p.dtype) for g, p in found)


_sliced_loss: Callable[..., tuple[Tensor, ...]] = _SlicedLoss.apply


class SlicedLogits(PartLogits):
    """Logits (N, C, ...) of which this rank has a slice (N, C_r, ...)."""

    def __init__(self, group: Group, classes: int, logits: Tensor, offset: int | None, return_stats: bool = False):
        super().__init__(group, classes, logits, logits, None, return_stats=return_stats)
        self.offset = offset

    def shaped(self) -> Tensor:
        leading, _, *others = self.input.shape
        return self.input.detach().new_empty(()).expand(leading, self.classes, *others)

    def loss(self, target: Tensor, asked: Asked) -> tuple[Tensor, RowStats | None]:
        if torch.compiler.is_compiling():  # a graph break, as below
            found: tuple[Tensor, RowStats | None] = torch.compiler.disable(self.loss)(target, asked)
            return found
        numbers, params, tables, return_stats, backend = asked
        pieces = pieces_for(target.device, backend)
        if forward_ad._current_level >= 0 and any(map(is_dual, (self.input, *params))):
            raise RuntimeError("slices of logits know no forward-mode AD: take the loss of whole logits")
        self.visits += 1
        dtype = accumulated(self.input.dtype)
        flat, per_row = by_rows(numbers, params, tables)
        rows, with_stats = target.numel(), return_stats or self.return_stats
        logits = self.input.movedim(1, -1).reshape(rows, self.input.shape[1])
        offset = self._meet(target, numbers, flat, with_stats, type(pieces).__name__)
        made = Plan(False, max(rows, 1), max(1, min(TILE // max(rows, 1), logits.shape[1])))
        call = Call(list(numbers), tuple(flat), per_row, False, with_stats, pieces, dtype, made)
        shard, label = Shard(self.group, (), self.classes, offset), target.reshape(-1)
        call = call._replace(kept=kept_rows(label, call, False))
        loss, *stats = _sliced_loss(call, shard, logits, label, *flat.values())
        return self.shown(loss, stats, target, return_stats)

    def _meet(
        self, target: Tensor, numbers: Sequence[float], params: dict[int, Tensor], return_stats: bool, kernels: str
    ) -> int:
        """Where this rank's classes begin, if all ranks came with the same call and their slices make a whole."""
        signature = {
            "call": "loss on slices of logits",
            "dtype": str(self.input.dtype),
            "num_classes": self.classes,
            "rows": tuple(target.shape),
            "return_stats": return_stats,
            "kernels": kernels,
            "hooks on saved tensors (checkpointing)": has_hooks(),
            **agreement.of_loss(numbers, params, frozenset()),
            "target": target,
        }
        self.met = True
        offset = -1 if self.offset is None else self.offset
        return offsets_of(self.group.meet(signature, (self.input.shape[1], offset)), self.classes)[self.group.rank]


def offsets_of(slices: Sequence[Sequence[int]], classes: int) -> list[int]:
    """Where each rank's classes begin, of (width, offset or -1), if there are neither gaps nor overlaps."""
    if all(begin < 0 for _, begin in slices):
        widths = [width for width, _ in slices]
        slices = list(zip(widths, accumulate([0, *widths[:-1]]), strict=True))
    end, last = 0, "the first class is"
    for begin, width, rank in sorted((begin, width, rank) for rank, (width, begin) in enumerate(slices)):
        if begin < 0:
            raise ValueError(f"offset must be given on all ranks or on none: rank {rank} has none")
        if begin != end:
            kind = "a gap" if begin > end else "an overlap"
            raise ValueError(
                f"slices must follow each other, got {kind}: rank {rank} begins at {begin}, {last} at {end}"
            )
        end, last = begin + width, f"rank {rank} ends"
    if end < classes:
        raise ValueError(f"num_classes is {classes}, but the slices of all ranks end at {end}")
    return [begin for _, begin in slices]


class _Local(torch.autograd.Function):
    """``to_local()`` whose gradient has the logits' strides. That of torch up to 2.13 has those of as many classes on
    every rank, and where they are not autograd keeps a copy in its own order: torch 2.11's has all classes."""

    @staticmethod
    def forward(ctx: Any, logits: DTensor) -> Tensor:
        ctx.of = logits.device_mesh, logits.placements
        ctx.form = {"shape": logits.shape, "stride": logits.stride()}
        return logits.to_local()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return DTensor.from_local(gradient, *ctx.of, run_check=False, **ctx.form)


def of_dtensor(logits: Tensor, target: Tensor) -> tuple[SlicedLogits | Tensor, Tensor]:
    """What a loss is called with where its logits are a DTensor that is split by classes; others stay what they are."""
    if not isinstance(logits, DTensor) or logits.dim() < 2:
        return logits, target
    mesh, placements = logits.device_mesh, logits.placements
    split = [
        dim for dim, placement in enumerate(placements) if type(placement) is ShardPlacement and placement.dim == 1
    ]
    if len(split) != 1 or not all(p.is_replicate() for dim, p in enumerate(placements) if dim != split[0]):
        return logits, target
    check_untraced("slices of logits know", logits, target)
    if isinstance(target, DTensor):
        if not all(placement.is_replicate() for placement in target.placements):
            raise ValueError(f"target must be on all ranks that share the classes, got {target.placements}")
        target = target.to_local()
    local = cast(Tensor, _Local.apply(logits))  # type: ignore[no-untyped-call]
    return SlicedLogits(group_of(mesh.get_group(split[0])), logits.shape[1], local, None), target


@overload
def class_parallel_softmax_loss(
    input: Tensor,
    target: Tensor,
    *,
    num_classes: int | None = None,
    offset: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    loss: Callable[..., Tensor] | None = None,
    return_stats: Literal[False] = False,
    **arguments: Any,
) -> Tensor: ...


@overload
def class_parallel_softmax_loss(
    input: Tensor,
    target: Tensor,
    *,
    num_classes: int | None = None,
    offset: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    loss: Callable[..., Tensor] | None = None,
    return_stats: Literal[True],
    **arguments: Any,
) -> tuple[Tensor, RowStats]: ...


@by_name
def class_parallel_softmax_loss(
    input: Tensor,
    target: Tensor,
    *,
    num_classes: int | None = None,
    offset: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    loss: Callable[..., Tensor] | None = None,
    return_stats: bool = False,
    **arguments: Any,
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Any loss of the family on logits of which each rank has some of the classes, and all of them all rows
    (vocabulary-parallel): the loss of the whole logits, the same on every rank.

    Gradients are those of tensor parallelism: each rank calls ``backward`` on the same loss and gets the slice
    :math:`\partial L/\partial f_{[o_r, o_r+C_r)}` of the dense gradient; the loss's own parameters get their whole
    gradient, the same on every rank. Nothing travels in the backward pass.

    Args:
        input: (N, C_r) or (N, C_r, d1, ...), logits of this rank's classes of all rows; not written to.
        target: (N,) or (N, d1, ...), class indices in [0, C), the same on every rank.
        num_classes: C. Classes from C on, which a padded vocabulary has at its end, are not read, and their gradient
            is 0.
        offset: where this rank's classes begin; None: they follow each other in the order of ranks.
        process_group: the ranks that share the classes; None: all.
        loss, return_stats, arguments: as in :func:`mlkernels.linear_softmax_loss`; what is one per row is of all rows.

    ``DTensor`` logits that are split by classes, ``Shard(1)``, need no such call: every loss of the family takes them,
    and returns a plain tensor.

    Raises:
        TypeError, ValueError, IndexError: a bad argument, on every rank, with the rank it came from.
        ValueError: ranks that disagree on loss, labels, rows or options, by name; gaps and overlaps of slices.
        RuntimeError: second-order gradients, torch.func transforms and forward-mode AD.

    Example:
        >>> import torch, mlkernels
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> logits = torch.randn(4, 12, requires_grad=True)
        >>> loss = mlkernels.distributed.class_parallel_softmax_loss(
        ...     logits, torch.tensor([1, 2, 3, 9]), num_classes=10, loss=mlkernels.FocalLoss()
        ... )
        >>> loss.backward()
        >>> dist.destroy_process_group()

    Source: the three reductions of Shoeybi et al., "Megatron-LM" (2019), section 3, packed into one.
    """
    result: Tensor | tuple[Tensor, RowStats]
    if torch.compiler.is_compiling():  # a graph break: collectives and their agreement are no graph
        result = torch.compiler.disable(class_parallel_softmax_loss)(
            input, target, num_classes=num_classes, offset=offset, process_group=process_group, loss=loss,
            return_stats=return_stats, **arguments,
        )  # fmt: skip
        return result
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("class_parallel_softmax_loss needs torch.distributed: call init_process_group() first")
    check_untraced("slices of logits know", input, target)
    group = group_of(process_group)
    with group.telling():
        check_input(input)
        if input.dim() < 2:
            raise ValueError(f"input must be (N, C_r) or (N, C_r, d1, ...), got {tuple(input.shape)}")
        check_class_indices(target, "cross_entropy of whole logits")
        check_plain("target", target, "pass target.to_local()")
        shape, rows = tuple(input.shape), tuple(target.shape)
        if rows != shape[:1] + shape[2:]:
            raise ValueError(f"target must be {shape[:1] + shape[2:]} for an input of {shape}, got {rows}")
        classes = check_size("num_classes", num_classes)  # type: ignore[arg-type]
        offset = None if offset is None else check_size("offset", offset, 0)
        part = SlicedLogits(group, classes, input, offset, return_stats)
    with part.telling():
        result = loss_of(part, target, loss, return_stats, arguments, class_parallel_softmax_loss)
    return result
