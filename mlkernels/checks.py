"""Every argument check: an error names the argument, what came and what it takes, before anything is computed."""

from __future__ import annotations

import inspect
import math
import numbers
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from . import tracing
from .numbering import Reduction
from .positional import classifier_of, kind_of
from .spec import Number

_REDUCTIONS = {"none": int(Reduction.NONE), "mean": int(Reduction.MEAN), "sum": int(Reduction.SUM)}
HALF = frozenset({torch.float16, torch.bfloat16})
_FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_INTEGER = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
#: Those that no backend reads: they are widened before.
UNSIGNED = frozenset({torch.uint16, torch.uint32, torch.uint64})
_STRIDED = torch.strided

_check_labels = False


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """What sums of that dtype are kept in, and losses returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


# ---- numbers --------------------------------------------------------------------------------------------------------

_Range: TypeAlias = tuple[float, float, float, str]
"""The open lower end, the closed lower end, the closed upper end, and words for it."""

_POSITIVE: _Range = (0.0, -math.inf, math.inf, "> 0")
#: As float32 has it.
_HALF_TURN = math.pi * (1 + 1e-7)
#: What each argument takes.
_RANGES: dict[str, _Range] = {
    **dict.fromkeys(("scale", "scale_low", "scale_high", "logit_norm", "norm"), _POSITIVE),
    **dict.fromkeys(("m1", "beta", "softcap", "sigma", "rate"), _POSITIVE),
    **dict.fromkeys(("alpha", "gamma", "kappa", "z_loss", "lambda_", "a", "lr"), (-math.inf, 0.0, math.inf, ">= 0")),
    **dict.fromkeys(("k", "tau_min"), (0.0, -math.inf, 1.0, "in (0, 1]")),
    **dict.fromkeys(("label_smoothing", "participation"), (-math.inf, 0.0, 1.0, "in [0, 1]")),
    "normalizer": (0.0, -math.inf, sys.float_info.max, "> 0 and finite"),
    "m2": (-math.inf, -_HALF_TURN, _HALF_TURN, "finite"),
}
_FINITE: _Range = (-math.inf, -math.inf, math.inf, "finite")


def range_of(rule: str) -> tuple[float, float, float]:
    """The open lower end, the closed lower end and the closed upper end of what a number may be."""
    return _RANGES.get(rule, _FINITE)[:3]


def check_number(word: str, value: float, rule: str | None = None, takes: str = "a number") -> float:
    """The number as a float, or an error that says which argument is none, or is out of which range.

    Args:
        word: the caller's name of the argument.
        value: anything that is a real number: Python's, NumPy's, a fraction, an integer by ``__index__``.
        rule: the name under which ``_RANGES`` has it, if that is another.
        takes: what else the argument might have been.
    """
    number = value if type(value) is float else _real(word, value, takes)
    rule = rule or word
    above, low, high, words = _RANGES.get(rule, _FINITE)
    # Written so that NaN fails. An infinite threshold is legal: every row is below it, or none.
    if not (number > above and low <= number <= high and abs(number) < math.inf):
        if rule == "eta" and abs(number) == math.inf:
            return number
        if rule == "m2" and math.isfinite(number):
            raise _degrees(word, str(value), f"math.radians({value})", number)
        raise ValueError(f"{word} must be {words}, got {value}")
    return number


def _degrees(word: str, given: str, instead: str, angle: float) -> ValueError:
    return ValueError(
        f"{word} is an angle in radians, at most pi, got {given}; if those are degrees, pass {instead} = "
        f"{math.radians(angle):.4g}"
    )


def _real(word: str, value: object, takes: str) -> float:
    if isinstance(value, Tensor):
        raise TypeError(f"{word} takes {takes}, got a tensor of shape {tuple(value.shape)}")
    _check_traced_number(word, takes, value, "float")
    try:
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, bool):
            return float(operator.index(value))  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError(f"{word} must be finite, got an integer beyond float64") from None
    except TypeError:
        pass
    raise wrong_type(word, takes, value)


def _check_traced_number(word: str, takes: str, value: object, plain: str) -> None:
    if torch.compiler.is_compiling() and type(value).__name__ == "ndarray":
        raise TypeError(
            f"{word} takes {takes}, got a NumPy number, which torch.compile makes an array of: pass {plain}({word}) to "
            "the compiled function"
        )


def check_index(word: str, value: int) -> int:
    """An integer (anything with ``__index__``) that 64 bits hold, and float64 exactly."""
    _check_traced_number(word, "an int", value, "int")
    if isinstance(value, (bool, Tensor)) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{word} takes an int, got {type(value).__name__}")
    number = operator.index(value)
    if not -(2**63) <= number < 2**63 or int(float(number)) != number:
        raise ValueError(f"{word} must be exactly representable as int64 and as float64, got {number}")
    return number


def check_range(word: str, tensor: Tensor, rule: str | None = None) -> None:
    """The same for a tensor, where the host may look: reading one on a device would synchronise."""
    if not tensor.is_cpu or tracing.traced(tensor):
        return
    above, low, high, words = _RANGES.get(rule or word, _FINITE)
    if tensor.numel() != 1:
        unbounded = above == low == -math.inf and high == math.inf
        if unbounded or not bool(((tensor <= above) | (tensor < low) | (tensor > high)).any()):
            return
    for value in [tensor.item()] if tensor.numel() == 1 else tensor.flatten().tolist():
        # A non-finite parameter is a training run gone wrong, not a bad argument: it gives NaN rows. A divisor is none.
        if not (value > above and low <= value <= high) and (math.isfinite(value) or word == "normalizer"):
            given = f"a tensor holding {value}"
            if rule == "m2":
                raise _degrees(word, given, f"torch.deg2rad({word})", value)
            raise ValueError(f"{word} must be {words}, got {given}")


def check_scalar(word: str, value: Number, rule: str | None = None) -> Number:
    """A number, as a float, or a floating tensor of one element."""
    takes = "a number or a floating tensor, 0-d or (1,)"
    if not isinstance(value, Tensor):
        return check_number(word, value, rule, takes)
    if value.shape not in ((), (1,)) or not value.is_floating_point():
        raise ValueError(f"{word} must be {takes}, got {tuple(value.shape)} {value.dtype}")
    check_range(word, value, rule)
    return value


def check_several(word: str, value: object, what: str, per: str = "", count: int = 0) -> None:
    """Anything with a length that can be gone through, but for text; as many as there are of something."""
    if isinstance(value, str) or not (hasattr(value, "__len__") and hasattr(value, "__iter__")):
        raise TypeError(f"{word} takes a sequence of {what}, got {type(value).__name__}")
    if per and len(value) != count:
        raise ValueError(f"{word} must be one per {per}, {count}, got {len(value)}")


# ---- keywords --------------------------------------------------------------------------------------------------------


def unknown_keywords(of: Callable[..., object], unknown: Mapping[str, object], shared: Iterable[str] = ()) -> TypeError:
    """The error for arguments that a function or a class does not take, with those that it does."""
    what, name = f"{of.__name__}()", next(iter(unknown))
    if name in ("size_average", "reduce"):
        kept = unknown.get("reduce", True) is not False
        mean = unknown.get("size_average", True) is not False
        wanted = "mean" if kept and mean else "sum" if kept else "none"
        return TypeError(f"{what} takes no {name}, which torch has deprecated: write reduction={wanted!r}")
    if isinstance(of, type) and shared and name in ("num_classes", "embedding_size"):  # a loss of the family
        return TypeError(f"{what} takes no {name}: {classifier_of(of)}")
    taken = inspect.signature(of).parameters.values()
    own = [one.name for one in taken if one.default is not one.empty or one.kind == one.KEYWORD_ONLY]
    return TypeError(f"{what} takes no {name!r}; there are {', '.join(dict.fromkeys([*own, *shared]))}")


def wrong_type(word: str, takes: str, value: object) -> TypeError:
    """The error for what is no tensor; of lists and arrays with what makes one of them."""
    hint = ""
    if type(value).__name__ == "Proxy":  # of torch.fx, which has whatever it is asked for
        hint = ": symbolic_trace sees no numbers; make the loss a leaf of its Tracer, or take make_fx or torch.export"
    elif hasattr(value, "instead"):  # a ProductLogits
        return TypeError(f"loss calculates with the logits of a linear head: {value.instead}")
    elif isinstance(value, (list, tuple)) or hasattr(value, "__array_interface__"):
        hint = f": write torch.as_tensor({word})" if "tensor" in takes or "number" not in takes else ""
    return TypeError(f"{word} takes {takes}, got {kind_of(value)}{hint}")


# ---- functions and generators ----------------------------------------------------------------------------------------


def check_kind(word: str, value: object, kind: type | tuple[type, ...], takes: str) -> None:
    """An instance of a class."""
    if not isinstance(value, kind):
        raise TypeError(f"{word} takes {takes}, got {type(value).__name__}")


def check_function(word: str, function: object, takes: str = "a function") -> None:
    """Anything that can be called, but for the class of a module."""
    if isinstance(function, type) and issubclass(function, torch.nn.Module):
        raise TypeError(f"{word} takes {takes}, got a class: call {function.__name__}(...)")
    if not callable(function):
        raise TypeError(f"{word} takes {takes}, got {type(function).__name__}")


def check_generator(generator: torch.Generator, use: str) -> None:
    """A generator on the CPU."""
    check_kind("generator", generator, torch.Generator, "a torch.Generator")
    if generator.device.type != "cpu":
        raise ValueError(f"generator must be on the CPU, where {use}, got {generator.device}")


# ---- tensors --------------------------------------------------------------------------------------------------------


def check_input(input: Tensor) -> None:
    """The type of the logits."""
    if not isinstance(input, Tensor):
        raise wrong_type("input", "a floating tensor", input)
    if input.dtype not in _FLOATING:
        raise TypeError(f"input must be float16, bfloat16, float32 or float64, got {input.dtype}")
    if input.layout != _STRIDED or input.is_nested:
        kind = "nested" if input.is_nested else str(input.layout).removeprefix("torch.")
        raise TypeError(f"input takes a dense tensor, got a {kind} one")
    if type(input) not in tracing.PLAIN_TENSORS:
        check_plain(
            "input", input, "where ranks have rows of their own pass to_local() of input and target, which gives each "
            "rank the loss of its rows; else input.full_tensor()",
        )  # fmt: skip


def check_plain(name: str, value: Tensor, instead: str) -> None:
    """No tensor of which a rank has a part."""
    if type(value).__name__ == "DTensor":
        raise TypeError(f"{name} takes a plain tensor, got a DTensor {value.placements}: {instead}")  # type: ignore[attr-defined]


def check_tensors(input: Tensor, target: Tensor, ignore_index: int | None = None) -> Tensor:
    """Types, shapes and devices of the logits and the labels; returns the labels as every backend reads them."""
    check_input(input)
    return check_target(input, input.shape, target, ignore_index)


def check_target(input: Tensor, shape: torch.Size, target: Tensor, ignore_index: int | None = None) -> Tensor:
    """The labels of logits of that shape, returned as every backend reads them."""
    unread = check_class_indices(target)
    labels, dim = target.shape, 1 if len(shape) > 1 else 0
    # (N, C) with (N) is nearly every call; the general rule costs microseconds.
    if not (len(shape) == 2 and len(labels) == 1 and shape[0] == labels[0]):
        if len(shape) == 0:
            raise ValueError("input must be (C), (N, C) or (N, C, d1, ...), got a 0-d tensor")
        wanted = shape[:1] + shape[2:] if dim else ()
        if tuple(labels) != tuple(wanted):
            raise ValueError(
                f"target must be {tuple(wanted)} for an input of {tuple(shape)} (classes are dimension {dim}), got "
                f"{tuple(labels)}{_to_fit(shape, labels)}"
            )
    classes = shape[dim]
    if classes == 0:
        raise ValueError(f"input must have at least one class, got {tuple(shape)}")
    if not (input.is_cpu and target.is_cpu) and target.device != input.device:
        raise ValueError(f"target must be on input's device {input.device}, got {target.device}")
    return widened("target", target, classes, ignore_index) if unread else target


def _to_fit(shape: torch.Size, labels: torch.Size) -> str:
    """What makes labels fit that lack only a change of shape: of classes that come last, for instance."""
    count = labels.numel()
    if len(shape) > 2 and count == shape[:-1].numel():
        return "; write input.flatten(0, -2) and target.flatten()"
    if labels == shape:
        return f"; write target.argmax({min(len(shape) - 1, 1)})"
    if len(shape) == 2 and count == shape[0]:
        return "; write target.flatten()"
    return "; write input.T" if len(shape) == 2 and labels == shape[1:] else ""


def check_class_indices(target: Tensor, of_probabilities: str = "cross_entropy") -> bool:
    """The type of the labels; whether it is one that no backend reads."""
    if not isinstance(target, Tensor):
        raise wrong_type("target", "an integer tensor", target)
    unread = target.dtype not in _INTEGER
    if unread and target.dtype not in UNSIGNED:
        probabilities = f", or take {of_probabilities} for class probabilities" if target.is_floating_point() else ""
        hint = "" if target.is_complex() else f"; write target.long(){probabilities}"
        raise TypeError(f"target must hold integer class indices, got {target.dtype}{hint}")
    return unread


def check_index_dtype(name: str, index: Tensor) -> None:
    """An integer tensor of any dtype."""
    if not isinstance(index, Tensor):
        raise wrong_type(name, "an integer tensor", index)
    if index.dtype not in _INTEGER | UNSIGNED:
        raise TypeError(f"{name} must be an integer tensor, got {index.dtype}")


def widened(name: str, index: Tensor, count: int, ignore_index: int | None = None) -> Tensor:
    """Indices of any dtype as int64. From 2^63 on they are none, and not what is ignored either."""
    if index.dtype != torch.uint64:
        return index.long()
    signed = index.view(torch.int64)
    beyond = signed < 0
    if index.device.type == "cpu" and not tracing.traced(index) and bool(beyond.any()):
        row = int(beyond.reshape(-1).nonzero()[0])
        raise index_error(name, row, int(signed.reshape(-1)[row]) + 2**64, count)
    return torch.where(beyond, -1 if ignore_index != -1 else -2, signed)


def check_indices(name: str, index: Tensor, count: int, ignore_index: int | None = None) -> bool:
    """An IndexError naming the first row whose index is outside [0, count). False: on a GPU nobody looks."""
    looked_at = index.device.type == "cpu" or (_check_labels and index.device.type != "meta")
    if not looked_at or tracing.traced(index):
        return False
    index = index.long()  # a narrow dtype holds neither count nor ignore_index
    if index.numel() > 0 and not 0 <= int(index.min()) <= int(index.max()) < count:
        bad = ((index < 0) | (index >= count)) & (True if ignore_index is None else index != ignore_index)
        if bool(bad.any()):
            row = int(bad.reshape(-1).nonzero()[0])
            raise index_error(name, row, int(index.reshape(-1)[row]), count, ignore_index is not None)
    return True


def index_error(name: str, row: int, value: int, count: int, ignores: bool = False) -> IndexError:
    """The error for one bad index; the compiled kernels say it in the same words."""
    # What data sets mark rows without a class by.
    hint = f"; to leave such rows out pass ignore_index={value}" if ignores and (value < 0 or value == 255) else ""
    return IndexError(f"{name} {value} at row {row} is out of range [0, {count}){hint}")


def check_floating(name: str, value: Tensor, shape: str = "") -> None:
    """A tensor of a dtype that kernels read."""
    if not isinstance(value, Tensor):
        raise wrong_type(name, f"a floating tensor{shape}", value)
    if value.dtype not in _FLOATING:
        hint = "" if value.is_complex() else f"; write {name}.float()"
        raise TypeError(f"{name} must be floating, got {value.dtype}{hint}")


def check_device(name: str, value: Tensor, other: Tensor, its: str = "input") -> None:
    """Where another tensor lies."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on {its}'s device {other.device}, got {value.device}")


