"""``python -m bench.linear_errors [backend [rows]]``: relative errors of linear heads in bfloat16 (docs/heads.md).

Beside them those of the chain on logits in float32, of the same features and weight, and of the chain in bfloat16. The
truth is the chain in float64. All gradients are rounded to bfloat16 in the end, which by itself is 1.7e-3. No error of
dX is shown where dX is 0. Triton's kernels, interpreted, take minutes: ``TRITON_INTERPRET=1 python -m
bench.linear_errors triton 256``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import mlkernels

from .peers import Function, apart, evaluated
from .report import markdown

ROWS, CLASSES, WIDTH = 1024, 120, 64


class Problem(NamedTuple):
    """Features, weight and labels; their values are bfloat16's."""

    x: Tensor
    weight: Tensor
    label: Tensor


def _contexts(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eight different rows, with labels as often as the classifier has them: dW is what whole numbers leave."""
    x, w = x[:8].repeat(ROWS // 8, 1), 0.2 * w
    share = (torch.arange(ROWS) // 8 + 0.5) * 8 / ROWS
    label = torch.searchsorted((x @ w.T).softmax(1).cumsum(1), share[:, None]).squeeze(1)
    return x, w, label.clamp_max(CLASSES - 1)


#: Features, weight and labels, made of random ones.
KINDS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "random": lambda x, w, y: (x, w / 8, y),
    "peaked": lambda x, w, y: (x, w, y),
    "half of the rows confident": lambda x, w, y: (
        torch.where(torch.arange(ROWS)[:, None] % 2 == 0, w[y] + 0.3 * x, x), w / 2, y
    ),
    # A weight of zeros, and what a ReLU leaves.
    "a fresh classifier": lambda x, w, y: (x.relu(), 0 * w, y),
    # All but 1 % of the weight is the same for every class: dX is a small rest of large terms.
    "classes alike but for 1 %": lambda x, w, y: (x.relu(), w[:1] + 0.01 * w, y),
    # The same of features, with as many labels of each class.
    "features alike but for 1 %": lambda x, w, y: (x[:1] + 0.01 * x, w / 100, torch.arange(ROWS) % CLASSES),
    "labels of three classes": lambda x, w, y: (x.relu(), w / 8, y % 3),
    "rows all the same": lambda x, w, y: (x[:1].expand(ROWS, WIDTH), w / 8, y),
    "rows of eight kinds": _contexts,
}  # fmt: skip


def problem(kind: str, device: torch.device | None = None, rows: int = ROWS) -> Problem:
    """One of KINDS, or its first rows."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, WIDTH, generator=generator) for n in (ROWS, CLASSES))
    x, w, y = KINDS[kind](x, w, torch.randint(CLASSES, (ROWS,), generator=generator))
    x, y = x[:rows], y[:rows]
    return Problem(x.to(device, torch.bfloat16), w.to(device, torch.bfloat16), y.to(device))


class Errors(NamedTuple):
    """Relative ones, by norms; that of dX is NaN where it is 0."""

    loss: float
    x: float
    weight: float


def chain(x: Tensor, weight: Tensor, label: Tensor) -> Tensor:
    """Cross entropy, written out."""
    return cross_entropy(x @ weight.T, label)


def errors(loss: Function, of: Problem) -> Errors:
    """Of a loss of a problem's features, weight and labels."""
    x, weight = (tensor.detach().requires_grad_() for tensor in (of.x, of.weight))
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    found, wanted = evaluated(loss, [x, weight], of.label), evaluated(chain, exact, of.label)
    return Errors(*map(apart, found, wanted))


def table(backend: str | None, device: torch.device, rows: int = ROWS) -> str:
    """Markdown."""
    losses: list[Function] = [
        lambda x, weight, y: mlkernels.linear_softmax_loss(x, weight, y, backend=backend),
        lambda x, weight, y: chain(x.float(), weight.float(), y),
        chain,
    ]
    rows_of = []
    for kind in KINDS:
        of = problem(kind, device, rows)
        each = [errors(loss, of) for loss in losses]
        cells = [f"{value:.0e}" for value in (e.loss for e in each)]
        cells += [f"{1e3 * value:.2f}e-3" for value in (*(e.x for e in each), *(e.weight for e in each))]
        rows_of.append([kind, *("" if "nan" in cell else cell for cell in cells)])
    titles = ["", *(title for what in ("loss", "dX", "dW") for title in (f"{what}: linear", "float32", "bfloat16"))]
    return "\n".join(markdown(titles, rows_of))


def main() -> None:
    """The table of a backend that is named, or of the one that is chosen; of so many rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend, rows = (*sys.argv[1:], None, None)[:2]
    print(table(backend, device, ROWS if rows is None else int(rows)))


if __name__ == "__main__":
    main()
