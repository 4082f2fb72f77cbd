"""The semantics in plain torch: the oracle of every kernel, and the backend where there is no kernel.

Readable first. It runs in float32 (half inputs are widened) or float64, is differentiable twice, works under
``torch.func`` and never synchronises; it makes a handful of N x C temporaries and makes no claim to speed.
The scalar part has the same functions in the same order as ``csrc/finish.h``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..numbering import Structure, structure_of
from ..spec import (
    CONSTS,
    IGNORE_INDEX,
    MASK,
    REDUCTION,
    SLOTS,
    BeyondPi,
    Clamp,
    HeadKind,
    MarginGradient,
    Reduction,
    ScaleKind,
    Slot,
    TransformKind,
)

#: The floor of sqrt(1 - x^2) where it divides: derivatives of angles stay finite, and within fp16 at s = 64.
ROOT_FLOOR = 2.0**-10


class Stats(NamedTuple):
    """What a row knows about itself; see :class:`mlkernels.RowStats`."""

    logsumexp: Tensor
    log_prob: Tensor
    prediction: Tensor
    confidence: Tensor
    rank: Tensor


class _Values:
    """The numbers of a loss, per row."""

    def __init__(
        self, label: Tensor, kept: Tensor, dtype: torch.dtype, consts: Sequence[float], params: dict[int, Tensor]
    ):
        self.label, self.kept, self.dtype, self.consts, self.params = label, kept, dtype, consts, params

    def __getitem__(self, slot: int) -> Tensor:
        """0-d where the number is shared, else (rows,)."""
        param = self.params.get(slot)
        if param is None:
            return torch.full((), self.consts[int(slot)], dtype=self.dtype, device=self.label.device)
        param = param.to(self.dtype)
        if param.dim() == 0:
            return param
        # An ignored row's own number is not read either: 1 is legal for all of them.
        return param[self.label] if param.dim() == 1 else torch.where(self.kept, param.reshape(-1), 1)

    def bins(self, slot: int) -> int:
        return self.params[slot].shape[-1]

    def table(self, slot: int, index: Tensor) -> Tensor:
        table = self.params[slot].to(self.dtype)
        if table.dim() == 1:
            return table[index]
        group = self.params[Slot.GROUP].reshape(-1).long()
        inside = (group >= 0) & (group < table.shape[0])
        return torch.where(inside, table[torch.where(inside, group, 0), index], math.nan)


# ---- transforms: t(f_y) ----------------------------------------------------------------------------------------------


def _root(x: Tensor) -> Tensor:
    """sqrt(max(0, 1 - x^2)), its derivative -x / max(root, floor)."""
    square = 1 - x * x
    smooth = square > ROOT_FLOOR**2
    root = square.clamp(min=0).sqrt().detach() - (x / ROOT_FLOOR).detach() * (x - x.detach())
    return torch.where(smooth, torch.where(smooth, square, 1).sqrt(), root)


def _angle(x: Tensor) -> Tensor:
    """arccos of x clamped to [-1, 1], its derivative -1 / max(root, floor)."""
    smooth = 1 - x * x > ROOT_FLOOR**2
    edge = x.clamp(-1, 1).acos().detach() - (x - x.detach()) / ROOT_FLOOR
    return torch.where(smooth, torch.where(smooth, x, 0).acos(), edge)


def margin(x: Tensor, m1: Tensor, m2: Tensor, m3: Tensor, beyond_pi: int, gradient: int) -> Tensor:
    """cos(m1 theta + m2) - m3 with the chosen continuation beyond pi, and that of a negative m2 below 0."""
    passed = x
    if gradient == MarginGradient.STRAIGHT_THROUGH:
        x = x.detach()
    single = m1 == 1
    bounded = torch.where(x.isinf(), x.sign(), x)  # a class of probability 0 has no angle
    theta, root = _angle(bounded), _root(bounded)
    phi = m1 * theta + m2
    closed = x * m2.cos() - m2.sin() * root
    closed = closed - (m1 - 1) * theta * (bounded * m2.sin() + m2.cos() * root)  # 0; m1 may be trained from 1
    cosine = torch.where(single, closed, phi.cos())
    plain = cosine - m3

    # At exactly pi (an x of -1, and all below, which the closed form does not clamp) nothing is beyond it yet.
    turn = torch.where(phi > 0, (phi / math.pi).ceil() - 1, (phi / math.pi).floor()).detach()
    monotone = torch.where(turn % 2 == 0, cosine, -cosine) - 2 * turn - m3
    past = (m2 > 0) & ((m2 >= math.pi) | (x < -m2.cos()))
    # A negative margin ends at the cosine's maximum: beyond it, easy rows would be pushed away.
    over = single & (m2 < 0) & ((m2 <= -math.pi) | (x > m2.cos()))
    rising = torch.where(over, x + (1 - m2.cos()) - m3, plain)
    linear = torch.where(past, x - m2 * m2.sin() - m3, rising)
    if beyond_pi == BeyondPi.AUTO:
        t = torch.where(single, linear, monotone)
    elif beyond_pi == BeyondPi.LINEAR:
        t = torch.where(single, linear, math.nan)
    elif beyond_pi == BeyondPi.MONOTONE:
        t = monotone
    elif beyond_pi == BeyondPi.EASY:
        t = torch.where(x > 0, rising, x)
    else:
        t = plain
    if gradient == MarginGradient.STRAIGHT_THROUGH:
        t = torch.where(t.isinf(), passed, t + (passed - passed.detach()))
    return t


def _bin(x: Tensor, low: float, high: float, count: int) -> Tensor:
    """The index of x's bin, clamped; 0 for NaN."""
    index = ((x - low) * (count / (high - low))).floor()
    return torch.where(index == index, index, 0).clamp(0, count - 1).long()


