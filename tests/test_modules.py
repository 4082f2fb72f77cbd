"""The modules: their functional twins with the arguments kept, and what only modules have."""

import copy
import inspect
import io
import math
import re

import pytest
import table
import torch
from table import LOSSES, leaves
from torch import nn

import mlkernels
from mlkernels import functional as F
from mlkernels.softmax import COMMON as COMMON_DEFAULTS

F64 = torch.float64
N, C = 6, 4
TABLE = torch.tensor([0.9, 1.1]), torch.tensor([0.1, -0.05])

# module, its own arguments, functional
TWINS = [
    (mlkernels.CrossEntropyLoss, {"scale": 2.0}, F.cross_entropy),
    (mlkernels.FocalLoss, {"gamma": 1.5}, F.focal_loss),
    (
        mlkernels.ModulatedCrossEntropyLoss,
        {"beta": 2.0, "gamma": 3.0, "alpha": 0.5, "kappa": 1.5},
        F.modulated_cross_entropy,
    ),
    (
        mlkernels.MarginLoss,
        {"m1": 1.2, "m2": 0.2, "m3": 0.1, "scale": 8.0, "beyond_pi": "none"},
        F.margin_cross_entropy,
    ),
    (mlkernels.MarginLoss, {"m2": 0.2, "gradient": "straight_through"}, F.margin_cross_entropy),
    (mlkernels.ArcFaceLoss, {"margin": 0.3, "scale": 16.0, "beyond_pi": "easy"}, F.arcface_loss),
    (mlkernels.CosFaceLoss, {"margin": 0.2, "scale": 16.0}, F.cosface_loss),
    (mlkernels.SphereFaceLoss, {"margin": 2, "scale": 16.0}, F.sphereface_loss),
    (
        mlkernels.PiecewiseLoss,
        {"t_slope": TABLE[0], "tau_slope": TABLE[0], "tau_bias": TABLE[1], "tau_min": 1e-3, "clamp": "cross_entropy"},
        F.piecewise_cross_entropy,
    ),
    (mlkernels.MultiMarginLoss, {"p": 2, "margin": 0.5}, F.multi_margin_loss),
]
COMMON = {
    "weight": torch.tensor([0.5, 1.0, 2.0, 0.7]),
    "ignore_index": 3,
    "reduction": "sum",
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "softcap": 5.0,
    "logit_adjustment": torch.tensor([0.1, -0.2, 0.3, 0.0]),
    "backend": "reference",
}


def draw(dtype=torch.float32):
    return (2 * torch.rand(N, C, dtype=dtype) - 1).requires_grad_(), torch.tensor([0, 1, 2, 3, 1, 0])


def value_and_gradient(loss, input):
    (gradient,) = torch.autograd.grad(2.5 * loss.sum(), input)
    return loss.detach(), gradient


