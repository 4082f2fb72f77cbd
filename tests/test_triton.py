"""What is Triton's own: elementary functions, launch sizes, the streamed kernel, sums in parts, bit-identical results.

The properties that every backend shares are tested by the whole suite, under Triton's interpreter; on a GPU by
test_gpu.py.
"""

import functools
import itertools
import math
import os

import mpmath
import pytest
import torch
from table import BY_NAME, F64, FEW, LOSSES, check, draw, leaves, run
from test_no_sync import Forbid
from test_values import CAPPED, check_everything, upstream_for

import mlkernels
import mlkernels.call as door
from mlkernels import checks

if mlkernels.available_backends()["triton"] is not None:
    pytest.skip(f"no Triton: {mlkernels.available_backends()['triton']}", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on a GPU test_gpu.py does this", allow_module_level=True)

import triton
import triton.language as tl

from mlkernels.backends.triton import arguments, elementary, launch, replay, sums, tiles

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter: log(0) and the like


# ---- elementary functions --------------------------------------------------------------------------------------------


@triton.jit
def _unary(x, out, WHICH: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    v = tl.load(x + at)
    if WHICH == "log1p":
        r = elementary.log1p(v)
    elif WHICH == "expm1":
        r = elementary.expm1(v)
    elif WHICH == "tanh":
        r = elementary.tanh(v)
    elif WHICH == "tanh_slope":
        r = elementary.tanh_slope(v)
    elif WHICH == "acos":
        r = elementary.acos(v)
    elif WHICH == "sin":
        r, _ = elementary.sincos(v)
    else:
        _, r = elementary.sincos(v)
    tl.store(out + at, r)


@triton.jit
def _power(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, elementary.power(tl.load(x + at), tl.load(y + at)))


def ulps(found: torch.Tensor, wanted: list) -> float:
    """The largest error in units of the last place of the result, of numbers that are not subnormal."""
    eps, tiny = torch.finfo(found.dtype).eps, torch.finfo(found.dtype).tiny
    return max(
        float(abs(mpmath.mpf(f) - w) / (eps * max(abs(w), mpmath.mpf(tiny))))
        for f, w in zip(found.double().tolist(), wanted, strict=True)
    )


def points(low, high, dtype, tiny=True):
    """Spread over an interval, both ends in it, and close to 0."""
    generator = torch.Generator().manual_seed(0)
    x = low + (high - low) * torch.rand(1024, generator=generator, dtype=F64)
    x[0], x[1] = low, high
    if tiny:
        x[2:102] = torch.logspace(-30, -2, 100, dtype=F64) * (1 if high > 0 else -1)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize(
    ("name", "low", "high", "allowed"),
    [("log1p", -0.5, 1, 3), ("expm1", -1, 0, 3), ("expm1", -30, -1, 3), ("tanh", -12, 12, 4), ("tanh", 0, 0.7, 4),
     ("tanh_slope", -12, 12, 6), ("acos", -1, 1, 3), ("sin", -0.78, 0.78, 2), ("cos", -0.78, 0.78, 2)],
)  # fmt: skip
def test_elementary_functions(name, low, high, allowed, dtype):
    x = points(low, high, dtype, tiny=high > 0 or low == -1)
    out = torch.empty_like(x)
    _unary[(1,)](x, out, WHICH=name, N=len(x))
    with mpmath.workdps(40):
        function = {"tanh_slope": lambda v: mpmath.sech(v) ** 2}.get(name) or getattr(mpmath, name)
        assert ulps(out, [function(mpmath.mpf(v)) for v in x.double().tolist()]) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_sine_of_large_angles(dtype):
    """In absolute terms: where sin is small, no angle of this size is known so exactly."""
    x = points(-1e4, 1e4, dtype, tiny=False)
    for name in ("sin", "cos"):
        out = torch.empty_like(x)
        _unary[(1,)](x, out, WHICH=name, N=len(x))
        with mpmath.workdps(40):
            wanted = torch.tensor([float(getattr(mpmath, name)(mpmath.mpf(v))) for v in x.double().tolist()], dtype=F64)
        assert float((out.double() - wanted).abs().max()) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_power(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2048, generator=generator, dtype=F64).to(dtype)
    y = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 5, 7.25, 10, 15, -0.25, -0.75, 0.1, 16, 2.75] * 128, dtype=dtype)
    x[:16], x[16:32] = 0.0, 1.0
    out = torch.empty_like(x)
    _power[(1,)](x, y, out, N=len(x))
    with mpmath.workdps(40):
        wanted = [
            mpmath.mpf(a) ** mpmath.mpf(b) if a > 0 else mpmath.mpf(1 if b == 0 else 0 if b > 0 else "inf")
            for a, b in zip(x.double().tolist(), y.double().tolist(), strict=True)
        ]
        finite = [i for i, w in enumerate(wanted) if mpmath.isfinite(w) and w > 1e-30]
        # exp2(y log2 x): the rounding of the exponent, up to 16 times 10, is the error.
        assert ulps(out[finite], [wanted[i] for i in finite]) <= 64
        whole = [i for i in finite if y[i] == y[i].floor() and 0 <= y[i] < 16]
        assert ulps(out[whole], [wanted[i] for i in whole]) <= 6
    infinite = [i for i, w in enumerate(wanted) if mpmath.isinf(w)]
    assert bool((out[infinite] == torch.inf).all())
    assert torch.equal(out[:16] == 0, (y[:16] > 0))


