"""The state of a training run, kept on its own devices and put back in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import multi_copy_
from .walk import Walk, form, has_state_dict, location, memory, reshard, type_name


class Snapshot:
    r"""A training run's state, saved beside it on its devices and restored in place, exact to the bit.

    ``optimizer.state_dict()`` is no snapshot, because it holds the live tensors; ``load_state_dict`` is no way back,
    because it replaces them. Here every tensor has a twin on its own device, allocated once, and both ways are one
    :func:`~mlkernels.ops.multi_copy_` per device: nothing passes through the host, every ``data_ptr`` stays, and a CUDA
    graph captured over the state stays valid. :meth:`restore` also puts back what is no tensor, and takes away
    what was not there, such as the momentum that an optimizer makes at its first step.

    Args:
        *parts: what to cover, at least one, each of these:

            * a module: parameters and buffers, also those that are not persistent, its extra state, and the attributes
              that classes other than torch's own give it. ``training`` and ``requires_grad`` are no state.
            * an optimizer: its state, its parameter groups with their options, **the parameters it steps**, its
              attributes, and what its own ``state_dict`` holds beyond that.
            * a learning rate scheduler: all its fields, not its optimizer.
            * a :class:`torch.amp.GradScaler`: all its fields.
            * anything else with ``state_dict()`` and ``load_state_dict()``. A tensor that two calls of ``state_dict()``
              hand out at the same place in memory is the live one, and is restored in place. Where there is more
              (copies, or numbers that changed) ``load_state_dict`` is given what ``state_dict()`` was.

    Attributes, states and options may hold numbers, words, tensors, NumPy arrays, random generators, modules,
    optimizers, objects with ``state_dict()`` and ``load_state_dict()``, objects with attributes, and containers of all
    these. What cannot be covered (an iterator, say) is refused by :meth:`save`.

    Memory that several of them share is kept once: tied weights, views, a model and its optimizer. Sharded parameters
    (FSDP2, any ``DTensor``) are kept by shard: each rank its own. Gradients are not covered: clear them.

    Raises:
        TypeError: a part that is none of the above.

    Example:
        >>> import torch
        >>> from mlkernels.schedule import Snapshot
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> snapshot = Snapshot(model, optimizer)
        >>> snapshot.save()
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()  # makes a momentum buffer
        >>> snapshot.restore()
        >>> model.weight.tolist(), len(optimizer.state), snapshot.nbytes
        ([[1.0, 1.0]], 0, 8)

    Source: the "save" and "restore" of MILS, algorithm 4.3.
    """

    def __init__(self, *parts: Any) -> None:
        if not parts:
            raise TypeError("parts takes at least one module, optimizer, scheduler or scaler, got none")
        for index, part in enumerate(parts):
            if not has_state_dict(part):
                raise TypeError(
                    f"parts[{index}] takes an object with state_dict and load_state_dict, got {type_name(part)}"
                )
        self._parts = parts
        self._record: Walk | None = None
        self._twins: dict[str, Tensor] = {}
        # Where the twins are copied to.
        self._targets: list[Tensor] = []
        # By identity: live tensors, each with another one of the same memory and its bytes: whatever `.data =` or
        # resize_ do, the way back.
        self._anchors: dict[int, tuple[Tensor, Tensor, int]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are of the parts: what was saved is of these tensors here."""
        return type(self), self._parts

    @property
    def nbytes(self) -> int:
        """Bytes of the twins, those of the parts' tensors, shared memory once. 0 before the first :meth:`save`."""
        copies = [] if self._record is None else self._record.copies()
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self._twins.values(), *copies))

    def save(self) -> None:
        """Takes the state as it is now; the one taken before is overwritten.

        Raises:
            TypeError: something that cannot be covered, by name: a tensor without memory of its own to copy (sparse, or
                a lazy module's before its first forward), an object that keeps its state where it cannot be seen (an
                iterator, say). What was saved before is still there then.
        """
        record = Walk(self._parts)
        # As a rule nothing has moved since the last time.
        unmoved = self._record is not None and self._record.locations == record.locations
        anchors: dict[int, tuple[Tensor, Tensor, int]] = {}
        for tensor in record.tensors.values():
            key = id(tensor)
            if key not in anchors:
                known = self._anchors.get(key) if unmoved else None
                if known is None or known[0] is not tensor or known[1].data_ptr() != tensor.data_ptr():
                    known = tensor, tensor.detach(), tensor.untyped_storage().nbytes()
                anchors[key] = known
        twins, sources = {}, []
        for name in self._twins if unmoved else record.distinct():
            source = memory(anchors[id(record.tensors[name])][1])
            twin = self._twins.get(name)
            if twin is None or form(twin) != form(source):
                twin = torch.empty_like(source)
            twins[name] = twin
            sources.append(source)
        _copy(twins.values(), sources)
        self._record, self._twins, self._targets, self._anchors = record, twins, sources, anchors

    def restore(self) -> None:
        """Puts everything back to what :meth:`save` took; may be called again.

        What exists only since then goes: optimizer state, parameter groups, a scaler's scale. A tensor that was
        replaced by another comes back itself; one that was given other memory (``parameter.data = ...``) or another
        size, in its old memory and size.

        Raises:
            RuntimeError: nothing was saved; or a part's own ``load_state_dict`` failed: the message names it, and
                everything else has been restored then.
        """
        record = self._saved()
        reshard(self._parts)
        self._in_place(record)
        failed: tuple[str, Exception] | None = None
        loaded = False
        for foreign in record.foreign:
            try:
                if foreign.changed():
                    loaded = True
                    foreign.load(foreign.rebuild())
            except Exception as error:  # noqa: PERF203 - the others are to be restored
                failed = failed or (foreign.name, error)
        if loaded:  # an optimizer's replaces the tensors that have just been restored
            self._in_place(record)
        # An enclosing autocast keeps casts of weights, which it cannot know to be stale.
        torch.clear_autocast_cache()
        if failed is not None:
            raise RuntimeError(f"{failed[0]} could not be restored; everything else was") from failed[1]

    def restore_if(self, reject: Tensor) -> None:
        """Puts every tensor back if ``reject`` is true, without the host knowing whether it is.

        It covers what existed at :meth:`save`, and tensors only. Because the host does not know, it can neither take
        away what is new nor put back a number of its own (a learning rate, a scheduler's epoch): if there is such a
        change it raises, whatever ``reject`` holds, and :meth:`restore` is the call to use. So save after the
        optimizer's first step, and let the schedulers step afterwards.

        Args:
            reject: one boolean. On a GPU nothing waits for it, unless a part keeps tensors on the CPU, as an optimizer
                that is neither ``fused`` nor ``capturable`` does with its step counters: those cost one read.

        Raises:
            TypeError: ``reject`` is no tensor. ValueError: it is not one boolean.
            RuntimeError: nothing was saved; or state is new, gone, replaced or changed on the host since: the
                message names it. Nothing has been restored then.
        """
        if not isinstance(reject, Tensor):
            raise TypeError(f"reject takes a boolean tensor, got {type_name(reject)}")
        if reject.dtype != torch.bool or reject.numel() != 1:
            raise ValueError(f"reject must be one boolean, got {reject.dtype} of shape {tuple(reject.shape)}")
        record = self._saved()
        difference = record.difference(Walk(self._parts)) or self._moved(record)
        if difference:
            raise RuntimeError(f"restore_if puts back tensors that existed at save(), but {difference}; use restore()")
        _copy([memory(record.tensors[name]) for name in self._twins], self._twins.values(), reject)
        torch.clear_autocast_cache()

    def _saved(self) -> Walk:
        if self._record is None:
            raise RuntimeError("nothing to restore: save() has not been called")
        return self._record

    def _in_place(self, record: Walk) -> None:
        """Everything but what ``load_state_dict`` is for: every tensor where it was, as large, and as it was."""
        record.put_back()
        for live, anchor, nbytes in self._anchors.values():
            if anchor.untyped_storage().nbytes() < nbytes:
                anchor.untyped_storage().resize_(nbytes)
            if live.data_ptr() != anchor.data_ptr() or live.stride() != anchor.stride() or form(live) != form(anchor):
                live.data = anchor
        _copy(self._targets, self._twins.values())

    def _moved(self, record: Walk) -> str | None:
        """What keeps a flag from deciding about a tensor that is elsewhere now: another one shared its memory."""
        covered = {id(record.tensors[name]) for name in self._twins}
        shared = any(id(tensor) not in covered and tensor.numel() for tensor in record.tensors.values())
        for name, before in record.locations.items():
            now = location(record.tensors[name])
            if now != before and (shared or now[2] != before[2]):
                return f"{name} has other memory since"
        return None


def _copy(targets: Any, sources: Any, flag: Tensor | None = None) -> None:
    """One multi_copy_ per device."""
    pairs: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        to, other = pairs.setdefault(target.device, ([], []))
        to.append(target)
        other.append(source)
    with torch.no_grad():
        for device, (to, other) in pairs.items():
            here = flag if flag is None or flag.is_cpu else flag.to(device, non_blocking=device.type != "cpu")
            multi_copy_(to, other, here)
