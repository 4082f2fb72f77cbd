"""``python -m bench.errors``: relative errors of confident rows, ours and the eager chain's (docs/numerics.md).

The truth is the reference backend in float64, which the tests hold against 50 digits. A row has ten classes: its
label's logit lies a gap above the others, which are equal. The eager chain gets half logits in float32, as autocast
has it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .options import names_of
from .peers import Function, evaluated, losses
from .report import markdown

CLASSES = 10
GAPS = [4.0, 8.0, 12.0, 16.0, 20.0]  # exact in every dtype
LOSSES = {"cross_entropy": "cross entropy", "focal": "focal, γ = 2", "modulated": "modulated, β = 4, γ = 5"}
DTYPES = ["float32", "float16"]


class Errors(NamedTuple):
    """Of the loss and of the gradient by the label's logit, relative."""

    loss: float
    gradient: float


def _run(loss: Function, logits: Tensor, upstream: float) -> tuple[float, float]:
    label = torch.zeros(1, dtype=torch.long)
    value, gradient = evaluated(loss, [logits.clone().requires_grad_()], label, upstream=upstream)
    return value.item(), gradient[0, 0].item() / upstream


def errors(name: str, dtype: torch.dtype, upstream: float = 1.0) -> Iterator[tuple[float, Errors, Errors]]:
    """Of each gap: 1 - p, our errors, the eager chain's."""
    loss = losses(torch.device("cpu"))[name]
    for gap in GAPS:
        logits = torch.zeros(1, CLASSES, dtype=dtype)
        logits[0, 0] = gap
        truth = _run(lambda x, y: loss.ours(x, y, backend="reference"), logits.double(), 1.0)
        found = [
            Errors(*(abs(value / wanted - 1) for value, wanted in zip(_run(one, logits, upstream), truth, strict=True)))
            for one in (loss.ours, lambda x, y: loss.eager(x.float(), y))
        ]
        rest = torch.softmax(logits.double(), 1)[0, 1:].sum().item()
        yield rest, found[0], found[1]


def _text(error: float) -> str:
    return "all" if error == 1 else _power(error)


def _power(value: float) -> str:
    """With a minus that no line breaks at."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}".replace("-", "−")


def table(dtype: str, upstream: float) -> str:
    """Markdown."""
    lines = []
    for name, title in LOSSES.items():
        for k, (rest, ours, eager) in enumerate(errors(name, getattr(torch, dtype), upstream)):
            found = (ours.loss, eager.loss, ours.gradient, eager.gradient)
            lines.append([title if k == 0 else "", _power(rest), *map(_text, found)])
    titles = ["loss", "1 − p", "loss: ours", "eager", "gradient: ours", "eager"]
    return "\n".join(markdown(titles, lines))


def main() -> None:
    """The tables of the dtypes that are named; of all without."""
    for dtype in names_of(DTYPES)(sys.argv[1]) if len(sys.argv) > 1 else DTYPES:
        upstream = 65536.0 if dtype == "float16" else 1.0
        print(f"{dtype}, upstream gradient {upstream:g}\n")
        print(table(dtype, upstream) + "\n")


if __name__ == "__main__":
    main()
