"""From tensors to launches: the arguments that the operators share, as the kernels take them.

Nothing here looks at a number in a tensor, so nothing waits for the device, and all of it can be captured in a CUDA
graph.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ...checks import accumulated
from ...numbering import (
    HEAD_TABLES,
    IGNORE_INDEX,
    INPUT,
    PER_CLASS,
    REDUCTION,
    TRAINABLE_SLOTS,
    HeadKind,
    Mode,
    Reduction,
    ScaleKind,
    Slot,
    Structure,
    TransformKind,
    consts_of,
    needed,
    slots_of,
    structure_of,
)
from . import replay, sums, tiles
from . import rows as kernels

_NUMBERS = int(Slot.SOFTCAP) + 1
_PARTS = int(sums.PARTS.value)
_INT32 = 2**31
_FEW = int(sums.FEW.value)
_GROUP = int(sums.GROUP.value)
#: Labels that all programs together may read to count them, in bytes: a microsecond of the cache.
_COUNTED_BYTES = 2**22
#: What a program of a sum holds at once: a thread 16 labels or partial losses, of few ones 8.
_SUM_BLOCK = 1024
#: So many values one program adds up alone, rather than leave them to a second launch.
_SUM_CHUNK = 4096
_COUNT = {"BLOCK": 4096, "num_warps": 8}
_TOTAL = {"BLOCK": 8192, "num_warps": 16}
_CONDITIONAL_PROGRAMS = 4096

#: (d1, d2), and (class, N, d1, d2) strides of the input and of the gradient.
_Layout = tuple[tuple[int, int], tuple[int, ...], tuple[int, ...]]


def _collapsed(input: Tensor, gradient: Tensor) -> _Layout | None:
    """The layout of both tensors: row dimensions that continue each other are one.

    None where more than three row dimensions remain.
    """
    dims: list[list[int]] = []  # size, stride, the other's stride
    for d, size in enumerate(input.shape):
        if d == 1 or size == 1:
            continue
        stride, other = input.stride(d), gradient.stride(d)
        if dims and dims[-1][1] == size * stride and dims[-1][2] == size * other:
            dims[-1] = [dims[-1][0] * size, stride, other]
        else:
            dims.append([size, stride, other])
    if len(dims) > 3:
        return None
    dims += [[1, 0, 0]] * (3 - len(dims))
    sizes = (dims[1][0], dims[2][0])
    strides = (input.stride(1), *(d[1] for d in dims))
    others = (gradient.stride(1), *(d[2] for d in dims))
    return sizes, strides, others


def _unit(classes: int, layout: _Layout, input: Tensor, gradient: Tensor) -> int:
    """A power of two that divides C, all row strides, and both tensors' first addresses (in elements, up to 16 bytes):
    the address of every class that it divides is a multiple of it, too. 1 where classes are not neighbours."""
    _, strides, others = layout
    if strides[0] != 1 or others[0] != 1:
        return 1
    unit = math.gcd(16, classes, *strides[1:], *others[1:])
    for tensor in (input, gradient):
        beyond = tensor.data_ptr() % 16
        unit = math.gcd(unit, beyond // tensor.element_size()) if beyond else unit
    return unit


def _rows_at_once(rows: int, layout: _Layout, input: Tensor, gradient: Tensor) -> int:
    """How many rows side by side 32 bits hold, if every so many of them are neighbours that begin at 32 bits."""
    most = max(1, 4 // input.element_size())
    sizes, *both = layout
    inner = 3 - sizes.count(1)  # the innermost row dimension
    length = rows if inner == 1 else sizes[inner - 2]
    for strides, tensor in zip(both, (input, gradient), strict=True):
        apart = (*strides[:inner], *strides[inner + 1 :])
        if strides[inner] != 1 or math.gcd(most, length, *apart) < most or tensor.data_ptr() % 4:
            return 1
    return most


def _reach(tensor: Tensor) -> int:
    """The largest offset of an element."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def exact(value: float) -> bool:
    """Whether float32, in which numbers travel by value, holds this one."""
    return value != value or ctypes.c_float(value).value == value


