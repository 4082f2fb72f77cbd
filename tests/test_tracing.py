"""Tensors without numbers (fake, meta) and recorders (make_fx, compiled autograd): right, and no look at a value."""

import io

import pytest
import torch
from table import BY_NAME, draw, usable_backends
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import mlkernels

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS, CLASSES = 6, 4


def _family(name, reduction, backend):
    loss = BY_NAME[name]
    input, target, params = draw(loss, rows=ROWS, classes=CLASSES, form="shared")
    own = {k: v.float() for k, v in params.items() if isinstance(v, torch.Tensor)}
    labels = (target, loss.group(target)) if loss.groups else (target,)

    def function(labels, x, *values):
        options = {"group": labels[1]} if loss.groups else {}
        replaced = params | dict(zip(own, values, strict=True))
        return loss(x, labels[0], replaced, reduction=reduction, backend=backend, **options)

    return function, labels, (input.float(), *own.values())


def _statistics(backend):
    def function(labels, x):
        loss, rows = mlkernels.softmax_loss(x, labels[0], return_stats=True, backend=backend)
        return loss + rows.log_prob.sum() + rows.rank.sum()

    return function, (torch.arange(ROWS) % CLASSES,), (torch.randn(ROWS, CLASSES),)


def _linear(reduction, backend):
    def function(labels, x, weight, margin):
        labels = labels[0].masked_fill(labels[0] == 3, -100)
        return mlkernels.linear_softmax_loss(
            x, weight, labels, normalize=True, compact=True,
            loss=lambda f, y: mlkernels.arcface_loss(
                f, y, margin=margin, scale=4.0, reduction=reduction, backend=backend
            ),
        )  # fmt: skip

    tensors = (torch.randn(ROWS, 3), torch.randn(CLASSES, 3), torch.tensor(0.3))
    return function, (torch.arange(ROWS) % CLASSES,), tensors


def _lgm(labels, x, means, log_variance, alpha):
    return mlkernels.lgm_loss(x, labels[0], means, log_variance=log_variance, alpha=alpha)


def _soft(labels, x, probabilities, scale):
    return mlkernels.cross_entropy(x, probabilities, scale=scale, label_smoothing=0.1, z_loss=0.1, softcap=5.0)


def _beside(name):
    labels, x = (torch.arange(ROWS) % CLASSES,), torch.randn(ROWS, CLASSES)
    features, means = torch.randn(ROWS, 3), torch.randn(CLASSES, 3)
    return {
        "center": (lambda y, x, c: mlkernels.center_loss(x, y[0], c), labels, (features, means)),
        "lgm": (_lgm, labels, (features, means, torch.randn(CLASSES, 3), torch.tensor(0.2))),
        "multi_margin": (lambda y, x: mlkernels.multi_margin_loss(x, y[0]), labels, (x,)),
        "soft": (_soft, labels, (x, torch.rand(ROWS, CLASSES).softmax(1), torch.tensor(2.0))),
        "metrics": (lambda y, x: mlkernels.metrics.accuracy(x, y[0]) + 0 * x.sum(), labels, (x,)),
    }[name]


FAMILY = (
    "cross_entropy-mean",
    "two_scale_margin_modulated-mean",
    "piecewise_groups-none",
    "statistics",
    "linear-mean",
    "linear-none",
)
BESIDE = ("center", "lgm", "multi_margin", "soft", "metrics")
CASES = [
    *(
        f"{name}-{backend}"
        for name in FAMILY
        for backend in usable_backends()
        if (name[:6], backend) != ("linear", "cuda")
    ),
    *BESIDE,
]


def case(name):
    """(function of (labels, *tensors), labels, tensors); the tensors are differentiated."""
    if name in BESIDE:
        return _beside(name)
    first, *others, backend = name.split("-")
    if first == "linear":
        return _linear(*others, backend)
    return _statistics(backend) if first == "statistics" else _family(first, *others, backend)


