"""The family's autograd: gradients made with the loss, or once the upstream gradient is known, or by the reference.

The reference serves what a kernel cannot: gradients that are differentiated in turn, dual tensors, batches of upstream
gradients. What is kept from forward to backward goes through saved tensors, nothing else does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import reference
from .call import ONLY_INPUT, Call
from .numbering import INPUT, MASK, needed, slots_of
from .tracing import functorch_level, is_batched, is_dual, modes, observed

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def _usual(upstream: Tensor) -> bool:
    """Whether a backward is neither differentiated in turn nor watched; batches are asked for apart."""
    return not (
        _is_grad_enabled()
        or functorch_level() is not None
        or _is_compiling()
        or modes() > 0
        or type(upstream) is not Tensor
        or forward_ad._current_level >= 0
    )


def _takes_reference(upstream: Sequence[Tensor | None]) -> bool:
    """Whether a backward is itself differentiated, or batched."""
    if _is_grad_enabled() or functorch_level() is not None:
        return True
    if _is_compiling():
        return False
    return any(g is not None and (is_batched(g) or (forward_ad._current_level >= 0 and is_dual(g))) for g in upstream)


def _unusual(
    call: Call, tensors: Sequence[Tensor], saved: Tensor | None, upstream: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """The gradients by bit, differentiable again by the reference, else by operators that can be seen."""
    if not _takes_reference(upstream):
        watched = [tensors[0], *(g for g in upstream if g is not None)]
        return _by_kernels(call, tensors, saved, upstream, observed(*watched))
    input, target, *params = tensors
    with torch.enable_grad():
        loss, rows = reference.softmax_loss(input, target, call.numbers, params)
        outputs = (loss, rows.logsumexp, rows.log_prob, rows.entropy)[: len(upstream)]
        pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if g is not None]
        by_slot = dict(zip(slots_of(call.numbers), params, strict=True))
        return torch.autograd.grad(
            [o for o, _ in pairs],
            [input if bit == INPUT else by_slot[bit] for bit in needed(call.needs)],
            [g for _, g in pairs],
            create_graph=True,
            materialize_grads=True,
        )


def _by_kernels(
    call: Call,
    tensors: Sequence[Tensor],
    saved: Tensor | None,
    upstream: Sequence[Tensor | None],
    observed: bool = False,
) -> Sequence[Tensor]:
    """The gradients by bit, once the upstream gradient is known."""
    input, target, *params = tensors
    kernels = call.kernels
    if observed and kernels.dispatched is not None:
        kernels = kernels.dispatched
    if saved is None:
        saved = input.new_empty((0, 2))
    of_all = (*upstream, None, None, None)[:4]
    gradients: Sequence[Tensor]
    gradients = kernels.softmax_loss_backward(*of_all, input, target, call.numbers, params, saved, call.needs)
    return gradients


def _made_later(
    call: Call, tensors: Sequence[Tensor], saved: Tensor | None, upstream: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """The gradients by bit, for the upstream gradient of the loss, or of it and of RowStats' first three."""
    given = [g for g in upstream if g is not None]
    if not _usual(given[0]) or any(map(is_batched, given)):
        return _unusual(call, tensors, saved, upstream)
    return _by_kernels(call, tensors, saved, upstream)


def fast_path_backward(call: Call, tensors: Sequence[Tensor], saved: Tensor | None, upstream: Tensor) -> list[Tensor]:
    """The gradients by bit that the fast path leaves to Python: watched, differentiated, batched, or refused."""
    return list(_made_later(call, tensors, saved, (upstream,)))


def _order(needs: int, mask: int) -> tuple[int | None, ...]:
    """Where the gradient of each argument of a Function lies among those by bit: call, input, target, *params."""
    by_bit = {bit: index for index, bit in enumerate(needed(needs))}
    return (None, by_bit.get(INPUT), None, *(by_bit.get(bit) for bit in needed(mask)))


_known_order = functools.cache(_order)


