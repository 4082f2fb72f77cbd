"""The package's operators, and what they return without being run. Their schemas: schemas.py.

They are defined here, so they exist without a compiler; the backends only implement them: C++ those of the
libraries ``mlkernels`` and ``mlkernels_cuda``, Triton those of ``mlkernels_triton``. They carry no autograd of their
own: ``autograd.py`` gives them their backward, at half the boundary cost of a registered one.

The arguments that every operator of the family shares:

* ``numbers``: ``Spec.ids``, then reduction, ignore_index and the mask of the slots that hold tensors (each exactly a
  float), then one float per :class:`mlkernels.numbering.Slot`; those that are left out at the end are 0. One list,
  because every list that crosses the boundary costs microseconds;
* ``params``: the tensors, in the order of their slots;
* ``needs``: bit s asks for the gradient of slot s, bit ``INPUT`` for that of the logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import accumulated
from .numbering import INPUT, MASK, REDUCTION, Reduction, Slot, consts_of, needed, slots_of, structure_of
from .schemas import SCHEMAS

library, *_of_gpus = (torch.library.Library(f"mlkernels{name}", "DEF") for name in ("", "_cuda", "_triton"))
_tags = (torch.Tag.pt2_compliant_tag,)
for _library in (library, *_of_gpus):
    for _schema in SCHEMAS[_library.ns]:
        _library.define(_schema, tags=_tags)


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
    return input.new_empty(shape, dtype=accumulated(input.dtype))


def _softmax_loss(
    input: Tensor, target: Tensor, numbers: Sequence[float], params: Sequence[Tensor], save: bool
) -> tuple[Tensor, Tensor]:
    saved = input.new_empty((target.numel() if save else 0, 2), dtype=accumulated(input.dtype))
    return _loss_like(input, target, numbers), saved


def _softmax_loss_with_gradients(
    input: Tensor, target: Tensor, numbers: Sequence[float], params: Sequence[Tensor], needs: int = 1 << INPUT
) -> tuple[Tensor, list[Tensor]]:
    return _loss_like(input, target, numbers), _gradients(input, numbers, params, needs)


def _softmax_loss_with_gradient(*arguments: Any) -> tuple[Tensor, Tensor]:
    loss, (gradient,) = _softmax_loss_with_gradients(*arguments)
    return loss, gradient


def _of_mean(numbers: Sequence[float]) -> int:
    return int(numbers[REDUCTION] == Reduction.MEAN)


def _of_mean_and_weights(numbers: Sequence[float]) -> int:
    smooth = consts_of(numbers)[Slot.SMOOTHING] > 0
    return _of_mean(numbers) + (smooth and int(numbers[MASK]) >> Slot.WEIGHT & 1)


def _with_factors(
    fake: Callable[..., tuple[Any, ...]], pairs: Callable[[Sequence[float]], int]
) -> Callable[..., tuple[Any, ...]]:
    """The same with so many pairs of what all rows share, which the operators of GPUs return or save too."""

    def factors(input: Tensor, numbers: Sequence[float], rows: int = 0) -> Tensor:
        return input.new_empty((rows + pairs(numbers), 2), dtype=accumulated(input.dtype))

    def run(input: Tensor, target: Tensor, numbers: Sequence[float], *rest: Any) -> tuple[Any, ...]:
        loss, second, *others = fake(input, target, numbers, *rest)
        if fake in (_softmax_loss, _softmax_stats):
            saved = second if rest[-1] is False else factors(input, numbers, target.numel())
            return loss, saved, *others
        return loss, second, factors(input, numbers)

    return run


def _softmax_stats(
    input: Tensor, target: Tensor, numbers: Sequence[float], params: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    dtype = accumulated(input.dtype)
    saved = input.new_empty((target.numel(), 2), dtype=dtype)
    logsumexp, log_prob, entropy, confidence = (input.new_empty(target.shape, dtype=dtype) for _ in range(4))
    prediction, rank = (input.new_empty(target.shape, dtype=torch.int64) for _ in range(2))
    loss = _loss_like(input, target, numbers)
    return loss, saved, logsumexp, log_prob, entropy, prediction, confidence, rank


def _softmax_loss_backward(*arguments: Any) -> list[Tensor]:
    input, _, numbers, params, _, needs = arguments[4:]
    return _gradients(input, numbers, params, needs)


def _nothing(*arguments: Any) -> None:
    pass


_FAKES: dict[str, Callable[..., Any]] = {
    "softmax_loss": _softmax_loss,
    "softmax_loss_with_gradient": _softmax_loss_with_gradient,
    "softmax_loss_with_gradients": _softmax_loss_with_gradients,
    "softmax_stats": _softmax_stats,
    "softmax_loss_backward": _softmax_loss_backward,
}
_CUDA_FAKES, _TRITON_FAKES = (
    {name: fake if "backward" in name else _with_factors(fake, pairs) for name, fake in _FAKES.items()}
    for pairs in (_of_mean_and_weights, _of_mean)
)


def _by_triton(name: str) -> Callable[..., Any]:
    """The operator's implementation; Triton takes a second to import, so that waits for the first call."""

    def run(*arguments: Any) -> Any:
        from .backends.triton import launch

        return launch.OPERATORS[name](*arguments)

    return run


