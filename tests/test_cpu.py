"""What only the compiled CPU kernels have: instruction sets, streamed gradients, threads."""

import os
import subprocess
import sys

import pytest
import torch

import mlkernels
from mlkernels.backends import native

if mlkernels.available_backends()["cpu"] is not None:
    pytest.skip(f"no CPU kernels: {mlkernels.available_backends()['cpu']}", allow_module_level=True)

# A gradient of 8 MB and more is written past the caches, row by row, in whole aligned vectors.
STREAMED = [
    (torch.float64, 53, 20011),
    (torch.float32, 67, 32003),
    (torch.float32, 9, 300001),
    (torch.bfloat16, 83, 50257),
]


def gradients(dtype, rows, classes, offset, saved, smoothing):
    generator = torch.Generator().manual_seed(classes + offset)
    storage = torch.randn(rows * classes + offset, generator=generator, dtype=torch.float64)
    input = storage.mul(3).to(dtype)[offset:].view(rows, classes)
    target = torch.randint(classes, (rows,), generator=generator)
    target[1], target[2], target[3] = 0, classes - 1, -100
    weight = torch.rand(classes, generator=generator)
    upstream = torch.randn(rows, generator=generator, dtype=torch.float64)
    found = []
    for backend, x in (("cpu", input), ("reference", input.double())):
        x = x.detach().requires_grad_()
        # "none" leaves the row statistics for the backward; "sum" makes the gradient in the forward.
        options = {"label_smoothing": smoothing, "weight": weight, "backend": backend}
        if saved:
            loss = mlkernels.focal_loss(x, target, gamma=2.0, reduction="none", **options)
            loss.backward(upstream.to(loss.dtype))
        else:
            loss = mlkernels.focal_loss(x, target, gamma=2.0, reduction="sum", **options)
            loss.backward()
        found.append(x.grad)
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("saved", [False, True], ids=["one visit", "split"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("dtype", "rows", "classes"), STREAMED, ids=str)
def test_streamed_gradients(dtype, rows, classes, offset, saved, smoothing):
    ours, expected = gradients(dtype, rows, classes, offset, saved, smoothing)
    assert (ours[3] == 0).all()
    scale = expected.abs().amax(1, keepdim=True).clamp(min=1e-30)
    bound = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype]
    assert ((ours.double() - expected).abs() / scale).max() < bound


SCRIPT = """
import torch, mlkernels
from mlkernels.backends import native
torch.manual_seed(0)
print(native.cpu_isa())
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for classes in (1, 5, 16, 17, 100, 255, 256, 257, 1031):
        x = torch.randn(19, classes, dtype=torch.float64).mul(4).to(dtype)
        y = torch.randint(classes, (19,))
        y[3] = -100
        found = []
        for backend, input in (("cpu", x), ("reference", x.double())):
            input = input.detach().requires_grad_()
            loss = mlkernels.modulated_cross_entropy(
                input, y, softcap=20.0, label_smoothing=0.1, z_loss=1e-3, reduction="none", backend=backend
            )
            loss.backward(torch.linspace(-1, 1, 19, dtype=loss.dtype))
            found.append((loss.double(), input.grad.double()))
        (loss, grad), (wanted_loss, wanted_grad) = found
        eps = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
        torch.testing.assert_close(loss, wanted_loss, rtol=min(eps, 3e-6), atol=min(eps, 3e-6))
        torch.testing.assert_close(grad, wanted_grad, rtol=eps, atol=eps * max(float(wanted_grad.abs().max()), 1e-3))
        tied = x.round()
        tied[5, classes // 2] = float("nan")
        ours, wanted = (
            mlkernels.softmax_loss(tied, y, reduction="none", return_stats=True, backend=backend)[1]
            for backend in ("cpu", "reference")
        )
        for name in ("prediction", "rank", "confidence"):
            torch.testing.assert_close(getattr(ours, name), getattr(wanted, name), rtol=0, atol=0, equal_nan=True)
    for width in (6, 7):
        leaves = [torch.randn(n, width, dtype=torch.float64).to(dtype).requires_grad_() for n in (19, 331)]
        y = torch.randint(331, (19,))
        exact = [t.detach().double().requires_grad_() for t in leaves]
        loss = mlkernels.linear_cross_entropy(*leaves, y)
        wanted = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, y)
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-6)
        for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, exact)):
            assert (a.double() - b).norm() < min(eps, 2e-3) * b.norm(), (dtype, width)
"""

