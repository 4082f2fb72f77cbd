"""The CUDA C++ kernels over the fibers of a host: every number of classes, every launch, any order of threads.

That the losses are right on this backend is what the tests of the property table say, which know it by its name; here
it is about how rows are shared out.
"""

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import simt
import torch
from table import FEW, LOSSES, draw, plain_numbers, run
from test_multi_copy import bits, mixed

import mlkernels
from mlkernels import ops
from mlkernels.numbering import Slot

pytestmark = pytest.mark.skipif(simt.library()[0] is None, reason="needs the CUDA kernels for the host")
ROOT = Path(__file__).resolve().parent.parent
FULL = bool(os.environ.get("MLKERNELS_FULL"))
INF, NAN = float("inf"), float("nan")


def rows(count, classes, dtype, seed=0, phase=0):
    """Logits that begin `phase` elements after a 16-byte boundary, some rows confident, and labels."""
    generator = torch.Generator().manual_seed(seed)
    memory = torch.empty(count * classes + 16, dtype=dtype)
    start = -(memory.data_ptr() // memory.element_size()) % (16 // memory.element_size()) + phase
    input = memory[start : start + count * classes].view(count, classes)
    input.copy_(torch.randn(count, classes, generator=generator) * 3)
    target = torch.randint(0, classes, (count,), generator=generator)
    input[0, target[0]] += 12
    return input, target


def check(input, target, path, loss=mlkernels.cross_entropy, reduction="none", tolerance=1.0, **options):
    """One loss and its gradient against the reference in float64."""
    weight = torch.linspace(0.3, 1.7, input.shape[0], dtype=torch.float64)
    found, exact = input.detach().requires_grad_(), input.detach().double().requires_grad_()
    with simt.forced(**path):
        got = loss(found, target, reduction=reduction, backend="cuda", **options)
        (got * weight if reduction == "none" else got * 1.7).sum().backward()
    wanted = loss(exact, target, reduction=reduction, backend="reference", **options)
    (wanted * weight if reduction == "none" else wanted * 1.7).sum().backward()
    gradient = found.grad.double()
    error = 1e-11 if input.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance * error, atol=tolerance * error)
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(input.dtype, tolerance * 2 * error)
    # Half of the last bit of a half, and subnormal ones.
    torch.testing.assert_close(
        gradient, exact.grad, rtol=rounding, atol=tolerance * (error if input.dtype != torch.float16 else 6e-8)
    )


PATHS = [
    pytest.param({"path": "short"}, id="short"),
    pytest.param({"path": "short", "warps": 1, "cluster": -1, "tile_rows": 2, "teams": 1}, id="short-tiles"),
    pytest.param({"path": "long", "warps": 1, "chunk": 32}, id="long-warp"),
    pytest.param({"path": "long", "warps": 4, "chunk": 32, "teams": 2}, id="long-block"),
    pytest.param({"path": "long", "warps": 1, "cluster": 4, "chunk": 32, "teams": 1}, id="long-cluster"),
    pytest.param({"path": "streamed", "warps": 2, "chunk": 32, "slots": 2, "teams": 1}, id="streamed"),
    pytest.param({"path": "strided", "warps": 1}, id="strided"),
]


