"""Classes spread over ranks: any loss as the dense one in float64, whatever the number of ranks, rows and classes."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import processes
import pytest
import torch
import torch.distributed as dist
import training_scenes
import vocabulary_scenes
import weight_scenes
import wire_scenes
from table import BY_NAME, F64, LOSSES
from test_linear import OPTIONS, leaves_of, unfused
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel

import mlkernels
from mlkernels import TileSGD
from mlkernels.distributed import ClassParallelLoss, agreement, clip_grad_norm_
from mlkernels.distributed.group import Group
from mlkernels.linear.loop import Linear
from mlkernels.linear.pieces import TORCH

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")

RANKS = 4
ROWS, CLASSES, WIDTH = 10, 23, 5
SIZES = {1: (10,), 2: (7, 3), 3: (4, 0, 6), 4: (1, 5, 0, 4)}  # rows of each rank


def problem(seed: int = 0, classes: int = CLASSES) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(s, generator=generator, dtype=F64) for s in ((ROWS, WIDTH), (classes, WIDTH), classes)
    )
    target = torch.randint(classes, (ROWS,), generator=generator)
    target[2], x[2] = -100, float("nan")
    return x, weight, bias, target


def linear_of(
    group: dist.ProcessGroup, loss: Any, weight: torch.Tensor, bias: torch.Tensor | None = None, **options: Any
):
    """A linear head with a given weight."""
    linear = ClassParallelLoss(
        loss, weight.shape[1], len(weight), process_group=group, bias=bias is not None, dtype=weight.dtype, **options
    )
    linear.load_weight(weight)
    if bias is not None:
        with torch.no_grad():
            linear.bias.to_local().copy_(bias[linear.first_class : linear.last_class])
    return linear


def own_rows(group: dist.ProcessGroup) -> slice:
    rank, sizes = dist.get_rank(group), SIZES[dist.get_world_size(group)]
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def agrees(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def every_loss(group: dist.ProcessGroup) -> None:
    """Values and gradients of features, weight, bias and parameters, under upstream gradients of each rank's own."""
    rank, ranks, own = dist.get_rank(group), dist.get_world_size(group), own_rows(group)
    for index, loss in enumerate(LOSSES):
        options = [*OPTIONS.values()][index % len(OPTIONS)]
        normalize = loss.draws == "cosines"
        x, weight, bias, target = problem(index)
        bias = None if normalize else bias
        per_row = {"row_weight"} & options.keys()
        params = leaves_of(loss, "number" if loss.structure.scale == "two_scale" else loss.forms[-1], target)
        mine = {
            k: v.detach()[own].requires_grad_() if v.dim() == 2 and len(v) == ROWS else v for k, v in params.items()
        }
        groups = {"group": loss.group(target)} if loss.groups else {}
        local = {k: v[own] if k in per_row else v for k, v in options.items()} | {k: v[own] for k, v in groups.items()}
        budget = (None, 3000, 900)[index % 3]
        whole = lambda logits, y: loss(logits, y, mine, **local)
        linear = linear_of(group, whole, weight, bias, normalize=normalize, memory=budget,
                       strategy=(None, "stored", "tiles")[index % 3])  # fmt: skip
        features = x[own].clone().requires_grad_()
        found = linear(features, target[own])

        leaves = [t.clone().requires_grad_() for t in ((x, weight) if bias is None else (x, weight, bias))]
        logits = unfused(leaves[0], leaves[1], None if bias is None else leaves[2], normalize)
        wanted = loss(logits, target, params, backend="reference", **options, **groups)
        upstream = torch.linspace(-1, 2, ranks, dtype=F64)
        if found.dim():
            rows = torch.linspace(-2, 3, ROWS, dtype=F64)
            agrees(found, wanted[own])
            found.backward(rows[own])
            total = (wanted * rows).sum() / ranks
        else:
            agrees(found, wanted)
            found.backward(upstream[rank])
            total = wanted * upstream.mean()
        grads = torch.autograd.grad(total, [*leaves, *params.values()])
        shard = slice(linear.first_class, linear.last_class)
        agrees(features.grad, ranks * grads[0][own])
        agrees(linear.weight.grad.to_local(), grads[1][shard])
        if bias is not None:
            agrees(linear.bias.grad.to_local(), grads[2][shard])
        for key, wanted_grad in zip(params, grads[len(leaves) :], strict=True):
            agrees(mine[key].grad, wanted_grad if mine[key] is params[key] else ranks * wanted_grad[own])
            params[key].grad = None


