"""An auxiliary loss on trial: what is kept, what leaves no trace, what an iteration costs, what is refused."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from test_snapshot import Average, Count, same
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import mlkernels
from mlkernels.schedule import MILS, Step

CLASSES = 4


class Network(nn.Module):
    """Features and logits; batch norm and dropout on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(input))


class Both(Network):
    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        features = self.body(input)
        return features, self.classifier(features)


class Around(nn.Module):
    """A loss of the user's own, which takes no more than outputs and targets."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.loss(output, target)


def samples(n: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(3))
    return x, x[:, :CLASSES].argmax(1)


X, Y = samples()


def nan_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output.sum() * torch.nan


def worse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Away from the labels, and far."""
    return -1000 * nn.functional.cross_entropy(output, target)


def build(model: nn.Module | None = None, optimizer: Any = None, **options: Any) -> MILS:
    torch.manual_seed(0)
    model = Network() if model is None else model
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    options = {
        "primary": mlkernels.CrossEntropyLoss(),
        "auxiliary": mlkernels.MultiMarginLoss(),
        "observation": (TensorDataset(X, Y), 32),
        "participation": 0.5,
    } | options
    return MILS(model, optimizer, **options)


def run(mils: MILS, iterations: int, start: int = 0) -> list[Step]:
    steps = []
    for k in range(start, start + iterations):
        rows = torch.arange(16 * k, 16 * k + 16) % len(X)
        steps.append(mils.step(X[rows], Y[rows]))
    return steps


def state(mils: MILS) -> Any:
    optimizers = [optimizer.state_dict() for optimizer in mils.optimizers]
    chance = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    gradients = [parameter.grad for parameter in mils.model.parameters()]
    return copy.deepcopy((mils.model.state_dict(), optimizers, chance, gradients))


def plain_loop(iterations: int, **options: Any) -> Any:
    """The same run by hand, without MILS."""
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for k in range(iterations):
        rows = torch.arange(16 * k, 16 * k + 16) % len(X)
        optimizer.zero_grad()
        mlkernels.cross_entropy(model(X[rows]), Y[rows]).backward()
        optimizer.step()
    return copy.deepcopy((model.state_dict(), [optimizer.state_dict()]))


# ---- what it does ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auxiliary", [nan_loss, worse], ids=["nan", "worse"])
def test_a_rejected_attempt_leaves_no_trace(auxiliary: Any) -> None:
    """From the first step on, where the optimizer has no state yet; dropout draws the same masks."""
    mils = build(auxiliary=auxiliary, participation=1.0)
    steps = run(mils, 12)
    assert all(step.used == "primary" and step.accepted is False for step in steps)
    statistics = mils.statistics()
    assert (statistics.attempts, statistics.acceptances, statistics.ratio) == (12, 0, 0.0)
    assert statistics.non_finite == (12 if auxiliary is nan_loss else 0)
    never = build(participation=0.0)
    run(never, 12)
    assert same(state(mils)[:3], state(never)[:3])
    assert same(state(mils)[3], state(never)[3])
    assert same(state(never)[:2], plain_loop(12))


def test_gradients_that_nobody_clears_go_on_adding_up() -> None:
    """A norm over all gradients sees those of parameters that no optimizer here has, too."""

    def trained(participation: float) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(X.shape[1], int(Y.max()) + 1)
        optimizer = torch.optim.SGD([model.weight], lr=0.5)
        mils = MILS(
            model, optimizer, primary=mlkernels.CrossEntropyLoss(), auxiliary=mlkernels.MultiMarginLoss(),
            observation=(X[:4], torch.full((4,), -1)), participation=participation,
            before_step=lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.5),
        )  # fmt: skip
        for k in range(3):
            assert mils.step(X[8 * k : 8 * k + 8], Y[8 * k : 8 * k + 8]).used == "primary"
        return [model.weight.detach(), model.bias.grad.clone()]

    for tried, plain in zip(trained(1.0), trained(0.0), strict=True):
        assert torch.equal(tried, plain)


def test_sloppy_randomness_is_put_back_too() -> None:
    """An observation set that is augmented by the global generators."""

    def observation() -> tuple[torch.Tensor, torch.Tensor]:
        random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002
        return X, Y

    mils = build(auxiliary=nan_loss, participation=1.0, observation=observation)
    never = build(participation=0.0)
    random.seed(0), np.random.seed(0)  # noqa: NPY002
    run(mils, 3)
    left = state(mils)
    random.seed(0), np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    never = build(participation=0.0)
    run(never, 3)
    assert same(left, state(never))

    loose = build(auxiliary=nan_loss, participation=1.0, observation=observation, restore_rng=False)
    run(loose, 3)
    assert not same(state(loose)[0], state(never)[0])


def test_an_accepted_attempt_is_the_auxiliary_step() -> None:
    mils = build(participation=1.0, accept="not_worse", observation=lambda: (X[:1], torch.full((1,), 99)))
    step = mils.step(X, Y)
    assert step.accepted is True and step.used == "MultiMarginLoss"

    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    loss = mlkernels.multi_margin_loss(model(X), Y)
    loss.backward()
    optimizer.step()
    assert same(model.state_dict(), mils.model.state_dict())
    assert torch.equal(step.loss, loss.detach()) and not step.loss.requires_grad
    assert mils.statistics().by_auxiliary == {"MultiMarginLoss": (1, 1)}


