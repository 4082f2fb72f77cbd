"""The multi-margin loss: torch's, behind this package's conventions."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import mlkernels
from mlkernels import buffers

F64 = torch.float64
N, C = 6, 5


def oracle(f, target, p, margin, weight, reduction):
    rows = []
    for i, y in enumerate(target.tolist()):
        total = 0.0
        for j in range(f.shape[1]):
            if j != y:
                total = total + torch.clamp(margin - f[i, y] + f[i, j], min=0) ** p
        rows.append((1.0 if weight is None else weight[y].item()) * total / f.shape[1])
    rows = torch.stack(rows)
    return rows if reduction == "none" else rows.sum() / (f.shape[0] if reduction == "mean" else 1)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_values_and_gradients(p, weighted, reduction):
    f, target = torch.randn(N, C, dtype=F64, requires_grad=True), torch.randint(C, (N,))
    weight = torch.rand(C, dtype=F64) + 0.5 if weighted else None
    found = mlkernels.multi_margin_loss(f, target, p, 0.7, weight=weight, reduction=reduction)
    torch.testing.assert_close(found, oracle(f, target, p, 0.7, weight, reduction))
    same = F.multi_margin_loss(f, target, p, 0.7, weight, reduction=reduction)
    torch.testing.assert_close(found, same)
    upstream = torch.randn_like(found)
    (got,), (wanted,) = (torch.autograd.grad(loss, f, upstream) for loss in (found, same))
    torch.testing.assert_close(got, wanted)
    assert got.abs().sum() > 0


def test_gradcheck():
    f, target = torch.randn(N, C, dtype=F64, requires_grad=True), torch.randint(C, (N,))
    assert torch.autograd.gradcheck(lambda f: 1.3 * mlkernels.multi_margin_loss(f, target, 2), (f,))


@pytest.mark.parametrize("labels", [torch.int64, torch.int32, torch.uint8])
def test_a_single_row_and_other_integers(labels):
    f = torch.randn(C)
    loss = mlkernels.multi_margin_loss(f, torch.tensor(2, dtype=labels))
    torch.testing.assert_close(loss, F.multi_margin_loss(f, torch.tensor(2)))


def test_half_and_a_weight_of_another_dtype():
    f, target, weight = torch.randn(N, C, dtype=torch.bfloat16), torch.randint(C, (N,)), torch.rand(C, dtype=F64)
    loss = mlkernels.multi_margin_loss(f, target, weight=weight)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.multi_margin_loss(f.float(), target, weight=weight.float()))


def test_no_rows():
    f = torch.zeros(0, C, requires_grad=True)
    loss = mlkernels.multi_margin_loss(f, torch.zeros(0, dtype=torch.long), reduction="sum")
    assert loss == 0
    assert mlkernels.multi_margin_loss(f, torch.zeros(0, dtype=torch.long)).isnan()


@pytest.mark.parametrize(
    ("input", "target"), [((), ()), ((), (1,)), ((3,), ()), ((3,), (1,)), ((1, 3), ()), ((1, 3), (1,))]
)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_shapes_are_torchs(input, target, reduction):
    """A single row may lack its dimension, and so may its label; "none" has the label's shape."""
    x, y = torch.randn(input), torch.zeros(target, dtype=torch.long)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = mlkernels.multi_margin_loss(one, y, 2, 0.7, reduction=reduction)
    theirs = F.multi_margin_loss(other, y, 2, 0.7, reduction=reduction)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    (3 * ours.sum()).backward()
    (3 * theirs.sum()).backward()
    torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(
    ("input", "target"), [((2, 3), ()), ((2, 3), (1,)), ((3,), (3,)), ((3,), (1, 1)), ((0,), ()), ((1, 1, 3), (1,))]
)
def test_shapes_that_torch_refuses(input, target):
    x, y = torch.randn(input), torch.zeros(target, dtype=torch.long)
    with pytest.raises(RuntimeError):
        F.multi_margin_loss(x, y)
    with pytest.raises(ValueError, match=r"input|target"):
        mlkernels.multi_margin_loss(x, y)


def test_the_order_of_arguments_is_torchs():
    x, y, weight = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.rand(3)
    torch.testing.assert_close(
        mlkernels.multi_margin_loss(x, y, 2, 0.5, weight), F.multi_margin_loss(x, y, 2, 0.5, weight)
    )
    module, peer = mlkernels.MultiMarginLoss(2, 0.5, weight), torch.nn.MultiMarginLoss(2, 0.5, weight)
    torch.testing.assert_close(module(x, y), peer(x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_kept_memory_changes_no_bit(dtype, kept_memory):
    f, target, weight = torch.randn(N, C).to(dtype).requires_grad_(), torch.randint(C, (N,)), torch.rand(C)

    def go():
        loss = mlkernels.multi_margin_loss(f, target, 2, 0.7, weight, reduction="none")
        first = torch.autograd.grad(loss, f, torch.linspace(0.5, 2, N, dtype=loss.dtype), retain_graph=True)[0]
        graph = torch.autograd.grad(loss.sum(), f, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="not implemented"):
            graph.sum().backward(retain_graph=True)
        batch = torch.autograd.grad(loss, f, torch.eye(N, dtype=loss.dtype), is_grads_batched=True)[0]
        return loss.detach(), first, graph.detach(), batch

    assert kept_memory(go) == (4 if dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("p", [1, 2])
def test_forward_mode(p):
    """torch's own kernel refuses tangents: ours are the gradient's product with them."""
    torch.manual_seed(p)
    input, tangent, target = torch.randn(5, 4).double(), torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 3, 0])
    weight = torch.tensor([0.5, 1.0, 2.0, 0.25]).double()

    def loss(x):
        return mlkernels.multi_margin_loss(x, target, p, 0.7, weight)

    wanted = torch.autograd.functional.jacobian(loss, input)
    with forward_ad.dual_level():
        value, found = forward_ad.unpack_dual(loss(forward_ad.make_dual(input, tangent)))
        torch.testing.assert_close(value, loss(input))
        torch.testing.assert_close(found, (wanted * tangent).sum())


def _recorded(call):
    """The operators that a call runs."""
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Record():
        call()
    return seen


def test_labels_are_looked_at_once():
    """By torch's kernel: nobody looks at them before."""
    f, target = torch.randn(N, C), torch.randint(C, (N,))
    assert _recorded(lambda: mlkernels.multi_margin_loss(f, target)) == [torch.ops.aten.multi_margin_loss.default]


@pytest.mark.parametrize("bad", [-1, C, -(2**40)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", ["plain", "trained", "kept", "dual", "no gradient"])
def test_bad_labels_by_name_whoever_finds_them(bad, reduction, kind, monkeypatch):
    f, target = torch.randn(N, C, requires_grad=kind in ("trained", "kept")), torch.randint(C, (N,))
    target[2] = bad
    words = rf"^target {bad} at row 2 is out of range \[0, {C}\)$"
    if kind == "kept":
        monkeypatch.setattr(buffers, "BUFFER_FROM", 0)
    with torch.set_grad_enabled(kind != "no gradient"), forward_ad.dual_level():
        if kind == "dual":
            f = forward_ad.make_dual(f, torch.randn(N, C))
        with pytest.raises(IndexError, match=words):
            mlkernels.multi_margin_loss(f, target, 2, weight=torch.rand(C), reduction=reduction)


def test_errors_of_others_stay_theirs(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no memory")

    monkeypatch.setattr(F, "multi_margin_loss", broken)
    with pytest.raises(RuntimeError, match=r"^no memory$"):
        mlkernels.multi_margin_loss(torch.randn(N, C), torch.randint(C, (N,)))
