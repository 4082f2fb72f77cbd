"""The scalar part of the reference: from what is known of a row to its loss, and the only place that knows losses.

The same functions in the same order as ``csrc/finish.h`` and ``triton/finish.py``, in plain torch over a vector of
rows. Autograd takes their derivatives, so each is right at its edges too: p = 0 and 1, NaN, a number out of range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..numbering import (
    IGNORE_INDEX,
    REDUCTION,
    BeyondPi,
    Clamp,
    HeadKind,
    MarginGradient,
    ScaleKind,
    Slot,
    TransformKind,
    consts_of,
    slots_of,
    structure_of,
)

#: The floor of sqrt(1 - x^2) where it divides: derivatives of angles stay finite, and within fp16 at s = 64.
ROOT_FLOOR = 2.0**-10


class Values:
    """A loss and its numbers, as every row of a batch sees them.

    Args:
        numbers: Spec.ids, reduction, ignore_index, the mask of the slots that are tensors, then one number per slot;
            those that are left out at the end are 0.
        params: the tensors, by slot.
        target: (rows,) labels, of any integer dtype. classes: C of the whole row.
        dtype: what is computed in.
    """

    def __init__(
        self, numbers: Sequence[float], params: Sequence[Tensor], target: Tensor, classes: int, dtype: torch.dtype
    ):
        self.structure, self.reduction = structure_of(numbers), int(numbers[REDUCTION])
        self.consts = consts_of(numbers)
        self.params = dict(zip(slots_of(numbers), params, strict=True))
        self.numbers, self.target, self.classes, self.dtype = numbers, target, classes, dtype
        label = target.long()
        self.kept = label != int(numbers[IGNORE_INDEX])
        inside = (label >= 0) & (label < classes)
        #: False where a label is out of range: that row is NaN, never 0, never a read out of bounds.
        self.legal = inside | ~self.kept
        self.label = torch.where(inside, label, 0)
        #: 1, or NaN where a row is: a factor of every tensor's number, whose gradient is NaN there too.
        self.mark = torch.ones((), dtype=dtype, device=label.device)
        self.smoothing, self.z_loss = self.consts[int(Slot.SMOOTHING)], self.consts[int(Slot.Z_LOSS)]
        #: Whether a row's loss has a term that class weights do not weigh.
        self.has_row_term = self.z_loss > 0

    def __getitem__(self, slot: int) -> Tensor:
        """0-d where the number is shared, else (rows,)."""
        param = self.params.get(slot)
        if param is None:
            return torch.full((), self.consts[int(slot)], dtype=self.dtype, device=self.label.device)
        param = param.to(self.dtype)
        if param.dim() > 0:
            # An ignored row's own number is not read either: 1 is legal for all of them.
            param = param[self.label] if param.dim() == 1 else torch.where(self.kept, param.reshape(-1), 1)
        return param * self.mark

    def _copied(self, params: dict[int, Tensor], mark: Tensor) -> Values:
        # Not by the module copy, which Dynamo of torch 2.11 refuses.
        own = [self.params[slot] for slot in slots_of(self.numbers)]
        other = Values(self.numbers, own, self.target, self.classes, self.dtype)
        other.params, other.mark = params, mark
        return other

    def replaced(self, params: dict[int, Tensor]) -> Values:
        """The same with some other tensors."""
        return self._copied(self.params | params, self.mark)

    def marked(self, sound: Tensor) -> Values:
        """The same where rows are sound, else NaN."""
        return self._copied(self.params, torch.where(sound, 1.0, math.nan).to(self.dtype))

    def bins(self, slot: int) -> int:
        return self.params[slot].shape[-1]

    def table(self, slot: int, index: Tensor) -> Tensor:
        table = self.params[slot].to(self.dtype)
        if table.dim() == 1:
            found = table[index]
        else:
            group = self.params[Slot.GROUP].reshape(-1).long()
            inside = (group >= 0) & (group < table.shape[0])
            found = torch.where(inside, table[torch.where(inside, group, 0), index], math.nan)
        return found * self.mark

    def vector(self, slot: int) -> Tensor | None:
        """(C,) of the class weights or the adjustment, if there are any; they have no gradient."""
        found = self.params.get(slot)
        return None if found is None else found.to(self.dtype).detach()


# ---- transforms: t(u_y) ----------------------------------------------------------------------------------------------


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


def transform_target(x: Tensor, values: Values) -> Tensor:
    """t(u_y), (rows,)."""
    kind, structure = values.structure.transform, values.structure
    if kind == TransformKind.IDENTITY:
        return x
    a = Slot.TRANSFORM_A
    if kind == TransformKind.GIVEN:
        return values[a] + torch.where(x == x, 0, x)  # a row that is NaN is so everywhere
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


def row_scale(values: Values, high: Tensor) -> Tensor:
    """s, (rows,), where each row knows which of two scales it has. Not positive: NaN."""
    scale = values[Slot.SCALE]
    if values.structure.row_scale == ScaleKind.TWO_SCALE:
        scale = torch.where(high, values[Slot.SCALE_HIGH], scale)
        norm = values[Slot.LOGIT_NORM]
        scale = torch.where(norm > 0, scale / norm, math.nan)
    return torch.where(scale > 0, scale, math.nan).expand(values.label.shape)


def well_classified(confidence: Tensor, values: Values) -> Tensor:
    """Where a row has the higher of two scales."""
    return ~(confidence < values[Slot.ETA])


def scales(values: Values) -> Tensor:
    """(1 or 2, rows): all the scales that a row may turn out to have, without their gradients."""
    choices = [torch.zeros_like(values.kept), torch.ones_like(values.kept)]
    return torch.stack([row_scale(values, high).detach() for high in choices[: values.structure.scales]])


# ---- heads: phi(log p), from delta = logsumexp over j != y of z, minus z_y -------------------------------------------


def _damping(x: Tensor) -> Tensor:
    """(1 - exp(-x)) / x for x in [0, 1/4]: its Taylor series, which autograd cannot spoil by cancellation."""
    total = torch.zeros_like(x)
    for k in range(13, -1, -1):
        total = 1 / math.factorial(k + 1) - x * total
    return total


def modulated(nll: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, kappa: Tensor) -> Tensor:
    """alpha (1 - p^beta)^gamma (-log p)^kappa; (m/nll)^gamma nll^(gamma+kappa) near p = 1, where m -> 0."""
    impossible = nll == math.inf
    x = beta * torch.where(impossible, 1, nll)
    near = (x < 0.25) & ~impossible
    close = _damping(torch.where(near, x, 0)) * beta
    close = close.pow(gamma) * torch.where(near, nll, 1).pow(gamma + kappa)
    # At p = 0 the damping is the constant 1: its derivatives are 0, not 0 * inf. NaN takes this branch too.
    inside = ~near & ~impossible
    # Not expm1: its derivative, formed as expm1 + 1, would be lost where p^beta is small; and the logarithm, which is
    # gamma's derivative, of 1 - p^beta rounded to 1 would be too.
    damp = torch.where(inside, torch.exp(gamma * torch.log1p(-torch.exp(-torch.where(inside, x, 1)))), 1)
    apart = damp * torch.where(near, 1, nll).pow(kappa)
    legal = (alpha >= 0) & (beta > 0) & (gamma >= 0) & (kappa >= 0)
    return torch.where(legal, alpha * torch.where(near, close, apart), math.nan)


def tau(nll: Tensor, values: Values, clamp: int) -> Tensor:
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


def head_loss(nll: Tensor, values: Values) -> Tensor:
    """phi(log p), (rows,)."""
    kind = values.structure.head
    if kind == HeadKind.MODULATED:
        return modulated(nll, *(values[s] for s in (Slot.HEAD_A, Slot.HEAD_B, Slot.HEAD_C, Slot.HEAD_D)))
    if kind == HeadKind.TAU:
        return tau(nll, values, values.structure.clamp)
    if kind == HeadKind.TRUNCATED:
        return truncated(nll, values[Slot.HEAD_A])
    return nll


# ---- finish: from statistics to the loss -----------------------------------------------------------------------------


class Rows(NamedTuple):
    """What a piece of the classes knows of each row: over the j != y that it holds, with d_j = u_j - M.

    Attributes:
        top: (rows,), M = max u_j; -inf where there is none.
        total: (scales, rows), S = sum e^{s d_j} at each scale that the row may have.
        shift: (scales, rows), T = sum e^{s d_j} d_j.
        second: (scales, rows), sum e^{s d_j} d_j^2, or None: only the entropy's gradient by a scale takes it.
        weighted: (rows,), V = sum w_j d_j, or None without smoothing. weights: W = sum w_j.
        first: (rows,), the lowest class whose u_j is M. above: how many u_j are larger than u_y.
    """

    top: Tensor
    total: Tensor
    shift: Tensor
    second: Tensor | None
    weighted: Tensor | None
    weights: Tensor | None
    first: Tensor
    above: Tensor


class Finished(NamedTuple):
    """What finish makes of a row, each (rows,), 0 where the row is ignored; or the upstream gradients of that.

    by_class is what class weights weigh: "mean" divides it by theirs; by_row (None without z-loss) by the rows.
    """

    by_class: Tensor | None
    by_row: Tensor | None = None
    logsumexp: Tensor | None = None
    log_prob: Tensor | None = None
    entropy: Tensor | None = None


def sound(top: Tensor, u_y: Tensor, values: Values) -> Tensor:
    """False for NaN, +inf, only -inf, and labels out of range: the whole row is NaN then, and its gradient too."""
    return values.legal & (top < math.inf) & (u_y < math.inf) & (torch.maximum(top, u_y) > -math.inf)


def finish(rows: Rows, u_y: Tensor, s: Tensor, values: Values) -> Finished:
    """From what is known of all classes, at the row's scale s, to its loss: scalar work per row.

    Differentiable by u_y, s, S, T, V and the loss's parameters.
    """
    values = values.marked(sound(rows.top, u_y, values))
    t = transform_target(u_y * values.mark, values)
    # Everything relative to the largest other class: a difference of large logsumexps would lose what they share.
    top = torch.where(rows.top == -math.inf, 0, rows.top)
    alone = rows.total == 0  # no other class has a chance: log p_y is 0
    total = torch.where(alone, 1, rows.total)
    log_total = total.log()
    hopeless = t == -math.inf
    lead = s * (torch.where(hopeless, top, t) - top)
    delta = torch.where(alone, -math.inf - lead, log_total - lead)
    # An infinite z of the target's is no certainty but an overflow.
    mark = torch.where(s * t < math.inf, values.mark, math.nan)
    nll = torch.logaddexp(delta, torch.zeros_like(delta)) * mark
    above_top = torch.where(alone, lead, torch.logaddexp(log_total, lead)) * mark

    # H = p (-log p) + q (-log q) + q (the entropy among the others); 0 log 0 is 0.
    others = torch.logaddexp(-delta, torch.zeros_like(delta))
    among = log_total - s * rows.shift / total
    hit, miss = torch.where(nll == math.inf, 0, nll), torch.where(delta == -math.inf, 0, others)
    entropy = torch.sigmoid(-delta) * hit + torch.sigmoid(delta) * (miss + among)

    # Of a target without a chance only -log p knows: elsewhere its -inf must not meet a 0 on the way to s.
    nll = torch.where(hopeless, log_total - s * (t - top), nll)
    above_top = torch.where(hopeless, log_total, above_top)
    entropy = torch.where(hopeless, among, entropy)
    lse = above_top + s * top

    omega = values.vector(Slot.WEIGHT)
    omega_y = torch.ones_like(nll) if omega is None else omega[values.label]
    loss = omega_y * head_loss(nll, values.marked(nll == nll))
    if values.smoothing > 0:
        assert rows.weighted is not None and rows.weights is not None
        spread = omega_y * nll + rows.weights * above_top - s * rows.weighted
        loss = (1 - values.smoothing) * loss + values.smoothing / values.classes * spread
    penalty = values.z_loss * lse * lse if values.has_row_term else None

    def of_kept(value: Tensor) -> Tensor:
        return torch.where(values.kept, value, 0)

    by_row = None if penalty is None else of_kept(penalty)
    return Finished(of_kept(loss), by_row, of_kept(lse), of_kept(-nll), of_kept(entropy * mark))
