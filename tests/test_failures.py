"""The twelve ways in which published implementations of these losses have failed, each as a test.

1  gradients that are right only for an upstream of 1           7  labels out of range
2  row statistics in low precision                              8  host synchronisations, graph breaks
3  1 - exp(difference); gamma < 1 at p = 1                      9  a running maximum that starts at 0; swallowed NaN
4  acos and sqrt at cos = 1                                    10  strides
5  32-bit offsets                                              11  what "zero" gradients and rollbacks do to optimizers
6  ignored rows                                                12  the meaning of "mean"
"""

import math
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from oracle import TABLES
from table import BY_NAME, F64, FEW, INF, NAN, draw, expected, run

import mlkernels


@pytest.mark.parametrize("loss", FEW, ids=str)
def test_1_upstream_gradients_differ_by_row(loss, backend):
    """A row's gradient scales with its own upstream, a parameter's is the sum of the rows'."""
    input, target, params = draw(loss, rows=5, form="shared", kinds=("random",))
    options = {"reduction": "none", "backend": backend} | ({"group": loss.group(target)} if loss.groups else {})
    up = torch.tensor([0.0, -3.0, 0.25, 7.0, 1.5], dtype=F64)
    _, unit, _ = run(loss, input, target, params, torch.ones(5), **options)
    _, grad, by_param = run(loss, input, target, params, up, **options)
    torch.testing.assert_close(grad, up[:, None] * unit, rtol=1e-12, atol=1e-15)
    for name, found in by_param.items():
        total = torch.zeros_like(found)
        for i in range(5):
            one = torch.zeros(5, dtype=F64)
            one[i] = 1.0
            total += up[i] * run(loss, input, target, params, one, **options)[2][name]
        torch.testing.assert_close(found, total, rtol=1e-10, atol=1e-12)


