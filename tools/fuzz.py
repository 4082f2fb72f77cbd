"""Random calls of the kernels against the float64 reference, many rows a call: ``python -m tools.fuzz [BACKEND] ...``.

    python -m tools.fuzz cpu --rows 1e7             # until so many rows agreed; prints every seed that fails
    python -m tools.fuzz cpu --case 1234            # one call again, shrunk: fewer options, one row
    TRITON_INTERPRET=1 python -m tools.fuzz triton --rows 1e5 --most-rows 40

A call is a seed: the loss of the table, its parameters' form, shape, layout, dtypes, labels, options and rows are drawn
from it. What rounding may do to a number is measured, not derived: the reference is asked again at logits and with
numbers that differ by a few roundings, and what moves by a jump (a bin's edge, a threshold) allows that jump.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import table  # noqa: E402

F64, INF, NAN = torch.float64, float("inf"), float("nan")
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABELS = (torch.int64, torch.int64, torch.int32, torch.int16)
LAYOUTS = ("rows", "rows", "columns", "inside", "every second", "moved", "image")
ROUNDINGS = 4  # how far the asked-again logits are, in units of the accumulation's roundoff
ALLOWED = 24  # errors in units of what that moves


@dataclass(frozen=True)
class Case:
    """A call; everything random in it follows from ``seed``."""

    seed: int
    loss: str
    form: str
    rows: int
    classes: int
    dtype: torch.dtype
    label: torch.dtype
    layout: str
    spread: float
    reduction: str
    strange: bool  # rows of NaN and infinities
    options: dict[str, object] = field(default_factory=dict)
    only: int | None = None  # one row of them


def drawn(seed: int, most_rows: int, most_classes: int) -> Case:
    rng = random.Random(seed)
    loss = rng.choice(table.LOSSES)
    options: dict[str, object] = {}
    # A capped logit hides how near a jump is: at the cap nothing moves it.
    if rng.random() < 0.3 and not table.jumps(loss):
        options["softcap"] = rng.choice([2.0, 8.0, 30.0])
    if rng.random() < 0.3:
        options["label_smoothing"] = rng.choice([0.05, 0.5, 1.0])
    if rng.random() < 0.3:
        options["z_loss"] = rng.choice([1e-4, 0.5])
    for name in ("logit_adjustment", "weight", "row_weight"):
        if rng.random() < 0.3:
            options[name] = True
    reduction = rng.choice(["none", "none", "mean", "sum"])
    if reduction == "mean" and rng.random() < 0.3:
        options["normalizer"] = rng.uniform(0.5, 50)
    options["ignore_index"] = rng.choice([-100, -1, 0, 3])
    small = rng.random() < 0.7
    classes = rng.randint(1, 40) if small else int(2 ** rng.uniform(5, torch.tensor(float(most_classes)).log2().item()))
    rows = max(1, int(rng.uniform(0.1, 1) * min(most_rows, most_rows * 64 // classes)))
    return Case(
        seed, loss.name, rng.choice(loss.forms), rows, classes, rng.choice(DTYPES), rng.choice(LABELS),
        rng.choice(LAYOUTS), rng.choice([0.3, 1.0, 4.0, 20.0]), reduction, rng.random() < 0.2, options,
    )  # fmt: skip


def rows_of(case: Case) -> tuple[Tensor, Tensor]:
    """Logits that the case's dtype holds, and labels."""
    loss, generator = table.BY_NAME[case.loss], torch.Generator().manual_seed(case.seed)
    n, c = case.rows, case.classes

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=F64)

    target = torch.randint(c, (n,), generator=generator)
    kind = torch.randint(8, (n,), generator=generator)
    own = torch.arange(n), target
    if loss.draws == "cosines":
        x = 2 * uniform(n, c) - 1
        x[kind == 0] *= 0.2
        x[own] = torch.where(kind == 1, 1 - 1e-3 * uniform(n), x[own])
        x[own] = torch.where(kind == 2, uniform(n) * 0.1 - 1, x[own])
        x[own] = torch.where((kind == 3) & (uniform(n) < 0.3), torch.ones(n, dtype=F64), x[own])
    else:
        x = case.spread * torch.randn(n, c, generator=generator, dtype=F64)
        x[own] += torch.where(kind == 0, 40 * uniform(n), 0) - torch.where(kind == 1, 40 * uniform(n), 0)
    x[kind == 4] = 0.25
    ignored = uniform(n) < 0.15
    target[ignored] = int(case.options["ignore_index"])  # type: ignore[call-overload]
    if case.strange:
        at = uniform(n) < 0.1
        values = torch.tensor([NAN, INF, -INF, 0.0, 1e4])[torch.randint(5, (n,), generator=generator)].to(F64)
        where = torch.randint(c, (n,), generator=generator)
        # A target without a chance where the loss is finite all the same: its derivative by a scale is 0 · inf to the
        # reference's autograd, and 0 to the kernels.
        # The same where smoothing meets a weight of 0.
        values = values.where((values != -INF) | ("label_smoothing" not in case.options), NAN)
        place = at & ((where != target) | (values != -INF) & loss.masked_target)
        x[place, where[place]] = values[place]
    return x.clamp(-6e4, 6e4).to(case.dtype).to(F64) if not case.strange else x.to(case.dtype).to(F64), target


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "columns":
        return x.t().contiguous().t()
    if layout == "inside":
        return torch.cat([x * 0, x, x * 0], 1)[:, x.shape[1] : 2 * x.shape[1]]
    if layout == "every second":
        return torch.stack([x, x * 0], 2)[:, :, 0]
    if layout == "moved":  # off every alignment
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    return x


