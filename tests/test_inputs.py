"""Bad arguments: an error that names the argument, what came and what it takes, before anything is touched."""

import math
import warnings
from functools import partial

import pytest
import torch
from table import FEW, INF, LOSSES, NAN, draw, run, usable_backends

import mlkernels
import mlkernels.call as door
from mlkernels import Affine, Margin, Modulated, PiecewiseLinear, Tau, Truncated, TwoScale
from mlkernels.numbering import PER_CLASS

N, C = 4, 3
T = torch.tensor
INTS = torch.ones(C, dtype=torch.long)
TABLE = torch.ones(5)
ce, focal, modulated = mlkernels.cross_entropy, mlkernels.focal_loss, mlkernels.modulated_cross_entropy
margin, two_scale, softmax = mlkernels.margin_cross_entropy, mlkernels.two_scale_cross_entropy, mlkernels.softmax_loss
piecewise = mlkernels.piecewise_cross_entropy


def case(words, error, call):
    name = words.split("|")[0]
    return pytest.param(words.split("|"), error, call, id=f"{name}: {words.split('|', 1)[1]}")


def wrong_tensor(name, call):
    """What every per-class vector refuses."""
    return [
        case(f"{name}|list", TypeError, lambda x, y, **o: call(x, y, **{name: [1.0, 2.0, 3.0]}, **o)),
        case(f"{name}|floating|int64", TypeError, lambda x, y, **o: call(x, y, **{name: INTS}, **o)),
        case(f"{name}|(3,)|(4,)", ValueError, lambda x, y, **o: call(x, y, **{name: torch.ones(4)}, **o)),
        case(f"{name}|(3,)|(4, 1)", ValueError, lambda x, y, **o: call(x, y, **{name: torch.ones(4, 1)}, **o)),
        case(f"{name}|cpu|meta", ValueError, lambda x, y, **o: call(x, y, **{name: torch.ones(3, device="meta")}, **o)),
        case(
            f"{name}|gradient", ValueError, lambda x, y, **o: call(x, y, **{name: torch.ones(3).requires_grad_()}, **o)
        ),
    ]


def wrong_number(name, call, allowed, *bad):
    """Numbers out of range, as numbers and as tensors, and tensors of wrong shapes and dtypes."""
    cases = [
        case(f"{name}|{allowed}|{value}", ValueError, lambda x, y, v=value, **o: call(x, y, **{name: v}, **o))
        for value in bad
    ]
    cases += [
        case(f"{name}|{allowed}|{value}|tensor", ValueError, lambda x, y, v=value, **o: call(x, y, **{name: T(v)}, **o))
        for value in map(float, bad)
        if abs(value) < INF
    ]
    cases += [
        case(f"{name}|str", TypeError, lambda x, y, **o: call(x, y, **{name: "1"}, **o)),
        case(f"{name}|bool", TypeError, lambda x, y, **o: call(x, y, **{name: True}, **o)),
        case(f"{name}|floating|int64", TypeError, lambda x, y, **o: call(x, y, **{name: T(1)}, **o)),
        case(f"{name}|(3,)|(4, 1)|(4,)", ValueError, lambda x, y, **o: call(x, y, **{name: torch.ones(4)}, **o)),
        case(f"{name}|(3,)|(4, 1)|(1, 4)", ValueError, lambda x, y, **o: call(x, y, **{name: torch.ones(1, 4)}, **o)),
        case(f"{name}|cpu|meta", ValueError, lambda x, y, **o: call(x, y, **{name: T(1.0).to("meta")}, **o)),
    ]
    return cases


def plain_number(name, allowed, *bad):
    """Options that take a Python number only."""
    cases = [
        case(f"{name}|{allowed}|{value}", ValueError, lambda x, y, v=value, **o: ce(x, y, **{name: v}, **o))
        for value in bad
    ]
    return [
        *cases,
        case(f"{name}|number|str", TypeError, lambda x, y, **o: ce(x, y, **{name: "1"}, **o)),
        case(f"{name}|number|got a tensor", TypeError, lambda x, y, **o: ce(x, y, **{name: T(0.5)}, **o)),
    ]