def test_2_half_rows_at_p_999(backend):
    """See test_precision.py; here the plainest case: a bfloat16 row at p = .999, gradient 100 % off elsewhere."""
    logits = torch.zeros(1, 8)
    logits[0, 0] = 8.875
    x = logits.bfloat16().requires_grad_()
    mlkernels.cross_entropy(x, torch.tensor([0]), backend=backend).backward()
    rest = 7 * math.exp(-8.875)
    assert float(x.grad[0, 0]) == pytest.approx(-rest / (1 + rest), rel=2**-8)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("lead", [30.0, 60.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_3_focal_at_p_1(backend, gamma, lead, dtype):
    """(1 - p)^gamma at p = 1: x^(gamma - 1) is infinite for gamma < 1, and 1 - exp(.) has no digits left."""
    input = torch.tensor([[lead, 0.0, -1.0]], dtype=dtype)
    g = torch.tensor(gamma, dtype=dtype, requires_grad=True)
    x = input.clone().requires_grad_()
    loss = mlkernels.focal_loss(x, torch.tensor([0]), gamma=g, backend=backend)
    (2 * loss).backward()
    wanted = expected(BY_NAME["focal_2"], input, torch.tensor([0]), {"gamma": gamma}, upstream=2.0)
    tiny = 100 * torch.finfo(dtype).tiny
    torch.testing.assert_close(loss.detach().double(), torch.as_tensor(wanted.loss), rtol=1e-4, atol=tiny)
    torch.testing.assert_close(x.grad.double(), torch.as_tensor(wanted.grad), rtol=1e-4, atol=tiny)
    assert bool(g.grad.isfinite())


@pytest.mark.parametrize("x", [1.0, -1.0, 1.0000005, -1.0000005])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["arcface", "cosface", "margin", "margin_none"])
def test_4_margins_at_cosine_1(name, dtype, x, backend):
    """Finite, and at s = 64 within fp16's range."""
    input = torch.tensor([[x, 0.3, -0.2], [0.1, 0.2, x]]).to(dtype)
    loss = BY_NAME[name]
    value, grad, _ = run(loss, input, torch.tensor([0, 2]), dict(loss.params), torch.tensor([1.0, -0.5]),
                         reduction="none", backend=backend)  # fmt: skip
    assert bool(value.isfinite().all())
    assert bool(grad.isfinite().all())
    assert bool((grad != 0).any() or dtype == torch.float16)


# ---- 5: offsets ------------------------------------------------------------------------------------------------------

FAR = 2**30 + 7  # elements: three rows of this stride pass 2^31


@pytest.fixture
def far_apart():
    """Elements up to 2^31 and more apart in address space that is reserved, not used."""
    try:
        flat = torch.empty(2 * FAR + 64, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("4 GiB of address space cannot be had")
    return flat


def test_5_rows_beyond_int32(backend, far_apart):
    rows = torch.as_strided(far_apart, (3, 7), (FAR, 1))
    values = torch.linspace(-2, 2, 21).reshape(3, 7).bfloat16()
    rows.copy_(values)
    target = torch.tensor([1, 3, 6])
    up = torch.tensor([1.0, -2.0, 0.5])
    wanted = run(BY_NAME["modulated"], values, target, {}, up, reduction="none", backend=backend)
    x = rows.requires_grad_()
    loss = mlkernels.modulated_cross_entropy(x, target, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(loss, x, up)
    assert torch.equal(loss.detach(), wanted[0])
    assert torch.equal(grad, wanted[1])
    assert grad.untyped_storage().nbytes() < 2**20  # dense: not laid out like the input


def test_5_classes_beyond_int32(backend, far_apart):
    x = torch.as_strided(far_apart, (1, 3, 2), (3 * FAR - 2, FAR, 1))
    values = torch.tensor([[[1.0, -1.0], [0.5, 0.25], [2.0, -0.5]]]).bfloat16()
    x.copy_(values)
    target = torch.tensor([[2, 0]])
    found = mlkernels.cross_entropy(x, target, reduction="none", backend=backend)
    torch.testing.assert_close(found, F.cross_entropy(values.float(), target, reduction="none"))


# ---- 6: ignored rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label", [-100, -1, 255])
def test_6_ignored_rows(backend, reduction, label):
    """The label is compared before it is used as an index; the row's weight does not count in the mean."""
    input = torch.randn(5, 4, dtype=F64)
    target = torch.tensor([0, label, 3, label, 1])
    weight = torch.tensor([1.0, 100.0, 2.0, 0.5], dtype=F64)
    x, y = input.clone().requires_grad_(), input.clone().requires_grad_()
    x.data[1], x.data[3] = NAN, INF
    options = {"weight": weight, "ignore_index": label, "reduction": reduction, "label_smoothing": 0.1}
    ours = mlkernels.cross_entropy(x, target, backend=backend, **options)
    theirs = F.cross_entropy(y, target, **options)
    torch.testing.assert_close(ours, theirs)
    (3 * ours.sum()).backward()
    (3 * theirs.sum()).backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert not x.grad[[1, 3]].any()


# ---- 7: bad labels ---------------------------------------------------------------------------------------------------


def test_7_bad_labels_are_neither_silent_nor_fatal(backend):
    for bad in (4, 5, -1, 10**12):
        with pytest.raises(IndexError, match=f"target {bad} at row 2"):
            mlkernels.cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1, bad]), backend=backend)
    assert float(mlkernels.cross_entropy(torch.zeros(1, 4), torch.tensor([3]), backend=backend)) > 1


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_7_where_labels_cannot_be_looked_at_the_row_is_nan(loss, reduction):
    """Under torch.func, as on a GPU: NaN in its loss and gradient, the other rows as ever."""
    input, target, params = draw(loss, rows=4, kinds=("random",))
    options = {"group": loss.group(target)} if loss.groups else {}
    bad = target.clone()
    bad[1], bad[2] = 6, -3
    function = lambda x, y: loss(x, y, params, reduction=reduction, **options)
    value, pull = torch.func.vjp(lambda x: function(x, bad), input)
    (grad,) = pull(torch.ones_like(value))
    good, good_pull = torch.func.vjp(lambda x: function(x, target), input)
    (good_grad,) = good_pull(torch.ones_like(good))
    assert bool(grad[1:3].isnan().any(1).all())
    assert torch.equal(grad[[0, 3]], good_grad[[0, 3]])
    if reduction == "none":
        assert value.isnan().tolist() == [False, True, True, False]
        assert torch.equal(value[[0, 3]], good[[0, 3]])
    else:
        assert bool(value.isnan())


# ---- 9: maxima -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [-1e4, -1e30, -3e38])
def test_9_rows_far_below_zero(backend, level):
    """A maximum that starts at 0 leaves exp(level) = 0."""
    input = torch.full((2, 5), level)
    x = input.requires_grad_()
    loss = mlkernels.cross_entropy(x, torch.tensor([0, 4]), reduction="none", backend=backend)
    torch.testing.assert_close(loss, torch.full((2,), math.log(5.0)))
    loss.sum().backward()
    assert float(x.grad[0, 0]) == pytest.approx(-0.8)


def test_9_the_runner_up_excludes_the_target_and_starts_below_everything(backend):
    input = torch.tensor([[-5.0, -9.0, -7.0]])
    _, rows = mlkernels.softmax_loss(input, torch.tensor([0]), return_stats=True, backend=backend)
    assert float(rows.confidence) == 2.0
    _, rows = mlkernels.softmax_loss(input[:, :1], torch.tensor([0]), return_stats=True, backend=backend)
    assert float(rows.confidence) == INF
    assert float(rows.log_prob) == 0.0


@pytest.mark.parametrize("position", range(6))
@pytest.mark.parametrize("classes", [6, 67])
def test_9_nan_survives_the_maximum(backend, position, classes):
    """Wherever it stands: vector lanes and their tails compare differently."""
    x = torch.randn(3, classes)
    x[1, (position * 13) % classes] = NAN
    loss = mlkernels.cross_entropy(x, torch.tensor([0, 1, 2]), reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, False]


def test_9_rows_of_nothing_but_minus_infinity(backend):
    x = torch.full((2, 4), -INF)
    x[1] = 0.0
    x.requires_grad_()
    loss = mlkernels.cross_entropy(x, torch.tensor([0, 0]), reduction="none", backend=backend)
    loss.sum().backward()
    assert loss.isnan().tolist() == [True, False]
    assert x.grad.isnan().any(1).tolist() == [True, False]


