"""Triton's kernels of pieces, interpreted: any partition of a row, merged, finished and written back, is the whole row
of the reference in float64."""

import functools
import itertools
import os
import random
from collections import Counter

import pytest
import torch
from table import BY_NAME, LOSSES, NAN, usable_backends
from test_linear import rows_of
from test_no_sync import Forbid
from test_pieces import CLASSES, OPTIONS, by_kernels, check_pieces, whole_rows
from torch.utils._python_dispatch import TorchDispatchMode

from bench import linear_errors
from mlkernels import CrossEntropyLoss, LinearLoss, TileSGD, linear_softmax_loss, tracing
from mlkernels.linear.pieces import TRITON

FULL = os.environ.get("MLKERNELS_FULL") == "1"
CASES = [
    ("cross_entropy", "smoothed"), ("cross_entropy", "capped"), ("modulated", "plain"), ("truncated", "weighted"),
    ("margin_norm_combined", "plain"), ("two_scale_norm", "capped"), ("piecewise_groups", "plain"),
    ("target_logit", "smoothed"), ("two_scale_margin_modulated", "plain"),
]  # fmt: skip
if FULL:
    CASES = [(loss.name, options) for loss in LOSSES for options in OPTIONS]

tiles = pytest.importorskip("mlkernels.backends.triton.tiles")
Tile = tiles.Tile
pytestmark = pytest.mark.skipif("triton" not in usable_backends(), reason="Triton is not interpreted here")


@pytest.fixture(autouse=True)
def one_program(monkeypatch):
    """All rows at once, as the interpreter's time goes by programs; in two blocks of a tile of more than four."""
    monkeypatch.setattr("mlkernels.backends.triton.tiles.piece", lambda *_: Tile(2, 16, 2, 1, 1, False))


def partition(seed):
    """Some cuts of the classes; single ones, which for some rows hold the target alone, are among them."""
    pick = random.Random(seed)
    inner = sorted(pick.sample(range(1, CLASSES), CLASSES - 1 if FULL else pick.randrange(1, 3)))
    return [*itertools.pairwise([0, *inner, CLASSES])]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{loss}-{options}" for loss, options in CASES])
def test_pieces_are_the_whole_row(index, monkeypatch):
    """Each way through finish, under options that take turns; MLKERNELS_FULL=1: each loss under each of them."""
    loss, options = BY_NAME[CASES[index][0]], OPTIONS[CASES[index][1]]
    arguments, upstream, wanted = whole_rows(loss, options, monkeypatch)
    check_pieces(by_kernels(TRITON, *arguments, partition(index), upstream), wanted, loss, rtol=1e-9, atol=1e-10)


