"""Scenes of test_class_parallel.py: linear heads in training, with what trainers put around, and lost ranks."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_linear import unfused
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mlkernels
from mlkernels.distributed import ClassParallelLoss, GradScaler, clip_grad_norm_, data_parallel, sharded_parameters
from mlkernels.distributed.group import Group

F64 = torch.float64
ROWS, CLASSES, WIDTH = 10, 23, 5
#: Rows of each rank in each of two micro-batches.
MICRO = {1: ((6,), (4,)), 2: ((4, 1), (3, 2)), 3: ((4, 0, 2), (0, 1, 3)), 4: ((1, 3, 0, 2), (0, 2, 1, 1))}


def problem() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator, dtype=F64) for s in ((ROWS, WIDTH), (CLASSES, WIDTH)))
    return x, weight, torch.randint(CLASSES, (ROWS,), generator=generator)


def parts(group: dist.ProcessGroup) -> list[slice]:
    """This rank's rows of each micro-batch."""
    rank, found, start = dist.get_rank(group), [], 0
    for sizes in MICRO[dist.get_world_size(group)]:
        begin = start + sum(sizes[:rank])
        found.append(slice(begin, begin + sizes[rank]))
        start += sum(sizes)
    return found


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, WIDTH).double()


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def agrees(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


class Training(nn.Module):
    """A model and its linear head as one module."""

    def __init__(self, linear: ClassParallelLoss):
        super().__init__()
        self.model, self.linear = network(), linear

    def forward(self, x: torch.Tensor, y: torch.Tensor, **per_call: Any) -> Any:
        return self.linear(self.model(x), y, **per_call)


def wrapped(kind: str, group: dist.ProcessGroup, training: Training) -> nn.Module:
    mesh = DeviceMesh.from_group(group, "cpu")
    if kind == "DDP around the model":
        training.model = DistributedDataParallel(training.model, process_group=group)
    elif kind == "DDP around both":
        return data_parallel(training, process_group=group)
    elif kind == "FSDP around the model":
        fully_shard(training.model, mesh=mesh)
    else:
        fully_shard(training, mesh=mesh, ignored_params=sharded_parameters(training))
    return training


def twenty_steps(group: dist.ProcessGroup) -> None:
    """Micro-batches of unequal size, trained parameters, momentum, clipping: as one process over all rows."""
    x, weight, target = problem()
    kinds = ("DDP around the model", "DDP around both", "FSDP around the model", "FSDP around both")
    for kind in {1: kinds[:1], 2: kinds[3:], 3: kinds[:3], 4: kinds[2:3]}[dist.get_world_size(group)]:

        def loss() -> nn.Module:
            scale = nn.Parameter(torch.tensor([4.0], dtype=F64))
            margin = nn.Parameter(torch.full((CLASSES,), 0.2, dtype=F64))
            return mlkernels.ArcFaceLoss(margin=margin, scale=scale)

        linear = ClassParallelLoss(loss(), WIDTH, CLASSES, normalize=True, dtype=F64, process_group=group)
        linear.load_weight(weight)
        alone, own, w = network(), loss(), nn.Parameter(weight.clone())
        training = wrapped(kind, group, Training(linear))
        mine, others = [*training.parameters()], [*alone.parameters(), w, *own.parameters()]
        first, second = (torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3) for p in (mine, others))
        for _ in range(20):
            first.zero_grad()
            second.zero_grad()
            for part in parts(group):
                training(x[part], target[part], normalizer=ROWS).backward()
            own(unfused(alone(x), w, None, True), target).backward()
            agrees(clip_grad_norm_(mine, 0.5), nn.utils.clip_grad_norm_(others, 0.5))
            first.step()
            second.step()
        assert (linear.loss.scale - 4.0).abs() > 1e-3
        for parameter, wanted in zip(mine, others, strict=True):
            agrees(whole(parameter.detach()), wanted.detach())
        for parameter in linear.loss.parameters():
            for other in linear._group.gathered(parameter, "test"):
                assert torch.equal(other, parameter), "ranks have drifted apart"


