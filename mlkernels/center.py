"""The center loss, by gathering each row's own center."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Never

from .checks import check_indices, check_reduction, check_tensors, unknown_keywords
from .spec import ReductionName


def center_loss(
    input: Tensor, target: Tensor, centers: Tensor, *, reduction: ReductionName = "mean", **unknown: Never
) -> Tensor:
    r"""Center loss, :math:`L = \tfrac12\lVert x - c_y\rVert^2`. O(N D): each row meets its own center only.

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
    if unknown:
        raise unknown_keywords(center_loss, unknown)
    target = check_tensors(input, target)
    if input.dim() != 2:
        raise ValueError(f"input must be (N, D), got {tuple(input.shape)}")
    if not isinstance(centers, Tensor) or not centers.is_floating_point():
        kind = centers.dtype if isinstance(centers, Tensor) else type(centers).__name__
        raise TypeError(f"centers takes a floating tensor, got {kind}")
    if centers.dim() != 2 or centers.shape[1] != input.shape[1]:
        raise ValueError(f"centers must be (C, {input.shape[1]}), got {tuple(centers.shape)}")
    if centers.device != input.device:
        raise ValueError(f"centers must be on input's device {input.device}, got {centers.device}")
    check_reduction(reduction)
    classes = centers.shape[0]
    check_indices("target", target, classes)
    accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
    label = target.long()
    legal = (label >= 0) & (label < classes)
    own = F.embedding(torch.where(legal, label, 0), centers).to(accumulate)
    rows = 0.5 * (input.to(accumulate) - own).square().sum(1)
    rows = rows * torch.where(legal, 1.0, torch.nan).to(accumulate)
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()
