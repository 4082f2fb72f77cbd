"""Linear heads: a loss of the family on a classifier's output that is never whole, against the chain in float64."""

import functools
import operator
import warnings

import pytest
import torch
import torch.nn.functional as F
from table import BY_NAME, F64, LOSSES, TABLES, preparation
from test_inputs import CASES as BAD_ARGUMENTS
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import mlkernels
from bench import linear_errors
from mlkernels import linear_cross_entropy, linear_softmax_loss
from mlkernels.checks import accumulated
from mlkernels.linear.plan import DevicePlanner, Plan, Planner, ThreadsPlanner
from mlkernels.numbering import INPUT

ROWS, CLASSES, WIDTH = 10, 23, 5
VECTOR = torch.linspace(0.0, 2.0, CLASSES, dtype=F64)
OPTIONS = {
    "plain": {"reduction": "none"},
    "smoothed": {"weight": VECTOR, "label_smoothing": 0.1, "z_loss": 0.01, "reduction": "mean"},
    "capped": {**preparation(CLASSES), "softcap": 3.0, "label_smoothing": 0.2, "reduction": "sum"},
    "weighted": {
        "row_weight": torch.linspace(-1, 2, ROWS, dtype=F64), "normalizer": 3.5, "z_loss": 0.1, "reduction": "mean",
    },
}  # fmt: skip
#: (strategy, bytes where pieces work in place, bytes where they have temporaries): all at once; a few rows and classes.
PLANS = {
    "whole": (None, None, None),
    "stored": ("stored", 900, 1600),
    "tiles": ("tiles", 2000, 4000),
    "rows": ("rows", 2500, 9000),
}
PIECES = [name for name in ("cpu", "reference") if mlkernels.available_backends("cpu")[name] is None]


@pytest.fixture(params=PIECES)
def plans(request, monkeypatch):
    """(backend, [(strategy, memory)]); three threads have classes of their own where these are C++'s."""
    monkeypatch.setattr("mlkernels.linear.plan.FEW_CLASSES", 4)
    monkeypatch.setattr("mlkernels.linear.threads.count", lambda: 3)
    monkeypatch.setattr("mlkernels.linear.plan.BLOCK", 4)
    monkeypatch.setattr("mlkernels.linear.plan.SMALL", 8)
    at = 2 if request.param == "reference" else 1
    return request.param, [(plan[0], plan[at]) for plan in PLANS.values()]


