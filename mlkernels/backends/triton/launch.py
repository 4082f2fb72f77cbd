"""The package's operators (see ``ops.py``) on any device that Triton serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...numbering import INPUT
from . import replay
from .arguments import Arguments


def softmax_loss(
    input: Tensor, target: Tensor, numbers: Sequence[float], params: Sequence[Tensor], save: bool
) -> tuple[Tensor, Tensor]:
    call = Arguments(input, target, numbers, params)
    saved = call.statistics() if save else call.empty(0, 2)
    loss, _ = call.run(losses=True, save=saved if save else None)
    assert loss is not None
    return loss, saved


def softmax_loss_with_gradient(
    input: Tensor, target: Tensor, numbers: Sequence[float], params: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    call = Arguments(input, target, numbers, params)
    gradient = replay.empty_like(input)
    loss, _ = call.run(losses=True, gradient=gradient)
    assert loss is not None
    return loss, gradient, call.factors


def softmax_loss_with_gradients(
    input: Tensor, target: Tensor, numbers: Sequence[float], params: Sequence[Tensor], needs: int
) -> tuple[Tensor, list[Tensor], Tensor]:
    call = Arguments(input, target, numbers, params)
    gradient = replay.empty_like(input) if needs >> INPUT & 1 else None
    loss, found = call.run(losses=True, gradient=gradient, needs=needs)
    assert loss is not None
    return loss, [*found.values(), *([] if gradient is None else [gradient])], call.factors


def softmax_loss_refresh(
    grad_loss: Tensor, factors: Tensor, input: Tensor, target: Tensor, numbers: Sequence[float],
    params: Sequence[Tensor], gradient: Tensor,
) -> None:  # fmt: skip
    """Writes a gradient that was made for an upstream gradient of 1 anew, unless the device finds that it is 1."""
    call = Arguments(input, target, numbers, params, factors)
    call.run(gradient=gradient, upstream=(grad_loss, None, None, None), conditional=True)


def softmax_stats(
    input: Tensor, target: Tensor, numbers: Sequence[float], params: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = Arguments(input, target, numbers, params)
    saved = call.statistics()
    logsumexp, log_prob, entropy, confidence = [call.empty(*target.shape) for _ in range(4)]
    prediction, rank = [call.empty(*target.shape, dtype=torch.int64) for _ in range(2)]
    rows = (logsumexp, log_prob, entropy, prediction, confidence, rank)
    loss, _ = call.run(losses=True, save=saved, stats=rows)
    assert loss is not None
    return loss, saved, *rows


def softmax_loss_backward(
    grad_loss: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    input: Tensor,
    target: Tensor,
    numbers: Sequence[float],
    params: Sequence[Tensor],
    saved: Tensor,
    needs: int,
) -> list[Tensor]:
    call = Arguments(input, target, numbers, params)
    gradient = replay.empty_like(input) if needs >> INPUT & 1 else None
    _, found = call.run(
        saved=saved if saved.numel() else None,
        gradient=gradient,
        needs=needs,
        upstream=(grad_loss, grad_logsumexp, grad_log_prob, grad_entropy),
    )
    return [*found.values(), *([] if gradient is None else [gradient])]


_LEADING = {softmax_loss_refresh: 4, softmax_loss_backward: 6}
_FUNCTIONS = (
    softmax_loss,
    softmax_loss_with_gradient,
    softmax_loss_with_gradients,
    softmax_stats,
    softmax_loss_backward,
    softmax_loss_refresh,
)
#: What the dispatcher calls, having made plain memory of every tensor.
OPERATORS: dict[str, Callable[..., Any]] = {
    function.__name__: replay.replayed(function, _LEADING.get(function, 2), function) for function in _FUNCTIONS
}
#: The same without a dispatcher in between, unless there is something for it to do.
EAGER: dict[str, Callable[..., Any]] = {
    function.__name__: replay.replayed(
        function, _LEADING.get(function, 2), getattr(torch.ops.mlkernels_triton, function.__name__).default
    )
    for function in _FUNCTIONS
}