def transform_target(structure: Structure, x: Tensor, values: _Values) -> Tensor:
    """t(f_y), (rows,)."""
    kind = structure.transform
    if kind == TransformKind.IDENTITY:
        return x
    a = Slot.TRANSFORM_A
    if kind == TransformKind.GIVEN:
        return values[a].expand_as(x)
    if kind == TransformKind.AFFINE:
        return values[a] * x + values[Slot.TRANSFORM_B]
    has_norm = Slot.NORM in values.params or values.consts[int(Slot.NORM)] > 0
    norm = values[Slot.NORM] if has_norm else None
    if norm is not None:
        norm = torch.where(norm > 0, norm, math.nan)
    u = x if norm is None else x / norm
    if kind == TransformKind.MARGIN:
        m = (values[a], values[Slot.TRANSFORM_B], values[Slot.TRANSFORM_C])
        t = margin(u, torch.where(m[0] > 0, m[0], math.nan), m[1], m[2], structure.beyond_pi, structure.margin_gradient)
    else:
        low, high = values.consts[int(Slot.DOMAIN_LOW)], values.consts[int(Slot.DOMAIN_HIGH)]
        index = _bin(u.detach(), low, high, values.bins(a))
        t = values.table(a, index) * u + values.table(Slot.TRANSFORM_B, index)
    return t if norm is None else norm * t


# ---- row scales ------------------------------------------------------------------------------------------------------


def row_scale(kind: int, confidence: Tensor, values: _Values) -> Tensor:
    """s, 0-d or (rows,). Not positive: NaN."""
    scale = values[Slot.SCALE]
    if kind == ScaleKind.TWO_SCALE:
        scale = torch.where(confidence < values[Slot.ETA], scale, values[Slot.SCALE_HIGH])
        norm = values[Slot.LOGIT_NORM]
        scale = torch.where(norm > 0, scale / norm, math.nan)
    return torch.where(scale > 0, scale, math.nan)


# ---- heads: phi(log p), from delta = logsumexp over j != y of z, minus z_y -------------------------------------------


def _damping(x: Tensor) -> Tensor:
    """(1 - exp(-x)) / x for x in [0, 1/4]: its Taylor series, which autograd cannot spoil by cancellation."""
    total = torch.zeros_like(x)
    for k in range(13, -1, -1):
        total = 1 / math.factorial(k + 1) - x * total
    return total


def modulated(nll: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, kappa: Tensor) -> Tensor:
    """alpha (1 - p^beta)^gamma (-log p)^kappa; (m/nll)^gamma nll^(gamma+kappa) near p = 1, where m -> 0."""
    x = beta * nll
    near, impossible = x < 0.25, nll == math.inf
    close = _damping(torch.where(near, x, 0)) * beta
    close = close.pow(gamma) * torch.where(near, nll, 1).pow(gamma + kappa)
    # At p = 0 the damping is the constant 1: its derivatives are 0, not 0 * inf. NaN takes this branch too.
    inside = ~near & ~impossible
    # Not expm1: its derivative, formed as expm1 + 1, would be lost where p^beta is small.
    damp = torch.where(inside, (1 - torch.exp(-torch.where(inside, x, 1))).pow(gamma), 1)
    apart = damp * torch.where(near, 1, nll).pow(kappa)
    legal = (alpha >= 0) & (beta > 0) & (gamma >= 0) & (kappa >= 0)
    return torch.where(legal, alpha * torch.where(near, close, apart), math.nan)


