"""Low precision: never worse than the chain of eager operations that a loss replaces, and exact where that is wrong."""

import pytest
import torch
import torch.nn.functional as F
from table import BY_NAME, F64, FEW, draw, expected, numbers_of, run

import mlkernels
from mlkernels import ops
from mlkernels.backends import choose

HALF = [torch.bfloat16, torch.float16]
LOW = [*HALF, torch.float32]

# ---- the eager chains that people write ------------------------------------------------------------------------------


def eager_cross_entropy(x, y, p):
    return F.cross_entropy(p["scale"] * x, y, reduction="none")


def eager_focal(x, y, p):
    nll = F.cross_entropy(x, y, reduction="none")
    return (1 - torch.exp(-nll)) ** p["gamma"] * nll


def eager_modulated(x, y, p):
    nll = F.cross_entropy(x, y, reduction="none")
    return p["alpha"] * (1 - torch.exp(-nll) ** p["beta"]) ** p["gamma"] * nll ** p["kappa"]


def eager_margin(x, y, p):
    theta = torch.acos(x.gather(1, y[:, None]).clamp(-1 + 1e-4, 1 - 1e-4))
    t = torch.cos(theta + p.get("m2", 0.0)) - p.get("m3", 0.0)
    return F.cross_entropy(p["scale"] * x.scatter(1, y[:, None], t.to(x.dtype)), y, reduction="none")


def eager_two_scale(x, y, p):
    own = x.gather(1, y[:, None])
    runner_up = x.scatter(1, y[:, None], -float("inf")).amax(1, keepdim=True)
    r = torch.where(own - runner_up < 0.5, p["scale_low"], p["scale_high"]).to(x.dtype)
    return F.cross_entropy(r * x, y, reduction="none")


CHAINS = {
    "cross_entropy": eager_cross_entropy,
    "focal_2": eager_focal,
    "modulated": eager_modulated,
    "margin": eager_margin,
    "two_scale": eager_two_scale,
}


