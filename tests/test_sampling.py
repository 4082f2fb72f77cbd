"""Losses over a part of the classes: the positives of a batch, and others at random."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from table import F64
from test_linear import CLASSES, ROWS, WIDTH, Watched, unfused
from torch import Tensor, nn

import mlkernels
from mlkernels import LinearLoss, TileSGD
from mlkernels.linear.sampling import IGNORED, ClassSampler
from mlkernels.schedule import Snapshot

CPU = torch.device("cpu")


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features and labels of a few classes, of which one row is ignored and holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    x, target = torch.randn(ROWS, WIDTH, generator=generator, dtype=F64), torch.randint(3, (ROWS,), generator=generator)
    target, x[2] = 7 * target, float("nan")
    target[2] = -100
    return x.requires_grad_(), target


def next_sample(linear: LinearLoss, target: Tensor, ignored: int = -100) -> tuple[Tensor, Tensor]:
    """The classes that the next call will see, and the labels among them."""
    sample = copy.deepcopy(linear.sampler).draw(target, ignored)
    return sample.classes, torch.where(sample.label == IGNORED, -100, sample.label)


def make(loss: Any = None, sample: int | None = 8, **options: Any) -> LinearLoss:
    torch.manual_seed(0)
    return LinearLoss(loss or mlkernels.CrossEntropyLoss(), WIDTH, CLASSES, sample=sample, dtype=F64, **options)


# ---- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [1, 7, 20, 60])
@pytest.mark.parametrize("rows", [0, 5, 40])
def test_what_is_drawn(sample, rows):
    """On each of three ranks all positives in ascending order, then others, none twice; all ranks number them alike."""
    offsets, classes = (0, 9, 18, 20), 20
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(rows))
    target[1:3] = torch.tensor([4, classes + 5])[: max(rows - 1, 0)]  # ignored, and out of range
    for seed in range(5):
        every = [ClassSampler(sample, None, offsets, CPU, rank, seed).draw(target, 4) for rank in range(3)]
        kept = target[(target != 4) & (target < classes)]
        for rank, found in enumerate(every):
            first, last = offsets[rank : rank + 2]
            positives = kept[(kept >= first) & (kept < last)].unique()
            drawn = found.classes + first
            assert torch.equal(drawn[: len(positives)], positives) and found.positives == len(positives)
            assert len(drawn.unique()) == len(drawn) == min(last - first, max(sample, len(positives)))
            assert ((drawn >= first) & (drawn < last)).all()
            assert torch.equal(found.label, every[0].label) and found.starts == every[0].starts
        numbers = torch.cat([found.classes + found.first for found in every])
        assert torch.equal(numbers[every[0].label[(target != 4) & (target < classes)]], kept)
        assert (every[0].label[target == 4] == IGNORED).all()
        assert (every[0].label[target >= classes] == len(numbers)).all()


def test_others_are_drawn_alike():
    """Each class that is no positive as often, within four standard deviations."""
    sampler, counts = ClassSampler(10, None, (0, 40), CPU, seed=0), torch.zeros(40)
    for _ in range(2000):
        found = sampler.draw(torch.tensor([3, 5, 3]), -100)
        counts[found.classes] += 1
    assert (counts[[3, 5]] == 2000).all()
    chance = 8 / 38
    others = counts[[c for c in range(40) if c not in (3, 5)]] / 2000
    assert ((others - chance).abs() < 4 * (chance * (1 - chance) / 2000) ** 0.5).all()
    assert float(found.share) == pytest.approx(chance)


# ---- the loss --------------------------------------------------------------------------------------------------------

VECTOR = torch.linspace(0.5, 2.0, CLASSES, dtype=F64)
MARGINS = torch.linspace(0.1, 0.4, CLASSES, dtype=F64)


def losses(classes: Tensor | None, margins: Tensor) -> dict[str, Any]:
    """Losses with tensors per class, for some classes or all."""
    of = (lambda t: t) if classes is None else (lambda t: t[classes])
    common = {"weight": of(VECTOR), "logit_adjustment": of(VECTOR.log())}
    return {
        "options": mlkernels.CrossEntropyLoss(**common, label_smoothing=0.1, z_loss=0.01),
        "margins": lambda f, y: mlkernels.margin_cross_entropy(
            f, y, m2=of(margins), scale=4.0, weight=of(VECTOR), reduction="sum"
        ),
        "rows": mlkernels.MarginLoss(m3=torch.linspace(0, 0.3, ROWS, dtype=F64)[:, None], scale=4.0, reduction="none"),
        "two scales": lambda f, y: mlkernels.two_scale_cross_entropy(f, y, 1.0, 3.0, eta=0.5),
    }


@pytest.mark.parametrize("sample", [2, 8, CLASSES])
@pytest.mark.parametrize("name", ["options", "margins", "rows", "two scales"])
def test_as_over_the_drawn_classes_alone(name, sample):
    """Loss, statistics and all gradients; a class that was not drawn has none. Two are fewer than the positives."""
    margins = MARGINS.clone().requires_grad_()
    normalize = name in ("margins", "rows")
    linear = make(losses(None, margins)[name], sample, normalize=normalize, bias=not normalize)
    x, target = batch()
    classes, label = next_sample(linear, target)
    loss, rows = linear(x, target, return_stats=True)
    theirs, leaf = x.detach().clone().requires_grad_(), margins.detach().clone().requires_grad_()
    weight = linear.weight.detach().clone().requires_grad_()
    logits = unfused(theirs, weight[classes], None if normalize else linear.bias.detach()[classes], normalize)
    wanted = losses(classes, leaf)[name](logits, label)
    torch.testing.assert_close(loss, wanted)
    loss.sum().backward(), wanted.sum().backward()
    torch.testing.assert_close((x.grad, linear.weight.grad), (theirs.grad, weight.grad))
    if name == "margins":
        torch.testing.assert_close(margins.grad, leaf.grad)
    best = logits + (VECTOR.log()[classes] if name == "options" else 0)
    kept = target != -100
    assert torch.equal(rows.prediction[kept], classes[best.argmax(1)][kept]) and rows.prediction[2] == -1


def test_another_ignore_index():
    """One that is among the numbers of the sampled classes."""
    linear = make(mlkernels.CrossEntropyLoss(ignore_index=1), 5)
    x, target = batch()
    x = x.detach().nan_to_num()
    target[2], target[3] = 1, 14
    classes, label = next_sample(linear, target, 1)
    torch.testing.assert_close(linear(x, target), F.cross_entropy(x @ linear.weight[classes].T, label))


def test_all_classes_where_nothing_is_trained():
    linear = make(sample=4).eval()
    x, target = batch()
    assert torch.equal(linear(x, target), make(sample=None)(x, target))
    linear.train()
    with torch.no_grad():
        first = linear(x, target)
        assert linear(x, target) == first  # not counted
    assert linear(x, target) == first  # the one that a checkpoint makes again
    assert linear(x, target) != first


def test_importance_is_right_on_average():
    """The sum of exponentials over all draws is that over all classes; without the correction it is far from it."""
    x, target = batch()
    x = x.detach()
    for scale in (2.0, nn.Parameter(torch.tensor(2.0, dtype=F64))):
        loss = mlkernels.CrossEntropyLoss(scale=scale, logit_adjustment=VECTOR.log())
        exact = make(loss, None)(x, target, return_stats=True)[1].logsumexp.exp()
        found = {}
        for correction in (None, "importance"):
            linear = make(loss, 12, sample_correction=correction)
            sums = torch.stack([linear(x, target, return_stats=True)[1].logsumexp.exp() for _ in range(100)]).detach()
            found[correction] = (sums.mean(0) - exact) / exact, sums.std(0) / exact / 10
        kept = target != -100
        error, deviation = (each[kept] for each in found["importance"])
        assert (error.abs() < 4 * deviation + 1e-9).all()
        assert found[None][0][kept].mean() < -0.2


# ---- the update by rows ----------------------------------------------------------------------------------------------


def test_partial_fc():
    """insightface's steps, written out: sampled rows of weight and momentum out, SGD on them, back in; its ArcFace adds
    the margin to angles that have no gradient of their own."""
    numbers = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    arcface = mlkernels.ArcFaceLoss(margin=0.5, scale=8.0, gradient="straight_through", beyond_pi="none")
    linear = make(arcface, 8, normalize=True, tile_update=TileSGD(**numbers))
    weight, momentum = linear.weight.detach().clone(), torch.zeros(CLASSES, WIDTH, dtype=F64)
    for step in range(6):
        x, target = batch(step)
        x = x.detach().nan_to_num(0.5).requires_grad_()
        target[2] = 3 * step
        index, label = next_sample(linear, target)
        sub = nn.Parameter(weight[index])
        optimizer = torch.optim.SGD([sub], **numbers)
        optimizer.state[sub]["momentum_buffer"] = momentum[index].clone()
        leaf = x.detach().requires_grad_()
        cosines = F.linear(F.normalize(leaf), F.normalize(sub)).clamp(-1, 1)
        with torch.no_grad():
            moved = cosines.arccos()
            moved[torch.arange(ROWS), label] += 0.5
            moved = moved.cos() - cosines
        F.cross_entropy(8.0 * (cosines + moved), label).backward()
        optimizer.step()
        weight[index], momentum[index] = sub.detach(), optimizer.state[sub]["momentum_buffer"]
        linear(x, target).backward()
        torch.testing.assert_close(linear.weight.detach(), weight, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(linear.update.momentum_buffer, momentum, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(x.grad, leaf.grad)


def test_others_do_not_move():
    """Not by momentum, not by decay; a row's first step is its own, whenever that is."""
    numbers = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}
    linear = make(sample=6, tile_update=TileSGD(**numbers), bias=True, memory=3000)
    seen: set[int] = set()
    for step in range(4):
        x, target = batch(step)
        classes, label = next_sample(linear, target)
        before = linear.weight.detach().clone(), linear.update.momentum_buffer.clone()
        w = before[0][classes].requires_grad_()
        F.cross_entropy(x.detach().nan_to_num() @ w.T + linear.bias.detach()[classes], label).backward()
        gradient = w.grad + 0.1 * before[0][classes]
        fresh = torch.tensor([int(c) not in seen for c in classes])[:, None]
        momentum = torch.where(fresh, gradient, 0.9 * before[1][classes] + 0.5 * gradient)
        linear(x, target).backward()
        seen |= set(classes.tolist())
        others = torch.tensor([c not in classes for c in range(CLASSES)])
        for now, then in zip((linear.weight, linear.update.momentum_buffer), before, strict=True):
            assert torch.equal(now[others], then[others])
        torch.testing.assert_close(linear.update.momentum_buffer[classes], momentum)
        torch.testing.assert_close(linear.weight[classes].detach(), before[0][classes] - 0.1 * momentum)
        assert linear.weight.grad is None and not linear.bias.grad[others].any()
        linear.bias.grad = None


