"""The modules: their functional twins with the arguments kept, and what only modules have."""

import copy
import inspect
import io
import pickle
import re

import pytest
import torch
from table import F64, extras
from torch import nn

import mlkernels
from mlkernels import functional as F
from mlkernels import soft_targets
from mlkernels.call import COMMON as COMMON_DEFAULTS
from mlkernels.numbering import PER_CLASS

N, C = 6, 4
PER_CALL = ("row_weight", "normalizer")
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
COMMON = {"ignore_index": 3, "reduction": "sum", **extras(C), "backend": "reference"}


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
    batch = ("norm", "group", *PER_CALL)
    wanted = {name: default for name, default in arguments(function).items() if name not in batch}
    assert arguments(module.__init__) == wanted


@pytest.mark.parametrize(("module", "own", "function"), [twin for twin in TWINS if twin[2] is not F.multi_margin_loss])
def test_what_belongs_to_a_batch(module, own, function):
    """Weights of rows and a divisor are given to the call, and not kept."""
    input, target = draw()
    batch = {"row_weight": torch.rand(N), "normalizer": 2.5}
    loss = module(**own, backend="reference")
    wanted = function(input, target, **own, **batch, backend="reference")
    assert torch.equal(loss(input, target, **batch), wanted)
    assert not torch.equal(loss(input, target), wanted)
    for name, value in batch.items():
        with pytest.raises(TypeError, match=rf"{name}, which belongs to a batch: give it to the call, loss\("):
            module(**own, **{name: value})


def test_class_probabilities_with_weights_of_rows_and_a_divisor():
    input, weight = draw(F64)[0], torch.rand(N, dtype=F64)
    target, options = torch.rand(N, C, dtype=F64).softmax(1), {"weight": COMMON["weight"], "z_loss": 0.1}
    rows = F.cross_entropy(input, target, **options, reduction="none") * weight
    for reduction, wanted in (("none", rows), ("sum", rows.sum()), ("mean", rows.mean())):
        found = F.cross_entropy(input, target, **options, row_weight=weight, reduction=reduction)
        torch.testing.assert_close(found, wanted)
    for divisor in (3, torch.tensor(3)):
        found = F.cross_entropy(input, target, **options, row_weight=weight, normalizer=divisor)
        torch.testing.assert_close(found, rows.sum() / 3)
    for words, error, bad in [
        ("normalizer must be > 0", ValueError, {"normalizer": 0.0}),
        ("normalizer must be > 0", ValueError, {"normalizer": torch.tensor(-1.0)}),
        ("normalizer is what reduction='mean' divides by", ValueError, {"normalizer": 2.0, "reduction": "sum"}),
        ("row_weight must have target's shape", ValueError, {"row_weight": torch.ones(N, C)}),
    ]:
        with pytest.raises(error, match=words):
            F.cross_entropy(input, target, **bad)


@pytest.mark.parametrize(
    ("name", "good", "bad", "error"),
    [
        ("ignore_index", -100, -100.0, TypeError),
        ("ignore_index", -1, 1, ValueError),
        ("label_smoothing", 0.0, False, TypeError),
        ("label_smoothing", 1, True, TypeError),
        ("z_loss", 0.1, -0.1, ValueError),
        ("backend", None, "cpu", TypeError),
        ("reduction", "mean", "means", ValueError),
        ("scale", 1.0, True, TypeError),
        ("scale", 2.0, -2.0, ValueError),
    ],
)
def test_options_of_class_probabilities_that_are_remembered(name, good, bad, error):
    """A call that was legal makes none legal that only compares equal to it."""
    input, target = torch.randn(N, C), torch.rand(N, C).softmax(1)
    for _ in range(2):
        F.cross_entropy(input, target, **{name: good})
    for _ in range(2):
        with pytest.raises(error, match=name):
            F.cross_entropy(input, target, **{name: bad})


