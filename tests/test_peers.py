"""Side by side with what people use: where definitions agree the numbers do, where not, the difference is stated."""

import math

import pytest
import torch
import torch.nn.functional as F
from table import F64

import mlkernels

losses = pytest.importorskip("pytorch_metric_learning.losses")
N, C, D = 12, 7, 5


def embeddings(seed=0, angle=None):
    """Normalised embeddings and prototypes; ``angle`` puts each embedding at that angle to its own prototype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator, dtype=F64)
    w = torch.randn(D, C, generator=generator, dtype=F64)
    y = torch.randint(0, C, (N,), generator=generator)
    if angle is not None:
        own = F.normalize(w, dim=0).t()[y]
        across = F.normalize(x - (x * own).sum(1, keepdim=True) * own, dim=1)
        x = math.cos(angle) * own + math.sin(angle) * across
    return x, w, y


def cosines_of(a, b):
    return F.normalize(a, dim=1) @ F.normalize(b, dim=0)


def side_by_side(peer, ours, x, w, y):
    """((value, dx, dW) of theirs, of ours), through the same normalisation."""
    found = []
    peer = peer.double()
    peer.W.data.copy_(w)
    peer.W.grad = None
    a = x.clone().requires_grad_()
    value = peer(a, y)
    (1.5 * value).backward()
    found.append((value.detach(), a.grad, peer.W.grad))
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    value = ours(a, b, y)
    (1.5 * value).backward()
    found.append((value.detach(), a.grad, b.grad))
    return found


def agree(found, rtol=1e-7):
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-9)


def drawn(spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels."""
    generator = torch.Generator().manual_seed(0)
    return spread * torch.randn(N, C, generator=generator, dtype=F64), torch.randint(0, C, (N,), generator=generator)


@pytest.mark.parametrize("margin", [0.1, 0.5])
def test_arcface_within_pi(backend, margin):
    peer = losses.ArcFaceLoss(C, D, margin=math.degrees(margin), scale=16)
    for seed in range(3):
        x, w, y = embeddings(seed, angle=0.4 + 0.7 * seed)
        agree(
            side_by_side(
                peer,
                lambda a, b, t: mlkernels.arcface_loss(cosines_of(a, b), t, margin=margin, scale=16.0, backend=backend),
                x,
                w,
                y,
            )
        )


def test_arcface_beyond_pi_differs(backend):
    """Theirs goes on with cos theta - m sin m, as ours does by default; "none" is cos(theta + m), which turns back."""
    x, w, y = embeddings(angle=math.pi - 0.2)
    peer = losses.ArcFaceLoss(C, D, margin=math.degrees(0.5), scale=16)
    agree(
        side_by_side(
            peer,
            lambda a, b, t: mlkernels.arcface_loss(cosines_of(a, b), t, margin=0.5, scale=16.0, backend=backend),
            x,
            w,
            y,
        )
    )
    theirs, ours = side_by_side(
        peer,
        lambda a, b, t: mlkernels.arcface_loss(
            cosines_of(a, b), t, margin=0.5, scale=16.0, beyond_pi="none", backend=backend
        ),
        x,
        w,
        y,
    )
    # cos(pi + .3) = -.955 against cos(pi - .2) - .5 sin .5 = -1.22: beyond pi the angle's loss falls again.
    assert float(ours[0]) < float(theirs[0])


def test_arcface_at_cosine_1(backend):
    """Where theirs (2.9) has NaN gradients for embedding and prototype; the derivative of ours is floored."""
    w = torch.eye(D, C, dtype=F64)
    x = torch.eye(D, dtype=F64)[:3].clone().requires_grad_()
    y = torch.tensor([0, 1, 2])
    value = mlkernels.arcface_loss(F.normalize(x, dim=1) @ w, y, margin=0.5, scale=16.0, backend=backend)
    value.backward()
    assert bool(value.isfinite())
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("margin", [0.0, 0.35])
def test_cosface(backend, margin):
    peer = losses.CosFaceLoss(C, D, margin=margin, scale=16)
    for seed in range(3):
        x, w, y = embeddings(seed)
        agree(
            side_by_side(
                peer,
                lambda a, b, t: mlkernels.cosface_loss(cosines_of(a, b), t, margin=margin, scale=16.0, backend=backend),
                x,
                w,
                y,
            )
        )


