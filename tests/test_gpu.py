"""The whole property table on a GPU, on each backend there; and what only a GPU shows: graphs, streams,
synchronisation, 2^31 elements, copies under a flag, every form of every optimizer.

Nothing of this runs without one; ``bench/gpu.sh`` calls it where there is one.
"""

import copy
import gc
import re

import pytest
import torch
import torch.nn.functional as F
from table import BY_NAME, F64, FEW, LOSSES, check, draw, expected, leaves, placed, run
from test_multi_copy import bits, mixed
from test_snapshot import Network, kinds, same
from test_values import CAPPED, UNMASKED, check_everything, upstream_for

import mlkernels
from mlkernels.ops import multi_copy_
from mlkernels.schedule import Snapshot

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
#: exp2, quotient and root are approximations here. Triton's interpreter, given their errors (drawn at random, 2^-22 at
#: most each), is off by 7 units at most.
FACTOR = 32.0
#: Of float32 results that no closed formula's unit is known of: four times the worst (1.1e-5) seen so. A forgotten
#: rescaling or a class too many is off by percents.
EPS = 4e-5
#: What is smaller may be flushed to 0.
TINY = 1e-36
BACKENDS = [name for name in ("triton", "cuda") if mlkernels.available_backends()[name] is None]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each of ours in turn; its name is part of the test's."""
    return request.param


