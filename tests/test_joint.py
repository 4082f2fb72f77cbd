"""Joint losses: their weights, and what each loss takes."""

import math

import pytest
import table
import torch
from table import LOSSES, leaves
from test_modules import draw, saved
from test_two_scale import network
from torch import nn

import mlkernels
from mlkernels import functional as F

N = 6


def pair():
    return [mlkernels.CrossEntropyLoss(), lambda x, y: mlkernels.multi_margin_loss(x, y)]


def test_joint_fixed():
    input, target = draw()
    one, two = (loss(input, target) for loss in pair())
    torch.testing.assert_close(mlkernels.JointLoss(pair())(input, target), one + two)
    torch.testing.assert_close(mlkernels.JointLoss(pair(), weights=[0.25, 3.0])(input, target), 0.25 * one + 3 * two)
    torch.testing.assert_close(mlkernels.JointLoss(pair()[:1], weights=[2.0])(input, target), 2 * one)


def test_joint_hands_on_what_belongs_to_a_batch():
    input, target = draw()
    batch = {"row_weight": torch.rand(target.shape), "normalizer": 3.0}
    losses = [mlkernels.FocalLoss(), mlkernels.cross_entropy]
    wanted = sum(loss(input, target, **batch) for loss in losses)
    torch.testing.assert_close(mlkernels.JointLoss(losses)(input, target, **batch), wanted)
    with pytest.raises(TypeError, match="row_weight"):
        mlkernels.JointLoss(pair())(input, target, **batch)


def test_joint_trainable():
    input, target = draw()
    one, two = (loss(input, target).item() for loss in pair())
    loss = mlkernels.JointLoss(pair(), weights=[0.2, 0.8], mode="trainable")
    value = loss(input, target)
    assert value.item() == pytest.approx(0.2 * one + 0.8 * two)
    (2.5 * value).backward()
    assert loss.logit.grad.item() == pytest.approx(2.5 * (one - two) * 0.2 * 0.8, rel=1e-5)
    assert mlkernels.JointLoss(pair(), mode="trainable")(input, target).item() == pytest.approx((one + two) / 2)


def test_joint_uncertainty():
    input, target = draw()
    each = [loss(input, target).item() for loss in pair()]
    loss = mlkernels.JointLoss(pair(), weights=[1.0, 0.5], mode="uncertainty")
    value = loss(input, target)
    s = [0.0, math.log(2.0)]
    assert value.item() == pytest.approx(sum(math.exp(-a) * v + a / 2 for a, v in zip(s, each, strict=True)))
    (2.5 * value).backward()
    wanted = [2.5 * (0.5 - math.exp(-a) * v) for a, v in zip(s, each, strict=True)]
    assert loss.log_variance.grad.tolist() == pytest.approx(wanted, rel=1e-5)


def test_joint_holds_what_its_losses_train():
    scale = nn.Parameter(torch.tensor(2.0))
    loss = mlkernels.JointLoss([mlkernels.CrossEntropyLoss(scale=scale), lambda x, y: x.square().mean()])
    assert [p is scale for p in loss.parameters()] == [True]
    other = mlkernels.JointLoss([mlkernels.CrossEntropyLoss(scale=nn.Parameter(torch.tensor(1.0))), pair()[1]])
    other.load_state_dict(saved(loss))
    assert next(other.parameters()).item() == 2.0
    trained = mlkernels.JointLoss(pair(), weights=[0.9, 0.1], mode="trainable")
    again = mlkernels.JointLoss(pair(), mode="trainable")
    again.load_state_dict(saved(trained))
    assert torch.equal(again.logit, trained.logit)
    assert "lambda" in repr(trained)


def test_joint_weights_are_those_of_now():
    input, target = draw()
    each = [loss(input, target) for loss in pair()]
    fixed = mlkernels.JointLoss(pair(), weights=[0.25, 3.0])
    assert list(fixed.weights) == [0.25, 3.0]
    for mode, start in (("trainable", [0.2, 0.8]), ("uncertainty", [1.0, 0.5])):
        joint = mlkernels.JointLoss(pair(), weights=start, mode=mode)
        assert [weight.item() for weight in joint.weights] == pytest.approx(start)
        optimizer = torch.optim.SGD(joint.parameters(), lr=1.0)
        joint(input, target).backward()
        optimizer.step()
        now = [weight.item() for weight in joint.weights]
        assert now != pytest.approx(start)
        penalty = 0.5 * joint.log_variance.sum() if mode == "uncertainty" else 0.0
        wanted = now[0] * each[0] + now[1] * each[1] + penalty
        torch.testing.assert_close(joint(input, target), wanted)
        if mode == "trainable":
            assert sum(now) == pytest.approx(1.0)


