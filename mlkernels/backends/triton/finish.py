"""The scalar mathematics of a row: from its statistics to its loss, and to the coefficients of its gradient.

The same functions in the same order as ``backends/finish.py`` and ``csrc/finish.h``, over a block of rows. With u the
logits (after softcap and adjustment) and everything relative to m = max over j != y of u_j:

    e_j = exp(s (u_j - m)),  log_sum: the logarithm of their sum,
    z_j = s u_j,  z_y = s t(u_y),  delta = s m + log_sum - z_y,  -log p = softplus(delta),  1 - p = sigmoid(delta).

Kinds and options are run-time numbers, the same for a whole launch: one branch per block, no kernel per loss. What a
loss does not have costs nothing, and a number that changes compiles nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import (
    AFFINE,
    AUTO,
    BEYOND_PI,
    CLAMP,
    CLAMP_CROSS_ENTROPY,
    DOMAIN_HIGH,
    DOMAIN_LOW,
    EASY,
    ETA,
    GIVEN,
    HEAD,
    HEAD_A,
    HEAD_B,
    HEAD_C,
    HEAD_D,
    INF,
    KIND_BITS,
    KIND_MASK,
    LINEAR,
    LOGIT_NORM,
    MARGIN,
    MARGIN_GRADIENT,
    MODULATED,
    MONOTONE,
    NORM,
    SCALE,
    SCALE_HIGH,
    STRAIGHT_THROUGH,
    TAU_MIN,
    TRANSFORM,
    TRANSFORM_A,
    TRANSFORM_B,
    TRANSFORM_C,
    TRUNCATED,
    TWO_SCALE,
    Z_LOSS,
)
from .elementary import PI, acos, expm1, log1p, power, sincos
from .operands import shared

#: The floor of sqrt(1 - x^2) where it divides: derivatives of angles stay finite, and within fp16 at s = 64.
ROOT_FLOOR = tl.constexpr(2.0**-10)


@triton.jit
def legal(in_range, value):
    """NaN, unless the parameter is in its range."""
    return tl.where(in_range, value, float("nan"))


# ---- transforms: t(u_y) ----------------------------------------------------------------------------------------------


@triton.jit
def margin(x, m1, m2, m3, beyond_pi, gradient):
    """cos(m1 theta + m2) - m3 with the chosen continuations beyond pi and below 0; t, dt/dx, and dt by m1, m2, m3."""
    # One per row: the interpreter cannot join a shared condition with the rows' own.
    beyond = beyond_pi + tl.zeros(x.shape, tl.int32)
    single = m1 == 1.0
    square = 1.0 - x * x
    root = tl.sqrt(tl.where(square > 0, square, tl.where(square <= 0, 0.0, square)))
    divisor = tl.maximum(root, ROOT_FLOOR)
    theta = acos(tl.where(x > 1.0, 1.0, tl.where(x < -1.0, -1.0, x)))
    phi = m1 * theta + m2
    # m1 = 1: cos(theta + m2) without an arc cosine, x not clamped, so that a zero margin is exactly x.
    sin_m, cos_m = sincos(m2)
    sin_phi, cos_phi = sincos(phi)
    straight = sin_m == 0.0  # also for an x of -inf
    cosine = tl.where(single, tl.where(straight, x * cos_m, x * cos_m - sin_m * root), cos_phi)
    sine = tl.where(single, x * sin_m + cos_m * root, sin_phi)
    turned = tl.where(straight, cos_m, cos_m + x * sin_m / divisor)
    slope = tl.where(single, turned, m1 * sine / divisor)
    value = cosine - m3
    da = -theta * sine
    db = -sine
    dc = tl.full(x.shape, -1.0, x.dtype)

    linear = single & ((beyond == LINEAR) | (beyond == AUTO))
    past = linear & (m2 > 0) & ((m2 >= PI) | (x < -cos_m))
    value = tl.where(past, x - m2 * sin_m - m3, value)
    slope = tl.where(past, 1.0, slope)
    da = tl.where(past, 0.0, da)
    db = tl.where(past, -sin_m - m2 * cos_m, db)
    # A negative margin ends at the cosine's maximum: beyond it, easy rows would be pushed away.
    over = single & ((beyond == LINEAR) | (beyond == AUTO) | (beyond == EASY))
    over = over & (m2 < 0) & ((m2 <= -PI) | (x > cos_m))
    value = tl.where(over, x + (1.0 - cos_m) - m3, value)
    slope = tl.where(over, 1.0, slope)
    da = tl.where(over, 0.0, da)
    db = tl.where(over, sin_m, db)
    # A multiplicative margin has no linear continuation.
    value = tl.where((beyond == LINEAR) & (m1 != 1.0), float("nan"), value)

    # Beyond pi, not at it: there a zero margin must leave a logit that is no cosine alone.
    turns = phi / PI
    turn = tl.where(turns > 0, tl.ceil(turns) - 1.0, tl.floor(turns))
    sign = tl.where(turn - 2.0 * tl.floor(0.5 * turn) == 0.0, 1.0, -1.0)
    monotone = (beyond == MONOTONE) | ((beyond == AUTO) & (m1 != 1.0))
    value = tl.where(monotone, sign * cosine - 2.0 * turn - m3, value)
    sign = tl.where(monotone, sign, 1.0)
    slope, da, db = slope * sign, da * sign, db * sign

    left_alone = (beyond == EASY) & ((x > 0) == 0)
    value = tl.where(left_alone, x, value)
    slope = tl.where(left_alone, 1.0, slope)
    da = tl.where(left_alone, 0.0, da)
    db = tl.where(left_alone, 0.0, db)
    dc = tl.where(left_alone, 0.0, dc)
    slope = tl.where(gradient == STRAIGHT_THROUGH, 1.0, slope)
    return value, slope, da, db, dc


@triton.jit
def bin_of(x, low, high, count):
    """The index of x's bin, clamped; 0 for NaN, before the integer cast."""
    index = tl.floor((x - low) * (count / (high - low)))
    index = tl.where(index >= 0, index, 0.0)
    return tl.where(index < count, index, count - 1.0).to(tl.int32)


