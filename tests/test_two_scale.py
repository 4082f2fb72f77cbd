"""The two-scale module: its scales, variants and parametrizations, and the norm by which it is called."""

import math

import pytest
import torch
from test_modules import draw, saved
from torch import nn

import mlkernels
from mlkernels import functional as F

F64 = torch.float64
N, C = 6, 4


def network():
    return nn.Sequential(nn.Linear(C, 8), nn.ReLU(), nn.Linear(8, C))


def two_scale(x, target, low, high, norm, eta):
    """Equation (13), row by row."""
    rows = []
    for i, y in enumerate(target.tolist()):
        others = [j for j in range(x.shape[1]) if j != y]
        well = (x[i, y] - x[i, others].max()).item() >= eta
        r = (high if well else low) / norm
        rows.append(torch.log(1 + sum(torch.exp(r * (x[i, j] - x[i, y])) for j in others)))
    return torch.stack(rows).mean()


@pytest.mark.parametrize("variant", ["trainable", "fixed"])
@pytest.mark.parametrize("parametrization", ["absolute", "relative"])
@pytest.mark.parametrize("size", [3.0, 10.0**24.7, 1e100])
def test_two_scale(variant, parametrization, size):
    """Equal for every size of R, also where float32 has long overflowed."""
    input, target = draw(F64)
    norm = torch.tensor(1.7 * size, dtype=F64, requires_grad=True)
    loss = mlkernels.TwoScaleLoss(size, eta=0.1, variant=variant, parametrization=parametrization, detach_norm=False)
    low, high = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (1.0, 10.0))
    relative = norm / size
    wanted = two_scale(input, target, low, high, relative, 0.1)
    for given in ({"logit_norm": norm}, {"log_norm": norm.log()}):
        found = loss(input, target, **given)
        torch.testing.assert_close(found, wanted)
        trained = list(loss.parameters())
        assert len(trained) == (2 if variant == "trainable" else 0)
        got = torch.autograd.grad(2.5 * found, [input, norm, *trained])
        expected = torch.autograd.grad(2.5 * wanted, [input, norm, low, high], retain_graph=True)
        unit = 1.0 if parametrization == "relative" else size
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[1] * size, expected[1] * size)
        for gradient, other in zip(got[2:], expected[2:], strict=False):
            torch.testing.assert_close(gradient.double() * unit, other, rtol=1e-6, atol=1e-9)
    single = loss(input.detach().float(), target, norm)
    torch.testing.assert_close(single.double(), wanted, rtol=1e-5, atol=1e-6)


def test_two_scale_starts_from_the_model():
    model = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C))
    size = mlkernels.weight_norm_product(model).item()
    absolute = mlkernels.TwoScaleLoss(model)
    assert absolute.scale_low.item() == pytest.approx(size, rel=1e-12)
    assert absolute.scale_high.item() == pytest.approx(10 * size, rel=1e-12)
    assert absolute.scale_low.dtype == F64
    relative = mlkernels.TwoScaleLoss(model, parametrization="relative")
    assert (relative.scale_low.item(), relative.scale_high.item()) == (1.0, 10.0)
    input, target = draw()
    norm = mlkernels.weight_norm_product(model)
    wanted = F.two_scale_cross_entropy(input, target, 1.0, 10.0)
    for loss in (absolute, relative, mlkernels.TwoScaleLoss(norm.detach().float())):
        torch.testing.assert_close(loss(input, target, norm), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parametrization", ["absolute", "relative"])
def test_an_initial_norm_in_any_form(parametrization: str) -> None:
    """A number, 0-d, or (1,) as logit_norm may be: the same scales, to the bit, of the same shape."""
    wanted = mlkernels.TwoScaleLoss(3.3, parametrization=parametrization).state_dict()
    for given in (torch.tensor(3.3, dtype=torch.float64), torch.tensor([3.3], dtype=torch.float64)):
        found = mlkernels.TwoScaleLoss(given, parametrization=parametrization).state_dict()
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_two_scale_of_a_model_beyond_float64():
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(100)])
    for layer in model:
        nn.init.constant_(layer.weight, 1e6)
    with pytest.raises(ValueError, match=r"initial_norm .* 10\^600.0.*relative"):
        mlkernels.TwoScaleLoss(model)
    loss = mlkernels.TwoScaleLoss(model, parametrization="relative")
    input, target = draw()
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    found = loss(input, target, log_norm=mlkernels.weight_norm_product(model, log=True))
    torch.testing.assert_close(found, F.two_scale_cross_entropy(input, target, 0.5, 5.0))


