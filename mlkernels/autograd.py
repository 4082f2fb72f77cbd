"""The family's autograd: gradients made with the loss, or once the upstream gradient is known, or by the reference.

The reference serves what a kernel cannot: gradients that are differentiated in turn, dual tensors, batches of upstream
gradients. What is kept from forward to backward goes through saved tensors, nothing else does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .backends import reference
from .checks import functorch_level, is_dual, observed
from .spec import MASK

ONLY_INPUT = 1 << ops.INPUT

_is_compiling = torch.compiler.is_compiling
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


class Call(NamedTuple):
    """What of a call is not a tensor."""

    numbers: list[float]
    needs: int
    half: bool  # a gradient is stored in half precision: it is never rescaled, which would round it twice
    kernels: ops.Kernels


def _takes_reference(*upstream: Tensor | None) -> bool:
    """Whether a backward is itself differentiated, or batched."""
    if torch.is_grad_enabled() or functorch_level() is not None:
        return True
    if _is_compiling():
        return False
    # What is_grads_batched=True sends is no level of torch.func.
    return any(g is not None and (_is_batched(g) or (forward_ad._current_level >= 0 and is_dual(g))) for g in upstream)


def _by_reference(
    call: Call, stats: bool, tensors: Sequence[Tensor], upstream: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients, differentiable again."""
    input, target, *params = tensors
    with torch.enable_grad():
        loss, rows = reference.softmax_loss(input, target, call.numbers, params)
        outputs = [loss, rows.logsumexp, rows.log_prob] if stats else [loss]
        pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if g is not None]
        by_slot = dict(zip(ops.slots_of(call.numbers), params, strict=True))
        wanted = {bit: input if bit == ops.INPUT else by_slot[bit] for bit in ops.needed(call.needs)}
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            list(wanted.values()),
            [g for _, g in pairs],
            create_graph=True,
            materialize_grads=True,
        )
    return _place(call, found)


def _by_kernels(
    call: Call, tensors: Sequence[Tensor], saved: Tensor | None, upstream: Sequence[Tensor | None]
) -> list[Tensor]:
    """The gradients by bit, once the upstream gradient is known."""
    input, target, *params = tensors
    kernels = call.kernels
    if kernels.dispatched is not None and observed(input, *(g for g in upstream if g is not None)):
        kernels = kernels.dispatched
    if saved is None:
        saved = input.new_empty((0, 2))
    found: list[Tensor] = kernels.softmax_loss_backward(
        *upstream, input, target, call.numbers, params, saved, call.needs
    )
    return found


def _place(call: Call, gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients in the order of a Function's arguments: call, input, target, *params."""
    by_bit = dict(zip(ops.needed(call.needs), gradients, strict=True))
    return [None, by_bit.get(ops.INPUT), None, *(by_bit.get(slot) for slot in ops.slots_of(call.numbers))]


class _SingleVisit(torch.autograd.Function):
    """A reduced loss whose gradients are made with it, for the upstream gradient that it nearly always gets: 1."""

    @staticmethod
    def forward(ctx: Any, call: Call, input: Tensor, target: Tensor, *params: Tensor) -> Tensor:
        loss: Tensor
        if call.needs == ONLY_INPUT:
            loss, gradient = call.kernels.softmax_loss_with_gradient(input, target, call.numbers, params)
            ctx.save_for_backward(gradient, input, target, *params)
        else:
            loss, gradients = call.kernels.softmax_loss_with_gradients(input, target, call.numbers, params, call.needs)
            ctx.save_for_backward(*gradients, input, target, *params)
        ctx.call = call
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        call: Call = ctx.call
        count = call.needs.bit_count()
        if _takes_reference(grad_loss):
            return tuple(_by_reference(call, False, ctx.saved_tensors[count:], (grad_loss,)))
        if observed(grad_loss):
            gradients = _by_kernels(call, ctx.saved_tensors[count:], None, (grad_loss, None, None))
            return tuple(_place(call, gradients))
        if call.kernels.refresh is not None:
            gradients = _refreshed(call, ctx.saved_tensors, grad_loss)
        else:
            upstream = grad_loss.item()
            # 0 * inf would be NaN in rows that are not read, whose gradient is 0 whatever comes.
            serves = upstream == 1.0 or (math.isfinite(upstream) and not call.half)
            try:
                saved = ctx.saved_tensors
            except RuntimeError:
                if not serves:
                    raise
                # Logits that were changed in place since are not needed again.
                saved = [tensor.data for tensor in ctx._raw_saved_tensors]
            if not serves:
                gradients = _by_kernels(call, saved[count:], None, (grad_loss, None, None))
            else:
                gradients = saved[:count]
                if upstream != 1.0:
                    gradients = [g * upstream if _keeps_graph() else g.mul_(upstream) for g in gradients]
                elif _keeps_graph():
                    gradients = [g.clone() for g in gradients]
        if call.needs == ONLY_INPUT and call.numbers[MASK] == 0:
            return None, gradients[0], None
        return tuple(_place(call, gradients))


def _refreshed(call: Call, saved: Sequence[Tensor], grad_loss: Tensor) -> list[Tensor]:
    """What was made for an upstream gradient of 1, for this one, which only the device knows."""
    count = call.needs.bit_count()
    gradients, (input, target, *params) = list(saved[:count]), saved[count:]
    # Handed out as they are, unless there will be another backward: then autograd clears what was saved.
    if _keeps_graph():
        gradients = [gradient.clone() for gradient in gradients]
    own = count
    if call.needs & ONLY_INPUT:
        assert call.kernels.refresh is not None
        # A second look at the rows where the upstream gradient is not 1.
        call.kernels.refresh(grad_loss, input, target, call.numbers, params, gradients[-1])
        own -= 1
    for index in range(own):
        # Not 0 * inf where only rows that are not read count.
        gradients[index] = torch.where(gradients[index] == 0, 0, gradients[index] * grad_loss)
    return gradients


# What Function.apply itself calls once it has found no torch.func transform, which the door has asked already.
single_visit: Callable[..., Tensor] = super(torch.autograd.Function, _SingleVisit).apply


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
        call: Call = ctx.call
        saved, *tensors = ctx.saved_tensors
        if _takes_reference(grad_loss):
            return tuple(_by_reference(call, False, tensors, (grad_loss,)))
        return tuple(_place(call, _by_kernels(call, tensors, saved, (grad_loss, None, None))))


class _SoftmaxStats(torch.autograd.Function):
    """The loss and its row statistics."""

    @staticmethod
    def forward(ctx: Any, call: Call, input: Tensor, target: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        loss, saved, *rows = call.kernels.softmax_stats(input, target, call.numbers, params)
        ctx.call = call
        ctx.save_for_backward(saved, input, target, *params)
        ctx.mark_non_differentiable(*rows[2:])
        ctx.set_materialize_grads(False)
        return loss, *rows

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        call: Call = ctx.call
        saved, *tensors = ctx.saved_tensors
        if _takes_reference(*upstream[:3]):
            return tuple(_by_reference(call, True, tensors, upstream[:3]))
        return tuple(_place(call, _by_kernels(call, tensors, saved, upstream[:3])))


softmax_loss: Callable[..., Tensor] = _SoftmaxLoss.apply
softmax_stats: Callable[..., tuple[Tensor, ...]] = _SoftmaxStats.apply
