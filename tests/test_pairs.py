"""Products of bfloat16 by pairs (csrc/cpu/bfloat16.cpp): a linear head's operators on numbers whose sums are exact.

With a scale of 0 every exponential is 1, and a tile's gradient is factor - spread * weight: whole numbers too.
"""

from __future__ import annotations

import functools

import pytest
import torch
from table import plain_numbers
from torch import Tensor

from bench import linear_errors
from mlkernels import linear_cross_entropy, linear_softmax_loss
from mlkernels.backends import native
from mlkernels.linear.plan import Plan, ThreadsPlanner, workspace
from mlkernels.numbering import Slot

pytestmark = pytest.mark.skipif(native.cpu_isa() != "avx512_bf16", reason="no such products here")

ops = torch.ops.mlkernels
# Rows, classes, width; parts, tile, block. Nothing even but the width; whole panels, vectors and parts of these.
SIZES = [
    (13, 331, 150, (1, 331, 13)),
    (29, 203, 66, (2, 67, 7)),
    (1, 3, 2, (1, 1, 1)),
    (12, 256, 128, (2, 64, 6)),
    (7, 45, 34, (3, 5, 3)),
    (131, 45, 34, (2, 20, 70)),  # blocks of several groups, the last of each a part of one
    (131, 601, 2, (1, 601, 131)),  # groups of a block for several threads
]


class Problem:
    def __init__(self, rows: int, classes: int, width: int, plan: tuple[int, int, int]) -> None:
        whole = lambda *shape: torch.randint(-3, 4, shape).float()
        self.plan, self.sizes = plan, (rows, classes, width)
        self.x, self.label = whole(rows, width).bfloat16(), torch.randint(classes, (rows,))
        self.weight = whole(classes, width + 3).bfloat16()[:, 2:-1]  # rows of an odd stride, at odd places
        self.factor, self.spread = whole(rows) * 8, whole(rows)
        self.class_weight, self.target = whole(classes), whole(rows)

    def linear(self, keep: bool, more: int = 0) -> list[object]:
        rows, classes, width = self.sizes
        size = workspace(
            Plan(keep, rows, self.plan[1], self.plan[0], self.plan[2]), keep, rows, classes, width, 1, True
        )
        self.workspace = torch.full((size + more,), float("nan"))
        return [
            self.x, self.weight, None, None, self.label, 0, plain_numbers(Slot.WEIGHT), [self.class_weight],
            self.workspace, keep, self.plan,
        ]  # fmt: skip

    def statistics(self, keep: bool = True, more: int = 0) -> tuple[Tensor, Tensor]:
        """The row numbers, and the products, which are kept by tile."""
        rows, classes, _ = self.sizes
        known, _ = ops.linear_statistics(*self.linear(keep, more), torch.zeros(rows), torch.ones(1, rows), classes, 0)
        tiles = self.workspace[: rows * classes].split(rows * self.plan[1])
        return known, torch.cat([tile.view(rows, -1) for tile in tiles], 1)

    def gradients(self) -> tuple[Tensor, Tensor]:
        rows, classes, width = self.sizes
        dx, dw = (torch.full((n, width), float("nan")) for n in (rows, classes))
        row = self.factor, None, self.spread, self.target, self.factor * 0, self.factor * 0
        ops.linear_gradient(*self.linear(False), *row, dx, dw, None, True, True)
        return dx, dw

    def exact(self) -> tuple[Tensor, Tensor]:
        x, weight = self.x.double(), self.weight.double()
        g = self.factor.double()[:, None] - self.spread.double()[:, None] * self.class_weight.double()
        g[torch.arange(len(x)), self.label] = self.target.double()
        return g @ weight, g.T @ x


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_exact(sizes):
    """To the bit, with the workspace that is planned and no more; without one element of it the call is refused."""
    torch.manual_seed(0)
    problem = Problem(*sizes)
    known, products = problem.statistics()
    wanted = problem.x.double() @ problem.weight.double().T
    assert torch.equal(products.double(), wanted)
    wanted[torch.arange(len(wanted)), problem.label] = -torch.inf
    assert torch.equal(known[0].double(), wanted.amax(1))
    for ours, exact in zip(problem.gradients(), problem.exact(), strict=True):
        assert torch.equal(ours.double(), exact)
    with pytest.raises(RuntimeError, match="workspace is too small"):
        problem.statistics(more=-1)


def test_what_large_gradients_lose_is_added():
    """259 is no bfloat16; few of a row are large, and these are as exact as in float32."""
    torch.manual_seed(0)
    problem = Problem(13, 331, 150, (2, 100, 6))
    problem.factor.zero_()
    problem.spread.fill_(-1)
    problem.class_weight.zero_()[torch.tensor([0, 99, 100, 250, 330])] = 259.0
    problem.target.fill_(1000.0)
    for ours, exact in zip(problem.gradients(), problem.exact(), strict=True):
        assert torch.equal(ours.double(), exact)


@pytest.mark.parametrize("sizes", [SIZES[1], *SIZES[-2:]], ids=str)
def test_what_equal_terms_lose_is_added(sizes):
    """Most of 257 to 600 are no bfloat16, and here no large ones; features and classes have all in common."""
    torch.manual_seed(0)
    problem = Problem(*sizes)
    problem.x[:], problem.weight[:] = problem.x[:1].clone(), problem.weight[:1].clone()
    problem.factor.zero_()
    problem.spread.copy_(torch.randint(-2, 0, problem.spread.shape))
    problem.class_weight.copy_(torch.randint(129, 301, problem.class_weight.shape))
    problem.target.fill_(32 * 640.0)
    for ours, exact in zip(problem.gradients(), problem.exact(), strict=True):
        assert torch.equal(ours.double(), exact)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_what_is_not_finite_stays_in_its_row(bad):
    torch.manual_seed(0)
    problem = Problem(13, 75, 34, (2, 20, 6))
    exact = problem.exact()[0].index_fill(0, torch.tensor(4), float("nan"))  # whatever follows from its logits
    problem.x[4, 33] = bad
    torch.testing.assert_close(problem.gradients()[0].double(), exact, rtol=0, atol=0, equal_nan=True)
    problem.weight[51, 0] = bad
    wanted = problem.x.double() @ problem.weight.double().T
    torch.testing.assert_close(problem.statistics()[1].double(), wanted, rtol=0, atol=0, equal_nan=True)


