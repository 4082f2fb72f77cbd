"""The state of a training run, kept on its own devices and put back in place."""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ops import multi_copy_

__all__ = ["Snapshot"]


class Snapshot:
    r"""A training run's state, saved beside it on its devices and restored in place, exact to the bit.

    ``optimizer.state_dict()`` is no snapshot, because it holds the live tensors; ``load_state_dict`` is no way back,
    because it replaces them. Here every tensor has a twin on its own device, allocated once, and both ways are one
    :func:`~mlkernels.ops.multi_copy_` per device: nothing passes through the host, every ``data_ptr`` stays, and a CUDA
    graph captured over the state stays valid. :meth:`restore` also puts back what is no tensor, and takes away
    what was not there, such as the momentum that an optimizer makes at its first step.

    Args:
        *parts: what to cover, at least one, each of these:

            * a module: parameters and buffers, also those that are not persistent, and its extra state. ``training``
              and ``requires_grad`` are no state.
            * an optimizer: its state, its parameter groups with their options, **and the parameters it steps**.
            * a learning rate scheduler: all its fields, not its optimizer.
            * a :class:`torch.amp.GradScaler`: all its fields.
            * anything else with ``state_dict()`` and ``load_state_dict()``. A tensor that two calls of ``state_dict()``
              hand out at the same place in memory is the live one, and is restored in place. Where there is more
              (copies, or numbers that changed) ``load_state_dict`` is given what ``state_dict()`` was.

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
            both = callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None))
            if isinstance(part, type) or not both:
                raise TypeError(
                    f"parts[{index}] takes an object with state_dict and load_state_dict, got {_type(part)}"
                )
        self._parts = parts
        self._record: _Record | None = None
        self._twins: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the twins: what the parts' tensors hold, shared memory once. 0 before the first :meth:`save`."""
        copies = [] if self._record is None else self._record.copies()
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self._twins.values(), *copies))

    def save(self) -> None:
        """Takes the state as it is now; the one taken before is overwritten.

        Raises:
            TypeError: a tensor without memory of its own to copy (sparse, or a lazy module's before its first forward).
                What was saved before is still there then.
        """
        record = _Record(self._parts)
        twins = {}
        # As a rule nothing has moved since the last time.
        unmoved = self._record is not None and self._record.places == record.places
        for name in self._twins if unmoved else record.distinct():
            source = _memory(record.tensors[name])
            twin = self._twins.get(name)
            if twin is None or _form(twin) != _form(source):
                twin = torch.empty_like(source, requires_grad=False)
            twins[name] = twin
        _copy(twins.values(), [_memory(record.tensors[name]) for name in twins])
        self._record, self._twins = record, twins

    def restore(self) -> None:
        """Puts everything back to what :meth:`save` took; may be called again.

        What exists only since then goes: optimizer state, parameter groups, a scaler's scale. A tensor that was
        replaced by another comes back itself.

        Raises:
            RuntimeError: nothing was saved. ValueError: a tensor changed its shape, dtype or device since; nothing has
                been restored then.
        """
        record = self._saved()
        _reshard(self._parts)
        targets = self._targets(record)
        for owner, name, value in record.attributes:
            if getattr(owner, name) is not value:
                setattr(owner, name, value)
        for container, content in record.containers:
            _put_back(container, content)
        _copy(targets, self._twins.values())
        for foreign in record.foreign:
            if foreign.changed():
                foreign.load(foreign.rebuild())
        # An enclosing autocast keeps casts of weights, which it cannot know to be stale.
        torch.clear_autocast_cache()

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
            RuntimeError: nothing was saved; or state was born, went, was replaced or changed on the host since: the
                message names it. Nothing has been restored then.
        """
        if not isinstance(reject, Tensor):
            raise TypeError(f"reject takes a boolean tensor, got {_type(reject)}")
        if reject.dtype != torch.bool or reject.numel() != 1:
            raise ValueError(f"reject must be one boolean, got {reject.dtype} of shape {tuple(reject.shape)}")
        record = self._saved()
        difference = record.difference(_Record(self._parts))
        if difference:
            raise RuntimeError(f"restore_if puts back tensors that existed at save(), but {difference}; use restore()")
        _copy(self._targets(record), self._twins.values(), reject)
        torch.clear_autocast_cache()

    def _saved(self) -> _Record:
        if self._record is None:
            raise RuntimeError("nothing to restore: save() has not been called")
        return self._record

    def _targets(self, record: _Record) -> list[Tensor]:
        """The live tensors, one per twin, after a look at whether all can be written."""
        for name, (address, _, form) in record.places.items():
            live = record.tensors[name]
            if _form(live) != form:
                raise ValueError(f"{name} was {_shown(form)} at save() and is {_shown(_form(live))} now")
            if live.data_ptr() != address and name not in self._twins and live.numel():
                raise ValueError(f"{name} shared its memory at save() and has its own now")
        return [_memory(record.tensors[name]) for name in self._twins]


Form = tuple[torch.Size, torch.dtype, torch.device]


class _Record:
    """What a walk over the parts found: live tensors and values by name, and the containers that hold them."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, object] = {}
        self.containers: list[tuple[Any, Any]] = []
        self.attributes: list[tuple[object, str, object]] = []
        self.foreign: list[_Foreign] = []
        self._visited: dict[int, object] = {}  # the object beside its id: an id alone may be used again
        self._live: set[str] = set()  # of the foreign leaves, those that are restored in place
        self._numbers: dict[int, int] = {}  # of parameters, in the order of their optimizer
        _reshard(parts)
        for index, part in enumerate(parts):
            self._part(f"parts[{index}] ({_type(part)})", part)
        self.places = {name: _place(tensor) for name, tensor in self.tensors.items()}

    def _part(self, name: str, part: Any) -> None:
        if not self._first_visit(part):
            return
        if isinstance(part, nn.Module):
            self._module(name, part)
        elif isinstance(part, Optimizer):
            self._optimizer(name, part)
        elif isinstance(part, (LRScheduler, torch.amp.GradScaler)):
            self._add(name, vars(part))
        else:
            self._foreign(name, part.state_dict, part.load_state_dict)

    def _module(self, name: str, module: nn.Module) -> None:
        for path, child in module.named_modules():
            prefix = f"{name} {path}".rstrip()
            for store in (child._parameters, child._buffers):
                # A scripted module has a wrapper around both instead.
                self._add(prefix, store if isinstance(store, dict) else dict(store.items()))
            if type(child).get_extra_state is not nn.Module.get_extra_state:
                self._foreign(f"{prefix}.extra_state", child.get_extra_state, child.set_extra_state)

    def _optimizer(self, name: str, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._numbers.setdefault(id(parameter), len(self._numbers))
        for field in ("param_groups", "state"):
            value = getattr(optimizer, field)
            self.attributes.append((optimizer, field, value))
            self._add(f"{name} {field}", value)
        # Optimizers that are wrapped by others: ZeroRedundancyOptimizer's, and those of sharpness-aware ones.
        for field, value in vars(optimizer).items():
            if isinstance(value, Optimizer):
                self._part(f"{name}.{field}", value)

    def _foreign(self, name: str, get: Callable[[], Any], load: Callable[[Any], Any]) -> None:
        tree, leaves = _flat(name, get())
        self.foreign.append(_Foreign(name, get, load, tree, leaves))
        _, again = _flat(name, get())
        for path, leaf in leaves.items():
            other = again.get(path)
            if isinstance(leaf, Tensor) and isinstance(other, Tensor) and _place(leaf) == _place(other):
                self._live.add(path)
                self._add(path, leaf)

    def _first_visit(self, value: object) -> bool:
        if id(value) in self._visited:
            return False
        self._visited[id(value)] = value
        return True

    def _add(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self._tensor(name, value)
        elif isinstance(value, dict):
            if self._first_visit(value):
                self.containers.append((value, list(value.items())))
                for key, item in list(value.items()):
                    self._add(self._child(name, key), item)
        elif isinstance(value, (list, deque, set)):
            if self._first_visit(value):
                self.containers.append((value, list(value)))
                for index, item in enumerate(value):
                    self._add(f"{name}[{index}]", item)
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                self._add(f"{name}[{index}]", item)
        elif isinstance(value, LRScheduler):
            self._part(name, value)
        elif callable(value) and _has_state_of_its_own(value):  # a LambdaLR's rule, which its state_dict holds too
            self._add(name, vars(value))
        else:
            self.values[name] = value

    def _tensor(self, name: str, tensor: Tensor) -> None:
        if is_lazy(tensor):
            raise TypeError(f"{name} is not initialized: run the lazy module forward once before save()")
        if is_traceable_wrapper_subclass(tensor):  # a DTensor's local shard
            inner, _ = tensor.__tensor_flatten__()
            for field in inner:
                self._add(f"{name}.{field}", getattr(tensor, field))
        elif tensor.layout != torch.strided:
            raise TypeError(f"{name} takes a dense tensor, got {tensor.layout}")
        else:
            self.tensors[name] = tensor

    def _child(self, name: str, key: object) -> str:
        if isinstance(key, str):
            return f"{name}.{key}"
        return f"{name}[{self._numbers.get(id(key), '?') if isinstance(key, Tensor) else key}]"

    def distinct(self) -> list[str]:
        """Names of tensors that together cover all the memory: tied weights once, a view inside another not at all."""
        spans: list[tuple[str, int, int, bool, str]] = []
        unique: dict[object, str] = {}
        for name, tensor in self.tensors.items():
            tensor = _memory(tensor)
            # On the meta device everything is at address 0.
            place = tensor.untyped_storage()._cdata if tensor.is_meta else tensor.data_ptr()
            key = (place, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            if tensor.numel() == 0 or unique.setdefault(key, name) != name:
                continue
            size = tensor.element_size()
            reach = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append((str(tensor.device), place, -reach * size, reach == tensor.numel(), name))
        spans.sort(key=lambda span: (span[0], span[1], span[2], not span[3]))
        kept, covered_on, covered_to = set(), "", 0
        for device, start, negative, dense, name in spans:
            end = start - negative
            if device == covered_on and end <= covered_to and device != "meta":
                continue
            kept.add(name)
            if dense:
                covered_on, covered_to = device, end
        return [name for name in self.tensors if name in kept]

    def copies(self) -> list[Tensor]:
        """Tensors that a state_dict() made: kept as they are, without a twin."""
        leaves = [leaf for foreign in self.foreign for leaf in foreign.leaves.items()]
        return [leaf for name, leaf in leaves if isinstance(leaf, Tensor) and name not in self._live]

    def difference(self, now: _Record) -> str | None:
        """What keeps a device flag from deciding between this state and a later one, in words."""
        for name, tensor in now.tensors.items():
            if name not in self.tensors:
                return f"{name} was born since"
            if tensor is not self.tensors[name] and _place(tensor) != _place(self.tensors[name]):
                return f"{name} was replaced since"
        for name in self.tensors:
            if name not in now.tensors:
                return f"{name} went since"
        for name, value in now.values.items():
            if name not in self.values:
                return f"{name} was born since"
            if not _equal(value, self.values[name]):
                return f"{name} changed on the host since, from {self.values[name]!r} to {value!r}"
        for name in self.values:
            if name not in now.values:
                return f"{name} went since"
        for foreign in self.foreign:
            if foreign.changed():
                return f"{foreign.name} changed since, or its state_dict() holds copies"
        return None


class _Foreign(NamedTuple):
    """An object known by its state_dict alone."""

    name: str
    get: Callable[[], Any]
    load: Callable[[Any], Any]
    tree: Any
    leaves: dict[str, object]

    def changed(self) -> bool:
        """Whether it is not yet what it was, after its live tensors were restored in place."""
        _, now = _flat(self.name, self.get())
        if now.keys() != self.leaves.keys():
            return True
        for name, leaf in self.leaves.items():
            other = now[name]
            if isinstance(leaf, Tensor) and isinstance(other, Tensor):
                if _place(leaf) != _place(other):
                    return True
            elif not _equal(leaf, other):
                return True
        return False

    def rebuild(self) -> Any:
        """What state_dict() returned at save(), the live tensors among it being restored; the receiver may keep it."""
        return _map(
            lambda _, value: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value), "", self.tree
        )


def _flat(name: str, tree: Any) -> tuple[Any, dict[str, object]]:
    """A copy of a tree's containers, and its leaves by name."""
    leaves: dict[str, object] = {}

    def leaf(name: str, value: object) -> object:
        leaves[name] = value if isinstance(value, Tensor) else copy.deepcopy(value)
        return leaves[name]

    return _map(leaf, name, tree), leaves


def _map(leaf: Callable[[str, object], object], name: str, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _map(leaf, f"{name}.{key}", item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [_map(leaf, f"{name}[{index}]", item) for index, item in enumerate(tree)]
        if isinstance(tree, list):
            return items
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return leaf(name, tree)


def _copy(targets: Any, sources: Any, flag: Tensor | None = None) -> None:
    """One multi_copy_ per device."""
    pairs: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        to, other = pairs.setdefault(target.device, ([], []))
        to.append(target)
        other.append(source)
    with torch.no_grad():
        for device, (to, other) in pairs.items():
            here = (
                flag
                if flag is None or flag.device.type == "cpu"
                else flag.to(device, non_blocking=device.type != "cpu")
            )
            multi_copy_(to, other, here)


def _put_back(container: Any, content: list[Any]) -> None:
    """Fills a container with what it held; one that still holds it is not touched."""
    if isinstance(container, dict):
        now = list(container.items())
        same = len(now) == len(content) and all(a is c and b is d for (a, b), (c, d) in zip(now, content, strict=True))
    else:
        now = list(container)
        same = len(now) == len(content) and all(a is b for a, b in zip(now, content, strict=True))
    if same:
        return
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(content)
    else:
        container.extend(content)


def _reshard(parts: Sequence[Any]) -> None:
    """Lets FSDP2 drop gathered parameters, in whose place are the shards then: a forward alone leaves them gathered."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = getattr(fsdp, "FSDPModule", None)
    if sharded is None:
        return
    for part in parts:
        if isinstance(part, nn.Module):
            for module in part.modules():
                if isinstance(module, sharded):
                    module.reshard()


def _memory(tensor: Tensor) -> Tensor:
    """A tensor's own elements: an expanded dimension repeats one."""
    for dim, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if step == 0 and size > 1:
            tensor = tensor.detach().narrow(dim, 0, 1)
    return tensor


def _form(tensor: Tensor) -> Form:
    return tensor.shape, tensor.dtype, tensor.device


def _shown(form: Form) -> str:
    return f"{tuple(form[0])} {form[1]} on {form[2]}"


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...], Form]:
    if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        return id(tensor), (), _form(tensor)
    return tensor.data_ptr(), tensor.stride(), _form(tensor)


def _equal(a: object, b: object) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (int, float, complex, str, bytes)) and a == b)


def _has_state_of_its_own(value: object) -> bool:
    """Whether it is an instance of somebody's class, not a function."""
    known = isinstance(value, (type, nn.Module, Optimizer)) or type(value).__module__ in ("builtins", "functools")
    return hasattr(value, "__dict__") and not known


def _type(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__
