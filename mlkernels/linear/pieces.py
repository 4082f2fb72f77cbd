"""Statistics and gradients of tiles: by the CPU's operators where they are, which work in place, else in torch."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..backends import native, reference
from ..backends.reference import Coefficients, Rows, Values
from ..spec import Slot


class Want(NamedTuple):
    """What is not always asked of the statistics: T, the second moment, and what only RowStats need."""

    shift: bool
    second: bool
    ranks: bool


class Pieces(Protocol):
    """What the loop needs of a tile (rows, classes) of products, which is its to overwrite."""

    #: How many temporaries of a tile's size there are.
    temporaries: int

    def begin(self, u_y: Tensor, values: Values, want: Want) -> Rows:
        """What is known of rows of which no class has been seen."""

    def statistics(
        self, f: Tensor, u_y: Tensor, values: Values, start: int, known: Rows, scales: Tensor, want: Want
    ) -> Rows:
        """What is known with the classes of this tile."""

    def gradient(self, f: Tensor, row: Coefficients, values: Values, start: int, seen: bool) -> Tensor:
        """dL/df of the tile, 0 at the target; seen: whether ``statistics`` has had it."""


class TorchPieces:
    """By the reference's functions, on any device."""

    temporaries = 12

    def begin(self, u_y: Tensor, values: Values, want: Want) -> Rows:
        nothing = u_y.new_empty(u_y.shape[0], 0)
        return reference.statistics(nothing, u_y, reference.scales(values), values, second=want.second)

    def statistics(
        self, f: Tensor, u_y: Tensor, values: Values, start: int, known: Rows, scales: Tensor, want: Want
    ) -> Rows:
        u = reference.final_logits(f, values, start)
        piece = reference.statistics(u, u_y, scales, values, start=start, second=want.second)
        return reference.combine(known, piece, scales)

    def gradient(self, f: Tensor, row: Coefficients, values: Values, start: int, seen: bool) -> Tensor:
        gradient = reference.gradient(reference.final_logits(f, values, start), row, values, start=start)
        return reference.through_cap(gradient, f, values)


class CpuPieces:
    """By the CPU's operators, which leave u in a tile that they have seen, and the gradient in the end."""

    temporaries = 0

    def begin(self, u_y: Tensor, values: Values, want: Want) -> Rows:
        scales, rows = reference.scales(values).shape
        reals = u_y.new_zeros(3 + 3 * scales, rows)
        reals[0] = -torch.inf
        whole = torch.full((2, rows), values.classes)
        whole[1] = 0 if want.ranks else -1
        return rows_of(reals, whole, values.smoothing > 0, want.second)

    def statistics(
        self, f: Tensor, u_y: Tensor, values: Values, start: int, known: Rows, scales: Tensor, want: Want
    ) -> Rows:
        top, total, shift, *others = known
        torch.ops.mlkernels.piece_statistics(
            f, u_y, values.label, start, scales, values.params.get(Slot.WEIGHT), values.params.get(Slot.ADJUSTMENT),
            values.consts[Slot.SOFTCAP], top, total, shift if want.shift else None, *others,
        )  # fmt: skip
        return known

    def gradient(self, f: Tensor, row: Coefficients, values: Values, start: int, seen: bool) -> Tensor:
        torch.ops.mlkernels.piece_gradient(
            f, values.label, start, seen, values.params.get(Slot.WEIGHT), values.params.get(Slot.ADJUSTMENT),
            values.consts[Slot.SOFTCAP], row.factor, row.slope, row.spread, row.scale, row.top,
        )  # fmt: skip
        return f


def rows_of(reals: Tensor, whole: Tensor, smoothed: bool, second: bool) -> Rows:
    """The numbers of rows from where the CPU's operators have them: (3 + 3 scales, rows) and (2, rows)."""
    total, shift, squares = reals[3:].unflatten(0, (3, -1))
    return Rows(
        reals[0], total, shift, squares if second else None,
        reals[1] if smoothed else None, reals[2] if smoothed else None, whole[0], whole[1],
    )  # fmt: skip


TORCH, CPU = TorchPieces(), CpuPieces()


def pieces_for(device: torch.device, backend: str | None) -> Pieces:
    """Whose pieces serve a device's tiles."""
    if backend not in (None, "reference", "cpu"):
        raise ValueError(f"heads take backend=None, 'reference' or 'cpu', got {backend!r}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' does not serve tensors on {device.type!r}")
    missing = native.cpu_missing
    if backend == "cpu" and missing is not None:
        raise ValueError(f"backend 'cpu' is not available: {missing}")
    return CPU if backend != "reference" and device.type == "cpu" and missing is None else TORCH
