"""The linear heads' part of the smoke test: every way to cut the work, a few losses, each dtype, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mlkernels
from mlkernels.linear.plan import STRATEGIES

from .peers import wrong

#: Several chunks of rows and tiles of classes, neither a multiple of anything.
ROWS, WIDTH, CLASSES, MEMORY = 150, 16, 3001, 600_000
#: Relative errors (of norms): bfloat16 rounds the gradient of a tile, then the result; float16 the result alone.
ERROR = {"float32": 1e-3, "bfloat16": 6e-3, "float16": 2e-3}
#: Of losses and statistics, which are float32's.
LOSS_ERROR = 1e-4
#: The kernels that serve a linear head, by the names that the smoke test has.
SERVED = {name: name for name in ("triton", "cpu", "reference")}
#: What :func:`mlkernels.softmax_loss` takes; two of these want row statistics, whose gradients are looked at too.
LOSSES: dict[str, dict[str, Any]] = {
    "cross_entropy": {"reduction": "sum"},
    "arcface": {"reduction": "sum", "transform": mlkernels.Margin(m2=0.5), "scale": 16.0},
    "two_scale": {
        "reduction": "none", "scale": mlkernels.TwoScale(1.0, 2.0), "label_smoothing": 0.1, "z_loss": 0.01,
        "softcap": 8.0, "return_stats": True,
    },
}  # fmt: skip
#: By name: loss, strategy and dtype.
STEPS = {"-".join(each): each for each in itertools.product(LOSSES, STRATEGIES, ERROR)}


def inputs(dtype: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Features, weight and labels; some rows are ignored, and hold what must not be read."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, WIDTH, generator=generator) / WIDTH**0.25 for n in (ROWS, CLASSES))
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    target[::7], x[::7] = -100, torch.nan
    x, weight = (t.to(device, getattr(torch, dtype)).requires_grad_() for t in (x, weight))
    return x, weight, target.to(device)


def results(value: Any, leaves: list[Tensor]) -> list[Tensor]:
    """Loss and statistics, and their gradients; no upstream gradient is 1."""
    outputs = [value] if isinstance(value, Tensor) else [value[0], *value[1][:3]]
    ups = [torch.linspace(0.3, 1.7, max(o.numel(), 1)).to(o).reshape(o.shape) for o in outputs]
    gradients = torch.autograd.grad(outputs, leaves, ups)
    return [*(o.detach() for o in outputs), *gradients]


def wanted(name: str, x: Tensor, weight: Tensor, target: Tensor) -> list[Tensor]:
    """By the whole logits, in float64."""
    options = LOSSES[STEPS[name][0]]
    a, w = (t.detach().cpu().double().requires_grad_() for t in (x, weight))
    rows, target = torch.where(a.isnan(), 0.5, a), target.cpu()
    logits = F.normalize(rows) @ F.normalize(w).T if "transform" in options else rows @ w.T
    return results(mlkernels.softmax_loss(logits, target, backend="reference", **options), [a, w])


def check(by: str, name: str, device: torch.device) -> str | None:
    """What is wrong with a step's results, if something is."""
    loss, strategy, dtype = STEPS[name]
    x, weight, target = inputs(dtype, device)
    value = mlkernels.linear_softmax_loss(
        x, weight, target, normalize="transform" in LOSSES[loss], strategy=strategy, memory=MEMORY,
        backend=SERVED[by], **LOSSES[loss],
    )  # fmt: skip
    found = results(value, [x, weight])
    outputs = len(found) - 2
    what, bounds = ["loss"] * outputs + ["gradient"] * 2, [LOSS_ERROR] * outputs + [ERROR[dtype]] * 2
    return wrong(what, found, wanted(name, x, weight, target), bounds)