def plain_ddp(group: dist.ProcessGroup) -> None:
    """DDP that is not told of the shards averages nothing: torch refuses to build it, our module to run in it."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    x, y = torch.randn(3, WIDTH, dtype=F64), torch.arange(3)
    for classes in (4 * ranks, 4 * ranks + 1):  # an even split, which torch flattens, and one that it does not
        linear = ClassParallelLoss(mlkernels.CrossEntropyLoss(), WIDTH, classes, dtype=F64, process_group=group)
        before = linear.weight.to_local().detach().clone()
        for module in (linear, Training(linear)):
            with pytest.raises(RuntimeError):
                DistributedDataParallel(module, process_group=group)
            within = DistributedDataParallel(module, process_group=group, init_sync=False)
            with pytest.raises(RuntimeError, match=r"ClassParallelLoss for replicas.*data_parallel\(module\)"):
                within(x, y)
        assert torch.equal(linear.weight.to_local(), before) and linear.weight.grad is None, rank


def scaled_losses(group: dist.ProcessGroup) -> None:
    """autocast and GradScaler: an overflow of one rank's shard is a step that none makes."""
    x, weight, target = problem()
    with pytest.raises(ValueError, match=r"^module has nothing but class-parallel linear heads"):
        data_parallel(ClassParallelLoss(mlkernels.CrossEntropyLoss(), WIDTH, CLASSES, process_group=group))
    rank, part = dist.get_rank(group), parts(group)[0]
    rows = sum(MICRO[dist.get_world_size(group)][0])
    linear = ClassParallelLoss(mlkernels.CrossEntropyLoss(), WIDTH, CLASSES, process_group=group)
    linear.load_weight(weight.float())
    model = DistributedDataParallel(network().float(), process_group=group)
    optimizer = torch.optim.SGD([*model.parameters(), *linear.parameters()], lr=0.5)
    scaler = GradScaler("cpu", process_group=group, init_scale=1024.0, growth_interval=100)
    alone, w = network().float(), weight.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        scaler.scale(linear(model(x[part].float()), target[part])).backward()
        features = alone(x[:rows].float())
    mlkernels.cross_entropy(features.float() @ w.T, target[:rows]).backward()
    before = [whole(p.detach()).clone() for p in (*model.parameters(), linear.weight)]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0
    wanted = [p.grad for p in (*alone.parameters(), w)]
    for parameter, old, gradient in zip((*model.parameters(), linear.weight), before, wanted, strict=True):
        agrees(whole(parameter.detach()), old - 0.5 * gradient, 2e-2)
    before = [whole(p.detach()).clone() for p in (*model.parameters(), linear.weight)]
    if rank == 0:
        linear.weight.grad.to_local()[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    for parameter, old in zip((*model.parameters(), linear.weight), before, strict=True):
        assert torch.equal(whole(parameter.detach()), old)


class _Gather(torch.autograd.Function):
    """Partial FC's: backward adds up what all ranks have for a rank's rows, times their number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, sizes: tuple[int, ...]) -> torch.Tensor:
        ctx.group, ctx.sizes = group, sizes
        padded = nn.functional.pad(x, (0, 0, 0, max(sizes) - len(x)))
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded, group)
        return torch.cat([rows[:size] for rows, size in zip(found, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return len(ctx.sizes) * gradient.split(ctx.sizes)[dist.get_rank(ctx.group)], None, None


class _PartialFC(torch.autograd.Function):
    """Its softmax over all ranks: p - 1[y] over N, where the logits' margin has moved and nobody differentiates it."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, label: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        top = logits.amax(1, keepdim=True)
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
        p = (logits - top).exp()
        total = p.sum(1, keepdim=True)
        dist.all_reduce(total, group=group)
        p = p / total
        own = label >= 0
        hit = torch.where(own, p[torch.arange(len(p)), label.clamp(min=0)], 0)
        dist.all_reduce(hit, group=group)
        p[own, label[own]] -= 1
        ctx.save_for_backward(p / len(p))
        return -hit.log().mean()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return upstream * ctx.saved_tensors[0], None, None


def as_partial_fc(group: dist.ProcessGroup) -> None:
    """Every class taken, as An et al., "Partial FC" (2021), under ArcFace whose margin is added to the angle without a
    gradient of its own: the same loss, and the same gradients on every rank."""
    x, weight, target = problem()
    sizes, part = MICRO[dist.get_world_size(group)][0], parts(group)[0]
    linear = ClassParallelLoss(
        mlkernels.ArcFaceLoss(margin=0.5, scale=8.0, gradient="straight_through", beyond_pi="none"),
        WIDTH, CLASSES, normalize=True, dtype=F64, process_group=group,
    )  # fmt: skip
    linear.load_weight(weight)
    x_ours, x_theirs = (x[part].clone().requires_grad_() for _ in range(2))
    loss = linear(x_ours, target[part])
    loss.backward()

    own = weight[linear.first_class : linear.last_class].clone().requires_grad_()
    features = nn.functional.normalize(_Gather.apply(x_theirs, group, sizes))
    cosines = nn.functional.linear(features, nn.functional.normalize(own)).clamp(-1, 1)
    label = target[: sum(sizes)] - linear.first_class
    label = torch.where((label >= 0) & (label < len(own)), label, -1)
    moved = cosines.clone()
    with torch.no_grad():
        kept = label >= 0
        angle = cosines[kept, label[kept]].arccos() + 0.5
        moved[kept, label[kept]] = angle.cos()
    logits = 8.0 * (cosines + (moved - cosines).detach())
    theirs = _PartialFC.apply(logits, label, group)
    theirs.backward()
    agrees(loss, theirs)
    agrees(x_ours.grad, x_theirs.grad)
    agrees(linear.weight.grad.to_local(), own.grad)


def disagreements(group: dist.ProcessGroup) -> None:
    """What ranks have not alike is named with rank and value, in the constructor and in calls, and so is what one of
    them was refused for."""
    x, weight, target = problem()
    rank, part = dist.get_rank(group), parts(group)[0]
    other = rank == 1
    prefix = "" if other else "rank 1: "

    def refused(kind: type[Exception], match: str, call: Callable[[], Any]) -> None:
        with pytest.raises(kind, match=match):
            call()

    def made(loss: Any = None, **options: Any) -> ClassParallelLoss:
        loss = mlkernels.CrossEntropyLoss() if loss is None else loss
        return ClassParallelLoss(loss, **{"in_features": WIDTH, "num_classes": CLASSES, "dtype": F64,
                                          "process_group": group, **options})  # fmt: skip

    weights = torch.ones(CLASSES)
    weights[3] = 1.0 + other
    refused(ValueError, r"^loss.weight\[3\] must be the same on all ranks: rank 0 has 1.0, rank 1 2.0$",
            lambda: made(mlkernels.CrossEntropyLoss(weight=weights)))  # fmt: skip
    refused(ValueError, r"^loss must be the same on all ranks: rank 0 has FocalLoss\(.*, rank 1 ArcFaceLoss\(",
            lambda: made(mlkernels.ArcFaceLoss() if other else mlkernels.FocalLoss()))  # fmt: skip
    refused(ValueError, r"^memory must be the same on all ranks: rank 0 has None, rank 1 4096$",
            lambda: made(memory=4096 if other else None))  # fmt: skip
    for name, value in {"in_features": WIDTH + 1, "dtype": torch.float32, "bias": True, "normalize": True,
                        "strategy": "tiles", "sample": 3, "compact": True}.items():  # fmt: skip
        refused(ValueError, rf"^{name} must be the same on all ranks: rank 0 has .*, rank 1 {value}$",
                lambda name=name, value=value: made(**{name: value} if other else {}))  # fmt: skip
    refused(ValueError, rf"^{prefix}num_classes must be an integer >= 1, got 0$",
            lambda: made(num_classes=0 if other else CLASSES))  # fmt: skip
    refused(TypeError, rf"^{prefix}loss takes a loss module or function", lambda: made(3 if other else None))
    margin = nn.Parameter(torch.tensor(0.3, dtype=F64))
    linear = made(mlkernels.ArcFaceLoss(margin=margin), normalize=True)
    call = lambda **per_call: linear(x[part], target[part], **per_call)
    refused(ValueError, rf"^{prefix}k must be an integer in \[1, 23\], got 24$",
            lambda: linear.topk(x[part], 24 if other else 2))  # fmt: skip
    refused(ValueError, r"^k must be the same on all ranks: rank 0 has 2, rank 1 3$",
            lambda: linear.topk(x[part], 2 + other))  # fmt: skip
    refused(ValueError, rf"^{prefix}source must be \(C, 5\) with C <= 23, got \(23, 4\)",
            lambda: linear.load_weight(weight[:, : WIDTH - other]))  # fmt: skip
    refused(ValueError, r"^source must be the same on all ranks: rank 0 has \(23, 5\), rank 1 \(22, 5\)$",
            lambda: linear.load_weight(weight[: CLASSES - other]))  # fmt: skip
    with torch.no_grad():
        margin += 0.1 * other
    refused(ValueError, r"^m2 must be the same on all ranks: rank 0 has 0.3, rank 1 0.4", call)
    with torch.no_grad():
        margin.fill_(0.3)
    if other:
        linear.loss.scale = 32.0
    refused(ValueError, r"^scale must be the same on all ranks: rank 0 has 64.0, rank 1 32.0$", call)
    linear.loss.scale = 64.0
    if other:
        linear.loss.reduction = "sum"
    refused(ValueError, r"^reduction must be the same on all ranks: rank 0 has mean, rank 1 sum$", call)
    linear.loss.reduction = "mean"
    ones = torch.ones(len(x[part]))
    refused(ValueError, r"^row_weight must be the same on all ranks: rank 0 has None, rank 1 one per row$",
            lambda: call(row_weight=ones if other else None))  # fmt: skip
    moved = made()
    if other:
        moved.to(torch.float32)
    refused(ValueError, r"^dtype must be the same on all .* has \('torch.float64'.*, rank 1 \('torch.float32'",
            lambda: moved(x[part].to(moved.weight.dtype), target[part]))  # fmt: skip
    # Dtypes that do not matter may differ.
    label = target[part].int() if other else target[part]
    agrees(call(row_weight=ones.half() if other else ones), linear(x[part], label))


def lost_ranks(groups: dict[int, dist.ProcessGroup], late: dist.ProcessGroup) -> None:
    """A rank that dies while features are gathered, statistics combined, gradients sent home, or that is late: rank 0
    says in which of these, and nothing of it has changed. For the last: three ranks are gone after it."""
    x, weight, target = problem()
    rank = dist.get_rank()
    store = dist.distributed_c10d._get_default_store()

    def linear_in(group: dist.ProcessGroup) -> ClassParallelLoss:
        linear = ClassParallelLoss(mlkernels.CrossEntropyLoss(), WIDTH, CLASSES, dtype=F64, process_group=group)
        linear.load_weight(weight)
        return linear

    def fails_in(linear: ClassParallelLoss, what: str) -> None:
        features = x.clone().requires_grad_()
        with pytest.raises(RuntimeError, match=rf"^rank 0 of 2 got no answer .* as they exchanged {what}, and no g"):
            linear(features, target).backward()
        assert features.grad is None and linear.weight.grad is None
        assert torch.equal(linear.weight.to_local(), weight[linear.first_class : linear.last_class])

    if rank in (0, 3):
        linear = linear_in(late)
        if rank == 0:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), late)
            fails_in(linear, "sizes")
            store.set("late", "")
        else:
            store.wait(["late"], timedelta(seconds=90))
    dying = {1: "features", 2: "statistics", 3: "gradients"}
    for other, phase in dying.items():
        if rank not in (0, other):
            continue
        linear = linear_in(groups[other])
        if rank == 0:
            fails_in(linear, phase)
            continue
        sending = Group._sending
        Group._sending = lambda self, what, sent: os._exit(0) if re.match(phase, what) else sending(self, what, sent)
        linear(x.clone().requires_grad_(), target).backward()


SCENES = [twenty_steps, plain_ddp, scaled_losses, as_partial_fc, disagreements]
