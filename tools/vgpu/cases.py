"""Calls of the public functions, and what is expected of them: the reference backend in float64.

The losses are those of ``tests/table.py``.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parents[2] / "tests"
DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
}  # fmt: skip
#: How logits lie in memory, see :func:`_placed`.
LAYOUTS = ("rows", "padded", "odd", "every_second", "transposed", "expanded")
INNER_LAYOUTS = ("rows", "odd", "last_every_second", "channels_last", "rows_every_second")
#: What is special about some rows.
KINDS = ("random", "confident", "ignored", "nan", "masked")


@dataclass(frozen=True)
class Case:
    """A call."""

    loss: str = "cross_entropy"
    form: str = "number"
    dtype: str = "float32"
    rows: int = 5
    classes: int = 33
    inner: tuple[int, ...] = ()  # d1, ...: the logits are (rows, classes, d1, ...)
    layout: str = "rows"
    reduction: str = "mean"
    train: bool = False
    stats: bool = False
    kind: str = "random"
    upstream: float = 2.5
    labels: str = "int64"
    options: tuple[str, ...] = ()  # of OPTIONS
    seed: int = 0
    forced: tuple[tuple[str, Any], ...] = field(default=())  # launches of another shape, of the CUDA kernels only

    def __str__(self) -> str:
        default = Case()
        told = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k) and k != "loss"]
        return " ".join([self.loss, *told])


def table() -> Any:
    """tests/table.py."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    import table

    return table


# ---- the tensors of a call -------------------------------------------------------------------------------------------


def _placed(values: Tensor, layout: str) -> Tensor:
    """The values in memory of another layout; what lies between them is NaN."""
    shape = values.shape

    def within(size: tuple[int, ...]) -> Tensor:
        return torch.full(size, math.nan, dtype=values.dtype)

    if layout == "rows":
        return values.clone()
    if layout == "odd":
        view = within((values.numel() + 9,))[3 : 3 + values.numel()].view(shape)
    elif layout == "padded":
        view = within((shape[0], shape[1] + 3))[:, 1 : 1 + shape[1]]
    elif layout == "every_second":
        view = within((shape[0], 2 * shape[1], *shape[2:]))[:, ::2]
    elif layout == "rows_every_second":
        view = within((2 * shape[0], *shape[1:]))[::2]
    elif layout == "last_every_second":
        view = within((*shape[:-1], 2 * shape[-1]))[..., ::2]
    elif layout == "transposed":
        view = within((shape[1], shape[0], *shape[2:])).transpose(0, 1)
    elif layout == "channels_last":
        view = within((shape[0], *shape[2:], shape[1])).movedim(-1, 1)
    else:
        assert layout == "expanded", layout
        return values[:1].clone().expand(shape)
    return view.copy_(values)


