"""The L-GM loss against its formulas, row by row and class by class."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mlkernels
from mlkernels import lgm

F64 = torch.float64
N, C, D = 7, 4, 3


def draw(dtype=F64, offset=0.0):
    x = torch.randn(N, D, dtype=F64) + offset
    means = torch.randn(C, D, dtype=F64) + offset
    log_variance = 0.5 * torch.randn(C, D, dtype=F64)
    weight = torch.rand(C, dtype=F64) + 0.5
    target = torch.tensor([0, 3, -100, 1, 2, 2, 0])
    return x.to(dtype), target, means.to(dtype), log_variance.to(dtype), weight


def oracle(x, target, means, log_variance, alpha, lambda_, weight=None, smoothing=0.0, reduction="mean"):
    """The loss in scalars: one Gaussian at a time."""
    rows, weights = [], []
    for i, y in enumerate(target.tolist()):
        if y == -100:
            rows.append(x.new_zeros(()))
            continue
        distance, half_log_det, z = [], [], []
        for k in range(means.shape[0]):
            d = g = 0.0
            for j in range(x.shape[1]):
                log_var = 0.0 if log_variance is None else log_variance[k, j]
                variance = math.exp(log_var) if isinstance(log_var, float) else torch.exp(log_var)
                d = d + 0.5 * (x[i, j] - means[k, j]) ** 2 / variance
                g = g + 0.5 * log_var
            distance.append(d)
            half_log_det.append(g)
            z.append(-(1 + alpha if k == y else 1) * d - g)
        lse = torch.logsumexp(torch.stack(z), 0)
        omega = [1.0] * len(z) if weight is None else weight.tolist()
        smooth = sum(w * (lse - zj) for w, zj in zip(omega, z, strict=True)) / len(z)
        loss = (1 - smoothing) * omega[y] * (lse - z[y]) + smoothing * smooth
        rows.append(loss + lambda_ * omega[y] * (distance[y] + half_log_det[y]))
        weights.append(omega[y])
    rows = torch.stack(rows)
    return rows if reduction == "none" else rows.sum() / (sum(weights) if reduction == "mean" else 1)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("weighted", "smoothing"), [(False, 0.0), (True, 0.0), (True, 0.2)])
def test_values_and_gradients(diagonal, reduction, weighted, smoothing):
    x, target, means, log_variance, weight = draw()
    leaves = [x.requires_grad_(), means.requires_grad_()] + ([log_variance.requires_grad_()] if diagonal else [])
    log_variance = log_variance if diagonal else None
    weight = weight if weighted else None
    found = mlkernels.lgm_loss(
        x,
        target,
        means,
        log_variance=log_variance,
        alpha=0.3,
        lambda_=0.7,
        weight=weight,
        label_smoothing=smoothing,
        reduction=reduction,
    )
    wanted = oracle(x, target, means, log_variance, 0.3, 0.7, weight, smoothing, reduction)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(found)
    got = torch.autograd.grad(found, leaves, upstream)
    for gradient, expected in zip(got, torch.autograd.grad(wanted, leaves, upstream), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


def test_the_margin_can_be_trained():
    x, target, means, log_variance, _ = draw()
    alpha = torch.tensor(0.4, dtype=F64, requires_grad=True)
    (3 * mlkernels.lgm_loss(x, target, means, log_variance=log_variance, alpha=alpha)).backward()
    step = 1e-6
    up = oracle(x, target, means, log_variance, 0.4 + step, 0.1)
    down = oracle(x, target, means, log_variance, 0.4 - step, 0.1)
    assert alpha.grad.item() == pytest.approx(3 * (up - down).item() / (2 * step), rel=1e-6)


def test_twice_differentiable():
    x, target, means, log_variance, _ = draw()
    leaves = (x.requires_grad_(), means.requires_grad_(), log_variance.requires_grad_())
    assert torch.autograd.gradgradcheck(
        lambda x, m, v: 1.7 * mlkernels.lgm_loss(x, target, m, log_variance=v, alpha=0.2, lambda_=0.3, reduction="sum"),
        leaves,
    )


@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1.0), (100.0, 1.0), (0.0, 100.0)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_float32_keeps_small_distances(diagonal, offset, spread):
    """Rows close to their means, far from the origin or each other: a GEMM alone returns a wrong distance there."""
    x, target, means, log_variance, _ = draw(torch.float32, offset)
    with torch.no_grad():
        means *= spread
        kept = target != -100
        x[kept] = means[target[kept]] + 0.01 * torch.randn(int(kept.sum()), D)
    x.requires_grad_()
    log_variance = log_variance if diagonal else None
    wide = [None if t is None else t.detach().double() for t in (x, means, log_variance)]
    wide[0].requires_grad_()
    found = mlkernels.lgm_loss(x, target, means, log_variance=log_variance, alpha=0.1, lambda_=1.0, reduction="none")
    wanted = oracle(wide[0], target, wide[1], wide[2], 0.1, 1.0, reduction="none")
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-6)
    found.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(x.grad.double(), wide[0].grad, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(dtype):
    x, target, means, log_variance, _ = draw(dtype)
    x.requires_grad_()
    parameter = means.float().requires_grad_()
    loss = mlkernels.lgm_loss(x, target, parameter, log_variance=log_variance)
    assert loss.dtype == torch.float32
    loss.backward()
    assert (x.grad.dtype, parameter.grad.dtype) == (dtype, torch.float32)
    wanted = oracle(x.detach().double(), target, parameter.detach().double(), log_variance.double(), 0.1, 0.1)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_autocast_changes_nothing():
    x, target, means, log_variance, _ = draw(torch.float32)
    plain = mlkernels.lgm_loss(x, target, means, log_variance=log_variance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mlkernels.lgm_loss(x, target, means, log_variance=log_variance), plain)


def test_ignored_rows_are_not_read():
    x, target, means, log_variance, weight = draw()
    x[2] = math.nan
    leaves = [t.requires_grad_() for t in (x, means, log_variance)]
    loss = mlkernels.lgm_loss(x, target, means, log_variance=log_variance, alpha=0.2, lambda_=0.5, weight=weight)
    kept = target != -100
    alone = mlkernels.lgm_loss(
        x[kept].detach(), target[kept], means, log_variance=log_variance, alpha=0.2, lambda_=0.5, weight=weight
    )
    torch.testing.assert_close(loss, alone)
    (2.5 * loss).backward()
    assert torch.equal(x.grad[2], torch.zeros(D, dtype=F64))
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    rows = mlkernels.lgm_loss(x, target, means, log_variance=log_variance, reduction="none")
    assert rows[2] == 0


def test_a_nan_stays_in_its_row():
    x, target, means, _, _ = draw()
    clean = mlkernels.lgm_loss(x, target, means, reduction="none")
    x[3, 1] = math.nan
    rows = mlkernels.lgm_loss(x, target, means, reduction="none")
    assert rows[3].isnan()
    rest = torch.arange(N) != 3
    assert torch.equal(rows[rest], clean[rest])


@pytest.mark.parametrize("weighted", [False, True])
def test_all_ignored(weighted):
    x, target, means, log_variance, weight = draw()
    target = torch.full_like(target, -100)
    leaves = [t.requires_grad_() for t in (x, means, log_variance)]
    for reduction in ("mean", "sum"):
        options = {"weight": weight if weighted else None, "reduction": reduction}
        loss = mlkernels.lgm_loss(x, target, means, log_variance=log_variance, **options)
        assert loss.isnan() if reduction == "mean" else loss == 0
        for gradient in torch.autograd.grad(2.5 * loss, leaves):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_no_rows():
    x = torch.zeros(0, D, requires_grad=True)
    means = torch.randn(C, D, requires_grad=True)
    target = torch.zeros(0, dtype=torch.long)
    assert mlkernels.lgm_loss(x, target, means).isnan()
    assert mlkernels.lgm_loss(x, target, means, reduction="none").shape == (0,)
    mlkernels.lgm_loss(x, target, means, reduction="sum").backward()
    assert torch.equal(means.grad, torch.zeros(C, D))


def test_one_class_is_certain():
    x = torch.randn(3, D)
    loss = mlkernels.lgm_loss(x, torch.zeros(3, dtype=torch.int32), x[:1].clone(), lambda_=0.0)
    assert loss == 0


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // max(tensor.element_size(), 1))
        return out


def test_never_rows_times_classes_times_features():
    n, c, d = 40, 30, 20
    x, means = torch.randn(n, d, requires_grad=True), torch.randn(c, d, requires_grad=True)
    log_variance = torch.zeros(c, d, requires_grad=True)
    with _Largest() as largest:
        mlkernels.lgm_loss(x, torch.randint(c, (n,)), means, log_variance=log_variance).backward()
    assert 0 < largest.numel <= max(n * c, 2 * n * d, 2 * c * d)


def test_inputs_are_left_alone():
    x, target, means, log_variance, weight = draw()
    before = [t.clone() for t in (x, target, means, log_variance, weight)]
    x.requires_grad_()
    mlkernels.lgm_loss(x, target, means, log_variance=log_variance, weight=weight).backward()
    for tensor, copy in zip((x.detach(), target, means, log_variance, weight), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("diagonal", [False, True])
def test_kept_memory_changes_no_bit(diagonal, kept_memory):
    """What large calls do in place, and twice differentiable, batched and retained all the same."""
    torch.default_generator.manual_seed(0)
    means = torch.randn(9, 4).requires_grad_()
    x = (1e3 * torch.randn(7, 4)).requires_grad_()
    with torch.no_grad():
        x[:5] = means[:5]  # distances around 0, some of them below
    target = torch.tensor([0, 1, 2, 3, 4, 8, -100])
    log_variance = (0.1 * torch.randn(9, 4)).requires_grad_() if diagonal else None
    leaves = [x, means, *([log_variance] if diagonal else [])]

    def go():
        loss = mlkernels.lgm_loss(x, target, means, log_variance=log_variance, reduction="none")
        first = torch.autograd.grad(loss, leaves, torch.linspace(0.5, 2, 7), retain_graph=True)
        batch = torch.autograd.grad(loss, leaves, torch.eye(7), is_grads_batched=True, retain_graph=True)
        twice = torch.autograd.grad(loss.sum(), x, create_graph=True)[0].square().sum()
        return loss.detach(), *first, *batch, *torch.autograd.grad(twice, leaves)

    assert kept_memory(go) == 4  # logits, what was clamped, and the gradient twice
    x64, m64 = x.detach()[5:].double().requires_grad_(), means.detach().double().requires_grad_()
    of_leaves = lambda x, m: mlkernels.lgm_loss(1e-3 * x, target[4:6], m)
    assert torch.autograd.gradgradcheck(of_leaves, (x64, m64))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_masks_change_no_bit(reduction, weighted, diagonal, monkeypatch):
    """Labels that are seen to be classes need none; and none is made."""
    x, _, means, log_variance, weight = draw(torch.float32)
    target = torch.randint(C, (N,), dtype=torch.uint8)
    leaves = [x.requires_grad_(), means.requires_grad_()]
    options = {"weight": weight if weighted else None, "log_variance": log_variance if diagonal else None}

    def go():
        loss = mlkernels.lgm_loss(x, target, means, reduction=reduction, **options)
        return loss.detach(), *torch.autograd.grad(loss, leaves, torch.linspace(0.5, 2, loss.numel()).view_as(loss))

    masks = []
    real = torch.where
    monkeypatch.setattr(torch, "where", lambda *of: masks.append(of) or real(*of))
    plain = go()
    assert not masks
    monkeypatch.setattr(lgm, "_all_kept", lambda *of: False)
    assert all(torch.equal(got, wanted) for got, wanted in zip(plain, go(), strict=True))
    assert masks


@pytest.mark.parametrize(("label", "ignored"), [(C, -100), (-1, -100), (0, 0), (-100, -100), (200, 200)])
def test_labels_that_need_masks(label, ignored):
    """Bad ones by name, ignored ones as such, also where the label to ignore is a class."""
    x, _, means, _, _ = draw()
    target = torch.arange(N) % (C - 1) + 1
    target[1] = label
    if label != ignored:
        with pytest.raises(IndexError, match=rf"target {label} at row 1 is out of range"):
            mlkernels.lgm_loss(x, target, means, ignore_index=ignored)
    else:
        assert mlkernels.lgm_loss(x, target, means, ignore_index=ignored, reduction="none")[1] == 0