# ---- launch sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_tiles_cover_every_row(itemsize, plain, side_by_side):
    for classes in (1, 2, 3, 10, 100, 1000, 4096, 4097, 16384, 16385, 50257, 1 << 20, (1 << 20) + 1):
        unit = 1 if side_by_side else math.gcd(16, classes)
        for architecture, warp in (("default", 32), ("gfx942", 64)):
            tile = tiles.tile(architecture, classes, side_by_side, itemsize, unit, plain)
            assert all(size & (size - 1) == 0 for size in tile[:4])
            assert not tile.on_chip or classes <= tile.cols < 2 * classes
            assert tile.vector <= unit and tile.vector * itemsize <= 16
            # Of the registers half are the logits' at most, a quarter where a loss can have more than those.
            assert tile.rows * tile.cols * (2 if itemsize == 8 else 1) <= (64 if plain else 32) * warp * tile.warps
            if classes <= 4096 and not side_by_side:
                assert tile.on_chip
            if side_by_side:
                assert tile.rows >= 32  # what a warp reads in one go


def test_an_architecture_that_was_not_measured_has_the_default():
    assert tiles.tile("sm_999", 1000, False, 2, 8, True) == tiles.tile("default", 1000, False, 2, 8, True)


# ---- longer rows -----------------------------------------------------------------------------------------------------


@pytest.fixture
def streamed(monkeypatch):
    """Rows of 6 classes in blocks of 4; the last program is not full."""
    monkeypatch.setattr(tiles, "tile", lambda *arguments: tiles.Tile(2, 8, 2, 1, 1, False))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_streamed_everything(loss, reduction, streamed):
    check_everything(loss, "triton", reduction)


@pytest.mark.parametrize("form", [0, -1])
def test_streamed_forms(loss, form, streamed):
    """Masked classes too, parameters in another form, and float64."""
    input, target, params = draw(loss, form=loss.forms[form])
    check(loss, "triton", input, target, params, F64, upstream_for("none", len(target)), reduction="none")
    check(loss, "triton", input, target, params, torch.float32, upstream_for("sum", len(target)), reduction="sum")


@pytest.mark.parametrize("loss", FEW, ids=str)
def test_streamed_capped_and_adjusted(loss, streamed):
    input, target, params = draw(loss, form=loss.forms[1], seed=2, **CAPPED)
    check(loss, "triton", input, target, params, F64, upstream_for("none", len(target)), reduction="none", **CAPPED)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("loss", FEW, ids=str)
