"""What a loss *is*: target transform x row scale x head.

A :class:`Spec` holds structure only (which formula, which option), so there are few of them and they are built once.
The numbers and tensors of a loss travel beside it, one per :class:`Slot`; changing them builds and recompiles nothing.
``numbering.py`` has the kinds, the options and the slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, get_args

from torch import Tensor
from typing_extensions import Self

from .numbering import (
    HEAD_VALUES,
    KINDS,
    SCALE_VALUES,
    TRANSFORM_VALUES,
    BeyondPi,
    Clamp,
    HeadKind,
    MarginGradient,
    ScaleKind,
    Structure,
    TransformKind,
)
from .positional import kind_of, positional_arguments

Number: TypeAlias = float | Tensor
"""A parameter of a loss: a Python number, or a tensor (0-d: shared; (C,): per class; (N, 1): per row)."""

ReductionName: TypeAlias = Literal["mean", "sum", "none"]
BackendName: TypeAlias = Literal["reference", "cpu", "triton", "cuda"]
BeyondPiName: TypeAlias = Literal["linear", "monotone", "easy", "none"]
GradientName: TypeAlias = Literal["exact", "straight_through"]
ClampName: TypeAlias = Literal["min", "cross_entropy"]

# The margins of functions that have one only, which they call so.
_MARGINS = {"arcface_loss": "m2", "cosface_loss": "m3", "sphereface_loss": "m1"}

_E = TypeVar("_E", bound=IntEnum)


def option(name: str, value: str | None, choices: type[_E]) -> _E:
    """The option by its lower-case name; None is the first choice where that is AUTO."""
    if value is None and "AUTO" in choices.__members__:
        return choices["AUTO"]
    member = choices.__members__.get(value.upper()) if isinstance(value, str) and value != "auto" else None
    if member is None:
        allowed = ", ".join(repr(m.lower()) for m in choices.__members__ if m != "AUTO")
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return member


@dataclass(frozen=True, repr=False)
class Spec:
    """The structure of a loss, in the words of a function. Build it with :func:`spec`, which caches."""

    #: As it crosses an op boundary.
    ids: Structure
    #: The public function of this name; only words depend on it.
    function: str = field(compare=False)

    #: (slot, name, word) of each value in the order in which they are passed: the word is the function's.
    values: tuple[tuple[int, str, str], ...] = field(init=False, compare=False)
    #: The slots that hold tables: a slope and a bias, and again where there are two.
    tables: tuple[int, ...] = field(init=False, compare=False)
    #: How many of the consts are not zero by default: no more of them need to cross an op boundary.
    width: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        values, single = self.ids.values, _MARGINS.get(self.function)
        words = (
            value.composed if self.function == "softmax_loss" else "margin" if value.name == single else value.name
            for value in values
        )
        named = tuple((int(value.slot), value.name, word) for value, word in zip(values, words, strict=True))
        object.__setattr__(self, "values", named)
        object.__setattr__(self, "tables", tuple(int(value.slot) for value in values if value.is_table))
        object.__setattr__(self, "width", max(value.slot for value in values) + 1)

    def __repr__(self) -> str:
        kinds = (f"{word}={kind(number).name}" for (kind, word), number in zip(KINDS.values(), self.ids, strict=False))
        return f"Spec({', '.join(kinds)}; {', '.join(name for _, name, _ in self.values)})"


_F = TypeVar("_F", bound=Callable[..., Any])


def constant_when_compiled(function: _F) -> _F:
    """torch.compile calls the function while it traces, and takes what it returns as a constant.

    All that ``torch.compiler.assume_constant_result`` does, but for importing Dynamo, which takes as long as torch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_specs: dict[tuple[object, ...], Spec] = {}


@constant_when_compiled  # a Spec cannot be built in a graph
def spec(
    transform: TransformKind = TransformKind.IDENTITY,
    scale: ScaleKind = ScaleKind.SINGLE,
    head: HeadKind = HeadKind.LOG,
    beyond_pi: str | None = None,
    gradient: str = "exact",
    clamp: str = "min",
    function: str = "softmax_loss",
) -> Spec:
    """The one Spec of this structure, in the words of a public function."""
    key = (transform, scale, head, beyond_pi, gradient, clamp, function)
    try:
        return _specs[key]
    except (KeyError, TypeError):  # a new one, or an option that cannot be hashed, which is none
        pass
    kinds = (
        transform, scale, head, option("beyond_pi", beyond_pi, BeyondPi),
        option("gradient", gradient, MarginGradient), option("clamp", clamp, Clamp),
    )  # fmt: skip
    found = _specs[key] = Spec(Structure(*map(int, kinds)), function)
    return found


# ---- the public composition types ------------------------------------------------------------------------------------