@pytest.mark.parametrize("which", [0, 2], ids=["logsumexp", "entropy"])
@pytest.mark.parametrize("classes", [4, 20001])
def test_9_a_target_without_a_chance_is_no_part_of_statistics(backend, which, classes):
    """Their gradient by a scale is that without its class: no 0 * inf, where only the loss has -log 0."""
    drawn = torch.randn(2, classes, dtype=F64)
    target = torch.tensor([1, classes - 1])
    found = []
    for others in (True, False):
        x, scale = drawn.clone(), torch.tensor(0.7, dtype=F64, requires_grad=True)
        if others:
            x = torch.stack([row[torch.arange(classes) != y] for row, y in zip(x, target, strict=True)])
        else:
            x[range(2), target] = -INF
        x.requires_grad_()
        rows = target * 0 if others else target
        name = "reference" if others else backend
        _, stats = mlkernels.softmax_loss(x, rows, scale=scale, reduction="none", return_stats=True, backend=name)
        by_scale, by_input = torch.autograd.grad(stats[which].sum(), [scale, x])
        assert others or not by_input[range(2), target].any()
        found.append(by_scale)
    assert math.isclose(*map(float, found), rel_tol=1e-9), found


NAN_ROWS = {
    "another": lambda row, y: row.__setitem__((y + 1) % len(row), NAN),
    "impossible": lambda row, y: row.fill_(-INF),
}


@pytest.mark.parametrize("kind", NAN_ROWS)
def test_9_parameters_of_a_nan_row(loss, backend, kind):
    """Each has a gradient of NaN: which scale or bin is such a row's nobody knows."""
    form = "row" if "row" in loss.forms else "shared"
    input, target, params = draw(loss, rows=4, form=form, kinds=("random",))
    NAN_ROWS[kind](input[1], int(target[1]))
    options = {"group": loss.group(target)} if loss.groups else {}
    value, grad, by_param = run(
        loss, input, target, params, torch.tensor([2.0, 1.0, 0.5, -1.0]), reduction="none", backend=backend, **options
    )
    assert value.isnan().tolist() == grad.isnan().all(1).tolist() == [False, True, False, False]
    for name, found in by_param.items():
        wanted = torch.zeros_like(found, dtype=torch.bool)
        if name in TABLES:
            wanted.view(-1, found.shape[-1])[1 if loss.groups else 0, 0] = True
        else:
            wanted[1 if found.dim() else ...] = True
        assert torch.equal(found.isnan(), wanted), name


# ---- 10: strides -----------------------------------------------------------------------------------------------------


def test_10_strided_inputs_and_expanded_upstreams(backend):
    """See test_layouts.py; here the two that were got wrong: a transposed view, and sum()'s stride-0 gradient."""
    base = torch.randn(7, 5, dtype=F64)
    target = torch.arange(5) % 7
    x, y = base.t().requires_grad_(), base.t().contiguous().requires_grad_()
    mlkernels.focal_loss(x, target, reduction="none", backend=backend).sum().backward()
    mlkernels.focal_loss(y, target, reduction="none", backend=backend).backward(torch.ones(5, dtype=F64))
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-14, atol=0)


# ---- 12: mean --------------------------------------------------------------------------------------------------------


def test_12_mean_is_torchs(backend):
    input, target = torch.randn(6, 3, 2, dtype=F64), torch.randint(0, 3, (6, 2))
    target[0, 0] = -100
    weight = torch.tensor([0.2, 3.0, 1.0], dtype=F64)
    ours = mlkernels.cross_entropy(input, target, weight=weight, backend=backend)
    torch.testing.assert_close(ours, F.cross_entropy(input, target, weight))


# ---- the process -----------------------------------------------------------------------------------------------------


def test_importing_keeps_subnormals_and_threads():
    """A library linked with -ffast-math sets flush-to-zero for the whole process when it loads."""
    program = """
        import warnings; warnings.simplefilter("ignore")
        import torch
        threads = torch.get_num_threads()
        import mlkernels
        tiny = torch.tensor([1e-40])
        x = torch.zeros(2, 3, requires_grad=True)
        mlkernels.modulated_cross_entropy(x, torch.tensor([0, 1])).backward()
        assert float(tiny * 0.5) > 0, "subnormals are flushed"
        assert 5e-324 > 0 and 2.2250738585072014e-308 / 4 > 0
        assert torch.get_num_threads() == threads
        assert not torch.is_autocast_enabled() and torch.get_default_dtype() == torch.float32
        print("ok")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "ok", result.stderr


def test_subnormal_gradients(backend):
    """What is subnormal in the result is returned, not flushed."""
    x = torch.tensor([[90.0, 0.0]], requires_grad=True)  # e^-90 = 8e-40
    mlkernels.cross_entropy(x, torch.tensor([0]), backend=backend).backward()
    assert float(x.grad[0, 1]) == pytest.approx(math.exp(-90.0), rel=1e-3)
