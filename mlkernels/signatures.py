"""The shared arguments of the family, shown where they are taken: in signatures and in ``help()``."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

from .softmax import COMMON, Common, functions

_F = TypeVar("_F", bound=Callable[..., Any])
_PARAMETERS = [
    inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=COMMON[name], annotation=getattr(kind, "__forward_arg__", kind)
    )
    for name, kind in Common.__annotations__.items()
]


def filled(doc: str | None) -> str:
    """A docstring with the meaning of every shared argument in the place of its line ``**common: ...``."""
    shared = inspect.getdoc(Common)
    if doc is None or shared is None:  # python -OO
        return ""
    meanings = textwrap.dedent(shared.split("Args:\n")[1])
    return re.sub(r"^( *)\*\*common:.*$", lambda line: textwrap.indent(meanings, line[1]), doc, flags=re.MULTILINE)


def _shown(of: Callable[..., Any]) -> inspect.Signature:
    found = inspect.signature(of)
    own = [one for one in found.parameters.values() if one.kind is not one.VAR_KEYWORD]
    return found.replace(parameters=[*own, *_PARAMETERS])


def family(of: _F) -> _F:
    """Of a function or a module with ``**common: Unpack[Common]``: the same object, which says what that is."""
    initializer: Any = of.__init__ if isinstance(of, type) else of  # type: ignore[misc]
    initializer.__signature__ = _shown(initializer)
    of.__doc__ = filled(of.__doc__)
    if not isinstance(of, type):
        functions[of.__name__] = of
    return of