def problem(seed=0, dtype=F64, rows=ROWS, classes=CLASSES, width=WIDTH, bias=True, ignored=True):
    """Leaves x, W, b and labels of which one is ignored, whose row holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=F64).to(dtype)
    x, weight = draw(rows, width), draw(classes, width)
    target = torch.randint(classes, (rows,), generator=generator)
    if ignored:
        target[2], x[2] = -100, float("nan")
    return x.requires_grad_(), weight.requires_grad_(), draw(classes).requires_grad_() if bias else None, target


def unfused(x, weight, bias, normalize=False):
    """The logits as people write them; 0 * NaN of an ignored row would be in every gradient."""
    x = torch.where(x.isnan(), 0.5, x)
    if normalize:
        return F.linear(x / x.norm(dim=1, keepdim=True), weight / weight.norm(dim=1, keepdim=True))
    return F.linear(x, weight, bias)


def leaves_of(loss, form, target):
    found = loss.values(form, target, CLASSES)
    found = {k: torch.as_tensor(v, dtype=F64) if k != "eta" else v for k, v in found.items()}
    return {k: v.clone().requires_grad_() for k, v in found.items()}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_as_the_unfused_chain(loss, options, plans):
    """Value, gradients of features, weight, bias and every parameter of the loss, under every plan."""
    options = OPTIONS[options]
    normalize = loss.draws == "cosines"
    x, weight, bias, target = problem(bias=not normalize)
    params = leaves_of(loss, "number" if loss.structure.scale == "two_scale" else loss.forms[-1], target)
    options = options | ({"group": loss.group(target)} if loss.groups else {})
    leaves = [x, weight, *([] if normalize else [bias]), *params.values()]
    wanted = loss(unfused(x, weight, bias, normalize), target, params, backend="reference", **options)
    upstream = torch.randn(wanted.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    wanted_grads = torch.autograd.grad(wanted, leaves, upstream)
    whole = lambda logits, target: loss(logits, target, params, backend=plans[0], **options)
    for strategy, memory in plans[1]:
        found = linear_softmax_loss(
            x, weight, target, linear_bias=bias, normalize=normalize, loss=whole, strategy=strategy, memory=memory
        )
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
        for ours, theirs in zip(torch.autograd.grad(found, leaves, upstream), wanted_grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["cross_entropy", "two_scale_norm", "two_scale_margin_modulated", "piecewise_groups"])
def test_statistics_and_their_gradients(name, plans):
    """logsumexp, log_prob and entropy of one call have gradients, by the scale too."""
    loss = BY_NAME[name]
    normalize = loss.draws == "cosines"
    x, weight, _, target = problem(bias=False)
    params = leaves_of(loss, "number", target)
    options = {"group": loss.group(target)} if loss.groups else {}
    leaves = [x, weight, *params.values()]
    upstream = None
    for strategy, memory in plans[1]:
        value, rows = linear_softmax_loss(
            x, weight, target, normalize=normalize, return_stats=True, strategy=strategy, memory=memory,
            backend=plans[0], **loss.compose(params), **options,
        )  # fmt: skip
        wanted, whole = mlkernels.softmax_loss(
            unfused(x, weight, None, normalize), target, return_stats=True, backend="reference",
            **loss.compose(params), **options,
        )  # fmt: skip
        for ours, theirs in zip((value, *rows), (wanted, *whole), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
        if upstream is None:
            generator = torch.Generator().manual_seed(2)
            upstream = [torch.randn(t.shape, dtype=F64, generator=generator) for t in (value, *rows[:3])]
        results = [
            torch.autograd.grad([v, *r[:3]], leaves, upstream, allow_unused=True)
            for v, r in ((value, rows), (wanted, whole))
        ]
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


# ---- which gradients, of how much memory -----------------------------------------------------------------------------


class Watched(TorchDispatchMode):
    """Counts products, and the largest number of bytes that new tensors held at a time."""

    def __init__(self):
        super().__init__()
        self.products, self.peak, self.live = 0, 0, {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.products += any(name in str(function) for name in ("aten.mm", "aten.addmm"))
        self.products += "linear_statistics" in str(function)
        if "linear_gradient" in str(function):
            kept, (dx, dw) = arguments[10], arguments[18:20]
            self.products += (not kept) + (dx is not None) + (dw is not None)
        workspace = 0
        if any(name in str(function) for name in ("linear_loss_with_gradients", "linear_rows")):
            workspace = arguments[5] * accumulated(arguments[0].dtype).itemsize
        if "linear_loss_with_gradients" in str(function):
            (*_, stored), of_tiles = arguments[6], [arguments[9] >> INPUT + i & 1 for i in range(2)]
            self.products += 1 + (any(of_tiles) and not stored) + sum(of_tiles)
        old = {t.untyped_storage()._cdata for t in arguments if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in old:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {k: (ref, size) for k, (ref, size) in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()) + workspace)
        return result


@pytest.mark.parametrize("strategy, products", [("stored", (1, 3, 2, 2)), ("tiles", (1, 4, 3, 3))])
def test_gradients_that_nobody_wants_are_not_made(strategy, products):
    """Nothing, or no_grad: one pass of products; features and weight: two more; one of them: one more."""
    x, weight, _, target = problem(bias=False, dtype=torch.float32)
    calls = [(x.detach(), weight.detach()), (x, weight), (x.detach(), weight), (x, weight.detach())]
    for (features, classifier), wanted in zip(calls, products, strict=True):
        with Watched() as watched:
            loss = linear_cross_entropy(features, classifier, target, strategy=strategy)
            if loss.requires_grad:
                loss.backward()
        assert watched.products == wanted
        assert loss.requires_grad == (wanted > 1)
    for without in (torch.no_grad, torch.inference_mode):
        with without(), Watched() as watched:
            found = linear_cross_entropy(x, weight, target, strategy=strategy)
        assert watched.products == 1 and not found.requires_grad
        torch.testing.assert_close(found, loss.detach())


@pytest.mark.parametrize("strategy", ["stored", "tiles", None])
@pytest.mark.parametrize("memory", [60_000, 400_000])
@pytest.mark.parametrize("backend", PIECES)
def test_memory_is_a_bound(strategy, memory, backend):
    """Of all that a call makes but the gradients and their sums; the whole logits would be 800 kB."""
    x, weight, _, target = problem(rows=50, classes=4000, width=4, dtype=torch.float32, bias=False)
    weight.requires_grad_(False)
    with Watched() as watched:
        linear_cross_entropy(x, weight, target, strategy=strategy, memory=memory, backend=backend).backward()
    # A handful of numbers per row and class besides.
    assert watched.peak <= memory + 50 * 4 * 100


def test_what_a_plan_takes():
    assert Planner(1024, 200_000, 64, 4, False).plan() == Plan(False, 1024, 1024)
    assert Planner(1024, 200_000, 256, 4, False).plan() == Plan(True, 114, 9198)
    assert Planner(100, 200_000, 64, 4, False).plan() == Plan(True, 100, 10485)
    assert not Planner(1024, 10_000_000, 512, 4, True).plan().stored
    # Beside twelve temporaries a chunk has fewer rows, where as many as fit alone would leave no room for a tile.
    assert Planner(40, 11, 4, 8, False, 12 * 8, 5000).plan("stored") == Plan(True, 20, 1)
    assert Planner(10_000_000, 3, 16, 4, False, 12 * 4).plan("stored") == Plan(True, 1_250_000, 1)
    with pytest.raises(ValueError, match=r"memory=1000 is too small for one row of 5000 logits .* takes 20000 bytes"):
        Planner(8, 5000, 16, 4, False, memory=1000).plan("stored")
    with pytest.raises(ValueError, match=r"memory=10 is too small for one logit of one row: that takes 68 bytes"):
        Planner(8, 5000, 16, 4, True, memory=10).plan()


def test_what_a_plan_of_threads_takes():
    """Rows are cut by memory alone; threads get as many tiles each, of one size, where there are classes enough."""

    def planner(rows, classes, width, copies, threads, **options):
        return ThreadsPlanner(rows, classes, width, 4, copies, threads=threads, **options)

    assert planner(1024, 500_000, 64, False, 2).plan() == Plan(False, 1024, 256, 2, 512)
    assert planner(100, 50_000, 512, False, 2).plan() == Plan(True, 100, 1250, 2, 100)
    for threads in (1, 2, 16):
        made = planner(1024, 200_000, 256, True, threads).plan()
        assert made.stored and made.rows == 103 and made.parts == threads
    assert planner(1 << 20, 10, 64, False, 8).plan().parts == 1
    assert planner(2048, 4096, 64, False, 2).plan() == Plan(True, 512, 256, 2, 512)  # 8 MB at a time, and not 33
    assert planner(8, 5000, 16, False, 4, memory=480_000).plan("rows") == Plan(True, 8, 5000, 1, 8)
    for strategy, needed in (("stored", 20_128), ("rows", 660_000), ("tiles", 132)):
        assert planner(8, 5000, 16, True, 2, memory=needed).plan(strategy).parts == 1
        with pytest.raises(ValueError, match=f"too small .* that takes {needed} bytes"):
            planner(8, 5000, 16, True, 2, memory=needed - 1).plan(strategy)


def test_what_a_plan_of_a_gpu_takes():
    """Logits are kept where all rows are one chunk, or a chunk has rows enough; tiles lie in the cache."""

    def planner(rows, classes, width, copies=0, **options):
        return DevicePlanner(rows, classes, width, 4, copies, memory=1 << 30, **options)

    assert planner(512, 50_000, 64).plan() == Plan(True, 512, 12_288)
    assert planner(4096, 1 << 18, 64).plan() == Plan(True, 1024, 6144)  # exactly rows enough
    assert planner(4096, (1 << 18) + 1, 64).plan() == Plan(False, 4096, 1536)
    assert planner(8192, 128_256, 4096).plan() == Plan(True, 2048, 8192)  # two widths: dX is read once per tile
    assert planner(1024, 10_000_000, 512).plan() == Plan(False, 1024, 6144)
    assert planner(0, 300, 8).plan() == Plan(True, 1, 300)
    assert planner(3000, 300, 2).plan() == Plan(True, 3000, 300)  # not cut down to a multiple of 256


# ---- precision -------------------------------------------------------------------------------------------------------


def of_float64(x, weight, target, **options):
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    loss = F.cross_entropy(x @ weight.T, target, **options)
    return loss.detach(), *torch.autograd.grad(loss, [x, weight])


def rows_of(confident, dtype):
    """Random rows, or rows with p = 1 - 1e-6 or so: each a multiple of its class's weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 32, generator=generator).to(dtype)
    target = torch.randint(500, (64,), generator=generator)
    x = weight[target].double() * 0.75 if confident else torch.randn(64, 32, generator=generator)
    return x.to(dtype).requires_grad_(), weight.requires_grad_(), target


