"""The center loss, by gathering each row's own center; and its module, which can move the centers itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Never

from .checks import (
    accumulated,
    check_device,
    check_floating,
    check_indices,
    check_number,
    check_reduction,
    check_size,
    check_tensors,
    unknown_keywords,
)
from .loss_module import Loss, classes_of, reduced
from .positional import positional_arguments
from .spec import ReductionName
from .tracing import traced


def center_loss(
    input: Tensor, target: Tensor, centers: Tensor, *rest: Never, reduction: ReductionName = "mean", **unknown: Never
) -> Tensor:
    r"""Center loss, :math:`L = \tfrac12\lVert x - c_y\rVert^2`. O(N D): each row meets its own center only.

    Gradient: :math:`\partial L/\partial x = x - c_y`, :math:`\partial L/\partial c_y = c_y - x`.

    Args:
        input: (N, D) features. target: (N,), any integer dtype. centers: (C, D), may require a gradient.
        reduction: ``"mean"`` (over N), ``"sum"`` or ``"none"``.

    Returns:
        0-d, or (N,); float32 for half inputs.

    Raises:
        TypeError, ValueError: a bad argument, by name. IndexError: a label outside [0, C) on the CPU; on a GPU that row
            is NaN.

    Example:
        >>> import torch, mlkernels
        >>> features, centers = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> mlkernels.center_loss(features, torch.tensor([1]), centers)
        tensor(2.)

    Source: Wen et al., A Discriminative Feature Learning Approach for Deep Face Recognition, equation (2).
    """
    if rest:
        raise positional_arguments(center_loss, rest)
    if unknown:
        raise unknown_keywords(center_loss, unknown)
    target = check_tensors(input, target)
    if input.dim() != 2:
        raise ValueError(f"input must be (N, D), got {tuple(input.shape)}")
    check_floating("centers", centers, " of shape (C, D)")
    if centers.dim() != 2 or centers.shape[1] != input.shape[1]:
        raise ValueError(f"centers must be (C, {input.shape[1]}), got {tuple(centers.shape)}")
    check_device("centers", centers, input)
    check_reduction(reduction)
    classes = centers.shape[0]
    all_legal = check_indices("target", target, classes)
    accumulate = accumulated(input.dtype)
    label = target.long()
    if all_legal and reduction != "none" and input.shape[0] > 0:
        own = F.embedding(label, centers).to(accumulate)
        total = F.mse_loss(input.to(accumulate), own, reduction="sum")  # one kernel each way
        return total * (0.5 / input.shape[0] if reduction == "mean" else 0.5)
    legal, y = classes_of(label, classes)
    own = F.embedding(y, centers).to(accumulate)
    return reduced(0.5 * (input.to(accumulate) - own).square().sum(1), reduction, legal=legal)


class CenterLoss(Loss):
    r"""Center loss with its centers; see :func:`mlkernels.center_loss`.

    Args:
        num_features: D. num_classes: C.
        rate: None: ``centers`` (C, D) is a parameter for the optimizer. A number > 0: ``centers`` is a buffer, and
            every forward in training mode moves it, after the loss is computed and without gradient, by

            .. math:: c_j \leftarrow c_j - \text{rate}\cdot\frac{\sum_{i: y_i = j}(c_j - x_i)}{1 + \#\{i: y_i = j\}}

            Under ``torch.distributed`` over the rows of all ranks: every rank calls it, and the centers are equal, from
            the first forward on those of the first rank. On the CPU an error of one rank's call, a bad label for
            instance, is an error on all of them, and no center moves.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        process_group: of the ranks that move the centers together; None: all. Ranks that train models of their own pass
            a group of one each.

    Centers start from N(0, 1); ``reset_parameters()`` draws them again.

    Example:
        >>> import torch, mlkernels
        >>> loss = mlkernels.CenterLoss(num_features=2, num_classes=3, rate=0.5)
        >>> _ = loss.centers.zero_()
        >>> loss(torch.tensor([[4.0, 0.0]]), torch.tensor([1]))
        tensor(8.)
        >>> loss.centers[1]
        tensor([1., 0.])

    Source: Wen et al., A Discriminative Feature Learning Approach for Deep Face Recognition, equations (2) to (4).
    """

    _function = staticmethod(center_loss)
    _drawn = frozenset({"centers"})
    centers: Tensor

    def __init__(
        self,
        *,
        num_features: int,
        num_classes: int,
        rate: float | None = None,
        reduction: ReductionName = "mean",
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Never,
    ) -> None:
        if unknown:
            raise unknown_keywords(CenterLoss, unknown)
        num_features = check_size("num_features", num_features)
        num_classes = check_size("num_classes", num_classes)
        check_reduction(reduction)
        if rate is not None:
            rate = check_number("rate", rate)
        centers = torch.empty(num_classes, num_features, device=device, dtype=dtype)
        super().__init__({"centers": nn.Parameter(centers) if rate is None else centers}, {"reduction": reduction})
        self.rate, self.process_group = rate, process_group
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the centers from N(0, 1)."""
        nn.init.normal_(self.centers)
        self._agreed = False  # whether the ranks' centers are equal

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._agreed = False

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of (N, D) features; then, with a rate and in training mode, the centers' step."""
        if self.rate is None or not self.training:
            return super().forward(input, target)
        shared = dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1
        if shared and not self._agreed:
            dist.broadcast(self.centers, group=self.process_group, group_src=0)
            self._agreed = True
        try:
            loss = super().forward(input, target)
        except Exception:
            if shared and self.centers.device.type == "cpu":  # else the other ranks would wait for this one
                sums = self._zeros()
                sums[-1, -1] = 1
                dist.all_reduce(sums, group=self.process_group)
            raise
        self._move(input.detach(), target, self.rate, shared)
        return loss

    @torch.no_grad()
    def _move(self, input: Tensor, target: Tensor, rate: float, shared: bool) -> None:
        sums = self._zeros()
        classes, accumulate = self.centers.shape[0], sums.dtype
        centers = self.centers.to(accumulate)
        legal, y = classes_of(target.long(), classes)
        # A bad label moves nothing: on a GPU its row is already NaN in the loss.
        gap = torch.where(legal.unsqueeze(1), centers[y] - input.to(accumulate), 0)
        sums.index_add_(0, y, torch.cat((gap, legal.to(accumulate).unsqueeze(1)), 1))
        if shared:
            dist.all_reduce(sums, group=self.process_group)
            if sums.device.type == "cpu" and not traced(sums) and bool(sums[-1, -1] > 0):
                raise RuntimeError("CenterLoss failed on another rank, whose error says why; no center was moved")
        sums = sums[:classes]
        self.centers.copy_(centers - rate * sums[:, :-1] / (1 + sums[:, -1:]))

    def _zeros(self) -> Tensor:
        """For sums and counts by class, in one tensor for one exchange; the last row says whether a rank failed."""
        accumulate = accumulated(self.centers.dtype)
        classes, features = self.centers.shape
        return self.centers.new_zeros(classes + 1, features + 1, dtype=accumulate)

    def extra_repr(self) -> str:
        """Sizes, rate and reduction."""
        return f"num_features={self.centers.shape[1]}, num_classes={self.centers.shape[0]}, rate={self.rate}" + (
            "" if self.reduction == "mean" else f", reduction={self.reduction!r}"
        )