class Loss:
    """A loss of rows as the kernels take it, and the sums that the gradients of its parameters are."""

    def __init__(
        self,
        structure: Structure,
        consts: Sequence[float],  # a number for each slot
        by_slot: Mapping[int, Tensor],
        target: Tensor,  # (rows)
        classes: int,
        accumulate: torch.dtype,
    ):
        self.structure, self.by_slot, self.accumulate = structure, by_slot, accumulate
        self.target, self.classes, self.device = target, classes, target.device
        self.rows = target.numel()
        self.capped = consts[Slot.SOFTCAP] > 0
        self.smooth = consts[Slot.SMOOTHING] > 0
        self.tables = tuple(
            tuple(by_slot[slot].detach().contiguous() for slot in slots) if there else None
            for slots, there in (
                ((Slot.TRANSFORM_A, Slot.TRANSFORM_B), structure.transform == TransformKind.PIECEWISE),
                ((Slot.HEAD_A, Slot.HEAD_B), structure.head == HeadKind.TAU),
            )
        )
        self.bins = [1 if table is None else table[0].shape[-1] for table in self.tables]
        # Both have as many groups, where they have any.
        self.groups = max(
            table[0].shape[0] if table is not None and table[0].dim() == 2 else 1 for table in self.tables
        )
        self.modes = 0
        values: list[float | Tensor] = []
        for slot in range(_NUMBERS):
            param = by_slot.get(slot)
            if param is None:
                number = consts[slot]
                if accumulate == torch.float64 and not exact(number):
                    # Filled on the device, from a kernel's argument: no copy from the host.
                    values.append(torch.full((), number, dtype=torch.float64, device=self.device))
                    self.modes += Mode.SHARED * len(Mode) ** slot
                else:
                    values.append(number)
            elif self.is_table(slot):
                values.append(0.0)
            else:
                values.append(param.detach().contiguous())
                mode = (Mode.SHARED, Mode.PER_CLASS, Mode.PER_ROW)[min(param.dim(), 2)]
                self.modes += mode * len(Mode) ** slot
        self.values = tuple(values)
        found = (by_slot.get(slot) for slot in PER_CLASS)
        self.vectors = tuple(None if vector is None else vector.contiguous() for vector in found)
        self.weight = self.vectors[0]
        group = by_slot.get(Slot.GROUP)
        self.group = None if group is None else group.reshape(-1).contiguous()

    def is_table(self, slot: int) -> bool:
        return slot in self.structure.tables

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return replay.empty(shape, dtype or self.accumulate, self.device)

    def parameter(self, slot: int, values: Tensor, bins: Tensor | None) -> Tensor:
        """A parameter's gradient from those of the rows, in a fixed order."""
        param = self.by_slot[slot]
        if self.is_table(slot):
            assert bins is not None
            tau = int(slot in HEAD_TABLES[self.structure.head])
            return self._buckets(param, values, bins[tau], self.group, self.bins[tau])
        if param.dim() == 0:
            return self._buckets(param, values)
        if param.dim() == 1:
            # An ignored row adds 0 to class 0. Accumulating index_put sorts: the same bits on every run.
            label = self.target.long()
            label = torch.where((label >= 0) & (label < self.classes), label, 0)
            found = torch.zeros(self.classes, dtype=torch.float64, device=self.device)
            found.index_put_((label,), values.double(), accumulate=True)
        else:
            found = values.clone()  # not a view of what holds every parameter's
        return found.reshape(param.shape).to(param.dtype)

    def _buckets(
        self, param: Tensor, values: Tensor, keys: Tensor | None = None, group: Tensor | None = None, per_group: int = 1
    ) -> Tensor:
        """The sums that are a parameter's gradient: by no function of torch's, whose calls could not be replayed."""
        found = self.empty(*param.shape, dtype=param.dtype)
        chunk = max(_SUM_CHUNK, triton.cdiv(triton.cdiv(self.rows, 512), _SUM_BLOCK) * _SUM_BLOCK)
        programs = max(1, triton.cdiv(self.rows, chunk))
        count = param.numel()
        parts = found if programs == 1 else self.empty(count, programs, dtype=torch.float64)
        replay.launch(
            sums.bucket, (count, programs), values, keys, group, parts, self.rows, chunk, per_group, 0,
            BLOCK=_SUM_BLOCK,
        )  # fmt: skip
        if programs > 1:
            replay.launch(
                sums.bucket, (count, 1), parts, None, None, found, programs, programs, 1, programs, BLOCK=_SUM_BLOCK
            )
        return found


