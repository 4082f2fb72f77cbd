"""Many models as one: the same numbers as each by itself."""

import copy
import math

import pytest
import torch
from test_no_sync import Forbid
from test_search import F64, adam, data, network, reward, same, seeded, state_of, the_search, train
from torch import nn

import mlkernels
from mlkernels import tracing
from mlkernels.search import Population, PopulationLoss

ELEMENTWISE = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01}),
    ("Adam", {"lr": 0.01, "fused": True}),
    ("Adam", {"lr": 0.01, "foreach": True}),
    ("AdamW", {"lr": 0.01}),
    ("Adamax", {"lr": 0.01}),
    ("NAdam", {"lr": 0.01}),
    ("RAdam", {"lr": 0.05}),
    ("Adagrad", {"lr": 0.05, "initial_accumulator_value": 0.1}),
    ("Adadelta", {"lr": 1.0}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    ("Rprop", {"lr": 0.01}),
    ("ASGD", {"lr": 0.05, "lambd": 0.01, "t0": 1}),
]
IDS = [f"{kind}-{'-'.join(sorted(options))}" for kind, options in ELEMENTWISE]


class Plain(nn.Module):
    """No dropout, whose masks are each model's own; batch norm, a shared weight, a 0-d parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.norm, self.last = nn.BatchNorm1d(5), nn.Linear(5, 3, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.scale * self.last(torch.tanh(self.second(self.norm(torch.tanh(self.first(x))))))


def plain():
    torch.default_generator.manual_seed(4)
    return Plain().to(F64)


def close(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        else:
            assert a == b


@pytest.mark.parametrize(("kind", "options"), ELEMENTWISE, ids=IDS)
def test_as_one_after_another(kind, options):
    """Three epochs of five candidates, in threes and one by one: rewards, means, weights, statistics, optimizer state.

    Also the optimizer's state that did not exist before.
    """
    found = []
    for population in (1, 3):
        model = plain()
        optimizer = getattr(torch.optim, kind)(model.parameters(), **options)
        search = the_search(candidates=5, scale=2.0, clamp="cross_entropy", label_smoothing=0.05)
        search.run(model, optimizer, train, reward, epochs=3, population=population)
        found.append((state_of(model, optimizer), search.record))
    (state, record), (other, of_population) = found
    torch.testing.assert_close(record.rewards, of_population.rewards, rtol=1e-9, atol=1e-11)
    assert torch.equal(record.best, of_population.best)
    torch.testing.assert_close(record.mu, of_population.mu, rtol=1e-8, atol=1e-10)
    close(state, other)
    assert record.rewards.std(1).min() > 1e-4, "a weak test otherwise"


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum"}, {"ignore_index": 1, "weight": torch.tensor([1.0, 2, 3])}]
)
def test_gradients_are_those_of_each_loss(options):
    """One backward for all; the loss is the sum of theirs."""
    torch.default_generator.manual_seed(0)
    search, (x, y) = the_search(candidates=3, z_loss=0.01, **options), data()
    theta, models = search.sample(), plain()
    population = Population(models, adam(models), 3)
    with torch.no_grad():
        for parameter in population.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    singles = [copy.deepcopy(models) for _ in range(3)]
    total = 0.0
    for g, (single, tables) in enumerate(zip(singles, theta, strict=True)):
        with torch.no_grad():
            for own, stacked in zip(single.parameters(), population.parameters(), strict=True):
                own.copy_(stacked[g])
        loss = search.loss(tables)(single(x), y)
        loss.backward()
        total += loss.detach()
    loss = search.loss(theta)(population(x), y)
    loss.backward()
    torch.testing.assert_close(loss.detach(), total)
    for stacked, *own in zip(population.parameters(), *(single.parameters() for single in singles), strict=True):
        torch.testing.assert_close(stacked.grad, torch.stack([parameter.grad for parameter in own]))
        assert stacked.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in models.parameters())


def test_the_loss_of_each_row():
    x, y = torch.randn(2, 6, 4), torch.randint(4, (6,))
    tables = 1 + 0.1 * torch.randn(2, 3), 0.1 * torch.randn(2, 3)
    norm = 1 + torch.rand(2, 6, 1)
    loss = PopulationLoss(t_slope=tables[0], t_bias=tables[1], reduction="none")
    wanted = [
        mlkernels.piecewise_cross_entropy(
            x[g], y, t_slope=tables[0][g], t_bias=tables[1][g], norm=norm[g], reduction="none"
        )
        for g in range(2)
    ]
    torch.testing.assert_close(loss(x, y, norm), torch.stack(wanted))
    # Segmentation: a label per pixel.
    image, labels = torch.randn(2, 3, 4, 5, 6), torch.randint(4, (3, 5, 6))
    wanted = sum(
        mlkernels.piecewise_cross_entropy(image[g], labels, tau_slope=tables[0][g], tau_bias=tables[1][g])
        for g in range(2)
    )
    torch.testing.assert_close(PopulationLoss(tau_slope=tables[0], tau_bias=tables[1])(image, labels), wanted)


@pytest.mark.parametrize("normalizer", [None, 3.0, torch.tensor(5)])
def test_what_belongs_to_a_batch_is_the_same_for_all(normalizer):
    tables, y = torch.tensor([[1.0, 0.5], [0.7, 2.0]]), torch.randint(3, (6,))
    logits, batch = torch.randn(2, len(y), 3), {"row_weight": torch.rand(len(y)), "normalizer": normalizer}
    wanted = sum(mlkernels.PiecewiseLoss(tau_slope=t)(f, y, **batch) for t, f in zip(tables, logits, strict=True))
    torch.testing.assert_close(PopulationLoss(tau_slope=tables)(logits, y, **batch), wanted)
    with pytest.raises(ValueError, match=r"row_weight must have target's shape \("):
        PopulationLoss(tau_slope=tables)(logits, y, row_weight=torch.ones(2, len(y)))


def test_one_loss_that_is_nan_spoils_no_other():
    x, y = torch.randn(3, 4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    slope = torch.ones(3, 2)
    slope[1] = math.nan
    PopulationLoss(t_slope=slope, t_bias=torch.zeros(3, 2))(x, y).backward()
    assert x.grad[[0, 2]].isfinite().all()
    assert x.grad[1].isnan().any()


def test_each_draws_its_own_mask():
    model = nn.Sequential(nn.Linear(5, 50), nn.Dropout(0.5))
    population = Population(model, adam(model), 3)
    output = population(torch.randn(4, 5))
    assert output.shape == (3, 4, 50)
    dropped = output == 0
    assert 0.3 < dropped.float().mean() < 0.7
    assert not torch.equal(dropped[0], dropped[1])
    population.eval()
    assert not model[1].training
    x = torch.randn(4, 5)
    torch.testing.assert_close(population(x), model(x).expand(3, -1, -1))
    assert population.train() is population
    assert model[1].training


def test_convolutions_and_statistics():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    population = Population(model, adam(model), 2)
    x = torch.randn(4, 1, 6, 6)
    for _ in range(2):
        wanted = model(x)
        torch.testing.assert_close(population(x), wanted.expand(2, -1, -1))
    fresh = copy.deepcopy(model[1])
    fresh.reset_running_stats()
    model[1].load_state_dict(fresh.state_dict())
    population.copy_to_model(1)
    assert model[1].num_batches_tracked == 2
    assert model[1].running_mean.abs().max() > 0


def test_what_is_not_trained_is_shared():
    model = network()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    population = Population(model, optimizer, 4)
    assert [tuple(p.shape) for p in population.parameters()] == [(4, 3, 8), (4, 3)]
    population(data()[0]).sum().backward()
    assert model[0].weight.grad is None
    model = network()
    model[0].requires_grad_(False)
    population = Population(model, adam(model), 2)
    population(data()[0]).sum().backward()
    assert [p.grad is not None for p in population.parameters()] == [False, False, True, True, True, True]


def test_the_model_is_changed_by_copy_to_model_only():
    model = network()
    optimizer = adam(model)
    before = state_of(model, optimizer)
    where = [parameter.data_ptr() for parameter in model.parameters()]
    search = the_search()
    population = Population(model, optimizer, 4)
    train(population, population.optimizer, search.loss(search.sample()))
    assert same(state_of(model, optimizer), before)
    population.optimizer.param_groups[0]["lr"] = 0.5
    population.copy_to_model(2)
    assert [parameter.data_ptr() for parameter in model.parameters()] == where
    for parameter, stacked in zip(model.parameters(), population.parameters(), strict=True):
        assert torch.equal(parameter, stacked[2])
        for key, value in population.optimizer.state[stacked].items():
            assert torch.equal(optimizer.state[parameter][key], value if key == "step" else value[2])
    assert optimizer.param_groups[0]["lr"] == 0.5
    kept = state_of(model, optimizer)
    train(population, population.optimizer, search.loss(search.sample()))
    assert same(state_of(model, optimizer), kept), "nothing is shared with the population"
    assert repr(population).startswith("Population(\n  4 x Sequential")


def test_options_of_groups():
    """Each group has its own; a learning rate that is a tensor is not shared with the population."""
    model, rate = network(), torch.tensor(0.1)
    groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[4].parameters(), "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=rate, foreach=False)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # leaves initial_lr behind
    population = Population(model, optimizer, 2)
    got = population.optimizer.param_groups
    assert [group["weight_decay"] for group in got] == [0.01, 0.1]
    got[1]["lr"].fill_(7.0)
    assert rate == 0.1
    train(population, population.optimizer, the_search().loss(the_search().sample()[:2]))
    population.copy_to_model(0)
    assert rate == 7.0, "in place"
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_no_synchronisation(monkeypatch):
    """A training step waits for the device nowhere (SGD: on the CPU others count their steps by the host)."""
    monkeypatch.setattr(tracing, "traced", lambda *tensors: True)
    model = network(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    search = the_search(backend="reference", clamp="cross_entropy")
    loss, (x, y) = search.loss(search.sample()), data(torch.float32)
    population = Population(model, optimizer, 4)
    with Forbid():
        for _ in range(2):
            population.optimizer.zero_grad()
            loss(population(x), y).backward()
            population.optimizer.step()
        population.copy_to_model(3)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


class MyAdam(torch.optim.Adam):
    """Who knows what it does."""


def refused(kind, **options):
    model = nn.Linear(5, 3, bias=False)
    return model, getattr(torch.optim, kind)(model.parameters(), **options)


@pytest.mark.parametrize("kind", ["LBFGS", "Adafactor", "Muon", "SparseAdam"])
def test_optimizers_that_mix_are_refused(kind):
    model, optimizer = refused(kind, lr=0.1)
    says = f"optimizer must treat every number by itself .*SGD.*; got {kind}, which may mix .*population=1"
    with pytest.raises(TypeError, match=says):
        Population(model, optimizer, 2)
    with pytest.raises(TypeError, match=says):
        the_search().step(model, optimizer, train, reward, population=2)
    with pytest.raises(TypeError, match="got MyAdam"):
        Population(model, MyAdam(model.parameters()), 2)


def test_what_else_is_refused():
    model = network()
    optimizer = adam(model)
    with pytest.raises(ValueError, match="size must be an integer >= 1, got 0"):
        Population(model, optimizer, 0)
    with pytest.raises(ValueError, match=r"hold parameters of the model only .* got others of \[\(2, 5\)"):
        Population(model, adam(nn.Linear(5, 2)), 2)
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match="hold a parameter that requires a gradient, got none"):
        Population(frozen, adam(frozen), 2)
    model[1].momentum = None
    with pytest.raises(ValueError, match="momentum of 1 must be a number to train a population, got None"):
        Population(model, optimizer, 2)
    with pytest.raises(ValueError, match=r"index must be in \[0, 2\), got 2"):
        Population(frozen.requires_grad_(), adam(frozen), 2).copy_to_model(2)
    search = the_search()
    loss = search.loss(search.sample())
    with pytest.raises(ValueError, match=r"input must be \(G, N, C, ...\) with G = 4 models, got \(6, 3\)"):
        loss(torch.zeros(6, 3), torch.zeros(6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"with G = 4 models, got \(3, 6, 3\)"):
        loss(torch.zeros(3, 6, 3), torch.zeros(6, dtype=torch.long))


def test_a_generator_of_the_candidates_alone():
    """How many are trained at once draws nothing."""
    states = []
    for population in (1, 2, 4, 9):
        model, search = plain(), the_search(generator=seeded(3))
        search.step(model, adam(model), train, reward, population=population)
        states.append((search.generator.get_state(), search.record.theta))
    assert all(torch.equal(state, states[0][0]) and torch.equal(theta, states[0][1]) for state, theta in states)
