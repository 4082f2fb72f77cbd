"""How a linear head's work is cut: which rows and classes are together, and how much memory that takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

from typing_extensions import Never

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


def workspace(plan: Plan, keep: bool, rows: int, classes: int, width: int, copies: int, pairs: bool = False) -> int:
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


@dataclasses.dataclass(frozen=True)
class Planner:
    """The strategy, and the sizes that keep a call's own buffers within ``memory`` bytes, for the loop in Python."""

    rows: int  # N
    classes: int  # C
    width: int  # D
    itemsize: int  # of what is computed in
    copies: int  # of a tile of the weight, that the loop makes
    beside: int = 0  # bytes that temporaries and gradients take for each number of a tile
    memory: int = DEFAULT_MEMORY

    def plan(self, strategy: str | None = None) -> Plan:
        """The one for a strategy, or for the better one."""
        if strategy == "rows":
            return self._largest(self.whole, self.memory) or self._refuse("", self.uncut(True, 1, self.classes))
        if strategy != "tiles":
            made = self._largest(functools.partial(self.cut, True), self.for_logits())
            if made is not None and (strategy == "stored" or self.is_worth_it(made)):
                return made
            if strategy == "stored":
                self._refuse(" under strategy='stored'", self.uncut(True, 1, 1))
        return self._largest(functools.partial(self.cut, False)) or self._refuse(None, self.uncut(False, 1, 1))

    def for_logits(self) -> int:
        """The bytes of logits that a chunk may keep. It reads all of W: most of the memory is for rows."""
        return self.memory * 3 // 4 if self.beside or self.width * self.copies else self.memory

    def is_worth_it(self, stored: Plan) -> bool:
        """Whether to keep logits so: those of few rows at a time are better made again."""
        return stored.rows >= self.rows or (self.width >= CHEAP_WIDTH and stored.rows >= FEW_ROWS)

    def bytes_of(self, plan: Plan) -> int:
        """What a plan takes."""
        kept = self.classes if plan.stored else plan.classes
        of_tiles = plan.classes * (plan.rows * self.beside + self.itemsize * self.width * self.copies)
        return self.itemsize * plan.rows * kept + of_tiles

    def cut(self, stored: bool, chunk: int) -> Plan | None:
        """Such a chunk's, with tiles as large as there is memory for."""
        base = self.bytes_of(Plan(stored, chunk, 0))
        each = self.bytes_of(Plan(stored, chunk, 1)) - base
        if base > self.memory:
            return None
        tile = min(self.classes, max(1, TILE // chunk), (self.memory - base) // each if each else self.classes)
        least = 1 if stored or chunk == 1 else min(self.classes, FEW_CLASSES)
        return Plan(stored, chunk, tile) if tile >= least else None

    def whole(self, chunk: int) -> Plan | None:
        """All classes at a time, if there is memory for that."""
        return self._allowed(self.uncut(True, chunk, self.classes))

    def uncut(self, stored: bool, rows: int, classes: int) -> Plan:
        """So many rows and classes at a time, by one thread."""
        return Plan(stored, rows, classes)

    def _allowed(self, plan: Plan) -> Plan | None:
        return plan if self.bytes_of(plan) <= self.memory else None

    def _largest(self, of: Callable[[int], Plan | None], logits: int | None = None) -> Plan | None:
        """Of as many rows as there is memory for, by halves; logits: for so many bytes of theirs at first."""
        chunk = rows = max(self.rows, 1)
        if logits is not None:
            chunks = -(-rows // max(1, logits // (self.itemsize * self.classes)))
            chunk = -(-rows // chunks)  # as many chunks, of one size
        while (made := of(chunk)) is None and chunk > 1:
            chunk = (chunk + 1) // 2
        return made

    def _refuse(self, stored: str | None, least: Plan) -> Never:
        """stored: under what; None: no logits are."""
        what = "one logit of one row" if stored is None else f"one row of {self.classes} logits{stored}"
        words = f"memory={self.memory} is too small for {what}: that takes {self.bytes_of(least)} bytes"
        if stored is not None:
            words += f"; strategy='tiles' takes {self.bytes_of(self.uncut(False, 1, 1))}"
        raise ValueError(words)


@dataclasses.dataclass(frozen=True)
class ThreadsPlanner(Planner):
    """The same where threads share the classes. How rows are cut depends on the memory, and not on the threads."""

    threads: int = 1
    pairs: bool = False

    def for_logits(self) -> int:
        # More rows than these at a time gained nothing: W and dW then come from memory seldom enough.
        return min(BLOCK * self.itemsize * self.classes, self.memory * 7 // 8)

    def is_worth_it(self, stored: Plan) -> bool:
        fits = max(self.rows, 1) * self.itemsize * self.classes <= self.memory
        return fits or (self.width >= CHEAP and stored.rows >= FEW)

    def bytes_of(self, plan: Plan) -> int:
        size = workspace(plan, plan.stored, plan.rows, self.classes, self.width, self.copies, self.pairs)
        return self.itemsize * size

    def cut(self, stored: bool, chunk: int) -> Plan | None:
        """Of as many threads as there is memory for."""
        parts = max(1, min(self.threads, self.classes // FEW_CLASSES))
        while True:
            elements = PART if parts > 1 or self.threads == 1 else TILE
            while elements:
                block = min(chunk, BLOCK if parts > 1 else chunk, elements)
                tile = max(1, min(elements // block, -(-self.classes // parts)))
                every = -(-self.classes // (parts * tile)) * parts  # as many tiles for each thread, of one size
                made = self._allowed(Plan(stored, chunk, max(1, -(-self.classes // every)), parts, block))
                if made is not None:
                    return made
                elements = elements // 2 if parts == 1 or elements > SMALL else 0
            if parts == 1:
                return None
            parts //= 2

    def uncut(self, stored: bool, rows: int, classes: int) -> Plan:
        return Plan(stored, rows, classes, 1, rows)


@dataclasses.dataclass(frozen=True)
class DevicePlanner(Planner):
    """The same on a GPU; beside: 0 where a tile's gradient takes the place of its products."""

    def for_logits(self) -> int:
        return self.memory

    def is_worth_it(self, stored: Plan) -> bool:
        return stored.rows >= min(max(self.rows, 1), ENOUGH_ROWS)

    def cut(self, stored: bool, chunk: int) -> Plan | None:
        """Of a tile both are read again: itself, if it is small, and dX once per tile, if these are many."""
        tile = min(self.classes, max(1, CACHED // (self.itemsize * chunk), 2 * self.width))
        while True:
            made = Plan(stored, chunk, tile - tile % ROUND if ROUND < tile < self.classes else tile)
            if self._allowed(made) or tile == 1:
                return self._allowed(made)
            tile = (tile + 1) // 2
