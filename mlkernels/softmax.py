"""The one door to the family: check the tensors, choose the backend, autograd, reduce."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from typing_extensions import Never, Unpack

from . import checks, ops
from .backends import choose, reference
from .checks import (
    HALF,
    check_class_vector,
    check_index,
    check_indices,
    check_number,
    check_parameter,
    check_range,
    check_reduction,
    check_tables,
    check_tensors,
    unknown_keywords,
)
from .checks import functorch_level as _functorch_level
from .spec import MASK, SLOTS, TRAINABLE, BackendName, HeadKind, Number, ReductionName, Slot, Spec, TransformKind


class RowStats(NamedTuple):
    """What the kernel learned of each row, target-shaped. Ignored rows hold 0, and -1 as prediction.

    Attributes:
        logsumexp: of the final z; differentiable.
        log_prob: log p of the target, of the final z; differentiable.
        prediction: the class of the largest logit before transform and scale; the lowest index on ties, -1 where the
            row holds a NaN.
        confidence: the target's logit minus the largest other one, before transform and scale; +inf for C = 1.
        rank: how many logits are larger than the target's (0: right; < n: right among the top n).
    """

    logsumexp: Tensor
    log_prob: Tensor
    prediction: Tensor
    confidence: Tensor
    rank: Tensor


_TRAINABLE = sum(1 << slot for slot in TRAINABLE)
_DEFAULTS = [0.0] * SLOTS
_DEFAULTS[Slot.LOGIT_NORM] = 1.0
_SMOOTHING, _Z_LOSS, _SOFTCAP = int(Slot.SMOOTHING), int(Slot.Z_LOSS), int(Slot.SOFTCAP)
_WEIGHT, _ADJUSTMENT, _GROUP = int(Slot.WEIGHT), int(Slot.ADJUSTMENT), int(Slot.GROUP)
_NORM, _LOGIT_NORM = int(Slot.NORM), int(Slot.LOGIT_NORM)
_ETA = int(Slot.ETA)
_TABLES = frozenset(int(s) for s in (Slot.TRANSFORM_A, Slot.TRANSFORM_B, Slot.HEAD_A, Slot.HEAD_B))
_HEAD_C, _HEAD_D = int(Slot.HEAD_C), int(Slot.HEAD_D)
_GAMMA_KAPPA = frozenset({_HEAD_C, _HEAD_D})

_ONLY_INPUT = 1 << ops.INPUT
_PLAIN = frozenset({float, int, str, type(None)})
_MOST_CALLS = 1024


# ---- autograd --------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """What of a call is not a tensor."""

    numbers: list[float]
    needs: int
    half: bool  # a gradient is stored in half precision: it is never rescaled, which would round it twice
    kernels: ops.Kernels


def _by_reference(
    call: _Call, stats: bool, tensors: Sequence[Tensor], upstream: Sequence[Tensor | None]
) -> dict[int, Tensor]:
    """The gradients by bit, differentiable again."""
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
    return dict(zip(wanted, found, strict=True))


def _place(call: _Call, gradients: dict[int, Tensor]) -> list[Tensor | None]:
    """The gradients in the order of a Function's arguments: call, input, target, *params."""
    return [None, gradients.get(ops.INPUT), None, *(gradients.get(slot) for slot in ops.slots_of(call.numbers))]