def saved(module):
    """The state after a trip through a file."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(("module", "own", "function"), TWINS)
def test_twins_agree(module, own, function):
    taken = inspect.signature(function).parameters
    common = {name: value for name, value in COMMON.items() if "common" in taken or name in taken}
    for options in ({}, common):
        input, target = draw()
        loss = module(**own, **options)
        got = value_and_gradient(loss(input, target), input)
        wanted = value_and_gradient(function(input, target, **own, **options), input)
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other)
        assert got[1].abs().sum() > 0


@pytest.mark.parametrize(("module", "own", "function"), TWINS)
def test_twins_have_the_same_arguments_and_defaults(module, own, function):
    def arguments(of):
        named = inspect.signature(of).parameters.values()
        return {p.name: p.default for p in named if p.default is not inspect.Parameter.empty}

    # What belongs to the batch is given to forward.
    wanted = {name: default for name, default in arguments(function).items() if name not in ("norm", "group")}
    assert arguments(module.__init__) == wanted


@pytest.mark.parametrize(("module", "own", "function"), TWINS)
def test_shared_arguments_are_shown(module, own, function):
    """Every one of them in the signature, with its default, and with its meaning in help()."""
    for of in (module, function) if function is not F.multi_margin_loss else ():
        taken = inspect.signature(of).parameters
        assert {name: taken[name].default for name in COMMON_DEFAULTS} == COMMON_DEFAULTS
        assert not any(one.kind is one.VAR_KEYWORD for one in taken.values())
        for name in COMMON_DEFAULTS:
            assert len(re.findall(rf"^        {name}: \S", of.__doc__, re.MULTILINE)) == 1, name
        assert "**common" not in of.__doc__
    assert "\n    label_smoothing: " in F.__doc__
    assert "Gradient: :math:`" in function.__doc__


@pytest.mark.parametrize(("module", "own", "function"), TWINS)
def test_state_copies_and_pickles(module, own, function):
    one = module(**{name: nn.Parameter(v) if isinstance(v, torch.Tensor) else v for name, v in own.items()})
    other = module(**{name: nn.Parameter(2 * v) if isinstance(v, torch.Tensor) else v for name, v in own.items()})
    other.load_state_dict(saved(one))
    input, target = draw()
    wanted = one(input, target)
    for twin in (other, copy.deepcopy(one)):
        assert torch.equal(twin(input, target), wanted)


def test_every_number_of_a_loss_can_be_trained():
    for module, names in [
        (mlkernels.CrossEntropyLoss, {"scale": 2.0}),
        (mlkernels.FocalLoss, {"gamma": 1.5}),
        (mlkernels.ModulatedCrossEntropyLoss, {"beta": 4.0, "gamma": 5.0, "alpha": 1.0, "kappa": 1.0}),
        (mlkernels.MarginLoss, {"m1": 1.3, "m2": 0.2, "m3": 0.1, "scale": 8.0}),
        (mlkernels.ArcFaceLoss, {"margin": 0.3, "scale": 8.0}),
        (mlkernels.CosFaceLoss, {"margin": 0.3, "scale": 8.0}),
        (mlkernels.SphereFaceLoss, {"margin": 2.0, "scale": 8.0}),
    ]:
        loss = module(**{name: nn.Parameter(torch.tensor(value, dtype=F64)) for name, value in names.items()})
        assert dict(loss.named_parameters()).keys() == names.keys()
        input, target = draw(F64)
        (2.5 * loss(input, target)).backward()
        for name, value in names.items():
            step = 1e-6
            up, down = (module(**(names | {name: value + h}))(input, target) for h in (step, -step))
            numeric = 2.5 * (up - down).item() / (2 * step)
            assert getattr(loss, name).grad.item() == pytest.approx(numeric, rel=1e-5, abs=1e-8), (module, name)


def test_tables_can_be_trained():
    tables = {name: nn.Parameter(TABLE[i].to(F64)) for name, i in [("tau_slope", 0), ("tau_bias", 1)]}
    tables |= {name: nn.Parameter(TABLE[i].to(F64)) for name, i in [("t_slope", 0), ("t_bias", 1)]}
    loss = mlkernels.PiecewiseLoss(**tables)
    input, target = draw(F64)
    loss(input, target).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())
    assert len(list(loss.parameters())) == 4


def test_numbers_stay_numbers_and_tensors_become_buffers():
    scale = torch.tensor(3.0)
    loss = mlkernels.CosFaceLoss(margin=0.2, scale=scale, weight=torch.ones(C))
    assert loss.margin == 0.2
    assert dict(loss.named_buffers()).keys() == {"scale", "weight"}
    assert not list(loss.parameters())
    assert not loss.weight.requires_grad
    input, target = draw()
    assert torch.equal(loss(input, target), F.cosface_loss(input, target, margin=0.2, scale=3.0))
    assert loss.double().weight.dtype == F64
    later = mlkernels.CrossEntropyLoss()
    later.weight = COMMON["weight"]  # a place was kept for it
    assert "weight" in later.state_dict()


def test_repr():
    assert repr(mlkernels.FocalLoss(gamma=2.0)) == "FocalLoss(gamma=2.0)"
    loss = mlkernels.MarginLoss(
        m3=torch.zeros(C), scale=nn.Parameter(torch.tensor(8.0)), reduction="sum", weight=torch.ones(C)
    )
    text = (
        "MarginLoss(m1=1.0, m2=0.0, m3=(4,), scale=(), beyond_pi=None, gradient='exact', weight=(4,), reduction='sum')"
    )
    assert repr(loss) == text
    loss = mlkernels.PiecewiseLoss(tau_slope=TABLE[0], softcap=5.0)
    own = "t_slope=None, t_bias=None, tau_slope=(2,), tau_bias=None, scale=1.0, tau_min=1e-06, clamp='min'"
    assert repr(loss) == f"PiecewiseLoss({own}, softcap=5.0)"


def test_two_scale_repr():
    loss = mlkernels.TwoScaleLoss(2.0, variant="fixed", parametrization="relative", z_loss=0.1)
    text = "eta=0.01, z_loss=0.1, variant='fixed', parametrization='relative', detach_norm=True"
    assert repr(loss) == f"TwoScaleLoss({text})"


EVERY = [
    (mlkernels.CrossEntropyLoss, F.cross_entropy, ["scale", "weight", "z_loss"]),
    (mlkernels.FocalLoss, F.focal_loss, ["gamma", "weight", "reduction"]),
    (mlkernels.ModulatedCrossEntropyLoss, F.modulated_cross_entropy, ["beta", "gamma", "alpha", "kappa"]),
    (mlkernels.MarginLoss, F.margin_cross_entropy, ["m1", "m2", "m3", "beyond_pi", "gradient"]),
    (mlkernels.ArcFaceLoss, F.arcface_loss, ["margin", "scale"]),
    (mlkernels.CosFaceLoss, F.cosface_loss, ["margin", "scale"]),
    (mlkernels.SphereFaceLoss, F.sphereface_loss, ["margin", "scale"]),
    (mlkernels.TwoScaleLoss, F.two_scale_cross_entropy, ["eta"]),
    (mlkernels.PiecewiseLoss, F.piecewise_cross_entropy, ["t_slope", "clamp"]),
    (mlkernels.MultiMarginLoss, F.multi_margin_loss, ["p", "margin", "weight", "reduction"]),
    (mlkernels.CenterLoss, F.center_loss, ["reduction"]),
    (mlkernels.LGMLoss, F.lgm_loss, ["alpha", "lambda_", "weight"]),
]
SIZES = {"num_features": 2, "num_classes": C}


@pytest.mark.parametrize(("module", "function", "taken"), EVERY, ids=lambda value: getattr(value, "__name__", ""))
def test_unknown_arguments_are_refused(module, function, taken):
    """By the name that the caller wrote, with those that there are; torch's old ones with what to write instead."""
    input, target = draw()
    sizes = SIZES if module in (mlkernels.CenterLoss, mlkernels.LGMLoss) else {}
    needed = {F.two_scale_cross_entropy: (1.0, 2.0), F.center_loss: (input,), F.lgm_loss: (input,)}.get(function, ())
    calls = [
        (module.__name__, lambda **unknown: module(**sizes, **unknown)),
        (function.__name__, lambda **unknown: function(input, target, *needed, **unknown)),
    ]
    for name, call in calls:
        with pytest.raises(TypeError) as caught:
            call(gama=2.0)
        assert str(caught.value).startswith(f"{name}() takes no 'gama'; there are ")
        for argument in taken:
            assert argument in str(caught.value)
        for others in {
            "return_stats": True,
            "group": target,
            "values": (),
            "spec": None,
        }.items():  # softmax_loss's, ours
            if others[0] not in inspect.signature(function).parameters:
                with pytest.raises(TypeError, match=rf"^{name}\(\) takes no '{others[0]}'; there are "):
                    call(**dict([others]))
        for old, wanted in [
            ({"size_average": False}, "sum"),
            ({"size_average": True}, "mean"),
            ({"reduce": False}, "none"),
            ({"reduce": True}, "mean"),
            ({"size_average": False, "reduce": False}, "none"),
        ]:
            with pytest.raises(TypeError, match=rf"^{name}\(\) takes no {next(iter(old))}.*reduction='{wanted}'"):
                call(**old)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: mlkernels.FocalLoss(torch.ones(C)),  # a weight is no gamma
        lambda x, y: mlkernels.CrossEntropyLoss(torch.ones(C)),
        lambda x, y: mlkernels.ArcFaceLoss(5, 16),  # sizes are no margin and scale
        lambda x, y: mlkernels.CosFaceLoss(0.2),
        lambda x, y: mlkernels.SphereFaceLoss(4),
        lambda x, y: mlkernels.MarginLoss(1.0, 0.5),
        lambda x, y: mlkernels.ModulatedCrossEntropyLoss(4.0, 5.0),
        lambda x, y: mlkernels.PiecewiseLoss(TABLE[0]),
        lambda x, y: mlkernels.TwoScaleLoss(1.0, 0.1),
        lambda x, y: mlkernels.CenterLoss(2, C),
        lambda x, y: mlkernels.LGMLoss(2, C),
        lambda x, y: mlkernels.JointLoss([mlkernels.FocalLoss()], [1.0]),
        lambda x, y: mlkernels.MultiMarginLoss(1, 1.0, None, None),
        lambda x, y: mlkernels.Modulated(4.0, 5.0),
        lambda x, y: mlkernels.Margin(1.0),
        lambda x, y: mlkernels.Affine(1.0),
        lambda x, y: mlkernels.TwoScale(1.0, 2.0, 0.1),
        lambda x, y: mlkernels.Tau(*TABLE, 1e-3),
        lambda x, y: mlkernels.PiecewiseLinear(*TABLE, (-1.0, 1.0)),
        lambda x, y: F.focal_loss(x, y, torch.ones(C)),
        lambda x, y: F.cross_entropy(x, y, torch.ones(C)),
        lambda x, y: F.modulated_cross_entropy(x, y, 4.0),
        lambda x, y: F.margin_cross_entropy(x, y, 1.0),
        lambda x, y: F.arcface_loss(x, y, 0.5),
        lambda x, y: F.cosface_loss(x, y, 0.5),
        lambda x, y: F.sphereface_loss(x, y, 4),
        lambda x, y: F.two_scale_cross_entropy(x, y, 1.0, 2.0, 0.1),
        lambda x, y: F.piecewise_cross_entropy(x, y, TABLE[0]),
        lambda x, y: F.lgm_loss(x, y, x, x),
        lambda x, y: F.center_loss(x, y, x, "sum"),
        lambda x, y: F.multi_margin_loss(x, y, 1, 1.0, None, None),
    ],
)
def test_numbers_are_keywords(call):
    """A positional weight, number of classes or margin in degrees must not be swallowed as something else."""
    with pytest.raises(TypeError, match="positional argument"):
        call(*draw())


