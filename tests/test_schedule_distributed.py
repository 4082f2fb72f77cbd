"""Two ranks: they decide alike, by the samples of both, and each keeps its own shards; losses with state agree."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from test_mils import Items, Network, X, Y, nan_loss, same
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mlkernels
from mlkernels.schedule import MILS, Snapshot

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
PRIMARY = mlkernels.CrossEntropyLoss()


def everywhere(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def own_rows(k: int) -> torch.Tensor:
    """Each rank has its own batches."""
    return torch.arange(12 * k, 12 * k + 12).mul(2).add(dist.get_rank()) % len(X)


def run(mils: MILS, iterations: int = 8) -> list[bool | None]:
    rows = map(own_rows, range(iterations))
    return [mils.step(X[row], Y[row]).accepted for row in rows]


def ranks_agree(rank: int) -> None:
    """Different global seeds; the same coins, disjoint samples, equal decisions and weights."""
    torch.manual_seed(rank)
    model = DistributedDataParallel(Network())
    dataset = Items()
    mils = MILS(model, torch.optim.Adam(model.parameters(), lr=0.05), primary=PRIMARY,
                auxiliary=mlkernels.MultiMarginLoss(), observation=(dataset, 33), participation=0.6)  # fmt: skip
    accepted = run(mils, 14)
    first, second = everywhere(accepted)
    assert first == second and {True, False, None} == set(first), first
    mine, other = everywhere(dataset.asked)
    attempts = sum(one is not None for one in accepted)
    assert len(mine) == 17 * attempts and len(other) == 16 * attempts
    assert len({*mine[:17], *other[:16]}) == 33
    first, second = everywhere([parameter.detach() for parameter in model.parameters()])
    assert same(first, second)


def counts_are_summed(rank: int) -> None:
    """Rank 0 alone would accept, rank 1 alone would not."""

    def to_class_0(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return -output[:, 0].mean()

    for losers, wanted in ((20, False), (5, True)):
        linear = nn.Linear(6, 4)
        nn.init.zeros_(linear.weight)
        linear.bias.data = torch.tensor([0.0, 1.0, 0.0, 0.0])
        model = DistributedDataParallel(linear)
        labels = torch.zeros(10).long() if rank == 0 else torch.ones(losers).long()
        mils = MILS(model, torch.optim.SGD(model.parameters(), lr=100.0), primary=PRIMARY, auxiliary=to_class_0,
                    observation=(X[: len(labels)].abs(), labels), participation=1.0)  # fmt: skip
        assert mils.step(X.abs(), Y).accepted is wanted


def one_rank_is_nan(rank: int) -> None:
    """One rank's loss, not its gradients: all reject and go on as if they had not tried; batch norm's too."""

    def make(participation: float) -> tuple[nn.Module, MILS]:
        torch.manual_seed(3)
        model = DistributedDataParallel(Network())
        torch.manual_seed(4 + rank)  # dropout

        def auxiliary(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return output.sum() + (torch.nan if rank == 1 else 0.0)

        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        return model, MILS(model, optimizer, primary=PRIMARY, auxiliary=auxiliary, accept="not_worse",
                           observation=(X, torch.full_like(Y, 99)), participation=participation)  # fmt: skip

    (model, mils), (other, never) = make(1.0), make(0.0)
    torch.manual_seed(4 + rank)
    assert run(mils, 4) == [False] * 4 and mils.statistics().non_finite == 4
    torch.manual_seed(4 + rank)
    run(never, 4)
    assert same(copy.deepcopy(model.state_dict()), other.state_dict())
    assert not same(*everywhere(list(Network().parameters())))  # the ranks' own randomness did differ


def generators_that_differ(rank: int) -> None:
    model = nn.Linear(6, 4)
    options = {"primary": PRIMARY, "auxiliary": nan_loss, "observation": (X, Y)}
    optimizer = torch.optim.SGD(model.parameters())
    MILS(model, optimizer, generator=torch.Generator().manual_seed(5), **options)
    with pytest.raises(ValueError, match="generator must be in the same state on all ranks"):
        MILS(model, optimizer, generator=torch.Generator().manual_seed(rank), **options)
    with pytest.raises(ValueError, match=r"observation must draw from 2 \(2 ranks\) to 96 samples, got 1"):
        MILS(model, optimizer, **(options | {"observation": (Items(), 1)}))
    # Ranks that train models of their own.
    groups = [dist.new_group([one]) for one in range(2)]
    alone = MILS(model, optimizer, process_group=groups[rank], **options, participation=1.0)
    if rank == 0:
        assert alone.step(X, Y).accepted is False


def accumulation_exchanges_once(rank: int) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    model = DistributedDataParallel(linear)
    exchanged = []

    def hook(state, bucket):  # DDP checks annotations, and does not know them as strings
        exchanged.append(1)
        return default_hooks.allreduce_hook(None, bucket)

    model.register_comm_hook(None, hook)
    mils = MILS(model, torch.optim.SGD(model.parameters(), lr=0.1), primary=PRIMARY, auxiliary=PRIMARY,
                observation=(X, Y), participation=0.0)  # fmt: skip
    rows = own_rows(0)
    mils.accumulate([(X[rows[:6]], Y[rows[:6]]), (X[rows[6:]], Y[rows[6:]])])
    assert len(exchanged) == 1
    plain = nn.Linear(6, 4)
    torch.manual_seed(0)
    plain.reset_parameters()
    both = torch.cat(everywhere(rows))
    loss = mlkernels.cross_entropy(plain(X[both]), Y[both])
    loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(linear.weight, plain.weight - 0.1 * plain.weight.grad)


def shards(rank: int) -> None:
    """FSDP2: a twin of each rank's shard, and gathered weights that a score leaves behind are dropped."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2,))

    def make(auxiliary: Any, participation: float) -> tuple[nn.Module, MILS]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        return model, MILS(model, optimizer, primary=PRIMARY, auxiliary=auxiliary, accept="not_worse",
                           observation=(X, torch.full_like(Y, 99)), participation=participation)  # fmt: skip

    (model, mils), (other, never) = make(nan_loss, 1.0), make(nan_loss, 0.0)
    assert run(mils, 4) == [False] * 4
    run(never, 4)
    for run_model in (model, other):
        run_model.reshard()
    mine, theirs = (
        [t._local_tensor if isinstance(t, DTensor) else t for t in m.state_dict().values()] for m in (model, other)
    )
    assert same(mine, theirs)
    with torch.no_grad():
        assert torch.equal(model(X), other(X))

    snapshot = Snapshot(model)
    with torch.no_grad():
        before = model(X)  # leaves the outer module gathered
    snapshot.save()
    held = everywhere(snapshot.nbytes)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert sum(held) == 2 * buffers + 4 * sum(parameter.numel() for parameter in model.parameters())
    for undo in (snapshot.restore, lambda: snapshot.restore_if(torch.tensor(True))):
        with torch.no_grad():
            for parameter in model.parameters():
                if isinstance(parameter, DTensor):
                    parameter._local_tensor.zero_()
            model(X)
            undo()
            assert torch.equal(model(X), before)

    accepted, keeper = make(mlkernels.FocalLoss(), 1.0)
    assert run(keeper, 3) == [True] * 3
    assert not same(
        [t._local_tensor for t in accepted[0].parameters()], [t._local_tensor for t in model[0].parameters()]
    )