@triton.jit
def piece(slope, bias, bin, bins, group, groups, T: tl.constexpr):
    """The bin's slope and bias, of the row's group; NaN for a group that there is not."""
    there = (group >= 0) & (group < groups)
    at = tl.where(there, group, 0).to(tl.int32) * bins + bin
    return tl.load(slope + at, there, float("nan")).to(T), tl.load(bias + at, there, float("nan")).to(T)


@triton.jit
def transform_target(transform, beyond_pi, gradient, x, v, group, tables, T: tl.constexpr, PIECEWISE: tl.constexpr):
    """t(u_y), dt/du, dt by the transform's parameters and by the norm, and the bin of a piecewise t."""
    value = x
    slope = tl.full(x.shape, 1.0, T)
    da = tl.zeros(x.shape, T)
    db = tl.zeros(x.shape, T)
    dc = tl.zeros(x.shape, T)
    dnorm = tl.zeros(x.shape, T)
    bin = tl.zeros(x.shape, tl.int32)
    a, b, c, norm = v[TRANSFORM_A], v[TRANSFORM_B], v[TRANSFORM_C], v[NORM]
    normed = norm != 0.0  # 0: none
    n = tl.where(normed, legal(norm > 0, norm), 1.0)
    if PIECEWISE:
        u = x / n
        bins, groups = tables[2], tables[3]
        bin = bin_of(u, v[DOMAIN_LOW], v[DOMAIN_HIGH], bins.to(T))
        slope, bias = piece(tables[0], tables[1], bin, bins, group, groups, T)
        value = slope * u + bias
        dnorm = tl.where(normed, bias, 0.0)
        da = u * n
        db = slope * 0.0 + n
        value = value * n
    else:
        if transform == MARGIN:
            u = x / n
            t, slope, da, db, dc = margin(u, legal(a > 0, a), b, c, beyond_pi, gradient)
            dnorm = tl.where(normed, t - u * slope, dnorm)
            value = t * n
            da = da * n
            db = db * n
            dc = dc * n
        elif transform == AFFINE:
            value = a * x + b
            slope = slope * a
            da = x
            db = slope * 0.0 + 1.0
        elif transform == GIVEN:
            value = a + tl.zeros(x.shape, T)
            slope = slope * 0.0
            da = da + 1.0
    return value, slope, da, db, dc, dnorm, bin


# ---- row scales ------------------------------------------------------------------------------------------------------


@triton.jit
def row_scale(scale, confidence, v):
    """s, and whether it is the second of two scales."""
    value = v[SCALE]
    high = tl.zeros(confidence.shape, tl.int1)
    if scale == TWO_SCALE:
        high = (confidence < v[ETA]) == 0
        value = tl.where(high, v[SCALE_HIGH], v[SCALE]) / legal(v[LOGIT_NORM] > 0, v[LOGIT_NORM])
    return legal(value > 0, value), high