@pytest.mark.parametrize("accept, kept", [("improves", False), ("not_worse", True)])
def test_a_tie(accept: str, kept: bool) -> None:
    """Labels that nobody can predict: as many right as before, none."""
    mils = build(participation=1.0, accept=accept, observation=(X, torch.full_like(Y, 99)))
    assert [step.accepted for step in run(mils, 4)] == [kept] * 4


def test_an_improvement_is_kept() -> None:
    """An auxiliary loss that learns, against logits that start constant: all rows are predicted as class 0."""
    model = nn.Linear(6, CLASSES)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    mils = build(model, torch.optim.SGD(model.parameters(), lr=1.0), participation=1.0, observation=(X, Y))
    assert mils.step(X, Y).accepted is True
    worst = build(model, torch.optim.SGD(model.parameters(), lr=1.0), participation=1.0, auxiliary=worse,
                  observation=(X, Y), accept="not_worse")  # fmt: skip
    assert worst.step(X, Y).accepted is False


def test_nan_logits_are_never_accepted() -> None:
    """A gradient that is NaN where the loss is not; argmax of NaN is class 0, which is right for some."""

    def auxiliary(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output * 0).abs().pow(0.5).sum()  # 0, with gradient inf * 0

    mils = build(auxiliary=auxiliary, participation=1.0, accept="not_worse", observation=(X, torch.zeros_like(Y)))
    step = mils.step(X, Y)
    assert step.accepted is False and mils.statistics().non_finite == 1
    assert all(bool(parameter.isfinite().all()) for parameter in mils.model.parameters())


def test_the_coin_is_fair() -> None:
    mils = build(model=nn.Linear(6, CLASSES), participation=0.2, observation=(X[:2], Y[:2]))
    for _ in range(600):
        mils.step(X[:2], Y[:2])
    assert 85 < mils.statistics().attempts < 155
    mils.participation = 0.0
    assert mils.statistics(reset=True).iterations == 600
    run(mils, 5)
    statistics = mils.statistics()
    assert (statistics.iterations, statistics.attempts) == (5, 0)
    assert math.isnan(statistics.ratio)


def test_auxiliary_losses_take_turns() -> None:
    seen = []

    def first(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append("first")
        return output.sum()

    def second(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append("second")
        return output.sum()

    mils = build(auxiliary=[first, second], participation=1.0)
    run(mils, 5)
    assert seen == ["first", "second", "first", "second", "first"]
    assert {name: tried for name, (tried, _) in mils.statistics().by_auxiliary.items()} == {"first": 3, "second": 2}
    assert list(build(auxiliary=[nn.CrossEntropyLoss(), nn.CrossEntropyLoss()]).auxiliary) == [
        "CrossEntropyLoss", "CrossEntropyLoss_1"]  # fmt: skip
    assert list(build(auxiliary={"a": first, "b": second}).auxiliary) == ["a", "b"]


def test_auxiliary_on_features_with_parameters_of_its_own() -> None:
    """Center loss on features, its centers stepped by the same optimizer, or moved by themselves."""
    for rate in (None, 0.5):
        torch.manual_seed(0)
        model, center = Both(), mlkernels.CenterLoss(num_features=8, num_classes=CLASSES, rate=rate)
        centers = center.centers.detach().clone()
        optimizer = torch.optim.Adam([*model.parameters(), *center.parameters()], lr=0.01)
        primary = mlkernels.JointLoss([mlkernels.CrossEntropyLoss()], inputs=[1])
        auxiliary = mlkernels.JointLoss([center], inputs=[0])
        common = {"primary": primary, "auxiliary": auxiliary, "participation": 1.0, "logits": lambda output: output[1]}
        rejected = build(model, optimizer, observation=(X, torch.full_like(Y, 99)), **common)
        assert rejected.step(X, Y).accepted is False
        assert torch.equal(center.centers, centers)
        accepted = build(model, optimizer, accept="not_worse", observation=(X, torch.full_like(Y, 99)), **common)
        assert accepted.step(X, Y).accepted is True
        assert not torch.equal(center.centers, centers)


def test_several_optimizers_and_extras() -> None:
    torch.manual_seed(0)
    model = Network()
    weights = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizers = [torch.optim.Muon(weights, lr=0.02), torch.optim.AdamW(others, lr=0.01)]

    def auxiliary(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        average.update_parameters(model)
        return nan_loss(output, target)

    mils = build(model, optimizers, auxiliary=auxiliary, participation=1.0, extras=[average])
    before = copy.deepcopy(average.state_dict())
    run(mils, 3)
    assert same(average.state_dict(), before)
    assert all(len(optimizer.state) > 0 for optimizer in optimizers)
    moved = [p.detach().clone() for p in model.parameters()]
    run(mils, 1)
    assert all(not torch.equal(a, b) for a, b in zip(moved, model.parameters(), strict=True))


def test_lbfgs() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, CLASSES)
    mils = build(model, torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4), auxiliary=nan_loss)
    torch.manual_seed(0)
    other = nn.Linear(6, CLASSES)
    plain = build(other, torch.optim.LBFGS(other.parameters(), lr=0.5, max_iter=4), participation=0.0)
    losses = [step.loss.item() for step in run(mils, 8)]
    run(plain, 8)
    assert mils.statistics().attempts > 0 and losses[-1] < losses[0]
    assert same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_autocast_scaler_clipping_and_a_schedule(dtype: torch.dtype | None) -> None:
    """Each with what it changes put back; the learning rate steps once per iteration."""

    def make(**options: Any) -> tuple[MILS, Any, Any, list[float]]:
        torch.manual_seed(0)
        model = Network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        norms: list[float] = []

        def clip() -> None:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))

        autocast = None if dtype is None else torch.autocast("cpu", dtype)
        mils = build(model, optimizer, scaler=scaler, before_step=clip, autocast=autocast, **options)
        return mils, scheduler, scaler, norms

    ends = []
    for options in ({"participation": 0.0}, {"participation": 0.5, "auxiliary": nan_loss}):
        mils, scheduler, scaler, norms = make(**options)
        for k in range(8):
            run(mils, 1, k)
            scheduler.step()
        assert scheduler.last_epoch == 8
        ends.append((state(mils)[:3], scheduler.state_dict(), scaler.state_dict()))
        assert len(norms) == 8 + mils.statistics().attempts
        assert all(norm < 50 for norm in norms if math.isfinite(norm))  # unscaled
    assert mils.statistics().attempts > 1
    assert same(*ends)
    assert ends[0][2]["scale"] != 2.0**10


