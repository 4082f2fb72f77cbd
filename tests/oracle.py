"""The closed formulas of the losses, row by row, with 50 digits: what every backend is compared with.

Nothing here is shared with the package: no torch, no autograd, no code of the reference backend. Values and derivatives
are written out by hand (``test_gradients.py`` checks the derivatives against finite differences of the values), with
conventions (floors, continuations, clamps) where the semantics have them. Confident rows need no care at 50 digits as
long as 1 - p is a sum of the other classes.

With every number comes its *unit*: the size of the error that one rounding of the row's final logits makes in it. A
backend is right when it is within a few eps units.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mpmath
import numpy as np

mp = mpmath.MPContext()
mp.dps = 50

ROOT_FLOOR = mp.mpf(2) ** -10
INF = mp.inf


@dataclass
class Structure:
    """Which formulas a loss is made of."""

    transform: str = "identity"  # margin, affine, piecewise, given
    scale: str = "single"  # two_scale
    head: str = "log"  # modulated, tau, truncated
    beyond_pi: str | None = None
    gradient: str = "exact"
    clamp: str = "min"
    eta: float = 0.01
    tau_min: float = 1e-6
    domain: tuple[float, float] = (-1.0, 1.0)


@dataclass
class Piece:
    """A scalar function at a point: its value, its derivatives, and how far the next jump is."""

    value: object
    by_x: object
    by: dict = field(default_factory=dict)  # parameter name -> derivative, or (index, derivative) for tables
    gap: object = INF
    amplify: object = 1  # how much larger the relative error of the derivative is than that of the argument


# ---- the target transform --------------------------------------------------------------------------------------------


def margin(x, m1, m2, m3, beyond_pi, gradient):
    single = m1 == 1
    beyond_pi = beyond_pi or ("linear" if single else "monotone")
    inside = min(mp.mpf(1), max(mp.mpf(-1), x))
    theta = mp.acos(inside)
    root = mp.sqrt(max(mp.mpf(0), 1 - x * x))
    floored = max(root, ROOT_FLOOR)
    phi = m1 * theta + m2
    if single:
        cosine = x * mp.cos(m2) - mp.sin(m2) * root
        by_x = mp.cos(m2) + x * mp.sin(m2) / floored
        by_m2 = -x * mp.sin(m2) - mp.cos(m2) * root
    else:
        cosine = mp.cos(phi)
        by_x = m1 * mp.sin(phi) / floored
        by_m2 = -mp.sin(phi)
    by_m1 = -theta * mp.sin(phi)
    # 1 - x^2 is known to eps of 1; under the floor it does not matter.
    known = 1 / (1 - x * x) if 1 - x * x > ROOT_FLOOR**2 else mp.mpf(1)
    piece = Piece(cosine - m3, by_x, {"m1": by_m1, "m2": by_m2, "m3": mp.mpf(-1)}, amplify=known)
    if single and m2 < 0 and beyond_pi in ("linear", "easy"):
        # Where theta + m2 < 0 the cosine would fall again: slope 1 from its maximum on.
        piece.gap = abs(x - mp.cos(m2))
        if x > mp.cos(m2):
            piece.value = x + 1 - mp.cos(m2) - m3
            piece.by_x, piece.amplify = mp.mpf(1), 1
            piece.by = {"m1": mp.mpf(0), "m2": mp.sin(m2), "m3": mp.mpf(-1)}
    if beyond_pi == "linear":
        assert single
        piece.gap = abs(x + mp.cos(m2)) if m2 > 0 else piece.gap
        if m2 > 0 and x < -mp.cos(m2):
            piece.value = x - m2 * mp.sin(m2) - m3
            piece.by_x, piece.amplify = mp.mpf(1), 1
            piece.by = {"m1": mp.mpf(0), "m2": -mp.sin(m2) - m2 * mp.cos(m2), "m3": mp.mpf(-1)}
    elif beyond_pi == "monotone":
        k = int(mp.ceil(phi / mp.pi)) - 1 if phi > 0 else int(mp.floor(phi / mp.pi))  # pi itself is not beyond it
        sign = -1 if k % 2 else 1
        piece.value = sign * cosine - 2 * k - m3
        piece.by_x = sign * by_x
        piece.by = {"m1": sign * by_m1, "m2": sign * by_m2, "m3": mp.mpf(-1)}
    elif beyond_pi == "easy":
        piece.gap = min(piece.gap, abs(x))
        if x <= 0:
            piece = Piece(x, mp.mpf(1), {"m1": mp.mpf(0), "m2": mp.mpf(0), "m3": mp.mpf(0)}, abs(x))
    else:
        assert beyond_pi == "none"
    if gradient == "straight_through":
        piece.by_x = mp.mpf(1)
    return piece


def find_bin(x, low, high, count):
    """The bin's index, and how far x is from the inner edges."""
    width = (mp.mpf(high) - mp.mpf(low)) / count
    index = min(count - 1, max(0, int(mp.floor((x - low) / width))))
    gap = min((abs(x - (low + k * width)) for k in range(1, count)), default=INF)
    return index, gap