def _tensors(case: Case, loss: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(case.seed)
    shape, outer = (case.rows, case.classes, *case.inner), (case.rows, *case.inner)
    # Rounded before anything is computed: the reference has the same numbers.
    if loss.draws == "logits":
        values = 2 * torch.randn(shape, generator=generator)
    else:
        values = 1.9 * torch.rand(shape, generator=generator) - 0.95
    target = torch.randint(0, case.classes, outer, generator=generator)
    some = torch.rand(outer, generator=generator) < 0.3
    some.view(-1)[0] = False
    if case.kind == "confident":
        top = 40.0 if loss.draws == "logits" else 0.98
        values = values.scatter(1, target.unsqueeze(1), top)
    elif case.kind == "masked":
        other = (target + 1) % case.classes
        if case.classes > 2:
            values = values.scatter(1, other.unsqueeze(1), -math.inf)
    elif case.kind == "nan":
        values = torch.where(some.unsqueeze(1), math.nan, values)
    elif case.kind == "ignored":
        values = torch.where(some.unsqueeze(1), math.nan, values)
        target = torch.where(some, -100, target)
    input = _placed(values.to(DTYPES[case.dtype]), case.layout)
    options: dict[str, Any] = {"reduction": case.reduction}
    if case.kind == "ignored":
        options["ignore_index"] = -100
    known = {
        "weight": lambda: torch.rand(case.classes, generator=generator) + 0.5,
        "label_smoothing": lambda: 0.1,
        "z_loss": lambda: 0.01,
        "softcap": lambda: 6.0,
        "logit_adjustment": lambda: 0.3 * torch.randn(case.classes, generator=generator),
        # An ignored row's is not read.
        "row_weight": lambda: torch.where(target == -100, math.nan, torch.rand(outer, generator=generator) + 0.25),
        "normalizer": lambda: torch.tensor(12.5) if case.seed % 2 else 12.5,
    }
    options |= {name: known[name]() for name in case.options if name != "normalizer" or case.reduction == "mean"}
    if loss.groups:
        options["group"] = loss.group(target)
    return input, target.to(getattr(torch, case.labels)), options


# ---- a call, and what comes out --------------------------------------------------------------------------------------


def _called(case: Case, loss: Any, backend: str, input: Tensor, target: Tensor, options: dict[str, Any], exact: bool):
    import mlkernels

    dtype = torch.float64 if exact or input.dtype == torch.float64 else torch.float32

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    drawn = loss.values(case.form, target.clamp(min=0).long(), case.classes, seed=case.seed)
    params = {
        name: cast(value).clone().requires_grad_(case.train) if isinstance(value, Tensor) else value
        for name, value in drawn.items()
    }
    # The reference sees the numbers, not how they lie.
    input = (input.double().contiguous() if exact else input.detach()).requires_grad_()
    options = {name: cast(value) for name, value in options.items()}
    stats = ()
    if case.stats:
        value, stats = mlkernels.softmax_loss(
            input, target, **loss.compose(params), **options, backend=backend, return_stats=True
        )
    else:
        value = loss(input, target, params, **options, backend=backend)
    generator = torch.Generator().manual_seed(case.seed + 1)
    upstream = torch.randn(value.shape, generator=generator) if value.dim() else torch.tensor(case.upstream)
    outputs = [value, *stats[:3]]  # those that have a gradient
    upstreams = [upstream, *(torch.randn(one.shape, generator=generator) for one in outputs[1:])]
    torch.autograd.backward(outputs, [one.to(value.dtype) for one in upstreams])
    gradients = {f"gradient of {k}": v.grad for k, v in params.items() if isinstance(v, Tensor) and v.grad is not None}
    return {
        "loss": value.detach(),
        "gradient": input.grad,
        **gradients,
        **{f"stat {k}": v for k, v in enumerate(stats)},
    }


ENTROPY = "stat 2"
#: Relative errors; of a half-precision gradient mostly its own rounding.
_GRADIENT = {torch.float32: 3e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 1e-9}


def _compare(name: str, found: Tensor, wanted: Tensor, relative: float, rounded: Callable[[], Tensor]) -> None:
    """A number may be off by its own size, or half as much of the largest: what p - 1 cancels.

    Where that is not enough, by four times what eager torch in the same precision (``rounded``) is off in its row: the
    slope of a softcap that is nearly reached, the entropy of a confident row and 1 / tau near 0 are no better known.
    """
    dtype = found.dtype
    found, wanted = found.detach().double(), wanted.detach().double()
    if name == "gradient" and dtype == torch.float16:  # what float16 cannot hold
        wanted = torch.where(wanted.abs() > 65504, wanted.sign() * math.inf, wanted)
    finite = wanted[wanted.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    # Entropy is a difference of numbers of size 1.
    tiny = 1e-7 if dtype == torch.float16 or (name == ENTROPY and dtype == torch.float32) else 1e-12
    close = torch.isclose(found, wanted, rtol=relative, atol=0.5 * relative * max(largest, 1e-6) + tiny, equal_nan=True)
    if wanted.dim() > 1:  # a row that has become NaN may be NaN where a formula leaves it out, too
        close |= found.isnan() & wanted.isnan().any(1, keepdim=True)
    if bool(close.all()):
        return
    off = (rounded().double() - wanted).abs().nan_to_num(0)
    close |= (found - wanted).abs() <= 4 * (off.amax(1, keepdim=True) if off.dim() > 1 else off.amax())
    if bool(close.all()):
        return
    error = torch.where(close, -1.0, (found - wanted).abs().nan_to_num(math.inf))
    worst = int(error.argmax())
    raise AssertionError(
        f"{name}: {int((~close).sum())} of {close.numel()} are wrong; the worst, at {worst}, is "
        f"{found.reshape(-1)[worst]:.9g} and not {wanted.reshape(-1)[worst]:.9g} (largest {largest:.3g})"
    )


def check(case: Case, backend: str) -> None:
    """Runs a call by a backend.

    Raises:
        AssertionError: a value or a gradient is wrong.
        Fault: the emulator found one.
    """
    loss = table().BY_NAME[case.loss]
    input, target, options = _tensors(case, loss)
    found = _called(case, loss, backend, input, target, options, exact=False)
    wanted = _called(case, loss, "reference", input, target, options, exact=True)
    assert found.keys() == wanted.keys(), (list(found), list(wanted))
    eager = functools.cache(lambda: _called(case, loss, "reference", input, target, options, exact=False))
    accumulated = 1e-9 if input.dtype == torch.float64 else 5e-5
    for name, value in found.items():
        if case.kind == "nan" and name.startswith("gradient of"):
            continue  # of a row that is NaN it may be NaN, or what the formula leaves it out of
        relative = max(_GRADIENT[input.dtype], accumulated) if name == "gradient" else accumulated
        # A parameter's gradient is a sum over rows whose terms cancel.
        bound = 20 * accumulated if name.startswith("gradient of") else relative
        _compare(name, value, wanted[name], bound, lambda name=name: eager()[name])


# ---- the whole table -------------------------------------------------------------------------------------------------

#: The table comes in so many parts, each of them a spread: every loss in every form is in each.
PARTS = 12
_TURNS = ((), ("weight", "label_smoothing"), ("z_loss", "softcap"), ("logit_adjustment",))


def everything(part: int) -> Iterator[Case]:
    """A part of the table: every loss in every form and every layout, with every dtype and length.

    A call costs 10 ms, and a second where it needs another kernel. So what kernels differ in (options, reductions,
    what is trained) takes turns with form, dtype and length, and is the same for all losses; data differ in each call.
    """
    seeds = (seed * PARTS + part for seed in itertools.count())

    def case(turn: int, **fields: Any) -> Case:
        seed = next(seeds)
        return Case(
            reduction=("mean", "sum", "none")[turn % 3], options=_TURNS[turn // 3 % 4], train=turn % 2 == 0,
            stats=turn % 5 == 0, upstream=(2.5, 1.0)[seed % 7 == 0], labels=("int64", "int32")[turn % 11 == 0],
            kind=KINDS[seed // PARTS % 4], seed=seed, **fields,
        )  # fmt: skip

    shapes = [(dtype, classes) for dtype in DTYPES for classes in (10, 1000, 2051)]
    for loss in table().LOSSES:
        for index, form in enumerate(loss.forms):
            shape = (part + index) % PARTS
            dtype, classes = shapes[shape]
            yield case(PARTS * index + shape, loss=loss.name, form=form, dtype=dtype, rows=6, classes=classes)
    placed = [(layout, 9, ()) for layout in LAYOUTS]
    placed += [(layout, 3, inner) for layout in INNER_LAYOUTS for inner in ((5, 7), (8, 2), (4,))]
    long = [(loss, classes) for loss in ("cross_entropy", "two_scale", "arcface") for classes in (40000, 128256)]
    for d, dtype in enumerate(DTYPES):
        for c, classes in enumerate((1, 2, 3, 10, 16, 64, 1000, 2051, 4096)):
            for index, (layout, rows, inner) in enumerate(placed):
                if (d + c + index) % PARTS == part:
                    turn = 9 * d + c + 5 * bool(inner)
                    yield case(turn, dtype=dtype, rows=rows, classes=classes, layout=layout, inner=inner)
        for index, (name, classes) in enumerate(long):
            if (6 * d + index) % PARTS == part:
                yield case(6 * d + index, loss=name, dtype=dtype, rows=2, classes=classes)


# ---- random calls ----------------------------------------------------------------------------------------------------

OPTIONS = ("weight", "label_smoothing", "z_loss", "softcap", "logit_adjustment", "row_weight", "normalizer")
SHORT = (1, 2, 3, 10, 16, 19, 24, 31, 33, 64, 100, 150, 256, 257, 1000, 1001, 1024)
LONG = (1025, 2048, 2051, 4096, 4099, 8192, 16384, 20000)
HUGE = (32768, 50257, 65537, 128256, 131073)


def random_case(rng: random.Random, sizes: str = "short") -> Case:
    """A call of any kind."""
    losses = table().LOSSES
    loss = rng.choice(losses)
    classes = rng.choice({"short": SHORT, "long": LONG, "huge": HUGE}[sizes])
    rows = rng.choice({"short": (1, 2, 3, 5, 17, 64, 130), "long": (1, 2, 3, 5), "huge": (1, 2, 3)}[sizes])
    if sizes == "short" and classes <= 19 and rng.random() < 0.3:
        rows = rng.choice((300, 1025, 2049))
    inner = ()
    if rng.random() < 0.25 and sizes != "huge":
        inner = rng.choice(((2, 3), (4,), (3, 1, 2), (8, 2), (5, 7)))
        rows = max(1, rows // 8)
    layout = rng.choice(INNER_LAYOUTS if inner else LAYOUTS) if rng.random() < 0.5 else "rows"
    options = tuple(name for name in OPTIONS if rng.random() < 0.2)
    kind = rng.choice(KINDS) if rng.random() < 0.4 else "random"
    if kind == "masked" and not loss.masked_target:
        kind = "random"
    return Case(
        loss=loss.name, form=rng.choice(loss.forms), dtype=rng.choice(list(DTYPES)), rows=rows, classes=classes,
        inner=inner, layout=layout, reduction=rng.choice(("mean", "sum", "none")), train=rng.random() < 0.5,
        stats=rng.random() < 0.2, kind=kind, upstream=rng.choice((1.0, 2.5)), labels=rng.choice(("int64", "int32")),
        options=options, seed=rng.randrange(1 << 30),
    )  # fmt: skip