def statistics(group: dist.ProcessGroup) -> None:
    """logsumexp, log_prob and entropy with gradients, of which a rank may use some or none."""
    rank, ranks, own = dist.get_rank(group), dist.get_world_size(group), own_rows(group)
    for name in ("cross_entropy", "two_scale_norm"):
        loss, (x, weight, _, target) = BY_NAME[name], problem()
        params = leaves_of(loss, "number", target)
        both = {"reduction": "mean", "return_stats": True, **loss.compose(params)}
        plain = {**both, "return_stats": False}
        linear = linear_of(group, lambda logits, y: mlkernels.softmax_loss(logits, y, **plain), weight, memory=3000)
        features = x[own].clone().requires_grad_()
        value, rows = linear(features, target[own], return_stats=True)
        leaf, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        wanted, whole = mlkernels.softmax_loss(unfused(leaf, w, None), target, backend="reference", **both)
        agrees(value, wanted)
        for ours, theirs in zip(rows, whole, strict=True):
            agrees(ours, theirs[own])
        g = torch.linspace(-1, 1, ROWS, dtype=F64)
        entropies = rows.entropy @ g[own] if rank != 1 else 0.0  # this rank has no use for them
        (value * 2 + rows.log_prob @ g[own] + entropies).backward()
        used = torch.ones(ROWS, dtype=F64)
        if ranks > 1:
            used[sum(SIZES[ranks][:1]) : sum(SIZES[ranks][:2])] = 0
        total = wanted * 2 + (whole.log_prob @ g + whole.entropy @ (g * used)) / ranks
        of_x, of_w = torch.autograd.grad(total, [leaf, w])
        agrees(features.grad, ranks * of_x[own])
        agrees(linear.weight.grad.to_local(), of_w[linear.first_class : linear.last_class])


def batches_of_nothing(group: dist.ProcessGroup) -> None:
    """No rows that count on any rank: the loss is NaN and the gradients are 0; fewer classes than ranks."""
    x, weight, _, _ = problem(classes=3)
    linear = linear_of(group, mlkernels.CrossEntropyLoss(), weight)
    features = x[own_rows(group)].clone().requires_grad_()
    loss = linear(features, torch.full((len(features),), -100))
    loss.backward()
    assert loss.isnan()
    assert not features.grad.any()
    assert not linear.weight.grad.to_local().any()
    own = own_rows(group)
    target = torch.arange(ROWS) % 3
    x[2] = 1.0
    agrees(linear(x[own], target[own]), mlkernels.cross_entropy(x @ weight.T, target))
    stepping = linear_of(group, mlkernels.CrossEntropyLoss(), weight, tile_update=TileSGD(0.1, momentum=0.9), sample=2)
    stepping.eval()(x[own], target[own]).backward()
    w = weight.clone().requires_grad_()
    mlkernels.cross_entropy(x @ w.T, target).backward()
    agrees(stepping.export_weight(), weight - 0.1 * w.grad)
    stepping.train()(x[own], target[own]).backward()


def compacted(group: dist.ProcessGroup) -> None:
    """Ignored rows of all ranks masked, as on a device, and left out: as the dense loss."""
    (x, weight, _, target), own = problem(), own_rows(group)
    leaf, w, up = x.clone().requires_grad_(), weight.clone().requires_grad_(), torch.linspace(-1, 2, ROWS, dtype=F64)
    loss = functools.partial(mlkernels.arcface_loss, scale=4.0, reduction="none", backend="reference")
    wanted = loss(unfused(leaf, w, None, True), target)
    wanted.backward(up)
    with mock.patch.object(TORCH, "masks", True):
        for compact in (False, True):
            linear = linear_of(group, loss, weight, normalize=True, memory=3000, compact=compact)
            features = x[own].clone().requires_grad_()
            with mock.patch.object(Linear, "chunks", autospec=True, side_effect=Linear.chunks) as chunks:
                found = linear(features, target[own])
            seen = chunks.call_args[0][0].x
            assert len(seen) == ROWS - 1 if compact else len(seen) >= ROWS
            agrees(found, wanted[own])
            found.backward(up[own])
            agrees(features.grad, leaf.grad[own])
            agrees(
                linear.weight.grad.to_local() * dist.get_world_size(group),
                w.grad[linear.first_class : linear.last_class],
            )


