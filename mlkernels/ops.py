"""The schemas of the package's operators, and what they return without being run.

The operators are defined here, so they exist without a compiler; C++ only implements them. They carry no autograd of
their own: ``softmax.py`` gives them their backward, at half the boundary cost of a registered one.

The arguments that every operator of the family shares:

* ``numbers``: ``Spec.ids``, then reduction, ignore_index and the mask of the slots that hold tensors (each exactly a
  float), then one float per :class:`mlkernels.spec.Slot`; those that are left out at the end are 0. One list, because
  every list that crosses the boundary costs microseconds;
* ``params``: the tensors, in the order of their slots;
* ``needs``: bit s asks for the gradient of slot s, bit ``INPUT`` for that of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .spec import MASK, REDUCTION, SLOTS, Reduction

#: The bit of ``needs`` that stands for the logits.
INPUT = SLOTS

_library = torch.library.Library("mlkernels", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_COMMON = "Tensor input, Tensor target, float[] numbers, Tensor[] params"

_UPSTREAM = "Tensor? grad_loss, Tensor? grad_logsumexp, Tensor? grad_log_prob"
_SCHEMAS = (
    # loss; (m, log S) per row where save.
    f"softmax_loss({_COMMON}, bool save) -> (Tensor, Tensor)",
    # loss; the gradient of the logits for an upstream gradient of 1, in the same visit of each row.
    f"softmax_loss_with_gradient({_COMMON}) -> (Tensor, Tensor)",
    # The same, for whatever `needs` asks.
    f"softmax_loss_with_gradients({_COMMON}, int needs) -> (Tensor, Tensor[])",
    # loss, (m, log S) and RowStats' logsumexp, log_prob, prediction, confidence, rank.
    f"softmax_stats({_COMMON}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # `saved` may be empty: the row statistics are then computed again.
    f"softmax_loss_backward({_UPSTREAM}, {_COMMON}, Tensor saved, int needs) -> Tensor[]",
)
for _schema in _SCHEMAS:
    _library.define(_schema, tags=_tags)


def needed(needs: int) -> list[int]:
    """The bits that are set, lowest first; the logits come last."""
    return [bit for bit in range(SLOTS + 1) if needs >> bit & 1]


def slots_of(numbers: Sequence[float]) -> list[int]:
    """The slots that hold tensors, in the order of params."""
    mask = int(numbers[MASK])
    return [slot for slot in range(SLOTS) if mask >> slot & 1]


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gradients(input: Tensor, numbers: Sequence[float], params: Sequence[Tensor], needs: int) -> list[Tensor]:
    by_slot = dict(zip(slots_of(numbers), params, strict=True))
    return [
        torch.empty_like(input)
        if bit == INPUT
        else torch.empty_like(by_slot[bit], memory_format=torch.contiguous_format)
        for bit in needed(needs)
    ]


def _loss_like(input: Tensor, target: Tensor, numbers: Sequence[float]) -> Tensor:
    shape = target.shape if numbers[REDUCTION] == Reduction.NONE else ()
    return input.new_empty(shape, dtype=_accumulate(input.dtype))


@torch.library.register_fake("mlkernels::softmax_loss", lib=_library)
def _softmax_loss(
    input: Tensor, target: Tensor, numbers: Sequence[float], params: Sequence[Tensor], save: bool
) -> tuple[Tensor, Tensor]:
    saved = input.new_empty((target.numel() if save else 0, 2), dtype=_accumulate(input.dtype))
    return _loss_like(input, target, numbers), saved


@torch.library.register_fake("mlkernels::softmax_loss_with_gradient", lib=_library)
def _softmax_loss_with_gradient(
    input: Tensor, target: Tensor, numbers: Sequence[float], params: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    return _loss_like(input, target, numbers), torch.empty_like(input)


@torch.library.register_fake("mlkernels::softmax_loss_with_gradients", lib=_library)
def _softmax_loss_with_gradients(
    input: Tensor, target: Tensor, numbers: Sequence[float], params: Sequence[Tensor], needs: int
) -> tuple[Tensor, list[Tensor]]:
    return _loss_like(input, target, numbers), _gradients(input, numbers, params, needs)


@torch.library.register_fake("mlkernels::softmax_stats", lib=_library)
def _softmax_stats(
    input: Tensor, target: Tensor, numbers: Sequence[float], params: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _accumulate(input.dtype)
    saved = input.new_empty((target.numel(), 2), dtype=dtype)
    real = [input.new_empty(target.shape, dtype=dtype) for _ in range(3)]
    whole = [input.new_empty(target.shape, dtype=torch.int64) for _ in range(2)]
    return _loss_like(input, target, numbers), saved, real[0], real[1], whole[0], real[2], whole[1]


@torch.library.register_fake("mlkernels::softmax_loss_backward", lib=_library)
def _softmax_loss_backward(
    grad_loss: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_log_prob: Tensor | None,
    input: Tensor,
    target: Tensor,
    numbers: Sequence[float],
    params: Sequence[Tensor],
    saved: Tensor,
    needs: int,
) -> list[Tensor]:
    return _gradients(input, numbers, params, needs)


softmax_loss = torch.ops.mlkernels.softmax_loss.default
softmax_loss_with_gradient = torch.ops.mlkernels.softmax_loss_with_gradient.default
softmax_loss_with_gradients = torch.ops.mlkernels.softmax_loss_with_gradients.default
softmax_stats = torch.ops.mlkernels.softmax_stats.default
softmax_loss_backward = torch.ops.mlkernels.softmax_loss_backward.default
