"""What is a number on its way to the kernels: kinds and options, slots, the layout of what crosses an op boundary.

Said here and nowhere else. Python imports it, Triton's kernels take their constants from it, and ``csrc/build.py``
writes ``csrc/numbering.h`` from it (:func:`header`): it imports nothing of the package, nor torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

# ---- kinds and options -----------------------------------------------------------------------------------------------


class TransformKind(IntEnum):
    """What happens to the target's logit."""

    IDENTITY = 0
    MARGIN = 1
    AFFINE = 2
    PIECEWISE = 3
    GIVEN = 4


class ScaleKind(IntEnum):
    """How a row finds its scale."""

    SINGLE = 0
    TWO_SCALE = 1


class HeadKind(IntEnum):
    """The function of log p that is the loss."""

    LOG = 0
    MODULATED = 1
    TAU = 2
    TRUNCATED = 3


class BeyondPi(IntEnum):
    """What a margin does where m1*theta + m2 > pi. AUTO: linear where m1 = 1, else monotone."""

    AUTO = 0
    LINEAR = 1
    MONOTONE = 2
    EASY = 3
    NONE = 4


class MarginGradient(IntEnum):
    """The derivative of a margin: its own, or 1."""

    EXACT = 0
    STRAIGHT_THROUGH = 1


class Clamp(IntEnum):
    """What the loss is where tau(p) <= minimum."""

    MIN = 0
    CROSS_ENTROPY = 1


class Reduction(IntEnum):
    """How row losses become the result."""

    NONE = 0
    MEAN = 1
    SUM = 2


class Mode(IntEnum):
    """How a number of the loss reaches a kernel: as it is, or in a tensor of one, one per class, one per row."""

    BY_VALUE = 0
    SHARED = 1
    PER_CLASS = 2
    PER_ROW = 3


# ---- slots -----------------------------------------------------------------------------------------------------------


class Slot(IntEnum):
    """Where each number of a loss lies; the meaning of TRANSFORM_* and HEAD_* depends on the kind, see VALUES."""

    SCALE = 0
    SCALE_HIGH = 1
    ETA = 2
    LOGIT_NORM = 3
    TRANSFORM_A = 4
    TRANSFORM_B = 5
    TRANSFORM_C = 6
    NORM = 7  # 0: none
    HEAD_A = 8
    HEAD_B = 9
    HEAD_C = 10
    HEAD_D = 11
    DOMAIN_LOW = 12
    DOMAIN_HIGH = 13
    TAU_MIN = 14
    # From here on what every loss has.
    SMOOTHING = 15
    Z_LOSS = 16
    SOFTCAP = 17  # 0: none
    NORMALIZER = 18  # what "mean" divides by in place of its own divisors, a number or 0-d; 0: none
    # From here on always tensors, never differentiated.
    WEIGHT = 19
    ADJUSTMENT = 20
    GROUP = 21
    ROW_WEIGHT = 22  # of target's shape: a factor of each row's whole loss


SLOTS = len(Slot)
#: So many slots, the first ones, hold the numbers of transform, scale and head.
LOSS_SLOTS = int(Slot.TAU_MIN) + 1
#: The slots whose tensors can be trained. ETA is a threshold: the mask it draws has no gradient.
TRAINABLE = frozenset(slot for slot in Slot if slot <= Slot.HEAD_D and slot != Slot.ETA)
#: They are among so many, the first ones.
TRAINABLE_SLOTS = max(TRAINABLE) + 1
#: The slots whose gradient is one by the scale of a row, which takes the mean logit.
OF_SCALE = frozenset({Slot.SCALE, Slot.SCALE_HIGH, Slot.LOGIT_NORM})


class Value(NamedTuple):
    """A number of a kind: its slot, the name that functions have for it, and what it is in a composition."""

    slot: Slot
    name: str
    composed: str
    is_table: bool = False  # (bins) or (groups, bins), and nothing else