# ---- heads: phi(log p) -----------------------------------------------------------------------------------------------


@triton.jit
def modulated(nll, alpha, beta, gamma, kappa):
    """alpha (1 - p^beta)^gamma (-log p)^kappa; (m/nll)^gamma nll^(gamma+kappa) near p = 1, where m = 1 - p^beta -> 0.

    phi, w = -dphi/dlog p, and phi by alpha, beta, gamma, kappa.
    """
    sound = (alpha >= 0) & (beta > 0) & (gamma >= 0) & (kappa >= 0) & (nll == nll)
    impossible = nll == INF  # p = 0: the damping is the constant 1
    some = nll > 0
    inner = tl.where(impossible, 1.0, nll)
    x = beta * inner
    p_beta = tl.exp(-x)
    m = -expm1(-x)
    h = tl.where(x > 0, x * p_beta / tl.where(x > 0, m, 1.0), 1.0)
    near = x < 0.25
    exponent = gamma + kappa - 1.0
    outer = tl.where(near, exponent, kappa - 1.0)
    rest = tl.where(outer == 0, 1.0, power(inner, outer))
    damped = tl.where(near, tl.where(some, m / tl.where(some, inner, 1.0), beta), m)
    bare = power(damped, gamma) * rest  # m^gamma nll^(kappa-1)
    w = alpha * bare * (kappa + gamma * h)
    # Where gamma + kappa < 1 and p = 1 that diverges, but the loss does not.
    da = tl.where(some, bare * inner, tl.where(gamma + kappa == 0, 1.0, 0.0))
    value = alpha * da
    counts = value > 0  # 0 times a logarithm is 0
    log_m = tl.where(p_beta < 0.5, log1p(-tl.where(p_beta < 0.5, p_beta, 0.0)), tl.log(m))
    db = tl.where(counts, value * gamma * h / beta, 0.0)
    dc = tl.where(counts, value * log_m, 0.0)
    dd = tl.where(counts, value * tl.log(inner), 0.0)
    if tl.max(impossible.to(tl.int32), 0) > 0:
        ends = power(nll, kappa)
        falls = tl.where(kappa == 0, 0.0, alpha * kappa * power(nll, kappa - 1.0))
        value = tl.where(impossible, alpha * ends, value)
        w = tl.where(impossible, falls, w)
        da = tl.where(impossible, ends, da)
        db = tl.where(impossible, 0.0, db)
        dc = tl.where(impossible, 0.0, dc)
        dd = tl.where(impossible, alpha * ends * nll, dd)
    return legal(sound, value), legal(sound, w), legal(sound, da), legal(sound, db), legal(sound, dc), legal(sound, dd)


@triton.jit
def tau(nll, minimum, clamp, group, tables, T: tl.constexpr):
    """-log tau(p), tau(p) = a p + b on p's bin: phi, w, phi by a and by b, and the bin."""
    p = tl.exp(-nll)
    bins, groups = tables[2], tables[3]
    bin = bin_of(p, 0.0, 1.0, bins.to(T))
    a, b = piece(tables[0], tables[1], bin, bins, group, groups, T)
    level = a * p + b
    # Not clamped where b = 0, so identity tables are cross entropy for every p; b's own derivative is floored.
    pure = (b == 0) & (a > 0)
    low = (pure == 0) & (level <= minimum)
    floored = tl.where(level > minimum, level, tl.where(low | pure, minimum, level))
    value = tl.where(pure, nll - tl.log(tl.where(pure, a, 1.0)), -tl.log(floored))
    w = tl.where(pure, 1.0, a * p / floored)
    da = tl.where(pure, -1.0 / tl.where(pure, a, 1.0), -p / floored)
    db = -1.0 / floored
    passes = (clamp + bin * 0) == CLAMP_CROSS_ENTROPY
    value = tl.where(low & passes, value + nll, value)
    w = tl.where(low, tl.where(passes, 1.0, 0.0), w)
    da = tl.where(low, 0.0, da)
    db = tl.where(low, 0.0, db)
    value = tl.where(nll == nll, value, nll)
    return value, w, da, db, bin


