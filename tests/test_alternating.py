"""Losses in turn, each with its own optimizer."""

import copy
import io

import pytest
import torch
from table import LOSSES, draw, leaves
from test_no_sync import Forbid
from torch import nn

import mlkernels
from mlkernels import tracing

N, D, C = 8, 5, 4


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=generator), torch.randint(C, (N,), generator=generator)


def parts(seed=0, optimizer=torch.optim.SGD, **options):
    """A model and three turns: all of it, a part of it, and one loss with parameters of its own."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C))
    center = mlkernels.CenterLoss(num_features=C, num_classes=C)
    turns = [
        (mlkernels.CrossEntropyLoss(), optimizer(model.parameters(), lr=0.1, **options)),
        (mlkernels.MultiMarginLoss(p=2), optimizer(model[2].parameters(), lr=0.05, **options)),
        (center, optimizer([*model.parameters(), *center.parameters()], lr=0.01, **options)),
    ]
    return model, center, turns


def numbers(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]


def by_hand(model, turns, order, first=0):
    """The plain loop."""
    found = []
    for seed, which in enumerate(order, first):
        loss, optimizer = turns[which]
        for _, each in turns:
            each.zero_grad()
        value = loss(model(batch(seed)[0]), batch(seed)[1])
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found


@pytest.mark.parametrize("periods", [None, [2, 1, 3]], ids=str)
def test_the_plain_loop_to_the_bit(periods):
    model, center, turns = parts(momentum=0.9, weight_decay=0.01)
    twin, other, hand = parts(momentum=0.9, weight_decay=0.01)
    alternating = mlkernels.Alternating(model, turns, periods=periods)
    order = [0, 1, 2] * 4 if periods is None else [0, 0, 1, 2, 2, 2] * 2
    found = [alternating.step(*batch(seed)) for seed in range(12)]
    assert [step.which for step in found] == order
    assert [step.loss.item() for step in found] == by_hand(twin, hand, order)
    assert not any(step.loss.requires_grad for step in found)
    for one, wanted in zip(numbers(model, center), numbers(twin, other), strict=True):
        assert torch.equal(one, wanted)


def test_one_loss_does_not_move_what_is_anothers():
    """The classifier's loss gives the body a gradient, which the body's optimizer must not see."""
    model, _, _ = parts()
    body, classifier = model[0], model[2]
    turns = [
        (mlkernels.CrossEntropyLoss(), torch.optim.SGD(classifier.parameters(), lr=0.1)),
        (lambda output, target: 0.0 * output.sum(), torch.optim.SGD(body.parameters(), lr=0.1)),
    ]
    alternating = mlkernels.Alternating(model, turns)
    before = numbers(body)
    for seed in range(4):
        alternating.step(*batch(seed))
    assert all(torch.equal(a, b) for a, b in zip(before, numbers(body), strict=True))


def test_all_of_them_on_one_batch():
    model, center, turns = parts()
    twin, other, hand = parts()
    alternating = mlkernels.Alternating(model, turns, periods=[1, 2, 1])
    alternating.step(*batch(0))
    found = alternating.step_all(*batch(1))
    by_hand(twin, hand, [0])
    for which in range(3):
        by_hand(twin, hand, [which], first=1)
    assert [step.which for step in found] == [0, 1, 2]
    assert alternating.turn == 1
    for one, wanted in zip(numbers(model, center), numbers(twin, other), strict=True):
        assert torch.equal(one, wanted)


def test_goes_on_where_it_was():
    model, center, turns = parts(optimizer=torch.optim.Adam)
    whole = mlkernels.Alternating(model, turns, periods=[1, 2, 1])
    for seed in range(6):
        whole.step(*batch(seed))
    buffer = io.BytesIO()
    states = [model.state_dict(), center.state_dict(), [o.state_dict() for _, o in turns], whole.state_dict()]
    torch.save(states, buffer)
    rest = [whole.step(*batch(seed)).which for seed in range(6, 11)]

    twin, other, again = parts(seed=1, optimizer=torch.optim.Adam)
    buffer.seek(0)
    of_model, of_center, of_optimizers, of_turn = torch.load(buffer, weights_only=True)
    twin.load_state_dict(of_model)
    other.load_state_dict(of_center)
    for (_, optimizer), state in zip(again, of_optimizers, strict=True):
        optimizer.load_state_dict(state)
    resumed = mlkernels.Alternating(twin, again, periods=[1, 2, 1])
    resumed.load_state_dict(of_turn)
    assert [resumed.step(*batch(seed)).which for seed in range(6, 11)] == rest == [1, 2, 0, 1, 1]
    for one, wanted in zip(numbers(model, center), numbers(twin, other), strict=True):
        assert torch.equal(one, wanted)


@pytest.mark.parametrize(
    "state",
    [{}, {"periods": [1, 1], "position": 0}, {"periods": [1, 2, 1], "position": 4}, {"periods": [1, 2, 1]},
     {"periods": [1, 2, 1], "position": -1}],
    ids=str,
)  # fmt: skip
def test_another_ones_state(state):
    model, _, turns = parts()
    alternating = mlkernels.Alternating(model, turns, periods=[1, 2, 1])
    alternating.step(*batch(0))
    with pytest.raises(ValueError, match="state"):
        alternating.load_state_dict(state)
    assert alternating.turn == 1


def test_an_error_does_not_end_the_turn():
    model, _, turns = parts()
    fail = True

    def loss(output, target):
        if fail:
            raise RuntimeError("no loss today")
        return output.square().mean()

    turns[1] = (loss, turns[1][1])
    alternating = mlkernels.Alternating(model, turns)
    alternating.step(*batch(0))
    before = numbers(model)
    with pytest.raises(RuntimeError, match="no loss today"):
        alternating.step(*batch(1))
    assert alternating.turn == 1
    assert all(torch.equal(a, b) for a, b in zip(before, numbers(model), strict=True))
    fail = False
    assert alternating.step(*batch(1)).which == 1


def test_an_optimizer_that_evaluates_several_times():
    model, _, turns = parts()
    lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)
    alternating = mlkernels.Alternating(model, [(mlkernels.CrossEntropyLoss(), lbfgs), turns[1]])
    first = alternating.step(*batch(0)).loss
    alternating.step(*batch(0))
    assert alternating.step(*batch(0)).loss < 0.8 * first


def test_scaled_gradients():
    """By a power of two, so that nothing is rounded otherwise; and a step with infinite gradients is left out."""
    (model, center, turns), (twin, other, hand) = parts(), parts()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    alternating = mlkernels.Alternating(model, turns, scaler=scaler)
    plain = mlkernels.Alternating(twin, hand)
    for seed in range(6):
        assert torch.equal(alternating.step(*batch(seed)).loss, plain.step(*batch(seed)).loss)
    for one, wanted in zip(numbers(model, center), numbers(twin, other), strict=True):
        torch.testing.assert_close(one, wanted)
    before = numbers(model, center)
    alternating.step(torch.full((N, D), torch.inf), batch(0)[1])
    assert all(torch.equal(a, b) for a, b in zip(before, numbers(model, center), strict=True))
    assert scaler.get_scale() == 2.0**9


def test_never_waits_for_the_device():
    model, _, turns = parts(foreach=True)
    turns[0] = (mlkernels.CrossEntropyLoss(backend="reference"), turns[0][1])
    turns = [turns[0], (lambda output, target: output.square().mean(), turns[1][1])]
    alternating = mlkernels.Alternating(lambda input: model(input), turns)
    data = batch(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "traced", lambda *tensors: True)
        with Forbid():
            for _ in range(4):
                alternating.step(*data)
            alternating.step_all(*data)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_every_loss_of_the_family(loss):
    """With an optimizer for the logits and one for the loss's own parameters."""
    input, target, params = draw(loss, rows=6, form="shared")
    own = leaves(params)
    logits = input.float().clone().requires_grad_()
    options = {"group": loss.group(target)} if loss.groups else {}

    def call(output, target):
        return loss(output, target, own, **options)

    trained = [value for value in own.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    start = copy.deepcopy(trained)
    turns = [(call, torch.optim.SGD([logits], lr=1e-3)), (call, torch.optim.SGD(trained or [logits], lr=1e-4))]
    alternating = mlkernels.Alternating(lambda _: logits, turns)
    before = logits.detach().clone()
    alternating.step(None, target)
    assert not torch.equal(logits, before)
    assert all(torch.equal(a, b) for a, b in zip(trained, start, strict=True))
    alternating.step(None, target)
    moved = [not torch.equal(a, b) for a, b in zip(trained, start, strict=True)]
    # In some losses a parameter does not count for the rows that are drawn, but not in all of them.
    assert any(moved) or not trained


def test_repr():
    model, _, turns = parts()
    text = repr(mlkernels.Alternating(model, turns, periods=[3, 1, 1]))
    assert text.startswith("Alternating(3 x CrossEntropyLoss(scale=1.0) by SGD, 1 x MultiMarginLoss(")
