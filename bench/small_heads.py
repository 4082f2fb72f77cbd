"""Small heads beside the chain written out: what a call costs beside its products. A part of ``bench.limits``."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mlkernels

from .cases import Problem, make_inputs
from .measure import Step
from .peers import ANGLE, SCALE

#: Rows, features, classes.
SHAPES = ((128, 64, 1000), (64, 32, 100), (32, 16, 10), (16, 16, 10))
TEMPERATURE, LOW, HIGH, CONFIDENT = 0.7, 1.0, 3.0, 0.5


def _focal(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    nll = F.cross_entropy(input, target, reduction="none")
    rows = (1 - torch.exp(-nll)) ** 2 * nll
    return rows if reduction == "none" else rows.mean()


def _two_scale(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    with torch.no_grad():
        index = target[:, None]
        runner_up = input.scatter(1, index, -torch.inf).amax(1, keepdim=True)
        scale = torch.where(input.gather(1, index) - runner_up < 0.1, LOW, HIGH)
    return F.cross_entropy(input * scale, target, reduction=reduction)


def _arcface(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    index = target[:, None]
    turned = torch.cos(torch.acos(input.gather(1, index).clamp(-1 + 1e-7, 1 - 1e-7)) + ANGLE)
    return F.cross_entropy(SCALE * input.scatter(1, index, turned), target, reduction=reduction)


class Kind(NamedTuple):
    """A loss of the family as a module, made with its reduction, and written out."""

    of: Callable[..., Callable[..., Tensor]]
    eager: Callable[[Tensor, Tensor, str], Tensor]
    cosines: bool = False


KINDS = {
    "cross entropy": Kind(mlkernels.CrossEntropyLoss, lambda f, y, r: F.cross_entropy(f, y, reduction=r)),
    "focal": Kind(functools.partial(mlkernels.FocalLoss, gamma=2.0), _focal),
    "two scales": Kind(
        lambda **common: functools.partial(
            mlkernels.two_scale_cross_entropy, scale_low=LOW, scale_high=HIGH, eta=0.1, **common
        ),
        _two_scale,
    ),
    "ArcFace on cosines": Kind(
        functools.partial(mlkernels.ArcFaceLoss, margin=ANGLE, scale=SCALE), _arcface, cosines=True
    ),
}


class Pair(NamedTuple):
    """A step of ours and the same written out; each returns what it has computed."""

    ours: Callable[[], object]
    eager: Callable[[], object]


def pairs(shape: tuple[int, int, int]) -> dict[str, Pair]:
    """By name; each step is a loss and its ``backward()``."""
    rows, features, classes = shape
    inputs = make_inputs(Problem((rows, classes), "float32", features), False, torch.device("cpu"))
    (x, weight), target, upstream = inputs.leaves, inputs.target, inputs.upstream
    bias = torch.linspace(-1, 1, classes).requires_grad_()
    ignored = target.clone()
    ignored[0] = -100
    found: dict[str, Pair] = {}

    def add(name: str, ours: Callable[[], Tensor], eager: Callable[[], Tensor], *leaves: Tensor) -> None:
        def step(value_of: Callable[[], Tensor]) -> Tensor:
            for leaf in (x, *leaves):
                leaf.grad = None
            value = value_of()
            value.backward(upstream if value.dim() else None)
            return value

        found[name] = Pair(functools.partial(step, ours), functools.partial(step, eager))

    def logits(kind: Kind, bias: Tensor | None) -> Tensor:
        if kind.cosines:
            return F.normalize(x, dim=1, eps=0.0) @ F.normalize(weight, dim=1, eps=0.0).T
        return F.linear(x, weight, bias)

    for name, kind in KINDS.items():
        for reduction in ("mean", "none"):
            for own in (None,) if kind.cosines else (None, bias):
                loss = kind.of(reduction=reduction)
                add(
                    name + ', "none"' * (reduction == "none") + ", bias" * (own is not None),
                    functools.partial(
                        mlkernels.linear_softmax_loss, x, weight, target, loss=loss, linear_bias=own,
                        normalize=kind.cosines,
                    ),
                    lambda kind=kind, own=own, reduction=reduction: kind.eager(logits(kind, own), target, reduction),
                    weight, bias,
                )  # fmt: skip
    add(
        "cross entropy, an ignored row",
        lambda: mlkernels.linear_cross_entropy(x, weight, ignored),
        lambda: F.cross_entropy(F.linear(x, weight), ignored), weight,
    )  # fmt: skip
    layer = torch.nn.Linear(features, classes)
    head, module = mlkernels.LinearLoss.from_linear(mlkernels.CrossEntropyLoss(), layer), torch.nn.CrossEntropyLoss()
    add(
        "cross entropy, modules, bias",
        lambda: head(x, target), lambda: module(layer(x), target), layer.weight, layer.bias,
    )  # fmt: skip

    def statistics() -> Tensor:
        _, stats = mlkernels.linear_softmax_loss(
            x, weight, target, scale=1 / TEMPERATURE, reduction="none", return_stats=True
        )
        return -upstream * stats.log_prob - 0.01 * stats.entropy

    def statistics_written_out() -> Tensor:
        log_probs = F.log_softmax(F.linear(x, weight) / TEMPERATURE, 1)
        entropy = -(log_probs.exp() * log_probs).sum(1)
        return -upstream * log_probs.gather(1, target[:, None]).squeeze(1) - 0.01 * entropy

    add("log-probability and entropy", statistics, statistics_written_out, weight)
    return found


def steps(shape: tuple[int, int, int]) -> dict[str, Step]:
    """The same one by one, once they are found to agree."""
    made: dict[str, Step] = {}
    for name, pair in pairs(shape).items():
        torch.testing.assert_close(pair.ours(), pair.eager(), rtol=1e-3, atol=1e-4, msg=name)
        made |= {name: _nothing_of(pair.ours), f"{name}: eager": _nothing_of(pair.eager)}
    return made


def _nothing_of(step: Callable[[], object]) -> Step:
    def run() -> None:
        step()

    return run


def ratios(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """By problem and step: ours over the chain written out, of each process."""
    found: dict[str, dict[str, list[float]]] = {}
    for problem in runs[0]:
        names = [name for name in runs[0][problem] if not name.endswith(": eager")]
        found[problem] = {n: [run[problem][n] / run[problem][f"{n}: eager"] for run in runs] for n in names}
    return found


def table(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """As docs/heads.md has it: of the chain written out, the median of the processes."""
    found = ratios(runs)
    lines = [f"| N, D, C | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    for name in next(iter(found.values())):
        cells = (f"{statistics.median(each[name]):.2f}".removeprefix("0") for each in found.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
