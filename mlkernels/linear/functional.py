"""Classifier and loss in one, as functions."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from .. import functional
from ..backends.reference import RowStats
from ..call import COMMON, Options
from ..checks import check_class_indices, check_flag, check_input, check_plain, check_size, unknown_keywords, wrong_type
from ..modules import CosineLoss
from ..positional import by_name
from .logits import LinearLogits
from .plan import STRATEGIES, Cut
from .sampling import ClassSampler
from .update import TileSGD, Updating

Strategy: TypeAlias = Literal["stored", "tiles", "rows"]

_OF_A_LOSS = frozenset({"transform", "scale", "head", "target_logit", *Options.__annotations__})
#: What those take who are given no loss.
_COMPOSED = ("transform", "scale", "head", "target_logit", "group", *COMMON)


@by_name
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    strategy: Strategy | None = None,
    memory: int | None = None,
    compact: bool = False,
    **common: Any,
) -> Tensor:
    r"""Cross entropy of a classifier's output that is never whole: :math:`-\log\operatorname{softmax}(xW^\top+b)_y`.

    Args:
        input: (..., D) features x. linear_weight: (C, D), as in ``nn.Linear``. target: (...) class indices.
        linear_bias: (C,).
        strategy, memory, compact: see :func:`linear_softmax_loss`.
        scale: s > 0, of all logits; a number or a tensor (0-d, (C,) or target.shape + (1,)).

    The other arguments are those of :mod:`mlkernels.functional`, the result and the errors those of
    :func:`linear_softmax_loss`. It has the name and the order of arguments of torch's own.

    Example:
        >>> import torch, mlkernels
        >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> mlkernels.linear_cross_entropy(x, weight, torch.tensor([2]))
        tensor(0.4076)
    """
    if "options" in common:
        raise TypeError(
            "linear_cross_entropy() takes no options, by which torch's own cuts its chunks: memory= bounds the bytes "
            "of the buffers, strategy= forces how rows and classes are cut"
        )
    unknown = {name: value for name, value in common.items() if name != "scale" and name not in COMMON}
    if unknown:
        raise unknown_keywords(linear_cross_entropy, unknown, ("scale", *COMMON))
    logits = logits_of(input, linear_weight, target, linear_bias, False, False, Cut(strategy, memory, compact))
    common = _flat_arguments(target, common)
    return _shaped(functional.cross_entropy(logits, _flat(target), **common), target)  # type: ignore[arg-type]


@overload
def linear_softmax_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    normalize: bool = False,
    loss: Callable[..., Tensor] | None = None,
    return_stats: Literal[False] = False,
    strategy: Strategy | None = None,
    memory: int | None = None,
    compact: bool = False,
    **arguments: Any,
) -> Tensor: ...


@overload
def linear_softmax_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    normalize: bool = False,
    loss: Callable[..., Tensor] | None = None,
    return_stats: Literal[True],
    strategy: Strategy | None = None,
    memory: int | None = None,
    compact: bool = False,
    **arguments: Any,
) -> tuple[Tensor, RowStats]: ...


@by_name
def linear_softmax_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    normalize: bool = False,
    loss: Callable[..., Tensor] | None = None,
    return_stats: bool = False,
    strategy: Strategy | None = None,
    memory: int | None = None,
    compact: bool = False,
    **arguments: Any,
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Any loss of the family on a classifier's output, :math:`f = xW^\top + b` or cosines, which is never whole.

    The (N, C) logits exist a part at a time: products, statistics, gradient in place, products. Nothing is rounded to
    half precision between them: products and sums are in float32 (float64 for float64), also for half operands, and
    the gradients of x and W are rounded once, at the end.

    Args:
        input: (..., D) features x, half, bfloat16, float or double.
        linear_weight: (C, D), as in ``nn.Linear``; of input's dtype.
        target: (...) class indices of any integer dtype.
        linear_bias: (C,), or None.
        normalize: the logits are the cosines of x and the rows of W, which margins take: :math:`f = \hat x\cdot\hat w`.
            A zero row is NaN, and so is one whose squares vanish or overflow (in float32 norms below 1e-22 or above
            1.8e19, where the cosines of ``F.normalize`` are 0). There is no bias then.
        loss: what is called with (logits, target): a module of the family (``mlkernels.ArcFaceLoss()``,
            ``TwoScaleLoss``...) or a function of it; further arguments are passed on to its call (``row_weight``,
            ``normalizer``, ``logit_norm``, ``norm``, ``group``). None: those of :func:`mlkernels.softmax_loss`, that is
            ``transform``, ``scale``, ``head``, ``target_logit``, ``group`` and what :mod:`mlkernels.functional` shares.
        return_stats: return ``(loss, RowStats)``, whose ``logsumexp``, ``log_prob`` and ``entropy`` have gradients.
        strategy: ``"stored"`` keeps the logits of a chunk of rows from the statistics to the gradient, ``"tiles"``
            makes the product again for the gradient; None picks by size.
        memory: a bound in bytes of the call's own buffers, without input, gradients and their float32 sums.
        compact: on a GPU, leave ignored rows out before the first product. Which they are must be known on the host,
            which waits for the GPU once per call; else they are masked, and cost what others do. On the CPU they are
            left out in any case. Results are the same.

    Returns:
        The loss: 0-d, or of target's shape under ``"none"``; float32 for half inputs, else of input's dtype. What
        ``"none"`` and the statistics return has right gradients under every upstream gradient.

    Raises:
        TypeError, ValueError: a bad argument, by name, before anything is computed.
        IndexError: on the CPU, a label out of range, with its row.
        RuntimeError: second-order gradients, torch.func transforms and forward-mode AD.

    Example:
        >>> import torch, mlkernels
        >>> features, weight = torch.randn(4, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
        >>> target = torch.tensor([1, 999, 3, 7])
        >>> arcface = mlkernels.ArcFaceLoss(scale=16.0)
        >>> mlkernels.linear_softmax_loss(features, weight, target, normalize=True, loss=arcface).backward()
        >>> loss, rows = mlkernels.linear_softmax_loss(
        ...     features, weight, target, scale=1 / 0.7, reduction="none", return_stats=True  # temperature 0.7
        ... )
        >>> rows.entropy.shape
        torch.Size([4])
    """
    cut = Cut(strategy, memory, compact)
    logits = logits_of(input, linear_weight, target, linear_bias, normalize, return_stats, cut)
    result: Tensor | tuple[Tensor, RowStats] = loss_of(logits, target, loss, return_stats, arguments)
    return result


