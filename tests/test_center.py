"""The center loss and its two ways of moving the centers."""

import math

import pytest
import torch

import mlkernels

F64 = torch.float64
N, C, D = 6, 4, 3


def draw(dtype=F64):
    target = torch.tensor([2, 0, 2, 3, 2, 0])
    return torch.randn(N, D, dtype=dtype), target, torch.randn(C, D, dtype=dtype)


def oracle(x, target, centers):
    rows = []
    for i, y in enumerate(target.tolist()):
        rows.append(sum(0.5 * (x[i, j] - centers[y, j]) ** 2 for j in range(x.shape[1])))
    return torch.stack(rows)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("labels", [torch.int64, torch.int32, torch.uint8])
def test_values_and_gradients(reduction, labels):
    x, target, centers = draw()
    x.requires_grad_()
    centers.requires_grad_()
    found = mlkernels.center_loss(x, target.to(labels), centers, reduction=reduction)
    rows = oracle(x, target, centers)
    wanted = rows if reduction == "none" else rows.sum() / (N if reduction == "mean" else 1)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(found)
    got = torch.autograd.grad(found, (x, centers), upstream)
    for gradient, expected in zip(got, torch.autograd.grad(wanted, (x, centers), upstream), strict=True):
        torch.testing.assert_close(gradient, expected)
    assert torch.equal(got[1][1], torch.zeros(D, dtype=F64)), "no row is of class 1"


def test_gradcheck():
    x, target, centers = draw()
    leaves = (x.requires_grad_(), centers.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, c: mlkernels.center_loss(x, target, c, reduction="none"), leaves)
    assert torch.autograd.gradgradcheck(lambda x, c: mlkernels.center_loss(x, target, c, reduction="none"), leaves)


def test_half_is_summed_in_float32():
    x = torch.full((1, 4096), 4.0, dtype=torch.float16)
    loss = mlkernels.center_loss(x, torch.zeros(1, dtype=torch.long), torch.zeros(1, 4096))
    assert loss.dtype == torch.float32
    assert loss == 32768.0


def test_no_rows():
    assert mlkernels.center_loss(torch.zeros(0, D), torch.zeros(0, dtype=torch.long), torch.zeros(C, D)).isnan()


def test_module_trains_its_centers():
    x, target, _ = draw(torch.float32)
    module = mlkernels.CenterLoss(num_features=D, num_classes=C, reduction="sum")
    assert [name for name, _ in module.named_parameters()] == ["centers"]
    assert not list(module.buffers())
    before = module.centers.detach().clone()
    (2 * module(x, target)).backward()
    assert torch.equal(module.centers, before), "only the optimizer moves them"
    wanted = torch.zeros(C, D)
    for i, y in enumerate(target.tolist()):
        wanted[y] += 2 * (before[y] - x[i])
    torch.testing.assert_close(module.centers.grad, wanted)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_module_moves_its_centers_by_rate(reduction):
    x, target, centers = draw(torch.float32)
    module = mlkernels.CenterLoss(num_features=D, num_classes=C, rate=0.25, reduction=reduction)
    assert not list(module.parameters())
    module.centers.copy_(centers)
    x.requires_grad_()
    loss = module(x, target)
    torch.testing.assert_close(loss, mlkernels.center_loss(x, target, centers, reduction=reduction))
    wanted = centers.clone()
    for j in range(C):
        members = [i for i, y in enumerate(target.tolist()) if y == j]
        step = sum((centers[j] - x[i].detach() for i in members), torch.zeros(D)) / (1 + len(members))
        wanted[j] = centers[j] - 0.25 * step
    torch.testing.assert_close(module.centers, wanted)
    assert not module.centers.requires_grad
    # The loss was of the centers before their step, and so is its gradient.
    loss.sum().backward()
    factor = 1 / N if reduction == "mean" else 1.0
    torch.testing.assert_close(x.grad, factor * (x.detach() - centers[target]))
    module.eval()
    module(x, target)
    torch.testing.assert_close(module.centers, wanted)


def test_module_rate_and_labels():
    for rate in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="rate"):
            mlkernels.CenterLoss(num_features=D, num_classes=C, rate=rate)
    module = mlkernels.CenterLoss(num_features=D, num_classes=C, rate=0.5)
    before = module.centers.clone()
    with pytest.raises(IndexError, match="target 4 at row 0"):
        module(torch.zeros(1, D), torch.tensor([C]))
    assert torch.equal(module.centers, before)
    module(torch.zeros(0, D), torch.zeros(0, dtype=torch.long))
    assert torch.equal(module.centers, before)


@pytest.mark.parametrize("rate", [None, 0.5])
def test_module_state(rate):
    one, other = (
        mlkernels.CenterLoss(num_features=D, num_classes=C, rate=rate),
        mlkernels.CenterLoss(num_features=D, num_classes=C, rate=rate),
    )
    assert not torch.equal(one.centers, other.centers)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.centers, other.centers)
    assert "num_features=3, num_classes=4" in repr(one)
    assert mlkernels.CenterLoss(num_features=D, num_classes=C, dtype=F64).centers.dtype == F64