class _SingleVisit(torch.autograd.Function):
    """A reduced loss whose gradients are made with it, for the upstream gradient that it nearly always gets: 1."""

    @staticmethod
    def forward(ctx: Any, call: _Call, input: Tensor, target: Tensor, *params: Tensor) -> Tensor:
        loss: Tensor
        # Not saved for backward: dropped when handed out, so that the leaf can take it without a copy.
        if call.needs == _ONLY_INPUT:
            loss, *ctx.gradients = call.kernels.softmax_loss_with_gradient(input, target, call.numbers, params)
        else:
            loss, ctx.gradients = call.kernels.softmax_loss_with_gradients(
                input, target, call.numbers, params, call.needs
            )
        ctx.call = call
        ctx.save_for_backward(input, target, *params)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        call: _Call = ctx.call
        if torch.is_grad_enabled() or _functorch_level() is not None:
            return tuple(_place(call, _by_reference(call, False, ctx.saved_tensors, (grad_loss,))))
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None and call.kernels.refresh is not None:
            # A second look at the rows where the upstream gradient is not 1; only the device knows.
            input, target, *params = ctx.saved_tensors
            if call.needs & _ONLY_INPUT:
                call.kernels.refresh(grad_loss, input, target, call.numbers, params, gradients[-1])
            for gradient in gradients[: -1 if call.needs & _ONLY_INPUT else None]:
                gradient.mul_(grad_loss)
        elif gradients is not None:
            upstream = grad_loss.item()
            if upstream != 1.0:
                if call.half:
                    gradients = None
                else:
                    for gradient in gradients:
                        gradient.mul_(upstream)
        if gradients is None:
            input, target, *params = ctx.saved_tensors
            gradients = call.kernels.softmax_loss_backward(
                grad_loss, None, None, input, target, call.numbers, params, input.new_empty((0, 2)), call.needs
            )
        if call.needs == _ONLY_INPUT and call.numbers[MASK] == 0:
            return None, gradients[0], None
        return tuple(_place(call, dict(zip(ops.needed(call.needs), gradients, strict=True))))


# What Function.apply itself calls once it has found no torch.func transform, which the door has asked already.
_single_visit = super(torch.autograd.Function, _SingleVisit).apply


class _SoftmaxLoss(torch.autograd.Function):
    """The loss alone, its gradients made once the upstream gradient is known."""

    @staticmethod
    def forward(ctx: Any, call: _Call, input: Tensor, target: Tensor, *params: Tensor) -> Tensor:
        loss: Tensor
        loss, saved = call.kernels.softmax_loss(input, target, call.numbers, params, True)
        ctx.call = call
        ctx.save_for_backward(input, target, saved, *params)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        call: _Call = ctx.call
        input, target, saved, *params = ctx.saved_tensors
        if torch.is_grad_enabled() or _functorch_level() is not None:
            return tuple(_place(call, _by_reference(call, False, (input, target, *params), (grad_loss,))))
        gradients = call.kernels.softmax_loss_backward(
            grad_loss, None, None, input, target, call.numbers, params, saved, call.needs
        )
        return tuple(_place(call, dict(zip(ops.needed(call.needs), gradients, strict=True))))


