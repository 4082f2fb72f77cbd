"""Candidates over the ranks of torch.distributed: what one process does, to the bit."""

import copy
import os
import socket
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_search import adam, network, reward, same, seeded, state_of, the_search, train
from torch import nn

from mlkernels.search import ranks as ranks_module
from mlkernels.search.ranks import Ranks

WORLD = 3


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


# ---- what the ranks do, each in a function that all of them run ------------------------------------------------------


def equal_to_one_process(rank, group):
    """Also where a rank has no candidate (2 for 3), and its optimizer's state is born of another's."""
    assert "matplotlib" not in sys.modules, "needed by those only who plot"
    for optimizer_of, candidates, population in ((adam, 2, 1), (sgd, 5, 1), (adam, 4, 2)):
        results = []
        for process_group in (group, None):
            model = network()
            if process_group is not None and rank > 0:
                with torch.no_grad():
                    model[0].weight.mul_(rank)  # rank 0's counts
            optimizer = optimizer_of(model)
            where = [parameter.data_ptr() for parameter in model.parameters()]
            # Of the ranks rank 0's generator counts.
            search = the_search(candidates=candidates, generator=seeded(0 if process_group is None else rank))
            search.run(model, optimizer, train, reward, epochs=2, population=population, process_group=process_group)
            assert [parameter.data_ptr() for parameter in model.parameters()] == where
            results.append((state_of(model, optimizer), search.record))
        (state, record), (alone, of_one) = results
        if population == 1:
            assert same(state, alone), (optimizer_of, candidates)
            assert torch.equal(record.rewards, of_one.rewards)
            assert torch.equal(record.mu, of_one.mu)
        assert len(record.best.unique()) > 1 or record.best[0] != 0, "a weak test otherwise"
        everyone = [None] * WORLD
        dist.all_gather_object(everyone, (state, record.to_json()), group=group)
        assert all(same(other[0], state) and other[1] == record.to_json() for other in everyone)


def one_rank_fails(rank, group):
    """All raise, and nothing has changed anywhere."""

    def failing(model, optimizer, loss):
        train(model, optimizer, loss)
        if rank == 1:
            raise ZeroDivisionError("one too many")

    model = network()
    optimizer, search = adam(model), the_search(generator=seeded(rank))
    before, drawn = state_of(model, optimizer), search.generator.get_state()
    with pytest.raises(ZeroDivisionError if rank == 1 else RuntimeError, match="one too many") as raised:
        search.step(model, optimizer, failing, reward, process_group=group)
    if rank != 1:
        assert "rank 1 failed: ZeroDivisionError: one too many" in str(raised.value)
    assert same(state_of(model, optimizer), before)
    assert torch.equal(search.generator.get_state(), drawn)
    assert search.epoch == 0
    with pytest.raises(ValueError, match="every candidate failed"):
        search.step(model, optimizer, train, lambda model: float("nan"), process_group=group)
    assert same(state_of(model, optimizer), before)


def searches_that_differ(rank, group):
    model = network()
    search = the_search(candidates=4 if rank == 2 else 5)
    with pytest.raises(ValueError if rank == 2 else RuntimeError, match="searches of all ranks must be alike"):
        search.step(model, adam(model), train, reward, process_group=group)
    search = the_search()
    if rank == 0:  # a checkpoint that the others did not load
        search.update(search.sample(), [1.0, 2.0, 3.0, 4.0])
    with pytest.raises(ValueError if rank else RuntimeError, match="load a checkpoint on every rank"):
        search.step(model, adam(model), train, reward, process_group=group)


def state_travels(rank, group):
    """Every dtype and layout, in buckets of a few numbers, in place, to the bit; and what is no tensor."""
    ranks_module._BUCKET = 64
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last))
    model.brief = nn.Parameter(torch.randn(7, dtype=torch.bfloat16))
    model.tied = model.weight
    for name, dtype in (("whole", torch.long), ("flag", torch.bool), ("wide", torch.float64)):
        model.register_buffer(name, torch.randint(2, (5,)).to(dtype), persistent=name != "wide")
    model.register_buffer("count", torch.tensor(rank))
    model.register_buffer("none", torch.empty(0, 3))
    optimizer = torch.optim.Adam([{"params": [model.weight]}, {"params": [model.brief], "lr": 0.1 * (rank + 1)}])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(rank):  # rank 0 has no state, rank 1 less than rank 2
        model.weight.grad, model.brief.grad = torch.randn_like(model.weight), torch.randn_like(model.brief)
        if rank == 1:
            model.brief.grad = None
        optimizer.step()
        scheduler.step()
    if rank == 2:
        model.wide[0] = float("nan")
        optimizer.param_groups[1]["note"] = "of one rank"
    parts = model, optimizer, scheduler
    for source in (0, 2, 1):
        wanted = [None] * WORLD
        mine = [state_of(model, optimizer), model.wide.view(torch.long).tolist(), scheduler.state_dict()]
        dist.all_gather_object(wanted, mine, group=group)
        where = [tensor.data_ptr() for tensor in (model.weight, model.brief, model.whole, model.wide)]
        Ranks(group).broadcast_state(parts, source)
        got = [state_of(model, optimizer), model.wide.view(torch.long).tolist(), scheduler.state_dict()]
        assert same(got[0], wanted[source][0])
        assert got[1:] == wanted[source][1:]
        assert where == [tensor.data_ptr() for tensor in (model.weight, model.brief, model.whole, model.wide)]
        assert model.weight.is_contiguous(memory_format=torch.channels_last)
        assert len(optimizer.state) == len(copy.deepcopy(optimizer).state)
        # They are apart again, and train on.
        with torch.no_grad():
            model.brief.add_(rank)
        optimizer.step()


def what_is_refused(rank, group):
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=group)
    with pytest.raises(TypeError, match=r"model must not be wrapped .* give model.module"):
        the_search().step(wrapped, adam(model), train, reward, process_group=group)
    pair = dist.new_group([0, 1])
    if rank == 2:
        with pytest.raises(ValueError, match="process_group must hold this process"):
            the_search().step(model, adam(model), train, reward, process_group=pair)
    else:
        search = the_search()
        assert search.step(model, adam(model), train, reward, process_group=pair).epoch == 0


SCENARIOS = [equal_to_one_process, one_rank_fails, searches_that_differ, state_travels, what_is_refused]


def work(rank, port, directory):
    """One rank: every scenario in turn, since a process takes seconds to start."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    for scenario in SCENARIOS:
        torch.default_generator.manual_seed(rank)
        try:
            scenario(rank, dist.group.WORLD)
            outcome = ""
        except BaseException:
            outcome = traceback.format_exc()
        (directory / f"{scenario.__name__} {rank}").write_text(outcome)
        if outcome:
            break  # the ranks are out of step
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """A directory with a file per scenario and rank: how it failed, or empty."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    directory, context = tmp_path_factory.mktemp("ranks"), mp.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, port, directory), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    return directory


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_ranks(outcomes, scenario):
    for rank in range(WORLD):
        outcome = outcomes / f"{scenario} {rank}"
        assert outcome.exists(), f"rank {rank} did not finish"
        assert outcome.read_text() == "", f"rank {rank}"


def test_without_a_group():
    with pytest.raises(ValueError, match=r"process_group needs torch\.distributed\.init_process_group first"):
        Ranks(object())
    alone = Ranks(None)
    assert alone.collect(lambda: 3) == [3]
    assert alone.broadcast(4) == 4