def tau(nll: Tensor, values: _Values, clamp: int) -> Tensor:
    """-log tau(p), tau(p) = a p + b on p's bin."""
    p = torch.exp(-nll)
    index = _bin(p.detach(), 0.0, 1.0, values.bins(Slot.HEAD_A))
    a, b = values.table(Slot.HEAD_A, index), values.table(Slot.HEAD_B, index)
    minimum = values[Slot.TAU_MIN]
    level = a * p + b
    pure = (b == 0) & (a > 0)
    # No clamp here, so identity tables are cross entropy for every p; b's own derivative, -1/tau, is floored.
    floor = torch.maximum((a * p).detach(), minimum)
    exact = nll - torch.where(pure, a, 1).log() - (b - b.detach()) / floor
    low = ~pure & (level <= minimum)
    regular = -torch.where(pure | low, 1, level).log()
    clamped = -minimum.log().expand_as(nll)
    if clamp == Clamp.CROSS_ENTROPY:
        clamped = clamped + nll
    return torch.where(pure, exact, torch.where(low, clamped, regular))


def truncated(nll: Tensor, k: Tensor) -> Tensor:
    """-log max(p, k)."""
    legal = (k > 0) & (k <= 1)
    ceiling = -torch.where(legal, k, 1).log()
    return torch.where(legal, torch.where(nll > ceiling, ceiling, nll), math.nan)


def head_loss(structure: Structure, nll: Tensor, values: _Values) -> Tensor:
    """phi(log p), (rows,)."""
    kind = structure.head
    if kind == HeadKind.MODULATED:
        return modulated(nll, *(values[s] for s in (Slot.HEAD_A, Slot.HEAD_B, Slot.HEAD_C, Slot.HEAD_D)))
    if kind == HeadKind.TAU:
        return tau(nll, values, structure.clamp)
    if kind == HeadKind.TRUNCATED:
        return truncated(nll, values[Slot.HEAD_A])
    return nll


# ---- a row, whole ----------------------------------------------------------------------------------------------------