def rows_of(kind, loss, dtype, classes=8, rows=12):
    """Rows of one kind: drawn as elsewhere, or with p = .999 and 1 - 1e-7 exactly where confidence starts to hurt."""
    if kind not in ("p=.999", "p=1-1e-7"):
        return draw(loss, rows=rows, classes=classes, kinds=(kind,), exact=dtype, margin=0.05)
    gap = {"p=.999": 6.9, "p=1-1e-7": 16.1}[kind] + torch.log(torch.tensor(classes - 1.0)).item()
    input, target, params = draw(loss, rows=rows, classes=classes, kinds=("ties",), exact=dtype, margin=0.0)
    scale = {"margin": 16.0, "cross_entropy": 1.7, "two_scale": 4.0}.get(loss.name, 1.0)
    noise = 0.02 * torch.randn(input.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    input = (noise - 0.9 if loss.name == "margin" and kind != "p=.999" else noise).to(dtype).double()
    lead = 0.2 if loss.name == "margin" and kind == "p=.999" else 0.0  # what the margin cuts off
    own = input.mean(1) + min(gap / scale, 1.85) + lead
    input.scatter_(1, target[:, None], own[:, None])
    return input.to(dtype).double(), target, params


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("kind", ["random", "confident5", "confident20", "wrong40", "ties", "p=.999", "p=1-1e-7"])
@pytest.mark.parametrize("name", CHAINS)
def test_no_worse_than_eager(name, kind, dtype, backend):
    loss = BY_NAME[name]
    input, target, params = rows_of(kind, loss, dtype)
    wanted = expected(loss, input, target, params, reduction="none", upstream=torch.full((12,), 0.75))
    value, grad, _ = run(
        loss, input.to(dtype), target, params, torch.full((12,), 0.75), reduction="none", backend=backend
    )
    x = input.to(dtype).requires_grad_()
    eager = CHAINS[name](x, target, params)
    eager.backward(torch.full((12,), 0.75, dtype=eager.dtype))

    exact, exact_grad = torch.as_tensor(wanted.loss), torch.as_tensor(wanted.grad)
    size = exact_grad.abs().amax(1, keepdim=True)
    tiny = torch.finfo(dtype).tiny
    ours_loss = ((value.double() - exact).abs() / (exact + tiny)).max()
    eager_loss = ((eager.detach().double() - exact).abs() / (exact + tiny)).nan_to_num(torch.inf).max()
    ours_grad = ((grad.double() - exact_grad).abs() / (size + tiny)).max()
    eager_grad = ((x.grad.double() - exact_grad).abs() / (size + tiny)).nan_to_num(torch.inf).max()
    ulp = torch.finfo(dtype).eps
    # The logits' own rounding after the scale is in both; ours is allowed an ulp of theirs where eager was lucky.
    lucky = 4 * torch.finfo(torch.float32).eps * (1 + float(input.abs().max()) * max(params.get("scale", 1.0), 4.0))
    assert ours_loss <= 1.1 * eager_loss + lucky
    assert ours_grad <= 1.1 * eager_grad + ulp + lucky


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_confident_rows_have_half_gradients_to_the_ulp(backend, dtype):
    """p = .999: published kernels are 100 % off here, having kept the row's loss or lse in bfloat16."""
    for kind in ("p=.999", "p=1-1e-7"):
        input, target, params = rows_of(kind, BY_NAME["cross_entropy"], dtype)
        up = torch.full((12,), 1000.0)
        _, grad, _ = run(
            BY_NAME["cross_entropy"], input.to(dtype), target, params, up, reduction="none", backend=backend
        )
        wanted = torch.as_tensor(
            expected(BY_NAME["cross_entropy"], input, target, params, reduction="none", upstream=up).grad
        )
        assert wanted.abs().min() > 0
        error = (grad.double() - wanted).abs()
        assert bool((error <= 0.55 * torch.finfo(dtype).eps * wanted.abs() + 6e-8).all())


def test_fp16_under_a_grad_scaler(backend):
    """Upstream 65536 on a mean: written at upstream 1 and rescaled, small gradients would be gone."""
    generator = torch.Generator().manual_seed(0)
    input = (3 * torch.randn(64, 128, generator=generator)).half()
    target = torch.randint(0, 128, (64,), generator=generator)
    x, y = input.clone().requires_grad_(), input.double().requires_grad_()
    (65536 * mlkernels.cross_entropy(x, target, backend=backend)).backward()
    (65536 * F.cross_entropy(y, target)).backward()
    wanted = y.grad.half()
    assert torch.equal(x.grad == 0, wanted == 0)
    error = (x.grad.double() - y.grad).abs()
    assert bool((error <= 0.52 * torch.finfo(torch.half).eps * y.grad.abs() + 4e-8).all())


@pytest.mark.parametrize("upstream", [0.37, 65536.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_gradients_are_rounded_once(backend, dtype, upstream):
    """Any upstream: as if computed exactly and rounded (a rescaled bfloat16 gradient would be rounded twice)."""
    generator = torch.Generator().manual_seed(1)
    input = (2 * torch.randn(32, 64, generator=generator)).to(dtype)
    target = torch.randint(0, 64, (32,), generator=generator)
    x, y = input.clone().requires_grad_(), input.double().requires_grad_()
    (upstream * mlkernels.cross_entropy(x, target, backend=backend)).backward()
    (upstream * F.cross_entropy(y, target)).backward()
    error = (x.grad.double() - y.grad).abs()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bool((error <= 0.505 * torch.finfo(dtype).eps * y.grad.abs() + 0.51 * smallest).all())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("loss", FEW, ids=str)
def test_nothing_but_the_logits_is_kept_in_low_precision(loss, backend, dtype):
    input, target, params = draw(loss, rows=4, classes=5, exact=dtype, kinds=("random",))
    x = input.to(dtype).requires_grad_()
    options = {"group": loss.group(target)} if loss.groups else {}
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss(x, target, params, reduction="none", backend=backend, **options)
    assert value.dtype == torch.float32
    own = x.untyped_storage().data_ptr()
    assert kept
    assert not [t.dtype for t in kept if t.dtype in HALF and t.untyped_storage().data_ptr() != own]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_op_saves_in_the_accumulation_dtype(backend, dtype):
    if choose(torch.device("cpu"), backend) == "reference":
        pytest.skip("the reference saves nothing of its own")
    from mlkernels.call import DEFAULTS
    from mlkernels.numbering import Slot
    from mlkernels.spec import spec

    consts = DEFAULTS.copy()
    consts[Slot.SCALE] = 1.0
    x, y = torch.randn(5, 7).to(dtype), torch.tensor([0, 1, 2, 3, 4])
    kernels = {"cpu": ops.NATIVE, "triton": ops.TRITON, "cuda": ops.CUDA}[backend]
    loss, saved = kernels.softmax_loss(x, y, numbers_of(spec(), consts), [], True)
    assert saved.shape == (5, 2)
    assert loss.dtype == saved.dtype == (F64 if dtype == F64 else torch.float32)
    assert kernels.softmax_loss_with_gradient(x, y, numbers_of(spec(), consts, reduction=1), [])[1].dtype == dtype


def test_bfloat16_rows_sum_many_losses(backend):
    """The mean of 4096 half rows is a float32 sum, not a chain of bfloat16 additions."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(4096, 10, generator=generator).bfloat16()
    target = torch.randint(0, 10, (4096,), generator=generator)
    found = mlkernels.cross_entropy(input, target, reduction="sum", backend=backend)
    wanted = F.cross_entropy(input.double(), target, reduction="sum")
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_long_rows_sum_accurately(backend, dtype):
    """A naive float32 sum over 50257 classes drifts; relative to the row it must not."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 50257, generator=generator).to(dtype)
    target = torch.tensor([3, 50256])
    found = run(BY_NAME["modulated"], input, target, {}, torch.tensor([1.5, -0.5]), reduction="none", backend=backend)
    y = input.double().requires_grad_()
    nll = F.cross_entropy(y, target, reduction="none")
    wanted = (1 - torch.exp(-4 * nll)) ** 5 * nll
    wanted.backward(torch.tensor([1.5, -0.5]).double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0].double(), wanted.detach(), rtol=4 * eps, atol=0)
    torch.testing.assert_close(found[1].double(), y.grad, rtol=40 * eps, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_parameter_is_rounded_once(backend, dtype):
    """Its gradient is made at the true upstream, not at 1 and rescaled: at 1 it may have underflowed."""
    torch.manual_seed(0)
    input, target = torch.randn(64, 5) * 1e-6, torch.randint(5, (64,))
    scale = torch.tensor(1.0, dtype=dtype).requires_grad_()
    (mlkernels.cross_entropy(input, target, scale=scale, backend=backend) * 49999.0).backward()
    exact = torch.tensor(1.0, dtype=torch.float64).requires_grad_()
    loss = mlkernels.cross_entropy(input.double(), target, scale=exact, backend="reference")
    (loss * 49999.0).backward()
    assert scale.grad.item() == pytest.approx(exact.grad.item(), rel=torch.finfo(dtype).eps)


def test_gamma_of_hopeless_rows(backend):
    """dL/dγ = L log(1 - p) with p = e^-nll, of which 1 - p keeps little in float32 and at e^-20 nothing."""
    gap = torch.tensor([8.0, 15, 20, 40], dtype=F64)
    input = torch.stack([-gap, torch.zeros(4, dtype=F64)], 1)
    gamma = torch.full((4, 1), 2.0, requires_grad=True)
    target = torch.zeros(4, dtype=torch.long)
    loss = mlkernels.focal_loss(input.float(), target, gamma=gamma, reduction="none", backend=backend)
    loss.backward(torch.full((4,), 1.5))
    nll, p = torch.log1p(gap.exp()), torch.sigmoid(-gap)
    wanted = 1.5 * nll * (1 - p) ** 2 * torch.log1p(-p)
    torch.testing.assert_close(gamma.grad[:, 0].double(), wanted, rtol=1e-5, atol=1e-30)