def transform(structure, f_y, p):
    if structure.transform == "identity":
        return Piece(f_y, mp.mpf(1))
    if structure.transform == "given":
        return Piece(p["target_logit"], mp.mpf(0), {"target_logit": mp.mpf(1)})
    if structure.transform == "affine":
        return Piece(p["slope"] * f_y + p["offset"], p["slope"], {"slope": f_y, "offset": mp.mpf(1)})
    norm = p.get("norm")
    u = f_y if norm is None else f_y / norm
    if structure.transform == "margin":
        piece = margin(u, p["m1"], p["m2"], p["m3"], structure.beyond_pi, structure.gradient)
    else:
        slope, bias = p["t_slope"], p["t_bias"]
        k, gap = find_bin(u, *structure.domain, len(slope))
        piece = Piece(slope[k] * u + bias[k], slope[k], {"t_slope": (k, u), "t_bias": (k, mp.mpf(1))}, gap)
    if norm is not None:
        by_norm = piece.value - u * piece.by_x
        times = lambda d: (d[0], norm * d[1]) if isinstance(d, tuple) else norm * d
        piece.by = {name: times(d) for name, d in piece.by.items()} | {"norm": by_norm}
        piece.value = norm * piece.value
    return piece


# ---- the head, a function of n = -log p ------------------------------------------------------------------------------


def modulated(n, alpha, beta, gamma, kappa):
    if n == 0:
        by_n = alpha * beta**gamma * (kappa + gamma) if gamma + kappa == 1 else mp.mpf(0)
        zero = mp.mpf(0)
        value = alpha if gamma + kappa == 0 else zero
        return Piece(value, by_n, {"alpha": zero, "beta": zero, "gamma": zero, "kappa": zero})
    if n == INF:
        by_n = alpha * kappa if kappa == 1 else INF if kappa > 1 else mp.mpf(0)
        value = alpha * n**kappa if kappa > 0 else alpha
        by = {"alpha": value / alpha, "beta": mp.mpf(0), "gamma": mp.mpf(0), "kappa": INF}
        return Piece(value, by_n, by)
    x = beta * n
    m = -mp.expm1(-x)
    h = x / mp.expm1(x)
    value = alpha * m**gamma * n**kappa
    by_n = alpha * m**gamma * n ** (kappa - 1) * (kappa + gamma * h)
    by_beta = value * gamma * n * mp.exp(-x) / m
    return Piece(
        value,
        by_n,
        {"alpha": value / alpha, "beta": by_beta, "gamma": value * mp.log(m), "kappa": value * mp.log(n)},
        amplify=1 + beta + gamma + kappa,
    )


