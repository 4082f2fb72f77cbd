"""Small linear heads beside the chain written out: what a call costs beside its products. Part of ``bench.limits``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mlkernels

from .cases import Problem, make_inputs
from .measure import Step
from .peers import ANGLE, ETA, FOCAL_GAMMA, HIGH, LOW, SCALE, losses

#: Rows, features, classes.
SHAPES = ((128, 64, 1000), (64, 32, 100), (32, 16, 10), (16, 16, 10))
TEMPERATURE = 0.7


def _arcface(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """By the angle: of so few rows it takes fewer kernels than what peers.py has."""
    index = target[:, None]
    turned = torch.cos(torch.acos(input.gather(1, index).clamp(-1 + 1e-7, 1 - 1e-7)) + ANGLE)
    return F.cross_entropy(SCALE * input.scatter(1, index, turned), target, reduction=reduction)


class Kind(NamedTuple):
    """A loss of the family as a module, made with its reduction, and written out."""

    of: Callable[..., Callable[..., Tensor]]
    eager: Callable[..., Tensor]
    cosines: bool = False


EAGER = {name: loss.eager for name, loss in losses(torch.device("cpu")).items()}
KINDS = {
    "cross entropy": Kind(mlkernels.CrossEntropyLoss, F.cross_entropy),
    "focal": Kind(functools.partial(mlkernels.FocalLoss, gamma=FOCAL_GAMMA), EAGER["focal"]),
    "two scales": Kind(
        lambda **common: functools.partial(
            mlkernels.two_scale_cross_entropy, scale_low=LOW, scale_high=HIGH, eta=ETA, **common
        ),
        EAGER["two_scale"],
    ),
    "ArcFace on cosines": Kind(
        functools.partial(mlkernels.ArcFaceLoss, margin=ANGLE, scale=SCALE), _arcface, cosines=True
    ),
}


def steps(shape: tuple[int, int, int]) -> dict[str, Step]:
    """Loss and ``backward()``, of ours and of the same written out, which are first found to agree."""
    rows, features, classes = shape
    inputs = make_inputs(Problem((rows, classes), "float32", features), False, torch.device("cpu"))
    (x, weight), target, upstream = inputs.leaves, inputs.target, inputs.upstream
    bias = torch.linspace(-1, 1, classes).requires_grad_()
    ignored = target.clone()
    ignored[0] = -100
    found: dict[str, Step] = {}

    def add(name: str, ours: Callable[[], Tensor], eager: Callable[[], Tensor], *leaves: Tensor) -> None:
        def step(value_of: Callable[[], Tensor]) -> Tensor:
            for leaf in (x, *leaves):
                leaf.grad = None
            value = value_of()
            value.backward(upstream if value.dim() else None)
            return value

        own, other = functools.partial(step, ours), functools.partial(step, eager)
        torch.testing.assert_close(own(), other(), rtol=1e-3, atol=1e-4, msg=name)
        found.update({name: own, f"{name}: eager": other})

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
                    lambda kind=kind, own=own, r=reduction: kind.eager(logits(kind, own), target, reduction=r),
                    weight, bias,
                )  # fmt: skip
    add(
        "cross entropy, an ignored row",
        lambda: mlkernels.linear_cross_entropy(x, weight, ignored),
        lambda: F.cross_entropy(F.linear(x, weight), ignored), weight,
    )  # fmt: skip
    layer = torch.nn.Linear(features, classes)
    linear, module = mlkernels.LinearLoss.from_linear(mlkernels.CrossEntropyLoss(), layer), torch.nn.CrossEntropyLoss()
    add(
        "cross entropy, modules, bias",
        lambda: linear(x, target), lambda: module(layer(x), target), layer.weight, layer.bias,
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
