"""What of a training run is state: a walk over models, optimizers and whatever they hold."""

from __future__ import annotations

import copy
import itertools
import operator
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Form = tuple[torch.Size, torch.dtype, torch.device]
Location = tuple[int, tuple[int, ...], Form]

#: What nn.Module keeps of itself: the modes are no state, and what the rest holds is walked by itself.
_MODULE_FIELDS = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
#: What torch and its schedulers hang on an optimizer to check and to warn once; the first two are walked by themselves.
_OPTIMIZER_FIELDS = frozenset({
    "param_groups", "state", "step", "_opt_called", "_need_device_dtype_check_for_fused",
    "_warned_capturable_if_run_uncaptured",
})  # fmt: skip
#: Where classes come from whose instances are machinery: runtimes, handles, locks, types.
_MACHINERY = frozenset({"torch", "logging", "threading", "_thread", "weakref", "functools", "types", "inspect", "_io"})
_NUMBERS_AND_WORDS = (bool, int, float, complex, str, bytes, types.NoneType, Enum)
_UNSET = object()
_CONSTANTS = (
    type, slice, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, types.EllipsisType,
)  # fmt: skip


class Walk:
    """What a walk over the parts found: live tensors and values by name, and what holds them."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, object] = {}
        self.foreign: list[Foreign] = []
        self._containers: list[tuple[Any, Any]] = []
        self._fields: list[tuple[dict[str, Any], dict[str, Any], frozenset[str]]] = []
        self._attributes: list[tuple[object, str, object]] = []
        self._visited: dict[int, object] = {}  # the object beside its id: an id alone may be used again
        self._live: set[str] = set()  # of the foreign leaves, those that are restored in place
        self._numbers: dict[int, int] = {}  # of parameters, in the order of their optimizer
        reshard(parts)
        for index, part in enumerate(parts):
            self._part(f"parts[{index}] ({type_name(part)})", part)
        locations = {id(tensor): location(tensor) for tensor in self.tensors.values()}
        self.locations = {name: locations[id(tensor)] for name, tensor in self.tensors.items()}

    # ---- traversal ---------------------------------------------------------------------------------------------------

    def _part(self, name: str, part: Any) -> None:
        if not self._first_visit(part):
            return
        if isinstance(part, nn.Module):
            self._module(name, part)
        elif isinstance(part, Optimizer):
            self._optimizer(name, part)
        elif isinstance(part, LRScheduler):
            self._object(name, part, frozenset({"optimizer"}))
        elif isinstance(part, torch.amp.GradScaler):
            self._object(name, part)
        else:
            self._foreign(name, part.state_dict, part.load_state_dict)

    def _module(self, name: str, module: nn.Module) -> None:
        for path, child in module.named_modules():
            prefix = f"{name} {path}".rstrip()
            for store in (child._parameters, child._buffers):
                # A scripted module has a wrapper around both instead.
                self._add(prefix, store if isinstance(store, dict) else dict(store.items()))
            # torch's own modules keep their state in buffers; the other fields of DDP and its like belong to a runtime.
            if not all(_from(base, ("torch", "builtins")) for base in type(child).__mro__):
                self._object(prefix, child, _MODULE_FIELDS)
            if type(child).get_extra_state is not nn.Module.get_extra_state:
                if type(child).set_extra_state is nn.Module.set_extra_state:
                    raise TypeError(f"{prefix} has get_extra_state() but no set_extra_state() to restore by")
                self._foreign(f"{prefix}.extra_state", child.get_extra_state, child.set_extra_state)

    def _optimizer(self, name: str, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._numbers.setdefault(id(parameter), len(self._numbers))
        for field in ("param_groups", "state"):
            value = getattr(optimizer, field)
            self._attributes.append((optimizer, field, value))
            self._add(f"{name} {field}", value)
        hooks = {field for field in vars(optimizer) if field.startswith("_optimizer_")}
        # Among the others: optimizers that are wrapped (ZeroRedundancyOptimizer's, sharpness-aware ones').
        self._object(name, optimizer, _OPTIMIZER_FIELDS | hooks)
        if optimizer._optimizer_state_dict_post_hooks or not _from(type(optimizer).state_dict, ("torch",)):
            self._foreign(f"{name}.state_dict()", *_own_entries(optimizer))

    def _object(self, name: str, owner: object, skip: frozenset[str] = frozenset()) -> None:
        """The attributes of an instance."""
        for slot in _slots(owner):
            value = getattr(owner, slot, _UNSET)
            self._attributes.append((owner, slot, value))
            if value is not _UNSET:
                self._add(f"{name}.{slot}", value)
        fields = getattr(owner, "__dict__", {})
        if self._first_visit(fields):
            content = {key: value for key, value in fields.items() if key not in skip}
            self._fields.append((fields, content, skip))
            for key, value in content.items():
                self._add(f"{name}.{key}", value)

    def _foreign(self, name: str, get: Callable[[], Any], load: Callable[[Any], Any]) -> None:
        tree, leaves = _flat(name, get())
        self.foreign.append(Foreign(name, get, load, tree, leaves))
        _, again = _flat(name, get())
        for path, leaf in leaves.items():
            if isinstance(leaf, Tensor) and _unmoved(leaf, again.get(path)):
                self._live.add(path)
                self._add(path, leaf)

    def _first_visit(self, value: object) -> bool:
        if id(value) in self._visited:
            return False
        self._visited[id(value)] = value
        return True

    def _add(self, name: str, value: Any) -> None:
        if isinstance(value, _NUMBERS_AND_WORDS):
            self.values[name] = value
        elif isinstance(value, Tensor):
            self._tensor(name, value)
        elif isinstance(value, np.ndarray):
            self._array(name, value)
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                self._add(f"{name}[{index}]", item)
        elif isinstance(value, (dict, list, deque, set)):
            self._container(name, value)
        elif isinstance(value, (nn.Module, Optimizer)) or has_state_dict(value):
            self._part(name, value)
        elif (chance := _generator(value)) is not None:
            if self._first_visit(value):
                self._foreign(name, *chance)
        elif _is_constant(value):
            self.values[name] = value
        elif hasattr(value, "__dict__") or _slots(value):
            if self._first_visit(value):
                self._object(name, value)
        else:
            raise TypeError(
                f"{name} is a {type_name(value)}, of which no copy can be kept: give what holds it state_dict() and "
                "load_state_dict(), or hold it elsewhere"
            )

    def _container(self, name: str, value: Any) -> None:
        if not self._first_visit(value):
            return
        self._containers.append((value, _items(value)))
        if isinstance(value, dict):
            for key, item in list(value.items()):
                self._add(self._child(name, key), item)
        else:
            for index, item in enumerate(value):
                self._add(f"{name}[{index}]", item)
        if hasattr(value, "__dict__"):
            self._object(name, value)

    def _tensor(self, name: str, tensor: Tensor) -> None:
        if is_lazy(tensor):
            raise TypeError(f"{name} is not initialized: run the lazy module forward once before save()")
        if is_traceable_wrapper_subclass(tensor):  # a DTensor's local shard
            inner, _ = tensor.__tensor_flatten__()
            for field in inner:
                self._attributes.append((tensor, field, getattr(tensor, field)))
                self._add(f"{name}.{field}", getattr(tensor, field))
        elif tensor.layout != torch.strided:
            raise TypeError(f"{name} takes a dense tensor, got {tensor.layout}")
        else:
            self.tensors[name] = tensor

    def _array(self, name: str, array: np.ndarray[Any, Any]) -> None:
        if not array.flags.writeable:
            self.values[name] = array
            return
        try:
            self.tensors[name] = torch.from_numpy(array)  # its memory
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} takes an array of numbers in ascending strides, got {array.dtype}") from error

    def _child(self, name: str, key: object) -> str:
        if isinstance(key, str):
            return f"{name}.{key}"
        return f"{name}[{self._numbers.get(id(key), '?') if isinstance(key, Tensor) else key}]"

    # ---- what was found ----------------------------------------------------------------------------------------------

    def put_back(self) -> None:
        """Lets everything hold what it held: the same objects, and no others."""
        for owner, name, value in self._attributes:
            if value is _UNSET:
                if hasattr(owner, name):
                    object.__delattr__(owner, name)
            elif getattr(owner, name, _UNSET) is not value:
                object.__setattr__(owner, name, value)
        for fields, content, skip in self._fields:
            for key in [key for key in fields if key not in content and key not in skip]:
                del fields[key]
            fields.update(content)
        for container, items in self._containers:
            _fill(container, items)

    def distinct(self) -> list[str]:
        """Names of tensors that together cover all the memory: tied weights once, a view inside another not at all."""
        spans: list[tuple[str, int, int, bool, str]] = []
        unique: dict[object, str] = {}
        for name, tensor in self.tensors.items():
            tensor = memory(tensor)
            # On the meta device everything is at address 0.
            start = tensor.untyped_storage()._cdata if tensor.is_meta else tensor.data_ptr()
            key = (start, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            if tensor.numel() == 0 or unique.setdefault(key, name) != name:
                continue
            reach = extent(tensor)
            spans.append((str(tensor.device), start, -reach * tensor.element_size(), reach == tensor.numel(), name))
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

    def difference(self, now: Walk) -> str | None:
        """What keeps a device flag from deciding between this state and a later one, in words."""
        for before, after in ((self.tensors, now.tensors), (self.values, now.values)):
            for name in {**after, **before}:
                if name not in before or name not in after:
                    return f"{name} is {'gone' if name in before else 'new'} since"
                if not _unmoved(before[name], after[name]):
                    if isinstance(before[name], Tensor):
                        return f"{name} was replaced since"
                    return f"{name} changed on the host since, from {before[name]!r} to {after[name]!r}"
        for foreign in self.foreign:
            if foreign.changed():
                return f"{foreign.name} changed since, or its state_dict() holds copies"
        return None


class Foreign(NamedTuple):
    """State that is known by what a function returns, and set by another."""

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
        return not all(_unmoved(leaf, now[name]) for name, leaf in self.leaves.items())

    def rebuild(self) -> Any:
        """What it was at save(), the live tensors among it being restored; the receiver may keep it."""

        def kept(_: str, value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)

        return _map(kept, "", self.tree)


def _own_entries(optimizer: Optimizer) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """What an optimizer's own state_dict() says beyond torch's two entries, which are restored in place."""

    def get() -> dict[str, Any]:
        return {key: value for key, value in optimizer.state_dict().items() if key not in ("state", "param_groups")}

    def load(entries: dict[str, Any]) -> None:
        now = optimizer.state_dict()
        # Torch's load_state_dict cannot rebuild an array; what it does with the state is undone in any case.
        kinds = (Tensor, *_NUMBERS_AND_WORDS)
        state = {
            key: {name: item for name, item in value.items() if isinstance(item, kinds)}
            if isinstance(value, dict)
            else value
            for key, value in now["state"].items()
        }
        optimizer.load_state_dict({**now, "state": state, **entries})

    return get, load


def _generator(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """How a random generator's state is taken and set."""
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, random.Random):
        return lambda: [value.getstate()], lambda state: value.setstate(state[0])
    if isinstance(value, np.random.RandomState):
        return lambda: value.get_state(legacy=False), value.set_state
    bits = value.bit_generator if isinstance(value, np.random.Generator) else value
    if isinstance(bits, np.random.BitGenerator):
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    return None


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


