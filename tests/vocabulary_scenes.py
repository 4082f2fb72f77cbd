"""Scenes of test_class_parallel.py: logits of which each rank has a slice of the classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from table import BY_NAME, F64, LOSSES
from test_linear import OPTIONS, leaves_of
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.fx.experimental.proxy_tensor import make_fx

import mlkernels
from mlkernels.distributed import class_parallel_softmax_loss, communication

ROWS, CLASSES = 10, 23
WIDTHS = {2: (9, 14), 3: (11, 5, 7), 4: (6, 0, 10, 7)}  # classes of each rank


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, CLASSES, generator=generator, dtype=F64)
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    target[2], logits[2] = -100, float("nan")
    return logits, target


def own_classes(group: dist.ProcessGroup) -> slice:
    rank, widths = dist.get_rank(group), WIDTHS[dist.get_world_size(group)]
    return slice(sum(widths[:rank]), sum(widths[: rank + 1]))


def agrees(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def every_loss_on_slices(group: dist.ProcessGroup) -> None:
    """Values, and the slices of the dense gradients; parameters get the dense gradient, the same on every rank."""
    own = own_classes(group)
    for index, loss in enumerate(LOSSES):
        options = [*OPTIONS.values()][index % len(OPTIONS)]
        logits, target = problem(index)
        logits = logits.clamp(-1, 1) if loss.draws == "cosines" else logits
        params = leaves_of(loss, "number" if loss.structure.scale == "two_scale" else loss.forms[-1], target)
        mine = {name: param.detach().requires_grad_() for name, param in params.items()}
        extra = options | ({"group": loss.group(target)} if loss.groups else {})
        part = logits[:, own].clone().requires_grad_()
        found = class_parallel_softmax_loss(
            part, target, num_classes=CLASSES, process_group=group, offset=own.start if index % 2 else None,
            loss=lambda f, y, loss=loss, mine=mine, extra=extra: loss(f, y, mine, **extra),
        )  # fmt: skip
        leaf = logits.clone().requires_grad_()
        wanted = loss(leaf, target, params, backend="reference", **extra)
        agrees(found, wanted)
        upstream = torch.linspace(-2, 3, ROWS, dtype=F64) if found.dim() else torch.tensor(1.5, dtype=F64)
        found.backward(upstream)
        wanted.backward(upstream)
        agrees(part.grad, leaf.grad[:, own])
        for name, param in params.items():
            agrees(mine[name].grad, param.grad)


def statistics_of_slices(group: dist.ProcessGroup) -> None:
    """RowStats with their gradients, of (N, C, d) logits whose vocabulary is padded; half precision."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, CLASSES, 3, generator=generator, dtype=F64)
    target = torch.randint(CLASSES, (4, 3), generator=generator)
    target[1, 2] = -100
    width = 2 + -(-CLASSES // ranks)
    padded = torch.cat([logits, torch.full((4, width * ranks - CLASSES, 3), torch.nan, dtype=F64)], 1)
    part = padded[:, rank * width : (rank + 1) * width].clone().requires_grad_()
    for name in ("cross_entropy", "two_scale_norm"):
        part.grad = None
        params = leaves_of(BY_NAME[name], "number", target)
        arguments = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0, "return_stats": True,
                     **BY_NAME[name].compose(params)}  # fmt: skip
        value, rows = class_parallel_softmax_loss(part, target, num_classes=CLASSES, process_group=group, **arguments)
        leaf = logits.clone().requires_grad_()
        wanted, whole = mlkernels.softmax_loss(leaf, target, backend="reference", **arguments)
        agrees(value, wanted)
        for ours, theirs in zip(rows, whole, strict=True):
            agrees(ours, theirs)
        for loss, of in ((value, rows), (wanted, whole)):
            (2 * loss + of.entropy.sum() + (of.log_prob * of.logsumexp).sum()).backward()
        dense = F.pad(leaf.grad, (0, 0, 0, width * ranks - CLASSES))
        agrees(part.grad, dense[:, rank * width : (rank + 1) * width])
    for dtype in (torch.bfloat16, torch.float16):
        half = part.detach().to(dtype).requires_grad_()
        loss = class_parallel_softmax_loss(half, target, num_classes=CLASSES, process_group=group)
        loss.backward()
        leaf = logits.to(dtype).requires_grad_()
        wanted = mlkernels.cross_entropy(leaf, target)
        wanted.backward()
        assert loss.dtype == torch.float32 and half.grad.dtype == dtype
        torch.testing.assert_close(loss, wanted)
        dense = F.pad(leaf.grad, (0, 0, 0, width * ranks - CLASSES))
        torch.testing.assert_close(half.grad, dense[:, rank * width : (rank + 1) * width], rtol=1e-2, atol=1e-6)


