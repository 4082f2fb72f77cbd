"""Any loss of the family: its arguments bound, then a backend's operators with their autograd, or the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Never

from . import autograd, fast_path
from .backends import reference
from .backends.reference import RowStats
from .call import Common, bind, check_loss, functions
from .ops import REFERENCE
from .positional import positional_arguments
from .spec import BackendName, Number, Spec
from .tracing import PLAIN_TENSORS

_is_compiling = torch.compiler.is_compiling
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


#: In the place of logits and labels: a loss is checked as far as it can be without them, and nothing is computed.
NO_BATCH: Any = object()


class Asked(NamedTuple):
    """What is asked of logits that are a product: a loss as operators take it, and by whom and with what it comes."""

    numbers: Sequence[float]
    params: Sequence[Tensor]
    tables: tuple[int, ...]
    return_stats: bool
    backend: BackendName | None


class ProductLogits:  # no ABC: every call asks whether its input is one, and an ABC answers slowly
    """What stands for logits that are a product and never whole; see :mod:`mlkernels.linear`."""

    #: What an error says where somebody needs them all.
    instead = (
        "they are never whole, and it takes losses of the softmax family (mlkernels.softmax_loss, those of a name, "
        "their modules) and functions of these; reduction='none' and return_stats=True give what else is wanted of rows"
    )

    def shaped(self) -> Tensor:
        """A tensor of their shape, dtype and device that takes no memory: arguments are checked by it."""
        raise NotImplementedError

    def loss(self, target: Tensor, asked: Asked) -> tuple[Tensor, RowStats | None]:
        """The loss whose arguments were checked."""
        raise NotImplementedError

    def refused(self, error: Exception) -> None:
        """An argument was refused, or nothing came of it: for those who wait for the loss elsewhere."""


def _of_dtensor(input: Tensor | ProductLogits, target: Tensor) -> tuple[Tensor | ProductLogits, Tensor]:
    from .distributed.vocabulary import of_dtensor  # imports DTensor, as whoever has one did

    return of_dtensor(input, target)  # type: ignore[arg-type]


def loss(
    spec: Spec,
    values: Sequence[Number | None],
    input: Tensor | ProductLogits,
    target: Tensor,
    group: Tensor | None,
    common: Common,
    rest: Sequence[Never] = (),
) -> Tensor:
    """The loss of :func:`apply`, with the arguments that it shares with others as they came.

    rest: arguments by position that are taken by name only.
    """
    if rest:
        raise positional_arguments(functions[spec.function], rest)
    if input is NO_BATCH:
        check_loss(spec, values, **common)  # type: ignore[misc]  # none of PerCall: modules do not keep them
        return target
    if not _is_compiling() and fast_path.loss is not None:
        found = fast_path.loss(spec, values, input, target, group, common)
        if found is not None:
            return found
    return apply(spec, values, input, target, group, common)[0]


def apply(
    spec: Spec,
    values: Sequence[Number | None],
    input: Tensor | ProductLogits,
    target: Tensor,
    group: Tensor | None,
    common: Common,
    return_stats: bool = False,
) -> tuple[Tensor, RowStats | None]:
    """Any loss of the family: ``values`` are its numbers and tensors, in the order of ``spec.values``."""
    if type(input) not in PLAIN_TENSORS:
        if type(input).__name__ == "DTensor":
            input, target = _of_dtensor(input, target)
        if isinstance(input, ProductLogits):
            try:
                checked: Common = {**common, "backend": "reference"}
                call, _, labels, params = bind(spec, values, input.shaped(), target, group, **checked)
                asked = Asked(call.numbers, params, spec.tables, return_stats, common.get("backend"))
                return input.loss(labels, asked)
            except Exception as error:
                input.refused(error)
                raise
    call, batch, labels, params = bind(spec, values, input, target, group, **common)  # type: ignore[arg-type]
    kernels, rows = call.kernels, None
    if kernels is REFERENCE:
        loss, found = reference.softmax_loss(batch, labels, call.numbers, params)
        rows = found if return_stats else None
    elif return_stats:
        if call.needs:
            loss, *outputs = autograd.softmax_stats(call, batch, labels, *params)
        else:
            loss, _, *outputs = kernels.softmax_stats(batch, labels, call.numbers, params)
        rows = RowStats(*outputs)
    elif not call.needs:
        loss = kernels.softmax_loss(batch, labels, call.numbers, params, False)[0]
    # Hooks on saved tensors (checkpointing, offloading) would meet a gradient.
    elif call.apart or _saved_tensors_hooks(False) is not None:
        loss = autograd.softmax_loss(call, batch, labels, *params)
    else:
        loss = autograd.loss_with_gradients(call, batch, labels, *params)
    if batch is not input:  # a single row
        return loss.reshape(()), None if rows is None else RowStats(*(row.squeeze(0) for row in rows))
    return loss, rows