@pytest.mark.parametrize("chunk", range(10))
def test_every_number_of_classes(chunk):
    """C = 1 ... 5000 as the package launches them, at any alignment, in every storage type in turn."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    for classes in range(1 + chunk, 5001, 10 if FULL else 40):
        dtype = dtypes[classes // 7 % 4]
        input, target = rows(3, classes, dtype, classes, phase=classes % 3)
        check(input, target, {"seed": classes})
    for classes in range(1 + chunk, 300, 10):
        input, target = rows(5, classes, dtypes[classes % 4], classes, phase=classes % 2)
        check(input, target, {"seed": classes}, reduction="mean")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_way(path, dtype):
    per_vector = 16 // dtype.itemsize
    edges = {1, 2, 31, 33, per_vector, 32 * per_vector - 1, 32 * per_vector, 32 * per_vector + 1, 64 * per_vector + 3}
    for classes in sorted(edges):
        if path["path"] == "short" and classes > (256 if dtype == torch.float64 else 1024):
            continue
        for phase in (0, 1):
            input, target = rows(7, classes, dtype, classes, phase)
            for reduction in ("none", "mean", "sum"):
                check(input, target, {**path, "seed": classes}, reduction=reduction)


@pytest.mark.parametrize("seed", range(40 if FULL else 12))
def test_seeded_corners(seed):
    """Random losses, shapes, launches and orders; a failure names them."""
    pick = random.Random(seed)
    for _ in range(8):
        loss = pick.choice(LOSSES)
        path = dict(pick.choice(PATHS).values[0])
        path.update(seed=pick.randrange(1 << 30), slots=pick.choice((0, 2, 3, 5)), teams=pick.choice((0, 1, 2, 5)))
        count, classes = pick.randint(1, 12), pick.choice((2, 3, 17, 64, 129, 300))
        dtype = pick.choice((torch.float32, torch.bfloat16, torch.float64))
        input, target, params = draw(
            loss, rows=count, classes=classes, seed=seed, form=pick.choice(loss.forms), exact=dtype, kinds=("random",)
        )
        options = {"reduction": pick.choice(("mean", "sum", "none"))}
        options["upstream"] = torch.linspace(0.5, 2, count) if options["reduction"] == "none" else 1.7
        if pick.random() < 0.3:
            options |= {"label_smoothing": 0.1, "z_loss": 1e-3}
        if loss.groups:
            options["group"] = loss.group(target)
        if loss.masked_target:
            target[pick.randrange(count)] = -100
        wanted = run(loss, input.double(), target, params, backend="reference", **options)
        with simt.forced(**path):
            got = run(loss, input.to(dtype), target, params, backend="cuda", **options)
        what = f"{loss} {path} {count}x{classes} {dtype} {options}"
        pairs = [(got[0], wanted[0]), (got[1], wanted[1]), *((got[2][k], wanted[2][k]) for k in wanted[2])]
        for a, b in pairs:
            a, b = a.double(), b.double()
            tight = 1e-8 if dtype == torch.float64 else 2e-2 if dtype == torch.bfloat16 else 3e-4
            scale = float(b.nan_to_num(0, 0, 0).abs().max()) + 1e-3
            torch.testing.assert_close(
                a, b, rtol=tight, atol=tight * scale, equal_nan=True, msg=lambda m: f"{what}: {m}"
            )


@pytest.mark.parametrize("loss", [loss for loss in FEW if loss.name != "target_logit"], ids=str)
def test_results_are_those_of_any_launch_order(loss):
    """The same bits whatever the order of the threads, and whatever batch a row is in."""
    input, target, params = draw(loss, rows=9, classes=700, form="number")
    found = []
    for seed, count in ((1, 9), (2, 9), (3, 4)):
        x = input[:count].float().clone().requires_grad_()
        with simt.forced(path="long", warps=2, cluster=2, chunk=32, seed=seed):
            group = loss.group(target)
            more = {} if group is None else {"group": group[:count]}
            out = loss.call(x, target[:count], **params, **more, **loss.fixed, reduction="none", backend="cuda")
        out.sum().backward()
        found.append((out.detach(), x.grad))
    for out, gradient in found[1:]:
        assert torch.equal(out, found[0][0][: len(out)]) and torch.equal(gradient, found[0][1][: len(out)])


def results_of(x, target, path, options):
    """Row by row: the loss, the gradient and, with a trained scale, its gradient."""
    x = x.requires_grad_()
    scale = torch.full((len(x), 1), 1.5, requires_grad=True) if options else None
    with simt.forced(**path):
        loss = mlkernels.cross_entropy(
            x, target, scale=1.0 if scale is None else scale, reduction="none", backend="cuda", **options
        )
        loss.sum().backward()
    return [loss.detach(), x.grad, *([] if scale is None else [scale.grad])]


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}], ids=["simple", "general"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("path", [{}, *PATHS])
def test_bits_do_not_depend_on_where_a_row_lies(path, dtype, options):
    """At every offset from a 16-byte boundary, in any place of a batch; nor on the launch order."""
    lengths = (7, 16, 129, 256) if path.get("path") == "short" else (16, 517, 2051) if not path else (16, 517)
    for classes in lengths:
        if path.get("path") == "short" and classes > (256 if dtype == torch.float64 else 1024):
            continue
        row = (torch.randn(classes) * 3).to(dtype)
        target = torch.full((3,), classes // 3)
        found = []
        for phase in range(16 // dtype.itemsize):
            x, _ = rows(3, classes, dtype, phase=phase)
            x.copy_(row)
            found.append(results_of(x, target, {**path, "seed": phase + 1}, options))
        for results in found:
            for got, wanted in zip(results, found[0], strict=True):
                for each in got:
                    assert torch.equal(each, wanted[0]), f"{classes} classes"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bits_do_not_depend_on_the_place_in_a_tile(dtype):
    """Neighbouring lanes begin with different pieces of their rows, where they would meet in a bank otherwise."""
    for classes in (4, 8, 12, 16, 24, 32, 64, 96, 128):
        row = (torch.randn(classes) * 3).to(dtype)
        x, target = row.expand(70, -1).contiguous(), torch.full((70,), classes // 2)
        for options in ({}, {"label_smoothing": 0.1}):
            for got in results_of(x, target, {"path": "short", "warps": 1, "cluster": -1}, options):
                assert (got == got[0]).all()


def test_lanes_do_not_meet_in_banks():
    """Rows of a power of two, and others: accesses to shared memory take hardly more turns than they must."""

    def turns(classes, dtype, **options):
        x, target = torch.randn(64, classes).to(dtype).requires_grad_(), torch.randint(0, classes, (64,))
        with simt.forced(path="short", warps=1, cluster=-1), simt.banks() as factor:
            mlkernels.cross_entropy(x, target, reduction="sum", backend="cuda", **options).backward()
        return factor[0]

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for classes in (16, 32, 64, 128):
            assert turns(classes, dtype) < 1.25, classes
            assert turns(classes, dtype, label_smoothing=0.1) < 1.25, classes
    # Rows of ten floats are read by the float, of which every second one is the same bank's: it is told.
    assert 1.4 < turns(10, torch.float32) < 2


@pytest.mark.parametrize("cluster", [2, 4, 8, 16])
def test_clusters_at_their_boundaries(cluster):
    """Rows that end in the middle of a block's share, with a block's, and one before and after."""
    for parts in (1, cluster - 1, cluster):
        for more in (-1, 0, 1):
            classes = parts * 32 * 4 + more
            input, target = rows(2, classes, torch.float32, classes)
            path = {"path": "long", "warps": 1, "cluster": cluster, "chunk": 32, "teams": 1, "seed": classes}
            check(input, target, path)


@pytest.mark.parametrize("path", [w for w in PATHS if w.values[0]["path"] != "strided"])
def test_gradients_that_lie_otherwise(path):
    """Rows of a wider matrix: the gradient begins at another alignment in every row."""
    if path["path"] == "short":
        pytest.skip("packed rows only")
    wide = torch.randn(5, 403)
    for columns in (slice(0, 301), slice(3, 400), slice(1, 130)):
        target = torch.tensor([0, 5, 60, 100, 128])
        found, exact = wide.bfloat16().requires_grad_(), wide.bfloat16().double().requires_grad_()
        with simt.forced(**path):
            mlkernels.cross_entropy(found[:, columns], target, backend="cuda").mul(3).backward()
        mlkernels.cross_entropy(exact[:, columns], target, backend="reference").mul(3).backward()
        torch.testing.assert_close(found.grad.double(), exact.grad, rtol=2.0**-7, atol=1e-7)


@pytest.mark.parametrize("path", PATHS)
def test_large_logits_lose_nothing(path):
    """Where the fused multiplication would: the largest logit far from 0."""
    input, target = rows(4, 200, torch.float32)
    for shift in (1e3, -3e4, 1e6, -2e7, 1e30):
        check(input + shift, target, path)


@pytest.mark.parametrize("path", PATHS)
def test_unread_rows(path):
    """Ignored rows are 0 even where they hold NaN; labels that are none give NaN, for their row alone."""
    input, target = rows(6, 150, torch.float32)
    target[2], target[4] = -100, 5000
    input[2] = NAN
    x = input.clone().requires_grad_()
    with simt.forced(**path):
        saved = mlkernels.call.check_indices
        mlkernels.call.check_indices = lambda *_: None  # on a GPU nobody looks
        try:
            loss = mlkernels.cross_entropy(x, target, reduction="none", backend="cuda")
        finally:
            mlkernels.call.check_indices = saved
        loss.backward(torch.linspace(1, 2, 6))
    assert loss[2] == 0 and not bool(x.grad[2].any())
    assert bool(loss[4].isnan()) and bool(x.grad[4].isnan().all())
    rest = [0, 1, 3, 5]
    assert not bool(loss[rest].isnan().any() | x.grad[rest].isnan().any())


@pytest.mark.parametrize("shape", [(8, 10), (8, 150), (8, 2000), (2, 19, 4), (2, 19, 2, 2), (2, 30, 4)])
def test_unread_rows_of_a_loss_that_is_reduced(shape, monkeypatch):
    """Also where the loss is simple, and where rows go by pairs: an ignored one and none beside each other."""
    monkeypatch.setattr(mlkernels.call, "check_indices", lambda *_: None)
    target = (torch.arange(8) % 3).view(shape[0], *shape[2:])
    flat = target.view(-1)
    flat[2], flat[5], flat[7] = -100, 5000, -100
    x = torch.randn(shape)
    x.movedim(1, -1)[target == -100] = NAN
    found = x.clone().requires_grad_()
    loss = mlkernels.cross_entropy(found, target, reduction="sum", backend="cuda")
    loss.backward()
    assert bool(loss.isnan())
    gradient = found.grad.movedim(1, -1).reshape(8, -1)
    assert not bool(gradient[[2, 7]].any()) and bool(gradient[5].isnan().all())
    flat[5] = -100
    exact = x.nan_to_num().double().requires_grad_()
    wanted = mlkernels.cross_entropy(exact, target, reduction="sum", backend="reference")
    wanted.backward()
    rest = [0, 1, 3, 4, 6]
    wanted_gradient = exact.grad.movedim(1, -1).reshape(8, -1)
    torch.testing.assert_close(gradient[rest].double(), wanted_gradient[rest], rtol=4e-6, atol=2e-6)
    got = mlkernels.cross_entropy(x, target, reduction="sum", backend="cuda")
    torch.testing.assert_close(got.double(), wanted.detach(), rtol=4e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("inner", [(6,), (2, 3), (3,), (1, 2)], ids=str)
def test_neighbouring_rows_apart(dtype, inner):
    """By pairs where they are adjacent and aligned, and classes few; else one by one."""
    for classes in (1, 2, 5, 19, 24, 25):
        input = (torch.randn(3, classes, *inner) * 3).to(dtype)
        target = torch.randint(0, classes, (3, *inner))
        target[1].view(-1)[0] = -100
        for reduction in ("mean", "sum"):
            for loss in (mlkernels.cross_entropy, mlkernels.modulated_cross_entropy):
                check(input, target, {"seed": classes}, loss, reduction=reduction, tolerance=3)
    wide = torch.randn(3, 8, 7).to(dtype)  # neighbours, but not in pairs that begin at even places
    target = torch.randint(0, 8, (3, 6))
    check(wide[:, :, 1:], target, {}, reduction="mean")
    wide = torch.randn(3, 8, 6).to(dtype)  # and an odd number of them, in an even place
    check(wide[:, :, :5], target[:, :5], {}, reduction="mean")
    # Without a gradient, which would have strides of its own.
    found = mlkernels.cross_entropy(wide[:, :, :5], target[:, :5], backend="cuda")
    wanted = mlkernels.cross_entropy(wide[:, :, :5].double(), target[:, :5], backend="reference")
    torch.testing.assert_close(found.double(), wanted, rtol=4e-6, atol=2e-6)


@pytest.mark.parametrize("value", [-INF, INF, NAN])
@pytest.mark.parametrize("path", PATHS)
def test_extreme_logits(path, value):
    input, target = rows(5, 140, torch.float32)
    input[1, 7] = input[2, target[2]] = value
    input[3] = value
    wanted = mlkernels.cross_entropy(input.double(), target, reduction="none", backend="reference")
    with simt.forced(**path):
        got = mlkernels.cross_entropy(input, target, reduction="none", backend="cuda")
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("path", simt.PATHS)
def test_launches_of_a_step(path, reduction):
    """Forward and backward, also where the gradient waits for its upstream one. The labels of many rows are counted
    once, for both, and that launch sets the counter by which the rows' adds up its losses itself; those of few are
    counted by whoever needs them."""
    for many, dtype in ((40, torch.float32), (600, torch.float32), (600, torch.float16)):
        input, target = rows(many, 6, dtype)
        target[::3] = -100
        before = simt.launches()
        weight = torch.linspace(0.2, 1.9, 6)  # whose sum whoever needs it adds up
        options = {"weight": weight, "label_smoothing": 0.1, "z_loss": 0.1}
        check(input, target, {"path": path, "cluster": -1}, reduction=reduction, **options)
        assert simt.launches() - before == (2 if reduction == "none" else 3), (many, dtype)


def test_more_partial_sums_than_the_last_block_reads_at_once():
    input, target = rows(600, 6, torch.float32)
    check(input, target, {"path": "long", "warps": 1, "cluster": -1, "teams": 600}, reduction="mean")


@pytest.mark.parametrize("classes", [1, 31, 33, 300, 512, 513, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_weights_of_classes_under_smoothing(classes, dtype):
    """The sum of few is taken by every warp, that of many once a step, by the launch that counts labels."""
    weight = torch.linspace(0.2, 1.9, classes, dtype=torch.promote_types(dtype, torch.float32))
    calls = [(3, "none"), (3, "mean"), *[(520, "mean"), (520, "sum")] * (classes in (33, 513))]
    for path, (count, reduction) in itertools.product(simt.PATHS, calls):
        input, target = rows(count, classes, dtype)
        before = simt.launches()
        options = {"weight": weight, "label_smoothing": 0.3, "reduction": reduction}
        check(input, target, {"path": path, "cluster": -1}, tolerance=2, **options)
        most = 2 if classes <= 512 and reduction == "none" else 3
        assert simt.launches() - before == most, (path, count, reduction)


@pytest.mark.parametrize("reduction", range(3))
@pytest.mark.parametrize("classes", [6, 700])
def test_what_all_rows_share(reduction, classes):
    """The operators return it as they say, and a backward without it finds it out again."""
    input, target = rows(4, classes, torch.float32)
    numbers = plain_numbers(Slot.WEIGHT, reduction=reduction, SMOOTHING=0.1)
    arguments = input, target, numbers, [torch.linspace(0.2, 1.9, classes)]
    for call, more in ((ops.CUDA.softmax_loss, (True,)), (ops.CUDA.softmax_loss_with_gradient, ())):
        torch.library.opcheck(call, (*arguments, *more), test_utils=("test_schema", "test_faketensor"))
    _, saved = ops.CUDA.softmax_loss(*arguments, True)
    up = torch.full((4,) if reduction == 0 else (), 1.5)
    kept, again = (
        ops.CUDA.softmax_loss_backward(up, None, None, None, *arguments, known, 1 << ops.INPUT)[0]
        for known in (saved, saved[:0])
    )
    torch.testing.assert_close(kept, again, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_factors_of_a_class_and_of_a_row(reduction):
    """They differ, and a later visit has to know both."""
    input, target = rows(600, 6, torch.float32)
    check(input, target, {}, reduction=reduction, weight=torch.linspace(0.2, 1.9, 6), z_loss=0.1)


@pytest.mark.parametrize("upstream", [1.0, 0.25])
def test_refresh_looks_at_the_upstream_gradient_itself(upstream):
    """An upstream gradient of 1 leaves what is there, right or not."""
    input, target = rows(4, 50, torch.float32)
    x = input.clone().requires_grad_()
    mlkernels.cross_entropy(x, target, backend="cuda").backward()
    numbers = plain_numbers(reduction=1)
    gradient = torch.full_like(x, 7.0)
    factors = ops.CUDA.softmax_loss_with_gradient(input, target, numbers, [])[2]
    ops.CUDA.refresh(torch.tensor(upstream), factors, input, target, numbers, [], gradient)
    torch.testing.assert_close(gradient, torch.full_like(x, 7.0) if upstream == 1 else x.grad * upstream)


# ---- memory ----------------------------------------------------------------------------------------------------------

GUARDED = """
import ctypes, mmap, sys
sys.path[:0] = [{tests!r}]
import torch, simt
import mlkernels
simt.install()
libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE

