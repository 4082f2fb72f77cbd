"""Bad arguments of modules, when they are built, and of what is beside the family: an error that names each.

Those of the family's functions are in test_inputs.py, on every backend.
"""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import mlkernels
from mlkernels import Affine, Margin, Modulated, PiecewiseLinear, Tau, Truncated, TwoScale

INF, NAN = math.inf, math.nan
N, C = 4, 3
T = torch.tensor
INTS = torch.ones(C, dtype=torch.long)
TABLE = torch.ones(5)
x, y, ints, features = (
    torch.linspace(-1, 1, N * C).reshape(N, C),
    T([0, 2, 1, 0]),
    torch.ones(N, C).long(),
    torch.ones(N, 2),
)
meta = torch.device("meta")
modules, sizes = mlkernels.modules, {"num_features": 2, "num_classes": C}
net, norm_layer = torch.nn.Linear(2, C), torch.nn.BatchNorm1d(2)
pair = (mlkernels.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1))
two = mlkernels.TwoScaleLoss(1.0)
trained = torch.ones(C, requires_grad=True)


def alternating(model=net, turns=(pair,), **options):
    return mlkernels.Alternating(model, turns, **options)


def statistics(**arguments):
    """The measures by row statistics."""
    return {"input": mlkernels.softmax_loss(x, y, return_stats=True)[1], "target": y, **arguments}


def of_all(**own):
    """What every module of the family refuses, beside what it has itself."""
    common = [
        ("reduction|'mean'|'avg'", ValueError, {"reduction": "avg"}),
        ("label_smoothing|[0, 1]|1.5", ValueError, {"label_smoothing": 1.5}),
        ("z_loss|>= 0|-1.0", ValueError, {"z_loss": -1.0}),
        ("softcap|> 0|0.0", ValueError, {"softcap": 0.0}),
        ("ignore_index|int|float", TypeError, {"ignore_index": 1.5}),
        ("backend|'reference'|'gpu'", ValueError, {"backend": "gpu"}),
        ("weight|(C,)|list|torch.as_tensor(weight)", TypeError, {"weight": [1.0]}),
        ("weight|(C,)|(3, 1)", ValueError, {"weight": torch.ones(C, 1)}),
        ("logit_adjustment|floating|int64", TypeError, {"logit_adjustment": INTS}),
        ("logit_adjustment|logit_adjustment.detach()", ValueError, {"logit_adjustment": trained}),
    ]
    for name, (allowed, bad) in own.items():
        common += [
            (f"{name}|{allowed}|{bad}", ValueError, {name: bad}),
            (f"{name}|{allowed}|a tensor holding {float(bad)}", ValueError, {name: T(float(bad))}),
            (f"{name}|{allowed}", ValueError, {name: torch.nn.Parameter(T([1.0, float(bad), 1.0]))}),
            (f"{name}|finite" if "radians" in allowed else f"{name}|{allowed}", ValueError, {name: NAN}),
            (f"{name}|floating|int64", TypeError, {name: INTS}),
            (f"{name}|a number|str", TypeError, {name: "1"}),
            (f"{name}|{name}.detach()", ValueError, {name: trained}),
        ]
    return common


