"""A loss's arguments, each looked at once: what they must be, and the :class:`Call` that they come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.autograd import forward_ad
from typing_extensions import Never, Unpack

from . import ops
from .backends import check_backend, choose
from .checks import (
    HALF,
    check_class_vector,
    check_floating,
    check_index,
    check_indices,
    check_input,
    check_normalizer,
    check_number,
    check_parameter,
    check_plain,
    check_range,
    check_reduction,
    check_row_weight,
    check_target,
    unknown_keywords,
    wrong_type,
)
from .numbering import EXTRAS, INPUT, PER_CLASS, SLOTS, TRAINABLE, BeyondPi, HeadKind, Slot, TransformKind
from .spec import BackendName, Number, ReductionName, Spec
from .tables import check_tables, table_groups
from .tracing import PLAIN_TENSORS, functorch_level, is_dual, is_jit_tracing, modes

ONLY_INPUT = 1 << INPUT

DEFAULTS = [0.0] * SLOTS
DEFAULTS[Slot.LOGIT_NORM] = 1.0
_GROUP, _ROW_WEIGHT, _NORMALIZER = int(Slot.GROUP), int(Slot.ROW_WEIGHT), int(Slot.NORMALIZER)
_NORM, _LOGIT_NORM, _ETA = int(Slot.NORM), int(Slot.LOGIT_NORM), int(Slot.ETA)
_NUMBERS = tuple((int(slot), name) for slot, (name, _) in EXTRAS.items() if slot < Slot.WEIGHT)
_HEAD_C, _HEAD_D = int(Slot.HEAD_C), int(Slot.HEAD_D)
_M1 = int(Slot.TRANSFORM_A)
_TRAINABLE = frozenset(map(int, TRAINABLE))

#: Types of numbers that a call is remembered by, and how many calls are.
PLAIN = frozenset({float, int, str, type(None)})
MOST_CALLS = 1024
_BFLOAT16, _FLOAT16 = torch.bfloat16, torch.float16
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled


class Options(TypedDict, total=False):
    r"""The keyword arguments that the losses of the family share, and that their modules keep.

    Args:
        weight: (C,) weight of each class, any floating dtype, not differentiated.
        ignore_index: rows with this label (compared as 64-bit integers) are not read: loss 0, gradient exactly 0.
        reduction: ``"mean"`` (divides by the sum of ``weight[target]`` over the rows that are not ignored), ``"sum"``
            or ``"none"``.
        label_smoothing: :math:`\epsilon`: a row's loss is
            :math:`(1-\epsilon)\,\omega_y\varphi(\log p_y) - \frac{\epsilon}{C}\sum_j\omega_j\log p_j`.
        z_loss: adds z_loss * logsumexp(z)^2, never class-weighted; "mean" divides it by the number of rows not ignored.
        softcap: c: the logits become :math:`c\tanh(f/c)` first.
        logit_adjustment: (C,), added to the logits after softcap (priors of long-tailed data), not differentiated.
        backend: None picks; see :func:`mlkernels.available_backends`.
    """

    weight: Tensor | None
    ignore_index: int
    reduction: ReductionName
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_adjustment: Tensor | None
    backend: BackendName | None


class PerCall(TypedDict, total=False):
    """Those that belong to a batch, which modules take in their calls.

    Args:
        row_weight: of target's shape, floating, of either sign: a factor of each row's whole loss, under every
            reduction, not differentiated. What "mean" divides by stays what it is.
        normalizer: > 0, a number or a 0-d tensor (floating or integer), not differentiated: what "mean" divides by in
            the place of its own divisors: the tokens of all micro-batches, say, or of all ranks. Where no row is kept
            the loss is then 0, not NaN.
    """

    row_weight: Tensor | None
    normalizer: Number | None


class Common(Options, PerCall, total=False):
    """All of them, which functions take."""


class Call(NamedTuple):
    """What of a call is not a tensor."""

    numbers: list[float]
    needs: int
    half: bool  # a gradient is stored in half precision: it is never rescaled, which would round it twice
    apart: bool  # gradients are made once the upstream gradient is known, not with the loss
    kernels: ops.Kernels


#: The public functions, which enter themselves: what an error about a keyword says that they take.
functions: dict[str, Callable[..., object]] = {}
# A loss that was called before is the same call again: of its numbers nothing is looked at twice.
_calls: dict[tuple[object, ...], Call] = {}


def bind(
    spec: Spec,
    values: Sequence[Number | None],
    input: Tensor,
    target: Tensor,
    group: Tensor | None,
    /,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_adjustment: Tensor | None = None,
    backend: BackendName | None = None,
    row_weight: Tensor | None = None,
    normalizer: Number | None = None,
    **unknown: Never,
) -> tuple[Call, Tensor, Tensor, list[Tensor]]:
    """Every argument checked: the call, input and target as backends read them, and the other tensors by slot.

    A single row comes back as a batch of one.
    """
    if unknown:
        raise unknown_keywords(functions[spec.function], unknown, COMMON)
    if type(ignore_index) is not int:
        ignore_index = check_index("ignore_index", ignore_index)
    check_input(input)
    shape = input.shape
    target = check_target(input, shape, target, ignore_index)
    if row_weight is not None:
        check_row_weight(row_weight, input, target.shape)
    if len(shape) == 1:
        values, input, target, group, row_weight = _as_batch(values, input, target, group, row_weight)
        shape = input.shape
    dtype = input.dtype
    observed = _is_compiling() or modes() > 0 or type(input) not in PLAIN_TENSORS
    grad = _is_grad_enabled()
    needs = ONLY_INPUT if grad and input.requires_grad else 0
    shared = (reduction, ignore_index, label_smoothing, z_loss, softcap)  # and normalizer: in the order of _NUMBERS
    numbers: tuple[Any, ...] = (*shared, normalizer, *values)
    plain = PLAIN.issuperset(map(type, numbers))
    tensors: dict[int, Tensor] = {}
    params: list[Tensor] = []
    mask, half_param = 0, False
    if not (plain and weight is logit_adjustment is row_weight is group is normalizer is None) or spec.tables:
        per_class = (weight, logit_adjustment)
        tensors, normalizer, own = _tensors(
            spec, values, input, target, group, per_class, row_weight, normalizer, reduction
        )
        numbers = (*shared, normalizer, *own)
        plain = PLAIN.issuperset(map(type, numbers))
        for slot in sorted(tensors):
            tensor = tensors[slot]
            params.append(tensor)
            mask |= 1 << slot
            if grad and tensor.requires_grad and slot in _TRAINABLE:
                needs |= 1 << slot
                half_param = half_param or tensor.dtype in HALF

    chosen = choose(input.device, backend, shape[1], len(shape) > 2 and input.stride(1) != 1)
    dual = forward_ad._current_level >= 0
    # Kernels are opaque to torch.func, and would lose a tangent; torch.jit.trace would save none of ours.
    traced_by_jit = not _is_compiling() and is_jit_tracing()
    if functorch_level() is not None or traced_by_jit or (dual and any(map(is_dual, (input, *params)))):
        chosen = "reference"
    half = half_param or dtype == _BFLOAT16
    # Gradients in the loss's own pass where it pays. An fp16 gradient is written only when the upstream is known: a
    # GradScaler's 65536 would rescale what has already underflowed. On a GPU nobody on the host knows it: a parameter's
    # is always multiplied.
    apart = reduction == "none" or dtype == _FLOAT16 or observed or (half_param and chosen != "cpu")
    key = (*numbers, spec.ids, chosen, needs, mask, half, apart)
    plain = plain and not observed
    call = _calls.get(key) if plain else None
    if call is None:
        call = Call(_numbers(spec, mask, *numbers), needs, half, apart, ops.kernels(chosen, observed))
        if plain:
            if len(_calls) >= MOST_CALLS:  # scheduled numbers: each is used a few times and never again
                _calls.clear()
            _calls[key] = call
    if chosen != "cpu":  # the CPU's kernels look at the indices while they read them
        check_indices("target", target, shape[1], ignore_index)
        if _GROUP in tensors:
            check_indices("group", tensors[_GROUP], next(len(tensors[slot]) for slot in spec.tables))
    if observed and _is_compiling():
        # Dynamo refuses a Function that takes a tensor twice, as tables or scales that are alike may be.
        params = [p.view_as(p) if any(p is other for other in params[:i]) else p for i, p in enumerate(params)]
    return call, input, target, params


#: The defaults of what all losses take.
COMMON: dict[str, Any] = dict(bind.__kwdefaults__ or {})


def _tensors(
    spec: Spec,
    values: Sequence[Number | None],
    input: Tensor,
    target: Tensor,
    group: Tensor | None,
    per_class: Sequence[Tensor | None],
    row_weight: Tensor | None,
    normalizer: Number | None,
    reduction: ReductionName,
) -> tuple[dict[int, Tensor], float | None, Sequence[Number | None]]:
    """All tensors, checked, by slot; the normalizer and the values that are none, with None in the places of others."""
    tensors: dict[int, Tensor] = {}
    if group is not None or normalizer is not None or spec.tables or not PLAIN.issuperset(map(type, values)):
        tensors, values = _parted(spec, values)
        if normalizer is not None:
            normalizer = check_normalizer(normalizer, input, reduction)
        if isinstance(normalizer, Tensor):
            tensors[_NORMALIZER], normalizer = normalizer, None
        if group is not None:
            tensors[_GROUP] = group
        _check_tensors(spec, tensors, input, target)
    for slot, vector in zip(PER_CLASS, per_class, strict=True):
        if vector is not None:
            check_class_vector(PER_CLASS[slot], vector, input, input.shape[1])
            tensors[slot] = vector
    if row_weight is not None:
        tensors[_ROW_WEIGHT] = row_weight
    return tensors, normalizer, values


def _parted(spec: Spec, values: Sequence[Number | None]) -> tuple[dict[int, Tensor], list[float | None]]:
    """The tensors among the values by slot, and the numbers with None in the places of tensors."""
    tensors: dict[int, Tensor] = {}
    numbers: list[float | None] = []
    for (slot, _, word), value in zip(spec.values, values, strict=True):
        if isinstance(value, Tensor):
            tensors[slot] = value
            numbers.append(None)
        elif slot in spec.tables:
            raise wrong_type(word, "a floating tensor of shape (M,) or (G, M)", value)
        else:
            numbers.append(value)
    return tensors, numbers


def _numbers(
    spec: Spec,
    mask: int,
    reduction: ReductionName,
    ignore_index: int,
    *values: float | None,
) -> list[float]:
    """What crosses the op boundary beside the tensors, of which the mask says where they are.

    Args:
        values: those of _NUMBERS, then the loss's own.
    """
    check_index("ignore_index", ignore_index)
    reduced = check_reduction(reduction)
    consts, width = DEFAULTS.copy(), spec.width
    for (slot, name), value in zip(_NUMBERS, values, strict=False):
        if value is not None or COMMON[name] is not None:
            consts[slot] = check_number(name, value)  # type: ignore[arg-type]
            width = SLOTS if consts[slot] else width
    for (slot, name, word), value in zip(spec.values, values[len(_NUMBERS) :], strict=True):
        if not mask >> slot & 1 and (value is not None or slot not in (_NORM, _LOGIT_NORM)):
            takes = "a number or a floating tensor" if slot in _TRAINABLE else "a number"
            consts[slot] = check_number(word, value, name, takes)  # type: ignore[arg-type]
    exponents = mask & (1 << _HEAD_C | 1 << _HEAD_D)
    if spec.ids.head == HeadKind.MODULATED and consts[_HEAD_C] + consts[_HEAD_D] < 1 and not exponents:
        raise ValueError(
            "gamma + kappa must be >= 1, or the gradient diverges where p = 1; "
            f"got gamma = {consts[_HEAD_C]}, kappa = {consts[_HEAD_D]}"
        )
    linear = spec.ids.transform == TransformKind.MARGIN and spec.ids.beyond_pi == BeyondPi.LINEAR
    if linear and consts[_M1] != 1 and not mask >> _M1 & 1:
        word = spec.values[0][2]
        raise ValueError(f"beyond_pi='linear' needs {word} = 1, got {word} = {consts[_M1]}")
    return [*map(float, spec.ids), float(reduced), float(ignore_index), float(mask), *consts[:width]]


def _check_tensors(spec: Spec, tensors: dict[int, Tensor], input: Tensor, target: Tensor) -> None:
    """The loss's own tensors and its group by slot, each replaced by what backends read."""
    for slot, name, word in spec.values:
        tensor = tensors.get(slot)
        if tensor is not None and type(tensor) not in PLAIN_TENSORS:
            check_plain(word, tensor, f"fully_shard makes it one within forward(); else {word}.full_tensor()")
        if slot not in spec.tables and tensor is not None:
            tensors[slot] = check_parameter(word, tensor, input, target)
            _check_value(slot, name, word, tensor)
    if spec.tables or _GROUP in tensors:
        check_tables(spec, tensors, input, target)


