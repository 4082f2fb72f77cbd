"""The autograd of a head: when gradients are made, and for which upstream ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import buffers
from ..backends import reference
from ..backends.reference import Finished, Rows
from ..numbering import REDUCTION, TRAINABLE, Reduction
from ..tracing import functorch_level, is_batched, is_dual, traced
from . import threads
from .loop import Call, Head, Known, Sums, Wanted, add_chunk, chunk_coefficients, forward, upstream_of

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
    def forward(
        ctx: Any,
        call: Call,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        *params: Tensor,
    ) -> tuple[Tensor, ...]:
        needs = ctx.needs_input_grad
        slots = tuple(slot for slot, need in zip(call.slots, needs[5:], strict=True) if need and slot in TRAINABLE)
        wanted = Wanted(needs[1], needs[2], bias is not None and needs[3], slots)
        at_once = makes_at_once(call, wanted)
        results, gradients, saved = made(call, x, weight, bias, target, params, wanted, at_once)
        ctx.call, ctx.wanted, ctx.at_once = call, wanted, at_once
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[4:])
        if at_once and gradients is not None:
            ctx.dtypes = [t.dtype for t in (x, weight, weight if bias is None else bias, *params)]
            ctx.present = [g is not None for g in gradients]
            ctx.save_for_backward(*(g for g in gradients if g is not None))
        elif wanted:
            ctx.present = [n is not None for n in saved]
            ctx.save_for_backward(x, weight, bias, target, *params, *(n for n in saved if n is not None))
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        check_upstream(upstream, "heads have", ctx.at_once)
        call: Call = ctx.call
        wanted: Wanted = ctx.wanted
        if call.update is not None:
            call.update.check()
        if ctx.at_once:
            saved = iter(scaled(ctx.saved_tensors, upstream[0]))
            gradients = [next(saved) if there else None for there in ctx.present]
            dtypes = ctx.dtypes
        else:
            x, weight, bias, target, *rest = ctx.saved_tensors
            params, numbers = rest[: len(call.slots)], iter(rest[len(call.slots) :])
            each = [next(numbers) if there else None for there in ctx.present]
            gradients = list(gradients_of(call, x, weight, bias, target, params, wanted, each, upstream))
            dtypes = [t.dtype for t in (x, weight, weight if bias is None else bias, *params)]
        by_slot = dict(zip(wanted.slots, gradients[3:], strict=True))
        ordered = [*gradients[:3], None, *(by_slot.get(slot) for slot in call.slots)]
        dtypes = [*dtypes[:3], torch.int64, *dtypes[3:]]
        return (None, *(g if g is None else handed_out(g, dtype) for g, dtype in zip(ordered, dtypes, strict=True)))


def made(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, params: Sequence[Tensor],
    wanted: Wanted, at_once: bool,
) -> tuple[tuple[Tensor, ...], Sequence[Tensor | None] | None, Sequence[Tensor | None]]:  # fmt: skip
    """The results; the gradients at an upstream of 1, where they are made at once; else what :func:`gradients_of`
    takes."""
    if threads.serves(call):
        whole = threads.Whole(call, x, weight, bias, target, params)
        if at_once or not (wanted or call.return_stats):
            loss, gradients = whole.at_once(wanted if at_once else None)
            return (loss,), gradients, ()
        results, saved = whole.rows()
        return results, None, (saved,)
    with reference.full_precision(x.device):
        results, known, gradients = forward(Head(call, x, weight, bias, target, params), wanted if at_once else None)
    return results, gradients, () if known is None else (*known.rows, known.f_y, known.u_y)


def gradients_of(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, params: Sequence[Tensor],
    wanted: Wanted, saved: Sequence[Tensor | None], upstream: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients once the upstream ones are known."""
    if threads.serves(call):
        (rows,) = saved
        assert rows is not None
        return threads.Whole(call, x, weight, bias, target, params).backward(wanted, rows, upstream)
    with reference.full_precision(x.device):
        head = Head(call, x, weight, bias, target, params)
        sums = head.sums(wanted)
        known = Known(Rows(*saved[:-2]), *saved[-2:]) if saved else None  # type: ignore[arg-type]
        later(sums, head, known, upstream)
        return sums.finished()


def later(sums: Sums, head: Head, known: Known | None, upstream: Sequence[Tensor | None]) -> None:
    """The gradients once the upstream ones are known; known: of the rows, if there are any."""
    if head.call.update is not None:
        head.call.update.later(sums, head, known, upstream)
    elif known is not None:
        for part, of_part, of_results in chunks_of(head, known, upstream):
            values = head.of(part)
            add_chunk(sums, head, part, values, [], chunk_coefficients(sums, head, part, values, of_part, of_results))


def chunks_of(head: Head, known: Known, upstream: Sequence[Tensor | None]) -> Iterator[tuple[slice, Known, Finished]]:
    """By chunk what is known of its rows, and the upstream gradients of what they give."""
    loss, *rows = (upstream[i] if i < len(upstream) else None for i in range(4))
    dtype = head.call.dtype
    loss = loss if loss is None else loss.to(dtype) if loss.dim() == 0 else head.gathered(loss.to(dtype))
    rows = [head.gathered(g if g is None else g.to(dtype)) for g in rows]
    for part in head.chunks():
        of_part = Known(
            Rows(*(None if n is None else n[..., part] for n in known.rows)),  # type: ignore[arg-type]
            known.f_y[part],
            known.u_y[part],
        )
        yield part, of_part, upstream_of(head, part, loss, rows)


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
    check_upstream(upstream, "heads have", at_once)
    if at_once:
        of_loss = upstream[0]
        if of_loss is not None and traced(of_loss):
            of_loss = of_loss.sum()  # one number, of which compiled autograd does not say the shape
        return scaled(tensors, of_loss)
    x, weight, bias, target, *params = tensors
    dx, dw, db, *by_slot = gradients_of(call, x, weight, bias, target, params, wanted, (saved,), upstream)
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
