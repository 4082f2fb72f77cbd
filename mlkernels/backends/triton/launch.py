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
    return call.run(losses=True, save=saved if save else None)[0], saved


def softmax_loss_with_gradient(
    input: Tensor, target: Tensor, numbers: Sequence[float], params: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    loss, gradients, factors = softmax_loss_with_gradients(input, target, numbers, params, 1 << INPUT)
    return loss, gradients[0], factors


def softmax_loss_with_gradients(
    input: Tensor, target: Tensor, numbers: Sequence[float], params: Sequence[Tensor], needs: int
) -> tuple[Tensor, list[Tensor], Tensor]:
    call = Arguments(input, target, numbers, params)
    return *call.run(losses=True, needs=needs), call.factors


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
    return call.run(losses=True, save=saved, stats=rows)[0], saved, *rows


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
    upstream = (grad_loss, grad_logsumexp, grad_log_prob, grad_entropy)
    call = Arguments(input, target, numbers, params)
    return call.run(saved=saved if saved.numel() else None, needs=needs, upstream=upstream)[1]


#: Each with how many tensors its arguments begin with.
_FUNCTIONS: dict[Callable[..., Any], int] = {
    softmax_loss: 2,
    softmax_loss_with_gradient: 2,
    softmax_loss_with_gradients: 2,
    softmax_stats: 2,
    softmax_loss_backward: 6,
    softmax_loss_refresh: 4,
}
#: What the dispatcher calls, having made plain memory of every tensor.
OPERATORS = {one.__name__: replay.replayed(one, leading, one) for one, leading in _FUNCTIONS.items()}
#: The same without a dispatcher in between, unless there is something for it to do.
EAGER = {
    one.__name__: replay.replayed(one, leading, getattr(torch.ops.mlkernels_triton, one.__name__).default)
    for one, leading in _FUNCTIONS.items()
}
