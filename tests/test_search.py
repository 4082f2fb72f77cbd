"""The search for a loss: its distribution, its epochs, what it keeps and what it refuses."""

import copy
import io
import json
import math
import struct
import time
import warnings

import pytest
import torch
from torch import nn

import mlkernels
from mlkernels.search import LossSearch, Record, loss_search, plot
from mlkernels.search.record import ROWS as TABLES

F64 = torch.float64
ROWS, FEATURES, CLASSES = 24, 5, 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def data(dtype=F64):
    x = torch.randn(ROWS, FEATURES, generator=seeded(1), dtype=dtype)
    return x, (x[:, :CLASSES] + 0.5 * x[:, -CLASSES:]).argmax(1)


def network(dtype=F64):
    """With buffers and randomness of its own."""
    torch.default_generator.manual_seed(3)
    layers = nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, CLASSES)
    return nn.Sequential(*layers).to(dtype)


def train(model, optimizer, loss):
    x, y = data()
    model.train()
    for rows in torch.randperm(ROWS).split(8):
        optimizer.zero_grad()
        loss(model(x[rows]), y[rows]).backward()
        optimizer.step()


def reward(model):
    x, y = data()
    # As good for one model as for a population.
    return model(x).log_softmax(-1)[..., range(ROWS), y].mean(-1)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def state_of(model, optimizer):
    """Everything, as a flat list of tensors and values."""
    found = [*model.state_dict().values()]
    for state in optimizer.state_dict()["state"].values():
        found += [state[key] for key in sorted(state)]
    groups = optimizer.state_dict()["param_groups"]
    return copy.deepcopy(found + [group[key] for group in groups for key in sorted(group)])


