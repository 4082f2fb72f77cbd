"""What is said where an argument that is taken by name comes by position."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor

_F = TypeVar("_F", bound=Callable[..., Any])


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
    if isinstance(of, type) and len(given) > 1 and named[0].name == "margin":  # elsewhere: classes, features
        return TypeError(
            f"{what}, everything else by name: write {of.__name__}(margin=..., scale=...). {classifier_of(of)}"
        )
    return TypeError(
        f"{what}, everything else by name: write {of.__name__}({', '.join(dict.fromkeys([*first, *written]))})"
    )


def classifier_of(of: Callable[..., object]) -> str:
    """Where the classifier is that losses of other packages have in them."""
    cosines = ", normalize=True" if inspect.signature(of).parameters.keys() & {"margin", "m2"} else ""
    return f"the classifier belongs to LinearLoss({of.__name__}(...), in_features, num_classes{cosines})"


def kind_of(value: object) -> str:
    """What came, for an error."""
    return (
        f"the class {value.__name__}: write {value.__name__}(...)" if isinstance(value, type) else type(value).__name__
    )


def by_name(of: _F) -> _F:
    """A function, or a class with its ``__init__``, with :func:`positional_arguments` for Python's own words."""
    init = of.__init__ if isinstance(of, type) else None  # type: ignore[misc]
    function: Callable[..., Any] = init or of
    taken = inspect.signature(function).parameters.values()
    few = sum(one.kind == one.POSITIONAL_OR_KEYWORD for one in taken)
    if any(one.kind == one.VAR_POSITIONAL for one in taken):
        return of

    @functools.wraps(function)
    def checked(*given: Any, **named: Any) -> Any:
        if len(given) > few:
            raise positional_arguments(of, given[few:])
        return function(*given, **named)

    if init is None:
        return cast(_F, checked)
    of.__init__ = checked  # type: ignore[method-assign]
    return of