def tables(slope, bias, call):
    return [
        case(f"{slope}|list", TypeError, lambda x, y, **o: call(x, y, **{slope: [1.0], bias: TABLE}, **o)),
        case(f"{bias}|(5,)|(4,)", ValueError, lambda x, y, **o: call(x, y, **{slope: TABLE, bias: torch.ones(4)}, **o)),
        case(f"{slope}|floating|int64", TypeError, lambda x, y, **o: call(x, y, **{slope: INTS, bias: INTS}, **o)),
        case(f"{slope}|(M,)|()", ValueError, lambda x, y, **o: call(x, y, **{slope: T(1.0), bias: T(1.0)}, **o)),
        case(f"{slope}|(M,)|(0,)", ValueError, lambda x, y, **o: call(x, y, **{slope: T([]), bias: T([])}, **o)),
        case(
            f"group|required|(G, M)|{slope}", ValueError, lambda x, y, **o: call(x, y, **{slope: torch.ones(2, 5)}, **o)
        ),
    ]


GROUPS = {"t_slope": torch.ones(2, 5)}
CASES = [
    # input
    case("input|list", TypeError, lambda x, y, **o: ce(x.tolist(), y, **o)),
    case("input|float32|int64", TypeError, lambda x, y, **o: ce(x.long(), y, **o)),
    case("input|float32|bool", TypeError, lambda x, y, **o: ce(x > 0, y, **o)),
    case("input|float32|complex64", TypeError, lambda x, y, **o: ce(x.to(torch.complex64), y, **o)),
    case("input|(N, C)|0-d", ValueError, lambda x, y, **o: ce(T(1.0), y, **o)),
    case("input|class|(4, 0)", ValueError, lambda x, y, **o: ce(x[:, :0], y, **o)),
    # target
    case("input|dense|sparse_coo", TypeError, lambda x, y, **o: ce(x.to_sparse(), y, **o)),
    *[
        case(
            "input|dense|nested",
            TypeError,
            lambda x, y, layout=layout, **o: focal(torch.nested.as_nested_tensor([x, x], layout=layout), y, **o),
        )
        for layout in (torch.jagged, torch.strided)
    ],
    case("target|list|torch.as_tensor", TypeError, lambda x, y, **o: ce(x, y.tolist(), **o)),
    case("target|int", TypeError, lambda x, y, **o: ce(x, 1, **o)),
    case("target|integer|bool|target.long()", TypeError, lambda x, y, **o: ce(x, y > 0, **o)),
    case("target|integer|float32|target.long()|cross_entropy", TypeError, lambda x, y, **o: focal(x, y.float(), **o)),
    case("target|(4,)|(3,)", ValueError, lambda x, y, **o: ce(x, y[:3], **o)),
    case("target|(4,)|(4, 1)", ValueError, lambda x, y, **o: ce(x, y.unsqueeze(1), **o)),
    case(
        "target|(4, 2)|(4, 3)",
        ValueError,
        lambda x, y, **o: ce(x[:, :, None].expand(4, 3, 2), y[:, None].expand(4, 3), **o),
    ),
    case("target|cpu|meta", ValueError, lambda x, y, **o: ce(x, y.to("meta"), **o)),
    # the options of every function
    *(case for name in PER_CLASS.values() for case in wrong_tensor(name, ce)),
    case("ignore_index|int|float", TypeError, lambda x, y, **o: ce(x, y, ignore_index=1.5, **o)),
    case(
        "ignore_index|representable|9007199254740993",
        ValueError,
        lambda x, y, **o: ce(x, y, ignore_index=2**53 + 1, **o),
    ),
    case("ignore_index|int|NoneType", TypeError, lambda x, y, **o: ce(x, y, ignore_index=None, **o)),
    case("reduction|'none'|'mean'|'sum'|'average'", ValueError, lambda x, y, **o: ce(x, y, reduction="average", **o)),
    case("reduction|'none'|'mean'|'sum'|None", ValueError, lambda x, y, **o: ce(x, y, reduction=None, **o)),
    *plain_number("label_smoothing", "[0, 1]", -0.1, 1.5, NAN),
    *plain_number("z_loss", ">= 0", -0.1, INF, NAN),
    *plain_number("softcap", "> 0", 0.0, -1.0, INF, NAN),
    *[
        case(words, error, lambda x, y, v=value, **o: ce(x, y, row_weight=v, **o))
        for words, error, value in [
            ("row_weight|target's shape (4,)|list|torch.as_tensor", TypeError, [1.0] * N),
            ("row_weight|floating|int64", TypeError, torch.ones(N, dtype=torch.long)),
            ("row_weight|target's shape (4,)|(4, 1)", ValueError, torch.ones(N, 1)),
            ("row_weight|cpu|meta", ValueError, torch.ones(N, device="meta")),
            ("row_weight|reduction='none'|detach", ValueError, torch.ones(N, requires_grad=True)),
        ]
    ],
    case("row_weight|()|(1,)", ValueError, lambda x, y, **o: ce(x[0], y[0], row_weight=torch.ones(1), **o)),
    *[
        case(words, error, lambda x, y, v=value, **o: ce(x, y, normalizer=v, **o))
        for words, error, value in [
            ("normalizer|> 0|0", ValueError, 0),
            ("normalizer|> 0|nan", ValueError, NAN),
            ("normalizer|> 0|holding -2", ValueError, T(-2)),
            ("normalizer|> 0|holding nan", ValueError, T(NAN)),
            ("normalizer|> 0|holding inf", ValueError, T(INF)),
            ("normalizer|a number|str", TypeError, "4"),
            ("normalizer|floating|integer|bool", TypeError, T(True)),
            ("normalizer|0-d|(4,)", ValueError, torch.ones(N)),
            ("normalizer|cpu|meta", ValueError, torch.ones((), device="meta")),
            ("normalizer|reduction='sum'|detach", ValueError, torch.ones((), requires_grad=True)),
        ]
    ],
    case("normalizer|'mean'|'sum'", ValueError, lambda x, y, **o: ce(x, y, normalizer=4, reduction="sum", **o)),
    case("backend|'reference'|'cpu'|'gpu'", ValueError, lambda x, y, **o: ce(x, y, backend="gpu")),
    # the parameters
    *wrong_number("scale", ce, "> 0", 0.0, -1, NAN, INF),
    *wrong_number("gamma", focal, ">= 0", -0.5, NAN, INF),
    *wrong_number("alpha", modulated, ">= 0", -1.0, NAN),
    *wrong_number("beta", modulated, "> 0", 0.0, -2.0, NAN),
    *wrong_number("kappa", modulated, ">= 0", -0.5, NAN),
    case("gamma|kappa|>= 1", ValueError, lambda x, y, **o: modulated(x, y, gamma=0.25, kappa=0.5, **o)),
    *wrong_number("m1", margin, "> 0", 0.0, -1.0, NAN),
    *wrong_number("norm", margin, "> 0", 0.0, -2.0),
    case("m2|finite|nan", ValueError, lambda x, y, **o: margin(x, y, m2=NAN, **o)),
    case("m3|finite|inf", ValueError, lambda x, y, **o: margin(x, y, m3=INF, **o)),
    case(
        "beyond_pi|'linear'|'monotone'|'easy'|'none'|'hard'",
        ValueError,
        lambda x, y, **o: margin(x, y, beyond_pi="hard", **o),
    ),
    case("beyond_pi|linear|m1 = 1|2", ValueError, lambda x, y, **o: margin(x, y, m1=2.0, beyond_pi="linear", **o)),
    case(
        "gradient|'exact'|'straight_through'|'wrong'", ValueError, lambda x, y, **o: margin(x, y, gradient="wrong", **o)
    ),
    *wrong_number("scale_low", lambda x, y, scale_low, **o: two_scale(x, y, scale_low, 2.0, **o), "> 0", 0.0, -1.0),
    *wrong_number("scale_high", lambda x, y, scale_high, **o: two_scale(x, y, 1.0, scale_high, **o), "> 0", 0.0, -1.0),
    *wrong_number("logit_norm", lambda x, y, **o: two_scale(x, y, 1.0, 2.0, **o), "> 0", 0.0, -1.0),
    case("eta|nan", ValueError, lambda x, y, **o: two_scale(x, y, 1.0, 2.0, eta=NAN, **o)),
    case(
        "eta|gradient|detach", ValueError, lambda x, y, **o: two_scale(x, y, 1.0, 2.0, eta=T(0.1).requires_grad_(), **o)
    ),
    *wrong_number("k", lambda x, y, k, **o: softmax(x, y, head=Truncated(k), **o), "(0, 1]", 0.0, 1.5, NAN),
    *wrong_number(
        "slope", lambda x, y, slope, **o: softmax(x, y, transform=Affine(slope=slope), **o), "finite", NAN, INF
    )[:2],
    *tables("t_slope", "t_bias", piecewise),
    *tables("tau_slope", "tau_bias", piecewise),
    case("norm|t_slope", ValueError, lambda x, y, **o: piecewise(x, y, tau_slope=TABLE, norm=torch.ones(4, 1), **o)),
    case("tau_min|(0, 1]|0.0", ValueError, lambda x, y, **o: piecewise(x, y, tau_slope=TABLE, tau_min=0.0, **o)),
    case(
        "clamp|'min'|'cross_entropy'|'max'",
        ValueError,
        lambda x, y, **o: piecewise(x, y, tau_slope=TABLE, clamp="max", **o),
    ),
    case("group|(G, M)", ValueError, lambda x, y, **o: piecewise(x, y, t_slope=TABLE, group=y * 0, **o)),
    case("group|integer|float32", TypeError, lambda x, y, **o: piecewise(x, y, **GROUPS, group=y.float(), **o)),
    case("group|(4,)|(3,)", ValueError, lambda x, y, **o: piecewise(x, y, **GROUPS, group=y[:3] * 0, **o)),
    case("group|cpu|meta", ValueError, lambda x, y, **o: piecewise(x, y, **GROUPS, group=y.to("meta"), **o)),
    case("group 2|row 1|[0, 2)", IndexError, lambda x, y, **o: piecewise(x, y, **GROUPS, group=T([0, 2, 1, 0]), **o)),
    case(
        "tau|number of groups|2|3",
        ValueError,
        lambda x, y, **o: piecewise(x, y, t_slope=torch.ones(2, 5), tau_slope=torch.ones(3, 5), group=y * 0, **o),
    ),
    # compositions
    case("transform|Margin|str", TypeError, lambda x, y, **o: softmax(x, y, transform="margin", **o)),
    case(
        "transform|Margin|Modulated|target_logit",
        TypeError,
        lambda x, y, **o: softmax(x, y, transform=Modulated(), **o),
    ),
    case("head|Modulated|Margin", TypeError, lambda x, y, **o: softmax(x, y, head=Margin(), **o)),
    case(
        "target_logit|transform|Margin",
        ValueError,
        lambda x, y, **o: softmax(x, y, transform=Margin(), target_logit=torch.ones(4, 1), **o),
    ),
    case("target_logit|(4, 1)|(4, 3)", ValueError, lambda x, y, **o: softmax(x, y, target_logit=x, **o)),
    case("scale|number|Modulated", TypeError, lambda x, y, **o: softmax(x, y, scale=Modulated(), **o)),
    case(
        "domain|(1.0, -1.0)",
        ValueError,
        lambda x, y, **o: softmax(x, y, transform=PiecewiseLinear(TABLE, TABLE, domain=(1.0, -1.0)), **o),
    ),
    # the caller's own word
    *[
        case(f"{word}|{what}", error, lambda x, y, call=call, **o: call(x, y, **o))
        for word, what, error, call in [
            ("margin", "must be finite|nan", ValueError, partial(mlkernels.arcface_loss, margin=NAN)),
            ("margin", "must be finite|inf", ValueError, partial(mlkernels.cosface_loss, margin=INF)),
            ("margin", "must be > 0|-2", ValueError, partial(mlkernels.sphereface_loss, margin=-2)),
            ("margin", "must be > 0|-2", ValueError, partial(mlkernels.sphereface_loss, margin=T(-2.0))),
            ("margin", "a number or a floating tensor|str", TypeError, partial(mlkernels.arcface_loss, margin="1")),
            (
                "margin",
                "margin = 1|margin = 2",
                ValueError,
                partial(mlkernels.sphereface_loss, margin=2.0, beyond_pi="linear"),
            ),
            ("margin", "radians|degrees|0.4992", ValueError, partial(mlkernels.arcface_loss, margin=28.6)),
            ("margin", "radians|degrees|0.4992", ValueError, partial(mlkernels.arcface_loss, margin=T(28.6))),
            ("m2", "radians|degrees|-0.8727", ValueError, partial(margin, m2=T([0.5, INF, -50.0]))),
            ("m2", "radians|degrees|0.5236", ValueError, partial(margin, m2=T([[0.5]] * (N - 1) + [[30.0]]).half())),
            ("m2", "radians|degrees|-3.2", ValueError, partial(margin, m2=-3.2)),
            ("Margin.m2", "radians|degrees|30", ValueError, partial(softmax, transform=Margin(m2=30))),
            ("Margin.m2", "radians|degrees|0.5236", ValueError, partial(softmax, transform=Margin(m2=T([30.0])))),
            ("Margin.m1", "> 0", ValueError, partial(softmax, transform=Margin(m1=0.0))),
            ("Margin.norm", "> 0", ValueError, partial(softmax, transform=Margin(norm=T([[-1.0]] * N)))),
            ("Affine.slope", "finite", ValueError, partial(softmax, transform=Affine(slope=NAN))),
            ("TwoScale.high", "> 0|-2", ValueError, partial(softmax, scale=TwoScale(1.0, T(-2.0)))),
            ("TwoScale.eta", "finite|nan", ValueError, partial(softmax, scale=TwoScale(1.0, 2.0, eta=NAN))),
            ("TwoScale.norm", "> 0|0", ValueError, partial(softmax, scale=TwoScale(1.0, 2.0, norm=0.0))),
            ("Modulated.beta", "> 0|0.0", ValueError, partial(softmax, head=Modulated(beta=0.0))),
            ("Modulated.kappa", "(3,)|(4, 1)|(2,)", ValueError, partial(softmax, head=Modulated(kappa=torch.ones(2)))),
            ("Tau.minimum", "in (0, 1]|2", ValueError, partial(softmax, head=Tau(TABLE, TABLE, minimum=2))),
            ("Tau.slope", "(M,)|(G, M)|float", TypeError, partial(softmax, head=Tau(1.0, 0.0))),
            ("Tau.bias", "(M,)|(G, M)|int", TypeError, partial(softmax, head=Tau(TABLE, 0))),
            ("Tau.bias", "Tau.slope|(5,)|(4,)", ValueError, partial(softmax, head=Tau(TABLE, TABLE[:4]))),
            (
                "PiecewiseLinear.slope",
                "(M,)|list",
                TypeError,
                partial(softmax, transform=PiecewiseLinear([1.0], TABLE)),
            ),
            ("PiecewiseLinear.slope", "(M,)|float", TypeError, partial(softmax, transform=PiecewiseLinear(1.0, 0.0))),
            *(
                ("PiecewiseLinear.domain", "two numbers|-1", TypeError, partial(softmax, transform=cut))
                for cut in (PiecewiseLinear(TABLE, TABLE, domain=ends) for ends in ((T(-1.0), 1.0), ("-1", 1)))
            ),
            (
                "PiecewiseLinear.domain",
                "two numbers|0.5",
                TypeError,
                partial(softmax, transform=PiecewiseLinear(TABLE, TABLE, domain=0.5)),
            ),
            ("Truncated.k", "in (0, 1]|1.5", ValueError, partial(softmax, head=Truncated(1.5))),
            ("t_slope", "(M,)|float", TypeError, partial(piecewise, t_slope=1.0)),
            ("norm", "> 0|-1", ValueError, partial(piecewise, t_slope=TABLE, norm=-1.0)),
            ("tau_min", "a number|a tensor", TypeError, partial(piecewise, tau_slope=TABLE, tau_min=T(0.1))),
            ("label_smoothing", "a number|NoneType", TypeError, partial(ce, label_smoothing=None)),
            ("label_smoothing", "a number|str", TypeError, partial(ce, label_smoothing="")),
            ("z_loss", "a number|NoneType", TypeError, partial(ce, z_loss=None)),
            ("z_loss", "a number|bool", TypeError, partial(ce, z_loss=False)),
            ("ignore_index", "int|Tensor", TypeError, partial(ce, ignore_index=T(1))),
            ("ignore_index", "int|bool", TypeError, partial(ce, ignore_index=True)),
            ("ignore_index", "int64|18446744073709551616", ValueError, partial(ce, ignore_index=2**64)),
            ("reduction", "'none'|['mean']", ValueError, partial(ce, reduction=["mean"])),
            ("beyond_pi", "'easy'|['easy']", ValueError, partial(margin, beyond_pi=["easy"])),
            ("scale", "finite|beyond float64", ValueError, partial(ce, scale=10**400)),
            ("scale", "a number|complex", TypeError, partial(ce, scale=1j)),
            ("transform", "the class Margin: write Margin(...)", TypeError, partial(softmax, transform=Margin)),
            ("head", "the class Tau: write Tau(...)", TypeError, partial(softmax, head=Tau)),
            ("scale", "the class TwoScale: write TwoScale(...)", TypeError, partial(softmax, scale=TwoScale)),
            ("return_stats", "True or False|'yes'", TypeError, partial(softmax, return_stats="yes")),
            ("gamma", "torch.int64|gamma.float()", TypeError, partial(focal, gamma=T(2))),
            ("weight", "torch.int64|weight.float()", TypeError, partial(ce, weight=INTS)),
            ("row_weight", "torch.bool|row_weight.float()", TypeError, partial(ce, row_weight=T([True] * N))),
            ("gamma", "list|torch.as_tensor(gamma)", TypeError, partial(focal, gamma=[1.0, 2.0, 3.0])),
        ]
    ],
    case("TwoScale.low|> 0|-1", ValueError, lambda x, y, **o: softmax(x, y, scale=TwoScale(-1.0, 2.0), **o)),
    case("clamp|'max'", ValueError, lambda x, y, **o: softmax(x, y, head=Tau(TABLE, TABLE, clamp="max"), **o)),
]


