"""Random shapes, strides, dtypes, labels and options against the closed formulas."""

import os

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from table import (
    F64,
    INF,
    LOSSES,
    NAN,
    TABLES,
    accumulation_eps,
    close,
    draw,
    expected,
    from_oracle,
    leaves,
    usable_backends,
)

import mlkernels

RELAXED = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
ROWS = ("random", "confident5", "confident20", "wrong40", "ties", "tied_top")


def weights(classes, draw_from):
    return torch.tensor(draw_from(st.lists(st.integers(0, 8), min_size=classes, max_size=classes))).double() / 4


@st.composite
def calls(draw_from):
    """A loss, its rows and whatever else a call may have."""
    loss = draw_from(st.sampled_from(LOSSES))
    classes = draw_from(st.integers(1, 9))
    rows = draw_from(st.integers(1, 6))
    seed = draw_from(st.integers(0, 999))
    form = draw_from(st.sampled_from(loss.forms))
    dtype = draw_from(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    kinds = ("random", "ties") if classes == 1 else tuple(draw_from(st.permutations(ROWS)))
    if dtype == torch.float16 and loss.draws == "cosines":
        kinds = tuple(k for k in kinds if k != "confident40")
    options = {}
    if draw_from(st.booleans()):
        options["softcap"] = draw_from(st.sampled_from([2.0, 8.0, 30.0]))
    if draw_from(st.booleans()):
        options["logit_adjustment"] = weights(classes, draw_from) - 1
    input, target, params = draw(
        loss, rows=rows, classes=classes, seed=seed, form=form, exact=dtype, kinds=kinds, margin=5e-3, **options
    )
    if draw_from(st.booleans()):
        options["weight"] = weights(classes, draw_from)
    if draw_from(st.booleans()):
        options["label_smoothing"] = draw_from(st.sampled_from([0.05, 0.5, 1.0]))
    if draw_from(st.booleans()):
        options["z_loss"] = draw_from(st.sampled_from([1e-4, 0.5]))
    options["ignore_index"] = draw_from(st.sampled_from([-100, -1, 0, 3]))
    options["reduction"] = draw_from(st.sampled_from(["none", "mean", "sum"]))
    for i in range(rows):
        if draw_from(st.integers(0, 4)) == 0:
            target[i] = options["ignore_index"]
            input[i] = draw_from(st.sampled_from([NAN, INF, -INF, 0.0]))
    if "weight" in options:  # 0/0 and x/0 are test_conventions.py's
        kept = target[target != options["ignore_index"]]
        assume(len(kept) == 0 or bool(options["weight"][kept].sum() > 0))
    layout = draw_from(st.sampled_from(["contiguous", "transposed", "sliced", "stepped", "dense"]))
    label = draw_from(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8]))
    upstream = draw_from(st.sampled_from([1.0, -0.5, 3.75])), draw_from(st.integers(0, 99))
    return loss, input, target, params, dtype, options, layout, label, upstream


def laid_out(x, layout):
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "sliced":
        return torch.cat([x * 0, x, x * 0], 1)[:, x.shape[1] : 2 * x.shape[1]]
    if layout == "stepped":
        return torch.stack([x, x * 0], 2)[:, :, 0]
    return x


def check_call(call, backend):
    loss, input, target, params, dtype, options, layout, label, (factor, seed) = call
    rows = len(target)
    upstream = torch.tensor(factor)
    if options["reduction"] == "none":
        upstream = factor * torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    group = {"group": loss.group(target)} if loss.groups else {}
    wanted = expected(loss, input, target, params, upstream=upstream.double(), **options, **group)

    x, y = laid_out(input.to(dtype), layout), target.to(label)
    own, up = leaves(params), upstream
    if layout == "dense":  # the rows as one image: (1, C, rows)
        x, y = x.t().unsqueeze(0).contiguous(), y.unsqueeze(0)
        per_row = lambda k, v: isinstance(v, torch.Tensor) and v.shape == (rows, 1) and k not in TABLES
        own = {k: v.detach()[None].requires_grad_() if per_row(k, v) else v for k, v in own.items()}
        group = {k: v.unsqueeze(0) for k, v in group.items()}
        up = upstream.unsqueeze(0) if upstream.dim() else upstream
    x = x.detach().requires_grad_()
    value = loss(x, y, own, backend=backend, **options, **group)
    value.backward(up.to(value.dtype))

    grad = x.grad[0].t() if layout == "dense" else x.grad
    eps = accumulation_eps(dtype)
    half = torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0.0
    tiny = 100 * torch.finfo(value.dtype).tiny
    close(value.detach(), wanted.loss, wanted.loss_unit, eps, "loss", tiny=tiny)
    exact = torch.as_tensor(wanted.grad)
    fits = exact.isfinite() & (exact.abs() < 0.99 * torch.finfo(dtype).max)
    close(
        grad[fits], exact[fits], torch.as_tensor(wanted.grad_unit)[fits], eps, "gradient", extra=half,
        tiny=max(tiny, torch.finfo(dtype).smallest_normal),
    )  # fmt: skip
    for name, v in own.items():
        if isinstance(v, torch.Tensor):
            key = from_oracle(loss, name)
            close(v.grad, wanted.params[key], wanted.param_units[key], eps, name, tiny=tiny)


def for_backend(backend):
    @RELAXED
    @given(calls())
    def test(call):
        check_call(call, backend)

    return test


for _backend in usable_backends():
    globals()[f"test_any_call_{_backend}"] = for_backend(_backend)


@RELAXED
@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 88.0, -104.0, 1e30, -1e30, INF, -INF, NAN]), min_size=1, max_size=5),
    st.integers(0, 4),
)
def test_any_numbers_as_torch(values, y):
    """Overflow, underflow and everything not finite: as F.cross_entropy has it, row by row, on every backend."""
    y = y % len(values)
    for backend in usable_backends():
        x = torch.tensor([values, [0.5] * len(values)], dtype=F64)
        theirs = torch.nn.functional.cross_entropy(x, torch.tensor([y, y]), reduction="none")
        ours = mlkernels.cross_entropy(x, torch.tensor([y, y]), reduction="none", backend=backend)
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-12, atol=1e-13)


def test_examples_are_drawn_anew():
    """Hypothesis takes the CI that conftest.py sets for one, in which it draws the same on every run."""
    assert settings().derandomize == (os.environ["CI"] != "conftest")
