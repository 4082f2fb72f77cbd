"""Two ranks: they decide alike, by the samples of both, and each keeps its own shards."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

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


SCENES: list[Callable[[int], None]] = [
    ranks_agree, counts_are_summed, one_rank_is_nan, generators_that_differ, accumulation_exchanges_once, shards,
]  # fmt: skip


def scenes(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    # Ranks that disagree wait for each other.
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=45))
    try:
        for scene in SCENES:
            scene(rank)
    finally:
        dist.destroy_process_group()


def test_two_ranks() -> None:
    """All scenes in one pair of processes: starting them takes longer than they do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(scenes, args=(port,), nprocs=2)