@pytest.mark.parametrize(("words", "error", "call"), CASES)
def test_bad_argument(words, error, call, backend):
    x = torch.linspace(-1, 1, N * C).reshape(N, C).requires_grad_()
    y = T([0, 2, 1, 0])
    before = (x.detach().clone(), x._version, y.clone(), y._version)
    options = {} if "backend" in words else {"backend": backend}
    with pytest.raises(error) as caught:
        call(x, y, **options)
    message = str(caught.value)
    for word in words:
        if word not in ("tensor", "t_slope", "tau_slope") or words[0] != "group":
            assert word in message, message
    # Nothing was touched, and the next call is served.
    assert torch.equal(x.detach(), before[0])
    assert torch.equal(y, before[2])
    assert (x._version, y._version) == (before[1], before[3])
    assert x.grad is None
    good = ce(x, y, backend=backend)
    torch.testing.assert_close(good.detach(), torch.nn.functional.cross_entropy(before[0], y))


def test_the_ends_of_ranges_are_legal(backend):
    """As numbers and as tensors, one or many of them."""
    x, y, options = torch.linspace(-1, 1, N * C).reshape(N, C), T([0, 2, 1, 0]), {"backend": backend}
    for gamma in (0, T(0.0), torch.zeros(C), torch.zeros(N, 1)):
        torch.testing.assert_close(focal(x, y, gamma=gamma, **options), ce(x, y))
    for k in (1, T(1.0), torch.ones(C)):
        assert float(softmax(x, y, head=Truncated(k), **options)) == 0.0
    for k in (0, T(0.0), torch.linspace(0, 1, C)):  # the end that is left out
        with pytest.raises(ValueError, match=r"k must be in \(0, 1\]"):
            softmax(x, y, head=Truncated(k), **options)
    for half_turn in (math.pi, T(math.pi), torch.full((C,), -math.pi), T([[math.pi]] * N).bfloat16()):
        assert mlkernels.arcface_loss(x, y, margin=half_turn, **options).isfinite()
    for lost in (T(NAN), T([0.5, INF, NAN]), T([[NAN], [-INF], [0.5], [INF]])):  # a training run gone wrong
        assert mlkernels.arcface_loss(x, y, margin=lost, **options).isnan()
    miss = 1 - x.softmax(1).gather(1, y.unsqueeze(1)).mean()
    for zero in (0, T(0.0)):
        assert float(modulated(x, y, alpha=zero, **options)) == 0.0
        torch.testing.assert_close(modulated(x, y, beta=1.0, gamma=1.0, kappa=zero, **options), miss)


