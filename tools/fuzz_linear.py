"""Random calls of linear heads on the CPU against logits in float64: ``python -m tools.fuzz_linear --minutes 10``.

    python -m tools.fuzz_linear --case 1234          # one call again

A call is a seed: sizes, dtype, loss and the form of its parameters, options, bias or cosines, strategy, memory, threads
and labels. Features and weight are small multiples of 1/8, whose products every format holds: the logits of both sides
are the same numbers, so that no threshold is crossed, and what differs is a sum's rounding. Cosines are rounded, and
only losses without jumps see them.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import table  # noqa: E402

import mlkernels  # noqa: E402
from tools import fuzz  # noqa: E402

F64 = torch.float64
WIDTHS = (1, 2, 3, 8, 16, 30, 64)
DTYPES = (torch.float32, torch.float32, F64, torch.bfloat16)
GROUP = 64  # rows whose loss to rounding is added up together
ROUNDINGS = 192  # a product's sums, and the exponentials of what they give


@dataclass(frozen=True)
class Case:
    """A call; everything random in it follows from ``seed``."""

    seed: int
    loss: str
    form: str
    rows: int
    width: int
    classes: int
    dtype: torch.dtype
    normalize: bool
    bias: bool
    reduction: str
    strategy: str | None
    memory: int | None
    threads: int
    frozen: str  # what takes no gradient
    options: tuple[str, ...]


class Check(NamedTuple):
    """What came of a result, what is right, and what it may be off by."""

    name: str
    got: Tensor
    right: Tensor
    allowed: Tensor


def served(loss: table.Loss) -> bool:
    """Losses of a linear head whose numbers are not decided by the rounding of a cosine."""
    jumps = loss.draws == "cosines" and (table.jumps(loss) or loss.name == "margin_easy")  # where the cosine is 0
    return "target_logit" not in loss.params and "norm" not in loss.params and not jumps


def drawn(seed: int) -> Case:
    rng = random.Random(seed)
    loss = rng.choice([one for one in table.LOSSES if served(one)])
    large = rng.random() < 0.1
    return Case(
        seed, loss.name, rng.choice(loss.forms), rng.randint(1, 300 if large else 40),
        max(rng.choice(WIDTHS), 8 if loss.draws == "cosines" else 1),  # of few features some are parallel: arccos of 1
        rng.randint(2000, 20000) if large else rng.randint(1, 300), rng.choice(DTYPES), loss.draws == "cosines",
        loss.draws != "cosines" and rng.random() < 0.4, rng.choice(["mean", "mean", "sum", "none"]),
        rng.choice([None, None, None, "stored", "tiles", "rows"]), rng.choice([None, None, 1 << 16, 1 << 20]),
        rng.choice([1, 2, 3]), rng.choice(["", "", "", "x", "weight"]),
        tuple(one for one in ("weight", "row_weight", "logit_adjustment", "label_smoothing", "z_loss", "softcap")
              if rng.random() < 0.2 and not (one == "softcap" and table.jumps(loss))),
    )  # fmt: skip


def mean_of(rows: Tensor) -> Tensor:
    """No smaller than that of any group of rows is."""
    return torch.stack([group.sum(0).abs() / max(len(group), 1) for group in rows.split(GROUP)]).amax(0)


def called(case: Case) -> tuple[list[Check], int]:
    """Its results, and the number of rows."""
    loss, generator = table.BY_NAME[case.loss], torch.Generator().manual_seed(case.seed)

    def eighths(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).double() / 8

    x, weight = eighths(case.rows, case.width), eighths(case.classes, case.width)
    if case.normalize:
        x[:, 0], weight[:, 0] = 1.0, 0.5  # no row without a length
    bias = eighths(case.classes) if case.bias else None
    target = torch.randint(case.classes, (case.rows,), generator=generator)
    target[torch.rand(case.rows, generator=generator) < 0.1] = -100
    options: dict[str, Any] = {"reduction": case.reduction}
    numbers = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}
    for name in case.options:
        size = case.rows if name == "row_weight" else case.classes
        options[name] = numbers[name] if name in numbers else eighths(size).abs() + 0.5
    if loss.groups:
        options["group"] = loss.group(target)
    upstream = eighths(*(target.shape if case.reduction == "none" else ())) + 0.5
    values = loss.values(case.form, target, case.classes, case.seed % 1000, F64 if case.dtype == F64 else torch.float32)

    def run(dtype: torch.dtype, linear: bool) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        own = {k: v.to(F64) if isinstance(v, Tensor) and not linear else v for k, v in values.items()}
        own = table.leaves(own)
        leaves = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
        leaves = {k: v.to(dtype).clone().requires_grad_(k != case.frozen) for k, v in leaves.items()}
        given = {
            k: v.float() if linear and isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in options.items()
        }
        logits = None
        if linear:
            bound = lambda f, y, **rest: loss(f, y, own, **given, **rest)  # noqa: E731
            value = mlkernels.linear_softmax_loss(
                leaves["x"], leaves["weight"], target, linear_bias=leaves.get("bias"), normalize=case.normalize,
                loss=bound, strategy=case.strategy, memory=case.memory,
            )  # fmt: skip
        else:
            a, b = leaves["x"], leaves["weight"]
            logits = F.linear(F.normalize(a), F.normalize(b)) if case.normalize else F.linear(a, b, leaves.get("bias"))
            logits.retain_grad()
            value = loss(logits, target, own, backend="reference", **given)
        value.backward(upstream.to(value.dtype))
        found = {k: v.grad.double() for k, v in (leaves | own).items() if isinstance(v, Tensor) and v.grad is not None}
        return value.detach().double(), found, logits.grad if logits is not None else None

    torch.set_num_threads(case.threads)
    value, found, _ = run(case.dtype, True)
    right, exact, by_logits = run(F64, False)
    assert by_logits is not None
    eps = 2e-15 if case.dtype == F64 else 1.2e-7  # both sides are in double then, and the reference rounds as much
    largest = by_logits.abs().amax().nan_to_num(0, 0, 0)
    slack = by_logits.abs() + largest * 1e-4  # of each element of dL/dlogits, in roundings
    half = torch.finfo(case.dtype).eps if case.dtype == torch.bfloat16 else 0.0
    # A tile of bfloat16 gradients is rounded, up or down by place; what that loses meets the mean of the other operand.
    eps_products = ROUNDINGS * eps + half
    longest = 4.0 if case.normalize else 1.0  # cosines' derivatives
    by_row, by_class = slack.sum(1, keepdim=True), slack.sum(0)[:, None]
    bounds = {
        "x": longest * (eps_products * (slack @ weight.abs() + by_row * 1e-3) + half * by_row * mean_of(weight)),
        "weight": longest
        * (eps_products * (slack.T @ x.abs() + by_class * 1e-3) + half * by_class * mean_of(x[target >= 0])),
        "bias": eps_products * slack.sum(0),
    }
    checks = [
        Check(
            "loss", value, right, ROUNDINGS * eps * (right.abs() + right.abs().nan_to_num(0, 0, 0).amax() * 1e-2 + 1e-2)
        )
    ]
    for name, gradient in exact.items():
        allowed = bounds.get(name)
        if allowed is None:
            scale = (
                right.abs().nan_to_num(0, 0, 0).sum() + gradient.abs().nan_to_num(0, 0, 0).amax() + largest * case.rows
            )
            allowed = 8 * ROUNDINGS * eps * scale + torch.zeros_like(gradient)
        got = found[name].reshape(gradient.shape)
        checks.append(Check(name, got, gradient, allowed + half * gradient.abs() + 1e-30))
    missing = exact.keys() ^ found.keys()
    assert not missing, f"gradients of one side only: {sorted(missing)}"
    return checks, case.rows


def wrong(case: Case) -> str | None:
    """What is wrong with the linear head's numbers, if anything is."""
    try:
        checks, _ = called(case)
    except Exception as error:
        if "is too small for one row" in str(error):  # what was drawn for memory=
            return None
        return f"{type(error).__name__}: {error}"
    for name, got, right, allowed in checks:
        bad = ~((got - right).abs() <= allowed) & ~(got.isnan() & right.isnan())
        if bool(bad.any()):
            i = int(((got - right).abs() / allowed).nan_to_num(1e30).where(bad, torch.tensor(-1.0, dtype=F64)).argmax())
            return (
                f"{name}: {int(bad.sum())} of {bad.numel()}; at {i} got {got.flatten()[i]:.9g}, wanted "
                f"{right.flatten()[i]:.9g}, allowed {allowed.flatten()[i]:.3g}"
            )
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="fuzz_linear", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--calls", type=float, default=float("inf"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first call; the next ones follow")
    parser.add_argument("--case", type=int, help="this seed alone")
    arguments = parser.parse_args()
    if arguments.case is not None:
        case = drawn(arguments.case)
        print(case, wrong(case), sep="\n")
        return 0
    cases = map(drawn, itertools.count(arguments.seed))
    return fuzz.ran("linear heads", cases, wrong, arguments.minutes, most_calls=arguments.calls)


if __name__ == "__main__":
    sys.exit(main())