def same(one, other):
    """Equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def the_search(**options):
    return LossSearch(**({"pieces": 3, "candidates": 4, "generator": seeded(7)} | options))


# ---- the distribution ------------------------------------------------------------------------------------------------


def test_it_starts_at_the_identity():
    search = LossSearch()
    assert search.mu.shape == (4, 6)
    x, y = torch.randn(8, 5), torch.randint(5, (8,))
    torch.testing.assert_close(search.loss()(x, y), nn.functional.cross_entropy(x, y))
    assert search.record.candidates == 32
    assert (search.record.sigma, search.record.lr) == (0.2, 0.05)


def test_samples_are_normal_around_the_mean():
    search = LossSearch(pieces=5, candidates=4000, sigma=0.3, generator=seeded())
    theta = search.sample()
    assert theta.shape == (4000, 4, 5)
    assert theta.dtype == F64
    z = (theta - search.mu) / 0.3
    assert z.mean(0).abs().max() < 0.07
    assert (z.std(0) - 1).abs().max() < 0.05
    covariance = torch.corrcoef(z.flatten(1).T) - torch.eye(20)
    assert covariance.abs().max() < 0.08


def test_the_generator_decides():
    one, other = (the_search(generator=seeded(5)) for _ in range(2))
    assert torch.equal(one.sample(), other.sample())
    assert not torch.equal(one.sample(), the_search(generator=seeded(6)).sample())
    torch.default_generator.manual_seed(1)
    first = LossSearch().sample()
    torch.default_generator.manual_seed(1)
    assert torch.equal(first, LossSearch().sample()), "without one it comes from torch's own"


@pytest.mark.parametrize(("part", "rows"), [("both", (0, 1, 2, 3)), ("t", (0, 1)), ("tau", (2, 3))])
def test_what_is_not_searched_stays(part, rows):
    search = the_search(search=part)
    for _ in range(3):
        theta = search.sample()
        moved = (theta != search.record.mu[0]).any(-1).any(0)
        assert moved.nonzero().flatten().tolist() == list(rows)
        search.update(theta, theta.sum((1, 2)))
    drift = (search.mu != search.record.mu[0]).all(-1)
    assert drift.nonzero().flatten().tolist() == list(rows)
    loss = search.loss(theta[0])
    names = ("t_slope", "t_bias", "tau_slope", "tau_bias")
    assert [getattr(loss, name) is not None for name in names] == [i in rows for i in range(4)]


def test_update_is_the_formula():
    """Against loops over candidates, and Adam written down."""
    sigma, lr, count, pieces = 0.25, 0.03, 5, 2
    search = LossSearch(pieces, count, sigma, lr, seeded(2))
    mean, first, second = search.mu, torch.zeros(4, pieces, dtype=F64), torch.zeros(4, pieces, dtype=F64)
    for step in range(1, 4):
        theta = search.sample()
        rewards = [float(i * i % 7) / step for i in range(count)]
        average = sum(rewards) / count
        deviation = math.sqrt(sum((r - average) ** 2 for r in rewards) / count) + 1e-8
        gradient = torch.zeros(4, pieces, dtype=F64)
        for candidate, r in zip(theta, rewards, strict=True):
            gradient += (r - average) / deviation * (candidate - mean) / sigma**2 / count
        first = 0.9 * first + 0.1 * -gradient
        second = 0.999 * second + 0.001 * gradient**2
        mean = mean - lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        found = search.update(theta, rewards)
        torch.testing.assert_close(search.mu, mean, rtol=1e-12, atol=1e-13)
        assert found.epoch == step - 1
        assert torch.equal(found.mu, search.mu)
        assert torch.equal(found.theta, theta)
        assert found.rewards.tolist() == rewards
    assert search.record.mu.shape == (4, 4, pieces)


def test_it_finds_what_is_rewarded():
    """Rewards that fall with the distance from a point pull the mean there."""
    search = LossSearch(4, 64, generator=seeded(), lr=0.02)
    aim = search.mu + 0.3
    for _ in range(100):
        theta = search.sample()
        search.update(theta, -(theta - aim).square().sum((1, 2)))
    assert (search.mu - aim).abs().max() < 0.12


@pytest.mark.parametrize(
    ("rewards", "best"),
    [
        ([0.1, 0.3, 0.3, 0.2], 1),
        ([0.3, 0.3, 0.3, 0.3], 0),
        ([math.nan, 0.1, 0.2, 0.2], 2),
        ([math.inf, 0.1, -math.inf, 0.1], 1),
    ],
)
def test_the_winner(rewards, best):
    search = the_search()
    assert search.update(search.sample(), rewards).best == best


@pytest.mark.parametrize("value", [0.1, 0.7, 1e9 / 3])
@pytest.mark.parametrize("count", [3, 4, 33])
def test_equal_rewards_move_nothing(value, count):
    """Exactly, although their mean is rounded: Adam would blow a rounding error up to a step."""
    search = the_search(candidates=count)
    search.update(search.sample(), [value] * count)
    assert torch.equal(search.mu, search.record.mu[0])


def test_equal_rewards_after_others_leave_the_momentum():
    search = the_search()
    search.update(search.sample(), [0.1, 0.2, 0.3, 0.4])
    step = search.mu - search.record.mu[0]
    search.update(search.sample(), [0.5] * 4)
    more = search.mu - search.record.mu[1]
    # Adam: m̂ and v̂ after a gradient and a zero.
    wanted = step * (0.09 / 0.19) / math.sqrt(0.999 * 0.001 / (1 - 0.999**2))
    torch.testing.assert_close(more, wanted, rtol=1e-5, atol=1e-9)


def test_failed_candidates_count_as_the_worst():
    one, other = the_search(), the_search()
    theta = one.sample()
    one.update(theta, [math.nan, 0.5, -math.inf, 0.2])
    other.update(theta, [0.2, 0.5, 0.2, 0.2])
    assert torch.equal(one.mu, other.mu)
    assert math.isnan(one.record.rewards[0, 0])


def test_random_search_never_moves():
    search = the_search(lr=0.0)
    for _ in range(3):
        theta = search.sample()
        search.update(theta, theta.sum((1, 2)))
    assert torch.equal(search.mu, search.record.mu[0])


@pytest.mark.parametrize(
    ("theta", "rewards", "says"),
    [
        ((4, 4, 3), [math.nan] * 4, "every candidate failed"),
        ((4, 4, 2), [1.0, 2.0, 3.0, 4.0], r"theta must be \(B, 4, M\) = \(4, 4, 3\), got \(4, 4, 2\)"),
        ((4, 4, 3), [1.0, 2.0, 3.0], r"rewards must be \(B,\) = \(4,\), got \(3,\)"),
    ],
)
def test_update_refuses(theta, rewards, says):
    search = the_search()
    with pytest.raises(ValueError, match=says):
        search.update(torch.ones(theta), rewards)
    assert search.epoch == 0
    assert torch.equal(search.mu, search.record.mu[0])


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"pieces": 0}, ValueError, "pieces must be an integer >= 1, got 0"),
        ({"pieces": True}, TypeError, "pieces takes an int, got bool"),
        ({"candidates": 1}, ValueError, "candidates must be an integer >= 2, got 1"),
        ({"candidates": 2.0}, TypeError, "candidates takes an int, got float"),
        ({"sigma": 0.0}, ValueError, "sigma must be > 0, got 0.0"),
        ({"sigma": math.nan}, ValueError, "sigma must be > 0, got nan"),
        ({"sigma": "wide"}, TypeError, "sigma takes a number, got str"),
        ({"lr": -0.1}, ValueError, "lr must be >= 0, got -0.1"),
        ({"bins": 3}, TypeError, r"LossSearch\(\) takes no 'bins'; there are pieces, candidates, .*clamp, weight, "),
        ({"tau_min": 0.0}, ValueError, r"tau_min must be in \(0, 1\], got 0.0"),
        ({"search": "everything"}, ValueError, "search must be one of 'both', 't', 'tau', got 'everything'"),
        ({"generator": 3}, TypeError, "generator takes a torch.Generator, got int"),
        ({"clamp": "never"}, ValueError, "clamp"),
        ({"scale": 0.0}, ValueError, "scale must be > 0, got 0.0"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_settings(options, error, says):
    with pytest.raises(error, match=says):
        the_search(**options)


def test_losses_have_the_options():
    search = the_search(scale=4.0, label_smoothing=0.1, ignore_index=2, clamp="cross_entropy", tau_min=0.05)
    theta, (x, y) = search.sample(), data(torch.float32)
    for candidate in theta:
        wanted = mlkernels.piecewise_cross_entropy(
            x[:, :3], y, **dict(zip(TABLES, candidate.float(), strict=True)), scale=4.0, label_smoothing=0.1,
            ignore_index=2, clamp="cross_entropy", tau_min=0.05,
        )  # fmt: skip
        assert torch.equal(search.loss(candidate)(x[:, :3], y), wanted)
    with pytest.raises(ValueError, match=r"theta must be \(4, 3\) or \(G, 4, 3\), got \(3, 4\)"):
        search.loss(torch.ones(3, 4))


# ---- an epoch --------------------------------------------------------------------------------------------------------


def by_hand(search, model, optimizer_of, one_epoch, epochs):
    """The same search over copies of everything."""
    optimizer = optimizer_of(model)
    for _ in range(epochs):
        seed = int(torch.randint(2**63 - 1, (), generator=search.generator))
        theta, outcomes = search.sample(), []
        for candidate in theta:
            twin = copy.deepcopy(model)
            its = optimizer_of(twin)
            its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            torch.default_generator.manual_seed(seed)
            one_epoch(twin, its, search.loss(candidate))
            twin.eval()
            outcomes.append((reward(twin).item(), twin, its))
        best = search.update(theta, [outcome[0] for outcome in outcomes]).best
        _, model, optimizer = outcomes[best]
    return model, optimizer


@pytest.mark.parametrize("kind", ["Adam", "SGD", "LBFGS"])
def test_one_after_another(kind):
    """To the bit what a loop over copies does: parameters, buffers, optimizer state, mean, rewards."""

    def optimizer_of(model):
        if kind == "LBFGS":
            return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=1)
        options = {"momentum": 0.9} if kind == "SGD" else {}
        return getattr(torch.optim, kind)(model.parameters(), lr=0.02, weight_decay=0.1, **options)

    def one_epoch(model, optimizer, loss):
        if kind != "LBFGS":
            return train(model, optimizer, loss)
        x, y = data()
        model.train()

        def closure():
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            return value

        return optimizer.step(closure)

    wanted, got = the_search(), the_search()
    twin, model = network(), network()
    twin, its = by_hand(wanted, twin, optimizer_of, one_epoch, 3)
    optimizer = optimizer_of(model)
    before = torch.get_rng_state()
    record = got.run(model, optimizer, one_epoch, reward, epochs=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(state_of(model, optimizer), state_of(twin, its))
    assert torch.equal(got.mu, wanted.mu)
    assert torch.equal(record.rewards, wanted.record.rewards)
    assert len(set(record.rewards.flatten().tolist())) == record.rewards.numel(), "a weak test otherwise"
    assert record.best.max() < 3 or record.best.min() < 3, "or if the last candidate always wins"
    assert reward(model.eval()).item() == record.rewards[-1].max()


def test_every_candidate_starts_alike():
    model, seen = network(), []
    optimizer = adam(model)
    model[1].eval()  # frozen statistics
    model[0].weight.requires_grad_(False)

    def watch(model, optimizer, loss):
        order = torch.randperm(1000)
        seen.append((state_of(model, optimizer), order, [p.grad is None for p in model.parameters()]))
        assert [module.training for module in model] == [True, False, True, True, True]
        assert loss.tau_slope is not None
        train(model, optimizer, loss)

    search = the_search(candidates=3)
    search.run(model, optimizer, watch, reward, epochs=2)
    for epoch in (0, 1):
        first, *others = seen[3 * epoch : 3 * epoch + 3]
        for other in others:
            assert same(first[0], other[0])
            assert torch.equal(first[1], other[1])
        assert all(first[2])
    assert len(seen[0][0]) < len(seen[3][0]), "Adam's state is there from the second epoch on only"
    assert not torch.equal(seen[0][1], seen[3][1]), "another epoch, another order"
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rewards_are_taken_in_evaluation_without_gradients():
    model = network()

    def look(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        return 1.0

    the_search().step(model, adam(model), train, look)
    assert model.training


def test_extras_are_put_back_too():
    """A trained scale of another loss, a scheduler stepped by the epoch's batches."""
    model, scaled = network(), mlkernels.CrossEntropyLoss(scale=nn.Parameter(torch.tensor(2.0, dtype=F64)))
    optimizer = torch.optim.SGD([*model.parameters(), *scaled.parameters()], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    seen = []

    def both(model, optimizer, loss):
        seen.append((scaled.scale.item(), scheduler.last_epoch, optimizer.param_groups[0]["lr"]))
        x, y = data()
        optimizer.zero_grad()
        output = model(x)
        (loss(output, y) + scaled(output, y)).backward()
        optimizer.step()
        scheduler.step()

    search = the_search()
    search.run(model, optimizer, both, reward, epochs=2, extras=(scaled, scheduler))
    assert len(set(seen[:4])) == 1
    assert len(set(seen[4:])) == 1
    assert seen[0] != seen[4]
    assert seen[4][1:] == (1, 0.05)
    assert (scheduler.last_epoch, optimizer.param_groups[0]["lr"]) == (2, 0.025)


@pytest.mark.parametrize("population", [1, 3])
@pytest.mark.parametrize("where", ["train", "reward", "all NaN", "interrupt"])
def test_after_an_error_nothing_has_changed(where, population):
    model = network()
    optimizer = adam(model)
    search = the_search()
    search.run(model, optimizer, train, reward, epochs=1, population=population)
    model[1].eval()
    before, mean = state_of(model, optimizer), search.mu
    generators = torch.get_rng_state(), search.generator.get_state()
    calls = []

    def failing_train(model, optimizer, loss):
        train(model, optimizer, loss)
        calls.append(1)
        if len(calls) == 2 and where in ("train", "interrupt"):
            raise KeyboardInterrupt if where == "interrupt" else RuntimeError("the disk is full")

    def failing_reward(model):
        if where == "reward" and len(calls) == 2:
            raise RuntimeError("the disk is full")
        return torch.full_like(reward(model), math.nan if where == "all NaN" else 1.0)

    error = {"all NaN": ValueError, "interrupt": KeyboardInterrupt}.get(where, RuntimeError)
    with pytest.raises(error):
        search.step(model, optimizer, failing_train, failing_reward, population=population)
    assert len(calls) == (2 if where != "all NaN" or population == 3 else 4)
    assert same(state_of(model, optimizer), before)
    assert torch.equal(search.mu, mean)
    assert search.epoch == 1
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert torch.equal(search.generator.get_state(), generators[1])
    assert model.training and not model[1].training
    assert all(parameter.grad is None for parameter in model.parameters())
    # And it goes on as if it had never been tried.
    again, its = copy.deepcopy(model), adam(model)
    its = adam(again)
    its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other = the_search()
    other.load_state_dict(search.state_dict())
    search.step(model, optimizer, train, reward, population=population)
    other.step(again, its, train, reward, population=population)
    assert same(state_of(model, optimizer), state_of(again, its))


def test_a_candidate_that_diverges():
    """NaN in its parameters is gone with it."""
    model, calls = network(), []

    def diverge(model, optimizer, loss):
        calls.append(1)
        train(model, optimizer, loss)
        if len(calls) in (1, 3):
            with torch.no_grad():
                model[0].weight.fill_(math.nan)

    search = the_search()
    found = search.step(model, adam(model), diverge, reward)
    assert found.rewards.isfinite().tolist() == [False, True, False, True]
    assert found.best in (1, 3)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("population", [1, 2, 4])
def test_of_equal_rewards_the_first_model_goes_on(population):
    model, twin = network().eval(), network()
    model[3], twin[3] = nn.Identity(), nn.Identity()  # a population draws masks of its own
    search = the_search()
    search.step(model, adam(model), train, lambda model: torch.ones(getattr(model, "size", 1)), population=population)
    generator = seeded(7)
    torch.default_generator.manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))
    train(twin, adam(twin), search.loss(search.record.theta[0, 0]))
    for one, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


