"""Launch sizes: what a program holds of the rows, and how many warps and registers it has for that.

``sizes.json`` holds what was measured, per architecture; ``bench/tune.py`` writes it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import triton

from .. import architecture as architecture  # here, where who measures or pretends can put another

#: Whether this Triton's ptxas, left alone, spills for plain losses. That of 3.6 does not where rows are streamed, and
#: takes as few as 72 registers: 28 warps.
_PLAIN_SPILLS = tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6)


class Tile(NamedTuple):
    """What a program holds: (chunks, rows, lanes, vector), see ``elements.py``."""

    chunks: int
    rows: int
    lanes: int
    vector: int
    warps: int
    on_chip: bool

    @property
    def cols(self) -> int:
        """Classes, at a time."""
        return self.chunks * self.lanes * self.vector


@functools.cache
def _sizes(architecture: str) -> dict[str, list[list[int]]]:
    table = json.loads((Path(__file__).parent / "sizes.json").read_text())
    return {**table["default"], **table.get(architecture, {})}


@functools.cache
def tile(architecture: str, classes: int, side_by_side: bool, itemsize: int, unit: int, plain: bool) -> Tile:
    """The program of rows of so many classes. side_by_side: it is rows, not classes, that are neighbours in memory;
    unit: a divisor of classes and strides; plain: nothing is read beside logits and labels, and nothing written but
    loss and gradient of the logits.

    Nothing else counts, the number of rows least of all: a row's results do not depend on the batch it is in.
    """
    table = _sizes(architecture)["rows_side_by_side" if side_by_side else "classes_side_by_side"]
    warp = 64 if architecture.startswith("gfx9") else 32
    cols = triton.next_power_of_2(classes)
    spare = 1 + (itemsize == 8)  # float64 takes twice the registers
    for limit, elements, warps in table[:-1]:
        if cols > limit // spare:
            continue
        elements //= spare
        if not plain:  # and so may all that a loss can have
            fewer = elements // (2 * spare)
            elements, warps = (fewer, warps) if cols <= fewer else (elements, 2 * warps)
            if warps >= 16:  # these leave a thread 128 registers
                break
        # A thread has all of one row, or some short ones; of rows side by side those that 32 bits of memory hold.
        most = max(1, 4 // itemsize) if side_by_side else min(4, max(1, 8 // cols))
        rows = min(most * warp * warps, elements // cols)
        return Tile(*_shape(rows, cols, warp * warps, side_by_side, itemsize, unit), warps, True)
    _, elements, warps = table[-1]
    if not plain:
        elements //= 2
    cols = min(cols, elements // 64) if side_by_side else elements
    rows = elements // cols
    return Tile(*_shape(rows, cols, warp * warps * spare, side_by_side, itemsize, unit), warps * spare, False)


def piece(architecture: str, classes: int, itemsize: int, unit: int, plain: bool) -> Tile:
    """The program of a tile of so many classes: two rows, a warp each, so that no thread waits for another warp's.

    A thread has 32 numbers at a time, half as many where they are float64, and where there is more to keep than the sum
    of exponentials. unit: what classes and strides are a multiple of.
    """
    warp = 64 if architecture.startswith("gfx9") else 32
    vector = min(unit, 16 // itemsize)
    most = 32 // (1 + (itemsize == 8)) // (1 if plain else 2) // vector
    chunks = min(most, max(1, triton.next_power_of_2(classes) // (warp * vector)))
    return Tile(chunks, 2, warp, vector, 2, False)


def _shape(
    rows: int, cols: int, threads: int, side_by_side: bool, itemsize: int, unit: int
) -> tuple[int, int, int, int]:
    """A row's scalar mathematics is done by every thread that holds some of it, so these are as few as there can be."""
    if side_by_side:
        lanes = max(1, min(cols, threads * max(1, 4 // itemsize) // rows))
        return cols // lanes, rows, lanes, 1
    vector = min(cols, unit, 16 // itemsize)
    lanes = max(1, threads // rows)
    if cols * itemsize > 64:  # of longer rows a sector of 32 bytes at a time
        lanes = max(lanes, 32 // (itemsize * vector))
    lanes = min(cols // vector, lanes)
    return cols // (lanes * vector), rows, lanes, vector


def most_registers(
    architecture: str, tile: Tile, side_by_side: bool, itemsize: int, plain: bool, conditional: bool
) -> int | None:
    """The bound on the registers of a thread that ptxas is given, if any; conditional: what is there may do already.

    Else it stops short of the registers that there are, and spills. Of plain losses a newer one does so (8 to 16 bytes)
    where rows are streamed, and on sm_8x where the longest on chip are refreshed: both have 16 warps on a
    multiprocessor with the bound.
    """
    if not architecture.startswith("sm_"):
        return None
    if not plain:
        return min(255, 2**16 // (32 * tile.warps))
    spills = _PLAIN_SPILLS and tile.warps <= 4 and not side_by_side
    if tile.on_chip:
        spills = _PLAIN_SPILLS and architecture.startswith("sm_8") and conditional and tile.warps == 8 and itemsize == 2
    return 128 if spills else None


def most_registers_of_statistics(architecture: str, moments: int) -> int | None:
    """The same of a tile's statistics; moments: how many sums each class adds to. The ptxas of 3.6 takes 209 to 228 for
    six, where 200 spill nothing and leave room for 10 warps on a multiprocessor, not 8."""
    return 200 if moments == 6 and not _PLAIN_SPILLS and architecture.startswith("sm_") else None