def test_streamed_statistics(loss, broken, streamed):
    """And their gradients: by the logits and, where no row is NaN, by the parameters."""
    input, target, params = draw(loss, rows=9, classes=11, form="shared")
    if broken:
        input[2, 5] = float("nan")
    target[4] = -100
    input[5, 3] = input[5, 9] = 20.0  # the lowest index on ties
    options = {"group": loss.group(target)} if loss.groups else {}
    call = lambda backend, x, own: mlkernels.softmax_loss(
        x, target, **loss.compose(own), **options, reduction="none", return_stats=True, backend=backend
    )
    found = []
    for backend in ("reference", "triton"):
        x, own = input.clone().requires_grad_(), leaves(params)
        value, rows = call(backend, x, own)
        outputs = (value, rows.logsumexp, rows.log_prob, rows.entropy)
        sum(factor * of.nan_to_num() for factor, of in zip((1, 2, -3, 4), outputs, strict=True)).sum().backward()
        if broken:
            x.grad[2] = x.grad[2].isnan().any()  # which of its entries are NaN is nobody's business
        found.append((value, *rows, x.grad, *([] if broken else [leaf.grad for leaf in own.values()])))
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-12, atol=1e-13)


def test_long_rows_in_real_blocks():
    """Beyond the registers' reach by the table itself: 16385 classes and more, no tile of them full."""
    for classes, dtype in ((16385, torch.float32), (20001, torch.bfloat16)):
        generator = torch.Generator().manual_seed(0)
        x = (3 * torch.randn(3, classes, generator=generator)).to(dtype)
        y = torch.tensor([0, classes - 1, 8192])
        for name in ("modulated", "two_scale_norm"):
            loss, up = BY_NAME[name], torch.tensor([1.5, -2.0, 0.5])
            params = {k: torch.tensor(v) for k, v in loss.params.items()}
            found = run(loss, x, y, params, up, reduction="none", backend="triton")
            wanted = run(loss, x.double(), y, params, up, reduction="none", backend="reference")
            torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=0)
            rtol = 1e-4 if dtype == torch.float32 else 2**-8
            torch.testing.assert_close(found[1].double(), wanted[1], rtol=rtol, atol=1e-9)
            for key, gradient in found[2].items():
                torch.testing.assert_close(gradient.double(), wanted[2][key].double(), rtol=1e-4, atol=1e-6)


# ---- another upstream gradient than 1 --------------------------------------------------------------------------------


@pytest.mark.parametrize("programs", [1, 3, 4096])
@pytest.mark.parametrize("upstream", [1.0, 1.5])
def test_a_gradient_is_refreshed_by_few_programs(upstream, programs, monkeypatch):
    """Each takes tiles in turn; the last one has fewer."""
    monkeypatch.setattr(arguments, "_CONDITIONAL_PROGRAMS", programs)
    monkeypatch.setattr(tiles, "tile", lambda *arguments: tiles.Tile(2, 4, 2, 2, 1, True))
    loss = BY_NAME["modulated"]
    input, target, params = draw(loss, rows=29, kinds=("random", "confident5"))
    found = run(loss, input.float(), target, params, upstream, backend="triton")
    wanted = run(loss, input, target, params, upstream, backend="reference")
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-5, atol=1e-8)


