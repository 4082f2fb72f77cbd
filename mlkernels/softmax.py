"""Any loss of the family: check the arguments, choose the backend, apply it with autograd."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.autograd import forward_ad
from typing_extensions import Never, Unpack

from . import autograd, ops, tracing
from .autograd import ONLY_INPUT, Call
from .backends import check_backend, choose, reference
from .checks import (
    HALF,
    check_class_vector,
    check_floating,
    check_index,
    check_indices,
    check_normalizer,
    check_number,
    check_parameter,
    check_range,
    check_reduction,
    check_row_weight,
    check_tables,
    check_tensors,
    table_groups,
    unknown_keywords,
    wrong_type,
)
from .spec import (
    MASK,
    SLOTS,
    TRAINABLE,
    BackendName,
    BeyondPi,
    HeadKind,
    Number,
    ReductionName,
    Slot,
    Spec,
    TransformKind,
)
from .tracing import PLAIN_TENSORS, functorch_level, is_dual, modes


class RowStats(NamedTuple):
    r"""What the kernel learned of each row, target-shaped. Ignored rows hold 0, and -1 as prediction.

    Attributes:
        logsumexp: of the final z; differentiable.
        log_prob: log p of the target, of the final z; differentiable.
        entropy: :math:`-\sum_j p_j \log p_j` of the final z; differentiable.
        prediction: the class of the largest logit before transform and scale; the lowest index on ties, -1 where the
            row holds a NaN.
        confidence: the target's logit minus the largest other one, before transform and scale; +inf for C = 1.
        rank: how many logits are larger than the target's (0: right; < n: right among the top n).
    """

    logsumexp: Tensor
    log_prob: Tensor
    entropy: Tensor
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
_ROW_WEIGHT, _NORMALIZER = int(Slot.ROW_WEIGHT), int(Slot.NORMALIZER)
_TABLES = frozenset(int(s) for s in (Slot.TRANSFORM_A, Slot.TRANSFORM_B, Slot.HEAD_A, Slot.HEAD_B))
_TRANSFORM_A, _HEAD_C, _HEAD_D = int(Slot.TRANSFORM_A), int(Slot.HEAD_C), int(Slot.HEAD_D)
_GAMMA_KAPPA = frozenset({_HEAD_C, _HEAD_D})

_PLAIN = frozenset({float, int, str, type(None)})
_MOST_CALLS = 1024
_BFLOAT16, _FLOAT16 = torch.bfloat16, torch.float16
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


#: The public functions, which enter themselves: what an error about a keyword says that they take.
functions: dict[str, Callable[..., object]] = {}

_calls: dict[tuple[object, ...], Call] = {}


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
        row_weight: of target's shape, floating: a factor of each row's whole loss, under every reduction, not
            differentiated. What "mean" divides by stays what it is.
        normalizer: > 0, a number or a 0-d tensor (floating or integer), not differentiated: what "mean" divides by in
            the place of its own divisors: the tokens of all micro-batches, say, or of all ranks.
    """

    row_weight: Tensor | None
    normalizer: Number | None


class Common(Options, PerCall, total=False):
    """All of them, which functions take."""


class ProductLogits:  # no ABC: every call asks whether its input is one, and an ABC answers slowly
    """What stands for logits that are a product and never whole; see :mod:`mlkernels.linear`."""

    def shaped(self) -> Tensor:
        """A tensor of their shape, dtype and device that takes no memory: arguments are checked by it."""
        raise NotImplementedError

    def loss(
        self,
        target: Tensor,
        numbers: Sequence[float],
        params: Sequence[Tensor],
        tables: frozenset[int],
        return_stats: bool,
        backend: BackendName | None,
    ) -> tuple[Tensor, RowStats | None]:
        """The loss whose arguments were checked, with the numbers and tensors that operators take."""
        raise NotImplementedError