def step(function):
    """Forward and backward, for an upstream gradient that is not 1."""

    def run(labels, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        value = function(labels, *leaves)
        return [value, *torch.autograd.grad(1.5 * value.sum(), leaves, materialize_grads=True)]

    return run


@pytest.mark.parametrize("name", CASES)
def test_fake_tensors(name):
    function, labels, tensors = case(name)
    wanted = step(function)(labels, *tensors)
    with FakeTensorMode() as mode:
        fake = [tuple(map(mode.from_tensor, labels)), *map(mode.from_tensor, tensors)]
        found = step(function)(*fake)
    for ours, real in zip(found, wanted, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("name", CASES)
def test_recorded_by_make_fx(name):
    """Recorded with the shapes as symbols, played back on other numbers."""
    function, labels, tensors = case(name)
    played = make_fx(step(function), tracing_mode="symbolic")(labels, *tensors)
    labels, tensors = tuple(y.roll(1) for y in labels), [1.1 * t for t in tensors]
    for found, wanted in zip(played(labels, *tensors), step(function)(labels, *tensors), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("cross_entropy", "linear-mean"))])
def test_recorded_with_real_tensors(name):
    """Real numbers are there, but the record is for others; of a backward alone, too."""
    function, labels, tensors = case(name)
    played = make_fx(step(function), tracing_mode="real")(labels, *tensors)
    others = [1.1 * t for t in tensors]
    for found, wanted in zip(played(labels, *others), step(function)(labels, *others), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    leaves = [t.requires_grad_() for t in tensors]
    value = function(labels, *leaves).sum()
    backward = lambda up: torch.autograd.grad(value, leaves, up, retain_graph=True)
    played = make_fx(backward)(torch.tensor(1.0))
    for found, wanted in zip(played(torch.tensor(2.5)), backward(torch.tensor(2.5)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("bad", [-1, CLASSES])
@pytest.mark.parametrize(
    "loss",
    [
        mlkernels.multi_margin_loss,
        lambda x, y, **options: mlkernels.center_loss(x, y, torch.ones(CLASSES, CLASSES), **options),
    ],
    ids=["multi_margin", "center"],
)
def test_a_label_that_is_no_class_is_nan_in_a_recorded_graph(loss, bad, reduction):
    x, good = torch.randn(3, CLASSES), torch.tensor([0, 1, 2])
    graph = make_fx(lambda x, y: loss(x, y, reduction=reduction))(x, good)
    found = graph(x, torch.tensor([0, bad, 2]))
    assert found.isnan().tolist() == ([False, True, False] if reduction == "none" else True)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in CASES
        if name.startswith(("cross_entropy-mean", "two_scale_margin_modulated-mean", "linear-mean", "linear-none-cpu"))
        and not name.endswith("reference")
    ],
)
def test_compiled_autograd(name):
    """The backward of an eager forward is compiled: nothing that the forward made may become a constant of it."""
    function, labels, tensors = case(name)
    torch._dynamo.reset()
    for factor in (1.0, 1.2, 0.7):
        leaves = [(factor * t).requires_grad_() for t in tensors]
        value = 1.5 * function(labels, *leaves).sum()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            value.backward()
        _, *wanted = step(function)(labels, *(factor * t for t in tensors))
        torch.testing.assert_close([t.grad for t in leaves], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in BESIDE if name != "multi_margin"])
def test_the_meta_device(name):
    """The family is in test_no_sync.py; torch has no backward of multi_margin_loss there."""
    function, labels, tensors = case(name)
    wanted = step(function)(labels, *tensors)
    found = step(function)(tuple(y.to("meta") for y in labels), *(t.to("meta") for t in tensors))
    for ours, real in zip(found, wanted, strict=True):
        assert (ours.shape, ours.dtype, ours.device.type) == (real.shape, real.dtype, "meta")