# ---- sums in parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("few", "reduction", "upstream"),
    [(True, "mean", 1.5), (True, "sum", 1.0), (False, "mean", 1.0), (False, "mean", 1.5), (False, "sum", 1.5)],
)
def test_sums_in_many_parts(few, reduction, upstream, monkeypatch):
    """As with millions of rows: labels counted in parts, of several blocks and a rest each, and losses and tables added
    up in blocks. Or few rows, whose labels are counted by whoever needs their number."""
    monkeypatch.setattr(arguments, "_SUM_BLOCK", 4)
    monkeypatch.setattr(arguments, "_SUM_CHUNK", 8)
    monkeypatch.setattr(arguments, "_TOTAL", {"BLOCK": 8})
    monkeypatch.setattr(tiles, "tile", lambda *arguments: tiles.Tile(2, 1, 2, 2, 1, True))
    if not few:
        for name, value in (("_FEW", 0), ("_PARTS", 4), ("_COUNT", {"BLOCK": 8})):
            monkeypatch.setattr(arguments, name, value)
    counted = []
    launched = replay.launch

    def listen(kernel, grid, *arguments, **options):
        if kernel is sums.count:
            counted.append(grid)
        launched(kernel, grid, *arguments, **options)

    monkeypatch.setattr(replay, "launch", listen)
    loss = BY_NAME["piecewise_groups"]
    input, target, params = draw(loss, rows=70, kinds=("random", "confident5"))
    target[::7] = -100
    weight = torch.linspace(0.5, 2, 6)
    options = {"group": loss.group(target), "weight": weight, "z_loss": 0.1, "reduction": reduction}
    found = run(loss, input.float(), target, params, upstream, backend="triton", **options)
    wanted = run(loss, input, target, params, upstream, backend="reference", **options)
    assert counted == ([(3,)] if reduction == "mean" and not few else [])  # once, for both directions
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-4, atol=1e-7)
    for key, gradient in found[2].items():
        torch.testing.assert_close(gradient, wanted[2][key], rtol=1e-5, atol=1e-6)


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", FEW, ids=str)
def test_a_row_does_not_know_its_batch(loss):
    """Row losses and gradients are the same bits alone, in a batch, in another order."""
    input, target, params = draw(loss, rows=21, classes=37)
    options = {"reduction": "none", "backend": "triton"}
    group = loss.group(target)

    def rows_of(index):
        own = {k: v[index] if isinstance(v, torch.Tensor) and v.shape == (21, 1) else v for k, v in params.items()}
        more = {} if group is None else {"group": group[index]}
        up = torch.linspace(-1, 2, 21)[index]
        return run(loss, input.float()[index], target[index], own, up, **options, **more)[:2]

    whole = rows_of(torch.arange(21))
    for index in (torch.arange(21).flip(0), torch.tensor([4]), torch.arange(3, 20)):
        for found, wanted in zip(rows_of(index), whole, strict=True):
            assert torch.equal(found, wanted[index])


@pytest.mark.parametrize("loss", FEW, ids=str)
def test_the_same_bits_every_time(loss):
    input, target, params = draw(loss, rows=16, form="shared")
    options = {"group": loss.group(target)} if loss.groups else {}
    first, second = (run(loss, input.float(), target, params, 1.5, backend="triton", **options) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(first[2][k], second[2][k]) for k in first[2])


# ---- the upstream gradient of a single visit -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_device_looks_at_the_upstream_gradient(dtype, monkeypatch):
    """Where it is 1 nothing is written again; else the rows are visited again, not rescaled (and rounded twice)."""
    x = torch.randn(5, 7).to(dtype).requires_grad_()
    y = torch.arange(5)
    conditional = []
    execute = arguments.Arguments.run
    monkeypatch.setattr(
        arguments.Arguments,
        "run",
        lambda self, **o: conditional.append(o.get("conditional", False)) or execute(self, **o),
    )
    mlkernels.focal_loss(x, y, backend="triton").backward()
    assert conditional == [False, True]
    plain, x.grad = x.grad, None
    mlkernels.focal_loss(x, y, backend="triton").backward(torch.tensor(0.3))
    scaled, x.grad = x.grad, None
    (0.3 * mlkernels.focal_loss(x, y, reduction="none", backend="triton")).mean().backward()
    torch.testing.assert_close(scaled, x.grad, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0)
    wanted = run(BY_NAME["focal_2"], x.detach().double(), y, {"gamma": 2.0}, 0.3, backend="reference")[1]
    torch.testing.assert_close(scaled.double(), wanted, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-9)
    assert not torch.equal(plain, scaled)


