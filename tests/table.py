"""One table of losses, and how their rows are drawn: every property is tested on every row of it.

Adding a loss to the package adds one entry to ``LOSSES`` (and its formulas to ``oracle.py``).
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field

import oracle
import torch
from oracle import TABLES, Structure

import mlkernels
from mlkernels import Affine, Margin, Modulated, PiecewiseLinear, Tau, Truncated, TwoScale
from mlkernels.backends.reference import PREPARATION
from mlkernels.call import DEFAULTS
from mlkernels.numbering import IGNORE_INDEX, Slot

INF, NAN = math.inf, math.nan
F64 = torch.float64


def usable_backends() -> list[str]:
    """The backends that can be used here on CPU tensors."""
    usable = []
    for name, why_not in mlkernels.available_backends().items():
        if why_not is None:
            try:
                mlkernels.cross_entropy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), backend=name)
            except ValueError:  # there, but not for the CPU
                continue
            usable.append(name)
    return usable


def extras(classes: int) -> dict[str, object]:
    """What every loss may keep beside its own numbers, where it shows. A new one is one entry (and its formula in
    ``oracle.py``): the tests of values, pieces, heads, modules and of the fast path take all of them from here."""
    weights = torch.tensor([0.5, 1.5, 0.0, 2.0, 0.75, 1.25], dtype=F64)
    return {
        "weight": weights[torch.arange(classes) % len(weights)],
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 6.0,
        "logit_adjustment": torch.linspace(-0.5, 0.75, classes, dtype=F64).roll(2),
    }


def preparation(classes: int) -> dict[str, object]:
    """All that may happen to a logit first, at once."""
    return {name: value for name, value in extras(classes).items() if name in PREPARATION}


def numbers_of(structure: mlkernels.spec.Spec, consts: list[float], mask: int = 0, reduction: int = 0) -> list[float]:
    """A loss as it crosses an op boundary."""
    return [*map(float, structure.ids), float(reduction), -100.0, float(mask), *consts]


def plain_numbers(*slots: int, reduction: int = 0, ignore_index: int = -100, **consts: float) -> list[float]:
    """Those of cross entropy, with tensors in these slots and other numbers by the slots' names."""
    values = DEFAULTS.copy()
    values[Slot.SCALE] = 1.0
    for name, value in consts.items():
        values[Slot[name]] = value
    structure, _ = mlkernels.spec.compose(None, 1.0, None, None)
    numbers = numbers_of(structure, values, sum(1 << slot for slot in slots), reduction)
    numbers[IGNORE_INDEX] = float(ignore_index)
    return numbers


@dataclass(frozen=True)
class Loss:
    """A loss with fixed, non-trivial parameters.

    ``call(input, target, **params, **options)`` is the public function; ``params`` are the numbers that can be trained
    (tables as nested tuples); ``fixed`` are the options that are not tensors; ``compose`` is the same loss for
    ``softmax_loss``.
    """

    name: str
    call: Callable
    structure: Structure
    params: dict
    compose: Callable  # params -> keyword arguments of softmax_loss
    draws: str = "logits"  # cosines
    neutral: dict | None = None  # the values at which the loss is cross entropy
    groups: int = 0
    smooth: bool = True  # twice differentiable wherever rows are drawn
    forms: tuple = ("number", "shared", "class", "row")
    fixed: dict = field(default_factory=dict)
    masked_target: bool = True  # a target logit of -inf makes sense

    def __str__(self) -> str:
        return self.name

    def values(self, form: str, target: torch.Tensor, classes: int, seed: int = 0, dtype: torch.dtype = F64) -> dict:
        """The parameters in a form; those that must have another shape (tables, norms per row) have that.

        Tensors hold numbers of float32, so that the dtype of a parameter does not change its value.
        """
        generator = torch.Generator().manual_seed(seed)
        found: dict = {}
        for name, value in self.params.items():
            if name in TABLES:
                found[name] = torch.tensor(value, dtype=torch.float32).to(dtype)
                continue
            own = "row" if name in ("norm", "target_logit") else form
            if own == "number":
                found[name] = value
                continue
            shape = {"shared": (), "class": (classes,), "row": (*target.shape, 1)}[own]
            # Numbers that differ, on one side of whatever they must not cross.
            spread = 0.2 * torch.rand(shape, generator=generator) if shape else torch.zeros(())
            sign = -1 if name == "k" else 1
            found[name] = (value * (1 + sign * spread)).float().to(dtype)
            if name == "m1" and value == 1.0:  # a multiplicative margin of 1 is a structure of its own
                found[name] = torch.ones(shape, dtype=dtype)
            if name == "target_logit":
                found[name] = torch.randn(shape, generator=generator).float().to(dtype)
        return found

    def group(self, target: torch.Tensor) -> torch.Tensor | None:
        """Which of the losses each row has."""
        return (torch.arange(target.numel()) % self.groups).reshape(target.shape) if self.groups else None

    def __call__(self, input: torch.Tensor, target: torch.Tensor, params: dict, **options) -> torch.Tensor:
        return self.call(input, target, **params, **self.fixed, **options)


