"""Classifier and loss in one, as a module."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..backends.reference import RowStats, full_precision
from ..checks import accumulated, check_flag, check_kind, check_size
from ..positional import by_name
from .functional import Strategy, check_callable, check_classifier, check_cosines, check_plan, logits_of, loss_of
from .plan import TILE, Cut
from .products import lengths
from .sampling import ClassSampler, Correction, check_sample
from .update import TileSGD, TileUpdate


class LinearModule(nn.Module):
    """What a linear head and one over ranks share: what was asked for, checked and kept."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    update: TileUpdate | None
    sampler: ClassSampler | None

    def __init__(
        self, loss: Callable[..., Tensor], in_features: int, num_classes: int, bias: bool,
        normalize: bool | None, cut: Cut, tile_update: TileSGD | None,
    ):  # fmt: skip
        super().__init__()
        check_callable(loss)
        self.in_features = check_size("in_features", in_features, 0)
        self.num_classes = check_size("num_classes", num_classes)
        check_flag("bias", bias)
        self.normalize = check_cosines(loss, normalize)
        if bias and self.normalize:
            raise ValueError("bias has no meaning beside normalize=True: cosines have none")
        self.strategy, self.memory, self.compact = check_plan(cut, tile_update)
        self.loss, self.update, self.sampler = loss, None, None

    @property
    def tile_update(self) -> TileSGD | None:
        """What steps the weight in the backward; a scheduler takes it."""
        return None if self.update is None else self.update.optimizer

    @property
    def _cut(self) -> Cut:
        return Cut(self.strategy, self.memory, self.compact)

    def _called_with(self, weight: Tensor) -> dict[str, Any]:
        """What logits are made with beside features and classifier; weight: what is stepped of it here."""
        begin = None
        if self.update is not None and torch.is_grad_enabled() and self.weight.requires_grad:
            begin = partial(self.update.begun, self.weight, weight)
        return {"begin": begin, "sampler": self.sampler if self.training else None}

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, bias={self.bias is not None}, "
            f"normalize={self.normalize}"
        )