def test_nothing_is_written_for_an_upstream_of_one():
    """The conditional launch leaves what it finds; the gradient handed in here is wrong on purpose."""
    x, y = torch.randn(4, 6), torch.arange(4)
    numbers = next(iter(_numbers_of_cross_entropy(x, y)))
    gradient = torch.full_like(x, 7.0)
    factors = torch.full((1, 2), 0.25)
    launch.softmax_loss_refresh(torch.tensor(1.0), factors, x, y, numbers, [], gradient)
    assert bool((gradient == 7.0).all())
    launch.softmax_loss_refresh(torch.tensor(2.0), factors, x, y, numbers, [], gradient)
    z = x.clone().requires_grad_()
    (2 * torch.nn.functional.cross_entropy(z, y)).backward()
    torch.testing.assert_close(gradient, z.grad)


def _numbers_of_cross_entropy(x, y):
    door._calls.clear()
    mlkernels.cross_entropy(x, y, backend="triton")
    plain = ("mean", -100, 0.0, 0.0, None, None, 1.0, mlkernels.spec.spec().ids)
    return [called.numbers for key, called in door._calls.items() if key[: len(plain)] == plain]


# ---- the host --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("loss", FEW, ids=str)
def test_the_host_never_looks(loss, reduction, monkeypatch):
    """Forward and backward under a mode that forbids every operator that waits for a device."""
    monkeypatch.setattr(door, "check_indices", lambda *arguments: None)
    for room in (door, checks):
        monkeypatch.setattr(room, "check_range", lambda *arguments: None)
    input, target, params = draw(loss, rows=6, form=loss.forms[-1])
    own = leaves(params)
    options = {"group": loss.group(target)} if loss.groups else {}
    x, weight = input.float().requires_grad_(), torch.ones(6)
    up = torch.linspace(-1, 2, 6) if reduction == "none" else torch.tensor(1.5)
    if reduction == "mean":
        options["normalizer"] = torch.tensor(7)
    with Forbid():
        loss(
            x, target, own, reduction=reduction, weight=weight, label_smoothing=0.1, z_loss=0.1, softcap=9.0,
            row_weight=weight, backend="triton", **options,
        ).backward(up)  # fmt: skip
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_launches_of_a_step(reduction, monkeypatch):
    """Forward and backward: 3 launches, 2 where nothing is summed, whichever loss it is and of however many rows. One
    that counts more than FEW labels, for both directions, takes the place of the one that adds up the losses."""
    names = []
    monkeypatch.setattr(replay, "launch", lambda kernel, *arguments, **options: names.append(kernel.__name__))
    cases = [(64, torch.float32, True), (64, torch.float16, False), (5000, torch.float32, False)]
    cases += [(5000, torch.float16, True), (700000, torch.float16, False)]
    for loss, (rows, dtype, trained) in itertools.product(LOSSES, cases):
        if rows > 5000 and loss not in FEW:
            continue
        added = {"none": [], "sum": ["total"], "mean": ["count" if rows > arguments._FEW else "total"]}[reduction]
        target = torch.randint(0, 10, (rows,))
        options = {"group": loss.group(target)} if loss.groups else {}
        params = loss.values("shared" if trained else "number", target, 10, dtype=torch.float32)
        trainable = [v.requires_grad_() for v in params.values() if trained and isinstance(v, torch.Tensor)]
        # A parameter's gradient is one launch, and one more that adds up the parts of many rows; one per row is there.
        summed = [v for v in trainable if v.shape != (rows, 1)]
        sums = len(summed) * ["bucket"] * (2 if rows > arguments._SUM_CHUNK else 1)
        x = torch.randn(rows, 10).to(dtype).requires_grad_()
        names.clear()
        value = loss(x, target, params, reduction=reduction, backend="triton", **options)
        value.backward(torch.ones_like(value))
        assert sorted(names) == sorted([*added, "visit", "visit", *sums]), (loss, rows, dtype)