@pytest.mark.parametrize(
    "auxiliary, kept", [(nan_loss, False), (mlkernels.FocalLoss(), True)], ids=["rejected", "kept"]
)
def test_an_autocast_around_the_step(auxiliary: Any, kept: bool) -> None:
    """It keeps casts of weights until it is left."""
    hopeless = X, torch.full_like(Y, 99)
    options = {"auxiliary": auxiliary, "participation": 1.0, "accept": "not_worse", "observation": hopeless}
    inside = build(**options, autocast=torch.autocast("cpu", torch.bfloat16))
    steps = [step.accepted for step in run(inside, 3)]
    around = build(**options)
    for k in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            run(around, 1, k)
    assert steps == [kept] * 3
    assert same(state(around)[:3], state(inside)[:3])


def test_a_score_within_an_autocast_sees_the_step() -> None:
    model = nn.Linear(6, CLASSES)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    mils = build(model, torch.optim.SGD(model.parameters(), lr=1.0), participation=1.0, observation=(X, Y))
    with torch.autocast("cpu", torch.bfloat16):
        assert mils.step(X, Y).accepted is True


IGNORED = torch.where(
    (torch.arange(len(Y)) % 7 == 0) | ((torch.arange(len(Y)) >= 20) & (torch.arange(len(Y)) < 50)), -100, Y
)
UNEVEN = (0, 11), (11, 20), (20, 50), (50, 60), (60, 96)  # of the third batch nothing is kept
KEPT = [int((IGNORED[start:end] >= 0).sum()) for start, end in UNEVEN]
CLASS_WEIGHTS = torch.tensor([0.2, 3.0, 1.0, 0.5])