def gathered_by_its_own_wrap(group: dist.ProcessGroup) -> None:
    """LinearLoss under fully_shard: its forward has the whole weight, the mean of the ranks' gradients is cut again."""
    (x, weight, _, target), own = problem(), own_rows(group)
    linear = mlkernels.LinearLoss(mlkernels.CrossEntropyLoss(reduction="sum"), WIDTH, CLASSES, dtype=F64)
    with torch.no_grad():
        linear.weight.copy_(weight)
    fully_shard(linear, mesh=DeviceMesh.from_group(group, "cpu"))
    features = x[own].clone().requires_grad_()
    linear(features, target[own]).backward()
    leaf, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
    mlkernels.cross_entropy(unfused(leaf, w, None), target, reduction="sum").backward()
    agrees(features.grad, leaf.grad[own])
    agrees(linear.weight.grad.full_tensor() * dist.get_world_size(group), w.grad)
    linear.reshard()
    with pytest.raises(TypeError, match=r"^weight takes a plain tensor.*fully_shard makes it one within forward"):
        linear.logits(x[own])


def half_precision(group: dist.ProcessGroup) -> None:
    x, weight, _, target = problem()
    own = own_rows(group)
    features = x[own].bfloat16().requires_grad_()
    linear = linear_of(group, mlkernels.CosFaceLoss(scale=8.0), weight.bfloat16(), normalize=True)
    loss = linear(features, target[own])
    loss.backward()
    leaf, w = x.bfloat16().double().requires_grad_(), weight.bfloat16().double().requires_grad_()
    wanted = mlkernels.cosface_loss(unfused(leaf, w, None, True), target, scale=8.0)
    wanted.backward()
    assert loss.dtype == torch.float32 and features.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        features.grad.double(), dist.get_world_size(group) * leaf.grad[own], rtol=1e-2, atol=1e-3
    )


def averaged_backbones(group: dist.ProcessGroup) -> None:
    """The backbone under DDP: a step over two micro-batches is that of one process over all rows."""
    x, weight, _, target = problem()
    x[2] = 1.0
    own = own_rows(group)

    model, alone = DistributedDataParallel(training_scenes.network(), process_group=group), training_scenes.network()
    linear = linear_of(group, mlkernels.ArcFaceLoss(scale=4.0), weight, normalize=True)
    w = weight.clone().requires_grad_()
    for _ in range(2):
        linear(model(x[own]), target[own]).backward()
        mlkernels.arcface_loss(unfused(alone(x), w, None, True), target, scale=4.0).backward()
    shard = slice(linear.first_class, linear.last_class)
    for mine, wanted in zip(model.parameters(), alone.parameters(), strict=True):
        agrees(mine.grad, wanted.grad)
    agrees(linear.weight.grad.to_local(), w.grad[shard])
    w = nn.Parameter(w.detach(), requires_grad=True)
    w.grad = linear.export_weight() * 0 + linear.weight.grad.full_tensor()
    for norm_type in (2.0, math.inf):
        found = clip_grad_norm_([*model.parameters(), *linear.parameters()], 0.1, norm_type)
        agrees(found, nn.utils.clip_grad_norm_([*alone.parameters(), w], 0.1, norm_type))
        agrees(linear.weight.grad.to_local(), w.grad[shard])
    few = linear_of(group, mlkernels.CrossEntropyLoss(), weight[:2])  # of more ranks than two, some have no class
    few(x[own], target[own].clamp(min=0) % 2).backward()
    largest = few.weight.grad.full_tensor().abs().max()
    agrees(clip_grad_norm_(few.parameters(), 0.1, math.inf), largest)


