"""Plain CPU calls in one crossing: what the fast path serves, that it is the same loss, and that it says the same."""

import sys

import pytest
import torch
from table import BY_NAME, LOSSES, draw, run
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.profiler import profile

import mlkernels
from mlkernels import fast_path

if fast_path.loss is None:
    pytest.skip(str(fast_path.missing), allow_module_level=True)


@pytest.fixture
def served(monkeypatch):
    """Of each call so far, whether it was served."""
    hits = []
    real = fast_path.loss

    def spy(*arguments):
        found = real(*arguments)
        hits.append(found is not None)
        return found

    monkeypatch.setattr(fast_path, "loss", spy)
    return hits


def by_python(call):
    """The same call, without the fast path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_path, "loss", None)
        return call()


def logits(*shape, dtype=torch.float32):
    torch.default_generator.manual_seed(1)
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


TARGET = torch.tensor([0, 3, 2, -100, 1, 1])


# ---- the same loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["number", "shared", "class", "row"])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_bits_are_those_of_python(loss, form, served):
    if form not in loss.forms:
        pytest.skip("not for this loss")
    input, target, params = draw(loss, rows=7, form=form, classes=5)
    target[2] = -100
    vector = torch.linspace(0.5, 2, 5)
    both = {"weight": vector, "logit_adjustment": vector, "label_smoothing": 0.1, "z_loss": 0.01}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for options in (
            {},
            {"reduction": "none"},
            {"reduction": "sum", **both},
            {"row_weight": torch.linspace(-1, 2, 7)},
        ):
            upstream = torch.linspace(0.5, 2, 7) if options.get("reduction") == "none" else 1.5
            own = options | ({"group": loss.group(target)} if loss.groups else {})
            x = input.to(dtype)
            go = lambda x=x, own=own, up=upstream: run(loss, x, target, params, up, **own)
            value, grad, by_param = go()
            assert served[-1], options
            wanted = by_python(go)
            assert torch.equal(value, wanted[0]) and torch.equal(grad, wanted[1]), options
            assert all(torch.equal(by_param[name], wanted[2][name]) for name in by_param), options


@pytest.mark.parametrize(
    "target", [TARGET.int(), TARGET.char(), TARGET.repeat_interleave(2)[::2]], ids=["int32", "int8", "strided"]
)
def test_labels_and_layouts(target, served):
    x = logits(5, 6).t()
    assert torch.equal(mlkernels.cross_entropy(x, target), by_python(lambda: mlkernels.cross_entropy(x, target)))
    images, labels = logits(2, 5, 3, 4), torch.arange(24).view(2, 3, 4) % 5
    go = lambda: torch.autograd.grad(mlkernels.cross_entropy(images, labels), images)[0]
    assert torch.equal(go(), by_python(go))
    assert all(served)


def test_numbers_are_told_apart(served):
    """A call that is remembered is none with other numbers, of another dtype, or that needs something else."""
    x, s = logits(6, 5), torch.tensor(2.0, requires_grad=True)
    calls = [
        {"scale": 2.0}, {"scale": 2}, {"scale": 3.0}, {"scale": s}, {"scale": s.detach()}, {"softcap": 2.0},
        {"z_loss": 2.0}, {"label_smoothing": 0.5}, {"ignore_index": 1}, {"reduction": "sum"}, {"normalizer": 2.0},
        {"backend": "cpu"},
    ]  # fmt: skip
    for y in (x, x.detach(), x.double(), x.bfloat16()):
        for _ in range(2):
            for options in calls:
                go = lambda y=y, options=options: mlkernels.cross_entropy(y, TARGET.clamp(0), **options)
                found, wanted = go(), by_python(go)
                assert torch.equal(found, wanted) and found.requires_grad == wanted.requires_grad, options
    with torch.no_grad():
        assert not mlkernels.cross_entropy(x, TARGET).requires_grad
    with torch.inference_mode():
        assert mlkernels.cross_entropy(x, TARGET).is_inference()
    assert all(served)


def test_modules_and_schedules_are_served(served):
    """A module hands over everything it keeps; a number that changes at every step is another call at every step."""
    x = logits(6, 5)
    mlkernels.FocalLoss(weight=torch.ones(5))(x, TARGET, row_weight=torch.ones(6))
    for step in range(600):  # more than are remembered
        scale = 1 + step / 600
        found = mlkernels.cross_entropy(x, TARGET, scale=scale)
    assert torch.equal(found, by_python(lambda: mlkernels.cross_entropy(x, TARGET, scale=scale)))
    assert all(served)


# ---- what Python is left ---------------------------------------------------------------------------------------------


class Sub(torch.Tensor):
    pass


def watched(x):
    """Calls that somebody sees, batches, casts or differentiates forward."""
    plain = x.detach()
    loss = lambda t: mlkernels.cross_entropy(t, TARGET)
    yield lambda: torch.func.grad(loss)(plain)
    yield lambda: torch.func.vmap(loss)(plain[None])
    yield lambda: loss(plain.as_subclass(Sub))
    yield lambda: loss(torch._neg_view(plain))
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    for context in (forward_ad.dual_level(), torch.autocast("cpu"), torch.device("cpu"), FakeTensorMode(), hooks):

        def under(context=context):
            with context as mode:
                fake = isinstance(mode, FakeTensorMode)
                mlkernels.cross_entropy(*(mode.from_tensor(t) if fake else t for t in (plain, TARGET)))

        yield under
    yield lambda: mlkernels.cross_entropy(plain[0], TARGET[0])
    yield lambda: mlkernels.cross_entropy(plain, TARGET, backend="reference")


def test_what_is_watched_is_left_to_python(served):
    for index, call in enumerate(watched(logits(6, 5))):
        call()
        assert not any(served), index


BAD = [
    {"scale": -1.0},
    {"scale": torch.tensor(-1.0)},
    {"scale": torch.tensor([1.0, 1, 1, 1, -1])},
    {"scale": torch.ones(4)},
    {"scale": torch.ones((), dtype=torch.long)},
    {"scale": float("nan")},
    {"scale": True},
    {"weight": torch.ones(4)},
    {"weight": torch.ones(5, requires_grad=True)},
    {"row_weight": torch.ones(5)},
    {"reduction": "average"},
    {"ignore_index": 0.5},
    {"ignore_index": 2**60 + 1},
    {"label_smoothing": 2},
    {"backend": "none"},
    {"unknown": 1},
    {"normalizer": 1.0, "reduction": "sum"},
    {"target": TARGET + 3},
    {"target": TARGET.float().bool()},
    {"target": TARGET[1:]},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_errors_are_those_of_python(bad):
    arguments = {"target": TARGET} | bad
    go = lambda: mlkernels.cross_entropy(logits(6, 5), **arguments)
    with pytest.raises((TypeError, ValueError, IndexError)) as found:
        go()
    with pytest.raises(type(found.value)) as wanted:
        by_python(go)
    assert str(found.value) == str(wanted.value)


def test_tables_that_do_not_fit_say_so():
    two, three = torch.ones(2), torch.ones(3)
    for slope, bias, group in ((two, three, None), (two.expand(2, 2), two.expand(2, 2), None), (two, two, TARGET)):
        with pytest.raises(ValueError, match=r"t_bias must have the shape|group is"):
            mlkernels.piecewise_cross_entropy(logits(6, 5), TARGET, t_slope=slope, t_bias=bias, group=group)


# ---- autograd --------------------------------------------------------------------------------------------------------


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["cross_entropy", "two_scale_margin_modulated"])
def test_unusual_backwards(name, reduction, served):
    """Differentiated, batched, without an upstream gradient, infinite: in both ways the same."""
    loss = BY_NAME[name]
    input, target, params = draw(loss, rows=6, form="shared", classes=4)
    x = input.requires_grad_()
    own = {k: v.requires_grad_() for k, v in params.items()}
    leaves = [x, *own.values()]
    value = lambda: loss(x, target, own, reduction=reduction)

    def batched():
        out = value()
        upstream = torch.linspace(0, 1, 3 * out.numel(), dtype=out.dtype).view(3, *out.shape)
        return torch.autograd.grad(out, leaves, upstream, is_grads_batched=True)

    def twice():
        first = torch.autograd.grad(value().sum(), leaves, create_graph=True)
        return torch.autograd.grad(first[0].square().sum(), leaves)

    infinite = lambda: torch.autograd.grad(value().sum() * torch.inf, leaves)
    nothing = lambda: torch.autograd.grad(NoGradient.apply(value()).sum(), leaves)
    for go in (batched, twice, infinite, nothing):
        for found, wanted in zip(go(), by_python(go), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert all(served)


def test_a_compiled_backward_takes_no_number_for_another(served):
    import torch._dynamo.compiled_autograd

    x = logits(6, 5)
    for scale in (1.0, 2.0):
        value = mlkernels.cross_entropy(x, TARGET, scale=scale)
        x.grad = None
        with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
            value.backward()
        wanted = by_python(lambda s=scale: torch.autograd.grad(mlkernels.cross_entropy(x, TARGET, scale=s), x)[0])
        torch.testing.assert_close(x.grad, wanted)
    assert all(served)


def test_a_profiler_sees_the_same_names():
    def names():
        with profile() as seen:
            mlkernels.cross_entropy(logits(6, 5), TARGET).backward()
        return {event.name for event in seen.events() if "oss" in event.name}

    assert names() == by_python(names) >= {"_LossWithGradients", "mlkernels::softmax_loss_with_gradient"}


# ---- the library -----------------------------------------------------------------------------------------------------


def test_a_library_for_another_torch_is_not_loaded(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    library, why = fast_path._load()
    assert library is None and f"{sys.implementation.cache_tag}-torch-" in why
    monkeypatch.undo()
    monkeypatch.setenv("MLKERNELS_FAST_PATH", "0")
    assert fast_path._load() == (None, "switched off by MLKERNELS_FAST_PATH=0")