@triton.jit
def truncated(nll, k):
    """-log max(p, k): phi, w, and phi by k."""
    ceiling = -tl.log(legal((k > 0) & (k <= 1), k))
    over = nll > ceiling
    doubt = ceiling - ceiling  # a NaN ceiling reaches the loss
    return tl.where(over, ceiling, nll + doubt), tl.where(over, 0.0, 1.0 + doubt), tl.where(over, -1.0 / k, 0.0)


@triton.jit
def head_loss(head, clamp, nll, v, group, tables, T: tl.constexpr, TAU: tl.constexpr):
    """phi(log p), w = -dphi/dlog p, phi by the head's parameters, and the bin of tau."""
    value = nll
    w = tl.full(nll.shape, 1.0, T)
    da = tl.zeros(nll.shape, T)
    db = tl.zeros(nll.shape, T)
    dc = tl.zeros(nll.shape, T)
    dd = tl.zeros(nll.shape, T)
    bin = tl.zeros(nll.shape, tl.int32)
    if TAU:
        value, w, da, db, bin = tau(nll, v[TAU_MIN], clamp, group, tables, T)
    else:
        if head == MODULATED:
            value, w, da, db, dc, dd = modulated(nll, v[HEAD_A], v[HEAD_B], v[HEAD_C], v[HEAD_D])
        elif head == TRUNCATED:
            value, w, da = truncated(nll, v[HEAD_A])
    return value, w, da, db, dc, dd, bin


# ---- finish: from statistics to the loss -----------------------------------------------------------------------------


@triton.jit
def locate(target, other_max, log_sum, s, t):
    """Where the row stands: -log p, 1 - p, p, logsumexp(z) - s m, logsumexp(z), whether no other class has a chance."""
    z_y = s * t
    alone = log_sum == -INF
    # The difference of the logits first: at |z| = 300 anything added before it costs 1e-5 in p.
    delta = tl.where(alone, -INF - z_y, log_sum + s * (tl.where(alone, 0.0, other_max) - t))
    # An infinite logit of the target's is no certainty but an overflow; nor is there one in a row without any chance.
    delta = tl.where((target < INF) & (z_y < INF) & ((target > -INF) | (alone == 0)), delta, float("nan"))
    wrong = delta > 0
    e = tl.exp(-tl.abs(delta))
    tail = log1p(e)
    near = 1.0 / (1.0 + e)
    far = e * near
    nll = tl.where(wrong, delta + tail, tail)
    q = tl.where(wrong, near, far)
    p = tl.where(wrong, far, near)
    others = log_sum + tl.where(wrong, tail, tail - delta)  # log_sum + softplus(-delta)
    lse = tl.where(wrong, s * other_max + log_sum, z_y) + tail
    return nll, q, p, others, lse, alone


@triton.jit
def kind(structure, FIELD: tl.constexpr):
    """A kind or an option of a packed structure. Of a tuple Triton would make a kernel for each that holds a 1."""
    return (structure >> (KIND_BITS * FIELD)) & KIND_MASK


@triton.jit
def finish(
    structure, target, m, log_sum, s, v, group, t_tables, tau_tables, T: tl.constexpr, PIECEWISE: tl.constexpr,
    TAU: tl.constexpr,
):  # fmt: skip
    """From a row's statistics to its loss: what transform_target, locate and head_loss return."""
    transform, beyond_pi = kind(structure, TRANSFORM), kind(structure, BEYOND_PI)
    gradient = kind(structure, MARGIN_GRADIENT)
    own = transform_target(transform, beyond_pi, gradient, target, v, group, t_tables, T, PIECEWISE)
    at = locate(target, m, log_sum, s, own[0])
    head, clamp = kind(structure, HEAD), kind(structure, CLAMP)
    return own, at, head_loss(head, clamp, at[0], v, group, tau_tables, T, TAU)


@triton.jit
def batch_of(values, MODES: tl.constexpr, T: tl.constexpr, classes, smoothing, weight_sum):
    """What the losses of all rows share; weight_sum: of all class weights, the classes without any."""
    return classes, smoothing, shared(values, Z_LOSS, MODES, T), weight_sum


@triton.jit
def has_row_term(batch):
    """Whether a row's loss has a term that class weights do not weigh."""
    _classes, _smoothing, z_loss, _weight_sum = batch
    return z_loss > 0