_T, _S, _H = TransformKind, ScaleKind, HeadKind
#: The numbers of each kind, in the order in which they are passed.
TRANSFORM_VALUES: dict[TransformKind, tuple[Value, ...]] = {
    _T.IDENTITY: (),
    _T.MARGIN: (
        Value(Slot.TRANSFORM_A, "m1", "Margin.m1"),
        Value(Slot.TRANSFORM_B, "m2", "Margin.m2"),
        Value(Slot.TRANSFORM_C, "m3", "Margin.m3"),
        Value(Slot.NORM, "norm", "Margin.norm"),
    ),
    _T.AFFINE: (
        Value(Slot.TRANSFORM_A, "slope", "Affine.slope"),
        Value(Slot.TRANSFORM_B, "offset", "Affine.offset"),
    ),
    _T.PIECEWISE: (
        Value(Slot.TRANSFORM_A, "t_slope", "PiecewiseLinear.slope", is_table=True),
        Value(Slot.TRANSFORM_B, "t_bias", "PiecewiseLinear.bias", is_table=True),
        Value(Slot.NORM, "norm", "PiecewiseLinear.norm"),
        Value(Slot.DOMAIN_LOW, "domain", "PiecewiseLinear.domain"),
        Value(Slot.DOMAIN_HIGH, "domain", "PiecewiseLinear.domain"),
    ),
    _T.GIVEN: (Value(Slot.TRANSFORM_A, "target_logit", "target_logit"),),
}
SCALE_VALUES: dict[ScaleKind, tuple[Value, ...]] = {
    _S.SINGLE: (Value(Slot.SCALE, "scale", "scale"),),
    _S.TWO_SCALE: (
        Value(Slot.SCALE, "scale_low", "TwoScale.low"),
        Value(Slot.SCALE_HIGH, "scale_high", "TwoScale.high"),
        Value(Slot.ETA, "eta", "TwoScale.eta"),
        Value(Slot.LOGIT_NORM, "logit_norm", "TwoScale.norm"),
    ),
}
HEAD_VALUES: dict[HeadKind, tuple[Value, ...]] = {
    _H.LOG: (),
    _H.MODULATED: (
        Value(Slot.HEAD_B, "beta", "Modulated.beta"),
        Value(Slot.HEAD_C, "gamma", "Modulated.gamma"),
        Value(Slot.HEAD_A, "alpha", "Modulated.alpha"),
        Value(Slot.HEAD_D, "kappa", "Modulated.kappa"),
    ),
    _H.TAU: (
        Value(Slot.HEAD_A, "tau_slope", "Tau.slope", is_table=True),
        Value(Slot.HEAD_B, "tau_bias", "Tau.bias", is_table=True),
        Value(Slot.TAU_MIN, "tau_min", "Tau.minimum"),
    ),
    _H.TRUNCATED: (Value(Slot.HEAD_A, "k", "Truncated.k"),),
}
TRANSFORM_TABLES = tuple(frozenset(v.slot for v in TRANSFORM_VALUES[kind] if v.is_table) for kind in TransformKind)
HEAD_TABLES = tuple(frozenset(v.slot for v in HEAD_VALUES[kind] if v.is_table) for kind in HeadKind)


class Extra(NamedTuple):
    """What every loss may be given: its keyword, and how many numbers a tensor of it has."""

    name: str
    per: Mode = Mode.BY_VALUE


#: By slot; numbers first, in the order in which they are passed.
EXTRAS: dict[Slot, Extra] = {
    Slot.SMOOTHING: Extra("label_smoothing"),
    Slot.Z_LOSS: Extra("z_loss"),
    Slot.SOFTCAP: Extra("softcap"),
    Slot.NORMALIZER: Extra("normalizer", Mode.SHARED),
    Slot.WEIGHT: Extra("weight", Mode.PER_CLASS),
    Slot.ADJUSTMENT: Extra("logit_adjustment", Mode.PER_CLASS),
    Slot.GROUP: Extra("group", Mode.PER_ROW),
    Slot.ROW_WEIGHT: Extra("row_weight", Mode.PER_ROW),
}
#: Those of which a tensor has a number for each class.
PER_CLASS: dict[int, str] = {slot: extra.name for slot, extra in EXTRAS.items() if extra.per == Mode.PER_CLASS}
#: Where 0 stands for none.
NONE_AT_0 = frozenset({Slot.NORM, Slot.SOFTCAP, Slot.NORMALIZER})


