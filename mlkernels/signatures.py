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


def _show(of: Any, own: Iterable[inspect.Parameter], shared: Iterable[str]) -> None:
    shown = [one for one in own if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    for name in shared:
        kind = Common.__annotations__[name]
        kind = getattr(kind, "__forward_arg__", kind)
        shown.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=COMMON[name], annotation=kind))
    of.__signature__ = inspect.signature(of).replace(parameters=shown)


def family(of: _F) -> _F:
    """Of a function with ``**common: Unpack[Common]``: itself, which says so."""
    _show(of, inspect.signature(of).parameters.values(), Common.__annotations__)
    of.__doc__ = filled(of.__doc__, end=_SHARED)
    functions[of.__name__] = of
    return of


def show_module(of: type, function: Callable[..., Any]) -> None:
    """The same of a module that keeps a function's arguments: what it does not say of them, the function does."""
    init, theirs = cast(Any, of).__init__, inspect.signature(function).parameters
    own = [one for one in inspect.signature(init).parameters.values() if one.kind != one.VAR_KEYWORD]
    if len(own) == 1:  # self
        own += [one for name, one in theirs.items() if one.kind == one.KEYWORD_ONLY and name not in COMMON]
    _show(init, own, Options.__annotations__)
    of.__doc__ = filled(of.__doc__, Options)
    if "    Args:\n" not in of.__doc__:
        arguments = re.findall(r"^ {8}(?=\S)(.*\n(?: {12}.*\n)*)", function.__doc__ or "", re.MULTILINE)
        taken = [one for one in arguments if inspect.signature(init).parameters.keys() & {*re.split(r"[:,] ?", one)}]
        # Numbers of each row belong to a batch, and are not kept.
        described = "".join(f"        {one}" for one in taken).replace("(0-d, (C,) or (N, 1))", "(0-d or (C,))")
        of.__doc__ = of.__doc__.replace("    Example:\n", f"    Args:\n{described}\n    Example:\n")
