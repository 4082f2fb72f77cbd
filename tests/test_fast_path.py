"""Plain CPU calls in one crossing: what the fast path serves, that it is the same loss, and that it says the same."""

import sys
from types import SimpleNamespace

import pytest
import torch
from table import BY_NAME, LOSSES, draw, extras, run
from table import leaves as leaves_of
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

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
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for options in (
            {},
            {"reduction": "none"},
            {"reduction": "sum", **extras(5)},
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
        {"backend": "cpu"}, {"backend": "".join("cpu"), "reduction": "".join("sum")},  # as read from a file
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


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_kept_is_not_to_be_changed(served, reduction):
    x, scale = logits(6, 5), torch.tensor(2.0, requires_grad=True)
    value = mlkernels.cross_entropy(x, TARGET, scale=scale, reduction=reduction)
    assert served.pop()
    value.sum().backward(retain_graph=True)
    first = x.grad.clone()
    value.sum().backward(retain_graph=True)
    assert torch.equal(x.grad, 2 * first)
    made = value.grad_fn.saved_tensors[0]
    assert made is not x
    made.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


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
    {"group": None},  # softmax_loss has one, which comes by itself
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


def test_degrees_after_radians(served):
    """What tensors hold is looked at again in a call remembered, a linear head's too; lost ones are NaN rows."""
    linear = mlkernels.LinearLoss(mlkernels.MarginLoss(scale=4.0), 5, 7, normalize=True)
    x, target = logits(6, 5), TARGET.clamp(0)
    arcface = lambda margin: mlkernels.arcface_loss(x, target, margin=margin)
    of_linear = lambda margin: mlkernels.linear_softmax_loss(
        x, linear.weight, target, normalize=True, loss=lambda f, y: mlkernels.arcface_loss(f, y, margin=margin)
    )
    for call, classes in ((arcface, 5), (of_linear, 7)):
        for shape in ((), (classes,), (6, 1)):
            for dtype in (torch.float32, torch.bfloat16):
                assert call(torch.full(shape, 0.5, dtype=dtype)).isfinite() and served[-1]
                assert call(torch.full(shape, float("nan"), dtype=dtype)).isnan() and served[-1]
                with pytest.raises(ValueError, match=r"^margin is an angle in radians.* got a tensor holding 28.*deg"):
                    call(torch.full(shape, 28.6, dtype=dtype))


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


def test_a_compiled_backward_takes_no_product_for_a_cosine(served):
    import torch._dynamo.compiled_autograd

    x, weight, _ = linear()
    for normalize in (False, True):
        value = lambda by=normalize: mlkernels.linear_softmax_loss(
            x, weight, TARGET, normalize=by, reduction="none"
        ).sum()
        x.grad = weight.grad = None
        loss = value()
        with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
            loss.backward()
        wanted = by_python(lambda value=value: torch.autograd.grad(value(), [x, weight]))
        torch.testing.assert_close([x.grad, weight.grad], [*wanted])
    assert all(served)


def test_a_profiler_sees_the_same_names():
    def names():
        with profile() as seen:
            mlkernels.cross_entropy(logits(6, 5), TARGET).backward()
        return {event.name for event in seen.events() if "oss" in event.name}

    assert names() == by_python(names) >= {"_LossWithGradients", "mlkernels::softmax_loss_with_gradient"}


# ---- linear heads ----------------------------------------------------------------------------------------------------


def linear(rows=6, classes=5, width=4, dtype=torch.float32):
    """Features, weight and bias whose logits are cosines' size."""
    torch.default_generator.manual_seed(2)
    return [
        (0.3 * torch.randn(*shape)).to(dtype).requires_grad_()
        for shape in ((rows, width), (classes, width), (classes,))
    ]


def same(go):
    """Value and gradients, to the bit."""
    for found, wanted in zip(go(), by_python(go), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_linear_heads_are_those_of_python(loss, served):
    by_row = {"row_weight": torch.linspace(-1, 2, 7)}
    kinds = [
        ({}, False, False), ({"reduction": "sum", **extras(5)}, False, False), (by_row, True, False),
        ({"reduction": "none", **extras(5)}, False, True), ({"reduction": "none", **by_row}, True, False),
        ({}, True, True),
    ]  # fmt: skip
    for shift, form in enumerate(loss.forms):
        _, target, params = draw(loss, rows=7, form=form, classes=5)
        for index, (options, cosines, stats) in enumerate(kinds):
            dtype = torch.float64 if (index + shift) % 2 else torch.float32
            x, weight, bias = linear(7, dtype=dtype)
            own = leaves_of(params, dtype)
            options = options | ({"group": loss.group(target)} if loss.groups else {})
            leaves = [t for t in (x, weight, None if cosines else bias, *own.values()) if isinstance(t, torch.Tensor)]

            def go():
                value = mlkernels.linear_softmax_loss(
                    x, weight, target, linear_bias=None if cosines else bias, normalize=cosines, return_stats=stats,
                    loss=lambda f, y: loss(f, y, own, **options),
                )  # fmt: skip
                value, *rows = (value[0], *value[1]) if stats else (value,)
                upstream = [value.detach().abs() + 1.5, *(torch.linspace(0.5, 1, 7).to(dtype) * i for i in range(3))]
                outputs = [value, *rows[:3]]
                gradients = torch.autograd.grad(outputs, leaves, upstream[: len(outputs)])
                return *(t.detach() for t in (value, *rows)), *gradients

            same(go)
            assert served[-1], (options, cosines, stats)


def test_which_linear_heads_are_served(served):
    """Plain ones, whatever needs a gradient; what a call has in its key is one of each number of rows and classes."""
    call, y = mlkernels.linear_cross_entropy, TARGET.clamp(0)
    for rows, classes in ((6, 5), (3, 5), (6, 7), (0, 5)):
        x, weight, bias = linear(rows, classes)
        for leaves in ([x, weight], [x.detach(), weight], [x, weight.detach()]):
            for options in ({}, {"linear_bias": bias}, {"linear_bias": bias.detach(), "reduction": "sum"}):
                value = lambda leaves=leaves, options=options: call(*leaves, y[:rows], **options)
                asked = [t for t in (*leaves, bias) if t.requires_grad]
                same(lambda value=value, asked=asked: torch.autograd.grad(value(), asked, materialize_grads=True))
    with torch.no_grad():
        same(lambda: [call(*linear()[:2], y), call(*linear()[:2], y, reduction="none")])
    for labels in (TARGET, torch.full((6,), -100)):
        x, weight, bias = linear()
        with torch.no_grad():
            x[labels == -100] = torch.nan
        norms = (torch.arange(6.0) + 1).unsqueeze(1).requires_grad_()
        ignored = lambda x=x, w=weight, b=bias, y=labels, m=norms: torch.autograd.grad(
            mlkernels.linear_softmax_loss(
                x, w, y, linear_bias=b, scale=m, row_weight=m.detach()[:, 0], label_smoothing=0.1, softcap=2.0
            ),
            [x, w, b, m],
        )
        same(ignored)
        rows = lambda x=x, w=weight, y=labels: mlkernels.linear_softmax_loss(
            x, w, y, reduction="none", return_stats=True, softcap=2.0, normalize=True
        )
        same(lambda x=x, w=weight, rows=rows: torch.autograd.grad(rows()[1].entropy.sum(), [x, w]))
        with torch.no_grad():
            same(lambda x=x, w=weight, y=labels: [call(x, w, y), call(x, w, y, reduction="none")])
            same(lambda rows=rows: [*rows()[1]])
    assert all(served)
    x, weight, _ = linear()
    left = [
        lambda: call(x, weight.T.contiguous().T, y),
        lambda: call(x, weight, y, memory=10_000), lambda: call(x, weight, y, strategy="rows"),
        lambda: call(x.bfloat16(), weight.bfloat16(), y), lambda: call(x[:, None], weight, y[:, None]),
        lambda: call(x, weight, y, scale=torch.ones((), dtype=torch.bfloat16, requires_grad=True)),
    ]  # fmt: skip
    for index, go in enumerate(left):
        served.clear()
        same(lambda go=go: torch.autograd.grad(go(), [x, weight]))
        assert not any(served), index
    for bad in (TARGET + 3, TARGET.repeat(2)):
        said = []
        for way in (lambda go: go(), by_python):
            with pytest.raises((IndexError, ValueError)) as found:
                way(lambda bad=bad: call(x, weight, bad))
            said.append(str(found.value))
        assert said[0] == said[1]


def test_unusual_backwards_of_linear_heads(served):
    """Batched, without an upstream gradient, infinite, kept: in both ways the same; differentiated: refused."""
    x, weight, bias = leaves = linear()
    value = lambda: mlkernels.linear_cross_entropy(x, weight, TARGET.clamp(0), linear_bias=bias)
    upstream = torch.linspace(0, 1, 3)
    same(lambda: torch.autograd.grad(value(), leaves, upstream, is_grads_batched=True))
    same(lambda: torch.autograd.grad(value() * torch.inf, leaves))
    same(lambda: torch.autograd.grad(NoGradient.apply(value()), leaves))
    kept = value()
    first = torch.autograd.grad(kept, leaves, retain_graph=True)
    first[1].zero_()  # whose it is may write into it
    second = torch.autograd.grad(kept, leaves)
    assert second[1].any() and torch.equal(first[0], second[0])
    with pytest.raises(RuntimeError, match="second-order"):
        torch.autograd.grad(value(), leaves, create_graph=True)
    assert all(served) and kept.grad_fn.name() == "_LinearLossBackward"


def test_unusual_backwards_of_the_rows_of_linear_heads(served):
    """Their gradients are made later: from what was saved, which may not have changed, once for each upstream one."""
    x, weight, bias = leaves = linear()
    value = lambda: mlkernels.linear_cross_entropy(x, weight, TARGET, linear_bias=bias, reduction="none")
    upstream = torch.linspace(0, 1, 6)
    same(lambda: torch.autograd.grad(value() * torch.inf, leaves, upstream + 1))
    same(lambda: torch.autograd.grad(NoGradient.apply(value()), leaves, upstream))
    kept = value()
    first = torch.autograd.grad(kept, leaves, upstream, retain_graph=True)
    wanted = [one.clone() for one in first]
    first[1].zero_()
    assert all(map(torch.equal, torch.autograd.grad(kept, leaves, upstream, retain_graph=True), wanted))
    assert all(map(torch.equal, seen_backward(kept, leaves, upstream), wanted))
    for words, options in (("second-order", {"create_graph": True}), ("at a time", {"is_grads_batched": True})):
        ups = torch.eye(6) if "is_grads_batched" in options else upstream
        for way in (lambda go: go(), by_python):
            with pytest.raises(RuntimeError, match=words):
                way(lambda ups=ups, options=options: torch.autograd.grad(value(), leaves, ups, **options))
    kept = value()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(kept, leaves, upstream)
    assert all(served) and kept.grad_fn.name() == "_LinearLossBackward"


def seen_backward(output, leaves, upstream):
    """A backward whose operators somebody sees."""
    seen = []

    class See(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.append(str(function))
            return function(*arguments, **(keywords or {}))

    with See():
        found = torch.autograd.grad(output, leaves, upstream)
    assert "mlkernels.linear_rows_backward.default" in seen
    return found


# ---- the library -----------------------------------------------------------------------------------------------------


def test_a_library_for_another_torch_is_not_loaded(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    library, why = fast_path._load()
    assert library is None and f"{sys.implementation.cache_tag}-torch-" in why
    monkeypatch.undo()
    monkeypatch.setenv("MLKERNELS_FAST_PATH", "0")
    assert fast_path._load() == (None, "switched off by MLKERNELS_FAST_PATH=0")


@pytest.mark.parametrize("set_up", [lambda *arguments: None, lambda one: None], ids=["no linear", "other arguments"])
def test_a_library_of_older_sources_is_not_used(monkeypatch, set_up):
    monkeypatch.setattr(fast_path.importlib.util, "module_from_spec", lambda spec: SimpleNamespace(set_up=set_up))
    library, why = fast_path._load()
    assert library is None and why.endswith("was built from older sources: build it again")