# ---- losses with state -----------------------------------------------------------------------------------------------

ROWS = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([5, 6])  # the ranks'
PAIR = ROWS[0].tolist() + ROWS[1].tolist()


def centers_agree(rank: int) -> None:
    """Moved by the rows of all ranks, from rank 0's; or by the rank's own in a group of its own."""
    torch.manual_seed(rank)
    center = mlkernels.CenterLoss(num_features=6, num_classes=4, rate=0.5)
    if rank == 0:
        start = center.centers.clone()
    for _ in range(2):
        loss = center(X[ROWS[rank]], Y[ROWS[rank]])
    first, second = everywhere((center.centers, loss))
    assert torch.equal(first[0], second[0]) and first[1] != second[1]
    if rank == 0:
        wanted = start
        for _ in range(2):
            move = torch.zeros(4, 6)
            for k in range(4):
                rows = [row for row in PAIR if Y[row] == k]
                if rows:
                    move[k] = (wanted[k] - X[rows]).sum(0) / (1 + len(rows))
            wanted = wanted - 0.5 * move
        torch.testing.assert_close(center.centers, wanted)
    kept = center.centers.clone()
    x, y = X[ROWS[rank]], torch.where(torch.arange(len(ROWS[rank])) == 1, 4 * rank, Y[ROWS[rank]])
    error, words = ((RuntimeError, "failed on another rank"), (IndexError, "target 4 at row 1"))[rank]
    with pytest.raises(error, match=words):  # neither waits for the other
        center(x, y)
    assert torch.equal(center.centers, kept)

    center.eval()  # neither moves nor waits
    if rank == 0:
        center(X, Y)
    center.train()
    for change in (center.reset_parameters, lambda: center.load_state_dict({"centers": torch.randn(4, 6)})):
        torch.manual_seed(10 + rank)
        change()
        center(X[ROWS[rank]], Y[ROWS[rank]])
        assert torch.equal(*everywhere(center.centers))

    groups = [dist.new_group([one]) for one in range(2)]
    torch.manual_seed(0)
    alone = mlkernels.CenterLoss(num_features=6, num_classes=4, rate=0.5, process_group=groups[rank])
    alone(X[ROWS[rank]], Y[ROWS[rank]])
    assert not torch.equal(*everywhere(alone.centers))