for _name in (*_TRITON_FAKES, "softmax_loss_refresh"):
    _of_gpus[-1].impl(_name, _by_triton(_name), "CompositeExplicitAutograd")


def _multi_copy_(dst: list[Tensor], src: list[Tensor], flag: Tensor | None = None) -> None:
    """Where no compiled kernel serves the device: no synchronisation either, but one launch per tensor under a flag."""
    check_copies(dst, src, flag)
    if not dst:
        return
    if flag is not None and flag.device.type == "cpu":
        if not bool(flag):
            return
        flag = None
    if flag is None:
        torch._foreach_copy_(dst, src)
    else:
        for to, other in zip(dst, src, strict=True):
            to.copy_(torch.where(flag, other, to))


def check_copies(dst: Sequence[Tensor], src: Sequence[Tensor], flag: Tensor | None = None) -> None:
    """What ``multi_copy_`` takes: pairs of one shape, dtype and device, and a boolean."""
    if len(dst) != len(src):
        raise ValueError(f"src must hold one tensor per tensor of dst, {len(dst)}, got {len(src)}")
    for index, (to, other) in enumerate(zip(dst, src, strict=True)):
        for name in ("shape", "dtype", "device"):
            if getattr(to, name) != getattr(other, name):
                wanted, got = getattr(to, name), getattr(other, name)
                raise ValueError(f"src[{index}] must have the {name} of dst[{index}], {wanted}, got {got}")
    if flag is not None and (flag.dtype != torch.bool or flag.numel() != 1):
        raise ValueError(f"flag takes one boolean, got {flag.dtype} of shape {tuple(flag.shape)}")
    if flag is not None and flag.device.type != "cpu":
        for index, to in enumerate(dst):
            if to.device != flag.device:
                raise ValueError(f"dst[{index}] must be on flag's device {flag.device}, got {to.device}")