def test_two_scale_detaches_the_norm_by_default():
    input, target = draw()
    norm = torch.tensor(2.0, requires_grad=True)
    mlkernels.TwoScaleLoss(1.0)(input, target, norm).backward()
    assert norm.grad is None
    mlkernels.TwoScaleLoss(1.0, detach_norm=False)(input, target, norm).backward()
    assert norm.grad.item() != 0


def test_two_scale_separation():
    input, target = draw()
    loss = mlkernels.TwoScaleLoss(variant="separation", eta=0.1)
    assert [(name, p.item()) for name, p in loss.named_parameters()] == [("scale_high", 10.0)]
    wanted = F.two_scale_cross_entropy(input, target, 1.0, 10.0, eta=0.1)
    assert torch.equal(loss(input, target), wanted)
    assert torch.equal(loss(input, target, torch.tensor(3.0)), wanted), "R has no place in (17)"
    loss(input, target).backward()
    assert loss.scale_high.grad.item() != 0
    assert torch.equal(loss.probabilities(input), torch.softmax(input, 1))


def test_two_scale_without_norm():
    input, target = draw()
    loss = mlkernels.TwoScaleLoss()
    torch.testing.assert_close(loss(input, target), F.two_scale_cross_entropy(input, target, 1.0, 10.0))
    with pytest.raises(ValueError, match="logit_norm"):
        loss(input, target, 2.0)


def test_two_scale_baseline():
    """R2 := R1 is a threshold that no row reaches."""
    input, target = draw()
    loss = mlkernels.TwoScaleLoss(2.0, eta=math.inf)
    wanted = F.two_scale_cross_entropy(input, target, 2.0, 2.0, logit_norm=torch.tensor(3.0))
    torch.testing.assert_close(loss(input, target, 3.0), wanted)
    loss(input, target, 3.0).backward()
    assert loss.scale_high.grad.item() == 0.0
    assert loss.scale_low.grad.item() != 0.0


def test_two_scale_probabilities_are_those_of_the_low_scale():
    input, _ = draw()
    loss = mlkernels.TwoScaleLoss(4.0)
    wanted = torch.softmax(input * 0.5, 1)
    torch.testing.assert_close(loss.probabilities(input, 8.0), wanted)
    torch.testing.assert_close(loss.probabilities(input, log_norm=math.log(8.0)), wanted)
    half = loss.probabilities(input.detach().half(), 8.0)
    assert half.dtype == torch.float32
    image = torch.randn(2, C, 3)
    torch.testing.assert_close(loss.probabilities(image, 4.0), torch.softmax(image, 1))
    torch.testing.assert_close(loss.probabilities(image[0, :, 0], 4.0), torch.softmax(image[0, :, 0], 0))


@pytest.mark.parametrize("parametrization", ["absolute", "relative"])
def test_two_scale_state(parametrization):
    one = mlkernels.TwoScaleLoss(5.0, parametrization=parametrization)
    with torch.no_grad():
        one.scale_low.mul_(1.5)
    other = mlkernels.TwoScaleLoss(1.0, parametrization=parametrization)
    other.load_state_dict(saved(one))
    input, target = draw()
    assert torch.equal(one(input, target, 6.0), other(input, target, 6.0))