@pytest.mark.parametrize("confident", [False, True], ids=["random", "confident"])
@pytest.mark.parametrize("strategy", ["stored", "tiles"])
def test_no_worse_than_the_unfused_chain_in_float32(strategy, confident):
    x, weight, target = rows_of(confident, torch.float32)
    exact = of_float64(x, weight, target)
    errors = []
    for value in (linear_cross_entropy(x, weight, target, strategy=strategy), F.cross_entropy(x @ weight.T, target)):
        found = (value.detach(), *torch.autograd.grad(value, [x, weight]))
        errors.append([float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)])
    for ours, theirs in zip(*errors, strict=True):
        assert ours <= 1.1 * theirs + 1e-7


@pytest.mark.parametrize("strategy", ["stored", "tiles"])
@pytest.mark.parametrize("kind", linear_errors.KINDS)
def test_sums_that_cancel_are_those_of_the_chain_in_float32(kind, strategy):
    """A class has what its labels contribute and what all rows do: with these summed up apart dW was 5.7 times as far
    off where features are alike, 3.3 times where rows are the same."""
    of = linear_errors.problem(kind)
    of = of._replace(x=of.x.float(), weight=of.weight.float())
    found = linear_errors.errors(functools.partial(linear_cross_entropy, strategy=strategy), of)
    limit = linear_errors.errors(linear_errors.chain, of)
    assert found.loss < 2e-7
    assert not found.x > 1.1 * limit.x and found.weight <= 1.1 * limit.weight  # a fresh one's dX is 0


def test_a_bias_sums_many_rows_as_torch_does():
    """One after the other they would be off 40 times as much."""
    x, weight, target = (t.detach() for t in rows_of(False, torch.float32))
    x, target, bias = x.repeat(64, 1), torch.arange(4096) % 500, torch.zeros(500, requires_grad=True)
    exact, eager = (
        torch.autograd.grad(F.cross_entropy(F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)), target), bias)[0]
        for dtype in (F64, torch.float32)
    )
    found = torch.autograd.grad(linear_cross_entropy(x, weight, target, linear_bias=bias), bias)[0]
    assert (found - exact).norm() <= 1.5 * (eager - exact).norm()


@pytest.mark.parametrize("confident", [False, True], ids=["random", "confident"])
@pytest.mark.parametrize("strategy", ["stored", "tiles"])
def test_bfloat16_rounds_once(strategy, confident):
    """Gradients are the exact ones, rounded; eager bfloat16 is 100 % off on confident rows."""
    x, weight, target = rows_of(confident, torch.bfloat16)
    exact = of_float64(x, weight, target)
    value = linear_cross_entropy(x, weight, target, strategy=strategy)
    assert value.dtype == torch.float32
    found = torch.autograd.grad(value, [x, weight])
    assert abs(float(value.detach()) / float(exact[0]) - 1) < 1e-5
    for ours, theirs in zip(found, exact[1:], strict=True):
        assert ours.dtype == torch.bfloat16
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 2e-3
    # Under autocast features are half and the weight is not.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = linear_cross_entropy(x, weight.detach().float(), target, strategy=strategy)
    torch.testing.assert_close(mixed, value)


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, classes, width", [(13, 331, 149), (29, 64, 16), (3, 70, 260)])
def test_products_of_every_block(rows, classes, width, dtype):
    """Whole panels and parts of them, vectors and parts of these, rows by six, three and one."""
    x, weight, _, target = problem(rows=rows, classes=classes, width=width, dtype=dtype, bias=False, ignored=False)
    exact = of_float64(x, weight, target)
    bound = {F64: 1e-14, torch.float32: 2e-6}.get(dtype, 3e-3)
    for strategy in ("stored", "tiles", "rows"):
        value = linear_cross_entropy(x, weight, target, strategy=strategy)
        found = (value.detach(), *torch.autograd.grad(value, [x, weight]))
        for ours, theirs in zip(found, exact, strict=True):
            assert float((ours.double() - theirs).norm() / theirs.norm()) < bound


