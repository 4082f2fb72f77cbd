"""How a head's work is cut: which rows and classes are together, and how much memory that takes."""

from __future__ import annotations

from typing import NamedTuple

STRATEGIES = ("stored", "tiles", "rows")


class Cut(NamedTuple):
    """How whoever calls a head has its work cut; see :func:`mlkernels.linear_softmax_loss`."""

    strategy: str | None = None
    memory: int | None = None
    compact: bool = False


#: As nobody says otherwise.
DEFAULT = Cut()

#: Bytes of a call's own buffers where nobody says: beyond it larger chunks gained nothing.
DEFAULT_MEMORY = 96 << 20
#: Elements of a tile: it stays in the caches from the product to the sums, and each tile is a few barriers of the
#: threads, which cost much where others use the cores too. With two threads (N = 1024, D = 64, C = 50,000), of the
#: unfused chain's time, stored and tiles: 2^18 1.21 and .42, 2^20 .40 and .40, 2^22 .42 and .48, 2^24 .65 and 1.33.
TILE = 1 << 20
#: The same where each thread has tiles of its own: rows at a time, and elements; the fewest that are worth a thread.
BLOCK, PART, SMALL = 512, 1 << 17, 1 << 12
#: Rows of which, where they are multiplied by pairs, what they have in common is a pair too.
TOGETHER = 64
#: From so many features on a fourth product costs more than W's and dW's way through memory once for each chunk. One
#: thread of an EPYC, float32, of the unfused chain's time, stored and tiles: D = 64 (C = 100,000) .57 and .45, D = 256
#: (50,000) .62 and .79, D = 512 (20,000, one chunk) .88 and 1.05.
CHEAP_WIDTH = 128
#: The same where each thread has tiles of its own, from this width and so many rows of a chunk on. One thread of an
#: EPYC, float32, N = 1024, of the unfused chain's processor time, stored and tiles: D = 64 (C = 50,000) .214 and .209,
#: D = 128 (50,000) .276 and .299, D = 256 (20,000) .38 and .41; two threads on a busy machine, D = 64: .36 and .27.
CHEAP, FEW = 96, 80
#: A chunk of fewer rows, or a tile of fewer classes, is not worth a product.
FEW_ROWS, FEW_CLASSES = 32, 64


#: The same on a GPU, by the arithmetic in docs/heads.md and not measured. The bytes of a call's own buffers; those of a
#: tile that is in the second-level cache still when it is read again; the rows of a chunk from which on a fourth
#: product costs more than dW's way through memory once more, at any width; what tensor cores like multiples of.
DEVICE_MEMORY, CACHED, ENOUGH_ROWS, ROUND = 1 << 30, 24 << 20, 1024, 256


class Plan(NamedTuple):
    """What is cut how.

    stored: a chunk's logits are kept from the statistics to the gradient; else the product is made again.
    rows: how many are in a chunk. classes: how many are in a tile.
    parts: how many threads have tiles of their own, of `block` rows at a time; 0: the tiles are walked through in
    Python, all of a chunk's rows at a time.
    """

    stored: bool
    rows: int
    classes: int
    parts: int = 0
    block: int = 0


