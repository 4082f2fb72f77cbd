"""How a head's work is cut: which rows and classes are together, and how much memory that takes."""

from __future__ import annotations

from typing import NamedTuple

STRATEGIES = ("stored", "tiles")
#: Bytes of a call's own buffers where nobody says: beyond it larger chunks gained nothing.
DEFAULT_MEMORY = 96 << 20
#: Elements of a tile: it stays in the caches from the product to the sums, and each tile is a few barriers of the
#: threads, which cost much where others use the cores too. With two threads (N = 1024, D = 64, C = 50,000), of the
#: unfused chain's time, stored and tiles: 2^18 1.21 and .42, 2^20 .40 and .40, 2^22 .42 and .48, 2^24 .65 and 1.33.
TILE = 1 << 20
#: From so many features on a fourth product costs more than W's and dW's way through memory once for each chunk. One
#: thread of an EPYC, float32, of the unfused chain's time, stored and tiles: D = 64 (C = 100,000) .57 and .45, D = 256
#: (50,000) .62 and .79, D = 512 (20,000, one chunk) .88 and 1.05.
CHEAP_WIDTH = 128
#: A chunk of fewer rows, or a tile of fewer classes, is not worth a product.
FEW_ROWS, FEW_CLASSES = 32, 64


class Plan(NamedTuple):
    """What is cut how.

    stored: a chunk's logits are kept from the statistics to the gradient; else the product is made again.
    rows: how many are in a chunk. classes: how many are in a tile.
    """

    stored: bool
    rows: int
    classes: int


def plan(
    rows: int,
    classes: int,
    width: int,
    itemsize: int,
    copies: bool,
    temporaries: int,
    strategy: str | None = None,
    memory: int | None = None,
) -> Plan:
    """The strategy, and the sizes that keep a call's own buffers within ``memory`` bytes.

    Args:
        rows, classes, width: N, C, D. itemsize: of what is computed in. copies: whether a tile of the weight is copied.
        temporaries: of a tile's size, that the pieces make.
    """
    allowed = DEFAULT_MEMORY if memory is None else memory
    rows = max(rows, 1)

    def of_class(chunk: int, tiles: int) -> int:
        """The bytes that each class of a tile takes: its logits in so many tiles, its part of the weight."""
        return itemsize * (chunk * tiles + (width if copies else 0))

    def tile_of(chunk: int, left: int, tiles: int) -> int:
        each = of_class(chunk, tiles)
        return min(classes, max(1, TILE // chunk), left // each if each else classes if left >= 0 else 0)

    a_row, tiles = itemsize * classes, temporaries + 1
    if strategy in (None, "stored"):
        # A chunk reads all of W: most of the memory is for rows, and few of them are better made again.
        most = min(rows, max(1, (allowed * 3 // 4 if of_class(1, temporaries) else allowed) // a_row))
        chunk = -(-rows // -(-rows // most))  # as many chunks, of one size
        if strategy == "stored":  # temporaries are of a chunk's rows, which may be many where classes are few
            while chunk > 1 and chunk * a_row + of_class(chunk, temporaries) > allowed:
                chunk = (chunk + 1) // 2
        tile = tile_of(chunk, allowed - chunk * a_row, temporaries)
        worth = chunk == rows or (width >= CHEAP_WIDTH and chunk >= FEW_ROWS)
        if tile > 0 and (strategy == "stored" or worth):
            return Plan(True, chunk, tile)
        if strategy == "stored":
            raise ValueError(
                f"memory={allowed} is too small for one row of {classes} logits under strategy='stored': that takes "
                f"{a_row + of_class(1, temporaries)} bytes; strategy='tiles' takes {of_class(1, tiles)}"
            )
    chunk = rows
    while chunk > 1 and tile_of(chunk, allowed, tiles) < min(classes, FEW_CLASSES):
        chunk = (chunk + 1) // 2
    tile = tile_of(chunk, allowed, tiles)
    if tile < 1:
        raise ValueError(
            f"memory={allowed} is too small for one logit of one row: that takes {of_class(1, tiles)} bytes"
        )
    return Plan(False, chunk, tile)