def tau(n, slope, bias, minimum, clamp):
    q = mp.exp(-n) if n < INF else mp.mpf(0)
    j, gap = find_bin(q, 0, 1, len(slope))
    a, b = slope[j], bias[j]
    level = a * q + b
    if b == 0 and a > 0:
        return Piece(
            n - mp.log(a), mp.mpf(1), {"tau_slope": (j, -1 / a), "tau_bias": (j, -1 / max(level, minimum))}, gap
        )
    gap = min(gap, abs(level - minimum))
    if level <= minimum:
        zero = mp.mpf(0)
        piece = Piece(-mp.log(minimum), zero, {"tau_slope": (j, zero), "tau_bias": (j, zero)}, gap)
        if clamp == "cross_entropy":
            piece.value, piece.by_x = piece.value + n, mp.mpf(1)
        return piece
    by = {"tau_slope": (j, -q / level), "tau_bias": (j, -1 / level)}
    return Piece(-mp.log(level), a * q / level, by, gap, amplify=1 + abs(b) / level)


def truncated(n, k):
    ceiling = -mp.log(k)
    gap = abs(mp.exp(-n) - k) if n < INF else k
    if n > ceiling:
        return Piece(ceiling, mp.mpf(0), {"k": -1 / k}, gap)
    return Piece(n, mp.mpf(1), {"k": mp.mpf(0)}, gap)


def head(structure, n, p):
    if structure.head == "log":
        return Piece(n, mp.mpf(1))
    if structure.head == "modulated":
        return modulated(n, p["alpha"], p["beta"], p["gamma"], p["kappa"])
    if structure.head == "tau":
        return tau(n, p["tau_slope"], p["tau_bias"], mp.mpf(structure.tau_min), structure.clamp)
    return truncated(n, p["k"])


# ---- a row -----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """Everything about a row that is kept, at the upstream factors it was given."""

    loss: object  # (1-eps) omega_y phi + eps/C sum omega_j (-log p_j)
    penalty: object  # z_loss lse^2
    omega: object
    grad: list
    params: dict
    logsumexp: object
    log_prob: object
    entropy: object
    confidence: object
    prediction: int
    rank: int
    loss_unit: object
    penalty_unit: object
    entropy_unit: object
    grad_unit: object
    param_units: dict


@dataclass
class Forward:
    """The way from a row's logits to its head."""

    p: dict  # the parameters
    f: list  # after softcap and adjustment
    capped: list  # d(softcapped)/d(raw)
    confidence: object
    s: object
    t: Piece
    z: list
    n: object  # -log p of the target
    lse: object
    miss: object  # 1 - p of the target
    prob: list
    phi: Piece
    gap: object  # how far the next jump is


def forward(structure, f, y, params, softcap=None, logit_adjustment=None):
    """One kept row, up to its head."""
    f = [mp.mpf(v) for v in f]
    exact = lambda v: v if isinstance(v, mp.mpf) else mp.mpf(float(v))
    p = {k: [exact(v) for v in value] if np.ndim(value) else exact(value) for k, value in params.items()}
    classes = range(len(f))
    capped = [mp.mpf(1)] * len(f)
    if softcap is not None:
        cap = mp.mpf(softcap)
        squashed = [mp.tanh(v / cap) for v in f]
        capped = [1 - v * v for v in squashed]
        f = [cap * v for v in squashed]
    if logit_adjustment is not None:
        f = [v + mp.mpf(float(a)) for v, a in zip(f, logit_adjustment, strict=True)]

    runner_up = max((f[j] for j in classes if j != y), default=-INF)
    confidence = f[y] - runner_up if runner_up > -INF else INF
    gap = INF
    if structure.scale == "two_scale":
        well = confidence >= structure.eta
        r, norm = p["scale_high" if well else "scale_low"], p.get("logit_norm", mp.mpf(1))
        s = r / norm
        gap = abs(confidence - structure.eta)
    else:
        s = p["scale"]
    t = transform(structure, f[y], p)
    gap = min(gap, t.gap)
    z = [s * t.value if j == y else s * f[j] if f[j] > -INF else -INF for j in classes]
    present = [j for j in classes if j != y and z[j] > -INF]

    if z[y] > -INF:
        odds = {j: mp.exp(z[j] - z[y]) for j in present}
        rest = sum(odds.values(), mp.mpf(0))
        n = mp.log1p(rest)
        lse = z[y] + n
        miss = rest / (1 + rest)
        total = 1 + rest
    else:
        top = max(z[j] for j in present)
        odds = {j: mp.exp(z[j] - top) for j in present}
        total = sum(odds.values(), mp.mpf(0))
        lse = top + mp.log(total)
        n, miss = INF, mp.mpf(1)
    prob = [odds[j] / total if j in odds else mp.mpf(0) for j in classes]
    if z[y] > -INF:
        prob[y] = 1 / total  # not 1 - miss: it may be smaller than 50 digits of 1
    phi = head(structure, n, p)
    gap = min(gap, phi.gap)
    return Forward(p, f, capped, confidence, s, t, z, n, lse, miss, prob, phi, gap)