@pytest.mark.parametrize("bad", [-1, 6, 2**31 + 1, -(2**40)])
def test_bad_label(loss, backend, bad):
    """On the CPU an IndexError with the first bad row and its label; the call after it is served."""
    input, target, params = draw(loss, rows=8)
    options = {"backend": backend} | ({"group": loss.group(target)} if loss.groups else {})
    wanted = run(loss, input, target, params, 1.5, **options)
    wrong = target.clone()
    wrong[3], wrong[5] = bad, bad - 1
    for reduction in ("none", "mean"):
        with pytest.raises(IndexError, match=rf"target {bad} at row 3 is out of range \[0, 6\)"):
            loss(input.clone().requires_grad_(), wrong, params, reduction=reduction, **options)
    found = run(loss, input, target, params, 1.5, **options)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def test_bad_label_elsewhere(backend):
    """Rows are counted over all of target; statistics, single rows and small integers check too."""
    with pytest.raises(IndexError, match=r"target 3 at row 5 is out of range \[0, 3\)"):
        ce(torch.zeros(2, 3, 4), T([[0, 1, 2, 0], [1, 3, 0, 0]]), backend=backend)
    with pytest.raises(IndexError, match="target 3 at row 0"):
        ce(torch.zeros(3), T(3), backend=backend)
    with pytest.raises(IndexError, match="target 200 at row 1"):
        ce(torch.zeros(2, 100), T([1, 200], dtype=torch.uint8), backend=backend)
    with pytest.raises(IndexError, match="target -100 at row 1"):
        ce(torch.zeros(2, 3), T([1, -100]), ignore_index=-1, backend=backend)
    with pytest.raises(IndexError, match="target 9 at row 0"):
        softmax(torch.zeros(1, 3), T([9]), return_stats=True, backend=backend)