def test_options_of_class_probabilities_are_looked_at_once(monkeypatch):
    input, target = torch.randn(N, C), torch.rand(N, C).softmax(1)
    monkeypatch.setattr(soft_targets, "_checked", set())
    looked = []
    real = soft_targets.check_loss
    monkeypatch.setattr(soft_targets, "check_loss", lambda *of, **options: looked.append(of) or real(*of, **options))
    for z_loss in (0.1, 0.1, 0.2, 0.1):
        F.cross_entropy(input, target, z_loss=z_loss)
    assert len(looked) == 2


@pytest.mark.parametrize(("module", "own", "function"), TWINS)
def test_shared_arguments_are_shown(module, own, function):
    """Every one of them in the signature, with its default, and with its meaning in help()."""
    for of in (module, function) if function is not F.multi_margin_loss else ():
        taken = inspect.signature(of).parameters
        shared = {name: value for name, value in COMMON_DEFAULTS.items() if of is function or name not in PER_CALL}
        assert {name: taken[name].default for name in shared} == shared
        assert not any(one.kind is one.VAR_KEYWORD for one in taken.values())
        for name in shared:
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
    for twin in (other, copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert torch.equal(twin(input, target), wanted)


def test_those_beside_the_family_are_copied_and_pickled():
    x, y = draw()
    cross_entropy = mlkernels.CrossEntropyLoss()
    for one in (
        mlkernels.LGMLoss(num_classes=C, num_features=C),
        mlkernels.CenterLoss(num_classes=C, num_features=C, rate=0.5),
        mlkernels.MultiMarginLoss(p=2),
        mlkernels.JointLoss([cross_entropy, mlkernels.FocalLoss()], mode="uncertainty"),
        mlkernels.LinearLoss(mlkernels.CosFaceLoss(margin=nn.Parameter(torch.tensor(0.3))), C, 9, normalize=True),
        mlkernels.LinearLoss(cross_entropy, C, 9, bias=True, tile_update=mlkernels.TileSGD(lr=0.1, momentum=0.9)),
    ):
        twins = copy.deepcopy(one), pickle.loads(pickle.dumps(one))
        wanted = one(x, y)  # moves centers
        for twin in twins:
            assert torch.equal(twin(x, y), wanted), one
            assert repr(twin) == repr(one) and twin.state_dict().keys() == one.state_dict().keys()


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


@pytest.mark.parametrize("module", [row[0] for row in EVERY], ids=lambda module: module.__name__)
def test_docstrings_have_every_argument(module):
    described = module.__doc__.split("Args:\n")[1].split("Example:")[0]
    assert "(N, 1)" not in described  # numbers of each row belong to a batch
    for name in inspect.signature(module).parameters:
        if name not in ("unknown", "device", "dtype"):
            assert re.search(rf"\b{name}\b[^\n]*:", described), name


def test_modulated_has_one_order():
    def order(of):
        return [name for name in inspect.signature(of).parameters if name in ("alpha", "beta", "gamma", "kappa")]

    for of in (F.modulated_cross_entropy, mlkernels.ModulatedCrossEntropyLoss, mlkernels.Modulated):
        assert order(of) == ["beta", "gamma", "alpha", "kappa"]


@pytest.mark.parametrize("name", ["scale", *PER_CLASS.values()])
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


@pytest.mark.parametrize("diagonal", [False, True])
def test_lgm_logits_are_gaussian_log_densities(diagonal):
    loss = mlkernels.LGMLoss(num_features=3, num_classes=4, diagonal=diagonal)
    if diagonal:
        torch.nn.init.normal_(loss.log_variance)
    features = torch.randn(5, 3)
    deviation = torch.ones(4, 3) if loss.log_variance is None else (0.5 * loss.log_variance).exp()
    density = torch.distributions.Normal(loss.means, deviation).log_prob(features.unsqueeze(1)).sum(2)
    torch.testing.assert_close(torch.softmax(loss.logits(features), 1), torch.softmax(density, 1))


# ---- the package -------------------------------------------------------------------------------------------------


def test_public_names():
    for name in mlkernels.__all__:
        assert hasattr(mlkernels, name), name
    assert len(mlkernels.__all__) == len(set(mlkernels.__all__))
