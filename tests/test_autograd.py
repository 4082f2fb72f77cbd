"""What autograd, torch.func, autocast and hooks may ask of a loss."""

import gc

import pytest
import torch
from table import BY_NAME, F64, FEW, LOSSES, draw, leaves, run, usable_backends
from torch.autograd import forward_ad

import mlkernels
from mlkernels import fast_path

SMOOTH = [loss for loss in LOSSES if loss.smooth and loss.name != "focal_half"]
ROWS = ("random", "confident5")


def prepared(loss, rows=6, form="shared", **keywords):
    input, target, params = draw(loss, rows=rows, form=form, classes=4, **keywords)
    options = {"group": loss.group(target)} if loss.groups else {}
    return input, target, params, options


def tensors_of(own):
    return [v for v in own.values() if isinstance(v, torch.Tensor)]


@pytest.fixture(params=[*usable_backends(), "cpu-by-python"])
def backend(request, monkeypatch):
    """Every backend, and the CPU's without the fast path."""
    if request.param != "cpu-by-python":
        return request.param
    monkeypatch.setattr(fast_path, "loss", None)
    return "cpu"


# ---- once, twice, again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", FEW, ids=str)
def test_retained_graphs_give_the_same_twice(loss, backend, reduction, dtype):
    """The first backward may hand out what the forward kept: the second must not find it changed or gone."""
    input, target, params, options = prepared(loss, exact=dtype, kinds=ROWS)
    x, own = input.to(dtype).requires_grad_(), leaves(params)
    value = loss(x, target, own, reduction=reduction, backend=backend, **options)
    up = torch.linspace(0.5, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
    wanted = [
        run(loss, x, target, params, factor * up, reduction=reduction, backend=backend, **options)
        for factor in (1.0, 3.0)
    ]
    for i, factor in enumerate((1.0, 3.0, 1.0)):
        x.grad = None
        for v in tensors_of(own):
            v.grad = None
        value.backward(factor * up, retain_graph=True)
        _, grad, by_param = wanted[i % 2]
        # What the forward wrote for an upstream of 1 and rescaled, against what a backward writes at once.
        rtol = torch.finfo(dtype).eps if x.element_size() == 2 else 1e-6
        torch.testing.assert_close(x.grad, grad, rtol=rtol, atol=1e-9)
        for name, g in by_param.items():
            torch.testing.assert_close(own[name].grad, g, rtol=1e-5, atol=1e-9)


def test_gradients_of_two_backwards_share_nothing(backend):
    input, target, _, _ = prepared(BY_NAME["cross_entropy"])
    x = input.float().requires_grad_()
    value = mlkernels.cross_entropy(x, target, backend=backend)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(value, x, retain_graph=True)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    second.zero_()
    first.mul_(5)
    (third,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(third, kept, rtol=0, atol=0)


def test_a_leafs_gradient_is_its_own(backend):
    """.grad is accumulated in place: it must alias neither the input nor what the graph still holds."""
    input, target, _, _ = prepared(BY_NAME["modulated"])
    x = input.float().requires_grad_()
    value = mlkernels.modulated_cross_entropy(x, target, backend=backend)
    value.backward(retain_graph=True)
    once = x.grad.clone()
    value.backward(retain_graph=True)
    torch.testing.assert_close(x.grad, 2 * once)
    value.backward(torch.tensor(-2.0), retain_graph=True)
    torch.testing.assert_close(x.grad, torch.zeros_like(once), atol=1e-8, rtol=0)
    value.backward(torch.tensor(2.0))
    torch.testing.assert_close(x.grad, 2 * once)
    assert x.grad.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_a_freed_graph_says_so(backend):
    input, target, _, _ = prepared(BY_NAME["cross_entropy"])
    x = input.requires_grad_()
    value = mlkernels.cross_entropy(x, target, backend=backend)
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_input_changed_in_place_is_noticed(backend, reduction):
    """torch's version error where the backward reads the logits again, else the gradient of what they were."""
    input, target, _, _ = prepared(BY_NAME["cross_entropy"])
    x = input.requires_grad_()
    _, wanted, _ = run(BY_NAME["cross_entropy"], x, target, {}, None if reduction == "mean" else torch.ones(6),
                       reduction=reduction, backend=backend)  # fmt: skip
    y = x * 1
    value = mlkernels.cross_entropy(y, target, reduction=reduction, backend=backend)
    y.mul_(torch.linspace(-2, 2, 4, dtype=F64))
    # The reference works on a copy; on the CPU the forward writes a mean's gradient, which Triton's may have to redo.
    if backend == "reference" or (backend == "cpu" and reduction == "mean"):
        value.sum().backward()
        torch.testing.assert_close(x.grad, wanted)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.sum().backward()


def test_an_input_changed_between_two_backwards_is_noticed(backend):
    """As between the forward and the first: what the CPU's forward wrote of a mean is still right."""
    input, target, _, _ = prepared(BY_NAME["cross_entropy"])
    x = input.requires_grad_()
    y = x * 1
    value = mlkernels.cross_entropy(y, target, backend=backend)
    value.backward(retain_graph=True)
    once = x.grad.clone()
    y.add_(torch.linspace(-2, 2, 4, dtype=F64))
    if backend in ("reference", "cpu"):
        value.backward()
        torch.testing.assert_close(x.grad, 2 * once)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


# ---- upstream gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", FEW, ids=str)
def test_expanded_upstreams(loss, backend):
    """sum() of unreduced losses sends a stride-0 gradient; slices and transposes of others come too."""
    input, target, params, options = prepared(loss)
    plain = torch.linspace(-1, 2, 6, dtype=F64)
    wide = torch.stack([plain, torch.full_like(plain, 99.0)], 1)
    for upstream in (torch.tensor(1.75, dtype=F64).expand(6), wide[:, 0], wide.flip(0)[:, 0]):
        found = run(loss, input, target, params, upstream, reduction="none", backend=backend, **options)
        dense = upstream.clone(memory_format=torch.contiguous_format)
        wanted = run(loss, input, target, params, dense, reduction="none", backend=backend, **options)
        assert torch.equal(found[1], wanted[1])
        for name, g in found[2].items():
            torch.testing.assert_close(g, wanted[2][name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", [0.0, -2.5, 1e-3, 1.0])
@pytest.mark.parametrize("loss", FEW, ids=str)
def test_scaled_losses(loss, backend, scale):
    """(scale * loss).backward() is scale times loss.backward(), also through further operations."""
    input, target, params, options = prepared(loss)
    _, unit, units = run(loss, input, target, params, 1.0, backend=backend, **options)
    x, own = input.clone().requires_grad_(), leaves(params)
    value = loss(x, target, own, backend=backend, **options)
    (scale * value + value.detach() ** 2).backward()
    torch.testing.assert_close(x.grad, scale * unit, rtol=1e-12, atol=1e-15)
    for name, g in units.items():
        torch.testing.assert_close(own[name].grad, scale * g, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("form", ["shared", "class", "row"])
@pytest.mark.parametrize("loss", FEW, ids=str)
def test_ignored_rows_are_exactly_zero_whatever_comes(loss, backend, form):
    """Logits and every parameter; what is kept shows that something is wrong."""
    if form not in loss.forms:
        pytest.skip("not for this loss")
    up = torch.tensor([float("inf"), float("nan")] * 3, dtype=F64)
    for kept in ([], [1, 4]):
        input, target, params, options = prepared(loss, form=form, kinds=ROWS)
        ignored = [i for i in range(6) if i not in kept]
        absent = sorted({0, 1, 2, 3} - set(target[kept].tolist()))
        target[ignored] = -100
        for reduction, upstream in (("mean", up[1]), ("sum", up[0]), ("none", up)):
            options |= {"reduction": reduction, "backend": backend, "z_loss": 0.1}
            _, grad, by_param = run(loss, input, target, params, upstream, **options)
            assert not grad[ignored].any(), reduction
            assert not grad[kept].isfinite().all(1).any()
            for name, g in by_param.items():
                if not kept:
                    assert not g.any(), (reduction, name)
                elif form == "row" and g.shape == (6, 1):
                    assert not g[ignored].any(), (reduction, name)
                elif form == "class" and g.shape == (4,):
                    assert not g[absent].any(), (reduction, name)


def test_a_mean_of_nothing_may_go_on(backend):
    """exp(NaN) sends a NaN back to rows that are not there."""
    x = torch.randn(3, 4, requires_grad=True)
    mlkernels.cross_entropy(x, torch.full((3,), -100), backend=backend).exp().backward()
    assert not x.grad.any()


def test_a_zero_upstream_is_exactly_zero(backend):
    """Where the upstream is 0 a row contributes nothing, finite as it is."""
    input, target, params, _ = prepared(BY_NAME["cross_entropy"], form="number")
    up = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0, 0.0], dtype=F64)
    _, grad, _ = run(BY_NAME["cross_entropy"], input, target, params, up, reduction="none", backend=backend)
    assert torch.equal(grad[up == 0], torch.zeros(4, 4, dtype=F64))


# ---- twice differentiable --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", SMOOTH, ids=str)
def test_gradcheck_and_gradgradcheck(loss, backend):
    input, target, params, options = prepared(loss, rows=2, kinds=ROWS, margin=2e-2)
    at_its_end = lambda k, v: k in ("gamma", "kappa") and float(v.min()) == 0
    names = [k for k, v in params.items() if isinstance(v, torch.Tensor) and not at_its_end(k, v)]
    x = input.requires_grad_()
    own = [params[k].clone().requires_grad_() for k in names]
    options |= {"label_smoothing": 0.1, "z_loss": 0.01}

    def function(x, *values):
        return loss(
            x, target, params | dict(zip(names, values, strict=True)), reduction="none", backend=backend, **options
        )

    everything = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(function, (x, *own), fast_mode=True, rtol=1e-4, atol=1e-6, **everything)
    assert torch.autograd.gradgradcheck(function, (x, *own), fast_mode=True, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", [loss for loss in FEW if loss.smooth], ids=str)
def test_double_backward_is_the_same_on_every_backend(loss, backend):
    """The penalty |dL/dx|^2, differentiated: once by hand through create_graph."""
    input, target, params, options = prepared(loss, kinds=ROWS)
    found = []
    for name in (backend, "reference"):
        x, own = input.clone().requires_grad_(), leaves(params)
        value = loss(x, target, own, backend=name, **options)
        grads = torch.autograd.grad(value, [x, *tensors_of(own)], create_graph=True)
        assert all(g.requires_grad for g in grads)
        penalty = sum((g * g).sum() for g in grads)
        found.append((grads, torch.autograd.grad(penalty + value, [x, *tensors_of(own)], materialize_grads=True)))
    for ours, theirs in zip(found[0][0] + found[0][1], found[1][0] + found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    if backend != "reference":
        return
    # The reference's own second derivative, against a difference of its first.
    x = input.clone().requires_grad_()
    own = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in params.items()}
    direction = torch.linspace(-1, 1, x.numel(), dtype=F64).reshape(x.shape)

    def gradient(at):
        return torch.autograd.grad(loss(at, target, own, **options, backend=backend), at, create_graph=True)[0]

    (second,) = torch.autograd.grad((gradient(x) * direction).sum(), x)
    h = 1e-5
    up, down = (gradient((input + s * h * direction).requires_grad_()) for s in (1, -1))
    torch.testing.assert_close(second, ((up - down) / (2 * h)).detach(), rtol=1e-5, atol=1e-7)


def test_double_backward_through_statistics(backend):
    input, target, _, _ = prepared(BY_NAME["cross_entropy"])
    weight = torch.linspace(-1, 2, len(target))

    def function(x):
        loss, rows = mlkernels.softmax_loss(
            x, target, normalizer=5, row_weight=weight, return_stats=True, backend=backend
        )
        return loss, rows.logsumexp, rows.log_prob, rows.entropy

    assert torch.autograd.gradcheck(function, (input.requires_grad_(),), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, (input,), fast_mode=True)


def test_create_graph_then_a_plain_backward(backend):
    """A create_graph pass leaves nothing behind that a later plain pass would use."""
    input, target, _, _ = prepared(BY_NAME["modulated"])
    x = input.requires_grad_()
    value = mlkernels.modulated_cross_entropy(x, target, backend=backend)
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    value.backward(torch.tensor(0.5, dtype=F64))
    torch.testing.assert_close(x.grad, 0.5 * first.detach(), rtol=1e-10, atol=1e-14)


# ---- torch.func ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", FEW, ids=str)
def test_func_grad_and_jacrev(loss, backend):
    input, target, params, options = prepared(loss)
    own = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in params.items()}
    function = lambda x: loss(x, target, own, backend=backend, **options)
    _, wanted, _ = run(loss, input, target, own, backend=backend, **options)
    torch.testing.assert_close(torch.func.grad(function)(input), wanted, rtol=1e-9, atol=1e-12)
    value, grad = torch.func.grad_and_value(function)(input)[::-1]
    torch.testing.assert_close(value, function(input), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12)
    rows = lambda x: loss(x, target, own, reduction="none", backend=backend, **options)
    jacobian = torch.func.jacrev(rows)(input)
    assert jacobian.shape == (6, 6, 4)
    _, dense, _ = run(loss, input, target, own, torch.ones(6), reduction="none", backend=backend, **options)
    torch.testing.assert_close(jacobian.sum(0), dense, rtol=1e-9, atol=1e-12)
    for i in range(6):  # a row depends on itself only
        assert not jacobian[i][torch.arange(6) != i].any()


def test_vmap_over_candidates(backend):
    """A population of models under vmap, each batch its own loss."""
    generator = torch.Generator().manual_seed(1)
    input = torch.randn(3, 5, 4, generator=generator, dtype=F64)
    target = torch.randint(0, 4, (3, 5), generator=generator)
    one = lambda x, y: mlkernels.modulated_cross_entropy(x, y, reduction="none", backend=backend)
    together = torch.func.vmap(one)(input, target)
    torch.testing.assert_close(together, torch.stack([one(x, y) for x, y in zip(input, target, strict=True)]))
    mean = lambda x, y: mlkernels.modulated_cross_entropy(x, y, backend=backend)
    grads = torch.func.vmap(torch.func.grad(mean))(input, target)
    for i in range(3):
        torch.testing.assert_close(grads[i], torch.func.grad(mean)(input[i], target[i]))


def test_jvp_and_hessian(backend):
    input, target, _, _ = prepared(BY_NAME["cross_entropy"])
    function = lambda x: mlkernels.cross_entropy(x, target, backend=backend)
    theirs = lambda x: torch.nn.functional.cross_entropy(x, target)
    direction = torch.linspace(-1, 1, input.numel(), dtype=F64).reshape(input.shape)
    value, slope = torch.func.jvp(function, (input,), (direction,))
    torch.testing.assert_close(value, theirs(input))
    torch.testing.assert_close(slope, torch.func.jvp(theirs, (input,), (direction,))[1])
    torch.testing.assert_close(torch.func.hessian(function)(input), torch.func.hessian(theirs)(input))


# ---- forward mode, batches of upstream gradients ---------------------------------------------------------------------


def test_tangents_are_not_lost(backend):
    """Dual tensors are no level of torch.func. Under no_grad, too, and of statistics and parameters."""
    loss = BY_NAME["two_scale_margin_modulated"]
    input, target, params, _ = prepared(loss)
    direction = torch.linspace(-1, 1, input.numel(), dtype=F64).reshape(input.shape)
    _, grad, by_param = run(loss, input, target, params, backend=backend)
    with torch.no_grad(), forward_ad.dual_level():
        value = loss(forward_ad.make_dual(input, direction), target, params, backend=backend)
        torch.testing.assert_close(forward_ad.unpack_dual(value).tangent, (grad * direction).sum())
        for name, slope in by_param.items():
            own = params | {name: forward_ad.make_dual(params[name], torch.full_like(params[name], 2.0))}
            value = loss(input, target, own, backend=backend)
            torch.testing.assert_close(forward_ad.unpack_dual(value).tangent, 2 * slope.sum(), msg=name)
        _, rows = mlkernels.softmax_loss(
            forward_ad.make_dual(input, direction), target, return_stats=True, backend=backend
        )
        p = input.softmax(1)
        torch.testing.assert_close(forward_ad.unpack_dual(rows.logsumexp).tangent, (p * direction).sum(1))
        # Without a tangent a call inside of a level is any other.
        assert forward_ad.unpack_dual(loss(input, target, params, backend=backend)).tangent is None


def test_a_tangent_of_the_upstream_gradient_is_not_lost(backend):
    input, target, _, _ = prepared(BY_NAME["cross_entropy"])
    x = input.requires_grad_()
    for reduction in ("mean", "none"):
        value = mlkernels.cross_entropy(x, target, reduction=reduction, backend=backend)
        (unit,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
        with forward_ad.dual_level():
            up = forward_ad.make_dual(torch.ones_like(value), torch.full_like(value, 3.0))
            (grad,) = torch.autograd.grad(value, x, up)
            torch.testing.assert_close(forward_ad.unpack_dual(grad).tangent, 3 * unit)


def test_linearized():
    backend = usable_backends()[-1]  # they all take the same way
    loss = BY_NAME["modulated"]
    input, target, params, _ = prepared(loss, form="number")
    _, grad, _ = run(loss, input, target, params, backend=backend)
    direction = torch.linspace(-1, 1, input.numel(), dtype=F64).reshape(input.shape)
    value, tangent = torch.func.linearize(lambda x: loss(x, target, params, backend=backend), input)
    torch.testing.assert_close(value, loss(input, target, params, backend=backend))
    torch.testing.assert_close(tangent(direction), (grad * direction).sum())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batches_of_upstream_gradients(backend, reduction):
    """is_grads_batched=True is no level of torch.func, either; jacobian(vectorize=True) takes both ways."""
    loss = BY_NAME["two_scale_margin_modulated"]
    input, target, params, _ = prepared(loss)
    x, own = input.clone().requires_grad_(), leaves(params)
    value = loss(x, target, own, reduction=reduction, backend=backend)
    ups = torch.linspace(-1, 2, 3 * value.numel(), dtype=F64).reshape(3, *value.shape)
    inputs = [x, *tensors_of(own)]
    wanted = [torch.autograd.grad(value, inputs, up, retain_graph=True) for up in ups]
    found = torch.autograd.grad(value, inputs, ups, is_grads_batched=True)
    for i, one in enumerate(found):
        torch.testing.assert_close(one, torch.stack([grads[i] for grads in wanted]))
    function = lambda t: loss(t, target, params, reduction=reduction, backend=backend)
    plain = torch.autograd.functional.jacobian(function, input)
    for strategy in ("reverse-mode", "forward-mode"):
        found = torch.autograd.functional.jacobian(function, input, vectorize=True, strategy=strategy)
        torch.testing.assert_close(found, plain)


def test_batches_of_upstream_gradients_of_statistics(backend):
    input, target, _, _ = prepared(BY_NAME["cross_entropy"])
    x = input.requires_grad_()
    _, rows = mlkernels.softmax_loss(x, target, return_stats=True, backend=backend)
    (found,) = torch.autograd.grad(rows.log_prob, x, torch.eye(6, dtype=F64), is_grads_batched=True)
    torch.testing.assert_close(found.sum(0), torch.nn.functional.one_hot(target, 4) - x.detach().softmax(1))


# ---- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", FEW, ids=str)
def test_autocast_changes_nothing(loss, backend, dtype):
    input, target, params, options = prepared(loss, exact=dtype, kinds=ROWS)
    x = input.to(dtype)
    wanted = run(loss, x, target, params, 1.5, backend=backend, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(loss, x, target, params, 1.5, backend=backend, **options)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == dtype
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    for name, g in found[2].items():
        assert torch.equal(g, wanted[2][name])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("loss", FEW, ids=str)
def test_without_gradients(loss, backend, mode):
    input, target, params, options = prepared(loss)
    own = leaves(params)
    wanted = loss(input, target, params, reduction="none", backend=backend, **options).detach()
    with mode():
        x = input.clone().requires_grad_() if mode is torch.no_grad else input.clone()
        value = loss(x, target, own, reduction="none", backend=backend, **options)
        assert not value.requires_grad
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-300)


def test_inference_tensors_can_be_scored(backend):
    with torch.inference_mode():
        x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    assert not mlkernels.cross_entropy(x, y, backend=backend).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hooks(backend, reduction):
    input, target, _, _ = prepared(BY_NAME["cross_entropy"])
    x = input.requires_grad_()
    hidden = x * 2
    seen = []
    hidden.register_hook(lambda g: seen.append(g.clone()))
    hidden.register_hook(lambda g: g * 10)
    x.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    mlkernels.cross_entropy(hidden, target, reduction=reduction, backend=backend).sum().backward()
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], 20 * seen[0])
    _, wanted, _ = run(
        BY_NAME["cross_entropy"], 2 * input.detach(), target, {"scale": 1.0},
        None if reduction == "mean" else torch.ones(6), reduction=reduction, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(seen[0], wanted)


def test_anomaly_mode_finds_nothing_in_sound_rows(loss, backend):
    """The reference masks before it computes: no NaN meets a 0 on the way back."""
    input, target, params = draw(loss, form="shared")
    target[2], input[2] = -100, float("nan")
    options = {"group": loss.group(target)} if loss.groups else {}
    with torch.autograd.detect_anomaly(check_nan=True):
        _, grad, by_param = run(loss, input, target, params, 1.25, backend=backend, **options)
    assert bool(grad.isfinite().all())
    assert all(bool(g.isfinite().all()) for g in by_param.values())


def test_saved_tensor_hooks(backend):
    """Offloading saved tensors (as checkpointing libraries do) and getting copies back."""
    loss = BY_NAME["two_scale_margin_modulated"]
    input, target, params, _ = prepared(loss)
    wanted = run(loss, input, target, params, 1.5, backend=backend)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        found = run(loss, input, target, params, 1.5, backend=backend)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-12, atol=1e-15)


def test_activation_checkpointing(backend):
    input, target, _, _ = prepared(BY_NAME["modulated"])
    x, y = input.clone().requires_grad_(), input.clone().requires_grad_()
    score = lambda t: mlkernels.modulated_cross_entropy(2 * t, target, backend=backend)
    torch.utils.checkpoint.checkpoint(score, x, use_reentrant=False).backward()
    score(y).backward()
    assert torch.equal(x.grad, y.grad)


def test_checkpointing_keeps_no_gradient(backend):
    """Between forward and backward there is what the checkpointed function takes, and nothing of its size more."""
    x = torch.randn(61, 103, requires_grad=True)
    target = torch.arange(61)
    score = lambda t: mlkernels.cross_entropy(t, target, backend=backend)
    # Not isinstance, which asks a weak proxy, of anybody's, for what it stood for.
    tensors = lambda: (t for t in gc.get_objects() if issubclass(type(t), torch.Tensor))
    large = lambda: {t.data_ptr() for t in tensors() if t.numel() == x.numel()}
    before = large()
    value = torch.utils.checkpoint.checkpoint(score, x, use_reentrant=False)
    assert large() <= before
    value.backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(score(x), x)[0])


def test_hooks_on_saved_tensors_meet_no_gradient(backend):
    """Logits, labels and two numbers a row: a gradient would be offloaded, too."""
    if backend == "reference":
        pytest.skip("plain operations")
    x = torch.randn(61, 103, requires_grad=True)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        mlkernels.cross_entropy(x, torch.arange(61), backend=backend).backward()
    assert [t.data_ptr() for t in packed if t.numel() == x.numel()] == [x.data_ptr()]


def test_what_is_kept_is_a_saved_tensor(backend):
    if backend == "reference":
        pytest.skip("plain operations")
    x = torch.randn(8, 5, requires_grad=True)
    value = mlkernels.cross_entropy(
        x, torch.arange(8) % 5, scale=torch.tensor(2.0, requires_grad=True), backend=backend
    )
    kept = getattr(value.grad_fn, "__dict__", {}).values()  # the fast path's has none
    assert not [v for v in kept if torch.is_tensor(v) or isinstance(v, (list, dict))]
    assert any(t.shape == x.shape and t is not x for t in value.grad_fn.saved_tensors)


def test_the_leaf_takes_the_gradient_that_was_made(backend):
    """Without a copy, and nothing of it is left when the graph is gone."""
    if backend == "reference":
        pytest.skip("plain operations")
    x = torch.randn(64, 100, requires_grad=True)
    value = mlkernels.cross_entropy(x, torch.arange(64), backend=backend)
    made = next(t for t in value.grad_fn.saved_tensors if t.shape == x.shape and t is not x)
    place = made.data_ptr()
    del made
    value.backward()
    assert x.grad.data_ptr() == place


def test_nothing_is_kept_when_nothing_is_asked(backend):
    input, target, _, _ = prepared(BY_NAME["cross_entropy"])
    assert mlkernels.cross_entropy(input, target, backend=backend).grad_fn is None
    x = input.requires_grad_()
    value = mlkernels.cross_entropy(x.detach(), target, scale=torch.tensor(2.0, requires_grad=True), backend=backend)
    value.backward()
    assert x.grad is None


def test_one_tensor_in_two_places(backend):
    """The same leaf as logits and parameter, or as two parameters: gradients add."""
    input, target, _, _ = prepared(BY_NAME["cross_entropy"])
    s = torch.tensor(1.5, dtype=F64, requires_grad=True)
    mlkernels.two_scale_cross_entropy(input, target, s, s, eta=0.0, backend=backend).backward()
    t = torch.tensor(1.5, dtype=F64, requires_grad=True)
    mlkernels.cross_entropy(input, target, scale=t, backend=backend).backward()
    torch.testing.assert_close(s.grad, t.grad)
    x = input.clone().requires_grad_()
    own = x.gather(1, target[:, None]) * 2
    mlkernels.softmax_loss(x, target, target_logit=own, backend=backend).backward()
    y = input.clone().requires_grad_()
    z = y.scatter(1, target[:, None], 2 * y.gather(1, target[:, None]))
    torch.nn.functional.cross_entropy(z, target).backward()
    torch.testing.assert_close(x.grad, y.grad)