# ---- the table -------------------------------------------------------------------------------------------------------


def general(compose: Callable, fixed_names: tuple = ()) -> Callable:
    """softmax_loss as a function of the composition's parameters."""

    def call(input, target, **arguments):
        options = {k: arguments.pop(k) for k in list(arguments) if k in _OPTIONS}
        return mlkernels.softmax_loss(input, target, **compose(arguments), **options)

    return call


_OPTIONS = {*mlkernels.call.COMMON, "group", "return_stats"}


def _modulated(p):
    return Modulated(
        alpha=p.get("alpha", 1.0), beta=p.get("beta", 1.0), gamma=p.get("gamma", 0.0), kappa=p.get("kappa", 1.0)
    )


def _margin(p, **options):
    return Margin(m1=p.get("m1", 1.0), m2=p.get("m2", 0.0), m3=p.get("m3", 0.0), norm=p.get("norm"), **options)


def _margin_loss(name, beyond_pi=None, gradient="exact", *, m1=1.0, m2=0.5, m3=0.1, scale=16.0, norm=None):
    params = {"m1": m1, "m2": m2, "m3": m3, "scale": scale} | ({"norm": norm} if norm else {})
    if m1 == 1.0:
        # At m1 = 1 the formula changes (closed form, linear continuation): the number, and not trained.
        del params["m1"]
    neutral = {"m1": 1.0, "m2": 0.0, "m3": 0.0, "scale": 1.0} | ({"norm": 1.0} if norm else {})
    fixed = {"beyond_pi": beyond_pi, "gradient": gradient}
    structure = Structure(transform="margin", beyond_pi=beyond_pi, gradient=gradient)
    compose = lambda p: {"transform": _margin(p, **fixed), "scale": p["scale"]}
    return Loss(
        name, mlkernels.margin_cross_entropy, structure, params, compose,
        draws="logits" if norm else "cosines", fixed=fixed, smooth=gradient == "exact" and not norm,
        neutral=neutral if m1 == 1.0 else None,
        masked_target=False,
    )  # fmt: skip


def _named_margin(name, call, own, margin, scale):
    """ArcFace, CosFace, SphereFace: one of the margins, called ``margin``."""
    params = {"margin": margin, "scale": scale}
    compose = lambda p: {"transform": Margin(**{own: p["margin"]}), "scale": p["scale"]}
    return Loss(
        name, call, Structure(transform="margin"), params, compose, draws="cosines",
        neutral={"margin": 1.0 if own == "m1" else 0.0, "scale": 1.0}, masked_target=False,
    )  # fmt: skip


_T_SLOPE, _T_BIAS = (1.1, 0.7, 1.3, 0.9, 1.2, 0.8), (0.05, -0.1, 0.02, 0.1, -0.05, 0.15)
_TAU_SLOPE, _TAU_BIAS = (0.9, 1.1, 1.2, 0.8, 1.0, 1.1), (-0.05, 0.02, -0.03, 0.1, 0.0, -0.02)
_T, _TAU = {"t_slope": _T_SLOPE, "t_bias": _T_BIAS}, {"tau_slope": _TAU_SLOPE, "tau_bias": _TAU_BIAS}
_T_GROUPS = {"t_slope": ((1.1, 0.7, 1.3), (0.9, 1.2, 0.8)), "t_bias": ((0.1, -0.1, 0.0), (0.2, 0.0, -0.2))}
_TAU_GROUPS = {"tau_slope": ((0.9, 1.1, 0.8), (1.0, 1.2, 0.9)), "tau_bias": ((-0.05, 0.0, 0.1), (0.05, -0.1, 0.02))}


