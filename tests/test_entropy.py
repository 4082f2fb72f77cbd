"""The entropy of a row's softmax, and what policies are trained with; its closed formula is in test_gradients.py."""

import oracle
import pytest
import torch
from table import BY_NAME, F64, INF, draw

import mlkernels


def statistics(x, y, backend, **options):
    return mlkernels.softmax_loss(x, y, reduction="none", return_stats=True, backend=backend, **options)


def by_torch(z):
    log_p = torch.log_softmax(z.clamp(min=-1e4), 1)  # no class of probability 0, whose -inf has no product with it
    return -(log_p.exp() * log_p).sum(1)


def test_a_policy_and_its_temperature(backend):
    """Log probability, entropy and logsumexp of one call, an advantage, and the gradient of a trained temperature."""
    input, target, _ = draw(BY_NAME["cross_entropy"], rows=8, classes=7, kinds=("random", "confident5"))
    advantage = torch.linspace(-1, 2, 8, dtype=F64)
    found = []
    for ours in (True, False):
        x, temperature = input.clone().requires_grad_(), torch.tensor(0.7, dtype=F64, requires_grad=True)
        if ours:
            _, rows = statistics(x, target, backend, scale=1 / temperature)
            log_prob, entropy, lse = rows.log_prob, rows.entropy, rows.logsumexp
        else:
            z = x / temperature
            log_prob, entropy = torch.log_softmax(z, 1).gather(1, target[:, None])[:, 0], by_torch(z)
            lse = z.logsumexp(1)
        objective = -(advantage * log_prob).mean() - 0.3 * (entropy * advantage.roll(1)).sum() + 0.01 * (lse**2).mean()
        objective.backward()
        found.append((objective.detach(), entropy.detach(), x.grad, temperature.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_entropy_alone(backend):
    """With no other upstream, and with masked classes."""
    input, target, _ = draw(BY_NAME["cross_entropy"], rows=8, kinds=("masked", "random", "ties", "confident20"))
    x, z = input.clone().requires_grad_(), input.clone().requires_grad_()
    up = torch.linspace(-1, 2, 8, dtype=F64)
    (_, rows), wanted = statistics(x, target, backend), by_torch(z)
    rows.entropy.backward(up)
    wanted.backward(up)
    torch.testing.assert_close(rows.entropy.detach(), wanted.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-9, atol=1e-12)
    assert not x.grad[input == -INF].any()


@pytest.mark.parametrize("gap", [20.0, 40.0])
def test_confident_rows_are_relatively_accurate(backend, gap):
    """In float32 too: 1 - p is a sum, and so is the entropy of the rest; the target's own is p times -log p."""
    row = [gap, 0.25, -0.5, 0.125]
    x = torch.tensor([row], requires_grad=True)
    _, rows = statistics(x, torch.tensor([0]), backend)
    rows.entropy.sum().backward()
    wanted = oracle.row(oracle.Structure(), row, 0, {"scale": 1.0}, up_loss=0, up_entropy=1)
    assert float(rows.entropy.detach()) == pytest.approx(float(wanted.entropy), rel=1e-5)
    torch.testing.assert_close(x.grad[0].double(), torch.tensor([*map(float, wanted.grad)]).double(), rtol=1e-4, atol=0)


def test_half_precision_and_many_classes(backend):
    """Rows that are read in several pieces; two-byte logits, entropies in float32."""
    generator = torch.Generator().manual_seed(1)
    input = (2 * torch.randn(3, 5000, generator=generator)).bfloat16()
    target, up = torch.tensor([0, 4999, -100]), torch.tensor([1.5, -0.5, 2.0])
    x, z = input.clone().requires_grad_(), input.double().requires_grad_()
    (_, rows), wanted = statistics(x, target, backend, scale=0.5), by_torch(0.5 * z)
    assert rows.entropy.dtype == torch.float32 and rows.entropy[2] == 0
    rows.entropy.backward(up)
    wanted[:2].backward(up[:2].double())
    torch.testing.assert_close(rows.entropy[:2].double(), wanted[:2], rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad[:2].double(), z.grad[:2], rtol=2**-7, atol=1e-8)
    assert not x.grad[2].any()


def test_one_class_has_none(backend):
    x = torch.tensor([[3.0], [-2.0]], requires_grad=True)
    _, rows = statistics(x, torch.tensor([0, 0]), backend)
    rows.entropy.sum().backward()
    assert not rows.entropy.any() and not x.grad.any()
