"""R, the product of the layers' norms."""

import math

import pytest
import torch
from test_no_sync import Forbid
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mlkernels
from mlkernels import cached_weight_norm, weight_norm_product


def norm(*tensors):
    return math.sqrt(sum(float(v) ** 2 for t in tensors for v in t.detach().double().flatten()))


def network():
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4, bias=False))


def test_product_over_linear_and_convolution():
    model = network()
    conv, linear = model[0], model[4]
    wanted = norm(conv.weight, conv.bias) * norm(linear.weight)
    found = weight_norm_product(model)
    assert (found.shape, found.dtype) == ((), torch.float64)
    assert found.item() == pytest.approx(wanted, rel=1e-12)
    assert weight_norm_product(model, log=True).item() == pytest.approx(math.log(wanted), rel=1e-12)


def test_norm_layers_count_for_nothing():
    model = network()
    before = weight_norm_product(model).item()
    nn.init.constant_(model[1].weight, 7.0)
    assert weight_norm_product(model).item() == before


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(2, 3, 3), nn.Conv3d(1, 2, 2), nn.ConvTranspose2d(2, 3, 2), nn.Linear(3, 2)]
)
def test_every_kind_of_layer(layer):
    assert weight_norm_product(layer).item() == pytest.approx(norm(layer.weight, layer.bias), rel=1e-12)


def test_tied_weights_count_once():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.ModuleDict({"a": first, "b": second, "again": first})
    assert weight_norm_product(model).item() == pytest.approx(norm(first.weight, first.bias, second.bias), rel=1e-12)


def test_a_reparametrised_weight_counts_as_it_is_used():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        layer.parametrizations.weight.original0.fill_(2.0)
    value = weight_norm_product(layer)
    assert value.item() == pytest.approx(math.sqrt(8.0), rel=1e-6)
    value.backward()
    assert layer.parametrizations.weight.original0.grad.abs().sum() > 0


def test_gradient():
    model = network()
    (2 * weight_norm_product(model)).backward()
    product = weight_norm_product(model).item()
    conv = model[0]
    wanted = 2 * product * conv.weight.detach() / norm(conv.weight, conv.bias) ** 2
    torch.testing.assert_close(conv.weight.grad, wanted)
    assert model[1].weight.grad is None
    model.double()
    parameters = [p for p in model.parameters() if p.dim() > 1 or p is conv.bias]

    def of(*_):
        return weight_norm_product(model, log=True)

    assert torch.autograd.gradcheck(of, tuple(parameters))


def test_beyond_float32_and_float64():
    """WRN-28-10 has R of about 10^25; here 10^60 and 10^600."""
    deep = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(100)])
    for one in deep:
        nn.init.constant_(one.weight, 1e6)
    assert weight_norm_product(deep[:10]).item() == pytest.approx(1e60, rel=1e-9)
    assert weight_norm_product(deep, log=True).item() == pytest.approx(600 * math.log(10), rel=1e-12)
    assert weight_norm_product(deep).item() == math.inf


def test_other_layers_on_request():
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2))
    both = weight_norm_product(model, layers=(nn.Linear, nn.Embedding)).item()
    assert both == pytest.approx(norm(model[0].weight) * norm(model[1].weight, model[1].bias), rel=1e-12)


def test_no_layer():
    with pytest.raises(ValueError, match=r"model must have a layer .* got BatchNorm1d"):
        weight_norm_product(nn.BatchNorm1d(3))


def test_no_synchronisation():
    model = network()
    with Forbid():
        mlkernels.weight_norm_product(model).backward()


def test_detached():
    model = network()
    assert weight_norm_product(model).requires_grad
    found = weight_norm_product(model, detach=True)
    assert not found.requires_grad
    assert torch.equal(found, weight_norm_product(model).detach())