#: Of each function or class the arguments that it takes, and what it says of others.
REFUSED = {
    modules.CrossEntropyLoss: ({}, of_all(scale=("> 0", 0.0))),
    modules.FocalLoss: ({}, of_all(gamma=(">= 0", -0.5))),
    modules.ModulatedCrossEntropyLoss: (
        {},
        [
            *of_all(beta=("> 0", -1.0), gamma=(">= 0", -1.0), alpha=(">= 0", -1.0), kappa=(">= 0", -1.0)),
            ("gamma + kappa|0.25|0.5", ValueError, {"gamma": 0.25, "kappa": 0.5}),
        ],
    ),
    modules.MarginLoss: (
        {},
        [
            *of_all(m1=("> 0", 0.0), scale=("> 0", -1.0)),
            ("m2|radians|degrees|30", ValueError, {"m2": 30}),
            ("m3|finite|inf", ValueError, {"m3": INF}),
            ("beyond_pi|'easy'|'hard'", ValueError, {"beyond_pi": "hard"}),
            ("beyond_pi|m1 = 1|2.0", ValueError, {"beyond_pi": "linear", "m1": 2.0}),
            ("gradient|'exact'|'wrong'", ValueError, {"gradient": "wrong"}),
        ],
    ),
    modules.ArcFaceLoss: (
        {},
        [
            *of_all(scale=("> 0", 0.0)),
            ("margin|radians|degrees|0.4992", ValueError, {"margin": 28.6}),
            ("margin|radians|degrees|0.5236", ValueError, {"margin": torch.tensor([0.5, -30.0])}),
            ("num_classes|LinearLoss(|in_features|normalize=True", TypeError, {"num_classes": 10}),
        ],
    ),
    modules.CosFaceLoss: ({}, [*of_all(scale=("> 0", 0.0)), ("margin|finite|nan", ValueError, {"margin": NAN})]),
    modules.SphereFaceLoss: ({}, of_all(margin=("> 0", -2.0), scale=("> 0", 0.0))),
    modules.PiecewiseLoss: (
        {},
        [
            *of_all(scale=("> 0", 0.0)),
            ("t_slope|(M,)|float", TypeError, {"t_slope": 1.0}),
            ("tau_bias|(M,)|list|torch.as_tensor(tau_bias)", TypeError, {"tau_bias": [0.0]}),
            ("t_bias|t_slope|(5,)|(4,)", ValueError, {"t_slope": TABLE, "t_bias": torch.ones(4)}),
            ("t_slope|floating|int64", TypeError, {"t_slope": INTS}),
            ("tau_slope|(M,)|()", ValueError, {"tau_slope": T(1.0)}),
            ("groups|[2, 3]", ValueError, {"t_slope": torch.ones(2, 5), "tau_slope": torch.ones(3, 5)}),
            ("tau_min|(0, 1]|0.0", ValueError, {"tau_slope": TABLE, "tau_min": 0.0}),
            ("clamp|'min'|'max'", ValueError, {"tau_slope": TABLE, "clamp": "max"}),
        ],
    ),
    modules.TwoScaleLoss: (
        {"initial_norm": 1.0},
        [
            *of_all(),
            ("eta|nan", ValueError, {"eta": NAN}),
            ("initial_norm|0.0", ValueError, {"initial_norm": 0.0}),
            ("initial_norm|inf", ValueError, {"initial_norm": INF}),
            ("initial_norm|-1.0", ValueError, {"initial_norm": T(-1.0)}),
            ("initial_norm|finite", ValueError, {"initial_norm": T(INF), "parametrization": "relative"}),
            ("initial_norm|(2,)", ValueError, {"initial_norm": torch.ones(2)}),
            ("model|BatchNorm1d", ValueError, {"initial_norm": norm_layer}),
            ("variant|'moving'", ValueError, {"variant": "moving"}),
            ("parametrization|'log'", ValueError, {"parametrization": "log"}),
        ],
    ),
    two: (
        {"input": x, "target": y, "logit_norm": 1.0},
        [
            ("logit_norm|required|loss(input, target, model)", ValueError, {"logit_norm": None}),
            ("log_norm|both", ValueError, {"log_norm": 0.0}),
            ("logit_norm|> 0|0.0", ValueError, {"logit_norm": 0.0}),
            ("logit_norm|> 0|-1.0", ValueError, {"logit_norm": T(-1.0)}),
            ("logit_norm|(4, 1)", ValueError, {"logit_norm": torch.ones(N, 1)}),
            ("log_norm|int64", ValueError, {"logit_norm": None, "log_norm": T(0)}),
            ("log_norm|got a model: that is a logit_norm", ValueError, {"logit_norm": None, "log_norm": net}),
            ("model|ReLU", ValueError, {"logit_norm": torch.nn.ReLU()}),
        ],
    ),
    mlkernels.TwoScaleLoss(): (
        {"input": x, "target": y},
        [("logit_norm has no meaning", ValueError, {"logit_norm": net})],
    ),
    mlkernels.weight_norm_product: (
        {"model": net},
        [
            ("model|nn.Module|Parameter", TypeError, {"model": net.weight}),
            ("model|layer|BatchNorm1d", ValueError, {"model": norm_layer}),
        ],
    ),
    modules.MultiMarginLoss: (
        {},
        [
            ("p must be 1 or 2|3", ValueError, {"p": 3}),
            ("margin|finite|nan", ValueError, {"margin": NAN}),
            ("weight|(C,)|list", TypeError, {"weight": [1.0]}),
            ("weight|floating|int64", TypeError, {"weight": INTS}),
            ("reduction|'avg'", ValueError, {"reduction": "avg"}),
        ],
    ),
    mlkernels.multi_margin_loss: (
        {"input": x, "target": y},
        [
            ("input|int64", TypeError, {"input": ints}),
            ("input|(4, 3, 2)", ValueError, {"input": torch.ones(N, C, 2), "target": torch.zeros(N, 2).long()}),
            ("target|float32", TypeError, {"target": y.float()}),
            ("target 3 at row 2", IndexError, {"target": T([0, 0, 3, 0])}),
            ("target -100 at row 3", IndexError, {"target": T([0, 0, 0, -100])}),
            ("p must be 1 or 2|3", ValueError, {"p": 3}),
            ("weight|(3,)|(2,)", ValueError, {"weight": torch.ones(C - 1)}),
            ("weight|floating|int64", TypeError, {"weight": INTS}),
            ("reduction|'avg'", ValueError, {"reduction": "avg"}),
        ],
    ),
    modules.CenterLoss: (
        sizes,
        [
            ("num_classes|>= 1|-5", ValueError, {"num_classes": -5}),
            ("num_features|>= 1|0", ValueError, {"num_features": 0}),
            ("num_classes|int|float", TypeError, {"num_classes": 3.0}),
            ("rate|> 0|0.0", ValueError, {"rate": 0.0}),
            ("rate|> 0|nan", ValueError, {"rate": NAN}),
            ("reduction|'avg'", ValueError, {"reduction": "avg"}),
        ],
    ),
    mlkernels.center_loss: (
        {"input": features, "target": y, "centers": torch.zeros(C, 2)},
        [
            ("input|int64", TypeError, {"input": features.long()}),
            ("input|(4, 2, 2)", ValueError, {"input": torch.zeros(N, 2, 2), "target": torch.zeros(N, 2).long()}),
            ("target|float32", TypeError, {"target": y.float()}),
            ("target 3 at row 3", IndexError, {"target": T([0, 0, 0, 3])}),
            ("target -100 at row 1", IndexError, {"target": T([0, -100, 0, 0])}),
            ("centers|(C, 2)|(3, 3)", ValueError, {"centers": torch.zeros(C, 3)}),
            ("centers|(C, 2)|(3,)", ValueError, {"centers": torch.zeros(C)}),
            ("centers|floating|int64", TypeError, {"centers": torch.zeros(C, 2).long()}),
            ("centers|(C, D)|list|torch.as_tensor(centers)", TypeError, {"centers": [[0.0] * 2] * C}),
            ("centers|cpu|meta", ValueError, {"centers": torch.zeros(C, 2, device=meta)}),
            ("reduction|'avg'", ValueError, {"reduction": "avg"}),
        ],
    ),
    modules.LGMLoss: (
        sizes,
        [
            ("num_classes|>= 1|0", ValueError, {"num_classes": 0}),
            ("num_features|int|str", TypeError, {"num_features": "2"}),
            ("alpha|>= 0|-0.1", ValueError, {"alpha": -0.1}),
            ("alpha|>= 0|-0.1", ValueError, {"alpha": T(-0.1)}),
            ("alpha|0-d|(3,)", ValueError, {"alpha": torch.ones(C)}),
            ("lambda_|>= 0|inf", ValueError, {"lambda_": INF}),
            *[case for case in of_all() if not {"z_loss", "softcap", "logit_adjustment"} & case[2].keys()],
        ],
    ),
    mlkernels.lgm_loss: (
        {"input": features, "target": y, "means": torch.zeros(C, 2)},
        [
            ("input|list|torch.as_tensor(input)", TypeError, {"input": [1.0]}),
            ("input|int64", TypeError, {"input": features.long()}),
            ("input|(4, 2, 2)", ValueError, {"input": torch.zeros(N, 2, 2), "target": torch.zeros(N, 2).long()}),
            ("target|float32", TypeError, {"target": y.float()}),
            ("target|(4,)|(5,)", ValueError, {"target": torch.zeros(N + 1).long()}),
            ("target 3 at row 0", IndexError, {"target": torch.full((N,), C)}),
            ("target -1 at row 0", IndexError, {"target": torch.full((N,), -1)}),
            ("means|(C, 2)|(3, 3)", ValueError, {"means": torch.zeros(C, 3)}),
            ("means|C > 0|(0, 2)", ValueError, {"means": torch.zeros(0, 2)}),
            ("means|(C, 2)|(2,)", ValueError, {"means": torch.zeros(2)}),
            ("means|floating|int64", TypeError, {"means": torch.zeros(C, 2).long()}),
            ("means|(C, D)|NoneType", TypeError, {"means": None}),
            ("means|cpu|meta", ValueError, {"means": torch.zeros(C, 2, device=meta)}),
            ("log_variance|means|(3,)", ValueError, {"log_variance": torch.zeros(C)}),
            ("log_variance|float", TypeError, {"log_variance": 1.0}),
            ("log_variance|int32", TypeError, {"log_variance": torch.zeros(C, 2, dtype=torch.int32)}),
            ("alpha|>= 0|-0.1", ValueError, {"alpha": -0.1}),
            ("alpha|nan", ValueError, {"alpha": NAN}),
            ("alpha|str", TypeError, {"alpha": "0.1"}),
            ("alpha|>= 0|-0.1", ValueError, {"alpha": T(-0.1)}),
            ("alpha|(3,)", ValueError, {"alpha": torch.zeros(C)}),
            ("alpha|cpu|meta", ValueError, {"alpha": T(0.1).to(meta)}),
            ("lambda_|-0.1", ValueError, {"lambda_": -0.1}),
            ("lambda_|inf", ValueError, {"lambda_": INF}),
            ("weight|(3,)|(4,)", ValueError, {"weight": torch.ones(C + 1)}),
            ("weight|int64", TypeError, {"weight": INTS}),
            ("reduction|'average'", ValueError, {"reduction": "average"}),
            ("label_smoothing|1.5", ValueError, {"label_smoothing": 1.5}),
            ("backend|'abacus'", ValueError, {"backend": "abacus"}),
        ],
    ),
    modules.JointLoss: (
        {"losses": [pair[0], F.cross_entropy]},
        [
            ("losses|at least one", ValueError, {"losses": []}),
            ("losses takes a sequence of modules|CrossEntropyLoss", TypeError, {"losses": pair[0]}),
            ("losses takes a function|int", TypeError, {"losses": [pair[0], 1]}),
            ("weights takes a sequence of numbers|float", TypeError, {"weights": 0.5}),
            ("inputs takes a sequence of indices|int", TypeError, {"inputs": 0}),
            ("losses|two|1", ValueError, {"losses": [F.cross_entropy], "mode": "trainable"}),
            ("mode|'both'", ValueError, {"mode": "both"}),
            ("weights|one per loss, 2|1", ValueError, {"weights": [1.0]}),
            ("weights|finite|nan", ValueError, {"weights": [1.0, NAN]}),
            ("weights|> 0|'uncertainty'", ValueError, {"weights": [1.0, 0.0], "mode": "uncertainty"}),
            ("weights|add up to 1", ValueError, {"weights": [1.0, 1.0], "mode": "trainable"}),
            ("inputs|one per loss, 2|1", ValueError, {"inputs": [0]}),
            ("inputs|indices|got ()", ValueError, {"inputs": [(), 0]}),
            ("inputs|indices|got 'logits'", ValueError, {"inputs": ["logits", 0]}),
        ],
    ),
    alternating: (
        {},
        [
            ("model must be callable|int", TypeError, {"model": 3}),
            ("turns must hold at least one", ValueError, {"turns": []}),
            ("turns[0] must be a pair", TypeError, {"turns": [pair[0]]}),
            ("turns[1] must be a pair", TypeError, {"turns": [pair, (pair[0], "sgd")]}),
            ("turns[0] must be a pair", TypeError, {"turns": [("loss", pair[1])]}),
            ("turns takes a sequence of pairs|CrossEntropyLoss", TypeError, {"turns": pair[0]}),
            ("periods takes a sequence of integers|int", TypeError, {"periods": 2}),
            ("periods must be one per turn, 1, got 2", ValueError, {"periods": [1, 2]}),
            ("periods[0] must be an integer >= 1, got 0", ValueError, {"periods": [0]}),
            ("periods[0] takes an int, got float", TypeError, {"periods": [1.5]}),
            ("periods[0] takes an int, got bool", TypeError, {"periods": [True]}),
        ],
    ),
    mlkernels.metrics.accuracy: (
        {"input": x, "target": y},
        [
            ("input|logits or RowStats|list|torch.as_tensor(input)", TypeError, {"input": [1]}),
            ("target|integer tensor|list|torch.as_tensor(target)", TypeError, {"target": y.tolist()}),
            ("target|float32", TypeError, {"target": y.float()}),
            ("target|(4,)|(3,)", ValueError, {"target": y[1:]}),
            ("target|(4,)|(3,)", ValueError, statistics(target=y[1:])),
            ("target|NoneType", TypeError, statistics(target=None)),
            ("target 3 at row 0", IndexError, {"target": y + C}),
        ],
    ),
    mlkernels.metrics.top_n_accuracy: (
        {"input": x, "target": y},
        [("n must be >= 1|0", ValueError, {"n": 0}), ("n takes an int|float", TypeError, {"n": 1.5})],
    ),
    mlkernels.metrics.close_enough: (
        {"input": x, "target": y},
        [
            ("a must be|-0.1", ValueError, {"a": -0.1}),
            ("scale|> 0|0.0", ValueError, {"scale": 0.0}),
            ("scale|> 0|-1.0", ValueError, statistics(scale=-1.0)),
            ("scale|> 0|-1.0", ValueError, statistics(scale=T(-1.0))),
            ("scale|0-d|(4,)", ValueError, statistics(scale=torch.ones(N))),
        ],
    ),
    mlkernels.metrics.superclass_accuracy: (
        {"input": x, "target": y, "superclass": torch.arange(C)},
        [
            ("superclass|integer|float32", TypeError, {"superclass": torch.zeros(C)}),
            ("superclass|list|torch.as_tensor(superclass)", TypeError, {"superclass": [0, 0, 1]}),
            ("superclass|one entry per class|(4,)", ValueError, {"superclass": torch.arange(C + 1)}),
            ("superclass|cpu|meta", ValueError, {"superclass": torch.arange(C, device=meta)}),
            ("target 2 at row 1", IndexError, statistics(superclass=torch.arange(2))),
            ("target|list", TypeError, {"target": y.tolist()}),
        ],
    ),
    mlkernels.metrics.classification_confidence: (
        {"input": x, "target": y},
        [
            ("logit_norm|> 0|0.0", ValueError, {"logit_norm": 0.0}),
            ("logit_norm|> 0|0.0", ValueError, {"logit_norm": T(0.0)}),
            ("logit_norm|0-d|int64", ValueError, {"logit_norm": T(1)}),
        ],
    ),
    mlkernels.metrics.macro_f1: (
        {"input": y, "target": y},
        [
            ("input|target's shape (4,)|(3,)", ValueError, {"input": y[1:]}),
            ("input|list", TypeError, {"input": y.tolist()}),
            ("target|list|torch.as_tensor(target)", TypeError, {"target": y.tolist()}),
        ],
    ),
    **{
        part: (good, [(f"{part.__name__}() takes no 'margin'; there are {taken}", TypeError, {"margin": 0.5})])
        for part, good, taken in [
            (Margin, {}, "m1, m2, m3, beyond_pi, gradient, norm"),
            (Affine, {}, "slope, offset"),
            (PiecewiseLinear, {"slope": TABLE, "bias": TABLE}, "slope, bias, domain, norm"),
            (TwoScale, {"low": 1.0, "high": 2.0}, "low, high, eta, norm"),
            (Modulated, {}, "beta, gamma, alpha, kappa"),
            (Tau, {"slope": TABLE, "bias": TABLE}, "slope, bias, minimum, clamp"),
            (Truncated, {"k": 0.5}, "k"),
        ]
    },
}