def guarded(bytes, at_end):
    # Memory between two pages that nobody may touch, at its beginning or at its end.
    pages = (bytes + PAGE - 1) // PAGE
    area = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for page in (start, start + (pages + 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0
    first = PAGE + (pages * PAGE - bytes if at_end else 0)
    keep.append(area)
    return torch.frombuffer(area, dtype=torch.uint8, count=bytes, offset=first)

keep = []
for classes in (5, 9, 33, 131, 257, 1001):
    for dtype in (torch.bfloat16, torch.float32):
        for at_end in (False, True):
            x = guarded(3 * classes * dtype.itemsize, at_end).view(dtype).view(3, classes)
            x.copy_(torch.randn(3, classes))
            for path, how in ((None, {{}}), ("long", {{"warps": 2}}), ("streamed", {{"slots": 2}}), ("strided", {{}})):
                with simt.forced(path=path, **how):
                    y = torch.tensor([0, classes - 1, classes // 2])
                    loss = mlkernels.cross_entropy(x.requires_grad_(), y, backend="cuda")
                    loss.backward()
                assert bool(loss.isfinite())
print("nothing outside was touched")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_nothing_beyond_the_logits_is_read():
    done = subprocess.run(
        [sys.executable, "-c", GUARDED.format(tests=str(ROOT / "tests"))],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout == "nothing outside was touched\n", (done.returncode, done.stderr[-2000:])


# ---- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [None, True, False])
@pytest.mark.parametrize("usable", [True, False])
def test_multi_copy(flag, usable):
    """Also where the library is loaded and its kernels do not run on the device: Snapshot and search go on."""
    dst, src = mixed(0), mixed(1)
    before, wanted = [bits(t) for t in dst], [bits(t) for t in src]
    with simt.forced() if usable else simt.unusable("no kernel image"):
        simt.operator("multi_copy_")(dst, src, None if flag is None else torch.tensor(flag))
    for old, new, t in zip(before, wanted, dst, strict=True):
        assert torch.equal(bits(t), old if flag is False else new)


def test_losses_say_why_a_device_is_not_served():
    input, target = rows(2, 5, torch.float32)
    with simt.unusable("no kernel image"), pytest.raises(RuntimeError, match="do not run here: no kernel image"):
        mlkernels.cross_entropy(input, target, backend="cuda")


@pytest.mark.parametrize("count", [47, 48, 49, 999, 1000, 1001, 2500])
def test_multi_copy_of_many(count):
    """Around the sizes of the tables that a launch carries."""
    src = [torch.randn(1 + i % 37) for i in range(count)]
    dst = [torch.zeros_like(t) for t in src]
    simt.operator("multi_copy_")(dst, src, torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(dst, src, strict=True))


@pytest.mark.parametrize("offset", range(0, 20, 3))
def test_multi_copy_over_several_pieces(offset):
    memory = torch.randint(0, 255, (300_000,), dtype=torch.uint8)
    to = torch.zeros(300_000, dtype=torch.uint8)
    simt.operator("multi_copy_")([to[7 : 7 + 250_001]], [memory[offset : offset + 250_001]], None)
    assert torch.equal(to[7 : 7 + 250_001], memory[offset : offset + 250_001])
    assert not bool(to[:7].any()) and not bool(to[7 + 250_001 :].any())


def test_multi_copy_says_what_is_wrong(monkeypatch):
    """The operator refuses, and Python finds the words."""
    dst, src = [torch.zeros(2), torch.zeros(2)], [torch.ones(2), torch.ones(3)]
    with pytest.raises(RuntimeError, match=r"src\[1\] must have the shape, dtype and device of dst\[1\]"):
        simt.operator("multi_copy_")(dst, src, None)
    monkeypatch.setattr(torch.ops.mlkernels.multi_copy_, "default", simt.operator("multi_copy_"))
    with pytest.raises(ValueError, match=r"the shape of dst\[1\], torch.Size\(\[2\]\), got torch.Size\(\[3\]\)"):
        ops.multi_copy_(dst, src)
    assert not any(map(torch.count_nonzero, dst))