def _piecewise(name, tables, *, clamp="min", groups=0, scale=1.5, norm=None, structure=None, domain=None):
    params = dict(tables) | {"scale": scale} | ({"norm": norm} if norm else {})
    has_t, has_tau = "t_slope" in tables, "tau_slope" in tables
    structure = Structure(
        transform="piecewise" if has_t else "identity",
        head="tau" if has_tau else "log",
        clamp=clamp,
        domain=domain or (-1.0, 1.0),
    )

    def compose(p):
        t = PiecewiseLinear(p["t_slope"], p["t_bias"], domain=structure.domain, norm=p.get("norm")) if has_t else None
        return {
            "transform": t,
            "scale": p["scale"],
            "head": Tau(p["tau_slope"], p["tau_bias"], clamp=clamp) if has_tau else None,
        }

    call = general(compose) if domain else mlkernels.piecewise_cross_entropy
    return Loss(
        name, call, structure, params, compose, groups=groups, smooth=False, masked_target=not has_t,
        fixed={} if domain else {"clamp": clamp},
    )  # fmt: skip


def _two_scale(name, low, high, norm=None, eta=0.5):
    params = {"scale_low": low, "scale_high": high} | ({"logit_norm": norm} if norm else {})
    compose = lambda p: {
        "scale": TwoScale(p["scale_low"], p["scale_high"], eta=eta, norm=p.get("logit_norm")),
    }
    return Loss(
        name, mlkernels.two_scale_cross_entropy, Structure(scale="two_scale", eta=eta), params, compose,
        fixed={"eta": eta}, forms=("number", "shared"), neutral={"scale_low": 1.0, "scale_high": 1.0},
    )  # fmt: skip


def _composition():
    compose = lambda p: {
        "transform": Margin(m2=p["m2"], m3=p["m3"]),
        "scale": TwoScale(p["scale_low"], p["scale_high"], eta=0.1, norm=p["logit_norm"]),
        "head": _modulated(p),
    }
    params = {
        "m2": 0.3, "m3": 0.05, "scale_low": 12.0, "scale_high": 30.0, "logit_norm": 1.5,
        "alpha": 1.5, "beta": 2.0, "gamma": 1.5, "kappa": 1.2,
    }  # fmt: skip
    structure = Structure(transform="margin", scale="two_scale", head="modulated", eta=0.1)
    return Loss(
        "two_scale_margin_modulated", general(compose), structure, params, compose, draws="cosines",
        neutral={"m2": 0.0, "m3": 0.0, "scale_low": 1.0, "scale_high": 1.0, "logit_norm": 1.0,
                 "alpha": 1.0, "beta": 2.0, "gamma": 0.0, "kappa": 1.0}, masked_target=False,
    )  # fmt: skip


def _modulated_loss(name, alpha, beta, gamma, kappa):
    params = {"alpha": alpha, "beta": beta, "gamma": gamma, "kappa": kappa}
    return Loss(
        name, mlkernels.modulated_cross_entropy, Structure(head="modulated"), params,
        lambda p: {"head": _modulated(p)}, neutral={"alpha": 1.0, "beta": beta, "gamma": 0.0, "kappa": 1.0},
    )  # fmt: skip


def _focal_loss(name, gamma):
    return Loss(
        name, mlkernels.focal_loss, Structure(head="modulated"), {"gamma": gamma},
        lambda p: {"head": Modulated(alpha=1.0, beta=1.0, gamma=p["gamma"], kappa=1.0)}, neutral={"gamma": 0.0},
    )  # fmt: skip


def _by_compose(name, structure, params, compose, **keywords):
    return Loss(name, general(compose), structure, params, compose, **keywords)


