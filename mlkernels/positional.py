"""What is said where an argument that is taken by name comes by position."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Sequence

from torch import Tensor


def positional_arguments(of: Callable[..., object], given: Sequence[object]) -> TypeError:
    """The error for arguments given by position, after the last that may be, with how to write them."""
    shown = inspect.signature(of.__init__ if isinstance(of, type) else of)  # type: ignore[misc]
    taken = [one for one in shown.parameters.values() if one.kind != one.VAR_POSITIONAL and one.name != "self"]
    first = [one.name for one in taken if one.kind == one.POSITIONAL_OR_KEYWORD]
    named = [one for one in taken if one.kind == one.KEYWORD_ONLY]
    written = []
    for one, value in zip(named, given, strict=False):
        # torch's own third argument
        weights = isinstance(value, Tensor) and one.default is not None and any(n.name == "weight" for n in named)
        plain = isinstance(value, (str, numbers.Real))
        written.append("weight=..." if weights else f"{one.name}={value!r}" if plain else f"{one.name}=...")
    what = f"{of.__name__}() takes {' and '.join(first) if first else 'nothing'} by position"
    return TypeError(f"{what}, everything else by name: write {of.__name__}({', '.join([*first, *written])})")


def names_positional(cls: type, init: Callable[..., None]) -> Callable[..., None]:
    """The ``__init__`` of a class, with :func:`positional_arguments` for Python's own words."""
    taken = inspect.signature(init).parameters.values()
    few = sum(one.kind == one.POSITIONAL_OR_KEYWORD for one in taken)
    if any(one.kind == one.VAR_POSITIONAL for one in taken):
        return init

    @functools.wraps(init)
    def checked(self: object, *given: object, **named: object) -> None:
        if len(given) >= few:
            raise positional_arguments(cls, given[few - 1 :])
        init(self, *given, **named)

    return checked