def _items(container: Any) -> list[Any]:
    """What a container holds; of a dictionary each key and its value."""
    return list(itertools.chain.from_iterable(container.items()) if isinstance(container, dict) else container)


def _fill(container: Any, content: list[Any]) -> None:
    """Fills a container with what it held; one that still holds it is not touched."""
    now = _items(container)
    if len(now) == len(content) and all(map(operator.is_, now, content)):
        return
    container.clear()
    if isinstance(container, dict):
        container.update(zip(content[::2], content[1::2], strict=True))
    elif isinstance(container, set):
        container.update(content)
    else:
        container.extend(content)


def reshard(parts: Sequence[Any]) -> None:
    """Lets FSDP2 drop gathered parameters, in whose place are the shards then: a forward alone leaves them gathered."""
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    for part in parts:
        for module in part.modules() if sharded and isinstance(part, nn.Module) else ():
            if isinstance(module, sharded):
                module.reshard()


def memory(tensor: Tensor) -> Tensor:
    """A tensor's own elements: an expanded dimension repeats one."""
    for dim, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if step == 0 and size > 1:
            tensor = tensor.detach().narrow(dim, 0, 1)
    return tensor


def extent(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last in memory, those between included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def form(tensor: Tensor) -> Form:
    """What two tensors must have in common for a copy bit by bit."""
    return tensor.shape, tensor.dtype, tensor.device


def location(tensor: Tensor) -> Location:
    """Where a tensor is, and what."""
    if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        return id(tensor), (), form(tensor)
    return tensor.data_ptr(), tensor.stride(), form(tensor)


def type_name(value: object) -> str:
    """A class's name, or that of an object's class."""
    return value.__name__ if isinstance(value, type) else type(value).__name__


def _unmoved(a: object, b: object) -> bool:
    """Tensors at one place, or numbers and words that are equal."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return location(a) == location(b)
    return type(a) is type(b) and isinstance(a, (int, float, complex, str, bytes)) and a == b


def _from(value: Any, packages: Sequence[str] | frozenset[str]) -> bool:
    """Whether a class or a function is defined in one of these packages."""
    return str(value.__module__).partition(".")[0] in packages


def has_state_dict(value: object) -> bool:
    """Whether an object says itself what its state is."""
    both = callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))
    return both and not isinstance(value, type)


def _slots(value: object) -> list[str]:
    """Attributes that are not in an instance's dictionary."""
    members = [item for base in type(value).__mro__ if "__slots__" in vars(base) for item in vars(base).items()]
    return [name for name, member in members if isinstance(member, types.MemberDescriptorType)]


def _is_constant(value: object) -> bool:
    """Whether it cannot change, which what has a hash by value must not, or is machinery."""
    kind = type(value)
    by_value = kind.__hash__ not in (None, object.__hash__) and not hasattr(value, "__dict__")
    return by_value or kind is object or isinstance(value, _CONSTANTS) or _from(kind, _MACHINERY)