class _Part:
    """Of a composition: the numbers of its kind by name, and options. A keyword that it does not take is an error."""

    kind: ClassVar[Any]
    _values: ClassVar[Callable[[Any], tuple[Any, ...]]]
    _takes_fields: ClassVar[bool] = True

    def __init_subclass__(cls, kind: TransformKind | ScaleKind | HeadKind | None = None) -> None:
        if kind is None:  # a class of the user's own
            if "__init__" in vars(cls):  # before a dataclass has made one
                cls._takes_fields = False
            return
        known: Any = {TransformKind: TRANSFORM_VALUES, ScaleKind: SCALE_VALUES, HeadKind: HEAD_VALUES}[type(kind)]
        read = "".join(f"part.{value.composed.partition('.')[2]}, " for value in known[kind])
        # One expression, as it is read at every call, and none that Dynamo does not trace.
        cls.kind, cls._values = kind, eval(f"lambda part: ({read})")

    def __new__(cls, *given: object, **keywords: object) -> Self:
        if not cls._takes_fields:
            return super().__new__(cls)
        fields: tuple[str, ...] = tuple(cls.__dataclass_fields__)  # type: ignore[attr-defined]
        few = sum(not one.kw_only for one in cls.__dataclass_fields__.values())  # type: ignore[attr-defined]
        if len(given) > few:
            raise positional_arguments(cls, given[few:])
        for name in keywords:
            if name not in fields:
                raise TypeError(f"{cls.__name__}() takes no {name!r}; there are {', '.join(fields)}")
        return super().__new__(cls)

    @property
    def values(self) -> tuple[Number | None, ...]:
        """The numbers in the order of the slots."""
        return type(self)._values(self)


@dataclass(frozen=True, eq=False, kw_only=True)
class Margin(_Part, kind=TransformKind.MARGIN):
    r"""Angular margins on the target's cosine: :math:`t(x) = \cos(m_1\theta + m_2) - m_3`, :math:`\theta=\arccos x`.

    Args:
        m1: the multiplicative margin (A-Softmax, SphereFace), > 0.
        m2: the additive angular margin in radians (ArcFace).
        m3: the additive cosine margin (CosFace).
        beyond_pi: what happens where :math:`m_1\theta + m_2 > \pi`: ``"linear"`` (only with m1 = 1, and its default),
            ``"monotone"`` (default otherwise), ``"easy"`` (margin only where the cosine is positive) or ``"none"``.
        gradient: ``"exact"``, or ``"straight_through"``: the derivative of t by the logit is taken as 1.
        norm: (N, 1), n > 0: the logit is :math:`n\,t(f_y/n)` (L-Softmax on raw logits).

    Each of m1, m2, m3 is a number or a tensor: 0-d, (C,) per class, (N, 1) per row; tensors may be trained.

    Example:
        >>> import torch, mlkernels
        >>> logits, target = torch.tensor([[0.5, 0.1], [0.2, 0.9]]), torch.tensor([0, 1])
        >>> ldam = mlkernels.Margin(m3=torch.tensor([0.1, 0.3]))  # a margin per class
        >>> mlkernels.softmax_loss(logits, target, transform=ldam, scale=10.0)
        tensor(0.0334)
    """

    m1: Number = 1.0
    m2: Number = 0.0
    m3: Number = 0.0
    beyond_pi: BeyondPiName | None = None
    gradient: GradientName = "exact"
    norm: Number | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Affine(_Part, kind=TransformKind.AFFINE):
    r"""An affine target transform: :math:`t(f) = a f + b`; slope and offset as in :class:`Margin` (a number, 0-d,
    (C,) or (N, 1))."""

    slope: Number = 1.0
    offset: Number = 0.0


@dataclass(frozen=True, eq=False)
class PiecewiseLinear(_Part, kind=TransformKind.PIECEWISE):
    r"""A piecewise-linear target transform: :math:`t(x) = a_k x + b_k` on the k-th of M equal bins of ``domain``.

    Args:
        slope: (M,), or (G, M) for a population of losses (then the loss takes ``group``).
        bias: of the same shape.
        domain: the interval that the bins divide; the outer pieces extrapolate.
        norm: (N, 1), n > 0: the logit is :math:`n\,t(f_y/n)`.

    Source: AM-LFS, equation (16) and its definition of t.
    """

    slope: Tensor
    bias: Tensor
    _: KW_ONLY
    domain: tuple[float, float] = (-1.0, 1.0)
    norm: Number | None = None

    @property
    def values(self) -> tuple[Number | None, ...]:
        """The numbers in the order of the slots."""
        try:
            if any(isinstance(end, (Tensor, str, bool)) for end in self.domain):  # which float() would take
                raise TypeError
            low, high = (float(end) for end in self.domain)
        except (TypeError, ValueError):
            raise TypeError(f"PiecewiseLinear.domain takes two numbers (low, high), got {self.domain!r}") from None
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"PiecewiseLinear.domain must be a finite interval (low, high), got {self.domain}")
        return (self.slope, self.bias, self.norm, low, high)


