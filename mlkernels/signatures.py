"""The shared arguments of the family, shown where they are taken: in signatures and in ``help()``."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from .call import COMMON, Common, Options, PerCall, functions

_F = TypeVar("_F", bound=Callable[..., Any])
_SHARED = "The result and the errors are those of :mod:`mlkernels.functional`."


def _meanings(*shared: type) -> str:
    docs = [inspect.getdoc(one) or "" for one in shared]
    return "\n".join(textwrap.dedent(doc.partition("Args:\n")[2]).strip() for doc in docs)


def filled(doc: str | None, *shared: type, end: str = "") -> str:
    """A docstring with the meanings of all shared arguments in the place of its line ``**common: ...``, and an end."""
    meanings = _meanings(*(shared or (Options, PerCall)))

    def here(line: re.Match[str]) -> str:
        return textwrap.indent(meanings, line[1]) + (f"\n\n{line[1][4:]}{end}" if end else "")

    return re.sub(r"^( *)\*\*common:.*$", here, doc or "", flags=re.MULTILINE)


def _shown(of: Callable[..., Any], shared: Iterable[str]) -> inspect.Signature:
    found = inspect.signature(of)
    own = [one for one in found.parameters.values() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    for name in shared:
        kind = Common.__annotations__[name]
        kind = getattr(kind, "__forward_arg__", kind)
        own.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=COMMON[name], annotation=kind))
    return found.replace(parameters=own)


def family(of: _F) -> _F:
    """Of a function with ``**common: Unpack[Common]`` or a module with those of Options: itself, which says so."""
    if isinstance(of, type):
        of.__init__.__signature__ = _shown(of.__init__, Options.__annotations__)  # type: ignore[misc]
        of.__doc__ = filled(of.__doc__, Options)
    else:
        cast(Any, of).__signature__ = _shown(of, Common.__annotations__)
        of.__doc__ = filled(of.__doc__, end=_SHARED)
        functions[of.__name__] = of
    return of
