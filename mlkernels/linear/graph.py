"""A linear head as two operators, for those who make graphs: torch.compile sees them whole, with their gradients.

Eagerly a head is an ``autograd.Function`` (see :mod:`.autograd`), which knows at less cost what is wanted of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import reference
from ..checks import accumulated, check_indices
from ..numbering import IGNORE_INDEX, REDUCTION, TRAINABLE, Reduction, Slot, consts_of, slots_of, structure_of
from . import threads
from .autograd import check_upstream, gradients_of, made
from .loop import Call, Inputs, Wanted, planned
from .pieces import pieces_for
from .plan import Cut

#: The arguments of both, see :class:`mlkernels.linear.loop.Call`; per_row has a bit for each slot, and needs says which
#: of x, weight, bias and params have a gradient.
_LINEAR = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor[] params, float[] numbers, int per_row, "
    "bool normalize, bool return_stats, str? strategy, int? memory, bool compact, str? backend, bool[] needs"
)
_SCHEMAS = (
    # Loss, and RowStats where wanted; then the gradients for an upstream one of 1, or what is known of each row.
    f"linear_loss({_LINEAR}) -> Tensor[]",
    # The gradients, for the upstream ones of loss, logsumexp, log_prob and entropy.
    f"linear_loss_backward({_LINEAR}, Tensor?[] upstream, Tensor saved) -> Tensor[]",
)


def results(return_stats: bool) -> int:
    """How many outputs are not for the backward: the loss, RowStats."""
    return 7 if return_stats else 1


def makes_at_once(numbers: Sequence[float], return_stats: bool, needs: Sequence[bool]) -> bool:
    """Whether gradients are made with the loss."""
    return numbers[REDUCTION] != Reduction.NONE and not return_stats and any(needs)


class _Problem:
    """A call of either operator, as the loop takes it."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, params: Sequence[Tensor],
        numbers: Sequence[float], per_row: int, normalize: bool, return_stats: bool, strategy: str | None,
        memory: int | None, compact: bool, backend: str | None, needs: Sequence[bool],
    ):  # fmt: skip
        slots = tuple(slots_of(numbers))
        classes = weight.shape[0]
        check_indices("target", target, classes, int(numbers[IGNORE_INDEX]))
        by_slot = dict(zip(slots, params, strict=True))
        if Slot.GROUP in by_slot:
            groups = max(p.shape[0] for s, p in by_slot.items() if p.dim() == 2 and not per_row >> s & 1)
            check_indices("group", by_slot[Slot.GROUP], groups)
        pieces = pieces_for(x.device, backend)
        dtype = accumulated(x.dtype)
        call = Call(
            list(numbers),
            slots,
            frozenset(s for s in slots if per_row >> s & 1),
            normalize,
            return_stats,
            pieces,
            dtype,
        )
        call = planned(call, Cut(strategy, memory, compact), classes, x, weight, target)
        trained = (slot for slot, need in zip(slots, needs[3:], strict=True) if need)
        self.wanted = Wanted(needs[0], needs[1], needs[2], tuple(trained))
        self.given = call, Inputs(x, weight, bias, target, params)