def name_of(value):
    return getattr(value, "__name__", type(value).__name__) if callable(value) else ""


@pytest.mark.parametrize(
    ("of", "words", "error", "change"),
    [(of, *refused) for of, (_, every) in REFUSED.items() for refused in every],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_bad_arguments(of, words, error, change):
    """Refused before anything is computed; a module's when it is built, tensors on the host too."""
    with pytest.raises(error) as caught:
        of(**(REFUSED[of][0] | change))
    for word in words.split("|"):
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("of", REFUSED, ids=name_of)
def test_good_arguments(of):
    of(**REFUSED[of][0])


def by_position_and_by_name(of):
    shown = inspect.signature(of.__init__ if isinstance(of, type) else of).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [[one.name for one in shown if one.kind == kind and one.name != "self"] for kind in kinds]


EVERYWHERE = (
    mlkernels,
    mlkernels.functional,
    mlkernels.metrics,
    mlkernels.schedule,
    mlkernels.search,
    mlkernels.distributed,
)
PUBLIC = {getattr(module, name): None for module in EVERYWHERE for name in module.__all__ if name != "__version__"}


@pytest.mark.parametrize(
    "of", [of for of in PUBLIC if callable(of) and by_position_and_by_name(of)[1]], ids=lambda of: of.__name__
)
def test_what_is_taken_by_name_says_so(of):
    """A positional weight, number of classes or margin in degrees must not be swallowed as something else."""
    first, named = by_position_and_by_name(of)
    with pytest.raises(TypeError) as caught:
        of(*[object()] * (len(first) + 1))
    what = f"{of.__name__}() takes {' and '.join(first) or 'nothing'} by position, everything else by name: "
    assert str(caught.value) == f"{what}write {of.__name__}({', '.join([*first, f'{named[0]}=...'])})"


POSITIONAL = [
    (lambda: mlkernels.arcface_loss(x, y, 0.5, 30.0), "write arcface_loss(input, target, margin=0.5, scale=30.0)"),
    (lambda: mlkernels.cross_entropy(x, y, torch.ones(C)), "write cross_entropy(input, target, weight=...)"),
    (lambda: mlkernels.cross_entropy(x, x.softmax(1), torch.ones(C)), "write cross_entropy(input, target, weight=...)"),
    (lambda: mlkernels.lgm_loss(x, y, x, None, 0.1), "(input, target, means, log_variance=..., alpha=0.1)"),
    (lambda: mlkernels.piecewise_cross_entropy(x, y, TABLE), "(input, target, t_slope=...)"),
    (lambda: mlkernels.center_loss(x, y, x, "sum"), "center_loss(input, target, centers, reduction='sum')"),
    (lambda: modules.CrossEntropyLoss(torch.ones(C)), "write CrossEntropyLoss(weight=...)"),
    (lambda: modules.CrossEntropyLoss(x, y), "write CrossEntropyLoss(weight=...)"),
    (lambda: Modulated(4.0, 5.0), "write Modulated(beta=4.0, gamma=5.0)"),
    (lambda: modules.ArcFaceLoss(10, 16), "LinearLoss(ArcFaceLoss(...), in_features, num_classes, normalize=True)"),
]


@pytest.mark.parametrize(("call", "words"), POSITIONAL, ids=[words for _, words in POSITIONAL])
def test_names_instead_of_positions(call, words):
    with pytest.raises(TypeError) as caught:
        call()
    for word in words.split("|"):
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("loss", [modules.CrossEntropyLoss(), modules.FocalLoss(), modules.MarginLoss(),
                                  modules.TwoScaleLoss(initial_norm=1.0),
                                  modules.PiecewiseLoss(tau_slope=TABLE, tau_bias=TABLE)])  # fmt: skip
def test_what_a_module_keeps_is_not_given_to_its_calls(loss):
    more = (1.0,) if isinstance(loss, modules.TwoScaleLoss) else ()
    for name, value in (("weight", torch.ones(C)), ("reduction", "none"), ("backend", "cpu")):
        words = rf"^{type(loss).__name__} keeps its {name}: give it to {type(loss).__name__}\({name}=\.\.\.\), not to"
        with pytest.raises(TypeError, match=words):
            loss(x, y, *more, **{name: value})
    with pytest.raises(TypeError, match=r"takes no 'labels'; there are "):
        loss(x, y, *more, labels=y)


def test_a_class_is_no_loss():
    """Before it is called."""
    for make in (
        lambda: mlkernels.JointLoss([modules.CrossEntropyLoss, modules.FocalLoss()]),
        lambda: mlkernels.LinearLoss(modules.CrossEntropyLoss, 4, 3),
        lambda: alternating(turns=[(modules.CrossEntropyLoss, pair[1])]),
        lambda: mlkernels.schedule.MILS(
            net, pair[1], primary=modules.CrossEntropyLoss, auxiliary=two, observation=(x, y)
        ),
        lambda: mlkernels.schedule.MILS(
            net, pair[1], primary=two, auxiliary=modules.CrossEntropyLoss, observation=(x, y)
        ),
    ):
        with pytest.raises(TypeError, match=r"got a class: call CrossEntropyLoss\(\.\.\.\)"):
            make()


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: mlkernels.focal_loss(x, y),
        lambda x, y: mlkernels.cross_entropy(x, y),
        lambda x, y: mlkernels.multi_margin_loss(x, y),
        lambda x, y: mlkernels.linear_cross_entropy(x, torch.ones(3, 2), y),
        modules.LGMLoss(num_features=2, num_classes=2),
        modules.CenterLoss(num_features=2, num_classes=2),
    ],
)
def test_symbolic_tracing_is_told_what_sees_a_loss(loss):
    with pytest.raises(TypeError, match=r"^input takes a floating tensor, got Proxy: .*a leaf.*make_fx"):
        torch.fx.symbolic_trace(loss)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlkernels.CenterLoss(num_features=2, num_classes=3, embedding_size=2),
        lambda: mlkernels.MultiMarginLoss(num_classes=3),
    ],
)
def test_what_no_linear_head_takes_is_sent_to_none(make):
    with pytest.raises(TypeError, match="; there are ") as caught:
        make()
    assert "LinearLoss" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "labels", "words"),
    [
        ((2, 5, C), (2, 5), "write input.flatten(0, -2) and target.flatten()"),  # classes last
        ((2, 5, C), (10,), "write input.flatten(0, -2) and target.flatten()"),
        ((10, C), (2, 5), "write target.flatten()"),
        ((4, C), (4, 1), "write target.flatten()"),
        ((4, C), (4, C), "write target.argmax(1)"),  # one-hot
        ((C, 4), (4,), "write input.T"),
        ((C,), (C,), "write target.argmax(0)"),
        ((4, C), (5,), ""),
    ],
)
def test_shapes_that_nearly_fit(shape, labels, words):
    with pytest.raises(ValueError, match="target must be") as caught:
        mlkernels.cross_entropy(torch.zeros(shape), torch.zeros(labels).long())
    assert str(caught.value).endswith(f"; {words}" if words else f"got {labels}")


@pytest.mark.parametrize("label", [-1, 255, C])
def test_labels_that_may_mean_ignore_index(label):
    """A label that marks rows without a class is told from one too large; not where there is no ignore_index."""
    target = T([0, label, 0, 0])
    for backend in (None, "reference"):
        with pytest.raises(IndexError) as caught:
            mlkernels.cross_entropy(x, target, backend=backend)
        words = f"target {label} at row 1 is out of range [0, {C})"
        assert str(caught.value) == words + (
            f"; to leave such rows out pass ignore_index={label}" if label != C else ""
        )
    with pytest.raises(IndexError, match=r"\)$"):
        mlkernels.multi_margin_loss(x, target)
