"""A chunk of rows and all classes at once, by the CPU's operators: each thread takes tiles of classes of its own.

So a product is one thread's, the threads meet twice for a chunk, and what they have summed up is added in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import buffers
from ..backends import native
from ..backends.reference import Coefficients, Rows, Values
from ..checks import accumulated
from ..numbering import INPUT, Slot
from .pieces import CPU, TRITON, Want, rows_of
from .plan import DEFAULT_MEMORY, DEVICE_MEMORY, Cut, DevicePlanner, Plan, Planner, ThreadsPlanner, workspace

if TYPE_CHECKING:
    from .loop import Call, Inputs, Linear, Wanted

ops = torch.ops.mlkernels
ALL = slice(0, None)


def count() -> int:
    """How many there are to share the classes."""
    return torch.get_num_threads()


def multiplies_pairs(x: torch.dtype, weight: Tensor, normalize: bool) -> bool:
    """Whether features and weight are multiplied as they are, and not widened: two of bfloat16 at a time."""
    half = x == weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0
    return half and not normalize and native.cpu_isa() == "avx512_bf16"


def planned(rows: int, classes: int, x: Tensor, weight: Tensor, call: Call, cut: Cut) -> Plan:
    """How so many rows and classes of a call's are cut."""
    normalize, update, pieces = call.normalize, call.update, call.pieces
    accumulate = accumulated(x.dtype)
    width, itemsize = weight.shape[1], accumulate.itemsize
    copies = int(normalize or x.dtype != accumulate or weight.dtype != accumulate)
    strategy, memory = cut.strategy if update is None else "tiles", cut.memory or DEFAULT_MEMORY
    if pieces is CPU:
        memory = memory if update is None else update.cut(itemsize, width, memory)
        pairs = multiplies_pairs(x.dtype, weight, normalize)
        return ThreadsPlanner(rows, classes, width, itemsize, copies, 0, memory, count(), pairs).plan(strategy)
    kind, beside = Planner, pieces.temporaries * itemsize
    if pieces is TRITON:
        operands = pieces.operands(x.dtype, weight.dtype)
        copies = int(weight.dtype != (operands or accumulate))
        kind, beside = DevicePlanner, 0 if operands is None else operands.itemsize
        memory = cut.memory or DEVICE_MEMORY
    copies += 0 if update is None else update.temporaries
    return kind(rows, classes, width, itemsize, copies, beside, memory).plan(strategy)


def serves(call: Call) -> bool:
    """Whether :class:`Whole` is for a call: a head of the CPU's that does not step its weight."""
    return call.pieces is CPU and call.update is None


def cut(plan: Plan) -> tuple[int, ...]:
    """As the operator takes it."""
    return plan.parts, plan.classes, plan.block, plan.rows, int(plan.stored)


