"""The loss of several batches as if they were one, from a loss of each."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..joint import JointLoss
from ..linear import LinearLoss
from ..loss_module import FamilyLoss

LossFunction: TypeAlias = Callable[..., Tensor]
Counts: TypeAlias = Sequence[float | Tensor] | None

#: What a function says of its mean, and what holds where it says nothing.
_SAID = {"reduction": "mean", "ignore_index": -100, "weight": None, "row_weight": None, "normalizer": None}


class Shares(NamedTuple):
    """The loss of all batches is the sum of n_k L_k / n."""

    counts: Counts  # None: it is the sum of L_k
    total: float | Tensor = 1.0
    kept: float | Tensor = 1.0  # 0: there is nothing for a mean
    keywords: Mapping[str, Tensor] = MappingProxyType({})  # what else each loss is called with

    def of(self, k: int, loss: Tensor) -> Tensor:
        """n_k L_k / n; of a batch without rows, whose mean is NaN, nothing."""
        if self.counts is None:
            return loss
        count = self.counts[k]
        if not isinstance(self.total, Tensor):
            return loss * (count / self.total) if count else loss.nan_to_num() * 0
        exact = torch.promote_types(loss.dtype, torch.float32)
        count = count.to(exact) if isinstance(count, Tensor) else count
        share = torch.where(self.total > 0, count / self.total.to(exact), 0)
        return torch.where(share > 0, loss, 0) * share


ADDED_UP = Shares(None)


@contextmanager
def shares(name: str, loss: LossFunction, targets: Sequence[Any], counts: Counts) -> Iterator[Shares]:
    """By the counts given, or by what the loss's mean over each batch is divided by."""
    means = _means(name, loss) if counts is None else _Means()
    if means is None:
        yield ADDED_UP
        return
    weighed = [] if counts or any(_are_probabilities(target) for target in targets) else means.weighed
    if weighed and means.takes_normalizer:
        with _normalized(weighed, [_rows(target, means.ignore_index) for target in targets], targets) as found:
            yield found
        return
    if counts is None:
        weight = cast(Tensor, weighed[0].weight) if weighed else None
        counts = [_rows(target, means.ignore_index, weight) for target in targets]
    total: Any = sum(counts)
    yield Shares(counts, total, total)


@contextmanager
def _normalized(weighed: Sequence[nn.Module], rows: Sequence[Tensor], targets: Sequence[Tensor]) -> Iterator[Shares]:
    """All terms are divided by the number of rows: what else the weighed ones are divided by is in their weights."""
    weights = [cast(Tensor, part.weight) for part in weighed]
    kept = torch.stack(list(rows)).sum()
    sums = []
    try:
        for part, weight in zip(weighed, weights, strict=True):
            of_all = sum(_rows(target, cast(int, part.ignore_index), weight) for target in targets)
            sums.append(cast(Tensor, of_all))
            part.weight = weight.to(sums[-1].dtype) * torch.where(sums[-1] > 0, kept / sums[-1], 0)
        keywords = {"normalizer": kept.clamp(min=1).to(sums[0].dtype) / len(targets)}
        yield Shares([1.0] * len(targets), float(len(targets)), torch.stack(sums).amin(), keywords)
    finally:
        for part, weight in zip(weighed, weights, strict=True):
            part.weight = weight


class _Means(NamedTuple):
    """What a loss says of the sums that it divides by."""

    ignore_index: int = -100
    weighed: Sequence[nn.Module] = ()  # those that divide by the rows' weights
    takes_normalizer: bool = False


def _means(name: str, loss: LossFunction) -> _Means | None:
    """None: it divides by nothing."""
    if isinstance(loss, functools.partial):
        given = {key: value for key, value in loss.keywords.items() if key in _SAID}
        said = [key for key, value in given.items() if isinstance(value, Tensor) or value != _SAID[key]]
        if said:
            raise ValueError(
                f"counts must be given where {name} is a function with its own {', '.join(said)}: a module tells them"
            )
    modules = list(loss.modules()) if isinstance(loss, nn.Module) else []
    if any(type(module).__name__ == "ClassParallelLoss" for module in modules):
        raise ValueError(f"counts must be given where {name} is over all ranks: each batch's rows on all of them")
    # What torch.compile() makes of a module has its attributes too.
    parts: list[Any] = [one for one in modules if hasattr(one, "reduction") and not hasattr(one, "_orig_mod")]
    reductions = {str(part.reduction) for part in parts}
    dividing = [part for part in parts if hasattr(part, "ignore_index")]  # others divide by all rows: multi-margin
    ignored = {int(part.ignore_index) for part in dividing}
    weighed = [part for part in dividing if getattr(part, "weight", None) is not None]
    takes_normalizer = _takes_normalizer(loss)
    joined = max((len(one.losses) for one in modules if isinstance(one, JointLoss)), default=1)
    several = len(weighed) > 0 and (max(joined, len(parts)) > 1 or getattr(weighed[0], "z_loss", 0) > 0)
    if len(reductions) > 1 or len(ignored) > 1 or (several and reductions != {"sum"} and not takes_normalizer):
        raise ValueError(
            f"counts must be given where the parts of {name} differ: reduction {sorted(reductions)}, "
            f"ignore_index {sorted(ignored)}, class weights in {len(weighed)} of {len(parts)}"
            + " beside a z_loss"
            * (len(parts) == 1)
        )
    if reductions == {"sum"}:
        return None
    return _Means(next(iter(ignored), -100), weighed, takes_normalizer)


def _takes_normalizer(loss: Any) -> bool:
    """Whether it is of losses that all get what it is called with, and know what a normalizer is."""
    loss = getattr(loss, "_orig_mod", loss)
    if isinstance(loss, JointLoss):
        return all(map(_takes_normalizer, loss.losses))
    if isinstance(loss, LinearLoss):
        return _takes_normalizer(loss.loss)
    taken = inspect.signature(loss.forward).parameters.values() if isinstance(loss, FamilyLoss) else ()
    return any(one.kind == one.VAR_KEYWORD for one in taken)


def _are_probabilities(target: Any) -> bool:
    return isinstance(target, Tensor) and target.is_floating_point()


def _rows(target: Any, ignore_index: int, weight: Tensor | None = None) -> Any:
    """How many rows a loss keeps, by their classes' weights where there are such."""
    if not isinstance(target, Tensor):
        raise TypeError(f"counts must be given where target is no tensor, got {type(target).__name__}")
    if _are_probabilities(target):  # (N, C, ...), or a number per row
        return float(target.numel() // (target.shape[1] if target.dim() > 1 else 1))
    label = target.long()
    kept = label.ne(ignore_index)
    if weight is None:
        return kept.sum()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return torch.where(kept, weight[label.clamp(0, len(weight) - 1)], 0).sum()