LOSSES = [
    Loss(
        "cross_entropy",
        mlkernels.cross_entropy,
        Structure(),
        {"scale": 1.7},
        lambda p: {"scale": p["scale"]},
        neutral={"scale": 1.0},
    ),
    _focal_loss("focal_2", 2.0),
    _focal_loss("focal_half", 0.5),
    _focal_loss("focal_0", 0.0),
    _modulated_loss("modulated", 1.0, 4.0, 5.0, 1.0),
    _modulated_loss("modulated_1154", 1.0, 1.0, 5.0, 4.0),
    _modulated_loss("modulated_half", 2.0, 3.0, 0.5, 0.75),
    _modulated_loss("generalised", 1 / 0.7, 0.7, 1.0, 0.0),
    _by_compose(
        "truncated",
        Structure(head="truncated"),
        {"k": 0.2, "scale": 1.2},
        lambda p: {"head": Truncated(p["k"]), "scale": p["scale"]},
        smooth=False,
    ),
    _margin_loss("margin"),
    _margin_loss("margin_monotone", "monotone", m2=1.3),
    _margin_loss("margin_easy", "easy"),
    _margin_loss("margin_none", "none", m2=1.3),
    _margin_loss("margin_negative", m2=-0.2, m3=-0.1),
    _margin_loss("margin_straight_through", gradient="straight_through"),
    _margin_loss("margin_combined", m1=1.35, m2=0.2),
    _margin_loss("margin_combined_easy", "easy", m1=1.35, m2=0.2),
    _margin_loss("margin_combined_none", "none", m1=1.35, m2=0.2),
    _margin_loss("margin_combined_straight_through", gradient="straight_through", m1=1.35, m2=0.2),
    _margin_loss("margin_norm", norm=12.0, scale=1.0),
    _margin_loss("margin_norm_combined", norm=12.0, scale=1.2, m1=2.0),
    _margin_loss("margin_norm_straight_through", gradient="straight_through", norm=12.0, scale=1.0),
    _named_margin("arcface", mlkernels.arcface_loss, "m2", 0.5, 64.0),
    _named_margin("cosface", mlkernels.cosface_loss, "m3", 0.35, 64.0),
    _named_margin("sphereface", mlkernels.sphereface_loss, "m1", 3.5, 64.0),
    _by_compose(
        "affine",
        Structure(transform="affine"),
        {"slope": 1.3, "offset": -0.4, "scale": 1.5},
        lambda p: {"transform": Affine(slope=p["slope"], offset=p["offset"]), "scale": p["scale"]},
        neutral={"slope": 1.0, "offset": 0.0, "scale": 1.0},
    ),
    _two_scale("two_scale", 1.5, 4.0),
    _two_scale("two_scale_norm", 2.0, 20.0, norm=3.0),
    _two_scale("separation", 1.0, 10.0),
    _piecewise("piecewise_t", _T),
    _piecewise("piecewise_t_norm", _T, norm=12.0, scale=1.0),
    _piecewise("piecewise_t_domain", _T, domain=(-3.0, 4.0)),
    _piecewise("piecewise_tau", _TAU),
    _piecewise("piecewise_tau_cross_entropy", _TAU, clamp="cross_entropy"),
    _piecewise("piecewise_identity", {"tau_slope": (1.0,) * 6, "tau_bias": (0.0,) * 6}),
    _piecewise("piecewise", _T | _TAU, clamp="cross_entropy"),
    _piecewise("piecewise_groups", _T_GROUPS | _TAU_GROUPS, groups=2),
    _by_compose(
        "target_logit",
        Structure(transform="given"),
        {"target_logit": 1.0, "scale": 1.5},
        lambda p: {"target_logit": p["target_logit"], "scale": p["scale"]},
    ),
    _composition(),
]
BY_NAME = {loss.name: loss for loss in LOSSES}
# One of each kind of formula, for the properties that are about machinery rather than formulas.
FEW = [
    BY_NAME[n]
    for n in ("cross_entropy", "modulated", "margin", "two_scale_norm", "piecewise_groups", "target_logit",
              "two_scale_margin_modulated")
]  # fmt: skip

_OWN = {"arcface": "m2", "cosface": "m3", "sphereface": "m1"}


def for_oracle(loss: Loss, params: dict) -> dict:
    """The parameters under the oracle's names, complete."""
    found = {_OWN.get(loss.name, k) if k == "margin" else k: v for k, v in params.items()}
    if loss.structure.transform == "margin":
        found = {"m1": 1.0, "m2": 0.0, "m3": 0.0} | found
    if loss.structure.head == "modulated":
        found = {"alpha": 1.0, "beta": 1.0, "gamma": 0.0, "kappa": 1.0} | found
    if loss.structure.scale == "single":
        found = {"scale": 1.0} | found
    return {k: numbers(v) for k, v in found.items()}


def numbers(value):
    """A tensor as float64 numpy; anything else as it is."""
    return value.detach().double().numpy() if isinstance(value, torch.Tensor) else value


def from_oracle(loss: Loss, name: str) -> str:
    """The oracle's name of a parameter."""
    return _OWN.get(loss.name, name) if name == "margin" else name