def trained_losses_agree(rank: int) -> None:
    """Wrapped by DDP, as the page says: margins, scales and R1, R2 are equal, and those of the mean of the losses."""

    def make() -> tuple[nn.Module, list[nn.Module]]:
        torch.manual_seed(0)
        model = nn.Linear(6, 4)
        margin = nn.Parameter(torch.tensor(0.2))
        return model, [mlkernels.CosFaceLoss(margin=margin, scale=4.0), mlkernels.TwoScaleLoss(model, eta=0.1)]

    def value(model: nn.Module, losses: list[nn.Module], rows: torch.Tensor) -> torch.Tensor:
        logits = model(X[rows])
        return losses[0](logits / 10, Y[rows]) + losses[1](logits, Y[rows], model)

    model, losses = make()
    wrapped = DistributedDataParallel(model)
    joined = [DistributedDataParallel(loss) for loss in losses]
    parameters = [p for part in (wrapped, *joined) for p in part.parameters()]
    plain, own = make()
    others = [p for part in (plain, *own) for p in part.parameters()]
    for optimizer, step in (
        (torch.optim.SGD(parameters, lr=0.1), lambda: value(wrapped, joined, ROWS[rank])),
        (torch.optim.SGD(others, lr=0.1), lambda: sum(value(plain, own, rows) for rows in ROWS) / 2),
    ):
        for _ in range(3):
            optimizer.zero_grad()
            step().backward()
            optimizer.step()
    assert same(*everywhere([p.detach() for p in parameters]))
    torch.testing.assert_close(parameters, others)
    assert len(parameters) == 5 and not torch.equal(losses[0].margin, torch.tensor(0.2))


def norms_of_shards(rank: int) -> None:
    """fully_shard, in part, and on a mesh that replicates too; FullyShardedDataParallel's shards are refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 1), nn.Linear(1, 4, bias=False))

    factor = 1.0 + rank  # the ranks' losses differ
    whole = make()
    product = mlkernels.weight_norm_product(whole)
    (1.5 * product).backward()
    mesh = init_device_mesh("cpu", (2,))
    both = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    for each in (mesh, both):
        model = make()
        fully_shard(model[0], mesh=each)
        fully_shard(model[2], mesh=each)  # of one row: rank 1 has none
        with mlkernels.cached_weight_norm():
            found = mlkernels.weight_norm_product(model)
            assert mlkernels.weight_norm_product(model) == found
        torch.testing.assert_close(found, product)
        (factor * found).backward()
        for mine, wanted in zip(model.parameters(), whole.parameters(), strict=True):
            if isinstance(mine, DTensor):
                torch.testing.assert_close(mine.grad.full_tensor(), wanted.grad)
            elif wanted.grad is not None:
                torch.testing.assert_close(mine.grad, wanted.grad * factor / 1.5)  # left to the rank, as it always was
    zero = make()
    fully_shard(zero[0], mesh=mesh)
    with torch.no_grad():
        for parameter in zero[0].parameters():
            parameter.zero_()
    assert mlkernels.weight_norm_product(zero) == 0
    split = make()
    split[0].weight = nn.Parameter(distribute_tensor(split[0].weight.data, mesh, [Shard(1)]))
    split[2].weight = nn.Parameter(distribute_tensor(split[2].weight.data, mesh, [Replicate()]))
    torch.testing.assert_close(mlkernels.weight_norm_product(split, detach=True), product.detach())
    split[0].weight = nn.Parameter(DTensor.from_local(torch.ones(3, 5), mesh, [Partial()]))
    with pytest.raises(ValueError, match="model must hold whole or sharded parameters"):
        mlkernels.weight_norm_product(split)

    for keep in (True, False):
        model = FullyShardedDataParallel(make(), use_orig_params=keep, device_id=torch.device("cpu"))
        with pytest.raises(
            ValueError, match="model must be whole, got a Linear of which FullyShardedDataParallel shows"
        ):
            mlkernels.weight_norm_product(model)
        with FullyShardedDataParallel.summon_full_params(model):
            torch.testing.assert_close(mlkernels.weight_norm_product(model, detach=True), product.detach())


def a_loss_within_fully_shard(rank: int) -> None:
    """It takes no 0-d parameters: those of shape (1,) train as they would alone. Its logits are plain tensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    class Training(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = nn.Linear(6, 4)
            scale, margin = nn.Parameter(torch.tensor([4.0])), nn.Parameter(torch.tensor([0.1]))
            self.loss = mlkernels.CosFaceLoss(margin=margin, scale=scale)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.loss(self.model(X[rows]), Y[rows])

    mesh = init_device_mesh("cpu", (2,))
    sharded, plain = Training(), Training()
    fully_shard(sharded, mesh=mesh)
    sharded(ROWS[rank]).backward()
    (sum(plain(rows) for rows in ROWS) / 2).backward()
    for mine, wanted in zip(sharded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), wanted.grad)
    logits, target = (distribute_tensor(t[:8], mesh, [Shard(0)]) for t in (X[:, :4], Y))
    for function in (mlkernels.cross_entropy, mlkernels.multi_margin_loss):
        with pytest.raises(
            TypeError, match=r"input takes a plain tensor, got a DTensor .*to_local\(\) of input and target"
        ):
            function(logits, target)


SCENES: list[Callable[[int], None]] = [
    ranks_agree, counts_are_summed, one_rank_is_nan, generators_that_differ, accumulation_exchanges_once, shards,
    centers_agree, trained_losses_agree, norms_of_shards, a_loss_within_fully_shard,
]  # fmt: skip


def scenes(rank: int) -> None:
    for scene in SCENES:
        scene(rank)


def test_two_ranks() -> None:
    processes.run(scenes, 2)