def row(
    structure,
    f,
    y,
    params,
    *,
    weight=None,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    logit_adjustment=None,
    up_loss=1.0,
    up_penalty=1.0,
    up_logsumexp=0.0,
    up_log_prob=0.0,
    up_entropy=0.0,
):
    """One kept row. ``params`` holds this row's numbers (its own scale, margin, table)."""
    at = forward(structure, f, y, params, softcap, logit_adjustment)
    p, f, s, t, z, phi, lse, prob = at.p, at.f, at.s, at.t, at.z, at.phi, at.lse, at.prob
    classes = range(len(f))
    residual = [-at.miss if j == y else prob[j] for j in classes]  # p - 1_y
    ups = (up_loss, up_penalty, up_logsumexp, up_log_prob, up_entropy)
    up_loss, up_penalty, up_lse, up_log_p, up_h = (mp.mpf(float(v)) for v in ups)
    eps, lam = mp.mpf(label_smoothing), mp.mpf(z_loss)
    omega = [mp.mpf(1)] * len(f) if weight is None else [mp.mpf(float(v)) for v in weight]

    loss = omega[y] * phi.value
    if eps > 0:
        spread = sum((w * (lse - v if v > -INF else INF) for w, v in zip(omega, z, strict=True) if w != 0), mp.mpf(0))
        loss = (1 - eps) * loss + eps / len(f) * spread
    total_omega = sum(omega)

    # -p log p, 0 where p is 0.
    log_p = [-at.n if j == y else z[j] - lse if z[j] > -INF else mp.mpf(0) for j in classes]
    surprise = [mp.mpf(0) if prob[j] == 0 else -prob[j] * log_p[j] for j in classes]
    entropy = sum(surprise, mp.mpf(0))

    through_head = up_loss * (1 - eps) * omega[y]
    parts = [
        (
            through_head * phi.by_x * residual[j],
            up_loss * eps / len(f) * prob[j] * total_omega,
            -up_loss * eps / len(f) * omega[j],
            up_penalty * 2 * lam * lse * prob[j],
            up_lse * prob[j],
            -up_log_p * residual[j],
            up_h * surprise[j],
            -up_h * prob[j] * entropy,
        )
        for j in classes
    ]
    dz = [sum(part) for part in parts]
    to_f = [s * at.capped[j] * (t.by_x if j == y else 1) for j in classes]
    grad = [d * factor for d, factor in zip(dz, to_f, strict=True)]
    # What cancels in the sum still rounds; and of a logsumexp near 0 the absolute error is what is known.
    of_lse = [abs(up_penalty * 2 * lam * prob[j]) for j in classes]
    dz_size = [sum(abs(v) for v in part) + more for part, more in zip(parts, of_lse, strict=True)]
    # Through a saturated softcap 1 - tanh^2 is known to eps of 1.
    largest = max(abs(s * (t.by_x if j == y else 1)) * dz_size[j] for j in classes)
    # A class of probability 0 contributes 0 to every sum.
    by_s = [mp.mpf(0) if z[j] == -INF else t.value if j == y else f[j] for j in classes]
    by_scale = sum((a * b for a, b in zip(by_s, dz, strict=True)), mp.mpf(0))

    sizes = [abs(v) for v in z if v > -INF] + [abs(s)]
    # How far off the row's numbers can be, relatively, in units of eps.
    spread_unit = (1 + 4 * max(sizes)) * phi.amplify * t.amplify
    by_param = {name: scaled(d, through_head) for name, d in phi.by.items()}
    # L log(1 - p^beta) and L log(-log p) are as accurate as L times a logarithm's argument.
    least = {"gamma": abs(phi.value), "kappa": abs(phi.value)}
    units = {
        name: scaled(absolute(d, least.get(name, 0)), abs(through_head) * spread_unit) for name, d in phi.by.items()
    }
    for name, d in t.by.items():
        by_param[name] = scaled(d, s * dz[y])
        units[name] = scaled(absolute(d, at_least=1), abs(s) * dz_size[y] * spread_unit)
    scale_unit = sum((abs(a) * b for a, b in zip(by_s, dz_size, strict=True)), mp.mpf(0)) * spread_unit
    if structure.scale == "two_scale":
        well = at.confidence >= structure.eta
        chosen, other = ("scale_high", "scale_low") if well else ("scale_low", "scale_high")
        r, norm = p[chosen], p.get("logit_norm", mp.mpf(1))
        by_param |= {chosen: by_scale / norm, other: mp.mpf(0), "logit_norm": -r / norm**2 * by_scale}
        units |= {chosen: scale_unit / norm, other: mp.mpf(0), "logit_norm": r / norm**2 * scale_unit}
    else:
        by_param["scale"], units["scale"] = by_scale, scale_unit

    by_z = [omega[y] * phi.by_x * residual[j] for j in classes]
    finite = phi.value < INF and loss < INF
    of_entropy = sum(abs(surprise[j] - prob[j] * entropy) for j in classes)
    # The logarithm of a tau near 1 is as accurate as tau.
    rounding = omega[y] if structure.head == "tau" else 0
    return Row(
        loss=loss,
        penalty=lam * lse * lse,
        omega=omega[y],
        grad=grad,
        params={name: d for name, d in by_param.items() if name in params},
        logsumexp=lse,
        log_prob=-at.n,
        entropy=entropy,
        confidence=at.confidence,
        prediction=min(j for j in classes if f[j] == max(f)),
        rank=sum(v > f[y] for v in f),
        loss_unit=abs(loss) + rounding + spread_unit * (sum(map(abs, by_z)) + eps * total_omega)
        if finite
        else mp.mpf(0),
        penalty_unit=lam * (lse * lse + spread_unit * abs(lse)),
        entropy_unit=entropy + at.miss + spread_unit * of_entropy,
        grad_unit=largest * spread_unit,
        param_units={name: d for name, d in units.items() if name in params},
    )