def check_parameter(name: str, value: Tensor, input: Tensor, target: Tensor) -> Tensor:
    """A tensor parameter: 0-d or (1,), (C,) or target.shape + (1,); returned as the kernels take it."""
    check_floating(name, value)
    check_device(name, value, input)
    dim = value.dim()
    classes = input.shape[1]
    if dim == 0 or (dim == 1 and value.shape[0] == classes):
        return value
    if dim == target.dim() + 1 and value.shape[-1] == 1 and value.shape[:-1] == target.shape:
        return value
    if dim == 1 and value.shape[0] == 1:  # fully_shard takes no 0-d parameters
        return value.reshape(())
    rows = (*target.shape, 1)
    raise ValueError(
        f"{name} must be a number or a tensor that is 0-d or (1,) (shared), ({classes},) (per class) or {rows} (per "
        f"row), got {tuple(value.shape)}"
    )


def check_flag(word: str, value: bool) -> None:
    """A bool: what is merely true may be another argument's."""
    if type(value) is not bool:
        raise TypeError(f"{word} takes True or False, got {value!r}")


def check_size(word: str, value: int, least: int = 1) -> int:
    """How many of something there are."""
    number = check_index(word, value)
    if number < least:
        raise ValueError(f"{word} must be an integer >= {least}, got {number}")
    return number


