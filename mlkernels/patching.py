"""Losses of the package in code that calls torch's cross entropy and cannot be edited."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import cross_entropy as torchs_cross_entropy

from .functional import cross_entropy
from .tracing import functorch_level


def _torchs_alone(input: object, target: object, weight: object) -> bool:
    """Whether no kernel serves the call: torch.func and forward-mode AD, DTensor and its like, other devices."""
    return (
        not isinstance(input, Tensor)
        or torch.overrides.has_torch_function((input, target, weight))
        or input.device.type not in ("cpu", "cuda")
        or functorch_level() is not None
        or forward_ad._current_level >= 0
    )


@contextlib.contextmanager
def patch(loss: Callable[..., Tensor] = cross_entropy) -> Iterator[None]:
    """Inside, ``torch.nn.functional.cross_entropy`` is a loss of this package, for models that cannot be edited.

    ``torch.nn.CrossEntropyLoss`` and libraries that look the function up when they call it (Hugging Face's models among
    them) are served too; a name that was bound before (``from torch.nn.functional import cross_entropy``) is not.
    The function is the process's: other threads see it as well.

    Args:
        loss: is called as ``loss(input, target, weight=, ignore_index=, reduction=, label_smoothing=)``: a function of
            :mod:`mlkernels.functional`, or a ``functools.partial`` of one. With :func:`~mlkernels.cross_entropy`
            numbers are torch's own, and calls that no kernel serves (``torch.func``, forward-mode AD, DTensor, devices
            other than CPU and CUDA) go to torch. Another loss is asked for every call, and refuses what it does not
            take.

    Raises:
        TypeError: ``loss`` is no function: a module has its own weight, reduction and ignore_index, the caller's would
            be lost.

    Example:
        >>> import functools, torch, mlkernels
        >>> input, target = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
        >>> with mlkernels.patch():
        ...     torch.nn.CrossEntropyLoss()(input, target)
        tensor(0.2395)
        >>> with mlkernels.patch(functools.partial(mlkernels.focal_loss, gamma=2.0)):
        ...     torch.nn.functional.cross_entropy(input, target)
        tensor(0.0109)
    """
    if isinstance(loss, (torch.nn.Module, type)) or not callable(loss):
        got = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
        raise TypeError(
            "patch: loss must be a function such as mlkernels.focal_loss or a functools.partial of one, "
            f"got {got}: what the model says of weight, ignore_index and reduction must reach it"
        )
    before = F.cross_entropy

    def instead(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        if size_average is not None or reduce is not None:
            reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
        if loss is cross_entropy and _torchs_alone(input, target, weight):
            return torchs_cross_entropy(
                input, target, weight, None, ignore_index, None, reduction, label_smoothing=label_smoothing
            )
        return loss(
            input,
            target,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    F.cross_entropy = instead
    try:
        yield
    finally:
        if F.cross_entropy is not instead:
            warnings.warn(
                "somebody else replaced torch.nn.functional.cross_entropy inside mlkernels.patch and did not undo it",
                stacklevel=3,
            )
        F.cross_entropy = before