@pytest.mark.parametrize("module", [row[0] for row in EVERY], ids=lambda module: module.__name__)
def test_docstrings_have_every_argument(module):
    described = module.__doc__.split("Args:\n")[1].split("Example:")[0]
    for name in inspect.signature(module).parameters:
        if name not in ("unknown", "device", "dtype"):
            assert re.search(rf"\b{name}\b[^\n]*:", described), name


def test_modulated_has_one_order():
    def order(of):
        return [name for name in inspect.signature(of).parameters if name in ("alpha", "beta", "gamma", "kappa")]

    for of in (F.modulated_cross_entropy, mlkernels.ModulatedCrossEntropyLoss, mlkernels.Modulated):
        assert order(of) == ["beta", "gamma", "alpha", "kappa"]


@pytest.mark.parametrize("name", ["scale", "weight", "logit_adjustment"])
def test_a_gradient_that_no_optimizer_would_see_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} .*{name}\.detach\(\)") as caught:
        mlkernels.CrossEntropyLoss(**{name: torch.ones(C, requires_grad=True)})
    if name == "scale":
        assert "nn.Parameter(scale)" in str(caught.value)
        mlkernels.CrossEntropyLoss(scale=nn.Parameter(torch.ones(C)))
    else:
        with pytest.raises(ValueError, match="not differentiated"):
            mlkernels.CrossEntropyLoss(**{name: nn.Parameter(torch.ones(C))})
    with torch.no_grad():
        frozen = nn.Parameter(torch.tensor(2.0), requires_grad=False)
    assert mlkernels.CrossEntropyLoss(scale=frozen).scale is frozen