@pytest.mark.parametrize("angle", [0.3, 0.9, 1.7, 2.9])
def test_sphereface_is_scaled_by_the_embedding(backend, angle):
    """A-Softmax keeps |x|: pytorch-metric-learning multiplies it by its scale, here it is a (trained) scale per row."""
    x, w, y = embeddings(angle=angle)
    x = x * torch.linspace(0.5, 2, N, dtype=F64)[:, None]
    peer = losses.SphereFaceLoss(C, D, margin=4, scale=3)

    def ours(a, b, y):
        return mlkernels.sphereface_loss(
            cosines_of(a, b), y, margin=4, scale=3 * a.norm(dim=1, keepdim=True), backend=backend
        )

    agree(side_by_side(peer, ours, x, w, y), rtol=1e-6)
    theirs, plain = side_by_side(
        peer,
        lambda a, b, y: mlkernels.sphereface_loss(cosines_of(a, b), y, margin=4, scale=3.0, backend=backend),
        x,
        w,
        y,
    )
    assert float(plain[0]) != pytest.approx(float(theirs[0]), rel=1e-2)  # normalised, as most use it today


@pytest.mark.parametrize("angle", [0.3, 0.9, 1.7, 2.9])
def test_large_margin_softmax_has_a_norm(backend, angle):
    """L-Softmax: raw logits, and the target's is |W_y||x| psi(theta)."""
    x, w, y = embeddings(angle=angle)
    x = x * torch.linspace(0.5, 2, N, dtype=F64)[:, None]
    peer = losses.LargeMarginSoftmaxLoss(C, D, margin=3, scale=2)

    def ours(a, b, y):
        norm = a.norm(dim=1, keepdim=True) * b.norm(dim=0)[y][:, None]
        return mlkernels.margin_cross_entropy(a @ b, y, m1=3, scale=2.0, norm=norm, backend=backend)

    agree(side_by_side(peer, ours, x, w, y), rtol=1e-6)


def test_straight_through_is_the_common_arcface(backend):
    """arcface_torch detaches the margin: at theta = 90 degrees, m = .5, s = 64 it sends -64, not -56.17."""
    for gradient, wanted in (("straight_through", -64.0), ("exact", -64 * math.cos(0.5))):
        x = torch.tensor([[0.0, 0.9, 0.9]], dtype=F64, requires_grad=True)  # p of the target is 0
        mlkernels.arcface_loss(
            x, torch.tensor([0]), margin=0.5, scale=64.0, gradient=gradient, backend=backend
        ).backward()
        assert float(x.grad[0, 0]) == pytest.approx(wanted, rel=1e-6)
    assert -64 * math.cos(0.5) == pytest.approx(-56.17, abs=0.01)


def test_ldam_is_a_margin_per_class(backend):
    """As in its authors' code: x_y - delta_y, times s."""
    input, target = drawn()
    delta = 0.5 / torch.arange(1.0, C + 1, dtype=F64) ** 0.25
    x, z = input.clone().requires_grad_(), input.clone().requires_grad_()
    (
        2 * mlkernels.softmax_loss(x, target, transform=mlkernels.Margin(m3=delta), scale=30.0, backend=backend)
    ).backward()
    (2 * F.cross_entropy(30 * (z - F.one_hot(target, C) * delta), target)).backward()
    torch.testing.assert_close(x.grad, z.grad)


# ---- losses of one's own ---------------------------------------------------------------------------------------------