def stepping_in_tiles(group: dist.ProcessGroup) -> None:
    """Each rank steps its shard in the backward, as torch.optim.SGD steps the whole weight by the mean upstream."""
    rank, ranks, own = dist.get_rank(group), dist.get_world_size(group), own_rows(group)
    numbers = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}
    x, weight, of_classes, target = problem()
    for bias, loss in ((of_classes, mlkernels.FocalLoss(reduction="none")), (None, mlkernels.ArcFaceLoss(scale=4.0))):
        sgd = TileSGD(**numbers)
        linear = linear_of(group, loss, weight, bias, normalize=bias is None, memory=5000, tile_update=sgd)
        w = nn.Parameter(weight.clone())
        optimizer = torch.optim.SGD([w], **numbers)
        for step in range(3):
            sgd.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            features, leaf = x[own].clone().requires_grad_(), x.clone().requires_grad_()
            found, wanted = linear(features, target[own]), loss(unfused(leaf, w, bias, bias is None), target)
            g = torch.linspace(-1, 2, ROWS, dtype=F64)
            upstream = torch.linspace(-1, 2, ranks, dtype=F64)
            found.backward(g[own] if found.dim() else upstream[rank])
            w.grad, leaf_grad = torch.autograd.grad(
                (wanted * g).sum() / ranks if found.dim() else wanted * upstream.mean(), [w, leaf]
            )
            optimizer.step()
            agrees(linear.export_weight(), w.detach())
            agrees(features.grad, ranks * leaf_grad[own])
            assert linear.weight.grad is None
        agrees(linear.state_dict()["update.momentum_buffer"].full_tensor(), optimizer.state[w]["momentum_buffer"])
    with pytest.raises(RuntimeError, match="two losses of a linear head with tile_update wait"):
        (linear(x[own], target[own]) + linear(x[own], target[own])).backward()
    with pytest.raises(ValueError, match=r"tile_update must be the same on all ranks: rank 0 has None, rank 1 \{'lr'"):
        ClassParallelLoss(loss, WIDTH, 6, process_group=group, tile_update=TileSGD(0.1) if rank == 1 else None)
    with pytest.raises(ValueError, match=r"tile_update takes a TileSGD of its own for every linear head"):
        ClassParallelLoss(loss, WIDTH, 6, process_group=group, tile_update=sgd if rank == 1 else TileSGD(0.1))
    sgd.param_groups[0]["lr"] += rank == 1  # a scheduler that has gone another way here
    with pytest.raises(ValueError, match=r"tile_update must be the same on .* has \{'lr': 0.03.*rank 1 \{'lr': 1.03"):
        linear(x[own], target[own])


def sampled(group: dist.ProcessGroup) -> None:
    """Each rank draws from its own classes; all together are the loss over what all have drawn. Then a step by rows."""
    rank, ranks, own = dist.get_rank(group), dist.get_world_size(group), own_rows(group)
    x, weight, bias, target = problem()
    adjustment, upstream = torch.linspace(-1, 1, CLASSES, dtype=F64), torch.linspace(-1, 2, ranks, dtype=F64)
    for sample, correction in ((1, None), (3, "importance"), (CLASSES, None)):
        margins = [torch.linspace(0.1, 0.4, CLASSES, dtype=F64).requires_grad_() for _ in range(2)]
        of_rows = torch.linspace(0.1, 0.5, ROWS, dtype=F64).unsqueeze(1)
        loss = lambda f, y, m=margins[0], a=adjustment, r=of_rows[own]: mlkernels.softmax_loss(
            f, y, transform=mlkernels.Margin(m2=r, m3=m), scale=2.0, logit_adjustment=a
        )
        sgd = TileSGD(0.1, momentum=0.9, weight_decay=0.1)
        both = [
            linear_of(group, loss, weight, bias, sample=sample, sample_correction=correction, tile_update=update)
            for update in (None, sgd)
        ]
        both[1].sampler.load_state_dict(both[0].sampler.state_dict())
        drawn = []
        for other in range(ranks):
            sampler = copy.deepcopy(both[0].sampler)
            sampler.rank = other
            drawn.append(sampler.draw(target, -100))
        classes = torch.cat([each.classes + each.first for each in drawn])
        label = torch.where(target == -100, target, drawn[0].label)
        shares = torch.cat([torch.where(each.others()[0], -each.share.log() / 2, 0) for each in drawn])
        found = []
        for linear in both:
            margins[0].grad, features = None, x[own].clone().requires_grad_()
            value, rows = linear(features, target[own], return_stats=True)
            value.backward(upstream[rank])
            found.append((value.detach(), features.grad, linear.bias.grad.to_local(), margins[0].grad))
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        logits = unfused(leaves[0], leaves[1][classes], leaves[2][classes])
        added = adjustment[classes] + (shares if correction else 0)
        wanted, whole = mlkernels.softmax_loss(
            logits, label, transform=mlkernels.Margin(m2=of_rows, m3=margins[1][classes]), scale=2.0,
            logit_adjustment=added, return_stats=True,
        )  # fmt: skip
        (wanted * upstream.mean()).backward()
        shard = slice(both[0].first_class, both[0].last_class)
        for ours in found:
            theirs = (wanted.detach(), ranks * leaves[0].grad[own], leaves[2].grad[shard], margins[1].grad)
            for mine, other in zip(ours, theirs, strict=True):
                agrees(mine, other)
        at = whole.prediction[own]
        assert torch.equal(rows.prediction, torch.where(at < 0, at, classes[at.clamp(min=0)]))
        agrees(both[0].weight.grad.to_local(), leaves[1].grad[shard])
        moved = torch.where(leaves[1].grad.any(1, keepdim=True), weight - 0.1 * (leaves[1].grad + 0.1 * weight), weight)
        moved[classes] = (weight - 0.1 * (leaves[1].grad + 0.1 * weight))[classes]
        agrees(both[1].export_weight(), moved)