@by_name
class LinearLoss(LinearModule):
    r"""A classifier and a loss of the family on its output, which is never whole; see :func:`linear_softmax_loss`.

    Args:
        loss: a module of the family, or a function of (logits, target): ``mlkernels.ArcFaceLoss()``. Its parameters are
            among this module's.
        in_features: D. num_classes: C.
        bias: whether there is one, (C,).
        normalize: the logits are the cosines of features and rows of the weight, which margins take.
        weight: a Parameter (C, D) that somebody else has, an embedding's for instance: it is shared, not copied.
        strategy, memory, compact: see :func:`linear_softmax_loss`.
        tile_update: a :class:`mlkernels.TileSGD`, which steps the weight within the loss's backward, so that there is
            never a gradient of its size: ``weight.grad`` stays None. docs/heads.md says what that rules out.
        sample: how many classes the loss sees while training, drawn anew for each call: all those of the batch's
            labels, and others at random up to this number. With ``tile_update`` the rest of weight and momentum does
            not move, not even by decay; without it the gradient has the weight's size, and zeros. ``eval()`` sees all.
        sample_correction: ``"importance"`` adds :math:`-\log\pi/s` to the logits of the classes that were drawn at
            random, each with probability :math:`\pi`: the sum of exponentials is then that of all classes on average,
            and the loss, its logarithm, is nearly so. None is Partial FC: the softmax over the drawn classes.
        device, dtype: of a weight of its own.

    ``weight`` (C, D) and ``bias`` start as those of ``nn.Linear``.

    Example:
        >>> import torch, mlkernels
        >>> head = mlkernels.LinearLoss(mlkernels.CosFaceLoss(scale=16.0), 8, 1000, normalize=True)
        >>> features = torch.randn(4, 8, requires_grad=True)
        >>> head(features, torch.tensor([1, 2, 3, 999])).backward()
        >>> head.weight.grad.shape
        torch.Size([1000, 8])
        >>> values, classes = head.topk(features, 5)  # the best classes, without (N, C) logits
        >>> classes.shape
        torch.Size([4, 5])
        >>> embedding = torch.nn.Embedding(1000, 8)
        >>> tied = mlkernels.LinearLoss(mlkernels.CrossEntropyLoss(), 8, 1000, weight=embedding.weight)
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        normalize: bool | None = None,
        weight: nn.Parameter | None = None,
        strategy: Strategy | None = None,
        memory: int | None = None,
        compact: bool = False,
        tile_update: TileSGD | None = None,
        sample: int | None = None,
        sample_correction: Correction | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(loss, in_features, num_classes, bias, normalize, Cut(strategy, memory, compact), tile_update)
        sample = check_sample(sample, sample_correction)
        in_features, num_classes = self.in_features, self.num_classes  # integers of Python
        if weight is None:
            self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        elif device is not None or dtype is not None:
            given = "device" if device is not None else "dtype"
            raise ValueError(f"{given} has no meaning beside weight, which has its own: leave it out")
        elif not isinstance(weight, nn.Parameter):
            raise TypeError(f"weight takes the nn.Parameter that is shared, got {type(weight).__name__}")
        elif weight.shape != (num_classes, in_features):
            raise ValueError(f"weight must be ({num_classes}, {in_features}), got {tuple(weight.shape)}")
        else:
            self.weight = weight
        own = nn.Parameter(self.weight.new_empty(num_classes).detach()) if bias else None
        self.register_parameter("bias", own)
        self._shares_weight, self._shares_bias = weight is not None, False
        self.reset_parameters()
        if tile_update is not None:
            self.update = TileUpdate(tile_update, self.weight)
        if sample is not None:
            self.sampler = ClassSampler(sample, sample_correction, (0, num_classes), self.weight.device)

    @classmethod
    def from_linear(cls, loss: Callable[..., Tensor], linear: nn.Linear, **options: Any) -> Self:
        """A linear head on the weight and the bias of a layer, shared with it.

        Example:
            >>> import torch, mlkernels
            >>> layer = torch.nn.Linear(8, 100)
            >>> head = mlkernels.LinearLoss.from_linear(mlkernels.FocalLoss(), layer)
            >>> head.weight is layer.weight and head.bias is layer.bias
            True
        """
        check_kind("linear", linear, nn.Linear, "an nn.Linear")
        weight = cast(nn.Parameter, linear.weight)
        made = cls(loss, linear.in_features, linear.out_features, weight=weight, **options)
        if linear.bias is not None:
            if made.normalize:
                raise ValueError("linear has a bias, which has no meaning beside normalize=True")
            made.bias, made._shares_bias = linear.bias, True
        return made

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws weight and bias as ``nn.Linear`` does; what is shared is left to whom it belongs."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        if not self._shares_weight:
            nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None and not self._shares_bias:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.update is not None:
            self.update.reset()

    def forward(self, input: Tensor, target: Tensor, **per_call: Any) -> Tensor | tuple[Tensor, RowStats]:
        """The loss of (..., D) features; ``per_call`` goes to the loss (``logit_norm``, ``norm``, ``group``,
        ``row_weight``, ``normalizer``), but for ``return_stats``."""
        run = self._called
        if (self.update is not None or self.sampler is not None) and torch.compiler.is_compiling():
            run = torch.compiler.disable(run, reason="a linear head with tile_update or sample is no graph")
        return run(input, target, **per_call)

    def _called(
        self, input: Tensor, target: Tensor, return_stats: bool = False, **per_call: Any
    ) -> Tensor | tuple[Tensor, RowStats]:
        logits = logits_of(
            input, self.weight, target, self.bias, self.normalize, return_stats, self._cut,
            **self._called_with(self.weight), module=True,
        )  # fmt: skip
        result: Tensor | tuple[Tensor, RowStats] = loss_of(
            logits, target, self.loss, return_stats, per_call, type(self)
        )
        return result

    def logits(self, input: Tensor) -> Tensor:
        """The whole logits, (..., D) to (..., C), as ``nn.Linear`` or cosines: for few rows or few classes."""
        check_classifier(input, self.weight, self.bias, self.normalize, module=True)
        if not self.normalize:
            return nn.functional.linear(input, self.weight, self.bias)
        return nn.functional.linear(_direction(input), _direction(self.weight))

    @torch.no_grad()
    def topk(self, input: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits of each row and their classes, (..., k) each, largest first; they take no N x C memory.

        They are in float32, float64 for float64; no loss has a part in them.
        """
        check_classifier(input, self.weight, self.bias, self.normalize, module=True)
        k = check_k(k, self.num_classes)
        x = input.reshape(input.shape[:-1].numel(), self.in_features)
        values, classes = streamed_topk(x, self.weight, self.bias, k, self.normalize)
        shape = (*input.shape[:-1], k)
        return values.reshape(shape), classes.reshape(shape)


def check_k(k: int, classes: int) -> int:
    """How many of the best classes are wanted."""
    if check_size("k", k) > classes:
        raise ValueError(f"k must be an integer in [1, {classes}], got {k}")
    return int(k)


def streamed_topk(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row, or as many as there are, and their classes, by tiles of classes."""
    accumulate = accumulated(x.dtype)
    with full_precision(x.device):
        x = x.to(accumulate)
        x = _direction(x) if normalize else x
        values = x.new_empty(x.shape[0], 0)
        classes = torch.empty(x.shape[0], 0, dtype=torch.int64, device=x.device)
        tile = max(k, TILE // max(x.shape[0], 1))
        for start in range(0, weight.shape[0], tile):
            part = weight[start : start + tile].to(accumulate)
            f = x @ (_direction(part) if normalize else part).T
            if bias is not None:
                f += bias[start : start + tile].to(accumulate)
            best, at = f.topk(min(k, f.shape[1]), 1)
            values, classes = torch.cat((values, best), 1), torch.cat((classes, at + start), 1)
            values, at = values.topk(min(k, values.shape[1]), 1)
            classes = classes.gather(1, at)
    return values, classes


def _direction(rows: Tensor) -> Tensor:
    return rows / lengths(rows, rows.dtype)
