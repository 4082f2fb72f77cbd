"""Classes spread over ranks, on gloo: beside one process with as many threads, and other vocabulary-parallel losses.

python -m bench.ranks --ranks 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

import mlkernels
from mlkernels.distributed import ClassParallelLoss, class_parallel_softmax_loss, communication

#: torch 2.13 has a new name for it, and warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _MegatronCrossEntropy(torch.autograd.Function):
    """Three all-reduces: the maximum, the target's logit, the sum of exponentials (Shoeybi et al., 2019)."""

    @staticmethod
    def forward(ctx: object, logits: Tensor, target: Tensor, start: int) -> Tensor:
        top = logits.amax(1)
        dist.all_reduce(top, dist.ReduceOp.MAX)
        logits = logits - top.unsqueeze(1)
        label = target - start
        own = (label >= 0) & (label < logits.shape[1])
        label = torch.where(own, label, 0)
        found = torch.where(own, logits.gather(1, label.unsqueeze(1)).squeeze(1), 0)
        dist.all_reduce(found)
        exponentials = torch.exp(logits, out=logits)
        total = exponentials.sum(1)
        dist.all_reduce(total)
        ctx.save_for_backward(exponentials.div_(total.unsqueeze(1)), own, label)  # type: ignore[attr-defined]
        return total.log() - found

    @staticmethod
    def backward(ctx: object, upstream: Tensor) -> tuple[Tensor, None, None]:
        gradient, own, label = ctx.saved_tensors  # type: ignore[attr-defined]
        gradient[torch.arange(len(label)), label] -= own.to(gradient.dtype)
        return gradient.mul_(upstream.unsqueeze(1)), None, None


def in_turns(candidates: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Seconds of each, on the slowest rank."""
    took: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(turns + 1):
        for name, step in candidates.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            seconds = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if turn:
                took[name].append(float(seconds))
    return took


def linear(options: argparse.Namespace) -> None:
    """Each rank has its rows and its classes; rank 0 alone has all rows and classes, and as many threads as ranks."""
    rank, ranks, rows = dist.get_rank(), dist.get_world_size(), options.rows // dist.get_world_size()
    torch.manual_seed(0)
    x, target = torch.randn(options.rows, options.width), torch.randint(options.classes, (options.rows,))
    loss = mlkernels.ArcFaceLoss()
    spread = ClassParallelLoss(loss, options.width, options.classes, normalize=True)
    dense = mlkernels.LinearLoss(loss, options.width, options.classes, normalize=True) if rank == 0 else None
    own = x[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    every = x.clone().requires_grad_()

    def parallel() -> None:
        own.grad = spread.weight.grad = None
        spread(own, target[rank * rows : (rank + 1) * rows]).backward()

    def alone() -> None:
        if dense is not None:
            torch.set_num_threads(ranks)
            every.grad = dense.weight.grad = None
            dense(every, target).backward()
            torch.set_num_threads(1)

    parts = torch.empty(ranks, rows * options.width)

    def collectives() -> None:
        _all_gather(parts.view(-1), own.detach().reshape(-1))
        _all_gather(torch.empty(ranks * options.rows * 3), torch.empty(options.rows * 3))
        dist.all_to_all_single(torch.empty_like(parts), parts)

    spread.communication()
    parallel()
    sent = spread.communication()
    took = in_turns({"parallel": parallel, "alone": alone, "collectives": collectives}, options.turns)
    if rank == 0:
        least = {name: 1e3 * min(each) for name, each in took.items()}
        middle = {name: 1e3 * statistics.median(each) for name, each in took.items()}
        ratios = sorted(a / b for a, b in zip(took["parallel"], took["alone"], strict=True))
        print(f"linear head {options.rows} x {options.width} x {options.classes}, ArcFace, {ranks} ranks of one thread")
        for name in took:
            print(f"  {name:12} least {least[name]:8.1f} ms, median {middle[name]:8.1f} ms")
        print(f"  parallel / alone ({ranks} threads): of the least {least['parallel'] / least['alone']:.2f}, "
              f"median {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}")  # fmt: skip
        print(
            f"  a rank sends {sum(sent.bytes.values()) / 2**20:.2f} MiB in {sum(sent.collectives.values())} collectives"
        )


def vocabulary(options: argparse.Namespace) -> None:
    """Logits that are split already."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    target = torch.randint(options.vocabulary, (options.tokens,))
    width = options.vocabulary // ranks
    logits = torch.randn(options.tokens, width)
    part = logits.clone().requires_grad_()
    split = DTensor.from_local(logits.clone(), init_device_mesh("cpu", (ranks,)), [Shard(1)]).requires_grad_()

    def ours() -> Tensor:
        part.grad = None
        loss = class_parallel_softmax_loss(part, target, num_classes=options.vocabulary)
        loss.backward()
        return loss

    def theirs() -> Tensor:
        split.grad = None
        with loss_parallel():
            loss = F.cross_entropy(split, target)
            loss.backward()
        return loss.full_tensor()

    def megatron() -> Tensor:
        part.grad = None
        loss = _MegatronCrossEntropy.apply(part, target, rank * width).mean()
        loss.backward()
        return loss

    communication()
    found = ours()
    sent = communication()
    for other in (theirs, megatron):
        torch.testing.assert_close(found, other())
    took = in_turns({"ours": ours, "loss_parallel": theirs, "Megatron's formula": megatron}, options.turns)
    if rank == 0:
        print(f"logits {options.tokens} x {options.vocabulary}, cross entropy, forward and backward, {ranks} ranks")
        for name, each in took.items():
            print(f"  {name:18} least {1e3 * min(each):8.1f} ms, median {1e3 * statistics.median(each):8.1f} ms")
        ring = 3 * 2 * 4 * options.tokens * (ranks - 1) // ranks
        print(f"  a rank sends {sum(sent.bytes.values())} bytes in {sum(sent.collectives.values())} collectives; three "
              f"all-reduces of a number per row {ring} by a ring")  # fmt: skip


def _rank(rank: int, port: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.ranks)
    try:
        for suite in (linear, vocabulary):
            suite(options)
    finally:
        dist.destroy_process_group()


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=512, help="of all ranks")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--classes", type=int, default=200_000)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=64_000)
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args(arguments)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(_rank, args=(store.port, options), nprocs=options.ranks)


if __name__ == "__main__":
    main(sys.argv[1:])