def lost_late(group: dist.ProcessGroup) -> None:
    """The last exchange of a forward: its error is not taken for an argument's, which all would be told of."""
    (x, weight, _, target), own, seen = problem(), own_rows(group), []
    gathered = Group.gathered

    def failing(self: Group, tensor: torch.Tensor, what: str) -> torch.Tensor:
        seen.append(what)
        if what == "classes":
            raise RuntimeError("lost")
        return gathered(self, tensor, what)

    linear = linear_of(group, mlkernels.CrossEntropyLoss(), weight, sample=2)
    with mock.patch.object(Group, "gathered", failing), pytest.raises(RuntimeError, match=r"^lost$"):
        linear(x[own], target[own], return_stats=True)
    assert seen.count("sizes") == 1 and seen[-1] == "classes"


def recomputed(group: dist.ProcessGroup) -> None:
    """The same to the bit; under checkpointing, and with a backward that comes twice."""
    x, weight, _, target = problem()
    own = own_rows(group)
    grads = []
    for checkpointed in (False, False, True):
        linear = linear_of(group, mlkernels.CrossEntropyLoss(), weight)
        features = x[own].clone().requires_grad_()
        if checkpointed:
            loss = torch.utils.checkpoint.checkpoint(linear, features, target[own], use_reentrant=False)
        else:
            loss = linear(features, target[own])
            loss.backward(retain_graph=True)
            features.grad = linear.weight.grad = None
        loss.backward()
        grads.append((features.grad, linear.weight.grad.to_local()))
    for first, again, second in zip(*grads, strict=True):
        assert torch.equal(first, again)
        agrees(first, second)


def copied_and_compiled(group: dist.ProcessGroup) -> None:
    """A copy is of the same ranks, and so is a linear head of their mesh; compiled, it is left out of the graph."""
    x, weight, _, target = problem()
    own = own_rows(group)
    linear = linear_of(group, mlkernels.CrossEntropyLoss(), weight)
    loss = linear(x[own], target[own])
    agrees(copy.deepcopy(linear)(x[own], target[own]), loss)
    mesh = DeviceMesh.from_group(group, "cpu")
    of_mesh = ClassParallelLoss(mlkernels.CrossEntropyLoss(), WIDTH, CLASSES, device_mesh=mesh, dtype=F64)
    of_mesh.load_weight(weight)
    agrees(of_mesh(x[own], target[own]), loss)
    with pytest.raises(ValueError, match="device_mesh and process_group say the same"):
        ClassParallelLoss(linear.loss, WIDTH, CLASSES, device_mesh=mesh, process_group=group)
    if dist.get_world_size(group) == 2:
        agrees(torch.compile(linear, backend="eager")(x[own], target[own]), loss)
    features = x[own].requires_grad_()
    run = lambda features: linear(features, target[own])
    for record in (torch.func.grad(run), make_fx(run), make_fx(lambda features: linear.topk(features, 2))):
        with pytest.raises(
            RuntimeError, match=r"^class-parallel linear heads know no torch\.func transforms.* no make_fx"
        ):
            record(features)
    with pytest.raises(
        RuntimeError, match=r"^class-parallel linear heads have no backward for many upstream gradients"
    ):
        torch.autograd.grad(run(features), features, torch.arange(3.0, dtype=F64), is_grads_batched=True)
    with pytest.raises(RuntimeError, match=r"^class-parallel linear heads have no second-order gradients"):
        torch.autograd.grad(run(features), features, create_graph=True)