def test_what_belongs_to_the_batch_is_given_to_forward():
    input, target = draw()
    norm = torch.rand(N, 1) + 1
    loss = mlkernels.MarginLoss(m1=2.0, scale=1.0)
    wanted = F.margin_cross_entropy(input, target, m1=2.0, scale=1.0, norm=norm)
    assert torch.equal(loss(input, target, norm), wanted)
    assert not torch.equal(loss(input, target), wanted)
    slope, bias = torch.rand(2, 3) + 0.5, 0.1 * torch.rand(2, 3)
    group = torch.tensor([0, 1, 0, 1, 0, 1])
    loss = mlkernels.PiecewiseLoss(t_slope=slope, t_bias=bias)
    wanted = F.piecewise_cross_entropy(input, target, t_slope=slope, t_bias=bias, group=group, norm=norm)
    assert torch.equal(loss(input, target, group, norm), wanted)


# ---- two scales --------------------------------------------------------------------------------------------------


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


def network():
    return nn.Sequential(nn.Linear(C, 8), nn.ReLU(), nn.Linear(8, C))


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


# ---- Gaussians ---------------------------------------------------------------------------------------------------


def test_lgm_module():
    x, target = torch.randn(N, 3), torch.tensor([0, 1, -100, 3, 1, 0])
    loss = mlkernels.LGMLoss(
        num_features=3,
        num_classes=C,
        alpha=0.3,
        lambda_=0.5,
        diagonal=True,
        weight=COMMON["weight"],
        label_smoothing=0.1,
        reduction="sum",
    )
    assert torch.equal(loss.log_variance, torch.zeros(C, 3))
    nn.init.normal_(loss.log_variance)
    options = {"weight": COMMON["weight"], "label_smoothing": 0.1, "reduction": "sum"}
    wanted = F.lgm_loss(x, target, loss.means, log_variance=loss.log_variance, alpha=0.3, lambda_=0.5, **options)
    assert torch.equal(loss(x, target), wanted)
    (2.5 * loss(x, target)).backward()
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters())
    assert dict(loss.named_parameters()).keys() == {"means", "log_variance"}
    other = mlkernels.LGMLoss(num_features=3, num_classes=C, alpha=0.3, lambda_=0.5, diagonal=True, **options)
    other.load_state_dict(saved(loss))
    assert torch.equal(other(x, target), wanted)
    identity = mlkernels.LGMLoss(num_features=3, num_classes=C)
    assert torch.equal(identity(x, target), F.lgm_loss(x, target, identity.means))
    assert "alpha=0.1, lambda_=0.1" in repr(identity)
    assert mlkernels.LGMLoss(num_features=3, num_classes=C, dtype=F64, diagonal=True).log_variance.dtype == F64
    defaults = {name: p.default for name, p in inspect.signature(F.lgm_loss).parameters.items()}
    for name, parameter in inspect.signature(mlkernels.LGMLoss.__init__).parameters.items():
        assert name not in defaults or parameter.default == defaults[name]