def test_small_half_gradients_survive_a_scaler():
    """An upstream of 65536 is multiplied before what was made is rounded."""
    x, weight, target = rows_of(True, torch.float16)
    exact = of_float64(x, weight, target)
    found = torch.autograd.grad(65536 * linear_cross_entropy(x, weight, target), [x, weight])
    for ours, theirs in zip(found, exact[1:], strict=True):
        assert float((ours.double() / 65536 - theirs).norm() / theirs.norm()) < 1e-3


# ---- rows that do not count ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_but_ignored_rows(rows, reduction):
    x, weight, bias, target = problem(rows=max(rows, 3), ignored=False)
    x, target = x[:rows].detach().fill_(float("nan")).requires_grad_(), torch.full((rows,), -100)
    loss, stats = linear_softmax_loss(
        x, weight, target, linear_bias=bias, reduction=reduction, return_stats=True, scale=2.0
    )
    alone = linear_softmax_loss(x, weight, target, linear_bias=bias, reduction=reduction, scale=2.0)
    assert torch.equal(loss.nan_to_num(7.0), alone.nan_to_num(7.0))
    wanted = F.cross_entropy(torch.zeros(rows, CLASSES, dtype=F64), target, reduction=reduction)
    assert torch.equal(loss.nan_to_num(7.0), wanted.nan_to_num(7.0))
    assert stats.prediction.tolist() == [-1] * rows and stats.entropy.tolist() == [0.0] * rows
    for value in (loss, alone):
        for grad in torch.autograd.grad(value.sum(), [x, weight, bias]):
            assert not grad.any()


class Looks(TorchDispatchMode):
    """Counts what a host would wait for its device for."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function.overloadpacket.__name__ in ("nonzero", "_local_scalar_dense", "masked_select")
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("ignored", ["some", "none", "all"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compacted_as_masked(reduction, ignored, monkeypatch):
    """As on a device, where ignored rows are masked by default: left out, everything is the same, for one look at the
    labels per call; trained margins and weights of rows, statistics, and a weight that steps included."""
    monkeypatch.setattr("mlkernels.linear.pieces.TORCH.masks", True)
    monkeypatch.setattr("mlkernels.tracing.traced", lambda *tensors: True)  # labels are checked by nobody
    x, weight, _, target = problem(bias=False)
    target[4] = -100
    x = torch.where(target.unsqueeze(1) == -100, torch.nan, x).detach().requires_grad_()
    if ignored != "some":
        target, x = target.clamp(min=0), x.nan_to_num(0.5).detach().requires_grad_()
    if ignored == "all":
        target = torch.full_like(target, -100)
    margin = torch.linspace(0.1, 0.5, ROWS, dtype=F64).unsqueeze(1).requires_grad_()
    leaves, up = [x, weight, margin], torch.linspace(-1, 2, ROWS, dtype=F64)
    run = {"backend": "reference", "reduction": reduction}
    loss_function = functools.partial(mlkernels.arcface_loss, margin=margin, scale=4.0, **run)
    options = {"normalize": True, "strategy": "tiles", "memory": 3000, "row_weight": up, "loss": loss_function}
    results, products = [], []
    for compact in (False, True):
        with Looks() as looks, Watched() as watched:
            loss, rows = linear_softmax_loss(x, weight, target, return_stats=True, compact=compact, **options)
            outputs, ups = [loss, *rows[:3]], [up.sum() if reduction == "mean" else up, up, up + 1, up * up]
            grads = torch.autograd.grad(outputs, leaves, ups, retain_graph=True)
        assert looks.count == compact
        alone = linear_softmax_loss(x, weight, target, compact=compact, **options)
        grads += torch.autograd.grad(alone, leaves, ups[0])
        results.append([loss, *rows, alone, *grads])
        products.append(watched.products)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12, equal_nan=True)
    assert products[1] == 0 if ignored == "all" else products[1] <= products[0]
    stepped = []
    for compact in (False, True):
        linear = mlkernels.LinearLoss(
            functools.partial(mlkernels.cosface_loss, **run), WIDTH, CLASSES,
            weight=nn.Parameter(weight.detach().clone()), tile_update=mlkernels.TileSGD(0.1), compact=compact,
        )  # fmt: skip
        linear(x, target).sum().backward()
        stepped.append(linear.weight.detach())
    torch.testing.assert_close(*stepped)


def test_ignored_rows_take_no_part_of_the_plan():
    """Rows are cut as those that are left fit into the memory: sixteen times as many, nearly all ignored, in one."""
    x, weight, _, target = problem(bias=False, ignored=False)
    target = torch.cat([target, torch.full((15 * ROWS,), -100)])
    counts = []
    for rows in (ROWS, 16 * ROWS):
        with Watched() as watched:
            linear_cross_entropy(
                x.repeat(16, 1)[:rows], weight, target[:rows], strategy="stored", memory=12 * ROWS * CLASSES,
                backend="reference",
            )  # fmt: skip
        counts.append(watched.products)
    assert counts[0] == counts[1]


def test_an_infinite_upstream_leaves_ignored_rows_alone():
    x, weight, _, target = problem(bias=False)
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(x, weight, target, reduction=reduction)
        (grad,) = torch.autograd.grad(loss, x, torch.full_like(loss, float("inf")))
        assert not grad[2].any() and not grad[3].isfinite().all()


# ---- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_graph_that_is_kept_gives_the_same_twice(reduction):
    x, weight, _, target = problem(bias=False)
    loss = linear_cross_entropy(x, weight, target, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    once = x.grad.clone(), weight.grad.clone()
    loss.backward(torch.tensor(2.0, dtype=F64))
    for grad, first in zip((x.grad, weight.grad), once, strict=True):
        torch.testing.assert_close(grad, 3 * first)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_linear_heads_cannot_do_they_refuse(reduction):
    x, weight, _, target = problem(bias=False)
    loss = linear_cross_entropy(x, weight, target, reduction=reduction)
    with pytest.raises(RuntimeError, match="no second-order gradients"):
        torch.autograd.grad(loss.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no torch\.func transforms"):
        torch.func.grad(lambda x: linear_cross_entropy(x, weight, target))(x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        linear_cross_entropy(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()), weight, target)
    for kind in ({"sample": 7}, {"tile_update": mlkernels.TileSGD(0.1)}):
        linear = mlkernels.LinearLoss(mlkernels.FocalLoss(reduction=reduction), WIDTH, CLASSES, dtype=F64, **kind)
        with pytest.raises(RuntimeError, match=r"a linear head with tile_update= or sample= .* make_fx"):
            make_fx(functools.partial(linear, target=target))(x)
    again = lambda x: torch.autograd.grad(linear_cross_entropy(x, weight, target).exp(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second-order gradients"):
        make_fx(again)(x)


def test_many_upstream_gradients_at_a_time():
    """Where a reduced loss has its gradients already they are multiplied, also by tangents; else that is refused."""
    x, weight, _, target = problem(bias=False)
    ups = torch.tensor([0.5, 1.0, float("inf")], dtype=F64)
    loss = linear_cross_entropy(x, weight, target)
    wanted = [torch.autograd.grad(loss, (x, weight), up, retain_graph=True) for up in ups]
    found = torch.autograd.grad(loss, (x, weight), ups, is_grads_batched=True, retain_graph=True)
    for ours, theirs in zip(found, zip(*wanted, strict=True), strict=True):
        assert torch.equal(ours, torch.stack(theirs))
    with torch.autograd.forward_ad.dual_level():
        (grad,) = torch.autograd.grad(loss, x, torch.autograd.forward_ad.make_dual(ups[1], ups[0]))
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(grad).tangent, wanted[0][0])
    none = linear_cross_entropy(x, weight, target, reduction="none")
    with pytest.raises(RuntimeError, match=r"^linear heads have no backward for many .*: is_grads_batched=False"):
        torch.autograd.grad(none, x, torch.eye(ROWS, dtype=F64), is_grads_batched=True, retain_graph=True)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="nor for one with a tangent"):
        torch.autograd.grad(none, x, torch.autograd.forward_ad.make_dual(none.detach(), none.detach()))


def test_a_kept_graph_gives_gradients_that_may_be_written_into():
    """Whatever becomes of those of one backward, the next one's are right."""
    x, weight, _, target = problem(bias=False)
    loss = linear_cross_entropy(x, weight, target)
    found = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    wanted = [gradient.clone() for gradient in found]
    for gradient in found:
        gradient.mul_(5)
    for gradient, right in zip(torch.autograd.grad(loss, (x, weight)), wanted, strict=True):
        assert torch.equal(gradient, right)


