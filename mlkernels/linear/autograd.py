"""The autograd of a linear head: when gradients are made, and for which upstream ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import buffers
from ..backends import reference
from ..backends.reference import Finished
from ..numbering import REDUCTION, TRAINABLE, Reduction
from ..tracing import functorch_level, is_batched, is_dual, traced
from . import loop, threads
from .loop import Call, Inputs, Known, Linear, Sums, Wanted

_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def makes_at_once(call: Call, wanted: Wanted) -> bool:
    """Whether gradients are made with the loss; hooks on saved tensors (checkpointing) would meet them."""
    reduced = call.numbers[REDUCTION] != Reduction.NONE and not call.return_stats
    return reduced and bool(wanted) and call.update is None and not has_hooks()


def has_hooks() -> bool:
    """Whether saved tensors are somebody else's, who recomputes or moves them."""
    return _saved_tensors_hooks(False) is not None


#: What those do who need more of autograd than there is.
WHOLE = "take the loss of whole logits, loss(F.linear(input, weight), target)"


def check_upstream(upstream: Sequence[Tensor | None], what: str, scales: bool = False) -> None:
    """Whether a backward is one of those that there are.

    scales: the gradients are there, and are multiplied: then upstream ones may come many at a time, or with a tangent.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} no second-order gradients: {WHOLE}, or create_graph=False")
    if not scales and _looks_within(upstream):
        raise RuntimeError(
            f"{what} no backward for many upstream gradients at a time, nor for one with a tangent: "
            f"is_grads_batched=False, vectorize=False; or {WHOLE}"
        )


def _looks_within(upstream: Sequence[Tensor | None]) -> bool:
    """Whether upstream gradients hold more than their values: is_grads_batched=True, vmap, forward-mode AD."""
    given = [g for g in upstream if g is not None]
    if functorch_level() is not None or any(map(is_batched, given)):
        return True
    return forward_ad._current_level >= 0 and any(map(is_dual, given))


class _LinearLoss(torch.autograd.Function):
    """A reduced loss makes its gradients at once, for the upstream gradient that it nearly always gets."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Any) -> tuple[Tensor, ...]:
        needs = ctx.needs_input_grad
        slots = tuple(slot for slot, need in zip(call.slots, needs[5:], strict=True) if need and slot in TRAINABLE)
        wanted = Wanted(needs[1], needs[2], needs[3], slots)
        at_once = makes_at_once(call, wanted)
        results, gradients, saved = made(call, Inputs.of(tensors), wanted, at_once)
        ctx.call, ctx.wanted, ctx.at_once, ctx.dtypes = call, wanted, at_once, dtypes_of(tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[4:])
        if gradients is not None:
            save(ctx, (), gradients)
        elif wanted:
            save(ctx, tensors, saved)
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        check_upstream(upstream, "linear heads have", ctx.at_once)
        call: Call = ctx.call
        if call.update is not None:
            call.update.check()
        if ctx.at_once:
            gradients = placed(ctx, scaled(ctx.saved_tensors, upstream[0]))
        else:
            tensors = ctx.saved_tensors
            inputs, numbers = Inputs.of(tensors[: len(ctx.dtypes)]), placed(ctx, tensors[len(ctx.dtypes) :])
            gradients = gradients_of(call, inputs, ctx.wanted, numbers, upstream)
        return (None, *by_argument(call, ctx.wanted, gradients, ctx.dtypes))


def dtypes_of(tensors: Sequence[Tensor | None]) -> list[torch.dtype | None]:
    """Of those that are there."""
    return [None if t is None else t.dtype for t in tensors]


def save(ctx: Any, tensors: Sequence[Tensor | None], some: Sequence[Tensor | None]) -> None:
    """Keeps tensors for the backward, and others of which some are not there: they are not saved as None."""
    ctx.present = [t is not None for t in some]
    ctx.save_for_backward(*tensors, *(t for t in some if t is not None))


def placed(ctx: Any, some: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """These others again, in their places."""
    there = iter(some)
    return [next(there) if present else None for present in ctx.present]


def by_argument(
    call: Call, wanted: Wanted, gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]
) -> Iterator[Tensor | None]:
    """Gradients of features, weight, bias and wanted slots in the order of Inputs, each in its tensor's dtype."""
    by_slot = dict(zip(wanted.slots, gradients[3:], strict=True))
    ordered = (*gradients[:3], None, *(by_slot.get(slot) for slot in call.slots))
    for gradient, dtype in zip(ordered, dtypes, strict=True):
        yield None if gradient is None or dtype is None else handed_out(gradient, dtype)