class Stranger:
    """No state_dict."""


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"model": 3}, TypeError, "model takes an nn.Module, got int"),
        ({"optimizer": 3}, TypeError, "optimizer takes a torch.optim.Optimizer, got int"),
        ({"train": None}, TypeError, "train takes a function, got NoneType"),
        ({"reward": 0.3}, TypeError, "reward takes a function, got float"),
        ({"reward": lambda m: None}, TypeError, "reward must return a number per model, got NoneType"),
        ({"reward": lambda m: [1.0, 2.0]}, ValueError, r"reward must return one number, got shape \(2,\)"),
        ({"population": 0}, ValueError, "population must be an integer >= 1, got 0"),
        ({"extras": [Stranger()]}, TypeError, r"extras\[0\] must have a state_dict, got Stranger"),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2, 3))], lr=0.1)},
            ValueError,
            r"optimizer holds parameters of \[\(2, 3\)\] that are neither the model's",
        ),
        ({"population": 2, "extras": [nn.Linear(1, 1)]}, ValueError, "extras are for candidates one after another"),
        ({"population": 2, "reward": lambda m: 1.0}, ValueError, "must return 2 numbers, one for each model"),
        ({"epochs": 0}, ValueError, "epochs must be an integer >= 1, got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments(arguments, error, says):
    model = network()
    search = the_search()
    drawn = search.generator.get_state()
    usual = {"model": model, "optimizer": adam(model), "train": train, "reward": reward, "epochs": 1}
    with pytest.raises(error, match=says):
        search.run(**(usual | arguments))
    assert torch.equal(search.generator.get_state(), drawn)
    assert search.epoch == 0


def test_callback_and_epochs_in_all():
    model, seen = network(), []
    optimizer, search = adam(model), the_search(candidates=2)
    search.run(model, optimizer, train, reward, epochs=2, callback=seen.append)
    search.run(model, optimizer, train, reward, epochs=3, callback=seen.append)
    assert [round.epoch for round in seen] == [0, 1, 2]
    assert search.epoch == 3
    assert seen[1] is search.record.rounds[1]


def test_progress(capsys, monkeypatch):
    model = network()

    def slow_train(*arguments):
        time.sleep(0.06)  # tqdm draws ten times a second

    the_search(progress=True).step(model, adam(model), slow_train, reward)
    shown = capsys.readouterr().err
    assert "epoch 1" in shown and "best -" in shown
    assert "2/4" in shown or "3/4" in shown or "4/4" in shown
    for search in (the_search(progress=False), the_search()):  # nobody watches
        search.step(model, adam(model), train, reward)
        assert capsys.readouterr().err == ""
    monkeypatch.setattr(loss_search, "find_spec", lambda name: None)
    the_search().step(model, adam(model), train, reward)
    with pytest.raises(ImportError, match="progress=True needs tqdm"):
        the_search(progress=True)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("population", [1, 4])
def test_resume_to_the_bit(population):
    def run(search, model, optimizer, epochs):
        search.run(model, optimizer, train, reward, epochs=epochs, population=population)

    model = network()
    optimizer, search = adam(model), the_search()
    run(search, model, optimizer, 2)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "search": search.state_dict()}, file)
    run(search, model, optimizer, 4)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = nn.Sequential(*copy.deepcopy([*network()]))
    its, other = adam(again), the_search(generator=seeded(99))
    torch.default_generator.manual_seed(1234)
    again.load_state_dict(saved["model"])
    its.load_state_dict(saved["optimizer"])
    other.load_state_dict(saved["search"])
    assert other.epoch == 2
    run(other, again, its, 4)
    assert same(state_of(model, optimizer), state_of(again, its))
    assert torch.equal(search.record.mu, other.record.mu)
    assert search.record.to_json() == other.record.to_json()


