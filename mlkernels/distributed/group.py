"""What ranks say to each other in a class-parallel loss, and how much that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import reference
from ..backends.reference import Rows
from ..tracing import traced
from . import agreement

#: torch 2.13 has a new name for it, and warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
#: What an error of one rank is on the others.
_ERRORS = (IndexError, TypeError, ValueError, OSError, RuntimeError)


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

    @contextmanager
    def _sending(self, what: str, sent: int) -> Iterator[None]:
        """A collective, counted; where another rank is gone or late, it is said in which."""
        self._collectives[what] += 1
        self._bytes[what] += sent
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} got no answer from another rank as they exchanged {what}, and no "
                f"gradient of this call has been written: {error}"
            ) from error

    def gathered(self, tensor: Tensor, what: str) -> Tensor:
        """(n, ...) of each rank, alike in shape, to (ranks, n, ...)."""
        tensor = tensor.detach().contiguous()
        found = tensor.new_empty((self.size, *tensor.shape))
        # Bytes, because not every backend moves every dtype.
        if tensor.numel():
            with self._sending(what, tensor.nbytes * (self.size - 1)):
                _all_gather(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8), self.process_group)
        return found

    def exchanged(self, parts: Tensor, what: str) -> Tensor:
        """What this rank has for each (ranks, n, ...) to what each has for this one, in the order of ranks."""
        parts = parts.contiguous()
        found = torch.empty_like(parts)
        if parts.numel():
            with self._sending(what, parts.nbytes // self.size * (self.size - 1)):
                dist.all_to_all_single(
                    found.view(-1).view(torch.uint8), parts.view(-1).view(torch.uint8), group=self.process_group
                )
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

    def meet(
        self, signature: Mapping[str, Any], counts: tuple[int, int] = (0, 0), error: Exception | None = None
    ) -> list[list[int]]:
        """Two numbers of each rank, if all came with the same call and nobody with an error.

        Raises:
            IndexError, TypeError, ValueError, OSError, RuntimeError: what another rank's argument was refused for.
            ValueError: what differs between the ranks.
        """
        code = agreement.code(signature)
        device = None if dist.get_backend(self.process_group) != "nccl" else torch.device("cuda")
        mine = torch.tensor([*counts, code, int(error is not None)], device=device)
        found = self.gathered(mine, "sizes").tolist()
        if all(each[-2] == code and not each[-1] for each in found):
            return [each[:-2] for each in found]
        said: list[Any] = [None] * self.size
        own: Any = {n: v.detach().cpu() if isinstance(v, Tensor) else v for n, v in signature.items()}
        if error is not None:
            own = (next((at for at, kind in enumerate(_ERRORS) if isinstance(error, kind)), -1), str(error))
        dist.all_gather_object(said, own, self.process_group)
        if error is not None:
            raise error
        for rank, each in enumerate(found):
            if each[-1]:
                kind, message = said[rank]
                raise _ERRORS[kind](f"rank {rank}: {message}")
        raise ValueError(agreement.difference(said))

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What is raised here is raised on all ranks, which come to a meeting after this."""
        try:
            yield
        except Exception as error:
            self.meet({}, error=error)
            raise

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
        pieces = []
        for packed in every:
            at, own = 1, {name: getattr(rows, name) for name in left_out}
            for name, value in fields:
                count = value.numel() // f_y.shape[0] * value.element_size() // f_y.element_size()
                own[name] = packed[at : at + count].reshape(-1).view(value.dtype).reshape(value.shape)
                at += count
            pieces.append(Rows(**{name: own.get(name) for name in Rows._fields}))  # type: ignore[arg-type]
        return reduce(lambda total, piece: reference.combine(total, piece, scales), pieces), every[:, 0].sum(0)


def check_untraced(what: str, *tensors: Any) -> None:
    """Whether there are numbers to exchange: where there are none, there are none on all ranks."""
    if not torch.compiler.is_compiling() and traced(*(t for t in tensors if isinstance(t, Tensor))):
        raise RuntimeError(
            f"{what} no torch.func transforms, no fake tensors and no make_fx: ranks exchange numbers, of which there "
            "are none then"
        )


_groups: WeakKeyDictionary[dist.ProcessGroup, Group] = WeakKeyDictionary()


def group_of(process_group: dist.ProcessGroup | None) -> Group:
    """The group of functions, which have none of their own."""
    at = process_group if process_group is not None else dist.group.WORLD
    if at not in _groups:
        _groups[at] = Group(process_group)  # type: ignore[index]
    return _groups[at]  # type: ignore[index]


def communication(process_group: dist.ProcessGroup | None = None) -> Traffic:
    """How many collectives this rank has taken part in for losses on logits of which each rank has a part, and how many
    bytes it has sent, by what for, since the last time that this was asked."""
    return group_of(process_group).traffic()


def offsets(classes: int, ranks: int) -> list[int]:
    """Where each rank's classes begin, and where the last one's end: as torch.chunk cuts them."""
    size = -(-classes // ranks)
    return [min(rank * size, classes) for rank in range(ranks + 1)]


def padded(tensor: Tensor, rows: int, fill: float | int) -> Tensor:
    """(n, ...) to (rows, ...)."""
    if tensor.shape[0] == rows:
        return tensor
    return torch.cat([tensor, tensor.new_full((rows - tensor.shape[0], *tensor.shape[1:]), fill)])
