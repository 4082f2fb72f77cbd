"""Losses as modules: arguments that are checked once, kept, put back and shown; and what those in plain torch share."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .call import COMMON, Options, PerCall
from .checks import unknown_keywords
from .numbering import PER_CLASS
from .positional import by_name
from .signatures import show_module
from .softmax import NO_BATCH
from .spec import Number

_PLAIN: frozenset[type] = frozenset({int, float, bool})


class Loss(nn.Module):
    """A function and the arguments kept for it."""

    _function: ClassVar[Callable[..., Tensor]]
    _buffers_always: ClassVar[frozenset[str]] = frozenset(PER_CLASS.values())
    _drawn: ClassVar[frozenset[str]] = frozenset()
    """What ``reset_parameters`` draws: everything else it puts back."""

    def __init_subclass__(cls) -> None:
        by_name(cls)

    def __init__(self, own: dict[str, Any], common: dict[str, Any]) -> None:
        super().__init__()
        self._own, self._common = tuple(own), tuple(common)
        self._names = self._own + self._common
        self._initial: dict[str, Tensor] = {}
        for name, value in (own | common).items():
            self._keep(name, value)

    def _keep(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and name not in self._drawn:
            self._initial[name] = value.detach().clone()
        if name in self._buffers_always:
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(f"{name} is not differentiated: it must not require a gradient; pass {name}.detach()")
            self.register_buffer(name, value)
        elif isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        elif isinstance(value, Tensor):
            if value.requires_grad:
                raise ValueError(
                    f"{name} requires a gradient, and as no nn.Parameter would be in no optimizer: pass "
                    f"nn.Parameter({name}) to train it, {name}.detach() to keep it"
                )
            self.register_buffer(name, value)
        elif isinstance(value, numbers.Real) and type(value) not in _PLAIN:
            # NumPy's are arrays to torch.compile, fractions nothing.
            setattr(self, name, int(value) if isinstance(value, numbers.Integral) else float(value))
        else:
            setattr(self, name, value)

    def reset_parameters(self) -> None:
        """Puts back the tensors that the loss was built with, for one that ``to_empty()`` took off the meta device.

        Raises:
            ValueError: a tensor that was on the meta device itself: there is nothing to put back.
        """
        for name, initial in self._initial.items():
            if initial.is_meta:
                raise ValueError(
                    f"{name} was given on the meta device and has no value to go back to: build it on a device "
                    "(device='cpu'), or load a state_dict"
                )
        with torch.no_grad():
            for name, initial in self._initial.items():
                getattr(self, name).copy_(initial)

    def _kept(self, names: Sequence[str]) -> dict[str, Any]:
        # As getattr() finds them, in half the time: most are numbers.
        numbers, buffers = self.__dict__, self._buffers
        return {
            name: numbers[name] if name in numbers else buffers[name] if name in buffers else getattr(self, name)
            for name in names
        }

    def _arguments(self, batch: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What is kept, and what belongs to the batch."""
        arguments = self._kept(self._names)
        if batch:
            for name in batch:
                if name in arguments:
                    of = type(self).__name__
                    raise TypeError(f"{of} keeps its {name}: give it to {of}({name}=...), not to its calls")
            arguments.update(batch)
        return arguments

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of the kept arguments."""
        return type(self)._function(input, target, **self._arguments())

    def extra_repr(self) -> str:
        """The loss's own arguments, and the common ones that are not at their defaults; tensors by their shapes."""
        own = inspect.signature(type(self)._function).parameters
        defaults = COMMON | {name: parameter.default for name, parameter in own.items()}
        shown = self._kept(self._own)
        for name, value in self._kept(self._common).items():
            if isinstance(value, Tensor) or value != defaults[name]:
                shown[name] = value
        return ", ".join(f"{name}={_shown(value)}" for name, value in shown.items())


# ---- losses in plain torch -------------------------------------------------------------------------------------------


def classes_of(label: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Whether each int64 label is a class; and the labels, with 0 in the place of those that are none."""
    legal = (label >= 0) & (label < classes)
    return legal, torch.where(legal, label, 0)


def reduced(rows: Tensor, reduction: str, normalizer: Number | None = None, legal: Tensor | None = None) -> Tensor:
    """The losses of rows as they are returned; NaN those whose labels are not legal."""
    if legal is not None:
        rows = rows * torch.where(legal, 1.0, torch.nan).to(rows.dtype)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.mean() if normalizer is None else rows.sum() / normalizer


def _shown(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else repr(value)


class FamilyLoss(Loss):
    """A loss of the softmax family: what all of them take."""

    def __init_subclass__(cls, of: Callable[..., Tensor] | None = None) -> None:
        super().__init_subclass__()
        if of is not None:  # not a class of the user's own
            cls._function = staticmethod(of)
            show_module(cls, of)

    def __init__(self, own: dict[str, Any], common: Options, **later: Any) -> None:
        options = {name: COMMON[name] for name in Options.__annotations__}
        unknown = {name: value for name, value in common.items() if name not in options}
        for name in PerCall.__annotations__.keys() & unknown.keys():
            what = f"{type(self).__name__}() takes no {name}"
            raise TypeError(f"{what}, which belongs to a batch: give it to the call, loss(input, target, {name}=...)")
        if unknown:
            raise unknown_keywords(type(self), unknown, options)
        type(self)._function(NO_BATCH, NO_BATCH, **own, **later, **common)
        super().__init__(own, options | common)

    def forward(self, input: Tensor, target: Tensor, **batch: Unpack[PerCall]) -> Tensor:
        """The loss of the kept arguments; ``row_weight`` and ``normalizer`` belong to the batch."""
        arguments = self._arguments(batch) if batch else self._kept(self._names)
        return self._function(input, target, **arguments)