def test_two_scale_trains_in_one_optimizer():
    model = nn.Linear(3, C)
    loss = mlkernels.TwoScaleLoss(model, parametrization="relative")
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    x, target = torch.randn(64, 3), torch.randint(C, (64,))
    before = loss(model(x), target, mlkernels.weight_norm_product(model)).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss(model(x), target, mlkernels.weight_norm_product(model)).backward()
        optimizer.step()
    assert loss(model(x), target, mlkernels.weight_norm_product(model)).item() < before
    assert (loss.scale_low.item(), loss.scale_high.item()) != (1.0, 10.0)


@pytest.mark.parametrize("parametrization", ["absolute", "relative"])
@pytest.mark.parametrize("variant", ["trainable", "fixed", "separation"])
def test_two_scale_takes_the_model_for_its_norm(variant, parametrization):
    model = network()
    loss = mlkernels.TwoScaleLoss(model, eta=0.1, variant=variant, parametrization=parametrization)
    with torch.no_grad():
        model[0].weight.mul_(1.7)  # R is that of now, not of the start
    input, target = draw()
    norm = mlkernels.weight_norm_product(model)
    torch.testing.assert_close(loss(input, target, model), loss(input, target, norm))
    torch.testing.assert_close(loss.probabilities(input, model), loss.probabilities(input, norm))
    start = 1.0 if variant == "separation" else (mlkernels.TwoScaleLoss(model).scale_low / norm).item()
    assert start == pytest.approx(1.0)
    if variant != "separation":
        assert not torch.allclose(loss.probabilities(input, model), torch.softmax(input, 1))


def test_two_scale_detaches_the_models_norm_by_default():
    model = network()
    input, target = draw()
    mlkernels.TwoScaleLoss(model)(input.detach(), target, model).backward()
    assert model[0].weight.grad is None
    mlkernels.TwoScaleLoss(model, detach_norm=False)(input.detach(), target, model).backward()
    found = model[0].weight.grad.clone()
    model.zero_grad()
    loss = mlkernels.TwoScaleLoss(model, detach_norm=False)
    loss(input.detach(), target, mlkernels.weight_norm_product(model)).backward()
    assert found.abs().sum() > 0
    torch.testing.assert_close(found, model[0].weight.grad)


def test_two_scale_of_a_model_beyond_float64_by_the_model_itself():
    deep = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(100)])
    for layer in deep:
        nn.init.constant_(layer.weight, 1e6)
    loss = mlkernels.TwoScaleLoss(deep, parametrization="relative")
    with torch.no_grad():
        deep[0].weight.mul_(2.0)
    input, target = draw()
    torch.testing.assert_close(loss(input, target, deep), F.two_scale_cross_entropy(input, target, 0.5, 5.0))


@pytest.mark.parametrize("variant", ["trainable", "fixed", "separation"])
@pytest.mark.parametrize("parametrization", ["absolute", "relative"])
def test_two_scale_training(variant, parametrization):
    """Only what the variant trains moves, the other scale to the last bit not; and the network learns."""
    model = network()
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(128, C, generator=generator), torch.randint(C, (128,), generator=generator)
    x[torch.arange(128), target] += 3.0
    loss = mlkernels.TwoScaleLoss(model, variant=variant, parametrization=parametrization)
    start = {name: getattr(loss, name).detach().clone() for name in ("scale_low", "scale_high")}
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model(x), target, model).backward()
        optimizer.step()
    moved = {name for name, value in start.items() if not torch.equal(getattr(loss, name), value)}
    wanted = {"trainable": {"scale_low", "scale_high"}, "fixed": set(), "separation": {"scale_high"}}
    assert moved == wanted[variant]
    if variant != "fixed":
        assert loss.scale_high > start["scale_high"]  # (15): it grows as long as one row is well classified
    assert mlkernels.metrics.accuracy(model(x), target) > 0.8


def test_two_scale_repr():
    loss = mlkernels.TwoScaleLoss(2.0, variant="fixed", parametrization="relative", z_loss=0.1)
    text = "eta=0.01, z_loss=0.1, variant='fixed', parametrization='relative', detach_norm=True"
    assert repr(loss) == f"TwoScaleLoss({text})"
