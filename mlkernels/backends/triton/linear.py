"""From a linear head's tiles to launches: the steps of ``linear/pieces.py`` on any device that Triton serves.

Nothing here looks at a number in a tensor, and what is launched depends on shapes alone, so that a CUDA graph can have
captured it. The two launches of a tile are replayed, with another first class each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...numbering import IGNORE_INDEX, TRAINABLE_SLOTS, Mode, Slot, consts_of
from ..finish import Finished, Rows, Values
from ..reference import Coefficients
from . import pieces, replay, tiles
from .arguments import Loss, exact

_NUMBERS = int(Slot.SOFTCAP) + 1
_SUMS = int(pieces.SUMS.value)
_INT32 = 2**31
#: Rows of a program of row_finish: a thread each.
_BLOCK = 128
#: First classes of a tile are told apart by this alone.
ALIGNMENT = 16


class KnownRows(Rows):
    """What is known of rows, as it lies: (numbers, rows)."""

    reals: Tensor
    wholes: Tensor


def begin(rows: int, values: Values, device: torch.device, second: bool) -> KnownRows:
    """What is known of rows of which no class has been seen."""
    scales = values.structure.scales
    reals = torch.zeros(_SUMS + 3 * scales, rows, dtype=values.dtype, device=device)
    reals[0].fill_(-math.inf)  # no number comes from the host
    wholes = torch.full((2, rows), values.classes, device=device)
    wholes[1].zero_()
    total, shift, squares = reals[_SUMS:].unflatten(0, (3, scales))
    smoothed = values.smoothing > 0
    known = KnownRows(
        reals[0], total, shift, squares if second else None, reals[1] if smoothed else None,
        reals[2] if smoothed else None, wholes[0], wholes[1],
    )  # fmt: skip
    known.reals, known.wholes = reals, wholes
    return known


def _values(consts: Sequence[float], tile: Tensor) -> tuple[tuple[float | Tensor, ...], int]:
    """The numbers that tiles take, of which the softcap alone is read, and how it travels."""
    cap = consts[Slot.SOFTCAP]
    if tile.dtype == torch.float64 and not exact(cap):
        by_pointer = torch.full((), cap, dtype=torch.float64, device=tile.device)
        return (*consts[: Slot.SOFTCAP], by_pointer), Mode.SHARED * len(Mode) ** Slot.SOFTCAP
    return tuple(consts[:_NUMBERS]), 0


def _launched(tile: Tensor, out: Tensor, aligned: int, plain: bool) -> tuple[int, dict[str, Any]]:
    """How many programs go through a tile, and their options."""
    rows, classes = tile.shape
    unit = math.gcd(ALIGNMENT, classes, tile.stride(0), out.stride(0))
    for tensor in (tile, out):
        beyond = tensor.data_ptr() % 16
        unit = math.gcd(unit, beyond // tensor.element_size()) if beyond else unit
    shape = tiles.piece(tiles.architecture(tile.device), classes, tile.element_size(), unit, plain)
    options = {
        "WIDE": rows * max(tile.stride(0), out.stride(0)) + shape.cols >= _INT32,
        "UNIT": unit,
        "ALIGNED": aligned,
        "CHUNKS": shape.chunks,
        "ROWS": shape.rows,
        "LANES": shape.lanes,
        "VECTOR": shape.vector,
        "num_warps": shape.warps,
    }
    return -(-rows // shape.rows), options


def piece_statistics(
    tile: Tensor, target: Tensor, target_logit: Tensor, scales: Tensor, row_factor: Tensor | None,
    column_factor: Tensor | None, reals: Tensor, wholes: Tensor, numbers: Sequence[float],
    vectors: Sequence[Tensor | None], classes: int, shift: bool, second: bool, ranks: bool, aligned: int, start: int,
) -> None:  # fmt: skip
    """Adds a tile (rows, some classes from start on) of products to what is known of its rows.

    scales: (1 or 2, rows). reals, wholes: of :func:`begin`. classes: of the loss. aligned: a divisor of start.
    """
    consts = consts_of(numbers)
    values, modes = _values(consts, tile)
    two, smoothed, capped = scales.shape[0] == 2, consts[Slot.SMOOTHING] > 0, consts[Slot.SOFTCAP] > 0
    plain = not (two or shift or second or ranks or smoothed or capped)
    programs, options = _launched(tile, tile, aligned, plain)
    registers = tiles.most_registers_of_statistics(tiles.architecture(tile.device), (1 + two) * (1 + shift + second))
    if registers is not None:
        options["maxnreg"] = registers
    replay.launch(
        pieces.piece_statistics, (programs,), tile, target, target_logit, scales, row_factor, column_factor,
        (*vectors,), reals, wholes, values, *tile.shape, classes, int(numbers[IGNORE_INDEX]), tile.stride(0), start,
        MODES=modes, TWO=two, SHIFTED=shift, SECOND=second, DESCRIBED=ranks, SMOOTHED=smoothed, CAPPED=capped,
        **options,
    )  # fmt: skip


def piece_gradient(
    tile: Tensor, out: Tensor | None, target: Tensor, row_coefficients: Tensor, row_factor: Tensor | None,
    column_factor: Tensor | None, numbers: Sequence[float], vectors: Sequence[Tensor | None], classes: int,
    tilted: bool, aligned: int, start: int,
) -> None:  # fmt: skip
    """The gradient of a tile of products, in its place or in out; 0 at the target. row_coefficients: (COEFFICIENTS,
    rows); what a row of a bfloat16 out loses is added to its last."""
    consts = consts_of(numbers)
    values, modes = _values(consts, tile)
    out = tile if out is None else out
    smoothed, capped = consts[Slot.SMOOTHING] > 0, consts[Slot.SOFTCAP] > 0
    programs, options = _launched(tile, out, aligned, not (tilted or smoothed or capped))
    replay.launch(
        pieces.piece_gradient, (programs,), tile, out, target, row_coefficients, row_factor, column_factor,
        (*vectors,), values, *tile.shape, classes, int(numbers[IGNORE_INDEX]), tile.stride(0), out.stride(0), start,
        MODES=modes, TILTED=tilted, SMOOTHED=smoothed, CAPPED=capped, **options,
    )  # fmt: skip


#: The same, from tapes.
STATISTICS: Callable[..., None] = replay.replayed(piece_statistics, 8, piece_statistics, started=True)
GRADIENT: Callable[..., None] = replay.replayed(piece_gradient, 6, piece_gradient, started=True)


class RowCoefficients(Coefficients):
    """The coefficients of rows, as they lie: (COEFFICIENTS, rows)."""

    packed: Tensor
    #: What the rows of bfloat16 tiles have lost to rounding, in the tiles whose gradients are there.
    lost: Tensor


def row_finish(
    known: Rows, target_logit: Tensor, values: Values, upstream: Finished | None, slots: Sequence[int], shift: bool
) -> tuple[Finished, RowCoefficients | None, dict[int, Tensor]]:
    """From what is known of all classes to what is finished of each row; where there is an upstream gradient of that,
    to the coefficients of its gradient and the gradients of the parameters in these slots.

    shift: whether T is there, without which the entropy is 0.
    """
    loss = Loss(values.structure, values.consts, values.params, values.target, values.classes, values.dtype)
    rows = loss.rows
    sums: list[Tensor | None] = [known.total, known.shift if shift else None, known.second if shift else None]
    if len({t.stride(0) for t in sums if t is not None}) > 1:
        sums = [None if t is None else t.contiguous() for t in sums]
    finished = loss.empty(int(pieces.FINISHED.value), rows)
    packed = by_parameter = bins = None
    ups: tuple[Tensor | None, ...] = (None,) * 5
    if upstream is not None:
        packed = loss.empty(int(pieces.COEFFICIENTS.value), rows)
        by_parameter = loss.empty(TRAINABLE_SLOTS, rows) if slots else None
        bins = loss.empty(2, rows, dtype=torch.int32) if any(map(loss.is_table, slots)) else None
        ups = tuple(None if g is None else g.contiguous() for g in upstream)
    if rows:
        replay.launch(
            pieces.row_finish, (-(-rows // _BLOCK),), loss.target, target_logit,
            (known.top, *sums, known.weighted, known.weights), loss.values, *loss.tables, loss.group, loss.weight, ups,
            finished, packed, by_parameter, bins, rows, values.classes, known.total.stride(0), *loss.bins, loss.groups,
            loss.structure.packed, int(values.numbers[IGNORE_INDEX]), MODES=loss.modes,
            WANT=sum(1 << slot for slot in slots), TWO=known.total.shape[0] == 2, BLOCK=_BLOCK,
        )  # fmt: skip
    row = None
    if packed is not None:
        factor, slope, spread, own, scale, top, lost = packed
        row = RowCoefficients(
            factor, None if ups[4] is None else slope, spread if loss.smooth else None, own, scale, top
        )
        row.packed, row.lost = packed, lost
    by_slot = {} if by_parameter is None else {slot: loss.parameter(slot, by_parameter[slot], bins) for slot in slots}
    by_class, by_row, lse, log_prob, h = finished
    return Finished(by_class, by_row if values.has_row_term else None, lse, log_prob, h), row, by_slot
