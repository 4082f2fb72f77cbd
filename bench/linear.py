"""Classifiers and losses in one: who takes part, and what the same machine takes for the three products alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import mlkernels

from .cases import Inputs
from .peers import ANGLE, SCALE, Candidate, Function, installed, losses

#: Of the family, the linear head that everybody has and one that none has: a margin on cosines.
LOSSES = ["cross_entropy", "arcface"]
#: By name: what the package picks, and the one that keeps no logits from statistics to gradient.
STRATEGIES: dict[str, str | None] = {"linear": None, "tiles": "tiles"}
CHUNKS = {"chunked64": 64, "chunked256": 256}  # rows, of torch's own; its automatic choice was slower on a CPU


def ours(strategy: str | None) -> dict[str, Function]:
    """The package's linear heads."""
    arcface = mlkernels.ArcFaceLoss(margin=ANGLE, scale=SCALE)
    margin = functools.partial(mlkernels.linear_softmax_loss, loss=arcface, normalize=True, strategy=strategy)
    return {
        "cross_entropy": functools.partial(mlkernels.linear_cross_entropy, strategy=strategy),
        "arcface": margin,
    }


def whole(name: str, device: torch.device) -> dict[str, Function]:
    """The logits as a whole, then a loss: the reference's, and a careful user's."""
    loss = losses(device)[name]

    def logits(features: Tensor, weight: Tensor) -> Tensor:
        if loss.cosines:
            features, weight = F.normalize(features, dim=1, eps=0.0), F.normalize(weight, dim=1, eps=0.0)
        return features @ weight.T

    def reference(features: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
        return loss.ours(logits(features, weight), target, reduction=reduction, backend="reference")

    def eager(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return loss.eager(logits(features, weight), target)

    return {"reference": reference, "eager": eager}


def chunked(rows: int) -> Function | None:
    """torch's own in chunks of rows, where it has that; its default is the unfused chain."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows))


#: By name, and for whom: a function of the loss's name and the device, None where it is not there.
PEERS: dict[str, Callable[[str, torch.device], Function | None]] = {
    "eager": lambda name, device: whole(name, device)["eager"],
    "compile": lambda name, device: torch.compile(whole(name, device)["eager"], fullgraph=True, dynamic=False),
    **{by: lambda name, device, rows=rows: of_cross_entropy(chunked(rows), name) for by, rows in CHUNKS.items()},
    "liger": lambda name, device: on_gpu(
        name, device, "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"
    ),
    "cce": lambda name, device: on_gpu(name, device, "cut_cross_entropy", "linear_cross_entropy", impl="cce_exact"),
}


def of_cross_entropy(peer: Function | None, name: str) -> Function | None:
    """A peer that knows no other loss."""
    return peer if name == "cross_entropy" else None


def on_gpu(name: str, device: torch.device, *where: str, **options: object) -> Function | None:
    """Such a peer's, that needs a GPU."""
    return of_cross_entropy(installed(*where, **options), name) if device.type == "cuda" else None


def candidates(device: torch.device, names: Sequence[str], peers: Sequence[str]) -> list[Candidate]:
    """Ours by strategy, then the peers that are there."""
    found = [Candidate(name, by, ours(strategy)[name]) for by, strategy in STRATEGIES.items() for name in names]
    others = [(name, by, PEERS[by](name, device)) for name in names for by in PEERS if by in peers]
    return [*found, *(Candidate(name, by, peer) for name, by, peer in others if peer is not None)]


def products(inputs: Inputs) -> object:
    """What no linear head that keeps its logits can be faster than: these, and from a gradient of theirs dX and dW."""
    features, weight = (leaf.detach() for leaf in inputs.leaves)
    logits = features @ weight.T
    return logits @ weight, logits.T @ features