def apply(  # noqa: C901 - one visit to every argument, and each may be refused
    spec: Spec,
    values: Sequence[Number | None],
    input: Tensor | ProductLogits,
    target: Tensor,
    group: Tensor | None = None,
    return_stats: bool = False,
    /,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_adjustment: Tensor | None = None,
    row_weight: Tensor | None = None,
    normalizer: Number | None = None,
    backend: BackendName | None = None,
    **unknown: Never,
) -> tuple[Tensor, RowStats | None]:
    """Any loss of the family: ``values`` are its numbers and tensors, in the order of ``spec.slots``.

    What only some functions take is positional: the callers' own keywords, which the rest passes on, cannot set it.
    """
    if unknown:
        raise unknown_keywords(functions[spec.function], unknown, COMMON)
    if type(ignore_index) is not int:
        ignore_index = check_index("ignore_index", ignore_index)
    product = None
    if isinstance(input, ProductLogits):
        product, input = input, input.shaped()
    target = check_tensors(input, target, ignore_index)
    dim = input.dim()
    if dim == 1:
        return _single_row(
            spec, values, input, target, group, return_stats,
            weight=weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
            z_loss=z_loss, softcap=softcap, logit_adjustment=logit_adjustment, row_weight=row_weight,
            normalizer=normalizer, backend=backend,
        )  # fmt: skip
    compiling = _is_compiling()
    key = (spec.ids, reduction, ignore_index, label_smoothing, z_loss, softcap, normalizer, *values)
    tensors: dict[int, Tensor] = {}
    # A loss whose parameters are numbers is the same call every time: nothing of it is looked at twice.
    plain = not compiling and _PLAIN.issuperset(map(type, key[1:]))
    call = _calls.get(key) if plain else None
    if call is None:
        numbers, tensors = _numbers(spec, values, ignore_index, reduction, label_smoothing, z_loss, softcap, normalizer)
        call = Call(numbers, ONLY_INPUT, False, ops.CPU)
        if plain:
            if len(_calls) >= _MOST_CALLS:  # scheduled numbers: each is used a few times and never again
                _calls.clear()
            _calls[key] = call

    grad = _is_grad_enabled()
    dtype = input.dtype
    params: list[Tensor] = []
    needs = ONLY_INPUT if grad and input.requires_grad else 0
    half = dtype == _BFLOAT16
    if tensors or weight is not None or logit_adjustment is not None or group is not None or row_weight is not None:
        mask = 0
        if tensors or group is not None:
            group = _check_values(spec, tensors, group, input, target)
            if group is not None:
                tensors[_GROUP] = group
        for slot, name, vector in ((_WEIGHT, "weight", weight), (_ADJUSTMENT, "logit_adjustment", logit_adjustment)):
            if vector is not None:
                check_class_vector(name, vector, input, input.shape[1])
                tensors[slot] = vector
        if row_weight is not None:
            check_row_weight(row_weight, input, target)
            tensors[_ROW_WEIGHT] = row_weight
        for slot in sorted(tensors):
            tensor = tensors[slot]
            params.append(tensor)
            mask |= 1 << slot
            half |= tensor.dtype in HALF
            if grad and tensor.requires_grad:
                needs |= (1 << slot) & _TRAINABLE
        numbers = call.numbers.copy()
        numbers[MASK] = float(mask)
        call = Call(numbers, needs, half, ops.CPU)
    elif half or needs != ONLY_INPUT:
        call = Call(call.numbers, needs, half, ops.CPU)

    if product is not None:
        check_indices("target", target, input.shape[1], ignore_index)
        if group is not None:
            check_indices("group", group, _groups(tensors))
        return product.loss(target, call.numbers, params, spec.tables, return_stats, backend)
    chosen = choose(input.device, backend, input.shape[1], dim > 2 and input.stride(1) != 1)
    by_reference = chosen == "reference" or functorch_level() is not None
    if forward_ad._current_level >= 0:  # kernels would lose a tangent
        by_reference = by_reference or any(map(is_dual, (input, *params)))
    if by_reference or chosen != "cpu":  # the CPU's kernels look at the indices while they read them
        check_indices("target", target, input.shape[1], ignore_index)
        if group is not None:
            check_indices("group", group, _groups(tensors))
    if by_reference:
        loss, rows = reference.softmax_loss(input, target, call.numbers, params)
        return loss, RowStats(*rows) if return_stats else None
    if compiling:  # Dynamo refuses a Function that takes a tensor twice, as tables or scales that are alike may be
        params = [p.view_as(p) if any(p is other for other in params[:i]) else p for i, p in enumerate(params)]
    # Gradients in the loss's own pass where it pays. An fp16 gradient is written only when the upstream is known: a
    # GradScaler's 65536 would rescale what has already underflowed. Hooks on saved tensors (checkpointing, offloading)
    # would meet a gradient.
    observed = compiling or modes() > 0 or type(input) not in PLAIN_TENSORS
    split = reduction == "none" or dtype == _FLOAT16 or observed or _saved_tensors_hooks(False) is not None
    if chosen != "cpu":
        if chosen == "cuda":
            call = call._replace(kernels=ops.CUDA)
        else:
            call = call._replace(kernels=ops.TRITON if observed else ops.triton())
        # Nobody on the host knows the upstream gradient, so a parameter's is always multiplied by it.
        split = split or (needs != ONLY_INPUT and any(param.dtype in HALF for param in params))
    if return_stats:
        if needs:
            loss, *outputs = autograd.softmax_stats(call, input, target, *params)
        else:
            loss, _, *outputs = call.kernels.softmax_stats(input, target, call.numbers, params)
        return loss, RowStats(*outputs)
    if not needs:
        return call.kernels.softmax_loss(input, target, call.numbers, params, False)[0], None
    if split:
        return autograd.softmax_loss(call, input, target, *params), None
    return autograd.loss_with_gradients(call, input, target, *params), None