@contextmanager
def _loop(device: torch.device) -> Iterator[None]:
    """Within an operator, which runs below autograd, as the loop runs outside: finish is differentiated by autograd."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    below = exclude & torch._C._after_autograd_keyset
    with torch._C._ForceDispatchKeyGuard(include, below), torch.no_grad(), reference.full_precision(device):
        yield


def _linear_loss(*arguments: Any) -> list[Tensor]:
    numbers, return_stats, needs = arguments[5], arguments[8], arguments[13]
    with _loop(arguments[0].device):
        problem = _Problem(*arguments)
        at_once = makes_at_once(numbers, return_stats, needs)
        found, gradients, saved = made(*problem.given, problem.wanted, at_once)
        if gradients is not None:
            return [*_apart(found), *(g for g in gradients if g is not None)]
        return [*_apart(found), *([_packed(problem, saved)] if any(needs) else ())]


def _linear_loss_backward(*arguments: Any) -> list[Tensor]:
    *of_linear, upstream, saved = arguments
    with _loop(arguments[0].device):
        problem = _Problem(*of_linear)
        gradients = gradients_of(*problem.given, problem.wanted, _unpacked(problem, saved), upstream)
        return [g for g in gradients if g is not None]


def _apart(results: Sequence[Tensor]) -> list[Tensor]:
    """What an operator returns may not share memory: statistics of rows that lie side by side are copied."""
    return [t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for t in results]


def _packed(problem: _Problem, saved: Sequence[Tensor | None]) -> Tensor:
    """What is known of all rows in one tensor, whose shape does not depend on how many are ignored."""
    call, inputs = problem.given
    if threads.serves(call):
        (known,) = saved
        assert known is not None
        return known
    packed = inputs.x.new_zeros(5 + 3 * structure_of(call.numbers).scales, inputs.target.shape[0], dtype=call.dtype)
    if saved:
        top, total, shift, second, weighted, weights, _, _, f_y, u_y = saved
        assert top is not None and total is not None and shift is not None
        zero = torch.zeros_like(top)
        one = [zero if n is None else n for n in (f_y, u_y, top, weighted, weights)]
        rows = torch.cat([torch.stack(one), total, shift, torch.zeros_like(total) if second is None else second])
        packed[:, slice(None) if call.kept.where is None else call.kept.where] = rows
    return packed


def _unpacked(problem: _Problem, packed: Tensor) -> Sequence[Tensor | None]:
    call, inputs = problem.given
    if threads.serves(call):
        return (packed,)
    index = call.kept.where
    if inputs.target.shape[0] == 0 or (index is not None and index.numel() == 0):
        return ()
    if index is not None:
        packed = packed[:, index]
    f_y, u_y, top, weighted, weights = packed[:5]
    total, shift, second = packed[5:].contiguous().unflatten(0, (3, -1))
    weighted, weights = (n if consts_of(call.numbers)[Slot.SMOOTHING] > 0 else None for n in (weighted, weights))
    seen = torch.zeros_like(top, dtype=torch.int64)  # no gradient takes the lowest class, nor how many are larger
    return top, total, shift, second, weighted, weights, seen, seen, f_y, u_y


# ---- what they return without being run ------------------------------------------------------------------------------


def _gradients_like(x: Tensor, leaves: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    dtype = accumulated(x.dtype)
    return [x.new_empty(t.shape, dtype=dtype) for t, need in zip(leaves, needs, strict=True) if need and t is not None]


def _linear_loss_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, params: Sequence[Tensor], numbers: Sequence[float],
    per_row: int, normalize: bool, return_stats: bool, strategy: str | None, memory: int | None,
    compact: bool, backend: str | None, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    dtype = accumulated(x.dtype)
    rows = target.shape[0]
    found = [x.new_empty(rows if numbers[REDUCTION] == Reduction.NONE else (), dtype=dtype)]
    if return_stats:
        whole = (3, 5)  # prediction and rank
        found += [x.new_empty(rows, dtype=torch.int64 if i in whole else dtype) for i in range(6)]
    if makes_at_once(numbers, return_stats, needs):
        return found + _gradients_like(x, (x, weight, bias, *params), needs)
    if any(needs):
        found.append(x.new_empty(5 + 3 * structure_of(numbers).scales, rows, dtype=dtype))
    return found


def _linear_loss_backward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, params: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    return _gradients_like(x, (x, weight, bias, *params), rest[-3])


# ---- autograd --------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, bias, target, params, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.results = results(rest[3])
    saved = output[ctx.results :]
    ctx.mark_non_differentiable(*output[4 : ctx.results], *saved)
    ctx.rest, ctx.leaves = rest, [None if t is None else t.dtype for t in (x, weight, bias, *params)]
    ctx.at_once = makes_at_once(rest[0], rest[3], rest[-1])
    ctx.save_for_backward(*(saved if ctx.at_once else (x, weight, bias, target, *params, *saved)))


def _backward(ctx: Any, upstream: Sequence[Tensor | None]) -> Any:
    needs = ctx.rest[-1]
    check_upstream(upstream, "linear heads have", True)  # dispatch answers for what is batched
    if ctx.at_once:
        grad = upstream[0]
        found = [torch.zeros_like(g) if grad is None else (g * grad).masked_fill(g == 0, 0) for g in ctx.saved_tensors]
    else:
        x, weight, bias, target, *others = ctx.saved_tensors
        *params, known = others
        given = list(upstream[: min(4, ctx.results)])
        found = torch.ops.mlkernels.linear_loss_backward(x, weight, bias, target, params, *ctx.rest, given, known)
    gradients = iter(found)
    x, weight, bias, *params = (
        next(gradients).to(dtype) if need and dtype is not None else None
        for need, dtype in zip(needs, ctx.leaves, strict=True)
    )
    return (x, weight, bias, None, params, *[None] * len(ctx.rest))


_library = ops.library
for _schema in _SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("linear_loss", _linear_loss, "CompositeExplicitAutograd")
_library.impl("linear_loss_backward", _linear_loss_backward, "CompositeExplicitAutograd")
torch.library.register_fake("mlkernels::linear_loss", _linear_loss_fake, lib=_library)
torch.library.register_fake("mlkernels::linear_loss_backward", _linear_loss_backward_fake, lib=_library)
torch.library.register_autograd("mlkernels::linear_loss", _backward, setup_context=_setup_context, lib=_library)


def linear_loss(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, params: Sequence[Tensor], numbers: Sequence[float],
    per_row: int, normalize: bool, return_stats: bool, strategy: str | None, memory: int | None,
    compact: bool, backend: str | None,
) -> list[Tensor]:  # fmt: skip
    """The loss of each row or of all, and the row statistics, in a graph."""
    grad = torch.is_grad_enabled()
    trained = [True] * 3 + [any(slot == each for each in TRAINABLE) for slot in slots_of(numbers)]
    leaves = zip((x, weight, bias, *params), trained, strict=True)
    needs = [grad and may and t is not None and t.requires_grad for t, may in leaves]
    found: list[Tensor] = torch.ops.mlkernels.linear_loss(
        x, weight, bias, target, params, list(numbers), per_row, normalize, return_stats, strategy, memory, compact,
        backend, needs,
    )  # fmt: skip
    return found[: results(return_stats)]