@dataclass(frozen=True, eq=False)
class TwoScale(_Part, kind=ScaleKind.TWO_SCALE):
    r"""A row's scale by its confidence: :math:`r/R`, with r = low where :math:`\delta X < \eta`, else high.

    Args:
        low: R1 > 0, of rows that are not well classified: a number or a 0-d tensor.
        high: R2 > 0, of the others.
        eta: the threshold on :math:`\delta X = X_y - \max_{j\ne y} X_j`; equality counts as well classified.
        norm: R > 0 (:func:`mlkernels.weight_norm_product`); None: 1.

    Source: the two-scale loss, equation (13).
    """

    low: Number
    high: Number
    _: KW_ONLY
    eta: float = 0.01
    norm: Number | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Modulated(_Part, kind=HeadKind.MODULATED):
    r"""The head :math:`\alpha(1-p^\beta)^\gamma(-\log p)^\kappa`; see :func:`mlkernels.modulated_cross_entropy`."""

    beta: Number = 4.0
    gamma: Number = 5.0
    alpha: Number = 1.0
    kappa: Number = 1.0


@dataclass(frozen=True, eq=False)
class Tau(_Part, kind=HeadKind.TAU):
    r"""The head :math:`-\log\tau(p)`, :math:`\tau(p) = a_j p + b_j` on the j-th of M equal bins of [0, 1].

    Args:
        slope: (M,), or (G, M) for a population.
        bias: of the same shape.
        minimum: where :math:`\tau \le` this, the loss is clamped.
        clamp: ``"min"``: to :math:`-\log` minimum, gradient 0; ``"cross_entropy"``: to :math:`-\log` minimum
            :math:`-\log p`, so that hard samples keep a gradient.

    Source: AM-LFS, equation (16).
    """

    slope: Tensor
    bias: Tensor
    _: KW_ONLY
    minimum: float = 1e-6
    clamp: ClampName = "min"


@dataclass(frozen=True, eq=False)
class Truncated(_Part, kind=HeadKind.TRUNCATED):
    r"""The head :math:`-\log\max(p, k)`: a single row costs at most :math:`-\log k`, with gradient 0 there.

    Source: the two-scale paper, equation (12).
    """

    k: Number


Transform: TypeAlias = Margin | Affine | PiecewiseLinear
Head: TypeAlias = Modulated | Tau | Truncated


def _names(parts: tuple[type, ...]) -> str:
    *others, last = ("None", *(part.__name__ for part in parts))
    return f"{', '.join(others)} or {last}"


# Members of an enumeration are found slowly.
_IDENTITY, _SINGLE, _TWO_SCALE, _LOG = TransformKind.IDENTITY, ScaleKind.SINGLE, ScaleKind.TWO_SCALE, HeadKind.LOG
_TRANSFORMS, _HEADS = get_args(Transform), get_args(Head)
_TRANSFORM_NAMES, _HEAD_NAMES = _names(_TRANSFORMS), _names(_HEADS)


def compose(
    transform: Transform | None, scale: Number | TwoScale, head: Head | None, target_logit: Tensor | None
) -> tuple[Spec, tuple[Number | None, ...]]:
    """The Spec and the values of a composition."""
    values: tuple[Number | None, ...] = ()
    of_transform, of_head, beyond_pi, gradient, clamp = _IDENTITY, _LOG, None, "exact", "min"
    if target_logit is not None:
        if transform is not None:
            raise ValueError(
                f"target_logit replaces the target transform: transform must be None, got {type(transform).__name__}"
            )
        of_transform, values = TransformKind.GIVEN, (target_logit,)
    elif isinstance(transform, _TRANSFORMS):
        of_transform, values = type(transform).kind, transform.values
        if isinstance(transform, Margin):
            beyond_pi, gradient = transform.beyond_pi, transform.gradient
    elif transform is not None:
        raise TypeError(
            f"transform takes {_TRANSFORM_NAMES}, got {kind_of(transform)}; a transform of your own goes through "
            "target_logit"
        )
    of_scale = _SINGLE
    if isinstance(scale, TwoScale):
        of_scale, values = _TWO_SCALE, values + scale.values
    else:
        values += (scale,)
    if isinstance(head, _HEADS):
        of_head, values = type(head).kind, values + head.values
        if isinstance(head, Tau):
            clamp = head.clamp
    elif head is not None:
        raise TypeError(
            f"head takes {_HEAD_NAMES}, got {kind_of(head)}; a head of your own is a function of the result with "
            'reduction="none"'
        )
    return spec(of_transform, of_scale, of_head, beyond_pi, gradient, clamp), values
