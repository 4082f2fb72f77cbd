"""Plain calls on the CPU cross the boundary once per direction: what ``csrc/library_fast_path.cpp`` needs of Python.

That library is compiled against one torch and one Python and is optional. It serves a call whose tensors are plain and
whose numbers, options and structure :func:`mlkernels.call.bind` has seen before; all else, and every error, is left to
:func:`mlkernels.softmax.apply`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor

from . import autograd, ops
from .backends import native
from .call import COMMON, Common, bind
from .checks import range_of
from .numbering import TRAINABLE
from .spec import Number, ReductionName, Spec

_PACKAGE = Path(__file__).resolve().parent


def _describe(spec: Spec) -> list[tuple[int, bool, bool, float, float, float]]:
    """Of each number of a structure: its slot, whether it is a table, whether it can be trained, and its range."""
    return [(slot, slot in spec.tables, slot in TRAINABLE, *range_of(name)) for slot, name, _ in spec.values]


#: A call, its numbers, needs, half and apart, and of a linear head those of its plan and how much workspace it takes.
Resolved: TypeAlias = tuple[Any, list[float], int, bool, bool, tuple[int, ...]]


def _resolve(
    spec: Spec,
    values: Sequence[Number | None],
    input: Any,  # logits, or those of a linear head
    target: Tensor,
    group: Tensor | None,
    common: Common,
) -> Resolved | None:
    """What a call of a kind that was not seen before comes to; None where other kernels than the CPU's serve it."""
    if not isinstance(input, Tensor):
        of_linear: Resolved | None = input.resolved(spec, values, target, group, common)
        return of_linear
    call = bind(spec, values, input, target, group, **common)[0]
    if call.kernels is not ops.CPU:
        return None
    return call, call.numbers, call.needs, call.half, call.apart, ()


def _load() -> tuple[Any, str | None]:
    """The library, set up, or why there is none."""
    if os.environ.get("MLKERNELS_FAST_PATH", "1") == "0":
        return None, "switched off by MLKERNELS_FAST_PATH=0"
    table = native.cpu_direct()
    if table is None:
        return None, "there are no CPU kernels"
    wanted = f"_fast_path.{sys.implementation.cache_tag}-torch-{torch.__version__}.so"
    found = sorted(_PACKAGE.glob("_fast_path.*.so"))
    path = _PACKAGE / wanted
    if path not in found:
        reason = _PACKAGE / "_fast_path.error.txt"
        if reason.exists():
            return None, f"not built: {reason.read_text().strip()}"
        others = ", ".join(other.name.removeprefix("_fast_path.").removesuffix(".so") for other in found)
        return None, f"built for {others}, not for this torch and this Python" if found else "not built"
    older = f"{wanted} was built from older sources: build it again"
    try:
        spec = importlib.util.spec_from_file_location("mlkernels._fast_path", path)
        assert spec is not None and spec.loader is not None
        library = importlib.util.module_from_spec(spec)
        library.set_up(table, COMMON, get_args(ReductionName), _describe, _resolve, autograd.fast_path_backward)
        return (library, None) if hasattr(library, "serve_linear") else (None, older)
    except TypeError:  # it is set up with something else
        return None, older
    except (ImportError, RuntimeError) as error:
        return None, f"{wanted} does not load: {error}"


_library, missing = _load()
#: ``(spec, values, input, target, group, common)``: the loss, or None where :func:`mlkernels.softmax.apply` is to be
#: called; None where the library is not there.
loss: Callable[..., Tensor | None] | None = None if _library is None else _library.loss


def serve_linear(kind: type, take_stats: Callable[..., Any], left: Callable[..., Any]) -> None:
    """From now on logits of this type, which have ``plain`` and ``resolved``, are served too; left: of their backward,
    (what ``resolved`` called the call, tensors, saved, upstream gradients), what is not plain."""
    if _library is not None:
        _library.serve_linear(kind, "plain", take_stats, left)