@pytest.mark.parametrize("backend", usable_backends())
def test_under_another_dispatch_mode_values_are_still_looked_at(backend):
    """Counting operators hides no bad label, and the operators are seen."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    x = torch.randn(3, 4, requires_grad=True)
    with Seen() as seen:
        mlkernels.cross_entropy(x, torch.tensor([0, 1, 2]), backend=backend).backward()
        with pytest.raises(IndexError, match="7"):
            mlkernels.cross_entropy(x, torch.tensor([0, 7, 2]), backend=backend)
    assert backend == "reference" or {"softmax_loss", "softmax_loss_backward"} <= seen.names


def modules():
    weight, scale = torch.tensor([1.0, 2.0, 3.0]), torch.nn.Parameter(torch.tensor(2.0))
    table = {"tau_slope": torch.tensor([1.0, 0.8]), "tau_bias": torch.tensor([0.0, 0.1])}
    yield lambda: mlkernels.CrossEntropyLoss(weight=weight, scale=scale)
    yield lambda: mlkernels.PiecewiseLoss(**table)
    yield lambda: mlkernels.MultiMarginLoss(weight=weight)
    yield lambda: mlkernels.CenterLoss(num_features=2, num_classes=3, rate=0.5)
    yield lambda: mlkernels.LGMLoss(num_features=2, num_classes=3, diagonal=True, weight=weight)
    yield lambda: mlkernels.TwoScaleLoss(3.0)
    yield lambda: mlkernels.TwoScaleLoss(3.0, variant="fixed", parametrization="relative")
    yield lambda: mlkernels.TwoScaleLoss(variant="separation")
    for mode in ("trainable", "uncertainty"):
        yield lambda mode=mode: mlkernels.JointLoss(
            [mlkernels.CrossEntropyLoss(), mlkernels.FocalLoss()], weights=[0.25, 0.75], mode=mode
        )


@pytest.mark.parametrize("make", [*modules()], ids=lambda make: type(make()).__name__)
def test_modules_are_built_on_the_meta_device(make):
    """Built without memory, given some, reset: as if built there."""
    with torch.device("meta"):
        built = make()
    built.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in built.state_dict().values():
            tensor.fill_(float("nan"))
    torch.manual_seed(0)
    for module in built.modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            module.reset_parameters()
    torch.manual_seed(0)
    wanted = make()
    if isinstance(wanted, mlkernels.CenterLoss | mlkernels.LGMLoss):
        torch.manual_seed(0)
        wanted.reset_parameters()
    found, wanted = built.state_dict(), wanted.state_dict()
    assert found.keys() == wanted.keys() and found
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name
        assert tensor.dtype == wanted[name].dtype


def test_what_has_no_value_to_go_back_to_says_so():
    with torch.device("meta"):
        loss = mlkernels.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))
        model = torch.nn.Linear(2, 3)
        scales = mlkernels.TwoScaleLoss(model)
    loss.to_empty(device="cpu")
    with pytest.raises(ValueError, match="weight was given on the meta device"):
        loss.reset_parameters()
    for module in (model, scales):
        module.to_empty(device="cpu")
    with pytest.raises(ValueError, match="scale_low was given on the meta device"):
        scales.reset_parameters()
    model.reset_parameters()
    scales.reset_parameters(model)
    torch.testing.assert_close(scales.scale_low.detach(), mlkernels.weight_norm_product(model).detach())


# ---- torch.jit.trace -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [
    mlkernels.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0])),
    mlkernels.ArcFaceLoss(margin=torch.nn.Parameter(torch.tensor(0.3)), scale=4.0),
    mlkernels.LGMLoss(num_features=3, num_classes=3),
])  # fmt: skip
def test_a_jit_trace_with_gradients_is_saved_and_right(loss):
    """Of other logits and more of them, too."""
    first, x = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    traced = torch.jit.trace(loss, (first, torch.tensor([0, 1, 2, 0])))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    target = torch.tensor([2, 1, -100, 0, 2, 2])
    for other in (traced, torch.jit.load(file)):
        found, wanted = other(x, target), loss(x, target)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(one, x)[0] for one in (found, wanted)))


def test_a_jit_trace_of_a_linear_head_is_refused():
    linear = mlkernels.LinearLoss(mlkernels.FocalLoss(), 3, 5)
    with pytest.raises(RuntimeError, match=r"^linear heads know no torch\.jit\.trace, only torch\.compile"):
        torch.jit.trace(linear, (torch.randn(4, 3), torch.arange(4)))