def test_hooks_on_saved_tensors_meet_no_gradient():
    """Under checkpointing or offloading the gradients are made in the backward: of W's size there is W alone."""
    x, weight, _, target = problem(bias=False)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        linear_cross_entropy(x, weight, target).backward()
    assert [t.data_ptr() for t in packed if t.shape == weight.shape] == [weight.data_ptr()]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_a_linear_head_is_in_the_graph(reduction):
    """With what stands around it, ignored rows included; results are the same, and refused is what is eagerly."""
    torch._dynamo.reset()
    x, weight, bias, target = problem()
    scale = torch.tensor(1.5, dtype=F64, requires_grad=True)

    def step(x, target):
        loss = linear_cross_entropy(2 * x, weight, target, linear_bias=bias, scale=scale, reduction=reduction)
        return 3 * loss.sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (ROWS, ROWS - 3):
        results = []
        for run in (compiled, step):
            loss = run(x[:rows], target[:rows])
            results.append((loss.detach(), *torch.autograd.grad(loss, [x, weight, bias, scale])))
        torch.testing.assert_close(*results)
    with torch.no_grad():
        assert compiled(x, target) == step(x, target)
    with pytest.raises(IndexError, match="target 23 at row 0 is out of range"):
        compiled(x, torch.full_like(target, CLASSES))