class Whole:
    """A head of which one operator makes all: rows that are ignored are its to leave out, and so are lengths."""

    def __init__(self, call: Call, inputs: Inputs):
        x, weight, bias, target, params = inputs
        self.call, dtype = call, call.dtype
        self.pairs = multiplies_pairs(x.dtype, weight, call.normalize)
        x, weight = x.detach(), weight.detach()
        if dtype == torch.float64 or (weight.shape[1] > 1 and weight.stride(1) != 1):
            weight = weight.to(dtype if dtype == torch.float64 else weight.dtype).contiguous()
        half = multiplies_pairs(x.dtype, weight, False)  # logits of cosines are, too
        self.x, self.weight = (x if half else x.to(dtype)).contiguous(), weight
        self.bias = None if bias is None else bias.detach().to(dtype).contiguous()
        self.target = target
        of_groups = (slot == Slot.GROUP for slot in call.slots)
        self.params = [p.detach() if of else p.detach().to(dtype) for p, of in zip(params, of_groups, strict=True)]

    def _given(self, keep: bool) -> Sequence[Any]:
        """What the operators take."""
        plan, (classes, width) = self.call.plan, self.weight.shape
        copies = self.call.normalize or self.weight.dtype != self.call.dtype
        rows = min(plan.rows, self.x.shape[0])
        size = workspace(plan, keep, rows, classes, width, int(copies), self.pairs)
        return (
            self.x, self.weight, self.bias, self.call.normalize, self.target, size, cut(plan), self.call.numbers,
            self.params,
        )  # fmt: skip

    def at_once(self, wanted: Wanted | None) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
        """The loss, and the gradients of features, weight, bias and parameters for an upstream of 1."""
        tiles = wanted is not None and (wanted.input or wanted.weight or wanted.bias)
        needs = 0 if wanted is None else needs_of(wanted)
        loss, found = ops.linear_loss_with_gradients(*self._given(self.call.plan.stored and tiles), needs)
        return loss, None if wanted is None else _placed(found, wanted)

    def rows(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """The loss and the row statistics, if these are asked for; what the backward takes."""
        loss, saved, stats = ops.linear_rows(*self._given(False), self.call.return_stats)
        return (loss, *stats), saved

    def backward(self, wanted: Wanted, saved: Tensor, upstream: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients, given those of the results."""
        rest = (saved, *upstream[:4], *[None] * (4 - len(upstream)), needs_of(wanted))
        return _placed(ops.linear_rows_backward(*self._given(False), *rest), wanted)


def needs_of(wanted: Wanted) -> int:
    """What is asked of an operator, as a number; the weight's bit and the bias's come behind the features'."""
    of_tiles = (wanted.input, wanted.weight, wanted.bias)
    return sum(1 << slot for slot in wanted.slots) + sum(1 << INPUT + i for i, needed in enumerate(of_tiles) if needed)


def _placed(found: Sequence[Tensor], wanted: Wanted) -> tuple[Tensor | None, ...]:
    """Gradients in the order of :meth:`Sums.finished`."""
    made = iter(found)
    by_slot = {slot: next(made) for slot in sorted(wanted.slots)}
    of_tiles = (next(made) if needed else None for needed in (wanted.input, wanted.weight, wanted.bias))
    return *of_tiles, *(by_slot[slot] for slot in wanted.slots)


def statistics(
    linear: Linear, part: slice, values: Values, u_y: Tensor, scales: Tensor, want: Want, keep: bool
) -> Rows:
    """What is known of a chunk's rows over the head's classes; keep: their products stay in the head's workspace."""
    smoothed = values.smoothing > 0
    wanted = want.shift + 2 * want.second + 4 * want.ranks + 8 * smoothed
    reals, whole = ops.linear_statistics(*_of(linear, part, values, keep), u_y, scales, values.classes, wanted)
    return rows_of(reals, whole, smoothed, want.second)


def gradients(
    linear: Linear, part: slice, values: Values, row: Coefficients, dx: Tensor | None, dw: Tensor | None,
    db: Tensor | None, kept: bool = False, classes: slice = ALL,
) -> None:  # fmt: skip
    """A chunk's gradients of features, which is written, and of weight and bias, of all classes or some; row.target: by
    the target's product."""
    first, last = part.start == 0, part.stop == linear.x.shape[0]
    ops.linear_gradient(*_of(linear, part, values, kept, classes), *row, dx, dw, db, first, last)


def _of(linear: Linear, part: slice, values: Values, keep: bool, classes: slice = ALL) -> Sequence[Any]:
    """What these take."""
    x, plan = linear.x[part], linear.call.plan
    weight, bias, inverse = (None if t is None else t[classes] for t in (linear.weight, linear.bias, linear.inverse))
    return (
        x, weight, bias, inverse, values.label, linear.offset + classes.start, values.numbers,
        [*values.params.values()], workspace_of(linear, keep, x.shape[0]), keep, [plan.parts, plan.classes, plan.block],
    )  # fmt: skip


def workspace_of(linear: Linear, keep: bool, rows: int) -> Tensor:
    """What a chunk of so many rows takes, the same for all of a head's chunks."""
    plan, (classes, width), pairs = linear.call.plan, linear.weight.shape, linear.x.dtype == torch.bfloat16
    size = workspace(plan, keep, rows, classes, width, linear.copies, pairs)
    if linear.workspace.numel() < size:
        linear.workspace = buffers.empty(linear.x, [size], linear.call.dtype)
    return linear.workspace