def _check_value(slot: int, name: str, word: str, tensor: Tensor) -> None:
    if slot not in _TRAINABLE and slot != _ETA:
        raise TypeError(f"{word} takes a number, got a tensor")
    if slot == _ETA and tensor.requires_grad:
        raise ValueError(f"{word} has no gradient (it draws a mask): it must not require one; pass eta.detach()")
    check_range(word, tensor, name)


def _as_batch(
    values: Sequence[Number | None],
    input: Tensor,
    target: Tensor,
    group: Tensor | None,
    row_weight: Tensor | None,
) -> tuple[Sequence[Number | None], Tensor, Tensor, Tensor | None, Tensor | None]:
    """(C,) with a 0-d target: a batch of one."""

    def per_row(value: Number | None) -> Number | None:
        # target.shape + (1,) is (1,) here; (1,) is per class only if there is one class.
        one = isinstance(value, Tensor) and value.dim() == 1 and value.shape[0] == 1 != input.shape[0]
        return value.unsqueeze(0) if one else value  # type: ignore[union-attr]

    own = tuple(per_row(value) for value in values)
    group, row_weight = (one.unsqueeze(0) if isinstance(one, Tensor) else one for one in (group, row_weight))
    return own, input.unsqueeze(0), target.unsqueeze(0), group, row_weight


def check_loss(spec: Spec, values: Sequence[Number | None], **options: Unpack[Options]) -> None:
    """All of a loss that can be checked without a batch: numbers, options, and tensors but for how they fit one."""
    given: dict[str, Any] = {**COMMON, **options}
    tensors, own = _parted(spec, values)
    extras = (given[name] for _, name in _NUMBERS)
    _numbers(spec, sum(1 << slot for slot in tensors), given["reduction"], given["ignore_index"], *extras, *own)
    check_backend(given["backend"])
    for name in PER_CLASS.values():
        if given[name] is not None:
            check_class_vector(name, given[name])
    table_groups(spec, tensors)
    for slot, name, word in spec.values:
        tensor = tensors.get(slot)
        if tensor is not None and slot not in spec.tables:
            check_floating(word, tensor)
            _check_value(slot, name, word, tensor)
