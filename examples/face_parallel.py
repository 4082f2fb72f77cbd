"""Train embeddings of synthetic identities with a classifier whose classes are spread over ranks.

    python examples/face_parallel.py                                  # two processes of its own, on the CPU
    torchrun --nproc-per-node 4 examples/face_parallel.py --classes 20000
    torchrun --nproc-per-node 8 examples/face_parallel.py --backend nccl --classes 1000000    # a GPU each

An identity is a direction in 32 dimensions, a sample of it that direction and noise; labels are long-tailed (Zipf). A
small network under DDP embeds the samples; ArcFace trains it over all classes, each rank having some. Scored by
verification on identities that training has not seen: whether two samples are of one identity, by the angle between
their embeddings at the best threshold. Prints loss, accuracy, time per step and what a rank sends.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mlkernels
from mlkernels.distributed import ClassParallelLoss, clip_grad_norm_

WIDTH = 32


def samples(identities: Tensor, spread: float, generator: torch.Generator) -> Tensor:
    """One of each identity: its direction, and noise through a fixed nonlinearity that the network has to undo."""
    noise = torch.randn(identities.shape, generator=generator)
    return torch.sinh(2 * F.normalize(identities + spread * noise / WIDTH**0.5, dim=1))


def verification(model: nn.Module, spread: float) -> float:
    """Accuracy over 2,000 pairs of unseen identities, half of them the same, at the best threshold."""
    generator = torch.Generator().manual_seed(12345)
    identities = F.normalize(torch.randn(2000, WIDTH, generator=generator), dim=1)
    with torch.no_grad():
        device = next(model.parameters()).device
        first, second = (F.normalize(model(samples(identities, spread, generator).to(device)), dim=1) for _ in range(2))
        same, other = (first * second).sum(1), (first * second.roll(1, 0)).sum(1)
    cosines, order = torch.cat([same, other]).sort()
    is_same = (order < len(same)).long()
    right = (1 - is_same).cumsum(0) + is_same.sum() - is_same.cumsum(0)
    return right.max().item() / len(cosines)


def train(options: argparse.Namespace) -> tuple[float, float]:
    """This rank's part; the accuracy before and after."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if options.backend == "nccl" else "cpu"
    if options.backend == "nccl":
        torch.cuda.set_device(device)
    torch.manual_seed(options.seed)
    identities = F.normalize(torch.randn(options.classes, WIDTH), dim=1)
    model = nn.Sequential(nn.Linear(WIDTH, 256), nn.ReLU(), nn.Linear(256, options.features)).to(device)
    backbone = DistributedDataParallel(model)
    classifier = ClassParallelLoss(
        mlkernels.ArcFaceLoss(margin=0.3, scale=24.0), options.features, options.classes, normalize=True, device=device
    )
    parameters = [*backbone.parameters(), *classifier.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=options.lr, momentum=0.9, weight_decay=1e-4)
    frequency = 1 / torch.arange(1, options.classes + 1, dtype=torch.float64) ** 0.5
    generator = torch.Generator().manual_seed(options.seed + 1 + rank)  # each rank has its own samples
    before = verification(model, options.spread)
    classifier.communication()
    start = time.perf_counter()
    for step in range(1, options.steps + 1):
        label = torch.multinomial(frequency, options.batch, replacement=True, generator=generator)
        loss = classifier(backbone(samples(identities[label], options.spread, generator).to(device)), label.to(device))
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        if rank == 0 and step % max(1, options.steps // 5) == 0:
            print(f"step {step:5d}: loss {loss.item():.3f}")
    took = (time.perf_counter() - start) / options.steps
    after = verification(model, options.spread)
    if rank == 0:
        sent = sum(classifier.communication().bytes.values()) / options.steps
        own = classifier.last_class - classifier.first_class
        print(f"{ranks} ranks, {options.classes} classes, {own} of them on rank 0")
        print(f"verification {before:.3f} -> {after:.3f}")
        print(f"{1e3 * took:.1f} ms a step, a rank sends {sent / 1024:.0f} KiB")
    return before, after


def run(rank: int, ranks: int, port: int, options: argparse.Namespace) -> None:
    """A process that this script has started."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group(options.backend, timeout=timedelta(minutes=5))
    try:
        before, after = train(options)
        assert after > before, "it has learned nothing"
    finally:
        dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=5000)
    parser.add_argument("--features", type=int, default=64, help="of an embedding")
    parser.add_argument("--batch", type=int, default=128, help="of a rank")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--spread", type=float, default=1.1, help="noise of a sample beside its identity's 1")
    parser.add_argument("--lr", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="gloo", choices=["gloo", "nccl"])
    parser.add_argument("--ranks", type=int, default=2, help="processes to start, where torchrun has started none")
    options = parser.parse_args(arguments)
    if "RANK" in os.environ:
        dist.init_process_group(options.backend)
        train(options)
        dist.destroy_process_group()
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run, args=(options.ranks, port, options), nprocs=options.ranks)


if __name__ == "__main__":
    main(sys.argv[1:])