def sharded_tensors(group: dist.ProcessGroup) -> None:
    """No function takes one, and each says so."""
    x, weight, bias, target = problem()
    mesh = DeviceMesh.from_group(group, "cpu")
    shard = lambda tensor: DTensor.from_local(tensor, mesh, [Shard(0)])
    linear, ones = mlkernels.linear_cross_entropy, torch.ones(ROWS)
    gamma, of_classes = (
        DTensor.from_local(t, mesh, [Replicate()]) for t in (torch.tensor(2.0, dtype=F64), torch.ones(CLASSES))
    )
    split = distribute_tensor(torch.ones(ROWS, CLASSES, dtype=F64), mesh, [Shard(1)])
    for name, call in {
        "input": lambda: linear(shard(x), weight, target),
        "linear_weight": lambda: linear(x, shard(weight), target),
        "linear_bias": lambda: linear(x, weight, target, linear_bias=DTensor.from_local(bias, mesh, [Replicate()])),
        "target": lambda: linear(x, weight, shard(target)),
        "gamma": lambda: mlkernels.focal_loss(split, target, gamma=gamma),
        "weight": lambda: mlkernels.cross_entropy(split, target, weight=of_classes),
        "logit_adjustment": lambda: linear(x, weight, target, logit_adjustment=of_classes),
        "row_weight": lambda: mlkernels.cross_entropy(x, target, row_weight=shard(ones)),
        "normalizer": lambda: mlkernels.cross_entropy(
            x, target, normalizer=DTensor.from_local(ones[0], mesh, [Replicate()])
        ),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name} takes a plain tensor, got a DTensor"):
            call()


def errors_everywhere(group: dist.ProcessGroup) -> None:
    """What is wrong on one rank is said on all, and the next call works."""
    rank, own = dist.get_rank(group), own_rows(group)
    x, weight, _, target = problem()
    linear = linear_of(group, mlkernels.CrossEntropyLoss(), weight)
    prefix = "" if rank == 1 else "rank 1: "
    features, labels = x[own], target[own]
    if rank == 1:
        features, labels = x[:2], torch.tensor([3, CLASSES])
    with pytest.raises(IndexError, match=rf"^{prefix}target {CLASSES} at row 1 is out of range \[0, {CLASSES}\)"):
        linear(features, labels)
    with pytest.raises(TypeError, match=rf"^{prefix}input must have weight's dtype torch.float64, got torch.float32"):
        linear(features.float() if rank == 1 else features, target[: len(features)])
    linear.strategy = "tiles" if rank == 1 else None
    with pytest.raises(ValueError, match=r"^strategy must be the same on all ranks: rank 0 has None, rank 1 tiles$"):
        linear(features, target[: len(features)])
    linear.strategy = None
    with pytest.raises(ValueError, match=r"^normalizer must be the same on all ranks: rank 0 has 3.0, rank 1 4.0$"):
        linear(features, target[: len(features)], normalizer=torch.tensor(4.0 if rank == 1 else 3.0))
    with pytest.raises(ValueError, match=r"^num_classes must be the same on all ranks: rank 0 has 5, rank 1 6$"):
        ClassParallelLoss(mlkernels.CrossEntropyLoss(), WIDTH, 6 if rank == 1 else 5, process_group=group)
    agrees(linear(x[own], target[own]), mlkernels.cross_entropy(unfused(x, weight, None), target))