# ---- what crosses an op boundary -------------------------------------------------------------------------------------


class Field(IntEnum):
    """Where everything lies in the numbers that cross an op boundary: a structure, what all losses have, the slots."""

    TRANSFORM = 0
    ROW_SCALE = 1
    HEAD = 2
    BEYOND_PI = 3
    MARGIN_GRADIENT = 4
    CLAMP = 5
    REDUCTION = 6
    IGNORE_INDEX = 7
    MASK = 8  # bit s: slot s holds a tensor
    CONSTS = 9  # from here on a number per slot; zeros at the end may be left out


REDUCTION, IGNORE_INDEX = int(Field.REDUCTION), int(Field.IGNORE_INDEX)
MASK, CONSTS = int(Field.MASK), int(Field.CONSTS)
#: What is asked of an operator, as a number: bit s stands for the gradient of slot s, this one for that of the logits.
INPUT = SLOTS


def needed(needs: int) -> list[int]:
    """The bits that are set, lowest first; the logits come last."""
    return [bit for bit in range(SLOTS + 1) if needs >> bit & 1]


def slots_of(numbers: Sequence[float]) -> list[int]:
    """The slots that hold tensors, in the order in which these come."""
    mask = int(numbers[MASK])
    return [slot for slot in range(SLOTS) if mask >> slot & 1]


def consts_of(numbers: Sequence[float]) -> list[float]:
    """A number for each slot; those that are left out at the end are 0."""
    return [*numbers[CONSTS:], *[0.0] * (SLOTS + CONSTS - len(numbers))]


#: The kind or option whose number each field is, with the word for it.
KINDS: dict[Field, tuple[type[IntEnum], str]] = {
    Field.TRANSFORM: (TransformKind, "transform"),
    Field.ROW_SCALE: (ScaleKind, "row scale"),
    Field.HEAD: (HeadKind, "head"),
    Field.BEYOND_PI: (BeyondPi, "beyond_pi"),
    Field.MARGIN_GRADIENT: (MarginGradient, "gradient of a margin"),
    Field.CLAMP: (Clamp, "clamp"),
    Field.REDUCTION: (Reduction, "reduction"),
}
#: A structure as one number, where it has to be one: so many bits for each of its fields.
KIND_BITS = 4


class Structure(NamedTuple):
    """The fields before REDUCTION."""

    transform: int
    row_scale: int
    head: int
    beyond_pi: int
    margin_gradient: int
    clamp: int

    @property
    def values(self) -> tuple[Value, ...]:
        """The numbers of a loss, in the order in which they are passed."""
        of_transform, of_scale = TRANSFORM_VALUES[_T(self.transform)], SCALE_VALUES[_S(self.row_scale)]
        return of_transform + of_scale + HEAD_VALUES[_H(self.head)]

    @property
    def tables(self) -> frozenset[Slot]:
        """The slots that hold tables."""
        return TRANSFORM_TABLES[self.transform] | HEAD_TABLES[self.head]

    @property
    def scales(self) -> int:
        """How many scales a row may turn out to have."""
        return 2 if self.row_scale == ScaleKind.TWO_SCALE else 1

    @property
    def packed(self) -> int:
        """All of it as one number."""
        return sum(kind << KIND_BITS * place for place, kind in enumerate(self))


_LIMITS = tuple((int(field), len(kind), word) for field, (kind, word) in KINDS.items())