def _groups(tensors: dict[int, Tensor]) -> int:
    """How many losses the tables hold."""
    return next(tensor.shape[0] for slot, tensor in tensors.items() if slot in _TABLES and tensor.dim() == 2)


def _numbers(
    spec: Spec,
    values: Sequence[Number | None],
    ignore_index: int,
    reduction: ReductionName,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    normalizer: Number | None,
) -> tuple[list[float], dict[int, Tensor]]:
    """The numbers that cross the op boundary, but for the mask, and the tensors by slot."""
    check_index("ignore_index", ignore_index)
    label_smoothing = check_number("label_smoothing", label_smoothing)
    z_loss = check_number("z_loss", z_loss)
    plain = softcap is None and label_smoothing == 0 and z_loss == 0 and normalizer is None
    consts = _DEFAULTS[: spec.width if plain else SLOTS]
    tensors: dict[int, Tensor] = {}
    for (slot, name), word, value in zip(spec.slots, spec.words, values, strict=True):
        if isinstance(value, Tensor):
            tensors[slot] = value
        elif slot in spec.tables:
            raise wrong_type(word, "a floating tensor of shape (M,) or (G, M)", value)
        elif value is not None or slot not in (_NORM, _LOGIT_NORM):
            takes = "a number or a floating tensor" if slot in TRAINABLE else "a number"
            consts[slot] = check_number(word, value, name, takes)  # type: ignore[arg-type]
    if spec.head == HeadKind.MODULATED and consts[_HEAD_C] + consts[_HEAD_D] < 1 and not _GAMMA_KAPPA & tensors.keys():
        raise ValueError(
            "gamma + kappa must be >= 1, or the gradient diverges where p = 1; "
            f"got gamma = {consts[_HEAD_C]}, kappa = {consts[_HEAD_D]}"
        )
    linear = spec.transform == TransformKind.MARGIN and spec.beyond_pi == BeyondPi.LINEAR
    if linear and consts[_TRANSFORM_A] != 1 and _TRANSFORM_A not in tensors:
        raise ValueError(f"beyond_pi='linear' needs {spec.words[0]} = 1, got {spec.words[0]} = {consts[_TRANSFORM_A]}")
    if not plain:
        consts[_SMOOTHING] = label_smoothing
        consts[_Z_LOSS] = z_loss
        if softcap is not None:
            consts[_SOFTCAP] = check_number("softcap", softcap)
        if normalizer is not None and reduction != "mean":
            raise ValueError(f"normalizer is what reduction='mean' divides by; got it with reduction={reduction!r}")
        if isinstance(normalizer, Tensor):
            tensors[_NORMALIZER] = normalizer
        elif normalizer is not None:
            consts[_NORMALIZER] = check_number("normalizer", normalizer, takes="a number or a 0-d tensor")
    return [*map(float, spec.ids), float(check_reduction(reduction)), float(ignore_index), 0.0, *consts], tensors


