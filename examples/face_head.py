"""Train embeddings of synthetic identities, with a stored gradient of the classifier and with the update in the tile.

    python examples/face_head.py
    python examples/face_head.py --classes 1000000 --ways tile --steps 500 --threads 2
    python examples/face_head.py --classes 1000000 --ways sample bfloat16 --sample 50000

An identity is a direction in 32 dimensions, a sample of it is drawn from the von Mises-Fisher distribution around it
and seen through a fixed nonlinearity; labels are long-tailed (Zipf). A small network embeds the samples, and ArcFace
trains it over all classes; the classifier's weight steps in each of these ways from one start, on the same batches:

    stored      a gradient of the weight's size, and torch.optim.SGD
    tile        TileSGD: within the backward, a tile at a time; the gradient never exists
    bfloat16    the same with a weight in bfloat16, rounded stochastically
    sample      the same over some classes only, drawn anew for each batch

Printed are classes, bytes that a class takes (weight, gradient, momentum), a step's time and loss, and the accuracy of
verification on identities that training has not seen: whether two samples are of one identity, by the angle between
their embeddings at the best threshold.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlkernels

WIDTH = 32


class Result(NamedTuple):
    """Of one way: bytes per class, milliseconds per step, verification accuracy before and after."""

    bytes: float
    milliseconds: float
    before: float
    after: float


def von_mises_fisher(means: Tensor, concentration: float, generator: torch.Generator) -> Tensor:
    """One direction around each mean (N, d), by Wood's rejection (1994)."""
    dimension = means.shape[1] - 1
    b = dimension / (2 * concentration + (4 * concentration**2 + dimension**2) ** 0.5)
    x0 = (1 - b) / (1 + b)
    c = concentration * x0 + dimension * torch.log(torch.tensor(1 - x0**2))
    cosine = torch.full((len(means),), torch.nan)
    while (left := cosine.isnan()).any():
        # A Beta((d - 1)/2, (d - 1)/2) number, from the first coordinate of a direction in d dimensions.
        z = (F.normalize(torch.randn(len(means), dimension + 1, generator=generator), dim=1)[:, 0] + 1) / 2
        w = (1 - (1 + b) * z) / (1 - (1 - b) * z)
        accepted = concentration * w + dimension * torch.log(1 - x0 * w) - c >= torch.log(
            torch.rand(len(means), generator=generator)
        )
        cosine = torch.where(left & accepted, w, cosine)
    tangent = torch.randn(means.shape, generator=generator)
    tangent = F.normalize(tangent - (tangent * means).sum(1, keepdim=True) * means, dim=1)
    return cosine[:, None] * means + (1 - cosine**2).clamp(min=0).sqrt()[:, None] * tangent


def samples(means: Tensor, concentration: float, generator: torch.Generator) -> Tensor:
    """What the network sees of one of each: through a nonlinearity, on axes of unlike length, which it has to undo."""
    axes = torch.logspace(-1, 1, WIDTH)
    return axes * torch.sinh(4 * von_mises_fisher(means, concentration, generator))


def directions(count: int, generator: torch.Generator) -> Tensor:
    """Of identities, uniform."""
    return F.normalize(torch.randn(count, WIDTH, generator=generator), dim=1)


def verification(model: nn.Module, concentration: float) -> float:
    """Accuracy over 2,000 pairs of unseen identities, half of them the same, at the best threshold."""
    generator = torch.Generator().manual_seed(12345)
    means = directions(2000, generator)
    with torch.no_grad():
        first, second = (F.normalize(model(samples(means, concentration, generator)), dim=1) for _ in range(2))
    same, other = (first * second).sum(1), (first * second.roll(1, 0)).sum(1)
    order = torch.cat([same, other]).argsort()
    is_same = (order < len(same)).long()
    right = (1 - is_same).cumsum(0) + is_same.sum() - is_same.cumsum(0)
    return right.max().item() / (2 * len(same))


def train(way: str, means: Tensor, options: argparse.Namespace) -> Result:
    """One way from the same start."""
    torch.manual_seed(options.seed)
    numbers = {"lr": options.lr, "momentum": 0.9, "weight_decay": 1e-4}
    model = nn.Sequential(nn.Linear(WIDTH, 256), nn.ReLU(), nn.Linear(256, options.features))
    half = way == "bfloat16"
    start = nn.Linear(options.features, options.classes, bias=False).weight.detach()  # bfloat16 would draw others
    classifier = mlkernels.LinearLoss(
        mlkernels.ArcFaceLoss(margin=0.3, scale=24.0), options.features, options.classes, normalize=True,
        weight=nn.Parameter(start.bfloat16() if half else start),
        tile_update=None if way == "stored" else mlkernels.TileSGD(**numbers, stochastic_rounding=half),
        sample=options.sample if way == "sample" else None,
    )  # fmt: skip
    stepped = [*model.parameters(), *(classifier.parameters() if way == "stored" else [])]
    optimizer = torch.optim.SGD(stepped, **numbers)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(each, options.lr, total_steps=options.steps + 1, cycle_momentum=False)
        for each in (optimizer, classifier.tile_update)
        if each is not None
    ]
    frequency = 1 / torch.arange(1, options.classes + 1, dtype=torch.float64)
    cumulated = frequency.cumsum(0) / frequency.sum()
    generator = torch.Generator().manual_seed(options.seed + 1)
    before, start = verification(model, options.concentration), time.perf_counter()
    for step in range(1, options.steps + 1):
        label = torch.searchsorted(cumulated, torch.rand(options.batch, generator=generator, dtype=torch.float64))
        label = label.clamp(max=options.classes - 1)
        features = model(samples(means[label], options.concentration, generator))
        loss = classifier(features.bfloat16() if half else features, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        if step % max(1, options.steps // 3) == 0:
            print(f"  {way} step {step:5d}: loss {loss.item():.3f}")
    took = (time.perf_counter() - start) / options.steps
    weight = classifier.weight
    held = [weight, weight.grad, *optimizer.state.get(weight, {}).values(), *classifier.buffers()]
    total = sum(t.nbytes for t in held if isinstance(t, Tensor) and len(t) == options.classes)
    return Result(total / options.classes, 1e3 * took, before, verification(model, options.concentration))


def main(arguments: Sequence[str] | None = None) -> dict[str, Result]:
    """The command line; what each way has come to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = ["stored", "tile", "bfloat16", "sample"]
    parser.add_argument("--ways", nargs="+", default=ways, choices=ways)
    parser.add_argument("--classes", type=int, default=4000)
    parser.add_argument("--features", type=int, default=64, help="of an embedding")
    parser.add_argument("--sample", type=int, default=500, help="classes that a step sees")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--concentration", type=float, default=100.0, help="of an identity's samples")
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    means = directions(options.classes, torch.Generator().manual_seed(options.seed))
    found = {way: train(way, means, options) for way in options.ways}
    print(f"{options.classes} classes, D = {options.features}\n{'':10} bytes/class  ms/step  verification")
    for way, (size, took, before, after) in found.items():
        print(f"{way:10} {size:11.0f} {took:8.1f}  {before:.3f} -> {after:.3f}")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
