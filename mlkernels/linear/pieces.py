"""Statistics and gradients of tiles, and what is between: by the CPU's operators or Triton's kernels, else in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from ..backends import reference, refusal
from ..backends.reference import Coefficients, Finished, Rows, Values
from ..numbering import PER_CLASS, Slot


class Want(NamedTuple):
    """What is not always asked of the statistics: T, the second moment, and what only RowStats need."""

    shift: bool
    second: bool
    ranks: bool


#: What products of vectors are multiplied by to be those of directions: a factor for each row, one for each class.
Factors: TypeAlias = tuple[Tensor, Tensor]


class Tile(NamedTuple):
    """Products (rows, some classes from start on), to be overwritten, and what makes cosines of them."""

    f: Tensor
    start: int
    factors: Factors | None = None


class Pieces(Protocol):
    """What the loop needs of a tile of products, and of the rows."""

    #: How many temporaries of a tile's size there are.
    temporaries: int
    #: Whether products are of vectors as they are, and made those of directions here; else these are multiplied.
    takes_factors: bool
    #: Whether ignored rows stay where they are on a CPU, too, as they do where looking for them would be waiting.
    masks: bool

    def operands(self, *dtypes: torch.dtype) -> torch.dtype | None:
        """What products are made of, and gradients of tiles are; None: of what is computed in."""

    def begin(self, u_y: Tensor, values: Values, want: Want) -> Rows:
        """What is known of rows of which no class has been seen."""

    def statistics(self, tile: Tile, u_y: Tensor, values: Values, known: Rows, scales: Tensor, want: Want) -> Rows:
        """What is known with the classes of this tile."""

    def finish(
        self, known: Rows, u_y: Tensor, values: Values, upstream: Finished | None, slots: Sequence[int], want: Want
    ) -> tuple[Finished, Coefficients | None, dict[int, Tensor]]:
        """What follows from all classes; where the upstream gradients of that are given, also how tiles write their
        gradients, and the gradients of the parameters in these slots."""

    def gradient(self, tile: Tile, row: Coefficients, values: Values, seen: bool, out: Tensor | None) -> Tensor:
        """dL/df of the tile, 0 at the target, in its place or in out; seen: whether ``statistics`` has had it."""

    def add_lost(self, sum: Tensor | None, part: slice, row: Coefficients, common: Tensor | None) -> None:
        """Adds to the features' gradient what a chunk's has lost, by the rounding of tiles, of what classes have in
        common (D). The weight's loses as much of what rows have in common, but a class's rows are in many programs."""


class TorchPieces:
    """By the reference's functions, on any device."""

    temporaries = 12
    takes_factors = masks = False

    def operands(self, *dtypes: torch.dtype) -> torch.dtype | None:
        return None

    def begin(self, u_y: Tensor, values: Values, want: Want) -> Rows:
        nothing = u_y.new_empty(u_y.shape[0], 0)
        return reference.statistics(nothing, u_y, reference.scales(values), values, second=want.second)

    def statistics(self, tile: Tile, u_y: Tensor, values: Values, known: Rows, scales: Tensor, want: Want) -> Rows:
        u = reference.final_logits(tile.f, values, tile.start)
        piece = reference.statistics(u, u_y, scales, values, start=tile.start, second=want.second)
        return reference.combine(known, piece, scales)

    def finish(
        self, known: Rows, u_y: Tensor, values: Values, upstream: Finished | None, slots: Sequence[int], want: Want
    ) -> tuple[Finished, Coefficients | None, dict[int, Tensor]]:
        high = reference.well_classified(u_y - known.top, values)
        finished = reference.finish(reference.chosen(known, high), u_y, reference.row_scale(values, high), values)
        if upstream is None:
            return finished, None, {}
        row, by_slot = reference.coefficients(known, u_y, values, upstream, slots)
        row = Coefficients(*(None if n is None else n.contiguous() for n in row))  # type: ignore[arg-type]
        return finished, row, by_slot

    def gradient(self, tile: Tile, row: Coefficients, values: Values, seen: bool, out: Tensor | None) -> Tensor:
        row = row._replace(target=torch.zeros_like(row.target))
        u = reference.final_logits(tile.f, values, tile.start)
        return reference.through_cap(reference.gradient(u, row, values, start=tile.start), tile.f, values)

    def add_lost(self, sum: Tensor | None, part: slice, row: Coefficients, common: Tensor | None) -> None:
        assert common is None  # nothing is rounded