@dataclass
class Found:
    """Of each row its loss, gradient and derivatives by its own parameters; sums stay what they are."""

    loss: Tensor
    grad: Tensor
    params: dict[str, Tensor]


def of_rows(name: str, value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == 1 and name not in table.TABLES


def called(case: Case, x: Tensor, target: Tensor, backend: str, dtype: torch.dtype) -> Found:
    loss, generator = table.BY_NAME[case.loss], torch.Generator().manual_seed(case.seed + 1)
    options = dict(case.options)
    params = loss.values(case.form, target, case.classes, case.seed % 1000, torch.float32 if dtype != F64 else F64)
    for name, size in (("logit_adjustment", case.classes), ("weight", case.classes), ("row_weight", case.rows)):
        drawn = torch.rand(size, generator=generator).mul(4).round() / 2 + (0.5 if name == "weight" else 0)
        if name in options:
            options[name] = drawn.to(F64 if backend == "reference" else torch.float32)
    upstream = (torch.randn(case.rows, generator=generator) if case.reduction == "none" else torch.tensor(-1.75)).to(
        F64
    )
    if loss.groups:
        options["group"] = loss.group(target)
    if case.only is not None:
        i = slice(case.only, case.only + 1)
        x, target = x[i], target[i]
        upstream = upstream[i] if upstream.dim() else upstream
        options = {k: v[i] if k in ("row_weight", "group") and isinstance(v, Tensor) else v for k, v in options.items()}
        params = {k: v[i] if of_rows(k, v) else v for k, v in params.items()}
    x, own = laid_out(x.to(dtype), case.layout), table.leaves(params)
    labels = target.to(case.label)
    image = case.layout == "image"
    if image:
        x, labels = x.t()[None], labels[None]
        upstream = upstream[None] if upstream.dim() else upstream
        own = {k: v.detach()[None].requires_grad_() if of_rows(k, v) else v for k, v in own.items()}
        options = {k: v[None] if k in ("row_weight", "group") else v for k, v in options.items()}
    x = x.detach().requires_grad_()
    value = loss(x, labels, own, backend=backend, reduction=case.reduction, **options)
    value.backward(upstream.to(value.dtype))
    assert x.grad is not None
    grad = x.grad[0].t() if image else x.grad
    trained = {
        k: v.grad.reshape(v.shape).double() for k, v in own.items() if isinstance(v, Tensor) and v.grad is not None
    }
    return Found(value.detach().double().reshape(-1), grad.double(), trained)


def disagreement(case: Case, backend: str) -> str | None:
    """What is wrong with the backend's numbers, if anything is."""
    x, target = rows_of(case)
    found = called(case, x, target, backend, case.dtype)
    wanted = called(case, x, target, "reference", F64)
    roundoff = table.accumulation_eps(case.dtype)
    half = torch.finfo(case.dtype).eps if case.dtype in (torch.float16, torch.bfloat16) else 0.0
    moved = []
    for k, distance in enumerate([ROUNDINGS] * 4 + [32 * ROUNDINGS] * 2):
        generator = torch.Generator().manual_seed(k)
        sign = torch.where(torch.rand(x.shape, generator=generator) < 0.5, 1.0, -1.0)
        if k % 4 < 2:  # the target alone against the others, to both sides
            sign = torch.ones_like(x).scatter(1, target.clamp(0, case.classes - 1)[:, None], -1) * (-1) ** k
        shift = distance * roundoff * sign * (x.abs() + 0.2)
        shift[~x.isfinite()] = 0
        cosines = table.BY_NAME[case.loss].draws == "cosines" and not case.strange
        moved.append(called(case, (x + shift).clamp(-1, 1) if cosines else x + shift, target, "reference", F64))
    if case.only is not None:
        x = x[case.only : case.only + 1]

    def off(name: str, got: Tensor, exact: Tensor, others: list[Tensor], extra: float, tiny: float) -> str | None:
        if got.shape != exact.shape:
            return f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
        largest = torch.finfo(case.dtype).max if name == "gradient" else torch.finfo(torch.float32).max
        fits = exact.isfinite() & (exact.abs() < 0.99 * largest)
        far = torch.stack([(other - exact).abs().nan_to_num(INF, INF) for other in others])
        unit, wide = far[:4].amax(0), far[4:].amax(0)
        unit = torch.where(wide > 1000 * unit, wide, unit)  # a jump is near
        if exact.numel() > 1 and exact.dim() == 2:
            unit = torch.maximum(unit, unit.nan_to_num(0, 0).amax(1, keepdim=True) * 1e-3)  # of a row, rounded alike
        relative = (
            65536 if case.dtype == F64 else 64
        ) * roundoff  # in double acos at the ends amplifies more than it moves
        if name == "gradient" and "softcap" in case.options:  # 1 - tanh^2, as torch has it: what of it the 1 leaves
            slope = 1 - torch.tanh(x / case.options["softcap"]) ** 2  # type: ignore[operator]
            relative = relative / slope.nan_to_num(1).clamp(min=roundoff)
            # At the cap the reference's is 0 or 1e-16, whatever the kernel has more of.
            uncapped = torch.where(slope > 1e-6, exact.abs() / slope, 0).nan_to_num(0, 0, 0)
            tiny += ALLOWED * torch.finfo(F64).eps * float(uncapped.amax())
        allowed = ALLOWED * unit + (extra + relative) * exact.abs() + tiny
        if name == "gradient" and "label_smoothing" in case.options:  # p_j - d may cancel
            largest_of_row = exact.abs().nan_to_num(0, 0, 0).amax(1, keepdim=True)
            allowed = allowed + ALLOWED * roundoff * (largest_of_row + largest_of_row.amax() / 16)
        bad = fits & ~((got - exact).abs() <= allowed)
        strange = ~exact.isfinite() & torch.stack([~o.isfinite() for o in others[:4]]).all(0)
        if name == "gradient":  # of a row without a loss: NaN, but where is a matter of convention
            lost = (x.isnan() | x.isposinf()).any(1, keepdim=True)
            if bool((lost[:, 0] & (got.isnan().any(1) != exact.isnan().any(1))).any()):
                return "gradient: of a row with NaN or inf it must be NaN, and of no other"
            bad, strange = bad & ~lost, strange & ~lost
        bad |= strange & (got.isfinite() & ~(exact.isinf() & (got.abs() >= 0.9 * largest)))
        if not bool(bad.any()):
            return None
        i = int(torch.where(bad, (got - exact).abs() / allowed, -1).nan_to_num(1e30).argmax())
        row = i // case.classes if name == "gradient" else i
        return (
            f"{name}: {int(bad.sum())} of {bad.numel()}; at {i} (row {row}) got {got.flatten()[i]:.9g}, "
            f"wanted {exact.flatten()[i]:.9g}, allowed {allowed.flatten()[i]:.3g}"
        )

    smallest = torch.finfo(case.dtype).smallest_normal
    checks = [
        off("loss", found.loss, wanted.loss, [m.loss for m in moved], 0.0, 1e-36),
        off("gradient", found.grad, wanted.grad, [m.grad for m in moved], half, max(smallest, 1e-35)),
    ]
    for name, exact in wanted.params.items():
        # A sum over rows: errors add up where values cancel.
        scale = roundoff * case.rows**0.5 * float(exact.abs().nan_to_num(0, 0, 0).amax()) if exact.numel() else 0.0
        scale += 2 * roundoff * float(wanted.loss.abs().nan_to_num(0, 0, 0).sum())
        loosened = 1e-36 + 64 * scale + ALLOWED * roundoff * case.rows * (1 if case.reduction != "mean" else 1e-2)
        checks.append(off(f"by {name}", found.params[name], exact, [m.params[name] for m in moved], 0.0, loosened))
    return next((word for word in checks if word), None)


def wrong(case: Case, backend: str) -> str | None:
    try:
        return disagreement(case, backend)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def shrunk(case: Case, backend: str) -> Case:
    """A smaller case that fails too."""
    for name in list(case.options):
        fewer = replace(case, options={k: v for k, v in case.options.items() if k != name or k == "ignore_index"})
        if wrong(fewer, backend):
            case = fewer
    for change in ({"layout": "rows"}, {"label": torch.int64}, {"reduction": "none"}, {"strange": False}):
        simpler = replace(case, **change)  # type: ignore[arg-type]
        if "normalizer" not in simpler.options and wrong(simpler, backend):
            case = simpler
    for row in range(case.rows):
        if wrong(replace(case, only=row), backend):
            return replace(case, only=row)
    return case


def ran(
    name: str, cases: Iterable[Any], check: Callable[[Any], str | None], minutes: float, *, most_rows: float = math.inf,
    most_calls: float = math.inf,
) -> int:  # fmt: skip
    """Asks one case after another, and says what was wrong; 1 where something was."""
    rows = calls = failed = 0
    begun = time.monotonic()
    for case in cases:
        if rows >= most_rows or calls >= most_calls or time.monotonic() - begun >= 60 * minutes:
            break
        word = check(case)
        if word:
            failed += 1
            print(f"--case {case.seed}: {case}\n    {word[:400]}", flush=True)
        calls, rows = calls + 1, rows + case.rows
    print(f"{name}: {calls} calls, {rows} rows, {failed} failed, {time.monotonic() - begun:.0f} s")
    return int(failed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("backend", nargs="?", default="cpu", choices=("cpu", "triton", "cuda"))
    parser.add_argument("--rows", type=float, default=1e5, help="until so many agreed")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="or so long")
    parser.add_argument("--seed", type=int, default=0, help="of the first call; the next ones follow")
    parser.add_argument("--most-rows", type=int, default=4000, help="of one call")
    parser.add_argument("--most-classes", type=int, default=2048)
    parser.add_argument("--case", type=int, help="this seed alone, shrunk")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case is not None:
        case = drawn(arguments.case, arguments.most_rows, arguments.most_classes)
        print(case, wrong(case, arguments.backend), sep="\n")
        if wrong(case, arguments.backend):
            case = shrunk(case, arguments.backend)
            print("shrunk:", case, wrong(case, arguments.backend), sep="\n")
        return 0
    cases = (drawn(seed, arguments.most_rows, arguments.most_classes) for seed in itertools.count(arguments.seed))
    wrong_here = functools.partial(wrong, backend=arguments.backend)
    return ran(arguments.backend, cases, wrong_here, arguments.minutes, most_rows=arguments.rows)


if __name__ == "__main__":
    sys.exit(main())