# ---- linear heads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize, confident", [(True, False), (False, True)], ids=["cosines", "confident"])
def test_bfloat16_linear_heads(normalize, confident, monkeypatch):
    """Products of what there is, into float32; gradients of tiles in bfloat16, the target's apart. Nothing looks at a
    number, labels left to the kernels as on a GPU."""
    monkeypatch.setattr(tracing, "traced", lambda *tensors: True)
    monkeypatch.setattr("mlkernels.backends.triton.tiles.piece", lambda *_: Tile(16, 16, 16, 1, 1, False))
    x, weight, target = rows_of(confident, torch.bfloat16)
    x, target = x.detach()[:16].clone(), target[:16].clone()
    target[3], x[3] = -100, NAN  # masked, not looked for
    x.requires_grad_()
    a, w = (t.detach().double().requires_grad_() for t in (x, weight))
    f = torch.where(a.isnan(), 0.5, a)
    f = (f / f.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T if normalize else f @ w.T
    scale = 16.0 if normalize else 1.0
    exact = torch.nn.functional.cross_entropy(scale * f, target)
    wanted = torch.autograd.grad(2 * exact, [a, w])
    with Forbid():
        value = linear_softmax_loss(
            x, weight, target, normalize=normalize, scale=scale, backend="triton", strategy="tiles", memory=16 * 6 * 300
        )
    found = torch.autograd.grad(value, [x, weight], torch.full_like(value, 2.0))
    assert value.dtype == torch.float32 and abs(float(value.detach()) / float(exact.detach()) - 1) < 1e-5
    assert not found[0][3].any()
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.bfloat16
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 2.0**-8  # of tile and result, half of that each


@pytest.mark.parametrize(
    "kind, gradient", [("a fresh classifier", "weight"), ("classes alike but for 1 %", "x")], ids=["fresh", "alike"]
)
def test_what_rounding_loses_does_not_add_up(kind, gradient, monkeypatch):
    """To the nearest the first would be off by 3.3e-3; by what it loses of what classes have in common the second by
    18e-3."""
    monkeypatch.setattr("mlkernels.backends.triton.tiles.piece", lambda *_: Tile(4, 256, 16, 1, 1, False))
    cut = {"strategy": "tiles", "memory": 256 * 6 * 60}  # a tile's place among the classes counts
    loss = functools.partial(linear_softmax_loss, backend="triton", **cut)
    assert getattr(linear_errors.errors(loss, linear_errors.problem(kind, rows=256)), gradient) < 1.8e-3


def test_nor_where_the_weight_steps(monkeypatch):
    """What classes had in common before the first of them stepped, which leaves little of that."""
    monkeypatch.setattr("mlkernels.backends.triton.tiles.piece", lambda *_: Tile(4, 256, 16, 1, 1, False))
    of = linear_errors.problem("classes alike but for 1 %", rows=256)
    leaves = [of.x.double().requires_grad_(), of.weight.double().requires_grad_()]
    wanted = torch.autograd.grad(linear_errors.chain(*leaves, of.label), leaves)[0]
    linear = LinearLoss(
        CrossEntropyLoss(backend="triton"), linear_errors.WIDTH, linear_errors.CLASSES,
        weight=torch.nn.Parameter(of.weight), tile_update=TileSGD(1.0, weight_decay=1.0),
        memory=256 * 6 * 60 + 60 * 64 * 8,
    )  # fmt: skip
    x = of.x.clone().requires_grad_()
    linear(x, of.label).backward()
    assert float((x.grad.double() - wanted).norm() / wanted.norm()) < 1.8e-3
    assert float(linear.weight.detach().norm() / leaves[1].detach().norm()) < 0.1


def test_what_a_row_loses_is_summed(monkeypatch):
    """Over tiles, of which the last block is narrower; an ignored row loses nothing. For each chunk one launch adds
    it."""
    monkeypatch.setattr("mlkernels.backends.triton.tiles.piece", lambda *_: Tile(2, 16, 16, 1, 1, False))
    x, weight, target = rows_of(False, torch.bfloat16)
    x, target = x.detach()[:16].requires_grad_(), target[:16].clone()
    target[3] = -100
    write, chunks, launched = TRITON.gradient, [], Counter()

    def both(tile, row, values, seen, out):
        exact = write(tile._replace(f=tile.f.clone()), row, values, seen, None)
        found = write(tile, row, values, seen, out)
        assert (exact.dtype, found.dtype) == (torch.float32, torch.bfloat16)
        if not chunks or chunks[-1][0] is not row:
            chunks.append([row, 0])
        chunks[-1][1] += (exact.double() - found.double()).sum(1)
        return found

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            launched[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(TRITON, "gradient", both)
    with Count():
        linear_softmax_loss(
            x, weight, target, normalize=True, scale=16.0, label_smoothing=0.1, backend="triton", strategy="stored",
            memory=20500,
        )  # fmt: skip
    assert len(chunks) == 2 and (launched["addr_"], launched["mean"]) == (2, 1)
    for row, lost in chunks:
        torch.testing.assert_close(row.lost.double(), lost, rtol=0, atol=1e-5 * float(lost.abs().max()))
        assert int((lost == 0).sum()) == (row is chunks[0][0])