class _Counted(TorchDispatchMode):
    """How many norms were computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten.linalg_vector_norm
        return func(*args, **(kwargs or {}))


def norms_of(call):
    with _Counted() as counted:
        found = call()
    return counted.count, found


def test_computed_once_in_a_step():
    model, other = network(), network()
    fresh, value = norms_of(lambda: weight_norm_product(model, detach=True))
    assert fresh == 4  # of the three parameters, and of weight and bias together
    with cached_weight_norm():
        assert norms_of(lambda: weight_norm_product(model, detach=True)) == (fresh, value)
        assert norms_of(lambda: weight_norm_product(model, detach=True)) == (0, value)
        assert norms_of(lambda: weight_norm_product(model, log=True, detach=True)) == (0, value.log())
        with torch.no_grad():
            assert norms_of(lambda: weight_norm_product(model)) == (0, value)
        # Another network, other layers, one with a gradient: each is another number.
        assert norms_of(lambda: weight_norm_product(other, detach=True))[0] == fresh
        assert norms_of(lambda: weight_norm_product(model, detach=True, layers=(nn.Conv2d,)))[0] == 3
        assert weight_norm_product(model).requires_grad
        assert norms_of(lambda: weight_norm_product(model))[0] == 0
    assert norms_of(lambda: weight_norm_product(model, detach=True))[0] == fresh


def test_a_differentiable_one_is_shared():
    model = network()
    weight_norm_product(model).backward(torch.tensor(3.0, dtype=torch.float64))
    wanted = model[0].weight.grad.clone()
    model.zero_grad()
    with cached_weight_norm():
        (weight_norm_product(model) + 2 * weight_norm_product(model)).backward()
    torch.testing.assert_close(model[0].weight.grad, wanted)


@pytest.mark.parametrize("change", ["in place", "optimizer", "load_state_dict", "replaced", "new layer"])
def test_counted_changes_are_noticed_inside(change):
    model = network()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = network().state_dict()
    assert network()[4].weight._version == model[4].weight._version
    with cached_weight_norm():
        before = weight_norm_product(model, detach=True)
        if change == "in place":
            with torch.no_grad():
                model[4].weight.mul_(2)
        elif change == "optimizer":
            optimizer.step()
        elif change == "load_state_dict":
            model.load_state_dict(other)
        elif change == "replaced":
            model[4].weight = network()[4].weight  # of the same version, but another
        else:
            model.append(nn.Linear(4, 2))
        after = weight_norm_product(model, detach=True)
    assert after != before
    assert after == weight_norm_product(model, detach=True)


@pytest.mark.parametrize("write", ["fused", "data"])
def test_changes_that_are_not_counted_are_seen_in_the_next_step(write):
    """Fused optimizers and writes to .data do not raise a parameter's version."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    found = []
    for _ in range(3):
        with cached_weight_norm():
            found += [weight_norm_product(model, detach=True).item() for _ in range(2)]
        if write == "data":
            model[4].weight.data.mul_(2)
        else:
            weight_norm_product(model).backward()
            optimizer.step()
    assert found[0] == found[1] != found[2] == found[3] != found[4]
    plain = weight_norm_product(model, detach=True).item()
    with cached_weight_norm():
        assert weight_norm_product(model, detach=True).item() == plain


def test_a_scope_ends_with_an_error_and_can_be_nested():
    model = network()
    weight_norm_product(model, detach=True)
    with pytest.raises(ValueError, match="model must have a layer"), cached_weight_norm():
        weight_norm_product(nn.ReLU())
    assert norms_of(lambda: weight_norm_product(model, detach=True))[0] == 4
    with cached_weight_norm():
        weight_norm_product(model, detach=True)
        with cached_weight_norm():
            assert norms_of(lambda: weight_norm_product(model, detach=True))[0] == 4
        assert norms_of(lambda: weight_norm_product(model, detach=True))[0] == 0


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        model = network()
        with cached_weight_norm():
            first = weight_norm_product(model)
            model[4].weight.mul_(2)
            assert weight_norm_product(model) > first


def test_no_synchronisation_inside():
    model = network()
    with cached_weight_norm(), Forbid():
        assert weight_norm_product(model, detach=True) is not None
        weight_norm_product(model, log=True).backward()