def expected(loss: Loss, input: torch.Tensor, target: torch.Tensor, params: dict, **options) -> oracle.Batch:
    """What the closed formulas say about (N, C) logits."""
    options = {k: v.numpy() if k == "group" else numbers(v) for k, v in options.items()}
    arguments = (numbers(input), target.numpy(), for_oracle(loss, params))
    # Backends and dtypes share their rows; 50 digits are slow.
    key = pickle.dumps((loss.name, arguments, sorted(options.items())))
    if key not in _expected:
        _expected[key] = oracle.batch(loss.structure, *arguments, **options)
    return _expected[key]


_expected: dict = {}


# ---- rows ------------------------------------------------------------------------------------------------------------

ROW_KINDS = ("random", "confident5", "confident20", "confident40", "wrong40", "ties", "tied_top", "masked")


def _row(kind: str, draws: str, y: int, classes: int, generator: torch.Generator) -> torch.Tensor:
    rand = lambda n, a, b: a + (b - a) * torch.rand(n, generator=generator)
    others = torch.arange(classes) != y
    if draws == "logits":
        f = 2 * torch.randn(classes, generator=generator)
        top = float(f[others].max()) if classes > 1 else 0.0
        if kind.startswith("confident"):
            f[y] = top + float(kind.removeprefix("confident")) + float(rand(1, -0.5, 0.5))
        elif kind == "wrong40":
            f[y] = top - 40
    else:
        f = rand(classes, -0.97, 0.97)
        if kind == "confident5":
            f[y], f[others] = 0.95, rand(int(others.sum()), -0.2, 0.2)
        elif kind == "confident20":  # the row after the margin has cut into it
            f[y], f[others] = 0.8, rand(int(others.sum()), -0.5, 0.0)
        elif kind == "confident40":
            f[y], f[others] = 1.0, rand(int(others.sum()), -0.9, -0.8)
        elif kind == "wrong40":
            f[y], f[others] = -0.9, rand(int(others.sum()), 0.5, 0.9)
        top = float(f[others].max()) if classes > 1 else 0.0
    if kind == "ties":
        f[:] = 0.25
    elif kind == "tied_top":
        f[y] = top
    elif kind == "masked" and classes > 2:
        f[(y + 1) % classes] = -INF
    return f


def draw(loss: Loss, *arguments, **keywords) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """See :func:`_draw`; drawn once and copied, as finding rows away from jumps takes the closed formulas."""
    key = (loss.name, arguments, repr(sorted(keywords.items())))
    if key not in _drawn:
        _drawn[key] = _draw(loss, *arguments, **keywords)
    input, target, params = _drawn[key]
    # Copies of the parameters, too: one test's requires_grad_() would make non-leaves of the next one's multiples.
    return input.clone(), target.clone(), {k: _copied(v) for k, v in params.items()}


def _copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


_drawn: dict = {}