def loss_of(
    logits: LinearLogits,
    target: Tensor,
    loss: Callable[..., Tensor] | None,
    return_stats: bool,
    arguments: dict[str, Any],
    of: Callable[..., Any] = linear_softmax_loss,
) -> Any:
    """What a loss makes of logits that are a product; of: what was called."""
    arguments = _flat_arguments(target, arguments)
    if loss is None:
        unknown = {name: value for name, value in arguments.items() if name not in _COMPOSED}
        if unknown:
            raise unknown_keywords(of, unknown, _COMPOSED)
        value = functional.softmax_loss(logits, _flat(target), **arguments)  # type: ignore[call-overload]
    else:
        given = sorted(name for name in arguments if name in _OF_A_LOSS)
        if given:
            without = "" if isinstance(of, type) else ", or leave loss=None"  # a module has one
            raise TypeError(f"loss has its own {given[0]}: give it to the loss{without}")
        check_callable(loss)
        value = loss(logits, _flat(target), **arguments)
        if not isinstance(value, Tensor):
            raise TypeError(f"loss must return a tensor, got {type(value).__name__}")
    if not return_stats:
        return _shaped(value, target)
    if logits.stats is None or logits.visits > 1:
        raise ValueError(
            f"return_stats needs a loss that looks at the logits once, got one that does so {logits.visits} times"
        )
    return _shaped(value, target), RowStats(*(row.reshape(target.shape) for row in logits.stats))


def check_callable(loss: Any) -> None:
    """A loss is called with (logits, target)."""
    takes = "loss takes a loss module or function of the softmax family"
    if isinstance(loss, type):
        raise TypeError(f"{takes}, got a class: call {loss.__name__}(...)")
    if not callable(loss):
        raise TypeError(f"{takes}, got {type(loss).__name__}")


def check_cosines(loss: Any, normalize: bool | None) -> bool:
    """Whether the logits are cosines; None: nobody has said so. What is nearly always forgotten: of products with
    lengths in them margin losses have values, but no angles."""
    if normalize is not None:
        check_flag("normalize", normalize)
        return normalize
    if isinstance(loss, CosineLoss):
        name = type(loss).__name__
        words = f"{name} takes cosines: pass normalize=True beside {name}(...)"
        warnings.warn(words, UserWarning, stacklevel=_level_outside())
    return False


def _level_outside() -> int:
    """The level, in the stack of who asks, of the line that has called the package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        f"{__package__.partition('.')[0]}."
    ):
        level, frame = level + 1, frame.f_back
    return level


def _flat(target: Tensor) -> Tensor:
    return target.unsqueeze(0) if target.dim() == 0 else target


def _flat_arguments(target: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """What has target's shape, as a batch has it."""
    if target.dim() > 0:
        return arguments
    rows = {name: arguments[name] for name in ("row_weight", "group") if isinstance(arguments.get(name), Tensor)}
    return {**arguments, **{name: _flat(value) for name, value in rows.items()}}