def test_who_is_refused():
    problem = Problem(5, 7, 6, (1, 7, 5))
    linear, rest = problem.linear(True, 100), (torch.zeros(5), torch.ones(1, 5), 7, 0)
    odd = problem.x[:, :5].contiguous(), problem.weight[:, :5]
    for changed in (
        [problem.x, problem.weight.float(), *linear[2:]],
        [*odd, *linear[2:]],
        [*linear[:3], torch.ones(7), *linear[4:]],
        [problem.x.T.contiguous().T, *linear[1:]],
    ):
        with pytest.raises(RuntimeError, match="avx512_bf16"):
            ops.linear_statistics(*changed, *rest)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_no_rows(reduction):
    x, weight = (torch.zeros(n, 8).bfloat16().requires_grad_() for n in (0, 3))
    loss = linear_cross_entropy(x, weight, torch.zeros(0).long(), reduction=reduction)
    dx, dw = torch.autograd.grad(loss.sum(), [x, weight])
    assert loss.sum() == 0 and dx.shape == (0, 8) and dw.count_nonzero() == 0


@pytest.mark.parametrize("rows", [100, 1 << 20])  # of the latter, features as pairs would alone be more
@pytest.mark.parametrize("strategy", ["stored", "tiles", "rows"])
def test_memory_is_bounded(strategy, rows):
    plan = ThreadsPlanner(rows, 5000, 128, 4, 1, memory=3_000_000, threads=2, pairs=True).plan(strategy)
    assert 4 * workspace(plan, plan.stored, plan.rows, 5000, 128, 1, True) <= 3_000_000


@pytest.mark.parametrize("width", [31, 32])
@pytest.mark.parametrize("spread", [0.1, 1.0], ids=["flat", "peaked"])
def test_hardly_worse_than_float32_rounded_once(width, spread):
    torch.manual_seed(0)
    x, weight = torch.randn(64, width).bfloat16(), (spread * torch.randn(500, width)).bfloat16()
    target = torch.randint(500, (64,))
    a, w = (t.double().requires_grad_() for t in (x, weight))
    exact = torch.autograd.grad(torch.nn.functional.cross_entropy(a @ w.T, target), [a, w])
    x.requires_grad_()
    found = torch.autograd.grad(linear_cross_entropy(x, weight.requires_grad_(), target), [x, weight])
    for ours, wanted in zip(found, exact, strict=True):
        error, once = ((t.double() - wanted).norm() for t in (ours, wanted.bfloat16()))
        assert error < 1.05 * once


@pytest.mark.parametrize("strategy", ["stored", "tiles"])
@pytest.mark.parametrize("kind", linear_errors.KINDS)
def test_hardly_worse_than_the_chain_in_float32(kind, strategy):
    """With numbers to the nearest dW would be off 2.3 times as much in the last; without the products of what is lost
    with the means dX 11 times where classes are alike."""
    of = linear_errors.problem(kind)
    found = linear_errors.errors(functools.partial(linear_cross_entropy, strategy=strategy), of)
    limit = linear_errors.errors(lambda x, weight, y: linear_errors.chain(x.float(), weight.float(), y), of)
    assert found.loss < 1e-6
    assert not found.x > 1.02 * limit.x and found.weight <= 1.02 * limit.weight  # a fresh one's dX is 0


@pytest.mark.parametrize("strategy", ["stored", "tiles"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cosines_are_as_exact_as_in_float32(reduction, strategy):
    """Their logits are products of vectors of any length, their gradients products of directions; in several chunks and
    tiles, an ignored row among these."""
    torch.manual_seed(0)
    x, weight = torch.randn(70, 32), torch.randn(300, 32)
    target = torch.randint(300, (70,))
    x[::2] += weight[target[::2]]
    lengths = lambda t: 10 ** torch.linspace(-9, 9, len(t))[:, None]
    x, weight = ((t * lengths(t)).bfloat16().requires_grad_() for t in (x, weight))
    target[5] = -100
    a, w = (t.detach().double().requires_grad_() for t in (x, weight))
    cosines = (a / a.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T
    cap = {"mean": None, "none": 0.7}[reduction]
    capped = cosines if cap is None else cap * torch.tanh(cosines / cap)
    wanted = torch.nn.functional.cross_entropy(16 * capped, target, reduction=reduction)
    found = linear_softmax_loss(
        x, weight, target, normalize=True, scale=16.0, softcap=cap, reduction=reduction, strategy=strategy,
        memory=60_000,
    )  # fmt: skip
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-6)
    upstream = torch.rand_like(found)
    exact = torch.autograd.grad(wanted, [a, w], upstream.double())
    for ours, by in zip(torch.autograd.grad(found, [x, weight], upstream), exact, strict=True):
        kept = by.any(1)
        assert not ours[~kept].any()
        error, once = ((t.double() - by).norm(dim=1)[kept] / by.norm(dim=1)[kept] for t in (ours, by.bfloat16()))
        assert error.norm() < 1.005 * once.norm()
