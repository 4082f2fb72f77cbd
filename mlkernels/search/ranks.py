"""Candidates over the ranks of torch.distributed: who trains which, and the winner's state for everyone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops import multi_copy_
from .state import held, put, without

T = TypeVar("T")

# Bytes that travel together. Large enough for the bandwidth of any link, small beside a model.
_BUCKET = 64 << 20


class _Shape(NamedTuple):
    """A tensor of an optimizer's state, where its values travel apart."""

    shape: torch.Size
    dtype: torch.dtype
    device: str


class Ranks:
    """A process group, or None for this process alone."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank, self.size = 0, 1
        if group is not None:
            if not (dist.is_available() and dist.is_initialized()):
                raise ValueError("process_group needs torch.distributed.init_process_group first")
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise ValueError("process_group must hold this process, got a group of others")

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self._group, group_src=0)
        return values[0]

    def collect(self, work: Callable[[], T]) -> list[T]:
        """What the work of each rank returned, in their order. If one fails, all raise: none is left waiting."""
        if self.size == 1:
            return [work()]
        found: T | None = None
        failure: Exception | None = None
        try:
            found = work()
        except Exception as error:
            failure = error
        outcomes: list[Any] = [None] * self.size
        said = failure and f"{type(failure).__name__}: {failure}"
        dist.all_gather_object(outcomes, (found, said), group=self._group)
        if failure is not None:
            raise failure
        for rank, (_, said) in enumerate(outcomes):
            if said is not None:
                raise RuntimeError(f"rank {rank} failed: {said}")
        return [found for found, _ in outcomes]

    def broadcast_state(self, parts: Sequence[Any], source: int) -> None:
        """The state of one rank's parts for all: tensors in place, coalesced; to the bit."""
        if self.size == 1:
            return
        here = self.rank == source
        layouts = [[_layout(part) for part in parts] if here else None]
        dist.broadcast_object_list(layouts, group=self._group, group_src=source)
        assert layouts[0] is not None
        if not here:
            for part, layout in zip(parts, layouts[0], strict=True):
                _make_room(part, layout)
        tensors = [tensor for part in parts for tensor in _tensors(part)]
        # A group has one device per backend; the model's is the one that it was made for.
        device = tensors[0].device if tensors else torch.device("cpu")
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).to(device)
            # As bytes: not every backend knows every dtype.
            dist.broadcast(flat.view(torch.uint8), group=self._group, group_src=source)
            if not here:
                received = flat.to(bucket[0].device).split([tensor.numel() for tensor in bucket])
                multi_copy_(bucket, [one.view(to.shape) for one, to in zip(received, bucket, strict=True)])


def _tensors(part: Any) -> list[Tensor]:
    """What is sent as it lies in memory, in the same order on every rank."""
    if isinstance(part, nn.Module):
        return [tensor.detach() for tensor in (*part.parameters(), *part.buffers())]
    if isinstance(part, torch.optim.Optimizer):
        states = (part.state.get(parameter, {}) for parameter in held(part))
        return [state[key] for state in states for key in sorted(state) if isinstance(state[key], Tensor)]
    return []


def _layout(part: Any) -> Any:
    if isinstance(part, nn.Module):
        return None
    if isinstance(part, torch.optim.Optimizer):
        groups = [without(group, ("params",)) for group in part.param_groups]
        states = map(part.state.get, held(part))
        return groups, [None if state is None else {k: _shape(v) for k, v in state.items()} for state in states]
    return part.state_dict()


def _shape(value: Any) -> Any:
    return _Shape(value.shape, value.dtype, value.device.type) if isinstance(value, Tensor) else value


def _make_room(part: Any, layout: Any) -> None:
    """Everything of another rank's part that is no tensor, and places for its tensors."""
    if isinstance(part, nn.Module):
        return
    if not isinstance(part, torch.optim.Optimizer):
        part.load_state_dict(layout)
        return
    groups, states = layout
    for group, options in zip(part.param_groups, groups, strict=True):
        put(group, options, keep=("params",))
    for parameter, state in zip(held(part), states, strict=True):
        live = part.state.pop(parameter, {})
        if state is not None:
            part.state[parameter] = {k: _room(v, live.get(k), parameter.device) for k, v in state.items()}


def _room(value: Any, there: Any, device: torch.device) -> Any:
    """A place for a tensor of that shape, the one that is there if it has it; anything else as it is."""
    if not isinstance(value, _Shape):
        return value
    if _shape(there) == value:
        return there
    # A counter may live on the host whatever the parameter's device is.
    return torch.empty(value.shape, dtype=value.dtype, device="cpu" if value.device == "cpu" else device)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype and device that travel together."""
    buckets: dict[tuple[torch.dtype, torch.device, int], list[Tensor]] = {}
    sent: Counter[tuple[torch.dtype, torch.device]] = Counter()
    for tensor in tensors:
        kind = tensor.dtype, tensor.device
        buckets.setdefault((*kind, sent[kind] // _BUCKET), []).append(tensor)
        sent[kind] += tensor.nbytes
    return list(buckets.values())