# What softcap makes of logits shows as a confidence over 0, its slope in gradients: rows, two classes, a linear head.
SOFTCAP = """
import numpy as np, torch, mlkernels
for dtype, c in ((torch.float32, 30.0), (torch.float32, 3.3), (torch.float64, 3.3), (torch.float64, 30.0)):
    real = torch.empty(0, dtype=dtype).numpy().dtype
    f64 = {"dtype": torch.float64}
    u = torch.cat([torch.logspace(-30, 2, 3000, **f64), torch.linspace(0.3, 3, 20001, **f64)])
    x = torch.cat([u, -u]).mul(c).to(dtype)

    def confidence(x):
        pairs = torch.stack([x, torch.zeros_like(x)], 1)
        return mlkernels.softmax_loss(pairs, torch.zeros(len(x)).long(), softcap=c, return_stats=True)[1].confidence

    cap = np.longdouble(torch.tensor(c, dtype=dtype).item())
    exact = cap * np.tanh(x.numpy().astype(np.longdouble) / cap)
    ulp = np.spacing(np.abs(exact).astype(real))
    ours, eager = (np.abs(y.numpy() - exact) / ulp for y in (confidence(x), c * torch.tanh(x / c)))
    assert ours.max() <= eager.max() and ours.mean() <= eager.mean(), (dtype, c, ours.max(), eager.max())
    inf, nan, tiny = float("inf"), float("nan"), float(np.finfo(real).smallest_subnormal)
    special = torch.tensor([inf, nan, -inf, 1e30, -1e30, 0.0, -0.0, tiny, -tiny], dtype=dtype)
    wanted = torch.tensor([nan, nan, -c, c, -c, 0.0, 0.0, tiny, -tiny], dtype=dtype)
    torch.testing.assert_close(confidence(special), wanted, rtol=0, atol=0, equal_nan=True)

    x = x[(x.abs() < 15 * c) & (x.abs() > 1e-6)][::7]
    e = torch.exp(-2 * x.double().abs() / c)
    slope, value = 4 * e / (1 + e) ** 2, c * torch.tanh(x.double() / c)
    first = torch.zeros(1).long()
    row, pairs = x[None].clone().requires_grad_(), torch.stack([x, torch.zeros_like(x)], 1).requires_grad_()
    weight, one = x[:, None].clone().requires_grad_(), torch.ones(1, 1, dtype=dtype)
    mlkernels.cross_entropy(row, first, softcap=c).backward()
    mlkernels.cross_entropy(pairs, torch.ones(len(x)).long(), softcap=c, reduction="sum").backward()
    mlkernels.linear_cross_entropy(one, weight, first, softcap=c).backward()
    of_row = value.softmax(0) * slope
    of_row[0] -= slope[0]
    rtol = 2e-5 if dtype == torch.float32 else 1e-13
    for found, wanted in (
        (row.grad[0], of_row), (weight.grad[:, 0], of_row), (pairs.grad[:, 0], torch.sigmoid(value) * slope)
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=0)
"""


@pytest.mark.parametrize("isa", native.ISAS)
def test_each_instruction_set(isa):
    if native.ISAS.index(isa) > native.ISAS.index(native.cpu_isa()) and "MLKERNELS_CPU" not in os.environ:
        pytest.skip(f"this machine has no {isa}")
    command, environment = [sys.executable, "-c", SCRIPT + SOFTCAP], os.environ | {"MLKERNELS_CPU": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


def test_an_unknown_instruction_set_is_not_obeyed():
    command = "from mlkernels.backends import native; print(native.cpu_isa())"
    done = subprocess.run(
        [sys.executable, "-c", command], env=os.environ | {"MLKERNELS_CPU": "sse9"}, capture_output=True, text=True
    )
    assert done.stdout.strip() in native.ISAS


def test_the_same_bits_on_any_number_of_threads():
    torch.manual_seed(1)
    input, target = torch.randn(301, 2003), torch.randint(2003, (301,))
    scale = torch.tensor(1.25)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x, s = input.clone().requires_grad_(), scale.clone().requires_grad_()
            loss = mlkernels.cross_entropy(x, target, scale=s)
            loss.backward()
            found.append((loss.detach(), x.grad, s.grad))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("softcap", [None, 3.0])  # 3: of some logits, but not of all, tanh is a series
@pytest.mark.parametrize("classes", [10, 300, 5000])
def test_a_row_does_not_depend_on_its_batch(classes, softcap):
    torch.manual_seed(2)
    input, target = 2 * torch.randn(37, classes), torch.randint(classes, (37,))
    upstream = torch.randn(37)

    def run(rows):
        x = input[rows].clone().requires_grad_()
        loss = mlkernels.focal_loss(x, target[rows], softcap=softcap, reduction="none")
        loss.backward(upstream[rows])
        return loss.detach(), x.grad

    whole, part = run(slice(None)), run(slice(5, 18))
    assert torch.equal(whole[0][5:18], part[0])
    assert torch.equal(whole[1][5:18], part[1])