def made(
    call: Call, inputs: Inputs, wanted: Wanted, at_once: bool
) -> tuple[tuple[Tensor, ...], Sequence[Tensor | None] | None, Sequence[Tensor | None]]:
    """The results; the gradients at an upstream of 1, where they are made at once; else what :func:`gradients_of`
    takes."""
    if threads.serves(call):
        whole = threads.Whole(call, inputs)
        if at_once or not (wanted or call.return_stats):
            loss, gradients = whole.at_once(wanted if at_once else None)
            return (loss,), gradients, ()
        results, saved = whole.rows()
        return results, None, (saved,)
    with reference.full_precision(inputs.x.device):
        results, known, gradients = loop.forward(Linear(call, inputs), wanted if at_once else None)
    return results, gradients, loop.numbers_of(known)


def gradients_of(
    call: Call, inputs: Inputs, wanted: Wanted, saved: Sequence[Tensor | None], upstream: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients once the upstream ones are known."""
    if threads.serves(call):
        (rows,) = saved
        assert rows is not None
        return threads.Whole(call, inputs).backward(wanted, rows, upstream)
    with reference.full_precision(inputs.x.device):
        linear = Linear(call, inputs)
        sums = linear.sums(wanted)
        later(sums, linear, Known.of(saved), upstream)
        return sums.finished()


def later(sums: Sums, linear: Linear, known: Known | None, upstream: Sequence[Tensor | None]) -> None:
    """The gradients once the upstream ones are known; known: of the rows, if there are any."""
    if linear.call.update is not None:
        linear.call.update.later(sums, linear, known, upstream)
    elif known is not None:
        for part, of_part, of_results in chunks_of(linear, known, upstream):
            values = linear.of(part)
            _, row = loop.finish_chunk(linear, part, values, of_part, sums, of_results)
            assert row is not None
            loop.add_chunk(sums, linear, part, values, [], row)


def chunks_of(
    linear: Linear, known: Known, upstream: Sequence[Tensor | None]
) -> Iterator[tuple[slice, Known, Finished]]:
    """By chunk what is known of its rows, and the upstream gradients of what they give."""
    loss, *rows = (upstream[i] if i < len(upstream) else None for i in range(4))
    dtype = linear.call.dtype
    loss = loss if loss is None else loss.to(dtype) if loss.dim() == 0 else linear.gathered(loss.to(dtype))
    rows = [linear.gathered(g if g is None else g.to(dtype)) for g in rows]
    for part in linear.chunks():
        of_part = Known.of([None if n is None else n[..., part] for n in loop.numbers_of(known)])
        assert of_part is not None
        yield part, of_part, loop.upstream_of(linear, part, loss, rows)


def handed_out(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient in the dtype of what it is of, a large one in memory that is kept."""
    if gradient.dtype == dtype or not buffers.serves(gradient.numel() * dtype.itemsize, gradient):
        return gradient.to(dtype)
    return buffers.empty(gradient, gradient.shape, dtype).copy_(gradient)


def fast_path_backward(
    of: tuple[Call, Wanted, bool], tensors: Sequence[Tensor], saved: Tensor | None, upstream: Sequence[Tensor | None]
) -> list[Tensor]:
    """What the fast path leaves to Python: upstream gradients that are watched, batched, or not finite.

    of: of a call, and whether its gradients, which are the tensors then, were made at once.
    """
    call, wanted, at_once = of
    check_upstream(upstream, "linear heads have", at_once)
    if at_once:
        of_loss = upstream[0]
        if of_loss is not None and traced(of_loss):
            of_loss = of_loss.sum()  # one number, of which compiled autograd does not say the shape
        return scaled(tensors, of_loss)
    dx, dw, db, *by_slot = gradients_of(call, Inputs.of(tensors), wanted, (saved,), upstream)
    return [gradient for gradient in (*by_slot, dx, dw, db) if gradient is not None]


def scaled(gradients: Sequence[Tensor], upstream: Tensor | None) -> list[Tensor]:
    """Gradients made for an upstream of 1, for another; rows that are not read keep their 0 whatever comes."""
    if upstream is None:
        return [torch.zeros_like(gradient) for gradient in gradients]
    if upstream.device.type == "cpu" and not (traced(upstream) or _looks_within([upstream])):
        factor = upstream.item()
        if factor == 1:
            # Whose it is may write into it; another backward needs it.
            return [gradient.clone() for gradient in gradients] if _keeps_graph() else list(gradients)
        if math.isfinite(factor):
            return [gradient * factor for gradient in gradients]
    return [torch.where(gradient == 0, 0, gradient * upstream) for gradient in gradients]


linear_loss: Callable[..., tuple[Tensor, ...]] = _LinearLoss.apply