def vocabulary_parallel_tensors(group: dist.ProcessGroup) -> None:
    """DTensor logits, Shard(1), as F.cross_entropy has them under loss_parallel, and what both send."""
    ranks, mesh = dist.get_world_size(group), DeviceMesh.from_group(group, "cpu")
    logits, target = problem()
    logits[2] = 0
    found, wanted = (distribute_tensor(logits, mesh, [Shard(1)]).requires_grad_() for _ in range(2))
    communication(group)
    for reduction in ("mean", "sum"):
        loss = mlkernels.cross_entropy(found, target, reduction=reduction)
        loss.backward()
        with loss_parallel():
            theirs = F.cross_entropy(wanted, target, reduction=reduction)
            theirs.backward()
        agrees(loss, theirs.full_tensor())
    sent = communication(group)
    assert sent.bytes == {"sizes": 2 * 32 * (ranks - 1), "statistics": 2 * 3 * 8 * 9 * (ranks - 1)}
    assert sent.collectives == {"sizes": 2, "statistics": 2}
    assert isinstance(found.grad, DTensor) and found.grad.placements == (Shard(1),)
    agrees(found.grad.full_tensor(), wanted.grad.full_tensor())
    if ranks == 4:
        grid = DeviceMesh("cpu", torch.arange(4).view(2, 2))
        both = distribute_tensor(logits, grid, [Replicate(), Shard(1)]).requires_grad_()
        mlkernels.cross_entropy(both, target, reduction="sum").backward()
        agrees(both.grad.full_tensor(), 0.9 * wanted.grad.full_tensor())  # that has the mean's too
    # Modules, target transforms, labels that are a DTensor too.
    labels = distribute_tensor(target, mesh, [Replicate()])
    arcface = mlkernels.ArcFaceLoss(scale=8.0, reduction="none")
    agrees(arcface(distribute_tensor(logits / 5, mesh, [Shard(1)]), labels), arcface(logits / 5, target))
    plain = mlkernels.cross_entropy(logits, target)
    if ranks == 2:  # left out of the graph
        agrees(torch.compile(mlkernels.cross_entropy, backend="eager")(found, target), plain)
        part = found.detach().to_local()
        compiled = torch.compile(class_parallel_softmax_loss, backend="eager")
        agrees(compiled(part, target, num_classes=CLASSES, process_group=group), plain)
    run = lambda f: class_parallel_softmax_loss(f, target, num_classes=CLASSES)
    for record in (torch.func.grad(run), make_fx(run)):
        with pytest.raises(RuntimeError, match=r"^slices of logits know no torch\.func transforms.* no make_fx"):
            record(logits)
    loss = mlkernels.cross_entropy(found, target)
    with pytest.raises(RuntimeError, match=r"^losses on slices of logits have no backward for many upstream gradients"):
        torch.autograd.grad(loss, found, torch.arange(3.0), is_grads_batched=True, retain_graph=True)
    with pytest.raises(TypeError, match=r"^input takes a plain tensor, got a DTensor .*Shard\(dim=0\)"):
        mlkernels.cross_entropy(distribute_tensor(logits, mesh, [Shard(0)]), target)
    with pytest.raises(ValueError, match=r"^target must be on all ranks that share the classes"):
        mlkernels.cross_entropy(found, distribute_tensor(target, mesh, [Shard(0)]))


def slices_that_disagree(group: dist.ProcessGroup) -> None:
    """What is wrong on one rank, or differs between them, is said on all, with rank and value."""
    rank, own = dist.get_rank(group), own_classes(group)
    first = rank == 0
    prefix = "" if rank == 1 else "rank 1: "
    logits, target = problem()
    part = logits[:, own]
    other = target.clone()
    other[4] = (target[4] + 1) % CLASSES
    weight = torch.arange(1.0, CLASSES + 1)
    heavier = weight.clone()
    heavier[7] = 0.5

    def refused(kind: type[Exception], match: str, logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> None:
        options = {"num_classes": CLASSES, "process_group": group, **options}
        with pytest.raises(kind, match=match):
            class_parallel_softmax_loss(logits, labels, **options)

    refused(ValueError, rf"^target\[4\] must be the same on all ranks: rank 0 has {target[4]}, rank 1 {other[4]}$",
            part, other if rank == 1 else target)  # fmt: skip
    refused(ValueError, r"^weight\[7\] must be the same on all ranks: rank 0 has 8.0, rank 1 0.5$",
            part, target, weight=heavier if rank == 1 else weight)  # fmt: skip
    refused(ValueError, r"^num_classes must be the same on all ranks: rank 0 has 23, rank 1 22$",
            part, target % 20, num_classes=22 if rank == 1 else 23)  # fmt: skip
    refused(ValueError, r"^rows must be the same on all ranks: rank 0 has \(10,\), rank 1 \(9,\)$",
            part[:-1] if rank == 1 else part, target[:-1] if rank == 1 else target)  # fmt: skip
    refused(ValueError, r"slices must follow each other, got an overlap: rank \d begins at",
            part, target, offset=own.start - own.start // 4)  # fmt: skip
    refused(ValueError, r"slices must follow each other, got a gap: rank \d begins at", part, target,
            offset=own.start + 1)  # fmt: skip
    refused(ValueError, r"offset must be given on all ranks or on none: rank 0 has none", part, target,
            offset=None if first else own.start)  # fmt: skip
    refused(ValueError, r"num_classes is 24, but the slices of all ranks end at 23", part, target, num_classes=24)
    refused(IndexError, rf"^{prefix}target 23 at row 4 is out of range", part,
            torch.where(target == other, target, 23) if rank == 1 else target)  # fmt: skip
    refused(TypeError, rf"^{prefix}label_smoothing takes", part, target,
            label_smoothing="x" if rank == 1 else 0.0)  # fmt: skip
    agrees(class_parallel_softmax_loss(part, target, num_classes=CLASSES, process_group=group),
           mlkernels.cross_entropy(logits, target))  # fmt: skip


SCENES = [every_loss_on_slices, statistics_of_slices, vocabulary_parallel_tensors, slices_that_disagree]