class _SoftmaxStats(torch.autograd.Function):
    """The loss and its row statistics."""

    @staticmethod
    def forward(ctx: Any, call: _Call, input: Tensor, target: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        loss, saved, *rows = call.kernels.softmax_stats(input, target, call.numbers, params)
        ctx.call = call
        ctx.save_for_backward(input, target, saved, *params)
        ctx.mark_non_differentiable(*rows[2:])
        ctx.set_materialize_grads(False)
        return loss, *rows

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        call: _Call = ctx.call
        input, target, saved, *params = ctx.saved_tensors
        if torch.is_grad_enabled() or _functorch_level() is not None:
            found = _by_reference(call, True, (input, target, *params), upstream[:3])
            return tuple(_place(call, found))
        gradients = call.kernels.softmax_loss_backward(
            *upstream[:3], input, target, call.numbers, params, saved, call.needs
        )
        return tuple(_place(call, dict(zip(ops.needed(call.needs), gradients, strict=True))))


_calls: dict[tuple[object, ...], _Call] = {}

# ---- the door --------------------------------------------------------------------------------------------------------


class Common(TypedDict, total=False):
    """The keyword arguments that the losses of the family share; see :mod:`mlkernels.functional`."""

    weight: Tensor | None
    ignore_index: int
    reduction: ReductionName
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_adjustment: Tensor | None
    backend: BackendName | None


def apply(
    spec: Spec,
    values: Sequence[Number | None],
    input: Tensor,
    target: Tensor,
    *,
    group: Tensor | None = None,
    return_stats: bool = False,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_adjustment: Tensor | None = None,
    backend: BackendName | None = None,
    **unknown: Never,
) -> tuple[Tensor, RowStats | None]:
    """Any loss of the family: ``values`` are its numbers and tensors, in the order of ``spec.slots``."""
    if unknown:
        from . import functional

        raise unknown_keywords(getattr(functional, spec.function), unknown, COMMON)
    if type(ignore_index) is not int:
        ignore_index = check_index("ignore_index", ignore_index)
    target = check_tensors(input, target, ignore_index)
    if input.dim() == 1:
        return _single_row(
            spec, values, input, target, group, return_stats,
            weight=weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
            z_loss=z_loss, softcap=softcap, logit_adjustment=logit_adjustment, backend=backend,
        )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    key = (spec, reduction, ignore_index, label_smoothing, z_loss, softcap, *values)
    tensors: dict[int, Tensor] = {}
    # A loss whose parameters are numbers is the same call every time: nothing of it is looked at twice.
    plain = not compiling and _PLAIN.issuperset(map(type, key[1:]))
    call = _calls.get(key) if plain else None
    if call is None:
        numbers, tensors = _numbers(spec, values, ignore_index, reduction, label_smoothing, z_loss, softcap)
        call = _Call(numbers, _ONLY_INPUT, False, ops.NATIVE)
        if plain:
            if len(_calls) >= _MOST_CALLS:  # scheduled numbers: each is used a few times and never again
                _calls.clear()
            _calls[key] = call

    grad = torch.is_grad_enabled()
    dtype = input.dtype
    params: list[Tensor] = []
    needs = _ONLY_INPUT if grad and input.requires_grad else 0
    half = dtype == torch.bfloat16
    if tensors or weight is not None or logit_adjustment is not None or group is not None:
        mask = 0
        if tensors or group is not None:
            group = _check_values(spec, tensors, group, input, target)
            if group is not None:
                tensors[_GROUP] = group
        for slot, name, vector in ((_WEIGHT, "weight", weight), (_ADJUSTMENT, "logit_adjustment", logit_adjustment)):
            if vector is not None:
                check_class_vector(name, vector, input, input.shape[1])
                tensors[slot] = vector
        for slot in sorted(tensors):
            tensor = tensors[slot]
            params.append(tensor)
            mask |= 1 << slot
            half |= tensor.dtype in HALF
            if grad and tensor.requires_grad:
                needs |= (1 << slot) & _TRAINABLE
        numbers = call.numbers.copy()
        numbers[MASK] = float(mask)
        call = _Call(numbers, needs, half, ops.NATIVE)
    elif half or needs != _ONLY_INPUT:
        call = _Call(call.numbers, needs, half, ops.NATIVE)

    chosen = choose(input.device, backend, input.shape[1], input.dim() > 2 and input.stride(1) != 1)
    by_reference = chosen == "reference" or _functorch_level() is not None
    if by_reference or chosen != "cpu":  # the CPU's kernels look at the indices while they read them
        check_indices("target", target, input.shape[1], ignore_index)
        if group is not None:
            count = next(t.shape[0] for slot, t in tensors.items() if slot in _TABLES and t.dim() == 2)
            check_indices("group", group, count)
    if by_reference:
        loss, rows = reference.softmax_loss(input, target, call.numbers, params)
        return loss, RowStats(*rows) if return_stats else None
    # One visit where it pays. An fp16 gradient is written only when the upstream is known: a GradScaler's 65536 would
    # rescale what has already underflowed.
    split = reduction == "none" or compiling or dtype == torch.float16
    if chosen != "cpu":
        if chosen == "cuda":
            call = call._replace(kernels=ops.CUDA)
        else:
            call = call._replace(kernels=ops.TRITON_TRACED if compiling else ops.triton())
        # Nobody on the host knows the upstream gradient, so a parameter's is always multiplied by it.
        split = split or (needs != _ONLY_INPUT and any(param.dtype in HALF for param in params))
    if return_stats:
        if needs:
            loss, *outputs = _SoftmaxStats.apply(call, input, target, *params)  # type: ignore[no-untyped-call]
        else:
            loss, _, *outputs = call.kernels.softmax_stats(input, target, call.numbers, params)
        return loss, RowStats(*outputs)
    if not needs:
        return call.kernels.softmax_loss(input, target, call.numbers, params, False)[0], None
    if split:
        return _SoftmaxLoss.apply(call, input, target, *params), None  # type: ignore[no-untyped-call]
    return _single_visit(call, input, target, *params), None  # type: ignore[no-untyped-call]


def _numbers(
    spec: Spec,
    values: Sequence[Number | None],
    ignore_index: int,
    reduction: ReductionName,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> tuple[list[float], dict[int, Tensor]]:
    """The numbers that cross the op boundary, but for the mask, and the tensors by slot."""
    check_index("ignore_index", ignore_index)
    label_smoothing = check_number("label_smoothing", label_smoothing)
    z_loss = check_number("z_loss", z_loss)
    plain = softcap is None and label_smoothing == 0 and z_loss == 0
    consts = _DEFAULTS[: spec.width if plain else SLOTS]
    tensors: dict[int, Tensor] = {}
    for (slot, name), word, value in zip(spec.slots, spec.words, values, strict=True):
        if isinstance(value, Tensor):
            tensors[slot] = value
        elif slot in spec.tables:
            raise TypeError(
                f"{word} takes a floating tensor of shape (M,) or (G, M), got "
                f"{'a number' if isinstance(value, (int, float)) else type(value).__name__}"
            )
        elif value is not None or slot not in (_NORM, _LOGIT_NORM):
            takes = "a number or a floating tensor" if slot in TRAINABLE else "a number"
            consts[slot] = check_number(word, value, name, takes)  # type: ignore[arg-type]
    if spec.head == HeadKind.MODULATED and consts[_HEAD_C] + consts[_HEAD_D] < 1 and not _GAMMA_KAPPA & tensors.keys():
        raise ValueError(
            "gamma + kappa must be >= 1, or the gradient diverges where p = 1; "
            f"got gamma = {consts[_HEAD_C]}, kappa = {consts[_HEAD_D]}"
        )
    if spec.transform == TransformKind.MARGIN and spec.ids[3] == 1 and consts[4] != 1 and 4 not in tensors:
        raise ValueError(f"beyond_pi='linear' needs {spec.words[0]} = 1, got {spec.words[0]} = {consts[4]}")
    if not plain:
        consts[_SMOOTHING] = label_smoothing
        consts[_Z_LOSS] = z_loss
        if softcap is not None:
            consts[_SOFTCAP] = check_number("softcap", softcap)
    return [*map(float, spec.ids), float(check_reduction(reduction)), float(ignore_index), 0.0, *consts], tensors


def _check_values(
    spec: Spec, tensors: dict[int, Tensor], group: Tensor | None, input: Tensor, target: Tensor
) -> Tensor | None:
    """Checks the tensors among the values; returns the group as every backend reads it."""
    if spec.tables or group is not None:
        group = check_tables(spec, tensors, group, input, target)
    on_host = input.device.type == "cpu" and not checks.traced()
    for (slot, name), word in zip(spec.slots, spec.words, strict=True):
        tensor = tensors.get(slot)
        if tensor is None or slot in spec.tables:
            continue
        if slot not in TRAINABLE and slot != _ETA:
            raise TypeError(f"{word} takes a number, got a tensor")
        if slot == _ETA and tensor.requires_grad:
            raise ValueError(f"{word} has no gradient (it draws a mask): it must not require one; pass eta.detach()")
        tensors[slot] = check_parameter(word, tensor, input, target)
        if on_host:
            check_range(word, tensor, name)
    return group


def _single_row(
    spec: Spec,
    values: Sequence[Number | None],
    input: Tensor,
    target: Tensor,
    group: Tensor | None,
    return_stats: bool,
    **common: Unpack[Common],
) -> tuple[Tensor, RowStats | None]:
    """(C,) with a 0-d target: a batch of one, its results 0-d again."""

    def per_row(value: Number | None) -> Number | None:
        # target.shape + (1,) is (1,) here; (1,) is per class only if there is one class.
        one = isinstance(value, Tensor) and value.dim() == 1 and value.shape[0] == 1 != input.shape[0]
        return value.unsqueeze(0) if one else value  # type: ignore[union-attr]

    if group is not None:
        group = group.unsqueeze(0)
    row, label = input.unsqueeze(0), target.unsqueeze(0)
    own = tuple(per_row(value) for value in values)
    loss, rows = apply(spec, own, row, label, group=group, return_stats=return_stats, **common)
    return loss.reshape(()), None if rows is None else RowStats(*(row.squeeze(0) for row in rows))


#: The shared arguments and their defaults.
COMMON = {
    name: parameter.default
    for name, parameter in inspect.signature(apply).parameters.items()
    if name in Common.__annotations__
}
