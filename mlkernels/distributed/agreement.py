"""What must be alike on all ranks, in words, so that one that differs can be named."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..numbering import (
    EXTRAS,
    IGNORE_INDEX,
    KINDS,
    MASK,
    NONE_AT_0,
    Slot,
    consts_of,
    structure_of,
)


@lru_cache(maxsize=1024)
def _words(numbers: tuple[float, ...]) -> tuple[dict[str, Any], dict[int, str]]:
    """The structure and the numbers of a loss by name, and the name of each slot."""
    names = {int(value.slot): value.name for value in structure_of(numbers).values}
    names |= {int(slot): name for slot, (name, _) in EXTRAS.items()}
    said: dict[str, Any] = {word: kind(int(numbers[at])).name.lower() for at, (kind, word) in KINDS.items()}
    said["ignore_index"] = int(numbers[IGNORE_INDEX])
    consts = consts_of(numbers)
    for slot, name in names.items():
        if not int(numbers[MASK]) >> slot & 1:
            absent = slot >= Slot.WEIGHT or (slot in NONE_AT_0 and not consts[slot])
            said[name] = None if absent else consts[slot]
    return said, names


def of_loss(numbers: Sequence[float], params: Mapping[int, Tensor], per_row: frozenset[int]) -> dict[str, Any]:
    """A loss by name: its structure, its numbers, its tensors, and which of these have a row each."""
    said, names = _words(tuple(numbers))
    tensors = {names[slot]: "one per row" if slot in per_row else tensor for slot, tensor in params.items()}
    return said | tensors


def of_module(loss: object) -> dict[str, Any]:
    """What is to be seen of a loss before it is called: its class and options, parameters and buffers."""
    if not isinstance(loss, nn.Module):
        return {"loss": getattr(loss, "__qualname__", type(loss).__name__)}
    tensors = {f"loss.{name}": tensor for name, tensor in loss.state_dict().items() if isinstance(tensor, Tensor)}
    return {"loss": repr(loss), **tensors}


_sums: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
#: From so many elements on a tensor that has not changed is not read again.
_LARGE = 4096


def checksum(tensor: Tensor) -> tuple[object, ...]:
    """Equal where two tensors are to the bit."""
    large = tensor.numel() > _LARGE and not tensor.is_inference()
    known = _sums.get(tensor) if large else None
    if known is not None and known[0] == tensor._version:
        return known[1]  # type: ignore[no-any-return]
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    found = (str(tensor.dtype), tuple(tensor.shape), zlib.crc32(data.data))
    if large:
        _sums[tensor] = (tensor._version, found)
    return found


def code(signature: Mapping[str, Any]) -> int:
    """The same where everything is."""
    sums = {name: checksum(value) if isinstance(value, Tensor) else value for name, value in signature.items()}
    return zlib.crc32(repr(sums).encode())


def difference(said: Sequence[Mapping[str, Any]]) -> str:
    """The first thing that ranks do not have alike, by what each of them has said."""
    for name in dict.fromkeys(name for each in said for name in each):
        values = [each.get(name) for each in said]
        for rank, value in enumerate(values):
            place, mine, other = _apart(values[0], value)
            if mine != other:
                return f"{name}{place} must be the same on all ranks: rank 0 has {mine}, rank {rank} {other}"
    raise AssertionError("signatures differ in nothing")


def _apart(first: Any, other: Any) -> tuple[str, Any, Any]:
    """Where two values differ, and what they are there."""
    if not (isinstance(first, Tensor) and isinstance(other, Tensor)):
        mine, its = (f"a tensor {tuple(v.shape)}" if isinstance(v, Tensor) else v for v in (first, other))
        return "", mine, its
    if checksum(first) == checksum(other):
        return "", "", ""
    if first.dtype != other.dtype:
        return ".dtype", first.dtype, other.dtype
    if first.shape != other.shape:
        return ".shape", tuple(first.shape), tuple(other.shape)
    # Bits, because a NaN is no difference to itself.
    bits = [t.detach().reshape(-1).view(torch.uint8).view(t.numel(), -1) for t in (first, other)]
    at = int((bits[0] != bits[1]).any(1).nonzero()[0])
    place = "" if first.dim() == 0 else str(list(map(int, torch.unravel_index(torch.tensor(at), first.shape))))
    return place, first.flatten()[at].item(), other.flatten()[at].item()