def _check_values(
    spec: Spec, tensors: dict[int, Tensor], group: Tensor | None, input: Tensor, target: Tensor
) -> Tensor | None:
    """Checks the tensors among the values; returns the group as every backend reads it."""
    if spec.tables or group is not None:
        group = check_tables(spec, tensors, group, input, target)
    on_host = input.device.type == "cpu" and not tracing.traced(input)
    normalizer = tensors.get(_NORMALIZER)
    if normalizer is not None:
        tensors[_NORMALIZER] = check_normalizer(normalizer, input)
        if on_host:
            check_range("normalizer", tensors[_NORMALIZER])
    for (slot, name), word in zip(spec.slots, spec.words, strict=True):
        tensor = tensors.get(slot)
        if tensor is None or slot in spec.tables:
            continue
        tensors[slot] = check_parameter(word, tensor, input, target)
        _check_value(slot, name, word, tensor, on_host)
    return group


def _check_value(slot: int, name: str, word: str, tensor: Tensor, on_host: bool) -> None:
    if slot not in TRAINABLE and slot != _ETA:
        raise TypeError(f"{word} takes a number, got a tensor")
    if slot == _ETA and tensor.requires_grad:
        raise ValueError(f"{word} has no gradient (it draws a mask): it must not require one; pass eta.detach()")
    if on_host:
        check_range(word, tensor, name)


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
    weight = common.get("row_weight")
    if isinstance(weight, Tensor) and weight.dim() == 0:
        common["row_weight"] = weight.unsqueeze(0)
    row, label = input.unsqueeze(0), target.unsqueeze(0)
    own = tuple(per_row(value) for value in values)
    loss, rows = apply(spec, own, row, label, group, return_stats, **common)
    return loss.reshape(()), None if rows is None else RowStats(*(row.squeeze(0) for row in rows))


#: The shared arguments and their defaults.
COMMON = {
    name: parameter.default
    for name, parameter in inspect.signature(apply).parameters.items()
    if name in Common.__annotations__
}


def check_loss(spec: Spec, values: Sequence[Number | None], **common: Unpack[Common]) -> None:
    """All of a loss that can be checked without a batch: numbers, options, and tensors but for how they fit one."""
    options: dict[str, Any] = {**COMMON, **common}
    names = ("ignore_index", "reduction", "label_smoothing", "z_loss", "softcap", "normalizer")
    _, tensors = _numbers(spec, values, *(options[name] for name in names))
    check_backend(options["backend"])
    for name in ("weight", "logit_adjustment"):
        vector = options[name]
        if vector is not None:
            check_class_vector(name, vector)
    table_groups(spec, tensors)
    for (slot, name), word in zip(spec.slots, spec.words, strict=True):
        tensor = tensors.get(slot)
        if tensor is not None and slot not in spec.tables:
            check_floating(word, tensor)
            _check_value(slot, name, word, tensor, tensor.device.type == "cpu" and not tracing.traced(tensor))