def room(plan: Plan, keep: bool, rows: int, classes: int, width: int, copies: int, pairs: bool = False) -> int:
    """Elements that ``threads`` takes for a chunk: its products, tiles of the weight transposed and, where so asked,
    copied, and sums of dX by thread.

    pairs: operands are two to an element. Then tiles of the weight are copied, and gradients and the features are, too.
    """
    block, tile = min(plan.block, rows), plan.classes
    products = rows * classes if keep else plan.parts * block * tile
    sums = (plan.parts - 1) * rows * width
    if not pairs:
        return products + sums + plan.parts * tile * width * (1 + copies)
    block = min(block + block % 2, rows)
    products = products if keep else plan.parts * block * tile
    half = -(-tile // 2) + 1  # with a pair of what they have in common
    of_part = tile * (width // 2) + half * (width + block) + pair_rows(block) * tile
    blocks = -(-rows // max(block, 1))
    return products + sums + plan.parts * of_part + blocks * pair_rows(block) * width


def pair_rows(rows: int) -> int:
    """The pairs of so many rows, and one more for each group of them; csrc/cpu/pieces.h."""
    return -(-rows // 2) + -(-rows // TOGETHER)


def shared(
    rows: int,
    classes: int,
    width: int,
    itemsize: int,
    copies: int,
    threads: int,
    strategy: str | None = None,
    memory: int | None = None,
    pairs: bool = False,
) -> Plan:
    """The same where threads share the classes. How rows are cut depends on the memory, and not on the threads."""
    allowed = DEFAULT_MEMORY if memory is None else memory
    rows = max(rows, 1)

    def bytes_of(made: Plan) -> int:
        return itemsize * room(made, made.stored, made.rows, classes, width, copies, pairs)

    def cut(stored: bool, chunk: int) -> Plan | None:
        """Tiles as large as there is memory for, of as many threads."""
        parts = max(1, min(threads, classes // FEW_CLASSES))
        while True:
            elements = PART if parts > 1 or threads == 1 else TILE
            while elements:
                block = min(chunk, BLOCK if parts > 1 else chunk, elements)
                tile = max(1, min(elements // block, -(-classes // parts)))
                every = -(-classes // (parts * tile)) * parts  # as many tiles for each thread, of one size
                made = Plan(stored, chunk, max(1, -(-classes // every)), parts, block)
                if bytes_of(made) <= allowed:
                    return made
                elements = elements // 2 if parts == 1 or elements > SMALL else 0
            if parts == 1:
                return None
            parts //= 2

    least = bytes_of(Plan(False, 1, 1, 1, 1))
    if strategy == "rows":
        chunk = rows
        while chunk > 1 and bytes_of(Plan(True, chunk, classes, 1, chunk)) > allowed:
            chunk = (chunk + 1) // 2
        whole = Plan(True, chunk, classes, 1, chunk)
        if bytes_of(whole) > allowed:
            raise ValueError(
                f"memory={allowed} is too small for one row of {classes} logits: that takes {bytes_of(whole)} bytes; "
                f"strategy='tiles' takes {least}"
            )
        return whole
    a_row = itemsize * classes
    if strategy in (None, "stored"):
        # More rows than these at a time gained nothing: W and dW then come from memory seldom enough.
        most = min(rows, BLOCK, max(1, allowed * 7 // 8 // a_row))
        chunk = -(-rows // -(-rows // most))  # as many chunks, of one size
        made: Plan | None = cut(True, chunk)
        while made is None and chunk > 1:
            chunk = (chunk + 1) // 2
            made = cut(True, chunk)
        worth = rows * a_row <= allowed or (width >= CHEAP and chunk >= FEW)
        if made is not None and (strategy == "stored" or worth):
            return made
        if strategy == "stored":
            raise ValueError(
                f"memory={allowed} is too small for one row of {classes} logits under strategy='stored': that takes "
                f"{a_row + least - itemsize} bytes; strategy='tiles' takes {least}"
            )
    tiles = cut(False, rows)
    if tiles is None:
        raise ValueError(f"memory={allowed} is too small for one logit of one row: that takes {least} bytes")
    return tiles


def plan(
    rows: int,
    classes: int,
    width: int,
    itemsize: int,
    copies: int,
    temporaries: int,
    strategy: str | None = None,
    memory: int | None = None,
) -> Plan:
    """The strategy, and the sizes that keep a call's own buffers within ``memory`` bytes.

    Args:
        rows, classes, width: N, C, D. itemsize: of what is computed in. copies: of a tile of the weight, that the loop
            makes. temporaries: of a tile's size, that the pieces make.
    """
    allowed = DEFAULT_MEMORY if memory is None else memory
    rows = max(rows, 1)

    def of_class(chunk: int, tiles: int) -> int:
        """The bytes that each class of a tile takes: its logits in so many tiles, its part of the weight."""
        return itemsize * (chunk * tiles + width * copies)

    def tile_of(chunk: int, left: int, tiles: int) -> int:
        each = of_class(chunk, tiles)
        return min(classes, max(1, TILE // chunk), left // each if each else classes if left >= 0 else 0)

    a_row, tiles = itemsize * classes, temporaries + 1
    if strategy == "rows":
        chunk = rows
        while chunk > 1 and chunk * a_row + of_class(chunk, temporaries) * classes > allowed:
            chunk = (chunk + 1) // 2
        if chunk * a_row + of_class(chunk, temporaries) * classes > allowed:
            raise ValueError(
                f"memory={allowed} is too small for one row of {classes} logits: that takes "
                f"{a_row + of_class(1, temporaries) * classes} bytes; strategy='tiles' takes {of_class(1, tiles)}"
            )
        return Plan(True, chunk, classes)
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


def on_device(
    rows: int,
    classes: int,
    width: int,
    itemsize: int,
    copies: bool,
    gradient: int,
    strategy: str | None = None,
    memory: int | None = None,
) -> Plan:
    """The same on a GPU.

    Args:
        gradient: the bytes of a number of a gradient that has a tile of its own; 0: it takes the place of the products.
    """
    allowed = DEVICE_MEMORY if memory is None else memory
    rows = max(rows, 1)

    def bytes_of(made: Plan) -> int:
        kept = classes if made.stored else made.classes
        return itemsize * (made.rows * kept + made.classes * width * copies) + gradient * made.rows * made.classes

    def cut(stored: bool, chunk: int, whole: bool = False) -> Plan | None:
        """Of a tile both are read again: itself, if it is small, and dX once per tile, if these are many."""
        tile = min(classes, classes if whole else max(1, CACHED // (itemsize * chunk), 2 * width))
        while True:
            made = Plan(stored, chunk, tile - tile % ROUND if ROUND < tile < classes else tile)
            if bytes_of(made) <= allowed:
                return made
            if tile == 1 or whole:
                return None
            tile = (tile + 1) // 2

    def largest(stored: bool, chunk: int, whole: bool = False) -> Plan | None:
        while (made := cut(stored, chunk, whole)) is None and chunk > 1:
            chunk = (chunk + 1) // 2
        return made

    found = None
    if strategy != "tiles":
        most = min(rows, max(1, allowed // (itemsize * classes)))
        found = largest(True, -(-rows // -(-rows // most)), strategy == "rows")
        if strategy is None and found is not None and found.rows < min(rows, ENOUGH_ROWS):
            found = None
    if found is None and strategy in (None, "tiles"):
        found = largest(False, rows)
    if found is None:
        least = bytes_of(Plan(strategy != "tiles" and strategy is not None, 1, classes if strategy == "rows" else 1))
        raise ValueError(f"memory={allowed} is too small for one row of {classes} logits: that takes {least} bytes")
    return found