def test_joint_hands_on_what_belongs_to_the_batch():
    """A norm, a model, groups: whatever a loss takes after the target."""
    model = network()
    two_scale, margin = mlkernels.TwoScaleLoss(model), mlkernels.MarginLoss(m1=2.0, scale=1.0)
    joint = mlkernels.JointLoss([two_scale, margin, mlkernels.CrossEntropyLoss()], inputs=[(0, 2), (0, 1), (0,)])
    input, target = draw()
    norm = torch.rand(N, 1) + 1
    wanted = two_scale(input, target, model) + margin(input, target, norm) + F.cross_entropy(input, target)
    found = joint((input, norm, model), target)
    torch.testing.assert_close(found, wanted)
    found.backward()
    assert [name for name, _ in joint.named_parameters()] == ["losses.0.scale_low", "losses.0.scale_high"]
    assert all(parameter.grad.abs() > 0 for parameter in joint.parameters())


@pytest.mark.parametrize("mode", ["fixed", "trainable", "uncertainty"])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_joint_of_every_loss_of_the_family(loss, mode):
    """Value and gradients are those of the weighted sum by hand."""
    input, target, params = table.draw(loss, rows=6, form="shared")
    own = leaves(params)
    options = {"group": loss.group(target)} if loss.groups else {}
    weights = [0.3, 0.7]
    joint = mlkernels.JointLoss(
        [lambda x, y: loss(x, y, own, **options), mlkernels.CrossEntropyLoss()], weights=weights, mode=mode
    )
    x = input.float().requires_grad_()
    one, two = loss(x, target, own, **options), mlkernels.cross_entropy(x, target)
    wanted = 0.3 * one + 0.7 * two
    if mode == "uncertainty":
        wanted = wanted - 0.5 * (math.log(0.3) + math.log(0.7))
    found = joint(x, target)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    trained = [x, *(value for value in own.values() if isinstance(value, torch.Tensor) and value.requires_grad)]
    expected = torch.autograd.grad(wanted, trained, allow_unused=True)
    got = torch.autograd.grad(found, [*trained, *joint.parameters()], allow_unused=True)
    for a, b in zip(got, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if mode == "trainable":
        torch.testing.assert_close(got[-1], 0.21 * (one - two).detach(), rtol=1e-4, atol=1e-5)
    elif mode == "uncertainty":
        slope = torch.stack([0.5 - 0.3 * one, 0.5 - 0.7 * two]).detach()
        torch.testing.assert_close(got[-1], slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["fixed", "trainable", "uncertainty"])
def test_joint_rows(mode):
    """Losses per row are weighted per row: their mean is the loss of means."""
    input, target = draw()

    def joint(reduction):
        losses = [mlkernels.CrossEntropyLoss(reduction=reduction), mlkernels.FocalLoss(reduction=reduction)]
        return mlkernels.JointLoss(losses, weights=[0.25, 0.75], mode=mode)(input, target)

    assert joint("none").shape == (N,)
    torch.testing.assert_close(joint("none").mean(), joint("mean"))


def test_joint_loss_hands_each_loss_its_part():
    center, classifier = mlkernels.CenterLoss(num_features=2, num_classes=3), mlkernels.CrossEntropyLoss()
    joint = mlkernels.JointLoss([classifier, center], weights=[0.5, 2.0], inputs=[0, 1])
    logits, features = torch.randn(4, 3), torch.randn(4, 2)
    target = torch.tensor([0, 1, 2, 0])
    expected = 0.5 * classifier(logits, target) + 2.0 * center(features, target)
    torch.testing.assert_close(joint((logits, features), target), expected)
    assert [name for name, _ in joint.named_parameters()] == ["losses.1.centers"]
    with pytest.raises(ValueError, match="inputs must be one per loss, 2, got 1"):
        mlkernels.JointLoss([classifier, center], inputs=[0])