def test_poly_1_on_confident_rows(backend):
    """-log p + eps (1 - p) as a torch function of the row losses, 1 - p = -expm1(log p)."""
    lead = torch.tensor([0.0, 5.0, 20.0, 40.0, -40.0], dtype=F64)
    input = torch.zeros(5, 4, dtype=F64)
    input[:, 2] = lead
    target = torch.full((5,), 2)
    x = input.clone().requires_grad_()
    nll = mlkernels.softmax_loss(x, target, reduction="none", backend=backend)
    rows = nll + 2 * -torch.expm1(-nll)
    up = torch.linspace(-1, 2, 5, dtype=F64)
    rows.backward(up)
    rest = 3 * torch.exp(-lead)
    miss = rest / (1 + rest)
    torch.testing.assert_close(rows.detach(), torch.log1p(rest) + 2 * miss, rtol=1e-13, atol=0)
    wanted = -up * miss * (1 + 2 * (1 - miss))
    torch.testing.assert_close(x.grad[:, 2], wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(x.grad.sum(1), torch.zeros(5, dtype=F64), atol=1e-15, rtol=0)


def test_a_transform_of_ones_own(backend):
    """target_logit: an autograd chain of N scalars replaces t(f_y); the gradient returns through it."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(N, C, generator=generator, dtype=F64)
    input[3] *= 20
    target = torch.randint(0, C, (N,), generator=generator)
    input[5, target[5]] = 40.0
    x, z = input.clone().requires_grad_(), input.clone().requires_grad_()
    own = torch.tanh(x.gather(1, target[:, None])) * 3
    (2 * mlkernels.softmax_loss(x, target, target_logit=own, scale=1.5, backend=backend)).backward()
    changed = z.scatter(1, target[:, None], torch.tanh(z.gather(1, target[:, None])) * 3)
    (2 * F.cross_entropy(1.5 * changed, target)).backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-12, atol=1e-15)


def test_balanced_softmax_is_an_adjustment(backend):
    input, target = drawn()
    counts = torch.tensor([1000.0, 500, 200, 90, 40, 10, 3], dtype=F64)
    ours = mlkernels.cross_entropy(input, target, logit_adjustment=counts.log(), backend=backend)
    odds = counts * torch.exp(input)
    theirs = -(odds.gather(1, target[:, None])[:, 0] / odds.sum(1)).log().mean()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("q", [0.3, 0.7, 1.0])
def test_generalised_cross_entropy(backend, q):
    """(1 - p^q) / q exactly; q = 1 is 1 - p."""
    input, target = drawn(spread=2.0)
    x, z = input.clone().requires_grad_(), input.clone().requires_grad_()
    ours = mlkernels.modulated_cross_entropy(x, target, beta=q, gamma=1.0, alpha=1 / q, kappa=0.0, backend=backend)
    theirs = ((1 - F.softmax(z, 1).gather(1, target[:, None]) ** q) / q).mean()
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_focal_where_the_naive_one_survives(backend):
    input, target = drawn(spread=2.0)
    for gamma in (1.0, 2.0, 5.0):
        x, z = input.clone().requires_grad_(), input.clone().requires_grad_()
        nll = F.cross_entropy(z, target, reduction="none")
        naive = ((1 - torch.exp(-nll)) ** gamma * nll).mean()
        ours = mlkernels.focal_loss(x, target, gamma=gamma, backend=backend)
        torch.testing.assert_close(ours, naive)
        ours.backward()
        naive.backward()
        torch.testing.assert_close(x.grad, z.grad)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_multi_margin_is_torchs(p, weighted, reduction):
    input, target = drawn()
    weight = torch.linspace(0.5, 2, C, dtype=F64) if weighted else None
    x, z = input.clone().requires_grad_(), input.clone().requires_grad_()
    ours = mlkernels.multi_margin_loss(x, target.int(), p, 0.8, weight=weight, reduction=reduction)
    theirs = F.multi_margin_loss(z, target, p, 0.8, weight, reduction=reduction)
    torch.testing.assert_close(ours, theirs)
    up = torch.linspace(-1, 2, ours.numel() + 1, dtype=F64)[1:].reshape(ours.shape)
    ours.backward(up)
    theirs.backward(up)
    torch.testing.assert_close(x.grad, z.grad)
    with pytest.raises(IndexError, match="target 7 at row 0"):
        mlkernels.multi_margin_loss(input, torch.full((N,), C), p)


def test_center_loss_by_its_formula():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=F64, requires_grad=True)
    centers = torch.randn(C, D, generator=generator, dtype=F64, requires_grad=True)
    y = torch.randint(0, C, (N,), generator=generator)
    up = torch.linspace(-1, 2, N, dtype=F64)
    mlkernels.center_loss(x, y, centers, reduction="none").backward(up)
    pull = (x - centers[y]).detach() * up[:, None]
    torch.testing.assert_close(x.grad, pull)
    torch.testing.assert_close(centers.grad, torch.zeros(C, D, dtype=F64).index_add_(0, y, -pull))
    distances = 0.5 * torch.cdist(x, centers).square()[torch.arange(N), y]
    torch.testing.assert_close(mlkernels.center_loss(x, y, centers), distances.mean())