def _draw(
    loss: Loss,
    rows: int = len(ROW_KINDS),
    classes: int = 6,
    seed: int = 0,
    form: str = "number",
    exact: torch.dtype = torch.float32,
    kinds: tuple = ROW_KINDS,
    margin: float = 2e-3,
    **options,
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """(input, target, params): float64 numbers that ``exact`` represents, away from the loss's jumps.

    Rows cycle through ``kinds``. A row closer than ``margin`` to a jump (a bin's edge, the threshold of a scale or of a
    clamp) is drawn again: on which side it falls is a matter of rounding.
    """
    generator = torch.Generator().manual_seed(1000 * seed + classes)
    target = torch.randint(0, classes, (rows,), generator=generator)
    params = loss.values(form, target, classes, seed)
    group = loss.group(target)
    input = torch.empty(rows, classes, dtype=F64)
    allowed = {k: numbers(v) for k, v in options.items() if k in preparation(classes)}
    found = for_oracle(loss, params)
    for i in range(rows):
        kind = kinds[i % len(kinds)]
        for _ in range(50):
            input[i] = _row(kind, loss.draws, int(target[i]), classes, generator).to(exact).to(F64)
            if not jumps(loss):
                break
            own = oracle.of_row(found, i, int(target[i]), group)
            if oracle.forward(loss.structure, input[i].tolist(), int(target[i]), own, **allowed).gap > margin:
                break
            kind = "random"
        else:
            raise AssertionError(f"{loss}: no row away from a jump")
    return input, target, params


def jumps(loss):
    s = loss.structure
    margin_jumps = s.transform == "margin" and s.beyond_pi in (None, "linear", "easy")
    return margin_jumps or s.transform == "piecewise" or s.scale == "two_scale" or s.head in ("tau", "truncated")


# ---- running and comparing -------------------------------------------------------------------------------------------


def leaves(params: dict, dtype: torch.dtype | None = None) -> dict:
    """Fresh leaves of the tensors among the parameters; numbers as they are."""
    return {
        k: v.detach().to(dtype or v.dtype).clone().requires_grad_() if isinstance(v, torch.Tensor) else v
        for k, v in params.items()
    }


def run(loss: Loss, input: torch.Tensor, target: torch.Tensor, params: dict, upstream=None, **options):
    """(loss, gradient by input, gradients by name), with an upstream gradient that is not 1."""
    x = input.detach().requires_grad_()
    own = leaves(params)
    value = loss(x, target, own, **options)
    value.backward(None if upstream is None else torch.as_tensor(upstream, dtype=value.dtype, device=value.device))
    return value.detach(), x.grad, {k: v.grad for k, v in own.items() if isinstance(v, torch.Tensor)}


def accumulation_eps(dtype: torch.dtype) -> float:
    """The unit roundoff of what a backend accumulates in."""
    return torch.finfo(F64 if dtype == F64 else torch.float32).eps


def close(actual, wanted, unit, eps: float, what: str, *, factor: float = 8.0, extra: float = 0.0, tiny: float = 0.0):
    """|actual - wanted| <= factor eps unit + extra |wanted| + tiny, infinities and NaN equal."""
    actual, wanted, unit = (torch.as_tensor(v).double().reshape(-1) for v in (actual, wanted, unit))
    assert actual.shape == wanted.shape, what
    finite = wanted.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(7.0), wanted[~finite].nan_to_num(7.0)), what
    assert bool(actual[finite].isfinite().all()), f"{what}: not finite: {actual.tolist()}, wanted {wanted.tolist()}"
    error = (actual - wanted).abs()
    allowed = factor * eps * unit + extra * wanted.abs() + tiny
    bad = finite & ~(error <= allowed)
    if bool(bad.any()):
        i = int(torch.where(bad, error / allowed, -1).argmax())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} off; worst at {i}: got {actual[i]:.17g}, wanted "
            f"{wanted[i]:.17g}, error {error[i]:.3g}, allowed {allowed[i]:.3g}"
        )


def placed(value, device):
    """A tensor, or the tensors in a dict, on a device; anything else as it is."""
    if isinstance(value, dict):
        return {k: placed(v, device) for k, v in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


def check(loss, backend, input, target, params, dtype, upstream=None, factor: float = 8.0, device="cpu", **options):
    """A backend against the closed formulas: value, gradient of the logits, gradients of the parameters."""
    group = loss.group(target)
    if group is not None:
        options["group"] = group
    x = input.to(dtype)
    assert torch.equal(x.double().nan_to_num(3.0), input.nan_to_num(3.0)), "rows must be exact in the tested dtype"
    found = run(
        loss, *(placed(v, device) for v in (x, target, params, upstream)), backend=backend, **placed(options, device)
    )
    value, grad, by_param = (placed(v, "cpu") for v in found)
    wanted = expected(loss, input, target, params, upstream=upstream, **options)
    eps = accumulation_eps(dtype)
    half = torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0.0
    assert value.dtype == (F64 if dtype == F64 else torch.float32)
    assert grad.dtype == dtype
    tiny = 100 * torch.finfo(value.dtype).tiny  # what is smaller may be flushed on the way
    largest = torch.finfo(dtype).max
    wanted_grad = torch.as_tensor(wanted.grad)
    wanted_grad = torch.where(wanted_grad.abs() > largest, wanted_grad.sign() * INF, wanted_grad)
    close(value, wanted.loss, wanted.loss_unit, eps, "loss", factor=factor, tiny=tiny)
    close(
        grad, wanted_grad, wanted.grad_unit, eps, "gradient", factor=factor, extra=half,
        tiny=max(tiny, torch.finfo(dtype).smallest_normal),
    )  # fmt: skip
    for name, found in by_param.items():
        own = from_oracle(loss, name)
        assert found.dtype == params[name].dtype and found.shape == params[name].shape
        close(
            found, wanted.params[own], wanted.param_units[own], eps, f"gradient of {name}", factor=factor, tiny=tiny
        )  # fmt: skip
    return wanted
