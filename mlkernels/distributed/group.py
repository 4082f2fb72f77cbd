"""What ranks say to each other in a class-parallel loss, and how much that is."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import reference
from ..backends.reference import Rows

#: torch 2.13 has a new name for it, and warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_ERRORS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (IndexError, TypeError, ValueError)}


class Traffic(NamedTuple):
    """What one rank has sent."""

    collectives: dict[str, int]
    bytes: dict[str, int]


class Group:
    """The ranks that share the classes, in the order of their shards."""

    def __init__(self, process_group: dist.ProcessGroup | None):
        self.process_group = process_group if process_group is not None else dist.group.WORLD
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self._collectives: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    def __deepcopy__(self, memo: object) -> Group:
        return Group(self.process_group)  # ranks are not copied

    def traffic(self) -> Traffic:
        """What this rank has sent since the last time that it was asked, by what for."""
        found = Traffic(dict(self._collectives), dict(self._bytes))
        self._collectives.clear()
        self._bytes.clear()
        return found

    def _count(self, what: str, sent: int) -> None:
        self._collectives[what] += 1
        self._bytes[what] += sent

    def gathered(self, tensor: Tensor, what: str) -> Tensor:
        """(n, ...) of each rank, alike in shape, to (ranks, n, ...)."""
        tensor = tensor.detach().contiguous()
        found = tensor.new_empty((self.size, *tensor.shape))
        # Bytes, because not every backend moves every dtype.
        if tensor.numel():
            _all_gather(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8), self.process_group)
        self._count(what, tensor.nbytes * (self.size - 1))
        return found

    def exchanged(self, parts: Tensor, what: str) -> Tensor:
        """What this rank has for each (ranks, n, ...) to what each has for this one, in the order of ranks."""
        parts = parts.contiguous()
        found = torch.empty_like(parts)
        if parts.numel():
            dist.all_to_all_single(
                found.view(-1).view(torch.uint8), parts.view(-1).view(torch.uint8), group=self.process_group
            )
        self._count(what, parts.nbytes // self.size * (self.size - 1))
        return found

    def home(self, partial: Tensor) -> Tensor:
        """Each rank's part (ranks, n, ...) of all rows to the sum (n, ...) of this rank's, in the order of ranks."""
        first: Tensor
        first, *others = self.exchanged(partial, "gradients")
        for other in others:
            first = first + other
        return first

    def mean(self, value: Tensor) -> Tensor:
        """Of a 0-d tensor of each rank."""
        mean: Tensor = self.gathered(value.reshape(1), "upstream").sum(0).squeeze(0) / self.size
        return mean

    def meet(self, rows: int, signature: Any, error: Exception | None = None) -> list[int]:
        """How many rows each rank has, if all came with the same call and nobody with an error.

        Raises:
            IndexError, TypeError, ValueError, RuntimeError: what another rank's argument was refused for.
            ValueError: what differs between the ranks.
        """
        code = zlib.crc32(repr(signature).encode())
        device = None if dist.get_backend(self.process_group) != "nccl" else torch.device("cuda")
        mine = torch.tensor([rows, code, int(error is not None)], device=device)
        all_rows, codes, failed = self.gathered(mine, "sizes").T.tolist()
        if error is None and not any(failed) and codes == [code] * self.size:
            return [int(n) for n in all_rows]
        said: list[Any] = [None] * self.size
        own = (type(error).__name__, str(error)) if error is not None else signature
        dist.all_gather_object(said, own, self.process_group)
        if any(failed):
            if error is not None:
                raise error
            rank = failed.index(1)
            kind, message = said[rank]
            raise _ERRORS.get(kind, RuntimeError)(f"rank {rank}: {message}")
        for name in signature:
            values = [each.get(name) for each in said]
            if any(value != values[0] for value in values):
                other = next(rank for rank, value in enumerate(values) if value != values[0])
                raise ValueError(
                    f"{name} must be the same on all ranks: rank 0 has {values[0]}, rank {other} {values[other]}"
                )
        raise AssertionError("signatures differ in nothing")

    def combined(self, rows: Rows, f_y: Tensor, scales: Tensor, left_out: Collection[str]) -> tuple[Rows, Tensor]:
        """What all shards know together, the same on every rank to the bit.

        Args:
            f_y: of the targets that this rank has, else 0. left_out: what nobody will ask for.
        """
        fields = [(n, value) for n, value in rows._asdict().items() if value is not None and n not in left_out]
        reals = [value.reshape(-1, f_y.shape[0]) for _, value in fields if value.is_floating_point()]
        # Counts and classes travel as the bits that they are.
        bits = [value.contiguous().view(f_y.dtype) for _, value in fields if not value.is_floating_point()]
        whole = [value.reshape(-1, f_y.shape[0]) for value in bits]
        every = self.gathered(torch.cat([f_y.unsqueeze(0), *reals, *whole]), "statistics")
        total: Rows | None = None
        target = torch.zeros_like(f_y)
        for packed in every:
            target = target + packed[0]
            at, own = 1, {name: getattr(rows, name) for name in left_out}
            for name, value in fields:
                count = value.numel() // f_y.shape[0] * value.element_size() // f_y.element_size()
                own[name] = packed[at : at + count].reshape(-1).view(value.dtype).reshape(value.shape)
                at += count
            piece = Rows(**{name: own.get(name) for name in Rows._fields})  # type: ignore[arg-type]
            total = piece if total is None else reference.combine(total, piece, scales)
        assert total is not None
        return total, target


def offsets(classes: int, ranks: int) -> list[int]:
    """Where each rank's classes begin, and where the last one's end: as torch.chunk cuts them."""
    size = -(-classes // ranks)
    return [min(rank * size, classes) for rank in range(ranks + 1)]


def padded(tensor: Tensor, rows: int, fill: float | int) -> Tensor:
    """(n, ...) to (rows, ...)."""
    if tensor.shape[0] == rows:
        return tensor
    return torch.cat([tensor, tensor.new_full((rows - tensor.shape[0], *tensor.shape[1:]), fill)])


def slices(sizes: Sequence[int], rank: int) -> slice:
    """A rank's rows among those of all ranks, padded to the most."""
    most = max(sizes)
    return slice(rank * most, rank * most + sizes[rank])