def test_checkpointing_and_shapes():
    """(B, T, D) with (B, T), per-row numbers of that shape, under checkpoint, as row by row."""
    x, weight, _, target = problem(rows=12, bias=False, ignored=False)
    scale = torch.linspace(0.5, 2, 12, dtype=F64, requires_grad=True)
    run = lambda x, target, scale: linear_softmax_loss(
        x, weight, target, scale=scale, reduction="none", return_stats=True
    )
    boxed = torch.utils.checkpoint.checkpoint(
        run, x.reshape(3, 4, -1), target.reshape(3, 4), scale.reshape(3, 4, 1), use_reentrant=False
    )
    flat = run(x, target, scale.reshape(12, 1))
    for ours, theirs in zip((boxed[0], *boxed[1]), (flat[0], *flat[1]), strict=True):
        assert ours.shape == (3, 4)
        torch.testing.assert_close(ours.reshape(-1), theirs)
    leaves = [x, weight, scale]
    grads = [torch.autograd.grad(v.sum() + r.entropy.sum(), leaves) for v, r in (boxed, flat)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    one = linear_cross_entropy(x[0], weight, target[0], reduction="none")
    assert one.shape == () and one == linear_cross_entropy(x[:1], weight, target[:1])


# ---- modules ---------------------------------------------------------------------------------------------------------


def test_a_linear_head_ties_and_takes_over():
    embedding = torch.nn.Embedding(CLASSES, WIDTH)
    tied = mlkernels.LinearLoss(mlkernels.CrossEntropyLoss(), WIDTH, CLASSES, weight=embedding.weight)
    assert tied.weight is embedding.weight
    layer = torch.nn.Linear(WIDTH, CLASSES)
    before, before_bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    linear = mlkernels.LinearLoss.from_linear(mlkernels.FocalLoss(), layer)
    assert linear.weight is layer.weight and linear.bias is layer.bias
    linear.reset_parameters()
    assert torch.equal(before, layer.weight) and torch.equal(before_bias, layer.bias)
    x, _, _, target = problem(dtype=torch.float32, ignored=False)
    torch.testing.assert_close(linear(x, target), mlkernels.FocalLoss()(layer(x), target))
    torch.testing.assert_close(linear.logits(x), layer(x))
    other = mlkernels.LinearLoss(mlkernels.FocalLoss(), WIDTH, CLASSES, bias=True)
    other.load_state_dict(linear.state_dict())
    torch.testing.assert_close(other(x, target), linear(x, target))


@pytest.mark.parametrize("normalize", [False, True])
def test_the_best_classes_without_logits(normalize, monkeypatch):
    monkeypatch.setattr(mlkernels.linear.module, "TILE", 50)
    linear = mlkernels.LinearLoss(mlkernels.ArcFaceLoss(), WIDTH, 101, normalize=normalize, dtype=F64)
    x = torch.randn(3, 4, WIDTH, dtype=F64)
    for k in (1, 7, 101):
        values, classes = linear.topk(x, k)
        wanted, at = linear.logits(x).topk(k)
        torch.testing.assert_close(values, wanted.detach())
        assert torch.equal(classes, at)


def test_losses_take_what_belongs_to_the_batch():
    """A model's norm, groups and norms of rows pass through; trained scales of a loss get their gradients."""
    x, _, _, target = problem(dtype=F64, ignored=False)
    two = mlkernels.TwoScaleLoss(3.0)
    linear = mlkernels.LinearLoss(two, WIDTH, CLASSES, dtype=F64)
    linear(x, target, logit_norm=torch.tensor(2.5)).backward()
    ours = two.scale_low.grad.clone(), linear.weight.grad.clone()
    two.zero_grad(), linear.zero_grad()
    two(F.linear(x, linear.weight), target, torch.tensor(2.5)).backward()
    torch.testing.assert_close(ours, (two.scale_low.grad, linear.weight.grad))
    tables = {k: torch.tensor(v, dtype=F64) for k, v in BY_NAME["piecewise_groups"].params.items() if k in TABLES}
    piecewise = mlkernels.PiecewiseLoss(**tables)
    linear, group = mlkernels.LinearLoss(piecewise, WIDTH, CLASSES, dtype=F64), torch.arange(ROWS) % 2
    torch.testing.assert_close(linear(x, target, group=group), piecewise(F.linear(x, linear.weight), target, group))
    norm = torch.full((ROWS, 1), 9.0, dtype=F64)
    linear = mlkernels.LinearLoss(mlkernels.MarginLoss(m2=0.2, scale=1.0), WIDTH, CLASSES, dtype=F64)
    torch.testing.assert_close(linear(x, target, norm=norm), linear.loss(F.linear(x, linear.weight), target, norm))
    loss, rows = linear(x, target, norm=norm, return_stats=True)
    assert rows.rank.shape == (ROWS,) and loss.shape == ()
    weights = torch.linspace(-1, 2, ROWS, dtype=F64)
    logits = F.linear(x, linear.weight)
    torch.testing.assert_close(
        linear(x, target, row_weight=weights, normalizer=3),
        linear.loss(logits, target, row_weight=weights, normalizer=3),
    )
    one = linear_softmax_loss(x[0], linear.weight, target[0], loss=mlkernels.FocalLoss(), row_weight=weights[0])
    torch.testing.assert_close(one, mlkernels.focal_loss(logits[0], target[0], row_weight=weights[0]))
    one = linear_cross_entropy(x[0], linear.weight, target[0], row_weight=weights[0])
    torch.testing.assert_close(one, mlkernels.cross_entropy(logits[0], target[0], row_weight=weights[0]))


@pytest.mark.parametrize("strategy", ["stored", "tiles"])
def test_no_features(strategy):
    """Of width 0 the logits are the bias."""
    x, weight, bias, target = problem(width=0, ignored=False)
    loss = linear_cross_entropy(x, weight, target, linear_bias=bias, strategy=strategy)
    wanted = F.cross_entropy(bias.expand(ROWS, CLASSES), target)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(each, bias) for each in (loss, wanted)))
    linear = mlkernels.LinearLoss(mlkernels.CrossEntropyLoss(), 0, CLASSES, bias=True, dtype=F64)
    torch.testing.assert_close(linear.topk(x, 3), tuple(linear.logits(x).topk(3)))


@pytest.mark.parametrize("strategy", ["stored", "tiles"])
def test_cosines_of_any_length_are_right_or_nan(strategy):
    """Where F.normalize has cosines of 0 (norms below 1e-12, or squares that overflow) they are right, or NaN."""
    x, weight, _, target = problem(ignored=False)
    options = {"normalize": True, "scale": 9.0, "strategy": strategy}
    wanted = linear_softmax_loss(x, weight, target, **options).item()
    for of_x, of_weight, right in [(1e-19, 1.0, True), (1.0, 1e-19, True), (1e18, 1e18, True), (1e20, 1.0, False),
                                   (1.0, 1e20, False), (1e-30, 1.0, False), (1.0, 1e-30, False)]:  # fmt: skip
        rows, classes = ((t * by).float().detach().requires_grad_() for t, by in ((x, of_x), (weight, of_weight)))
        found = linear_softmax_loss(rows, classes, target, **options)
        found.backward()
        assert bool(rows.grad.isfinite().all() and classes.grad.isfinite().all()) == right
        assert found.item() == pytest.approx(wanted, rel=1e-5) if right else bool(found.isnan())
        logits = mlkernels.LinearLoss(
            mlkernels.FocalLoss(), WIDTH, CLASSES, normalize=True, weight=nn.Parameter(classes)
        )
        assert bool(logits.logits(rows).isfinite().all()) == right


