"""Every argument check: an error names the argument, what came and what it takes, before anything is computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .spec import HeadKind, Reduction, Slot, Spec, TransformKind

_REDUCTIONS = {"none": int(Reduction.NONE), "mean": int(Reduction.MEAN), "sum": int(Reduction.SUM)}
HALF = frozenset({torch.float16, torch.bfloat16})
_FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_INTEGER = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})

_check_labels = False


def check_labels(enabled: bool = True) -> None:
    """Raise for labels out of range on every device, at the price of one synchronisation per call.

    On the CPU that is always an ``IndexError``; on a GPU the row's loss and gradient are NaN unless this is on.

    Example:
        >>> import mlkernels
        >>> mlkernels.check_labels(True)
        >>> mlkernels.check_labels(False)
    """
    global _check_labels
    _check_labels = bool(enabled)


def traced() -> bool:
    """Whether values cannot be looked at: under torch.compile, or inside torch.func transforms."""
    return torch.compiler.is_compiling() or functorch_level() is not None


# The level of the torch.func transform (grad, vmap, jvp, ...) that is running, or None; kernels are opaque to those.
functorch_level = torch._C._functorch.maybe_current_level


# ---- numbers --------------------------------------------------------------------------------------------------------

# What each argument takes: the open lower end, the closed lower end, the closed upper end, and words for it.
_RANGES: dict[str, tuple[float, float, float, str]] = {
    "scale": (0.0, -math.inf, math.inf, "> 0"),
    "scale_low": (0.0, -math.inf, math.inf, "> 0"),
    "scale_high": (0.0, -math.inf, math.inf, "> 0"),
    "logit_norm": (0.0, -math.inf, math.inf, "> 0"),
    "norm": (0.0, -math.inf, math.inf, "> 0"),
    "m1": (0.0, -math.inf, math.inf, "> 0"),
    "alpha": (-math.inf, 0.0, math.inf, ">= 0"),
    "beta": (0.0, -math.inf, math.inf, "> 0"),
    "gamma": (-math.inf, 0.0, math.inf, ">= 0"),
    "kappa": (-math.inf, 0.0, math.inf, ">= 0"),
    "k": (0.0, -math.inf, 1.0, "in (0, 1]"),
    "tau_min": (0.0, -math.inf, 1.0, "in (0, 1]"),
    "label_smoothing": (-math.inf, 0.0, 1.0, "in [0, 1]"),
    "z_loss": (-math.inf, 0.0, math.inf, ">= 0"),
    "softcap": (0.0, -math.inf, math.inf, "> 0"),
}
_FINITE = (-math.inf, -math.inf, math.inf, "finite")


def check_number(name: str, value: float) -> float:
    """The number as a float, or a ValueError that says which argument is out of which range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} takes a number or a floating tensor, got {type(value).__name__}")
    above, low, high, words = _RANGES.get(name, _FINITE)
    # Written so that NaN fails. An infinite threshold is legal: every row is below it, or none.
    legal = value > above and low <= value <= high and abs(value) < math.inf
    if not (legal or (name == "eta" and abs(value) == math.inf)):
        raise ValueError(f"{name} must be {words}, got {value}")
    return float(value)


def check_range(name: str, tensor: Tensor) -> None:
    """The same for a tensor in the host's memory; reading one on a device would synchronise."""
    above, low, high, words = _RANGES.get(name, _FINITE)
    if tensor.numel() == 1:
        value = tensor.item()
        if value > above and low <= value <= high:
            return
        # A non-finite parameter is a training run gone wrong, not a bad argument: it gives NaN rows.
        if math.isfinite(value):
            raise ValueError(f"{name} must be {words}, got a tensor holding {value}")
    elif above > -math.inf or low > -math.inf or high < math.inf:
        outside = (tensor <= above) | (tensor < low) | (tensor > high)
        if bool(outside.any()):
            first = tensor.detach().reshape(-1)[outside.reshape(-1).nonzero()[0]].item()
            raise ValueError(f"{name} must be {words}, got a tensor holding {first}")


# ---- tensors --------------------------------------------------------------------------------------------------------