def check_reduction(reduction: str) -> int:
    """The reduction's number."""
    found = _REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    if found is None:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    return found


def _check_constant(name: str, value: Tensor, input: Tensor | None, local: str, instead: str) -> None:
    """A tensor of the whole, on input's device where there is one yet, that is not to be differentiated."""
    check_plain(name, value, f"pass {name}.{local}()")
    if input is not None:
        check_device(name, value, input)
    if value.requires_grad:
        raise ValueError(f"{name} is not differentiated: {instead}")


def check_class_vector(name: str, value: Tensor, input: Tensor | None = None, classes: int | None = None) -> None:
    """A (C,) floating tensor, on input's device where there is one yet, that is not to be differentiated."""
    wanted = "(C,)" if classes is None else f"({classes},)"
    instead = f"it must not require a gradient; pass {name}.detach()"
    check_floating(name, value, f" of shape {wanted}")
    _check_constant(name, value, input, "full_tensor", instead)
    if value.dim() != 1 or (classes is not None and value.shape[0] != classes):
        raise ValueError(f"{name} must have one entry per class, {wanted}, got {tuple(value.shape)}")


def check_row_weight(value: Tensor, input: Tensor, rows: torch.Size) -> None:
    """A floating tensor of target's shape on input's device that is not to be differentiated."""
    wanted = tuple(rows)
    instead = "pass row_weight.detach(), or multiply the losses of reduction='none'"
    check_floating("row_weight", value, f" of target's shape {wanted}")
    _check_constant("row_weight", value, input, "to_local", instead)
    if value.shape != rows:
        raise ValueError(f"row_weight must have target's shape {wanted}, got {tuple(value.shape)}")


def check_normalizer(value: float | Tensor, input: Tensor, reduction: str) -> Number:
    """What "mean" divides by: a number > 0, or one in a tensor on input's device, returned 0-d and floating."""
    check_reduction(reduction)
    if reduction != "mean":
        raise ValueError(f"normalizer is what reduction='mean' divides by: it has no meaning under {reduction!r}")
    if not isinstance(value, Tensor):
        return check_number("normalizer", value, takes="a number, or one in a tensor")
    if value.dtype not in _FLOATING and value.dtype not in _INTEGER:
        raise TypeError(f"normalizer must be floating or an integer, got {value.dtype}")
    instead = "pass normalizer.detach(), or divide the loss of reduction='sum'"
    _check_constant("normalizer", value, input, "full_tensor", instead)
    if value.shape not in ((), (1,)):
        raise ValueError(f"normalizer must be a number or a tensor that is 0-d or (1,), got {tuple(value.shape)}")
    check_range("normalizer", value)
    value = value.reshape(())
    return value if value.dtype in _FLOATING else value.double()