# ---- bad arguments ---------------------------------------------------------------------------------------------------

X, W, B, Y, _META = *problem(ignored=False), torch.device("meta")
stored = functools.partial(linear_cross_entropy, strategy="stored")
linear = functools.partial(mlkernels.LinearLoss, mlkernels.FocalLoss())
BAD = [
    (TypeError, "input takes a floating tensor, got list", lambda: linear_cross_entropy([1.0], W, Y)),
    (TypeError, r"linear_weight takes a floating tensor \(C, D\), got list", lambda: linear_cross_entropy(X, [1], Y)),
    (ValueError, r"linear_weight must be \(C, 5\) .*, got \(23, 4\)", lambda: linear_cross_entropy(X, W[:, :4], Y)),
    (ValueError, "at least one class", lambda: linear_cross_entropy(X, W[:0], Y)),
    (ValueError, r"linear_bias must be \(23,\)", lambda: linear_cross_entropy(X, W, Y, linear_bias=B[:4])),
    (ValueError, "beside normalize", lambda: linear_softmax_loss(X, W, Y, linear_bias=B, normalize=True)),
    (TypeError, "linear_weight must have input's dtype", lambda: linear_cross_entropy(X, W.float(), Y)),
    (ValueError, "linear_weight must be on input's device cpu", lambda: linear_cross_entropy(X, W.to(_META), Y)),
    (TypeError, "linear_weight takes a dense tensor", lambda: linear_cross_entropy(X, W.detach().to_sparse(), Y)),
    (ValueError, r"target must be \(10,\), .* got \(4,\)", lambda: linear_cross_entropy(X, W, Y[:4])),
    (TypeError, "target must hold integer class indices", lambda: linear_cross_entropy(X, W, Y.double())),
    (TypeError, r"^target .*, got torch\.float32; write target\.long\(\), or take cross_entropy of whole logits",
        lambda: linear(5, 23)(X.float(), Y.float())),
    (TypeError, r"^target must hold .* write target\.long\(\)", lambda: mlkernels.LinearLoss(
        mlkernels.CrossEntropyLoss(), 5, 23)(X.float(), X.float())),
    (TypeError, r"^target .*, got torch\.bool; write target\.long\(\)$", lambda: linear_cross_entropy(X, W, Y > 0)),
    (ValueError, r"^input must be \(\.\.\., 5\), got \(10, 4\)$", lambda: linear(5, 23)(X.float()[:, :4], Y)),
    (TypeError, "^input must have weight's dtype torch.float32, got torch.float64$", lambda: linear(5, 23)(X, Y)),
    (ValueError, "^input must be on weight's device cpu, got meta$", lambda: linear(5, 23).topk(
        X.float().to(_META), 2)),
    (IndexError, "target 23 at row 0 is out of range", lambda: linear_cross_entropy(X, W, torch.full_like(Y, 23))),
    (ValueError, "strategy must be one of 'stored', 'tiles'", lambda: linear_cross_entropy(X, W, Y, strategy="fast")),
    (ValueError, "memory must be an integer >= 1, got -1", lambda: linear_cross_entropy(X, W, Y, memory=-1)),
    (TypeError, "memory takes an int, got float", lambda: linear_cross_entropy(X, W, Y, memory=1e6)),
    (TypeError, "compact takes True or False, got 1", lambda: linear_cross_entropy(X, W, Y, compact=1)),
    (TypeError, "compact takes True or False", lambda: linear(5, 23, compact=None)),
    (ValueError, "memory=7 is too small for one row", lambda: stored(X, W, Y, memory=7)),
    (ValueError, "memory=7 is too small for one logit", lambda: linear_cross_entropy(X, W, Y, memory=7)),
    (ValueError, "backend=None, 'reference', 'cpu' or 'triton'", lambda: linear_cross_entropy(X, W, Y, backend="cuda")),
    (TypeError, "takes no options", lambda: linear_cross_entropy(X, W, Y, options=None)),
    (TypeError, "normalize takes True or False, got 1", lambda: linear_softmax_loss(X, W, Y, normalize=1)),
    (TypeError, "normalize takes True or False", lambda: linear(5, 23, normalize="yes")),
    (TypeError, "bias takes True or False", lambda: linear(5, 23, bias=B)),
    (TypeError, "k takes an int, got float", lambda: linear(5, 23).topk(X.float(), 1.5)),
    (TypeError, r"linear takes an nn\.Linear, got Tensor", lambda: mlkernels.LinearLoss.from_linear(
        mlkernels.FocalLoss(), W)),
    (TypeError, r"^linear_cross_entropy\(\) takes no 'bias'; there are linear_bias, strategy, memory, compact, scale",
        lambda: linear_cross_entropy(X, W, Y, bias=B)),
    (TypeError, "takes no 'gamma'", lambda: linear_cross_entropy(X, W, Y, gamma=2.0)),
    (TypeError, r"^linear_softmax_loss\(\) takes no 'bias'; there are linear_bias, .*, transform, .*, group",
        lambda: linear_softmax_loss(X, W, Y, bias=B)),
    (TypeError, r"^linear_softmax_loss\(\) takes no size_average", lambda: linear_softmax_loss(
        X, W, Y, size_average=False)),
    (ValueError, "weight must have one entry per class", lambda: linear_cross_entropy(X, W, Y, weight=VECTOR[:3])),
    (TypeError, "loss has its own scale: give it to the loss, or leave loss=None", lambda: linear_softmax_loss(
        X, W, Y, loss=mlkernels.FocalLoss(), scale=2.0)),
    (TypeError, "loss has its own weight: give it to the loss$", lambda: linear(5, 23)(X.float(), Y, weight=VECTOR)),
    (TypeError, "loss takes a loss module or function", lambda: linear_softmax_loss(X, W, Y, loss=3)),
    (TypeError, "loss takes a loss module or function.*: call CrossEntropyLoss", lambda: linear_softmax_loss(
        X, W, Y, loss=mlkernels.CrossEntropyLoss)),
    (TypeError, "loss must return a tensor, got float", lambda: linear_softmax_loss(X, W, Y, loss=lambda f, y: 3.0)),
    (ValueError, "looks at the logits once", lambda: linear_softmax_loss(
        X, W, Y, loss=lambda f, y: mlkernels.cross_entropy(f, y) + mlkernels.focal_loss(f, y), return_stats=True)),
    (ValueError, "normalize=True", lambda: linear(5, 23, bias=True, normalize=True)),
    (ValueError, "strategy must be one of", lambda: linear(5, 23, strategy="tile")),
    (ValueError, "memory must be an integer >= 1", lambda: linear(5, 23, memory=0)),
    (TypeError, r"weight takes the nn\.Parameter", lambda: linear(5, 23, weight=X)),
    (ValueError, r"k must be an integer in \[1, 23\], got 24", lambda: linear(5, 23).topk(X.float(), 24)),
    (ValueError, "in_features must be an integer >= 0, got -5", lambda: linear(-5, 23)),
    (TypeError, "in_features takes an int, got float", lambda: linear(5.0, 23)),
    (ValueError, "num_classes must be an integer >= 1, got 0", lambda: linear(5, 0)),
    (TypeError, "num_classes takes an int, got bool", lambda: linear(5, True)),
    (ValueError, "dtype has no meaning beside weight", lambda: linear(5, 23, weight=nn.Parameter(W), dtype=F64)),
    (TypeError, "return_stats takes True or False, got 'yes'", lambda: linear(5, 23)(X.float(), Y, return_stats="yes")),
    (ValueError, "device has no meaning beside weight", lambda: linear(5, 23, weight=nn.Parameter(W), device="cpu")),
    (ValueError, "dtype has no meaning beside weight", lambda: mlkernels.LinearLoss.from_linear(
        mlkernels.FocalLoss(), nn.Linear(5, 23), dtype=F64)),
]  # fmt: skip