def structure_of(numbers: Sequence[float]) -> Structure:
    """The structure that the numbers of an operator begin with. An unknown kind is never another loss: a ValueError."""
    for field, count, word in _LIMITS:
        number = numbers[field]
        if not (0 <= number < count and number == int(number)):
            raise ValueError(f"there is no {word} with the number {number}")
    return Structure(*map(int, numbers[:REDUCTION]))


# ---- the same in C++ -------------------------------------------------------------------------------------------------


def _enum(kind: type[IntEnum], name: str, scoped: bool, says: dict[str, str] | None = None) -> str:
    lines = [f"// {(kind.__doc__ or '').strip()}", f"enum {'class ' if scoped else ''}{name} : int {{"]
    for member in kind:
        words = (says or {}).get(member.name)
        lines.append(f"  {member.name} = {member.value},{f'  // {words}' if words else ''}")
    return "\n".join([*lines, "};"])


def _bits(slots: frozenset[Slot]) -> str:
    return " | ".join(f"1u << {slot.name}" for slot in sorted(slots)) or "0"


def header() -> str:
    """``csrc/numbering.h``."""
    names = {slot.name: [EXTRAS[slot].name] if slot in EXTRAS else [] for slot in Slot}
    for values in (*TRANSFORM_VALUES.values(), *SCALE_VALUES.values(), *HEAD_VALUES.values()):
        for value in values:
            names[value.slot.name].append(value.name)
    words = {slot: ", ".join(dict.fromkeys(found)) for slot, found in names.items()}
    kinds = [(kind, kind.__name__.removesuffix("Kind"), word) for kind, word in KINDS.values()]
    parts = [_enum(kind, name, scoped=True) for kind, name, _ in kinds]
    parts.append(_enum(Mode, "Mode", scoped=True))
    parts.append("// How many there are of a kind, and the word for it.\ntemplate <class Kind>\nstruct Known;")
    for kind, name, word in kinds:
        parts[-1] += f"\ntemplate <>\nstruct Known<{name}> {{\n  static constexpr int COUNT = {len(kind)};"
        parts[-1] += f'\n  static constexpr const char* WORD = "{word}";\n}};'
    parts.append(_enum(Slot, "Slot", scoped=False, says=words))
    parts.append(
        f"constexpr int SLOTS = {SLOTS};\n"
        f"constexpr int LOSS_SLOTS = {LOSS_SLOTS};  // the numbers of transform, scale and head\n"
        f"constexpr int TRAINABLE_SLOTS = {TRAINABLE_SLOTS};  // the trainable ones are among these\n"
        f"constexpr unsigned OF_SCALE = {_bits(OF_SCALE)};  // their gradient takes the mean logit"
    )
    tables = ["// The slots that hold tables, by kind."]
    for name, kind_slots in (("TRANSFORM_TABLES", TRANSFORM_TABLES), ("HEAD_TABLES", HEAD_TABLES)):
        tables.append(f"constexpr unsigned {name}[] = {{{', '.join(map(_bits, kind_slots))}}};")
    parts.append("\n".join(tables))
    extras = [f'{{{slot.name}, Mode::{extra.per.name}, "{extra.name}"}}' for slot, extra in EXTRAS.items()]
    parts.append(
        "// What every loss may be given, and how many numbers a tensor of it has.\n"
        "struct Extra {\n  Slot slot;\n  Mode per;\n  const char* name;\n};\n"
        f"constexpr Extra EXTRAS[] = {{{', '.join(extras)}}};"
    )
    parts.append(_enum(Field, "Field", scoped=False))
    body = "\n\n".join(parts)
    return (
        "// Written by csrc/build.py from mlkernels/numbering.py, where it is changed.\n#pragma once\n\n"
        f"namespace mlkernels {{\n\n{body}\n\n"
        "// Of all this: a library says of which numbering it is.\n"
        f'constexpr char NUMBERING[] = "{zlib.crc32(body.encode()):08x}";\n\n'
        "}  // namespace mlkernels\n"
    )


def signature() -> str:
    """What a library of this numbering says of itself."""
    return header().rsplit('"', 2)[1]