def _placed(call: Call, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients in the order of a Function's arguments."""
    # Dynamo does not see through a cache, and warns.
    order = (_order if _is_compiling() else _known_order)(call.needs, int(call.numbers[MASK]))
    return tuple([None if index is None else gradients[index] for index in order])


class _LossWithGradients(torch.autograd.Function):
    """A reduced loss whose gradients are made with it, for the upstream gradient that it nearly always gets: 1."""

    @staticmethod
    def forward(ctx: Any, call: Call, input: Tensor, target: Tensor, *params: Tensor) -> Tensor:
        loss: Tensor
        if call.needs == ONLY_INPUT:
            loss, *made = call.kernels.softmax_loss_with_gradient(input, target, call.numbers, params)
            ctx.save_for_backward(*made, input, target, *params)
        else:
            loss, gradients, *kept = call.kernels.softmax_loss_with_gradients(
                input, target, call.numbers, params, call.needs
            )
            ctx.save_for_backward(*gradients, *kept, input, target, *params)
        ctx.call = call
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        call: Call = ctx.call
        count = call.needs.bit_count()
        refresh = call.kernels.refresh
        if not _usual(grad_loss) or (refresh is not None and is_batched(grad_loss)):
            tensors = ctx.saved_tensors[count + (refresh is not None) :]
            return _placed(call, _unusual(call, tensors, None, (grad_loss,)))
        if refresh is not None:
            return _placed(call, _refreshed(call, ctx.saved_tensors, grad_loss))
        try:
            upstream = grad_loss.item()
        except RuntimeError:
            if not is_batched(grad_loss):
                raise
            return _placed(call, _unusual(call, ctx.saved_tensors[count:], None, (grad_loss,)))
        # 0 * inf would be NaN in rows that are not read, whose gradient is 0 whatever comes.
        serves = upstream == 1.0 or (math.isfinite(upstream) and not call.half)
        try:
            saved = ctx.saved_tensors
        except RuntimeError:
            if not serves:
                raise
            # Logits that were changed in place since are not needed again.
            saved = tuple(tensor.data for tensor in ctx._raw_saved_tensors)
        if not serves:
            return _placed(call, _by_kernels(call, saved[count:], None, (grad_loss,)))
        gradients = saved[:count]
        if _keeps_graph():
            gradients = [gradient * upstream for gradient in gradients]
        elif upstream != 1.0:
            for gradient in gradients:
                gradient.mul_(upstream)
        if len(saved) == 3:  # the most frequent call: no parameters
            return None, gradients[0], None
        return _placed(call, gradients)


def _refreshed(call: Call, saved: Sequence[Tensor], grad_loss: Tensor) -> list[Tensor]:
    """What was made for an upstream gradient of 1, for this one, which only the device knows."""
    count = call.needs.bit_count()
    gradients, (factors, input, target, *params) = list(saved[:count]), saved[count:]
    # Handed out as they are, unless there will be another backward: else autograd clears what was saved.
    if _keeps_graph():
        gradients = [gradient.clone() for gradient in gradients]
    own = count
    if call.needs & ONLY_INPUT:
        assert call.kernels.refresh is not None
        # A second look at the rows where the upstream gradient is not 1.
        call.kernels.refresh(grad_loss, factors, input, target, call.numbers, params, gradients[-1])
        own -= 1
    for index in range(own):
        # Not 0 * inf where only rows that are not read count.
        gradients[index] = torch.where(gradients[index] == 0, 0, gradients[index] * grad_loss)
    return gradients


# What Function.apply itself calls once it has found no torch.func transform, which softmax.apply has asked for already.
loss_with_gradients: Callable[..., Tensor] = super(torch.autograd.Function, _LossWithGradients).apply


class _SoftmaxLoss(torch.autograd.Function):
    """The loss alone, its gradients made once the upstream gradient is known."""

    @staticmethod
    def forward(ctx: Any, call: Call, input: Tensor, target: Tensor, *params: Tensor) -> Tensor:
        loss: Tensor
        loss, saved = call.kernels.softmax_loss(input, target, call.numbers, params, True)
        ctx.call = call
        ctx.save_for_backward(saved, input, target, *params)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        saved, *tensors = ctx.saved_tensors
        return _placed(ctx.call, _made_later(ctx.call, tensors, saved, (grad_loss,)))


class _SoftmaxStats(torch.autograd.Function):
    """The loss and its row statistics."""

    @staticmethod
    def forward(ctx: Any, call: Call, input: Tensor, target: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        loss, saved, *rows = call.kernels.softmax_stats(input, target, call.numbers, params)
        ctx.call = call
        ctx.save_for_backward(saved, input, target, *params)
        ctx.mark_non_differentiable(*rows[3:])
        ctx.set_materialize_grads(False)
        return loss, *rows

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        saved, *tensors = ctx.saved_tensors
        if all(g is None for g in upstream):
            return (None,) * (1 + len(tensors))
        return _placed(ctx.call, _made_later(ctx.call, tensors, saved, upstream[:4]))


softmax_loss: Callable[..., Tensor] = _SoftmaxLoss.apply
softmax_stats: Callable[..., tuple[Tensor, ...]] = _SoftmaxStats.apply