def best_classes(group: dist.ProcessGroup) -> None:
    x, weight, bias, _ = problem()
    x[2] = 1.0
    linear = linear_of(group, mlkernels.CrossEntropyLoss(), weight, bias)
    own = own_rows(group)
    for k in (1, 8, CLASSES):
        values, classes = linear.topk(x[own], k)
        wanted = (x @ weight.T + bias)[own].topk(k, 1)
        agrees(values, wanted.values)
        assert torch.equal(classes, wanted.indices)


def from_one_device(group: dist.ProcessGroup) -> None:
    """A state_dict of LinearLoss, whose tensors are whole, the momentum of its tile update among them."""
    x, weight, _, target = problem()
    both = [
        made(mlkernels.CrossEntropyLoss(), WIDTH, CLASSES, bias=True, dtype=F64, tile_update=TileSGD(0.1, momentum=0.9))
        for made in (mlkernels.LinearLoss, functools.partial(ClassParallelLoss, process_group=group))
    ]
    both[0](x, target).backward()
    both[1].load_state_dict(both[0].state_dict())
    for name, value in both[1].state_dict().items():
        wanted = both[0].state_dict()[name]
        assert torch.equal(value.full_tensor(), wanted) if isinstance(value, DTensor) else value == wanted
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        both[1].load_state_dict({**both[0].state_dict(), "weight": weight[:4]})


def bytes_as_promised(group: dist.ProcessGroup) -> None:
    """One packed collective of statistics, features out, gradients home; docs/distributed.md says how many bytes."""
    ranks, own = dist.get_world_size(group), own_rows(group)
    x, weight, _, target = problem()
    linear = linear_of(group, mlkernels.FocalLoss(), weight)
    linear.communication()
    linear(x[own].clone().requires_grad_(), target[own]).backward()
    most, others = max(SIZES[ranks]), ranks - 1
    kept = sum(label != -100 for label in target.tolist())
    found = linear.communication()
    assert found.bytes == {
        "sizes": 4 * 8 * others,
        "labels": 8 * most * others,
        "features": 8 * most * WIDTH * others,
        "statistics": 8 * 3 * kept * others,  # M, S and u_y
        "gradients": 8 * most * WIDTH * others,
        "upstream": 8 * others,
    }
    assert set(found.collectives.values()) == {1}


def checkpoints(folder: Path) -> None:
    """Saved by four ranks with the optimizer's state, loaded by three, two and one; what the tile update and sampling
    keep too, where some ranks have no class."""
    import torch.distributed.checkpoint as dcp

    x, weight, _, target = problem()
    world = dist.group.WORLD
    linear = linear_of(world, mlkernels.CrossEntropyLoss(), weight)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1, momentum=0.9)
    linear(x[own_rows(world)], target[own_rows(world)]).backward()
    optimizer.step()
    dcp.save(
        {"weight": linear.weight, "momentum": optimizer.state[linear.weight]["momentum_buffer"]}, checkpoint_id=folder
    )
    saved = linear.export_weight()
    assert not torch.equal(saved, weight)
    for ranks in (3, 2, 1):
        group = GROUPS[ranks]
        if dist.get_rank() < ranks:
            other = linear_of(group, mlkernels.CrossEntropyLoss(), torch.zeros_like(weight))
            state = {"weight": other.weight.detach(), "momentum": torch.zeros_like(other.weight.detach())}
            dcp.load(state, checkpoint_id=folder, process_group=group)
            agrees(other.export_weight(), saved)
            assert state["momentum"].full_tensor().abs().sum() > 0
        dist.barrier()

    def made(group: dist.ProcessGroup, scale: float, weight: torch.Tensor) -> ClassParallelLoss:
        loss = mlkernels.ArcFaceLoss(scale=nn.Parameter(torch.tensor(scale, dtype=F64)))
        bias, sgd = torch.zeros(len(weight), dtype=F64), TileSGD(0.1, momentum=0.9)
        return linear_of(group, loss, weight, bias, tile_update=sgd, sample=2)

    linear = made(world, 2.0, weight[:5])
    for _ in range(2):
        linear(x[own_rows(world)], target[own_rows(world)].clamp(max=4)).backward()
    dcp.save(linear.state_dict(), checkpoint_id=folder / "stepping")
    whole = lambda value: value.full_tensor() if isinstance(value, DTensor) else value
    saved_state = {name: whole(value) for name, value in linear.state_dict().items()}
    assert saved_state["update.momentum_buffer"].any() and saved_state["sampler._extra_state"]["count"] == 2
    for ranks in (3, 2, 1):
        if dist.get_rank() < ranks:
            other = made(GROUPS[ranks], 9.0, torch.zeros_like(weight[:5]))
            state = other.state_dict()
            dcp.load(state, checkpoint_id=folder / "stepping", process_group=GROUPS[ranks])
            other.load_state_dict(state)
            found = {name: whole(value) for name, value in other.state_dict().items()}
            torch.testing.assert_close(found, saved_state, rtol=0, atol=0)
        dist.barrier()