class CpuPieces(TorchPieces):
    """By the CPU's operators, which leave u in a tile that they have seen, and the gradient in the end."""

    temporaries = 0

    def begin(self, u_y: Tensor, values: Values, want: Want) -> Rows:
        scales, rows = reference.scales(values).shape
        reals = u_y.new_zeros(3 + 3 * scales, rows)
        reals[0] = -torch.inf
        whole = torch.full((2, rows), values.classes)
        whole[1] = 0 if want.ranks else -1
        return rows_of(reals, whole, values.smoothing > 0, want.second)

    def statistics(self, tile: Tile, u_y: Tensor, values: Values, known: Rows, scales: Tensor, want: Want) -> Rows:
        top, total, shift, *others = known
        torch.ops.mlkernels.piece_statistics(
            tile.f, u_y, values.label, tile.start, scales, values.numbers, [*values.params.values()], top, total,
            shift if want.shift else None, *others,
        )  # fmt: skip
        return known

    def finish(
        self, known: Rows, u_y: Tensor, values: Values, upstream: Finished | None, slots: Sequence[int], want: Want
    ) -> tuple[Finished, Coefficients | None, dict[int, Tensor]]:
        shift = known.shift if want.shift else None
        (by_class, by_row, *others), found, gradients = torch.ops.mlkernels.row_finish(
            values.target, u_y, known.top, known.total, shift, known.second, known.weighted, values.numbers,
            [*values.params.values()], values.classes, *(upstream or Finished(None)), upstream is not None,
            sum(1 << slot for slot in slots),
        )  # fmt: skip
        finished = Finished(by_class, by_row if values.has_row_term else None, *others)
        if upstream is None:
            return finished, None, {}
        factor, slope, spread, *others = found
        row = Coefficients(
            factor, None if upstream.entropy is None else slope, spread if values.smoothing > 0 else None, *others
        )
        return finished, row, dict(zip(sorted(slots), gradients, strict=True))

    def gradient(self, tile: Tile, row: Coefficients, values: Values, seen: bool, out: Tensor | None) -> Tensor:
        torch.ops.mlkernels.piece_gradient(
            tile.f, values.label, tile.start, seen, values.numbers, [*values.params.values()], row.factor, row.slope,
            row.spread, row.scale, row.top,
        )  # fmt: skip
        return tile.f


def rows_of(reals: Tensor, whole: Tensor, smoothed: bool, second: bool) -> Rows:
    """The numbers of rows from where operators have them: (3 + 3 scales, rows) and (2, rows)."""
    total, shift, squares = reals[3:].unflatten(0, (3, -1))
    return Rows(
        reals[0], total, shift, squares if second else None,
        reals[1] if smoothed else None, reals[2] if smoothed else None, whole[0], whole[1],
    )  # fmt: skip


class TritonPieces:
    """By Triton's kernels: tiles of float32 products, of bfloat16 vectors as they are, whose gradients are written for
    the next products."""

    temporaries = 0
    takes_factors = masks = True

    def operands(self, *dtypes: torch.dtype) -> torch.dtype | None:
        # Not float16, in whose range the gradients of most logits are 0.
        return torch.bfloat16 if {*dtypes} == {torch.bfloat16} else None

    def begin(self, u_y: Tensor, values: Values, want: Want) -> Rows:
        from ..backends.triton import linear

        return linear.begin(u_y.shape[0], values, u_y.device, want.second)

    def statistics(self, tile: Tile, u_y: Tensor, values: Values, known: Rows, scales: Tensor, want: Want) -> Rows:
        from ..backends.triton import linear

        assert isinstance(known, linear.KnownRows)
        linear.STATISTICS(
            tile.f, values.target, u_y, scales, *(tile.factors or (None, None)), known.reals, known.wholes,
            values.numbers, self.vectors(values), values.classes, want.shift, want.second, want.ranks,
            math.gcd(linear.ALIGNMENT, tile.start), tile.start,
        )  # fmt: skip
        return known

    def vectors(self, values: Values) -> list[Tensor | None]:
        """Of all classes; of weights tiles know under smoothing only."""
        known = (slot != Slot.WEIGHT or values.smoothing > 0 for slot in PER_CLASS)
        return [values.params.get(slot) if used else None for slot, used in zip(PER_CLASS, known, strict=True)]

    def finish(
        self, known: Rows, u_y: Tensor, values: Values, upstream: Finished | None, slots: Sequence[int], want: Want
    ) -> tuple[Finished, Coefficients | None, dict[int, Tensor]]:
        from ..backends.triton import linear

        return linear.row_finish(known, u_y, values, upstream, slots, want.shift)

    def gradient(self, tile: Tile, row: Coefficients, values: Values, seen: bool, out: Tensor | None) -> Tensor:
        from ..backends.triton import linear

        assert isinstance(row, linear.RowCoefficients)
        linear.GRADIENT(
            tile.f, out, values.target, row.packed, *(tile.factors or (None, None)), values.numbers,
            self.vectors(values), values.classes, row.slope is not None, math.gcd(linear.ALIGNMENT, tile.start),
            tile.start,
        )  # fmt: skip
        return tile.f if out is None else out

    def add_lost(self, sum: Tensor | None, part: slice, row: Coefficients, common: Tensor | None) -> None:
        from ..backends.triton import linear

        if sum is not None and common is not None:
            assert isinstance(row, linear.RowCoefficients)
            sum[part].addr_(row.lost, common)


TORCH, CPU, TRITON = TorchPieces(), CpuPieces(), TritonPieces()


def pieces_for(device: torch.device, backend: str | None) -> Pieces:
    """Whose pieces serve a device's tiles."""
    if backend == "cuda":
        raise ValueError("linear heads take backend=None, 'reference', 'cpu' or 'triton', got 'cuda'")
    if backend is None:
        names = ("cpu",) if device.type == "cpu" else ("triton",)
        backend = next((name for name in names if refusal(device, name) is None), "reference")
    why = refusal(device, backend)
    if why is not None:
        raise ValueError(why)
    by_name: dict[str, Pieces] = {"reference": TORCH, "cpu": CPU, "triton": TRITON}
    return by_name[backend]