def _linear_statistics(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    scales = arguments[-3]
    return scales.new_empty(3 + 3 * scales.shape[0], x.shape[0]), scales.new_empty((2, x.shape[0]), dtype=torch.int64)


def _row_finish(target: Tensor, target_logit: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    numbers, params, (derive, needs) = arguments[5], arguments[6], arguments[-2:]
    of_rows = [target_logit.new_empty(count, target.numel()) for count in (5, 6 * derive)]
    return *of_rows, _gradients(target_logit, numbers, params, needs)  # type: ignore[return-value]


def _linear_gradients(x: Tensor, weight: Tensor, *of_loss: Any) -> list[Tensor]:
    numbers, params, needs = of_loss
    found = _gradients(x, numbers, params, needs & (1 << INPUT) - 1)
    shapes, dtype = ((x.shape, 0), (weight.shape, 1), (weight.shape[:1], 2)), accumulated(x.dtype)
    return found + [x.new_empty(shape, dtype=dtype) for shape, bit in shapes if needs >> INPUT + bit & 1]


def _linear_loss_with_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, normalize: bool, target: Tensor, workspace: int,
    plan: Sequence[int], numbers: Sequence[float], params: Sequence[Tensor], needs: int,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    return _loss_like(x, target, numbers), _linear_gradients(x, weight, numbers, params, needs)


def _linear_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, normalize: bool, target: Tensor, workspace: int,
    plan: Sequence[int], numbers: Sequence[float], params: Sequence[Tensor], stats: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    loss, saved, *rows = _softmax_stats(x, target, numbers, params)
    saved = saved.new_empty(5 + 3 * structure_of(numbers).scales, target.numel())
    return loss, saved, rows if stats else []


def _linear_rows_backward(x: Tensor, weight: Tensor, *arguments: Any) -> list[Tensor]:
    return _linear_gradients(x, weight, *arguments[5:7], arguments[-1])


def _buffer_like(like: Tensor, sizes: Sequence[int]) -> Tensor:
    return like.new_empty(sizes)


#: Of what is no loss.
_OTHERS: dict[str, Callable[..., Any]] = {
    "piece_statistics": _nothing,
    "piece_gradient": _nothing,
    "linear_statistics": _linear_statistics,
    "linear_gradient": _nothing,
    "linear_loss_with_gradients": _linear_loss_with_gradients,
    "linear_rows": _linear_rows,
    "linear_rows_backward": _linear_rows_backward,
    "row_finish": _row_finish,
    "buffer_like": _buffer_like,
    "multi_copy_": check_copies,
}
_refresh: dict[str, Callable[..., Any]] = {"softmax_loss_refresh": _nothing}
_OF_LIBRARIES = (_FAKES | _OTHERS, _CUDA_FAKES | _refresh, _TRITON_FAKES | _refresh)
for _library, _fakes in zip((library, *_of_gpus), _OF_LIBRARIES, strict=True):
    for _name, _fake in _fakes.items():
        torch.library.register_fake(f"{_library.ns}::{_name}", _fake, lib=_library)
library.impl("multi_copy_", _multi_copy_, "CompositeExplicitAutograd")


def multi_copy_(dst: Sequence[Tensor], src: Sequence[Tensor], flag: Tensor | None = None) -> None:
    r"""Copies many tensors in place: :math:`dst_i \leftarrow src_i`, all or, under a flag, all or none.

    On a GPU with the compiled kernels one launch serves them all and the flag never leaves the device.

    Args:
        dst: tensors of any dtypes, shapes and strides.
        src: as many, each of the shape, dtype and device of its partner; copied bit for bit.
        flag: one boolean: copy only if it is true. On a GPU it lies on the tensors' device; a CPU flag is looked at
            by the host.

    Raises:
        ValueError: pairs that do not match, or a flag that is no boolean; nothing has been copied then.

    Example:
        >>> import torch
        >>> from mlkernels.ops import multi_copy_
        >>> a, b = torch.zeros(3), torch.ones(3)
        >>> multi_copy_([a], [b], torch.tensor(False))
        >>> a
        tensor([0., 0., 0.])
        >>> multi_copy_([a], [b], torch.tensor(True))
        >>> a
        tensor([1., 1., 1.])
    """
    try:
        torch.ops.mlkernels.multi_copy_.default(dst, src, flag)
    except RuntimeError:  # a kernel says that it refuses, not why
        check_copies(dst, src, flag)
        raise


class Kernels(NamedTuple):
    """A backend's operators, callable."""

    softmax_loss: Callable[..., Any]
    softmax_loss_with_gradient: Callable[..., Any]
    softmax_loss_with_gradients: Callable[..., Any]
    softmax_stats: Callable[..., Any]
    softmax_loss_backward: Callable[..., Any]
    #: Writes a gradient made for an upstream gradient of 1 anew unless the device finds that it is 1, and takes the
    #: factors that a loss with gradients returns behind these; None where the host may look for itself.
    refresh: Callable[..., None] | None = None
    #: The same by way of the dispatcher, where these are not.
    dispatched: Kernels | None = None


_native: Any = torch.ops.mlkernels
NATIVE = Kernels(*(getattr(_native, name).default for name in _FAKES))
#: The same for the CPU. Gradients made with the loss are never traced: without the Python of an OpOverload.
CPU = NATIVE._replace(
    softmax_loss_with_gradient=_native.softmax_loss_with_gradient.default._op,
    softmax_loss_with_gradients=_native.softmax_loss_with_gradients.default._op,
)


def _of_gpu(operator: Callable[[str], Any], dispatched: Kernels | None = None) -> Kernels:
    return Kernels(*map(operator, _FAKES))._replace(refresh=operator("softmax_loss_refresh"), dispatched=dispatched)


CUDA = _of_gpu(lambda name: getattr(torch.ops.mlkernels_cuda, name).default)
#: Where operators are observed. Else Triton's functions are called as they are, without a dispatcher in between.
TRITON = _of_gpu(lambda name: getattr(torch.ops.mlkernels_triton, name).default)


@functools.cache
def triton() -> Kernels:
    """Triton's operators in eager mode."""
    from .backends.triton import launch

    return _of_gpu(launch.EAGER.__getitem__, TRITON)


_nowhere: dict[str, Any] = dict.fromkeys(_FAKES, _nothing)
#: The reference has no operators: it is plain torch.
REFERENCE = Kernels(**_nowhere)


def kernels(backend: str, observed: bool) -> Kernels:
    """A backend's operators; observed ones go by way of the dispatcher."""
    if backend == "triton":
        return TRITON if observed else triton()
    return {"cpu": CPU, "cuda": CUDA, "reference": REFERENCE}[backend]