def unpack(mask: int, params: Sequence[Tensor]) -> dict[int, Tensor]:
    """The tensors by slot: bit s of the mask says that slot s holds the next one."""
    return dict(zip((s for s in range(SLOTS) if mask >> s & 1), params, strict=True))


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """No autocast, where the device has such a thing."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


def softmax_loss(
    input: Tensor, target: Tensor, numbers: Sequence[float], params: Sequence[Tensor]
) -> tuple[Tensor, Stats]:
    """Any loss of the family, reduced, and its row statistics.

    Args:
        input: (N, C) or (N, C, d1, ...), floating. target: (N) or (N, d1, ...), integer.
        numbers: Spec.ids, reduction, ignore_index, the mask of the slots that are tensors, then one number per slot;
            those that are left out at the end are 0.
        params: the tensors, by slot.
    """
    consts = [*numbers[CONSTS:], *[0.0] * (SLOTS + CONSTS - len(numbers))]
    with full_precision(input.device):
        return _softmax_loss(input, target, structure_of(numbers), numbers, consts, params)


def _softmax_loss(
    input: Tensor,
    target: Tensor,
    structure: Structure,
    numbers: Sequence[float],
    consts: Sequence[float],
    params: Sequence[Tensor],
) -> tuple[Tensor, Stats]:
    reduction, ignore_index, mask = (int(numbers[field]) for field in (REDUCTION, IGNORE_INDEX, MASK))
    by_slot = unpack(mask, params)
    accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
    classes = input.shape[1]

    f = input.movedim(1, -1).reshape(-1, classes).to(accumulate)
    label = target.reshape(-1).long()
    kept = label != ignore_index
    legal = (label >= 0) & (label < classes)
    y = torch.where(legal, label, 0)
    # An ignored row is not read: whatever it holds, it holds no gradient.
    f = torch.where(kept.unsqueeze(1), f, 0)
    values = _Values(y, kept, accumulate, consts, by_slot)

    finite = f.amax(1) < math.inf  # false for NaN
    cap = consts[int(Slot.SOFTCAP)]
    if cap > 0:
        f = cap * torch.tanh(f / cap)
    if Slot.ADJUSTMENT in by_slot:
        f = f + by_slot[Slot.ADJUSTMENT].to(accumulate).detach()

    column = y.unsqueeze(1)
    f_y = f.gather(1, column).squeeze(1)
    is_target = torch.arange(classes, device=f.device) == column
    others = torch.where(is_target, -math.inf, f)
    runner_up = others.amax(1).detach()
    confidence = f_y.detach() - runner_up
    # NaN, +inf, only -inf, and labels out of range (never 0, never a read out of bounds): the whole row is NaN, and as
    # this is a product, its gradient too.
    sound = finite & (f.amax(1) > -math.inf) & (legal | ~kept)
    mark = torch.where(sound, 1.0, math.nan).to(accumulate)
    f_y, others = f_y * mark, others * mark.unsqueeze(1)

    s = row_scale(structure.row_scale, confidence, values)
    t = transform_target(structure, f_y, values)
    s_rows = s.expand_as(t) if s.dim() == 0 else s
    z_y = s_rows * t
    smoothing = consts[int(Slot.SMOOTHING)]
    # A class of probability 0 contributes 0 to every sum: its -inf must not meet a 0 on the way to s. But smoothing
    # counts such a class: the loss is infinite, and grows with s.
    absent = is_target if smoothing > 0 else (others == -math.inf).detach()
    column_s = s_rows.unsqueeze(1)
    z = torch.where(absent, column_s.detach() * others, column_s * torch.where(absent, 0, others))

    # Everything relative to the largest other class: a difference of large logsumexps would lose what they share.
    top = torch.where(runner_up == -math.inf, 0, runner_up * s_rows.detach())
    total = torch.exp(z - top.unsqueeze(1)).sum(1)
    alone = total == 0  # no other class has a chance: log p_y is 0
    log_total = torch.where(alone, 1, total).log()
    lead = z_y - top
    delta = torch.where(alone, -math.inf - z_y, log_total - lead)
    # An infinite z of the target's is no certainty but an overflow.
    overflow = torch.where(z_y < math.inf, 1.0, math.nan).to(accumulate)
    nll = torch.logaddexp(delta, torch.zeros_like(delta)) * overflow
    lse = torch.where(alone, lead, torch.logaddexp(log_total, lead))  # less top
    lse = lse * overflow

    loss = head_loss(structure, nll, values)
    weight = by_slot.get(Slot.WEIGHT)
    omega = None if weight is None else weight.to(accumulate).detach()
    omega_y = torch.ones_like(loss) if omega is None else omega[y]
    loss = omega_y * loss
    if smoothing > 0:
        every_z = torch.where(is_target, z_y.unsqueeze(1), z)
        gap = lse.unsqueeze(1) - (every_z - top.unsqueeze(1))
        spread = (gap if omega is None else gap * omega).sum(1)
        loss = (1 - smoothing) * loss + smoothing / classes * spread
    loss = torch.where(kept, loss, 0)
    lse = lse + top
    z_loss = consts[int(Slot.Z_LOSS)]
    penalty = torch.where(kept, z_loss * lse * lse, 0) if z_loss > 0 else None

    if reduction == Reduction.NONE:
        result = loss if penalty is None else loss + penalty
        result = result.reshape(target.shape)
    elif reduction == Reduction.SUM:
        result = loss.sum() if penalty is None else loss.sum() + penalty.sum()
    else:
        total_weight = torch.where(kept, omega_y, 0).sum()
        result = loss.sum() / torch.where(total_weight == 0, math.nan, total_weight)  # smoothing has a loss there still
        if penalty is not None:
            result = result + penalty.sum() / kept.sum()

    shape = target.shape
    with torch.no_grad():
        highest = f.amax(1, keepdim=True)
        index = torch.arange(classes, device=f.device)
        prediction = torch.where(f == highest, index, classes).amin(1)
        prediction = torch.where(kept & (prediction < classes), prediction, -1)
        rank = torch.where(kept, (f > f_y.unsqueeze(1)).sum(1), 0)
    stats = Stats(
        torch.where(kept, lse, 0).reshape(shape),
        torch.where(kept, -nll, 0).reshape(shape),
        prediction.reshape(shape),
        torch.where(kept, torch.where(legal, confidence, math.nan), 0).reshape(shape),
        rank.reshape(shape),
    )
    return result, stats