class Arguments(Loss):
    """A call of the operators of whole rows, as the kernels take it."""

    def __init__(
        self,
        input: Tensor,
        target: Tensor,
        numbers: Sequence[float],
        params: Sequence[Tensor],
        factors: Tensor | None = None,  # (2), of an earlier visit
    ):
        self.shape = target.shape
        self.input = input
        self.reduction = int(numbers[REDUCTION])
        self.ignore_index = int(numbers[IGNORE_INDEX])
        consts = consts_of(numbers)
        target = target.reshape(-1)
        super().__init__(
            structure_of(numbers),
            consts,
            dict(zip(slots_of(numbers), params, strict=True)),
            target if target.is_contiguous() else target.contiguous(),
            input.shape[1],
            accumulated(input.dtype),
        )
        self.weight_sum = self.weight.sum(dtype=self.accumulate) if self.smooth and self.weight is not None else None
        row_weight = self.by_slot.get(Slot.ROW_WEIGHT)
        self.row_weight = None if row_weight is None else row_weight.reshape(-1).contiguous()
        self.normalizer = self._normalizer(consts[Slot.NORMALIZER])
        self.plain = not self.by_slot and not self.smooth and not self.capped
        #: What "mean" makes of a row's terms: where a visit leaves it for the next.
        self.factors = self.empty(int(self.reduction == Reduction.MEAN), 2) if factors is None else factors

    def _normalizer(self, number: float) -> float | Tensor | None:
        """What "mean" divides by in place of sums of its own."""
        given = self.by_slot.get(Slot.NORMALIZER)
        if given is None and number and self.accumulate == torch.float64 and not exact(number):
            given = torch.full((), number, dtype=torch.float64, device=self.device)
        if given is None:
            return number or None
        self.modes += Mode.SHARED * len(Mode) ** Slot.NORMALIZER
        return given

    def statistics(self) -> Tensor:
        """Where a visit leaves (m, log S) of each row for the next, and behind them its factors."""
        return self.empty(self.rows + int(self.reduction == Reduction.MEAN), 2)

    def divisors(self, programs: int) -> tuple[Tensor | None, int]:
        """What "mean" divides by, in parts, and behind them what the programs add their losses up with; none where the
        labels are few enough for each of so many programs to count them."""
        bytes_ = programs * self.rows * self.target.element_size()
        if self.normalizer is not None or (self.rows <= _FEW and bytes_ <= _COUNTED_BYTES):
            return None, 1
        block = _COUNT["BLOCK"]
        chunk = triton.cdiv(triton.cdiv(self.rows, _PARTS), block) * block
        count = triton.cdiv(self.rows, chunk)
        groups = triton.cdiv(programs, _GROUP)
        parts = self.empty(2 * count + 1 + 2 * groups, dtype=torch.float64)
        replay.launch(
            sums.count, (count,), self.target, self.weight, parts, self.rows, self.classes, self.ignore_index, chunk,
            1 + groups, **_COUNT,
        )  # fmt: skip
        return parts, count

    def run(
        self,
        *,
        losses: bool = False,
        save: Tensor | None = None,
        saved: Tensor | None = None,
        stats: tuple[Tensor, ...] | None = None,
        gradient: Tensor | None = None,
        needs: int = 0,
        upstream: Sequence[Tensor | None] = (None, None, None, None),
        conditional: bool = False,
    ) -> tuple[Any, list[Tensor]]:
        """One visit of all rows: the loss, or None, and the gradients that are needed, in the order of their bits.

        gradient: where that of the logits is written, if not to new memory.
        """
        input, rows = self.input, self.rows
        if gradient is None and needs >> INPUT & 1:
            gradient = replay.empty_like(input)
        out = input if gradient is None else gradient
        layout = _collapsed(input, out)
        if layout is None:  # more than three row dimensions: by way of copies
            input, out = input.contiguous(), out.contiguous()
            layout = _collapsed(input, out)
            assert layout is not None
        sizes, in_strides, out_strides = layout
        side_by_side = self.classes > 1 and 0 < input.stride(-1 if input.dim() > 2 else 0) < in_strides[0]
        wanted = [slot for slot in needed(needs) if slot != INPUT]
        plain = self.plain and not wanted and stats is None and not any(up is not None for up in upstream[1:])
        unit = _unit(self.classes, layout, input, out)
        architecture = tiles.architecture(self.device)
        shape = tiles.tile(architecture, self.classes, side_by_side, input.element_size(), unit, plain)
        reduced = losses and self.reduction != Reduction.NONE
        programs = max(triton.cdiv(rows, shape.rows), int(reduced))  # no rows have a sum, too
        # Where nothing may be left to do, few programs find that out. Never 1 then, which Triton would compile apart.
        turns = max(2, triton.cdiv(programs, _CONDITIONAL_PROGRAMS)) if conditional else 1

        by_parameter = self.empty(TRAINABLE_SLOTS, rows) if wanted else None
        bins = self.empty(2, rows, dtype=torch.int32) if any(map(self.is_table, wanted)) else None
        row_losses = None
        if losses:
            row_losses = self.empty(programs if reduced else rows)
        ups, up_strides = _upstream(upstream, self.reduction)
        grid = triton.cdiv(programs, turns)
        divisors, parts, factors, loss = None, 1, None, None
        if self.reduction == Reduction.MEAN:
            if not conditional and saved is None:
                divisors, parts = self.divisors(grid)
            if losses and divisors is not None:
                loss = self.empty()
            if conditional or (losses and (gradient is not None or wanted)):
                factors = self.factors
        if programs > 0:
            arguments = (
                input, self.target, self.values, *self.tables, self.group, self.vectors, self.weight_sum,
                self.row_weight, self.normalizer, divisors, factors, ups, saved,
                row_losses, loss, save, stats, None if gradient is None else out, by_parameter, bins,
                rows, self.classes, *sizes, *in_strides, *out_strides, *up_strides, *self.bins, self.groups, parts,
                self.structure.packed, self.ignore_index, turns,
            )  # fmt: skip
            options = {
                "MODES": self.modes,
                "WANT": sum(1 << slot for slot in wanted),
                "REDUCTION": self.reduction,
                "CAPPED": self.capped,
                "CONDITIONAL": conditional,
                "WIDE": max(_reach(input), _reach(out)) + shape.cols * max(in_strides[0], out_strides[0]) >= _INT32
                or 2 * rows >= _INT32,
                "UNIT": unit,
                "DIMS": 3 - sizes.count(1),
                "ACROSS": _rows_at_once(rows, layout, input, out) if side_by_side else 0,
                "ON_CHIP": shape.on_chip,
                "TWO": not shape.on_chip and self.structure.row_scale == ScaleKind.TWO_SCALE,
                "CHUNKS": shape.chunks,
                "ROWS": shape.rows,
                "LANES": shape.lanes,
                "VECTOR": shape.vector,
                "num_warps": shape.warps,
            }
            registers = tiles.most_registers(
                architecture, shape, side_by_side, input.element_size(), plain, conditional
            )
            if registers is not None:
                options["maxnreg"] = registers
            replay.launch(kernels.visit, (grid,), *arguments, **options)
        if gradient is not None and out is not gradient:
            gradient.copy_(out)
        if row_losses is not None and loss is None:
            loss = self._total(row_losses) if reduced else row_losses.view(self.shape)
        found = [self.parameter(slot, by_parameter[slot], bins) for slot in wanted]  # type: ignore[index]
        return loss, found if gradient is None else [*found, gradient]

    def _total(self, terms: Tensor) -> Tensor:
        """The reduced loss."""
        loss = self.empty()
        options = _TOTAL if len(terms) > _TOTAL["BLOCK"] else {"BLOCK": _SUM_BLOCK}
        replay.launch(sums.total, (1,), terms, loss, len(terms), **options)
        return loss


def _upstream(
    grads: Sequence[Tensor | None], reduction: int
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """Upstream gradients as they lie, an expanded one (stride 0) too. The entropy's is rare: without it no kernel has
    its stride."""
    found: list[Tensor | None] = []
    strides: list[int | None] = []
    for index, grad in enumerate(grads):
        stride = 0
        if grad is not None and not (index == 0 and reduction != Reduction.NONE):
            if grad.dim() > 0 and any(grad.stride()):
                grad = grad.reshape(-1)
                stride = grad.stride(0)
        found.append(grad)
        strides.append(None if grad is None and index == 3 else stride)
    return tuple(found), tuple(strides)