def scaled(d, factor):
    # 0 * inf: at p = 0 a derivative may be infinite where nothing asks for it.
    product = lambda v: mp.mpf(0) if factor == 0 else v * factor
    return (d[0], product(d[1])) if isinstance(d, tuple) else product(d)


def absolute(d, at_least=0):
    return (d[0], max(abs(d[1]), at_least)) if isinstance(d, tuple) else max(abs(d), at_least)


# ---- a batch ---------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Reduced values and gradients as float64 arrays, each with its unit (of the same shape)."""

    loss: np.ndarray
    loss_unit: np.ndarray
    grad: np.ndarray
    grad_unit: np.ndarray
    params: dict
    param_units: dict
    rows: list  # Row, or None where ignored


def of_row(params, i, y, group):
    """The numbers and tables of row i."""
    return {k: at_table(v, i, group) if k in TABLES else at_row(v, i, y) for k, v in params.items()}


def at_row(value, i, y):
    """A parameter's number for row i: shared, per class, per row, or the row's table."""
    value = np.asarray(value, dtype=np.float64)
    return value[()] if value.ndim == 0 else value[y] if value.ndim == 1 else value[i, 0]


def at_table(value, i, group):
    value = np.asarray(value, dtype=np.float64)
    return value if value.ndim == 1 else value[group[i]]