@pytest.fixture
def no_sync():
    """An error wherever the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def compare(loss, backend, *arguments, **keywords):
    check(loss, backend, *arguments, factor=FACTOR, device=DEVICE, **keywords)


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "form", "dtype"),
    # Each is a kernel or two to compile. float64 as tensors is test_capped_and_adjusted's.
    [(loss, form, torch.float32) for loss in LOSSES for form in loss.forms]
    + [(loss, "number", torch.float64) for loss in LOSSES],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_forms(loss, form, dtype, backend):
    input, target, params = draw(loss, form=form)
    reduction = {"number": "mean", "shared": "sum"}.get(form, "none")
    compare(loss, backend, input, target, params, dtype, upstream_for(reduction, len(target)), reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_everything(loss, reduction, backend):
    check_everything(loss, backend, reduction, check=compare)


def test_capped_and_adjusted(loss, backend):
    input, target, params = draw(loss, form=loss.forms[1], seed=2, **CAPPED)
    compare(loss, backend, input, target, params, F64, upstream_for("none", len(target)), reduction="none", **CAPPED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_half(loss, dtype, backend):
    kinds = tuple(k for k in UNMASKED if k != "confident40") if loss.draws == "cosines" else UNMASKED
    input, target, params = draw(loss, form="shared", exact=dtype, kinds=kinds)
    compare(loss, backend, input, target, params, dtype, upstream_for("none", len(target)), reduction="none")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=["bf16", "f32", "f64"])
@pytest.mark.parametrize(
    "classes", [1, 2, 3, 10, 100, 997, 1000, 4096, 8192, 16384, 16385, 50257, 128255, 128256, 300001]
)
@pytest.mark.parametrize("name", ["modulated", "two_scale_norm", "piecewise"])
def test_every_tile(name, classes, dtype, backend):
    """Each row of the table of sizes, against the float64 reference on the host: random, confident and wrong rows."""
    generator = torch.Generator().manual_seed(classes)
    rows = 5
    x = 3 * torch.randn(rows, classes, generator=generator)
    y = torch.randint(0, classes, (rows,), generator=generator)
    x[1, y[1]] += 30
    x[2, y[2]] -= 40
    x = x.to(dtype)
    loss = BY_NAME[name]
    params = {k: torch.tensor(v, dtype=torch.float32) for k, v in loss.params.items()}
    up = torch.tensor([1.5, -2.0, 0.5, 1.0, 3.0])
    wanted = run(loss, x.double(), y, placed(params, "cpu"), up.double(), reduction="none", backend="reference")
    on = (placed(v, DEVICE) for v in (x, y, params, up))
    found = placed(dict(enumerate(run(loss, *on, reduction="none", backend=backend))), "cpu")
    eps = EPS if dtype != torch.float64 else 1e-12
    # The head of "piecewise" is a logarithm near 1; the others keep the relative accuracy of tiny losses.
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=eps, atol=eps / 20 if name == "piecewise" else TINY)
    stored = 2**-8 if dtype == torch.bfloat16 else 0.0  # rounded once
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=eps + stored, atol=TINY)
    for key, gradient in found[2].items():  # float32
        torch.testing.assert_close(gradient.double(), wanted[2][key].double(), rtol=max(eps, 1e-6), atol=1e-12)


@pytest.mark.parametrize("loss", FEW, ids=str)
@pytest.mark.parametrize("shape", [(2, 19, 32, 48), (3, 300, 33), (2, 5000, 40)], ids=str)
def test_dense_layouts(loss, shape, backend):
    """(N, C, d1, ...): rows side by side, and channels_last; the gradient has the input's layout."""
    generator = torch.Generator().manual_seed(0)
    x = 0.5 * torch.randn(shape, generator=generator)
    y = torch.randint(0, shape[1], shape[:1] + shape[2:], generator=generator)
    params = loss.values("shared", y.reshape(-1), shape[1], dtype=torch.float32)
    params = {k: v.reshape(*y.shape, 1) if v.dim() == 2 and v.shape[-1] == 1 else v for k, v in params.items()}
    options = {"group": loss.group(y)} if loss.groups else {}
    up = torch.randn(y.shape, generator=generator)
    wanted = run(loss, x.double(), y, params, up, reduction="none", backend="reference", **options)
    layouts = [torch.contiguous_format] + ([torch.channels_last] if len(shape) == 4 else [])
    for layout in layouts:
        on = [placed(v, DEVICE) for v in (x.to(memory_format=layout), y, params, up)]
        value, grad, _ = run(loss, *on, reduction="none", backend=backend, **placed(options, DEVICE))
        assert grad.stride() == on[0].stride()
        # Of three thousand rows some are ill-conditioned: a cosine next to 1, a logarithm next to 0.
        torch.testing.assert_close(value.cpu().double(), wanted[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grad.cpu().double(), wanted[1], rtol=2e-3, atol=1e-9)


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [10, 1000, 20000])
@pytest.mark.parametrize("loss", FEW, ids=str)
def test_bits(loss, classes, backend):
    """Run to run; and a row's own whatever its batch."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(257, classes, device=DEVICE, generator=generator)
    y = torch.randint(0, classes, (257,), device=DEVICE, generator=generator)
    params = placed(loss.values("shared", y.cpu(), classes, dtype=torch.float32), DEVICE)
    group = placed(loss.group(y), DEVICE)

    def rows_of(index):
        own = {k: v[index] if v.shape == (257, 1) else v for k, v in params.items()}
        more = {} if group is None else {"group": group[index]}
        up = torch.linspace(-1, 2, 257, device=DEVICE)[index]
        return run(loss, x[index], y[index], own, up, reduction="none", backend=backend, **more)

    everything = torch.arange(257, device=DEVICE)
    first, second = rows_of(everything), rows_of(everything)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(first[2][k], second[2][k]) for k in first[2])
    some = torch.tensor([200, 3, 77], device=DEVICE)
    few = rows_of(some)
    assert torch.equal(few[0], first[0][some]) and torch.equal(few[1], first[1][some])


# ---- the host never waits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("loss", FEW, ids=str)
def test_no_synchronisation(loss, reduction, backend, no_sync):
    torch.cuda.set_sync_debug_mode("default")
    input, target, params = draw(loss, rows=6, form=loss.forms[-1])
    own = leaves(placed(params, DEVICE))
    options = {"group": loss.group(target)} if loss.groups else {}
    x, y = input.float().to(DEVICE).requires_grad_(), target.to(DEVICE)
    up = (torch.linspace(-1, 2, 6) if reduction == "none" else torch.tensor(1.5)).to(DEVICE)
    weight, options = torch.ones(6, device=DEVICE), placed(options, DEVICE)
    arguments = {
        "reduction": reduction,
        "weight": weight,
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "softcap": 9.0,
        "backend": backend,
    }
    torch.cuda.set_sync_debug_mode("error")
    loss(x, y, own, **arguments, **options).backward(up)


def test_bad_labels_leave_the_device_usable(backend):
    x = torch.randn(5, 6, device=DEVICE, requires_grad=True)
    y = torch.tensor([1, 6, -3, 2**40, 4], device=DEVICE)
    rows = mlkernels.focal_loss(x, y, reduction="none", backend=backend)
    rows.backward(torch.ones(5, device=DEVICE))
    assert rows.isnan().tolist() == x.grad.isnan().all(1).tolist() == [False, True, True, True, False]
    mlkernels.check_labels(True)
    try:
        with pytest.raises(IndexError, match="target 6 at row 1"):
            mlkernels.focal_loss(x, y, backend=backend)
    finally:
        mlkernels.check_labels(False)
    assert bool(mlkernels.focal_loss(x[[0, 4]], y[[0, 4]], backend=backend).isfinite())


@pytest.mark.parametrize("classes", [10, 1000, 20000])
@pytest.mark.parametrize("name", ["cross_entropy", "modulated", "arcface", "two_scale", "piecewise"])
def test_cuda_graph(name, classes, backend):
    """Captured once, replayed on new data, with an upstream gradient that is not 1."""
    loss = BY_NAME[name]
    x = torch.zeros(33, classes, device=DEVICE, requires_grad=True)
    y = torch.zeros(33, dtype=torch.long, device=DEVICE)
    params = placed(loss.values("number", y.cpu(), classes, dtype=torch.float32), DEVICE)
    up = torch.ones((), device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            x.grad = None
            loss(x, y, params, backend=backend).backward(up)
    torch.cuda.current_stream().wait_stream(stream)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(x, y, params, backend=backend)
        value.backward(up)
    for factor in (1.0, 0.3):
        new = torch.randn(33, classes).tanh()
        labels = torch.randint(0, classes, (33,))
        with torch.no_grad():
            x.copy_(new)
            y.copy_(labels)
            up.fill_(factor)
        graph.replay()
        wanted = run(loss, new.double(), labels, placed(params, "cpu"), factor, backend="reference")
        torch.testing.assert_close(value.cpu().double(), wanted[0], rtol=EPS, atol=EPS / 20)
        torch.testing.assert_close(x.grad.cpu().double(), wanted[1], rtol=3 * EPS, atol=1e-12)


def test_streams(backend):
    """Two streams at once, each with its own result."""
    x = [torch.randn(512, 3000, device=DEVICE) for _ in range(2)]
    y = torch.randint(0, 3000, (512,), device=DEVICE)
    wanted = [F.cross_entropy(a.double(), y) for a in x]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for a, stream in zip(x, streams, strict=True):
        with torch.cuda.stream(stream):
            found.append(mlkernels.cross_entropy(a, y, backend=backend))
    torch.cuda.synchronize()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device_than_the_current_one(backend):
    x, y = torch.randn(5, 7, device="cuda:1", requires_grad=True), torch.arange(5, device="cuda:1")
    mlkernels.focal_loss(x, y, backend=backend).backward()
    assert x.grad.device == x.device and torch.cuda.current_device() == 0


@pytest.mark.parametrize("loss", FEW, ids=str)
def test_compiled(loss, backend):
    """One graph under torch.compile, the same numbers as in eager mode, and trained numbers do not compile again."""
    torch._dynamo.reset()
    input, target, params = draw(loss, rows=8, form="shared")
    options = placed({"group": loss.group(target)} if loss.groups else {}, DEVICE) | {"backend": backend}
    compiled = torch.compile(lambda x, y, own: loss(2 * x, y, own, **options), fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(4):
            found = []
            for function in (compiled, lambda x, y, own: loss(2 * x, y, own, **options)):
                x, own = input.float().to(DEVICE).requires_grad_(), leaves(placed(params, DEVICE), torch.float32)
                with torch.no_grad():
                    for value in own.values():
                        value.mul_(1 - 0.01 * step)
                value = function(x, target.to(DEVICE), own)
                value.backward(torch.tensor(1.5, device=DEVICE))
                found.append((value.detach(), x.grad, {k: v.grad for k, v in own.items()}))
            torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
            for key, gradient in found[0][2].items():
                torch.testing.assert_close(gradient, found[1][2][key], rtol=1e-4, atol=1e-5)


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cross_entropy", "modulated", "two_scale"])
def test_a_grad_scaler(name, backend):
    """float16 under an upstream gradient of 65536: as accurate as float32 rounded once."""
    loss = BY_NAME[name]
    x = (2 * torch.randn(64, 1000)).half()
    y = torch.randint(0, 1000, (64,))
    params = loss.values("number", y, 1000, dtype=torch.float32)
    found = run(loss, x.to(DEVICE), y.to(DEVICE), params, 65536.0, backend=backend)[1].cpu().double()
    wanted = run(loss, x.double(), y, params, 65536.0, backend="reference")[1]
    # Half a unit in the last place, of subnormal numbers too.
    torch.testing.assert_close(found, wanted, rtol=2**-11 + EPS, atol=2**-25)


def test_autocast(backend):
    x = torch.randn(8, 16, device=DEVICE, requires_grad=True)
    w = torch.randn(10, 16, device=DEVICE, requires_grad=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = F.linear(x, w)
        value = mlkernels.focal_loss(logits, torch.arange(8, device=DEVICE), backend=backend)
    assert logits.dtype == torch.bfloat16 and value.dtype == torch.float32
    value.backward()
    assert x.grad.dtype == torch.float32 and bool(x.grad.isfinite().all())


def test_confident_rows_against_eager(backend):
    """bfloat16 rows of p = .999: no further from float64 than eager torch is."""
    x = torch.randn(64, 1000)
    y = torch.randint(0, 1000, (64,))
    x[torch.arange(64), y] = 14.5
    x = x.bfloat16()
    wanted = run(BY_NAME["cross_entropy"], x.double(), y, {"scale": 1.0}, 1.5, backend="reference")[1]
    on = x.to(DEVICE), y.to(DEVICE)
    ours = run(BY_NAME["cross_entropy"], *on, {"scale": 1.0}, 1.5, backend=backend)[1].cpu().double()
    z = x.to(DEVICE).requires_grad_()
    (1.5 * F.cross_entropy(z, y.to(DEVICE))).backward()
    error = lambda g: float((g - wanted).norm() / wanted.norm())
    assert error(ours) <= 1.01 * error(z.grad.cpu().double())


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2**20 + 3, 2051), (16400, 131072 + 1), (9, 19, 4096, 4096)], ids=str)
def test_more_than_int32_elements(shape, backend):
    """The last rows of more than 2^31 elements are what they are alone."""
    elements = torch.Size(shape).numel()
    assert elements > 2**31
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 2 * 2 * elements + 2**31:
        pytest.skip(f"needs {4 * elements / 2**30:.0f} GiB")
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    for part in x.split(max(1, shape[0] // 8)):
        part.normal_()
    x.requires_grad_()
    y = torch.randint(0, shape[1], shape[:1] + shape[2:], device=DEVICE)
    rows = mlkernels.modulated_cross_entropy(x, y, reduction="none", backend=backend)
    rows.backward(torch.ones((), device=DEVICE).expand(rows.shape))
    with torch.no_grad():
        last = x[-1:].clone()
    last.requires_grad_()
    alone = mlkernels.modulated_cross_entropy(last, y[-1:], reduction="none", backend=backend)
    alone.backward(torch.ones_like(alone))
    assert torch.equal(alone, rows[-1:]) and torch.equal(last.grad, x.grad[-1:])
    wanted = F.cross_entropy(last.detach().float(), y[-1:], reduction="none")
    p = torch.exp(-wanted)
    torch.testing.assert_close(alone.detach(), (1 - p**4) ** 5 * wanted, rtol=1e-4, atol=1e-6)


def test_the_oracle_is_not_the_reference():
    """The table's wanted numbers are the closed formulas' own."""
    input, target, params = draw(BY_NAME["modulated"])
    wanted = expected(BY_NAME["modulated"], input, target, params, reduction="none")
    assert len(wanted.loss) == len(target)


# ---- copies and snapshots --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [None, True, False])
def test_copies_all_or_none(flag):
    """More tensors than one launch takes, of many dtypes and layouts; the two ends of a pair aligned alike or not."""
    pairs = [[t.to(DEVICE) for t in mixed(seed)] for seed in (0, 1)]
    sizes = [k * k % 97 for k in range(1200)]
    for k, tensors in enumerate(pairs):
        for shift in (0, 1 + k, 4 * k, 16 * k):  # alike, apart, to 4 bytes, to 16
            memory = torch.full((sum(sizes) + shift,), k, dtype=torch.uint8, device=DEVICE)
            tensors += memory[shift:].split(sizes)
    dst, src = pairs
    before, wanted = [bits(t) for t in dst], [bits(t) for t in src]
    on_device = None if flag is None else torch.tensor(flag, device=DEVICE)
    multi_copy_(dst, src, on_device)
    for old, new, t in zip(before, wanted, dst, strict=True):
        assert torch.equal(bits(t), old if flag is False else new)
    assert all(torch.equal(bits(t), w) for t, w in zip(src, wanted, strict=True))


def test_a_copy_in_a_graph_follows_the_flag(no_sync):
    torch.cuda.set_sync_debug_mode("default")
    dst, src = ([torch.full((k,), value, device=DEVICE) for k in range(1, 50)] for value in (0.0, 1.0))
    flag = torch.tensor(False, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        multi_copy_(dst, src, flag)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        multi_copy_(dst, src, flag)
    graph.replay()
    assert all(float(t.sum()) == 0 for t in dst)
    flag.fill_(True)
    torch.cuda.set_sync_debug_mode("error")
    graph.replay()
    multi_copy_(dst, src, flag)  # nor does the call itself wait
    torch.cuda.set_sync_debug_mode("default")
    assert all(bool((t == 1).all()) for t in dst)


def forms():
    """Every optimizer in every form that its signature offers."""
    found = []
    for name, options, offered in kinds():
        own = [{"foreach": False}, {"foreach": True}] if "foreach" in offered else [{}]
        if "capturable" in offered:
            own += [{**form, "capturable": True} for form in own]
            if "lr" in options:
                own.append({"capturable": True, "lr": torch.tensor(0.01)})
        if "fused" in offered:
            own.append({"fused": True})
        found += [(name, {**options, **form}) for form in own]
    return found


def form_id(value):
    if isinstance(value, dict):
        names = [name for name in ("foreach", "fused", "capturable") if value.get(name)]
        return "-".join(names + ["tensor_lr"] * isinstance(value.get("lr"), torch.Tensor)) or "plain"
    return None


#: What torch says of forms that it has not, on a device or at all; whatever else it says is a fault.
NO_SUCH_FORM = r"Could not run 'aten::_fused_|`fused=True` requires|as a Tensor is not supported"


def made(name, options):
    """A run that has made a step; skipped where torch has no such form."""
    try:
        run = Run(name, options)
        run.step(0)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        if not re.search(NO_SUCH_FORM, str(error)):
            raise
        pytest.skip(f"torch has no such form on a GPU: {str(error).splitlines()[0][:100]}")
    return run


class Run:
    """A model, its optimizer and steps on data that the step's number gives."""

    def __init__(self, name, options):
        torch.manual_seed(1)
        self.model = Network(sparse=name == "SparseAdam", biases=name != "Muon").to(DEVICE)
        parameters = self.model.embedding.parameters() if name == "SparseAdam" else self.model.parameters()
        self.optimizer = getattr(torch.optim, name)(parameters, **placed(options, DEVICE))

    def step(self, number):
        torch.manual_seed(number)
        input = torch.randint(12, (8,), device=DEVICE)

        def closure():
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(input), input)
            loss.backward()
            return loss

        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.optimizer.step(closure)
        else:
            closure()
            self.optimizer.step()

    def state(self):
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))