@pytest.mark.parametrize(
    "loss, labels, counts",
    [
        (mlkernels.CrossEntropyLoss(), IGNORED, None),
        (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), IGNORED, None),
        (mlkernels.JointLoss([nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)]), IGNORED, None),
        (nn.CrossEntropyLoss(ignore_index=1, reduction="sum"), Y, None),
        (
            mlkernels.JointLoss([mlkernels.FocalLoss(ignore_index=1)], mode="uncertainty"),
            Y.where(IGNORED >= 0, 1),
            None,
        ),
        (mlkernels.MultiMarginLoss(weight=CLASS_WEIGHTS), Y, None),
        (nn.functional.cross_entropy, IGNORED, None),
        (nn.functional.cross_entropy, nn.functional.one_hot(Y).float(), None),
        (nn.CrossEntropyLoss(), IGNORED, [KEPT[0], torch.tensor(KEPT[1]), 0, torch.tensor([float(KEPT[3])]), KEPT[4]]),
        (nn.functional.cross_entropy, IGNORED, [n / 8 for n in KEPT]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_accumulated_batches_are_one(loss: Any, labels: torch.Tensor, counts: Any) -> None:
    """Whatever each holds: its rows weigh alike, not the batches; a batch of which nothing is kept adds nothing."""
    ends = []
    for parts in (UNEVEN, ((0, 96),)):
        torch.manual_seed(0)
        model = nn.Linear(6, CLASSES)
        own = copy.deepcopy(loss)
        own = own if isinstance(own, nn.Module) else loss
        extra = list(own.parameters()) if isinstance(own, nn.Module) else []
        mils = build(model, torch.optim.SGD([*model.parameters(), *extra], lr=0.1), participation=0.0, primary=own)
        batches = [(X[start:end], labels[start:end]) for start, end in parts]
        step = mils.accumulate(batches, counts=counts if len(parts) > 1 else None)
        assert mils.statistics().iterations == 1
        ends.append((model.weight.detach(), model.bias.detach(), step.loss))
    torch.testing.assert_close(*ends)


W = torch.tensor([0.0, 3.0, 1.0, 0.5], dtype=torch.float64)
OPTIONS = {"weight": W, "z_loss": 0.1, "label_smoothing": 0.1, "ignore_index": 3}
#: The second batch holds nothing but a class of weight 0, the third nothing that is kept.
LABELS = torch.where(IGNORED < 0, 3, IGNORED).index_fill(0, torch.arange(*UNEVEN[1]), 0)
TABLES = torch.rand(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
SEVERAL = {
    "cross_entropy": mlkernels.CrossEntropyLoss(**OPTIONS),
    "plain": mlkernels.CrossEntropyLoss(weight=W, label_smoothing=0.1, ignore_index=3),
    "focal": mlkernels.FocalLoss(**OPTIONS),
    "modulated": mlkernels.ModulatedCrossEntropyLoss(**OPTIONS),
    "margin": mlkernels.MarginLoss(m2=nn.Parameter(torch.tensor(0.3, dtype=torch.float64)), scale=4.0, **OPTIONS),
    "arcface": mlkernels.ArcFaceLoss(scale=4.0, **OPTIONS),
    "cosface": mlkernels.CosFaceLoss(scale=4.0, **OPTIONS),
    "sphereface": mlkernels.SphereFaceLoss(scale=4.0, **OPTIONS),
    "two_scale": mlkernels.JointLoss([mlkernels.TwoScaleLoss(2.0, **OPTIONS)], inputs=[(0, 2)]),
    "groups": mlkernels.JointLoss([mlkernels.PiecewiseLoss(t_slope=TABLES, **OPTIONS)], inputs=[(0, 1)]),
    "weighed beside plain": mlkernels.JointLoss(
        [mlkernels.CrossEntropyLoss(**OPTIONS), mlkernels.FocalLoss(ignore_index=3, z_loss=0.2)], mode="uncertainty"
    ),
    "weighed twice": mlkernels.JointLoss(
        [mlkernels.FocalLoss(**OPTIONS), mlkernels.JointLoss([mlkernels.FocalLoss(**OPTIONS | {"weight": W.sqrt()})])]
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_accumulated_means_of_several_divisors(name: str) -> None:
    """Class weights are divided by their sum, a z-loss by the rows: both as those of one batch, to rounding."""

    def forward(model: nn.Module, input: torch.Tensor) -> Any:
        logits = model(input)
        group, norm = (input[:, 5] > 0).long(), torch.tensor(1.5, dtype=torch.float64)
        return (logits, group, norm) if name in ("two_scale", "groups") else logits

    ends = []
    for parts in (UNEVEN, ((0, 96),)):
        torch.manual_seed(0)
        model, loss = nn.Linear(6, CLASSES).double(), copy.deepcopy(SEVERAL[name]).double()
        trained = [*model.parameters(), *loss.parameters()]
        mils = build(model, torch.optim.SGD(trained, lr=0.1), participation=0.0, primary=loss, forward=forward)
        step = mils.accumulate([(X[start:end].double(), LABELS[start:end]) for start, end in parts])
        ends.append([*(parameter.detach() for parameter in trained), step.loss])
        assert same(dict(loss.named_buffers()), dict(SEVERAL[name].named_buffers()))
    torch.testing.assert_close(*ends, rtol=1e-13, atol=1e-15)


def test_a_batch_without_rows_is_no_failed_attempt() -> None:
    empty = X[:8], torch.full((8,), -100)
    auxiliary = mlkernels.FocalLoss()
    mils = build(participation=1.0, accept="not_worse", observation=(X, torch.full_like(Y, 99)), auxiliary=auxiliary)
    for batches in ([empty, (X[:16], Y[:16])], [(X[:16], Y[:16]), empty]):
        step = mils.accumulate(batches)
        assert step.accepted is True and step.loss.isfinite()
        assert all(bool(parameter.isfinite().all()) for parameter in mils.model.parameters())
    step = mils.accumulate([empty, empty])
    assert step.accepted is False and step.loss.isnan()
    assert all(bool(parameter.isfinite().all()) for parameter in mils.model.parameters())


@pytest.mark.parametrize(
    "options, targets, counts, error, message",
    [
        ({}, Y, [1], ValueError, "counts must be one per batch, 2, got 1"),
        ({}, Y, [1, -1], ValueError, r"counts must be >= 0 and not all 0, got \[1, -1\]"),
        ({}, Y, [0, 0], ValueError, "counts must be >= 0 and not all 0"),
        ({}, Y, [1, math.inf], ValueError, "counts must be"),
        ({}, Y, [1, "two"], TypeError, "counts"),
        ({"primary": lambda output, target: output.sum()}, [1, 2], None, TypeError, "counts must be given where targ"),
        ({"primary": mlkernels.JointLoss([nn.CrossEntropyLoss(ignore_index=0), nn.CrossEntropyLoss()])}, Y, None,
         ValueError, r"counts must be given where the parts of primary differ: .*ignore_index \[-100, 0\]"),
        ({"primary": mlkernels.JointLoss([nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss()])}, Y, None,
         ValueError, r"differ: reduction \['mean', 'sum'\]"),
        ({"primary": mlkernels.JointLoss([nn.CrossEntropyLoss(weight=torch.ones(4)), mlkernels.MultiMarginLoss()])}, Y,
         None, ValueError, r"class weights in 1 of 2"),
        ({"primary": mlkernels.JointLoss([nn.CrossEntropyLoss(weight=torch.ones(4)), mlkernels.focal_loss])}, Y, None,
         ValueError, r"class weights in 1 of 1"),
        ({"primary": Around(mlkernels.CrossEntropyLoss(weight=torch.ones(4), z_loss=0.1))}, Y, None,
         ValueError, r"class weights in 1 of 1 beside a z_loss"),
        ({"primary": functools.partial(mlkernels.focal_loss, weight=torch.ones(4), reduction="mean")}, Y, None,
         ValueError, r"counts must be given where primary is a function with its own weight: a module tells them"),
    ],
)  # fmt: skip
def test_bad_counts(options: Any, targets: Any, counts: Any, error: type[Exception], message: str) -> None:
    mils = build(**({"participation": 0.0} | options))
    with pytest.raises(error, match=message):
        mils.accumulate([(X, targets), (X, targets)], counts=counts)


def test_accumulation() -> None:
    """Several batches are one iteration, tried and retried whole."""
    model = nn.Linear(6, CLASSES)
    whole = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    calls = []

    def auxiliary(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(len(target))
        return output.sum() * (torch.nan if len(calls) == 2 else 1.0)

    tried = build(model, torch.optim.SGD(model.parameters(), lr=0.1), participation=1.0, auxiliary=auxiliary)
    result = tried.accumulate([(X[:10], Y[:10]), (X[10:], Y[10:])])
    assert calls == [10, 86] and result.accepted is False and result.used == "primary"
    plain = build(whole, torch.optim.SGD(whole.parameters(), lr=0.1), participation=0.0)
    whole.load_state_dict(before)
    plain.accumulate([(X[:10], Y[:10]), (X[10:], Y[10:])])
    assert same(model.state_dict(), whole.state_dict())


def test_a_forward_of_ones_own() -> None:
    seen = []

    def forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(model.training)
        return {"logits": model(batch["pixels"])}

    mils = build(
        forward=forward,
        logits=lambda output: output["logits"],
        primary=lambda output, target: nn.functional.cross_entropy(output["logits"], target),
        auxiliary=lambda output, target: nn.functional.multi_margin_loss(output["logits"], target),
        observation=({"pixels": X}, Y),
        participation=1.0,
        accept="not_worse",
    )
    mils.step({"pixels": X[:8]}, Y[:8])
    assert seen[:3] == [False, True, False]


def test_modes_are_put_back_each() -> None:
    model = Network()
    model.body[1].eval()  # a frozen batch norm
    mils = build(model, auxiliary=nan_loss, participation=1.0)
    run(mils, 2)
    assert model.training and model.body[3].training and not model.body[1].training

    def broken(output: torch.Tensor) -> torch.Tensor:
        raise KeyError("logits")

    mils = build(model, participation=1.0, logits=broken)
    with pytest.raises(KeyError):
        run(mils, 1)
    assert model.training and not model.body[1].training


def test_segmentation() -> None:
    model = nn.Conv2d(1, 3, 1)
    x, y = torch.randn(4, 1, 5, 5), torch.randint(3, (4, 5, 5))
    mils = build(model, torch.optim.SGD(model.parameters(), 0.1), auxiliary=mlkernels.FocalLoss(), participation=1.0,
                 observation=(x, y))  # fmt: skip
    mils.step(x, y)
    assert mils.statistics().attempts == 1


# ---- the observation set ---------------------------------------------------------------------------------------------


class Items(Dataset[Any]):
    """Single samples, each its own index as input."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.asked.append(index)
        return X[index], int(Y[index])


class Batched(Items):
    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        return [self[index] for index in indices]


@pytest.mark.parametrize("kind", [Items, Batched])
def test_samples_are_drawn_anew_without_repeats(kind: Any) -> None:
    dataset = kind()
    mils = build(observation=(dataset, 20), participation=1.0)
    run(mils, 2)
    first, second = dataset.asked[:20], dataset.asked[20:]
    assert len(set(first)) == len(set(second)) == 20
    assert set(first) != set(second)
    assert all(0 <= index < len(X) for index in first)
    mils = build(observation=(kind(), np.int64(len(X))), participation=1.0)
    run(mils, 1)


class Named(nn.Module):
    """A model of several inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, CLASSES)

    def forward(self, input: dict[str, Any]) -> torch.Tensor:
        return self.layer(input["parts"][0]) + input["more"]["shift"]


def test_samples_in_containers() -> None:
    """Which default_collate stacks, and which go to the model's device as they are: a batch scores as by hand."""
    items = [({"parts": (x, "a name"), "more": {"shift": x[:CLASSES] / 9}}, y) for x, y in zip(X, Y, strict=True)]
    mils = build(Named(), observation=(items, len(items)), auxiliary=worse, participation=1.0)
    input, target = mils._observe()
    assert sorted(target.tolist()) == sorted(Y.tolist()) and input["parts"][1] == ["a name"] * len(items)
    right = (mils.model.layer(X) + X[:, :CLASSES] / 9).argmax(1) == Y
    assert int(mils._score(input, target)[0]) == int(right.sum())
    whole = {"parts": (X, "a name"), "more": {"shift": X[:, :CLASSES] / 9}}
    assert mils.step(whole, Y).accepted is False


def test_its_own_generator() -> None:
    """The global one is untouched where nothing is tried; the same seed tries the same."""
    generator = torch.Generator().manual_seed(9)
    mils = build(nn.Linear(6, CLASSES), generator=generator)
    before = torch.get_rng_state()
    accepted = [step.accepted for step in run(mils, 20)]
    assert torch.equal(torch.get_rng_state(), before)
    again = build(nn.Linear(6, CLASSES), generator=torch.Generator().manual_seed(9))
    other = build(nn.Linear(6, CLASSES), generator=torch.Generator().manual_seed(10))
    assert accepted == [step.accepted for step in run(again, 20)]
    assert accepted != [step.accepted for step in run(other, 20)]


@pytest.mark.parametrize("cut", [0, 7])
def test_resumed_to_the_bit(cut: int, tmp_path: Any) -> None:
    auxiliary = [mlkernels.MultiMarginLoss(), mlkernels.FocalLoss()]
    whole = build(auxiliary=auxiliary)
    wanted = run(whole, 20)

    first = build(auxiliary=auxiliary)
    run(first, cut)
    parts = {"mils": first, "model": first.model, "optimizer": first.optimizers[0]}
    torch.save(
        {name: part.state_dict() for name, part in parts.items()} | {"rng": torch.get_rng_state()}, tmp_path / "f"
    )

    second = build(auxiliary=auxiliary, generator=torch.Generator().manual_seed(77))
    kept = torch.load(tmp_path / "f", weights_only=True)
    second.model.load_state_dict(kept["model"])
    second.optimizers[0].load_state_dict(kept["optimizer"])
    second.load_state_dict(kept["mils"])
    torch.set_rng_state(kept["rng"])
    resumed = run(second, 20 - cut, cut)
    assert [(float(s.loss), *s[1:]) for s in resumed] == [(float(s.loss), *s[1:]) for s in wanted[cut:]]
    assert same(state(second), state(whole))
    assert second.statistics() == whole.statistics()


class Wavering:
    """A loss that draws from a generator of its own."""

    def __init__(self) -> None:
        self.chance = random.Random(4)

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.chance.random() * nn.functional.cross_entropy(output, target)


def fixed() -> tuple[torch.Tensor, torch.Tensor]:
    return X[:32], Y[:32]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda mils: pickle.loads(pickle.dumps(mils))])
@pytest.mark.parametrize("observation", [(TensorDataset(X, Y), 32), fixed(), fixed], ids=["drawn", "pair", "function"])
@pytest.mark.parametrize("done", [0, 10])
def test_a_copy_goes_on_alike(done: int, observation: Any, copied: Any) -> None:
    """Model, optimizer, coins and observation sets with it, and nothing shared: before the first attempt and after."""
    mils = build(observation=observation, auxiliary=[Wavering(), worse])
    run(mils, done)
    chance = torch.get_rng_state()
    other = copied(mils)
    steps = run(mils, 12, done)
    assert any(step.accepted is False for step in steps)
    ended = state(mils)
    torch.set_rng_state(chance)
    for mine, its in zip(steps, run(other, 12, done), strict=True):
        assert same(mine, its)
    assert same(state(other), ended) and same(state(mils), ended)
    assert other.statistics() == mils.statistics()


def test_a_wrong_state_dict_changes_nothing() -> None:
    mils = build()
    run(mils, 3)
    before = mils.state_dict()
    with pytest.raises(ValueError, match="state_dict must have the keys"):
        mils.load_state_dict({"coins": []})
    other = build(auxiliary=[nan_loss]).state_dict()
    with pytest.raises(ValueError, match=r"state_dict must be of the auxiliary losses \['MultiMarginLoss'\], got"):
        mils.load_state_dict(other)
    with pytest.raises((TypeError, RuntimeError)):
        mils.load_state_dict({**before, "coins": [], "generator": torch.zeros(3, dtype=torch.uint8)})
    assert same(mils.state_dict(), before)


# ---- what it costs ---------------------------------------------------------------------------------------------------


def looks(mils: MILS) -> tuple[int, list[str]]:
    with Count() as count:
        mils.step(X, Y)
    names = [name for name in count.seen if "nonzero" in name or "is_nonzero" in name or "masked_select" in name]
    return sum("_local_scalar_dense" in name for name in count.seen), names


class Plain(nn.Module):
    """A cross entropy that does not look at its labels, as none does on a GPU."""

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return -output.log_softmax(1).gather(1, target.unsqueeze(1)).mean()


@pytest.mark.parametrize("observation", [(TensorDataset(X, Y), 32), (X, Y)], ids=["drawn", "fixed"])
def test_synchronisations(observation: Any) -> None:
    """None on an ordinary iteration, one on an attempt, whether it is accepted or not."""
    model = Network()
    # Fused: the plain forms look at their own step counters, which are on the CPU.
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    options = {"primary": Plain(), "observation": observation}
    mils = build(model, optimizer, auxiliary=Plain(), participation=0.0, **options)
    assert looks(mils) == (0, [])
    mils = build(model, optimizer, auxiliary=nan_loss, participation=1.0, **options)
    assert looks(mils) == (1, [])
    mils = build(model, optimizer, auxiliary=Plain(), participation=1.0, accept="not_worse", **options)
    assert looks(mils) == (1, [])


def test_an_ordinary_iteration_is_a_plain_one() -> None:
    """The same operators in the same order, so nothing to measure on the device."""
    mils = build(participation=0.0)
    with Count() as ours:
        mils.step(X, Y)
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    with Count() as plain:
        optimizer.zero_grad()
        loss = mlkernels.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
    free = {"aten.detach.default", "aten.view.default", "aten.rand.generator"}  # no work, and the coins once in 256
    assert [name for name in ours.seen if name not in free] == [name for name in plain.seen if name not in free]


def test_what_an_attempt_runs() -> None:
    passes = []

    class Counting(Network):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            passes.append((self.training, torch.is_grad_enabled()))
            return super().forward(input)

    mils = build(Counting(), auxiliary=nan_loss, participation=1.0)
    mils.step(X, Y)
    assert passes == [(False, False), (True, True), (False, False), (True, True)]


# ---- faults ----------------------------------------------------------------------------------------------------------


class Assigning(torch.optim.SGD):
    """As some optimizers do, it gives every parameter other memory; and it may fail after the first."""

    fails = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.data = parameter - 0.1 * parameter.grad
            self.state[parameter]["steps"] = self.state[parameter].get("steps", 0) + 1
            if self.fails:
                raise ArithmeticError("here")


def test_a_rejected_step_by_assignment() -> None:
    ends = []
    for participation in (1.0, 0.0):
        torch.manual_seed(1)
        model = Network()
        mils = build(model, Assigning(model.parameters()), auxiliary=worse, participation=participation)
        assert {step.accepted for step in run(mils, 3)} == {False if participation else None}
        ends.append(state(mils))
    assert same(*ends)


class Fickle:
    """A loss that is no module and counts its calls."""

    def __init__(self) -> None:
        self.calls, self.scale = 0, torch.ones(1)

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.scale *= 2
        return nan_loss(output, target) * self.scale.sum()


def test_a_loss_that_is_an_object() -> None:
    loss = Fickle()
    mils = build(participation=1.0, auxiliary=loss)
    run(mils, 3)
    assert loss.calls == 0 and loss.scale == 1.0 and mils.statistics().attempts == 3


@pytest.mark.parametrize(
    "where",
    ["observation", "auxiliary", "hook", "second score", "shape", "interrupt", "model", "optimizer", "save", "load"],
)
def test_an_exception_restores_before_it_propagates(where: str) -> None:
    """Coins and samples too, so that the next call tries the same."""
    calls = [0]

    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt if where == "interrupt" else ArithmeticError("here")

    def logits(output: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return fail() if where == "second score" and calls[0] % 2 == 0 else output

    options: dict[str, Any] = {"logits": logits}
    if where == "observation":
        options["observation"] = fail
    elif where in ("auxiliary", "interrupt"):
        options["auxiliary"] = fail
    elif where == "hook":
        options["before_step"] = fail
    elif where == "shape":
        options["auxiliary"] = nn.MultiMarginLoss(reduction="none")
    elif where == "load":
        part = Average()
        part.load_state_dict = fail  # type: ignore[method-assign]
        options |= {
            "extras": [part],
            "auxiliary": lambda *pair: setattr(part, "updates", part.updates + 1) or worse(*pair),
        }
    model = Network()
    optimizer = Assigning(model.parameters())
    mils = build(model, optimizer, **options, participation=1.0)
    optimizer.fails = where == "optimizer"
    if where == "model":
        model.body[1].register_forward_hook(lambda *_: fail() if torch.is_grad_enabled() else None)
    if where == "save":
        optimizer.state[model.classifier.weight]["own"] = iter([1])
    for parameter in mils.model.parameters():
        parameter.grad = None
    kept = mils.state_dict()
    before = state(mils) if where != "save" else None
    expected = {"shape": ValueError, "interrupt": KeyboardInterrupt, "save": TypeError, "load": RuntimeError}
    with pytest.raises(expected.get(where, ArithmeticError)):
        mils.step(X, Y)
    assert where == "save" or same(state(mils), before)
    coins = mils.state_dict()["coins"]
    assert same(mils.state_dict() | {"coins": [], "generator": 0}, kept | {"coins": [], "generator": 0})
    with pytest.raises(expected.get(where, ArithmeticError)):
        mils.step(X, Y)
    assert mils.state_dict()["coins"] == coins and len(coins) == 256
    assert mils.model.training
    statistics = mils.statistics()
    assert (statistics.iterations, statistics.attempts) == (0, 0)


LINEAR = nn.Linear(6, CLASSES)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


def key(value: Any) -> str | None:
    """Names that are the same in every process."""
    return "+".join(value) if isinstance(value, dict) else "" if isinstance(value, str) else None


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"participation": 1.5}, ValueError, r"participation must be in \[0, 1\], got 1.5"),
        ({"participation": math.nan}, ValueError, "participation must be"),
        ({"participation": "often"}, TypeError, "participation"),
        ({"accept": "always"}, ValueError, "accept must be 'improves' or 'not_worse', got 'always'"),
        ({"primary": None}, TypeError, r"primary takes a function of \(output, target\), got NoneType"),
        ({"auxiliary": []}, ValueError, "auxiliary must hold at least one loss, got none"),
        ({"auxiliary": 3}, TypeError, "auxiliary takes functions"),
        ({"auxiliary": {"primary": nan_loss}}, ValueError, "auxiliary must have names other than 'primary'"),
        ({"observation": 7}, TypeError, r"observation takes \(dataset, n\), \(input, target tensor\)"),
        ({"observation": (TensorDataset(X, Y), 0)}, ValueError, "observation must draw from 1 to 96 samples, got 0"),
        ({"observation": (TensorDataset(X, Y), 97)}, ValueError, "observation must draw from 1 to 96 samples, got 97"),
        ({"observation": (TensorDataset(X, Y), True)}, ValueError, "observation must draw"),
        ({"observation": (TensorDataset(X[:0], Y[:0]), 1)}, ValueError, "observation must hold at least one sample"),
        ({"observation": (X[:0], Y[:0])}, ValueError, "observation must hold at least one sample, got none"),
        ({"observation": (Endless(), 5)}, TypeError, "observation takes a dataset with a length and indices"),
        ({"generator": 3}, TypeError, "generator takes a torch.Generator, got int"),
        ({"forward": 3}, TypeError, "forward takes a function, got int"),
        ({"logits": 0}, TypeError, "logits takes a function, got int"),
        ({"before_step": 1.0}, TypeError, "before_step takes a function, got float"),
        ({"autocast": True}, TypeError, "autocast takes a torch.autocast, got bool"),
        ({"scaler": True}, TypeError, "scaler takes a torch.amp.GradScaler, got bool"),
        ({"extras": [3]}, TypeError, "parts.* takes an object with state_dict"),
        ({"optimizer": 3}, TypeError, "optimizer takes an optimizer or a sequence of them, got int"),
        ({"optimizer": [3]}, TypeError, "optimizer takes an optimizer or a sequence"),
        ({"model": 3}, TypeError, "model takes an nn.Module, got int"),
        ({"optimizer": [torch.optim.LBFGS([nn.Parameter(X)])] * 2}, ValueError, "optimizer must be alone"),
    ],
    ids=key,
)  # fmt: skip
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"model": LINEAR, "optimizer": torch.optim.SGD(LINEAR.parameters())} | options
    with pytest.raises(error, match=message):
        build(**options)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"observation": lambda: 3}, ValueError, r"observation must return \(input, target\), got int"),
        ({"observation": lambda: (X[:0], Y[:0])}, ValueError, "observation must hold at least one sample, got none"),
        ({"observation": lambda: (X, Y[:3])}, ValueError, r"one label per row of logits \(96, 4\), got \(3,\)"),
        ({"observation": (TensorDataset(X), 8)}, ValueError, "must hold pairs"),
        ({"logits": lambda output: [output]}, TypeError, "logits must select a tensor from the model's output"),
        ({"auxiliary": lambda output, target: 3.0}, ValueError, "auxiliary '<lambda>' must return a scalar loss, got"),
        ({"primary": lambda output, target: output, "participation": 0.0}, ValueError, "primary must return a scalar"),
    ],
    ids=key,
)  # fmt: skip
def test_bad_results(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(**({"participation": 1.0} | options)).step(X, Y)


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="batches must hold at least one"):
        build().accumulate([])


def test_a_compiled_model() -> None:
    """In both modes, and back in training."""
    model = Network()
    start = copy.deepcopy(model.state_dict())
    compiled = torch.compile(model, backend="eager")
    mils = build(compiled, torch.optim.SGD(model.parameters(), lr=0.1), participation=1.0, auxiliary=nan_loss)
    assert run(mils, 2)[1].accepted is False
    assert all(module.training for module in compiled.modules())
    other = Network()
    never = build(torch.compile(other, backend="eager"), torch.optim.SGD(other.parameters(), lr=0.1), participation=0.0)
    other.load_state_dict(start)
    run(never, 2)
    assert same(model.state_dict(), other.state_dict())