@pytest.mark.parametrize("programs, group", [(3, 4), (5, 4), (5, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, F64])
def test_the_last_program_adds_up_the_losses(programs, group, dtype, monkeypatch):
    """Of one group or of several, the last of them perhaps smaller, and of more groups than one looks at at once."""
    monkeypatch.setattr(tiles, "tile", lambda *_: tiles.Tile(1, 4, 8, 1, 4, True))
    monkeypatch.setattr(arguments, "_FEW", 0)
    monkeypatch.setattr(arguments, "_GROUP", group)
    monkeypatch.setattr(sums, "GROUP", tl.constexpr(group))
    x, y = torch.randn(4 * programs - 1, 7, dtype=dtype), torch.randint(7, (4 * programs - 1,))
    y[0] = -100
    options = {"weight": torch.rand(7), "row_weight": torch.rand(len(y)), "label_smoothing": 0.1, "z_loss": 0.01}
    found, wanted = (
        run(BY_NAME["focal_2"], input, y, {"gamma": 2.0}, 2.0, backend=backend, **options)
        for input, backend in ((x, "triton"), (x.double(), "reference"))
    )
    assert found[0].shape == ()
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-12 if dtype == F64 else 1e-6, atol=0)
    rtol, atol = (1e-11, 1e-14) if dtype == F64 else (2**-8, 1e-7)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=rtol, atol=atol)


@pytest.mark.parametrize("classes", [10, 20000])
def test_gradient_through_a_saturated_softcap(classes):
    """1 - tanh^2 has a few units in the last place of its own, not of 1: at 40 / 6 that would be 2 %."""
    x, y = torch.randn(2, classes), torch.tensor([0, 1])
    x[:, 0] = 40.0
    found = []
    for input, backend in ((x, "triton"), (x.double(), "reference")):
        input = input.clone().requires_grad_()
        mlkernels.cross_entropy(input, y, softcap=6.0, z_loss=0.01, backend=backend).backward()
        found.append(input.grad[:, 0].double())
    torch.testing.assert_close(*found, rtol=2e-5, atol=0)
    # A linear head whose logits are one column of weights: the label's class goes a way of its own.
    gradients = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float32, "reference"), (torch.float64, "reference")):
        weight = x[:1].mT.to(dtype).requires_grad_()
        one = torch.ones(1, 1, dtype=dtype)
        mlkernels.linear_cross_entropy(
            one, weight, y[:1], softcap=6.0, z_loss=0.01, strategy="tiles", memory=2**20, backend=backend
        ).backward()
        gradients.append(weight.grad[0].double())
    for gradient in gradients[:2]:
        torch.testing.assert_close(gradient, gradients[2], rtol=2e-5, atol=0)


def test_bad_labels_are_nan_where_nobody_looks(monkeypatch):
    """As on a GPU: the row is NaN, never 0, nothing is read out of bounds, and the other rows are as they were."""
    monkeypatch.setattr(door, "check_indices", lambda *arguments: None)
    for classes in (6, 40):
        x = torch.randn(5, classes).requires_grad_()
        y = torch.tensor([1, classes, -3, 2**40, 4])
        rows = mlkernels.modulated_cross_entropy(x, y, reduction="none", backend="triton")
        assert rows.isnan().tolist() == [False, True, True, True, False]
        rows.backward(torch.ones(5))
        assert x.grad.isnan().all(1).tolist() == [False, True, True, True, False]
        good = mlkernels.modulated_cross_entropy(x[[0, 4]], y[[0, 4]], reduction="none", backend="triton")
        assert torch.equal(good, rows[[0, 4]])
        assert bool(mlkernels.modulated_cross_entropy(x, y, backend="triton").isnan())