def test_margins_beside_products():
    """Angles of what is no cosine: said where the linear head is made, by the line that makes it."""
    for loss in (mlkernels.ArcFaceLoss(), mlkernels.CosFaceLoss(), mlkernels.SphereFaceLoss()):
        with pytest.warns(UserWarning, match=f"{type(loss).__name__} takes cosines: pass normalize=True") as said:
            mlkernels.LinearLoss(loss, 5, 23)
        assert said[0].filename == __file__
    with pytest.warns(UserWarning, match="ArcFaceLoss takes cosines") as said:
        mlkernels.LinearLoss.from_linear(mlkernels.ArcFaceLoss(), torch.nn.Linear(5, 23))
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mlkernels.LinearLoss(mlkernels.ArcFaceLoss(), 5, 23, normalize=True)
        meant = mlkernels.LinearLoss(mlkernels.ArcFaceLoss(), 5, 23, normalize=False)  # of features that are cosines
        assert meant.normalize is False
        mlkernels.LinearLoss(mlkernels.MarginLoss(m2=0.5), 5, 23)  # L-Softmax is of products, with their norm


@pytest.mark.parametrize(
    "loss",
    [
        mlkernels.MultiMarginLoss(), mlkernels.multi_margin_loss, F.cross_entropy, nn.CrossEntropyLoss(),
        mlkernels.CenterLoss(num_features=CLASSES, num_classes=CLASSES), operator.mul, operator.matmul,
        mlkernels.LGMLoss(num_features=CLASSES, num_classes=CLASSES), operator.getitem, lambda f, y: -f,
        lambda f, y: torch.softmax(f, 1), lambda f, y: f.logsumexp(1), lambda f, y: 2.0 * f, lambda f, y: len(f),
        lambda f, y: torch.stack([*f]),
        mlkernels.JointLoss([mlkernels.CrossEntropyLoss(), mlkernels.MultiMarginLoss()]),
    ],
)  # fmt: skip
def test_losses_that_a_linear_head_does_not_take(loss):
    """They read logits, of which there are never all at once."""
    with pytest.raises(
        (TypeError, AttributeError), match=r"linear head.*losses of the softmax family.*mlkernels\.softmax_loss"
    ):
        linear_softmax_loss(X, W, Y, loss=loss)


def test_errors_of_losses_pass_through_linear_heads():
    """What a loss refuses of its own arguments it refuses in a linear head, in the same words."""
    x, y, same = torch.linspace(-1, 1, 12).reshape(4, 3), torch.tensor([0, 2, 1, 0]), 0
    for words, error, call in (case.values for case in BAD_ARGUMENTS):
        # These calculate with the logits.
        if words[0] not in ("input", "target") and words[-1] not in ("(1,)", "(4, 3)"):
            found = []
            for attempt in (call, lambda x, y, call=call: linear_softmax_loss(x, torch.eye(3), y, loss=call)):
                with pytest.raises(error) as caught:
                    attempt(x, y)
                found.append(str(caught.value))
            assert found[0] == found[1]
            same += 1
    assert same > 200


@pytest.mark.parametrize("error, words, call", BAD, ids=[words for _, words, _ in BAD])
def test_bad_arguments(error, words, call):
    with pytest.raises(error, match=words):
        call()