@triton.jit
def row_loss(batch, s, at, phi, weight, weighted):
    """The terms of a row's loss that class weights weigh, and those that they do not; each has a factor of its own.

    weighted: the sum over j != y of w_j (u_j - m); used with smoothing only.
    """
    nll, _q, _p, others, lse, alone = at
    classes, smoothing, z_loss, weight_sum = batch
    by_class = weight * phi
    if smoothing > 0:
        # Where no other class has a chance, weighted alone knows whether there is one.
        spread = weight * nll + tl.where(alone, 0.0, (weight_sum - weight) * others) - s * weighted
        by_class = (1.0 - smoothing) * by_class + smoothing / classes * spread
    by_row = tl.zeros_like(nll)
    if z_loss > 0:
        by_row = z_loss * lse * lse
    return by_class, by_row


@triton.jit
def entropy(share, s, at, shift):
    """H = -sum of p_j log p_j; a class of probability 0 adds 0. shift: the sum over j != y of e_j (u_j - m)."""
    nll, q, p, others, _lse, alone = at
    own = tl.where(p == 0, 0.0, p * nll)
    rest = q * (others - s * (shift * share))
    return tl.where(alone | (q == 0), own, own + rest)


# ---- coefficients: from upstream gradients to what the gradient is made of -------------------------------------------


@triton.jit
def coefficients(batch, share, s, slope, at, h, w, weight, up, g_entropy):
    """dL/du_j = e_j (a + b (u_j - m)) - d w_j for j != y, and g at the target: (a, b, d, g). And what that and the
    derivative by s are made of: (pull, part, every, dL/dz_y), where pull is the coefficient of p_j - 1[j = y], part
    that of p_j sum w - w_j, every that of p_j alone.

    up, g_entropy: the upstream gradients of the loss's two terms, logsumexp and log_prob, and, or None, of the entropy:
    without it there are no b and h, the entropy itself.
    """
    nll, q, p, others, lse, alone = at
    classes, smoothing, z_loss, weight_sum = batch
    g_class, g_row, g_lse, g_log_prob = up
    pull = g_class * (1.0 - smoothing) * weight * w - g_log_prob
    part = g_class * smoothing / classes
    every = g_lse
    if z_loss > 0:
        every += g_row * 2.0 * z_loss * lse
    # Of a single class smoothing leaves exactly nothing.
    dz_y = every * p - pull * q + part * (weight_sum * p - weight)
    # The largest other class has exp(0) = 1, so log_sum >= 0 wherever there is one.
    a = tl.where(alone, 0.0 * dz_y, s * (pull + every + part * weight_sum) * (q * share))
    b = tl.zeros_like(a)
    if g_entropy is not None:  # dH/dz_j = -p_j (log p_j + H)
        each = s * g_entropy * (q * share)
        absent = alone | (q == 0)
        a = tl.where(absent, a, a - each * (h - others))
        b = tl.where(absent, 0.0, -s * each)
        dz_y = tl.where(p == 0, dz_y, dz_y - g_entropy * p * (h - nll))
    return (a, b, s * part, s * slope * dz_y), (pull, part, every, dz_y)


@triton.jit
def by_scale(classes, weight_sum, share, m, s, t, at, h, weight, weighted, shift, second, g_entropy, z):
    """The derivative of a row's loss by s. shift and second: the sums over j != y of e_j (u_j - m) and e_j (u_j - m)^2,
    this where the entropy's upstream gradient is given; z: the second of what coefficients returns."""
    nll, q, p, others, _lse, alone = at
    pull, part, every, _dz_y = z
    expected = tl.where(p > 0, p * t, 0.0)  # p_y t: 0 where p is, also when t is -inf
    smooth = part != 0
    # Smoothing counts classes that have no chance, in weighted.
    bare = every * expected + tl.where(smooth, part * ((weight_sum * p - weight) * t - weighted), 0.0)
    mean = m + shift * share  # of u_j for j != y, under p
    full = (every + part * weight_sum) * (q * mean + expected)
    full += tl.where(pull == 0, 0.0, pull * q * (mean - t))  # t may be -inf
    full -= tl.where(smooth, part * (weighted + m * (weight_sum - weight) + weight * t), 0.0)
    if g_entropy is not None:  # the sum of dH/dz_j is 0: m may be taken from every u_j
        own = tl.where(p == 0, 0.0, p * (h - nll) * (t - m))
        rest = tl.where(q == 0, 0.0, q * share * (s * second + (h - others) * shift))
        full -= g_entropy * (own + rest)
    return tl.where(alone, bare, full)