def test_out_of_range_numbers_on_a_device_are_nan(monkeypatch):
    monkeypatch.setattr(door, "check_range", lambda *arguments: None)
    x, y = torch.randn(3, 6), torch.arange(3)
    bad = [
        lambda: mlkernels.cross_entropy(x, y, scale=torch.tensor(-1.0), backend="triton"),
        lambda: mlkernels.focal_loss(x, y, gamma=torch.tensor(-0.5), backend="triton"),
        lambda: mlkernels.modulated_cross_entropy(x, y, beta=torch.tensor(0.0), backend="triton"),
        lambda: mlkernels.sphereface_loss(x.tanh(), y, margin=torch.tensor(-1.0), backend="triton"),
        lambda: mlkernels.softmax_loss(x, y, head=mlkernels.Truncated(torch.tensor(1.5)), backend="triton"),
        lambda: mlkernels.two_scale_cross_entropy(x, y, 1.0, 2.0, logit_norm=torch.tensor(0.0), backend="triton"),
    ]
    for call in bad:
        assert bool(call().isnan())


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_numbers_that_change_are_the_same_kernel(loss):
    """Values of a loss reach a launch as arguments: its constants (what is compiled) do not change with them."""
    from mlkernels.backends.triton import rows

    input, target, params = draw(loss, rows=4)
    options = {"group": loss.group(target)} if loss.groups else {}
    seen = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: seen.append(
                (constants, tuple(type(v) for v in arguments[2]), len(arguments))
            )

    kernel, rows.visit = rows.visit, Recorder()
    try:
        for factor in (1.0, 1.1, 1.2):
            own = {
                k: factor * v if isinstance(v, (float, torch.Tensor)) and k != "m1" else v for k, v in params.items()
            }
            loss(input.float(), target, own, reduction="none", backend="triton", **options)
    finally:
        rows.visit = kernel
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]


def _negated(real: torch.Tensor) -> torch.Tensor:
    """These numbers, as a view that waits to be negated."""
    view = torch.complex(torch.zeros_like(real), -real).conj().imag
    assert view.is_neg() and torch.equal(view, real)
    return view


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_views_that_wait_to_be_negated(reduction):
    """Input, parameters, weights and upstream gradient: what lies in memory has the other sign."""
    x, y, weight = torch.randn(6, 4), torch.randint(4, (6,)), torch.rand(4)
    upstream = torch.rand(6) if reduction == "none" else torch.rand(1)[0]
    found = []
    for view in (torch.clone, _negated):
        input = view(x).requires_grad_()
        scale = view(torch.tensor(3.0)).requires_grad_()
        loss = mlkernels.softmax_loss(
            input, y, scale=scale, weight=view(weight), reduction=reduction, label_smoothing=0.1, backend="triton"
        )
        loss.backward(view(upstream))
        found.append((loss.detach(), input.grad, scale.grad))
    for plain, negated in zip(*found, strict=True):
        assert torch.equal(plain, negated)


def test_what_is_more_than_memory_goes_by_the_dispatcher():
    """Zeros that are nowhere, wrapper subclasses, modes; a bare subclass is memory."""
    from torch.testing._internal.two_tensor import TwoTensor
    from torch.utils._python_dispatch import TorchDispatchMode

    x, other, y = torch.randn(6, 4), torch.randn(6, 4), torch.randint(4, (6,))
    loss = functools.partial(mlkernels.cross_entropy, target=y, backend="triton")
    assert torch.allclose(loss(torch._efficientzerotensor((6, 4))), torch.tensor(4.0).log())
    both = loss(TwoTensor(x, other))
    assert torch.equal(both.a, loss(x)) and torch.equal(both.b, loss(other))
    assert torch.equal(loss(x.as_subclass(type("Bare", (torch.Tensor,), {}))), loss(x))

    seen = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Listening():
        loss(x)
    assert "mlkernels_triton::softmax_loss" in seen