def _shaped(value: Tensor, target: Tensor) -> Tensor:
    return value.reshape(()) if target.dim() == 0 else value


def logits_of(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    normalize: bool,
    return_stats: bool,
    cut: Cut,
    begin: Callable[[], Updating] | None = None,
    sampler: ClassSampler | None = None,
    module: bool = False,
) -> LinearLogits:
    """Checks what a linear head adds to a loss's arguments."""
    check_classifier(input, weight, bias, normalize, module)
    cut = check_call(input, target, cut)
    if input.dim() == 1:
        input = input.unsqueeze(0)
    return LinearLogits(
        input, weight, bias, normalize=normalize, return_stats=return_stats, cut=cut, begin=begin, sampler=sampler
    )


def check_call(input: Tensor, target: Tensor, cut: Cut) -> Cut:
    """What a linear head takes beside a classifier and a loss's own arguments; how its work is cut, as it is read."""
    check_class_indices(target, "cross_entropy of whole logits")
    check_plain("target", target, "pass target.to_local(), beside features of this rank's rows")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must be {tuple(input.shape[:-1])}, a label for each row of an input of {tuple(input.shape)}, got "
            f"{tuple(target.shape)}"
        )
    return check_plan(cut)


def check_plan(cut: Cut, tile_update: TileSGD | None = None) -> Cut:
    """How a linear head's work is to be cut, as it is read."""
    strategy, memory, compact = cut
    if tile_update is not None and not isinstance(tile_update, TileSGD):
        raise TypeError(f"tile_update takes a TileSGD, got {type(tile_update).__name__}")
    if tile_update is not None:
        tile_update.check_free()
        if strategy == "stored":
            raise ValueError(
                "tile_update goes through the weight tile by tile: strategy takes 'tiles' or None, got 'stored'"
            )
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))} or None, got {strategy!r}")
    if memory is not None and (type(memory) is not int or memory < 1):
        memory = check_size("memory", memory)
    check_flag("compact", compact)
    return Cut(strategy, memory, compact)


def check_classifier(
    input: Tensor, weight: Tensor, bias: Tensor | None, normalize: bool, module: bool = False, shard: bool = False
) -> None:
    """Types, shapes and devices of features and a classifier: arguments, or a module's, which input has to fit."""
    check_input(input)
    if not isinstance(weight, Tensor):
        raise wrong_type("linear_weight", "a floating tensor (C, D)", weight)
    if input.dim() == 0:
        raise ValueError("input must be (..., D), got a 0-d tensor")
    check_flag("normalize", normalize)
    width = input.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(
            f"input must be (..., {weight.shape[-1]}), got {tuple(input.shape)}"
            if module
            else f"linear_weight must be (C, {width}) for an input of {tuple(input.shape)}, got {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0 and not shard:
        raise ValueError(f"linear_weight must have at least one class, got {tuple(weight.shape)}")
    if bias is not None:
        if normalize:
            raise ValueError("linear_bias has no meaning beside normalize=True: cosines have none")
        if not isinstance(bias, Tensor):
            raise wrong_type("linear_bias", "a floating tensor (C,)", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"linear_bias must be ({weight.shape[0]},), one per class, got {tuple(bias.shape)}")
    prefix = "" if module else "linear_"
    for name, tensor in ((f"{prefix}weight", weight), (f"{prefix}bias", bias)):
        if tensor is not None:
            _check_beside(input, name, tensor, module)


def _check_beside(input: Tensor, name: str, tensor: Tensor, module: bool) -> None:
    """A classifier's tensor beside features: of the two, what the caller gave is refused."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} takes a dense tensor, got a {str(tensor.layout).removeprefix('torch.')} one")
    check_plain(
        name, tensor, "fully_shard makes it one within forward() and after unshard(); ClassParallelLoss spreads "
        f"the classes over ranks; else {name}.full_tensor()",
    )  # fmt: skip
    (mine, given), (its, own) = ((name, tensor), ("input", input))[:: -1 if module else 1]
    if tensor.device != input.device:
        raise ValueError(f"{mine} must be on {its}'s device {own.device}, got {given.device}")
    # Under autocast the features are in half precision and the weight is not: each is read as it is.
    if tensor.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        raise TypeError(f"{mine} must have {its}'s dtype {own.dtype}, got {given.dtype}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating, got {tensor.dtype}")