GROUPS: dict[int, dist.ProcessGroup] = {}
SCENES: list[Callable[[dist.ProcessGroup], None]] = [
    every_loss, statistics, batches_of_nothing, compacted, gathered_by_its_own_wrap, half_precision, averaged_backbones,
    stepping_in_tiles, sampled, lost_late, recomputed, copied_and_compiled, sharded_tensors, errors_everywhere,
    best_classes, bytes_as_promised, from_one_device,
    *vocabulary_scenes.SCENES, *training_scenes.SCENES,
]  # fmt: skip


def scenes(rank: int, folder: str) -> None:
    world, alone = dist.group.WORLD, dist.new_group([0])
    for scene in SCENES:
        scene(world)
    weight_scenes.files(world, Path(folder))
    weight_scenes.refused(world, Path(folder))
    if dist.get_world_size() == 2 and rank == 0:
        for scene in (statistics, recomputed, best_classes, training_scenes.twenty_steps):
            scene(alone)
        weight_scenes.files(alone, Path(folder))
        weight_scenes.refused(alone, Path(folder))


@pytest.mark.parametrize("ranks", [2, 3, RANKS])
def test_ranks(ranks: int, tmp_path: Path) -> None:
    processes.run(scenes, ranks, str(tmp_path))


def between_ranks(_: int, folder: str) -> None:
    for ranks in (1, 2, 3, RANKS):
        GROUPS[ranks] = dist.new_group(list(range(ranks)))
    checkpoints(Path(folder) / "checkpoint")
    weight_scenes.exported(GROUPS, Path(folder))
    pairs = [dist.new_group([0, other]) for other in (1, 2, 3, 3)]
    training_scenes.lost_ranks(dict(zip((1, 2, 3), pairs, strict=False)), pairs[3])


def test_other_numbers_of_ranks_and_lost_ones(tmp_path: Path) -> None:
    processes.run(between_ranks, RANKS, str(tmp_path))


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 13.0, 20.0, math.inf])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_clipping_plain_gradients_is_torchs(max_norm: float, norm_type: float) -> None:
    ours, theirs = ([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))] for _ in range(2))
    for parameter, gradient in zip(ours + theirs, 2 * [[3.0, 4.0], [12.0]], strict=True):
        parameter.grad = torch.tensor(gradient)
    wanted = nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    assert torch.equal(clip_grad_norm_(ours, max_norm, norm_type), wanted)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=0)
    for wrong in ({"max_norm": -1.0}, {"max_norm": 1.0, "norm_type": 0.0}, {"max_norm": math.nan}):
        with pytest.raises(ValueError, match="max_norm must be >= 0 and norm_type > 0"):
            clip_grad_norm_(ours, **wrong)


def test_checksums_notice_changes() -> None:
    """Of large tensors too, which are read again only where they have changed."""
    for size in (5, 5000):
        tensor = torch.zeros(size)
        first = agreement.checksum(tensor)
        assert agreement.checksum(tensor.clone()) == first
        tensor[-1] = -0.0
        assert agreement.checksum(tensor) != first
        assert agreement.checksum(torch.zeros(size, dtype=torch.int32)) != first
        with torch.inference_mode():  # its tensors count no changes
            assert agreement.checksum(torch.zeros(size)) == first


@wire_scenes.linux
def test_bytes_of_eight_ranks() -> None:
    processes.run(wire_scenes.wire, 8)