def test_a_label_equal_to_ignore_index_may_be_in_range(backend):
    loss = ce(torch.zeros(2, 3), T([1, 2]), ignore_index=2, reduction="none", backend=backend)
    assert loss.tolist() == [pytest.approx(1.0986123), 0.0]


def test_what_is_remembered_of_a_call_is_checked_all_the_same(backend, monkeypatch):
    """Numbers that were seen before are not looked at again, but equals of another kind (True == 1.0) still are."""
    x, y = torch.zeros(2, 3), T([1, 2])
    first = mlkernels.focal_loss(x, y, gamma=1.0, backend=backend)
    assert torch.equal(mlkernels.focal_loss(x, y, gamma=1, backend=backend), first)
    with pytest.raises(TypeError, match="gamma takes a number"):
        mlkernels.focal_loss(x, y, gamma=True, backend=backend)
    weighted = mlkernels.focal_loss(
        x, y, gamma=1.0, weight=torch.tensor([1.0, 2.0, 5.0]), reduction="sum", backend=backend
    )
    again = mlkernels.focal_loss(
        x, y, gamma=1.0, reduction="sum", backend=backend
    )  # without the weight of the call before
    assert float(weighted) == pytest.approx(3.5 * float(again))
    monkeypatch.setattr(door, "MOST_CALLS", 20)
    door._calls.clear()
    for step in range(30):  # a schedule: no number comes twice, and nothing grows without end
        mlkernels.focal_loss(x, y, gamma=1.0 + step, backend=backend)
    assert len(door._calls) <= 20


