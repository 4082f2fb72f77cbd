"""``mlkernels.numbering`` as Triton reads it: a kernel's globals can only be constants of Triton's own."""

from __future__ import annotations

import triton.language as tl

from ... import numbering

# Kinds and options.
IDENTITY = tl.constexpr(int(numbering.TransformKind.IDENTITY))
MARGIN = tl.constexpr(int(numbering.TransformKind.MARGIN))
AFFINE = tl.constexpr(int(numbering.TransformKind.AFFINE))
GIVEN = tl.constexpr(int(numbering.TransformKind.GIVEN))
TWO_SCALE = tl.constexpr(int(numbering.ScaleKind.TWO_SCALE))
MODULATED = tl.constexpr(int(numbering.HeadKind.MODULATED))
TRUNCATED = tl.constexpr(int(numbering.HeadKind.TRUNCATED))
AUTO = tl.constexpr(int(numbering.BeyondPi.AUTO))
LINEAR = tl.constexpr(int(numbering.BeyondPi.LINEAR))
MONOTONE = tl.constexpr(int(numbering.BeyondPi.MONOTONE))
EASY = tl.constexpr(int(numbering.BeyondPi.EASY))
STRAIGHT_THROUGH = tl.constexpr(int(numbering.MarginGradient.STRAIGHT_THROUGH))
CLAMP_CROSS_ENTROPY = tl.constexpr(int(numbering.Clamp.CROSS_ENTROPY))
# The places of the numbers v of a row.
SCALE = tl.constexpr(int(numbering.Slot.SCALE))
SCALE_HIGH = tl.constexpr(int(numbering.Slot.SCALE_HIGH))
ETA = tl.constexpr(int(numbering.Slot.ETA))
LOGIT_NORM = tl.constexpr(int(numbering.Slot.LOGIT_NORM))
TRANSFORM_A = tl.constexpr(int(numbering.Slot.TRANSFORM_A))
TRANSFORM_B = tl.constexpr(int(numbering.Slot.TRANSFORM_B))
TRANSFORM_C = tl.constexpr(int(numbering.Slot.TRANSFORM_C))
NORM = tl.constexpr(int(numbering.Slot.NORM))
HEAD_A = tl.constexpr(int(numbering.Slot.HEAD_A))
HEAD_B = tl.constexpr(int(numbering.Slot.HEAD_B))
HEAD_C = tl.constexpr(int(numbering.Slot.HEAD_C))
HEAD_D = tl.constexpr(int(numbering.Slot.HEAD_D))
DOMAIN_LOW = tl.constexpr(int(numbering.Slot.DOMAIN_LOW))
DOMAIN_HIGH = tl.constexpr(int(numbering.Slot.DOMAIN_HIGH))
TAU_MIN = tl.constexpr(int(numbering.Slot.TAU_MIN))
NONE = tl.constexpr(int(numbering.Reduction.NONE))
MEAN = tl.constexpr(int(numbering.Reduction.MEAN))
LOSS_SLOTS = tl.constexpr(numbering.LOSS_SLOTS)
TRAINABLE_SLOTS = tl.constexpr(numbering.TRAINABLE_SLOTS)
#: The slots whose gradient needs the mean logit.
NEED_SHIFT = tl.constexpr(sum(1 << slot for slot in numbering.OF_SCALE))
T_TABLES = tl.constexpr(sum(1 << slot for slot in numbering.TRANSFORM_TABLES[numbering.TransformKind.PIECEWISE]))
TAU_TABLES = tl.constexpr(sum(1 << slot for slot in numbering.HEAD_TABLES[numbering.HeadKind.TAU]))
# How a number reaches a kernel.
BY_VALUE = tl.constexpr(int(numbering.Mode.BY_VALUE))
SHARED = tl.constexpr(int(numbering.Mode.SHARED))
PER_CLASS = tl.constexpr(int(numbering.Mode.PER_CLASS))
MODE_BASE = tl.constexpr(len(numbering.Mode))  # the modes of all slots are the digits of a number
KIND_BITS, KIND_MASK = tl.constexpr(numbering.KIND_BITS), tl.constexpr((1 << numbering.KIND_BITS) - 1)
TRANSFORM = tl.constexpr(int(numbering.Field.TRANSFORM))
ROW_SCALE = tl.constexpr(int(numbering.Field.ROW_SCALE))
HEAD = tl.constexpr(int(numbering.Field.HEAD))
BEYOND_PI = tl.constexpr(int(numbering.Field.BEYOND_PI))
MARGIN_GRADIENT = tl.constexpr(int(numbering.Field.MARGIN_GRADIENT))
CLAMP = tl.constexpr(int(numbering.Field.CLAMP))
SMOOTHING = tl.constexpr(int(numbering.Slot.SMOOTHING))
Z_LOSS = tl.constexpr(int(numbering.Slot.Z_LOSS))
SOFTCAP = tl.constexpr(int(numbering.Slot.SOFTCAP))
NORMALIZER = tl.constexpr(int(numbering.Slot.NORMALIZER))

INF = tl.constexpr(float("inf"))