TABLES = ("t_slope", "t_bias", "tau_slope", "tau_bias")


def batch(
    structure,
    input,
    target,
    params,
    *,
    group=None,
    reduction="mean",
    ignore_index=-100,
    upstream=None,
    up_logsumexp=None,
    up_log_prob=None,
    up_entropy=None,
    weight=None,
    row_weight=None,
    normalizer=None,
    **extras,
):
    """(N, C) logits and (N,) labels; ``upstream`` is a number, or (N,) under reduction "none"."""
    input = np.asarray(input, dtype=np.float64)
    n, c = input.shape
    kept = [i for i in range(n) if target[i] != ignore_index]
    up = np.ones(n) if upstream is None else np.broadcast_to(np.asarray(upstream, dtype=np.float64), (n,))
    # What a row's loss is multiplied by, and what "mean" divides its two parts by.
    factor = np.ones(n) if row_weight is None else np.asarray(row_weight, dtype=np.float64)
    of_loss, of_penalty = 1.0, 1.0
    if reduction == "mean":
        of_loss = sum(1.0 if weight is None else float(weight[target[i]]) for i in kept) or np.nan
        of_penalty = len(kept) or np.nan
        if normalizer is not None:
            of_loss = of_penalty = float(normalizer)
    rows = [None] * n
    for i in kept:
        rows[i] = row(
            structure, input[i], int(target[i]), of_row(params, i, int(target[i]), group),
            weight=weight, up_loss=up[i] * factor[i] / of_loss, up_penalty=up[i] * factor[i] / of_penalty,
            up_logsumexp=0 if up_logsumexp is None else up_logsumexp[i],
            up_log_prob=0 if up_log_prob is None else up_log_prob[i],
            up_entropy=0 if up_entropy is None else up_entropy[i],
            **extras,
        )  # fmt: skip

    grad, grad_unit = np.zeros((n, c)), np.zeros((n, c))
    by_param = {name: np.zeros(np.shape(v)) for name, v in params.items()}
    units = {name: np.zeros(np.shape(v)) for name, v in params.items()}
    for i in kept:
        grad[i], grad_unit[i] = [float(v) for v in rows[i].grad], float(rows[i].grad_unit)
        for name, v in params.items():
            for into, found in ((by_param[name], rows[i].params), (units[name], rows[i].param_units)):
                d = found.get(name, mp.mpf(0))
                if name in TABLES:
                    where = (d[0],) if np.ndim(v) == 1 else (group[i], d[0])
                    into[where] += float(d[1])
                else:
                    where = () if np.ndim(v) == 0 else (target[i],) if np.ndim(v) == 1 else (i, 0)
                    into[where] += float(d)

    per_row = lambda get, by: np.array([0.0 if r is None else by[i] * float(get(r)) for i, r in enumerate(rows)])
    losses, penalties = per_row(lambda r: r.loss, factor), per_row(lambda r: r.penalty, factor)
    loss_units, penalty_units = (per_row(get, abs(factor)) for get in (lambda r: r.loss_unit, lambda r: r.penalty_unit))
    if reduction != "none":
        losses, penalties, loss_units, penalty_units = (
            np.asarray(v.sum()) for v in (losses, penalties, loss_units, penalty_units)
        )
    loss, unit = losses / of_loss, loss_units / abs(of_loss)
    if extras.get("z_loss"):
        loss, unit = loss + penalties / of_penalty, unit + penalty_units / of_penalty
    return Batch(loss, unit, grad, grad_unit, by_param, units, rows)