def test_state_is_a_copy():
    search = the_search()
    search.update(search.sample(), [1.0, 2.0, 3.0, 4.0])
    state = search.state_dict()
    kept = copy.deepcopy(state)
    other = the_search()
    other.load_state_dict(state)
    for either in (search, other):
        either.update(either.sample(), [4.0, 2.0, 3.0, 1.0])
    assert torch.equal(state["mu"], kept["mu"])
    assert torch.equal(state["adam"]["state"][0]["exp_avg"], kept["adam"]["state"][0]["exp_avg"])
    assert torch.equal(search.mu, other.mu)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pieces": 4}, "state must be of a search with pieces=3, got pieces=4"),
        ({"candidates": 8}, "state must be of a search with candidates=4, got candidates=8"),
        ({"sigma": 0.1}, "with sigma=0.2, got sigma=0.1"),
        ({"lr": 0.1}, "with lr=0.05, got lr=0.1"),
        ({"search": "t"}, "with search='both', got search='t'"),
        ({"clamp": "cross_entropy"}, "with clamp='min', got clamp='cross_entropy'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_resuming_with_other_settings(change, says):
    search, other = the_search(), the_search(**change, generator=seeded(9))
    other.update(other.sample(), range(other.record.candidates))
    drawn = search.generator.get_state()
    with pytest.raises(ValueError, match=says):
        search.load_state_dict(other.state_dict())
    assert search.epoch == 0
    assert torch.equal(search.mu, search.record.mu[0])
    assert torch.equal(search.generator.get_state(), drawn)


def test_damaged_states():
    search = the_search()
    search.update(search.sample(), [1.0, 2.0, 3.0, 4.0])
    mean, state = search.mu, search.state_dict()
    damaged = [
        ({k: v for k, v in state.items() if k != "adam"}, "got one without adam"),
        ({}, "got one without pieces"),
        (state | {"mu": state["mu"][:1]}, r"mu of state must be a tensor of \(2, 4, 3\), got \(1, 4, 3\)"),
        (state | {"theta": [1, 2]}, "theta of state must be a tensor of"),
        (state | {"adam": {"state": {}, "param_groups": []}}, "parameter group"),
    ]
    for bad, says in damaged:
        with pytest.raises(ValueError, match=says):
            search.load_state_dict(bad)
    with pytest.raises((RuntimeError, TypeError)):
        search.load_state_dict(state | {"generator": torch.zeros(3, dtype=torch.uint8)})
    assert torch.equal(search.mu, mean)
    assert search.epoch == 1
    other = the_search()
    other.load_state_dict(state)
    theta = search.sample()
    assert torch.equal(theta, other.sample())
    for either in (search, other):
        either.update(theta, [3.0, 1.0, 2.0, 0.0])
    assert torch.equal(search.mu, other.mu)


# ---- the record ------------------------------------------------------------------------------------------------------


def searched(epochs=3, **options):
    search = the_search(**options)
    for epoch in range(epochs):
        theta = search.sample()
        rewards = -theta.square().sum((1, 2))
        rewards[epoch % 4] = (math.nan, math.inf, -math.inf, 0.0)[epoch % 4]
        search.update(theta, rewards)
    return search


def test_json():
    record = searched().record
    text = record.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    other = Record.from_json(text)
    assert torch.equal(record.mu, other.mu)
    assert torch.equal(record.theta, other.theta)
    assert torch.equal(record.best, other.best)
    torch.testing.assert_close(record.rewards, other.rewards, equal_nan=True, rtol=0, atol=0)
    assert other.to_json() == text
    assert (other.pieces, other.candidates, other.search) == (3, 4, "both")
    empty = Record.from_json(the_search().record.to_json())
    assert (empty.mu.shape, empty.theta.shape) == ((1, 4, 3), (0, 4, 4, 3))
    assert (empty.rewards.shape, empty.best.shape) == ((0, 4), (0,))


def test_bad_json():
    with pytest.raises(ValueError, match="text must be a record with pieces"):
        Record.from_json("[1, 2]")
    content = json.loads(searched().record.to_json())
    content["rounds"][1]["rewards"].pop()
    with pytest.raises(ValueError, match="round 1 of text does not fit candidates=4 and pieces=3"):
        Record.from_json(json.dumps(content))


def test_found_functions_are_the_kernels():
    search = searched()
    record = search.record
    x = torch.linspace(-0.99, 0.99, 40, dtype=F64)
    logits = torch.stack([x, torch.zeros_like(x)], 1)
    target = torch.zeros(40, dtype=torch.long)
    for epoch in (-1, 1):
        tables = record.mu[epoch]
        p = torch.softmax(torch.stack([record.t(x, epoch), torch.zeros_like(x)], 1), 1)[:, 0]
        wanted = mlkernels.piecewise_cross_entropy(
            logits, target, **dict(zip(TABLES, tables, strict=True)), reduction="none"
        )
        tau = record.tau(p, epoch)
        assert (tau > 0.01).any()
        torch.testing.assert_close(-tau.clamp_min(1e-6).log(), wanted)
    assert torch.equal(record.t(x, 0), x)
    # Beyond the domain the outer pieces go on; the last bin is closed.
    outside = torch.tensor([-3.0, 1.0, 3.0], dtype=F64)
    slope, bias = record.mu[-1, 0], record.mu[-1, 1]
    ends = torch.tensor([0, 2, 2])
    assert torch.equal(record.t(outside), slope[ends] * outside + bias[ends])


def test_plot(tmp_path):
    search = searched(epochs=6)
    path = tmp_path / "search.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot(search.record, path)
    picture = path.read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">2I", picture[16:24])
    assert width > 1200 and height > 700
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["t", "τ", "weight in the gradient", "rewards", "slopes of μ", "biases of μ"]
    # What is drawn are the record's numbers.
    drift = [line.get_ydata() for line in figure.axes[4].lines]
    assert len(drift) == 2 * 3
    assert drift[0].tolist() == search.record.mu[:, 0, 0].tolist()
    found = next(line for line in figure.axes[1].lines if line.get_label() == "found (μ)")
    x, y = (torch.as_tensor(values) for values in found.get_data())
    inside = x.isfinite() & ((x * 3) % 1 > 1e-6)
    torch.testing.assert_close(y[inside], search.record.tau(x[inside]))
    assert plot(searched(epochs=1, pieces=1).record) is not None, "one epoch, one piece, no file"
    with pytest.raises(ValueError, match="record must have at least one epoch"):
        plot(the_search().record)