@pytest.mark.parametrize("before", [0, 2], ids=["unborn", "born"])
@pytest.mark.parametrize(("name", "options"), forms(), ids=form_id)
def test_snapshot_of_every_optimizer(name, options, before):
    made(name, options)
    run = Run(name, options)
    for number in range(before):
        run.step(number)
    snapshot = Snapshot(run.model, run.optimizer)
    snapshot.save()
    saved, addresses = run.state(), [p.data_ptr() for p in run.model.parameters()]
    for _ in range(2):
        run.step(7)
        run.step(8)
        assert not same(run.state(), saved)
        snapshot.restore()
        assert same(run.state(), saved)
    assert [p.data_ptr() for p in run.model.parameters()] == addresses
    other = Run(name, options)
    for number in range(before):
        other.step(number)
    for one in (run, other):
        one.step(9)
    assert same(run.model.state_dict(), other.model.state_dict())  # as if it had never been tried


@pytest.mark.parametrize("reject", [True, False])
@pytest.mark.parametrize(
    ("name", "options"), [one for one in forms() if one[0] not in ("LBFGS", "SparseAdam")], ids=form_id
)
def test_a_flag_on_the_device_decides(name, options, reject, no_sync):
    torch.cuda.set_sync_debug_mode("default")
    run = made(name, options)
    layers = torch.nn.ModuleList([run.model.embedding, run.model.inner, run.model.norm, run.model.classifier])
    snapshot = Snapshot(layers, run.optimizer)
    snapshot.save()
    saved = run.state()
    run.step(1)
    stepped, flag = run.state(), torch.tensor(reject, device=DEVICE)
    for model, _ in (saved, stepped):
        model.pop("seen")  # rebound at each step: about that a flag cannot decide
    assert not same(saved, stepped)
    # A step counter on the host is the one thing that makes it wait.
    tensors = [t for state in run.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    if all(t.is_cuda for t in tensors):
        torch.cuda.set_sync_debug_mode("error")
    snapshot.restore_if(flag)
    torch.cuda.set_sync_debug_mode("default")
    now = run.state()
    now[0].pop("seen")
    assert same(now, saved if reject else stepped)