def test_backends_that_are_not_there():
    for name, why in mlkernels.available_backends().items():
        if why is not None:
            with pytest.raises(ValueError, match=name):
                ce(torch.zeros(1, 2), T([0]), backend=name)


def test_another_device_is_served_or_named(backend):
    if backend == "reference":
        loss = ce(torch.zeros(2, 3, device="meta"), T([0, 1]).to("meta"), backend=backend)
        assert loss.device.type == "meta"
    else:
        with pytest.raises(ValueError, match="meta"):
            ce(torch.zeros(2, 3, device="meta"), T([0, 1]).to("meta"), backend=backend)


@pytest.mark.parametrize("loss", FEW, ids=str)
def test_a_non_finite_parameter_is_a_run_gone_wrong(loss, backend):
    """A tensor that has become NaN is no bad argument: rows are NaN, as they are on a GPU."""
    input, target, params = draw(loss, rows=4, form="shared", kinds=("random",))
    name = next(k for k, v in params.items() if isinstance(v, torch.Tensor))
    params[name] = torch.full_like(params[name], NAN)
    options = {"group": loss.group(target)} if loss.groups else {}
    value = loss(input, target, params, reduction="none", backend=backend, **options)
    if loss.structure.scale != "two_scale" or name not in ("scale_low", "scale_high"):
        assert bool(value.isnan().all())


def test_check_labels_is_a_switch():
    mlkernels.check_labels(True)
    try:
        with pytest.raises(IndexError, match="target 5 at row 0"):
            ce(torch.zeros(1, 3), T([5]))
    finally:
        mlkernels.check_labels(False)
    with pytest.raises(IndexError):  # on the CPU always
        ce(torch.zeros(1, 3), T([5]))


def test_good_arguments_do_not_warn():
    """Nothing in a call warns (Triton, torch.library and autograd all like to)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="triton")  # numpy's, in the interpreter
        for name in usable_backends():
            for loss in LOSSES:
                input, target, params = draw(loss, rows=4)
                options = {"group": loss.group(target)} if loss.groups else {}
                run(loss, input, target, params, 2.0, backend=name, **options)