def check_input(input: Tensor) -> None:
    """The type of the logits."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input takes a floating tensor, got {type(input).__name__}")
    if input.dtype not in _FLOATING:
        raise TypeError(f"input must be float16, bfloat16, float32 or float64, got {input.dtype}")


def check_tensors(input: Tensor, target: Tensor) -> None:
    """Types, shapes and devices of the logits and the labels."""
    check_input(input)
    if not isinstance(target, Tensor):
        raise TypeError(f"target takes an integer tensor, got {type(target).__name__}")
    if target.dtype not in _INTEGER:
        raise TypeError(
            f"target must hold integer class indices, got {target.dtype}"
            + ("; class probabilities are served by cross_entropy" if target.is_floating_point() else "")
        )
    shape, labels = input.shape, target.shape
    # (N, C) with (N) is nearly every call; the general rule costs microseconds.
    if not (len(shape) == 2 and len(labels) == 1 and shape[0] == labels[0]):
        if len(shape) == 0:
            raise ValueError("input must be (C), (N, C) or (N, C, d1, ...), got a 0-d tensor")
        wanted = shape[:1] + shape[2:] if len(shape) > 1 else ()
        if tuple(labels) != tuple(wanted):
            raise ValueError(
                f"target must be {tuple(wanted)} for an input of {tuple(shape)} (classes are dimension "
                f"{1 if len(shape) > 1 else 0}), got {tuple(labels)}"
            )
    if shape[1 if len(shape) > 1 else 0] == 0:
        raise ValueError(f"input must have at least one class, got {tuple(shape)}")
    if target.device != input.device:
        raise ValueError(f"target must be on input's device {input.device}, got {target.device}")


def check_indices(name: str, index: Tensor, count: int, ignore_index: int | None = None) -> None:
    """An IndexError naming the first row whose index is outside [0, count); on a GPU only under check_labels."""
    if traced() or not (index.device.type == "cpu" or _check_labels):
        return
    bad = (index < 0) | (index >= count)
    if ignore_index is not None:
        bad &= index != ignore_index
    if bool(bad.any()):
        row = int(bad.reshape(-1).nonzero()[0])
        raise index_error(name, row, int(index.reshape(-1)[row]), count)


def index_error(name: str, row: int, value: int, count: int) -> IndexError:
    """The error for one bad index; the compiled kernels say it in the same words."""
    return IndexError(f"{name} {value} at row {row} is out of range [0, {count})")


def check_parameter(name: str, value: Tensor, input: Tensor, target: Tensor) -> Tensor:
    """A tensor parameter: 0-d, (C,) or target.shape + (1,); returned as the kernels take it."""
    if value.dtype not in _FLOATING:
        raise TypeError(f"{name} must be floating, got {value.dtype}")
    if value.device != input.device:
        raise ValueError(f"{name} must be on input's device {input.device}, got {value.device}")
    dim = value.dim()
    classes = input.shape[1]
    if dim == 0 or (dim == 1 and value.shape[0] == classes):
        return value
    if dim == target.dim() + 1 and value.shape[-1] == 1 and value.shape[:-1] == target.shape:
        return value
    rows = (*target.shape, 1)
    raise ValueError(
        f"{name} must be a number or a tensor that is 0-d (shared), ({classes},) (per class) or {rows} (per row), "
        f"got {tuple(value.shape)}"
    )


def check_reduction(reduction: str) -> int:
    """The reduction's number."""
    found = _REDUCTIONS.get(reduction)
    if found is None:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    return found


def check_class_vector(name: str, value: Tensor, input: Tensor, classes: int) -> None:
    """A (C,) floating tensor on input's device that is not to be differentiated."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} takes a floating tensor of shape ({classes},), got {type(value).__name__}")
    if value.dtype not in _FLOATING:
        raise TypeError(f"{name} must be floating, got {value.dtype}")
    if value.device != input.device:
        raise ValueError(f"{name} must be on input's device {input.device}, got {value.device}")
    if value.shape != (classes,):
        raise ValueError(f"{name} must have one entry per class, ({classes},), got {tuple(value.shape)}")
    if value.requires_grad:
        raise ValueError(f"{name} is not differentiated: it must not require a gradient; pass {name}.detach()")


def check_tables(spec: Spec, params: dict[int, Tensor], group: Tensor | None, input: Tensor, target: Tensor) -> None:
    """Piecewise tables: slope and bias alike, (M,) or (G, M); group exactly when they are (G, M)."""
    pairs = []
    if spec.transform == TransformKind.PIECEWISE:
        pairs.append((int(Slot.TRANSFORM_A), int(Slot.TRANSFORM_B)))
    if spec.head == HeadKind.TAU:
        pairs.append((int(Slot.HEAD_A), int(Slot.HEAD_B)))
    names = dict(spec.slots)
    groups = set()
    for first, second in pairs:
        for slot in (first, second):
            table = params.get(slot)
            name = names[slot]
            if table is None:
                raise TypeError(f"{name} takes a floating tensor of shape (M,) or (G, M), got a number")
            if table.dtype not in _FLOATING:
                raise TypeError(f"{name} must be floating, got {table.dtype}")
            if table.device != input.device:
                raise ValueError(f"{name} must be on input's device {input.device}, got {table.device}")
            if table.dim() not in (1, 2) or table.numel() == 0:
                raise ValueError(f"{name} must be (M,) or (G, M) with at least one piece, got {tuple(table.shape)}")
        if params[first].shape != params[second].shape:
            raise ValueError(
                f"{names[second]} must have the shape of {names[first]}, {tuple(params[first].shape)}, "
                f"got {tuple(params[second].shape)}"
            )
        groups.add(params[first].shape[0] if params[first].dim() == 2 else 0)
    counts = groups - {0}
    if len(counts) > 1:
        raise ValueError(f"the tables of t and of tau must have the same number of groups, got {sorted(counts)}")
    if group is None:
        if counts:
            raise ValueError(f"group is required where tables are (G, M): one index in [0, {counts.pop()}) per row")
        return
    if not counts:
        raise ValueError("group is only for tables of shape (G, M)")
    if not isinstance(group, Tensor) or group.dtype not in _INTEGER:
        kind = group.dtype if isinstance(group, Tensor) else type(group).__name__
        raise TypeError(f"group must be an integer tensor, got {kind}")
    if group.shape != target.shape:
        raise ValueError(f"group must have target's shape {tuple(target.shape)}, got {tuple(group.shape)}")
    if group.device != input.device:
        raise ValueError(f"group must be on input's device {input.device}, got {group.device}")