def test_memory_is_that_of_the_sample():
    linear = LinearLoss(
        mlkernels.CosFaceLoss(scale=4.0), 64, 4000, normalize=True, sample=200, memory=100_000,
        tile_update=TileSGD(0.1, momentum=0.9),
    )  # fmt: skip
    x, target = torch.randn(16, 64, requires_grad=True), torch.arange(16)
    with Watched() as watched:
        linear(x, target).backward()
    assert watched.peak < 300_000  # the drawn rows: 51,200; the weight: 1,024,000


def test_draws_are_state():
    """Loaded, copied or put back, the same classes are drawn again."""
    linear, (x, target) = make(), batch()
    snapshot = Snapshot(linear)
    linear(x, target)
    snapshot.save()
    other = make()
    other.load_state_dict(linear.state_dict())
    copied = copy.deepcopy(linear)
    losses = [each(x, target) for each in (linear, other, copied)]
    later = linear(x, target)
    snapshot.restore()
    assert losses[0] == losses[1] == losses[2] == linear(x, target) != later


BAD = [
    (ValueError, "sample must be an integer >= 1", lambda x, y: make(sample=0)),
    (ValueError, "sample_correction must be 'importance' or None", lambda x, y: make(sample_correction="log")),
    (ValueError, "it goes with sample=", lambda x, y: make(sample=None, sample_correction="importance")),
    (ValueError, "sample_correction takes no label_smoothing", lambda x, y: make(
        mlkernels.FocalLoss(label_smoothing=0.1), sample_correction="importance")(x, y)),
    (ValueError, "sample_correction takes one scale for all rows", lambda x, y: make(
        lambda f, y: mlkernels.two_scale_cross_entropy(f, y, 1.0, 3.0), sample_correction="importance")(x, y)),
    (ValueError, "sample_correction takes one scale for all rows", lambda x, y: make(
        mlkernels.CrossEntropyLoss(scale=VECTOR), sample_correction="importance")(x, y)),
    (RuntimeError, "leave the linear head out of the checkpoint", lambda x, y: torch.utils.checkpoint.checkpoint(
        make(), x, y, use_reentrant=False)),
    (IndexError, "target 23 at row 0 is out of range", lambda x, y: make()(x, torch.full_like(y, CLASSES))),
]  # fmt: skip


@pytest.mark.parametrize("error, words, call", BAD, ids=[f"{at}" for at in range(len(BAD))])
def test_bad_arguments(error, words, call):
    with pytest.raises(error, match=words):
        call(*batch())