# ---- joint losses ------------------------------------------------------------------------------------------------


def pair():
    return [mlkernels.CrossEntropyLoss(), lambda x, y: mlkernels.multi_margin_loss(x, y)]


def test_joint_fixed():
    input, target = draw()
    one, two = (loss(input, target) for loss in pair())
    torch.testing.assert_close(mlkernels.JointLoss(pair())(input, target), one + two)
    torch.testing.assert_close(mlkernels.JointLoss(pair(), weights=[0.25, 3.0])(input, target), 0.25 * one + 3 * two)
    torch.testing.assert_close(mlkernels.JointLoss(pair()[:1], weights=[2.0])(input, target), 2 * one)


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


# ---- the package -------------------------------------------------------------------------------------------------


def test_public_names():
    for name in mlkernels.__all__:
        assert hasattr(mlkernels, name), name
    assert set(F.__all__) | set(mlkernels.modules.__all__) <= set(mlkernels.__all__)
    assert mlkernels.__all__ == sorted(mlkernels.__all__)


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


@pytest.mark.parametrize("diagonal", [False, True])
def test_lgm_logits_are_gaussian_log_densities(diagonal):
    loss = mlkernels.LGMLoss(num_features=3, num_classes=4, diagonal=diagonal)
    if diagonal:
        torch.nn.init.normal_(loss.log_variance)
    features = torch.randn(5, 3)
    deviation = torch.ones(4, 3) if loss.log_variance is None else (0.5 * loss.log_variance).exp()
    density = torch.distributions.Normal(loss.means, deviation).log_prob(features.unsqueeze(1)).sum(2)
    torch.testing.assert_close(torch.softmax(loss.logits(features), 1), torch.softmax(density, 1))
